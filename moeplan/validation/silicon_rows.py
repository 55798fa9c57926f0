"""The measured rows of ``silicon_sample.csv``: which count, which part each belongs to, and what it ran on.

Which rows count, in this order:

1. MoE models only; DeepSeek-V3, R1 and their variants are one model.
2. Rows equal in all columns but ``id`` and ``silicon_data_source`` are one.
3. Rows with impossible widths are set aside: a width missing or zero; ``tp x dp`` other than ``moe_tp x moe_ep``
   (a missing ``dp`` is what makes them equal); one server (``agg``) of more ranks than its node or NVLink rack
   has; ``tp`` that does not divide the attention heads, ``moe_tp`` the expert's width or ``moe_ep`` the experts;
   weights that exceed the memory of a worker's ranks together.

The split is by whole groups, ``model|system|backend`` (as in ``DeepSeek-V3|h200_sxm|trtllm``): MiniMax-M2.5,
Kimi-K2.5 and GLM-5 are part ``c``; of the others a group is in ``a`` if the last bit of the sha256 of that name
(UTF-8) is 0, in ``b`` if it is 1. Only ``a`` is used to choose constants.

What a row ran on: its recipe (``silicon_recipes``); without one the columns count.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moeplan.errors import InputError
from moeplan.specs.attention_layers import attention_layers
from moeplan.specs.clusters import find_accelerator
from moeplan.specs.model import DTYPE_BYTES, ModelSpec
from moeplan.specs.models import find_model
from moeplan.validation.silicon_recipes import (
    Launch,
    Recipe,
    choose_recipes,
    image_of,
    lane_of,
    late,
    measured_on,
    number,
    widths_of,
)

__all__ = ["FAMILIES", "Measured", "Workers", "distinct", "impossible", "part_of", "read_measured"]

Part = Literal["a", "b", "c"]

# model_path in the file -> (name of the model in the split, name in the registry, name in the recipes).
# Kimi-K2.5's text model has Kimi-K2's shapes (text_config of moonshotai/Kimi-K2.5).
FAMILIES: dict[str, tuple[str, str, str]] = {
    "deepseek-ai/DeepSeek-R1": ("DeepSeek-V3", "deepseek-v3", "dsr1"),
    "deepseek-ai/DeepSeek-V3": ("DeepSeek-V3", "deepseek-v3", "dsr1"),
    "nvidia/DeepSeek-R1-NVFP4": ("DeepSeek-V3", "deepseek-v3", "dsr1"),
    "nvidia/DeepSeek-V3.1-NVFP4": ("DeepSeek-V3", "deepseek-v3", "dsr1"),
    "openai/gpt-oss-120b": ("gpt-oss-120b", "gpt-oss-120b", "gptoss"),
    "Qwen/Qwen3.5-397B-A17B": ("Qwen3.5-397B-A17B", "qwen3.5-397b-a17b", "qwen3.5"),
    "Qwen/Qwen3-235B-A22B-FP8": ("Qwen3-235B-A22B", "qwen3-235b-a22b", ""),
    "MiniMaxAI/MiniMax-M2.5": ("MiniMax-M2.5", "minimax-m2", "minimaxm2.5"),
    "moonshotai/Kimi-K2.5": ("Kimi-K2.5", "kimi-k2", "kimik2.5"),
    "zhipuai/GLM-5": ("GLM-5", "glm-5", "glm5"),
}
_NEVER_TUNED = frozenset(["MiniMax-M2.5", "Kimi-K2.5", "GLM-5"])
_NODE = {"gb200": 72, "gb300": 72}  # ranks that one server can have; else 8
_VERSION = {"sglang": "sglangv", "trtllm": "release"}  # before its number in an image's name
_DRAFTS = 3  # where a recipe uses drafts and does not say how many; with data-parallel attention on TensorRT-LLM 1


@dataclass(frozen=True, slots=True)
class Workers:
    """Equal workers of one pool."""

    count: int
    tp: int
    dp: int
    ep: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One row. ``prefill`` is None for one server; ``why_not`` says why an impossible row is set aside; ``repeats``
    are the ids of rows equal to it; ``late``: on a release of about the tables' age; ``undrafted``: what it ran on
    if it was not the drafted recipe taken here, where both agree with its columns."""

    id: str
    repeats: tuple[str, ...]
    group: str
    part: Part
    registry_name: str
    system: str
    backend: str
    mode: str
    precision: str
    isl: int
    osl: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float
    decode: Workers
    prefill: Workers | None
    draft_tokens: int
    recipe: bool
    launch: Launch | None
    late: bool
    why_not: str
    undrafted: Measured | None = None


def part_of(model: str, group: str) -> Part:
    """``a`` calibrates, ``b`` is held out, ``c`` are the models that are never tuned on."""
    if model in _NEVER_TUNED:
        return "c"
    return "b" if hashlib.sha256(group.encode()).digest()[-1] & 1 else "a"


def distinct(rows: Iterable[Mapping[str, str]]) -> list[tuple[Mapping[str, str], tuple[str, ...]]]:
    """The first of rows that are equal in all columns but ``id`` and ``silicon_data_source``, and the others' ids."""
    seen: dict[tuple[tuple[str, str], ...], list[Mapping[str, str]]] = {}
    for row in rows:
        key = tuple((k, v) for k, v in row.items() if k not in ("id", "silicon_data_source"))
        seen.setdefault(key, []).append(row)
    return [(same[0], tuple(row["id"] for row in same[1:])) for same in seen.values()]


def impossible(row: Mapping[str, str], model: ModelSpec) -> str:
    """Why the widths of a row cannot be, or an empty string. See the module."""
    sides = [""] if row["mode"] == "agg" else ["prefill_", "decode_"]
    heads = attention_layers(model)[0].spec.num_heads
    for side in sides:
        tp, dp, moe_tp, ep = widths_of(row, side)
        if not tp or not dp or not moe_tp or not ep:
            return f"{side}width missing or zero"
        if tp * dp != moe_tp * ep:
            return f"{side}tp x dp ({tp} x {dp}) is not moe_tp x moe_ep ({moe_tp} x {ep})"
        if row["mode"] == "agg" and tp * dp > _NODE.get(row["system"], 8):
            return f"{tp * dp} ranks in a server of {_NODE.get(row['system'], 8)}"
        if heads % tp or model.expert_intermediate_size % moe_tp or model.num_experts % ep:
            return f"{side}widths ({tp}, {moe_tp}, {ep}) do not divide heads, expert width or experts"
        if not _fits(row, model, tp * dp):
            return f"{side}weights exceed the memory of {tp * dp} ranks"
    return ""


def _fits(row: Mapping[str, str], model: ModelSpec, ranks: int) -> bool:
    """Whether ``ranks`` together hold the weights, all in the row's precision."""
    return model.total_parameters * DTYPE_BYTES[_precision(row)] <= ranks * _memory(row["system"])


@cache
def _memory(system: str) -> float:
    return find_accelerator(system.replace("_", "-")).memory


_model = cache(find_model)


def _precision(row: Mapping[str, str]) -> str:
    return row["precision"] if row["precision"] not in ("", "nan") else "bf16"


# ---------------------------------------------------------------------- what it ran on


def _server(widths: tuple[int, ...], count: int = 1) -> Workers:
    ranks, ep, dp = widths
    return Workers(count, 1 if dp else ranks, ranks if dp else 1, ep)


def _from_columns(row: Mapping[str, str], side: str) -> Workers:
    tp, dp, _, ep = widths_of(row, side)
    return Workers(number(row, f"{side}num_workers") or 1, tp or 1, dp or 1, min(ep or 1, (tp or 1) * (dp or 1)))


def _measured(row: Mapping[str, str], repeats: tuple[str, ...], recipe: Recipe | None) -> Measured:
    family, registry_name, _ = FAMILIES[row["model_path"]]
    group = f"{family}|{row['system']}|{row['backend']}"
    prefill = None
    drafts = 0
    widths = () if recipe is None else (recipe.launch.widths if recipe.launch else None) or recipe.widths
    if recipe is None:
        decode = _from_columns(row, "" if row["mode"] == "agg" else "decode_")
        prefill = None if row["mode"] == "agg" else _from_columns(row, "prefill_")
    elif len(widths) == 3:
        decode = _server(widths)
    else:
        prefill = _server(widths[1:4], widths[0])
        decode = _server(widths[5:8], widths[4])
    if recipe is not None and recipe.draft_tokens:
        unsaid = 1 if row["backend"] == "trtllm" and decode.dp > 1 else _DRAFTS
        drafts = recipe.draft_tokens if recipe.draft_tokens > 0 else unsaid
    return Measured(
        id=row["id"],
        repeats=repeats,
        group=group,
        part=part_of(family, group),
        registry_name=registry_name,
        system=row["system"],
        backend=row["backend"],
        mode=row["mode"],
        precision=_precision(row),
        isl=int(row["isl"]),
        osl=int(row["osl"]),
        concurrency=lane_of(row),
        ttft_ms=float(row["silicon_ttft_ms"]),
        tpot_ms=float(row["silicon_tpot_ms"]),
        decode=decode,
        prefill=prefill,
        draft_tokens=drafts,
        recipe=recipe is not None,
        launch=recipe.launch if recipe else None,
        late=late(
            row["backend"],
            image_of(row) or (recipe.image if recipe else _VERSION.get(row["backend"], "") + row["backend_version"]),
        ),
        why_not=impossible(row, _model(registry_name)),
    )


def _inputs(row: Mapping[str, str]) -> tuple[Any, ...]:
    names = ("model_path", "system", "backend", "precision", "mode", "isl", "osl")
    return (*(row[name] for name in names), lane_of(row), widths_of(row, "")[3])


def read_measured(path: Path) -> list[Measured]:
    """The distinct rows of MoE models, impossible ones included with their reason.

    A row without a date takes that of a dated row with equal inputs, where there is one.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["model_path"] in FAMILIES]
    except (OSError, KeyError) as error:
        raise InputError(f"cannot read {path}: {error}; reinstall aiconfigurator-core") from error
    kept = distinct(rows)
    dates = {_inputs(row): on for row, _ in kept if (on := measured_on(row)) is not None}
    days = {row["id"]: measured_on(row) or dates.get(_inputs(row)) for row in rows}
    names = {path: name for path, (_, _, name) in FAMILIES.items()}
    recipes = choose_recipes(rows, names, days)
    answer = []
    for row, repeats in kept:
        recipe, plain = recipes[row["id"]]
        found = _measured(row, repeats, recipe)
        answer.append(replace(found, undrafted=_measured(row, repeats, plain)) if plain else found)
    return answer
