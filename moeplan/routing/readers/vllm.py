"""vLLM's ``routed_experts`` (``--enable-return-routed-experts``), saved by whoever received the outputs.

``CompletionOutput.routed_experts`` is one int array per request, [tokens, hidden layers, k]: one row per
prompt and generated token but the last. Its layers are *all* hidden layers; the buffer starts as zeros,
so a dense layer (and a token that was not captured) is all zeros, which no real top-k of two or more is:
such rows are padding here. Read: an ``.npz`` with one array per request, an ``.npy`` of one request, or a
directory or pattern of ``.npy`` files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import TraceError
from moeplan.routing.arrays import looks_like_ids, npy_of_ids, npz_names, read_npy, read_npz
from moeplan.routing.readers.base import (
    MAX_EXPERTS,
    ReadOptions,
    compact_ids,
    count_experts,
    drop_padding,
    input_files,
    is_glob,
)

__all__ = ["VllmReader", "reader"]


class VllmReader:
    """Reads routed-experts arrays of vLLM."""

    name = "vllm"
    description = "vLLM routed_experts, one [tokens, layers, k] array per request (.npz, .npy, a directory)"
    has_domains = False

    def sniff(self, path: Path) -> bool:
        """Whether ``.npy`` content reads as ids, or an ``.npz`` has other arrays than the simple form."""
        try:
            if path.suffix == ".npz" and path.is_file():
                names = npz_names(path)
                simple = any(n == "experts" or n.endswith("_experts") for n in names if n != "routed_experts")
                return bool(names) and not simple and looks_like_ids(next(iter(read_npz(path, names[:1]).values())))
            if path.suffix == ".npy" or path.is_dir() or is_glob(path):
                return npy_of_ids(input_files(path, ".npy")[0])
        except (TraceError, OSError):
            pass
        return False

    def read(self, path: Path, options: ReadOptions) -> RoutingTrace:
        """Requests one after the other, each a sequence.

        Raises:
            TraceError: damaged, empty, requests of different shape, ids out of range.
        """
        if path.suffix == ".npz":
            requests = {name: _narrow(path, name, ids) for name, ids in read_npz(path).items()}
        else:
            requests = {file.name: _narrow(path, file.name, read_npy(file)) for file in input_files(path, ".npy")}
        if not requests:
            raise TraceError(f"{path} holds no request")
        shape = next(iter(requests.values())).shape[1:]
        for name, ids in requests.items():
            if ids.shape[1:] != shape:
                raise TraceError(f"{path}: {name} has [layers, k] {ids.shape[1:]}, other requests have {shape}")
        lengths = [len(ids) for ids in requests.values() if len(ids)]
        if not lengths:
            raise TraceError(f"{path} holds no tokens")
        experts_TLK = np.concatenate([*requests.values(), np.empty((0, *shape), np.int8)])  # a type that holds -1
        del requests
        for layer in range(shape[0] if shape[1] > 1 else 0):
            experts_TLK[(experts_TLK[:, layer] == 0).all(axis=1), layer] = -1
        num_experts, note = count_experts(str(path), None, options, int(experts_TLK.max()))
        if int(experts_TLK.max()) < 0:
            raise TraceError(f"{path} is all zeros; no routing was captured")
        trace = RoutingTrace(
            experts_TLK=compact_ids(experts_TLK, num_experts, str(path)),
            num_experts=num_experts,
            layer_ids=tuple(range(shape[0])),
            seq_lens_S=np.array(lengths, np.int64),
            origin=note,
        )
        return drop_padding(trace)


def _narrow(path: Path, name: str, ids: NDArray[Any]) -> NDArray[Any]:
    """One request's ids in the smallest type that holds them: engines keep 256 experts in 32 bits.

    Raises:
        TraceError: not integers [tokens, layers, k].
    """
    if ids.ndim != 3 or 0 in ids.shape[1:] or ids.dtype.kind not in "iu":
        raise TraceError(f"{path}: {name} is {ids.dtype} {ids.shape}; it must be integer [tokens, layers, k]")
    return compact_ids(ids, MAX_EXPERTS, f"{path}: {name}") if len(ids) else ids.astype(np.uint8)


reader = VllmReader()
