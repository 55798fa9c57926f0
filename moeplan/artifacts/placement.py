"""Placements: slot -> expert and slot -> rank. ``L`` layers, ``P`` slots, ``E`` experts, ``R`` ranks, ``N`` nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import PlanError

__all__ = ["EMPTY", "Placement"]

EMPTY = -1


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where every copy of every expert lives.

    ``physical_to_logical_LP`` names the expert in each slot; ``-1`` marks a slot left empty (ranks with unequal
    slots, layers with fewer experts). ``rank_of_slot_P`` never falls: the slots of a rank stand together, in rank
    order. Rank ``r`` is in node ``r // ranks_per_node``. No rank of a placement of ours holds two copies of one expert.
    ``share_LP`` is the part of an expert's tokens that each copy takes; None means evenly.
    """

    physical_to_logical_LP: NDArray[np.int32]
    rank_of_slot_P: NDArray[np.int32]
    num_experts: int
    num_ranks: int
    ranks_per_node: int
    share_LP: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        p2l, ranks = self.physical_to_logical_LP, self.rank_of_slot_P
        if p2l.ndim != 2 or ranks.shape != p2l.shape[1:]:
            raise PlanError(
                f"physical_to_logical_map {p2l.shape} and rank_of_slot {ranks.shape} do not fit: [L, P] and [P]"
            )
        if len(ranks) == 0 or (np.diff(ranks) < 0).any() or ranks[0] < 0 or ranks[-1] >= self.num_ranks:
            raise PlanError(f"rank_of_slot must never fall and stay within 0..{self.num_ranks - 1} (num_ranks)")
        if self.num_ranks % self.ranks_per_node:
            raise PlanError(f"num_ranks ({self.num_ranks}) is not a multiple of ranks_per_node ({self.ranks_per_node})")
        if p2l.min() < EMPTY or p2l.max() >= self.num_experts:
            layer, slot = (int(i[0]) for i in np.nonzero((p2l < EMPTY) | (p2l >= self.num_experts)))
            raise PlanError(
                f"physical_to_logical_map[{layer}][{slot}] ({p2l[layer, slot]}) is outside 0..{self.num_experts - 1}"
            )
        if self.share_LP is not None and self.share_LP.shape != p2l.shape:
            raise PlanError(
                f"share {self.share_LP.shape} does not have the shape of physical_to_logical_map {p2l.shape}"
            )

    @classmethod
    def contiguous(cls, layers: int, experts: int, ranks: int, ranks_per_node: int) -> Self:
        """Expert ``e`` in slot ``e``, slots spread evenly over the ranks: where training frameworks put them."""
        slots_R = np.full(ranks, experts // ranks)
        slots_R[: experts % ranks] += 1
        rows = np.tile(np.arange(experts, dtype=np.int32), (layers, 1))
        return cls(rows, np.repeat(np.arange(ranks, dtype=np.int32), slots_R), experts, ranks, ranks_per_node)

    @classmethod
    def by_layer(cls, of_layer: Sequence[Placement]) -> Placement:
        """Layer ``l`` placed as in ``of_layer[l]``, all of one model and the same ranks. Where these differ in slots,
        each rank has as many as the most of them give it, and what a layer does not use is empty."""
        first, different = of_layer[0], list({id(placement): placement for placement in of_layer}.values())
        if len(different) == 1:
            return first
        ranks_R = np.arange(first.num_ranks, dtype=np.int32)
        slots_R = np.max([np.bincount(p.rank_of_slot_P, minlength=len(ranks_R)) for p in different], axis=0)
        first_R = np.cumsum(slots_R) - slots_R
        rows_LP = np.full((len(of_layer), int(slots_R.sum())), EMPTY, np.int32)
        share_LP = np.zeros(rows_LP.shape)
        for layer, placement in enumerate(of_layer):
            ranks_P = placement.rank_of_slot_P
            place_P = first_R[ranks_P] + np.arange(len(ranks_P)) - np.searchsorted(ranks_P, ranks_P)
            rows_LP[layer, place_P] = placement.physical_to_logical_LP[layer]
            share_LP[layer, place_P] = placement.slot_share_LP[layer]
        even = all(placement.share_LP is None for placement in different)
        return cls(
            rows_LP, np.repeat(ranks_R, slots_R), first.num_experts, first.num_ranks, first.ranks_per_node,
            None if even else share_LP,
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """``L``."""
        return int(self.physical_to_logical_LP.shape[0])

    @property
    def num_slots(self) -> int:
        """``P``, empty slots included."""
        return int(self.physical_to_logical_LP.shape[1])

    @property
    def num_nodes(self) -> int:
        """``N``."""
        return self.num_ranks // self.ranks_per_node

    @property
    def live_R(self) -> NDArray[np.bool_]:
        """Ranks that have slots: those that work."""
        return np.bincount(self.rank_of_slot_P, minlength=self.num_ranks) > 0

    @property
    def node_of_slot_P(self) -> NDArray[np.int32]:
        """Node of each slot."""
        return (self.rank_of_slot_P // self.ranks_per_node).astype(np.int32)

    @property
    def replicas_LE(self) -> NDArray[np.int32]:
        """Copies of each expert in each layer."""
        shape = (self.num_layers, self.num_experts)
        rows, slots = np.nonzero(self.physical_to_logical_LP != EMPTY)
        held = rows * self.num_experts + self.physical_to_logical_LP[rows, slots]
        return np.bincount(held, minlength=shape[0] * shape[1]).reshape(shape).astype(np.int32)

    @property
    def has_copies(self) -> bool:
        """Whether any expert has more than one."""
        return bool((self.replicas_LE > 1).any())

    @property
    def slot_share_LP(self) -> NDArray[np.float64]:
        """Part of its expert's tokens that each slot takes; 0 for empty slots."""
        if self.share_LP is not None:
            return self.share_LP
        replicas = np.take_along_axis(self.replicas_LE, np.maximum(self.physical_to_logical_LP, 0), axis=1)
        return np.where(self.physical_to_logical_LP == EMPTY, 0.0, 1.0 / np.maximum(replicas, 1))

    def over_groups(self, degree: int) -> Placement:
        """Each rank becomes ``degree`` neighbours that hold the same: ranks that split experts among them."""
        if degree == 1:
            return self
        slots = np.arange(self.num_slots)
        groups = np.split(slots, np.searchsorted(self.rank_of_slot_P, np.arange(1, self.num_ranks)))
        order = np.concatenate([np.tile(group, degree) for group in groups])
        ranks = np.concatenate([
            np.repeat(np.arange(rank * degree, (rank + 1) * degree), len(group)) for rank, group in enumerate(groups)
        ])  # fmt: skip
        return Placement(
            self.physical_to_logical_LP[:, order],
            ranks.astype(np.int32),
            self.num_experts,
            self.num_ranks * degree,
            self.ranks_per_node * degree,
            None if self.share_LP is None else self.share_LP[:, order] / degree,
        )

    def duplicates(self) -> list[tuple[int, int, int]]:
        """``(row, rank, expert)`` wherever a rank holds an expert more than once: the further copies are wasted."""
        rows, slots = np.nonzero(self.physical_to_logical_LP != EMPTY)
        held = np.stack([rows, self.rank_of_slot_P[slots], self.physical_to_logical_LP[rows, slots]], axis=1)
        values, counts = np.unique(held, axis=0, return_counts=True)
        return [(int(row), int(rank), int(expert)) for row, rank, expert in values[counts > 1]]

    def require_valid(
        self, experts_per_layer: tuple[int, ...] | None = None, *, allow_duplicates: bool = False
    ) -> None:
        """Every expert of every layer has a place, and no rank holds one twice.

        ``allow_duplicates`` is for placements that other planners made (EPLB can put two copies on one rank).

        Raises:
            PlanError: naming layer and expert.
        """
        replicas = self.replicas_LE
        for layer in range(self.num_layers):
            expected = self.num_experts if experts_per_layer is None else experts_per_layer[layer]
            missing = np.nonzero(replicas[layer, :expected] == 0)[0]
            if len(missing):
                raise PlanError(f"layer {layer}: expert {int(missing[0])} has no slot; every expert needs at least one")
            if replicas[layer, expected:].any():
                raise PlanError(f"layer {layer}: a slot holds an expert beyond the layer's {expected}")
        if not allow_duplicates and (twice := self.duplicates()):
            layer, rank, expert = twice[0]
            raise PlanError(f"layer {layer}: rank {rank} holds expert {expert} twice; the second copy is wasted")
