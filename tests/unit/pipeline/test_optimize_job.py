from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.profile import HardwareProfile, Source, load_profile
from moeplan.costs.evaluation import aggregate
from moeplan.errors import PlanError, SpecError, UnknownNameError
from moeplan.files import sha256_file
from moeplan.pipeline import held_out
from moeplan.pipeline import optimize as pipeline_optimize
from moeplan.pipeline.inputs import profile_of
from moeplan.pipeline.job import Job
from moeplan.pipeline.optimize import optimize, write_plan
from moeplan.planning.greedy import greedy
from moeplan.planning.problem import PlanningResult
from moeplan.reports.summary import rank_load, relative_loads
from moeplan.specs.scenario import Scenario
from moeplan.testing.exporters import tiny_model

MODEL = tiny_model().model_dump(mode="json", exclude_unset=True)


def scenario(trace: Path, **fields: object) -> Scenario:
    given = {"model": MODEL, "trace": str(trace), "ranks": 4, "nodes": 2, "planner": "greedy", **fields}
    return Scenario.parse(given, "test")


@pytest.fixture
def tokens(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.gumbel(size=(1600, 3, 8)) + rng.normal(size=(3, 8)), axis=2)[:, :, :2]
    np.savez(tmp_path / "t.npz", experts=chosen.astype(np.int16), num_experts=8)
    return tmp_path / "t.npz"


def test_the_gain_is_measured_on_tokens_the_plan_has_not_seen(tokens):
    found = optimize(scenario(tokens))
    assert found.plan.verdict is not None
    held_out = "the second half of the trace, planned on the first (a low estimate: "
    assert found.plan.verdict.held_out.startswith(held_out)
    assert found.plan.verdict.expected_gain_low <= found.plan.verdict.expected_gain
    assert found.plan.prediction is not None
    assert found.plan.prediction.time_s == pytest.approx(found.evaluation.time_WL.sum())
    assert found.plan.prediction.baseline_time_s == pytest.approx(found.baseline_evaluation.time_WL.sum())
    assert found.plan.layer_ids == (1, 2, 4)
    assert not found.interrupted


def test_the_gain_is_that_of_a_plan_for_the_same_windows_aggregated_alike(tokens, monkeypatch):
    mixed = tokens.with_name("mixed.npz")
    domains = {"domain": np.arange(1600) % 5 // 4, "domains": ["a", "b"]}
    np.savez(mixed, experts=np.load(tokens)["experts"], num_experts=8, **domains)
    planned, scored = [], []

    def planner(problem):
        planned.append(problem.load.windows)
        return greedy(problem)

    def aggregated(values, objective):
        scored.append(len(values))
        return aggregate(values, objective)

    monkeypatch.setattr("moeplan.pipeline.job.load_plugin", lambda group, name: planner)
    monkeypatch.setattr("moeplan.pipeline.held_out.aggregate", aggregated)
    plan = optimize(scenario(mixed, objective={"aggregate": "worst"}), windows="domain").plan
    assert planned == [("a", "b")] * 2
    assert scored[-10:] == [2] * 10  # both domains, whole and without each of four stretches, before and after
    assert plan.verdict.held_out.startswith("the second half of the trace in 2 windows, planned on the first")


def test_the_gain_is_that_on_the_second_half_as_a_whole(tokens):
    experts, half = np.load(tokens)["experts"], tokens.with_name("half.npz")
    verdict = optimize(scenario(tokens)).plan.verdict
    assert verdict is not None
    np.savez(half, experts=experts[:800], num_experts=8)
    write_plan(optimize(scenario(half)), tokens.parent / "plan")
    np.savez(half, experts=experts[800:], num_experts=8)
    scores = [optimize(scenario(half, **more)).plan.prediction for more in ({}, {"current": tokens.parent / "plan"})]
    before, after = (found.baseline_time_s for found in scores if found is not None)
    assert verdict.expected_gain == pytest.approx(1 - after / before, rel=1e-12)


def test_more_ranks_than_are_planned_for_are_refused_at_once(tokens):
    with pytest.raises(SpecError, match=r"ranks \(100,000\) are more than are planned for \(8,192\)"):
        optimize(scenario(tokens, ranks=100_000, nodes=12_500))


def test_too_few_tokens_to_hold_out_are_said_with_how_many_it_takes(tokens):
    few = tokens.with_name("few.npz")
    np.savez(few, experts=np.load(tokens)["experts"][:512], num_experts=8)
    verdict = optimize(scenario(few)).plan.verdict
    assert not verdict.apply
    assert verdict.reason.endswith("; the trace has 512 tokens, holding out needs 1,024: record more")


def test_a_plan_records_the_domain_it_was_made_on(tokens):
    named = tokens.with_name("named.npz")
    np.savez(named, experts=np.load(tokens)["experts"], num_experts=8, domain=np.arange(1600) % 2, domains=["a", "b"])
    recorded = [optimize(scenario(named), domain=name).plan.provenance for name in ("b", None)]
    assert [made.get("domain") for made in recorded] == ["b", None]
    assert {made["trace_sha256"] for made in recorded} == {sha256_file(named)}


@pytest.mark.parametrize("stage", ["score", "prove", "hold out"])
def test_ctrl_c_after_the_search_keeps_the_plan(tokens, stage, monkeypatch):
    calls = []

    def stop(*_words):
        if not calls:
            calls.append(1)
            raise KeyboardInterrupt
        return original(*_words)

    places = {"score": (Job, "evaluate"), "prove": (pipeline_optimize, "bounds_of"), "hold out": (held_out, "_split")}
    module, name = places[stage]
    original = getattr(module, name)
    monkeypatch.setattr(module, name, stop)
    found = optimize(scenario(tokens))
    assert (found.interrupted, found.plan.status) == (True, "interrupted")
    assert found.plan.verdict is not None
    assert found.plan.verdict.apply is False
    assert "interrupted" in found.plan.verdict.held_out or stage == "prove"
    assert bool(found.plan.bounds) == (stage != "prove")


def test_windows_of_counts_are_held_out_only_where_both_halves_have_tokens(tmp_path):
    counts = np.random.default_rng(0).integers(1, 90, (4, 3, 8)).astype(float)
    np.save(tmp_path / "c.npy", counts)
    verdict = optimize(scenario(tmp_path / "c.npy")).plan.verdict
    assert verdict is not None
    assert verdict.held_out == "the last 2 windows, planned on the first 2"
    np.save(tmp_path / "c.npy", np.concatenate([np.zeros((2, 3, 8)), counts[:2], np.zeros((1, 3, 8)), counts[2:]]))
    assert optimize(scenario(tmp_path / "c.npy")).plan.verdict == verdict  # windows without tokens are no evidence
    counts[:2, 1] = 0  # a layer that was quiet at first
    np.save(tmp_path / "c.npy", counts)
    verdict = optimize(scenario(tmp_path / "c.npy")).plan.verdict
    assert verdict is not None
    assert (verdict.apply, "nothing could be held out" in verdict.held_out) == (False, True)


@pytest.mark.parametrize("planner", ["joint", "greedy"])
def test_more_slots_than_a_copy_per_node_are_all_filled_for_an_engine_that_takes_the_nearest(tokens, planner):
    found = optimize(scenario(tokens, target="sglang", redundant=12, planner=planner))
    assert (np.array(found.plan.physical_to_logical_map) >= 0).all()
    assert found.plan.objective.replica_split == "nearest"
    assert found.plan.prediction.time_s <= found.plan.prediction.baseline_time_s


def test_the_page_shows_the_loads_that_the_evaluation_counted(tokens):
    homes = tokens.with_name("homes.npz")  # all tokens at home in node 0: its copies serve all of them
    np.savez(homes, experts=np.load(tokens)["experts"], num_experts=8, source_rank=np.zeros(1600, np.int16))
    found = optimize(scenario(homes, target="sglang", redundant=4))
    before, after = relative_loads(found.plan, found.evidence)
    for shown_LR, evaluation in ((before, found.baseline_evaluation), (after, found.evaluation)):
        assert shown_LR == pytest.approx(evaluation.load_LR / evaluation.load_LR.mean(axis=1, keepdims=True))
    even_LR = rank_load(found.plan.placement, found.load.load_LE)
    assert not np.allclose(even_LR, found.evaluation.load_LR, rtol=0.1)


def test_what_the_target_cannot_express_is_not_to_be_applied(tokens):
    verdict = optimize(scenario(tokens, target="sglang", redundant=28)).plan.verdict
    assert not verdict.apply
    assert verdict.reason.startswith("sglang cannot express this plan: some slots are empty")
    assert not any("cannot" in optimize(scenario(tokens, target=t)).plan.verdict.reason for t in ("sglang", "trtllm"))


@pytest.mark.parametrize("allowed", [1e-9, 2e-8, 1e-3])
def test_any_time_to_move_can_be_met(tokens, tmp_path, allowed):
    write_plan(optimize(scenario(tokens, planner="contiguous")), tmp_path / "now")
    job = scenario(tokens, planner="joint", current=str(tmp_path / "now"), migration_time=f"{allowed} s")
    migration = optimize(job).plan.migration
    assert migration.seconds <= allowed
    assert bool(migration.moves) == (allowed > 1e-9)


def test_a_mistyped_backend_of_the_same_scenario_is_refused(tokens):
    requests = {"arrivals": "constant", "rate": "1 /s", "count": 1, "input_tokens": 8, "output_tokens": 8}
    with pytest.raises(UnknownNameError, match=r"serving.engine.backend 'vlm' is not known; did you mean 'vllm'\?"):
        optimize(scenario(tokens, serving={"requests": requests, "engine": {"backend": "vlm"}}))


def test_costs_of_another_machine_are_told(tokens):
    notes = optimize(scenario(tokens, profile="h200-sxm")).plan.notes
    assert any("measured on H200-SXM-141GB, where the cluster has H100-SXM-80GB" in note for note in notes)
    assert any("does not cover experts at" in note and "moeplan profile experts" in note for note in notes)
    assert not any("measured on" in note or "cover" in note for note in optimize(scenario(tokens)).plan.notes)


def test_exchanges_that_one_gpu_cannot_measure_are_the_public_ones_and_said(tokens, tmp_path):
    public = load_profile("h100-sxm")
    meta = public.meta.model_copy(update={"name": "own", "tables": {}})
    own = HardwareProfile(meta, {table: public.table(table) for table in ("experts", "attention", "gemm")})
    own.save(tmp_path / "own")
    asked, found = optimize(scenario(tokens)).plan, optimize(scenario(tokens, profile=str(tmp_path / "own"))).plan
    assert any(
        "profile own has no alltoall on 1, 2, 4, 8 nodes: those of h100-sxm stand in" in note for note in found.notes
    )
    assert not any("stand in" in note for note in asked.notes)
    assert sum("measure your own: " in note for note in found.notes) == 1, "one command measures all exchanges"
    assert found.prediction == asked.prediction
    lent, none = profile_of(str(tmp_path / "own"), "H100-SXM-80GB"), own.with_exchanges_of(own)
    assert lent.sha256 != own.sha256
    assert none is own


def test_exchanges_measured_on_one_node_are_joined_by_the_public_ones_between_nodes(tokens, tmp_path):
    public = load_profile("h100-sxm")
    exchange = {"mode": "flat", "hidden": 4096, "top_k": 2, "num_experts": 8, "dtype": "bf16", "nodes": 1, "ranks": 8}
    rows = [
        exchange | {"phase": phase, "tokens_per_rank": tokens_per_rank, "latency_us": 1e4 + tokens_per_rank,
                    "backend": "nccl", "kernel": "own", "source": "mine"}
        for phase in ("dispatch", "combine") for tokens_per_rank in (1, 64, 4096)
    ]  # fmt: skip
    sources = public.meta.sources | {"mine": Source(kind="measured", title="a test")}
    meta = public.meta.model_copy(update={"name": "own", "tables": {}, "sources": sources})
    tables = {table: public.table(table) for table in ("experts", "attention", "gemm")}
    HardwareProfile(meta, tables | {"alltoall": pa.Table.from_pylist(rows)}).save(tmp_path / "own")
    plans = {  # an expert on every rank
        nodes: optimize(
            scenario(tokens, profile=str(tmp_path / "own"), ranks=8 * nodes, nodes=nodes, redundant=redundant)
        ).plan
        for nodes, redundant in ((1, 0), (2, 8))
    }
    for plan in plans.values():
        assert "(own)" in plan.prediction.source["exchange inside a node"]
    assert "h100_sxm" in plans[2].prediction.source["exchange between nodes"]
    said = {nodes: [note for note in plan.notes if "stand in" in note] for nodes, plan in plans.items()}
    assert any("no alltoall on 2, 4, 8 nodes" in note for note in said[2])
    assert not any("alltoall" in note for note in said[1])


def test_a_plan_is_written_whole(tokens, tmp_path):
    found = optimize(scenario(tokens))
    written = write_plan(found, tmp_path / "out")
    assert [path.name for path in written] == ["plan.json", "plan.html"]
    assert json.loads(written[0].read_text())["seed"] == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    with pytest.raises(SpecError, match="does not hold a plan"):
        write_plan(found, tmp_path / "other")


def _first_expert_everywhere(problem):
    return PlanningResult(problem.placement(np.zeros((problem.load.num_layers, problem.num_slots), np.int32)))


def _other_ranks(problem):
    return greedy(replace(problem, ranks_per_node=len(problem.slots_R), slots_R=problem.slots_R[::-1] * 2))


def _one_layer(problem):
    placement = greedy(problem).placement
    return PlanningResult(replace(placement, physical_to_logical_LP=placement.physical_to_logical_LP[:1]))


@pytest.mark.parametrize(
    ("planner", "said"),
    [
        (lambda problem: None, "a NoneType is no PlanningResult"),
        (_first_expert_everywhere, "layer 0: expert 1 has no slot"),
        (_other_ranks, "its slots are not those asked for"),
        (_one_layer, "1 layers are placed, the load has 3"),
    ],
)
def test_a_planner_that_answers_wrongly_is_named(tokens, monkeypatch, planner, said):
    monkeypatch.setattr("moeplan.pipeline.job.load_plugin", lambda group, name: planner)
    with pytest.raises(PlanError, match=f"planner greedy answers wrongly: {said}"):
        optimize(scenario(tokens))
