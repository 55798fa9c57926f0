"""Traffic matrices in results and reports: sums by hand, and what the detailed mode's links carried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.event_log import EventLog, EventRecorder
from moeplan.artifacts.simulation_result import TrafficMatrix
from moeplan.pipeline.report import report
from moeplan.pipeline.simulate import simulate, write_simulation
from moeplan.reports.document import Picture, Table
from moeplan.reports.run_report import traffic_section
from moeplan.reports.wording import format_percent
from moeplan.specs.models import find_model
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Objective

DEMO = Path(__file__).resolve().parents[3] / "moeplan" / "data" / "demo_trace.npz"
MODEL = find_model("deepseek-v2-lite")
WIRE = 4 * MODEL.hidden_size  # bf16 there and back
SERVING: dict[str, Any] = {
    "model": "deepseek-v2-lite", "trace": str(DEMO), "cluster": "h100", "ranks": 4, "nodes": 2, "profile": "none",
    "objective": {"dispatch": "per_expert"},
    "serving": {
        "requests": {"arrivals": "gamma", "cv": 2, "rate": "60 /s", "count": 8,
                     "input_tokens": {"low": 50, "high": 400}, "output_tokens": {"low": 2, "high": 6}},
        "engine": {"max_num_batched_tokens": 256},
    },
}  # fmt: skip


def _serving(**serving: Any) -> Scenario:
    return Scenario.parse({**SERVING, "serving": {**SERVING["serving"], **serving}}, "test")


def _step_tokens(log: EventLog | None) -> float:
    assert log is not None
    return float(log.amount_V[log.of_kind("step")].sum())


def test_every_pair_of_an_even_load_is_in_the_matrix() -> None:
    found = simulate(_serving(experts={"mode": "balanced"}, role="decode"), seeds=1)
    (traffic,) = found.result.traffic
    # Every expert alike: wherever tokens are at home, 3 of 4 pairs leave their rank.
    pairs = _step_tokens(found.log) * MODEL.num_moe_layers * MODEL.top_k
    sent_RR = np.array(traffic.sent)
    assert sent_RR.sum() * traffic.steps == pytest.approx(pairs * 3 / 4 * WIRE, rel=1e-5)
    np.testing.assert_array_equal(sent_RR, sent_RR.T)  # as much comes back, in the same type
    assert traffic.steps == found.result.counts["steps"]
    assert "expected from loads" in traffic.source


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_detailed_mode_sends_as_many_bytes(drafts: int) -> None:
    """Its exchanges are played transfer by transfer: all that ranks sent is what the matrix says."""
    engine: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 64}
    if drafts:
        engine["speculative"] = {"num_speculative_tokens": drafts, "accept_length": 1.5}
    scenario = _serving(experts={"mode": "balanced"}, engine=engine).model_copy(update={"fidelity": "detailed"})
    # Of copies per node those that a forwarder keeps are played, too.
    scenario = scenario.model_copy(update={"objective": Objective(dispatch="per_rank")})
    found = simulate(scenario, seeds=1)
    (traffic,), log = found.result.traffic, found.log
    assert log is not None
    for rank in range(4):
        mine = log.of_kind("dispatch", "combine") & (log.rank_V == rank)
        sent = sum(traffic.sent[rank]) * traffic.steps
        assert float(log.amount_V[mine].sum()) == pytest.approx(sent, rel=1e-4)


def test_rebalancing_shows_the_first_placement_beside() -> None:
    spec = {"interval": "50 ms", "window": "50 ms", "planner": "greedy"}
    found = simulate(_serving(rebalance=spec, experts={"mode": "replay", "windows": 4, "window": "40 ms"}), seeds=1)
    (traffic,) = found.result.traffic
    assert traffic.unchanged is not None
    assert traffic.source == "counted on 1,200 recorded tokens"  # of the windows that were played
    assert np.array(traffic.unchanged).sum() == pytest.approx(np.array(traffic.sent).sum(), rel=0.2)
    assert traffic.unchanged != traffic.sent
    assert simulate(_serving(), seeds=1, keep_log=False).result.traffic == ()


def test_both_pools_have_their_own(tmp_path: Path) -> None:
    found = simulate(_serving(prefill={"ranks": 2, "instances": 2}), seeds=1)
    names = {matrix.name: len(matrix.sent) for matrix in found.result.traffic}
    assert names == {"prefill, mean of 2 instances": 2, "decode": 4}
    write_simulation(found, tmp_path / "run")
    report([tmp_path / "run"], tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    section = next(s for s in document["sections"] if s["title"] == "Traffic from rank to rank")
    assert [row[0] for row in section["blocks"][-1]["rows"]] == list(names)
    assert "4 by 4 ranks" in section["blocks"][1]["picture"]


@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("full", 3)])
def test_training_passes_each_layer_forward_and_backward(recompute: str, passes: int) -> None:
    document = {
        "model": "deepseek-v2-lite", "cluster": "h100", "ranks": 32, "nodes": 4, "profile": "none",
        "objective": {"dispatch": "per_expert"},
        "training": {"global_batch": 64, "pp": 2, "ep": 16, "experts": "balanced", "recompute": recompute},
    }  # fmt: skip
    result = simulate(Scenario.parse(document, "test"), seeds=1).result
    (traffic,) = result.traffic
    # A group of 16 of each stage's 16 ranks takes the whole batch of 64 sequences of 4096 through its layers.
    pairs = 64 * 4096 * MODEL.num_moe_layers * MODEL.top_k
    assert np.array(traffic.sent).sum() == pytest.approx(pairs * 15 / 16 * WIRE * passes, rel=1e-6)
    assert len(traffic.sent) == 16


def test_nodes_stand_for_very_many_ranks() -> None:
    sent_RR = np.arange(200.0**2).reshape(200, 200)
    found = TrafficMatrix.of("all", sent_RR, None, 1, 8, "counted")
    assert (found.places, len(found.sent), found.per_node) == ("node", 25, 1)
    assert found.sent[2][1] == sent_RR[16:24, 8:16].sum()
    assert TrafficMatrix.of("one node", sent_RR, None, 1, 200, "counted").places == "rank"


def test_the_page_names_nodes_where_nodes_stand_for_ranks() -> None:
    sent_RR = np.random.default_rng(0).uniform(1e6, 2e6, (176, 176))
    section = traffic_section({"run": [TrafficMatrix.of("decode", sent_RR, None, 1, 8, "counted")]})
    assert section is not None
    picture, table = section.blocks
    assert isinstance(picture, Picture)
    assert isinstance(table, Table)
    assert "decode: 22 by 22 nodes" in picture.label
    assert "lines part nodes" not in picture.svg
    inside = np.trace(sent_RR.reshape(22, 8, 22, 8).sum((1, 3)))
    assert table.rows[0][2] == format_percent(1 - inside / sent_RR.sum())
    assert table.columns[3] == "busiest node"


def test_a_live_runs_log_tells(tmp_path: Path) -> None:
    recorder = EventRecorder()
    recorder.add("step", 0.0, 1.0, rank=0, step=0)
    traffic = TrafficMatrix.of("live run", np.array([[0.0, 3e6], [1e6, 0.0]]), None, 1, 1, "every row of tokens")
    log = recorder.build("measured", 2, 2, {"traffic": [traffic.model_dump(mode="json")]})
    log.write(tmp_path / "events.parquet")
    report([tmp_path], tmp_path / "r.md")
    markdown = (tmp_path / "r.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "| live run | 4.00 MB | 100.0 % | 3.00 MB | 1 |" in markdown
