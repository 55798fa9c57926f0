"""A checkpoint with its experts permuted: one file, or a directory of shards with everything beside them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moeplan.errors import ExportError, InputError
from moeplan.exports import checkpoint_safetensors, checkpoint_torch
from moeplan.exports.checkpoint_dist import METADATA, DistFolder
from moeplan.exports.checkpoint_names import Permutations, expert_part
from moeplan.exports.checkpoint_safetensors import SafetensorsFile, Tensor
from moeplan.exports.checkpoint_torch import TorchFile
from moeplan.files import (
    atomic_directory,
    atomic_path,
    read_json,
    read_sums,
    require_place,
    sha256_file,
    unlike_its_sum,
    write_sums,
)
from moeplan.progress import Progress

__all__ = ["RECORD_NAME", "permute_checkpoint"]

RECORD_NAME = "moeplan_expert_permutation.json"
_PLACE = ("a permuted checkpoint", (RECORD_NAME, "*"))  # names are the source's: all of an older one goes
_TORCH = {".pt", ".pth", ".bin"}
# Beside the weights in a trainer's folder: no expert in them, and not always plain tensors.
_NOT_WEIGHTS = re.compile(
    r"training_args\.bin|scheduler\.pt|rng_state.*\.pth|latest_checkpointed_iteration\.txt"
)
_OPTIMIZER = re.compile(r".*optim_states\.pt")
_SHARDED = re.compile(r"zero_pp_rank_.*\.pt")


def permute_checkpoint(
    source: Path,
    out: Path,
    permutations: Permutations,
    num_experts: int,
    record: str,
    progress: Progress,
) -> list[Path]:
    """Write ``source`` to ``out`` with the experts of each planned layer in their new order.

    Expert weights, router rows and biases, and optimizer state of both move together; names, shapes, types
    and shard boundaries stay. ``record`` is kept in an output directory, so that nobody permutes twice.

    Raises:
        InputError: unreadable, incomplete, or of another model; or ``out`` holds something else.
        ExportError: a form that cannot be permuted exactly.
    """
    if not source.exists():
        raise InputError(
            f"cannot read {source}: no such file or directory; give a checkpoint with --checkpoint"
        )
    origin, target = source.resolve(), out.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise InputError(
            f"--out ({out}) and --checkpoint ({source}) overlap; write to another place, the original stays"
        )
    paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    for path in paths:
        if _OPTIMIZER.fullmatch(path.name):
            raise ExportError(
                f"checkpoint: {path.name} is optimizer state without parameter names, in which experts cannot be"
                " found; leave it out and load the weights alone (load_optimizer_states=False)"
            )
        if _SHARDED.fullmatch(path.name):
            raise ExportError(
                f"checkpoint: {path.name} is of a sharded form (ZeRO stage 3) that is not read; save the"
                " whole model's state_dict(), in one file or several"
            )
        if path.name == RECORD_NAME:
            raise InputError(
                f"{source} is permuted already ({RECORD_NAME}); start from the original checkpoint"
            )
    if source.is_dir():
        require_place(out, *_PLACE)
    job = _Job(permutations, num_experts, progress)
    for path in paths:
        if path == source and (path.name == METADATA or path.suffix == ".distcp"):
            raise InputError(f"{source} is one file of a torch_dist checkpoint; give its directory")
        if path.name == METADATA:
            job.dist[path.parent] = DistFolder(path.parent, permutations, num_experts)
    for path in paths:
        if path.parent in job.dist:
            continue  # its files are copied as they are
        if path.suffix == ".distcp":
            raise InputError(f"checkpoint: {METADATA} is missing beside {path}; bring all files")
        if path.suffix == ".safetensors":
            job.safetensors[path] = SafetensorsFile.open(path)
        elif path.suffix in _TORCH and not _NOT_WEIGHTS.fullmatch(path.name):
            job.torch[path] = TorchFile(path)
    if job.safetensors or job.torch or not job.dist:
        job.check(source, [path for path in paths if path.name.endswith(".index.json")])
    if not source.is_dir():
        with atomic_path(out) as temporary:
            job.write(source, temporary)
        return [out]
    sums = read_sums(source)
    for name, digest in sums.items():
        if why := unlike_its_sum(source, name, digest):
            raise InputError(f"checkpoint {source}: {why}; it is damaged, take another")
    with atomic_directory(out, *_PLACE) as directory:
        for path in paths:
            copied = directory / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            job.write(path, copied)
        for folder, dist in job.dist.items():
            dist.write(directory / folder.relative_to(source))
        if sums:  # of the files as they are now
            write_sums(directory, {name: sha256_file(directory / name) for name in sums})
        (directory / RECORD_NAME).write_text(record, encoding="utf-8")
    return sorted(path for path in out.rglob("*") if path.is_file())


class _Job:
    """The opened files of one checkpoint and where each expert's tensors are."""

    def __init__(self, permutations: Permutations, num_experts: int, progress: Progress) -> None:
        self.permutations, self.num_experts, self.progress = permutations, num_experts, progress
        self.safetensors: dict[Path, SafetensorsFile] = {}
        self.torch: dict[Path, TorchFile] = {}
        self.dist: dict[Path, DistFolder] = {}
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, list[Any]] = defaultdict(list)
        self.done = self.total = 0

    def check(self, source: Path, indices: Iterable[Path]) -> None:
        """Index files name files and tensors that exist; each planned layer has all experts and a router."""
        self.total = sum(path.stat().st_size for path in [*self.safetensors, *self.torch])
        for index in indices:
            document = read_json(index)
            names = document.get("weight_map") if isinstance(document, dict) else None
            if not isinstance(names, dict):
                raise InputError(f"{index} has no weight_map; it is not the index of a sharded checkpoint")
            for name, shard in names.items():
                path = index.parent / str(shard)
                if not path.is_file():
                    raise InputError(
                        f"checkpoint: {shard} is missing, but {index.name} names it; bring all shards"
                    )
                if path in self.safetensors and name not in self.safetensors[path].tensors:
                    raise InputError(
                        f"checkpoint: {index.name} places {name} in {shard}, which does not hold it"
                    )
        names_found: list[str] = []
        for path, file in self.safetensors.items():
            for name, tensor in file.tensors.items():
                if name in self.tensors:
                    raise InputError(
                        f"checkpoint: {name} stands in {self.tensors[name].path.name} and {path.name}"
                    )
                self.tensors[name] = tensor
                names_found.append(name)
        for saved in self.torch.values():
            for name, value in saved.numbered.items():
                self.values[name].append(value)
            names_found += [*saved.numbered, *saved.stacked]
        experts: dict[int, set[int]] = defaultdict(set)
        stacked: set[int] = set()
        routers: set[int] = set()
        for name in names_found:
            part = expert_part(name)
            if part is None:
                continue
            if part.router:
                routers.add(part.layer)
            elif part.expert is None:
                stacked.add(part.layer)
            else:
                experts[part.layer].add(part.expert)
        for layer in self.permutations:
            missing = sorted(set(range(self.num_experts)) - experts[layer]) if layer in experts else []
            if missing:
                raise InputError(
                    f"checkpoint {source}: layer {layer} has no expert {missing[0]} ({len(missing)} of"
                    f" {self.num_experts} are missing); a shard is missing, or the plan is of another model"
                )
            if layer not in experts and layer not in stacked:
                raise InputError(
                    f"checkpoint {source}: layer {layer} has no routed experts; is the plan of another model, or are"
                    f" names without the number of their layer (as in layers.{layer}.)?"
                )
            if layer not in routers:
                raise InputError(
                    f"checkpoint {source}: layer {layer} has no router; without its rows the model would change"
                )

    def write(self, path: Path, copied: Path) -> None:
        """One file: permuted if it holds tensors, else as it is."""
        if path in self.safetensors:
            checkpoint_safetensors.write_permuted(
                self.safetensors[path], self.tensors, self.permutations, self.num_experts, copied, self._tick
            )
        elif path in self.torch:
            with tempfile.TemporaryDirectory(prefix=".moeplan-scratch-", dir=copied.parent) as scratch:
                checkpoint_torch.write_permuted(
                    self.torch[path],
                    self.values,
                    self.permutations,
                    self.num_experts,
                    copied,
                    Path(scratch),
                    self._tick,
                )
        else:
            shutil.copyfile(path, copied)

    def _tick(self, size: int) -> None:
        self.done += size
        self.progress("permuting the checkpoint", self.done / self.total)


def group_limits(checkpoint: Path) -> tuple[int, int | None] | None:
    """``(n_group, topk_group)`` from the checkpoint's own ``config.json``; None where there is none."""
    config = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    if not config.is_file():
        return None
    document = read_json(config)
    document = document.get("text_config", document) if isinstance(document, dict) else {}
    groups, top = document.get("n_group"), document.get("topk_group")
    if not all(value is None or (type(value) is int and value > 0) for value in (groups, top)):
        raise InputError(f"{config}: n_group ({groups!r}) and topk_group ({top!r}) must be positive integers")
    return (groups or 1, top)


def record_text(fields: dict[str, Any]) -> str:
    """The permutation as JSON, one line per layer."""
    rows = ",\n    ".join(json.dumps(row) for row in fields["new_to_old"])
    head = "".join(
        f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in fields.items() if key != "new_to_old"
    )
    return f'{{\n{head}  "new_to_old": [\n    {rows}\n  ]\n}}\n'
