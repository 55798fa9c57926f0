"""Bytes and seconds of the KV cache of a serving engine.

A group of ``tp`` ranks keeps one cache: grouped-query heads are split over its ranks down to one head each, the
latent of multi-head latent attention is whole on every rank. ``pp`` stages keep their own layers' part.

What is left for it on a rank, with ``f`` the part of memory that the engine may use,

    f * memory - (experts + other weights) / pp - workspace

the experts of :func:`moeplan.costs.memory.slot_bytes`, other weights split over ``tp``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.memory import non_expert_bytes, slot_bytes, workspace_bytes
from moeplan.errors import InfeasibleError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside
from moeplan.specs.serving import EngineSpec
from moeplan.specs.workload import Workload

__all__ = ["KvRoom", "kv_bytes_per_token", "kv_room", "kv_rooms", "kv_transfer_s", "ranks_that_hold", "swap_s"]

_PCIE_BYTES_PER_S = 32e9  # PCIe 4.0 x16, one way, where the accelerator's is not known


@dataclass(frozen=True, slots=True)
class KvRoom:
    """Memory of the fullest rank, in bytes; ``tokens`` of KV cache that a group holds (None: attention not known)."""

    rank: int
    memory_bytes: float
    expert_bytes: float
    other_weight_bytes: float
    workspace_bytes: float
    free_bytes: float
    tokens: int | None


def kv_bytes_per_token(model: ModelSpec, engine: EngineSpec, weights: Dtype = "bf16") -> float | None:
    """Bytes on one rank per token in the cache, over the layers of its stage; None where attention is not known."""
    a = model.attention
    if a is None:
        return None
    cache: Dtype = "fp8" if engine.kv_dtype == "fp8" else activations_beside(weights)
    split = 1.0 if a.is_mla else min(engine.tp, a.num_kv_heads)
    return model.num_layers * a.kv_elements_per_token * DTYPE_BYTES[cache] / split / engine.pp


def kv_rooms(
    model: ModelSpec, cluster: ClusterSpec, workload: Workload, engine: EngineSpec, slots_R: NDArray[np.integer]
) -> list[KvRoom]:
    """Memory of every rank that works. ``cluster`` and ``slots_R`` are those of one pipeline stage."""
    batch = workload.model_copy(update={"batch_per_rank": max(1, engine.max_num_batched_tokens // engine.tp)})
    other = non_expert_bytes(model, workload.weight_dtype, engine.tp) / engine.pp
    workspace = workspace_bytes(model, batch)
    per_slot = slot_bytes(model, workload.weight_dtype) / engine.pp
    per_token = kv_bytes_per_token(model, engine, workload.weight_dtype)
    rooms = []
    for rank, slots in enumerate(slots_R):
        if cluster.rank(rank).failed:
            continue
        memory = cluster.rank_memory_bytes(rank)
        free = engine.memory_fraction * memory - float(slots) * per_slot - other - workspace
        tokens = None if per_token is None else max(0, int(free // per_token))
        rooms.append(KvRoom(rank, memory, float(slots) * per_slot, other, workspace, free, tokens))
    return rooms


def kv_room(
    model: ModelSpec, cluster: ClusterSpec, workload: Workload, engine: EngineSpec, slots_R: NDArray[np.integer]
) -> KvRoom:
    """Memory of the rank with least left, of those of :func:`kv_rooms`.

    Raises:
        InfeasibleError: nothing is left for the KV cache; the message says by how much, and what would fit.
    """
    rooms = kv_rooms(model, cluster, workload, engine, slots_R)
    least = min(rooms, key=lambda room: (room.free_bytes, room.rank))
    if least.free_bytes <= 0 or least.tokens == 0:
        enough = ranks_that_hold(model, cluster, workload, engine)
        fits = f"use {enough} ranks or more" if enough else "no number of ranks helps: other weights alone exceed it"
        raise InfeasibleError(
            f"{model.name} does not fit rank {least.rank}: {100 * engine.memory_fraction:.0f} % of its memory"
            f" ({_gib(least.memory_bytes)}) less experts ({_gib(least.expert_bytes)}), other weights"
            f" ({_gib(least.other_weight_bytes)}) and workspace ({_gib(least.workspace_bytes)}) leaves nothing for the"
            " KV cache: it is exceeded by"
            f" {max(0.0, -least.free_bytes):.0f} bytes ({_gib(max(0.0, -least.free_bytes))}); {fits},"
            " a smaller workload.weight_dtype, or smaller engine.max_num_batched_tokens"
        )
    return least


def ranks_that_hold(model: ModelSpec, cluster: ClusterSpec, workload: Workload, engine: EngineSpec) -> int | None:
    """Least ranks of a stage, a multiple of tp, on which weights and one block of KV cache fit; None if none do."""
    batch = workload.model_copy(update={"batch_per_rank": max(1, engine.max_num_batched_tokens // engine.tp)})
    fixed = non_expert_bytes(model, workload.weight_dtype, engine.tp) / engine.pp + workspace_bytes(model, batch)
    fixed += (kv_bytes_per_token(model, engine, workload.weight_dtype) or 0.0) * engine.block_size
    room = engine.memory_fraction * cluster.accelerator.memory - fixed
    slots = int(room // (slot_bytes(model, workload.weight_dtype) / engine.pp))
    if slots < 1:
        return None
    ranks = -(-model.num_experts // slots)
    return -(-ranks // engine.tp) * engine.tp * engine.pp


def kv_transfer_s(size_bytes: float, bandwidth_bytes_per_s: float, latency_s: float) -> float:
    """Seconds of one request's cache over one link."""
    return latency_s + size_bytes / bandwidth_bytes_per_s


def swap_s(size_bytes: float, cluster: ClusterSpec) -> float:
    """Seconds to bring a rank's part of a cache to host memory or back."""
    return size_bytes / (cluster.accelerator.pcie_bandwidth or _PCIE_BYTES_PER_S)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
