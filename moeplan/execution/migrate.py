"""Apply a plan to a running model: experts and their optimizer state move between ranks at a step boundary.

``S`` slots of this rank, ``L`` MoE layers. For each layer, or for all at once where no stall budget is given:

1. prepare: every rank packs the rows it sends, with a checksum each, and allocates what it will hold;
2. vote: if any rank could not, nothing has happened;
3. transfer: one batch of point-to-point messages;
4. vote: if any message failed or any checksum differs, what was staged is dropped and the old placement stands;
5. switch: weights, optimizer state and the table that routes tokens change together, on all ranks or on none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from moeplan.artifacts.placement import Placement
from moeplan.errors import PlanError, RunError
from moeplan.execution.clock import Clock
from moeplan.execution.groups import Mesh
from moeplan.execution.layer import ExpertLayer
from moeplan.execution.moves import Fetch, fetches_of, require_ranks
from moeplan.execution.optimizer import MoEAdamW
from moeplan.execution.parcels import Message, Send, message_bytes, pack, send_batch, unpack
from moeplan.files import canonical_json, sha256_bytes

__all__ = ["ExpertState", "MigrationReport", "Migrator", "torch_state"]


class ExpertState(Protocol):
    """What moves with an expert beside its weights: tensors with one row per slot, by name."""

    def rows(self, layer: int) -> dict[str, torch.Tensor]:
        """Tensors ``[S, ...]`` of the layer with this index."""
        ...

    def set_rows(self, layer: int, rows: dict[str, torch.Tensor]) -> None:
        """Take the tensors' successors; the layer's ``weights_SW`` is a new parameter by then."""
        ...


class _AdamState:
    def __init__(self, optimizer: MoEAdamW) -> None:
        self.optimizer = optimizer

    def rows(self, layer: int) -> dict[str, torch.Tensor]:
        return self.optimizer.states[layer].tensors

    def set_rows(self, layer: int, rows: dict[str, torch.Tensor]) -> None:
        self.optimizer.states[layer].tensors = rows


class _TorchState:
    """State of a ``torch.optim`` optimizer: its tensors of the parameter's own shape."""

    def __init__(self, optimizer: torch.optim.Optimizer, layers: Sequence[ExpertLayer]) -> None:
        self.optimizer, self.layers = optimizer, layers
        self.known = [layer.weights_SW for layer in layers]

    def rows(self, layer: int) -> dict[str, torch.Tensor]:
        weights = self.known[layer]
        state = self.optimizer.state.get(weights, {})
        return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == weights.shape}

    def set_rows(self, layer: int, rows: dict[str, torch.Tensor]) -> None:
        old, new = self.known[layer], self.layers[layer].weights_SW
        for group in self.optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        if old in self.optimizer.state:
            self.optimizer.state[new] = {**self.optimizer.state.pop(old), **rows}
        self.known[layer] = new


class _NoState:
    def rows(self, layer: int) -> dict[str, torch.Tensor]:
        return {}

    def set_rows(self, layer: int, rows: dict[str, torch.Tensor]) -> None:
        pass


def torch_state(optimizer: torch.optim.Optimizer, layers: Sequence[ExpertLayer]) -> ExpertState:
    """The state of any ``torch.optim`` optimizer that keeps tensors of its parameters' shape (Adam, SGD, ...).

    A move makes new parameters of the experts and puts them in the place of the old ones in the optimizer.
    """
    return _TorchState(optimizer, layers)



@dataclass(slots=True)
class MigrationReport:
    """What a migration did: ``stalls_s`` at each step boundary that worked on it, the slowest rank's. ``moved_bytes``
    are of all ranks.

    ``failure`` says why it stopped; layers that had switched by then stay switched, every other stands as it was.
    """

    moved_experts: int = 0
    moved_bytes: int = 0
    stalls_s: list[float] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    finished: bool = False
    failure: str | None = None

    @property
    def stall_s(self) -> float:
        """Seconds in which training stood still, all boundaries together."""
        return sum(self.stalls_s)


@dataclass(slots=True)
class _Staged:
    """New tensors of one layer, beside the old ones."""

    row: int
    tensors: dict[str, torch.Tensor]


class Migrator:
    """Moves the experts of ``layers`` to a new placement; one per model, on every rank.

    ::

        migrator = Migrator(layers, mesh, placement, optimizer)
        migrator.submit(plan.placement)              # between steps; refused if it does not fit
        ...
        report = migrator.at_step_boundary(0.05)     # after each step; None while there is nothing to do

    ``send`` may be replaced, to send another way.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        mesh: Mesh,
        placement: Placement,
        state: MoEAdamW | ExpertState | None = None,
        clock: Clock | None = None,
        send: Send = send_batch,
    ) -> None:
        self.layers, self.mesh, self.clock, self.send = list(layers), mesh, clock or Clock(), send
        if isinstance(state, MoEAdamW):
            state = _AdamState(state)
        self.state: ExpertState = state or _NoState()
        self._of_layer = [placement] * len(self.layers)
        self._target: Placement | None = None
        self._left: list[int] = []
        self._last_s = 0.0
        self.report: MigrationReport | None = None

    def submit(self, target: Placement, layer_order: Sequence[int] | None = None) -> None:
        """Begin to move to ``target`` at the next step boundary; every rank calls it with the same placement.

        ``layer_order``: rows of the placement, those that gain most first.

        Raises:
            PlanError: the placement does not fit, or ranks were given different ones; nothing has moved.
            RunError: another migration is not finished.
        """
        if self._target is not None:
            raise RunError("a migration is under way; wait for it before the next plan is applied")
        require_ranks(target, self.mesh)
        ours, theirs = (len(self.layers), self._of_layer[0].num_experts), (target.num_layers, target.num_experts)
        if ours != theirs:
            raise PlanError(
                f"placement has {theirs[0]} layers of {theirs[1]} experts, the model has {ours[0]} of {ours[1]}"
            )
        target.require_valid(allow_duplicates=True)
        told = self.mesh.world.all_of(_digest(target))
        if len(set(told)) > 1:
            odd = next(rank for rank, digest in enumerate(told) if digest != told[0])
            raise PlanError(f"rank {odd} was given another plan than rank 0; give all ranks the same file")
        self._target, self.report = target, MigrationReport()
        self._left = list(layer_order if layer_order is not None else range(target.num_layers))

    @property
    def under_way(self) -> bool:
        """Whether layers are still to be moved."""
        return self._target is not None

    @property
    def placement(self) -> Placement:
        """The placement in force, layer by layer: amid a migration, and after one that stopped, some layers have moved
        and others not."""
        return Placement.by_layer(self._of_layer)

    @property
    def goal(self) -> Placement:
        """The placement in force, or the one that layers are on their way to."""
        return self.placement if self._target is None else self._target

    def at_step_boundary(self, budget_s: float | None = None) -> MigrationReport | None:
        """Move what fits into ``budget_s`` seconds, at least one layer; all layers as one without a budget.

        Returns the report once the migration has ended, else None. Every rank calls it with the same budget.

        Raises:
            RunError: a rank was lost; no switch was made that others did not make: start again from a checkpoint.
        """
        with torch.no_grad():
            return self._advance(budget_s)

    def _advance(self, budget_s: float | None) -> MigrationReport | None:
        if self._target is None or self.report is None:
            return None
        begin, spent = time.perf_counter(), 0.0
        while self._left and self.report.failure is None:
            if budget_s is not None and spent and spent + self._last_s > budget_s:
                break
            group = self._left if budget_s is None else self._left[:1]
            self.report.failure = self._move(group)
            elapsed = self._agree(0, time.perf_counter() - begin)[1]
            self._last_s, spent = elapsed - spent, elapsed
            if self.report.failure is None:
                self.report.layers += group
                self._left = self._left[len(group) :]
        self.report.stalls_s.append(spent)
        if self._left and self.report.failure is None:
            return None
        report = self.report
        report.finished = not self._left
        if report.failure is not None and report.layers:
            report.failure += f"; {len(report.layers)} of {len(self.layers)} layers had moved by then and stay so"
        self._target, self.report, self._left = None, None, []
        return report

    def _agree(self, failed: int, elapsed_s: float = 0.0) -> tuple[bool, float]:
        """Whether any rank failed, and the longest time, on all ranks."""
        value = torch.tensor([float(failed), elapsed_s], dtype=torch.float64, device=self.mesh.device)
        if self.mesh.world.group is not None:
            try:
                dist.all_reduce(value, dist.ReduceOp.MAX, group=self.mesh.world.group)
            except (RuntimeError, OSError) as error:
                raise RunError(
                    "a rank was lost while experts moved; the placement before stands, start again from the last"
                    f" checkpoint ({str(error).splitlines()[0]})"
                ) from error
        return bool(value[0]), float(value[1])

    def _move(self, rows: list[int]) -> str | None:
        """Stage, vote, switch; None, or why nothing changed."""
        assert self._target is not None
        assert self.report is not None
        target = self._target
        sent_R = [0] * self.mesh.ep.size
        fetches = {row: fetches_of(self._of_layer[row], target, row, sent_R) for row in rows}
        why: str | None = None
        staged: list[_Staged] = []
        out: list[Message] = []
        into: list[tuple[Message, _Staged, int]] = []
        with self.clock.span("migrate", -1 if len(rows) > 1 else self.layers[rows[0]].layer_id) as span:
            try:
                for row in rows:
                    staged.append(self._prepare(row, fetches[row], out, into))
            except (RuntimeError, MemoryError) as error:
                said = (str(error).splitlines() or ["out of memory"])[0]
                why = f"rank {self.mesh.world.rank} could not prepare: {said}"
            if self._agree(why is not None)[0]:
                return self._reason(why)
            try:
                self.send(out, [message for message, _, _ in into], self.mesh.ep)
                for message, stage, slot in into:
                    why = why or self._take(message, stage, slot)
            except (RuntimeError, OSError) as error:
                why = f"rank {self.mesh.world.rank} could not transfer: {str(error).splitlines()[0]}"
            if self._agree(why is not None)[0]:
                return self._reason(why)
            for stage in staged:
                self._switch(stage, target)
            span.amount = sum(len(message.data) for message in out)
        self.report.moved_experts += sum(f.rank != f.source_rank for row in rows for f in fetches[row])
        for row in rows:
            size = sum(t.shape[1] * t.element_size() for t in self._tensors(row).values())
            groups = self.mesh.world.size // self.mesh.ep.size  # each moves its part or its own copy
            self.report.moved_bytes += groups * size * sum(f.rank != f.source_rank for f in fetches[row])
        return None

    def _reason(self, why: str | None) -> str:
        """The first rank's reason, known to all."""
        reasons = [reason for reason in self.mesh.world.all_of(why) if reason is not None]
        return str(reasons[0])

    def _tensors(self, row: int) -> dict[str, torch.Tensor]:
        return {"weights": self.layers[row].weights_SW.data, **self.state.rows(row)}

    def _prepare(
        self, row: int, fetches: list[Fetch], out: list[Message], into: list[tuple[Message, _Staged, int]]
    ) -> _Staged:
        """New tensors with what stays on this rank; messages for what leaves and what comes."""
        assert self._target is not None
        me, ranks = self.mesh.ep.rank, self._target.rank_of_slot_P
        first_old = int(np.searchsorted(self._of_layer[row].rank_of_slot_P, me))
        first_new, slots = int(np.searchsorted(ranks, me)), int((ranks == me).sum())
        old = self._tensors(row)
        stage = _Staged(row, {name: tensor.new_zeros(slots, *tensor.shape[1:]) for name, tensor in old.items()})
        like = [tensor[0] if len(tensor) else tensor.new_empty(tensor.shape[1:]) for tensor in old.values()]
        for f in fetches:
            if f.source_rank == me and f.rank == me:
                for name, tensor in old.items():
                    stage.tensors[name][f.slot - first_new] = tensor[f.source_slot - first_old]
            elif f.source_rank == me:
                out.append(Message(f.rank, pack([tensor[f.source_slot - first_old] for tensor in old.values()])))
            elif f.rank == me:
                data = torch.empty(message_bytes(like), dtype=torch.uint8, device=self.mesh.device)
                into.append((Message(f.source_rank, data), stage, f.slot - first_new))
        return stage

    def _take(self, message: Message, stage: _Staged, slot: int) -> str | None:
        rows = unpack(message.data, [tensor[slot] for tensor in stage.tensors.values()])
        if rows is None:
            return (
                f"rank {self.mesh.world.rank} received an expert of layer {self.layers[stage.row].layer_id} from EP"
                f" rank {message.peer} with a wrong checksum"
            )
        for tensor, value in zip(stage.tensors.values(), rows, strict=True):
            tensor[slot] = value
        return None

    def _switch(self, stage: _Staged, target: Placement) -> None:
        layer, tensors = self.layers[stage.row], dict(stage.tensors)
        # A new parameter: the number of slots may differ, and what autograd keeps of the old one has the old shape.
        layer.weights_SW = torch.nn.Parameter(tensors.pop("weights"))
        self.state.set_rows(stage.row, tensors)
        layer.set_placement(target)
        self._of_layer[stage.row] = target


def _digest(placement: Placement) -> str:
    share = placement.share_LP
    return sha256_bytes(
        canonical_json(
            [
                placement.physical_to_logical_LP.tolist(),
                placement.rank_of_slot_P.tolist(),
                placement.num_ranks,
                None if share is None else share.tolist(),
            ]
        ).encode()
    )
