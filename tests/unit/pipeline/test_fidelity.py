"""Step and detailed mode from the command line: where both apply they agree, where one does not it says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from moeplan.artifacts.event_log import EventLog
from moeplan.cli import cli
from moeplan.errors import SpecError
from moeplan.pipeline.report import report
from moeplan.pipeline.simulate import simulate
from moeplan.pipeline.training import simulate_training
from moeplan.specs.models import find_model
from moeplan.specs.scenario import Scenario

DEMO = Path(__file__).resolve().parents[3] / "moeplan" / "data" / "demo_trace.npz"
SERVING: dict[str, Any] = {
    "model": "deepseek-v2-lite", "trace": str(DEMO), "cluster": "h100", "ranks": 4, "nodes": 2, "profile": "none",
    "serving": {
        "requests": {"arrivals": "gamma", "cv": 2, "rate": "60 /s", "count": 6,
                     "input_tokens": {"low": 50, "high": 400}, "output_tokens": {"low": 2, "high": 6}},
        "engine": {"max_num_batched_tokens": 256},
    },
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "model": "deepseek-v2-lite", "trace": str(DEMO), "cluster": "h100", "ranks": 32, "nodes": 4,
    "training": {"global_batch": 64, "pp": 2, "ep": 16, "windows": 2},
}  # fmt: skip


def _command(tmp_path: Path, document: dict[str, Any], fidelity: str) -> tuple[dict[str, float], EventLog]:
    place = tmp_path / "scenario.json"
    place.write_text(json.dumps(document))
    out = tmp_path / fidelity
    words = ["simulate", str(place), "--fidelity", fidelity, "--seeds", "1", "--out", str(out), "--json", "--quiet"]
    ran = CliRunner().invoke(cli, words)
    assert ran.exit_code == 0, ran.output
    lines = json.loads(ran.stdout)["headlines"]
    return {name: line["value"] for name, line in lines.items()}, EventLog.read(out / "events.parquet")


@pytest.mark.parametrize(
    ("overlap", "drafts", "dense"), [("none", 0, 0), ("shared_expert", 0, 0), ("none", 2, 0), ("none", 2, 10944)]
)
def test_serving_agrees_within_two_per_cent(tmp_path: Path, overlap: str, drafts: int, dense: int) -> None:
    document = json.loads(json.dumps(SERVING))
    if dense:  # a prediction layer without experts
        model = find_model("deepseek-v2-lite").model_copy(update={"prediction_intermediate_size": dense})
        (tmp_path / "model.json").write_text(model.model_dump_json())
        document["model"] = str(tmp_path / "model.json")
    document["serving"]["engine"]["overlap"] = overlap
    if drafts:
        speculative = {"num_speculative_tokens": drafts, "accept_length": 1.5}
        document["serving"]["engine"] |= {"speculative": speculative, "max_num_seqs": 64}
    whole, log = _command(tmp_path, document, "step")
    played, inside = _command(tmp_path, document, "detailed")
    for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "e2e_p50_s", "output_tokens_per_s", "exchange_share"):
        assert played[name] == pytest.approx(whole[name], rel=0.02), name
    # Every rank computes the experts of all 26 MoE layers in every step, and of the prediction layer for drafts; the
    # step mode looks into one step's first 3.
    steps, mine = int(inside.of_kind("step").sum()), inside.of_kind("experts")
    assert (mine & (inside.layer_V < 26)).sum() == steps * 26 * 4
    passes = (mine & (inside.layer_V == 26)).sum() / 4
    assert passes == 0 if dense or not drafts else steps <= passes <= steps * drafts
    assert log.of_kind("experts").sum() == 3 * 4
    assert len(np.unique(log.step_V[log.of_kind("experts")])) == 1
    for each in (log, inside):  # what happens inside a step happens between its ends
        for step in np.unique(each.step_V[each.of_kind("experts")]):
            mine = each.step_V == step
            ends = each.start_s_V + each.duration_s_V
            [at] = np.flatnonzero(mine & each.of_kind("step"))
            assert each.start_s_V[mine].min() >= each.start_s_V[at] - 1e-9
            assert ends[mine].max() <= ends[at] + 2e-9


def test_parts_of_a_ranks_time_add_up_where_work_lies_side_by_side() -> None:
    document = json.loads(json.dumps(SERVING))
    document["serving"]["engine"]["overlap"] = "shortcut"
    shares = {}
    for fidelity in ("step", "detailed"):
        scenario = Scenario.parse(document | {"fidelity": fidelity}, "test")
        ranks = simulate(scenario, seeds=1, keep_log=False).result.ranks
        assert ranks is not None
        total = np.sum([ranks.compute, ranks.exchange, ranks.bubble, ranks.idle], axis=0)
        assert total == pytest.approx(np.ones(4), abs=1e-6)
        shares[fidelity] = np.array(ranks.compute)
    assert shares["detailed"] == pytest.approx(shares["step"], rel=0.05)


def test_reports_look_inside_a_step(tmp_path: Path) -> None:
    """Both modes have a picture of a step and of memory; loads of all layers are known where all were played."""
    titles = {}
    for fidelity in ("step", "detailed"):
        _command(tmp_path, SERVING, fidelity)
        found = report([tmp_path / fidelity], tmp_path / f"{fidelity}.html")
        titles[fidelity] = [section.title for section in found.document.sections]
        page = (tmp_path / f"{fidelity}.html").read_text(encoding="utf-8")
        assert "4 ranks" in re.findall(r'aria-label="(Step [^"]*)"', page)[0]
        assert re.search(r'aria-label="Memory of every rank: 4 ranks, at most [\d.]+ GiB of 79.6 GiB', page)
    assert "Load of every rank in every layer" in titles["detailed"]
    assert "Load of every rank in every layer" not in titles["step"]
    both = report([tmp_path / "detailed", tmp_path / "detailed"]).markdown()
    assert both.count("heat map of 26 layers by 4 ranks") >= 2


@pytest.mark.parametrize(
    "training",
    [{}, {"overlap": "shared_expert", "tp": 2, "cp": 2}, {"recompute": "full", "virtual_stages": 2, "mtp_layers": 1}],
    ids=["plain", "shared", "full"],
)
def test_training_agrees_within_two_per_cent(tmp_path: Path, training: dict[str, Any]) -> None:
    document = {**TRAINING, "training": TRAINING["training"] | training}
    whole, _ = _command(tmp_path, document, "step")
    played, log = _command(tmp_path, document, "detailed")
    for name in ("step_s", "tokens_per_s", "bubble_share", "exposed_exchange_share"):
        assert played[name] == pytest.approx(whole[name], rel=0.02), name
    micro_batches = int(log.of_kind("forward").sum()) // 2 // training.get("virtual_stages", 1)
    layers = 26 + training.get("mtp_layers", 0)
    assert log.of_kind("dispatch").sum() == layers * 16 * micro_batches * 2
    assert set(log.layer_V[log.of_kind("experts")].tolist()) == set(range(26))


def test_what_cannot_be_played_is_refused() -> None:
    engine = {"engine": {"pp": 2}}
    with pytest.raises(SpecError, match=r"plays the ranks of one pipeline stage, but engine.pp is 2"):
        simulate(Scenario.parse({**SERVING, "serving": SERVING["serving"] | engine, "fidelity": "detailed"}, "t"))
    overlap = {"training": TRAINING["training"] | {"overlap": "1f1b"}, "fidelity": "detailed"}
    with pytest.raises(SpecError, match=r"training.overlap is 1f1b, which hides one behind another; use"):
        simulate_training(Scenario.parse({**TRAINING, **overlap}, "t"))


def test_a_slow_link_is_slow_in_both_modes() -> None:
    cluster = {"accelerator": "h100", "num_nodes": 2, "ranks_per_node": 2, "ranks": {"1": {"link_speed": 0.2}}}
    fields = {name: value for name, value in SERVING.items() if name not in ("ranks", "nodes")}
    fields["objective"] = {"dispatch": "allgather"}
    requests = {"arrivals": "constant", "rate": "1 /s", "count": 2, "input_tokens": 4096, "output_tokens": 1}
    fields["serving"] = {"requests": requests, "engine": {"tp": 4}}
    values: dict[str, list[float]] = {}
    for mode in ("step", "detailed"):
        for name in ("slow", "built"):
            place = cluster if name == "slow" else {**cluster, "ranks": {}}
            scenario = Scenario.parse({**fields, "cluster": place, "fidelity": mode}, "t")
            found = simulate(scenario, seeds=1, keep_log=False)
            values.setdefault(name, []).append(found.result.headlines["ttft_mean_s"].value)
    assert values["slow"][0] > 1.2 * values["built"][0]
    assert values["slow"][1] == pytest.approx(values["slow"][0], rel=0.1)
    assert values["slow"][1] > 1.2 * values["built"][1]
