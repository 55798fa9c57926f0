"""Seconds of collectives: measured on as many ranks, else from fewer, else latency plus bytes over the slowest link.

Ring and tree algorithms move ``2 (n - 1) / n`` of the buffer per rank for an all-reduce, ``(n - 1) / n`` for
all-gather, reduce-scatter and all-to-all, all of it point to point (Thakur et al. 2005, IJHPCA 19(1)). Rings that
span nodes enter and leave a node over the NICs of all its members (NCCL's channels), so its members' NICs add up; of an
all-to-all each sends what other nodes get over its own.

Where only smaller groups are measured, a larger one in the same domain takes longer as that law says; one that spans
domains starts in its domain, crosses between them, ends in the other, and then moves its bytes as the law says, but
takes no less than its part in one domain.

All at the links' usual speed; what the bytes take of it is told apart from the start, which is what the smallest
measured message takes, or the latency (:mod:`moeplan.costs.work`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.fastest import FastestTable
from moeplan.costs.roofline import RELATIVE_ERROR, internode_bandwidth, scale_up_bandwidth
from moeplan.costs.tables import Seconds
from moeplan.specs.cluster import ClusterSpec

__all__ = ["CollectiveCosts"]

Floats = NDArray[np.float64]

LIBRARIES = ("nccl", "gloo")  # that every framework can call
_PLAIN: dict[str, Any] = {"algorithm": "flat", "distribution": "even"}
# What a small message takes through the library on both sides of a crossing, beside the latency of the link.
_LIBRARY_S = 10e-6


@dataclass(frozen=True, slots=True)
class _Group:
    """Ranks of a collective: how many, on how many nodes, how many of them share a domain; latency and bandwidth of
    the slowest links between them."""

    op: str
    ranks: int
    nodes: int
    members: int
    latency_s: float
    bandwidth: float

    @property
    def ways(self) -> int:
        """There and back, or there."""
        return 2 if self.op == "all_reduce" else 1

    def transfer_s(self, size: Floats) -> Floats:
        """Seconds of the bytes alone."""
        stays = self.members if self.op == "alltoall" and self.nodes > 1 else 1
        part = 1.0 if self.op == "p2p" else self.ways * (self.ranks - stays) / self.ranks
        seconds: Floats = part * size / self.bandwidth
        return seconds

    def law(self, coords: Floats) -> Floats:
        """Latency and bytes."""
        seconds: Floats = self.latency_s + self.transfer_s(coords[:, 0])
        return seconds


class CollectiveCosts:
    """Collectives over groups of ranks of a cluster that lie ``stride`` apart; those measured in 16 bits, else in fp32:
    bytes count. Of ``backend``'s own kernels and the communication library's, or of all, the fastest at the size
    serves."""

    def __init__(
        self, cluster: ClusterSpec, profile: HardwareProfile | None = None, backend: str | None = None
    ) -> None:
        self._cluster, self._profile, self._backend = cluster, profile, backend
        self._tables: dict[_Group, FastestTable] = {}
        self._serving: dict[_Group, _Group] = {}
        self._start_s: dict[_Group, float] = {}

    def seconds(self, op: str, ranks: int, message_size_bytes: Any, stride: int = 1) -> Seconds:
        """``op``: all_reduce, all_gather, reduce_scatter, alltoall or p2p (between ranks ``stride`` apart); sizes, one
        or an array, as in the profile table."""
        size = np.atleast_1d(np.asarray(message_size_bytes, float))
        if ranks <= 1 and op != "p2p":
            return Seconds(np.zeros(size.shape), 0.0, "one rank", False, wire=np.zeros(size.shape))
        group = self._group(op, ranks, stride)
        if group not in self._serving:
            measured = self._table(group).measured
            self._serving[group] = group if measured else self._measured_below(group) or group
        serving = self._serving[group]
        found = self._told(group, serving, size)
        if group not in self._start_s:
            self._start_s[group] = self._told(group, serving, np.array([self._table(serving).smallest])).total
        return replace(found, wire=np.maximum(0.0, found.value - self._start_s[group]))

    def _told(self, group: _Group, smaller: _Group, size: Floats) -> Seconds:
        """Seconds of ``group`` by the table of ``smaller``, which is the group itself where that is measured, or where
        no smaller one is."""
        inner = self._table(smaller)
        found = inner.told(size)
        if smaller == group:
            return found
        if group.nodes == 1:
            value = found.value * group.law(size[:, None]) / smaller.law(size[:, None])
        else:
            start = inner.told(np.minimum(size, inner.smallest)).value
            crossing = group.ways * (_LIBRARY_S + group.latency_s)
            whole = self._group(group.op, group.members, 1)  # of a domain
            inside = found.value * whole.law(size[:, None]) / smaller.law(size[:, None])
            value = np.maximum(2 * start + crossing + group.transfer_s(size), inside)
        error = max(found.relative_error, RELATIVE_ERROR)
        how = f"modelled from {smaller.ranks} ranks: {found.source.partition(': ')[2]}"
        return Seconds(value, error, how, True)

    def _group(self, op: str, ranks: int, stride: int) -> _Group:
        cluster = self._cluster
        chip, span = cluster.accelerator, (stride + 1 if op == "p2p" else ranks * stride)
        span = min(span, cluster.num_ranks)
        ranks = 2 if op == "p2p" else ranks
        domain = {"flat": cluster.num_ranks, "nvl72": chip.scale_up_domain}.get(
            cluster.topology, cluster.ranks_per_node
        )
        bandwidth, members = scale_up_bandwidth(cluster, min(span, domain)), max(1, min(ranks, domain // stride))
        if span <= domain:
            return _Group(op, ranks, 1, ranks, cluster.scale_up_latency, bandwidth)
        members = 1 if op == "p2p" else members
        nic = chip.nic_bandwidth
        if cluster.topology == "explicit":
            nic = internode_bandwidth(cluster) / cluster.ranks_per_node
        bandwidth = min(bandwidth, nic if op == "alltoall" else members * nic)
        nodes = min(ranks, -(-span // cluster.ranks_per_node))
        return _Group(op, ranks, nodes, members, cluster.nic_latency, bandwidth)

    def _table(self, group: _Group) -> FastestTable:
        if group not in self._tables:
            owners = [{"backend": [self._backend, *LIBRARIES]}] if self._backend else []
            types: tuple[dict[str, Any], ...] = ({"dtype": ["fp16", "bf16"]}, {"dtype": "fp32"})
            choices = tuple(of | owner for of in types for owner in (*owners, {}))
            names = {"op": group.op, "ranks": group.ranks, "nodes": group.nodes, **_PLAIN}
            # Links given one by one are another network than the one measured.
            elsewhere = group.nodes > 1 and self._cluster.topology == "explicit"
            profile, device = None if elsewhere else self._profile, self._cluster.accelerator.name
            self._tables[group] = FastestTable(
                profile, "collectives", ("message_size_bytes",), names, group.law, device, choices
            )
        return self._tables[group]

    def _measured_below(self, group: _Group) -> _Group | None:
        """The largest measured group inside a domain that is part of this one."""
        if self._profile is None:
            return None
        rows = self._profile.select("collectives", op=group.op, nodes=1, **_PLAIN)
        fewer = [ranks for ranks in set(rows["ranks"].to_pylist()) if 1 < ranks <= group.members]
        return self._group(group.op, max(fewer), 1) if fewer else None
