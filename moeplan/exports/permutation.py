"""Training frameworks whose ranks own contiguous experts: the plan is applied by relabelling the experts.

Megatron-Core and DeepSpeed give rank r the experts ``r * E / R`` onwards. New expert s is old expert
``physical_to_logical[s]``; with weights, router rows, biases and optimizer state permuted alike, every token
gets the same output (ties between equal router scores aside).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.plan import Plan
from moeplan.errors import ExportError, PlanError, SpecError
from moeplan.exports.base import (
    ExportContext,
    ImportContext,
    ImportedPlacement,
    expert_map,
    placement_of,
    replica_refusals,
    require_expressible,
    uniform_refusals,
)
from moeplan.exports.checkpoint import group_limits, permute_checkpoint, record_text
from moeplan.exports.documents import write_npz
from moeplan.files import write_text

__all__ = ["PermutationExporter"]

_FORMAT = "moeplan-expert-permutation"


class PermutationExporter:
    """The permutation as a file (JSON or ``.npz``), or applied to a checkpoint."""

    variants: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".json", ".npz")
    options = frozenset({"model", "checkpoint", "num_groups"})

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.description = f"{title}: expert permutation, applied to a checkpoint with --checkpoint"

    def refusals(self, plan: Plan, context: ExportContext) -> list[str]:
        """No copies, equal slots, and groups of group-limited routing kept whole."""
        reasons = uniform_refusals(plan) + replica_refusals(plan)
        groups = _groups(context)
        if reasons or groups is None or groups == 1:
            return reasons
        if plan.num_experts % groups:
            return [f"num_experts ({plan.num_experts}) is not a multiple of the routing groups ({groups})"]
        size = plan.num_experts // groups
        for layer, row in zip(plan.layer_ids, plan.physical_to_logical_map, strict=True):
            group_GS = (np.asarray(row) // size).reshape(groups, size)
            if (group_GS != group_GS[:, :1]).any():
                return [
                    f"routing is limited to groups of {size} experts, and layer {layer} of the plan mixes experts of"
                    " different groups, which would change the model; a permutation must keep each group together"
                ]
        return []

    def export(self, plan: Plan, out: Path, context: ExportContext) -> list[Path]:
        """Write the permutation, or the permuted checkpoint when ``context.checkpoint`` is given.

        Raises:
            ExportError: the plan or a part of the checkpoint cannot be expressed, or the routing groups are
                not known.
            InputError: the checkpoint is unreadable, incomplete or of another model.
        """
        if _groups(context) is None:
            raise ExportError(
                f"the model '{plan.model}' is not known and there is no config.json beside the checkpoint,"
                " so group-limited routing cannot be ruled out; give --model, or --num-groups (1: no groups)"
            )
        require_expressible(self.name, self.refusals(plan, context))
        fields = {
            "format": _FORMAT,
            "version": 1,
            "target": self.name,
            "model": plan.model,
            "num_experts": plan.num_experts,
            "num_ranks": plan.num_ranks,
            "layer_ids": list(plan.layer_ids),
            "new_to_old": [list(row) for row in plan.physical_to_logical_map],
        }
        if context.checkpoint is not None:
            orders = np.asarray(plan.physical_to_logical_map, dtype=np.int32)
            permutations = dict(zip(plan.layer_ids, orders, strict=True))
            return permute_checkpoint(
                context.checkpoint, out, permutations, plan.num_experts, record_text(fields), context.progress
            )
        if out.suffix == ".npz":
            write_npz(out, {key: np.asarray(value) for key, value in fields.items()})
        elif out.suffix == ".json":
            write_text(out, record_text(fields))
        else:
            raise SpecError(
                f"--out ({out}) must end in .json or .npz for a permutation; for weights give --checkpoint too"
            )
        return [out]

    def recognises(self, document: Any) -> bool:
        """The format string, and this target."""
        return isinstance(document, dict) and (str(document.get("format")), str(document.get("target"))) == (
            _FORMAT,
            self.name,
        )

    def load(self, document: Any, where: str, context: ImportContext) -> ImportedPlacement:
        """The layers of the permutation, by absolute id.

        Raises:
            PlanError: not this format, or not this model's layers, ranks or experts.
        """
        if not self.recognises(document):
            raise PlanError(f"{where} is not an expert permutation for {self.name}")
        try:
            ranks = int(document["num_ranks"])
            layer_ids = tuple(int(layer) for layer in document["layer_ids"])
            rows = document["new_to_old"]
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{where} is not a complete expert permutation: {error!r}") from error
        if ranks != context.num_ranks:
            raise PlanError(f"{where}: num_ranks ({ranks}) is not --ranks ({context.num_ranks})")
        map_LP = expert_map(rows, f"{where}: new_to_old", context.model.num_experts)
        if len(map_LP) != len(layer_ids):
            raise PlanError(f"{where}: {len(layer_ids)} layer_ids but {len(map_LP)} rows of new_to_old")
        return placement_of(map_LP, where, context, layer_ids)


def _groups(context: ExportContext) -> int | None:
    """Groups that routing is limited to; 1 when it is not; None when that is not known."""
    found: tuple[int, int | None] | None = None
    if context.num_groups is not None:
        return context.num_groups
    if context.checkpoint is not None:
        found = group_limits(context.checkpoint)
    if found is None and context.model is not None:
        found = (context.model.n_group or 1, context.model.topk_group)
    if found is None:
        return None
    groups, top = found
    return 1 if top is not None and top >= groups else groups
