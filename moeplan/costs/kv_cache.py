"""Bytes and seconds of the KV cache of a serving engine: what fits, and what moves.

A group of ``tp`` ranks keeps one cache (:func:`moeplan.specs.attention_layers.kept_kv_bytes_per_token`): a latent, or
a key head of fewer than ranks, in copies, of which ``dcp`` ranks keep one between them; ``pcp`` times as many ranks
keep it as often. ``pp`` stages keep their own layers' part.

What is left for it on a rank, with ``f`` the part of memory that the engine may use,

    f * memory - (experts + other weights) / pp - workspace

the experts of :func:`moeplan.costs.memory.slot_bytes`, other weights split over ``tp``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.memory import non_expert_bytes, slot_bytes, workspace_bytes
from moeplan.costs.tables import TableCosts
from moeplan.errors import InfeasibleError
from moeplan.specs.attention_layers import kept_kv_bytes_per_token
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import Dtype, ModelSpec, cache_beside
from moeplan.specs.serving import EngineSpec
from moeplan.specs.workload import Workload

__all__ = ["KvRoom", "SwapCosts", "kv_bytes_per_token", "kv_room", "kv_rooms", "kv_transfer_s", "ranks_that_hold"]

Floats = NDArray[np.float64]

_PCIE_BYTES_PER_S = 32e9  # PCIe 4.0 x16, one way, where the accelerator's is not known
_POINTS = 64  # of the compiled curve, whose lines follow a start and a bandwidth


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


def kv_bytes_per_token(
    model: ModelSpec, engine: EngineSpec, context: float, weights: Dtype = "bf16"
) -> float | None:
    """Bytes on one rank per token in the cache, over the layers of its stage, of sequences of ``context`` tokens; None
    where attention is not known."""
    dtype = cache_beside(weights, engine.kv_dtype)
    whole = kept_kv_bytes_per_token(model, context, dtype, engine.tp, engine.dcp)
    return None if whole is None else whole / engine.pp


def _fullest(workload: Workload, engine: EngineSpec) -> Workload:
    """The workload at the most tokens that a step brings a rank."""
    return workload.model_copy(update={"batch_per_rank": max(1, engine.max_num_batched_tokens // engine.group_ranks)})


def kv_rooms(
    model: ModelSpec, cluster: ClusterSpec, workload: Workload, engine: EngineSpec, slots_R: NDArray[np.integer]
) -> list[KvRoom]:
    """Memory of every rank that works. ``cluster`` and ``slots_R`` are those of one pipeline stage, sequences hold
    ``workload.context`` tokens."""
    other = non_expert_bytes(model, workload.weight_dtype, engine.tp) / engine.pp
    workspace = workspace_bytes(model, _fullest(workload, engine))
    per_slot = slot_bytes(model, workload.weight_dtype) / engine.pp / engine.expert_tp
    per_token = kv_bytes_per_token(model, engine, workload.context, workload.weight_dtype)
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
    """Least ranks of a stage, a multiple of a group's and of expert_tp, that hold weights and one block of KV cache;
    None if none do."""
    fixed = non_expert_bytes(model, workload.weight_dtype, engine.tp) / engine.pp
    fixed += workspace_bytes(model, _fullest(workload, engine))
    fixed += (kv_bytes_per_token(model, engine, workload.context, workload.weight_dtype) or 0.0) * engine.block_tokens
    room = engine.memory_fraction * cluster.accelerator.memory - fixed
    slots = int(room // (slot_bytes(model, workload.weight_dtype) / engine.pp / engine.expert_tp))
    if slots < 1:
        return None
    ranks, whole = -(-model.num_experts // slots) * engine.expert_tp, math.lcm(engine.group_ranks, engine.expert_tp)
    return -(-ranks // whole) * whole * engine.pp


def kv_transfer_s(size_bytes: float, bandwidth_bytes_per_s: float, latency_s: float) -> float:
    """Seconds of one request's cache over one link."""
    return latency_s + size_bytes / bandwidth_bytes_per_s


class SwapCosts:
    """A rank's part of a cache to host memory, or back: one copy from or to pinned memory with nothing beside it, as
    measured, else at the bandwidth of PCIe. Compiled: an engine that runs out of memory asks in every step.

    ``measured_bytes``: the largest copy measured, 0 where there is none; larger ones take in proportion.
    """

    def __init__(self, cluster: ClusterSpec, to_host: bool, profile: HardwareProfile | None = None) -> None:
        chip = cluster.accelerator
        bandwidth = chip.pcie_bandwidth or _PCIE_BYTES_PER_S

        def law(size: Floats) -> Floats:
            seconds: Floats = size[:, 0] / bandwidth
            return seconds

        op = "device_to_host" if to_host else "host_to_device"
        names: dict[str, Any] = {"op": op, "host_memory": "pinned", "overlapped": 0}
        rows = profile.select("memory", **names) if profile is not None else None
        self.measured_bytes, self._bytes = 0.0, np.ones(1)
        if rows is not None and rows.num_rows:
            sizes = rows["message_size_bytes"].to_numpy()
            self.measured_bytes, self._bytes = float(sizes.max()), np.geomspace(sizes.min(), sizes.max(), _POINTS)
        found = TableCosts(profile, "memory", ("message_size_bytes",), names, law, chip.name).seconds(self._bytes)
        self._s, self.source = found.value, found.source

    def seconds(self, size_bytes: float) -> float:
        """Seconds of one copy."""
        most = float(self._bytes[-1])
        return float(np.interp(size_bytes, self._bytes, self._s)) * max(1.0, size_bytes / most)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
