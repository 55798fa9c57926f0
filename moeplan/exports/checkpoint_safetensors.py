"""Safetensors files, permuted byte by byte: no tensor is ever held, whatever its type.

Layout (public format description): 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape,
data_offsets}}``, then the data. A permuted file has the same names, types and shapes as its original, so the
same header; only where the bytes come from changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from moeplan.errors import ExportError, InputError
from moeplan.exports.checkpoint_names import Permutations, expert_part, is_stacked, source_name

__all__ = ["SafetensorsFile", "Tensor", "write_permuted"]

_CHUNK = 2**20
_MAX_HEADER = 100 * 10**6


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor's bytes are in its file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The header of one file, verbatim and parsed; tensors in the order of their bytes."""

    path: Path
    head: bytes
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header.

        Raises:
            InputError: unreadable, truncated or damaged.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if size < 8 or length > min(size - 8, _MAX_HEADER):
                    raise InputError(
                        f"cannot read {path}: not a complete safetensors file (header of {length} bytes)"
                    )
                head = stream.read(length)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        start, tensors = 8 + length, {}
        try:
            for name, entry in json.loads(head).items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                shape = tuple(int(axis) for axis in entry["shape"])
                tensors[name] = Tensor(path, str(entry["dtype"]), shape, start + int(begin), start + int(end))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"cannot read {path}: its safetensors header is damaged ({error})") from error
        ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        position = start
        for name, tensor in ordered.items():
            if tensor.begin != position or tensor.end < tensor.begin:
                raise InputError(
                    f"cannot read {path}: data_offsets of {name} leave a hole or overlap; the file is damaged"
                )
            position = tensor.end
        if position != size:
            raise InputError(
                f"cannot read {path}: {size} bytes where its header says {position}; the file is truncated"
            )
        return cls(path, length.to_bytes(8, "little") + head, ordered)


def write_permuted(
    file: SafetensorsFile,
    union: Mapping[str, Tensor],
    permutations: Permutations,
    num_experts: int,
    out: Path,
    tick: Callable[[int], None],
) -> None:
    """Write ``file`` with its experts permuted; ``union`` finds a tensor in any file, ``tick`` counts bytes.

    Raises:
        ExportError: a tensor cannot be permuted exactly. InputError: a needed tensor is missing.
    """
    with out.open("wb") as target:
        target.write(file.head)
        tick(len(file.head))
        for name, tensor in file.tensors.items():
            part = expert_part(name)
            if part is None or part.layer not in permutations:
                _copy(tensor.path, [(tensor.begin, tensor.end)], target)
            elif part.expert is not None:
                source = union.get(wanted := source_name(name, part, permutations))
                if source is None:
                    raise InputError(
                        f"checkpoint: {wanted} is missing; is a shard missing, or is it a part of a model?"
                    )
                if (source.dtype, source.shape) != (tensor.dtype, tensor.shape):
                    raise ExportError(
                        f"checkpoint: {wanted} ({source.dtype} {list(source.shape)}) cannot take the place of {name}"
                        f" ({tensor.dtype} {list(tensor.shape)}); experts of one layer must have one type and shape"
                    )
                _copy(source.path, [(source.begin, source.end)], target)
            elif is_stacked(name, tensor.shape, num_experts):
                block = (tensor.end - tensor.begin) // num_experts
                starts = [tensor.begin + int(old) * block for old in permutations[part.layer]]
                _copy(tensor.path, [(begin, begin + block) for begin in starts], target)
            else:
                _copy(tensor.path, [(tensor.begin, tensor.end)], target)
            tick(tensor.end - tensor.begin)


def _copy(path: Path, pieces: list[tuple[int, int]], target: IO[bytes]) -> None:
    with path.open("rb") as stream:
        for begin, end in pieces:
            stream.seek(begin)
            left = end - begin
            while left:
                chunk = stream.read(min(left, _CHUNK))
                if not chunk:
                    raise InputError(f"cannot read {path}: it became shorter while it was read")
                target.write(chunk)
                left -= len(chunk)
