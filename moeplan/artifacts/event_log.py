"""What happened when, simulated or measured: one columnar log for both. ``V`` events.

Because the simulator and the executor write the same log, "predicted against measured" is one function over two
logs of one type, and every picture of a run is drawn from it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeplan.errors import InputError
from moeplan.files import atomic_path

__all__ = ["EVENT_KINDS", "NONE", "EventLog", "EventRecorder"]

SCHEMA_VERSION = 1
NONE = -1  # a rank, layer, step or request that does not apply

EVENT_KINDS: dict[str, str] = {
    "step": "one step of the engine or of training; amount: tokens",
    "attention": "attention of a layer",
    "router": "choice of experts of a layer",
    "dispatch": "tokens to the ranks of their experts; amount: bytes sent",
    "experts": "expert FFN of a layer; amount: (token, expert) pairs",
    "shared": "shared expert of a layer",
    "combine": "tokens back from their experts; amount: bytes sent",
    "dense": "everything of a step that is no MoE layer: dense layers, embedding, head",
    "forward": "forward of one micro-batch on one pipeline stage",
    "backward": "backward of one micro-batch on one pipeline stage",
    "gradient_sync": "reduction of gradients; amount: bytes",
    "optimizer": "optimizer step",
    "transfer": "activations between pipeline stages, or KV cache from prefill to decode; amount: bytes",
    "arrival": "a request arrives; amount: prompt tokens",
    "admit": "a request enters the batch",
    "first_token": "the first token of a request is out",
    "finish": "the last token of a request is out; amount: generated tokens",
    "preempt": "a request loses its KV cache; amount: tokens to be computed again or brought back",
    "plan": "a planner works on a new placement",
    "migrate": "expert weights move; amount: bytes",
    "fault": "a rank or link fails, slows or comes back",
    "checkpoint": "state is saved; amount: bytes",
    "loss": "training loss after a step; amount: the loss",
}

_COLUMNS = {
    "start_s": np.float64,
    "duration_s": np.float64,
    "kind": np.uint8,
    "rank": np.int32,
    "layer": np.int32,
    "step": np.int64,
    "request": np.int64,
    "amount": np.float64,
}
_TYPECODE = {"f8": "d", "u1": "B", "i4": "i", "i8": "q"}
_NAMES = tuple(EVENT_KINDS)
_CODE = {name: code for code, name in enumerate(_NAMES)}


@dataclass(frozen=True, slots=True, eq=False)
class EventLog:
    """Columns of events, in the order they were recorded; see :data:`EVENT_KINDS` for kinds and amounts.

    ``start_s_V`` seconds since the run began; ``kind_V`` indexes ``EVENT_KINDS``; -1 in ``rank_V``, ``layer_V``,
    ``step_V``, ``request_V`` where none applies. ``origin`` holds what the run was made from: hashes, seed, versions.
    """

    source: Literal["simulated", "measured"]
    num_ranks: int
    num_nodes: int
    start_s_V: NDArray[np.float64]
    duration_s_V: NDArray[np.float64]
    kind_V: NDArray[np.uint8]
    rank_V: NDArray[np.int32]
    layer_V: NDArray[np.int32]
    step_V: NDArray[np.int64]
    request_V: NDArray[np.int64]
    amount_V: NDArray[np.float64]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.start_s_V)

    def of_kind(self, *kinds: str) -> NDArray[np.bool_]:
        """Mask ``[V]`` of the events of these kinds.

        Raises:
            InputError: a kind is unknown.
        """
        mask: NDArray[np.bool_] = np.isin(self.kind_V, [_code(kind) for kind in kinds])
        return mask

    def kind_names(self) -> list[str]:
        """Name of each event's kind."""
        return [_NAMES[code] for code in self.kind_V]

    def part_of_run(
        self,
        start_s: float,
        *,
        rank: int = 0,
        step: int = NONE,
        request: int = NONE,
        layers: Sequence[int] | None = None,
    ) -> EventLog:
        """The events of one step or operation, its step's own left out, as part of a longer run: begun at ``start_s``
        on ranks from ``rank`` on, of ``step`` and ``request``, layer ``l`` called ``layers[l]``."""
        mine = ~self.of_kind("step")
        layer_V, rank_V = self.layer_V[mine], self.rank_V[mine]
        if layers is not None:
            layer_V = np.append(np.array(layers, np.int32), np.int32(NONE))[layer_V]  # -1 takes the last: none
        return replace(
            self,
            start_s_V=self.start_s_V[mine] + start_s,
            duration_s_V=self.duration_s_V[mine],
            kind_V=self.kind_V[mine],
            rank_V=np.where(rank_V == NONE, NONE, rank_V + rank).astype(np.int32),
            layer_V=layer_V,
            step_V=np.full(len(layer_V), step, np.int64),
            request_V=np.full(len(layer_V), request, np.int64),
            amount_V=self.amount_V[mine],
        )

    def joined(self, other: EventLog) -> EventLog:
        """These events, and those of ``other`` after them."""
        names = [f"{name}_V" for name in _COLUMNS]
        both: dict[str, Any] = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names}
        return replace(self, **both)

    def write(self, path: Path) -> None:
        """Write as Parquet, whole or not at all; the same log gives the same bytes."""
        columns: dict[str, Any] = {name: getattr(self, f"{name}_V") for name in _COLUMNS if name != "kind"}
        columns["kind"] = pa.DictionaryArray.from_arrays(self.kind_V.astype(np.int8), list(_NAMES))
        head = {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "num_ranks": self.num_ranks,
            "num_nodes": self.num_nodes,
            "origin": dict(self.origin),
        }
        table = pa.table({name: columns[name] for name in _COLUMNS})
        table = table.replace_schema_metadata({"moeplan.event_log": json.dumps(head, sort_keys=True)})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> EventLog:
        """Read what :meth:`write` wrote.

        Raises:
            InputError: no such file, not an event log, or of another schema version.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read as an event log: {error}") from error
        head = json.loads((table.schema.metadata or {}).get(b"moeplan.event_log", b"null"))
        if head is None or not set(_COLUMNS) <= set(table.column_names):
            raise InputError(f"{path} is not an event log; moeplan simulate and moeplan live write them")
        if head["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"{path}: schema_version ({head['schema_version']}) is not {SCHEMA_VERSION};"
                " read it with the moeplan version that wrote it, or run again"
            )
        names = table.column("kind").to_pylist()
        unknown = sorted(set(names) - set(_CODE))
        if unknown:
            raise InputError(f"{path}: unknown event kind {unknown[0]!r}; known: {', '.join(_NAMES)}")
        columns = {
            f"{name}_V": table.column(name).to_numpy().astype(kind) for name, kind in _COLUMNS.items() if name != "kind"
        }
        columns["kind_V"] = np.array([_CODE[name] for name in names], np.uint8)
        return cls(head["source"], head["num_ranks"], head["num_nodes"], origin=head["origin"], **columns)


class EventRecorder:
    """Collects events and turns them into an :class:`EventLog`: 49 bytes and one append per column for each."""

    def __init__(self) -> None:
        self._columns: dict[str, array[Any]] = {
            name: array(_TYPECODE[np.dtype(kind).str[1:]]) for name, kind in _COLUMNS.items()
        }
        self._append = tuple(column.append for column in self._columns.values())

    def add(
        self,
        kind: str,
        start_s: float,
        duration_s: float = 0.0,
        *,
        rank: int = NONE,
        layer: int = NONE,
        step: int = NONE,
        request: int = NONE,
        amount: float = 0.0,
    ) -> None:
        """Record one event.

        Raises:
            InputError: the kind is unknown.
        """
        code = _code(kind)
        start_, duration_, kind_, rank_, layer_, step_, request_, amount_ = self._append
        start_(start_s)
        duration_(duration_s)
        kind_(code)
        rank_(rank)
        layer_(layer)
        step_(step)
        request_(request)
        amount_(amount)

    def extend(self, log: EventLog) -> None:
        """Record all events of ``log``."""
        for name, column in self._columns.items():
            column.frombytes(getattr(log, f"{name}_V").tobytes())

    def __len__(self) -> int:
        return len(self._columns["start_s"])

    def build(
        self,
        source: Literal["simulated", "measured"],
        num_ranks: int,
        num_nodes: int,
        origin: Mapping[str, Any] | None = None,
    ) -> EventLog:
        """The log of everything recorded so far, in the order recorded."""
        arrays = {f"{name}_V": np.array(self._columns[name], kind) for name, kind in _COLUMNS.items()}
        return EventLog(source, num_ranks, num_nodes, origin=dict(origin or {}), **arrays)


def _code(kind: str) -> int:
    try:
        return _CODE[kind]
    except KeyError:
        raise InputError(f"unknown event kind {kind!r}; known: {', '.join(_NAMES)}") from None
