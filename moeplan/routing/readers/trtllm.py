"""TensorRT-LLM expert statistics: a directory with ``meta_info.json`` and a ``rank<r>.safetensors`` each.

Written with ``EXPERT_STATISTIC_ITER_RANGE`` and ``EXPERT_STATISTIC_PATH``. Keys are
``<iteration>_<layer>`` (absolute layer numbers), values int64 [num_experts]: the tokens of that rank, so
the source of the traffic is known.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.errors import TraceError
from moeplan.files import read_json
from moeplan.routing.readers.base import ReadOptions, count_experts, input_files, strict_get, strict_int
from moeplan.routing.readers.shared import recorded_load

__all__ = ["TrtllmReader", "reader"]

_RANK = re.compile(r"rank(\d{1,6})\.safetensors")
_KEY = re.compile(r"(\d{1,12})_(\d{1,6})")


class TrtllmReader:
    """Reads a statistics directory of TensorRT-LLM."""

    name = "trtllm"
    description = "TensorRT-LLM expert statistics directory (meta_info.json, rank<r>.safetensors)"
    has_domains = False

    def sniff(self, path: Path) -> bool:
        """Whether ``path`` is a directory with ``meta_info.json``."""
        return path.is_dir() and (path / "meta_info.json").is_file()

    def read(self, path: Path, options: ReadOptions) -> ExpertLoad:
        """Counts per iteration, and per source rank.

        Raises:
            TraceError: damaged, ranks missing or of different iterations or layers, or negative counts.
        """
        if not path.is_dir():
            raise TraceError(f"{path} must be the directory that EXPERT_STATISTIC_PATH named")
        meta = read_json(path / "meta_info.json")
        if not isinstance(meta, dict):
            raise TraceError(f"{path / 'meta_info.json'} must be a JSON object")
        where = f"{path / 'meta_info.json'}"
        stated = strict_int(where, "num_experts", strict_get(where, meta, "num_experts"), 1)
        num_experts, _ = count_experts(where, stated, options, 0)
        top_k = meta.get("num_experts_per_token")
        ranks = {_rank(file): _counts(file, num_experts) for file in input_files(path, ".safetensors")}
        if sorted(ranks) != list(range(len(ranks))):
            raise TraceError(f"{path} has files of ranks {sorted(ranks)}; copy those of every rank")
        if "ep_size" in meta and strict_int(where, "ep_size", meta["ep_size"], 1) != len(ranks):
            raise TraceError(
                f"{where}: ep_size ({meta['ep_size']}) but there are {len(ranks)} rank files; copy them all"
            )
        keys = sorted(ranks[0])
        for rank, counts in ranks.items():
            if sorted(counts) != keys:
                odd = sorted(set(keys) ^ set(counts))[0]
                raise TraceError(f"{path}: rank {rank} and rank 0 differ: only one of them has {odd[0]}_{odd[1]}")
        iterations, layers = sorted({i for i, _ in keys}), sorted({layer for _, layer in keys})
        if len(keys) != len(iterations) * len(layers):
            raise TraceError(f"{path}: {len(keys)} records for {len(iterations)} iterations x {len(layers)} layers")
        shape = (len(iterations), len(layers), num_experts)
        total_WLE = np.zeros(shape, np.int64)
        source_SLE = np.zeros((len(ranks), *shape[1:]), np.int64)
        for rank in range(len(ranks)):
            counts_WLE = np.stack([ranks[rank][key] for key in keys]).reshape(shape)
            total_WLE += counts_WLE
            source_SLE[rank] = counts_WLE.sum(axis=0)
        return recorded_load(
            str(path),
            total_WLE,
            options,
            window="iteration",
            layer_ids=layers,
            source_SLE=source_SLE,
            top_k=None if top_k is None else strict_int(where, "num_experts_per_token", top_k, 1),
        )


def _rank(file: Path) -> int:
    match = _RANK.fullmatch(file.name)
    if match is None:
        raise TraceError(f"{file} is not called rank<r>.safetensors; leave only the statistics in the directory")
    return int(match.group(1))


def _counts(file: Path, num_experts: int) -> dict[tuple[int, int], NDArray[Any]]:
    from safetensors import SafetensorError, safe_open

    counts: dict[tuple[int, int], NDArray[Any]] = {}
    try:
        with safe_open(file, framework="numpy") as stream:
            for name in stream.keys():  # noqa: SIM118  (not a dict)
                match = _KEY.fullmatch(name)
                if match is None:
                    raise TraceError(f"{file}: key '{name[:60]}' must be '<iteration>_<layer>'")
                array = stream.get_tensor(name)
                if array.shape != (num_experts,) or array.dtype.kind not in "iu":
                    raise TraceError(
                        f"{file}: {name} is {array.dtype} {array.shape}; it must be integer [{num_experts}]"
                    )
                if (array < 0).any():
                    raise TraceError(f"{file}: {name} has a negative count")
                counts[int(match.group(1)), int(match.group(2))] = array
    except (SafetensorError, OSError) as error:
        raise TraceError(f"{file} is damaged or cut off: {str(error)[:200]}") from error
    if not counts:
        raise TraceError(f"{file} holds no statistics; was an iteration of EXPERT_STATISTIC_ITER_RANGE reached?")
    return counts


reader = TrtllmReader()
