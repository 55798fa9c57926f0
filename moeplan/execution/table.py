"""A layer's placement as the dispatcher needs it: which copy of an expert serves which token.

``P`` slots of the layer over all EP ranks, ``S`` slots of this rank, ``E`` experts, ``C`` most copies of an expert,
``T`` tokens, ``K`` choices.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.errors import PlanError
from moeplan.execution.groups import Axis
from moeplan.specs.workload import ReplicaSplit

__all__ = ["LayerTable"]


class LayerTable:
    """One row of a :class:`Placement`, seen from one rank.

    ``split`` says which copy serves a token: ``even``, ``nearest`` (own rank, else own node, else evenly), or
    ``weighted`` by the placement's shares. Tokens of an expert are counted off in their order, so that the parts are
    met exactly up to one token, and ranks begin at different copies.

    Raises:
        PlanError: the placement is not for this many ranks.
    """

    def __init__(
        self,
        placement: Placement,
        row: int,
        axis: Axis,
        split: ReplicaSplit = "even",
        device: str | torch.device = "cpu",
    ) -> None:
        if placement.num_ranks != axis.size:
            raise PlanError(
                f"num_ranks ({placement.num_ranks}) of the placement is not the expert-parallel size ({axis.size});"
                f" plan for --ranks {axis.size}, or start {placement.num_ranks} ranks"
            )
        self.num_experts, self.num_ranks, self.rank = placement.num_experts, axis.size, axis.rank
        self.expert_of_slot_P: NDArray[np.int32] = placement.physical_to_logical_LP[row]
        self.rank_of_slot_P = placement.rank_of_slot_P
        self.slots_R: list[int] = np.bincount(self.rank_of_slot_P, minlength=axis.size).tolist()
        self.first_slot = int(sum(self.slots_R[: axis.rank]))
        self.num_slots = len(self.expert_of_slot_P)
        copies_E = np.bincount(self.expert_of_slot_P[self.expert_of_slot_P != EMPTY], minlength=self.num_experts)
        self.has_copies = bool((copies_E > 1).any())
        width = max(1, int(copies_E.max()))
        slot_EC = np.full((self.num_experts, width), -1, np.int64)
        share_EC = np.zeros((self.num_experts, width))
        shares_P = placement.slot_share_LP[row]
        for e in range(self.num_experts):
            slots = np.flatnonzero(self.expert_of_slot_P == e)
            slot_EC[e, : len(slots)] = slots
            share_EC[e, : len(slots)] = self._shares(slots, shares_P[slots], split, placement.ranks_per_node)
        cumulative_EC = share_EC.cumsum(1)
        cumulative_EC /= np.maximum(cumulative_EC[:, -1:], 1e-300)
        last_E = width - 1 - np.argmax(share_EC[:, ::-1] > 0, axis=1)
        cumulative_EC[np.arange(width) >= last_E[:, None]] = np.inf  # rounding never leads past the last copy
        self.slot_EC = torch.from_numpy(slot_EC).to(device)
        self._cumulative_EC = torch.from_numpy(cumulative_EC).to(device)
        self._has_copies_E = torch.from_numpy(copies_E > 1).to(device)

    def _shares(
        self, slots: NDArray[np.int64], shares: NDArray[np.float64], split: ReplicaSplit, per_node: int
    ) -> NDArray[np.float64]:
        if split == "weighted" and shares.sum() > 0:
            return shares
        if split == "nearest":
            ranks = self.rank_of_slot_P[slots]
            for near in (ranks == self.rank, ranks // per_node == self.rank // per_node):
                if near.any():
                    return np.asarray(near / near.sum(), np.float64)
        return np.full(len(slots), 1 / max(1, len(slots)))

    @property
    def local_experts_S(self) -> NDArray[np.int32]:
        """Expert in each slot of this rank, -1 where empty."""
        return self.expert_of_slot_P[self.first_slot : self.first_slot + self.slots_R[self.rank]]

    def slots(self, experts_TK: torch.Tensor) -> torch.Tensor:
        """The slot ``[T, K]`` that serves each choice; -1 where it was dropped."""
        slot_TK = self.slot_EC[experts_TK.clamp(min=0), 0]
        if self.has_copies:
            flat = experts_TK.flatten()
            pairs = (self._has_copies_E[flat.clamp(min=0)] & (flat >= 0)).nonzero().squeeze(1)
            expert = flat[pairs]
            order = expert.argsort(stable=True)
            counts_E = torch.bincount(expert, minlength=self.num_experts)
            first_E = counts_E.cumsum(0) - counts_E
            number = torch.empty_like(order)
            number[order] = torch.arange(len(order), device=flat.device) - first_E[expert[order]]
            place = ((number + 0.5) / counts_E[expert] + self.rank / self.num_ranks) % 1.0
            copy = (place[:, None].double() >= self._cumulative_EC[expert]).sum(1)
            slot_TK.view(-1)[pairs] = self.slot_EC[expert, copy]
        return slot_TK.masked_fill(experts_TK < 0, -1)
