"""The experts of one rank: one row of numbers per slot, and the FFN over all slots at once.

``S`` slots of this rank, ``M`` (token, expert) pairs they work on, ``H`` hidden, ``F`` an expert's FFN size on this
rank (the model's over TP), ``W = 3 * F * H`` numbers of an expert: gate ``[F, H]``, up ``[F, H]``, down ``[H, F]``.
An expert is one contiguous row, so moving it, its moments or its master copy is copying a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu

from moeplan.errors import SpecError
from moeplan.execution.clock import Clock

__all__ = ["ExpertShape", "grouped_swiglu", "initial_row"]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Sizes of one expert and the part of it that this rank holds: ``tp_rank`` of ``tp``.

    Raises:
        SpecError: the FFN does not divide by ``tp``.
    """

    hidden: int
    intermediate: int
    tp: int = 1
    tp_rank: int = 0

    def __post_init__(self) -> None:
        if self.intermediate % self.tp:
            raise SpecError(f"expert_intermediate_size ({self.intermediate}) is not a multiple of tp ({self.tp})")

    @property
    def local_intermediate(self) -> int:
        """``F`` of this rank."""
        return self.intermediate // self.tp

    @property
    def row_size(self) -> int:
        """``W`` of this rank."""
        return 3 * self.hidden * self.local_intermediate

    def local_part(self, row_W: torch.Tensor) -> torch.Tensor:
        """This rank's ``W`` of the numbers of a whole expert ``[..., 3 * H * F_model]``; a copy."""
        if self.tp == 1:
            return row_W.clone()
        gate_up, down = split_row(row_W, self.hidden, self.intermediate)
        gate_up = gate_up.unflatten(-2, (2, self.intermediate))
        part = slice(self.tp_rank * self.local_intermediate, (self.tp_rank + 1) * self.local_intermediate)
        return torch.cat([gate_up[..., part, :].flatten(-3), down[..., part].flatten(-2)], -1)

    def join_parts(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """A whole expert from the parts of all TP ranks, in order."""
        if self.tp == 1:
            return parts[0]
        pairs = [split_row(part, self.hidden, self.local_intermediate) for part in parts]
        gate_up = torch.cat([gu.unflatten(-2, (2, self.local_intermediate)) for gu, _ in pairs], -2)
        return torch.cat([gate_up.flatten(-3), torch.cat([down for _, down in pairs], -1).flatten(-2)], -1)


def split_row(row_W: torch.Tensor, hidden: int, intermediate: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views ``gate_up [..., 2F, H]`` and ``down [..., H, F]`` of rows ``[..., W]``."""
    cut = 2 * intermediate * hidden
    return row_W[..., :cut].unflatten(-1, (2 * intermediate, hidden)), row_W[..., cut:].unflatten(
        -1, (hidden, intermediate)
    )


def initial_row(hidden: int, intermediate: int, seed: int, layer: int, expert: int) -> torch.Tensor:
    """A whole expert's first weights, float32 ``[W]``, the same wherever the expert is placed."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 1_000_003 + expert)
    row = torch.randn(3 * hidden * intermediate, generator=generator)
    gate_up, down = split_row(row, hidden, intermediate)
    gate_up *= hidden**-0.5
    down *= (2 * intermediate) ** -0.5
    return row


class _GroupedSwiGLU(torch.autograd.Function):
    """``down(silu(gate x) * up x)`` slot by slot; rows of a slot stand together, in slot order."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_MH: torch.Tensor,
        weights_SW: torch.Tensor,
        counts_S: list[int],
        intermediate: int,
        clock: Clock,
        layer: int,
    ) -> torch.Tensor:
        ctx.counts_S, ctx.intermediate, ctx.clock, ctx.layer = counts_S, intermediate, clock, layer
        with clock.span("experts", layer, len(rows_MH)):
            out_MH, hidden_M2F = _forward(rows_MH, weights_SW, counts_S, intermediate)
        ctx.save_for_backward(rows_MH, weights_SW, hidden_M2F)
        return out_MH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None, None]:
        rows_MH, weights_SW, hidden_M2F = ctx.saved_tensors
        with ctx.clock.span("experts", ctx.layer, len(rows_MH)):
            grad_rows_MH, grad_SW = _backward(
                grads[0].contiguous(), rows_MH, weights_SW, hidden_M2F, ctx.counts_S, ctx.intermediate
            )
        return grad_rows_MH, grad_SW, None, None, None, None


def _forward(
    rows_MH: torch.Tensor, weights_SW: torch.Tensor, counts_S: list[int], intermediate: int
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up_S, down_S = split_row(weights_SW, rows_MH.shape[1], intermediate)
    hidden_M2F = rows_MH.new_empty(len(rows_MH), 2 * intermediate)
    for s, part in _parts(counts_S):
        torch.mm(rows_MH[part], gate_up_S[s].t(), out=hidden_M2F[part])
    active_MF = silu(hidden_M2F[:, :intermediate]) * hidden_M2F[:, intermediate:]
    out_MH = torch.empty_like(rows_MH)
    for s, part in _parts(counts_S):
        torch.mm(active_MF[part], down_S[s].t(), out=out_MH[part])
    return out_MH, hidden_M2F


def _backward(
    grad_MH: torch.Tensor,
    rows_MH: torch.Tensor,
    weights_SW: torch.Tensor,
    hidden_M2F: torch.Tensor,
    counts_S: list[int],
    intermediate: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    F = intermediate
    gate_up_S, down_S = split_row(weights_SW, rows_MH.shape[1], F)
    grad_SW = torch.zeros_like(weights_SW)
    grad_gate_up_S, grad_down_S = split_row(grad_SW, rows_MH.shape[1], F)
    gate_MF, up_MF = hidden_M2F[:, :F], hidden_M2F[:, F:]
    sigmoid_MF = gate_MF.sigmoid()
    silu_MF = gate_MF * sigmoid_MF
    active_MF = silu_MF * up_MF
    grad_active_MF = torch.empty_like(active_MF)
    for s, part in _parts(counts_S):
        torch.mm(grad_MH[part], down_S[s], out=grad_active_MF[part])
        torch.mm(grad_MH[part].t(), active_MF[part], out=grad_down_S[s])
    grad_M2F = torch.empty_like(hidden_M2F)
    torch.mul(grad_active_MF * up_MF, sigmoid_MF * (1 + gate_MF - silu_MF), out=grad_M2F[:, :F])
    torch.mul(grad_active_MF, silu_MF, out=grad_M2F[:, F:])
    grad_rows_MH = torch.empty_like(rows_MH)
    for s, part in _parts(counts_S):
        torch.mm(grad_M2F[part], gate_up_S[s], out=grad_rows_MH[part])
        torch.mm(grad_M2F[part].t(), rows_MH[part], out=grad_gate_up_S[s])
    return grad_rows_MH, grad_SW


def _parts(counts_S: list[int]) -> list[tuple[int, slice]]:
    """Slots that have rows, with their rows."""
    parts, end = [], 0
    for s, count in enumerate(counts_S):
        if count:
            parts.append((s, slice(end, end + count)))
            end += count
    return parts


def grouped_swiglu(
    rows_MH: torch.Tensor,
    weights_SW: torch.Tensor,
    counts_S: list[int],
    intermediate: int,
    clock: Clock | None = None,
    layer: int = -1,
) -> torch.Tensor:
    """The FFN of each slot on its rows ``[M, H]``; ``counts_S`` says how many each slot has, in order.

    A row's result depends on its slot's rows alone, not on where the slot is: gradients are summed over a slot's rows
    in their order. (Bit for bit where H and F are multiples of 32, so that vectors have no remainder.) ``clock`` gets
    an ``experts`` span for ``layer``, forward and backward.
    """
    out_MH: torch.Tensor = _GroupedSwiGLU.apply(rows_MH, weights_SW, counts_S, intermediate, clock or Clock(), layer)
    return out_MH
