"""Which measurements a prediction lacks: the missing regions of a profile, each with the command that measures it."""

from __future__ import annotations

from typing import Any

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.exchange import MODES, mode_of
from moeplan.costs.experts import TABLE_DTYPES
from moeplan.errors import ProfileError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import Objective, Workload

__all__ = ["coverage_gaps"]


def coverage_gaps(
    model: ModelSpec, cluster: ClusterSpec, workload: Workload, objective: Objective, profile: HardwareProfile
) -> tuple[str, ...]:
    """One message per region that predictions for this model would have to scale or take from the roofline."""
    regions: list[tuple[str, dict[str, Any]]] = []
    hidden = {"hidden": model.hidden_size}
    for dtype in TABLE_DTYPES.get(workload.weight_dtype, (workload.weight_dtype,)):
        shape = {"inter": model.expert_intermediate_size, "num_experts": model.num_experts, "top_k": model.top_k}
        regions.append(("experts", hidden | shape | {"dtype": dtype, "distribution": "balanced"}))
    if objective.dispatch != "allgather" and cluster.num_ranks > 1:
        mode = list(MODES[mode_of(objective.dispatch, workload.phase)])
        regions.append(("alltoall", hidden | {"top_k": model.top_k, "nodes": cluster.num_nodes, "mode": mode}))
    if (a := model.attention) is not None:
        heads = {"heads": a.num_heads, "kv_heads": 1 if a.is_mla else a.num_kv_heads, "head_dim": a.head_dim}
        phase = "decode" if workload.phase == "decode" else "prefill"
        regions.append(("attention", {"kind": "mla" if a.is_mla else "gqa", "phase": phase, **heads}))
    gaps: dict[str, str] = {}
    for table, where in reversed(regions):
        try:
            profile.require(table, {"num_experts": model.num_experts}, **where)
        except ProfileError as error:
            gaps[table] = str(error)
    covered = {table for table, where in regions if profile.select(table, **where).num_rows}
    return tuple(message for table, message in reversed(gaps.items()) if table not in covered)
