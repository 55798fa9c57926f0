"""From a scenario to a plan: read, check and cost it (:mod:`moeplan.pipeline.job`), plan, bound, judge
(:mod:`moeplan.pipeline.held_out`), write. ``W`` windows, ``L`` layers, ``R`` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan import __version__
from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Bound, LayerEvaluation, Migration, Plan, Prediction, placement_fields
from moeplan.costs.evaluation import Evaluation, aggregate
from moeplan.costs.layer import LayerCosts
from moeplan.errors import InfeasibleError
from moeplan.exports.base import ExportContext, Exporter
from moeplan.files import atomic_directory, canonical_json, sha256_bytes, write_text
from moeplan.pipeline.held_out import judged
from moeplan.pipeline.job import Job, place, prepare, with_shares
from moeplan.pipeline.show import evidence_of
from moeplan.pipeline.threads import single_threaded
from moeplan.planning.bounds import bounds_of
from moeplan.planning.migration import align
from moeplan.planning.problem import PlanningProblem, PlanningResult
from moeplan.progress import Progress, no_progress
from moeplan.registry import load_plugin
from moeplan.reports.plan_page import render_plan_page
from moeplan.reports.summary import Evidence
from moeplan.specs.base import Spec
from moeplan.specs.scenario import Scenario

__all__ = ["PLAN_PLACE", "Optimized", "layer_evaluations", "optimize", "spec_sha256", "write_plan"]

PLAN_PLACE = ("a plan", ("plan.json", "plan.html"))
"""What ``--out`` may hold before: see :func:`moeplan.files.require_place`."""


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
    with single_threaded():
        job = prepare(scenario, windows, domain)
        problem = job.problem(job.load, progress)
        result = _chosen(job, problem)
        progress("score", 0.0)
        try:
            after = job.evaluate(result.placement, job.load)
        except KeyboardInterrupt:  # a plan stands with its figures; a second Ctrl-C ends without one
            result, after = replace(result, status="interrupted"), job.evaluate(result.placement, job.load)
        progress("score", 1.0)
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
        result, verdict = judged(job, result, best_possible, migration)
        progress("hold out", 1.0)
        plan = _plan(job, result, after, bounds=bounds, prediction=prediction, verdict=verdict, migration=migration)
        plan = _for_target(job, plan)
        return Optimized(plan, job.load, job.baseline, after, job.before, job.messages, job.speed_R)


def _chosen(job: Job, problem: PlanningProblem) -> PlanningResult:
    """The planner's answer; from a placement in use by the fewest moves, unless planned within a budget of them."""
    result = place(job, problem)
    placement = result.placement
    if job.current is not None and job.max_moves is None:
        placement = align(job.current, placement, problem)
    return replace(result, placement=with_shares(problem, placement))


def _migration(job: Job, placement: Placement, after: Evaluation) -> Migration | None:
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


def _prediction(job: Job, costs: LayerCosts, after: Evaluation) -> Prediction:
    def step_s(seconds_WL: NDArray[np.float64]) -> float:
        return aggregate(seconds_WL.sum(axis=1), job.objective)

    time_s, error = step_s(after.time_WL), costs.relative_error
    return Prediction(
        time_s=time_s, time_low_s=time_s * (1 - error), time_high_s=time_s * (1 + error),
        expert_time_s=step_s(after.expert_WL), dispatch_combine_time_s=step_s(after.exchange_WL),
        baseline=job.baseline_name, baseline_time_s=step_s(job.before.time_WL),
        tokens_per_step=costs.tokens_per_step, source=dict(costs.source),
    )  # fmt: skip


def _plan(job: Job, result: PlanningResult, after: Evaluation, **judged: Any) -> Plan:
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


def _for_target(job: Job, plan: Plan) -> Plan:
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


def write_plan(found: Optimized, out: Path) -> list[Path]:
    """Write ``plan.json`` and ``plan.html``; those of an older plan are replaced, other files stay.

    Raises:
        InputError: the directory holds something else, or cannot be written.
    """
    with atomic_directory(out, *PLAN_PLACE) as directory:
        found.plan.save(directory / "plan.json")
        write_text(directory / "plan.html", render_plan_page(found.plan, found.evidence))
    return [out / "plan.json", out / "plan.html"]
