"""Plans that reach a training run: given in code, or dropped into a folder that the run watches.

The folder is how another process talks to a run: ``run.json`` says what runs, a ``plan.json`` that appears there is
applied at the next step boundaries, ``answer.json`` says what came of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeplan.artifacts.plan import Plan
from moeplan.errors import MoeplanError
from moeplan.execution.groups import Mesh
from moeplan.execution.launch import restarts
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

    ``control`` is the folder to watch, None for plans given by :meth:`submit` alone. ``budget_s`` is the time that one
    step boundary may take; without it a plan is applied whole at one boundary.
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
        self._from_folder = False
        self._first = mesh.world.rank == 0
        if control is not None and self._first:
            for name in () if restarts() else ("plan.json", "window.npz", "answer.json"):
                (control / name).unlink(missing_ok=True)  # of a run before: not for this one
            about = {"model": model.name, "num_ranks": mesh.ep.size, "ranks_per_node": mesh.ranks_per_node}
            write_text(control / "run.json", json.dumps(about) + "\n")

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
        if report is not None and self._from_folder:
            self._from_folder = False
            self._answer(
                applied=report.finished,
                moved_experts=report.moved_experts,
                moved_bytes=report.moved_bytes,
                stall_s=report.stall_s,
                error=report.failure,
            )
        return report

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
                    self._answer(applied=False, error=f"cannot read {path}: {error}")
                    path.unlink(missing_ok=True)
        text = self.mesh.world.all_of(text)[0]
        if text is None:
            return
        try:
            self.submit(Plan.parse(json.loads(text), "plan.json"))
            self._from_folder = True
        except (MoeplanError, ValueError) as error:  # refused, the run goes on
            self._answer(applied=False, error=str(error))

    def _answer(self, **fields: Any) -> None:
        if self._first and self.control is not None:
            write_text(self.control / "answer.json", json.dumps(fields) + "\n")
