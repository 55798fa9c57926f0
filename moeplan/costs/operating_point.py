"""Linear costs of one MoE layer at a workload's operating point: what planners minimise.

Measured tables decide where a profile covers the point, the roofline elsewhere; ``source`` says which.
"""

from __future__ import annotations

from moeplan.costs import roofline
from moeplan.costs.layer import LayerCosts
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import Objective, Workload

__all__ = ["layer_costs", "live_ranks"]

_ROOFLINE_ERROR = 0.5  # a bound that real kernels miss by up to about 2x


def live_ranks(cluster: ClusterSpec) -> int:
    """Ranks that have not failed."""
    return sum(not cluster.rank(rank).failed for rank in range(cluster.num_ranks))


def _expert_roofline(model: ModelSpec, cluster: ClusterSpec, workload: Workload) -> tuple[float, float]:
    """(seconds per active expert, seconds per pair) of a balanced rank.

    Weight reads ``w`` and arithmetic ``c`` overlap in part: t = sqrt(w^2 + c^2) lies between the
    roofline's max (full overlap) and the sum (none). It is homogeneous, so its gradient at the operating
    point gives both coefficients and their sum is exact there (Euler).
    """
    ranks = live_ranks(cluster)
    pairs = workload.batch_per_rank * model.top_k
    active = roofline.expected_active(model.num_experts, pairs * ranks) / ranks
    weight = roofline.expert_weight_s(model, cluster.accelerator, workload.weight_dtype)
    pair = roofline.expert_pair_s(model, cluster.accelerator, workload.weight_dtype)
    # Activations in and out of both projections are read and written beside the weights.
    moved = 2 * (2 * model.hidden_size + 3 * model.expert_intermediate_size)
    pair_memory = moved / (roofline.MEMORY_EFFICIENCY * cluster.accelerator.memory_bandwidth)
    read, compute = active * weight, pairs * pair
    total = (read**2 + compute**2) ** 0.5
    return weight * read / total, pair * compute / total + pair_memory


def _exchange_roofline(
    model: ModelSpec, cluster: ClusterSpec, workload: Workload, objective: Objective
) -> tuple[float, float, float]:
    """(fixed seconds, seconds per copy into a node, seconds per copy into a rank) of dispatch and combine."""
    out = roofline.token_bytes(model.hidden_size, workload.activation_dtype)
    back = 0.0 if objective.return_mode == "stay" else roofline.token_bytes(model.hidden_size, "bf16")
    per_node = (out + back) / roofline.internode_bandwidth(cluster) if cluster.num_nodes > 1 else 0.0
    per_rank = (out + back) / cluster.accelerator.scale_up_bandwidth
    crosses = cluster.num_nodes > 1 and cluster.topology not in ("flat", "nvl72")
    passes = 1 if objective.return_mode == "stay" else 2
    fixed = passes * (cluster.nic_latency if crosses else cluster.scale_up_latency)
    if objective.dispatch != "allgather":
        return fixed, per_node, per_rank
    # Every rank gets every token whatever the placement: all of it is fixed.
    tokens = workload.batch_per_rank * live_ranks(cluster)
    foreign = tokens * (1 - 1 / cluster.num_nodes)
    elsewhere = tokens - workload.batch_per_rank
    return fixed + max(foreign * per_node, elsewhere * per_rank), 0.0, 0.0


def layer_costs(
    model: ModelSpec, cluster: ClusterSpec, workload: Workload, objective: Objective, profile: None = None
) -> LayerCosts:
    """Costs of one MoE layer, linear around ``workload.batch_per_rank`` tokens on every live rank."""
    per_active, per_pair = _expert_roofline(model, cluster, workload)
    fixed, per_node, per_rank = _exchange_roofline(model, cluster, workload, objective)
    sheet = f"roofline of {cluster.accelerator.name}"
    return LayerCosts(
        tokens_per_step=workload.batch_per_rank * live_ranks(cluster),
        expert_fixed_s=0.0,
        per_active_expert_s=per_active,
        per_pair_s=per_pair,
        exchange_fixed_s=fixed,
        per_node_copy_s=per_node,
        per_rank_copy_s=per_rank,
        relative_error=_ROOFLINE_ERROR,
        source={"experts": sheet, "exchange": sheet},
    )
