"""Score plans and placement files, ours or foreign ones, on any trace, alone or side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import IMPORTED, LayerEvaluation, Plan, plan_file
from moeplan.checks import Bundle, require, run_checks
from moeplan.costs.evaluation import Evaluation, aggregate, evaluate
from moeplan.costs.layer import LayerCosts
from moeplan.costs.operating_point import layer_costs
from moeplan.costs.work import speeds
from moeplan.errors import PlanError, SpecError, UnknownNameError
from moeplan.pipeline.exports import load_placement, own_plan
from moeplan.pipeline.inputs import DECODE_BATCH, in_phase, profile_notes, profile_of, read_routing
from moeplan.pipeline.job import SPLIT_OF_TARGET, with_shares
from moeplan.pipeline.optimize import layer_evaluations, spec_sha256
from moeplan.planning.problem import PlanningProblem, answer_of
from moeplan.registry import load_plugin
from moeplan.routing.loads import expert_load
from moeplan.specs.catalogue import slug
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import DEFAULT_CLUSTER, accelerator_names, sized_cluster
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model
from moeplan.specs.workload import DispatchKind, Objective, Phase, ReplicaSplit, ReturnMode, Workload

__all__ = ["Score", "differences", "evaluate_plan", "evaluate_plans"]

_COMPARED = ("time_s", "max_over_mean_load", "nodes_per_token", "ranks_per_token", "same_node_share")


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """A placement's figures on a trace."""

    model: str
    format: str
    evaluation: Evaluation
    objective: Objective
    workload: Workload
    layers: tuple[LayerEvaluation, ...]
    source: dict[str, str]
    messages: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object: totals, then layers."""

        def mean(name: str) -> float | None:
            values = [value for row in self.layers if (value := getattr(row, name)) is not None]
            return float(np.mean(values)) if values else None

        return {
            "model": self.model,
            "format": self.format,
            "time_s": aggregate(self.evaluation.time_WL.sum(axis=1), self.objective),
            "expert_time_s": aggregate(self.evaluation.expert_WL.sum(axis=1), self.objective),
            "dispatch_combine_time_s": aggregate(self.evaluation.exchange_WL.sum(axis=1), self.objective),
            "max_over_mean_load": mean("max_over_mean_load"),
            "nodes_per_token": mean("nodes_per_token"),
            "ranks_per_token": mean("ranks_per_token"),
            "same_node_share": mean("same_node_share"),
            "same_rank_share": mean("same_rank_share"),
            "windows": len(self.evaluation.time_WL),
            "objective": self.objective.model_dump(mode="json"),
            "workload": self.workload.model_dump(mode="json"),
            "source": self.source,
            "messages": list(self.messages),
            "layers": [row.model_dump(mode="json") for row in self.layers],
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Conditions:
    """What placements are scored under."""

    model: ModelSpec
    cluster: ClusterSpec
    workload: Workload
    objective: Objective
    load: ExpertLoad
    costs: LayerCosts
    notes: tuple[str, ...]  # on what the costs are of

    def score_plan(self, plan: Plan, format_name: str) -> Score:
        bundle = Bundle(
            model=self.model, cluster=self.cluster, workload=self.workload, load=self.load,
            current=plan.placement, current_layer_ids=plan.layer_ids,
        )  # fmt: skip
        found = require(run_checks(bundle))
        return self.score(plan.placement, plan.layer_ids, format_name, (*plan.notes, *found, *self.notes))

    def score_planner(self, planner: str, beside: Plan) -> Score:
        """What a planner makes of this very trace in the slots of ``beside``."""
        problem = PlanningProblem(
            load=self.load, experts_L=np.asarray(self.model.experts_L, dtype=np.int64),
            slots_R=np.bincount(beside.placement.rank_of_slot_P, minlength=beside.num_ranks),
            speed_R=speeds(self.cluster), ranks_per_node=beside.ranks_per_node, costs=self.costs,
            objective=self.objective, num_groups=self.model.n_group or 1,
        )  # fmt: skip
        placement = with_shares(problem, answer_of(planner, load_plugin("planners", planner), problem).placement)
        return self.score(placement, beside.layer_ids, planner, self.notes)

    def score(
        self, placement: Placement, layer_ids: tuple[int, ...], format_name: str, messages: Iterable[str]
    ) -> Score:
        found = evaluate(self.load, placement, self.costs, self.objective, speeds(self.cluster))
        return Score(
            model=self.model.name,
            format=format_name,
            evaluation=found,
            objective=self.objective,
            workload=self.workload,
            layers=layer_evaluations(layer_ids, found),
            source=dict(self.costs.source),
            messages=tuple(dict.fromkeys(messages)),  # own plans carry the notes of their profile
        )


def evaluate_plan(plan_path: Path, trace_path: Path, **options: Any) -> Score:
    """Evaluate a placement on a trace; options and errors are those of :func:`evaluate_plans`."""
    return evaluate_plans([plan_path], trace_path, **options)[0]


def evaluate_plans(
    plans: Sequence[Path],
    trace_path: Path,
    *,
    model_name: str | None = None,
    cluster_name: str | None = None,
    ranks: int | None = None,
    nodes: int | None = None,
    phase: Phase | None = None,
    batch_per_rank: int | None = None,
    dispatch: DispatchKind | None = None,
    return_mode: ReturnMode | None = None,
    split: ReplicaSplit | None = None,
    trace_format: str | None = None,
    domain: str | None = None,
    windows: str = "all",
    profile: str | None = None,
) -> list[Score]:
    """Evaluate placements on one trace under the same conditions. What is not given is taken from the first file: from
    the plan, or from what the file's engine does. A name of a planner, where there is no such file, is what that
    planner makes of the trace in the first file's slots.

    Where the cluster is not the plan's, or not known, a message says so.

    Raises:
        InputError: a file is wrong, plan and trace are of different models, or placements of different ranks.
    """
    planners = {path for path in plans if _names_planner(path)}
    files = [plan_file(path) for path in plans if path not in planners]
    if not files:
        names = ", ".join(map(str, plans))
        raise SpecError(f"--plan ({names}) names planners alone; give a plan or a file too, whose slots they fill")
    path = files[0]
    own = own_plan(path) if path.suffix == ".json" else None
    if model_name is None and own is None:
        raise SpecError(f"{path} is not a plan of ours and does not name its model; give --model")
    try:
        model = find_model(model_name or (own.model if own else ""))
    except UnknownNameError as error:
        if model_name is not None or own is None:
            raise
        raise SpecError(f"the plan's model ({own.model}) is not built in; give --model, its config.json") from error
    num_ranks = ranks or (own.num_ranks if own else None)
    num_nodes = nodes or (own.num_ranks // own.ranks_per_node if own else 1)
    loaded = [load_placement(file, model=model, num_ranks=num_ranks, num_nodes=num_nodes) for file in files]
    _require_same_ranks(files, loaded)
    cluster, cluster_notes = _cluster(cluster_name, loaded[0], num_nodes)
    routing, actual = in_phase(
        read_routing(trace_path, model, format=trace_format, domain=domain),
        phase or (own.workload.phase if own else None),
    )
    workload = own.workload if own else Workload(batch_per_rank=DECODE_BATCH if actual == "decode" else 4096)
    batch = {} if batch_per_rank is None else {"batch_per_rank": batch_per_rank}
    workload = Workload.parse(workload.model_dump() | {"phase": actual} | batch, "options")
    formats = [_format(file, plan) for file, plan in zip(files, loaded, strict=True)]
    objective = own.objective if own else Objective(replica_split=SPLIT_OF_TARGET.get(formats[0], "even"))
    asked = {"dispatch": dispatch, "return_mode": return_mode, "replica_split": split}
    objective = objective.model_copy(update={name: value for name, value in asked.items() if value is not None})
    load = expert_load(routing, windows)
    measured = profile_of(profile, cluster.accelerator.name)
    costs = layer_costs(model, cluster, workload, objective, measured).known_from(load, objective.return_mode)
    notes = (*cluster_notes, *profile_notes(measured, cluster))
    given = _Conditions(model, cluster, workload, objective, load, costs, notes)
    scores = iter([given.score_plan(plan, name) for plan, name in zip(loaded, formats, strict=True)])
    return [given.score_planner(str(path), loaded[0]) if path in planners else next(scores) for path in plans]


def _names_planner(path: Path) -> bool:
    """Whether a planner is meant: a name, not a path, and there is no such file.

    Raises:
        SpecError: no planner has that name.
    """
    name = str(path)
    if path.exists() or path.suffix or path.name != name:
        return False
    try:
        load_plugin("planners", name)
    except UnknownNameError as error:
        raise SpecError(f"--plan ({name}) is no file or directory, and {error}") from error
    return True


def differences(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """Change of each answer's totals from the first's, as parts of these; None where either is not known."""
    changes = []
    for score in scores:
        pairs = {name: (scores[0][name], score[name]) for name in _COMPARED}
        changes.append({name: new / old - 1 if old and new is not None else None for name, (old, new) in pairs.items()})
    return changes


def _format(path: Path, plan: Plan) -> str:
    """``plan`` of a plan of ours, else the engine's name."""
    foreign = plan.is_imported and (path.suffix != ".json" or own_plan(path) is None)
    return plan.planner.removeprefix(IMPORTED) if foreign else "plan"


def _require_same_ranks(paths: Sequence[Path], plans: Sequence[Plan]) -> None:
    first = plans[0]
    for path, plan in zip(paths, plans, strict=True):
        if (plan.num_ranks, plan.ranks_per_node) != (first.num_ranks, first.ranks_per_node):
            raise PlanError(
                f"{path} is of {plan.num_ranks} ranks, {plan.ranks_per_node} a node, {paths[0]} of {first.num_ranks},"
                f" {first.ranks_per_node} a node: not to be compared; score each alone"
            )


def _cluster(name: str | None, plan: Plan, num_nodes: int) -> tuple[ClusterSpec, list[str]]:
    """The cluster asked for, else one of the plan's accelerator, else the default; and how that differs from the
    plan's own.
    """
    recorded = plan.provenance.get("accelerator", "")
    known = slug(recorded) in accelerator_names()
    cluster = sized_cluster(name or (slug(recorded) if known else DEFAULT_CLUSTER), plan.num_ranks, num_nodes)
    made_for, costs_of = plan.provenance.get("cluster_sha256"), f"costs are those of {cluster.name}"
    notes = []
    if made_for is None and name is None:
        notes = [f"{costs_of}: the file names no cluster; give --cluster"]
    elif made_for not in (None, spec_sha256(cluster)):
        notes = [f"{costs_of}, not of the cluster that the plan was made for ({plan.provenance.get('cluster')})"]
    return cluster, notes
