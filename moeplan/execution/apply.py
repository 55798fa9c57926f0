"""Plans that reach a training run: given in code, or dropped into a folder that the run watches.

The folder is how another process talks to a run (:mod:`moeplan.execution.control_folder`): a ``plan.json`` that
appears there is applied at the next step boundaries, ``answer.json`` says what came of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moeplan.artifacts.plan import Plan
from moeplan.errors import MoeplanError, RunError
from moeplan.execution.control_folder import say_ended, take_folder
from moeplan.execution.groups import Mesh
from moeplan.execution.launch import most_restarts, restarts
from moeplan.execution.migrate import MigrationReport, Migrator
from moeplan.execution.moves import require_fits
from moeplan.files import write_text
from moeplan.specs.model import ModelSpec

__all__ = ["PlanCallback"]


class PlanCallback:
    """Applies plans between the steps of any training loop over :class:`ExpertLayer`; one on every rank.

    ::

        migrator = Migrator(expert_layers, mesh, placement, torch_state(optimizer, expert_layers))
        plans = PlanCallback(migrator, model_spec, mesh, control=Path("run/control"), budget_s=0.05)
        for batch in data:
            ...                       # forward, backward, optimizer.step()
            plans.after_step()
        plans.close()                 # tells who waits that the run has ended

    ``control`` is the folder to watch, None for plans given by :meth:`submit` alone. ``budget_s`` is the time that one
    step boundary may take; without it a plan is applied whole at one boundary.

    Raises:
        RunError: another run watches the folder, or it cannot be written; the same on every rank.
    """

    def __init__(
        self,
        migrator: Migrator,
        model: ModelSpec,
        mesh: Mesh,
        control: Path | None = None,
        budget_s: float | None = None,
    ) -> None:
        self.migrator, self.model, self.mesh, self.control, self.budget_s = migrator, model, mesh, control, budget_s
        self._first = mesh.world.rank == 0
        self._taken: str | None = None  # hash of the plan from the folder that is being applied
        self._lock: int | None = None
        self._closed = False
        why: str | None = None
        if control is not None and self._first:
            about = {"model": model.name, "num_ranks": mesh.ep.size, "ranks_per_node": mesh.ranks_per_node}
            again = restarts()
            try:
                self._lock = take_folder(control, about, most_restarts() - again, forget=not again)
            except (MoeplanError, OSError) as error:
                why = str(error)
        if control is not None and (why := mesh.world.all_of(why)[0]) is not None:
            raise RunError(why)

    def submit(self, plan: Plan) -> None:
        """Begin to apply ``plan`` at the next step boundary; every rank gives the same plan.

        Raises:
            PlanError: it is for another model or other ranks; nothing has moved.
            RunError: a plan is being applied.
        """
        require_fits(plan, self.model, self.mesh)
        order = None
        if plan.migration is not None and plan.migration.moves:
            rows = list(dict.fromkeys(plan.layer_ids.index(move.layer_id) for move in plan.migration.moves))
            order = rows + [row for row in range(len(plan.layer_ids)) if row not in rows]
        self.migrator.submit(plan.placement, order)

    def after_step(self) -> MigrationReport | None:
        """What is due at this step boundary; the report of a migration when it has ended. Every rank calls it.

        Raises:
            RunError: a rank was lost while experts moved.
        """
        if self.control is not None and not self.migrator.under_way:
            self._look()
        report = self.migrator.at_step_boundary(self.budget_s)
        if report is not None and self._taken is not None:
            self._answer(
                self._taken,
                applied=report.finished,
                moved_experts=report.moved_experts,
                moved_bytes=report.moved_bytes,
                stall_s=report.stall_s,
                error=report.failure,
            )
            self._taken = None
        return report

    def close(self) -> None:
        """Say in the folder that the run takes no more plans; every rank may call it, once or more."""
        if self.control is None or not self._first or self._closed:
            return
        self._closed = True
        say_ended(self.control)
        if self._lock is not None:
            os.close(self._lock)

    def _look(self) -> None:
        """Take a plan from the folder: rank 0 reads it, all ranks are told."""
        text: str | None = None
        if self._first and self.control is not None:
            path = self.control / "plan.json"
            if path.is_file():
                try:
                    text = path.read_text(encoding="utf-8")
                    path.replace(self.control / "plan.taken.json")
                except (OSError, UnicodeDecodeError) as error:
                    self._answer(None, applied=False, error=f"cannot read {path}: {error}")
                    path.unlink(missing_ok=True)
        text = self.mesh.world.all_of(text)[0]
        if text is None:
            return
        taken = None
        try:
            plan = Plan.parse(json.loads(text), "plan.json")
            taken = plan.sha256
            self.submit(plan)
            self._taken = taken
        except (MoeplanError, ValueError) as error:  # refused, the run goes on
            self._answer(taken, applied=False, error=str(error))

    def _answer(self, plan_sha256: str | None, **fields: Any) -> None:
        """``plan_sha256``: which plan it is about; None for one that could not be read."""
        if self._first and self.control is not None:
            text = json.dumps({"plan_sha256": plan_sha256, **fields})
            write_text(self.control / "answer.json", text + "\n")
