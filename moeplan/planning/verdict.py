"""Will it pay? The gain on windows the plan was not made on, against what it costs to get there."""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.plan import Migration, Verdict

__all__ = ["judge"]

_STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # two-sided, 1..10 degrees of freedom


def judge(
    baseline: str,
    baseline_W: NDArray[np.float64],
    planned_W: NDArray[np.float64],
    best_possible_gain: float,
    held_out: str,
    unchecked: str,
    migration: Migration | None,
) -> Verdict:
    """Set the expected gain, with its 95 % interval over windows, against the migration.

    Args:
        baseline: name of the placement compared with.
        baseline_W, planned_W: seconds of a step in each held-out window under either.
        best_possible_gain: part of the baseline's time that no placement can exceed (from the bound).
        held_out: what the windows are, in words.
        unchecked: why nothing was held out and what to do; the plan is then not recommended. Empty where it was.
        migration: from the current placement, None for a fresh start.
    """
    gain_W = 1.0 - planned_W / baseline_W
    mean = float(gain_W.mean())
    if len(gain_W) > 1:
        t = _STUDENT_95[min(len(gain_W) - 1, len(_STUDENT_95)) - 1]
        half = t * float(gain_W.std(ddof=1)) / len(gain_W) ** 0.5
    else:
        half = abs(mean)  # one window says nothing about the spread
    # No placement gains more than the bound, however wide the spread.
    low, high = mean - half, min(mean + half, max(mean, best_possible_gain))
    migration_s = None if migration is None else migration.seconds
    steps = break_even = None
    if migration_s is not None and mean > 0:
        saved_s = mean * float(baseline_W.mean())
        steps = ceil(migration_s / saved_s * (1 - 1e-9))
        break_even = migration_s * (1.0 - mean) / mean
    if migration is not None and not migration.moves:
        apply, reason = False, f"the {baseline} placement is already what was planned: nothing to move"
    elif mean <= 0:
        apply, reason = False, f"no gain over {baseline} is expected on {held_out}"
    elif low <= 0 and len(gain_W) > 1:
        apply, reason = False, f"the gain over {baseline} ({mean:.1%}) is not above its spread on {held_out}"
    elif unchecked:
        apply = False
        reason = f"the gain over {baseline} ({mean:.1%}) was seen only on the data planned on; {unchecked}"
    elif steps is not None:
        apply = True
        reason = f"saves {mean:.1%} of a step over {baseline}; the migration has paid after {steps:,} steps"
    else:
        apply, reason = True, f"saves {mean:.1%} of a step over {baseline}"
    return Verdict(
        apply=apply,
        reason=reason,
        largest_possible_gain=max(best_possible_gain, 0.0),
        expected_gain=mean,
        expected_gain_low=low,
        expected_gain_high=high,
        held_out=held_out,
        migration_s=migration_s,
        break_even_s=break_even,
        break_even_steps=steps,
    )
