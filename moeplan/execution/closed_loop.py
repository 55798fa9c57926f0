"""A run that watches its own routing and takes the plans made from it.

Each window of steps goes to an adviser, who may answer with a plan. The adviser is a function on rank 0 (in this
process: the run waits for it), or another process that shares a folder with the run: the run puts ``window.npz``
there, the other one puts ``plan.json`` (see :mod:`moeplan.execution.apply`), and the run never waits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Protocol

from moeplan.artifacts.load_window import LoadWindow, WindowCosts
from moeplan.artifacts.plan import Plan
from moeplan.errors import MoeplanError
from moeplan.execution.apply import PlanCallback
from moeplan.execution.launch import under_torchrun
from moeplan.execution.migrate import MigrationReport
from moeplan.execution.monitor import LoadMonitor, Routed

__all__ = ["Advise", "ClosedLoop", "StepTimes"]

Advise = Callable[[LoadWindow], Plan | None]


class StepTimes(Protocol):
    """What a step cost, the same on all ranks: :class:`moeplan.execution.train.StepMetrics` is one."""

    @property
    def step_s(self) -> float:
        """Seconds of the slowest rank."""
        ...

    @property
    def tokens(self) -> int:
        """Of all ranks."""
        ...

    @property
    def expert_R(self) -> list[float]:
        """Seconds in experts, by rank."""
        ...

    @property
    def alltoall_R(self) -> list[float]:
        """Seconds in exchanges, waiting included, by rank."""
        ...


class ClosedLoop:
    """Watches ``layers`` and applies the adviser's plans through ``plans``; one on every rank.

    ::

        loop = ClosedLoop(trainer.moe_layers, plans, LoadMonitor(...), advise=controller.decide)
        for step in range(steps):
            loop.after_step(trainer.step(), steps_left=steps - step - 1)

    Give ``advise`` (called on rank 0 alone), or ``folder``, or both: what is in the folder is for other processes.
    """

    def __init__(
        self,
        layers: Sequence[Routed],
        plans: PlanCallback,
        monitor: LoadMonitor,
        advise: Advise | None = None,
        folder: Path | None = None,
    ) -> None:
        self.layers, self.plans, self.monitor = layers, plans, monitor
        self.advise, self.folder = advise, folder
        self._times: list[StepTimes] = []
        self._moving, self._moved_experts, self._stall_s = False, 0, 0.0
        self._failure: str | None = None

    def after_step(self, times: StepTimes, steps_left: int | None = None) -> MigrationReport | None:
        """Count the step, do what is due at its boundary, and ask for advice where a window is full.

        Every rank calls it after every step. Returns the report of a migration that ended here.

        Raises:
            RunError: a rank was lost while experts moved.
        """
        self._times.append(times)
        self.monitor.watch(self.layers)
        report = self.plans.after_step()
        if report is not None:
            self._moved_experts += report.moved_experts
            self._stall_s += report.stall_s
            self._failure = report.failure
        self._moving |= report is not None or self.plans.migrator.under_way
        window = self.monitor.end_step()
        if window is not None:
            self._consult(self._costed(window, steps_left))
        return report

    def _costed(self, window: LoadWindow, steps_left: int | None) -> LoadWindow:
        times, self._times = self._times, []
        costs = WindowCosts(
            step_s=median(t.step_s for t in times),
            expert_s=median(max(t.expert_R) for t in times),
            exchange_s=median(min(t.alltoall_R) for t in times),
            tokens=round(median(t.tokens for t in times)),
            moving=self._moving,
            moved_experts=self._moved_experts,
            stall_s=self._stall_s,
            failure=self._failure,
            steps_left=steps_left,
        )
        self._moving, self._moved_experts, self._stall_s = self.plans.migrator.under_way, 0, 0.0
        self._failure = None
        return replace(window, placement=self.plans.migrator.placement, costs=costs)

    def _consult(self, window: LoadWindow) -> None:
        world = self.plans.mesh.world
        if self.folder is not None and world.rank == 0:
            window.write(self.folder / "window.npz")
        if self.advise is None:
            return
        answer: tuple[str | None, str | None] = None, None
        if world.rank == 0:
            try:
                plan = self.advise(window)
                answer = (None if plan is None else plan.model_dump_json()), None
            except MoeplanError as error:  # told to all ranks, so that none waits for the others
                answer = None, str(error)
        text, error_text = world.all_of(answer)[0]
        if error_text is not None:
            # Of ranks started here one error is shown; under torchrun each shows its own, so that one speaks.
            raise MoeplanError(error_text if world.rank == 0 or not under_torchrun() else "")
        if text is not None and not self.plans.migrator.under_way:
            self.plans.submit(Plan.parse(json.loads(text), "advice"))
