"""What the baseline planners share: room for experts, copies kept apart, spare slots filled.

``P`` slots, ``E`` experts of the layer, ``R`` ranks. A row is one layer of a placement: the expert of each
slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.costs.transitions import transition_counts
from moeplan.errors import InfeasibleError, TraceError
from moeplan.planning.problem import PlanningProblem

__all__ = [
    "base_slots",
    "expert_transitions",
    "fill_spare_slots",
    "finish_rows",
    "rank_loads",
    "require_room",
    "separate_copies",
    "used_slots",
]


def require_room(problem: PlanningProblem) -> None:
    """Every layer's experts fit the slots.

    Raises:
        InfeasibleError: naming layer, experts and slots.
    """
    layer = int(problem.experts_L.argmax())
    experts, slots = int(problem.experts_L[layer]), problem.num_slots
    if experts > slots:
        raise InfeasibleError(
            f"layer {problem.load.layer_ids[layer]}: {experts} experts need {experts} slots, but the ranks"
            f" have {slots} together, {experts - slots} too few; give ranks more slots or use more ranks"
        )


def used_slots(slots_R: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Slots of each rank that can hold something: no rank holds an expert twice, so at most ``E`` of them."""
    return np.minimum(slots_R, num_experts)


def base_slots(slots_R: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Experts of each rank where every expert has one copy: in proportion to the slots, largest remainders
    first.

    Ranks with equal slots differ by one expert at most.
    """
    base_R: NDArray[np.int64]
    base_R, remainder_R = np.divmod(num_experts * slots_R, slots_R.sum())
    order_R = np.argsort(-remainder_R, kind="stable")
    base_R[order_R[: num_experts - int(base_R.sum())]] += 1
    return base_R


def rank_loads(
    row_P: NDArray[np.int64], rank_of_slot_P: NDArray[np.int32], weight_E: NDArray[np.float64], num_ranks: int
) -> NDArray[np.float64]:
    """Tokens of each rank where the copies of an expert share its ``weight_E`` evenly."""
    used = row_P != EMPTY
    copies_E = np.bincount(row_P[used], minlength=len(weight_E))
    tokens_U = weight_E[row_P[used]] / copies_E[row_P[used]]
    load_R: NDArray[np.float64] = np.bincount(rank_of_slot_P[used], tokens_U, num_ranks).astype(np.float64)
    return load_R


def _holds(
    row_P: NDArray[np.int64], rank_of_slot_P: NDArray[np.int32], shape_RE: tuple[int, int]
) -> NDArray[np.int64]:
    used = row_P != EMPTY
    holds_RE = np.zeros(shape_RE, dtype=np.int64)
    np.add.at(holds_RE, (rank_of_slot_P[used], row_P[used]), 1)
    return holds_RE


def separate_copies(
    row_P: NDArray[np.int64],
    rank_of_slot_P: NDArray[np.int32],
    weight_E: NDArray[np.float64],
    speed_R: NDArray[np.float64],
    ranks_per_node: int | None = None,
) -> tuple[NDArray[np.int64], int, int]:
    """Move second copies of an expert off a rank; the answer is the row and how many swaps and
    replacements it took.

    Each is swapped with the slot of another rank that leaves the lowest busiest rank (inside the node
    first, where ``ranks_per_node`` is given). Where no swap keeps copies apart the slot takes another
    expert, the one with most tokens per copy that the rank does not hold. No rank may have more filled
    slots than there are experts.
    """
    row_P, swaps, replacements = row_P.copy(), 0, 0
    shape_RE = (len(speed_R), len(weight_E))
    holds_RE = _holds(row_P, rank_of_slot_P, shape_RE)
    for slot in np.nonzero(row_P != EMPTY)[0][::-1]:
        rank, expert = int(rank_of_slot_P[slot]), int(row_P[slot])
        if holds_RE[rank, expert] < 2:
            continue
        other_P = np.where(row_P == EMPTY, 0, row_P)
        swappable_P = (
            (row_P != EMPTY) & (holds_RE[rank, other_P] == 0) & (holds_RE[rank_of_slot_P, expert] == 0)
        )
        candidates_C = np.nonzero(swappable_P)[0]
        if len(candidates_C):
            best = _least_harm(
                candidates_C, int(slot), row_P, rank_of_slot_P, weight_E, speed_R, ranks_per_node
            )
            row_P[slot], row_P[best] = row_P[best], row_P[slot]
            swaps += 1
        else:
            per_copy_E = weight_E / np.maximum(holds_RE.sum(axis=0), 1)
            row_P[slot] = int(np.where(holds_RE[rank] == 0, per_copy_E, -1.0).argmax())
            replacements += 1
        holds_RE = _holds(row_P, rank_of_slot_P, shape_RE)
    return row_P, swaps, replacements


def _least_harm(
    candidates_C: NDArray[np.intp],
    slot: int,
    row_P: NDArray[np.int64],
    rank_of_slot_P: NDArray[np.int32],
    weight_E: NDArray[np.float64],
    speed_R: NDArray[np.float64],
    ranks_per_node: int | None,
) -> int:
    """The slot to swap with: same node, then lowest busiest rank, then lowest busier one of the two, then
    first.
    """
    copies_E = np.bincount(row_P[row_P != EMPTY], minlength=len(weight_E))
    per_copy_E = weight_E / np.maximum(copies_E, 1)
    rank, ranks_C = rank_of_slot_P[slot], rank_of_slot_P[candidates_C]
    given_C = per_copy_E[row_P[slot]] - per_copy_E[row_P[candidates_C]]
    loads_CR = np.tile(rank_loads(row_P, rank_of_slot_P, weight_E, len(speed_R)), (len(candidates_C), 1))
    each = np.arange(len(candidates_C))
    loads_CR[:, rank] -= given_C
    loads_CR[each, ranks_C] += given_C
    times_CR = loads_CR / speed_R
    pair_C = np.maximum(times_CR[:, rank], times_CR[each, ranks_C])
    node_size = ranks_per_node or len(speed_R)
    away_C = ranks_C // node_size != rank // node_size
    return int(candidates_C[np.lexsort((pair_C, times_CR.max(axis=1), away_C))[0]])


def fill_spare_slots(
    row_P: NDArray[np.int64],
    rank_of_slot_P: NDArray[np.int32],
    weight_E: NDArray[np.float64],
    speed_R: NDArray[np.float64],
) -> tuple[NDArray[np.int64], int]:
    """Fill empty slots with copies, and how many: each time the expert with most tokens per copy that some
    rank with room does not hold, on the least busy such rank. A slot stays empty where its rank already
    holds every expert.
    """
    row_P, filled = row_P.copy(), 0
    shape_RE = (len(speed_R), len(weight_E))
    while True:
        room_R = np.bincount(rank_of_slot_P[row_P == EMPTY], minlength=len(speed_R)) > 0
        holds_RE = _holds(row_P, rank_of_slot_P, shape_RE)
        allowed_RE = room_R[:, None] & (holds_RE == 0)
        if not allowed_RE.any():
            return row_P, filled
        per_copy_E = weight_E / np.maximum(holds_RE.sum(axis=0), 1)
        expert = int(np.where(allowed_RE.any(axis=0), per_copy_E, -1.0).argmax())
        times_R = rank_loads(row_P, rank_of_slot_P, weight_E, len(speed_R)) / speed_R
        rank = int(np.where(allowed_RE[:, expert], times_R, np.inf).argmin())
        row_P[np.nonzero((row_P == EMPTY) & (rank_of_slot_P == rank))[0][0]] = expert
        filled += 1


def expert_transitions(problem: PlanningProblem, planner: str) -> NDArray[np.float64]:
    """Layer-to-layer transitions ``[L-1, E, E]`` of the load, as given or counted from its tokens.

    Raises:
        TraceError: it has neither.
    """
    if problem.load.transitions_LEE is not None:
        return problem.load.transitions_LEE
    if problem.load.trace is not None:
        return transition_counts(problem.load.trace)
    raise TraceError(
        f"{planner} plans by how tokens go from layer to layer, but the load has counts only; give a"
        " token-level trace or transition counts, or use another planner"
    )


def finish_rows(
    problem: PlanningProblem, rank_LE: Sequence[NDArray[np.int64]], *, fill: bool = True
) -> tuple[Placement, tuple[str, ...]]:
    """The placement with one copy of each expert on the rank given, spare slots filled, and notes on what
    was added or not looked at.
    """
    rank_of_slot_P = problem.rank_of_slot_P
    rows, copies = [], 0
    for load_E, rank_E in zip(problem.load.load_LE, rank_LE, strict=True):
        row_P = np.full(problem.num_slots, EMPTY, dtype=np.int64)
        for rank in range(problem.num_ranks):
            mine_E = np.nonzero(rank_E == rank)[0]
            row_P[np.nonzero(rank_of_slot_P == rank)[0][: len(mine_E)]] = mine_E
        if fill:
            row_P, filled = fill_spare_slots(row_P, rank_of_slot_P, load_E[: len(rank_E)], problem.speed_R)
            copies += filled
        rows.append(row_P)
    notes = []
    if copies:
        notes.append(f"{copies} spare slots filled afterwards with copies of the most loaded experts")
    if len(set(problem.speed_R[problem.live_R].tolist())) > 1:
        notes.append("ranks of unequal speed: this method does not look at speeds")
    return problem.placement(np.stack(rows)), tuple(notes)
