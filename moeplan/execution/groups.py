"""Which ranks work together: a mesh of expert, tensor and data parallelism on ``torch.distributed``.

World rank ``w = (copy * ep + expert) * tp + tensor``: the ranks that split one expert's matrices (TP) stand next to
each other, then the ranks of one placement (EP), then whole copies of all that (expert data parallelism, EDP). The
weights outside the experts are the same on every rank, so they are reduced over EP x EDP, ``dp``.

``R`` EP ranks; EP rank ``r`` is in node ``r // ranks_per_node``, as in :class:`moeplan.artifacts.placement.Placement`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moeplan.errors import SpecError

__all__ = ["Axis", "Mesh", "build_mesh", "single_mesh"]


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """The ranks along one direction of the mesh; ``ranks`` are world ranks, ``group`` is None for one rank alone."""

    rank: int
    ranks: tuple[int, ...]
    group: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_of(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, in their order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """This rank's place: ``ep`` shares one placement, ``tp`` each expert's matrices, ``edp`` holds copies of all.

    ``dp`` is EP x EDP, every rank with tokens of its own. ``intra`` are the EP ranks of this rank's node, ``inter``
    the EP ranks with the same number in every node.
    """

    world: Axis
    ep: Axis
    tp: Axis
    edp: Axis
    dp: Axis
    intra: Axis
    inter: Axis
    device: torch.device

    @property
    def ranks_per_node(self) -> int:
        """EP ranks of one node."""
        return self.intra.size


def single_mesh(device: str = "cpu") -> Mesh:
    """One rank alone, without a process group: what the parallel layer is compared with."""
    one = Axis(0, (0,))
    return Mesh(one, one, one, one, one, one, one, torch.device(device))


def build_mesh(tp: int = 1, edp: int = 1, ranks_per_node: int | None = None, device: str = "cpu") -> Mesh:
    """The mesh of the default process group; every rank calls it, with the same numbers.

    ``ranks_per_node`` counts EP ranks; left out, all EP ranks are one node.

    Raises:
        SpecError: the ranks do not divide so.
    """
    if not dist.is_initialized():
        return single_mesh(device)
    world, me = dist.get_world_size(), dist.get_rank()
    if tp < 1 or edp < 1 or world % (tp * edp):
        raise SpecError(f"world size ({world}) is not a multiple of tp ({tp}) x edp ({edp}); start more ranks")
    ep = world // (tp * edp)
    per_node = ep if ranks_per_node is None else ranks_per_node
    if per_node < 1 or ep % per_node:
        raise SpecError(f"expert-parallel ranks ({ep}) are not a multiple of ranks_per_node ({per_node})")
    grid = torch.arange(world).reshape(edp, ep // per_node, per_node, tp)  # copy, node, rank in node, tensor

    def axis(*kept: int) -> Axis:
        """Groups along the dimensions ``kept`` of the grid; new_group is collective, so all are made."""
        others = [dimension for dimension in range(4) if dimension not in kept]
        size = math.prod(grid.shape[dimension] for dimension in kept)
        rows: list[list[int]] = grid.permute(*others, *kept).reshape(-1, size).tolist()
        mine: Axis | None = None
        for row in rows:
            group = None
            if len(row) > 1:
                group = dist.group.WORLD if len(row) == world else dist.new_group(row)
            if me in row:
                mine = Axis(row.index(me), tuple(row), group)
        assert mine is not None
        return mine

    return Mesh(
        world=axis(0, 1, 2, 3),
        ep=axis(1, 2),
        tp=axis(3),
        edp=axis(0),
        dp=axis(0, 1, 2),
        intra=axis(2),
        inter=axis(1),
        device=torch.device(device),
    )
