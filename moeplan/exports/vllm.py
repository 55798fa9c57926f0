"""vLLM has no static map in its main branch; these are the forms in circulation, and a policy module for
today.

- ``policy``: a Python module with an ``AbstractEplbPolicy`` that always answers the plan.
- ``offline``: JSON version 2, ``vllm_offline_eplb_physical_to_logical_by_model`` (out-of-tree plug-ins;
  version 1 is read too), one map per model class.
- ``rank-map``: ``{"expert_to_ep_rank": [...]}``: one map for all layers, no copies, no order in a rank.
- ``expert-map``: torch file [layers, ranks, experts]: the expert's place inside the rank, -1 where it is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.plan import Plan
from moeplan.errors import ExportError, PlanError, UnknownNameError
from moeplan.exports.base import (
    ExportContext,
    ImportContext,
    ImportedPlacement,
    duplicate_refusals,
    expert_map,
    moe_rows,
    moe_rows_refusals,
    replica_refusals,
    require_expressible,
    uniform_refusals,
)
from moeplan.exports.documents import write_torch
from moeplan.exports.vllm_policy import MAP_NAME, policy_module
from moeplan.files import write_text

__all__ = ["exporter"]

_V1 = "vllm_offline_eplb_physical_to_logical"
_V2 = "vllm_offline_eplb_physical_to_logical_by_model"
# 'architectures' in the models' published config.json, by the start of the built-in name.
_CLASSES = {
    "mixtral-": "MixtralForCausalLM",
    "deepseek-moe-": "DeepseekForCausalLM",
    "deepseek-v2": "DeepseekV2ForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "deepseek-v3.2": "DeepseekV32ForCausalLM",
    "qwen1.5-moe-": "Qwen2MoeForCausalLM",
    "qwen2-57b-": "Qwen2MoeForCausalLM",
    "qwen3-": "Qwen3MoeForCausalLM",
    "qwen3-next-": "Qwen3NextForCausalLM",
    "gpt-oss-": "GptOssForCausalLM",
    "olmoe-": "OlmoeForCausalLM",
    "kimi-k2": "DeepseekV3ForCausalLM",
    "glm-4.5": "Glm4MoeForCausalLM",
    "phi-3.5-moe": "PhiMoEForCausalLM",
    "dbrx": "DbrxForCausalLM",
    "jamba-": "JambaForCausalLM",
    "minimax-m2": "MiniMaxM2ForCausalLM",
    "powermoe-": "GraniteMoeForCausalLM",
}
_BY_SUFFIX = {".json": "offline", ".pth": "expert-map", ".pt": "expert-map"}


class VllmExporter:
    """One exporter, four variants.

    Without ``variant`` the suffix of ``out`` chooses: ``.json`` offline, ``.pt`` and ``.pth`` expert-map, any
    other policy.
    """

    name = "vllm"
    description = "vLLM: EPLB policy module, offline EPLB JSON, expert_to_ep_rank JSON, expert map .pth"
    variants: tuple[str, ...] = ("policy", "offline", "rank-map", "expert-map")
    suffixes: tuple[str, ...] = (".py", ".json", ".pth")
    options = frozenset({"model", "variant", "model_class"})

    def refusals(self, plan: Plan, context: ExportContext) -> list[str]:
        """Equal, full slots, even shares, every MoE layer; ``rank-map``: also one map, no copies."""
        reasons = uniform_refusals(plan) + moe_rows_refusals(plan, context)
        if context.variant == "rank-map":
            reasons += replica_refusals(plan)
            ranks_LE = _rank_map(plan)
            if not reasons and (ranks_LE != ranks_LE[0]).any():
                reasons.append(
                    "layers place experts on different ranks; expert_to_ep_rank is one map for all layers"
                )
        if context.variant == "expert-map":
            reasons += duplicate_refusals(plan)
        return reasons

    def export(self, plan: Plan, out: Path, context: ExportContext) -> list[Path]:
        """Write the chosen variant.

        Raises:
            ExportError: the plan cannot be expressed, or ``offline`` without a known model class.
            UnknownNameError: no such variant.
        """
        variant = context.variant or _BY_SUFFIX.get(out.suffix, "policy")
        if variant not in self.variants:
            raise UnknownNameError("vllm variant", variant, self.variants)
        require_expressible(
            f"vllm ({variant})", self.refusals(plan, ExportContext(model=context.model, variant=variant))
        )
        if variant == "policy":
            write_text(out, policy_module(plan))
        elif variant == "offline":
            write_text(out, json.dumps(_offline(plan, context.model_class)) + "\n")
        elif variant == "rank-map":
            write_text(out, json.dumps({"expert_to_ep_rank": _rank_map(plan)[0].tolist()}) + "\n")
        else:
            write_torch(out, _expert_places(plan))
        return [out]

    def recognises(self, document: Any) -> bool:
        """By the format string, the one key, our constant's name, or a 3-D array."""
        if isinstance(document, dict):
            constants = document.get("python")
            if isinstance(constants, dict):
                return MAP_NAME in constants
            return str(document.get("format")) in (_V1, _V2) or "expert_to_ep_rank" in document
        return isinstance(document, np.ndarray) and document.ndim == 3

    def load(self, document: Any, where: str, context: ImportContext) -> ImportedPlacement:
        """Any of the variants.

        Raises:
            PlanError: not one of them, or not this model's layers, ranks or width.
        """
        experts = context.model.num_experts
        if not self.recognises(document):
            raise PlanError(f"{where} is none of the vLLM forms: {', '.join(self.variants)}")
        if isinstance(document, np.ndarray):
            return moe_rows(_from_expert_map(document, where, context), where, context)
        if "python" in document:
            return moe_rows(
                expert_map(document["python"][MAP_NAME], f"{where}: {MAP_NAME}", experts), where, context
            )
        if "expert_to_ep_rank" in document:
            row = _from_rank_map(document["expert_to_ep_rank"], f"{where}: expert_to_ep_rank", context)
            return moe_rows(np.tile(row, (context.model.num_moe_layers, 1)), where, context)
        record = document
        if document["format"] == _V2:
            maps = document.get("model_maps")
            if not isinstance(maps, dict) or len(maps) != 1:
                found = f"{len(maps)} models" if isinstance(maps, dict) else "none"
                raise PlanError(
                    f"{where}: model_maps holds {found}; keep the one to import (draft models have their own)"
                )
            record = next(iter(maps.values()))
        if not isinstance(record, dict) or "physical_to_logical_map" not in record:
            raise PlanError(f"{where} has no physical_to_logical_map")
        map_LP = expert_map(record["physical_to_logical_map"], f"{where}: physical_to_logical_map", experts)
        for name, is_ in (
            ("num_moe_layers", len(map_LP)),
            ("num_logical_experts", experts),
            ("num_physical_experts", map_LP.shape[1]),
        ):
            if (said := record.get(name)) is not None and said != is_:
                raise PlanError(f"{where}: {name} ({said!r}) is not {is_}; is it a file of another model?")
        return moe_rows(map_LP, where, context)


def _rank_map(plan: Plan) -> NDArray[np.int64]:
    """Rank of each expert [L, E]; of the last copy, where there are several."""
    ranks_LE = np.zeros((len(plan.layer_ids), plan.num_experts), dtype=np.int64)
    for ranks_E, row in zip(ranks_LE, plan.physical_to_logical_map, strict=True):
        ranks_E[np.asarray(row)] = plan.rank_of_slot
    return ranks_LE


def _from_rank_map(value: Any, where: str, context: ImportContext) -> NDArray[np.int32]:
    """Experts by rank, rising inside a rank."""
    experts, ranks = context.model.num_experts, context.num_ranks
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < ranks for item in value):
        raise PlanError(
            f"{where} must list a rank (0..{ranks - 1}) for each expert; give the --ranks it was made for"
        )
    if len(value) != experts:
        raise PlanError(f"{where} has {len(value)} entries but {context.model.name} has {experts} experts")
    sizes = np.bincount(value, minlength=ranks)
    if sizes.min() != sizes.max():
        raise PlanError(
            f"{where} gives ranks {sizes.min()} to {sizes.max()} experts; all must get the same number"
        )
    return np.argsort(value, kind="stable").astype(np.int32)


def _offline(plan: Plan, model_class: str | None) -> dict[str, Any]:
    if model_class is None:
        starts = [start for start in _CLASSES if plan.model.lower().startswith(start)]
        model_class = _CLASSES[max(starts, key=len)] if starts else None
    if model_class is None:
        raise ExportError(
            "vllm (offline) files a map under the model's class; give it as --model-class, e.g. DeepseekV2ForCausalLM"
            " ('architectures' in the model's config.json)"
        )
    slots = len(plan.rank_of_slot)
    record = {
        "record_kind": "proposal",
        "model_name": plan.model,
        "model_class": model_class,
        "num_moe_layers": len(plan.layer_ids),
        "num_logical_experts": plan.num_experts,
        "num_physical_experts": slots,
        "num_redundant_experts": slots - plan.num_experts,
        "physical_to_logical_map": [list(row) for row in plan.physical_to_logical_map],
    }
    return {"version": 2, "format": _V2, "model_maps": {model_class: record}}


def _expert_places(plan: Plan) -> NDArray[np.int64]:
    width = len(plan.rank_of_slot) // plan.num_ranks
    places_LRE = np.full((len(plan.layer_ids), plan.num_ranks, plan.num_experts), -1, dtype=np.int64)
    slots = np.arange(len(plan.rank_of_slot))
    for layer, row in enumerate(plan.physical_to_logical_map):
        places_LRE[layer, slots // width, np.asarray(row)] = slots % width
    return places_LRE


def _from_expert_map(places_LRE: NDArray[Any], where: str, context: ImportContext) -> NDArray[np.int32]:
    layers, ranks, experts = places_LRE.shape
    if (ranks, experts) != (context.num_ranks, context.model.num_experts) or places_LRE.dtype.kind != "i":
        raise PlanError(
            f"{where} is [layers, ranks, experts] {places_LRE.shape} of {places_LRE.dtype}; expected integers for"
            f" {context.num_ranks} ranks and {context.model.num_experts} experts"
        )
    width = int(places_LRE.max()) + 1
    held = (places_LRE >= 0).sum(axis=2)
    if width == 0 or (held != width).any():
        raise PlanError(
            f"{where}: ranks hold {held.min()} to {held.max()} experts; all must hold the same number"
        )
    layer, rank, expert = np.nonzero(places_LRE >= 0)
    map_LRS = np.full((layers, ranks, width), -1, dtype=np.int32)
    map_LRS[layer, rank, places_LRE[layer, rank, expert]] = expert
    if (map_LRS < 0).any():
        raise PlanError(
            f"{where}: two experts share a place inside a rank; places must be 0..{width - 1}, each once"
        )
    return map_LRS.reshape(layers, ranks * width)


exporter = VllmExporter()
