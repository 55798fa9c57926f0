"""The compiled searches against recounts and against every arrangement of tiny layers."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from moeplan.planning.exact import arrangements
from moeplan.planning.search_home import anneal_home, group_arrivals, load_price, pack_tokens
from moeplan.planning.search_stay import anneal_stay, kept_value


def slow_arrivals(copies_TK, window_T, copy_of_slot_P, first_G, windows, home_T=None):
    """Distinct tokens that touch each group but their home, one token at a time."""
    out = np.zeros((windows, len(first_G) - 1))
    for t, (chosen, w) in enumerate(zip(copies_TK, window_T, strict=True)):
        for g in range(len(first_G) - 1):
            out[w, g] += (home_T is None or home_T[t] != g) and bool(
                set(copy_of_slot_P[first_G[g] : first_G[g + 1]].tolist()) & set(chosen[chosen >= 0].tolist())
            )
    return out


def some_tokens(copies, tokens=150, windows=2, seed=0):
    rng = np.random.default_rng(seed)
    block = rng.integers(2, size=tokens)
    weight = np.where(np.arange(copies) % 2 == block[:, None], 6.0, 1.0)
    copies_TK = np.argsort(-np.log(weight) - rng.gumbel(size=(tokens, copies)), axis=1)[:, :2].astype(np.int32)
    copies_TK[rng.random(tokens) < 0.05, 1] = -1
    return copies_TK, np.sort(rng.integers(windows, size=tokens)), rng


def test_group_arrivals_count_distinct_tokens():
    copies_TK, window_T, rng = some_tokens(9, tokens=333, windows=3)
    bits, start = pack_tokens(copies_TK, window_T, 9)
    slots, first = rng.permutation(9), np.array([0, 2, 2, 5, 9])
    slots[4] = -1
    everyone = ~np.zeros((1, bits.shape[1]), np.uint64)
    found = group_arrivals(bits, slots, first, everyone, start)
    np.testing.assert_array_equal(found, slow_arrivals(copies_TK, window_T, slots, first, 3))
    home_T = rng.integers(4, size=len(window_T))
    away = ~pack_tokens(home_T[:, None].astype(np.int32), window_T, 4)[0]
    found = group_arrivals(bits, slots, first, away, start)
    np.testing.assert_array_equal(found, slow_arrivals(copies_TK, window_T, slots, first, 3, home_T))


class Home:
    """A small layer, its price of any arrangement worked out slowly, and the search's answer."""

    def __init__(self, copies=6, ranks=4, per_node=2, empty=0, windows=2, seed=0, speeds=None, node=1.0, rank=0.3,
                 homes=False, slow=1.0):
        self.copies_TK, self.window_T, rng = some_tokens(copies, windows=windows, seed=seed)
        self.bits, self.start = pack_tokens(self.copies_TK, self.window_T, copies)
        self.home_T = rng.integers(ranks // per_node, size=len(self.window_T)) if homes else None
        self.away = ~np.zeros((ranks // per_node, self.bits.shape[1]), np.uint64)
        if self.home_T is not None:
            self.away = ~pack_tokens(self.home_T[:, None], self.window_T, ranks // per_node)[0]
        size = -(-(copies + empty) // ranks)
        self.slots = np.concatenate([np.arange(copies), np.full(ranks * size - copies, -1)])
        self.rank_P = np.repeat(np.arange(ranks, dtype=np.int32), size)
        self.first_R = np.arange(0, ranks * size + 1, size)
        self.first_N = self.first_R[::per_node].copy()
        self.per_node, self.windows = per_node, windows
        self.weight = 1.0 / np.bincount(self.window_T) / windows
        self.load = rng.lognormal(0, 0.5, (windows, copies)) / copies * ranks
        self.speed = np.ones(ranks) if speeds is None else np.array(speeds)
        self.base, self.cap = np.full(windows, 1.0), np.full(windows, 0.2)
        self.held, self.most = self.load.mean(axis=0), np.inf
        self.expert = np.arange(copies)
        self.prices = (0.05, 2.0, 0.1, node, rank)
        self.pace_R = np.array([slow] + [1.0] * (ranks - 1))
        self.pace_N = self.pace_R[::per_node]

    def price(self, slots) -> float:
        slope, steep, peak, node, rank = self.prices
        total = 0.0
        for value, first, home_T, pace in (
            (node, self.first_N, self.home_T, self.pace_N), (rank, self.first_R, None, self.pace_R)
        ):  # fmt: skip
            arrivals = slow_arrivals(self.copies_TK, self.window_T, slots, first, self.windows, home_T) * pace
            total += value * float((self.weight * 0.5 * (arrivals.max(axis=1) + arrivals.mean(axis=1))).sum())
        for w in range(self.windows):
            held_R = [sum(self.load[w, c] for c in slots[self.rank_P == r] if c >= 0) for r in range(len(self.speed))]
            total += peak * max(np.array(held_R) / self.speed) / self.windows
            for held, speed in zip(held_R, self.speed, strict=True):
                over = held / speed - self.base[w]
                if over > 0:
                    total += 0.5 * slope * over**2 / self.cap[w] / self.windows
                    total += steep * max(0.0, over - self.cap[w]) / self.windows
        return total

    def search(self, proposals=20_000, seed=0):
        slope, steep, peak, node, rank = self.prices
        return anneal_home(
            self.bits, self.away, self.start, self.weight, self.expert, self.load, self.slots.copy(), self.rank_P,
            self.first_R, self.first_N, self.per_node, self.speed, self.pace_N, self.pace_R, len(self.pace_N), 1,
            self.base, self.cap, self.held, self.most, slope, steep, peak, node, rank, 0.3, proposals, seed,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("copies", "ranks", "per_node", "homes", "slow"),
    [
        (8, 4, 2, False, 1.0), (6, 3, 3, False, 1.0), (6, 2, 1, False, 1.0), (6, 2, 1, True, 1.0),
        (6, 2, 1, True, 2.0),
    ],
)  # fmt: skip
def test_home_finds_the_cheapest_arrangement(copies, ranks, per_node, homes, slow, seed):
    home = Home(copies, ranks, per_node, seed=seed, homes=homes, slow=slow)
    found = home.search(8_000, seed)
    assert sorted(found.tolist()) == list(range(copies))
    # nodes and ranks are alike: one arrangement of each kind is enough for six copies; eight are sampled by swaps
    if copies == 6:
        every = [np.argsort(row, kind="stable") for row in arrangements(copies, ranks)]
        every += [np.roll(slots, copies // ranks) for slots in every]  # where homes or links count, nodes are not alike
        assert home.price(found) == pytest.approx(min(home.price(slots) for slots in every), abs=1e-12)
    for s in range(copies):
        for q in range(s):
            other = found.copy()
            other[[s, q]] = other[[q, s]]
            assert home.price(other) >= home.price(found) - 1e-12


def test_home_at_unequal_speeds_and_with_copies_of_one_expert():
    home = Home(8, 4, 2, speeds=[1.0, 0.5, 1.0, 0.8], seed=4)
    home.expert = np.array([0, 0, 1, 2, 3, 4, 5, 5])
    home.slots = np.array([0, 2, 1, 3, 4, 6, 5, 7])
    before = home.price(home.slots)
    found = home.search()
    assert home.price(found) < before
    for r in range(4):
        held = home.expert[found[home.rank_P == r]].tolist()
        assert len(set(held)) == len(held)


def test_home_leaves_empty_slots_empty_and_repeats_itself():
    home = Home(6, 4, 2, seed=1)
    found = home.search(4_000, 7)
    assert (found[home.slots < 0] == -1).all()
    assert sorted(found[found >= 0].tolist()) == list(range(6))
    assert home.search(4_000, 7).tolist() == found.tolist()


def test_home_respects_a_cap_it_can_meet():
    for seed in range(4):
        home = Home(8, 4, 2, seed=seed, node=0.02, rank=0.0)
        loads = home.load.mean(axis=0)
        home.load[:] = loads
        pairs = [np.argsort(row, kind="stable") for row in arrangements(8, 4)]
        best = min(loads[slots].reshape(4, 2).sum(axis=1).max() for slots in pairs)
        home.base[:], home.cap[:] = best, 0.02
        found = home.search(20_000, seed)
        assert loads[found].reshape(4, 2).sum(axis=1).max() <= best * 1.02 + 1e-9


def test_home_keeps_what_a_rank_may_hold_however_much_traffic_that_costs():
    for seed in range(4):
        home = Home(8, 4, 2, seed=seed, node=5.0, rank=0.0)
        pairs = [np.argsort(row, kind="stable") for row in arrangements(8, 4)]
        held = [home.held[slots].reshape(4, 2).sum(axis=1).max() for slots in pairs]
        home.slots = pairs[int(np.argmin(held))].copy()
        tight = min(held) * 1.02
        assert home.held[home.search(20_000, seed)].reshape(4, 2).sum(axis=1).max() > tight
        home.most = tight
        assert home.held[home.search(20_000, seed)].reshape(4, 2).sum(axis=1).max() <= tight


def test_load_price_rises_to_the_slope_at_the_cap():
    assert load_price(0.9, 1.0, 3.0, 0.2, 7.0) == 0.0
    assert load_price(1.2, 1.0, 3.0, 0.2, 7.0) == pytest.approx(0.3)
    step = 1e-6
    slope = (load_price(1.2, 1.0, 3.0, 0.2, 7.0) - load_price(1.2 - step, 1.0, 3.0, 0.2, 7.0)) / step
    assert slope == pytest.approx(3.0, rel=1e-4)
    assert load_price(1.3, 1.0, 3.0, 0.2, 7.0) == pytest.approx(0.5 * 3 * 0.09 / 0.2 + 7 * 0.1)


def slow_kept(flow, rows, share, rank_P, per_node, node_value, rank_value) -> float:
    total = 0.0
    for layer in range(len(rows) - 1):
        for s, e in enumerate(rows[layer]):
            for q, f in enumerate(rows[layer + 1]):
                if e >= 0 and f >= 0:
                    part = flow[layer, e, f] * share[layer, s] * share[layer + 1, q]
                    total += part * rank_value * (rank_P[s] == rank_P[q])
                    total += part * node_value * (rank_P[s] // per_node == rank_P[q] // per_node)
    return total


def stay_case(seed, copies=True):
    rng = np.random.default_rng(seed)
    experts, ranks, layers, windows = 6, 4, 3, 2
    flow = rng.random((layers - 1, experts, experts)) ** 3
    flow /= flow.sum(axis=(1, 2), keepdims=True)
    spare = [0, 1] if copies else [-1, -1]
    rows = np.stack([np.array([0, 1, 2, 3, 4, 5, *spare])[[0, 2, 1, 3, 4, 6, 5, 7]] for _ in range(layers)])
    many = np.stack([np.bincount(row[row >= 0], minlength=experts) for row in rows])
    share = np.where(rows < 0, 0.0, 1.0 / many[np.arange(layers)[:, None], np.maximum(rows, 0)])
    load = rng.lognormal(0, 0.5, (layers, windows, experts))
    load *= ranks / load.sum(axis=2, keepdims=True)
    cost = np.stack([load[l][:, np.maximum(rows[l], 0)] * share[l] for l in range(layers)])
    return flow, rows.astype(np.int64), share, cost, np.repeat(np.arange(ranks, dtype=np.int32), 2)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_stay_returns_the_value_of_what_it_returns(seed, copies):
    flow, rows, share, cost, rank_P = stay_case(seed, copies)
    start, share_before, cost_before = rows.copy(), share.copy(), cost.copy()
    back = np.ascontiguousarray(flow.transpose(0, 2, 1))
    base, cap = np.full((3, 2), 1.1), np.full((3, 2), 0.3)
    speed = np.array([1.0, 0.8, 1.0, 1.0])
    slope, steep, node_value, rank_value = 0.02, 1.0, 0.5, 0.25

    def price_of(rows, cost) -> float:
        total = 0.0
        for layer, w, r in np.ndindex(3, 2, 4):
            load = sum(cost[layer, w, s] for s in range(8) if rank_P[s] == r and rows[layer, s] >= 0) / speed[r]
            total += load_price(load, 1.1, slope, 0.3, steep) / 2
        return total

    value = anneal_stay(
        flow, back, rows, share, cost, rank_P, 2, speed, base, cap, slope, steep, node_value, rank_value, 30, 300,
        0.4, True, seed,
    )  # fmt: skip
    kept = slow_kept(flow, rows, share, rank_P, 2, node_value, rank_value)
    assert kept_value(flow, rows, share, rank_P, 4, 2, node_value, rank_value) == pytest.approx(kept)
    at_start = slow_kept(flow, start, share_before, rank_P, 2, node_value, rank_value)
    assert value == pytest.approx(kept - price_of(rows, cost))
    assert value > at_start - price_of(start, cost_before)
    for row, before in zip(rows, start, strict=True):
        assert sorted(row.tolist()) == sorted(before.tolist())
        assert all(len({e for e in pair if e >= 0}) == sum(e >= 0 for e in pair) for pair in row.reshape(4, 2).tolist())


def test_stay_reaches_the_best_of_all_chains():
    rng = np.random.default_rng(3)
    flow = rng.random((1, 4, 4)) ** 2
    flow /= flow.sum()
    rank_P, share = np.arange(4, dtype=np.int32), np.ones((2, 4))

    def search(seed: int) -> float:
        rows, cost = np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), np.ones((2, 1, 4))
        return anneal_stay(
            flow, np.ascontiguousarray(flow.transpose(0, 2, 1)), rows, share.copy(), cost, rank_P, 2, np.ones(4),
            np.ones((2, 1)), np.ones((2, 1)), 0.1, 1.0, 0.5, 0.25, 50, 300, 0.4, True,
            seed,
        )  # fmt: skip

    best = max(
        slow_kept(flow, [first, second], share, rank_P, 2, 0.5, 0.25)
        for first in permutations(range(4)) for second in permutations(range(4))
    )  # fmt: skip
    found = [search(seed) for seed in range(8)]
    assert max(found) == pytest.approx(best)
    assert min(found) > 0.9 * best
