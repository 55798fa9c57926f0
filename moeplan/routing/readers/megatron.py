"""Megatron-Core router traces (``--moe-routing-trace-path``): one ``router_trace_rank<r>.jsonl`` per rank.

Each line is one layer of one step: ``step``, ``stage``, ``block``, ``layer``, ``rank``, ``num_tokens``,
``topk``, ``top_indices`` [num_tokens][topk]. Several records of one (step, layer) are micro-batches, in
order. Blocks other than ``decoder`` (multi-token prediction) are other layers of another shape: left out
and counted in the origin. Layers are numbered within the pipeline stage. Layout as of Megatron-Core 0.19.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import TraceError
from moeplan.routing.readers.base import (
    ReadOptions,
    compact_ids,
    count_experts,
    drop_padding,
    input_files,
    is_glob,
    strict_get,
    strict_int,
)
from moeplan.routing.readers.shared import first_json_line, json_lines, numbers

__all__ = ["MegatronReader", "reader"]

_Batches = dict[tuple[int, int, int], dict[int, NDArray[Any]]]


class MegatronReader:
    """Reads router traces of Megatron-Core: one rank's file, their directory, or a pattern."""

    name = "megatron"
    description = "Megatron-Core router trace (router_trace_rank<r>.jsonl, a directory of them, or a pattern)"
    has_domains = False

    def sniff(self, path: Path) -> bool:
        """Whether the first JSONL line there has ``top_indices``."""
        try:
            files = input_files(path, ".jsonl") if path.is_dir() or is_glob(path) or path.suffix == ".jsonl" else []
        except (TraceError, OSError):
            return False
        return bool(files) and "top_indices" in first_json_line(files[0])

    def read(self, path: Path, options: ReadOptions) -> RoutingTrace:
        """Tokens rank by rank, step by step, with their source rank.

        Raises:
            TraceError: damaged, ragged, layers missing in a step, ranks with different layers, ids out of
            range.
        """
        batches: _Batches = {}
        other_blocks = 0
        for file in input_files(path, ".jsonl"):
            seen: dict[tuple[int, int, int], int] = {}
            where = ""
            for where, record in json_lines(file):
                if record.get("block", "decoder") != "decoder":
                    other_blocks += 1
                    continue
                rank, step, layer = (
                    strict_int(where, k, strict_get(where, record, k)) for k in ("rank", "step", "layer")
                )
                ids_TK = numbers(f"{where}: top_indices", strict_get(where, record, "top_indices"), 2)
                stated = (record.get("num_tokens", len(ids_TK)), record.get("topk", ids_TK.shape[1]))
                if stated != ids_TK.shape:
                    raise TraceError(f"{where}: top_indices has shape {ids_TK.shape}, num_tokens and topk say {stated}")
                microbatch = seen.get((rank, step, layer), 0)
                seen[rank, step, layer] = microbatch + 1
                layers = batches.setdefault((rank, step, microbatch), {})
                if layer in layers:
                    raise TraceError(f"{where}: rank {rank} step {step} is in two files; name one recording")
                high = int(ids_TK.max())
                layers[layer] = ids_TK.astype(np.int16 if high < 2**15 and int(ids_TK.min()) >= -1 else np.int64)
            if not where:
                raise TraceError(f"{file} is empty; its rank recorded nothing (leave it out if that is right)")
        if not batches:
            raise TraceError(f"{path} holds no records of the decoder; was tracing on?")
        return _assemble(path, batches, options, other_blocks)


def _assemble(path: Path, batches: _Batches, options: ReadOptions, other_blocks: int) -> RoutingTrace:
    first = next(iter(batches.values()))
    layer_ids = sorted({layer for layers in batches.values() for layer in layers})
    parts: list[NDArray[Any]] = []
    ranks: list[NDArray[np.int32]] = []
    top_k = next(iter(first.values())).shape[1]
    for (rank, step, microbatch), layers in sorted(batches.items()):
        place = f"{path}: rank {rank} step {step} micro-batch {microbatch}"
        if sorted(layers) != layer_ids:
            missing = sorted(set(layer_ids) - set(layers))[0]
            raise TraceError(
                f"{place} has no layer {missing}; the file is cut off, or ranks hold different layers"
                " (pipeline stages: read the files of each stage for themselves)"
            )
        shapes = {ids_TK.shape for ids_TK in layers.values()}
        if len(shapes) > 1 or next(iter(shapes))[1] != top_k:
            raise TraceError(f"{place}: layers differ in shape {sorted(shapes)}; each must be [tokens, {top_k}]")
        parts.append(np.stack([layers[layer] for layer in layer_ids], axis=1))
        ranks.append(np.full(len(parts[-1]), rank, np.int32))
    experts_TLK = np.concatenate(parts)
    num_experts, note = count_experts(str(path), None, options, int(experts_TLK.max()))
    trace = RoutingTrace(
        experts_TLK=compact_ids(experts_TLK, num_experts, str(path)),
        num_experts=num_experts,
        layer_ids=tuple(layer_ids),
        source_rank_T=np.concatenate(ranks),
        origin={**note, **({"left_out_mtp_records": other_blocks} if other_blocks else {})},
    )
    return drop_padding(trace)


reader = MegatronReader()
