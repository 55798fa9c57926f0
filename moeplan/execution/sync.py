"""Gradients that belong together: of copies of one expert, of ranks that saw other tokens.

``N`` copies sent, ``W`` numbers of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moeplan.artifacts.placement import EMPTY
from moeplan.execution.clock import Clock
from moeplan.execution.dispatch import Wire
from moeplan.execution.groups import Mesh
from moeplan.execution.layer import ExpertLayer
from moeplan.execution.table import LayerTable

__all__ = ["sync_copies"]


@dataclass(frozen=True, slots=True)
class _Copy:
    """One copy of an expert that has several: where it is, and the rank that sums them (that of the first copy)."""

    layer: int
    expert: int
    slot: int
    rank: int
    owner: int


def _copies(tables: Sequence[LayerTable]) -> list[_Copy]:
    found = []
    for layer, table in enumerate(tables):
        if not table.has_copies:
            continue
        used = table.expert_of_slot_P[table.expert_of_slot_P != EMPTY]
        for expert in np.flatnonzero(np.bincount(used) > 1).tolist():
            slots = np.flatnonzero(table.expert_of_slot_P == expert).tolist()
            owner = int(table.rank_of_slot_P[slots[0]])
            found += [_Copy(layer, expert, slot, int(table.rank_of_slot_P[slot]), owner) for slot in slots]
    return found


def sync_copies(layers: Sequence[ExpertLayer], mesh: Mesh, clock: Clock) -> None:
    """Give all copies of an expert the sum of their gradients, the same bits on each.

    The first copy's rank sums them in the order of their slots and sends the sum back: one exchange there and one
    back for all layers.
    """
    copies = _copies([layer.table for layer in layers])
    if not copies:
        return
    me, R = mesh.ep.rank, mesh.ep.size
    mine = sorted((c for c in copies if c.rank == me), key=lambda c: (c.owner, c.layer, c.slot))
    owned = sorted((c for c in copies if c.owner == me), key=lambda c: (c.rank, c.layer, c.slot))
    send_R = [sum(c.owner == r for c in mine) for r in range(R)]
    recv_R = [sum(c.rank == r for c in owned) for r in range(R)]

    def grad(copy: _Copy) -> torch.Tensor:
        weights = layers[copy.layer].weights_SW
        if weights.grad is None:
            weights.grad = torch.zeros_like(weights)
        row: torch.Tensor = weights.grad[copy.slot - layers[copy.layer].table.first_slot]
        return row

    wire = Wire(mesh.ep, clock)
    template = layers[0].weights_SW
    width = template.shape[1]
    rows_NW = torch.stack([grad(c) for c in mine]) if mine else template.new_empty(0, width)
    got_NW = wire.send(rows_NW, send_R, recv_R, "gradient_sync")
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place, c in enumerate(owned):
        places.setdefault((c.layer, c.expert), []).append((c.slot, place))
    for of_expert in places.values():
        order = [place for _, place in sorted(of_expert)]
        total_W = got_NW[order[0]].float()
        for place in order[1:]:
            total_W = total_W + got_NW[place].float()
        got_NW[order] = total_W.to(got_NW.dtype)
    back_NW = wire.send(got_NW, recv_R, send_R, "gradient_sync")
    for row_W, c in zip(back_NW, mine, strict=True):
        grad(c).copy_(row_W)
