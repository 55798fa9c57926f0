"""What recording router choices costs: slowdown of a pass, from pairs of passes with and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["paired_slowdown", "slowdown"]


def slowdown(plain_s: Sequence[float], recorded_s: Sequence[float]) -> tuple[float, float | None]:
    """By how much recording slows passes down, and its spread, as parts of the time without.

    Median, and 90th less 10th percentile, of pairs of passes; a single pair has no spread.
    """
    low, median, high = np.percentile(np.divide(recorded_s, plain_s) - 1, [10, 50, 90])
    return float(median), float(high - low) if len(plain_s) > 1 else None


def paired_slowdown(seconds: Callable[[bool], float], pairs: int = 8) -> tuple[float, float | None]:
    """:func:`slowdown` of passes that take ``seconds`` with (True) or without recording, which take turns in going
    first, after one to warm up."""
    seconds(True)  # warms both
    both = [{r: seconds(r) for r in ((True, False) if i % 2 else (False, True))} for i in range(pairs)]
    return slowdown([pair[False] for pair in both], [pair[True] for pair in both])
