"""SGLang: the JSON of ``--init-expert-location`` (0.5.23, ``sglang/srt/eplb/expert_location.py``).

The file is passed as keyword arguments to ``init_by_mapping``: any key besides ``physical_to_logical_map`` is
an error there. Rows are all decoder layers, dense ones included; slots of rank r are contiguous.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.plan import Plan
from moeplan.errors import ExportError, PlanError
from moeplan.exports.base import (
    ExportContext,
    ImportContext,
    ImportedPlacement,
    expert_map,
    placement_of,
    require_expressible,
    uniform_refusals,
)
from moeplan.files import write_text

__all__ = ["exporter"]

_KEY = "physical_to_logical_map"


class SglangExporter:
    """``{"physical_to_logical_map": [decoder layers][P]}``."""

    name = "sglang"
    description = "SGLang --init-expert-location JSON"
    variants: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".json",)
    options = frozenset({"model", "num_layers"})

    def refusals(self, plan: Plan, context: ExportContext) -> list[str]:
        """Equal, full slots and even shares only; every planned layer must be a decoder layer."""
        reasons = uniform_refusals(plan)
        layers = _num_layers(context)
        if layers is not None and plan.layer_ids[-1] >= layers:
            reasons.append(
                f"layer {plan.layer_ids[-1]} of the plan is beyond the model's {layers} decoder layers"
            )
        return reasons

    def export(self, plan: Plan, out: Path, context: ExportContext) -> list[Path]:
        """Write the JSON; layers without a row in the plan get the engine's own start: 0..E-1, then i mod E.

        Raises:
            ExportError: the plan cannot be expressed, or the number of decoder layers is not known.
        """
        layers = _num_layers(context)
        if layers is None:
            raise ExportError(
                f"sglang wants a row for every decoder layer and the model '{plan.model}' is not known;"
                " give --num-layers, or --model with its config.json"
            )
        require_expressible(self.name, self.refusals(plan, context))
        start = [slot % plan.num_experts for slot in range(len(plan.rank_of_slot))]
        planned = dict(zip(plan.layer_ids, plan.physical_to_logical_map, strict=True))
        write_text(
            out, json.dumps({_KEY: [list(planned.get(layer, start)) for layer in range(layers)]}) + "\n"
        )
        return [out]

    def recognises(self, document: Any) -> bool:
        """Exactly the one key."""
        return isinstance(document, dict) and set(document) == {_KEY}

    def load(self, document: Any, where: str, context: ImportContext) -> ImportedPlacement:
        """Rows of the MoE layers; rows of dense layers are dropped.

        Raises:
            PlanError: not this format, or not this model's layers or width.
        """
        if not isinstance(document, dict) or _KEY not in document:
            raise PlanError(f"{where} has no key '{_KEY}'; it is not an SGLang expert location file")
        model = context.model
        map_LP = expert_map(document[_KEY], f"{where}: {_KEY}", model.num_experts)
        if len(map_LP) != model.num_layers:
            raise PlanError(
                f"{where}: {_KEY} has {len(map_LP)} rows but {model.name} has {model.num_layers} decoder layers"
                " (SGLang files have one row for each, dense layers too); is it a file of another model?"
            )
        return placement_of(map_LP[np.asarray(model.moe_layer_ids)], where, context, model.moe_layer_ids)


def _num_layers(context: ExportContext) -> int | None:
    if context.num_layers is not None:
        return context.num_layers
    return None if context.model is None else context.model.num_layers


exporter = SglangExporter()
