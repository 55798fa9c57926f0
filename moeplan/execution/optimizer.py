"""AdamW over experts and all other weights, its state by rows so that it can move with the experts.

``S`` slots of this rank, ``W`` numbers of an expert, ``L`` MoE layers, ``E`` experts. The state of an expert is one row
of each of ``first`` and ``second`` (moments) and, where weights are not float32, ``master`` (their float32 copy).
With ZeRO-1 (arXiv 1910.02054) the ranks that hold the same weights each keep and update a part of every row, and
gather the weights again; a part is a range of columns, so it moves with its expert like the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from moeplan.artifacts.placement import EMPTY
from moeplan.execution.clock import Clock
from moeplan.execution.groups import Axis, Mesh
from moeplan.execution.layer import ExpertLayer
from moeplan.execution.sync import sync_copies

__all__ = ["AdamOptions", "MoEAdamW", "RowState"]


@dataclass(frozen=True, slots=True)
class AdamOptions:
    """AdamW (arXiv 1711.05101); ``clip``: greatest norm of all gradients together; ``zero``: ZeRO-1."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    zero: bool = False


class RowState:
    """Moments (and master copy) of rows ``[S, W]``: the columns that this rank of ``axis`` keeps."""

    def __init__(self, rows_SW: torch.Tensor, axis: Axis, master: bool | None = None) -> None:
        self.axis = axis
        self.width = rows_SW.shape[1]
        part = -(-self.width // axis.size)
        self.columns = slice(min(part * axis.rank, self.width), min(part * (axis.rank + 1), self.width))
        kept = rows_SW.detach()[:, self.columns]
        self.tensors: dict[str, torch.Tensor] = {
            "first": torch.zeros_like(kept, dtype=torch.float32),
            "second": torch.zeros_like(kept, dtype=torch.float32),
        }
        if rows_SW.dtype != torch.float32 if master is None else master:
            self.tensors["master"] = kept.float()

    @torch.no_grad()
    def update(
        self,
        rows_SW: torch.Tensor,
        grad_SW: torch.Tensor,
        o: AdamOptions,
        lr: float,
        decay: float | torch.Tensor,
        step: int,
    ) -> None:
        """One step of AdamW on this rank's columns; then all columns are gathered. Elementwise: no order of sums."""
        grad = grad_SW[:, self.columns].float()
        first, second = self.tensors["first"], self.tensors["second"]
        first.mul_(o.betas[0]).add_(grad, alpha=1 - o.betas[0])
        second.mul_(o.betas[1]).addcmul_(grad, grad, value=1 - o.betas[1])
        scale = (second / (1 - o.betas[1] ** step)).sqrt_().add_(o.eps)
        weights = self.tensors.get("master")
        kept = rows_SW[:, self.columns] if weights is None else weights
        decay = decay[:, self.columns] if isinstance(decay, torch.Tensor) else decay
        kept.mul_(1 - lr * decay).addcdiv_(first, scale, value=-lr / (1 - o.betas[0] ** step))
        if weights is not None:
            rows_SW[:, self.columns] = weights.to(rows_SW.dtype)
        if self.axis.size > 1:
            rows_SW.copy_(self.whole(rows_SW[:, self.columns]))

    def whole(self, kept: torch.Tensor) -> torch.Tensor:
        """All columns ``[S, W]`` of what each rank of the axis keeps."""
        if self.axis.size == 1:
            return kept
        part = -(-self.width // self.axis.size)
        padded = kept.new_zeros(len(kept), part)
        padded[:, : kept.shape[1]] = kept
        parts = [torch.empty_like(padded) for _ in range(self.axis.size)]
        dist.all_gather(parts, padded, group=self.axis.group)
        return torch.cat(parts, 1)[:, : self.width]


class MoEAdamW:
    """Reduces gradients, clips them, and steps; ``dense`` are all parameters but the experts'.

    Gradients are means over the DP ranks. Copies of an expert get the same gradient, so they stay the same. Norms are
    summed expert by expert in logical order: nothing here depends on where an expert is.
    """

    def __init__(
        self, dense: Iterable[tuple[str, nn.Parameter]], experts: list[ExpertLayer], mesh: Mesh, options: AdamOptions,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.options, self.mesh, self.clock, self.experts = options, mesh, clock or Clock(), experts
        self.names, self.dense = zip(*dense, strict=True)
        alone = Axis(0, (mesh.world.ranks[mesh.world.rank],))
        narrow = any(p.dtype != torch.float32 for p in self.dense)
        rows_1N = self._flat([p.detach() for p in self.dense])
        self.dense_state = RowState(rows_1N, mesh.dp if options.zero else alone, master=narrow)
        # Matrices are decayed, vectors (norms) are not.
        self._decay_1N = self._flat([torch.full_like(p, options.weight_decay * (p.dim() > 1)) for p in self.dense])
        self.expert_axis = mesh.edp if options.zero else alone
        self.states = [RowState(layer.weights_SW, self.expert_axis) for layer in experts]
        self.steps = 0
        self.grad_norm = 0.0

    def _flat(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """One row of all of them, in float32."""
        return torch.cat([t.float().flatten() for t in tensors])[None]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.dense, *(layer.weights_SW for layer in self.experts)):
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """Reduce gradients over the mesh and update all weights; every rank calls it."""
        o, lr = self.options, self.options.lr if lr is None else lr
        self.steps += 1
        grad_1N, grads = self._reduced()
        self.grad_norm = self._norm(grad_1N, grads)
        if o.clip and self.grad_norm > o.clip:
            factor = o.clip / (self.grad_norm + 1e-6)
            for grad in (grad_1N, *grads):
                grad.mul_(factor)
        with self.clock.span("optimizer"):
            rows_1N = self._flat([p.detach() for p in self.dense])
            self.dense_state.update(rows_1N, grad_1N, o, lr, self._decay_1N, self.steps)
            for parameter, value in zip(self.dense, self.split(rows_1N), strict=True):
                parameter.copy_(value)
            for layer, state, grad in zip(self.experts, self.states, grads, strict=True):
                state.update(layer.weights_SW, grad, o, lr, o.weight_decay, self.steps)

    def split(self, row_1N: torch.Tensor) -> list[torch.Tensor]:
        """The dense parameters' parts of one flat row, in their shapes."""
        sizes = [p.numel() for p in self.dense]
        return [part.view(p.shape) for part, p in zip(row_1N[0].split(sizes), self.dense, strict=True)]

    def _reduced(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        mesh, dp = self.mesh, self.mesh.dp.size
        with self.clock.span("gradient_sync") as span:
            grad_1N = self._flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.dense])
            span.amount = grad_1N.numel() * grad_1N.element_size() if dp > 1 else 0
            mesh.dp.sum_(grad_1N).div_(dp)
        sync_copies(self.experts, mesh, self.clock)
        grads = []
        for layer in self.experts:
            grad = layer.weights_SW.grad
            if grad is None:
                grad = torch.zeros_like(layer.weights_SW)
            grads.append(mesh.edp.sum_(grad).div_(dp))
        return grad_1N, grads

    def _norm(self, grad_1N: torch.Tensor, grads: list[torch.Tensor]) -> float:
        tables = [layer.table for layer in self.experts]
        num_experts = max((table.num_experts for table in tables), default=0)
        square_LE = torch.zeros(len(tables), num_experts, dtype=torch.float64)
        for l, (table, grad_SW) in enumerate(zip(tables, grads, strict=True)):
            for s, expert in enumerate(table.local_experts_S.tolist()):
                if expert != EMPTY and int(table.slot_EC[expert, 0]) == table.first_slot + s:  # one copy counts
                    square_LE[l, expert] = float(torch.linalg.vector_norm(grad_SW[s].float())) ** 2
        square_LE = square_LE.to(grad_1N.device)
        self.mesh.ep.sum_(square_LE)
        self.mesh.tp.sum_(square_LE)
        dense = float(torch.linalg.vector_norm(grad_1N)) ** 2
        return math.sqrt(dense + float(square_LE.sum()))
