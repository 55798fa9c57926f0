"""Placement files as plain values (JSON, YAML, Python constants, arrays); nothing in them is run."""

from __future__ import annotations

import ast
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import InputError, MissingExtraError
from moeplan.files import MAX_DOCUMENT_BYTES, atomic_path, read_json, read_yaml

__all__ = ["read_placement_document", "torch_load", "torch_save", "write_npz", "write_torch"]


def read_placement_document(path: Path) -> Any:
    """The content of a placement file as plain values and numpy arrays, whatever the format.

    JSON and YAML give what is written; ``.npz`` and torch files give arrays inside dicts and lists; a Python
    module gives ``{"python": {name: literal}}`` of its top-level constants and is never run.

    Raises:
        InputError: unreadable, damaged, or holds more than plain data.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix == ".py":
        return {"python": _constants(path)}
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path)
    if head == b"PK\x03\x04" and _is_npz(path):
        return _read_npz(path)
    if head == b"PK\x03\x04" or path.suffix in (".pt", ".pth", ".bin"):
        return _read_torch(path)
    try:
        return read_json(path)
    except InputError as error:
        if path.suffix == ".json":
            raise
        suffixes = ".yaml, .yml, .npz, .pt, .pth, .bin or .py"
        raise InputError(f"{error}; placements are read as JSON unless the name ends in {suffixes}") from error


def _constants(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} as a Python module: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except (ValueError, RecursionError):
                continue
    return found


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return path.suffix == ".npz"


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_DOCUMENT_BYTES:
            raise InputError(f"cannot read {path}: {size} bytes unpacked are too many for a placement")
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, MemoryError) as error:
        raise InputError(f"cannot read {path}: {error}; is the file complete?") from error


def torch_load(path: Path, *, mmap: bool = False) -> Any:
    """``torch.load`` of tensors and plain values only, on the CPU.

    Raises:
        MissingExtraError: torch is not installed. InputError: damaged, or holds other objects.
    """
    torch = _torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own legacy formats
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise InputError(
            f"cannot read {path}: it is damaged or holds objects other than tensors and plain values, which are never"
            " loaded; save it again as plain tensors"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise InputError(
            f"cannot read {path}: not a complete torch file ({str(error).partition('.')[0]})"
        ) from error


def torch_save(value: Any, path: Path) -> None:
    """``torch.save`` whose own write errors become ``OSError``, as every other writer's are.

    Raises:
        MissingExtraError: torch is not installed. OSError: the file cannot be written, e.g. the disk is full.
    """
    try:
        _torch(path).save(value, path)
    except RuntimeError as error:
        raise OSError(f"torch could not write the file ({error})") from error


def write_torch(out: Path, arrays: Mapping[str, NDArray[Any]] | NDArray[Any]) -> None:
    """Write one array, or several by name, as a torch file, atomically."""
    tensor = _torch(out).from_numpy
    with atomic_path(out) as temporary:
        if isinstance(arrays, np.ndarray):
            torch_save(tensor(arrays), temporary)
        else:
            torch_save({name: tensor(value) for name, value in arrays.items()}, temporary)


def write_npz(out: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name as ``.npz``, atomically."""
    with atomic_path(out) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(f"{path}", "torch") from error
    return torch


def _read_torch(path: Path) -> Any:
    def plain(value: Any) -> Any:
        if hasattr(value, "detach"):
            return value.detach().numpy()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    try:
        return plain(torch_load(path))
    except (TypeError, RecursionError) as error:  # e.g. bfloat16, which no placement uses
        raise InputError(f"cannot read {path} as a placement: {error}") from error
