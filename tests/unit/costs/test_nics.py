"""Copies between nodes at the busiest NIC: against copies from rank to rank, one by one, and by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.evaluation import evaluate
from moeplan.costs.layer import LayerCosts
from moeplan.costs.nics import nics_of
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.costs.traffic import counted_traffic, expected_reach, expected_traffic, spread
from moeplan.routing.loads import expert_load
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.workload import DispatchKind, Objective, Workload

KINDS: tuple[DispatchKind, ...] = ("per_node", "per_rank", "per_expert")
RANKS: dict[str, dict[int, RankSpec]] = {
    "whole": {},
    "a lost rank": {5: RankSpec(failed=True)},
    "a slow link": {2: RankSpec(link_speed=0.25)},
    "both": {1: RankSpec(failed=True), 9: RankSpec(link_speed=0.5)},
}


def cluster_of(nodes: int = 3, per_node: int = 4, **fields: Any) -> ClusterSpec:
    return cluster_for("h100", nodes, per_node).model_copy(update=fields)


def shares_of(cluster: ClusterSpec, layers: int = 2) -> np.ndarray:
    live_R = np.array([not cluster.rank(r).failed for r in range(cluster.num_ranks)])
    share_LR = np.random.default_rng(0).gamma(1.0, 1.0, (layers, cluster.num_ranks)) * live_R
    return share_LR / share_LR.sum(1, keepdims=True)


def nics(cluster: ClusterSpec, dispatch: DispatchKind):
    links = tuple(1.0 if cluster.rank(r).failed else cluster.rank(r).link_speed for r in range(cluster.num_ranks))
    lost = tuple(r for r, rank in cluster.ranks.items() if rank.failed)
    return nics_of(dispatch, links, cluster.num_nodes, cluster.ranks_per_nic, lost)


@pytest.mark.parametrize("dispatch", [*KINDS, "allgather"])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("case", RANKS)
def test_the_busiest_nic_is_that_of_copies_from_rank_to_rank(dispatch: DispatchKind, shared: int, case: str) -> None:
    cluster = cluster_of(ranks=RANKS[case], nics_per_node=4 // shared)
    share_LR, found = shares_of(cluster), nics(cluster, dispatch)
    both_LR = expected_traffic(share_LR, cluster, dispatch, 4).between_LRR
    into_LX, out_LX = (both_LR.sum(axis).reshape(2, -1, shared).sum(2) for axis in (1, 2))
    reach = expected_reach(share_LR, cluster, dispatch, 4)
    busiest = (np.maximum(into_LX, out_LX) / found.link_X).max(1) * (4 // shared)
    np.testing.assert_allclose(found.busiest(reach.node_LN, reach.rank_LR), busiest)


@pytest.mark.parametrize("dispatch", KINDS)
@pytest.mark.parametrize("case", RANKS)
def test_tokens_of_the_nic_that_takes_longest_where_homes_are_uneven(dispatch: DispatchKind, case: str) -> None:
    cluster = cluster_of(ranks=RANKS[case])
    live_R = np.array([not cluster.rank(r).failed for r in range(12)])
    tokens_R = np.random.default_rng(1).integers(1, 100, 12) * live_R
    even = expected_reach(live_R[None] / live_R.sum(), cluster, dispatch, 4)
    if dispatch == "per_node":
        even = type(even)(even.rank_LR, np.ones((1, 3)))  # as many copies to each node
    between_RR = spread(even, cluster, dispatch, tokens_R / tokens_R.sum()).between_LRR[0]
    sent_R, taken_R = between_RR.sum(1), between_RR.sum(0) if dispatch == "per_node" else np.zeros(12)
    link_R = nics(cluster, dispatch).link_X
    foreign = 2.0 if dispatch == "per_node" else (sent_R / np.maximum(tokens_R, 1)).max() * tokens_R.sum()
    want = (np.maximum(sent_R, taken_R) / link_R).max() * tokens_R.sum() / foreign
    near = 1e-9 if dispatch == "per_node" else 0.1  # a node with a lost rank is sent less
    assert nics(cluster, dispatch).tokens(tokens_R.astype(float)) == pytest.approx(want, rel=near)


def test_hot_experts_of_one_rank_load_its_nic_alone() -> None:
    """All of a node's tokens to rank 0 of 2 nodes x 2 or spread over both its ranks: as many copies into the node."""
    model = find_model("mixtral-8x7b")
    layers = model.num_moe_layers
    ranks = np.repeat(np.arange(4, dtype=np.int32), 2)
    place = Placement(np.tile(np.arange(8, dtype=np.int32), (layers, 1)), ranks, 8, 4, 2)
    even, hot = np.ones((layers, 8)), np.tile([1.8, 1.8, 0.2, 0.2, 1, 1, 1, 1], (layers, 1))
    work = Workload(batch_per_rank=4096)

    def exchange(dispatch: DispatchKind, load_LE: np.ndarray, **fields: Any) -> np.ndarray:
        step = StepModel(model, cluster_of(2, 2, **fields), work, Technique(dispatch=dispatch))
        fixed = step.exchange.between.fixed_s
        return step.step(place, load_LE).exchange_s_L - fixed

    for shared in (None, 1):
        np.testing.assert_allclose(exchange("per_expert", even, nics_per_node=shared), exchange("per_expert", even))
    np.testing.assert_allclose(exchange("per_expert", hot), 1.8 * exchange("per_expert", even))
    np.testing.assert_allclose(exchange("per_expert", hot, nics_per_node=1), exchange("per_expert", even))
    np.testing.assert_allclose(exchange("per_node", hot), exchange("per_node", even), rtol=1e-9)
    assert (exchange("per_rank", hot) > 1.3 * exchange("per_rank", even)).all()


@pytest.mark.parametrize("dispatch", KINDS)
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_evaluation_and_steps_charge_the_same_path_between_nodes(dispatch: DispatchKind, shared: int) -> None:
    cluster, rng = cluster_of(2, 4, nics_per_node=4 // shared), np.random.default_rng(2)
    model = find_model("mixtral-8x7b")
    chosen = np.argsort(rng.random((40000, 1, 8)) ** np.linspace(1, 4, 8), axis=2)[:, :, -2:]
    home_T = rng.integers(8, size=40000).astype(np.int32)
    place = Placement(np.arange(8, dtype=np.int32)[None], np.arange(8, dtype=np.int32), 8, 8, 4)
    few = model.model_copy(update={"num_layers": 1, "moe_layer_ids": (0,)})
    step = StepModel(few, cluster, Workload(batch_per_rank=4096), Technique(dispatch=dispatch))
    costs = LayerCosts(1000, 0.0, 0.0, 0.0, 0.0, 1e-6, 0.0, ranks_per_nic=cluster.ranks_per_nic)
    path = step.exchange.between
    for source in (None, home_T):
        load = expert_load(RoutingTrace(chosen.astype(np.int32), 8, (0,), source_rank_T=source))
        counted = counted_traffic(load, place, cluster, dispatch)
        exchange_s = step.step(place, load.load_LE, counted).exchange_s_L[0]
        alpha = (exchange_s - path.fixed_s) / (path.balanced_s(4096) - path.fixed_s)
        found = evaluate(load, place, costs, Objective(dispatch=dispatch)).node_path_WL[0, 0] / 1e-3
        assert found * 2 / path.copies_per_token == pytest.approx(alpha, rel=0.05)  # homes are drawn


@pytest.mark.parametrize(("nodes", "nics_per_node"), list(product([1, 2], [None, 2])))
def test_nothing_leaves_one_node(nodes: int, nics_per_node: int | None) -> None:
    cluster = cluster_of(nodes, 4, nics_per_node=nics_per_node)
    for dispatch in KINDS:
        reach = expected_reach(shares_of(cluster), cluster, dispatch, 4)
        busiest = nics(cluster, dispatch).busiest(reach.node_LN, reach.rank_LR)
        assert (busiest > 0).all() == (nodes > 1)
