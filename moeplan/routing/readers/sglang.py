"""Dumps of SGLang's expert distribution recorder (``expert_distribution_recorder_*.pt``).

Modes ``stat`` and ``stat_approx``: one file, ``{rank, logical_count [steps, layers, E], ...}``, a ring of steps. Modes
``per_pass`` and ``per_token``: one file per rank, ``{records: [...], last_physical_to_logical_map
[layers, P]}``; a record holds ``forward_pass_id``, ``rank`` and ``global_physical_count`` [layers, P], or
per token ``topk_ids_of_layer`` [layers, tokens, 8]: *physical* ids, room for eight whatever the model's
top-k, ``-1`` where unused. Layers are all decoder layers; dense ones are all zero or all ``-1`` and are
dropped. Layout as of SGLang 0.5.23.

Physical ids become logical ones through ``last_physical_to_logical_map``. A recording that a rebalance
interrupted holds ids of several maps but only the last map: record with a fixed placement.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.errors import TraceError
from moeplan.routing.joining import join_traces
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
from moeplan.routing.readers.shared import load_torch, recorded_load, tensor_array

__all__ = ["SglangReader", "reader"]

_MARKS = (b"logical_count", b"last_physical_to_logical_map")
_FORWARD_MODES = {
    1: "prefill",
    2: "decode",
}  # SGLang's ForwardMode: EXTEND = 1, DECODE = 2; others are neither


class SglangReader:
    """Reads SGLang recorder dumps of every mode: a file, a directory of rank files, or a pattern."""

    name = "sglang"
    description = "SGLang expert distribution recorder dump (stat, stat_approx, per_pass, per_token)"
    has_domains = False

    def sniff(self, path: Path) -> bool:
        """Whether the first ``.pt`` file there names the recorder's keys; needs no torch."""
        try:
            files = input_files(path, ".pt") if path.is_dir() or is_glob(path) or path.suffix == ".pt" else []
            if not files:
                return False
            with zipfile.ZipFile(files[0]) as archive:
                name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                with archive.open(name) as stream:
                    head = stream.read(1 << 22)
        except (
            TraceError,
            OSError,
            ValueError,
            StopIteration,
            zipfile.BadZipFile,
            NotImplementedError,
            RuntimeError,
        ):
            return False
        return any(mark in head for mark in _MARKS)

    def read(self, path: Path, options: ReadOptions) -> RoutingTrace | ExpertLoad:
        """Tokens for ``per_token``, counts for the other modes.

        Raises:
            TraceError: damaged, another layout, ids out of range, or nothing recorded.
            MissingExtraError: torch is not installed.
        """
        packs: list[tuple[str, dict[str, Any]]] = []
        for file in input_files(path, ".pt"):
            pack = load_torch(file)
            if not isinstance(pack, dict):
                raise TraceError(f"{file} holds a {type(pack).__name__}; a recorder dump is a dict")
            packs.append((str(file), pack))
        if "logical_count" in packs[0][1]:
            return _stat(packs, options)
        records = [(f"{file} record {i}", pack, r) for file, pack in packs for i, r in enumerate(_records(file, pack))]
        if not records:
            raise TraceError(f"{path}: records is empty; did the recorder run while requests were served?")
        per_token = "topk_ids_of_layer" in records[0][2]
        return _per_token(path, records, options) if per_token else _per_pass(path, records, options)


_Records = list[tuple[str, dict[str, Any], dict[str, Any]]]


def _records(file: str, pack: dict[str, Any]) -> list[dict[str, Any]]:
    records = strict_get(file, pack, "records")
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise TraceError(f"{file}: records must be a list of dicts")
    return records


def _stat(packs: list[tuple[str, dict[str, Any]]], options: ReadOptions) -> ExpertLoad:
    if len(packs) > 1:
        raise TraceError(f"{packs[0][0]} and {len(packs) - 1} more are 'stat' dumps, each complete; name one file")
    file, pack = packs[0]
    counts = tensor_array(f"{file}: logical_count", pack["logical_count"])
    return recorded_load(f"{file}: logical_count", counts if counts.ndim == 3 else counts[None], options, window="step")


def _physical_to_logical(where: str, pack: dict[str, Any], options: ReadOptions) -> tuple[NDArray[np.int64], int]:
    name = "last_physical_to_logical_map"
    map_LP = tensor_array(f"{where}: {name}", strict_get(where, pack, name), 2)
    if map_LP.dtype.kind not in "iu" or map_LP.size == 0 or int(map_LP.min()) < 0:
        raise TraceError(f"{where}: {name} must hold expert ids from 0")
    num_experts, _ = count_experts(where, int(map_LP.max()) + 1, options, 0)
    if num_experts > map_LP.shape[1]:
        raise TraceError(f"{where}: {name} names expert {num_experts - 1} but has only {map_LP.shape[1]} slots")
    return map_LP.astype(np.int64), num_experts


def _per_pass(path: Path, records: _Records, options: ReadOptions) -> ExpertLoad:
    """Each rank counts what it received; the ranks of a pass are added, as SGLang's own simulator does."""
    per_pass: dict[int, NDArray[np.int64]] = {}
    seen: dict[tuple[int, int], NDArray[np.bool_]] = {}
    for where, pack, record in records:
        map_LP, num_experts = _physical_to_logical(where, pack, options)
        count_LP = tensor_array(where, strict_get(where, record, "global_physical_count"), 2)
        if count_LP.shape != map_LP.shape:
            raise TraceError(f"{where}: global_physical_count {count_LP.shape} and the map {map_LP.shape} must agree")
        if count_LP.dtype.kind not in "iu" or (count_LP < 0).any():
            raise TraceError(f"{where}: global_physical_count must hold counts of 0 or more")
        number = strict_int(where, "forward_pass_id", strict_get(where, record, "forward_pass_id"))
        rank = strict_int(where, "rank", strict_get(where, record, "rank"))
        used_L = count_LP.any(axis=1)
        before_L = seen.get((number, rank), np.zeros_like(used_L))
        if (used_L & before_L).any():  # stages of a pipeline have one rank and layers of their own
            raise TraceError(f"{where}: forward pass {number} of rank {rank} appears twice; name one recording")
        seen[number, rank] = used_L | before_L
        logical_LE = np.zeros((len(map_LP), num_experts), np.int64)
        np.add.at(logical_LE, (np.arange(len(map_LP))[:, None], map_LP), count_LP)
        if number in per_pass and per_pass[number].shape != logical_LE.shape:
            raise TraceError(f"{where}: shape {logical_LE.shape} differs from other ranks' {per_pass[number].shape}")
        per_pass[number] = per_pass[number] + logical_LE if number in per_pass else logical_LE
    if len({count.shape for count in per_pass.values()}) > 1:
        raise TraceError(f"{path}: forward passes differ in shape; name one recording")
    counts_WLE = np.stack([per_pass[number] for number in sorted(per_pass)])
    return recorded_load(str(path), counts_WLE, options, window="pass")


def _per_token(path: Path, records: _Records, options: ReadOptions) -> RoutingTrace:
    """Tokens of each rank, in recorded order. Ranks that ran the same tokens (tensor and pipeline parallelism) count
    once: their records name the same pass and inputs, and differ in no layer that both hold."""
    tokens: list[_Tokens] = []
    same_inputs: dict[tuple[int, bytes], list[_Tokens]] = {}
    repeated = 0
    for where, pack, record in records:
        map_LP, num_experts = _physical_to_logical(where, pack, options)
        ids_LTK = tensor_array(where, strict_get(where, record, "topk_ids_of_layer"), 3)
        if ids_LTK.dtype.kind not in "iu" or len(ids_LTK) != len(map_LP):
            raise TraceError(f"{where}: topk_ids_of_layer {ids_LTK.shape} must be integer [{len(map_LP)}, tokens, k]")
        if 0 in ids_LTK.shape:
            continue  # an idle rank's pass
        if int(ids_LTK.min()) < -1 or int(ids_LTK.max()) >= map_LP.shape[1]:
            found = f"{int(ids_LTK.min())}..{int(ids_LTK.max())}"
            raise TraceError(f"{where}: physical ids {found} are not all within -1..{map_LP.shape[1] - 1}")
        narrow_LP = map_LP.astype(np.int16 if num_experts < 2**15 else np.int32)
        logical_LTK = np.where(ids_LTK < 0, -1, narrow_LP[np.arange(len(map_LP))[:, None, None], ids_LTK])
        mine = _Tokens(where, record, num_experts, logical_LTK)
        number = strict_int(where, "forward_pass_id", strict_get(where, record, "forward_pass_id"))
        if record.get("input_ids") is not None:
            inputs = tensor_array(f"{where}: input_ids", record["input_ids"])
            others = same_inputs.setdefault((number, hashlib.sha256(inputs.tobytes()).digest()), [])
            if any(other.take(mine) for other in others):
                repeated += 1
                continue
            others.append(mine)
        tokens.append(mine)
    if not tokens:
        raise TraceError(f"{path}: no record holds a token")
    trace = drop_padding(join_traces([part.trace() for part in tokens]))
    return replace(trace, origin={"repeated_records": repeated}) if repeated else trace


@dataclass(slots=True)
class _Tokens:
    """Tokens of one record: logical expert ids, ``-1`` in layers that the rank does not run."""

    where: str
    record: dict[str, Any]
    num_experts: int
    experts_LTK: NDArray[np.integer[Any]]

    def take(self, other: _Tokens) -> bool:
        """Whether ``other`` is of the same tokens; the layers that only it holds are then added."""
        if other.experts_LTK.shape != self.experts_LTK.shape:
            return False
        both_L = (self.experts_LTK >= 0).any(axis=(1, 2)) & (other.experts_LTK >= 0).any(axis=(1, 2))
        same = np.array_equal(self.experts_LTK[both_L], other.experts_LTK[both_L])
        if same:
            self.experts_LTK = np.maximum(self.experts_LTK, other.experts_LTK)
        return same

    def trace(self) -> RoutingTrace:
        return _record_trace(self.where, self.record, self.experts_LTK.transpose(1, 0, 2), self.num_experts)


def _record_trace(where: str, record: dict[str, Any], experts_TLK: NDArray[Any], num_experts: int) -> RoutingTrace:
    tokens = len(experts_TLK)
    phase = _FORWARD_MODES.get(record.get("forward_mode", 0))
    seq_lens = record.get("extend_seq_lens")
    seq_lens_S = None
    if phase == "decode":
        seq_lens_S = np.ones(tokens, np.int64)
    elif seq_lens is not None:
        lens = np.asarray(tensor_array(f"{where}: extend_seq_lens", seq_lens, 1), np.int64)
        seq_lens_S = lens if (lens > 0).all() and int(lens.sum()) == tokens else None
    rank = strict_int(where, "rank", strict_get(where, record, "rank"))
    return RoutingTrace(
        experts_TLK=compact_ids(experts_TLK, num_experts, where),
        num_experts=num_experts,
        layer_ids=tuple(range(experts_TLK.shape[1])),
        seq_lens_S=seq_lens_S,
        phase_T=None if phase is None else np.full(tokens, PHASES.index(phase), np.uint8),
        source_rank_T=np.full(tokens, rank, np.int32),
    )


reader = SglangReader()
