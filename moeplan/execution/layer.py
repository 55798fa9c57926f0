"""The expert-parallel MoE layer: router, dispatch, the experts of this rank, combine, shared experts.

``T`` tokens of this rank, ``H`` hidden, ``K`` choices per token, ``S`` slots of this rank, ``W`` numbers of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.execution.clock import Clock
from moeplan.execution.dispatch import Dispatcher, make_dispatcher
from moeplan.execution.experts import ExpertShape, grouped_swiglu
from moeplan.execution.groups import Axis, Mesh
from moeplan.execution.router import Router, Routing
from moeplan.execution.table import LayerTable
from moeplan.specs.workload import ReplicaSplit

__all__ = ["ExpertLayer", "MoELayer", "SharedExpert"]

RowOf = Callable[[int], torch.Tensor]
"""Logical expert -> the numbers of the whole expert, ``[3 * H * F]``: gate, up, down."""


class ExpertLayer(nn.Module):
    """The routed experts of one layer, over the EP ranks of ``mesh``.

    ``weights_SW`` is the parameter: one row per slot of this rank (see :mod:`moeplan.execution.experts`). ``row`` is
    the layer's row in the placement. Give ``dispatcher`` to send tokens another way.

    Raises:
        PlanError: the placement is not for this many ranks. SpecError: the FFN does not divide by TP.
    """

    def __init__(
        self,
        mesh: Mesh,
        hidden: int,
        intermediate: int,
        placement: Placement,
        row: int,
        *,
        layer_id: int | None = None,
        split: ReplicaSplit = "even",
        dispatcher: Dispatcher | None = None,
        clock: Clock | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.mesh, self.row, self.split = mesh, row, split
        self.layer_id = row if layer_id is None else layer_id
        self.clock = clock or Clock()
        self.dispatcher = dispatcher or make_dispatcher("per_expert", mesh, self.clock)
        self.shape = ExpertShape(hidden, intermediate, mesh.tp.size, mesh.tp.rank)
        self.table = LayerTable(placement, row, mesh.ep, split, mesh.device)
        slots = len(self.table.local_experts_S)
        self.weights_SW = nn.Parameter(torch.zeros(slots, self.shape.row_size, dtype=dtype, device=mesh.device))

    def load(self, row_of: RowOf) -> None:
        """Fill every slot of this rank with its expert's numbers; empty slots stay 0."""
        with torch.no_grad():
            for s, expert in enumerate(self.table.local_experts_S.tolist()):
                if expert != EMPTY:
                    self.weights_SW[s] = self.shape.local_part(row_of(expert))

    def set_placement(self, placement: Placement) -> None:
        """Route by ``placement`` from now on; the caller has brought the weights (:mod:`moeplan.execution.migrate`)."""
        self.table = LayerTable(placement, self.row, self.mesh.ep, self.split, self.mesh.device)

    def forward(
        self,
        x_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        meanwhile: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Sum of the chosen experts' outputs, weighted, ``[T, H]`` in the type of ``x_TH``.

        ``experts_TK`` int64, -1: no expert. ``meanwhile`` is added: what does not need the experts (shared experts).
        """
        tp = self.mesh.tp
        if tp.size > 1:
            # Every TP rank works on its columns of each expert: partial sums join at the end, gradients at the start.
            x_TH, weights_TK = _FromAll.apply(x_TH, tp), _FromAll.apply(weights_TK, tp)
        slots_TK = self.table.slots(experts_TK)
        sent = self.dispatcher.dispatch(x_TH, slots_TK, weights_TK, self.table, self.layer_id)
        out_MH = grouped_swiglu(
            sent.rows_MH, self.weights_SW, sent.counts_S, self.shape.local_intermediate, self.clock, self.layer_id
        )
        out_TH = self.dispatcher.combine(out_MH, sent)
        if tp.size > 1:
            out_TH = _ToAll.apply(out_TH, tp)
        if meanwhile is not None:
            with self.clock.span("shared", self.layer_id):
                shared_TH = meanwhile()
            out_TH = out_TH + shared_TH
        return out_TH.to(x_TH.dtype)


class _FromAll(torch.autograd.Function):
    """The same on every rank; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.axis.sum_(grads[0].clone(memory_format=torch.contiguous_format)), None


class _ToAll(torch.autograd.Function):
    """Summed over the ranks; each rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return axis.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class SharedExpert(nn.Module):
    """A SwiGLU that every token takes, whole on every rank; several shared experts are one wide one."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False, dtype=dtype)
        self.down = nn.Linear(intermediate, hidden, bias=False, dtype=dtype)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """``down(silu(gate x) * up x)``."""
        gate, up = self.gate_up(x_TH).chunk(2, -1)
        out: torch.Tensor = self.down(silu(gate) * up)
        return out


class MoELayer(nn.Module):
    """Router, routed experts and shared experts: ``[..., H]`` in, ``[..., H]`` out.

    ``last`` holds the latest :class:`Routing`: its ``aux_loss`` belongs into the loss. ``on_routing`` is called with
    the layer's number and each routing: what records traces or watches the load hangs there.
    """

    def __init__(self, router: Router, experts: ExpertLayer, shared: SharedExpert | None = None) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.last: Routing | None = None
        self.on_routing: Callable[[int, Routing], None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Route every token, run its experts wherever they are, and add what they say."""
        x_TH = x.reshape(-1, x.shape[-1])
        clock, layer = self.experts.clock, self.experts.layer_id
        with clock.span("router", layer):
            routing = self.last = self.router(x_TH)
        if self.on_routing is not None:
            self.on_routing(layer, routing)
        shared = self.shared
        out_TH: torch.Tensor = self.experts(
            x_TH, routing.experts_TK, routing.weights_TK, None if shared is None else lambda: shared(x_TH)
        )
        return out_TH.view_as(x)
