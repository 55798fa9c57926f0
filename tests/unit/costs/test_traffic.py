"""Hops of copies from rank to rank: by hand, and against the arrivals that the planner counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.counting import count_trace
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.costs.traffic import counted_traffic, expected_traffic
from moeplan.errors import PlanError
from moeplan.routing.loads import expert_load
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.workload import DispatchKind, Workload


def _cluster(nodes: int, per_node: int) -> ClusterSpec:
    return cluster_for("h100", nodes, per_node)


def _placement(cluster: ClusterSpec, layers: int, experts: int) -> Placement:
    R = cluster.num_ranks
    return Placement(
        np.tile(np.arange(experts, dtype=np.int32), (layers, 1)),
        np.repeat(np.arange(R, dtype=np.int32), experts // R),
        experts,
        R,
        cluster.ranks_per_node,
    )


def test_one_token_by_hand() -> None:
    # 2 nodes of 2 ranks, one expert per rank and more: token at home on rank 0 chooses experts on ranks 1, 2, 3.
    cluster = _cluster(2, 2)
    trace = RoutingTrace(np.array([[[1, 2, 3]]], np.uint8), 4, (0,), source_rank_T=np.array([0], np.int32))
    load, placement = expert_load(trace), _placement(cluster, 1, 4)
    node = counted_traffic(load, placement, cluster, "per_node")
    assert node.between_LRR[0].tolist() == [[0, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4]
    assert node.inside_LRR[0].tolist() == [[0, 1, 0, 0], [0] * 4, [0, 0, 1, 1], [0] * 4]
    rank = counted_traffic(load, placement, cluster, "per_rank")
    assert rank.between_LRR[0].tolist() == [[0, 0, 1, 1], [0] * 4, [0] * 4, [0] * 4]
    assert rank.inside_LRR[0].tolist() == [[0, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]


@pytest.mark.parametrize("dispatch", ["per_expert", "per_rank"])
def test_pairs_of_one_rank_travel_once_or_each(dispatch: DispatchKind) -> None:
    cluster = _cluster(1, 2)
    trace = RoutingTrace(np.array([[[2, 3, 0]]], np.uint8), 4, (0,), source_rank_T=np.array([0], np.int32))
    found = counted_traffic(expert_load(trace), _placement(cluster, 1, 4), cluster, dispatch)
    assert found.inside_LRR[0, 0, 1] == (2 if dispatch == "per_expert" else 1)
    assert found.between_LRR.sum() == 0


def _random_load(tokens: int = 3000, layers: int = 2, experts: int = 16, top_k: int = 4) -> ExpertLoad:
    rng = np.random.default_rng(1)
    weight = rng.dirichlet(np.full(experts, 0.8), layers)
    # The k least of exponential times: draws without replacement by weight.
    times = rng.exponential(size=(tokens, layers, experts)) / (weight * 0.9 + 0.1 / experts)
    chosen = np.argsort(times, axis=2)[:, :, :top_k]
    return expert_load(RoutingTrace(chosen.astype(np.uint8), experts, tuple(range(layers))))


def test_arrivals_are_those_of_the_counting_that_planners_use() -> None:
    trace, cluster = _random_load().trace, _cluster(2, 4)
    assert trace is not None
    load = expert_load(replace(trace, source_rank_T=np.arange(trace.num_tokens, dtype=np.int32) % 8))
    placement = _placement(cluster, 2, 16)
    node_LN, rank_LR = counted_traffic(load, placement, cluster, "per_node").arrivals(4)
    counts = count_trace(load, placement)
    np.testing.assert_allclose(node_LN, counts.node_arrivals_WLN[0])
    # Ranks touched, less the tokens that are at home there (about one in eight).
    assert (rank_LR < counts.rank_arrivals_WLR[0]).all()
    np.testing.assert_allclose(rank_LR, counts.rank_arrivals_WLR[0] * 7 / 8, rtol=0.06)


@pytest.mark.parametrize("dispatch", ["per_node", "per_expert"])
def test_a_rank_that_sends_all_holds_the_exchange_up(dispatch: DispatchKind) -> None:
    # Eight times the mean of what a rank sends, where no rank takes in more than before.
    cluster, model = _cluster(2, 4), find_model("mixtral-8x7b")
    layers = model.num_moe_layers
    placement, load_LE = _placement(cluster, layers, 8), np.ones((layers, 8))
    step = StepModel(model, cluster, Workload(batch_per_rank=4096), Technique(dispatch=dispatch))
    even, one = (
        expected_traffic(np.full((layers, 8), 1 / 8), cluster, dispatch, 2, home) for home in (None, np.eye(8)[0])
    )
    assert step.step(placement, load_LE, even).total_s == pytest.approx(step.step(placement, load_LE).total_s)
    np.testing.assert_allclose(one.busiest(4)[0], one.arrivals(4)[0].max())
    np.testing.assert_allclose(one.busiest(1)[0][:, 0], one.busiest(4)[0][:, 0])  # all leave over rank 0's NIC
    assert one.busiest(1)[1][0, 0] == pytest.approx(one.inside_LRR[0, 0].sum())
    assert one.busiest(1)[1][0, 0] > one.arrivals(4)[1][0, 0]
    longer = step.step(placement, load_LE, one).exchange_s_L / step.step(placement, load_LE, even).exchange_s_L
    assert (longer > 1.9).all()


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert", "allgather"])
def test_expected_traffic_has_the_step_models_arrivals(dispatch: DispatchKind) -> None:
    cluster, model = _cluster(2, 4), find_model("mixtral-8x7b")
    layers = model.num_moe_layers
    placement = _placement(cluster, layers, 8)
    load_LE = np.random.default_rng(0).dirichlet(np.ones(8), layers)
    step = StepModel(model, cluster, Workload(batch_per_rank=64), Technique(dispatch=dispatch))
    pairs_LR = step.batches(placement, load_LE)[0].pairs_LR
    found = expected_traffic(pairs_LR / pairs_LR.sum(1, keepdims=True), cluster, dispatch, model.top_k)
    node_LN, rank_LR = found.arrivals(4)
    whole = step.step(placement, load_LE)
    wire = model.hidden_size * 4  # bf16 both ways
    np.testing.assert_allclose(node_LN * 64 * 8 * wire, whole.node_bytes_LN, rtol=1e-9)
    total = found.inside_LRR.sum(1) if dispatch in ("per_node", "allgather") else rank_LR + found.between_LRR.sum(1)
    np.testing.assert_allclose(total * 64 * 8 * wire, whole.rank_bytes_LR, rtol=1e-9)


def test_failed_ranks_neither_send_nor_take_in() -> None:
    cluster = _cluster(2, 4).model_copy(update={"ranks": {5: RankSpec(failed=True)}})
    share_LR = np.full((1, 8), 1 / 7)
    share_LR[0, 5] = 0
    found = expected_traffic(share_LR, cluster, "per_node", 4)
    both = found.between_LRR + found.inside_LRR
    assert both[:, 5].sum() == 0
    assert both[:, :, 5].sum() == 0
    assert found.between_LRR[0, 1, 6] > 0  # the next one takes its place


def test_counts_alone_are_refused() -> None:
    load = ExpertLoad(np.ones((1, 1, 4)), ("all",), (0,))
    with pytest.raises(PlanError, match="token-level routing"):
        counted_traffic(load, _placement(_cluster(1, 2), 1, 4), _cluster(1, 2), "per_rank")
