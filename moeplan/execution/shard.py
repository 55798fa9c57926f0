"""A safetensors file (public format description), written and hashed at once.

Layout: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

__all__ = ["write_shard"]

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_shard(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write ``tensors`` (contiguous, in the memory of the host); the file's sha256.

    Nothing is copied, and a thread hashes meanwhile: it takes as long as the slower of the two.

    Raises:
        OSError: it cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        kind, shape = _TYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    parts += [_bytes(tensors[name]) for name in names]
    with ThreadPoolExecutor(1) as aside, path.open("wb") as file:
        digest = aside.submit(_sha256, parts)
        file.writelines(parts)
    return digest.result()


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())
