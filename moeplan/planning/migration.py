"""From the placement in use to a better one: fewest moves, a budget of moves, and the order to make them.

``L`` layers, ``P`` slots, ``R`` ranks, ``E`` experts. A move brings one expert to a rank that does not hold it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.plan import Migration, Move
from moeplan.planning.problem import PlanningProblem

__all__ = ["align", "held_experts", "migration_of", "moves_needed"]


def held_experts(placement: Placement) -> NDArray[np.bool_]:
    """Whether each rank holds each expert, ``[L, R, E]``."""
    held = np.zeros((placement.num_layers, placement.num_ranks, placement.num_experts), dtype=np.bool_)
    for layer, row in enumerate(placement.physical_to_logical_LP):
        used = row != EMPTY
        held[layer, placement.rank_of_slot_P[used], row[used]] = True
    return held


def moves_needed(current: Placement, target: Placement) -> NDArray[np.int64]:
    """Experts that have to be brought to a rank, per layer."""
    brought: NDArray[np.int64] = (held_experts(target) & ~held_experts(current)).sum(axis=(1, 2))
    return brought


def align(current: Placement, target: Placement, problem: PlanningProblem) -> Placement:
    """The target with equal ranks and nodes renamed so that fewest experts move, and staying experts in their slots.

    Renaming changes nothing a plan is judged by where ranks are alike; in ``return_home`` each layer is renamed on its
    own, in ``stay`` all layers alike. Ranks that differ in slots or speed, or share NICs, keep their names.
    """
    if current.num_slots != target.num_slots or (current.rank_of_slot_P != target.rank_of_slot_P).any():
        return target
    rows = target.physical_to_logical_LP
    if problem.ranks_change_places and not problem.knows_homes:
        overlap_LRR = np.einsum("lre,lse->lrs", held_experts(current).astype(float), held_experts(target).astype(float))
        if problem.objective.return_mode == "stay":
            overlap_LRR = np.broadcast_to(overlap_LRR.sum(axis=0), overlap_LRR.shape)
        size = problem.num_slots // problem.num_ranks
        rows = np.stack(
            [
                row.reshape(-1, size)[_rename(overlap, problem.ranks_per_node)].reshape(-1)
                for row, overlap in zip(rows, overlap_LRR, strict=True)
            ]
        )
    return problem.placement(_keep_slots(current, rows))


def _rename(overlap_RR: NDArray[np.float64], per_node: int) -> NDArray[np.int64]:
    """Target rank that stands in for each current rank: nodes matched to nodes, ranks to ranks inside them."""
    nodes = len(overlap_RR) // per_node
    blocks = overlap_RR.reshape(nodes, per_node, nodes, per_node).transpose(0, 2, 1, 3)
    best = np.zeros((nodes, nodes))
    inside = np.zeros((nodes, nodes, per_node), dtype=np.int64)
    for a in range(nodes):
        for b in range(nodes):
            rows, columns = linear_sum_assignment(-blocks[a, b])
            best[a, b] = blocks[a, b][rows, columns].sum()
            inside[a, b] = columns
    _, partner = linear_sum_assignment(-best)
    return np.concatenate([partner[a] * per_node + inside[a, partner[a]] for a in range(nodes)])


def _keep_slots(current: Placement, rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Experts that stay on their rank stay in their slot."""
    out = rows.copy()
    for layer in range(len(rows)):
        for rank in np.unique(current.rank_of_slot_P):
            own = np.flatnonzero(current.rank_of_slot_P == rank)
            before, after = current.physical_to_logical_LP[layer, own], rows[layer, own]
            stays = np.isin(before, after) & (before != EMPTY)
            stays[[b in before[:i] for i, b in enumerate(before)]] = False  # a second copy on the rank is not kept
            coming = iter(x for x in after.tolist() if x not in set(before[stays].tolist()))
            out[layer, own] = [b if s else next(coming, EMPTY) for b, s in zip(before.tolist(), stays, strict=True)]
    return out


def migration_of(
    current: Placement,
    target: Placement,
    layer_ids: tuple[int, ...],
    gain_L: NDArray[np.float64],
    expert_bytes: float,
    rank_bytes_per_s: float,
    node_bytes_per_s: float,
) -> Migration:
    """The moves in the order to make them: layers that gain most per move first, a layer at a time.

    Time is the busiest rank's: what it sends or receives inside its node over ``rank_bytes_per_s``, between nodes over
    ``node_bytes_per_s``.
    """
    before, after = held_experts(current), held_experts(target)
    needed = (after & ~before).sum(axis=(1, 2))
    order = sorted(np.flatnonzero(needed), key=lambda l: (-gain_L[l] / needed[l], l))
    per_node = current.ranks_per_node
    live = set(target.rank_of_slot_P.tolist())
    seconds_R = np.zeros((2, current.num_ranks))
    moves = []
    for layer in order:
        for slot, expert in enumerate(target.physical_to_logical_LP[layer].tolist()):
            rank = int(target.rank_of_slot_P[slot])
            if expert == EMPTY or before[layer, rank, expert]:
                continue
            holders = np.flatnonzero(before[layer, :, expert])
            # The nearest live holder that has sent least so far; a failed one where no other holds the expert.
            source = int(
                min(holders, key=lambda r: (r not in live, r // per_node != rank // per_node, seconds_R[0, r], r))
            )
            seconds = expert_bytes / (rank_bytes_per_s if source // per_node == rank // per_node else node_bytes_per_s)
            seconds_R[0, source] += seconds
            seconds_R[1, rank] += seconds
            moves.append(
                Move(layer_id=layer_ids[layer], expert=expert, source_rank=source, target_rank=rank, slot=slot)
            )
    return Migration(
        moves=tuple(moves),
        bytes=len(moves) * expert_bytes,
        seconds=float(seconds_R.max()) if moves else 0.0,
        source="modelled: link bandwidths of the cluster, busiest rank, no overlap with compute",
    )
