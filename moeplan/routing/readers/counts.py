"""Plain counts: [layers, experts] or [windows, layers, experts] as ``.npy``, ``.csv``, ``.json`` or ``.pt``.

``.csv``: one row per layer, one column per expert, a heading line allowed; a first column headed
``layer`` holds absolute layer numbers. ``.json``: the nested list itself, or an object with it under
``logical_count``, ``counts`` or ``load`` and optionally ``moe_layers``, ``windows`` and ``top_k``.
``.pt``: the tensor itself, or such an object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.errors import TraceError
from moeplan.files import read_json, read_lines
from moeplan.routing.arrays import npy_of_ids, read_npy
from moeplan.routing.readers.base import ReadOptions, count_experts, strict_int
from moeplan.routing.readers.shared import load_torch, numbers, tensor_array

__all__ = ["CountsReader", "reader"]

_KEYS = ("logical_count", "counts", "load")


class CountsReader:
    """Reads plain counts."""

    name = "counts"
    description = "[layers, experts] or [windows, layers, experts] counts (.npy .csv .json .pt)"
    has_domains = False

    def sniff(self, path: Path) -> bool:
        """Whether the suffix is one of counts and the content is not known to be another format's."""
        if not path.is_file() or path.suffix not in (".npy", ".csv", ".json", ".pt"):
            return False
        if path.suffix == ".npy":
            return not npy_of_ids(path)
        if path.suffix == ".pt":
            from moeplan.routing.readers.sglang import reader as sglang

            return not sglang.sniff(path)
        return True

    def read(self, path: Path, options: ReadOptions) -> ExpertLoad:
        """Read counts.

        Raises:
            TraceError: ragged, empty, NaN, negative, or not two or three axes.
        """
        document: Any
        if path.suffix == ".npy":
            document = read_npy(path)
        elif path.suffix == ".csv":
            document = _csv(path)
        elif path.suffix == ".json":
            document = read_json(path)
        else:
            document = load_torch(path)
        fields = document if isinstance(document, dict) else {"counts": document}
        present = [key for key in _KEYS if key in fields]
        if len(present) != 1:
            raise TraceError(
                f"{path} must have exactly one of {', '.join(_KEYS)}; it has {sorted(map(str, fields))[:12]}"
            )
        where = f"{path}: {present[0]}" if isinstance(document, dict) else str(path)
        value = fields[present[0]]
        if isinstance(value, np.ndarray):
            counts = value
        elif isinstance(value, list):
            counts = numbers(where, value, 3 if _depth(value) > 2 else 2, integer=False)
        else:
            counts = tensor_array(where, value)
        return _load(where, counts, fields, options)


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and value and depth < 4:
        depth, value = depth + 1, value[0]
    return depth


def _load(where: str, counts: NDArray[Any], fields: dict[str, Any], options: ReadOptions) -> ExpertLoad:
    if counts.dtype.kind not in "iuf":
        raise TraceError(f"{where} holds {counts.dtype}; it must hold numbers")
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or 0 in counts.shape:
        raise TraceError(
            f"{where} has shape {counts.shape}; counts are [layers, experts] or [windows, layers, experts]"
        )
    count_experts(where, int(counts.shape[2]), options, 0)
    windows = fields.get("windows", [f"window {i}" for i in range(len(counts))] if len(counts) > 1 else ["all"])
    layers = fields.get("moe_layers", list(range(counts.shape[1])))
    if not (isinstance(windows, list) and isinstance(layers, list)):
        raise TraceError(f"{where}: windows and moe_layers must be lists")
    top_k = fields.get("top_k")
    return ExpertLoad(
        load_WLE=counts.astype(np.float64),
        windows=tuple(str(name) for name in windows),
        layer_ids=tuple(strict_int(where, "moe_layers", i) for i in layers),
        top_k=None if top_k is None else strict_int(where, "top_k", top_k, 1),
    )


def _csv(path: Path) -> dict[str, Any]:
    rows: list[list[float]] = []
    heading: list[str] = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            words = [word.strip().strip('"') for word in line.decode("utf-8-sig").split(",")]
        except UnicodeDecodeError as error:
            raise TraceError(f"{path} line {number} is not UTF-8 text") from error
        if words == [""]:
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError as error:
            if rows or heading:
                raise TraceError(f"{path} line {number} is not a row of numbers: {','.join(words)[:60]!r}") from error
            heading = words
    table = numbers(str(path), rows, 2, integer=False)
    if heading[:1] != ["layer"]:
        return {"counts": table}
    if not (table[:, 0] == np.floor(table[:, 0])).all():
        raise TraceError(f"{path}: column 'layer' must hold whole numbers")
    return {"counts": table[:, 1:], "moe_layers": [int(i) for i in table[:, 0]]}


reader = CountsReader()
