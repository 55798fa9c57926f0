"""What a trace reader is, and what readers share. ``T`` tokens, ``L`` layers, ``K`` top-k, ``E`` experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import TraceError
from moeplan.routing.loads import pick_tokens

__all__ = [
    "MAX_EXPERTS",
    "ReadOptions",
    "TraceReader",
    "compact_ids",
    "count_experts",
    "drop_padding",
    "input_files",
    "is_glob",
]

MAX_EXPERTS = 2**16
"""More experts in a layer than any model has: a damaged id must not decide how much memory counts take."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a caller knows or wants that a file may not say.

    ``domain`` picks one of a file's domains (all are joined otherwise). ``num_experts`` is the model's
    ``E``: used where the file is silent, compared where it is not.
    """

    domain: str | None = None
    num_experts: int | None = None


@runtime_checkable
class TraceReader(Protocol):
    """A reader plugin (entry-point group ``moeplan.trace_readers``).

    ``has_domains`` says whether ``options.domain`` means anything to this format.
    """

    name: str
    description: str
    has_domains: bool

    def sniff(self, path: Path) -> bool:
        """Whether ``path`` looks like this format; looks at names and first bytes only and never raises."""
        ...

    def read(self, path: Path, options: ReadOptions) -> RoutingTrace | ExpertLoad:
        """Read ``path``.

        Raises:
            TraceError: the content is not a usable trace; one message with file, place and remedy.
        """
        ...


def is_glob(path: Path) -> bool:
    """Whether the last part of ``path`` is a pattern (``rank*.jsonl``) rather than a name."""
    return any(mark in path.name for mark in "*?[") and not path.exists()


def input_files(path: Path, *suffixes: str) -> list[Path]:
    """The files behind a file, a directory or a glob: those with one of ``suffixes``, in natural order.

    Natural order counts: ``rank10`` comes after ``rank9``.

    Raises:
        TraceError: there is none.
    """
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix in suffixes and p.is_file()]
    elif is_glob(path):
        found = [p for p in path.parent.glob(path.name) if p.suffix in suffixes and p.is_file()]
    else:
        return [path]
    if not found:
        raise TraceError(f"{path} holds no {' or '.join(suffixes)} file; name the recorder's directory")
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts: list[tuple[int, str]] = []
    digits = ""
    for char in path.name + "\0":
        if char.isascii() and char.isdigit():
            digits += char
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, char))
    return parts


def count_experts(where: str, stated: int | None, options: ReadOptions, highest_id: int) -> tuple[int, dict[str, Any]]:
    """``E`` and a note of where it came from: the file, else the caller, else the highest id seen plus one.

    Raises:
        TraceError: file and caller disagree (a trace of another model), or there cannot be so many.
    """
    if stated is not None and options.num_experts not in (None, stated):
        raise TraceError(
            f"{where}: num_experts ({stated}) differs from the model's ({options.num_experts});"
            " this is a trace of another model"
        )
    if stated is not None:
        number, note = stated, {}
    elif options.num_experts is not None:
        number, note = options.num_experts, {"num_experts_from": "caller"}
    else:
        number, note = highest_id + 1, {"num_experts_from": "highest id"}
    if not 1 <= number <= MAX_EXPERTS:
        raise TraceError(f"{where}: num_experts ({number}) must lie within 1..{MAX_EXPERTS}; is the file damaged?")
    return number, note


def compact_ids(experts: NDArray[Any], num_experts: int, where: str = "trace") -> NDArray[Any]:
    """Expert ids in the smallest integer type that holds them, ``-1`` included where it occurs.

    Raises:
        TraceError: an id is below -1 or not below ``num_experts``; the message gives its place.
    """
    if experts.size == 0:
        raise TraceError(f"{where}: experts has shape {experts.shape}; there is nothing in it")
    low, high = int(experts.min()), int(experts.max())
    if low < -1 or high >= num_experts:
        bad = low if low < -1 else high
        place = tuple(int(i[0]) for i in np.nonzero(experts == bad))
        raise TraceError(
            f"{where}: expert id {bad} at [token, layer, k] {list(place)} is outside 0..{num_experts - 1};"
            " check num_experts, or that the trace is of this model"
        )
    if low >= 0:
        kinds: tuple[Any, ...] = (np.uint8, np.uint16, np.uint32)
    else:
        kinds = (np.int8, np.int16, np.int32)
    kind = next((k for k in kinds if high <= np.iinfo(k).max), np.int64)
    return experts.astype(kind, copy=False)


def drop_padding(trace: RoutingTrace) -> RoutingTrace:
    """Without the layers, top-k columns and tokens that hold only ``-1``; every dropped ``-1`` is counted.

    A ``-1`` beside real ids of the same token stays in place (and is counted): statistics skip it.

    Raises:
        TraceError: nothing but padding.
    """
    if int(trace.experts_TLK.min()) >= 0:
        return trace
    tokens, layers, top_k = trace.experts_TLK.shape
    keep_T, keep_L, keep_K = (np.zeros(length, bool) for length in (tokens, layers, top_k))
    dropped = 0
    for layer in range(layers):  # one after the other: masks of all would be as large as the trace
        real_TK = trace.experts_TLK[:, layer] >= 0
        keep_T |= real_TK.any(axis=1)
        keep_K |= real_TK.any(axis=0)
        keep_L[layer] = real_TK.any()
        dropped += real_TK.size - int(real_TK.sum())
    if not keep_T.any():
        raise TraceError("the trace holds nothing but padding (-1); did the recorder run during requests?")

    part = trace if keep_T.all() else pick_tokens(trace, keep_T)
    kept = (part.experts_TLK[:, layer][:, keep_K] for layer in np.flatnonzero(keep_L))
    experts_TLK = np.stack([compact_ids(experts_TK, trace.num_experts) for experts_TK in kept], axis=1)
    scores_TLK = part.scores_TLK
    return replace(
        part,
        experts_TLK=compact_ids(experts_TLK, trace.num_experts),
        layer_ids=tuple(int(i) for i in np.array(trace.layer_ids)[keep_L]),
        scores_TLK=None if scores_TLK is None else scores_TLK[:, keep_L][:, :, keep_K],
        dropped_padding=trace.dropped_padding + dropped,
    )


def strict_int(where: str, name: str, value: Any, low: int = 0) -> int:
    """``value`` as an int not below ``low``.

    Raises:
        TraceError: another type or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise TraceError(f"{where}: {name} ({value!r:.80}) must be an integer of at least {low}")
    return value


def strict_get(where: str, record: Mapping[str, Any], name: str) -> Any:
    """``record[name]``.

    Raises:
        TraceError: the key is missing.
    """
    if name not in record:
        raise TraceError(f"{where}: key '{name}' is missing; it has {sorted(map(str, record))[:12]}")
    return record[name]
