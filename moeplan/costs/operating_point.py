"""Linear costs of one MoE layer at a workload's operating point: what planners minimise.

Measured tables decide where a profile covers the point, the roofline elsewhere; ``source`` says which.
"""

from __future__ import annotations

import math

import numpy as np

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.exchange import exchange_costs, touched
from moeplan.costs.experts import expert_costs
from moeplan.costs.layer import LayerCosts
from moeplan.costs.work import link_speeds
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import Objective, Workload

__all__ = ["layer_costs", "live_ranks"]

INDEPENDENT = 0.35
"""What independent choices miss of copies counted on tokens. Busiest ranks and nodes of 5 traces on 8 and 16 ranks in 1
to 4 nodes: 0-15 % too few under contiguous and greedy plans, up to 35 % too many under plans made from the tokens."""


def live_ranks(cluster: ClusterSpec) -> int:
    """Ranks that have not failed."""
    return sum(not cluster.rank(rank).failed for rank in range(cluster.num_ranks))


def layer_costs(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    objective: Objective,
    profile: HardwareProfile | None = None,
) -> LayerCosts:
    """Costs of one MoE layer, linear around ``workload.batch_per_rank`` tokens on every live rank.

    A part that ``profile`` does not cover is costed by the roofline, and ``source`` says so.
    """
    ranks, batch = live_ranks(cluster), workload.batch_per_rank
    mean = batch * ranks * model.top_k / model.num_experts
    # A rank's kernels see the tokens that come to it: all of them only where an all-gather brings them.
    arriving = 1.0 if objective.dispatch == "allgather" else touched(ranks, model.top_k) / ranks
    experts = expert_costs(
        model,
        cluster.accelerator,
        workload.weight_dtype,
        profile,
        mean_pairs=mean,
        local_experts=model.num_experts / ranks,
        arriving=arriving,
        phase=workload.phase,
        sent=objective.dispatch != "allgather",
    )
    _, per_active, per_pair = experts.linear(mean)
    fixed = experts.shared_s(mean * arriving)
    exchange = exchange_costs(
        model,
        cluster,
        objective.dispatch,
        workload.phase,
        workload.activation_dtype,
        one_way=objective.return_mode == "stay",
        profile=profile,
    )
    inside, between = exchange.inside, exchange.between
    link_R = link_speeds(cluster)
    slower = inside if between is None else max(inside, between, key=lambda path: path.balanced_s(batch))
    exchange_fixed, per_node, per_rank = slower.fixed_s, 0.0, inside.per_copy_s(batch)
    if between is not None:
        # Of a node, whose NICs together bring in what each of its ranks has a part of.
        per_node = between.per_copy_s(batch) / cluster.ranks_per_node
    elif cluster.num_nodes > 1:
        per_node = per_rank / cluster.ranks_per_node
    if objective.dispatch == "allgather":
        # Every rank gets every token whatever the placement: all of it is fixed.
        all_R, all_N = inside.copies_per_token, between.copies_per_token if between is not None else 0.0
        exchange_fixed = float(exchange.time_s(batch, all_N / link_R.min(), all_R / link_R.min()))
        per_node = per_rank = 0.0
    source = {"experts": experts.source, "exchange inside a node": inside.source}
    if (link_R != 1).any():
        unlike = ", ".join(f"rank {rank}: {link_R[rank]:g}" for rank in np.flatnonzero(link_R != 1))
        source["links"] = f"{unlike} of the usual"
    if between is not None:
        source["exchange between nodes"] = between.source
    seconds = {"experts": fixed + per_active * model.num_experts / ranks + per_pair * mean * model.num_experts / ranks}
    seconds["exchange"] = slower.balanced_s(batch)
    total = sum(seconds.values())

    def error(exchange: float) -> float:
        missed = seconds["experts"] * experts.relative_error + seconds["exchange"] * exchange
        return missed / total if total else roofline.RELATIVE_ERROR

    exchange_error = slower.told(batch)[0]
    known = objective.return_mode == "return_home" and objective.dispatch in ("per_expert", "allgather")
    return LayerCosts(
        tokens_per_step=batch * ranks,
        expert_fixed_s=fixed,
        per_active_expert_s=per_active,
        per_pair_s=per_pair,
        exchange_fixed_s=exchange_fixed,
        per_node_copy_s=per_node,
        per_rank_copy_s=per_rank,
        relative_error=error(exchange_error),
        relative_error_of_counts=None if known else error(math.hypot(exchange_error, INDEPENDENT)),
        link_R=tuple(link_R.tolist()) if (link_R != 1).any() else (),
        ranks_per_nic=cluster.ranks_per_nic,
        lost=tuple(rank for rank, own in sorted(cluster.ranks.items()) if own.failed),
        source=source,
    )
