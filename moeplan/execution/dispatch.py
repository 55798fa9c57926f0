"""Tokens to the ranks of their experts and back: one swappable object per way of sending.

``T`` tokens of this rank, ``K`` choices per token, ``N`` (token, slot) pairs or token copies sent, ``M`` received,
``S`` slots of this rank, ``P`` of all EP ranks, ``R`` EP ranks, ``H`` hidden.

A dispatcher turns tokens and their slots into the rows of this rank's slots, in slot order (``dispatch``), and the
slots' results into one weighted sum per token (``combine``). Both are differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moeplan.execution.clock import Clock
from moeplan.execution.groups import Axis, Mesh
from moeplan.execution.table import LayerTable
from moeplan.specs.workload import DispatchKind

__all__ = ["Dispatched", "Dispatcher", "PairDispatcher", "RelayDispatcher", "make_dispatcher"]


@dataclass(slots=True)
class Dispatched:
    """``rows_MH`` of this rank's slots, in slot order, ``counts_S`` of them each; ``way`` leads back."""

    rows_MH: torch.Tensor
    counts_S: list[int]
    way: Any


class Dispatcher(Protocol):
    """How tokens travel. ``slots_TK`` are global slots, -1 where a choice was dropped."""

    def dispatch(
        self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, table: LayerTable, layer: int
    ) -> Dispatched:
        """Send every token to the ranks of its slots."""
        ...

    def combine(self, out_MH: torch.Tensor, sent: Dispatched) -> torch.Tensor:
        """Bring the slots' results ``out_MH`` home: per token the sum weighted by ``weights_TK``, ``[T, H]``."""
        ...


# ---------------------------------------------------------------------- pieces


@dataclass(slots=True, eq=False)
class Wire:
    """An uneven all-to-all over an axis, timed; what travels back takes the same path reversed."""

    axis: Axis
    clock: Clock
    layer: int = -1

    def send(self, rows: torch.Tensor, send_R: list[int], recv_R: list[int], kind: str) -> torch.Tensor:
        """Exchange rows (first axis): ``send_R`` to each rank, ``recv_R`` from each."""
        if self.axis.group is None:
            return rows
        out = rows.new_empty(sum(recv_R), *rows.shape[1:])
        away = len(rows) - send_R[self.axis.rank]
        size = rows.element_size() * (rows[0].numel() if len(rows) else 0)
        for rank, count in zip(self.axis.ranks, send_R, strict=True):
            self.clock.sent(rank, count * size)
        with self.clock.span(kind, self.layer, away * size):
            dist.all_to_all_single(out, rows.contiguous(), recv_R, send_R, group=self.axis.group)
        return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, wire: Wire, send_R: list[int], recv_R: list[int], kind: str
    ) -> torch.Tensor:
        ctx.wire, ctx.send_R, ctx.recv_R = wire, send_R, recv_R
        ctx.back = "combine" if kind == "dispatch" else "dispatch"
        return wire.send(rows, send_R, recv_R, kind)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return ctx.wire.send(grads[0], ctx.recv_R, ctx.send_R, ctx.back), None, None, None, None


class _Permute(torch.autograd.Function):
    """``rows[order]`` for a permutation: its gradient is the inverse permutation, with nothing summed."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Spread(torch.autograd.Function):
    """Row ``pairs // width`` for each pair; gradients are summed per row in the order of ``width``, wherever sent."""

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, pairs_N: torch.Tensor, width: int) -> torch.Tensor:
        ctx.save_for_backward(pairs_N)
        ctx.shape, ctx.width = x_TH.shape, width
        return x_TH.index_select(0, pairs_N // width)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (pairs_N,) = ctx.saved_tensors
        return _gather(grads[0], pairs_N, ctx.shape[0], ctx.width).sum(1), None, None


class _Collect(torch.autograd.Function):
    """Rows back to ``[T, width, ...]`` at their pair's place, 0 where no pair was sent; the inverse of spreading."""

    @staticmethod
    def forward(ctx: Any, rows_NH: torch.Tensor, pairs_N: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
        ctx.save_for_backward(pairs_N)
        return _gather(rows_NH, pairs_N, tokens, width)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (pairs_N,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, pairs_N), None, None, None


class _WeightedSum(torch.autograd.Function):
    """``sum_k weights_TK * out_TKH`` in float32, term by term in the order of the choices."""

    @staticmethod
    def forward(ctx: Any, out_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(out_TKH, weights_TK)
        weights_TK = weights_TK.float()
        total_TH = out_TKH[:, 0].float() * weights_TK[:, :1]
        for k in range(1, out_TKH.shape[1]):
            total_TH.addcmul_(out_TKH[:, k].float(), weights_TK[:, k, None])
        return total_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out_TKH, weights_TK = ctx.saved_tensors
        grad_TKH = (grads[0][:, None] * weights_TK.float()[..., None]).to(out_TKH.dtype)
        terms = [(out_TKH[:, k].float() * grads[0]).sum(-1) for k in range(out_TKH.shape[1])]
        return grad_TKH, torch.stack(terms, 1).to(weights_TK.dtype)


def _gather(rows: torch.Tensor, pairs_N: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
    if len(pairs_N) == tokens * width:
        return rows.index_select(0, _inverse(pairs_N)).unflatten(0, (tokens, width))
    out = rows.new_zeros(tokens * width, *rows.shape[1:])
    return out.index_copy_(0, pairs_N, rows).unflatten(0, (tokens, width))


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes ``order``."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _counts(send_RS: torch.Tensor, sizes_R: list[int], axis: Axis) -> torch.Tensor:
    """From each rank the counts for this rank's ``size`` entries, ``[R, size]``, given those sent to all, flat."""
    mine = sizes_R[axis.rank]
    if axis.group is None:
        return send_RS.reshape(1, mine)
    out = send_RS.new_empty(axis.size * mine)
    dist.all_to_all_single(out, send_RS, [mine] * axis.size, sizes_R, group=axis.group)
    return out.view(axis.size, mine)


@dataclass(slots=True, eq=False)
class _PairWay:
    """One hop of (token, slot) pairs, and how to undo it."""

    wire: Wire
    pairs_N: torch.Tensor
    send_R: list[int]
    recv_R: list[int]
    order_M: torch.Tensor | None  # None: one rank, nothing travels
    tokens: int
    width: int
    weights_TK: torch.Tensor
    outer: Any = field(default=None)


def _send_pairs(
    x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, first: int, slots_R: list[int], wire: Wire
) -> Dispatched:
    """One row per (token, slot) to the slot's rank; slots ``first`` onwards are those of the axis' ranks in order."""
    axis, total = wire.axis, sum(slots_R)
    flat = slots_TK.flatten() - first
    order = flat.argsort(stable=True)
    pairs_N = order[int((slots_TK < 0).sum()) :]  # dropped choices sort first
    count_P = torch.bincount(flat[pairs_N], minlength=total)
    spread = _Spread.apply(x_TH, pairs_N, slots_TK.shape[1])
    if axis.group is None:
        alone = _PairWay(wire, pairs_N, [], [], None, len(x_TH), slots_TK.shape[1], weights_TK)
        return Dispatched(spread, count_P.tolist(), alone)
    with wire.clock.span("dispatch", wire.layer):
        recv_RS = _counts(count_P, slots_R, axis)
    send_R = [int(part.sum()) for part in count_P.cpu().split(slots_R)]
    recv_cpu = recv_RS.cpu()
    recv_R = recv_cpu.sum(1).tolist()
    rows = _Exchange.apply(spread, wire, send_R, recv_R, "dispatch")
    # Received by rank, then slot; wanted by slot, then rank: a rank's tokens stay in their order.
    slot_M = torch.arange(recv_RS.shape[1]).repeat(axis.size).repeat_interleave(recv_cpu.flatten())
    order_M = slot_M.argsort(stable=True).to(x_TH.device)
    way = _PairWay(wire, pairs_N, send_R, recv_R, order_M, len(x_TH), slots_TK.shape[1], weights_TK)
    return Dispatched(_Permute.apply(rows, order_M, _inverse(order_M)), recv_cpu.sum(0).tolist(), way)


def _bring_pairs(out_MH: torch.Tensor, way: _PairWay) -> torch.Tensor:
    """Results back over the same hop and summed per token in the order of its choices."""
    rows = out_MH
    if way.order_M is not None:
        back = _Permute.apply(out_MH, _inverse(way.order_M), way.order_M)
        rows = _Exchange.apply(back, way.wire, way.recv_R, way.send_R, "combine")
    weighted: torch.Tensor = _WeightedSum.apply(
        _Collect.apply(rows, way.pairs_N, way.tokens, way.width), way.weights_TK
    )
    return weighted


# ---------------------------------------------------------------------- dispatchers


class PairDispatcher:
    """``per_expert``: one copy of a token for each of its experts, as in Megatron-Core's all-to-all.

    Every result travels home and is summed there in the order of the token's choices, in float32: the sum does not
    depend on where the experts are.
    """

    def __init__(self, mesh: Mesh, clock: Clock) -> None:
        self.mesh, self.clock = mesh, clock

    def dispatch(
        self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, table: LayerTable, layer: int
    ) -> Dispatched:
        """See :class:`Dispatcher`."""
        wire = Wire(self.mesh.ep, self.clock, layer)
        return _send_pairs(x_TH, slots_TK, weights_TK, 0, table.slots_R, wire)

    def combine(self, out_MH: torch.Tensor, sent: Dispatched) -> torch.Tensor:
        """See :class:`Dispatcher`."""
        return _bring_pairs(out_MH, sent.way)


@dataclass(slots=True, eq=False)
class _RelayWay:
    wire: Wire
    pairs_N: torch.Tensor
    send_G: list[int]
    recv_G: list[int]
    tokens: int
    dtype: torch.dtype


class RelayDispatcher:
    """One copy of a token per group of ranks that it needs, then one per expert inside the group.

    ``per_node`` (DeepEP's normal mode): groups are nodes; the copy goes to the rank of the same number there, which
    fans it out, sums the node's results and sends one row back. ``per_rank``: groups are ranks. ``allgather``: every
    token goes to every rank. The sum runs within groups first, so that its rounding depends on the placement.
    """

    def __init__(self, across: Axis, inside: Axis, clock: Clock, everywhere: bool = False) -> None:
        self.across, self.inside, self.clock, self.everywhere = across, inside, clock, everywhere

    def dispatch(
        self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, table: LayerTable, layer: int
    ) -> Dispatched:
        """See :class:`Dispatcher`."""
        G, size = self.across.size, self.inside.size
        slots_G = [sum(table.slots_R[g * size : (g + 1) * size]) for g in range(G)]
        first_G = [sum(slots_G[:g]) for g in range(G)]
        group_P = torch.arange(G).repeat_interleave(torch.tensor(slots_G)).to(x_TH.device)
        group_TK = group_P[slots_TK.clamp(min=0)].masked_fill(slots_TK < 0, -1)
        needed_TG = (group_TK[:, :, None] == torch.arange(G, device=x_TH.device)).any(1)
        if self.everywhere:
            needed_TG = torch.ones_like(needed_TG)
        pairs_N = (torch.arange(len(x_TH), device=x_TH.device)[:, None] * G + torch.arange(G, device=x_TH.device)).t()[
            needed_TG.t()
        ]  # by group, then token
        wire = Wire(self.across, self.clock, layer)
        count_G = needed_TG.sum(0)
        with self.clock.span("dispatch", layer):
            recv_G = _counts(count_G, [1] * G, self.across)[:, 0].tolist()
        send_G = count_G.tolist()
        # Which slots and weights: those of the group the copy goes to.
        there_NK = group_TK[pairs_N // G] == (pairs_N % G)[:, None]
        slots_MK = wire.send(
            slots_TK[pairs_N // G].masked_fill(~there_NK, -1), send_G, recv_G, "dispatch"
        )
        weights_NK = _Spread.apply(weights_TK.float(), pairs_N, G) * there_NK
        weights_MK = _Exchange.apply(weights_NK, wire, send_G, recv_G, "dispatch")
        rows = _Exchange.apply(_Spread.apply(x_TH, pairs_N, G), wire, send_G, recv_G, "dispatch")
        here = self.across.rank
        inner = _send_pairs(
            rows,
            slots_MK,
            weights_MK,
            first_G[here],
            table.slots_R[here * size : (here + 1) * size],
            Wire(self.inside, self.clock, layer),
        )
        inner.way.outer = _RelayWay(wire, pairs_N, send_G, recv_G, len(x_TH), x_TH.dtype)
        return inner

    def combine(self, out_MH: torch.Tensor, sent: Dispatched) -> torch.Tensor:
        """See :class:`Dispatcher`."""
        way: _RelayWay = sent.way.outer
        partial = _bring_pairs(out_MH, sent.way).to(way.dtype)
        rows = _Exchange.apply(partial, way.wire, way.recv_G, way.send_G, "combine")
        summed: torch.Tensor = _Collect.apply(rows, way.pairs_N, way.tokens, self.across.size).float().sum(1)
        return summed


def make_dispatcher(kind: DispatchKind, mesh: Mesh, clock: Clock) -> Dispatcher:
    """The dispatcher of one of the kinds that plans are made for."""
    if kind == "per_expert":
        return PairDispatcher(mesh, clock)
    if kind == "per_node":
        return RelayDispatcher(mesh.inter, mesh.intra, clock)
    alone = Axis(0, (mesh.ep.ranks[mesh.ep.rank],))
    return RelayDispatcher(mesh.ep, alone, clock, everywhere=kind == "allgather")
