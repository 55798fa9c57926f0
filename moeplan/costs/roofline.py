"""What a layer costs by the data sheet: bytes over bandwidth, operations over peak.

Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009.

A roofline is a bound, not a measurement: answers made from it are marked ``roofline`` and carry a wide error.
``T`` tokens, ``K`` top-k, ``E`` experts.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from moeplan.errors import SpecError
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec

__all__ = [
    "MEMORY_EFFICIENCY",
    "RELATIVE_ERROR",
    "expected_active",
    "expert_pair_s",
    "expert_weight_s",
    "internode_bandwidth",
    "matmul_flops",
    "token_bytes",
]

# Streaming kernels reach about this share of the data sheet's memory bandwidth.
MEMORY_EFFICIENCY = 0.8
_FLOW_UNIT = 1e6  # link bandwidths are counted in MB/s to find a flow
RELATIVE_ERROR = 0.5  # a bound that real kernels miss by up to about 2x


def matmul_flops(accelerator: AcceleratorSpec, dtype: Dtype) -> float:
    """Peak operations per second; weight-only formats and units the device lacks compute in bf16."""
    peak = {"fp8": accelerator.fp8, "fp4": accelerator.fp4, "fp32": accelerator.bf16 / 2}.get(dtype)
    return peak or accelerator.bf16


def expert_weight_s(model: ModelSpec, accelerator: AcceleratorSpec, dtype: Dtype) -> float:
    """Seconds to read one routed expert's weights from device memory."""
    return model.expert_bytes(dtype) / (MEMORY_EFFICIENCY * accelerator.memory_bandwidth)


def expert_pair_s(model: ModelSpec, accelerator: AcceleratorSpec, dtype: Dtype) -> float:
    """Seconds of arithmetic of one (token, expert) pair."""
    return 2 * model.expert_parameters / matmul_flops(accelerator, dtype)


def expected_active(num_experts: int, pairs: float) -> float:
    """Distinct experts hit when ``pairs`` choices fall evenly on ``num_experts``: E (1 - (1 - 1/E)^pairs)."""
    if num_experts == 1:
        return float(pairs > 0)
    return -num_experts * math.expm1(pairs * math.log1p(-1 / num_experts))


def token_bytes(hidden_size: int, dtype: Dtype) -> float:
    """Bytes of one token on the wire; fp8 adds one fp32 scale per 128 numbers, fp4 one fp8 scale per 16."""
    scales = {"fp8": 4 / 128, "fp4": 1 / 16}.get(dtype, 0.0)
    return hidden_size * (DTYPE_BYTES[dtype] + scales)


def internode_bandwidth(cluster: ClusterSpec) -> float:
    """Bytes per second into the slowest node from the others, over all its links together.

    ``flat`` and ``nvl72`` join nodes by the scale-up network, ``explicit`` by the links given, the others
    by one NIC per rank.

    Raises:
        SpecError: explicit links leave a node without a way to it.
    """
    per_node = cluster.ranks_per_node
    if cluster.topology in ("flat", "nvl72"):
        return per_node * cluster.accelerator.scale_up_bandwidth
    if cluster.topology != "explicit":
        return per_node * cluster.accelerator.nic_bandwidth
    return min(_into_node(cluster, node) for node in range(cluster.num_nodes))


def _into_node(cluster: ClusterSpec, node: int) -> float:
    """Most bytes per second that explicit links carry from all other nodes to ``node``: a maximum flow."""
    per_node = cluster.ranks_per_node
    inside = {f"rank{rank}" for rank in range(node * per_node, (node + 1) * per_node)} | {f"node{node}"}
    others = {f"rank{rank}" for rank in range(cluster.num_ranks)} | {f"node{n}" for n in range(cluster.num_nodes)}
    # All other nodes together are 0, this one is 1.
    number = {end: 1 if end in inside else 0 for end in inside | others}
    for link in cluster.links:
        for end in (link.source, link.target):
            number.setdefault(end, len(set(number.values())))
    size = max(number.values()) + 1
    capacity = np.zeros((size, size))
    for link in cluster.links:
        ends = (number[link.source], number[link.target])
        for source, target in (ends, ends[::-1])[: 1 + link.duplex]:
            capacity[source, target] += link.bandwidth / _FLOW_UNIT
    np.fill_diagonal(capacity, 0.0)
    flow = _FLOW_UNIT * float(maximum_flow(csr_array(np.rint(capacity).astype(np.int32)), 0, 1).flow_value)
    if flow <= 0:
        raise SpecError(f"links: none lead from other nodes to the ranks of node {node}; add those that join them")
    return flow
