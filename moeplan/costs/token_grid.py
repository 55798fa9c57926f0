"""Grids over tokens, sequences and context on which steps of a service are tabled, and places between their points."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.interpolation import TILES

__all__ = ["Curve", "grid", "stairs"]

Floats = NDArray[np.float64]


def grid(highest: float, lowest: float = 1.0) -> Floats:
    """1 and 1.5 times powers of two from ``lowest`` (one of them or below) to the first at or above ``highest``; two or
    more, as lines lie between two."""
    first, last = int(np.floor(np.log2(lowest))), int(np.ceil(np.log2(max(highest, 2.0))))
    every = (factor * 2.0**power for power in range(first, last + 1) for factor in (1.0, 1.5))
    points = [x for x in every if x < 1 or x == int(x)]
    top = next((i for i, x in enumerate(points) if x >= highest), len(points) - 1)
    return np.array(points[: max(1, top) + 1])


def stairs(points: Floats, tp: int = 1) -> Floats:
    """With the tokens per rank that are one too many for the tiles of ``tp`` ranks: there times of products jump."""
    return np.union1d(points, points[(points * tp >= min(TILES)) & (points < points[-1])] + 1)


class Curve:
    """Rows over a rising grid: position and weight of a value, clipped at the first point, extended beyond the last."""

    def __init__(self, points: Floats) -> None:
        self.points = points
        self._list: list[float] = points.tolist()

    def place(self, value: float) -> tuple[int, float]:
        """The row at or below ``value``, and the weight of the next."""
        points = self._list
        if value <= points[0]:
            return 0, 0.0
        if value >= points[-1]:
            return len(points) - 2, (value - points[-2]) / (points[-1] - points[-2])
        i = bisect_right(points, value) - 1
        return i, (value - points[i]) / (points[i + 1] - points[i])
