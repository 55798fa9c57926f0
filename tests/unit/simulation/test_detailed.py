"""The detailed mode against the step mode, against hand-made cases, and its own conservation laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import shipped_profile_for
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.passes import Batch, no_chunks
from moeplan.costs.serving import COST_PARTS, ServingCosts
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.costs.traffic import Traffic, counted_traffic
from moeplan.errors import InputError
from moeplan.routing.loads import expert_load
from moeplan.simulation.detailed import simulate_step
from moeplan.simulation.detailed_costs import DetailedCosts
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model
from moeplan.specs.workload import DispatchKind, Workload


def _model(name: str, layers: int) -> ModelSpec:
    return find_model(name).model_copy(update={"num_layers": layers + 1, "moe_layer_ids": tuple(range(1, layers + 1))})


def _placement(cluster: ClusterSpec, layers: int, experts: int, extra: int = 0, seed: int | None = None) -> Placement:
    R = cluster.num_ranks
    slots = np.arange(experts + extra, dtype=np.int32) % experts
    p2l = np.tile(slots, (layers, 1))
    if seed is not None:
        rng = np.random.default_rng(seed)
        p2l = np.stack([rng.permutation(slots) for _ in range(layers)]).astype(np.int32)
    per = len(slots) // R
    return Placement(p2l, np.repeat(np.arange(R, dtype=np.int32), per), experts, R, cluster.ranks_per_node)


CASES: list[dict[str, Any]] = [
    {"cluster": ("h100", 1, 8), "dispatch": "per_rank", "phase": "decode", "batch": 128},
    {"cluster": ("h100", 2, 8), "dispatch": "per_node", "phase": "prefill", "batch": 4096, "overlap": "shared_expert"},
    {"cluster": ("h100", 4, 8), "dispatch": "per_node", "phase": "prefill", "batch": 2048, "extra": 32},
    {"cluster": ("gb200", 4, 4), "dispatch": "per_rank", "phase": "decode", "batch": 256, "overlap": "shortcut"},
    {"cluster": ("h200", 2, 4), "dispatch": "allgather", "phase": "decode", "batch": 64, "profile": False},
    {"cluster": ("h100", 1, 4), "dispatch": "per_expert", "phase": "decode", "batch": 32, "model": "mixtral-8x7b"},
    {"cluster": ("h100", 2, 8), "dispatch": "per_node", "phase": "decode", "batch": 1, "model": "qwen3-235b-a22b"},
    # All hot experts on one node: the network is the bottleneck, and one node's.
    {"cluster": ("h100", 4, 4), "dispatch": "per_node", "phase": "prefill", "batch": 4096, "skew": "first"},
]


def _build(case: dict[str, Any], layers: int = 6) -> tuple[StepModel, Placement, np.ndarray]:
    model = _model(case.get("model", "deepseek-v3"), layers)
    cluster = cluster_for(*case["cluster"])
    work = Workload(
        phase=case["phase"], batch_per_rank=case["batch"], weight_dtype="fp8", activation_dtype="fp8", context=1024
    )
    profile = shipped_profile_for(cluster.accelerator.name) if case.get("profile", True) else None
    how = Technique(dispatch=case["dispatch"], overlap=case.get("overlap", "none"))
    E = model.num_experts
    load_LE = np.random.default_rng(2).dirichlet(np.full(E, 1.0), layers)
    seed: int | None = 3
    if case.get("skew") == "first":
        load_LE, seed = np.tile(np.where(np.arange(E) < E // 4, 3.0, 1.0), (layers, 1)), None
    if case.get("skew") == "even":
        load_LE, seed = np.ones((layers, E)), None
    placement = _placement(cluster, layers, E, case.get("extra", 0), seed)
    return StepModel(model, cluster, work, how, profile), placement, load_LE


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['cluster'][0]}-{c['dispatch']}-{c.get('overlap', 'none')}")
def test_agrees_with_the_step_mode_within_two_per_cent(case: dict[str, Any]) -> None:
    step, placement, load_LE = _build(case)
    whole = step.step(placement, load_LE)
    assert whole.exchange_s_L.sum() > 0.02 * whole.total_s  # the exchange matters in every case
    assert simulate_step(step, placement, load_LE).total_s == pytest.approx(whole.total_s, rel=0.02)


@pytest.mark.parametrize(("cluster", "nic"), [(("h100", 1, 8), 1.0), (("h100", 4, 8), 0.1)], ids=["compute", "network"])
def test_two_batches_agree_where_one_resource_is_always_busy(cluster: Any, nic: float) -> None:
    case = {"cluster": cluster, "dispatch": "per_node", "phase": "prefill", "batch": 8192, "overlap": "two_batch"}
    step, placement, load_LE = _build({**case, "skew": "even", "profile": False}, layers=24)
    chip = step.cluster.accelerator
    slow = step.cluster.model_copy(
        update={"accelerator": chip.model_copy(update={"nic_bandwidth": nic * chip.nic_bandwidth})}
    )
    step = StepModel(step.model, slow, step.workload, step.technique)
    whole, found = step.step(placement, load_LE), simulate_step(step, placement, load_LE)
    assert found.total_s == pytest.approx(whole.total_s, rel=0.02)
    assert (whole.exchange_s_L[0] > whole.layer_s_L[0] / 2) == (nic < 1)


def test_two_batches_never_beat_the_step_modes_bound_under_even_load() -> None:
    case = {"cluster": ("h100", 4, 8), "dispatch": "per_node", "phase": "prefill", "batch": 2048}
    plain, placement, load_LE = _build({**case, "skew": "even"}, layers=24)
    step = StepModel(plain.model, plain.cluster, plain.workload, Technique(overlap="two_batch"), plain.profile)
    found = simulate_step(step, placement, load_LE).total_s
    assert step.step(placement, load_LE).total_s < found < simulate_step(plain, placement, load_LE).total_s


def test_counted_traffic_agrees_with_the_step_mode_given_the_same_arrivals() -> None:
    step, placement, _ = _build(CASES[1], layers=2)
    rng = np.random.default_rng(0)
    chosen = np.argpartition(rng.random((4000, 2, 256)) ** np.linspace(1, 3, 256), -8, axis=2)[:, :, -8:]
    load = expert_load(RoutingTrace(chosen.astype(np.int32), 256, (1, 2)))
    traffic = counted_traffic(load, placement, step.cluster, "per_node")
    whole = step.step(placement, load.load_LE, traffic)
    found = simulate_step(step, placement, load.load_LE, traffic)
    assert found.total_s == pytest.approx(whole.total_s, rel=0.02)


def test_bytes_and_pairs_are_conserved() -> None:
    step, placement, load_LE = _build(CASES[1])
    found = simulate_step(step, placement, load_LE)
    log, whole = found.log, step.step(placement, load_LE)
    sent = log.amount_V[log.of_kind("dispatch", "combine")].sum()
    inside, between = whole.rank_bytes_LR.sum(), whole.node_bytes_LN.sum()
    assert sent == pytest.approx(inside + between)
    into_ranks = sum(b for b, (s, t) in zip(found.link_bytes_X, found.links_X, strict=True) if s.startswith("domain"))
    hidden = step.model.hidden_size
    out = hidden * (1 + 4 / 128) / (hidden * (3 + 4 / 128))  # dispatch's part of both ways
    # Dispatch enters ranks from the switch; combine leaves through it, but for copies a forwarder keeps.
    assert out * inside < into_ranks <= inside * (1 + 1e-9)
    spine = sum(b for b, (_, t) in zip(found.link_bytes_X, found.links_X, strict=True) if t == "spine")
    assert spine == pytest.approx(between)
    pairs = log.amount_V[log.of_kind("experts")].sum()
    assert pairs == pytest.approx(6 * 16 * 4096 * 8)


def test_a_slow_link_holds_up_everybody() -> None:
    step, placement, load_LE = _build({**CASES[1], "skew": "even", "overlap": "none"})
    whole = simulate_step(step, placement, load_LE)
    slow = simulate_step(step, placement, load_LE, link_speed={("nic3", "spine"): 0.25})
    # Rank 3's half of dispatch and combine takes four times as long: the exchange's variable part does.
    fixed = step.step(placement, load_LE)
    variable = fixed.exchange_s_L.sum() - 6 * step.batches(placement, load_LE)[0].exchange.between.fixed_s
    assert slow.total_s - whole.total_s == pytest.approx(3 * variable, rel=0.02)
    with pytest.raises(InputError, match="not a link of the cluster"):
        simulate_step(step, placement, load_LE, link_speed={("nic99", "spine"): 0.25})


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert", "allgather"])
@pytest.mark.parametrize(
    "cluster",
    [{}, {"nics_per_node": 4}, {"nics_per_node": 1}, {"topology": "rail-optimised", "nics_per_node": 2},
     {"ranks": {3: RankSpec(link_speed=0.25)}}, {"nics_per_node": 4, "ranks": {3: RankSpec(link_speed=0.25)}}],
    ids=str,
)  # fmt: skip
def test_skewed_loads_on_two_nodes_take_as_long_in_both_modes(dispatch: DispatchKind, cluster: dict[str, Any]) -> None:
    """Hot experts of one rank, each dispatch kind at its own NIC; no slack for the exchange, which decides."""
    plain, placement, load_LE = _build({**CASES[1], "dispatch": dispatch, "overlap": "none"}, layers=1)
    load_LE = np.where(np.isin(np.arange(256), placement.physical_to_logical_LP[0, :16]), 3.0, 1.0)[None]
    step = StepModel(
        plain.model, plain.cluster.model_copy(update=cluster), plain.workload, plain.technique, plain.profile
    )
    found = simulate_step(step, placement, load_LE).total_s
    assert found == pytest.approx(step.step(placement, load_LE).total_s, rel=1e-3)


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert", "allgather"])
def test_a_lost_rank_takes_as_long_in_both_modes(dispatch: DispatchKind) -> None:
    """Of copies per node the next rank takes in those of two places; an all-gather goes over all that are left."""
    plain, _, load_LE = _build({**CASES[1], "dispatch": dispatch, "overlap": "none", "skew": "even"}, layers=1)
    lost = plain.cluster.model_copy(update={"ranks": {5: RankSpec(failed=True)}})
    slots = np.arange(270, dtype=np.int32) % 256
    ranks = np.repeat(np.array([r for r in range(16) if r != 5], np.int32), 18)
    placement = Placement(slots[None], ranks, 256, 16, 8)
    step = StepModel(plain.model, lost, plain.workload, plain.technique, plain.profile)
    whole = step.step(placement, load_LE)
    assert simulate_step(step, placement, load_LE).total_s == pytest.approx(whole.total_s, rel=1e-3)
    fixed_s = step.exchange.between.fixed_s
    part = (whole.exchange_s_L[0] - fixed_s) / (step.exchange.between.balanced_s(4096) - fixed_s)
    if dispatch in ("per_node", "allgather"):
        assert part == pytest.approx({"per_node": 2.0, "allgather": 8 / 7}[dispatch], rel=0.02)


@pytest.mark.parametrize("rank", [RankSpec(failed=True), RankSpec(link_speed=0.25)], ids=["lost", "slow"])
@pytest.mark.parametrize("prompts", [(0, 3000, *[0] * 6), (0, 0, 500, 0, 0, 0, 3000, 2000), (*[0] * 6, 900, 0)])
def test_prompts_of_few_ranks_take_as_long_in_both_modes_of_a_service(rank: RankSpec, prompts: tuple[int, ...]) -> None:
    """Rank 2 of two nodes of four is lost or has a slow link: what comes in over it is of tokens with its place."""
    model = _model("deepseek-v3", 1)
    cluster = cluster_for("h100", 2, 4).model_copy(update={"ranks": {2: rank}})
    live = [r for r in range(8) if not cluster.rank(r).failed]
    slots = np.arange(len(live) * 40, dtype=np.int32) % 256
    placement = Placement(slots[None], np.repeat(np.array(live, np.int32), 40), 256, 8, 4)
    work = Workload(weight_dtype="fp8", activation_dtype="fp8")
    profile = shipped_profile_for(cluster.accelerator.name)
    costs = ServingCosts(model, cluster, work, Technique(dispatch="per_node"), profile, 8192, 64, 8192)
    new_D = np.array(prompts, float) * np.isin(np.arange(8), live)
    none_4 = np.array([-1.0, 0.0, 0.0, 0.0])
    chunk_s_D4 = np.array([costs.chunk_s(0, int(new)) if new else none_4 for new in new_D])
    batch = Batch(np.zeros(8), np.zeros(8), chunk_s_D4, new_D, True)
    found, played = (each.step(batch, placement, np.ones((1, 256))) for each in (costs, DetailedCosts(costs)))
    assert played.total_s == pytest.approx(found.total_s, rel=0.01)


@pytest.mark.parametrize("part", COST_PARTS)
def test_a_played_step_with_a_part_off_is_longer_as_the_step_modes_is(part: str) -> None:
    model, cluster = _model("deepseek-v3", 2), cluster_for("h100", 2, 4)
    placement, load_LE = _placement(cluster, 2, 256), np.ones((2, 256))
    work = Workload(weight_dtype="fp8", activation_dtype="fp8")
    costs = ServingCosts(model, cluster, work, Technique(dispatch="per_node"), None, 2048, 64, 2048)
    every = np.full(8, 32.0)
    batch = Batch(every, 512 * every, no_chunks(8), every, False)
    base, played = costs.step(batch, placement, load_LE), DetailedCosts(costs).step(batch, placement, load_LE)
    high = {part: 1}
    off, found = (each.moved(high).step(batch, placement, load_LE) for each in (costs, DetailedCosts(costs)))
    assert off.total_s > 1.001 * base.total_s
    assert found.total_s / played.total_s == pytest.approx(off.total_s / base.total_s)
    assert found.exposed_s / played.exposed_s == pytest.approx(off.exposed_s / base.exposed_s)


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert"])
def test_copies_between_nodes_wait_for_a_ranks_slow_link_in_both_modes(dispatch: DispatchKind) -> None:
    step, placement, load_LE = _build({**CASES[1], "dispatch": dispatch, "skew": "even", "overlap": "none"}, layers=1)
    narrow = step.cluster.model_copy(update={"ranks": {3: RankSpec(link_speed=0.1)}})
    slow = StepModel(step.model, narrow, step.workload, step.technique, step.profile)
    whole = slow.step(placement, load_LE).total_s
    assert whole > 1.5 * step.step(placement, load_LE).total_s
    assert simulate_step(slow, placement, load_LE).total_s == pytest.approx(whole, rel=1e-6)


def test_the_log_holds_every_layer_of_every_rank_and_repeats_exactly() -> None:
    step, placement, load_LE = _build(CASES[1])
    first, second = (simulate_step(step, placement, load_LE) for _ in range(2))
    for name in ("start_s_V", "duration_s_V", "kind_V", "rank_V", "layer_V", "amount_V"):
        np.testing.assert_array_equal(getattr(first.log, name), getattr(second.log, name))
    for kind in ("attention", "dispatch", "experts", "combine"):
        assert first.log.of_kind(kind).sum() == 6 * 16
    end = (first.log.start_s_V + first.log.duration_s_V).max()
    assert end == pytest.approx(first.total_s)
    assert (first.busy_s_R <= first.total_s).all()


def test_what_does_not_fit_is_refused() -> None:
    step, placement, load_LE = _build(CASES[0])
    with pytest.raises(InputError, match="not of one model and cluster"):
        simulate_step(step, placement, load_LE[:2])
    wrong = Traffic(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)))
    with pytest.raises(InputError, match=r"is not \[6 layers"):
        simulate_step(step, placement, load_LE, wrong)
