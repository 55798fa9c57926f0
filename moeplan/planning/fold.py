"""Two slots on every rank: pairing is solved by folding, so only the copies per expert are searched.

With the copies fixed, pairing the largest with the smallest, the second with the second smallest, and so on,
minimises the largest pair sum. ``E`` experts, ``P = 2 R`` slots.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["fold_search"]


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
