"""What an exporter is, and what all of them share. ``L`` layers, ``P`` slots, ``E`` experts, ``R`` ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.plan import Plan
from moeplan.errors import ExportError, PlanError
from moeplan.progress import Progress, no_progress
from moeplan.specs.model import ModelSpec

__all__ = [
    "ExportContext",
    "Exporter",
    "ImportContext",
    "ImportedPlacement",
    "duplicate_refusals",
    "expert_map",
    "moe_rows",
    "moe_rows_refusals",
    "placement_of",
    "replica_refusals",
    "require_expressible",
    "uniform_refusals",
]


@dataclass(frozen=True, slots=True)
class ExportContext:
    """What an exporter is told besides the plan; None where it was not said.

    ``num_layers`` counts all decoder layers, dense and MoE. ``num_groups`` and ``top_groups`` describe
    group-limited routing (1 group: every token may go to every expert).
    """

    model: ModelSpec | None = None
    num_layers: int | None = None
    variant: str | None = None
    model_class: str | None = None
    checkpoint: Path | None = None
    num_groups: int | None = None
    progress: Progress = no_progress


@dataclass(frozen=True, slots=True)
class ImportContext:
    """What a placement file does not say itself."""

    model: ModelSpec
    num_ranks: int
    ranks_per_node: int


@dataclass(frozen=True, slots=True)
class ImportedPlacement:
    """A placement read from a foreign file; ``layer_ids`` are absolute layer numbers, one per row."""

    placement: Placement
    layer_ids: tuple[int, ...]


@runtime_checkable
class Exporter(Protocol):
    """An exporter plugin (entry-point group ``moeplan.exporters``): a plan to an engine's file and back."""

    name: str
    description: str
    variants: tuple[str, ...]
    """Forms the target knows, the default first; empty where there is only one."""
    suffixes: tuple[str, ...]
    """Endings of the files it writes, the usual one first."""
    options: frozenset[str]
    """Fields of :class:`ExportContext` that :meth:`export` uses; a person who sets another one is told so."""

    def refusals(self, plan: Plan, context: ExportContext) -> list[str]:
        """Why the target cannot express this plan, one reason each; empty when it can."""
        ...

    def export(self, plan: Plan, out: Path, context: ExportContext) -> list[Path]:
        """Write ``out`` atomically and return what was written.

        Raises:
            ExportError: the target cannot express the plan. InputError: an option or file is wrong.
        """
        ...

    def recognises(self, document: Any) -> bool:
        """Whether what ``documents.read_placement_document`` gave is of this format."""
        ...

    def load(self, document: Any, where: str, context: ImportContext) -> ImportedPlacement:
        """The placement in a document of this format; ``where`` names the file in errors.

        Raises:
            PlanError: it is not of this format, or not of this model and number of ranks.
        """
        ...


def uniform_refusals(plan: Plan) -> list[str]:
    """Reasons that hold for every engine: equal slots on all ranks, none empty, copies share evenly."""
    placement, reasons = plan.placement, []
    if plan.experts_per_layer is not None and len(set(plan.experts_per_layer)) > 1:
        low, high = min(plan.experts_per_layer), max(plan.experts_per_layer)
        reasons.append(
            f"layers have different numbers of experts ({low} to {high}); the target has one width for all"
        )
    sizes = np.bincount(placement.rank_of_slot_P, minlength=plan.num_ranks)
    if sizes.min() != sizes.max():
        reasons.append(
            f"ranks have different numbers of slots ({sizes.min()} to {sizes.max()}); the target gives each"
            " rank the same"
        )
    if (placement.physical_to_logical_LP == EMPTY).any():
        reasons.append("some slots are empty; the target needs an expert in every slot")
    if plan.share is not None:
        even = replace(placement, share_LP=None).slot_share_LP
        if not np.allclose(placement.slot_share_LP, even, rtol=0, atol=1e-9):
            reasons.append(
                "copies of an expert take unequal shares of its tokens; the target splits by its own rule"
            )
    return reasons


def duplicate_refusals(plan: Plan) -> list[str]:
    """A rank that holds an expert twice cannot be written where a rank's experts are found by id."""
    if not (twice := plan.placement.duplicates()):
        return []
    row, rank, expert = twice[0]
    return [
        f"layer {plan.layer_ids[row]}: rank {rank} holds expert {expert} twice ({len(twice)} such cases);"
        " the target finds a rank's experts by id"
    ]


def replica_refusals(plan: Plan) -> list[str]:
    """Targets without redundancy want every expert exactly once."""
    if len(plan.rank_of_slot) == plan.num_experts:
        return []
    return [
        f"the plan has {len(plan.rank_of_slot)} slots for {plan.num_experts} experts; the target holds every expert"
        " exactly once (plan with --redundant 0)"
    ]


def require_expressible(name: str, reasons: list[str]) -> None:
    """Stop an export.

    Raises:
        ExportError: there are reasons; all are in the message.
    """
    if reasons:
        raise ExportError(f"{name} cannot express this plan: {'; '.join(reasons)}")


def expert_map(value: Any, where: str, num_experts: int) -> NDArray[np.int32]:
    """A [L, P] array of expert ids from nested lists or an array, checked.

    Raises:
        PlanError: ragged, empty, not integers, or an id outside 0..num_experts-1.
    """
    rows = value if isinstance(value, np.ndarray) else None
    if rows is None:
        if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
            raise PlanError(f"{where} must be a list of lists of expert ids, one per layer")
        widths = {len(row) for row in value}
        if len(widths) > 1:
            raise PlanError(
                f"{where} has rows of {min(widths)} to {max(widths)} slots; all layers need the same number"
            )
        if not all(type(item) is int for row in value for item in row):
            raise PlanError(f"{where} holds something that is not an expert id; ids are integers")
        try:
            rows = np.asarray(value, dtype=np.int64)
        except OverflowError as error:
            raise PlanError(
                f"{where} holds an id beyond 64 bits; ids go from 0 to {num_experts - 1}"
            ) from error
    if rows.ndim != 2 or rows.size == 0 or rows.dtype.kind not in "iu":
        raise PlanError(
            f"{where} has shape {rows.shape} of {rows.dtype}; it must be [layers, slots] of integers"
        )
    if rows.min() < 0 or rows.max() >= num_experts:
        layer, slot = (int(i[0]) for i in np.nonzero((rows < 0) | (rows >= num_experts)))
        raise PlanError(
            f"{where}[{layer}][{slot}] ({rows[layer, slot]}) is outside 0..{num_experts - 1} (the model's experts)"
        )
    return rows.astype(np.int32)


def placement_of(
    map_LP: NDArray[np.int32], where: str, context: ImportContext, layer_ids: tuple[int, ...]
) -> ImportedPlacement:
    """The placement of a map whose ranks own equal, contiguous runs of slots.

    Raises:
        PlanError: the width does not divide over the ranks, a layer is not of the model, or an expert has no
            slot.
    """
    model, ranks = context.model, context.num_ranks
    slots = map_LP.shape[1]
    if slots % ranks:
        raise PlanError(
            f"{where}: {slots} slots do not divide over {ranks} ranks; give the --ranks the file was made for"
        )
    if slots < model.num_experts:
        raise PlanError(
            f"{where}: {slots} slots are fewer than num_experts ({model.num_experts}) of {model.name}"
        )
    if foreign := sorted(set(layer_ids) - set(model.moe_layer_ids)):
        raise PlanError(
            f"{where}: layer {foreign[0]} is not a MoE layer of {model.name}; is it a file of another model?"
        )
    placement = Placement(
        physical_to_logical_LP=map_LP,
        rank_of_slot_P=np.repeat(np.arange(ranks, dtype=np.int32), slots // ranks),
        num_experts=model.num_experts,
        num_ranks=ranks,
        ranks_per_node=context.ranks_per_node,
    )
    try:
        placement.require_valid(allow_duplicates=True)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    return ImportedPlacement(placement, layer_ids)


def moe_rows(map_LP: NDArray[np.int32], where: str, context: ImportContext) -> ImportedPlacement:
    """The placement of a map with one row per MoE layer, by position."""
    model = context.model
    if len(map_LP) != model.num_moe_layers:
        raise PlanError(
            f"{where}: {len(map_LP)} layers, but {model.name} has {model.num_moe_layers} MoE layers;"
            " is it a file of another model?"
        )
    return placement_of(map_LP, where, context, model.moe_layer_ids)


def moe_rows_refusals(plan: Plan, context: ExportContext) -> list[str]:
    """Why a plan does not fit a format that counts MoE layers by position: it must have all of them."""
    if context.model is not None and plan.layer_ids != context.model.moe_layer_ids:
        return [
            f"the plan has {len(plan.layer_ids)} layers but {context.model.name} has"
            f" {context.model.num_moe_layers} MoE"
            " layers; the target counts MoE layers by position and needs every one"
        ]
    return []
