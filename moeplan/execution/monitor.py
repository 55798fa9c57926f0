"""What a run's routers choose, window by window: exact loads of every expert, and some tokens choice by choice.

``B`` blocks of a window, ``L`` MoE layers, ``E`` experts, ``T`` tokens, ``K`` choices, ``R`` EP ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moeplan.artifacts.load_window import LoadWindow
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import SpecError
from moeplan.execution.groups import Mesh
from moeplan.execution.router import Routing

__all__ = ["LoadMonitor", "Routed"]


class Routed(Protocol):
    """A layer that holds its latest choices: :class:`MoELayer`, or one of a foreign model."""

    last: Routing | None


class LoadMonitor:
    """Counts what the layers' routers choose; :meth:`end_step` says when a window is full.

    A window has ``steps`` steps in ``blocks`` blocks. Of each block every rank keeps its first tokens, all layers'
    choices together, ``tokens`` per window in total. Counting works on the layers' device and waits for nothing;
    ranks speak to each other at the end of a window only.

    Raises:
        SpecError: the steps do not divide into the blocks.
    """

    def __init__(
        self, mesh: Mesh, num_layers: int, num_experts: int, steps: int = 64, blocks: int = 8, tokens: int = 4096
    ) -> None:
        if blocks < 2 or steps < blocks or steps % blocks:
            raise SpecError(f"steps ({steps}) of a window must be a multiple of its blocks ({blocks}), 2 or more")
        self.mesh, self.num_layers, self.num_experts = mesh, num_layers, num_experts
        self.steps, self.blocks = steps, blocks
        self.tokens_per_block = max(1, tokens // (blocks * mesh.dp.size))
        self.step = 0
        self._load_BLE = torch.zeros(blocks, num_layers, num_experts, dtype=torch.int64, device=mesh.device)
        self._kept: list[tuple[int, list[torch.Tensor]]] = []
        self._room = self.tokens_per_block

    def watch(self, layers: Sequence[Routed]) -> None:
        """Read the latest choices of every layer; once per step, after its forward.

        Raises:
            SpecError: a layer has not run yet.
        """
        chosen = []
        for row, layer in enumerate(layers):
            if layer.last is None:
                raise SpecError(f"layer {row} has no choices to watch; call watch after the forward pass")
            self._load_BLE[self.step % self.steps * self.blocks // self.steps, row] += layer.last.load_E
            chosen.append(layer.last.experts_TK)
        self._keep(chosen)

    def observe(self, chosen: list[torch.Tensor]) -> None:
        """The choices ``experts_TK`` of every layer in one step, where no :class:`MoELayer` holds them."""
        block = self.step % self.steps * self.blocks // self.steps
        for row, experts_TK in enumerate(chosen):
            # Dropped choices are -1: counted in front, and left there.
            self._load_BLE[block, row] += torch.bincount(experts_TK.flatten() + 1, minlength=self.num_experts + 1)[1:]
        self._keep(chosen)

    def _keep(self, chosen: list[torch.Tensor]) -> None:
        take = min(self._room, len(chosen[0]))
        if take:
            self._kept.append((self.step, [experts_TK[:take].to(torch.int16) for experts_TK in chosen]))
            self._room -= take

    def end_step(self) -> LoadWindow | None:
        """Count the step; the window that is full with it, else None. Collective: every rank, every step."""
        self.step += 1
        if self.step % (self.steps // self.blocks) == 0:
            self._room = self.tokens_per_block
        if self.step % self.steps:
            return None
        load = self.mesh.dp.sum_(self._load_BLE)
        parts = self.mesh.dp.all_of((self.mesh.ep.rank, *_joined(self._kept)))
        trace = None
        if self.mesh.world.rank == 0 and any(len(experts_TLK) for _, _, experts_TLK in parts):
            width = max(experts_TLK.shape[2] for _, _, experts_TLK in parts)
            experts_TLK = np.concatenate([_widened(experts_TLK, width) for _, _, experts_TLK in parts])
            home_T = np.concatenate([np.full(len(step_T), rank, np.int32) for rank, step_T, _ in parts])
            order_T = np.argsort(np.concatenate([step_T for _, step_T, _ in parts]), kind="stable")
            trace = RoutingTrace(
                experts_TLK[order_T].astype(np.int32), self.num_experts, tuple(range(self.num_layers)),
                source_rank_T=home_T[order_T],
            )  # fmt: skip
        window = LoadWindow(self.step - self.steps, self.steps, load.cpu().numpy().copy(), trace)
        self._load_BLE.zero_()
        self._kept = []
        return window


def _joined(kept: list[tuple[int, list[torch.Tensor]]]) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Step ``[T]`` and choices ``[T, L, K]`` of the steps' parts; widths differ under expert choice: -1 fills."""
    if not kept:
        return np.zeros(0, np.int64), np.zeros((0, 1, 1), np.int16)
    width = max(experts.shape[1] for _, step in kept for experts in step)
    rows = [np.stack([_widened(e.cpu().numpy(), width) for e in step], 1) for _, step in kept]
    return np.repeat([number for number, _ in kept], [len(row) for row in rows]), np.concatenate(rows)


def _widened(experts: NDArray[np.int16], width: int) -> NDArray[np.int16]:
    missing = [(0, 0)] * (experts.ndim - 1) + [(0, width - experts.shape[-1])]
    return np.pad(experts, missing, constant_values=-1)
