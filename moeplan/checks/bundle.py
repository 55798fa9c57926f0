"""Do these inputs make sense together? One function for each way in which they can be wrong.

``L`` MoE layers, ``E`` experts, ``R`` ranks. Checks take numbers and papers, never formulas: what memory is
needed is worked out by ``costs`` and handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import PHASES
from moeplan.checks.findings import Finding, error, warning
from moeplan.errors import InfeasibleError, PlanError, TraceError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import Workload

__all__ = ["CHECKS", "Bundle", "MemoryOfRank", "layers_by_position", "run_checks"]


class MemoryOfRank(Protocol):
    """Where a rank's memory goes, in bytes, as ``costs.memory`` reports it."""

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def memory_bytes(self) -> float: ...  # noqa: D102
    @property
    def expert_bytes(self) -> float: ...  # noqa: D102
    @property
    def other_weight_bytes(self) -> float: ...  # noqa: D102
    @property
    def workspace_bytes(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The inputs of one planning job; what is None is not checked.

    ``num_ranks`` and ``num_nodes`` are those asked for, ``slots_R`` the expert slots of each rank.
    ``equal_slots`` says that the target engine gives every rank the same number of slots.
    """

    model: ModelSpec
    cluster: ClusterSpec
    workload: Workload
    load: ExpertLoad | None = None
    num_ranks: int | None = None
    num_nodes: int | None = None
    num_redundant: int | None = None
    slots_R: NDArray[np.int64] | None = None
    memory: Sequence[MemoryOfRank] = ()
    current: Placement | None = None
    current_layer_ids: tuple[int, ...] | None = None
    target: str | None = None
    equal_slots: bool = False


def layers_by_position(layer_ids: tuple[int, ...], model: ModelSpec) -> bool:
    """Whether a trace numbers layers 0, 1, 2, ... and has one for each MoE layer of a model that does not."""
    return layer_ids == tuple(range(model.num_moe_layers)) != model.moe_layer_ids


def trace_experts(b: Bundle) -> Iterator[Finding]:
    """The trace has the model's experts and top-k."""
    if b.load is None:
        return
    if b.load.num_experts != b.model.num_experts:
        yield error(
            f"trace num_experts ({b.load.num_experts}) is not {b.model.name}'s ({b.model.num_experts});"
            " it is a trace of another model: give the --model it was recorded from",
            TraceError,
        )
    if b.load.top_k is not None and b.load.top_k != b.model.top_k:
        yield error(
            f"trace top_k ({b.load.top_k}) is not {b.model.name}'s ({b.model.top_k});"
            " it is a trace of another model, or one of its selections was cut",
            TraceError,
        )


def trace_layers(b: Bundle) -> Iterator[Finding]:
    """The trace has each MoE layer of the model once, by number or all of them by position."""
    if b.load is None or b.load.layer_ids == b.model.moe_layer_ids:
        return
    ids, model = b.load.layer_ids, b.model
    if layers_by_position(ids, model):
        yield warning(
            f"trace numbers its layers 0..{len(ids) - 1}; they are taken as {model.name}'s MoE layers"
            f" {model.moe_layer_ids[0]}..{model.moe_layer_ids[-1]} in order"
        )
        return
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        yield error(f"trace names layer {twice} twice in moe_layers; number each once", TraceError)
    elif ids == tuple(range(len(ids))) and not set(ids) <= set(model.moe_layer_ids):
        yield error(
            f"trace has {len(ids)} layers, numbered from 0, but {model.name} has {model.num_moe_layers} MoE layers,"
            f" {_some(model.moe_layer_ids)}; it is a trace of another model, or record them all",
            TraceError,
        )
    elif foreign := sorted(set(ids) - set(model.moe_layer_ids)):
        yield error(
            f"trace layers {_some(foreign)} are not MoE layers of {model.name}, which are"
            f" {_some(model.moe_layer_ids)}; it is a trace of another model, or moe_layers"
            " does not hold absolute layer numbers",
            TraceError,
        )
    elif missing := sorted(set(model.moe_layer_ids) - set(ids)):
        yield error(
            f"trace lacks {len(missing)} of {model.name}'s {model.num_moe_layers} MoE layers,"
            f" {_some(missing)}; an engine needs a placement for each: record them all",
            TraceError,
        )
    else:
        yield error("trace moe_layers do not rise; sort the layers by their number", TraceError)


def trace_experts_per_layer(b: Bundle) -> Iterator[Finding]:
    """No tokens went to an expert beyond a layer's own number of experts."""
    if b.load is None or b.load.load_LE.shape != (b.model.num_moe_layers, b.model.num_experts):
        return
    for layer, load_E, experts in zip(b.load.layer_ids, b.load.load_LE, b.model.experts_L, strict=True):
        if load_E[experts:].any():
            yield error(
                f"trace sends tokens of layer {layer} beyond the {experts} experts it has in {b.model.name}",
                TraceError,
            )


def trace_phase(b: Bundle) -> Iterator[Finding]:
    """The trace holds tokens of the phase that is planned for."""
    phase_T = None if b.load is None or b.load.trace is None else b.load.trace.phase_T
    if phase_T is None or b.workload.phase == "mix":
        return
    if not (phase_T == PHASES.index(b.workload.phase)).any():
        yield error(
            f"workload.phase ({b.workload.phase}): the trace holds no such tokens; plan the other phase"
        )


def ranks_and_nodes(b: Bundle) -> Iterator[Finding]:
    """Ranks and nodes asked for are the cluster's."""
    ranks, nodes = b.num_ranks, b.num_nodes
    if ranks is not None and nodes is not None and ranks % nodes:
        yield error(f"--ranks ({ranks}) is not a multiple of --nodes ({nodes}); nodes hold equally many")
    elif ranks is not None and ranks != b.cluster.num_ranks:
        yield error(
            f"--ranks ({ranks}) differs from the cluster's {b.cluster.num_ranks} ranks ({b.cluster.num_nodes}"
            f" nodes x {b.cluster.ranks_per_node}); change one of them"
        )
    elif nodes is not None and nodes != b.cluster.num_nodes:
        yield error(
            f"--nodes ({nodes}) differs from the cluster's num_nodes ({b.cluster.num_nodes}); change one"
        )


def node_size(b: Bundle) -> Iterator[Finding]:
    """A node holds no more ranks than its accelerators are built and linked for."""
    cluster, device = b.cluster, b.cluster.accelerator
    largest = max(device.scale_up_domain, device.ranks_per_node)
    if cluster.topology in ("two-level", "rail-optimised", "nvl72") and cluster.ranks_per_node > largest:
        yield warning(
            f"ranks_per_node ({cluster.ranks_per_node}) is more than a node of {device.name} holds"
            f" ({largest}); its ranks do not all share fast links: use more --nodes"
        )


def redundant_experts(b: Bundle) -> Iterator[Finding]:
    """Redundant experts are 0 or more."""
    if b.num_redundant is not None and b.num_redundant < 0:
        yield error(f"--redundant ({b.num_redundant}) is negative; write 0 or more, or max")


def slots_for_ranks(b: Bundle) -> Iterator[Finding]:
    """There is one number of slots per rank, and ranks that failed have none."""
    if b.slots_R is None:
        return
    if len(b.slots_R) != b.cluster.num_ranks:
        yield error(f"slots are given for {len(b.slots_R)} ranks, but the cluster has {b.cluster.num_ranks}")
        return
    for rank in np.flatnonzero(b.slots_R < 0).tolist():
        yield error(f"ranks.{rank}.slots ({b.slots_R[rank]}) is negative")
    failed = [rank for rank in range(b.cluster.num_ranks) if b.cluster.rank(rank).failed]
    for rank in failed:
        if b.slots_R[rank]:
            yield error(f"rank {rank} has failed but is given {b.slots_R[rank]} slots; it can hold none")
    if failed:
        one = len(failed) == 1
        yield warning(f"rank {failed[0]} has failed and holds nothing" if one
                      else f"ranks {_some(failed)} have failed and hold nothing")  # fmt: skip
    if idle := len(set(np.flatnonzero(b.slots_R == 0).tolist()) - set(failed)):
        yield warning(f"{idle} working ranks have no slot and compute nothing; add {idle} to --redundant to use them")


def slots_for_experts(b: Bundle) -> Iterator[Finding]:
    """All slots together hold every expert, and no rank has more than there are experts."""
    if b.slots_R is None:
        return
    slots, experts = int(b.slots_R.sum()), b.model.num_experts
    if slots < experts:
        yield error(
            f"{slots} slots on {np.count_nonzero(b.slots_R)} ranks are fewer than {b.model.name}'s {experts}"
            f" experts by {experts - slots}; give ranks more slots or use more ranks",
            InfeasibleError,
        )
    if b.slots_R.max(initial=0) > experts:
        fullest = int(b.slots_R.argmax())
        yield warning(
            f"rank {fullest} has {b.slots_R[fullest]} slots for {experts} experts; a second copy on one rank"
            f" serves nothing, so {b.slots_R[fullest] - experts} stay empty"
        )


def slots_for_memory(b: Bundle) -> Iterator[Finding]:
    """Weights fit each rank's memory.

    It is an error where they do not fit even with all other weights split over the ranks, and a warning where
    they fit only so, or without room for the buffers of a step.
    """
    worst = max(b.memory, key=lambda m: m.expert_bytes + m.other_weight_bytes - m.memory_bytes, default=None)
    if worst is None:
        return
    split = worst.expert_bytes + worst.other_weight_bytes / len(b.memory) - worst.memory_bytes
    whole = worst.expert_bytes + worst.other_weight_bytes + worst.workspace_bytes - worst.memory_bytes
    parts = (
        f"rank {worst.rank}: memory ({_gib(worst.memory_bytes)}) holds experts ({_gib(worst.expert_bytes)}),"
        f" other weights ({_gib(worst.other_weight_bytes)}) and workspace ({_gib(worst.workspace_bytes)})"
    )
    fewer = "fewer --redundant, " if (b.num_redundant or 0) > 0 else ""
    remedy = f"use {fewer}{_ranks_that_hold(b, worst)} or a smaller --dtype"
    if worst.workspace_bytes > worst.memory_bytes:
        yield error(f"{parts}: workspace alone exceeds it; use a smaller --batch-per-rank", InfeasibleError)
    elif split > 0:
        binds = (
            "experts alone"
            if worst.expert_bytes > worst.memory_bytes
            else "experts and a split of the others"
        )
        yield error(f"{parts}: {binds} exceed it by {_gib(split)}; {remedy}", InfeasibleError)
    elif whole > 0:
        yield warning(
            f"{parts} only if other weights are split over ranks: whole they exceed it by {_gib(whole)}; {remedy}"
        )


def _ranks_that_hold(b: Bundle, worst: MemoryOfRank) -> str:
    """How many ranks like the worst hold all slots beside other weights and workspace, as a remedy."""
    slots = 0 if b.slots_R is None else int(b.slots_R[worst.rank])
    room = worst.memory_bytes - worst.other_weight_bytes - worst.workspace_bytes
    if b.slots_R is None or not slots or slots * room < worst.expert_bytes:  # no slot to go by, or not even one fits
        return "more --ranks"
    return f"--ranks {-(-int(b.slots_R.sum()) // int(slots * room // worst.expert_bytes))} or more,"


def current_placement(b: Bundle) -> Iterator[Finding]:
    """The current placement is of this model and of as many ranks."""
    now = b.current
    if now is None:
        return
    facts = [
        ("num_experts", now.num_experts, b.model.num_experts, b.model.name),
        ("number of layers", now.num_layers, b.model.num_moe_layers, b.model.name),
        ("num_ranks", now.num_ranks, b.cluster.num_ranks, "the cluster"),
        ("ranks_per_node", now.ranks_per_node, b.cluster.ranks_per_node, "the cluster"),
    ]
    for what, here, there, whose in facts:
        if here != there:
            yield error(
                f"--current {what} ({here}) differs from that of {whose} ({there}); right file?",
                PlanError,
            )
    ids = b.current_layer_ids
    if ids is not None and len(ids) == b.model.num_moe_layers and ids != b.model.moe_layer_ids:
        yield error(
            f"--current layer_ids ({_some(ids)}) differ from {b.model.name}'s MoE layers"
            f" ({_some(b.model.moe_layer_ids)})",
            PlanError,
        )


_WITHOUT_COPIES = ("megatron", "deepspeed")


def target_slots(b: Bundle) -> Iterator[Finding]:
    """An engine that gives every rank the same number of slots gets no others, one without copies gets none."""
    if b.target in _WITHOUT_COPIES and b.num_redundant:
        yield error(f"{b.target} holds every expert once, but --redundant is {b.num_redundant}; give --redundant 0")
        return
    if b.slots_R is None or not b.equal_slots or len(set(b.slots_R.tolist())) == 1:
        return
    slots, ranks = int(b.slots_R.sum()), len(b.slots_R)
    if slots % ranks and not b.cluster.ranks:
        remedy = f"add {-slots % ranks} to --redundant"
        if b.target in _WITHOUT_COPIES:
            remedy = f"choose --ranks that divide {slots}"
        yield error(
            f"{b.target} gives every rank as many slots, but {slots} slots do not divide over {ranks} ranks; {remedy}"
        )
    else:
        yield error(
            f"{b.target} gives every rank as many slots, but they have {b.slots_R.min()} to"
            f" {b.slots_R.max()}; plan without a target, or leave failed ranks and"
            " ranks.*.slots out of the cluster"
        )


def target_groups(b: Bundle) -> Iterator[Finding]:
    """Where a plan renumbers experts, it must not mix the groups that routing is limited to; no planner keeps them."""
    groups, chosen = b.model.n_group or 1, b.model.topk_group
    if b.target in _WITHOUT_COPIES and groups > 1 and (chosen is None or chosen < groups):
        yield error(
            f"{b.target} renumbers experts, and {b.model.name} routes a token to {chosen or 'some'} of {groups} groups"
            " of experts: a plan would mix groups and change the model; leave --target out, or plan for an engine that"
            " takes a map, such as sglang, vllm or trtllm"
        )


CHECKS: tuple[Callable[[Bundle], Iterator[Finding]], ...] = (
    trace_experts,
    trace_layers,
    trace_experts_per_layer,
    trace_phase,
    ranks_and_nodes,
    node_size,
    redundant_experts,
    slots_for_ranks,
    slots_for_experts,
    slots_for_memory,
    current_placement,
    target_slots,
    target_groups,
)


def run_checks(bundle: Bundle) -> list[Finding]:
    """All findings, errors first."""
    found = [finding for check in CHECKS for finding in check(bundle)]
    return sorted(found, key=lambda finding: finding.severity)


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown if len(numbers) <= 6 else f"{shown}, ... {numbers[-1]}"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
