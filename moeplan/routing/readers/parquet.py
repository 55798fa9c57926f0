"""The large form: Parquet, one row per token, read in batches.

Column ``experts`` is a fixed-size list of ``layers * k`` integers, layer by layer; so a batch of rows is
one flat arrow buffer that numpy sees without copying, and no Python object is made per token. Optional
columns: ``scores`` (fixed-size list of float32, same length), ``sequence`` (int64, not falling),
``phase`` (uint8, 0 prefill 1 decode), ``source_rank`` (int32), ``domain`` (int32). The schema's metadata
key ``moeplan.trace`` holds JSON: ``version``, ``layer_ids``, ``top_k``, ``num_experts``, ``domains``,
``dropped_padding``, ``origin``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import TraceError
from moeplan.files import atomic_path
from moeplan.routing.arrays import MAX_ARRAY_BYTES
from moeplan.routing.joining import join_traces
from moeplan.routing.loads import pick_tokens
from moeplan.routing.readers.base import ReadOptions, compact_ids, count_experts

__all__ = ["ParquetReader", "reader", "save_parquet"]

BATCH_TOKENS = 65_536
_KEY = b"moeplan.trace"
_PER_TOKEN = {"phase": pa.uint8(), "source_rank": pa.int32(), "domain": pa.int32()}


@contextmanager
def _as_trace_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise TraceError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0][:200]}") from error


@dataclass(frozen=True, slots=True)
class _Header:
    layer_ids: tuple[int, ...]
    top_k: int
    num_experts: int
    domains: tuple[str, ...]
    dropped_padding: int
    origin: dict[str, Any]


def _header(path: Path, schema: Any, options: ReadOptions) -> _Header:
    text = (schema.metadata or {}).get(_KEY)
    if text is None:
        raise TraceError(f"{path} has no 'moeplan.trace' metadata; write it with 'moeplan trace convert'")
    try:
        raw = json.loads(text)
        header = _Header(
            layer_ids=tuple(int(i) for i in raw["layer_ids"]),
            top_k=int(raw["top_k"]),
            num_experts=int(raw["num_experts"]),
            domains=tuple(str(d) for d in raw["domains"]),
            dropped_padding=int(raw["dropped_padding"]),
            origin=dict(raw["origin"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TraceError(f"{path}: 'moeplan.trace' metadata is damaged ({error!r:.100})") from error
    count_experts(str(path), header.num_experts, options, 0)
    column = schema.field("experts").type if "experts" in schema.names else None
    width = len(header.layer_ids) * header.top_k
    if column is None or not pa.types.is_fixed_size_list(column) or column.list_size != width:
        raise TraceError(f"{path}: column 'experts' ({column}) must be a fixed-size list of layers * k ({width})")
    if not pa.types.is_integer(column.value_type):
        raise TraceError(f"{path}: column 'experts' holds {column.value_type}; it must hold integers")
    if options.domain is not None and options.domain not in header.domains:
        raise TraceError(f"{path} has no domain '{options.domain}'; it has {', '.join(header.domains) or 'none'}")
    return header


def _flat(path: Path, batch: Any, name: str) -> NDArray[Any] | None:
    """A column of a batch as a flat array over arrow's own memory."""
    if name not in batch.schema.names:
        return None
    column = batch.column(name)
    values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    if column.null_count or values.null_count:
        raise TraceError(f"{path}: column '{name}' has nulls; every token must have a value (-1 marks padding)")
    array: NDArray[Any] = values.to_numpy(zero_copy_only=True)
    return array


class ParquetReader:
    """Reads and streams the large form."""

    name = "parquet"
    description = "one row per token in a .parquet file, for traces of 10^8 selections"
    has_domains = True

    def sniff(self, path: Path) -> bool:
        """Whether ``path`` is called ``.parquet``."""
        return path.suffix == ".parquet" and path.is_file()

    def batches(self, path: Path, options: ReadOptions) -> Iterator[RoutingTrace]:
        """The trace in parts of at most 65,536 tokens; a sequence may be cut at the edge of a part.

        Raises:
            TraceError: damaged, of another layout, or ids out of range.
        """
        for trace, _ in self._parts(path, options):
            yield trace

    def read(self, path: Path, options: ReadOptions) -> RoutingTrace:
        """The whole trace in memory.

        Raises:
            TraceError: damaged, of another layout, empty, too large to hold, or ids out of range.
        """
        with _as_trace_error(path):
            file = pq.ParquetFile(path)
            header = _header(path, file.schema_arrow, options)
            size = file.metadata.num_rows * len(header.layer_ids) * header.top_k
        if size > MAX_ARRAY_BYTES:
            raise TraceError(f"{path} holds {size} selections, too many for memory; read its load in batches")
        parts = list(self._parts(path, options))
        if not parts:
            raise TraceError(f"{path} holds no tokens")
        trace = join_traces([part for part, _ in parts])
        seq_lens_S = None
        if all(sequence_T is not None for _, sequence_T in parts):
            sequence_T = np.concatenate([s for _, s in parts if s is not None])
            if (np.diff(sequence_T) < 0).any():
                raise TraceError(f"{path}: column 'sequence' falls; tokens of a sequence must stand together")
            seq_lens_S = np.diff(np.flatnonzero(np.diff(sequence_T, prepend=-1, append=2**62))).astype(np.int64)
        return replace(trace, seq_lens_S=seq_lens_S, dropped_padding=header.dropped_padding)

    def _parts(self, path: Path, options: ReadOptions) -> Iterator[tuple[RoutingTrace, NDArray[np.int64] | None]]:
        with _as_trace_error(path), pq.ParquetFile(path) as file:
            header = _header(path, file.schema_arrow, options)
            shape = (-1, len(header.layer_ids), header.top_k)
            known = [n for n in ("experts", "scores", "sequence", *_PER_TOKEN) if n in file.schema_arrow.names]
            for batch in file.iter_batches(BATCH_TOKENS, columns=known):
                columns = {name: _flat(path, batch, name) for name in known}
                experts, scores, sequence_T = (columns.get(n) for n in ("experts", "scores", "sequence"))
                if experts is None or experts.size == 0:
                    continue
                if sequence_T is not None and (sequence_T.dtype.kind not in "iu" or int(sequence_T.min()) < 0):
                    raise TraceError(f"{path}: column 'sequence' must hold integers from 0")
                if scores is not None and scores.size != experts.size:
                    raise TraceError(f"{path}: column 'scores' must be as long as 'experts'")
                for name, limit in (
                    ("phase", len(PHASES)),
                    ("domain", len(header.domains)),
                    ("source_rank", 2**31),
                ):
                    column = columns.get(name)
                    if column is not None and not (
                        column.dtype.kind in "iu" and 0 <= column.min() <= column.max() < limit
                    ):
                        raise TraceError(f"{path}: column '{name}' must hold integers from 0 to {limit - 1}")
                part = RoutingTrace(
                    experts_TLK=compact_ids(experts.reshape(shape), header.num_experts, str(path)),
                    num_experts=header.num_experts,
                    layer_ids=header.layer_ids,
                    scores_TLK=None if scores is None else scores.reshape(shape),
                    phase_T=columns.get("phase"),
                    source_rank_T=columns.get("source_rank"),
                    domain_T=columns.get("domain"),
                    domains=header.domains if "domain" in columns else (),
                    origin=header.origin,
                )
                if options.domain is not None and part.domain_T is not None:
                    keep_T = part.domain_T == header.domains.index(options.domain)
                    if not keep_T.any():
                        continue
                    part = pick_tokens(part, keep_T)
                    sequence_T = None if sequence_T is None else sequence_T[keep_T]
                yield part, sequence_T


def _list_column(array_TLK: NDArray[Any]) -> Any:
    width = array_TLK.shape[1] * array_TLK.shape[2]
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array_TLK).reshape(-1)), width)


def _metadata(trace: RoutingTrace) -> str:
    fields = {
        "version": 1,
        "layer_ids": trace.layer_ids,
        "top_k": trace.top_k,
        "num_experts": trace.num_experts,
        "domains": trace.domains,
        "dropped_padding": trace.dropped_padding,
        "origin": dict(trace.origin),
    }
    return json.dumps(fields, sort_keys=True)


def save_parquet(trace: RoutingTrace, path: Path) -> None:
    """Write a trace held in memory.

    Raises:
        InputError: ``path`` cannot be written.
    """
    sequence_T = None
    if trace.seq_lens_S is not None:
        sequence_T = np.repeat(np.arange(len(trace.seq_lens_S)), trace.seq_lens_S)

    def table(part: slice) -> Any:
        ids = trace.experts_TLK[part].astype(np.int16 if trace.num_experts < 2**15 else np.int32)
        columns = {"experts": _list_column(ids)}
        if trace.scores_TLK is not None:
            columns["scores"] = _list_column(trace.scores_TLK[part].astype(np.float32))
        if sequence_T is not None:
            columns["sequence"] = pa.array(sequence_T[part])
        for name, arrow_type in _PER_TOKEN.items():
            if (array_T := getattr(trace, f"{name}_T")) is not None:
                columns[name] = pa.array(array_T[part], type=arrow_type)
        return pa.table(columns).replace_schema_metadata({_KEY: _metadata(trace)})

    schema = table(slice(0)).schema
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for start in range(0, trace.num_tokens, BATCH_TOKENS):
            writer.write_table(table(slice(start, start + BATCH_TOKENS)))


reader = ParquetReader()
