"""What a layer costs by the data sheet: bytes over bandwidth, operations over peak.

Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009.

A roofline is a bound, not a measurement: answers made from it are marked ``roofline`` and carry a wide error.
``T`` tokens, ``K`` top-k, ``E`` experts.
"""

from __future__ import annotations

import math

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
    import networkx as nx  # here, as only explicit links need it

    per_node = cluster.ranks_per_node
    ends = {f"rank{rank}": rank // per_node == node for rank in range(cluster.num_ranks)}
    ends |= {f"node{other}": other == node for other in range(cluster.num_nodes)}
    graph: nx.DiGraph[str | bool] = nx.DiGraph()
    graph.add_nodes_from((True, False))  # this node, and all others together
    for link in cluster.links:
        a, b = ends.get(link.source, link.source), ends.get(link.target, link.target)
        for source, target in ((a, b), (b, a))[: 1 + link.duplex]:
            known = graph.get_edge_data(source, target, {"capacity": 0.0})["capacity"]
            graph.add_edge(source, target, capacity=known + link.bandwidth)
    flow = float(nx.maximum_flow_value(graph, False, True))
    if flow <= 0:
        raise SpecError(f"links: none lead from other nodes to the ranks of node {node}; add those that join them")
    return flow
