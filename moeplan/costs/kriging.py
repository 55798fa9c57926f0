"""Robust kriging of many queries, each from its own nearest points: the compiled part of ``interpolation``.

Shapes: ``n`` points, ``q`` queries, ``b`` neighbours of a query, ``A`` axes, ``D`` coordinates that tell points apart,
``T`` those that the trend runs along.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["krige"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ROUNDS = 8  # of reweighting, at most
_SETTLED = 0.1  # relative change of the weights at which they rest
_FREEDOM = 2.0  # of Student's t
_LEVEL, _SLOPE = 100.0, 4.0  # prior variances of the trend, in units of the smooth part's
_SAME = 1e-9


@njit(cache=True, nogil=True)
def _covariance(
    a_nD: Floats, a: int, b_nD: Floats, b: int, axes: int, align: float, length: float, size: float, other: float
) -> float:
    """Of the rows ``a`` and ``b``; rows cut out of arrays would take as long as the sum over them."""
    apart, share = 0.0, align
    for axis in range(a_nD.shape[1]):
        distance = abs(a_nD[a, axis] - b_nD[b, axis])
        apart += distance
        if axis < axes and distance <= _SAME:
            share += size if axis == 0 else other
    return float(np.exp(-apart / length) * (1 + share))


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _solve(lower_bb: Floats, noise_b: Floats, y_b: Floats, factor_bb: Floats, dual_b: Floats, count: int) -> None:
    """``dual = (lower + lower' - diag + noise)^-1 y`` by Cholesky, column by column, in which no row waits for another;
    writes ``factor`` and ``dual``."""
    for j in range(count):
        for i in range(j, count):
            total = lower_bb[i, j]
            for k in range(j):
                total -= factor_bb[i, k] * factor_bb[j, k]
            if i == j:
                factor_bb[i, i] = np.sqrt(total + noise_b[i])
            else:
                factor_bb[i, j] = total / factor_bb[j, j]
    for i in range(count):
        total = y_b[i]
        for k in range(i):
            total -= factor_bb[i, k] * dual_b[k]
        dual_b[i] = total / factor_bb[i, i]
    for i in range(count - 1, -1, -1):
        dual_b[i] /= factor_bb[i, i]
        for k in range(i):
            dual_b[k] -= factor_bb[i, k] * dual_b[i]


@njit(cache=True, nogil=True)
def krige(
    axes: int,
    trend_nT: Floats,
    place_nD: Floats,
    align_n: Ints,
    y_n: Floats,
    trend_qT: Floats,
    place_qD: Floats,
    align_q: Ints,
    rows_qb: Ints,
    most: int,
    setting: tuple[float, float, float, float, float, float, float],
) -> Floats:
    """Answers [q] in the logs of ``y``; nan for queries with fewer than two neighbours.

    ``place`` are log coordinates on the ``axes``, steps that lie apart stretched, and then what else tells points
    apart, ``trend`` what latencies rise along, ``align`` alignment classes, ``rows`` neighbours, nearest first, -1 for
    none; the first ``most`` serve. ``setting``: length, share of an equal size, of another equal coordinate, of an
    equal alignment, noise, the scale of the scatter, and how much farther off a point counts that lies above the
    others than one below.
    """
    length, size, other, align, noise, scatter, late = setting
    answer = np.full(len(trend_qT), np.nan)
    rows = np.empty(most, np.int64)
    among, factor = np.empty((most, most)), np.empty((most, most))
    towards, y, dual, own = np.empty(most), np.empty(most), np.empty(most), np.empty(most)
    for q in range(len(trend_qT)):
        count = 0
        for row in rows_qb[q]:
            if row >= 0 and count < most:
                rows[count] = row
                count += 1
        if count < 2:
            continue
        level = np.median(y_n[rows[:count]])
        for i in range(count):
            at = rows[i]
            y[i], own[i] = y_n[at] - level, noise
            same = align if align_n[at] == align_q[q] else 0.0
            towards[i] = _covariance(place_nD, at, place_qD, q, axes, same, length, size, other) + _LEVEL
            for j in range(i + 1):
                to = rows[j]
                slope = 0.0  # the trend, centred on the query
                for column in range(trend_nT.shape[1]):
                    slope += (trend_nT[at, column] - trend_qT[q, column]) * (trend_nT[to, column] - trend_qT[q, column])
                same = align if align_n[at] == align_n[to] else 0.0
                smooth = _covariance(place_nD, at, place_nD, to, axes, same, length, size, other)
                among[i, j] = smooth + _LEVEL + _SLOPE * slope
        for _ in range(_ROUNDS):
            _solve(among, own, y, factor, dual, count)
            change = 0.0
            for i in range(count):
                miss = own[i] * dual[i] / scatter
                if miss > 0:
                    miss *= late
                now = noise * (_FREEDOM + miss * miss) / (_FREEDOM + 1)
                change = max(change, abs(now / own[i] - 1))
                own[i] = now
            if change < _SETTLED:
                break
        total = level
        for i in range(count):
            total += dual[i] * towards[i]
        answer[q] = total
    return answer
