"""Predicted against measured: one function over two event logs.

Simulator and executor write the same kinds of events, so each kind is compared with itself: the seconds that the
busiest rank spends on it in a step, as the median over steps. The first step of a measured run is left out where there
are several (kernels load, caches fill).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.event_log import EVENT_KINDS, EventLog
from moeplan.errors import InputError

__all__ = ["Against", "predicted_against_measured", "seconds_per_step"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Against:
    """One kind of event: seconds per step, and by how much the prediction is off (+: too long)."""

    kind: str
    predicted_s: float
    measured_s: float
    measured_low_s: float
    measured_high_s: float
    error: float


def seconds_per_step(log: EventLog, kind: str) -> Floats:
    """Seconds of the busiest rank in each step that has events of this kind."""
    mine = log.of_kind(kind) & (log.duration_s_V > 0) & (log.step_V >= 0)
    if not mine.any():
        return np.zeros(0)
    steps, place = np.unique(log.step_V[mine], return_inverse=True)
    ranks = np.maximum(log.rank_V[mine], 0)
    total = np.zeros((len(steps), int(ranks.max()) + 1))
    np.add.at(total, (place, ranks), log.duration_s_V[mine])
    busiest: Floats = total.max(1)
    return busiest


def predicted_against_measured(predicted: EventLog, measured: EventLog) -> list[Against]:
    """Every kind that both logs hold, in the order of :data:`EVENT_KINDS`; quartiles of the measured steps beside.

    Raises:
        InputError: the logs have no kind with a duration in common, or differ in ranks.
    """
    if predicted.num_ranks != measured.num_ranks:
        raise InputError(
            f"the predicted run has {predicted.num_ranks} ranks and the measured one {measured.num_ranks};"
            " compare runs of one size"
        )
    answer = []
    for kind in EVENT_KINDS:
        ours, theirs = seconds_per_step(predicted, kind), seconds_per_step(measured, kind)
        if not len(ours) or not len(theirs):
            continue
        settled = theirs[1:] if len(theirs) > 2 else theirs
        middle, value = float(np.median(settled)), float(np.median(ours))
        low, high = np.quantile(settled, [0.25, 0.75])
        answer.append(Against(kind, value, middle, float(low), float(high), value / middle - 1))
    if not answer:
        raise InputError("the two runs have no kind of event in common; compare runs of one sort, training or serving")
    return answer
