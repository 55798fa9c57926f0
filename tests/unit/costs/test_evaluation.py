from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs import evaluation
from moeplan.costs.evaluation import aggregate, copy_seconds, evaluate, transitions_of
from moeplan.costs.layer import LayerCosts
from moeplan.specs.workload import Objective

COSTS = LayerCosts(
    tokens_per_step=100, expert_fixed_s=1e-3, per_active_expert_s=2e-3, per_pair_s=1e-4, exchange_fixed_s=5e-3,
    per_node_copy_s=3e-4, per_rank_copy_s=1e-4,
)  # fmt: skip
# Six tokens, top-2 of 4 experts, 2 layers; two windows of three tokens.
TOKENS = np.array([
    [[0, 1], [0, 2]], [[0, 2], [0, 3]], [[0, 3], [1, 2]],
    [[1, 2], [0, 1]], [[0, 1], [0, 1]], [[2, 3], [2, 3]],
])  # fmt: skip
ROWS = np.array([[0, 1, 2, 3], [0, 3, 1, 2]], np.int32)


def load(windows=1, source=None) -> ExpertLoad:
    trace = RoutingTrace(TOKENS, 4, (0, 1), source_rank_T=source)
    window_T = np.arange(6) * windows // 6
    counts = np.array([
        [np.bincount(TOKENS[window_T == w, l].ravel(), minlength=4) for l in range(2)] for w in range(windows)
    ]).astype(float)  # fmt: skip
    return ExpertLoad(counts, tuple("ab"[:windows]), (0, 1), 2, trace, window_T)


def plan(per_node=2) -> Placement:
    return Placement(ROWS, np.arange(4, dtype=np.int32), 4, 4, per_node)


def rank_of(layer: int) -> list[int]:
    return [int(np.flatnonzero(ROWS[layer] == e)[0]) for e in range(4)]


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert", "allgather"])
@pytest.mark.parametrize("per_node", [2, 4])
def test_exchange_in_return_home(windows, dispatch, per_node):
    found = evaluate(load(windows), plan(per_node), COSTS, Objective(dispatch=dispatch))
    nodes = 4 // per_node
    for w in range(windows):
        tokens = TOKENS[np.arange(6) * windows // 6 == w]
        for layer in range(2):
            node, rank = np.zeros(nodes), np.zeros(4)
            for chosen in tokens[:, layer]:
                ranks = [rank_of(layer)[e] for e in chosen]
                for n in {r // per_node for r in ranks}:
                    node[n] += (1 - 1 / nodes) / len(tokens)
                for r in ranks:
                    rank[r] += 1 / len(tokens)
            if dispatch != "per_node":  # by the busiest rank's own NIC, one of per_node
                node = rank * (1 - 1 / nodes) * per_node
            slower = 0.0 if dispatch == "allgather" else 100 * max(node.max() * 3e-4, rank.max() * 1e-4)
            assert found.exchange_WL[w, layer] == pytest.approx(5e-3 + slower)
    assert found.time_WL == pytest.approx(found.expert_WL + found.exchange_WL)


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert"])
def test_recorded_homes_decide_what_arrives_from_other_nodes(dispatch):
    source = np.array([0, 1, 2, 3, 2, 0], np.int32)
    found = evaluate(load(source=source), plan(), COSTS, Objective(dispatch=dispatch))
    for layer in range(2):
        node, nic, rank = np.zeros(2), np.zeros(4), np.zeros(4)
        for home, chosen in zip(source, TOKENS[:, layer], strict=True):
            for n in {rank_of(layer)[e] // 2 for e in chosen}:
                node[n] += (home // 2 != n) / 6
            for r in (rank_of(layer)[e] for e in chosen):
                rank[r] += 1 / 6
                nic[r] += (home // 2 != r // 2) / 6
        between = node if dispatch == "per_node" else 2 * nic  # two NICs a node
        slower = 100 * max(between.max() * 3e-4, rank.max() * 1e-4)
        assert found.exchange_WL[0, layer] == pytest.approx(5e-3 + slower)


@pytest.mark.parametrize("per_node", [2, 4])
def test_exchange_in_stay(per_node):
    found = evaluate(load(), plan(per_node), COSTS, Objective(return_mode="stay"))
    kept_rank = kept_node = 0
    for first, second in TOKENS:
        for e in first:
            for f in second:
                a, b = rank_of(0)[e], rank_of(1)[f]
                kept_rank += a == b
                kept_node += a // per_node == b // per_node
    same_rank, same_node = kept_rank / 24, kept_node / 24
    hops = (same_node - same_rank) * 1e-4 / 4 + (1 - same_node) * 3e-4 / (4 // per_node)
    assert found.exchange_WL[0] == pytest.approx([5e-3 + 200 * hops, 5e-3])
    assert found.same_rank_L == pytest.approx([same_rank, 0])
    assert found.same_node_L == pytest.approx([same_node, 0])


def test_seconds_of_a_copy():
    counts = np.array([[30.0, 10.0, 0.0, 60.0]])
    for copies in (1, 2, 3):
        p = np.array([0.6, 0.2, 0.0, 1.2]).clip(0, 1) / copies if copies == 1 else np.array([0.6, 0.2, 0, 1.2]) / copies
        expected = 2e-3 * (1 - (1 - p) ** 100) + 1e-4 * 100 * p
        assert copy_seconds(counts, COSTS, 2, copies)[0] == pytest.approx(expected)


def test_the_busiest_rank_counts_at_its_speed():
    speeds = np.array([1.0, 0.5, 1.0, 2.0])
    found = evaluate(load(), plan(), COSTS, Objective(), speeds)
    for layer in range(2):
        counts = np.bincount(TOKENS[:, layer].ravel(), minlength=4)[ROWS[layer]]
        p = counts / 6
        seconds = (2e-3 * (1 - (1 - p) ** 100) + 1e-2 * p) / speeds
        assert found.expert_WL[0, layer] == pytest.approx(1e-3 + seconds.max())
        assert found.max_over_mean_WL[0, layer] == pytest.approx((counts / speeds).max() / (12 / 4.5))
        assert found.load_LR[layer].tolist() == counts.tolist()


def test_copies_share_the_work_also_unevenly():
    rows, ranks = np.array([[0, 1, 0, 2, 3, -1]] * 2, np.int32), np.array([0, 0, 1, 1, 2, 2], np.int32)
    share = np.array([[0.75, 1, 0.25, 1, 1, 0]] * 2)
    found = evaluate(load(), Placement(rows, ranks, 4, 3, 3, share), COSTS, Objective())
    for layer in range(2):
        p = np.bincount(TOKENS[:, layer].ravel(), minlength=4) / 6
        parts = [[0.75 * p[0], p[1]], [0.25 * p[0], p[2]], [p[3]]]
        seconds = [sum(2e-3 * (1 - (1 - x) ** 100) + 1e-2 * x for x in rank) for rank in parts]
        assert found.expert_WL[0, layer] == pytest.approx(1e-3 + max(seconds))


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank"])
def test_counts_alone_are_charged_for_the_copies_of_independent_choices(dispatch):
    found = evaluate(replace(load(), trace=None, window_T=None), plan(), COSTS, Objective(dispatch=dispatch))
    assert (found.counts, found.same_rank_L, found.same_node_L) == (None, None, None)
    for layer in range(2):
        share = np.bincount(TOKENS[:, layer].ravel(), minlength=4)[ROWS[layer]] / 12
        rank = 1 - (1 - share) ** 2
        by_node = share.reshape(2, 2).sum(axis=1)
        node = 1 - (1 - by_node) ** 2 if dispatch == "per_node" else 2 * rank
        assert found.node_path_WL[0, layer] == pytest.approx(100 * node.max() / 2 * 3e-4)
        assert found.rank_path_WL[0, layer] == pytest.approx(100 * rank.max() * 1e-4)
        slower = max(found.node_path_WL[0, layer], found.rank_path_WL[0, layer])
        assert found.exchange_WL[0, layer] == pytest.approx(5e-3 + slower)


def test_counts_alone_are_charged_for_hops_by_chance_in_stay():
    counts = replace(load(2), trace=None, window_T=None)
    found = evaluate(counts, plan(), COSTS, Objective(return_mode="stay"))
    for w in range(2):
        share = counts.load_WLE[w, np.arange(2)[:, None], ROWS]
        share /= share.sum(axis=1, keepdims=True)
        same_rank, same_node = (np.prod(x, axis=0).sum() for x in (share, share.reshape(2, 2, 2).sum(axis=2)))
        hops = (same_node - same_rank) * 1e-4 / 4 + (1 - same_node) * 3e-4 / 2
        assert found.exchange_WL[w] == pytest.approx([5e-3 + 200 * hops, 5e-3])


def test_hops_are_not_counted_where_no_time_hangs_on_them(monkeypatch):
    def refuse(_load):
        raise AssertionError("counted")

    monkeypatch.setattr(evaluation, "transitions_of", refuse)
    found = evaluate(load(), plan(), COSTS, Objective(return_mode="return_home"))
    with pytest.raises(AssertionError, match="counted"):
        evaluate(load(), plan(), COSTS, Objective(return_mode="stay"))
    monkeypatch.undo()
    assert found.same_node_L is not None
    assert found.same_node_L[0] > 0


def test_given_transitions_go_before_counted_ones():
    given = np.ones((1, 4, 4))
    assert transitions_of(replace(load(), transitions_LEE=given)) is given
    counted = transitions_of(load())
    assert counted is not None
    assert counted[0].sum(axis=1).tolist() == load().load_LE[0].tolist()
    assert transitions_of(replace(load(), trace=None, window_T=None)) is None


def test_windows_in_one_figure():
    seconds = np.array([1.0, 5.0, 2.0, 4.0, 3.0])
    assert aggregate(seconds, Objective()) == 3.0
    assert aggregate(seconds, Objective(aggregate="worst")) == 5.0
    assert aggregate(seconds, Objective(aggregate="cvar", cvar_tail="40 %")) == 4.5
    assert aggregate(seconds, Objective(aggregate="cvar", cvar_tail="1 %")) == 5.0
    assert aggregate(seconds, Objective(aggregate="cvar", cvar_tail="100 %")) == 3.0


def test_a_window_without_tokens_in_a_layer_costs_no_expert_time():
    counts = np.array([[[3.0, 1, 1, 1], [2, 2, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 1]]])
    quiet = ExpertLoad(counts, ("a", "b"), (0, 1), 2)
    for dispatch in ("per_node", "per_expert"):
        found = evaluate(quiet, plan(), COSTS, Objective(dispatch=dispatch))
        assert np.isfinite(found.time_WL).all()
        assert np.isfinite(found.max_over_mean_WL).all()
        assert found.expert_WL[1, 0] == pytest.approx(1e-3)


def test_where_the_nearest_copy_serves_ranks_work_on_the_pairs_counted():
    # Both copies of expert 0 are in node 0: tokens at home there take them, those of node 1 share over both, and the
    # copies of expert 1, one in each node, get their own node's tokens alone: three in node 0, one in node 1.
    rows = np.array([[0, 1, 0, 2, 1, 3]], np.int32)
    placed = Placement(rows, np.array([0, 0, 1, 1, 2, 3], np.int32), 4, 4, 2)
    tokens = np.array([[[0, 1]], [[2, 1]], [[0, 1]], [[3, 1]]])
    trace = RoutingTrace(tokens, 4, (0,), source_rank_T=np.array([0, 1, 0, 2], np.int32))
    counts = np.array([[[2.0, 4, 1, 1]]])
    found = evaluate(ExpertLoad(counts, ("all",), (0,), 2, trace), placed, COSTS, Objective(replica_split="nearest"))
    pairs = np.array([[2, 3], [0, 1], [1, 0], [1, 0]]) / 4  # of the slots of each rank, per token
    assert found.load_LR[0].tolist() == [5, 1, 1, 1]
    assert found.max_over_mean_WL[0, 0] == 5 / 2
    seconds = (2e-3 * (1 - (1 - pairs) ** 100) + 1e-2 * pairs).sum(axis=1)
    assert found.expert_WL[0, 0] == pytest.approx(1e-3 + seconds.max())
    even = evaluate(ExpertLoad(counts, ("all",), (0,), 2), placed, COSTS, Objective(replica_split="nearest"))
    assert even.load_LR[0].tolist() == [3, 2, 2, 1]


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert"])
def test_what_is_served_at_home_is_not_sent_over_a_slow_link(dispatch):
    tokens = np.array([[[0, 1]], [[1, 0]], [[2, 3]], [[3, 2]]])
    trace = RoutingTrace(tokens, 4, (0,), source_rank_T=np.array([0, 1, 2, 3], np.int32))
    placed = Placement(np.arange(4, dtype=np.int32)[None], np.arange(4, dtype=np.int32), 4, 4, 2)
    costs = replace(COSTS, link_R=(1.0, 0.25, 1.0, 1.0))
    given = ExpertLoad(np.full((1, 1, 4), 2.0), ("all",), (0,), 2, trace)
    assert evaluate(given, placed, costs, Objective(dispatch=dispatch)).node_path_WL.tolist() == [[0.0]]


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert"])
@pytest.mark.parametrize("tokens", [True, False])
def test_copies_over_a_slow_link_take_longer(dispatch, tokens):
    given = load() if tokens else replace(load(), trace=None, window_T=None)
    usual = evaluate(given, plan(), COSTS, Objective(dispatch=dispatch))
    slow = evaluate(given, plan(), replace(COSTS, link_R=(1.0, 0.01, 1.0, 1.0)), Objective(dispatch=dispatch))
    assert (slow.rank_path_WL > 20 * usual.rank_path_WL).all()
    assert (slow.node_path_WL > 20 * usual.node_path_WL).all()  # all of node 0 waits for it
    assert slow.exchange_WL == pytest.approx(5e-3 + np.maximum(slow.node_path_WL, slow.rank_path_WL))
    halved = evaluate(given, plan(), replace(COSTS, link_R=(0.5,) * 4), Objective(dispatch=dispatch))
    assert halved.exchange_WL - 5e-3 == pytest.approx(2 * (usual.exchange_WL - 5e-3))


def test_hops_in_stay_wait_for_the_slowest_link():
    stay = Objective(return_mode="stay")
    usual, slow = (evaluate(load(), plan(), replace(COSTS, link_R=links), stay) for links in ((), (0.2, 0.6, 1, 1)))
    same_rank, same_node = usual.same_rank_L[0], usual.same_node_L[0]
    hops = (same_node - same_rank) * 1e-4 / 4 / 0.2 + (1 - same_node) * 3e-4 / 2 / 0.2
    assert slow.exchange_WL[0] == pytest.approx([5e-3 + 200 * hops, 5e-3])
