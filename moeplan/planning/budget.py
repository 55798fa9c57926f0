"""The best plan within a budget of moves.

``P`` slots, ``W`` windows, ``S`` swaps, none included. Each layer is improved on its own, swap by swap, each time by
the swap that saves most per expert moved (:mod:`moeplan.planning.search_moves`); what a layer has saved after each
swap, in seconds of its step, then decides how many swaps of it the budget pays for. Where moves would take too long,
the last are left out.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.costs.evaluation import aggregate, evaluate
from moeplan.errors import InfeasibleError
from moeplan.planning.clock import Clock, each_layer
from moeplan.planning.migration import held_experts, moves_needed
from moeplan.planning.prepare import Prepared, layer_tokens, objective_value, prepare
from moeplan.planning.problem import PlanningProblem
from moeplan.planning.search_moves import descend
from moeplan.routing.loads import pick_layers

__all__ = ["within_budget"]

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Trail:
    """One layer as it is and after each swap: experts of its slots, seconds of its step, experts moved until then."""

    rows_SP: Rows
    seconds_S: NDArray[np.float64]
    moved_S: NDArray[np.int64]


def within_budget(
    problem: PlanningProblem, current: Placement, max_moves: int, clock: Clock
) -> tuple[Placement, str]:
    """The best plan found within ``max_moves`` of ``current``, and what it used. Copies per expert stay as they are;
    when time is over or Ctrl-C comes, so do layers not finished.

    Raises:
        InfeasibleError: the return mode couples the layers, or the slots are not those of ``current``.
    """
    if problem.objective.return_mode == "stay":
        raise InfeasibleError("a migration budget is planned for return mode return_home only; leave the budget out")
    if current.num_slots != problem.num_slots or (current.rank_of_slot_P != problem.rank_of_slot_P).any():
        raise InfeasibleError(
            f"the current placement has {current.num_slots} slots, the plan {problem.num_slots}: a migration budget"
            " needs the same slots on every rank; leave the budget out to plan anew"
        )
    try:
        return _within_budget(prepare(problem), current, max_moves, clock)
    except KeyboardInterrupt:  # before the first layer is searched, or where the budget is spent
        clock.status = "interrupted"
        return current, "no moves are made: the search was interrupted"


def _within_budget(ready: Prepared, current: Placement, max_moves: int, clock: Clock) -> tuple[Placement, str]:
    problem = ready.problem
    start_LP = current.physical_to_logical_LP.astype(np.int64)
    held = held_experts(current)
    most = max(1, min(max_moves, 2 * problem.num_slots) // 2)

    def trail(layer: int) -> _Trail:
        row_P: Rows = start_LP[layer]
        data = layer_tokens(ready, layer, row_P)
        trail_SP = descend(
            data.bits_PM, data.away_GM, data.start_W, data.weight_W, row_P, data.cost_WP, data.copy_of_slot_P,
            problem.rank_of_slot_P, data.first_R, data.first_G, data.ranks_per_group, problem.speed_R, data.pace_X,
            data.pace_R, problem.num_nodes, held[layer], float(ready.seconds_L[layer]), data.group_price,
            data.rank_price, most, problem.seed * 3001 + layer,
        )  # fmt: skip
        rows = np.where(trail_SP < 0, EMPTY, row_P[np.maximum(trail_SP, 0)])
        return _scored(problem, layer, np.concatenate([row_P[None], rows]))

    nothing, none = np.zeros(1), np.zeros(1, dtype=np.int64)
    as_they_are = [_Trail(row_P[None], nothing, none) for row_P in start_LP]
    trails = each_layer(clock, "fit the budget", len(start_LP), trail, as_they_are)
    bought = _spend(trails, max_moves)

    def after(purchases: int) -> Placement:
        return problem.placement(np.stack([t.rows_SP[s] for t, s in zip(trails, bought[purchases], strict=True)]))

    first_too_long = bisect_left(range(len(bought)), True, key=lambda i: not problem.affordable(after(i)))
    best = after(max(first_too_long - 1, 0))
    if objective_value(problem, best) >= objective_value(problem, current):
        best = current
    made = int(moves_needed(current, best).sum())
    if first_too_long < len(bought):
        return best, f"{made} moves are made: more would take longer than allowed"
    return best, f"{made} of {max_moves} moves allowed are made"


def _scored(problem: PlanningProblem, layer: int, rows_SP: Rows) -> _Trail:
    """A layer's trail from its rows, which start as it is: layers do not meet in ``return_home``."""
    load, costs, objective = pick_layers(problem.load, [layer]), problem.costs, problem.objective
    steps = [problem.placement(row_P[None]) for row_P in rows_SP]
    time_SW = [evaluate(load, step, costs, objective, problem.speed_R).time_WL[:, 0] for step in steps]
    seconds_S = np.array([aggregate(time_W, objective) for time_W in time_SW])
    return _Trail(rows_SP, seconds_S, np.array([moves_needed(steps[0], step)[0] for step in steps]))


def _spend(trails: list[_Trail], budget: int) -> list[NDArray[np.int64]]:
    """Step of each layer to stop at, after none, one, two, ... purchases: the continuation that saves most per move is
    bought next.
    """
    chosen = np.zeros(len(trails), dtype=np.int64)
    bought = [chosen.copy()]
    left = budget
    while True:
        best_rate, best_layer, best_step = 0.0, -1, 0
        for layer, trail in enumerate(trails):
            now = int(chosen[layer])
            for step in range(now + 1, len(trail.rows_SP)):
                cost = int(trail.moved_S[step] - trail.moved_S[now])
                saved = float(trail.seconds_S[now] - trail.seconds_S[step])
                if cost <= left and saved > 0 and saved / max(cost, 0.5) > best_rate * (1 + 1e-12):
                    best_rate, best_layer, best_step = saved / max(cost, 0.5), layer, step
        if best_layer < 0:
            return bought
        moved_S = trails[best_layer].moved_S
        left -= int(moved_S[best_step] - moved_S[chosen[best_layer]])
        chosen[best_layer] = best_step
        bought.append(chosen.copy())
