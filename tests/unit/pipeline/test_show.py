from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from moeplan.artifacts.plan import Plan
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.cli.report import command as report
from moeplan.cli.show import show
from moeplan.errors import InputError, PlanError, TraceError
from moeplan.files import sha256_file
from moeplan.pipeline.show import contiguous_like, pair_traffic, show_plan, step_traffic
from moeplan.routing.io import save_trace
from moeplan.routing.loads import expert_load
from moeplan.specs.workload import Objective, Workload

TOKENS, LAYERS, TOP_K, EXPERTS, RANKS = 40, 3, 2, 6, 4
ROWS = ((0, 3, 1, 4, 2, 5, 0, 1), (5, 4, 3, 2, 1, 0, 4, 5), (0, 1, 2, 3, 4, 5, 1, 2))


def plan_of(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model": "tiny",
        "planner": "joint",
        "status": "feasible",
        "seed": 0,
        "num_experts": EXPERTS,
        "num_ranks": RANKS,
        "ranks_per_node": 2,
        "num_redundant_experts": 2,
        "layer_ids": (1, 2, 3),
        "physical_to_logical_map": ROWS,
        "rank_of_slot": (0, 0, 1, 1, 2, 2, 3, 3),
        "replicas": tuple(tuple(row.count(e) for e in range(EXPERTS)) for row in ROWS),
        "objective": Objective(dispatch="per_expert"),
        "workload": Workload(),
    }
    return Plan.model_validate(fields | changes)


def trace_of(**changes: Any) -> RoutingTrace:
    rng = np.random.default_rng(3)
    experts = rng.permuted(np.tile(np.arange(EXPERTS), (TOKENS, LAYERS, 1)), axis=2)[:, :, :TOP_K]
    trace = RoutingTrace(experts_TLK=experts.astype(np.int16), num_experts=EXPERTS, layer_ids=(1, 2, 3))
    return replace(trace, **changes)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    plan_of().save(tmp_path / "plan.json")
    save_trace(trace_of(), tmp_path / "trace.npz")
    return tmp_path / "plan.json", tmp_path / "trace.npz"


def ranks_of(layer: int, expert: int) -> list[int]:
    """Ranks of the copies of an expert, from the table above."""
    return [slot // 2 for slot, held in enumerate(ROWS[layer]) if held == expert]


def test_pair_traffic_against_counting_tokens() -> None:
    home_T = np.arange(TOKENS, dtype=np.int32) % RANKS
    trace = trace_of(source_rank_T=home_T)
    want = np.zeros((RANKS, RANKS))
    for token, layer, k in itertools.product(range(TOKENS), range(LAYERS), range(TOP_K)):
        copies = ranks_of(layer, int(trace.experts_TLK[token, layer, k]))
        for rank in copies:
            want[home_T[token], rank] += 1 / len(copies)
    source = expert_load(trace).source_SLE
    assert source is not None
    np.testing.assert_allclose(pair_traffic(plan_of().placement, source), want)


def test_step_traffic_against_counting_tokens(files: tuple[Path, Path]) -> None:
    trace = trace_of()
    want = np.zeros((RANKS, RANKS))
    for token, layer in itertools.product(range(TOKENS), range(LAYERS - 1)):
        for here, there in itertools.product(trace.experts_TLK[token, layer], trace.experts_TLK[token, layer + 1]):
            sources, targets = ranks_of(layer, int(here)), ranks_of(layer + 1, int(there))
            for source, target in itertools.product(sources, targets):
                want[source, target] += 1 / TOP_K / len(sources) / len(targets)
    plan_of(objective=Objective(return_mode="stay")).save(files[0])
    evidence = show_plan(files[0], trace_path=files[1]).evidence
    assert evidence.traffic_after_RR is not None
    np.testing.assert_allclose(evidence.traffic_after_RR, want)
    assert step_traffic(plan_of().placement, np.zeros((2, EXPERTS, EXPERTS))).sum() == 0


def test_unknown_homes_are_spread_evenly(files: tuple[Path, Path]) -> None:
    shown = show_plan(files[0], trace_path=files[1])
    traffic = shown.evidence.traffic_after_RR
    assert traffic is not None
    assert traffic.sum() == pytest.approx(TOKENS * LAYERS * TOP_K)
    np.testing.assert_allclose(traffic, np.tile(traffic[0], (RANKS, 1)))
    assert "spread evenly" in shown.evidence.traffic_note


def test_nodes_and_ranks_per_token_against_counting(files: tuple[Path, Path]) -> None:
    single = ((0, 1, 2, 3, 4, 5),) * LAYERS  # no copies, so that there is nothing to choose
    plan = plan_of(
        physical_to_logical_map=single,
        rank_of_slot=(0, 0, 1, 2, 3, 3),
        replicas=((1,) * EXPERTS,) * LAYERS,
        num_redundant_experts=0,
    )
    plan.save(files[0])
    rank_E = np.array([0, 0, 1, 2, 3, 3])
    rank_TLK = rank_E[trace_of().experts_TLK]
    rows = show_plan(files[0], trace_path=files[1]).summary()["layers"]
    for layer, row in enumerate(rows):
        ranks = [len(set(token)) for token in rank_TLK[:, layer].tolist()]
        nodes = [len(set(token)) for token in (rank_TLK[:, layer] // 2).tolist()]
        assert row["ranks_per_token"] == pytest.approx(np.mean(ranks))
        assert row["nodes_per_token"] == pytest.approx(np.mean(nodes))
        assert row["nodes_per_token_before"] is not None
        assert row["same_node_share"] is None


def test_same_node_share_in_stay_mode(files: tuple[Path, Path]) -> None:
    plan_of(objective=Objective(return_mode="stay")).save(files[0])
    shown = show_plan(files[0], trace_path=files[1])
    shares = [row["same_node_share"] for row in shown.summary()["layers"]]
    assert shares[-1] is None
    traffic = shown.evidence.traffic_after_RR
    assert traffic is not None
    inside = traffic[:2, :2].sum() + traffic[2:, 2:].sum()
    assert np.mean(shares[:-1]) == pytest.approx(inside / traffic.sum())


def test_homes_on_ranks_that_the_plan_lacks_are_spread_and_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    save_trace(trace_of(source_rank_T=np.full(TOKENS, 7, np.int32)), tmp_path / "wide.npz")
    shown = show_plan(files[0], trace_path=tmp_path / "wide.npz")
    assert "at home on rank 7, which holds no slot of the plan" in shown.messages[0]
    assert "spread evenly" in shown.evidence.traffic_note
    save_trace(trace_of(source_rank_T=np.full(TOKENS, 2, np.int32)), tmp_path / "fits.npz")
    traffic = show_plan(files[0], trace_path=tmp_path / "fits.npz").evidence.traffic_after_RR
    assert traffic is not None
    assert np.flatnonzero(traffic.sum(axis=1)).tolist() == [2]


def test_allgather_has_no_traffic_to_show(files: tuple[Path, Path]) -> None:
    plan_of(objective=Objective(dispatch="allgather")).save(files[0])
    evidence = show_plan(files[0], trace_path=files[1]).evidence
    assert evidence.traffic_after_RR is None
    assert "allgather sends every token to every rank" in evidence.traffic_note


def test_compares_with_contiguous_or_with_a_given_plan(files: tuple[Path, Path], tmp_path: Path) -> None:
    first = show_plan(files[0], trace_path=files[1])
    assert first.summary()["compared_with"] == "contiguous"
    assert first.evidence.before is not None
    np.testing.assert_array_equal(first.evidence.before.physical_to_logical_LP[0], [0, 1, 2, 3, 4, 5, 0, 1])
    plan_of(physical_to_logical_map=(ROWS[0],) * 3).save(tmp_path / "old.json")
    second = show_plan(files[0], trace_path=files[1], before_path=tmp_path / "old.json")
    assert second.summary()["compared_with"] == "old.json"
    assert second.evidence.before is not None
    assert second.evidence.before.physical_to_logical_LP[2].tolist() == list(ROWS[0])
    plan_of(num_ranks=8, ranks_per_node=2).save(tmp_path / "other.json")
    with pytest.raises(PlanError, match=r"num_ranks of the plan before \(8\) differs from this plan's \(4\)"):
        show_plan(files[0], before_path=tmp_path / "other.json")


def test_contiguous_keeps_failed_ranks_empty() -> None:
    plan = plan_of(rank_of_slot=(0, 0, 0, 1, 1, 1, 3, 3))
    placement = contiguous_like(plan, expert_load(trace_of()))
    assert set(placement.rank_of_slot_P.tolist()) == {0, 1, 3}


def test_phase_and_layers_are_matched(files: tuple[Path, Path], tmp_path: Path) -> None:
    phase = (np.arange(TOKENS) < 10).astype(np.uint8)  # the first ten are decode
    save_trace(trace_of(phase_T=phase), tmp_path / "phases.npz")
    load = show_plan(files[0], trace_path=tmp_path / "phases.npz").evidence.load_LE
    assert load is not None
    np.testing.assert_array_equal(load.sum(axis=1), [30 * TOP_K] * 3)
    plan_of(layer_ids=(3, 1), physical_to_logical_map=ROWS[:2], replicas=plan_of().replicas[:2]).save(files[0])
    picked = show_plan(files[0], trace_path=files[1]).evidence.load_LE
    whole = expert_load(trace_of()).load_LE
    assert picked is not None
    np.testing.assert_array_equal(picked, whole[[2, 0]])


def test_layers_numbered_from_zero_are_taken_in_order_and_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", expert_load(trace_of()).load_LE)
    shown = show_plan(files[0], trace_path=tmp_path / "counts.npy")
    assert shown.messages == ("counts.npy numbers its layers from 0; they are taken as the plan's, in order",)


def test_the_load_is_of_the_domain_planned_on_and_another_is_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    law_T = np.arange(TOKENS) < 10
    named = tmp_path / "named.npz"
    save_trace(trace_of(domain_T=np.where(law_T, 0, 1).astype(np.int32), domains=("law", "code")), named)
    plan_of(provenance={"trace_sha256": sha256_file(named), "domain": "law"}).save(files[0])

    def shown(trace: Path, **options: str) -> tuple[float, str]:
        found = show_plan(files[0], trace_path=trace, html_path=tmp_path / "page.html", **options)  # type: ignore[arg-type]
        assert found.evidence.load_LE is not None
        assert found.messages == ((found.evidence.load_note,) if found.evidence.load_note else ())
        assert found.evidence.load_note in (tmp_path / "page.html").read_text(encoding="utf-8")
        return found.evidence.load_LE[0].sum() / TOP_K, found.evidence.load_note

    assert shown(named) == shown(named, trace_domain="law") == (10, "")
    tokens, note = shown(named, trace_domain="code")
    assert (tokens, note.partition(": ")[2]) == (
        30, "it is domain code of named.npz; the plan and its own figures are of domain law of it"
    )  # fmt: skip
    tokens, note = shown(files[1])  # has no domains
    assert (tokens, note.partition(": ")[2]) == (
        TOKENS, "it is all of trace.npz; the plan and its own figures are of domain law of another trace"
    )  # fmt: skip
    with pytest.raises(TraceError, match="no domain 'wiki'"):
        show_plan(files[0], trace_path=named, trace_domain="wiki")
    plan_of(provenance={"trace_sha256": sha256_file(named)}).save(files[0])  # planned on all of it
    assert shown(named) == (TOKENS, "")
    assert "it is domain law of named.npz; the plan and its own figures are of all of it" in shown(
        named, trace_domain="law"
    )[1]
    command = ["--trace", str(named), "--domain", "law"]
    assert "it is domain law" in CliRunner().invoke(show, [str(files[0]), *command]).stderr
    reported = CliRunner().invoke(report, [str(files[0]), *command])
    assert "it is domain law" in reported.stderr
    assert "it is domain law" in reported.stdout


def test_bad_input(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent\.json"):
        show_plan(tmp_path / "absent.json")
    with pytest.raises(TraceError, match="does not exist"):
        show_plan(files[0], trace_path=tmp_path / "absent.npz")
    np.save(tmp_path / "wide.npy", np.ones((3, 7)))
    with pytest.raises(TraceError, match="7"):
        show_plan(files[0], trace_path=tmp_path / "wide.npy")
    np.save(tmp_path / "long.npy", np.ones((2, EXPERTS)))
    with pytest.raises(TraceError, match=r"does not hold layer 2 of the plan \(it has 2 layers, the plan 3\)"):
        show_plan(files[0], trace_path=tmp_path / "long.npy")


def test_command_writes_and_prints_one_json_object(files: tuple[Path, Path], tmp_path: Path) -> None:
    html, svg = tmp_path / "out" / "plan.html", tmp_path / "plan.svg"
    arguments = [
        str(files[0].parent),
        "--trace",
        str(files[1]),
        "--html",
        str(html),
        "--svg",
        str(svg),
        "--json",
    ]
    result = CliRunner().invoke(show, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["written"] == [str(html), str(svg)]
    assert f"wrote {html}" in result.stderr
    assert len(answer["layers"]) == LAYERS
    assert answer["sha256"] == plan_of().sha256
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "Homes" not in html.read_text(encoding="utf-8")
    assert svg.read_text(encoding="utf-8").startswith("<svg ")


def test_command_prints_for_people_or_nothing(files: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(show, [str(files[0]), "--trace", str(files[1])], catch_exceptions=False)
    assert "No verdict in this plan" in result.stdout
    assert "load of a rank / mean of its layer" in result.stdout
    quiet = CliRunner().invoke(show, [str(files[0]), "--quiet"], catch_exceptions=False)
    assert quiet.output == ""
