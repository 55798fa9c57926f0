"""Seconds of one training step: forward, backward, recompute, pipeline, gradient sync, optimizer; memory by ZeRO.

- Products cost twice their forward in backward (gradients of inputs and of weights); FlashAttention's kernel two
  and a half times (five products for two: Dao 2023, arXiv 2307.08691). Exchanges cost the same both ways.
- 1F1B with ``p`` stages, ``m`` micro batches and ``v`` chunks per stage idles ``(p - 1) / (v m)`` of the work
  (Narayanan et al. 2021, arXiv 2104.04473).
- Gradients are reduce-scattered and weights all-gathered over the ranks that hold copies: data-parallel ranks
  for dense parts, ``ranks / (pp ep)`` for experts.
- Adam reads and writes 4-byte master weights and two moments, reads gradients, writes weights (Rajbhandari et
  al. 2020, arXiv 1910.02054 count the same 16 bytes of state); ZeRO stage 1 shards that, 2 gradients too, 3
  weights too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.step import StepModel, Technique
from moeplan.errors import InputError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, ModelSpec
from moeplan.specs.workload import Workload

__all__ = ["Training", "TrainingCost", "training_step"]

Floats = NDArray[np.float64]

_BACKWARD, _BACKWARD_ATTENTION = 2.0, 2.5
_ADAM_STATE_BYTES, _ADAM_MOVED_BYTES = 12, 28  # master and two moments; those read and written, gradient, weight


@dataclass(frozen=True, slots=True)
class Training:
    """How training runs. ``cluster`` ranks are one pipeline stage's expert-parallel group times ``replicas``."""

    micro_batches: int = 1
    virtual_stages: int = 1
    recompute: Literal["none", "attention", "full"] = "none"
    zero: Literal[0, 1, 2, 3] = 1
    replicas: int = 1
    overlap_gradients: bool = True
    gradient_bytes: int = 4


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """Seconds of a step and where they go; ``state_bytes`` of weights, gradients and optimizer on a rank."""

    total_s: float
    forward_s: float
    backward_s: float
    bubble_s: float
    gradient_sync_s: float
    optimizer_s: float
    state_bytes: float
    relative_error: float
    source: Mapping[str, str]
    extrapolated: tuple[str, ...]


def training_step(
    model: ModelSpec,
    cluster: ClusterSpec,
    profile: HardwareProfile | None,
    placement: Placement,
    load_LE: Floats,
    workload: Workload,
    technique: Technique,
    training: Training,
) -> TrainingCost:
    """One optimizer step of ``training.micro_batches`` micro batches of ``workload.batch_per_rank`` tokens.

    ``cluster`` holds the ranks of one expert-parallel group, which is one stage of ``technique.pp``; the whole
    job has ``pp * replicas`` such groups.

    Raises:
        InputError: a count below one, or more stages than layers.
    """
    for name in ("micro_batches", "virtual_stages", "replicas"):
        if getattr(training, name) < 1:
            raise InputError(f"training.{name} ({getattr(training, name)}) must be at least 1")
    stages = technique.pp
    if stages * training.virtual_stages > model.num_layers:
        raise InputError(
            f"technique.pp x training.virtual_stages ({stages * training.virtual_stages}) exceeds num_layers"
            f" ({model.num_layers}); use fewer stages"
        )
    cost = StepModel(model, cluster, workload, technique, profile).step(placement, load_LE)
    layers = len(cost.layer_s_L)
    experts, exchange = float(cost.expert_s_LR.max(1).sum()), float(cost.exchange_s_L.sum())
    attention, dense = cost.attention_s * layers, cost.shared_s * layers + cost.other_s
    # What overlap saved in forward it saves in the same part of backward.
    plain = attention + dense + exchange + experts
    hidden = cost.total_s / plain
    forward = cost.total_s / stages
    backward = hidden * (_BACKWARD * (dense + experts) + _BACKWARD_ATTENTION * attention + exchange) / stages
    if training.recompute == "full":
        backward += forward
    elif training.recompute == "attention":
        backward += hidden * attention / stages
    work = training.micro_batches * (forward + backward)
    bubble = (stages - 1) / training.virtual_stages * (forward + backward)

    ranks = cluster.num_ranks
    links = CollectiveCosts(cluster, profile)
    dense_parameters = model.non_expert_parameters / (stages * technique.tp)
    expert_parameters = model.num_moe_layers * model.num_experts * model.expert_parameters / (stages * ranks)
    dense_copies, expert_copies = max(1, ranks * training.replicas // technique.tp), training.replicas
    sync = 0.0
    width = DTYPE_BYTES["bf16"]
    # Groups beyond this cluster's ranks meet over the same links; their ring differs by (n - 1) / n only.
    for parameters, copies in ((dense_parameters, dense_copies), (expert_parameters, expert_copies)):
        group = min(copies, ranks)
        sync += links.seconds("reduce_scatter", group, parameters * training.gradient_bytes).total
        sync += links.seconds("all_gather", group, parameters * width).total
    if training.overlap_gradients:
        sync = max(0.0, sync - backward)
    sharded = 1 if training.zero == 0 else None
    own = dense_parameters / (sharded or dense_copies) + expert_parameters / (sharded or expert_copies)
    bandwidth = roofline.MEMORY_EFFICIENCY * cluster.accelerator.memory_bandwidth
    optimizer = own * _ADAM_MOVED_BYTES / bandwidth
    state = _state_bytes(training, [(dense_parameters, dense_copies), (expert_parameters, expert_copies)])
    return TrainingCost(
        total_s=work + bubble + sync + optimizer,
        forward_s=training.micro_batches * forward,
        backward_s=training.micro_batches * backward,
        bubble_s=bubble,
        gradient_sync_s=sync,
        optimizer_s=optimizer,
        state_bytes=state,
        relative_error=cost.high_s / cost.total_s - 1,
        source={**cost.source, "backward": "modelled from forward", "optimizer": "modelled from bytes moved"},
        extrapolated=(*cost.extrapolated, "backward", "optimizer"),
    )


def _state_bytes(training: Training, groups: list[tuple[float, int]]) -> float:
    """Weights, gradients and Adam state of a rank; ``groups``: parameters on it, and ranks that hold copies."""
    total = 0.0
    for parameters, copies in groups:
        total += parameters * DTYPE_BYTES["bf16"] / (copies if training.zero >= 3 else 1)
        total += parameters * training.gradient_bytes / (copies if training.zero >= 2 else 1)
        total += parameters * _ADAM_STATE_BYTES / (copies if training.zero >= 1 else 1)
    return total
