"""What is built in: models, accelerators and the clusters made of them."""

from __future__ import annotations

from typing import Any

from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import accelerator_aliases, accelerator_names, find_cluster
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model, model_aliases, model_names
from moeplan.topology import build

__all__ = ["cluster_entries", "cluster_entry", "model_entries", "model_entry"]


def _model_row(model: ModelSpec) -> dict[str, Any]:
    return {
        "moe_layers": model.num_moe_layers,
        "experts": model.num_experts,
        "top_k": model.top_k,
        "shared_experts": model.num_shared_experts,
        "hidden_size": model.hidden_size,
        "expert_intermediate_size": model.expert_intermediate_size,
        "parameters": model.total_parameters,
        "kv_bytes_per_token": model.kv_bytes_per_token(),
    }


def model_entries() -> list[dict[str, Any]]:
    """One row per built-in model, with its slug and its other names."""
    return [
        {"name": name, **_model_row(find_model(name)), "aliases": model_aliases(name)}
        for name in model_names()
    ]


def model_entry(name: str) -> dict[str, Any]:
    """All fields of one model and what follows from them; ``name`` as :func:`find_model` takes it.

    Raises:
        InputError: no such model or file, or the file does not describe one.
    """
    model = find_model(name)
    return {
        **model.model_dump(mode="json"),
        "parameters": model.total_parameters,
        "expert_parameters": model.expert_parameters,
        "non_expert_parameters": model.non_expert_parameters,
        "kv_bytes_per_token": model.kv_bytes_per_token(),
    }


def _cluster_row(cluster: ClusterSpec) -> dict[str, Any]:
    fields = cluster.model_dump(mode="json")
    accelerator = fields["accelerator"]
    return {
        "nodes": cluster.num_nodes,
        "ranks_per_node": cluster.ranks_per_node,
        "topology": cluster.topology,
        "memory": accelerator["memory"],
        "memory_bandwidth": accelerator["memory_bandwidth"],
        "bf16": accelerator["bf16"],
        "scale_up_bandwidth": accelerator["scale_up_bandwidth"],
        "scale_up_domain": accelerator["scale_up_domain"],
        "nic_bandwidth": accelerator["nic_bandwidth"],
    }


def cluster_entries() -> list[dict[str, Any]]:
    """One row per built-in accelerator, as the cluster it stands for where no size is given."""
    return [
        {"name": name, **_cluster_row(find_cluster(name)), "aliases": accelerator_aliases(name)}
        for name in accelerator_names()
    ]


def cluster_entry(name: str, nodes: int | None = None, ranks_per_node: int | None = None) -> dict[str, Any]:
    """All fields of one cluster and its routes in short; ``name`` as :func:`find_cluster` takes it.

    ``num_links`` counts directed links. ``routes`` lists each kind of route (by bandwidth and latency) with its
    number of pairs of ranks and one example.

    Raises:
        InputError: no such accelerator or file, or ranks that are not connected.
    """
    cluster = find_cluster(name, nodes, ranks_per_node)
    topology = build(cluster)
    kinds: dict[tuple[float, float], dict[str, Any]] = {}
    for a in range(topology.num_ranks):
        for b in range(topology.num_ranks):
            bandwidth, latency = float(topology.bandwidth_RR[a, b]), float(topology.latency_RR[a, b])
            if a == b or not bandwidth:
                continue
            kind = kinds.get((bandwidth, latency))
            if kind is None:
                links = topology.route(a, b).links
                path = [link.source for link in links] + [links[-1].target]
                kinds[bandwidth, latency] = kind = {
                    "bandwidth_bytes_per_s": bandwidth,
                    "latency_s": latency,
                    "pairs": 0,
                    "example": path,
                }
            kind["pairs"] += 1
    return {
        **cluster.model_dump(mode="json"),
        "num_ranks": cluster.num_ranks,
        "scale_up_domains": len(set(topology.domain_of_rank)),
        "num_links": len(topology.links),
        "routes": list(kinds.values()),
    }
