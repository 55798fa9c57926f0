"""Small services for tests: steps of known seconds, or a small model's costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.simulation.expert_loads import ExpertLoads
from moeplan.simulation.oracles import PlainCosts
from moeplan.simulation.pools import Pool, Replan, Replanned
from moeplan.simulation.service import Served, simulate_service
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.serving import EngineSpec, ServingSpec


def trace(arrival_s: list[float], inputs: list[int], outputs: list[int], **more: object) -> RequestTrace:
    return RequestTrace(np.array(inputs), np.array(outputs), np.array(arrival_s), **more)  # type: ignore[arg-type]


def even_placement(ranks: int, layers: int = 1) -> Placement:
    rows = np.tile(np.arange(ranks, dtype=np.int32), (layers, 1))
    return Placement(rows, np.arange(ranks, dtype=np.int32), ranks, ranks, ranks)


def plain_pool(
    groups: int,
    engine: dict[str, Any],
    base_s: float,
    per_token_s: float,
    capacity_tokens: int = 10**9,
    role: Any = "both",
    instances: int = 1,
    kv_bytes: float = 100.0,
    **more: Any,
) -> Pool:
    cluster: ClusterSpec = cluster_for("h100", 1, groups)
    return Pool(
        role, instances, EngineSpec.parse(engine, "engine"), cluster, even_placement(groups),
        ExpertLoads({"decode": [np.ones((1, groups))]}, 1.0),
        lambda changed: PlainCosts(changed, base_s, per_token_s), capacity_tokens, kv_bytes, **more,
    )  # fmt: skip


def serving(**fields: Any) -> ServingSpec:
    requests = {"arrivals": "constant", "rate": "1 /s", "count": 1, "input_tokens": 1, "output_tokens": 1}
    return ServingSpec.parse({"requests": requests} | fields, "test")


def serve(pools: Pool | list[Pool], trace: RequestTrace, replan: Replan | None = None, **fields: Any) -> Served:
    stages = pools if isinstance(pools, list) else [pools]
    stages = [replace(pool, replan=replan) for pool in stages] if replan else stages
    return simulate_service(serving(**fields), trace, stages)


class Planner:
    """Turns the placement round and takes 2 s per layer for it."""

    def __init__(self, ranks: int, layers: int = 1, capacity: int = 10**9) -> None:
        self.asked: list[tuple[np.ndarray, list[bool], str | None]] = []
        self.ranks, self.layers, self.capacity = ranks, layers, capacity

    def __call__(self, load_LE, cluster, current, planner):  # type: ignore[no-untyped-def]
        self.asked.append((load_LE, [cluster.rank(r).failed for r in range(cluster.num_ranks)], planner))
        rows = even_placement(self.ranks, self.layers).physical_to_logical_LP[:, ::-1].copy()
        placement = Placement(rows, np.arange(self.ranks, dtype=np.int32), self.ranks, self.ranks, self.ranks)
        order = tuple(range(self.layers))
        return Replanned(placement, order, np.full(self.layers, 2.0), np.full(self.layers, 7.0), self.capacity)
