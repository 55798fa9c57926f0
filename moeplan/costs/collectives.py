"""Seconds of collectives: measured on as many ranks, else latency plus bytes over the slowest link.

Ring and tree algorithms move ``2 (n - 1) / n`` of the buffer per rank for an all-reduce, ``(n - 1) / n`` for
all-gather, reduce-scatter and all-to-all, all of it point to point (Thakur et al. 2005, IJHPCA 19(1)). Rings that
span nodes enter and leave a node over the NICs of all its members (NCCL's channels), so its members' NICs add up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.fastest import FastestTable
from moeplan.costs.roofline import scale_up_bandwidth
from moeplan.costs.tables import Seconds
from moeplan.specs.cluster import ClusterSpec

__all__ = ["CollectiveCosts"]

Floats = NDArray[np.float64]

LIBRARIES = ("nccl", "gloo")  # that every framework can call


class CollectiveCosts:
    """Collectives over groups of ranks of a cluster that lie ``stride`` apart; those measured in 16 bits, else in fp32:
    bytes count. Of ``backend``'s own kernels and the communication library's, or of all, the fastest at the size
    serves."""

    def __init__(
        self, cluster: ClusterSpec, profile: HardwareProfile | None = None, backend: str | None = None
    ) -> None:
        self._cluster, self._profile, self._backend = cluster, profile, backend
        self._tables: dict[tuple[str, int, int], FastestTable] = {}

    def seconds(self, op: str, ranks: int, message_size_bytes: float, stride: int = 1) -> Seconds:
        """``op``: all_reduce, all_gather, reduce_scatter, alltoall or p2p (between ranks ``stride`` apart); sizes as
        in the profile table."""
        if ranks <= 1 and op != "p2p":
            return Seconds(np.zeros(1), 0.0, "one rank", False)
        key = (op, ranks, stride)
        if key not in self._tables:
            self._tables[key] = self._table(op, ranks, stride)
        return self._tables[key].told(message_size_bytes)

    def _table(self, op: str, ranks: int, stride: int) -> FastestTable:
        cluster = self._cluster
        chip, span = cluster.accelerator, (stride + 1 if op == "p2p" else ranks * stride)
        domain = {"flat": cluster.num_ranks, "nvl72": chip.scale_up_domain}.get(
            cluster.topology, cluster.ranks_per_node
        )
        inside = span <= domain
        members = 1 if op == "p2p" else max(1, min(ranks, domain // stride))
        bandwidth = scale_up_bandwidth(cluster, min(span, domain))
        if not inside:
            bandwidth = min(bandwidth, members * chip.nic_bandwidth)
        latency = cluster.scale_up_latency if inside else cluster.nic_latency
        part = {"p2p": 1.0, "all_reduce": 2 * (ranks - 1) / ranks}.get(op, (ranks - 1) / ranks)

        def law(size: Floats) -> Floats:
            seconds: Floats = latency + part * size[:, 0] / bandwidth
            return seconds

        names: dict[str, Any] = {"op": op, "ranks": ranks, "nodes": 1 if inside else -(-span // cluster.ranks_per_node)}
        names |= {"algorithm": "flat", "distribution": "even"}
        owners = [{"backend": [self._backend, *LIBRARIES]}] if self._backend else []
        types: tuple[dict[str, Any], ...] = ({"dtype": ["fp16", "bf16"]}, {"dtype": "fp32"})
        choices = tuple(of | owner for of in types for owner in (*owners, {}))
        axes, device = ("message_size_bytes",), cluster.accelerator.name
        return FastestTable(self._profile, "collectives", axes, names, law, device, choices)
