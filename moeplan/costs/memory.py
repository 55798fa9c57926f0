"""Bytes of a rank's memory under expert parallelism.

With ``slots`` expert slots per MoE layer on the rank, ``L`` MoE layers and ``B`` bytes per weight,

- experts: ``slots * L * expert_parameters * B``;
- other weights: ``non_expert_parameters_on(shards) * B_other``. Attention, shared experts, dense layers and
  embeddings are whole on every rank under data-parallel attention (``shards = 1``) and split under tensor
  parallelism. ``B_other`` is that of the experts from 8 bits up and bf16 below: published 4-bit checkpoints
  (MXFP4, NVFP4) keep these weights in 16 bits;
- workspace: the (token, expert) pairs that an evenly loaded rank works on, ``n = batch_per_rank * top_k``,
  each with its token as it arrives, its result and the expert's intermediate rows (two where the FFN is gated, one
  otherwise), these in bf16, in fp32 beside fp32;
- what is left holds the KV cache of the ``shards`` ranks that share attention, on each
  :func:`moeplan.specs.attention_layers.kept_kv_bytes_per_token` of it at the workload's context.

Where the model's attention is not known, neither its weights (beyond ``extra_parameters``) nor its KV cache
are counted, and ``notes`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import InfeasibleError
from moeplan.specs.attention_layers import kept_kv_bytes_per_token
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside, cache_beside, dense_beside
from moeplan.specs.workload import Workload

__all__ = [
    "RankMemory",
    "kv_tokens_needed",
    "max_redundant_experts",
    "memory_report",
    "non_expert_bytes",
    "slot_bytes",
    "workspace_bytes",
]


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Where one rank's memory goes, in bytes; ``kv_tokens`` that the ranks which share attention can keep together,
    None where the KV cache is not known."""

    rank: int
    memory_bytes: float
    expert_bytes: float
    other_weight_bytes: float
    workspace_bytes: float
    kv_tokens: int | None
    notes: tuple[str, ...] = ()

    @property
    def used_bytes(self) -> float:
        """Without KV cache."""
        return self.expert_bytes + self.other_weight_bytes + self.workspace_bytes

    @property
    def free_bytes(self) -> float:
        """For the KV cache; negative where the rest does not fit."""
        return self.memory_bytes - self.used_bytes


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def slot_bytes(model: ModelSpec, dtype: Dtype) -> float:
    """Bytes of one expert slot over all MoE layers."""
    return model.num_moe_layers * model.expert_bytes(dtype)


def non_expert_bytes(model: ModelSpec, dtype: Dtype, shards: int = 1) -> float:
    """Bytes of all other weights on one rank, when ``shards`` ranks split them."""
    return model.non_expert_parameters_on(shards) * DTYPE_BYTES[dense_beside(dtype)]


def workspace_bytes(model: ModelSpec, workload: Workload) -> float:
    """Bytes of the buffers of one MoE layer on an evenly loaded rank."""
    sent = workload.activation_dtype
    arrives, leaves = DTYPE_BYTES[sent], DTYPE_BYTES[activations_beside(sent)]
    wide = DTYPE_BYTES[activations_beside(workload.weight_dtype)]
    rows = (2 if model.gated_ffn else 1) * model.expert_intermediate_size * wide
    return workload.batch_per_rank * model.top_k * (model.routed_hidden_size * (arrives + leaves) + rows)


def kv_tokens_needed(workload: Workload) -> int:
    """Tokens whose keys and values one rank holds.

    In prefill those of the step; in decode and mix ``context`` for each token, which stands for a sequence.
    """
    return workload.batch_per_rank * (1 if workload.phase == "prefill" else workload.context)


def memory_report(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    slots_R: NDArray[np.integer] | NDArray[np.floating],
    shards: int = 1,
    kv_dtype: Dtype = "bf16",
    dcp: int = 1,
) -> list[RankMemory]:
    """Memory of every rank that works, with ``slots_R`` expert slots per layer, parts of one where ranks share it.
    ``shards`` ranks share attention and its KV cache in ``kv_dtype``, of which ``dcp`` keep one copy together."""
    other, workspace = (
        non_expert_bytes(model, workload.weight_dtype, shards),
        workspace_bytes(model, workload),
    )
    per_slot = slot_bytes(model, workload.weight_dtype)
    dtype = cache_beside(workload.weight_dtype, kv_dtype)
    per_token = kept_kv_bytes_per_token(model, workload.context, dtype, shards, dcp)
    notes = (
        ()
        if per_token
        else (f"{model.name}: attention is not known; its weights and KV cache are not counted",)
    )
    if per_token is None and model.extra_parameters:
        notes = (f"{model.name}: attention is not known; its KV cache is not counted",)
    report = []
    for rank, slots in enumerate(slots_R):
        if cluster.rank(rank).failed:
            continue
        memory, experts = cluster.rank_memory_bytes(rank), float(slots) * per_slot
        free = memory - experts - other - workspace
        tokens = None if per_token is None else max(0, int(free // per_token))
        report.append(RankMemory(rank, memory, experts, other, workspace, tokens, notes))
    return report


def max_redundant_experts(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    kv_reserve_bytes: float | None = None,
    shards: int = 1,
) -> int:
    """Most redundant slots per layer with which every rank has equally many and its KV cache still fits.

    ``kv_reserve_bytes`` is kept free on each rank; left out, it is what the workload needs,
    :func:`kv_tokens_needed`. No rank takes more slots than there are experts, since two copies of one expert
    on a rank serve nothing. Ranks with ``slots`` of their own keep them.

    Raises:
        InfeasibleError: the experts do not fit, or the KV cache is not known and no reserve is given.
    """
    dtype = activations_beside(workload.weight_dtype)
    per_token = kept_kv_bytes_per_token(model, workload.context, dtype, shards)
    if kv_reserve_bytes is None:
        if per_token is None:
            raise InfeasibleError(
                f"{model.name}: attention is not known, so its KV cache cannot be kept free; give kv_reserve"
            )
        kv_reserve_bytes = shards * kv_tokens_needed(workload) * per_token
    alive = [rank for rank in range(cluster.num_ranks) if not cluster.rank(rank).failed]
    free = [rank for rank in alive if cluster.rank(rank).slots is None]
    total = sum(cluster.rank(rank).slots or 0 for rank in alive)
    if not free:
        if total < model.num_experts:
            raise InfeasibleError(
                f"ranks.*.slots add up to {total}, less than num_experts ({model.num_experts})"
            )
        return total - model.num_experts
    smallest = min(free, key=cluster.rank_memory_bytes)
    memory, per_slot = cluster.rank_memory_bytes(smallest), slot_bytes(model, workload.weight_dtype)
    other = non_expert_bytes(model, workload.weight_dtype, shards)
    workspace = workspace_bytes(model, workload)
    room = memory - other - workspace - kv_reserve_bytes
    slots = max(0, min(int(room // per_slot), model.num_experts))
    needed = -(-(model.num_experts - total) // len(free))
    if slots < needed:
        raise InfeasibleError(
            f"{model.num_experts} experts need {needed} slots on each rank, but memory has room for {slots}:"
            f" rank {smallest} lacks {_gib(needed * per_slot - room)} of {_gib(memory)} beside other weights"
            f" ({_gib(other)}), workspace ({_gib(workspace)}) and KV cache ({_gib(kv_reserve_bytes)});"
            " use more ranks, a smaller dtype, batch, context or kv_reserve"
        )
    return total + slots * len(free) - model.num_experts
