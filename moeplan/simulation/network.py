"""The links of a cluster as the detailed mode uses them: what each carries, and which of them a copy crosses.

``R`` ranks, ``X`` links, ``F`` transfers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.exchange import ExchangeCosts
from moeplan.costs.roofline import is_joined, scale_up_bandwidth
from moeplan.costs.work import link_speeds
from moeplan.errors import InputError
from moeplan.specs.cluster import ClusterSpec
from moeplan.topology import build, ranks_of_nics

__all__ = ["Network"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Network:
    """Links ``links_X`` (source, target) of a cluster and the routes over them.

    ``link_speed``: links that run at another speed than built; a rank's ``link_speed`` counts for all of its own, that
    of the slowest of those that share a NIC for the NIC's.

    Raises:
        InputError: an unknown link.
    """

    def __init__(self, cluster: ClusterSpec, link_speed: Mapping[tuple[str, str], float] | None = None) -> None:
        topology = build(cluster)
        self.cluster = cluster
        self.links_X = tuple((link.source, link.target) for link in topology.links)
        self._built_X = np.array([link.bandwidth_bytes_per_s for link in topology.links])
        speed_R = link_speeds(cluster)
        speed_of = {f"rank{r}": speed for r, speed in enumerate(speed_R)}
        speed_of |= {nic: speed_R[ranks].min() for nic, ranks in ranks_of_nics(cluster).items()}
        for x, ends in enumerate(self.links_X):
            self._built_X[x] *= next((speed_of[end] for end in ends if end in speed_of), 1.0)
        for name, speed in (link_speed or {}).items():
            if name not in self.links_X:
                raise InputError(f"link_speed names {name[0]} -> {name[1]}, which is not a link of the cluster")
            self._built_X[self.links_X.index(name)] *= speed
        outside = ("nic", "rail", "spine")
        self._network_X = np.array([s.startswith(outside) or t.startswith("nic") for s, t in self.links_X], bool)
        routes = topology.incidence.tocsc()
        self._first, self._route = routes.indptr.astype(np.int64), routes.indices.astype(np.int64)
        self._port_in = {t: x for x, (s, t) in enumerate(self.links_X) if s.startswith("domain")}
        self._port_out = {s: x for x, (s, t) in enumerate(self.links_X) if t.startswith("domain")}

    def capacity_X(self, exchange: ExchangeCosts, tokens_per_rank: float, copy_bytes: float) -> Floats:
        """Bytes per second of each link when the cost model's exchange runs over it."""
        device = self.cluster.accelerator
        if self.cluster.topology == "explicit":
            return self._built_X.copy()
        reached = []
        local = self.cluster.num_ranks if is_joined(self.cluster) else self.cluster.ranks_per_node
        inner = scale_up_bandwidth(self.cluster, local)
        for path, nominal in ((exchange.inside, inner), (exchange.between, device.nic_bandwidth)):
            seconds = 0.0 if path is None else path.per_copy_s(tokens_per_rank)
            reached.append(copy_bytes / seconds / nominal if seconds > 0 else 1.0)
        capacity_X: Floats = self._built_X * np.where(self._network_X, reached[1], reached[0])
        return capacity_X

    def routes(self, kind: str, source_F: Any, target_F: Any) -> tuple[Ints, Ints]:
        """Number of links of each transfer, and the links one after another.

        The route of each pair of ranks; a copy that a forwarder keeps crosses its one port.
        """
        routes = []
        for source, target in zip(source_F, target_F, strict=True):
            pair = source * self.cluster.num_ranks + target
            route = self._route[self._first[pair] : self._first[pair + 1]]
            if source == target:
                port = (self._port_in if kind == "dispatch" else self._port_out).get(f"rank{source}")
                route = np.zeros(0, np.int64) if port is None else np.array([port])
            routes.append(route)
        return np.array([len(route) for route in routes], np.int64), np.concatenate(routes)
