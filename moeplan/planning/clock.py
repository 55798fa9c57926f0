"""Layers side by side until time is over or Ctrl-C comes: what is finished by then is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

from moeplan.artifacts.plan import Status
from moeplan.planning.problem import PlanningProblem

__all__ = ["Clock", "each_layer"]

T = TypeVar("T")


@dataclass(slots=True)
class Clock:
    """When to stop: a person's time limit, or Ctrl-C, which sets ``status``."""

    problem: PlanningProblem
    started: float = field(default_factory=time.monotonic)
    status: Status = "feasible"

    def over(self) -> bool:
        """Whether nothing more is to be begun."""
        limit = self.problem.time_limit_s
        if self.status == "feasible" and limit is not None and time.monotonic() - self.started > limit:
            self.status = "time_limit"
        return self.status != "feasible"


def each_layer(
    clock: Clock, what: str, layers: int, work: Callable[[int], T], fallback: Sequence[T] | None = None
) -> list[T]:
    """Answer of every layer, on all cores; layers not finished when time is over, or interrupted, keep ``fallback``.

    Raises:
        KeyboardInterrupt: Ctrl-C, and there is no ``fallback``.
    """
    answers: dict[int, T] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        running: dict[Future[T], int] = {}
        queue = iter(range(layers))
        try:
            while True:
                while len(running) < (os.cpu_count() or 1) and not (fallback is not None and clock.over()):
                    layer = next(queue, None)
                    if layer is None:
                        break
                    running[pool.submit(work, layer)] = layer
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    answers[running.pop(future)] = future.result()
                    clock.problem.progress(what, len(answers) / layers)
        except KeyboardInterrupt:
            if fallback is None:
                raise
            clock.status = "interrupted"
    return [answers[l] if l in answers or fallback is None else fallback[l] for l in range(layers)]
