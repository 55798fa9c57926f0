"""Two slots on every rank: pairing is solved by folding, so only the copies per expert are searched, and bounded.

With the copies fixed, pairing the largest with the smallest, the second with the second smallest, and so on,
minimises the largest pair sum. ``E`` experts, ``P = 2 R`` slots.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

__all__ = ["fold_bound", "fold_search"]

_OPTIONS = 6


@njit(cache=True, nogil=True)
def _sorted_copies(load_E, copies_E, out_P):
    n = 0
    for e in range(len(load_E)):
        for _ in range(copies_E[e]):
            out_P[n] = load_E[e] / copies_E[e]
            n += 1
    out_P.sort()


@njit(cache=True, nogil=True)
def _fold_price(sorted_P, floor):
    """Largest pair sum, plus a little of what all pairs have above ``floor`` to keep a slope."""
    peak = 0.0
    over = 0.0
    slots = len(sorted_P)
    for i in range(slots // 2):
        pair = sorted_P[i] + sorted_P[slots - 1 - i]
        peak = max(peak, pair)
        over += max(0.0, pair - floor)
    return peak + 0.2 * over / slots


@njit(cache=True, nogil=True)
def _replace(sorted_P, load1, copies1, load2, copies2, out_P):
    """Copies of the whole layer, sorted, once one copy has gone from expert 1 to expert 2."""
    old1 = load1 / copies1
    old2 = load2 / copies2
    new1 = load1 / (copies1 - 1)
    new2 = load2 / (copies2 + 1)
    drop1 = copies1
    drop2 = copies2
    add1 = copies1 - 1
    add2 = copies2 + 1
    n = 0
    for x in sorted_P:
        while add1 > 0 and new1 <= x and (add2 == 0 or new1 <= new2):
            out_P[n] = new1
            n += 1
            add1 -= 1
        while add2 > 0 and new2 <= x:
            out_P[n] = new2
            n += 1
            add2 -= 1
        while add1 > 0 and new1 <= x:
            out_P[n] = new1
            n += 1
            add1 -= 1
        if drop1 > 0 and x == old1:
            drop1 -= 1
        elif drop2 > 0 and x == old2:
            drop2 -= 1
        else:
            out_P[n] = x
            n += 1
    while add1 > 0 or add2 > 0:
        if add1 > 0 and (add2 == 0 or new1 <= new2):
            out_P[n] = new1
            add1 -= 1
        else:
            out_P[n] = new2
            add2 -= 1
        n += 1


@njit(cache=True, nogil=True)
def fold_search(load_E, copies_E, floor, max_copies, proposals, seed):
    """Copies per expert whose folded pairs have the least largest sum found by annealing.

    Args:
        load_E: loads, mean over ranks 1.
        copies_E: start; sums to an even ``P``.
        floor: a lower bound of the largest pair.
        max_copies: limit per expert (the number of ranks).
    """
    np.random.seed(seed)
    experts = len(load_E)
    copies_E = copies_E.copy()
    slots = copies_E.sum()
    sorted_P = np.empty(slots)
    trial_P = np.empty(slots)
    _sorted_copies(load_E, copies_E, sorted_P)
    price = _fold_price(sorted_P, floor)
    best = copies_E.copy()
    best_price = price
    temperature = 1e-3
    cooling = (1e-3) ** (1.0 / max(1, proposals))
    for _ in range(proposals):
        temperature *= cooling
        e1 = np.random.randint(experts)
        e2 = np.random.randint(experts)
        if e1 == e2 or copies_E[e1] < 2 or copies_E[e2] == 0 or copies_E[e2] >= max_copies:
            continue
        _replace(sorted_P, load_E[e1], copies_E[e1], load_E[e2], copies_E[e2], trial_P)
        trial = _fold_price(trial_P, floor)
        if trial <= price or np.random.random() < np.exp((price - trial) / temperature):
            sorted_P, trial_P = trial_P, sorted_P
            copies_E[e1] -= 1
            copies_E[e2] += 1
            price = trial
            if price < best_price - 1e-12:
                best_price = price
                best[:] = copies_E
    return best


def _feasible(load_E: NDArray[np.float64], ranks: int, limit: float, thresholds: int) -> bool:
    """Whether the linear relaxation of "all pairs stay within ``limit``" has a solution.

    ``z[e, x]`` is the part of expert ``e`` that has ``x`` copies more than it must have. Whatever the pairing, the
    copies above ``limit - t`` need as many partners of at most ``t``: one row per threshold ``t`` below half the
    limit. The last option stands for all larger ``x``: it takes the slots of the least and serves as well as the best.
    """
    least_E = np.maximum(1, np.ceil(load_E / limit - 1e-12)).astype(np.int64)
    spare = 2 * ranks - int(least_E.sum())
    if spare < 0 or (least_E > ranks).any():
        return False
    copies_EX = least_E[:, None] + np.arange(spare + 1)
    size_EX = load_E[:, None] / copies_EX
    levels = np.unique(size_EX[size_EX < limit / 2])
    if len(levels) > thresholds:
        levels = levels[np.linspace(0, len(levels) - 1, thresholds).astype(np.int64)]
    large = size_EX > limit - levels[:, None, None] + 1e-12
    short = copies_EX * (large.astype(np.float64) - (size_EX <= levels[:, None, None]))
    kept = min(spare, _OPTIONS)
    short = np.concatenate([short[:, :, :kept], short[:, :, kept:].min(axis=2, keepdims=True)], axis=2)
    taken_EX = copies_EX[:, : kept + 1]
    experts, options = taken_EX.shape
    one_each = csr_array(
        (np.ones(taken_EX.size), (np.repeat(np.arange(experts), options), np.arange(taken_EX.size)))
    )
    answer = linprog(
        np.zeros(taken_EX.size),
        A_ub=np.vstack([short.reshape(len(levels), -1), taken_EX.reshape(1, -1)]),
        b_ub=np.append(np.zeros(len(levels)), 2.0 * ranks),
        A_eq=one_each,
        b_eq=np.ones(experts),
        bounds=(0, None),
        method="highs",
    )
    return bool(answer.status != 2)


def fold_bound(load_E: NDArray[np.float64], ranks: int, floor: float, value: float, tests: int = 4) -> float:
    """Lower bound on the largest pair sum: the largest limit found whose relaxation has no solution.

    Args:
        load_E: loads, mean over ranks 1.
        floor: a bound already known.
        value: the largest pair of a known plan; limits between ``floor`` and ``value`` are tested.
        tests: linear programmes solved.
    """
    low, high = floor, value
    limit = max(low, value / 1.005)
    for _ in range(tests):
        if high <= low * 1.0005:
            break
        if _feasible(load_E, ranks, limit, thresholds=60):
            high = limit
        else:
            low = limit
        limit = 0.5 * (low + high)
    return low
