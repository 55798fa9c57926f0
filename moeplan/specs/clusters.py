"""Accelerators by name, and the clusters built from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplan.errors import SpecError, UnknownNameError
from moeplan.specs.base import read_document
from moeplan.specs.catalogue import Catalogue, names_a_file, slug
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec, TopologyPreset

__all__ = [
    "DEFAULT_CLUSTER",
    "accelerator_aliases",
    "accelerator_names",
    "cluster_for",
    "cluster_from_mapping",
    "find_accelerator",
    "find_cluster",
    "sized_cluster",
]

DEFAULT_CLUSTER = "h100-sxm"
_ACCELERATORS = Catalogue("accelerator", "accelerators.json", AcceleratorSpec)


def accelerator_names() -> list[str]:
    """Slugs of the built-in accelerators."""
    return _ACCELERATORS.names()


def accelerator_aliases(name: str) -> list[str]:
    """Other names under which a built-in accelerator is found."""
    return _ACCELERATORS.aliases(name)


def find_accelerator(name: str) -> AcceleratorSpec:
    """A built-in accelerator by slug or alias, such as ``h100``, ``h200-sxm`` or ``gb200``.

    Raises:
        UnknownNameError: the message lists the names there are.
    """
    return _ACCELERATORS.find(name)


def _accelerator_of(cluster: str) -> AcceleratorSpec:
    """The accelerator that a cluster is named by; where there is none, the error speaks of the cluster."""
    if not _ACCELERATORS.knows(cluster):
        raise UnknownNameError("cluster (neither an accelerator nor a file)", cluster, accelerator_names())
    return find_accelerator(cluster)


def cluster_for(
    accelerator: AcceleratorSpec | str,
    num_nodes: int | None = None,
    ranks_per_node: int | None = None,
    topology: TopologyPreset | None = None,
) -> ClusterSpec:
    """A cluster of equal nodes.

    What is left out follows the accelerator: nodes of ``ranks_per_node`` ranks, one node, or all nodes of one
    scale-up domain where that spans nodes (18 trays of 4 for an NVL72 rack); topology ``nvl72`` in that case,
    ``two-level`` otherwise, as where several racks are nodes of 72.
    """
    spec = find_accelerator(accelerator) if isinstance(accelerator, str) else accelerator
    spans_nodes = spec.scale_up_domain > spec.ranks_per_node
    per_node = spec.ranks_per_node if ranks_per_node is None else ranks_per_node
    nodes = (
        num_nodes if num_nodes is not None else max(1, spec.scale_up_domain // per_node) if spans_nodes else 1
    )
    name = f"{slug(spec.name)} x {per_node} x {nodes}"
    return ClusterSpec.parse(
        {
            "name": name,
            "accelerator": spec,
            "num_nodes": nodes,
            "ranks_per_node": per_node,
            "topology": topology or ("nvl72" if spans_nodes and per_node < spec.scale_up_domain else "two-level"),
        },
        f"cluster {name}",
    )


def cluster_from_mapping(value: Mapping[str, Any], where: str) -> ClusterSpec:
    """A cluster from its fields; ``accelerator`` may be a built-in name or a mapping.

    Raises:
        SpecError: any field is wrong; UnknownNameError: no such accelerator.
    """
    fields = dict(value)
    if isinstance(fields.get("accelerator"), str):
        fields["accelerator"] = find_accelerator(fields["accelerator"])
    return ClusterSpec.parse(fields, where)


def find_cluster(
    name: str | Path = DEFAULT_CLUSTER, num_nodes: int | None = None, ranks_per_node: int | None = None
) -> ClusterSpec:
    """A cluster from an accelerator's name, or from a YAML or JSON file of :class:`ClusterSpec`.

    ``num_nodes`` and ``ranks_per_node`` size a cluster named by its accelerator; a file says both itself.

    Raises:
        UnknownNameError: neither an accelerator nor a file.
        InputError: the file cannot be read; SpecError: any field is wrong.
    """
    if _ACCELERATORS.knows(str(name)) or not names_a_file(name):
        return cluster_for(_accelerator_of(str(name)), num_nodes, ranks_per_node)
    path = Path(name)
    document = read_document(path)
    if not isinstance(document, dict):
        raise SpecError(f"{path} holds a {type(document).__name__}; a cluster is a mapping of fields")
    return cluster_from_mapping(document, str(path))


def sized_cluster(
    name: str | Path = DEFAULT_CLUSTER, ranks: int | None = None, nodes: int | None = None
) -> ClusterSpec:
    """As :func:`find_cluster`, where an accelerator's name is sized by all ranks together.

    Without ``nodes`` the ranks go into as few as can be: a node then holds the ranks of one scale-up domain,
    or of one box where that is larger. A file says its size itself.

    Raises:
        SpecError: the ranks do not divide over the nodes; otherwise as :func:`find_cluster`.
    """
    if ranks is None or (not _ACCELERATORS.knows(str(name)) and names_a_file(name)):
        return find_cluster(name, nodes)
    accelerator = _accelerator_of(str(name))
    largest = max(accelerator.scale_up_domain, accelerator.ranks_per_node)
    count = nodes or -(-ranks // largest)
    if ranks % count:
        raise SpecError(
            f"ranks ({ranks}) do not divide over {count} nodes"
            + ("" if nodes else f" of up to {largest} {accelerator.name}; say how many with nodes")
        )
    return cluster_for(accelerator, count, ranks // count)
