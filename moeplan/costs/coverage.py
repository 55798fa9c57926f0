"""What measurements a prediction lacks: missing regions of a profile, each with the command that measures it, and
frameworks that it has no rows of."""

from __future__ import annotations

import shlex
from typing import Any

from moeplan.artifacts.profile import HardwareProfile, shipped_profile_for
from moeplan.costs.exchange import MODES, mode_of
from moeplan.costs.frameworks import FRAMEWORK_TABLES
from moeplan.costs.number_formats import table_dtypes
from moeplan.costs.technique import Technique
from moeplan.errors import ProfileError
from moeplan.specs.catalogue import slug
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import Dtype, ModelSpec, activations_beside, dense_beside
from moeplan.specs.models import find_model, model_names
from moeplan.specs.workload import Objective, Workload

__all__ = ["backend_gaps", "coverage_gaps"]


def coverage_gaps(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    objective: Objective,
    profile: HardwareProfile,
    how: Technique | None = None,
    named: str | ModelSpec = "CONFIG.json",
) -> tuple[str, ...]:
    """One message per region that predictions for this model would have to scale or take from the roofline: of experts
    and exchanges, which a plan is costed by; with ``how`` also of attention and products, of which steps are.

    ``named``: the file that a model which is not built in is from, as a scenario names it."""
    hidden, experts = {"hidden": model.routed_hidden_size}, {"num_experts": model.num_experts}
    shape = hidden | {"inter": model.expert_intermediate_size} | experts | {"top_k": model.top_k}
    kinds = {"dtype": table_dtypes(workload.weight_dtype), "distribution": "balanced"}
    public = shipped_profile_for(profile.meta.accelerator)
    regions: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("experts", shape | kinds, {"system": public.meta.name} if public else {})
    ]
    if how is not None and how.expert_tp > 1:
        regions[0][1]["tp"] = how.expert_tp
    if objective.dispatch != "allgather" and cluster.num_ranks > 1:
        mode = list(MODES[mode_of(objective.dispatch, workload.phase)])
        sent = hidden | {"top_k": model.top_k, "nodes": cluster.num_nodes, "mode": mode}
        regions.append(("alltoall", sent, experts | {"ranks_per_node": cluster.ranks_per_node}))
    if how is not None:
        whole = {"model": _name(model, named)}  # measures the model's own shapes
        if (a := model.attention) is not None:
            decode = workload.phase == "decode"
            split = how.tp // how.dcp if decode else how.tp  # ranks among which a kernel's heads are divided
            where = {
                "kind": "mla" if a.is_mla else "gqa",
                "phase": "decode" if decode else "prefill",
                "heads": a.num_heads // split,
                "kv_heads": 1 if a.is_mla else max(1, a.num_kv_heads // split),
                "head_dim": a.head_dim,
                "dtype": table_dtypes(activations_beside(workload.weight_dtype)),
            }
            # The ranks of a latent cannot be given as sizes.
            regions.append(("attention", where, whole | _among(split) if a.is_mla else {}))
        dense = {"dtype": table_dtypes(how.dense_dtype or dense_beside(workload.weight_dtype))}
        regions.append(("gemm", dense, whole | _among(how.tp)))
    gaps: list[str] = []
    for table, where, command in regions:
        try:
            profile.require(table, command, **where)
        except ProfileError as error:
            gaps.append(str(error))
    return tuple(gaps)


def _among(tp: int) -> dict[str, Any]:
    return {"tp": tp} if tp > 1 else {}


def _name(model: ModelSpec, named: str | ModelSpec) -> str:
    """What ``--model`` takes: the built-in name, else the file it is from, or a placeholder for one."""
    name = slug(model.name)
    if name in model_names() and find_model(name) == model:
        return name
    return shlex.quote(named) if isinstance(named, str) else "CONFIG.json"


def backend_gaps(backend: str, dtype: Dtype, profile: HardwareProfile) -> tuple[str, ...]:
    """One message per table whose rows are chosen by framework and that has none of ``backend``: what stands in."""
    own: dict[str, dict[str, Any]] = {"experts": {"dtype": table_dtypes(dtype)}}
    return tuple(
        f"profile {profile.meta.name} has no {table} of it, "
        + (f"in {dtype}; the roofline stands in" if table == "experts" else "another framework's stand in")
        + "; leave backend out for the fastest measured"
        for table in FRAMEWORK_TABLES
        if not profile.select(table, backend=backend, **own.get(table, {})).num_rows
    )
