"""The greedy balancer of DeepSeek EPLB, and its generalisation to ranks that differ.

``L`` layers, ``E`` experts, ``P`` slots, ``R`` ranks, ``N`` nodes. The policy
(github.com/deepseek-ai/EPLB, README): pack groups of experts onto nodes, replicate the hottest experts
inside each node, pack the copies onto the node's ranks. Packing takes the heaviest first and puts it on
the lightest bin that has room. Where the groups do not divide over the nodes all nodes count as one.

Loads are rounded to float32 as in the public balancer; of equal loads the lowest index goes first. The
public one leaves equal loads to a sort of torch that is not stable and whose order depends on the
processor; where that sort keeps their order, answers agree slot by slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY
from moeplan.errors import SpecError
from moeplan.planning.problem import PlanningProblem, PlanningResult
from moeplan.planning.slots import require_room, separate_copies, used_slots

__all__ = ["greedy", "rebalance_experts"]


def _pack(weight_I: NDArray[np.float32], num_packs: int) -> NDArray[np.int64]:
    """Items of each pack ``[packs, items/packs]``, in the order they came in; one item per pack keeps its
    number.
    """
    room = len(weight_I) // num_packs
    if room == 1:
        return np.arange(num_packs)[:, None]
    packs = np.zeros((num_packs, room), dtype=np.int64)
    filled = np.zeros(num_packs, dtype=np.int64)
    total = np.zeros(num_packs, dtype=np.float32)
    for item in np.argsort(-weight_I, kind="stable"):
        pack = int(np.where(filled < room, total, np.inf).argmin())
        packs[pack, filled[pack]] = item
        filled[pack] += 1
        total[pack] += weight_I[item]
    return packs


def _replicate(weight_I: NDArray[np.float32], num_copies: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Expert of each copy and which of its copies it is: all once, then again and again the most loaded
    per copy.
    """
    expert_C = np.arange(num_copies)
    number_C = np.zeros(num_copies, dtype=np.int64)
    count_I = np.ones(len(weight_I), dtype=np.float32)
    for copy in range(len(weight_I), num_copies):
        expert_C[copy] = expert = int((weight_I / count_I).argmax())
        number_C[copy] = count_I[expert]
        count_I[expert] += 1
    return expert_C, number_C


def rebalance_experts(
    weight_LE: NDArray[Any], num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """EPLB's policy: ``physical_to_logical_LP``, ``logical_to_physical_LEX`` (padded with -1) and
    ``replicas_LE``.

    ``num_replicas`` is ``P``, over all ranks; rank of a slot is ``slot // (P / R)``. Hierarchical where
    ``num_groups`` is a multiple of ``num_nodes``, global otherwise. Two copies of an expert may land on
    one rank.

    Raises:
        SpecError: counts that do not divide, or fewer slots than experts.
    """
    layers, experts = weight_LE.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for name, value, other, by in (
        ("num_experts", experts, "num_groups", num_groups),
        ("num_ranks", num_ranks, "num_nodes", num_nodes),
        ("num_replicas", num_replicas, "num_ranks", num_ranks),
    ):
        if value % by:
            raise SpecError(f"{name} ({value}) is not a multiple of {other} ({by}); EPLB's policy needs that")
    if num_replicas < experts:
        raise SpecError(
            f"num_replicas ({num_replicas}) is less than num_experts ({experts}); each needs a slot"
        )
    size = experts // num_groups
    physical_to_logical_LP = np.empty((layers, num_replicas), dtype=np.int64)
    number_LP = np.empty_like(physical_to_logical_LP)
    for layer, weight_E in enumerate(weight_LE.astype(np.float32)):
        groups_N = _pack(weight_E.reshape(num_groups, size).sum(axis=1), num_nodes)
        for node, slots in enumerate(np.split(np.arange(num_replicas), num_nodes)):
            experts_I = (groups_N[node][:, None] * size + np.arange(size)).ravel()
            copy_C, number_C = _replicate(weight_E[experts_I], len(slots))
            count_I = np.bincount(copy_C, minlength=len(experts_I)).astype(np.float32)
            placed_C = _pack((weight_E[experts_I] / count_I)[copy_C], num_ranks // num_nodes).ravel()
            physical_to_logical_LP[layer, slots] = experts_I[copy_C[placed_C]]
            number_LP[layer, slots] = number_C[placed_C]
    logical_to_physical_LEX = np.full((layers, experts, int(number_LP.max()) + 1), -1, dtype=np.int64)
    layer_L1 = np.arange(layers)[:, None]
    logical_to_physical_LEX[layer_L1, physical_to_logical_LP, number_LP] = np.arange(num_replicas)
    return physical_to_logical_LP, logical_to_physical_LEX, (logical_to_physical_LEX >= 0).sum(axis=2)


def _heaviest_first(
    weight_E: NDArray[np.float64], problem: PlanningProblem, rank_of_slot_P: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Copies, heaviest first, each to the rank with room (and without a copy) that would then finish
    first.
    """
    experts, live_R = len(weight_E), problem.live_R
    room_R = used_slots(problem.slots_R, experts).copy()
    copies_E = np.ones(experts, dtype=np.int64)
    for _ in range(int(room_R.sum()) - experts):
        copies_E[np.where(copies_E < live_R.sum(), weight_E / copies_E, -1.0).argmax()] += 1
    per_copy_E = weight_E / copies_E
    holds_RE = np.zeros((problem.num_ranks, experts), dtype=bool)
    load_R = np.zeros(problem.num_ranks)
    row_P = np.full(problem.num_slots, EMPTY, dtype=np.int64)
    order_E = np.argsort(-per_copy_E, kind="stable")
    for expert in np.repeat(order_E, copies_E[order_E]):
        time_R = (load_R + per_copy_E[expert]) / problem.speed_R
        free_R = np.where(room_R > 0, time_R, np.inf)
        apart_R = np.where(holds_RE[:, expert], np.inf, free_R)
        rank = int((apart_R if np.isfinite(apart_R).any() else free_R).argmin())
        row_P[np.nonzero((row_P == EMPTY) & (rank_of_slot_P == rank))[0][0]] = expert
        holds_RE[rank, expert] = True
        room_R[rank] -= 1
        load_R[rank] += per_copy_E[expert]
    return row_P


def greedy(problem: PlanningProblem) -> PlanningResult:
    """EPLB's policy where it applies, else heaviest first over unequal ranks; second copies on a rank
    moved away.

    Where every rank has the same slots and speed the answer is EPLB's, except that a rank never holds an
    expert twice: the notes count the swaps. Otherwise, copies go, heaviest first, to the rank that would
    finish first.

    Raises:
        InfeasibleError: fewer slots than experts.
    """
    require_room(problem)
    rank_of_slot_P = problem.rank_of_slot_P
    hierarchical = problem.num_groups % problem.num_nodes == 0
    tally = {"swaps": 0, "replacements": 0, "general": 0, "ungrouped": 0}
    rows = []
    for load_E, experts in zip(problem.load.load_LE, problem.experts_L, strict=True):
        weight_E = load_E[:experts]
        if problem.ranks_alike and problem.slots_R[0] <= experts:
            groups = problem.num_groups if experts % problem.num_groups == 0 else 1
            nodes = problem.num_nodes if hierarchical and groups == problem.num_groups else 1
            tally["ungrouped"] += nodes < problem.num_nodes
            rows_LP, _, _ = rebalance_experts(weight_E[None], problem.num_slots, groups, nodes, problem.num_ranks)
            row_P = rows_LP[0]
            node_size = problem.ranks_per_node if nodes > 1 else None
        else:
            tally["general"] += 1
            row_P, node_size = _heaviest_first(weight_E, problem, rank_of_slot_P), None
        row_P, swaps, replacements = separate_copies(
            row_P, rank_of_slot_P, weight_E, problem.speed_R, node_size
        )
        tally["swaps"] += swaps
        tally["replacements"] += replacements
        rows.append(row_P)
    return PlanningResult(problem.placement(np.stack(rows)), notes=_notes(tally, problem))


def _notes(tally: Mapping[str, int], problem: PlanningProblem) -> tuple[str, ...]:
    """What was done beyond or instead of EPLB's policy, in how many layers or slots."""
    nodes, groups = problem.num_nodes, problem.num_groups
    texts = {
        "general": "layers: ranks differ in slots or speed, or have more slots than experts; heaviest first"
        " over unequal ranks, not EPLB's policy",
        "ungrouped": f"layers: num_groups ({groups}) is no multiple of num_nodes ({nodes}) or does not divide"
        " the experts; EPLB's global policy, which does not look at nodes",
        "swaps": "slots swapped with another rank, as a rank would have held an expert twice",
        "replacements": "slots given another expert, as a rank would have held one twice and no swap helped",
    }
    return tuple(f"{tally[key]} {text}" for key, text in texts.items() if tally[key])
