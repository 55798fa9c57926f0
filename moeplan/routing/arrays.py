"""``.npy`` and ``.npz`` files from strangers: sizes checked before memory is asked for, nothing unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import TraceError
from moeplan.files import atomic_path

__all__ = [
    "MAX_ARRAY_BYTES",
    "looks_like_ids",
    "npy_of_ids",
    "npz_names",
    "read_npy",
    "read_npz",
    "write_npz",
]

MAX_ARRAY_BYTES = 16 * 2**30
_MAX_MEMBERS = 100_000
_REMEDY = "store it as .parquet, which is read in batches"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextmanager
def _as_trace_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise TraceError(f"{path} is damaged or cut off: {str(error)[:200]}; record it again") from error
    except MemoryError as error:
        raise TraceError(f"{path} needs more memory than there is; {_REMEDY}") from error


def _header(path: Path, name: str, stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and type of an array in a stream of ``size`` bytes, held against ``size``."""
    try:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    except OSError:
        raise
    except Exception as error:  # the header is Python text, and parsing it fails in many ways
        raise TraceError(f"{path}: {name} has no readable .npy header; the file is damaged") from error
    if dtype.hasobject or dtype.kind not in "biufUS":
        raise TraceError(f"{path}: {name} holds {dtype}; only numbers and text are read, never objects")
    expected, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if expected != held:
        raise TraceError(
            f"{path}: {name} says {list(shape)} {dtype} ({expected} bytes) but holds {held} bytes;"
            " the file is damaged or cut off"
        )
    return shape, fortran, dtype


def _read_array(path: Path, name: str, stream: IO[bytes], size: int) -> NDArray[Any]:
    """One array from a stream of ``size`` bytes."""
    shape, fortran, dtype = _header(path, name, stream, size)
    expected = math.prod(shape) * dtype.itemsize
    if expected > MAX_ARRAY_BYTES:
        raise TraceError(f"{path}: {name} has {expected} bytes, more than {MAX_ARRAY_BYTES}; {_REMEDY}")
    array = np.empty(math.prod(shape), dtype=dtype)
    view_B, done = array.view(np.uint8), 0
    while done < expected:
        piece = stream.read(min(expected - done, 1 << 24))
        if not piece:
            raise TraceError(f"{path}: {name} ends after {done} of {expected} bytes; the file is cut off")
        view_B[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    return array.reshape(shape, order="F" if fortran else "C")


def read_npy(path: Path) -> NDArray[Any]:
    """The array of a ``.npy`` file.

    Raises:
        TraceError: unreadable, damaged, too large, or holding objects.
    """
    with _as_trace_error(path), path.open("rb") as stream:
        return _read_array(path, path.name, stream, path.stat().st_size)


def npz_names(path: Path) -> list[str]:
    """Names of the arrays of an ``.npz`` file.

    Raises:
        TraceError: unreadable or damaged.
    """
    with _as_trace_error(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz`` file by name (all of them, or those in ``names`` that exist).

    Raises:
        TraceError: unreadable, damaged, too large, or holding objects.
    """
    arrays: dict[str, NDArray[Any]] = {}
    with _as_trace_error(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise TraceError(f"{path} has {len(members)} members, more than {_MAX_MEMBERS}; is it a trace?")
        wanted = [m for m in members if m.filename.endswith(".npy")]
        wanted = [m for m in wanted if names is None or m.filename.removesuffix(".npy") in names]
        total = sum(m.file_size for m in wanted)
        if total > MAX_ARRAY_BYTES:
            raise TraceError(f"{path} unpacks to {total} bytes, more than {MAX_ARRAY_BYTES}; {_REMEDY}")
        for member in wanted:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise TraceError(f"{path}: array '{name}' appears twice; save it again")
            with archive.open(member) as stream:
                arrays[name] = _read_array(path, name, stream, member.file_size)
                if stream.read(1):  # reaching the end is also what makes zipfile check the CRC
                    raise TraceError(f"{path}: {name} is longer than its header says; the file is damaged")
    return arrays


def write_npz(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a compressed ``.npz`` atomically; equal arrays give equal bytes (no time of day inside)."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), (1, 0), allow_pickle=False)


def looks_like_ids(array: NDArray[Any]) -> bool:
    """Whether a 3-D array reads as ids [tokens, layers, k] rather than counts [windows, layers, experts].

    Ids are integers, few per row, distinct in a row and small. Counts of a small model can be all that
    too, but every layer of a window counts the same tokens: its rows have equal sums, rows of ids do not.
    """
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "iu" or array.shape[2] > 64:
        return False
    head = array[:256]
    if int(head.max()) >= 4096:
        return False
    ordered = np.sort(head, axis=2)
    blank = (head == 0).all(axis=2)  # a dense layer in a buffer that started as zeros
    distinct = (((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] < 0)).all(axis=2) | blank).all()
    sums = head.sum(axis=2, dtype=np.int64)[:, ~blank.all(axis=0)]
    return bool(distinct) and sums.size > 0 and not (sums.shape[1] > 1 and (sums == sums[:, :1]).all())


def npy_of_ids(path: Path) -> bool:
    """Whether a ``.npy`` file reads as ids [tokens, layers, k]; looks at its beginning only, never raises."""
    try:
        with _as_trace_error(path), path.open("rb") as stream:
            shape, fortran, dtype = _header(path, path.name, stream, path.stat().st_size)
            if len(shape) != 3 or 0 in shape:
                return False
            return looks_like_ids(np.memmap(path, dtype, "r", stream.tell(), shape, order="F" if fortran else "C"))
    except TraceError:
        return False
