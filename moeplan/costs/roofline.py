"""What a layer costs by the data sheet: bytes over bandwidth, operations over peak.

Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009.

A roofline is a bound, not a measurement: answers made from it are marked ``roofline`` and carry a wide error.
``T`` tokens, ``K`` top-k, ``E`` experts.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_diag, coo_array, csr_array, eye_array, hstack, kron
from scipy.sparse.csgraph import connected_components

from moeplan.errors import InputError, SpecError
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside

__all__ = [
    "MEMORY_EFFICIENCY",
    "RELATIVE_ERROR",
    "expected_active",
    "expert_pair_s",
    "expert_weight_s",
    "internode_bandwidth",
    "is_joined",
    "matmul_flops",
    "returned_bytes",
    "scale_up_bandwidth",
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


def returned_bytes(hidden_size: int, dtype: Dtype) -> float:
    """Bytes of one token on its way back, when it was sent out in ``dtype``: in 16 bits or more."""
    return token_bytes(hidden_size, activations_beside(dtype))


def is_joined(cluster: ClusterSpec) -> bool:
    """Whether one scale-up network joins all ranks.

    Raises:
        InputError: nodes are parts of several racks, which no cost tells apart.
    """
    domain = cluster.accelerator.scale_up_domain
    if cluster.topology == "nvl72" and cluster.num_ranks > domain:
        raise InputError(
            f"cluster.topology (nvl72) joins scale_up_domain ({domain}) ranks, but num_nodes x ranks_per_node is"
            f" {cluster.num_ranks}, several racks; make each a node: ranks_per_node {domain}, topology two-level"
        )
    return cluster.topology in ("flat", "nvl72") or cluster.num_nodes == 1


def scale_up_bandwidth(cluster: ClusterSpec, ranks: int) -> float:
    """Bytes per second of each of ``ranks`` neighbours among each other: over the host's links where they lie in
    several scale-up domains of a node, as pairs of PCIe cards do."""
    chip = cluster.accelerator
    if cluster.topology == "flat" or ranks <= chip.scale_up_domain:
        return chip.scale_up_bandwidth
    return min(chip.scale_up_bandwidth, chip.pcie_bandwidth or chip.nic_bandwidth)


def internode_bandwidth(cluster: ClusterSpec) -> float:
    """Bytes per second into a node from the others while all exchange evenly, over all its links together.

    ``flat`` and ``nvl72`` join nodes by the scale-up network, ``explicit`` by the links given, which routes share,
    the others by one NIC per rank.

    Raises:
        SpecError: explicit links do not join all nodes both ways.
    """
    per_node = cluster.ranks_per_node
    if cluster.topology in ("flat", "nvl72"):
        return per_node * cluster.accelerator.scale_up_bandwidth
    if cluster.topology != "explicit":
        return per_node * cluster.accelerator.nic_bandwidth
    links = tuple((link.source, link.target, link.bandwidth, link.duplex) for link in cluster.links)
    return _shared_links(cluster.num_nodes, per_node, links)


@lru_cache(maxsize=8)
def _shared_links(nodes: int, per_node: int, links: tuple[tuple[str, str, float, bool], ...]) -> float:
    """Bytes per second into each node when all exchange evenly over explicit links: a maximum concurrent flow.

    Every node sends each other one the same; what they share, they divide (Shahrokhi and Matula, JACM 37(2), 1990).
    One commodity per sending node, since only what a place takes in counts.
    """
    number = {f"node{node}": node for node in range(nodes)}
    number |= {f"rank{rank}": rank // per_node for rank in range(nodes * per_node)}
    for a, b, _, _ in links:
        for end in (a, b):
            number.setdefault(end, max(number.values()) + 1)
    ways: dict[tuple[int, int], float] = {}
    for a, b, bandwidth, duplex in links:
        for way in ((number[a], number[b]), (number[b], number[a]))[: 1 + duplex]:
            if way[0] != way[1]:
                ways[way] = ways.get(way, 0.0) + bandwidth
    places, edges = max(number.values()) + 1, len(ways)
    tails, heads = np.array([*ways], int).reshape(-1, 2).T
    capacity = np.array([*ways.values()])
    parts = connected_components(coo_array((np.ones(edges), (tails, heads)), (places, places)), connection="strong")[1]
    apart = np.flatnonzero(parts[:nodes] != parts[0])
    if len(apart):
        raise SpecError(f"links: they do not lead from node 0 to node {apart[0]} and back; add those that join them")
    out = coo_array((np.ones(edges), (tails, np.arange(edges))), (places, edges))
    net = (coo_array((np.ones(edges), (heads, np.arange(edges))), (places, edges)) - out).tocsr()
    # Taken in less sent on: 1 / (nodes - 1) of what a node gets at each other one, 0 at switches, -1 at the sender.
    taken_NP = np.zeros((nodes, places))
    taken_NP[:, :nodes] = 1 / (nodes - 1)
    np.fill_diagonal(taken_NP, -1.0)
    scale = capacity.max()
    found = linprog(
        np.append(np.zeros(nodes * edges), -1.0),
        A_ub=hstack([kron(np.ones((1, nodes)), eye_array(edges)), csr_array((edges, 1))]),
        b_ub=capacity / scale,
        A_eq=hstack([block_diag([net] * nodes), csr_array(-taken_NP.reshape(-1, 1))]),
        b_eq=np.zeros(nodes * places),
        method="highs-ipm",
    )
    if found.status != 0 or found.x[-1] <= 0:
        raise SpecError(
            f"links: no flow between nodes was found ({found.message}); bandwidths from {capacity.min():.3g} to"
            f" {scale:.3g} bytes/s may lie too far apart: leave out links that carry next to nothing"
        )
    return float(scale * found.x[-1])
