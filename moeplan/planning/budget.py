"""The best plan within a budget of moves.

``L`` layers, ``P`` slots. Each layer is improved on its own, swap by swap, each time by the swap that saves most per
expert moved (:mod:`moeplan.planning.search_moves`); what a layer has saved after each swap, in seconds of its step,
then decides how many swaps of it the budget pays for. Where moves would take too long, the last are left out.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.costs.evaluation import aggregate, evaluate
from moeplan.errors import InfeasibleError
from moeplan.planning.migration import held_experts, moves_needed
from moeplan.planning.prepare import Prepared, layer_tokens, objective_value
from moeplan.planning.search_moves import descend

__all__ = ["within_budget"]

Rows = NDArray[np.int64]


def within_budget(
    ready: Prepared, current: Placement, max_moves: int, over: Callable[[], bool] = lambda: False
) -> tuple[Placement, str]:
    """The best plan found within ``max_moves`` of ``current``, and what it used. Copies per expert stay as they are;
    when time is ``over``, so do layers not begun.

    Raises:
        InfeasibleError: the return mode couples the layers, or the slots are not those of ``current``.
    """
    problem = ready.problem
    if problem.objective.return_mode == "stay":
        raise InfeasibleError("a migration budget is planned for return mode return_home only; leave the budget out")
    if current.num_slots != problem.num_slots or (current.rank_of_slot_P != problem.rank_of_slot_P).any():
        raise InfeasibleError(
            f"the current placement has {current.num_slots} slots, the plan {problem.num_slots}: a migration budget"
            " needs the same slots on every rank; leave the budget out to plan anew"
        )
    start_LP = current.physical_to_logical_LP.astype(np.int64)
    held = held_experts(current)
    most = max(1, min(max_moves, 2 * problem.num_slots) // 2)

    def trail(layer: int) -> Rows:
        row_P: Rows = start_LP[layer]
        if over():
            return row_P[None]
        data = layer_tokens(ready, layer, row_P)
        trail_SP = descend(
            data.bits_PM, data.away_NM, data.start_W, data.weight_W, row_P, data.cost_WP, data.copy_of_slot_P,
            problem.rank_of_slot_P, data.first_R, data.first_N, problem.ranks_per_node, problem.speed_R, held[layer],
            float(ready.seconds_L[layer]), data.node_price, data.rank_price, most, problem.seed * 3001 + layer,
        )  # fmt: skip
        rows = np.where(trail_SP < 0, EMPTY, row_P[np.maximum(trail_SP, 0)])
        return np.concatenate([row_P[None], rows])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        trails = list(pool.map(trail, range(len(start_LP))))
    longest = max(len(rows) for rows in trails)
    seconds = np.empty((len(trails), longest))
    moved = np.empty((len(trails), longest), dtype=np.int64)
    for step in range(longest):  # layers do not meet in return_home: score the same step of all at once
        found = problem.placement(np.stack([rows[min(step, len(rows) - 1)] for rows in trails]))
        time_WL = evaluate(problem.load, found, problem.costs, problem.objective, problem.speed_R).time_WL
        seconds[:, step] = [aggregate(time_WL[:, layer], problem.objective) for layer in range(len(trails))]
        moved[:, step] = moves_needed(current, found)
        problem.progress("fit the budget", (step + 1) / longest)
        if over():
            break
    bought = _spend(seconds[:, : step + 1], moved[:, : step + 1], max_moves)

    def after(purchases: int) -> Placement:
        steps = bought[purchases]
        return problem.placement(np.stack([rows[min(steps[l], len(rows) - 1)] for l, rows in enumerate(trails)]))

    first_too_long = bisect_left(range(len(bought)), True, key=lambda i: not problem.affordable(after(i)))
    best = after(max(first_too_long - 1, 0))
    if objective_value(problem, best) >= objective_value(problem, current):
        best = current
    made = int(moves_needed(current, best).sum())
    if first_too_long < len(bought):
        return best, f"{made} moves are made: more would take longer than allowed"
    return best, f"{made} of {max_moves} moves allowed are made"


def _spend(seconds_LS: NDArray[np.float64], moved_LS: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Step of each layer to stop at, after none, one, two, ... purchases: the continuation that saves most per move is
    bought next.
    """
    layers, steps = seconds_LS.shape
    chosen = np.zeros(layers, dtype=np.int64)
    bought = [chosen.copy()]
    left = budget
    while True:
        best_rate, best_layer, best_step = 0.0, -1, 0
        for layer in range(layers):
            now = int(chosen[layer])
            for step in range(now + 1, steps):
                cost = int(moved_LS[layer, step] - moved_LS[layer, now])
                saved = float(seconds_LS[layer, now] - seconds_LS[layer, step])
                if cost <= left and saved > 0 and saved / max(cost, 0.5) > best_rate * (1 + 1e-12):
                    best_rate, best_layer, best_step = saved / max(cost, 0.5), layer, step
        if best_layer < 0:
            return bought
        left -= int(moved_LS[best_layer, best_step] - moved_LS[best_layer, chosen[best_layer]])
        chosen[best_layer] = best_step
        bought.append(chosen.copy())
