"""The graph of a cluster: ranks, their NICs, scale-up switches, rails and the spine.

Each preset is a set of directed links; every cable is two of them. Figures come from the cluster's spec
alone: a link of a scale-up switch carries ``scale_up_bandwidth`` and half of ``scale_up_latency``, a link
of a network switch ``nic_bandwidth`` for each rank that shares the NIC and half of ``nic_latency``, so that
two ranks on one switch are one latency apart and each further switch costs half a latency more per link.
``nic0`` is of the first ``ranks_per_nic`` ranks, and so on. Links between switches are as
wide as all that hangs below them (a non-blocking fabric); draw another fabric with ``topology:
explicit``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx

from moeplan.errors import SpecError
from moeplan.specs.cluster import ClusterSpec

__all__ = ["Link", "domain_of_rank", "draw", "name_order", "rank_name", "ranks_of_nics"]


@dataclass(frozen=True, slots=True)
class Link:
    """One directed link."""

    source: str
    target: str
    bandwidth_bytes_per_s: float
    latency_s: float


def rank_name(rank: int) -> str:
    """Name of a rank in the graph."""
    return f"rank{rank}"


def ranks_of_nics(cluster: ClusterSpec) -> dict[str, range]:
    """Ranks that share each NIC, by its name in the graph; among explicit links ``nic0`` is rank 0's."""
    per_nic = 1 if cluster.topology == "explicit" else cluster.ranks_per_nic
    return {f"nic{first // per_nic}": range(first, first + per_nic) for first in range(0, cluster.num_ranks, per_nic)}


def name_order(name: str) -> tuple[tuple[int, str | int], ...]:
    """Sort key under which ``rank2`` stands before ``rank10``."""
    return tuple((1, int(part)) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name) if part)


def domain_of_rank(cluster: ClusterSpec) -> tuple[int, ...]:
    """Scale-up (NVLink) domain of each rank, numbered in rank order.

    ``flat`` is one domain; ``nvl72`` has domains that span nodes; elsewhere a domain ends with its node,
    and a node with more ranks than a domain holds several. With ``explicit`` links a domain is a node.
    """
    per_node = cluster.ranks_per_node
    if cluster.topology == "flat":
        return (0,) * cluster.num_ranks
    if cluster.topology == "nvl72":
        return tuple(r // cluster.accelerator.scale_up_domain for r in range(cluster.num_ranks))
    if cluster.topology == "explicit":
        return tuple(r // per_node for r in range(cluster.num_ranks))
    size = min(cluster.accelerator.scale_up_domain, per_node)
    domains_per_node = -(-per_node // size)
    return tuple(r // per_node * domains_per_node + r % per_node // size for r in range(cluster.num_ranks))


def draw(cluster: ClusterSpec) -> nx.DiGraph[str]:
    """The graph; each edge has ``bandwidth_bytes_per_s`` and ``latency_s``. Failed ranks stand alone.

    Raises:
        SpecError: an explicit link names a rank that is not there.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(rank_name(r) for r in range(cluster.num_ranks))
    down = {rank_name(r) for r in range(cluster.num_ranks) if cluster.rank(r).failed}
    down |= {nic for nic, ranks in ranks_of_nics(cluster).items() if all(cluster.rank(r).failed for r in ranks)}
    links = _explicit(cluster) if cluster.topology == "explicit" else _preset(cluster)
    for link in links:
        if link.source not in down and link.target not in down:
            graph.add_edge(
                link.source,
                link.target,
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
                latency_s=link.latency_s,
            )
    return graph


def _cable(a: str, b: str, bandwidth: float, latency: float) -> Iterator[Link]:
    yield Link(a, b, bandwidth, latency)
    yield Link(b, a, bandwidth, latency)


def _preset(cluster: ClusterSpec) -> Iterator[Link]:
    accelerator, per_node = cluster.accelerator, cluster.ranks_per_node
    domain_R = domain_of_rank(cluster)
    inside, outside = cluster.scale_up_latency / 2, cluster.nic_latency / 2
    several_domains = len(set(domain_R)) > 1
    networked = several_domains and (cluster.num_nodes > 1 or cluster.topology == "nvl72")
    shared = cluster.ranks_per_nic
    nic_bandwidth = shared * accelerator.nic_bandwidth
    # Of a shared NIC the latency lies on its ranks' side: they are nearer to each other by the scale-up switch.
    before_nic, after_nic = (0.0, outside) if shared == 1 else (outside, 0.0)
    for r in range(cluster.num_ranks):
        rank = rank_name(r)
        yield from _cable(rank, f"domain{domain_R[r]}", accelerator.scale_up_bandwidth, inside)
        if several_domains and cluster.topology != "nvl72" and per_node > accelerator.scale_up_domain:
            # no figure for the host's links: the NIC's, which hang on the same PCIe switch
            host = accelerator.pcie_bandwidth or accelerator.nic_bandwidth
            yield from _cable(rank, f"host{r // per_node}", host, inside)
        if networked:
            yield from _cable(rank, f"nic{r // shared}", nic_bandwidth, before_nic)
    rails = per_node // shared if cluster.topology == "rail-optimised" else 0
    for nic in range(cluster.num_ranks // shared if networked else 0):
        yield from _cable(f"nic{nic}", f"rail{nic % rails}" if rails else "spine", nic_bandwidth, after_nic)
    for rail in range(rails if networked else 0):
        yield from _cable(f"rail{rail}", "spine", cluster.num_nodes * nic_bandwidth, outside)


def _explicit(cluster: ClusterSpec) -> Iterator[Link]:
    for number, link in enumerate(cluster.links):
        for end in (link.source, link.target):
            if (match := re.fullmatch(r"rank(\d+)", end)) and int(match[1]) >= cluster.num_ranks:
                raise SpecError(
                    f"links.{number} names {end}, but the cluster has ranks 0..{cluster.num_ranks - 1}"
                )
        yield Link(link.source, link.target, link.bandwidth, link.latency)
        if link.duplex:
            yield Link(link.target, link.source, link.bandwidth, link.latency)
