"""Routes between ranks and what they share. ``R`` ranks, ``V`` vertices, ``X`` links."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import dijkstra

from moeplan.errors import SpecError
from moeplan.specs.cluster import ClusterSpec
from moeplan.topology.graph import Link, domain_of_rank, draw, name_order, rank_name

__all__ = ["Route", "Topology", "build"]

_PICOSECONDS = 1e12
# A path costs its latency in picoseconds times this, plus its number of links: exact in a float up to 8 s.
_HOP = 1024


@dataclass(frozen=True, slots=True)
class Route:
    """The links from one rank to another, in order; none where both are the same rank."""

    links: tuple[Link, ...]
    bandwidth_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """A cluster's graph and its routes.

    One route per pair of ranks: the one of least latency, then of fewest links, then through the vertices
    first by name. In the presets a rank does not pass on what is meant for another; with explicit links
    it does.
    ``bandwidth_RR`` is each route's narrowest link in bytes per second (infinite from a rank to itself) and
    ``latency_RR`` its sum in seconds. Ranks that failed have bandwidth 0 and infinite latency.
    ``incidence`` is a sparse matrix [X, R * R]: 1 where a pair's route uses a link.
    """

    cluster: ClusterSpec
    graph: nx.DiGraph[str]
    links: tuple[Link, ...]
    domain_of_rank: tuple[int, ...]
    bandwidth_RR: NDArray[np.float64]
    latency_RR: NDArray[np.float64]
    incidence: sparse.csr_array
    _steps: NDArray[np.int32] = field(repr=False)

    @property
    def num_ranks(self) -> int:
        """``R``, failed ranks included."""
        return len(self.domain_of_rank)

    def route(self, a: int, b: int) -> Route:
        """The route from rank ``a`` to rank ``b``.

        Raises:
            SpecError: one of them has failed or is not in the cluster.
        """
        for rank in (a, b):
            if not 0 <= rank < self.num_ranks:
                raise SpecError(f"rank {rank} is outside 0..{self.num_ranks - 1}")
            if self.cluster.rank(rank).failed:
                raise SpecError(f"rank {rank} has failed; it has no route")
        steps = self._steps[:, a, b]
        links = tuple(self.links[i] for i in steps[steps >= 0][::-1])
        return Route(links, float(self.bandwidth_RR[a, b]), float(self.latency_RR[a, b]))


def build(cluster: ClusterSpec) -> Topology:
    """Draw the cluster and find the route of every pair of ranks.

    Raises:
        SpecError: two ranks that work are not connected; the message names them.
    """
    graph = draw(cluster)
    names = sorted(graph.nodes, key=name_order)
    number = {name: i for i, name in enumerate(names)}
    links = tuple(
        Link(u, v, data["bandwidth_bytes_per_s"], data["latency_s"])
        for u, v, data in sorted(graph.edges(data=True), key=lambda e: (number[e[1]], number[e[0]]))
    )
    num_ranks = cluster.num_ranks
    sources = np.array([number[rank_name(r)] for r in range(num_ranks)])
    tail_X = np.array([number[link.source] for link in links], dtype=np.int64)
    head_X = np.array([number[link.target] for link in links], dtype=np.int64)
    arrival = sources.copy()
    num_vertices = len(names)
    if cluster.topology != "explicit":  # a rank's arrivals get a vertex of their own, which nothing leaves
        arrival_of = np.arange(num_vertices)
        arrival = arrival_of[sources] = num_vertices + np.arange(num_ranks)
        head_X = arrival_of[head_X]
        num_vertices += num_ranks

    cost_X = np.array([round(link.latency_s * _PICOSECONDS) * _HOP + 1 for link in links], dtype=np.float64)
    weights = sparse.csr_array((cost_X, (tail_X, head_X)), shape=(num_vertices, num_vertices))
    cost_RV = np.asarray(dijkstra(weights, indices=sources))
    steps = _walk_back(cost_RV, cost_X, tail_X, head_X, sources, arrival)
    alive_R = np.array([not cluster.rank(r).failed for r in range(num_ranks)])
    _require_connected(cost_RV[:, arrival], alive_R)

    used = steps >= 0
    bandwidth_X = np.array([link.bandwidth_bytes_per_s for link in links])
    latency_X = np.array([link.latency_s for link in links])
    bandwidth_RR = np.full((num_ranks, num_ranks), np.inf)
    latency_RR = np.zeros((num_ranks, num_ranks))
    for step, on in zip(steps, used, strict=True):
        bandwidth_RR[on] = np.minimum(bandwidth_RR[on], bandwidth_X[step[on]])
        latency_RR[on] += latency_X[step[on]]
    lost_RR = ~(alive_R[:, None] & alive_R[None, :])
    bandwidth_RR[lost_RR], latency_RR[lost_RR] = 0.0, np.inf
    _, a, b = np.nonzero(used)
    incidence = sparse.csr_array(
        (np.ones(len(a)), (steps[used], a * num_ranks + b)), shape=(len(links), num_ranks * num_ranks)
    )
    for array in (bandwidth_RR, latency_RR, steps):
        array.setflags(write=False)
    return Topology(
        cluster, graph, links, domain_of_rank(cluster), bandwidth_RR, latency_RR, incidence, steps
    )


def _walk_back(
    cost_RV: NDArray[np.float64],
    cost_X: NDArray[np.float64],
    tail_X: NDArray[np.int64],
    head_X: NDArray[np.int64],
    sources: NDArray[np.int64],
    arrival: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Links of each route from its end, [hops, R, R], -1 beyond its start; the first by name of equals."""
    num_ranks, num_vertices = cost_RV.shape
    last_RV = np.full((num_ranks, num_vertices), -1, dtype=np.int32)
    for x in range(len(cost_X) - 1, -1, -1):  # links stand in order of names: the first one is written last
        u, v = tail_X[x], head_X[x]
        on_path = np.isfinite(cost_RV[:, u]) & (cost_RV[:, u] + cost_X[x] == cost_RV[:, v])
        last_RV[on_path, v] = x
    here_RR = np.broadcast_to(arrival, (num_ranks, num_ranks)).copy()
    np.fill_diagonal(here_RR, sources)
    rows = np.arange(num_ranks)[:, None]
    steps = []
    while True:
        link_RR = np.where(here_RR == sources[:, None], -1, last_RV[rows, here_RR])
        if (link_RR < 0).all():
            break
        steps.append(link_RR)
        here_RR = np.where(link_RR >= 0, tail_X[link_RR], sources[:, None])
    return np.array(steps, dtype=np.int32).reshape(-1, num_ranks, num_ranks)


def _require_connected(cost_RR: NDArray[np.float64], alive_R: NDArray[np.bool_]) -> None:
    missing = ~np.isfinite(cost_RR) & alive_R[:, None] & alive_R[None, :]
    np.fill_diagonal(missing, False)
    pairs = np.argwhere(missing)
    if len(pairs):
        a, b = pairs[0]
        raise SpecError(
            f"no route from rank {a} to rank {b} ({len(pairs)} pairs of ranks are not connected);"
            " add links, or mark ranks that do not work as failed"
        )
