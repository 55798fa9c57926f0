"""Which sizes to measure: a coarse grid, then the interval where interpolation errs most.

A size axis is read in logs. The error expected at the middle of an interval comes from what was seen: a
measured midpoint that departs by ``d`` from the line between its neighbours leaves about ``d / 4`` at the
middles of its two halves (the error of a line falls with the square of its length).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

__all__ = ["coarse_sizes", "departure", "interval_errors", "midpoint"]


def coarse_sizes(low: int, high: int, points: int = 7) -> list[int]:
    """``points`` integers from ``low`` to ``high``, even in logs, both ends included."""
    if high <= low:
        return [low]
    step = math.log(high / low) / max(1, points - 1)
    return sorted({round(low * math.exp(step * i)) for i in range(points)} | {low, high})


def midpoint(low: int, high: int) -> int | None:
    """The integer strictly between that is nearest to the geometric mean; None where there is none."""
    middle = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
    return middle if low < middle < high else None


def departure(size: int, below: int, above: int, us: Mapping[int, float]) -> float:
    """|log| of measured over interpolated time at ``size`` between two neighbours."""
    weight = math.log(size / below) / math.log(above / below)
    line = (1 - weight) * math.log(us[below]) + weight * math.log(us[above])
    return abs(math.log(us[size]) - line)


def interval_errors(us: Mapping[int, float]) -> dict[tuple[int, int], float]:
    """Expected relative error at the middle of each interval that an integer can still split.

    ``us`` holds time by size. Every inner size tells of the two intervals it ends; the larger figure counts.
    """
    sizes = sorted(us)
    off = {
        size: departure(size, below, above, us) / 4
        for below, size, above in zip(sizes, sizes[1:], sizes[2:], strict=False)
    }
    return {
        (a, b): max(off.get(a, 0.0), off.get(b, 0.0))
        for a, b in pairwise(sizes)
        if midpoint(a, b) is not None
    }
