"""Scores of predictions against measurements: relative errors, their middle and mean, rank correlation, coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Features", "mean_error", "median_error", "nearest", "scores", "spearman"]

Floats = NDArray[np.float64]


def _errors(predicted: ArrayLike, measured: ArrayLike) -> Floats:
    errors: Floats = np.abs(np.asarray(predicted, float) / np.asarray(measured, float) - 1)
    return errors


def median_error(predicted: ArrayLike, measured: ArrayLike) -> float | None:
    """Median of |predicted / measured - 1|; None without rows."""
    errors = _errors(predicted, measured)
    return float(np.median(errors)) if errors.size else None


def mean_error(predicted: ArrayLike, measured: ArrayLike) -> float | None:
    """Mean of |predicted / measured - 1| (MAPE); None without rows."""
    errors = _errors(predicted, measured)
    return float(errors.mean()) if errors.size else None


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rank correlation (Pearson's of the ranks); None with fewer than two rows or no spread."""
    from scipy.stats import rankdata

    x, y = rankdata(a), rankdata(b)
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def scores(
    tpot: Sequence[float | None],
    tpot_measured: Sequence[float],
    ttft: Sequence[float | None],
    ttft_measured: Sequence[float],
) -> dict[str, Any]:
    """Figures of one set of rows; rows without a prediction count against ``coverage`` alone."""
    known = [p is not None for p in tpot]
    p = [value for value in tpot if value is not None]
    m = [value for value, there in zip(tpot_measured, known, strict=True) if there]
    first = [value for value in ttft if value is not None]
    first_measured = [value for value, mine in zip(ttft_measured, ttft, strict=True) if mine is not None]
    bias = float(np.median(np.asarray(p) / np.asarray(m))) - 1 if p else None
    return {
        "rows": len(tpot),
        "predicted": len(p),
        "coverage": len(p) / len(tpot) if tpot else None,
        "tpot_median": median_error(p, m),
        "tpot_mape": mean_error(p, m),
        "tpot_bias": bias,
        "tpot_spearman": spearman(p, m),
        "ttft_median": median_error(first, first_measured),
    }


@dataclass(frozen=True, slots=True)
class Features:
    """What two rows are compared by: names that are equal or not, and numbers compared by their ratio."""

    names: tuple[str, ...]
    numbers: tuple[float, ...]


def nearest(query: Features, known: Sequence[Features]) -> int:
    """The known row closest to ``query``: 1 per name that differs plus |log2| of each ratio; the first of equals."""
    distance = [
        sum(a != b for a, b in zip(query.names, one.names, strict=True))
        + sum(abs(np.log2(a / b)) for a, b in zip(query.numbers, one.numbers, strict=True))
        for one in known
    ]
    return int(np.argmin(distance))
