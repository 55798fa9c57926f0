"""The controller of a live run: window -> drift? -> plan -> will it pay? -> apply -> measure -> recalibrate.

It never touches the run: :meth:`Controller.decide` answers one window, in the run's process or, by :func:`watch`, in
another one that shares a folder with it.

``L`` layers, ``E`` experts, ``R`` ranks.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moeplan.artifacts.load_window import LoadWindow, WindowCosts
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Plan, placement_fields
from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.evaluation import evaluate
from moeplan.costs.operating_point import layer_costs
from moeplan.errors import InputError, RunError
from moeplan.execution.control_folder import Watcher, watcher
from moeplan.files import hold, require_writable, write_text
from moeplan.pipeline.inputs import on_model_layers, profile_notes, profile_of
from moeplan.pipeline.optimize import optimize
from moeplan.routing.drift import Drift, drift_between
from moeplan.routing.loads import expert_load
from moeplan.routing.readers.npz import save_npz
from moeplan.specs.catalogue import slug
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Workload

__all__ = ["Calibration", "ControlOptions", "Controller", "Decision", "await_run", "watch"]

LEAST_TOKENS = 512
_MOST_STOPS = 3  # migrations that stop one after the other before only drift makes a plan again
_EXPERT_SHEET = ("memory_bandwidth", "bf16", "fp8", "fp4", "int8")
_LINK_SHEET = ("scale_up_bandwidth", "nic_bandwidth", "pcie_bandwidth")


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """When to plan again: ``significance`` and ``least_drift`` as in :class:`Drift`. ``steps_left`` is what a gain is
    counted over where the run does not say how long it goes on."""

    significance: float = 0.01
    least_drift: float = 0.02
    steps_left: int = 10_000


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured over predicted seconds of experts and exchange; ``move_s`` of an expert with its
    optimizer state, once experts have moved."""

    expert: float = 1.0
    exchange: float = 1.0
    move_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to one window. ``predicted_step_s`` is under ``plan``; ``checked``: a plan that was applied before
    this window, predicted and measured step seconds before and after it."""

    first_step: int
    apply: bool
    reason: str
    drift: Drift | None = None
    plan: Plan | None = None
    predicted_step_s: float | None = None
    calibration: Calibration = Calibration()
    checked: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """One line of a report; the plan by its hash."""
        return asdict(replace(self, plan=None)) | {"plan_sha256": None if self.plan is None else self.plan.sha256}


class Controller:
    """Decides window by window what a run should do. ``scenario`` names model, cluster and planner; trace, placement
    and batch come from the run. ``folder`` takes its files: the report ``decisions.jsonl``, and what it plans from.
    ``notes`` say what speaks against the costs that it starts from.

    Raises:
        SpecError, UnknownNameError: the scenario's model or cluster is not known. InputError: ``folder`` cannot be
            written.
    """

    def __init__(self, scenario: Scenario, folder: Path, options: ControlOptions | None = None) -> None:
        self.scenario, self.folder, self.options = scenario, folder, options or ControlOptions()
        self.report = folder / "decisions.jsonl"
        self.model, self.cluster = scenario.model_spec(), scenario.cluster_spec()
        self.profile = profile_of(scenario.profile, self.cluster.accelerator.name)
        self.notes = profile_notes(self.profile, self.cluster)
        self.calibration = Calibration()
        self.decisions: list[Decision] = []
        self._reference: Any = None
        self._applied: tuple[WindowCosts, float, Placement] | None = None
        self._stops = 0
        require_writable(folder)

    def forget(self) -> None:
        """Plan from the next window, whether it has drifted or not: the placement in force is not the one planned."""
        self._reference = self._applied = None

    def decide(self, window: LoadWindow) -> Plan | None:
        """The plan to apply now, or None; the reasons are in ``decisions`` and in the report.

        Raises:
            InputError: the window is of another model or cluster, or the report cannot be written.
        """
        decision = self._decide(window)
        self.decisions.append(decision)
        try:
            with self.report.open("a", encoding="utf-8") as report:
                report.write(json.dumps(decision.to_json()) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.report}: {error.strerror or error}; make room there") from error
        return decision.plan if decision.apply else None

    def _decide(self, window: LoadWindow) -> Decision:
        costs, placement = window.costs, window.placement
        if costs is None or placement is None:
            raise InputError("the window does not say what its steps cost and where experts were; write it from a run")
        self._require_fits(placement)
        start = window.first_step
        if costs.moved_experts and costs.stall_s:
            self.calibration = replace(self.calibration, move_s=costs.stall_s / costs.moved_experts)
        if costs.moving:
            return Decision(start, False, self._moved(costs), calibration=self.calibration)
        checked = self._check(costs, placement)
        if window.trace is None or window.trace.num_tokens < LEAST_TOKENS:
            return Decision(start, False, f"fewer than {LEAST_TOKENS} tokens were sampled", checked=checked)
        moe_s = self._recalibrate(window, costs, placement)
        drift = None
        if self._reference is not None:
            drift = drift_between(self._reference, self._blocks(window))
            if not drift.found(self.options.significance, self.options.least_drift):
                return Decision(start, False, "the load has not drifted", drift, None, None, self.calibration, checked)
        self._reference = self._blocks(window)
        plan = self._plan(window, costs, placement)
        apply, reason, predicted = self._pays(plan, costs, moe_s)
        if apply:
            self._applied = (costs, predicted, plan.placement)
        return Decision(start, apply, reason, drift, plan, predicted, self.calibration, checked)

    def _moved(self, costs: WindowCosts) -> str:
        """Why a window in which experts moved gets no plan; where they stopped on the way the next one does."""
        if costs.failure is None:
            self._stops = 0
            return "experts moved in this window: it measures no one placement"
        self._stops += 1
        if self._stops >= _MOST_STOPS:
            return f"experts stopped moving {self._stops} times in a row, plans again on drift: {costs.failure}"
        self.forget()
        return f"experts stopped moving, plans again from the next window: {costs.failure}"

    def _require_fits(self, placement: Placement) -> None:
        model, cluster = self.model, self.cluster
        for what, run, ours, remedy in (
            ("layers", placement.num_layers, model.num_moe_layers, "the run's --model"),
            ("experts", placement.num_experts, model.num_experts, "the run's --model"),
            ("ranks", placement.num_ranks, cluster.num_ranks, f"--ranks {placement.num_ranks}"),
            ("nodes", placement.num_nodes, cluster.num_nodes, f"--nodes {placement.num_nodes}"),
        ):
            if run != ours:
                raise InputError(
                    f"{what} of the run ({run}) are not those of --model and --cluster ({ours}); give {remedy}"
                )

    def _blocks(self, window: LoadWindow) -> NDArray[np.int64]:
        """What drift is looked for in: loads by block; on several nodes those of each home node apart, as sampled."""
        trace, nodes = window.trace, self.cluster.num_nodes
        if trace is None or trace.source_rank_T is None or nodes == 1:
            return window.load_BLE
        count, (L, E) = len(window.load_BLE), window.load_BLE.shape[1:]
        block_T = np.arange(trace.num_tokens) * count // trace.num_tokens
        node_T = trace.source_rank_T // self.cluster.ranks_per_node
        blocks = np.zeros((count, L, nodes * E), np.int64)
        at_TLK = node_T[:, None, None] * E + trace.experts_TLK
        t, l, k = np.nonzero(trace.experts_TLK >= 0)
        np.add.at(blocks, (block_T[t], l, at_TLK[t, l, k]), 1)
        return blocks

    # ------------------------------------------------------------------ measure

    def _check(self, costs: WindowCosts, placement: Placement) -> dict[str, float] | None:
        """Predicted against measured, in the first whole window under a plan that was applied."""
        if self._applied is None:
            return None
        before, predicted, planned = self._applied
        if not np.array_equal(placement.physical_to_logical_LP, planned.physical_to_logical_LP):
            return None  # the run has not taken it yet
        self._applied = None
        return {
            "before_step_s": before.step_s,
            "predicted_step_s": predicted,
            "measured_step_s": costs.step_s,
            "error": predicted / costs.step_s - 1,
            "gain": 1 - costs.step_s / before.step_s,
        }

    def _recalibrate(self, window: LoadWindow, costs: WindowCosts, placement: Placement) -> float:
        """Fit both parts of the costs to the window; the seconds of a step that plans can change."""
        assert window.trace is not None
        trace = on_model_layers(window.trace, self.model)
        load = replace(expert_load(trace), top_k=self.model.top_k)
        workload, objective = self._workload(costs), self.scenario.objective
        linear = layer_costs(self.model, self.cluster, workload, objective, self.profile)
        found = evaluate(load, placement, linear, objective)
        expert, exchange = (float(part.sum(axis=1).mean()) for part in (found.expert_WL, found.exchange_WL))
        self.calibration = replace(
            self.calibration,
            expert=costs.expert_s / expert if expert else 1.0,
            exchange=costs.exchange_s / exchange if exchange else 1.0,
        )
        return costs.expert_s + costs.exchange_s

    def _workload(self, costs: WindowCosts) -> Workload:
        batch = max(1, costs.tokens // self.cluster.num_ranks)
        return self.scenario.workload.model_copy(update={"batch_per_rank": batch})

    # ------------------------------------------------------------------ plan

    def _plan(self, window: LoadWindow, costs: WindowCosts, placement: Placement) -> Plan:
        assert window.trace is not None
        trace, current = self.folder / "trace.npz", self.folder / "current.json"
        save_npz(window.trace, trace)
        write_text(current, self._paper(placement, costs).model_dump_json() + "\n")
        update: dict[str, Any] = {
            "trace": trace,
            "current": current,
            "workload": self._workload(costs),
            "redundant": placement.num_slots - self.model.num_experts,
            "cluster": _scaled_sheet(self.cluster, self.calibration),
            "model": self.model,
        }
        if self.profile is not None:
            folder = self.folder / "profile"
            _scaled_profile(self.profile, self.calibration).save(folder)
            update |= {"profile": str(folder), "cluster": self.cluster}
        return optimize(self.scenario.model_copy(update=update)).plan

    def _paper(self, placement: Placement, costs: WindowCosts) -> Plan:
        """The placement in force as a plan file."""
        return Plan(
            model=self.model.name,
            planner="imported:run",
            status="feasible",
            seed=0,
            num_experts=placement.num_experts,
            num_redundant_experts=placement.num_slots - placement.num_experts,
            layer_ids=self.model.moe_layer_ids,
            **placement_fields(placement),
            objective=self.scenario.objective,
            workload=self._workload(costs),
        )

    def _pays(self, plan: Plan, costs: WindowCosts, moe_s: float) -> tuple[bool, str, float]:
        """Whether the gain expected on held-out tokens, over the steps left, exceeds the stall; step seconds then."""
        verdict, migration = plan.verdict, plan.migration
        if verdict is None or migration is None:
            raise InputError("the plan carries no verdict; plan from token-level routing and the placement in force")
        saved_s = verdict.expected_gain * moe_s
        predicted = costs.step_s - saved_s
        if not verdict.apply:
            return False, verdict.reason, predicted
        move_s = self.calibration.move_s
        stall_s = migration.seconds if move_s is None else len(migration.moves) * move_s
        left = self.options.steps_left if costs.steps_left is None else costs.steps_left
        words = f"{saved_s * 1e3:.3g} ms saved in each of {left} steps, {stall_s * 1e3:.3g} ms to move"
        if saved_s * left <= stall_s:
            return False, f"does not pay: {words}", predicted
        return True, f"pays: {words}", predicted


def _scaled_sheet(cluster: ClusterSpec, by: Calibration) -> ClusterSpec:
    """The cluster with its data sheet as slow as was measured: the roofline's seconds scale with it."""
    device = cluster.accelerator
    update: dict[str, float] = {}
    for names, factor in ((_EXPERT_SHEET, by.expert), (_LINK_SHEET, by.exchange)):
        update |= {name: getattr(device, name) / factor for name in names if getattr(device, name) is not None}
    latency = {name: getattr(cluster, name) * by.exchange for name in ("scale_up_latency", "nic_latency")}
    return cluster.model_copy(update={"accelerator": device.model_copy(update=update), **latency})


def _scaled_profile(profile: HardwareProfile, by: Calibration) -> HardwareProfile:
    """The profile with its measured experts and exchanges as slow as in the run."""
    tables: dict[str, pa.Table] = {name: profile.table(name) for name in profile.table_names}
    for name, factor in (("experts", by.expert), ("alltoall", by.exchange)):
        if name in tables:
            column = tables[name].schema.get_field_index("latency_us")
            scaled = pc.multiply(tables[name]["latency_us"], factor)
            tables[name] = tables[name].set_column(column, "latency_us", scaled)
    note = f"experts x {by.expert:.4g}, exchanges x {by.exchange:.4g}, as measured in a run"
    return HardwareProfile(profile.meta.model_copy(update={"note": note, "tables": {}}), tables)


def await_run(control: Path, timeout_s: float | None, tell: Callable[[str], None]) -> None:
    """Wait for a run to watch ``control``, which is not made; ``tell`` hears of it.

    Raises:
        InputError: none did within ``timeout_s``.
    """
    until = math.inf if timeout_s is None else time.monotonic() + timeout_s
    told = False
    while (run := watcher(control)) is None or not run.under_way:
        if not told:
            died = "the one before has died; " if run is not None and run.state == "died" else ""
            tell(f"no live run watches {control}; {died}waiting for one with --control {control}")
            told = True
        if time.monotonic() > until:
            raise InputError(f"no live run watched {control} within {timeout_s:g} s; is its --control folder another?")
        time.sleep(0.05)


def watch(
    controller: Controller,
    control: Path,
    windows: int | None = None,
    timeout_s: float | None = None,
    on_decision: Callable[[Decision], None] = lambda _decision: None,
    tell: Callable[[str], None] = lambda _text: None,
) -> list[Decision]:
    """Answer the windows that a run puts into ``control``, as a process of its own.

    Ends when the run does, after ``windows`` decisions, or when none came for ``timeout_s``; ``tell`` hears why. A plan
    that pays becomes ``plan.json``.

    Raises:
        InputError: no window came at all within ``timeout_s``; another controller watches; or the run is of another
            model. RunError: the run died.
    """
    try:
        lock = hold(control / "control.lock")
    except BlockingIOError:
        raise InputError(f"another 'moeplan control' watches {control}; end that one first") from None
    try:
        tell(_watch(controller, control, windows, timeout_s, on_decision, tell))
    finally:
        if lock is not None:
            os.close(lock)
    return controller.decisions


def _watch(
    controller: Controller,
    control: Path,
    windows: int | None,
    timeout_s: float | None,
    on_decision: Callable[[Decision], None],
    tell: Callable[[str], None],
) -> str:
    """Why it ended."""
    path, seen, before = control / "window.npz", None, None
    last = time.monotonic()
    while windows is None or len(controller.decisions) < windows:
        run = watcher(control)
        if run is not None and not _goes_on(controller, control, run, before, tell):
            return f"the live run at {control} has ended"
        written, before = _identity(path), run
        if written is not None and written != seen:
            plan = controller.decide(LoadWindow.read(path))
            if plan is not None:
                write_text(control / "plan.json", plan.model_dump_json() + "\n")
            on_decision(controller.decisions[-1])
            seen, last = written, time.monotonic()
        elif timeout_s is not None and time.monotonic() - last > timeout_s:
            why = f"no window came into {control} within {timeout_s:g} s"
            if not controller.decisions:
                raise InputError(f"{why}; is the run's control folder another?")
            return why
        else:
            time.sleep(0.05)
    return f"{len(controller.decisions)} windows are answered"


def _goes_on(
    controller: Controller, control: Path, run: Watcher, before: Watcher | None, tell: Callable[[str], None]
) -> bool:
    """Whether more windows may come from ``run``, which was ``before`` when it was looked at last.

    Raises:
        InputError: it is of another model. RunError: it has died.
    """
    name = str(run.about.get("model", controller.model.name))
    if slug(name) != slug(controller.model.name):
        raise InputError(f"the run is of model {name}, --model is {controller.model.name}; give --model {name}")
    if not run.under_way:
        (control / "plan.json").unlink(missing_ok=True)  # nobody takes it any more
        if run.state == "died":
            raise RunError(f"the live run at {control} has died; what was decided is in {controller.report}")
        return False
    if before is not None:
        if run.state == "down" and before.state != "down":
            tell(f"the live run at {control} has died; waiting for torchrun to start it again")
        if run.about.get("pid") != before.about.get("pid"):
            controller.forget()  # it began at a checkpoint, perhaps from before the plan
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    """Which writing of a file it is: runs that start again count their windows anew."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
