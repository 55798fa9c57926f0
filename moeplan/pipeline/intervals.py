"""Intervals from runs that were played again: with other seeds, and with the costs off. ``W`` ways the costs may be
off: all parts together, then each alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

__all__ = ["cost_sides", "seed_side"]

_LEVEL = 0.95


def cost_sides(moved_W2: NDArray[np.float64]) -> tuple[float, float]:
    """How far below and above a figure lies, from how far it moves at the low and the high end of each way.

    Together moves times most, each alone moves shares and differences, and is added in squares: the larger counts.
    """
    down_W, up_W = -np.minimum(0.0, moved_W2.min(1)), np.maximum(0.0, moved_W2.max(1))
    below, above = (max(float(side_W[0]), float(np.hypot.reduce(side_W[1:]))) for side_W in (down_W, up_W))
    return below, above


def seed_side(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean over seeds, by Student's t; 0 of one seed, which does not tell.

    For differences seed by seed: paired-t, Law, Simulation Modeling and Analysis, section 11.2 (10.2 in the 5th
    edition), with common random numbers.
    """
    n = len(values)
    if n < 2:
        return 0.0
    return float(student.ppf((1 + _LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
