"""The recorded routing as it is played: which experts are loaded how much, and when. ``L`` layers, ``E`` experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import RoutingTrace

__all__ = ["ExpertLoads", "Phase"]

Floats = NDArray[np.float64]
Phase = Literal["prefill", "decode"]


class ExpertLoads:
    """Loads by phase, one after the other, each for ``window_s``.

    ``order`` names which of them is played in the windows of time, from the first on, and begins again at its end.
    One load alone is played all the time. Where one phase is missing the other stands for both. ``tokens`` gives, by
    phase and number of the load, the recorded tokens that it counts, where the trace has them.
    """

    def __init__(
        self,
        loads: Mapping[Phase, Sequence[Floats]],
        window_s: float,
        order: Sequence[int] | None = None,
        tokens: Callable[[Phase, int], RoutingTrace | None] = lambda _phase, _number: None,
    ) -> None:
        self._loads = {phase: tuple(each) for phase, each in loads.items() if each}
        self._tokens = tokens
        self._window_s = window_s
        longest = max(len(each) for each in self._loads.values())
        self._order = tuple(order) if order is not None else tuple(range(longest))

    def number(self, time_s: float) -> int:
        """Which load is played at a time, counted within the longer phase."""
        if len(self._order) == 1:
            return self._order[0]
        return self._order[int(time_s / self._window_s) % len(self._order)]

    def at(self, time_s: float, phase: Phase) -> Floats:
        """The load ``[L, E]`` that a step of this phase meets."""
        each = self._loads.get(phase) or next(iter(self._loads.values()))
        return each[self.number(time_s) % len(each)]

    def recorded(self, load_LE: Floats) -> RoutingTrace | None:
        """The tokens behind one of the loads that :meth:`at` gives; None where there are counts only."""
        for phase, each in self._loads.items():
            for number, known_LE in enumerate(each):
                if known_LE is load_LE:
                    return self._tokens(phase, number)
        return None

    def over(self, start_s: float, end_s: float, phase: Phase) -> Floats:
        """The load over a stretch of time: shares weighted by how long each was played."""
        edges = np.unique(np.concatenate([[start_s, end_s], self._edges(start_s, end_s)]))
        total: Floats = np.zeros(1)
        for left, right in pairwise(edges):
            load_LE = self.at(float(left + right) / 2, phase)
            total = total + load_LE / load_LE.sum(1, keepdims=True) * (right - left)
        return total

    def _edges(self, start_s: float, end_s: float) -> Floats:
        first, last = int(np.ceil(start_s / self._window_s)), int(np.floor(end_s / self._window_s))
        return np.arange(first, last + 1, dtype=np.float64) * self._window_s
