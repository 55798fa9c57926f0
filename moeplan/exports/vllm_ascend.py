"""vLLM-Ascend: the expert map of ``eplb_config.expert_map_path`` (``vllm_ascend/eplb/core/eplb_utils.py``).

Layers are read by position in ``layer_list``; all devices hold the same number of experts and none of them
twice (a device indexes its experts by id).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeplan.artifacts.plan import Plan
from moeplan.errors import PlanError
from moeplan.exports.base import (
    ExportContext,
    ImportContext,
    ImportedPlacement,
    duplicate_refusals,
    expert_map,
    moe_rows,
    moe_rows_refusals,
    require_expressible,
    uniform_refusals,
)
from moeplan.files import write_text

__all__ = ["exporter"]


class VllmAscendExporter:
    """``layer_list[i].device_list[r].device_expert``."""

    name = "vllm-ascend"
    description = "vLLM-Ascend expert_map_path JSON"
    variants: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".json",)
    options = frozenset({"model"})

    def refusals(self, plan: Plan, context: ExportContext) -> list[str]:
        """Equal, full slots, even shares, no expert twice on a device, every MoE layer."""
        return uniform_refusals(plan) + duplicate_refusals(plan) + moe_rows_refusals(plan, context)

    def export(self, plan: Plan, out: Path, context: ExportContext) -> list[Path]:
        """Write the JSON.

        Raises:
            ExportError: the plan cannot be expressed.
        """
        require_expressible(self.name, self.refusals(plan, context))
        width = len(plan.rank_of_slot) // plan.num_ranks
        layers = [
            {
                "layer_id": position,
                "device_count": plan.num_ranks,
                "device_list": [
                    {"device_id": rank, "device_expert": list(row[rank * width : (rank + 1) * width])}
                    for rank in range(plan.num_ranks)
                ],
            }
            for position, row in enumerate(plan.physical_to_logical_map)
        ]
        write_text(out, json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n")
        return [out]

    def recognises(self, document: Any) -> bool:
        """The two top keys."""
        return isinstance(document, dict) and {"moe_layer_count", "layer_list"} <= set(document)

    def load(self, document: Any, where: str, context: ImportContext) -> ImportedPlacement:
        """One row per MoE layer, by position.

        Raises:
            PlanError: not this format, or not this model's layers, ranks or width.
        """
        if not self.recognises(document):
            raise PlanError(
                f"{where} is not a vLLM-Ascend expert map; it needs moe_layer_count and layer_list"
            )
        try:
            layers = document["layer_list"]
            count = document["moe_layer_count"]
            rows = [[device["device_expert"] for device in layer["device_list"]] for layer in layers]
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"{where} is not a complete vLLM-Ascend expert map: {error!r} in layer_list"
            ) from error
        if count != len(rows):
            raise PlanError(
                f"{where}: moe_layer_count ({count!r}) is not the length of layer_list ({len(rows)})"
            )
        for position, devices in enumerate(rows):
            if len(devices) != context.num_ranks:
                raise PlanError(
                    f"{where}: layer_list[{position}] has {len(devices)} devices but num_ranks is {context.num_ranks};"
                    " give the --ranks the file was made for"
                )
            if not all(isinstance(experts, list) and len(experts) == len(devices[0]) for experts in devices):
                raise PlanError(
                    f"{where}: layer_list[{position}] must give every device the same number of experts"
                )
        flat = [[expert for experts in devices for expert in experts] for devices in rows]
        return moe_rows(expert_map(flat, f"{where}: layer_list", context.model.num_experts), where, context)


exporter = VllmAscendExporter()
