"""simllm pre-play traces (schema ``simllm-preplay-trace-v2``): JSON lines with request ids and phases.

A ``header`` row gives ``expert_count``, ``top_k`` and ``moe_layer_indices``; each ``observed-dispatch``
row is one token: ``request_id``, ``phase``, ``token_index`` and ``routing`` [{``layer_index``,
``expert_ids``}]. A ``footer`` counts them. Other rows (requests, KV events) are not about routing.
Requests become sequences, in order of appearance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import TraceError
from moeplan.routing.readers.base import (
    ReadOptions,
    compact_ids,
    count_experts,
    drop_padding,
    strict_get,
    strict_int,
)
from moeplan.routing.readers.shared import first_json_line, json_lines, numbers

__all__ = ["SimllmReader", "reader"]

_SCHEMA = "simllm-preplay-trace-v2"


class SimllmReader:
    """Reads simllm JSONL traces."""

    name = "simllm"
    description = "simllm pre-play trace (.jsonl with request ids and prefill/decode phases)"
    has_domains = False

    def sniff(self, path: Path) -> bool:
        """Whether the first line names the schema."""
        return path.suffix == ".jsonl" and path.is_file() and first_json_line(path).get("schema") == _SCHEMA

    def read(self, path: Path, options: ReadOptions) -> RoutingTrace:
        """Tokens request by request: prefill, then decode.

        Raises:
            TraceError: damaged, cut off (the footer's counts do not match), ragged, layers missing, ids
            out of range.
        """
        header: dict[str, Any] | None = None
        footer: dict[str, Any] | None = None
        tokens: dict[str, dict[tuple[int, int], Any]] = {}
        for where, row in json_lines(path):
            kind = row.get("row_type")
            if kind == "header":
                header = strict_get(where, row, "provenance")
                if not isinstance(header, dict):
                    raise TraceError(f"{where}: provenance must be an object")
                listed = strict_get(where, header, "moe_layer_indices")
                if not isinstance(listed, list):
                    raise TraceError(f"{where}: moe_layer_indices must be a list")
                layer_ids = [strict_int(where, "moe_layer_indices", i) for i in listed]
                top_k = strict_int(where, "top_k", strict_get(where, header, "top_k"), 1)
                stated = strict_int(where, "expert_count", strict_get(where, header, "expert_count"), 1)
            elif kind == "observed-dispatch":
                if header is None:
                    raise TraceError(f"{where}: a dispatch row before the header row")
                phase = strict_get(where, row, "phase")
                if phase not in PHASES:
                    raise TraceError(f"{where}: phase ({phase!r:.40}) must be one of {', '.join(PHASES)}")
                key = (
                    PHASES.index(phase),
                    strict_int(where, "token_index", strict_get(where, row, "token_index")),
                )
                request = tokens.setdefault(str(strict_get(where, row, "request_id")), {})
                if key in request:
                    raise TraceError(f"{where}: {phase} token {key[1]} of this request appears twice")
                request[key] = _one_token(where, strict_get(where, row, "routing"), layer_ids, top_k)
            elif kind == "footer":
                footer = row
        if header is None or not tokens:
            raise TraceError(f"{path} holds no header or no observed-dispatch rows; was routing recorded?")
        phases = [phase for request in tokens.values() for phase, _ in sorted(request)]
        if footer is None:
            raise TraceError(f"{path} has no footer row; the file is cut off")
        for number, phase in enumerate(PHASES):
            said = footer.get(f"{phase}_dispatch_count", phases.count(number))
            if said != phases.count(number):
                raise TraceError(f"{path}: the footer counts {said} {phase} rows but there are {phases.count(number)}")
        num_experts, _ = count_experts(str(path), stated, options, 0)
        experts_TLK = np.stack([request[key] for request in tokens.values() for key in sorted(request)])
        return drop_padding(
            RoutingTrace(
                experts_TLK=compact_ids(experts_TLK, num_experts, str(path)),
                num_experts=num_experts,
                layer_ids=tuple(layer_ids),
                seq_lens_S=np.array([len(request) for request in tokens.values()], np.int64),
                phase_T=np.array(phases, np.uint8),
            )
        )


def _one_token(where: str, routing: Any, layer_ids: list[int], top_k: int) -> Any:
    if not isinstance(routing, list) or not all(isinstance(r, dict) for r in routing):
        raise TraceError(f"{where}: routing must be a list of objects")
    by_layer = {
        strict_int(where, "layer_index", strict_get(where, r, "layer_index")): strict_get(where, r, "expert_ids")
        for r in routing
    }
    if sorted(by_layer) != sorted(layer_ids) or len(routing) != len(layer_ids):
        raise TraceError(f"{where}: routing covers {len(by_layer)} layers, the header names {len(layer_ids)}")
    ids_LK = numbers(f"{where}: expert_ids", [by_layer[layer] for layer in layer_ids], 2)
    if ids_LK.shape[1] != top_k:
        raise TraceError(f"{where}: {ids_LK.shape[1]} experts per token, the header's top_k is {top_k}")
    return ids_LK


reader = SimllmReader()
