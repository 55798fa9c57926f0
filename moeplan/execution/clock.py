"""When did what take how long on this rank: spans into the event log that simulated runs write too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moeplan.artifacts.event_log import EventRecorder

__all__ = ["Clock", "Span"]


@dataclass(slots=True)
class Span:
    """A stretch of time; set ``amount`` before it ends (see :data:`moeplan.artifacts.event_log.EVENT_KINDS`)."""

    amount: float = 0.0


class Clock:
    """Spans of one rank. ``enabled = False`` makes it free: nothing is recorded, no device is waited for.

    ``origin_s`` is the reading of ``time.perf_counter`` that counts as 0; ranks of one machine share that counter.
    ``sent_R``: bytes of tokens that this rank has sent to others in steps, by their world rank, first under the
    placement that the run began with and, from :meth:`placed_anew` on, under later ones; ``steps`` of each.
    """

    def __init__(self, rank: int = 0, enabled: bool = False, origin_s: float = 0.0, cuda: bool = False) -> None:
        self.rank, self.enabled, self.origin_s, self.cuda = rank, enabled, origin_s, cuda
        self.step = 0
        self.events = EventRecorder()
        self.in_step, self._period = False, 0
        self.sent_R: tuple[dict[int, float], dict[int, float]] = {}, {}
        self.steps = [0, 0]
        self._totals: dict[str, list[float]] = {}

    @contextmanager
    def span(self, kind: str, layer: int = -1, amount: float = 0.0) -> Iterator[Span]:
        """Time the block; ``kind`` is one of the event log's."""
        span = Span(amount)
        if not self.enabled:
            yield span
            return
        self._wait()
        begin = time.perf_counter()
        self.in_step |= kind == "step"
        try:
            yield span
        finally:
            self._wait()
            self.in_step &= kind != "step"
            self.steps[self._period] += kind == "step"
            self.add(kind, begin, time.perf_counter() - begin, layer, span.amount)

    def add(self, kind: str, begin_s: float, duration_s: float, layer: int = -1, amount: float = 0.0) -> None:
        """Record a span that was timed elsewhere; ``begin_s`` in ``time.perf_counter``'s seconds."""
        start = begin_s - self.origin_s
        self.events.add(
            kind, start, duration_s, rank=self.rank, layer=layer, step=self.step, amount=amount
        )
        total = self._totals.setdefault(kind, [0.0, 0.0])
        total[0] += duration_s
        total[1] += amount

    def sent(self, rank: int, size_bytes: float) -> None:
        """Note tokens sent to another rank of the world; of steps alone."""
        if self.in_step and rank != self.rank and size_bytes:
            to_R = self.sent_R[self._period]
            to_R[rank] = to_R.get(rank, 0.0) + size_bytes

    def placed_anew(self) -> None:
        """From here on the run has another placement than it began with."""
        self._period = 1

    def take_totals(self) -> dict[str, list[float]]:
        """Seconds and amount per kind since the last call."""
        totals, self._totals = self._totals, {}
        return totals

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
