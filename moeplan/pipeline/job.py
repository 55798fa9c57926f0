"""A planning job: a scenario with everything looked up. ``W`` windows, ``L`` layers, ``R`` ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Migration
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.checks import Bundle, require, run_checks
from moeplan.costs.coverage import coverage_gaps
from moeplan.costs.evaluation import Evaluation, evaluate
from moeplan.costs.layer import LayerCosts
from moeplan.costs.memory import memory_report
from moeplan.costs.operating_point import layer_costs
from moeplan.costs.work import speeds, working
from moeplan.errors import SpecError
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
from moeplan.planning.migration import migration_of
from moeplan.planning.problem import PlanningProblem, PlanningResult, answer_of
from moeplan.planning.shares import weighted_shares
from moeplan.planning.simple import contiguous
from moeplan.progress import Progress, no_progress
from moeplan.registry import load_plugin, plugin_names
from moeplan.routing.loads import expert_load
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Objective, ReplicaSplit, Workload

__all__ = ["SPLIT_OF_TARGET", "Job", "place", "prepare", "with_shares"]

MOST_RANKS = 8192
SPLIT_OF_TARGET: dict[str, ReplicaSplit] = {
    "sglang": "nearest", "vllm": "even", "vllm-ascend": "even", "trtllm": "even",
}  # fmt: skip
"""How each engine's dispatch finds a copy, see docs/guides/exporters.md."""


@dataclass(frozen=True, eq=False)
class Job:
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


def prepare(scenario: Scenario, windows: str, domain: str | None) -> Job:
    """Read and check everything that a scenario names.

    Raises:
        InputError: an input is wrong. InfeasibleError: what is asked for does not fit.
    """
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
    if cluster.num_ranks > MOST_RANKS:
        raise SpecError(
            f"ranks ({cluster.num_ranks:,}) are more than are planned for ({MOST_RANKS:,}): a plan has figures for each"
            " pair of ranks; give the ranks of one expert-parallel group"
        )
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
    return Job(
        scenario, windows, domain, model, cluster, workload, objective, load, routing, slots_R, num_redundant,
        bundle.current, costs, tuple(notes), tuple(messages),
    )  # fmt: skip


def _redundant_of(current: Placement, cluster: ClusterSpec) -> int:
    """Redundant slots per layer where every rank that works keeps as many slots as it has."""
    slots_R = np.bincount(current.rank_of_slot_P, minlength=cluster.num_ranks)
    return max(0, int(slots_R[working(cluster)].sum()) - current.num_experts)


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


def place(job: Job, problem: PlanningProblem) -> PlanningResult:
    """What the scenario's planner answers."""
    name = job.scenario.planner
    return answer_of(name, load_plugin("planners", name), problem)


def with_shares(problem: PlanningProblem, placement: Placement) -> Placement:
    """The placement with weighted copies where the objective asks for them."""
    if problem.objective.replica_split != "weighted":
        return placement
    return weighted_shares(placement, problem.load.load_LE, problem.speed_R)
