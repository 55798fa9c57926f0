"""Checkpoints: weights and optimizer state by logical expert, in safetensors shards with an index.

A checkpoint does not know how it was placed or split: each expert, with its moments, stands once under its logical
number, in the names of Hugging Face (``model.layers.3.mlp.experts.7.gate_proj.weight``), optimizer state under
``optimizer.first.`` and so on before the same name. So it resumes on any number of ranks under any placement, and
whatever reads or relabels checkpoints of that form works on it. The directory appears whole or not at all, holds
finite numbers only, and ``SHA256SUMS`` of its files: what was damaged later is found before it is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.errors import InputError, RunError
from moeplan.execution.experts import split_row
from moeplan.execution.groups import Axis
from moeplan.execution.shard import write_shard
from moeplan.execution.train import Trainer
from moeplan.files import (
    SUMS,
    read_json,
    read_sums,
    sha256_bytes,
    unlike_its_sum,
    write_sums,
    write_text,
)
from moeplan.specs.catalogue import slug

__all__ = ["CheckpointReader", "load_checkpoint", "newest_whole", "save_checkpoint"]

_INDEX, _META = "model.safetensors.index.json", "moeplan_checkpoint.json"
_MATRICES = ("gate_proj", "up_proj", "down_proj")


def _dense_name(name: str) -> str:
    """Our module's name in the names of Hugging Face."""
    for ours, theirs in ((".mlp.router.weight", ".mlp.gate.weight"), (".mlp.shared.", ".mlp.shared_experts.")):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def _bias_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"


def _expert_names(layer: int, expert: int) -> list[str]:
    return [f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight" for matrix in _MATRICES]


def _matrices(row_W: torch.Tensor, hidden: int, intermediate: int) -> list[torch.Tensor]:
    gate_up, down = split_row(row_W, hidden, intermediate)
    return [part.contiguous() for part in (gate_up[:intermediate], gate_up[intermediate:], down)]


def _named(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What this rank writes: its first copies of experts; rank 0 all other weights too. Every rank calls it."""
    mesh, optimizer, spec = trainer.mesh, trainer.optimizer, trainer.options.model
    writes = mesh.edp.rank == 0 and mesh.tp.rank == 0
    found: dict[str, torch.Tensor] = {}
    for moe, state in zip(trainer.moe_layers, optimizer.states, strict=True):
        layer, table = moe.experts, moe.experts.table
        rows = {"": layer.weights_SW.detach()}
        rows |= {f"optimizer.{name}.": state.whole(kept) for name, kept in state.tensors.items()}
        for prefix, row_SW in rows.items():
            parts = [row_SW]
            if mesh.tp.group is not None:
                parts = [torch.empty_like(row_SW) for _ in range(mesh.tp.size)]
                torch.distributed.all_gather(parts, row_SW.contiguous(), group=mesh.tp.group)
            whole_SW = layer.shape.join_parts(parts)
            for s, expert in enumerate(table.local_experts_S.tolist()):
                if expert == EMPTY or int(table.slot_EC[expert, 0]) != table.first_slot + s or not writes:
                    continue
                matrices = _matrices(whole_SW[s], spec.hidden_size, spec.expert_intermediate_size)
                for name, matrix in zip(_expert_names(layer.layer_id, expert), matrices, strict=True):
                    found[prefix + name] = matrix
    dense = {name: optimizer.dense_state.whole(kept) for name, kept in optimizer.dense_state.tensors.items()}
    if mesh.world.rank == 0:
        for name, parameter in zip(optimizer.names, optimizer.dense, strict=True):
            found[_dense_name(name)] = parameter.detach()
        for prefix, row_1N in dense.items():
            for name, value in zip(optimizer.names, optimizer.split(row_1N), strict=True):
                found[f"optimizer.{prefix}.{_dense_name(name)}"] = value
        for moe in trainer.moe_layers:
            found[_bias_name(moe.experts.layer_id)] = moe.router.bias_E
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def save_checkpoint(trainer: Trainer, path: Path) -> int:
    """Write ``path`` (a directory), replacing what is there; every rank calls it. Bytes written by all ranks.

    Raises:
        RunError: a rank could not write, or has a number that is not finite; nothing appears under ``path``.
    """
    mesh = trainer.mesh
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.writing")
    if mesh.world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        _quietly(lambda: temporary.mkdir(parents=True))
    mesh.world.all_of(None)  # the directory is there
    shard = f"model-{mesh.world.rank + 1:05d}-of-{mesh.world.size:05d}.safetensors"
    with trainer.clock.span("checkpoint") as span:
        tensors = _named(trainer)
        said, digest = _not_finite(trainer, tensors), ""
        if tensors and said is None:
            try:
                digest = write_shard(tensors, temporary / shard)
            except OSError as error:
                said = f"rank {mesh.world.rank} cannot write {path}: {error.strerror or error}"
            span.amount = sum(t.numel() * t.element_size() for t in tensors.values())
        told = mesh.world.all_of((said, shard, digest, sorted(tensors), int(span.amount)))
        failures = [failure for failure, *_ in told if failure]
        if not failures and mesh.world.rank == 0:
            said_here = _quietly(lambda: _finish(trainer, path, temporary, told))
            failures = [f"cannot write {path}: {why}" for why in said_here]
        failures = [why for why in mesh.world.all_of(failures[0] if failures else None) if why]
    if failures:
        if mesh.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{failures[0]}; {path.name} was not written")
    return sum(size for *_, size in told)


def _not_finite(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> str | None:
    """The first tensor with a number that is none: a run resumed from it would diverge again."""
    for name, tensor in tensors.items():
        # Least and most are NaN where a number is; one pass, and a tenth of the time that isfinite takes.
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            return (
                f"{name} is not finite after {trainer.steps_done} steps: training diverged; give a lower --lr than"
                f" {trainer.options.lr:g}"
            )
    return None


def _finish(trainer: Trainer, path: Path, temporary: Path, told: list[Any]) -> None:
    """Index, model and what to know about the run; then the directory takes its name."""
    weight_map = {name: shard for _, shard, _, names, _ in told for name in names}
    index = {"metadata": {"total_size": sum(size for *_, size in told)}, "weight_map": dict(sorted(weight_map.items()))}
    placement, o = trainer.migrator.goal, trainer.options
    meta = {
        "schema_version": 1,
        "model": o.model.name,
        "step": trainer.steps_done,
        "optimizer_steps": trainer.optimizer.steps,
        "seed": o.seed,
        "placement": {
            "physical_to_logical_map": placement.physical_to_logical_LP.tolist(),
            "rank_of_slot": placement.rank_of_slot_P.tolist(),
            "share": None if placement.share_LP is None else placement.share_LP.tolist(),
            "num_ranks": placement.num_ranks,
            "ranks_per_node": placement.ranks_per_node,
        },
    }
    texts = {_INDEX: json.dumps(index, indent=1) + "\n", _META: json.dumps(meta) + "\n"}
    texts["config.json"] = trainer.options.model.model_dump_json(indent=1) + "\n"
    for name, text in texts.items():
        write_text(temporary / name, text)
    digests = {name: sha256_bytes(text.encode()) for name, text in texts.items()}
    write_sums(temporary, digests | {shard: digest for _, shard, digest, names, _ in told if names})
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _quietly(work: Any) -> list[str]:
    """What went wrong, as a list of none or one: other ranks wait for this one to say so."""
    try:
        work()
    except (OSError, InputError) as error:
        return [str(getattr(error, "strerror", None) or error)]
    return []


# ---------------------------------------------------------------------- reading


class CheckpointReader:
    """The tensors of a checkpoint by name; shards are opened when they are needed.

    Its files are held against ``SHA256SUMS``, where it has one (older checkpoints have none): all of them by this
    rank, or, where ``ranks`` are given and each of them makes a reader, each rank its part.

    Raises:
        InputError: no checkpoint, damaged, or a shard or expert is missing; the message names it.
    """

    def __init__(self, path: Path, ranks: Axis | None = None) -> None:
        self.path = path
        if not (path / _META).is_file():
            raise InputError(f"{path} is not a checkpoint of a live run: it has no {_META}")
        self.meta = read_json(path / _META)
        index = read_json(path / _INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
            raise InputError(f"checkpoint {path}: {_INDEX} has no weight_map of names to shards; it is damaged")
        self._map: dict[str, str] = names
        sums = read_sums(path)
        for shard in sorted(set(self._map.values())):
            if not (path / shard).is_file():
                raise InputError(f"checkpoint {path}: {shard} is missing, but {_INDEX} names it; bring all shards")
            if sums and shard not in sums:
                raise InputError(f"checkpoint {path}: {SUMS} has no sum of {shard}; it is damaged")
        rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        mine = sorted(sums.items())[rank::size]
        wrong = next((why for name, digest in mine if (why := unlike_its_sum(path, name, digest))), None)
        told = [wrong] if ranks is None else ranks.all_of(wrong)
        if why := next((why for why in told if why), None):
            raise InputError(f"checkpoint {path}: {why}; it is damaged, or was changed (then remove {SUMS})")
        self._open: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Steps done when it was saved.

        Raises:
            InputError: the record is damaged.
        """
        return self._number("step")

    @property
    def exact(self) -> str:
        """Prefix of the weights in float32: the master copies where it has them."""
        return "optimizer.master." if any(name.startswith("optimizer.master.") for name in self._map) else ""

    @property
    def optimizer_steps(self) -> int:
        """Updates that the moments have seen.

        Raises:
            InputError: the record is damaged.
        """
        return self._number("optimizer_steps")

    def _number(self, name: str) -> int:
        value = self.meta.get(name) if isinstance(self.meta, dict) else None
        if not isinstance(value, int):
            raise InputError(f"checkpoint {self.path}: {name} ({value!r}) in {_META} is not a number; it is damaged")
        return value

    def require_model(self, name: str) -> None:
        """It is of the model called ``name``.

        Raises:
            InputError: it is of another, or the record is damaged.
        """
        saved = self.meta.get("model") if isinstance(self.meta, dict) else None
        if slug(str(saved)) != slug(name):
            raise InputError(f"checkpoint {self.path} is of model {saved}, the run is of {name}")

    def require_experts(self, layers: Iterable[int], num_experts: int) -> None:
        """Every layer has the experts 0 to ``num_experts - 1``, without a gap, and no others.

        Raises:
            InputError: naming layer and expert.
        """
        for layer in layers:
            there = {e for e in range(num_experts + 1) if set(_expert_names(layer, e)) <= self._map.keys()}
            missing = [e for e in range(num_experts) if e not in there]
            if missing:
                raise InputError(
                    f"checkpoint {self.path}: layer {layer} has no expert {missing[0]} of 0..{num_experts - 1}"
                    f" ({len(missing)} missing); experts must be there without a gap"
                )
            if num_experts in there:
                raise InputError(
                    f"checkpoint {self.path}: layer {layer} has more than the model's {num_experts} experts;"
                    " it is of another model"
                )

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor, whole.

        Raises:
            InputError: missing, of another shape, or its shard is damaged.
        """
        shard = self._map.get(name)
        if shard is None:
            raise InputError(f"checkpoint {self.path}: {name} is missing; is it of another model?")
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.path / shard, framework="pt")
            value: torch.Tensor = self._open[shard].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"checkpoint {self.path}: {name} cannot be read from {shard}: {error}") from error
        if tuple(value.shape) != shape:
            raise InputError(
                f"checkpoint {self.path}: {name} has shape {list(value.shape)}, the model needs {list(shape)};"
                " it is of another model"
            )
        return value

    def row(self, prefix: str, layer: int, expert: int, hidden: int, intermediate: int) -> torch.Tensor:
        """An expert's numbers ``[W]``; ``prefix`` names optimizer state."""
        shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        names = _expert_names(layer, expert)
        return torch.cat([self.tensor(prefix + n, s).flatten() for n, s in zip(names, shapes, strict=True)])

    def placement(self, num_ranks: int, ranks_per_node: int) -> Placement | None:
        """The placement it was saved under, where that is for so many ranks in such nodes.

        Raises:
            InputError, PlanError: the record is damaged.
        """
        try:
            saved = self.meta["placement"]
            if (saved["num_ranks"], saved["ranks_per_node"]) != (num_ranks, ranks_per_node):
                return None
            rows = np.asarray(saved["physical_to_logical_map"], np.int32)
            share = None if saved["share"] is None else np.asarray(saved["share"], np.float64)
            placement = Placement(
                rows, np.asarray(saved["rank_of_slot"], np.int32), int(rows.max()) + 1, num_ranks, ranks_per_node, share
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"checkpoint {self.path}: {_META} is damaged ({error!r})") from error
        placement.require_valid(allow_duplicates=True)
        return placement


def newest_whole(folder: Path, not_after: str | None = None, ranks: Axis | None = None) -> CheckpointReader | None:
    """The checkpoint ``step-*`` in ``folder`` written last that can be read and agrees with its sums; None if none.

    ``not_after`` is the name of the latest that counts: those of more steps are another run's. ``ranks`` as in
    :class:`CheckpointReader`.
    """

    def steps(name: str) -> tuple[int, str]:
        return len(name), name

    found = [path for path in folder.glob("step-*") if (path / _META).is_file()]
    found = [path for path in found if not_after is None or steps(path.name) <= steps(not_after)]
    # By time: of an older run in the same folder there may be some of more steps than the newest whole one's.
    for path in sorted(found, key=lambda path: ((path / _META).stat().st_mtime_ns, steps(path.name)), reverse=True):
        with suppress(InputError):
            return CheckpointReader(path, ranks)
    return None


def _prefix(state: str, reader: CheckpointReader) -> str:
    """Where the optimizer's ``state`` stands: a master copy begins as the weights that were saved in float32."""
    return reader.exact if state == "master" else f"optimizer.{state}."


@torch.no_grad()
def load_checkpoint(trainer: Trainer, reader: CheckpointReader) -> None:
    """Bring a trainer to where the checkpoint was saved, whatever its ranks, placement and number format.

    Raises:
        InputError: it is of another model, or incomplete.
    """
    spec, optimizer = trainer.options.model, trainer.optimizer
    reader.require_model(spec.name)
    reader.require_experts(spec.moe_layer_ids, spec.num_experts)
    hidden, size = spec.hidden_size, spec.expert_intermediate_size
    for moe, state in zip(trainer.moe_layers, optimizer.states, strict=True):
        layer = moe.experts
        for s, expert in enumerate(layer.table.local_experts_S.tolist()):
            if expert == EMPTY:
                continue
            layer.weights_SW[s] = layer.shape.local_part(reader.row(reader.exact, layer.layer_id, expert, hidden, size))
            for name, kept in state.tensors.items():
                row = reader.row(_prefix(name, reader), layer.layer_id, expert, hidden, size)
                kept[s] = layer.shape.local_part(row)[state.columns]
        moe.router.bias_E.copy_(reader.tensor(_bias_name(layer.layer_id), (spec.num_experts,)))
    for name, parameter in zip(optimizer.names, optimizer.dense, strict=True):
        parameter.copy_(reader.tensor(reader.exact + _dense_name(name), tuple(parameter.shape)))
    for prefix, kept in optimizer.dense_state.tensors.items():
        parts = [
            reader.tensor(_prefix(prefix, reader) + _dense_name(name), tuple(p.shape)).flatten()
            for name, p in zip(optimizer.names, optimizer.dense, strict=True)
        ]
        kept.copy_(torch.cat(parts)[None, optimizer.dense_state.columns])
    trainer.steps_done, optimizer.steps = reader.step, reader.optimizer_steps
