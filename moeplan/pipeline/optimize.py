"""From a scenario to a plan: read, check, cost, plan, bound, judge, write.

``W`` windows, ``L`` layers, ``R`` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Bound, LayerEvaluation, Migration, Plan, Prediction, placement_fields
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.checks import Bundle, require, run_checks
from moeplan.costs.coverage import coverage_gaps
from moeplan.costs.evaluation import Evaluation, aggregate, evaluate
from moeplan.costs.layer import LayerCosts
from moeplan.costs.memory import memory_report
from moeplan.costs.operating_point import layer_costs
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
from moeplan.planning.problem import PlanningProblem, PlanningResult
from moeplan.planning.shares import weighted_shares
from moeplan.planning.simple import contiguous
from moeplan.planning.verdict import judge
from moeplan.progress import Progress, no_progress
from moeplan.registry import load_plugin, plugin_names
from moeplan.reports.plan_page import render_plan_page
from moeplan.reports.summary import Evidence
from moeplan.routing.loads import expert_load, in_stretches, split_trace
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Objective, ReplicaSplit, Workload

__all__ = [
    "PLAN_PLACE",
    "SPLIT_OF_TARGET",
    "Optimized",
    "cluster_sha256",
    "layer_evaluations",
    "optimize",
    "speeds",
    "write_plan",
]

PLAN_PLACE = ("a plan", ("plan.json", "plan.html"))
"""What ``--out`` may hold before: see :func:`moeplan.files.require_place`."""

HELD_OUT_WINDOWS = 4
MIN_HELD_OUT_TOKENS = 512
SPLIT_OF_TARGET: dict[str, ReplicaSplit] = {
    "sglang": "nearest",
    "vllm": "even",
    "vllm-ascend": "even",
    "trtllm": "even",
}
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
    interrupted: bool
    speed_R: NDArray[np.float64]

    @property
    def evidence(self) -> Evidence:
        """Load and traffic before and after, for pages and the terminal."""
        name = self.plan.prediction.baseline if self.plan.prediction else "before"
        rows = layer_evaluations(self.plan.layer_ids, self.baseline_evaluation)
        return evidence_of(self.plan, self.load, self.baseline, name, rows, self.speed_R)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A scenario with everything looked up."""

    scenario: Scenario
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

    def problem(self, load: ExpertLoad, progress: Progress) -> PlanningProblem:
        """The planning problem of a load; of all of it, or of the part planned on when some is held out."""
        scenario = self.scenario
        return PlanningProblem(
            load=load,
            experts_L=np.asarray(self.model.experts_L, dtype=np.int64),
            slots_R=self.slots_R,
            speed_R=speeds(self.cluster),
            ranks_per_node=self.cluster.ranks_per_node,
            costs=self.costs,
            objective=self.objective,
            seed=scenario.seed,
            num_groups=self.model.n_group or 1,
            time_limit_s=scenario.time_limit,
            current=self.current,
            max_moves=self.max_moves,
            affordable=self.affordable,
            progress=progress,
        )

    @property
    def max_moves(self) -> int | None:
        """Expert copies that the migration budget allows to bring to another rank."""
        scenario = self.scenario
        if self.current is None or (scenario.migration_size is None and scenario.migration_time is None):
            return None
        expert = self.model.expert_bytes(self.workload.weight_dtype)
        limits = []
        if scenario.migration_size is not None:
            limits.append(scenario.migration_size / expert)
        if scenario.migration_time is not None:
            # At most: every rank receives all the time, from its own node. Plans are held to the time itself.
            limits.append(scenario.migration_time * self.scale_up / expert * self.cluster.num_ranks)
        return int(min(limits))

    def affordable(self, placement: Placement) -> bool:
        """Whether the moves to a placement fit the migration time."""
        limit = self.scenario.migration_time
        if self.current is None or limit is None:
            return True
        problem = self.problem(self.load, no_progress)
        before_WL, after_WL = (
            evaluate(self.load, plan, problem.costs, self.objective, problem.speed_R).time_WL
            for plan in (self.current, placement)
        )
        return self.migration(self.current, placement, (before_WL - after_WL).mean(axis=0)).seconds <= limit

    def migration(self, current: Placement, placement: Placement, gain_L: NDArray[np.float64]) -> Migration:
        """The moves from the placement in use to another that gains ``gain_L`` seconds a step in each layer."""
        return migration_of(
            current,
            placement,
            self.load.layer_ids,
            gain_L,
            self.model.expert_bytes(self.workload.weight_dtype),
            self.scale_up,
            self.cluster.accelerator.nic_bandwidth,
        )

    @property
    def scale_up(self) -> float:
        """Bytes per second between ranks of a node."""
        return self.cluster.accelerator.scale_up_bandwidth or self.cluster.accelerator.nic_bandwidth


def cluster_sha256(cluster: ClusterSpec) -> str:
    """Hash of a cluster, as a plan records it."""
    return sha256_bytes(canonical_json(cluster.model_dump(mode="json")).encode())


def speeds(cluster: ClusterSpec) -> NDArray[np.float64]:
    """Relative speed of each rank."""
    return np.asarray([cluster.rank(r).speed for r in range(cluster.num_ranks)], dtype=np.float64)


def _prepare(scenario: Scenario, windows: str, domain: str | None) -> _Job:
    if scenario.planner not in plugin_names("planners"):
        load_plugin("planners", scenario.planner)  # raises, with the names there are
    if scenario.target is not None and scenario.target not in plugin_names("exporters"):
        load_plugin("exporters", scenario.target)
    model, cluster = scenario.model_spec(), scenario.cluster_spec()
    messages: list[str] = []
    routing = read_routing(scenario.recording, model, format=scenario.trace_format, domain=domain)
    given = scenario.workload.model_fields_set
    routing, phase = in_phase(routing, scenario.workload.phase if "phase" in given else None)
    workload = scenario.workload.model_copy(update={"phase": phase})
    if "batch_per_rank" not in given and phase == "decode":
        workload = workload.model_copy(update={"batch_per_rank": DECODE_BATCH})
    objective = scenario.objective
    if scenario.target is not None and objective.replica_split == "weighted":
        raise SpecError(
            f"replica_split (weighted) cannot be expressed by target ({scenario.target}), whose engine splits tokens"
            " its own way; leave --split out"
        )
    if scenario.target is not None and "replica_split" not in objective.model_fields_set:
        objective = objective.model_copy(update={"replica_split": SPLIT_OF_TARGET.get(scenario.target, "even")})
    load = expert_load(routing, windows)
    filled = np.flatnonzero(load.load_WLE.any(axis=(1, 2)))
    if load.trace is None and 0 < len(filled) < len(load.windows):
        load = replace(load, load_WLE=load.load_WLE[filled], windows=tuple(load.windows[w] for w in filled))
        messages.append(f"windows without tokens are left out, {len(filled)} remain")
    if load.top_k is None:
        load = replace(load, top_k=model.top_k)
    slots_R, num_redundant = slots_of_ranks(model, cluster, workload, scenario.redundant, scenario.kv_reserve)
    current = current_ids = None
    if scenario.current is not None:
        loaded = load_placement(
            scenario.current, model=model, num_ranks=cluster.num_ranks, num_nodes=cluster.num_nodes
        )
        current, current_ids = loaded.placement, loaded.layer_ids
        messages += loaded.notes
    bundle = Bundle(
        model=model,
        cluster=cluster,
        workload=workload,
        load=load,
        num_ranks=scenario.ranks,
        num_nodes=scenario.nodes,
        num_redundant=num_redundant if isinstance(scenario.redundant, str) else scenario.redundant,
        slots_R=slots_R,
        memory=memory_report(model, cluster, workload, slots_R),
        current=current,
        current_layer_ids=current_ids,
        target=scenario.target,
        equal_slots=scenario.target is not None,
    )
    messages += require(run_checks(bundle))
    profile = profile_of(scenario.profile, cluster.accelerator.name)
    backend_notes(scenario, profile)  # a plan is not costed by framework, but the scenario is wrong
    notes = profile_notes(profile, cluster)
    if profile is not None and scenario.profile is not None:
        gaps = coverage_gaps(model, cluster, workload, objective, profile)
        notes += [f"scaled or modelled: {gap}" for gap in gaps]
    costs = layer_costs(model, cluster, workload, objective, profile)
    return _Job(
        scenario, model, cluster, workload, objective, load, routing, slots_R, num_redundant, current, costs,
        tuple(notes), tuple(messages),
    )  # fmt: skip


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
        return _optimize(_prepare(scenario, windows, domain), windows, domain, progress)


def _optimize(job: _Job, windows: str, domain: str | None, progress: Progress) -> Optimized:
    scenario = job.scenario
    planner = load_plugin("planners", scenario.planner)
    problem = job.problem(job.load, progress)
    result: PlanningResult = planner(problem)
    placement = result.placement
    if job.current is not None and job.max_moves is None:
        placement = align(job.current, placement, problem)
    placement = _with_shares(problem, placement)
    result = replace(result, placement=placement)
    interrupted = result.status == "interrupted"
    baseline_name = "current" if job.current is not None else "contiguous"
    baseline = job.current if job.current is not None else contiguous(problem).placement
    after = evaluate(job.load, placement, problem.costs, job.objective, problem.speed_R)
    before = evaluate(job.load, baseline, problem.costs, job.objective, problem.speed_R)
    progress("prove", 0.0)
    bounds: tuple[Bound, ...] = ()
    try:
        bounds = bounds_of(problem, result, after)
    except KeyboardInterrupt:  # the plan stands without its proof
        interrupted, result = True, replace(result, status="interrupted")
    progress("prove", 1.0)
    migration = None
    if job.current is not None:
        migration = job.migration(job.current, placement, (before.time_WL - after.time_WL).mean(axis=0))
        if job.max_moves is not None and len(migration.moves) > job.max_moves:
            raise InfeasibleError(
                f"planner {scenario.planner} moves {len(migration.moves)} experts, but the migration budget allows"
                f" {job.max_moves}; allow more, or use planner joint, which plans within a budget"
            )
        limit = scenario.migration_time
        if limit is not None and migration.seconds > limit:
            raise InfeasibleError(
                f"planner {scenario.planner} moves experts for {migration.seconds:.3g} s, but migration_time allows"
                f" {limit:.3g} s; allow more, or use planner joint, which plans within a budget"
            )
    base_s = aggregate(before.time_WL.sum(axis=1), job.objective)
    time_s = aggregate(after.time_WL.sum(axis=1), job.objective)
    error = problem.costs.relative_error
    prediction = Prediction(
        time_s=time_s,
        time_low_s=time_s * (1 - error),
        time_high_s=time_s * (1 + error),
        expert_time_s=aggregate(after.expert_WL.sum(axis=1), job.objective),
        dispatch_combine_time_s=aggregate(after.exchange_WL.sum(axis=1), job.objective),
        baseline=baseline_name,
        baseline_time_s=base_s,
        tokens_per_step=problem.costs.tokens_per_step,
        source=dict(problem.costs.source),
    )
    progress("hold out", 0.0)
    best_possible = 1.0 - bounds[0].bound / base_s if bounds else 1.0
    try:
        held = _held_out(job, planner, windows, placement, baseline, interrupted)
    except KeyboardInterrupt:
        interrupted = True
        held = _held_out(job, planner, windows, placement, baseline, interrupted)
    interrupted = interrupted or held.interrupted
    verdict = judge(baseline_name, held.before_H, held.after_H, best_possible, held.words, held.unchecked, migration)
    progress("hold out", 1.0)
    plan = Plan(
        model=job.model.name,
        planner=scenario.planner,
        status="interrupted" if interrupted else result.status,
        seed=scenario.seed,
        num_experts=job.model.num_experts,
        experts_per_layer=job.model.experts_per_layer,
        num_redundant_experts=job.num_redundant,
        layer_ids=job.load.layer_ids,
        **placement_fields(placement),
        objective=job.objective,
        workload=job.workload,
        bounds=bounds,
        prediction=prediction,
        evaluation=layer_evaluations(job.load.layer_ids, after),
        verdict=verdict,
        migration=migration,
        notes=(*result.notes, *job.notes),
        provenance={
            "moeplan": version("moeplan"),
            "trace_sha256": job.routing.origin["sha256"],
            "model_sha256": sha256_bytes(canonical_json(job.model.model_dump(mode="json")).encode()),
            "cluster_sha256": cluster_sha256(job.cluster),
            "cluster": job.cluster.name,
            "accelerator": job.cluster.accelerator.name,
            "windows": windows,
            **({} if domain is None else {"domain": domain}),
        },
    )
    plan = _for_target(job, plan)
    return Optimized(plan, job.load, baseline, after, before, job.messages, interrupted, problem.speed_R)


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


def _with_shares(problem: PlanningProblem, placement: Placement) -> Placement:
    """The placement with weighted copies where the objective asks for them."""
    if problem.objective.replica_split != "weighted":
        return placement
    return weighted_shares(placement, problem.load.load_LE, problem.speed_R)


def layer_evaluations(layer_ids: tuple[int, ...], found: Evaluation) -> tuple[LayerEvaluation, ...]:
    """Per-layer figures, averaged over windows."""
    counts = found.counts
    rows = []
    for l, layer_id in enumerate(layer_ids):
        hop = l < len(layer_ids) - 1
        rows.append(
            LayerEvaluation(
                layer_id=layer_id,
                max_over_mean_load=float(found.max_over_mean_WL[:, l].mean()),
                nodes_per_token=None if counts is None else float(counts.nodes_per_token_WL[:, l].mean()),
                ranks_per_token=None if counts is None else float(counts.ranks_per_token_WL[:, l].mean()),
                same_node_share=float(found.same_node_L[l]) if found.same_node_L is not None and hop else None,
                same_rank_share=float(found.same_rank_L[l]) if found.same_rank_L is not None and hop else None,
                time_s=float(found.time_WL[:, l].mean()),
            )
        )
    return tuple(rows)


@dataclass(frozen=True, slots=True, eq=False)
class _HeldOut:
    """Step seconds of the baseline and of a plan that has not seen them, per held-out part: a stretch or a window."""

    before_H: NDArray[np.float64]
    after_H: NDArray[np.float64]
    words: str
    unchecked: str
    interrupted: bool


def _held_out(
    job: _Job, planner: Any, windows: str, placement: Placement, baseline: Placement, interrupted: bool
) -> _HeldOut:
    """Judge the planner on routing it has not seen, all windows of a held-out part aggregated as the objective says."""
    if interrupted:
        why = "interrupted before the held-out check", "planning was interrupted before the check: let it end"
        first, rest, parts, words, unchecked = _nothing_held_out(job, *why)
    else:
        first, rest, parts, words, unchecked = _split(job, windows)
    scored = placement
    if first is not None:
        seen_problem = job.problem(first, no_progress)
        result: PlanningResult = planner(seen_problem)
        if result.status == "interrupted":
            return _held_out(job, planner, windows, placement, baseline, interrupted=True)
        scored = _with_shares(seen_problem, result.placement)

    problem = job.problem(rest, no_progress)

    def seconds(plan: Placement) -> NDArray[np.float64]:
        time_W = evaluate(rest, plan, problem.costs, job.objective, problem.speed_R).time_WL.sum(axis=1)
        return np.array([aggregate(part_W, job.objective) for part_W in np.array_split(time_W, parts)])

    return _HeldOut(seconds(baseline), seconds(scored), words, unchecked, interrupted)


_Split = tuple[ExpertLoad | None, ExpertLoad, int, str, str]


def _nothing_held_out(job: _Job, why: str, remedy: str) -> _Split:
    parts = len(job.load.windows) if job.objective.aggregate == "mean" else 1
    return None, job.load, parts, f"the data planned on ({why})", remedy


def _split(job: _Job, windows: str) -> _Split:
    """What to plan on, None where nothing can be held out; what to score on, in how many parts, and that in words; why
    nothing was held out and what to do.
    """
    routing, load, least = job.routing, job.load, 2 * MIN_HELD_OUT_TOKENS
    unchecked = "record token-level routing or several windows to have it checked"
    if isinstance(routing, RoutingTrace) and routing.num_tokens >= least:
        seen, unseen = split_trace(routing)
        rest = expert_load(unseen, windows)
        fewest = unseen.num_tokens if rest.window_T is None else int(np.bincount(rest.window_T).min())
        count = min(HELD_OUT_WINDOWS, unseen.num_tokens // (MIN_HELD_OUT_TOKENS // HELD_OUT_WINDOWS), fewest)
        if count > 1:
            each = "" if len(rest.windows) == 1 else f" of {len(rest.windows)} kinds each"
            words = f"the second half of the trace in {count} windows{each}, planned on the first"
            return expert_load(seen, windows), in_stretches(rest, count), count, words, ""
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
            return first, rest, count if job.objective.aggregate == "mean" else max(2, count // 2), words, ""
    return _nothing_held_out(job, "nothing could be held out", unchecked)


def write_plan(found: Optimized, out: Path) -> list[Path]:
    """Write ``plan.json`` and ``plan.html``; those of an older plan are replaced, other files stay.

    Raises:
        InputError: the directory holds something else, or cannot be written.
    """
    with atomic_directory(out, *PLAN_PLACE) as directory:
        found.plan.save(directory / "plan.json")
        write_text(directory / "plan.html", render_plan_page(found.plan, found.evidence))
    return [out / "plan.json", out / "plan.html"]
