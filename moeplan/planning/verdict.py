"""Will it pay? The gain on routing the plan was not made on, against what it costs to get there."""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.plan import Migration, Verdict

__all__ = ["judge"]

_STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # two-sided, 1..10 degrees of freedom


def judge(
    baseline: str,
    baseline_s: float,
    gain: float,
    without_H: NDArray[np.float64],
    best_possible_gain: float,
    held_out: str,
    unchecked: str,
    migration: Migration | None,
) -> Verdict:
    """Set the expected gain, with its 95 % interval, against the migration.

    The interval is Student's with the spread of the jackknife: what leaving out a part changes (Tukey 1958).

    Args:
        baseline: name of the placement compared with.
        baseline_s: seconds of its step on what was held out.
        gain: part of it that the plan saves there.
        without_H: the gain where one of ``H`` parts is left out; empty where there are no parts.
        best_possible_gain: part of the baseline's time that no placement can exceed (from the bound).
        held_out: what was held out, in words.
        unchecked: why nothing was held out and what to do; the plan is then not recommended. Empty where it was.
        migration: from the current placement, None for a fresh start.
    """
    parts = len(without_H)
    if parts > 1:
        t = _STUDENT_95[min(parts - 1, len(_STUDENT_95)) - 1]
        half = t * (parts - 1) * float(without_H.std(ddof=1)) / parts**0.5
    else:
        half = abs(gain)  # one part says nothing about the spread
    # No placement gains more than the bound, however wide the spread.
    low, high = gain - half, min(gain + half, max(gain, best_possible_gain))
    migration_s = None if migration is None else migration.seconds
    steps = break_even = None
    if migration_s is not None and gain > 0:
        saved_s = gain * baseline_s
        steps = ceil(migration_s / saved_s * (1 - 1e-9))
        break_even = migration_s * (1.0 - gain) / gain
    part = f"{100 * gain:.1f} %"
    if migration is not None and not migration.moves:
        apply, reason = False, f"the {baseline} placement is already what was planned: nothing to move"
    elif gain <= 0:
        apply, reason = False, f"no gain over {baseline} is expected"
    elif low <= 0 and parts > 1:
        apply, reason = False, f"the gain over {baseline} ({part}) is not above its spread"
    elif unchecked:
        apply = False
        reason = f"the gain over {baseline} ({part}) was seen only on the data planned on; {unchecked}"
    elif steps is not None:
        apply = True
        reason = f"saves {part} of a step over {baseline}; the migration has paid after {steps:,} steps"
    else:
        apply, reason = True, f"saves {part} of a step over {baseline}"
    return Verdict(
        apply=apply,
        reason=reason,
        largest_possible_gain=max(best_possible_gain, 0.0),
        expected_gain=gain,
        expected_gain_low=low,
        expected_gain_high=high,
        held_out=held_out,
        migration_s=migration_s,
        break_even_s=break_even,
        break_even_steps=steps,
    )
