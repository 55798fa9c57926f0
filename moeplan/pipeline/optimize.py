"""From a scenario to a plan: read, check, cost, plan, bound, judge, write.

``W`` windows, ``L`` layers, ``R`` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from moeplan import __version__
from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Bound, LayerEvaluation, Migration, Plan, Prediction, Verdict, placement_fields
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.checks import Bundle, require, run_checks
from moeplan.costs.coverage import coverage_gaps
from moeplan.costs.evaluation import Evaluation, aggregate, evaluate
from moeplan.costs.layer import LayerCosts
from moeplan.costs.memory import memory_report
from moeplan.costs.operating_point import layer_costs
from moeplan.costs.work import speeds
from moeplan.errors import InfeasibleError, SpecError
from moeplan.exports.base import ExportContext, Exporter
from moeplan.files import atomic_directory, canonical_json, sha256_bytes, write_text
from moeplan.pipeline.exports import load_placement
from moeplan.pipeline.inputs import (
    DECODE_BATCH,
    backend_notes,
    in_phase,
    profile_notes,
    profile_of,
    read_routing,
    slots_of_ranks,
)
from moeplan.pipeline.show import evidence_of
from moeplan.planning.bounds import bounds_of
from moeplan.planning.migration import align, migration_of
from moeplan.planning.problem import Planner, PlanningProblem, PlanningResult
from moeplan.planning.shares import weighted_shares
from moeplan.planning.simple import contiguous
from moeplan.planning.verdict import judge
from moeplan.progress import Progress, no_progress
from moeplan.registry import load_plugin, plugin_names
from moeplan.reports.plan_page import render_plan_page
from moeplan.reports.summary import Evidence
from moeplan.routing.loads import expert_load, split_trace, without_stretches
from moeplan.specs.base import Spec
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Objective, ReplicaSplit, Workload

__all__ = [
    "PLAN_PLACE", "SPLIT_OF_TARGET", "Optimized", "layer_evaluations", "optimize", "spec_sha256",
    "write_plan",
]  # fmt: skip

PLAN_PLACE = ("a plan", ("plan.json", "plan.html"))
"""What ``--out`` may hold before: see :func:`moeplan.files.require_place`."""

HELD_OUT_STRETCHES = 4
LOW = "a low estimate: half of the routing plans less well than all of it"
MIN_HELD_OUT_TOKENS = 512
SPLIT_OF_TARGET: dict[str, ReplicaSplit] = {
    "sglang": "nearest", "vllm": "even", "vllm-ascend": "even", "trtllm": "even",
}  # fmt: skip
"""How each engine's dispatch finds a copy, see docs/guides/exporters.md."""


@dataclass(frozen=True, slots=True, eq=False)
class Optimized:
    """A plan and what was seen on the way: for pages and for people."""

    plan: Plan
    load: ExpertLoad
    baseline: Placement
    evaluation: Evaluation
    baseline_evaluation: Evaluation
    messages: tuple[str, ...]
    speed_R: NDArray[np.float64]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the search or what follows it: the plan is the best so far."""
        return self.plan.status == "interrupted"

    @property
    def evidence(self) -> Evidence:
        """Load and traffic before and after, for pages and the terminal."""
        name = self.plan.prediction.baseline if self.plan.prediction else "before"
        rows = layer_evaluations(self.plan.layer_ids, self.baseline_evaluation)
        return evidence_of(self.plan, self.load, self.baseline, name, rows, self.speed_R)


@dataclass(frozen=True, eq=False)
class _Job:
    """A scenario with everything looked up."""

    scenario: Scenario
    windows: str
    domain: str | None
    model: ModelSpec
    cluster: ClusterSpec
    workload: Workload
    objective: Objective
    load: ExpertLoad
    routing: RoutingTrace | ExpertLoad
    slots_R: NDArray[np.int64]
    num_redundant: int
    current: Placement | None
    costs: LayerCosts
    notes: tuple[str, ...]  # on where costs are from
    messages: tuple[str, ...]

    def problem(self, load: ExpertLoad, progress: Progress = no_progress) -> PlanningProblem:
        """The planning problem of a load; of all of it, or of the part planned on when some is held out."""
        return PlanningProblem(
            load=load, experts_L=np.asarray(self.model.experts_L, dtype=np.int64), slots_R=self.slots_R,
            speed_R=self.speed_R, ranks_per_node=self.cluster.ranks_per_node, costs=self.costs,
            objective=self.objective, seed=self.scenario.seed, num_groups=self.model.n_group or 1,
            time_limit_s=self.scenario.time_limit, current=self.current, max_moves=self.max_moves,
            affordable=self.affordable, progress=progress,
        )  # fmt: skip

    def evaluate(self, placement: Placement, load: ExpertLoad) -> Evaluation:
        """What a placement does to a load."""
        costs = self.costs.known_from(load, self.objective.return_mode)
        return evaluate(load, placement, costs, self.objective, self.speed_R)

    @cached_property
    def speed_R(self) -> NDArray[np.float64]:
        """Relative speed of each rank."""
        return speeds(self.cluster)

    @cached_property
    def baseline(self) -> Placement:
        """What a plan is compared with: the placement in use, else the contiguous one."""
        return contiguous(self.problem(self.load)).placement if self.current is None else self.current

    @property
    def baseline_name(self) -> str:
        """That in a word."""
        return "contiguous" if self.current is None else "current"

    @cached_property
    def before(self) -> Evaluation:
        """What the baseline does."""
        return self.evaluate(self.baseline, self.load)

    @property
    def max_moves(self) -> int | None:
        """Expert copies that the migration budget allows to bring to another rank."""
        scenario, expert = self.scenario, self.expert_bytes
        limits = []
        if scenario.migration_size is not None:
            limits.append(scenario.migration_size / expert)
        if scenario.migration_time is not None:
            # At most: every rank receives all the time, from its own node. Plans are held to the time itself.
            limits.append(scenario.migration_time * self.scale_up / expert * self.cluster.num_ranks)
        return int(min(limits)) if limits else None

    def affordable(self, placement: Placement) -> bool:
        """Whether the moves to a placement fit the migration time."""
        limit = self.scenario.migration_time
        if self.current is None or limit is None:
            return True
        return self.migration(self.current, placement, self.evaluate(placement, self.load)).seconds <= limit

    def migration(self, current: Placement, placement: Placement, after: Evaluation) -> Migration:
        """The moves from the placement in use to another, whose evaluation is ``after``."""
        gain_L, expert = (self.before.time_WL - after.time_WL).mean(axis=0), self.expert_bytes
        nic = self.cluster.accelerator.nic_bandwidth
        return migration_of(current, placement, self.load.layer_ids, gain_L, expert, self.scale_up, nic)

    @property
    def expert_bytes(self) -> float:
        """Bytes of an expert's weights in a layer."""
        return self.model.expert_bytes(self.workload.weight_dtype)

    @property
    def scale_up(self) -> float:
        """Bytes per second between ranks of a node."""
        return self.cluster.accelerator.scale_up_bandwidth or self.cluster.accelerator.nic_bandwidth


def spec_sha256(spec: Spec) -> str:
    """Hash of a model or cluster, as a plan records it."""
    return sha256_bytes(canonical_json(spec.model_dump(mode="json")).encode())


def optimize(
    scenario: Scenario, *, windows: str = "all", domain: str | None = None, progress: Progress = no_progress
) -> Optimized:
    """Plan what a scenario asks for.

    The plan is made on all of the routing given. What it is expected to gain is measured apart: the planner also plans
    on the first half (tokens, or windows of counts), and that plan is scored on the rest.

    Raises:
        InputError: an input is wrong. InfeasibleError: no placement satisfies the limits.
    """
    # Layers run side by side on all cores; a numeric library's own threads under them only get in each other's way.
    with threadpool_limits(1):
        job = _prepare(scenario, windows, domain)
        problem = job.problem(job.load, progress)
        result = _chosen(job, problem)
        after = job.evaluate(result.placement, job.load)
        progress("prove", 0.0)
        bounds: tuple[Bound, ...] = ()
        try:
            bounds = bounds_of(problem, result, after)
        except KeyboardInterrupt:  # the plan stands without its proof
            result = replace(result, status="interrupted")
        progress("prove", 1.0)
        migration = _migration(job, result.placement, after)
        prediction = _prediction(job, problem.costs, after)
        progress("hold out", 0.0)
        best_possible = 1.0 - bounds[0].bound / prediction.baseline_time_s if bounds else 1.0
        result, verdict = _judged(job, result, best_possible, migration)
        progress("hold out", 1.0)
        plan = _plan(job, result, after, bounds=bounds, prediction=prediction, verdict=verdict, migration=migration)
        plan = _for_target(job, plan)
        return Optimized(plan, job.load, job.baseline, after, job.before, job.messages, job.speed_R)


def _prepare(scenario: Scenario, windows: str, domain: str | None) -> _Job:
    for kind, name in (("planners", scenario.planner), ("exporters", scenario.target)):
        if name is not None and name not in plugin_names(kind):
            load_plugin(kind, name)  # raises, with the names there are
    model, cluster, objective = scenario.model_spec(), scenario.cluster_spec(), _objective(scenario)
    routing = read_routing(scenario.recording, model, format=scenario.trace_format, domain=domain)
    given = scenario.workload.model_fields_set
    routing, phase = in_phase(routing, scenario.workload.phase if "phase" in given else None)
    batch = {"batch_per_rank": DECODE_BATCH} if "batch_per_rank" not in given and phase == "decode" else {}
    workload = scenario.workload.model_copy(update={"phase": phase} | batch)
    load, messages = _load(routing, windows, model)
    in_use, redundant = None, scenario.redundant
    place: dict[str, Any] = {"num_ranks": cluster.num_ranks, "num_nodes": cluster.num_nodes}
    if scenario.current is not None:
        in_use = load_placement(scenario.current, model=model, **place, whose="ranks")
        messages += in_use.notes
        if "redundant" not in scenario.model_fields_set and (redundant := _redundant_of(in_use.placement, cluster)):
            messages.append(f"the plan has {redundant} redundant slots as current has; --redundant 0 plans without")
    slots_R, num_redundant = slots_of_ranks(model, cluster, workload, redundant, scenario.kv_reserve)
    bundle = Bundle(
        model=model, cluster=cluster, workload=workload, load=load, num_ranks=scenario.ranks,
        num_nodes=scenario.nodes, slots_R=slots_R, memory=memory_report(model, cluster, workload, slots_R),
        num_redundant=num_redundant if isinstance(redundant, str) else redundant,
        current=None if in_use is None else in_use.placement,
        current_layer_ids=None if in_use is None else in_use.layer_ids,
        target=scenario.target, equal_slots=scenario.target is not None,
    )  # fmt: skip
    messages += require(run_checks(bundle))
    costs, notes = _costs(scenario, model, cluster, workload, objective)
    return _Job(
        scenario, windows, domain, model, cluster, workload, objective, load, routing, slots_R, num_redundant,
        bundle.current, costs, tuple(notes), tuple(messages),
    )  # fmt: skip


def _redundant_of(current: Placement, cluster: ClusterSpec) -> int:
    """Redundant slots per layer where every rank that works keeps as many slots as it has."""
    slots_R = np.bincount(current.rank_of_slot_P, minlength=cluster.num_ranks)
    live_R = [not cluster.rank(r).failed for r in range(cluster.num_ranks)]
    return max(0, int(slots_R[live_R].sum()) - current.num_experts)


def _objective(scenario: Scenario) -> Objective:
    """The objective, its copies found as the target's engine does."""
    objective = scenario.objective
    if scenario.target is None:
        return objective
    if objective.replica_split == "weighted":
        raise SpecError(
            f"replica_split (weighted) cannot be expressed by target ({scenario.target}), whose engine splits tokens"
            " its own way; leave --split out"
        )
    if "replica_split" in objective.model_fields_set:
        return objective
    return objective.model_copy(update={"replica_split": SPLIT_OF_TARGET.get(scenario.target, "even")})


def _load(routing: RoutingTrace | ExpertLoad, windows: str, model: ModelSpec) -> tuple[ExpertLoad, list[str]]:
    """The load to plan for, and what people should know of it."""
    load, messages = expert_load(routing, windows), []
    filled = np.flatnonzero(load.load_WLE.any(axis=(1, 2)))
    if load.trace is None and 0 < len(filled) < len(load.windows):
        load = replace(load, load_WLE=load.load_WLE[filled], windows=tuple(load.windows[w] for w in filled))
        messages.append(f"windows without tokens are left out, {len(filled)} remain")
    return (load if load.top_k is not None else replace(load, top_k=model.top_k)), messages


def _costs(
    scenario: Scenario, model: ModelSpec, cluster: ClusterSpec, workload: Workload, objective: Objective
) -> tuple[LayerCosts, list[str]]:
    """Costs of a layer, and notes on where they are from."""
    profile = profile_of(scenario.profile, cluster.accelerator.name)
    backend_notes(scenario, profile)  # a plan is not costed by framework, but the scenario is wrong
    notes = profile_notes(profile, cluster)
    if profile is not None and scenario.profile is not None:
        gaps = coverage_gaps(model, cluster, workload, objective, profile)
        notes += [f"scaled or modelled: {gap}" for gap in gaps]
    return layer_costs(model, cluster, workload, objective, profile), notes


def _place(job: _Job, problem: PlanningProblem) -> PlanningResult:
    planner: Planner = load_plugin("planners", job.scenario.planner)
    return planner(problem)


def _chosen(job: _Job, problem: PlanningProblem) -> PlanningResult:
    """The planner's answer; from a placement in use by the fewest moves, unless planned within a budget of them."""
    result = _place(job, problem)
    placement = result.placement
    if job.current is not None and job.max_moves is None:
        placement = align(job.current, placement, problem)
    return replace(result, placement=_with_shares(problem, placement))


def _with_shares(problem: PlanningProblem, placement: Placement) -> Placement:
    """The placement with weighted copies where the objective asks for them."""
    if problem.objective.replica_split != "weighted":
        return placement
    return weighted_shares(placement, problem.load.load_LE, problem.speed_R)


def _migration(job: _Job, placement: Placement, after: Evaluation) -> Migration | None:
    """The moves from the placement in use.

    Raises:
        InfeasibleError: they exceed the budget.
    """
    if job.current is None:
        return None
    migration, limit_s = job.migration(job.current, placement, after), job.scenario.migration_time
    over = None
    if job.max_moves is not None and len(migration.moves) > job.max_moves:
        over = f"{len(migration.moves)} experts, but the migration budget allows {job.max_moves}"
    elif limit_s is not None and migration.seconds > limit_s:
        over = f"experts for {migration.seconds:.3g} s, but migration_time allows {limit_s:.3g} s"
    if over is not None:
        raise InfeasibleError(
            f"planner {job.scenario.planner} moves {over}; allow more, or use planner joint, which plans within a"
            " budget"
        )
    return migration


def _prediction(job: _Job, costs: LayerCosts, after: Evaluation) -> Prediction:
    def step_s(seconds_WL: NDArray[np.float64]) -> float:
        return aggregate(seconds_WL.sum(axis=1), job.objective)

    time_s, error = step_s(after.time_WL), costs.relative_error
    return Prediction(
        time_s=time_s, time_low_s=time_s * (1 - error), time_high_s=time_s * (1 + error),
        expert_time_s=step_s(after.expert_WL), dispatch_combine_time_s=step_s(after.exchange_WL),
        baseline=job.baseline_name, baseline_time_s=step_s(job.before.time_WL),
        tokens_per_step=costs.tokens_per_step, source=dict(costs.source),
    )  # fmt: skip


def _plan(job: _Job, result: PlanningResult, after: Evaluation, **judged: Any) -> Plan:
    """The plan's file, with its bounds, prediction, verdict and migration ``judged``."""
    return Plan(
        model=job.model.name, planner=job.scenario.planner, status=result.status, seed=job.scenario.seed,
        num_experts=job.model.num_experts, experts_per_layer=job.model.experts_per_layer,
        num_redundant_experts=job.num_redundant, layer_ids=job.load.layer_ids, **placement_fields(result.placement),
        objective=job.objective, workload=job.workload, evaluation=layer_evaluations(job.load.layer_ids, after),
        notes=(*result.notes, *job.notes), **judged,
        provenance={
            "moeplan": __version__, "trace_sha256": job.routing.origin["sha256"],
            "model_sha256": spec_sha256(job.model), "cluster_sha256": spec_sha256(job.cluster),
            "cluster": job.cluster.name, "accelerator": job.cluster.accelerator.name, "windows": job.windows,
            **({} if job.domain is None else {"domain": job.domain}),
        },
    )  # fmt: skip


def _for_target(job: _Job, plan: Plan) -> Plan:
    """The plan, not to be applied where its target cannot express it."""
    if job.scenario.target is None or plan.verdict is None:
        return plan
    exporter: Exporter = load_plugin("exporters", job.scenario.target)
    reasons = exporter.refusals(plan, ExportContext(model=job.model))
    if not reasons:
        return plan
    reason = f"{exporter.name} cannot express this plan: {'; '.join(reasons)}"
    return plan.model_copy(update={"verdict": plan.verdict.model_copy(update={"apply": False, "reason": reason})})


def layer_evaluations(layer_ids: tuple[int, ...], found: Evaluation) -> tuple[LayerEvaluation, ...]:
    """Per-layer figures, averaged over windows."""
    counts, last = found.counts, len(layer_ids) - 1
    return tuple(
        LayerEvaluation(
            layer_id=layer_id,
            max_over_mean_load=float(found.max_over_mean_WL[:, l].mean()),
            nodes_per_token=None if counts is None else float(counts.nodes_per_token_WL[:, l].mean()),
            ranks_per_token=None if counts is None else float(counts.ranks_per_token_WL[:, l].mean()),
            same_node_share=None if found.same_node_L is None or l == last else float(found.same_node_L[l]),
            same_rank_share=None if found.same_rank_L is None or l == last else float(found.same_rank_L[l]),
            time_s=float(found.time_WL[:, l].mean()),
        )
        for l, layer_id in enumerate(layer_ids)
    )


def _judged(
    job: _Job, result: PlanningResult, best_possible: float, migration: Migration | None
) -> tuple[PlanningResult, Verdict]:
    """The planner judged on routing it has not seen; where that is interrupted, the plan on what it was made on."""
    if result.status != "interrupted":
        try:
            split = _split(job)
            scored = result.placement if split.first is None else _unseen(job, split.first)
            return result, _verdict(job, split, scored, best_possible, migration)
        except KeyboardInterrupt:
            result = replace(result, status="interrupted")
    why = "interrupted before the held-out check", "planning was interrupted before the check: let it end"
    return result, _verdict(job, _all(job, *why), result.placement, best_possible, migration)


def _unseen(job: _Job, first: ExpertLoad) -> Placement:
    """The plan of the first part alone."""
    problem = job.problem(first)
    result = _place(job, problem)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    return _with_shares(problem, result.placement)


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """What to plan on, None where nothing can be held out; what to score on, and that in words; in how many parts it is
    cut for the interval, stretches of its tokens or else its windows; why nothing was held out and what to do.
    """

    first: ExpertLoad | None
    rest: ExpertLoad
    words: str
    parts: int
    stretches: bool = False
    unchecked: str = ""


def _verdict(
    job: _Job, split: _Split, placement: Placement, best_possible: float, migration: Migration | None
) -> Verdict:
    """What a placement gains on all that it is scored on, and there without each part."""

    def seconds(load: ExpertLoad) -> NDArray[np.float64]:  # before and after, per window
        return np.stack([job.evaluate(plan, load).time_WL.sum(axis=1) for plan in (job.baseline, placement)])

    def steps(seconds_BW: NDArray[np.float64]) -> tuple[float, float]:
        before_W, after_W = seconds_BW
        return aggregate(before_W, job.objective), aggregate(after_W, job.objective)

    rest_BW = seconds(split.rest)
    if split.stretches:
        others = [seconds(load) for load in without_stretches(split.rest, split.parts)]
    else:
        groups = np.array_split(np.arange(rest_BW.shape[1]), split.parts)
        others = [np.delete(rest_BW, group, axis=1) for group in groups if split.parts > 1]
    before_s, after_s = steps(rest_BW)
    without_H = np.array([1.0 - after / before for before, after in map(steps, others)])
    return judge(
        job.baseline_name, before_s, 1.0 - after_s / before_s, without_H, best_possible, split.words, split.unchecked,
        migration,
    )  # fmt: skip


def _all(job: _Job, why: str, remedy: str) -> _Split:
    parts = len(job.load.windows) if job.objective.aggregate == "mean" else 1
    return _Split(None, job.load, f"the data planned on ({why})", parts, unchecked=remedy)


def _split(job: _Job) -> _Split:
    """Half to plan on and half to score on; where there is not enough for both, all of it."""
    routing, load, least = job.routing, job.load, 2 * MIN_HELD_OUT_TOKENS
    unchecked = "record token-level routing or several windows to have it checked"
    if isinstance(routing, RoutingTrace) and routing.num_tokens >= least:
        seen, unseen = split_trace(routing)
        rest = expert_load(unseen, job.windows)
        fewest = unseen.num_tokens if rest.window_T is None else int(np.bincount(rest.window_T).min())
        count = min(HELD_OUT_STRETCHES, unseen.num_tokens // (MIN_HELD_OUT_TOKENS // HELD_OUT_STRETCHES), fewest)
        if count > 1:
            each = "" if len(rest.windows) == 1 else f" in {len(rest.windows)} windows"
            words = f"the second half of the trace{each}, planned on the first ({LOW})"
            return _Split(expert_load(seen, job.windows), rest, words, count, stretches=True)
        unchecked = "a window has too few tokens to hold some out: record more"
    elif isinstance(routing, RoutingTrace):
        unchecked = f"the trace has {routing.num_tokens:,} tokens, holding out needs {least:,}: record more"
    else:
        half = len(load.windows) // 2
        parts = slice(half), slice(half, None)
        if half > 1 and all((load.load_WLE[part].sum(axis=(0, 2)) > 0).all() for part in parts):
            first, rest = (
                replace(load, load_WLE=load.load_WLE[part], windows=load.windows[part], trace=None, window_T=None)
                for part in parts
            )
            count = len(rest.windows)
            words = f"the last {count} windows, planned on the first {half}"
            # Where not the mean counts, two windows at least make a part.
            return _Split(first, rest, words, count if job.objective.aggregate == "mean" else max(2, count // 2))
    return _all(job, "nothing could be held out", unchecked)


def write_plan(found: Optimized, out: Path) -> list[Path]:
    """Write ``plan.json`` and ``plan.html``; those of an older plan are replaced, other files stay.

    Raises:
        InputError: the directory holds something else, or cannot be written.
    """
    with atomic_directory(out, *PLAN_PLACE) as directory:
        found.plan.save(directory / "plan.json")
        write_text(directory / "plan.html", render_plan_page(found.plan, found.evidence))
    return [out / "plan.json", out / "plan.html"]
