"""What no choice of copies can beat: linear programmes over the number of copies of each expert.

``E`` experts, ``R`` ranks of ``s`` slots each, of which some may be empty; a rank may hold two copies of an expert.
Loads are scaled so that ranks average 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

__all__ = ["copies_bound"]

_OPTIONS = 12  # copies beyond the least that are told apart; a programme takes some 0.3 s at 256 experts
_LEVELS, _CUTS = 60, 8
_STEP = 0.002  # how finely limits are tried at most; a twentieth of the gap to be closed does


def _spaced(values: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    values = np.unique(values)
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).astype(np.int64)]


def _rows(
    size_EX: NDArray[np.float64], copies_EX: NDArray[np.int64], slots: int, limit: float
) -> tuple[list[NDArray[np.float64]], list[float]]:
    """Rows whose sum over the options taken, and what each empty slot adds to it, is at most 0 for every arrangement
    within ``limit``."""
    rows, empty = [], []
    # A copy above limit - t has slots - 1 neighbours, each of what the smallest such copy leaves at most.
    for t in _spaced(size_EX[size_EX < limit / 2], _LEVELS):
        large = size_EX > limit - t + 1e-12
        if large.any():
            small = size_EX <= limit - size_EX[large].min() + 1e-12
            rows.append(copies_EX * ((slots - 1) * large.astype(np.float64) - small))
            empty.append(-1.0)
    # Two copies above half the limit never share a rank: their ranks' other slots hold at least the smallest copies
    # there are, whose sum is bounded by its dual at any price u.
    if slots == 2:  # the rows above say as much
        return rows, empty
    near = size_EX[size_EX > limit * (1 - 1 / slots)]
    for cut in np.append(_spaced(near, _CUTS), limit / 2 * (1 + 1e-9)):
        above = size_EX >= cut
        for u in _spaced(size_EX[size_EX[:, 0] < limit / slots, 0], _CUTS):
            rows.append(copies_EX * (above * (size_EX - limit + u * (slots - 1)) + np.minimum(size_EX - u, 0.0)))
            empty.append(-float(u))
    return rows, empty


def _feasible(load_E: NDArray[np.float64], ranks: int, slots: int, limit: float) -> bool:
    """Whether the linear relaxation of "every rank stays within ``limit``" has a solution.

    ``z[e, x]`` is the part of expert ``e`` that has ``x`` copies more than it must have. The last option stands for
    all larger ``x``: it takes the slots of the least and serves as well as the best. The last variable is the number of
    empty slots.
    """
    least_E = np.maximum(1, np.ceil(load_E / limit - 1e-12)).astype(np.int64)
    spare = slots * ranks - int(least_E.sum())
    if spare < 0:
        return False
    copies_EX = least_E[:, None] + np.arange(spare + 1)
    rows, empty = _rows(load_E[:, None] / copies_EX, copies_EX, slots, limit)
    if not rows:
        return True
    short = np.stack(rows)
    kept = min(spare, _OPTIONS)
    short = np.concatenate([short[:, :, :kept], short[:, :, kept:].min(axis=2, keepdims=True)], axis=2)
    taken_EX = copies_EX[:, : kept + 1]
    experts, options = taken_EX.shape
    one_each = csr_array(
        (np.ones(taken_EX.size), (np.repeat(np.arange(experts), options), np.arange(taken_EX.size))),
        shape=(experts, taken_EX.size + 1),
    )
    answer = linprog(
        np.zeros(taken_EX.size + 1),
        A_ub=np.vstack([np.column_stack([short.reshape(len(short), -1), empty]), np.append(taken_EX.ravel(), 1.0)]),
        b_ub=np.append(np.zeros(len(short)), float(slots * ranks)),
        A_eq=one_each,
        b_eq=np.ones(experts),
        bounds=(0, None),
        method="highs",
    )
    return bool(answer.status != 2)


def copies_bound(load_E: NDArray[np.float64], ranks: int, slots: int, floor: float, value: float) -> float:
    """Lower bound on the busiest rank: the largest limit tried whose relaxation has no solution.

    Args:
        load_E: loads, mean over ranks 1.
        ranks, slots: ``R`` and the slots of each.
        floor: a bound already known.
        value: the busiest rank of a known plan; limits from ``floor`` up to it are tried.
    """
    least = max(_STEP, 0.05 * (value / floor - 1))
    low, high, step = floor, value, least
    while low * (1 + least) < high:
        limit = min(low * (1 + step), 0.5 * (low + high))
        if _feasible(load_E, ranks, slots, limit):
            high, step = limit, least
        else:
            low, step = limit, 2 * step
    return low
