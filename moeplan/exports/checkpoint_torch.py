"""Torch checkpoint files (``.pt``, ``.pth``, ``.bin``), permuted through memory maps.

Files are mapped, not read, and only as plain tensors (``weights_only``). Numbered experts change places by
reference; stacked tensors are permuted block by block into a mapped scratch file. So the process holds no
more than a block at a time, and ``torch.save`` writes from the maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moeplan.errors import ExportError, InputError
from moeplan.exports.checkpoint_names import Part, Permutations, expert_part, is_stacked, source_name
from moeplan.exports.documents import torch_load, torch_save

__all__ = ["TorchFile", "write_permuted"]


class TorchFile:
    """One mapped file; ``numbered`` holds what belongs to one expert, by its full dotted name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = torch_load(path, mmap=True)
        self.numbered: dict[str, Any] = {}
        self.stacked: list[str] = []
        for name, part, value in _parts(self.content, "", path):
            if part.expert is None:
                self.stacked.append(name)
            else:
                self.numbered[name] = value


def _labels(node: dict[Any, Any], path: Path) -> Mapping[Any, str]:
    """Parameter names of an optimizer's numbered state, where torch keeps them in ``param_groups``."""
    groups, state = node.get("param_groups"), node.get("state")
    if (
        not isinstance(groups, list)
        or not isinstance(state, dict)
        or not any(isinstance(key, int) for key in state)
    ):
        return {}
    names: dict[Any, str] = {}
    for group in groups:
        if not isinstance(group, dict) or len(group.get("param_names", ())) != len(
            group.get("params", (None,))
        ):
            raise ExportError(
                f"{path}: the optimizer state is keyed by number, not by parameter name, so its experts"
                " cannot be found; save it with names (an optimizer made from named_parameters()) or leave it out"
            )
        names.update(zip(group["params"], group["param_names"], strict=True))
    return names


def _items(node: Any, prefix: str, labels: Mapping[Any, str]) -> Iterator[tuple[Any, str, Any]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        yield key, f"{prefix}.{labels.get(key, str(key))}", value


def _children(node: dict[Any, Any], path: Path) -> dict[Any, Mapping[Any, str]]:
    return {"state": _labels(node, path)}


def _parts(
    node: Any, prefix: str, path: Path, labels: Mapping[Any, str] | None = None
) -> Iterator[tuple[str, Part, Any]]:
    """Every value of one expert and every stacked tensor, with its dotted name."""
    below = _children(node, path) if isinstance(node, dict) else {}
    for key, name, value in _items(node, prefix, labels or {}):
        part = expert_part(name)
        if part is not None and (part.expert is not None or hasattr(value, "untyped_storage")):
            yield name, part, value
        elif isinstance(value, (dict, list, tuple)):
            yield from _parts(value, name, path, below.get(key))


def write_permuted(
    file: TorchFile,
    union: Mapping[str, list[Any]],
    permutations: Permutations,
    num_experts: int,
    out: Path,
    scratch: Path,
    tick: Callable[[int], None],
) -> None:
    """Write ``file`` with its experts permuted; ``union`` finds an expert's value in any file.

    Raises:
        ExportError: a tensor cannot be permuted exactly. InputError: a needed value is missing.
    """
    import torch

    count = 0

    def find(name: str) -> Any:
        if name in file.numbered:
            return file.numbered[name]
        found = union.get(name, [])
        if len(found) != 1:
            what = f"stands in {len(found)} files" if found else "is missing"
            raise InputError(
                f"checkpoint: {name.lstrip('.')} {what}; merge tensor-parallel parts, and bring all shards"
            )
        return found[0]

    def stacked(tensor: Any, name: str, layer: int) -> Any:
        nonlocal count
        if not is_stacked(name, tensor.shape, num_experts):
            return tensor
        mapped = torch.from_file(
            str(scratch / f"{count}"), True, tensor.numel() * tensor.element_size(), dtype=torch.uint8
        )
        count += 1
        result = mapped.view(tensor.dtype).reshape(tensor.shape)
        old, new = tensor.detach().reshape(num_experts, -1), result.view(num_experts, -1)
        for place, expert in enumerate(permutations[layer]):
            new[place].copy_(old[int(expert)])
        return (
            torch.nn.Parameter(result, tensor.requires_grad)
            if isinstance(tensor, torch.nn.Parameter)
            else result
        )

    def rebuild(node: Any, prefix: str, labels: Mapping[Any, str]) -> Any:
        below = _children(node, file.path) if isinstance(node, dict) else {}
        changed = {}
        for key, name, value in _items(node, prefix, labels):
            part = expert_part(name)
            if part is not None and part.layer not in permutations:
                part = None
            if part is not None and part.expert is not None:
                source = find(source_name(name, part, permutations))
                if _form(source) != _form(value):
                    raise ExportError(
                        f"checkpoint: experts of layer {part.layer} differ in type or shape ({name.lstrip('.')});"
                        " they cannot change places"
                    )
                changed[key] = source
            elif isinstance(value, torch.Tensor):
                changed[key] = value if part is None else stacked(value, name, part.layer)
            elif isinstance(value, (dict, list, tuple)):
                changed[key] = rebuild(value, name, below.get(key, {}))
            else:
                changed[key] = value
        if isinstance(node, dict):
            result = copy.copy(node)  # keeps the kind of mapping and what torch hangs on it
            result.update(changed)
            return result
        return type(node)(changed.values()) if type(node) in (list, tuple) else node

    content = rebuild(file.content, "", {}) if isinstance(file.content, (dict, list, tuple)) else file.content
    torch_save(content, out)
    tick(file.path.stat().st_size)


def _form(value: Any) -> Any:
    if hasattr(value, "untyped_storage"):
        return str(value.dtype), tuple(value.shape)
    return {key: _form(item) for key, item in value.items()} if isinstance(value, dict) else type(value)
