"""Ranks, nodes, links and the routes between them."""

from moeplan.topology.graph import Link, domain_of_rank, ranks_of_nics
from moeplan.topology.routes import Route, Topology, build

__all__ = ["Link", "Route", "Topology", "build", "domain_of_rank", "ranks_of_nics"]
