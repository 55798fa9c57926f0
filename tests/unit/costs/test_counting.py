from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs import counting
from moeplan.costs.counting import choose_slots, count_loads, count_trace, home_ranks, hop_shares
from moeplan.errors import PlanError

# Two nodes of two ranks; rank 1 of node 0 failed; slot 3 stays empty in layer 1.
ROWS = np.array([[0, 1, 2, 0, 3, 1, 0], [3, 0, 1, -1, 2, 3, 1]], np.int32)
RANKS = np.array([0, 0, 0, 2, 2, 3, 3], np.int32)


def placed(rows=ROWS, ranks=RANKS, num_ranks=4, per_node=2, share=None) -> Placement:
    return Placement(rows, ranks, 4, num_ranks, per_node, share)


def traced(tokens=300, seed=0, windows=1, padding=0.1, source=None, layers=2) -> ExpertLoad:
    rng = np.random.default_rng(seed)
    experts = np.stack([[rng.permutation(4)[:2] for _ in range(layers)] for _ in range(tokens)])
    experts[rng.random(experts.shape) < padding] = -1
    trace = RoutingTrace(experts, 4, tuple(range(layers)), source_rank_T=source)
    window_T = rng.integers(windows, size=tokens) if windows > 1 else np.zeros(tokens, np.int64)
    load = np.zeros((windows, layers, 4))
    for t in range(tokens):
        for layer in range(layers):
            for e in experts[t, layer]:
                if e >= 0:
                    load[window_T[t], layer, e] += 1
    return ExpertLoad(load, tuple(f"w{w}" for w in range(windows)), trace.layer_ids, 2, trace, window_T)


def slow_counts(load, placement, split, homes_known):
    """What each token touches, one token at a time, from the slots chosen for it."""
    trace = load.trace
    live = sorted(set(placement.rank_of_slot_P.tolist()))
    W, L, R = len(load.windows), placement.num_layers, placement.num_ranks
    N, per_node = R // placement.ranks_per_node, placement.ranks_per_node
    pairs, ranks_in, pairs_in, ranks_away = np.zeros((4, W, L, R))
    nodes_in, nodes, ranks = np.zeros((W, L, N)), np.zeros((W, L)), np.zeros((W, L))
    elsewhere = [sum(r // per_node != n for r in live) / len(live) for n in range(N)]
    tokens_W = [max(1, int((load.window_T == w).sum())) for w in range(W)]
    home = [live[t % len(live)] if trace.source_rank_T is None else int(trace.source_rank_T[t])
            for t in range(trace.num_tokens)]  # fmt: skip
    for layer in range(L):
        slots = choose_slots(trace.experts_TLK[:, layer], np.array(home, np.int32), placement, layer, split)
        for t in range(trace.num_tokens):
            w = int(load.window_T[t])
            touched = [int(placement.rank_of_slot_P[s]) for s in slots[t] if s >= 0]
            for r in touched:
                pairs[w, layer, r] += 1 / tokens_W[w]
                away = float(home[t] // per_node != r // per_node) if homes_known else elsewhere[r // per_node]
                pairs_in[w, layer, r] += away / tokens_W[w]
            for r in set(touched):
                away = float(home[t] // per_node != r // per_node) if homes_known else elsewhere[r // per_node]
                ranks_in[w, layer, r] += 1 / tokens_W[w]
                ranks_away[w, layer, r] += away / tokens_W[w]
            for n in {r // per_node for r in touched}:
                away = float(home[t] // per_node != n) if homes_known else elsewhere[n]
                nodes_in[w, layer, n] += away / tokens_W[w]
            ranks[w, layer] += len(set(touched)) / tokens_W[w]
            nodes[w, layer] += len({r // per_node for r in touched}) / tokens_W[w]
    return pairs, nodes_in, pairs_in, ranks_in, ranks_away, nodes, ranks


@pytest.mark.parametrize("split", ["even", "nearest", "weighted"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("at_once", [70, 1 << 16])  # in parts, layers side by side; or all in one
def test_counts_are_those_of_one_token_at_a_time(monkeypatch, split, recorded, at_once):
    monkeypatch.setattr(counting, "_TOKENS_AT_ONCE", at_once)
    source = np.random.default_rng(5).choice([0, 2, 3], size=300).astype(np.int32) if recorded else None
    load, plan = traced(windows=3, source=source), placed()
    found = count_trace(load, plan, split)
    expected = slow_counts(load, plan, split, recorded or split == "nearest")
    arrays = (
        found.pairs_WLR, found.node_arrivals_WLN, found.away_pairs_WLR, found.rank_arrivals_WLR,
        found.away_rank_arrivals_WLR, found.nodes_per_token_WL, found.ranks_per_token_WL,
    )  # fmt: skip
    for array, slow in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(array, slow, atol=1e-12)
    assert found.pairs_WLR[:, :, 1].sum() == 0  # the failed rank works on nothing


@pytest.mark.parametrize("split", ["even", "nearest", "weighted"])
def test_a_selection_goes_to_a_slot_of_its_expert_and_padding_nowhere(split):
    load, plan = traced(), placed()
    home = home_ranks(load, np.array([0, 2, 3]))
    for layer in range(2):
        experts = load.trace.experts_TLK[:, layer]
        slots = choose_slots(experts, home, plan, layer, split)
        assert (slots[experts < 0] == -1).all()
        assert (ROWS[layer][slots[experts >= 0]] == experts[experts >= 0]).all()


def test_nearest_is_the_home_rank_then_the_home_node_then_any():
    rows, ranks = np.array([[0, 1, 0, 1, 0, 2, 1, 3]], np.int32), np.arange(8, dtype=np.int32) // 2
    plan = placed(rows, ranks)  # expert 0 on ranks 0, 1, 2; expert 1 on 0, 1, 3; 2 on rank 2; 3 on rank 3
    experts = np.random.default_rng(0).integers(4, size=(4000, 1))
    home = (np.arange(4000) % 4).astype(np.int32)
    rank = ranks[choose_slots(experts, home, plan, 0, "nearest")[:, 0]]
    for expert, holders in {0: {0, 1, 2}, 1: {0, 1, 3}, 2: {2}, 3: {3}}.items():
        for at in range(4):
            seen = set(rank[(experts[:, 0] == expert) & (home == at)].tolist())
            near = {r for r in holders if r // 2 == at // 2}
            assert seen == ({at} if at in holders else near or holders)


def test_even_copies_get_equal_parts_and_weighted_ones_their_shares():
    rows, ranks = np.array([[0, 1, 0, 2, 0, 3]], np.int32), np.array([0, 0, 1, 1, 2, 2], np.int32)
    share = np.array([[0.6, 1, 0.3, 1, 0.1, 1]])
    experts, home = np.zeros((30000, 1), np.int64), np.zeros(30000, np.int32)
    for split, parts in (("even", [1 / 3] * 3), ("weighted", [0.6, 0.3, 0.1])):
        slots = choose_slots(experts, home, placed(rows, ranks, 3, 3, share), 0, split)[:, 0]
        found = np.bincount(slots, minlength=6)[[0, 2, 4]] / 30000
        # five standard deviations of a share
        np.testing.assert_allclose(found, parts, atol=5 * (0.25 / 30000) ** 0.5)


def test_homes_are_recorded_ranks_or_spread_over_the_live_ones():
    assert home_ranks(traced(tokens=5), np.array([0, 2, 3])).tolist() == [0, 2, 3, 0, 2]
    recorded = traced(tokens=3, source=np.array([3, 3, 0], np.int32))
    assert home_ranks(recorded, np.array([0, 2, 3])).tolist() == [3, 3, 0]
    with pytest.raises(PlanError, match=r"source_rank \(3, token 0\) is not a live rank"):
        home_ranks(recorded, np.array([0, 1]))


def test_what_cannot_be_counted_is_refused():
    load = traced()
    counts_only = replace(load, trace=None, window_T=None)
    with pytest.raises(PlanError, match="counts only"):
        count_trace(counts_only, placed())
    with pytest.raises(PlanError, match="counts only"):
        home_ranks(counts_only, np.array([0]))
    with pytest.raises(PlanError, match="one model"):
        count_trace(load, placed(ROWS[:1]))
    with pytest.raises(PlanError, match=r"window 1 but the load has 1"):
        count_trace(replace(load, window_T=np.ones(300, np.int64)), placed())


def test_loads_follow_counts_and_shares():
    load_WLE = np.array([[[60, 20, 4, 8], [1, 2, 3, 4]], [[0, 0, 0, 6], [6, 0, 0, 0]]], float)
    even = count_loads(load_WLE, placed())
    # layer 0: expert 0 in slots 0, 3, 6; expert 1 in 1, 5; layer 1: expert 3 in 0, 5; 1 in 2, 6
    np.testing.assert_allclose(even[0], [[20 + 10 + 4, 0, 20 + 8, 10 + 20], [2 + 1 + 1, 0, 3, 2 + 1]])
    np.testing.assert_allclose(even[1], [[0, 0, 6, 0], [6, 0, 0, 0]])
    share = np.array([[0.5, 1, 1, 0.5, 1, 0, 0], [1, 1, 1, 0, 1, 0, 0]])
    uneven = count_loads(load_WLE, placed(share=share))
    np.testing.assert_allclose(uneven[0], [[30 + 20 + 4, 0, 30 + 8, 0], [4 + 1 + 2, 0, 3, 0]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_hop_shares_are_those_of_every_pair_of_copies(seed):
    rng = np.random.default_rng(seed)
    rows = np.stack([np.concatenate([rng.permutation(4), rng.integers(-1, 4, 4)]) for _ in range(3)])
    ranks = np.sort(np.concatenate([np.arange(4), rng.integers(4, size=4)])).astype(np.int32)
    plan = placed(rows.astype(np.int32), ranks)
    flow = rng.integers(0, 5, (2, 4, 4)).astype(float)
    flow[:, 0, 0] += 1
    on_rank, on_node = hop_shares(flow, plan)
    for layer in range(2):
        same_rank = same_node = 0.0
        for s, e in enumerate(rows[layer]):
            for q, f in enumerate(rows[layer + 1]):
                if e < 0 or f < 0:
                    continue
                part = flow[layer, e, f] / (rows[layer] == e).sum() / (rows[layer + 1] == f).sum()
                same_rank += part * (ranks[s] == ranks[q])
                same_node += part * (ranks[s] // 2 == ranks[q] // 2)
        assert on_rank[layer] == pytest.approx(same_rank / flow[layer].sum(), abs=1e-12)
        assert on_node[layer] == pytest.approx(same_node / flow[layer].sum(), abs=1e-12)
