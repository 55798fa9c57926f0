"""Placements that look at no load: contiguous blocks, round robin, random. Baselines to compare with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY
from moeplan.planning.problem import PlanningProblem, PlanningResult
from moeplan.planning.slots import require_room, separate_copies, used_slots

__all__ = ["contiguous", "random", "round_robin"]

_Deal = Callable[[int, NDArray[np.int32]], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""From the number of experts and the ranks of the ``U`` slots in use: experts in turn, and the slots they
go to.
"""


def _deal(problem: PlanningProblem, deal: _Deal) -> PlanningResult:
    """Deal each layer's experts to its slots, then move second copies off a rank."""
    require_room(problem)
    rank_of_slot_P = problem.rank_of_slot_P
    place_P = np.arange(problem.num_slots) - (problem.slots_R.cumsum() - problem.slots_R)[rank_of_slot_P]
    rows = []
    for experts in problem.experts_L:
        row_P = np.full(problem.num_slots, EMPTY, dtype=np.int64)
        slots_U = np.nonzero(place_P < used_slots(problem.slots_R, int(experts))[rank_of_slot_P])[0]
        dealt_U, order_U = deal(int(experts), rank_of_slot_P[slots_U])
        row_P[slots_U[order_U]] = dealt_U
        rows.append(separate_copies(row_P, rank_of_slot_P, np.zeros(int(experts)), problem.speed_R)[0])
    return PlanningResult(problem.placement(np.stack(rows)))


def contiguous(problem: PlanningProblem) -> PlanningResult:
    """Slot ``i`` holds expert ``i % E``: the block placement of Megatron-LM, and vLLM's initial map with
    replicas.

    A rank with more slots than the layer has experts leaves the rest empty.

    Raises:
        InfeasibleError: fewer slots than experts.
    """

    def deal(experts: int, ranks_U: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        slots_U = np.arange(len(ranks_U))
        return slots_U % experts, slots_U

    return _deal(problem, deal)


def round_robin(problem: PlanningProblem) -> PlanningResult:
    """Experts dealt to the ranks in turn, ``e`` to rank ``e % R`` where slots are equal; replicas
    likewise, then swapped where a rank would hold an expert twice.

    Raises:
        InfeasibleError: fewer slots than experts.
    """

    def deal(experts: int, ranks_U: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        turn_U = np.arange(len(ranks_U)) - np.searchsorted(ranks_U, ranks_U)
        return np.arange(len(ranks_U)) % experts, np.lexsort((ranks_U, turn_U))

    return _deal(problem, deal)


def random(problem: PlanningProblem) -> PlanningResult:
    """Experts shuffled over the slots, each layer anew, from ``problem.seed``; copies differ by one at
    most, except where the only way to keep two copies off one rank is another expert.

    Raises:
        InfeasibleError: fewer slots than experts.
    """
    rng = np.random.default_rng(problem.seed)

    def deal(experts: int, ranks_U: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rounds = -(-len(ranks_U) // experts)
        dealt_U = np.concatenate([rng.permutation(experts) for _ in range(rounds)])[: len(ranks_U)]
        return dealt_U, rng.permutation(len(ranks_U))

    return _deal(problem, deal)
