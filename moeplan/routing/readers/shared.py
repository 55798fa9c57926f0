"""Small tools of several readers: JSON lines, torch files and counts, all checked and bounded."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.errors import MissingExtraError, TraceError
from moeplan.files import read_lines
from moeplan.routing.arrays import MAX_ARRAY_BYTES
from moeplan.routing.readers.base import ReadOptions, count_experts

__all__ = [
    "MAX_WINDOWS",
    "first_json_line",
    "json_lines",
    "load_torch",
    "numbers",
    "recorded_load",
    "tensor_array",
]

MAX_WINDOWS = 64
"""Recorders write one count per step; more steps than this are added up into this many stretches."""


def numbers(where: str, value: Any, ndim: int, *, integer: bool = True) -> NDArray[Any]:
    """Nested lists as an array with ``ndim`` axes.

    Raises:
        TraceError: ragged, not numbers, or not integers where ``integer``.
    """
    what = "integers" if integer else "numbers"
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise TraceError(f"{where} is ragged (rows of different length); every row must be as long") from error
    if array.ndim != ndim or array.size == 0:
        raise TraceError(f"{where} has shape {array.shape}; it must have {ndim} axes and not be empty")
    if array.dtype.kind not in ("iu" if integer else "iuf"):
        raise TraceError(f"{where} holds {array.dtype}; it must hold {what}")
    return array


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(file line N, object)`` for each line that is not blank.

    Raises:
        TraceError: a line that is not one JSON object.
        InputError: unreadable, or a line over the limit.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{where} is not a JSON object; is the file cut off?") from error
        if not isinstance(value, dict):
            raise TraceError(f"{where} is not a JSON object but a {type(value).__name__}")
        yield where, value


def first_json_line(path: Path) -> dict[str, Any]:
    """The first line as a JSON object; empty where it is not one (for sniffing, never raises)."""
    try:
        with path.open("rb") as stream:
            value = json.loads(stream.readline(1 << 22))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def load_torch(path: Path) -> Any:
    """A ``.pt`` file, tensors and plain containers only (``weights_only``): code in it is refused, not run.

    Raises:
        MissingExtraError: torch is not installed.
        TraceError: unreadable, damaged, or more than tensors and containers.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(f"reading {path.name}", "torch") from error
    try:
        # Mapped, not copied: a recording is many times as large as the ids that are kept of it. Old files cannot be.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises a dozen kinds for damaged and for refused files
        raise TraceError(
            f"{path} is damaged or holds more than tensors and containers; nothing in it was run. Save it again with"
            " torch.save, as tensors alone"
        ) from error


def tensor_array(where: str, value: Any, ndim: int | None = None) -> NDArray[Any]:
    """A torch tensor (or nested lists) as a numpy array.

    Raises:
        TraceError: neither, too large when laid out, or not ``ndim`` axes.
    """
    if isinstance(value, list | tuple):
        return numbers(where, value, ndim or np.ndim(value), integer=False)
    if not (hasattr(value, "numel") and hasattr(value, "detach")):
        raise TraceError(f"{where} is a {type(value).__name__}; it must be a tensor")
    if value.numel() * value.element_size() > MAX_ARRAY_BYTES:
        raise TraceError(f"{where} has {value.numel()} elements, more than {MAX_ARRAY_BYTES} bytes")
    if value.is_sparse or value.is_quantized or value.is_complex():
        raise TraceError(f"{where} is sparse, quantised or complex; it must be a plain tensor")
    if value.is_floating_point():
        value = value.double()
    array: NDArray[Any] = value.detach().contiguous().numpy()
    if ndim is not None and array.ndim != ndim:
        raise TraceError(f"{where} has shape {array.shape}; it must have {ndim} axes")
    return array


def recorded_load(
    where: str,
    counts_WLE: NDArray[Any],
    options: ReadOptions,
    *,
    window: str,
    layer_ids: Sequence[int] | None = None,
    source_SLE: NDArray[Any] | None = None,
    top_k: int | None = None,
) -> ExpertLoad:
    """A recorder's counts as a load: dense layers and steps without a token (all zero: idle passes, the unused part
    of a ring buffer) dropped, many steps folded into few windows.

    Raises:
        TraceError: all zero, or the number of experts is another model's.
    """
    if counts_WLE.ndim != 3 or 0 in counts_WLE.shape:
        raise TraceError(f"{where} has shape {counts_WLE.shape}; it must be [steps, layers, experts] and not empty")
    count_experts(where, int(counts_WLE.shape[2]), options, 0)
    ids = np.arange(counts_WLE.shape[1]) if layer_ids is None else np.array(layer_ids)
    used_L = (counts_WLE != 0).any(axis=(0, 2))
    if not used_L.any():
        raise TraceError(f"{where} counts no tokens at all; did the recorder run while requests were served?")
    used_W = np.flatnonzero((counts_WLE != 0).any(axis=(1, 2)))
    counts_WLE = counts_WLE[used_W][:, used_L]
    steps = len(counts_WLE)
    starts = np.unique(np.arange(min(steps, MAX_WINDOWS)) * steps // min(steps, MAX_WINDOWS))
    ends = [*starts[1:], steps]
    spans = ((used_W[a], used_W[b - 1]) for a, b in zip(starts, ends, strict=True))
    names = (f"{window} {a}" if a == b else f"{window}s {a}-{b}" for a, b in spans)
    return ExpertLoad(
        load_WLE=np.add.reduceat(counts_WLE.astype(np.float64), starts, axis=0),
        windows=tuple(names),
        layer_ids=tuple(int(i) for i in ids[used_L]),
        top_k=top_k,
        source_SLE=None if source_SLE is None else source_SLE[:, used_L].astype(np.float64),
        origin={"dropped_layers": [int(i) for i in ids[~used_L]]},
    )
