"""Balanced layers: how many copies each expert gets and where they go, for load alone.

Greedy copies and longest-processing-time-first packing start it (Graham 1969); two slots per rank are folded
(:mod:`moeplan.planning.fold`); compiled annealing finishes. ``W`` windows, ``E`` experts, ``P`` slots, ``R`` ranks,
``C`` most copies of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY
from moeplan.errors import InfeasibleError
from moeplan.planning.fold import fold_search
from moeplan.planning.search_load import anneal_load, rank_loads

__all__ = ["LayerLoad", "balance_layer", "load_bound", "spread_copies"]

_HEAT, _MORE_HEAT, _FEW_SLOTS = 2e-3, 0.1, 64


@dataclass(frozen=True, slots=True, eq=False)
class LayerLoad:
    """One layer to balance. ``copy_WEC[w, e, c-1]``: what one of ``c`` copies costs, ranks averaging about 1.

    ``group_R`` numbers the groups that may hold one copy of an expert at most: the rank itself, or its node.
    """

    copy_WEC: NDArray[np.float64]
    rank_of_slot_P: NDArray[np.int32]
    speed_R: NDArray[np.float64]
    group_R: NDArray[np.int64]

    @property
    def total_EC(self) -> NDArray[np.float64]:
        """Mean over windows."""
        mean: NDArray[np.float64] = self.copy_WEC.mean(axis=0)
        return mean

    @property
    def most_copies(self) -> int:
        """Copies an expert can have: one per group with slots, at most ``C``."""
        return min(len(np.unique(self.group_R[self.rank_of_slot_P])), int(self.copy_WEC.shape[2]))


def spread_copies(layer: LayerLoad) -> NDArray[np.int64]:
    """Copies per expert that make the costliest copy least: each spare slot goes to the costliest (exact).

    Raises:
        InfeasibleError: fewer slots than experts.
    """
    experts, slots = layer.copy_WEC.shape[1], len(layer.rank_of_slot_P)
    if slots < experts:
        raise InfeasibleError(
            f"{slots} slots cannot hold {experts} experts: {experts - slots} short; add ranks or slots (--redundant)"
        )
    total_EC = layer.total_EC
    copies = np.ones(experts, dtype=np.int64)
    rows = np.arange(experts)
    for _ in range(min(slots, experts * layer.most_copies) - experts):
        cost = np.where(copies < layer.most_copies, total_EC[rows, copies - 1], -1.0)
        copies[int(cost.argmax())] += 1
    return copies


def _pack(layer: LayerLoad, copies_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Costliest copy first onto the rank that finishes first and may hold it."""
    ranks = len(layer.speed_R)
    cost_E = layer.total_EC[np.arange(len(copies_E)), copies_E - 1]
    # Experts with a copy for every group go first: they have no choice.
    order = np.lexsort((np.arange(len(copies_E)), -cost_E, -(copies_E >= layer.most_copies).astype(int)))
    free_R = np.bincount(layer.rank_of_slot_P, minlength=ranks)
    load_R = np.zeros(ranks)
    content: list[list[int]] = [[] for _ in range(ranks)]
    held: list[set[int]] = [set() for _ in range(int(layer.group_R.max()) + 1)]
    group = layer.group_R

    def put(e: int, r: int) -> None:
        content[r].append(e)
        held[group[r]].add(e)
        free_R[r] -= 1
        load_R[r] += cost_E[e]

    for expert in order:
        e = int(expert)
        for _ in range(int(copies_E[e])):
            finish = (load_R + cost_E[e]) / layer.speed_R
            open_R = [r for r in range(ranks) if free_R[r] > 0 and e not in held[group[r]]]
            if open_R:
                put(e, min(open_R, key=lambda r: (finish[r], r)))
                continue
            # Every free slot is beside a copy of e: some other expert f moves there, e takes its place.
            for r, q in (
                (r, q) for r in range(ranks) if free_R[r] > 0 for q in range(ranks) if e not in held[group[q]]
            ):
                f = next((f for f in content[q] if f not in held[group[r]]), None)
                if f is not None:
                    content[q].remove(f)
                    held[group[q]].discard(f)
                    free_R[q] += 1
                    load_R[q] -= cost_E[f]
                    put(f, r)
                    put(e, q)
                    break
            # else: no place left that may hold it; the slot stays empty.
    slots = np.full(len(layer.rank_of_slot_P), EMPTY, dtype=np.int64)
    for r in range(ranks):
        own = np.flatnonzero(layer.rank_of_slot_P == r)
        slots[own[: len(content[r])]] = content[r]
    return slots


def load_bound(layer: LayerLoad) -> float:
    """Lower bound on the costliest rank over all placements, for window-averaged costs.

    The larger of the mean (all copies together cost at least one copy of each; speeds add up), the costliest single
    copy with copies spread best on the fastest rank, and, without spare slots, the pigeonhole bound: among the
    ``k R + 1`` costliest experts some rank has ``k + 1``, and the rest of that rank is filled with the cheapest.
    """
    live = np.unique(layer.rank_of_slot_P)
    speed = layer.speed_R[live]
    one_E = np.sort(layer.total_EC[:, 0])[::-1]
    copies_E = spread_copies(layer)
    cost = layer.total_EC[np.arange(len(copies_E)), copies_E - 1]
    bound = max(float(one_E.sum() / speed.sum()), float(cost.max() / speed.max()))
    sizes = np.bincount(layer.rank_of_slot_P)[live]
    if len(layer.rank_of_slot_P) == len(one_E) and (sizes == sizes[0]).all():
        size, ranks = int(sizes[0]), len(live)
        for k in range(size):
            top = one_E[: k * ranks + 1][-(k + 1) :].sum()
            rest = one_E[len(one_E) - (size - k - 1) :].sum() if size > k + 1 else 0.0
            bound = max(bound, float((top + rest) / speed.max()))
    return bound


def balance_layer(layer: LayerLoad, proposals: int, seed: int) -> NDArray[np.int64]:
    """Expert in each slot, its costliest rank (averaged over windows) as low as the search finds.

    Raises:
        InfeasibleError: fewer slots than experts.
    """
    copies = spread_copies(layer)
    floor = load_bound(layer)
    starts = [_pack(layer, copies)]
    sizes = np.bincount(layer.rank_of_slot_P, minlength=len(layer.speed_R))
    replicate = bool(copies.max() > 1)
    one_per_rank = len(np.unique(layer.group_R)) == len(layer.speed_R)
    if replicate and (sizes == 2).all() and (layer.speed_R == 1).all() and one_per_rank:
        folded = fold_search(layer.total_EC[:, 0], copies, floor, layer.most_copies, 3 * proposals, seed)
        starts.append(_fold_pairs(layer, folded))

    def peak(slots: NDArray[np.int64]) -> float:
        loads = rank_loads(layer.copy_WEC, slots, layer.rank_of_slot_P, layer.speed_R)
        return float(loads.max(axis=1).mean())

    best = min(starts, key=peak)
    windows = layer.copy_WEC.shape[0]
    # Where a slot is much of a rank's load, every swap is a large step: a second, hotter search gets over it.
    for heat in (_HEAT, _MORE_HEAT) if len(layer.rank_of_slot_P) <= _FEW_SLOTS else (_HEAT,):
        if peak(best) <= floor * (1 + 1e-4):
            break
        found = anneal_load(
            layer.copy_WEC, best.copy(), layer.rank_of_slot_P, layer.group_R, layer.speed_R,
            np.full(windows, floor), replicate, heat, proposals, seed,
        )  # fmt: skip
        best = min(best, found, key=peak)
    return best


def _fold_pairs(layer: LayerLoad, copies_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Largest copy with smallest, and so on; a pair of one expert trades partners with a neighbour."""
    cost_E = layer.total_EC[:, 0] / copies_E
    expert_P = np.repeat(np.arange(len(copies_E)), copies_E)
    order = expert_P[np.argsort(-cost_E[expert_P], kind="stable")]
    half = len(order) // 2
    pairs = np.stack([order[:half], order[::-1][:half]], axis=1)
    for i in range(half):
        if pairs[i, 0] == pairs[i, 1]:
            for j in range(half - 1, -1, -1):
                if pairs[i, 0] not in pairs[j] and pairs[j, 1] != pairs[i, 0]:
                    pairs[i, 1], pairs[j, 1] = pairs[j, 1], pairs[i, 1]
                    break
    return pairs.reshape(-1).astype(np.int64)
