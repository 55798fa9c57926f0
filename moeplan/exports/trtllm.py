"""TensorRT-LLM: ``moe_load_balancer.yaml`` (``MoeLoadBalancerConfig``, a strict model: only its own keys).

Layer ids are absolute; rank r owns slots ``r * num_slots / ep_size`` onwards; ``layer_updates_per_iter: 0``
keeps the placement fixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeplan.artifacts.plan import Plan
from moeplan.errors import PlanError
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

_KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}


class TrtllmExporter:
    """``initial_global_assignments: {layer: [expert per slot]}`` and two counts."""

    name = "trtllm"
    description = "TensorRT-LLM moe_load_balancer.yaml (static)"
    variants: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".yaml",)
    options: frozenset[str] = frozenset()

    def refusals(self, plan: Plan, context: ExportContext) -> list[str]:
        """Equal, full slots and even shares only."""
        return uniform_refusals(plan)

    def export(self, plan: Plan, out: Path, context: ExportContext) -> list[Path]:
        """Write the YAML.

        Raises:
            ExportError: the plan cannot be expressed.
        """
        require_expressible(self.name, self.refusals(plan, context))
        lines = [f"num_slots: {len(plan.rank_of_slot)}", "initial_global_assignments:"]
        for layer, row in zip(plan.layer_ids, plan.physical_to_logical_map, strict=True):
            lines.append(f"  {layer}: [{', '.join(map(str, row))}]")
        lines.append("layer_updates_per_iter: 0")
        write_text(out, "\n".join(lines) + "\n")
        return [out]

    def recognises(self, document: Any) -> bool:
        """The assignments key and no foreign one."""
        return (
            isinstance(document, dict) and "initial_global_assignments" in document and set(document) <= _KEYS
        )

    def load(self, document: Any, where: str, context: ImportContext) -> ImportedPlacement:
        """The assigned layers, by absolute id.

        Raises:
            PlanError: not this format, or not this model's layers or width.
        """
        if not self.recognises(document):
            raise PlanError(
                f"{where} is not a TensorRT-LLM load balancer file; its keys are {', '.join(sorted(_KEYS))}"
            )
        assignments = document["initial_global_assignments"]
        if (
            not isinstance(assignments, dict)
            or not assignments
            or not all(type(key) is int for key in assignments)
        ):
            raise PlanError(f"{where}: initial_global_assignments must map layer ids to lists of expert ids")
        layer_ids = tuple(sorted(assignments))
        rows = [assignments[layer] for layer in layer_ids]
        map_LP = expert_map(rows, f"{where}: initial_global_assignments", context.model.num_experts)
        if (slots := document.get("num_slots")) != map_LP.shape[1]:
            raise PlanError(
                f"{where}: num_slots ({slots!r}) is not the length of the assignments ({map_LP.shape[1]})"
            )
        return placement_of(map_LP, where, context, layer_ids)


exporter = TrtllmExporter()
