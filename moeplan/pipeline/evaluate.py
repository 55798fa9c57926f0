"""Score any plan or placement file, ours or a foreign one, on any trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.plan import IMPORTED, LayerEvaluation, Plan, plan_file
from moeplan.checks import Bundle, require, run_checks
from moeplan.costs.evaluation import Evaluation, aggregate, evaluate
from moeplan.costs.operating_point import layer_costs
from moeplan.costs.work import speeds
from moeplan.errors import SpecError, UnknownNameError
from moeplan.pipeline.exports import load_placement, own_plan
from moeplan.pipeline.inputs import DECODE_BATCH, in_phase, profile_notes, profile_of, read_routing
from moeplan.pipeline.job import SPLIT_OF_TARGET
from moeplan.pipeline.optimize import layer_evaluations, spec_sha256
from moeplan.routing.loads import expert_load
from moeplan.specs.catalogue import slug
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import DEFAULT_CLUSTER, accelerator_names, sized_cluster
from moeplan.specs.models import find_model
from moeplan.specs.workload import DispatchKind, Objective, Phase, ReplicaSplit, ReturnMode, Workload

__all__ = ["Score", "evaluate_plan"]


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


def evaluate_plan(
    plan_path: Path,
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
) -> Score:
    """Evaluate a placement on a trace; what is not given is taken from the plan, or from what the file's engine does.

    Where the cluster is not the plan's, or not known, a message says so.

    Raises:
        InputError: a file is wrong, or plan and trace are of different models.
    """
    path = plan_file(plan_path)
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
    loaded = load_placement(path, model=model, num_ranks=num_ranks, num_nodes=num_nodes)
    placement = loaded.placement
    cluster, cluster_notes = _cluster(cluster_name, loaded, num_nodes)
    routing, actual = in_phase(
        read_routing(trace_path, model, format=trace_format, domain=domain),
        phase or (own.workload.phase if own else None),
    )
    workload = own.workload if own else Workload(batch_per_rank=DECODE_BATCH if actual == "decode" else 4096)
    batch = {} if batch_per_rank is None else {"batch_per_rank": batch_per_rank}
    workload = Workload.parse(workload.model_dump() | {"phase": actual} | batch, "options")
    format_name = loaded.planner.removeprefix(IMPORTED) if own is None and loaded.is_imported else "plan"
    objective = own.objective if own else Objective(replica_split=SPLIT_OF_TARGET.get(format_name, "even"))
    asked = {"dispatch": dispatch, "return_mode": return_mode, "replica_split": split}
    objective = objective.model_copy(update={name: value for name, value in asked.items() if value is not None})
    load = expert_load(routing, windows)
    bundle = Bundle(
        model=model,
        cluster=cluster,
        workload=workload,
        load=load,
        current=placement,
        current_layer_ids=loaded.layer_ids,
    )
    measured = profile_of(profile, cluster.accelerator.name)
    notes = profile_notes(measured, cluster)
    messages = [*loaded.notes, *cluster_notes, *require(run_checks(bundle)), *notes]
    costs = layer_costs(model, cluster, workload, objective, measured)
    costs = costs.known_from(load, objective.return_mode)
    found = evaluate(load, placement, costs, objective, speeds(cluster))
    return Score(
        model=model.name,
        format=format_name,
        evaluation=found,
        objective=objective,
        workload=workload,
        layers=layer_evaluations(loaded.layer_ids, found),
        source=dict(costs.source),
        messages=tuple(dict.fromkeys(messages)),  # own plans carry the notes of their profile
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
