"""The default planner: expert load and traffic together, by compiled search; small cases exactly.

Every layer is first balanced for load alone (:mod:`moeplan.planning.balance`). From there

- ``return_home``: layers separate; swaps trade load, within ``max_imbalance`` of the balanced plan, for fewer nodes
  (or ranks) per token (:mod:`moeplan.planning.search_home`);
- ``stay``: all layers together; experts are first spread over nodes, then over the ranks of each node, then both are
  refined (:mod:`moeplan.planning.search_stay`);
- few experts and ranks: every arrangement, or a dynamic programme over them (:mod:`moeplan.planning.exact`).

The balanced plan is returned where the search does not beat it on the objective.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.plan import Status
from moeplan.costs.counting import choose_slots, home_ranks
from moeplan.costs.evaluation import aggregate, evaluate, transitions_of
from moeplan.errors import InfeasibleError
from moeplan.planning.balance import LayerLoad, balance_layer
from moeplan.planning.exact import exact_placement
from moeplan.planning.migration import held_experts, moves_needed
from moeplan.planning.prepare import Prepared, prepare
from moeplan.planning.problem import STEP_TIME, PlanningProblem, PlanningResult
from moeplan.planning.search_home import anneal_home, group_arrivals, pack_tokens
from moeplan.planning.search_load import rank_loads
from moeplan.planning.search_stay import anneal_stay
from moeplan.planning.slots import require_room, separate_copies

__all__ = ["joint", "objective_value"]

BALANCE_PROPOSALS = 40_000
HOME_PROPOSALS = 50_000_000  # over the slots of a layer: its arrangements are the fewer
STAY_SWEEPS, STAY_PROPOSALS, STAY_HEAT = 100, 5_000, 0.005
BUDGET_STEPS, BUDGET_PROPOSALS = 10, 60_000

Rows = NDArray[np.int64]


def objective_value(problem: PlanningProblem, placement: Placement) -> float:
    """Seconds of a step over all layers, aggregated over windows as the objective says."""
    seconds_WL = evaluate(problem.load, placement, problem.costs, problem.objective, problem.speed_R).time_WL
    return aggregate(seconds_WL.sum(axis=1), problem.objective)


@dataclass(slots=True)
class _Clock:
    """When to stop: a person's time limit, or Ctrl-C; what is finished by then is kept."""

    problem: PlanningProblem
    started: float
    status: Status = "feasible"

    def over(self) -> bool:
        limit = self.problem.time_limit_s
        if limit is not None and time.monotonic() - self.started > limit:
            self.status = "time_limit"
        return self.status != "feasible"


def _each_layer(
    clock: _Clock, what: str, layers: int, work: Callable[[int], Rows], fallback: Rows | None = None
) -> Rows:
    """Row of every layer, on all cores; layers not begun when time is over keep ``fallback``."""
    rows: list[Rows | None] = [None] * layers
    done = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        running: dict[Future[Rows], int] = {}
        queue = iter(range(layers))
        try:
            while True:
                while len(running) < (os.cpu_count() or 1) and not (fallback is not None and clock.over()):
                    layer = next(queue, None)
                    if layer is None:
                        break
                    running[pool.submit(work, layer)] = layer
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    rows[running.pop(future)] = future.result()
                    done += 1
                    clock.problem.progress(what, done / layers)
        except KeyboardInterrupt:
            if fallback is None:
                raise
            clock.status = "interrupted"
    if fallback is not None:
        return np.stack([fallback[i] if row is None else row for i, row in enumerate(rows)])
    return np.stack([row for row in rows if row is not None])


def joint(problem: PlanningProblem) -> PlanningResult:
    """Place all layers; see the module.

    Raises:
        InfeasibleError: fewer slots than experts.
    """
    require_room(problem)
    clock = _Clock(problem, time.monotonic())
    ready = prepare(problem)
    base_LP = _each_layer(
        clock,
        "balance load",
        len(ready.layers),
        lambda l: balance_layer(ready.layers[l], BALANCE_PROPOSALS, problem.seed * 1009 + l),
    )
    base = problem.placement(base_LP)
    notes: list[str] = []
    if problem.current is not None and problem.max_moves is not None:
        budgeted = _within_budget(ready, problem.current, problem.max_moves, clock, notes)
        return PlanningResult(budgeted, clock.status, notes=tuple(notes))
    if problem.objective.kind == "load":
        return PlanningResult(base, clock.status, notes=tuple(notes))
    exact = exact_placement(ready)
    if exact is not None:
        quantity = STEP_TIME if problem.objective.kind == "time" else "dispatch and combine time"
        return PlanningResult(problem.placement(exact.row_LP), "optimal", quantity, argument=exact.argument)
    try:
        traffic = _stay if problem.objective.return_mode == "stay" else _home
        found_LP = traffic(ready, base_LP, clock, notes)
    except KeyboardInterrupt:
        clock.status, found_LP = "interrupted", base_LP
    found = problem.placement(found_LP)
    if objective_value(problem, found) > objective_value(problem, base):
        found = base
        notes.append("the balanced plan was not beaten: traffic traded for load would cost more than it saves")
    return PlanningResult(found, clock.status, notes=tuple(notes))


def _copy_costs(layer: LayerLoad, row_P: Rows) -> NDArray[np.float64]:
    """Cost of the copy in each slot per window, ``[W, P]``; 0 for empty slots."""
    used = row_P != EMPTY
    copies = np.bincount(row_P[used], minlength=layer.copy_WEC.shape[1])
    cost = np.zeros((layer.copy_WEC.shape[0], len(row_P)))
    cost[:, used] = layer.copy_WEC[:, row_P[used], copies[row_P[used]] - 1]
    return cost


@dataclass(frozen=True, slots=True, eq=False)
class _Limits:
    """What load a rank may take: the balanced plan's busiest per window, and prices in seconds above it.

    Many ranks may share an excess while the step pays for the busiest alone: up to the cap each is charged half its
    part, which gave the shortest steps on recorded routing (a quarter to twice the part: within 1 %). Beyond the cap
    each pays twice the whole.
    """

    base_W: NDArray[np.float64]
    cap_W: NDArray[np.float64]
    slope: float
    steep: float


def _limits(ready: Prepared, layer: int, row_P: Rows) -> _Limits:
    load, seconds = ready.layers[layer], float(ready.seconds_L[layer])
    base_W = rank_loads(load.copy_WEC, row_P, load.rank_of_slot_P, load.speed_R).max(axis=1)
    ranks = int((ready.problem.slots_R > 0).sum())
    by_traffic = ready.problem.objective.kind == "traffic"
    return _Limits(
        base_W=base_W,
        cap_W=np.maximum(ready.max_imbalance, 1e-3) * base_W,
        slope=1e-3 * seconds if by_traffic else 0.5 * seconds / ranks,
        steep=2.0 * seconds,
    )


def _home(ready: Prepared, base_LP: Rows, clock: _Clock, notes: list[str]) -> Rows:
    """``return_home``: trade load for fewer nodes per token, layer by layer."""
    problem = ready.problem
    trace = problem.load.trace
    if problem.objective.dispatch in ("per_expert", "allgather"):
        notes.append(f"dispatch {problem.objective.dispatch}: placement changes load only, traffic is not searched")
        return base_LP
    if trace is None or ready.token_T is None:
        notes.append("the input holds counts only: distinct nodes per token are unknown, load alone is planned")
        return base_LP
    if len(ready.token_T) < trace.num_tokens:
        notes.append(f"the search looks at {len(ready.token_T)} of {trace.num_tokens} tokens, evenly spaced")

    def search(layer: int) -> Rows:
        return _search_layer(
            ready, layer, base_LP[layer], _limits(ready, layer, base_LP[layer]), HOME_PROPOSALS // base_LP.shape[1]
        )

    return _each_layer(clock, "search traffic", len(base_LP), search, base_LP)


def _search_layer(
    ready: Prepared,
    layer: int,
    row_P: Rows,
    limits: _Limits,
    proposals: int,
    held_RE: NDArray[np.bool_] | None = None,
    move_price: float = 0.0,
) -> Rows:
    """One layer's annealing from ``row_P``; without tokens its load alone."""
    problem = ready.problem
    trace, token_T, window_T = problem.load.trace, ready.token_T, ready.window_T
    cost_WP = _copy_costs(ready.layers[layer], row_P)
    first_R = np.concatenate([[0], np.cumsum(problem.slots_R)]).astype(np.int64)
    first_N = first_R[:: problem.ranks_per_node].copy()
    slots = np.where(row_P == EMPTY, -1, np.arange(len(row_P)))
    node_price, rank_price = ready.node_price_s, ready.rank_price_s
    if (
        trace is None
        or token_T is None
        or window_T is None
        or problem.objective.dispatch in ("per_expert", "allgather")
    ):
        bits_PM, start_W = np.zeros((len(row_P), 0), np.uint64), np.zeros(len(cost_WP) + 1, np.int64)
        weight_W = np.full(len(cost_WP), 1.0 / len(cost_WP))
        node_price = rank_price = 0.0
    else:
        home_T = home_ranks(problem.load, np.flatnonzero(problem.slots_R > 0))[token_T]
        slot_TK = choose_slots(trace.experts_TLK[token_T, layer], home_T, problem.placement(row_P[None]), 0, "even")
        bits_PM, start_W = pack_tokens(slot_TK, window_T, len(row_P))
        weight_W = 1.0 / np.bincount(window_T) / len(cost_WP)

        def busiest(first_G: NDArray[np.int64]) -> float:
            return float((group_arrivals(bits_PM, slots, first_G, start_W) * weight_W[:, None]).sum(axis=0).max())

        # Dispatch takes the slower of two paths. Fewer nodes also means fewer ranks, not the other way round: ranks are
        # left out where nodes decide, nodes never.
        if busiest(first_N) * node_price >= 1.3 * busiest(first_R) * rank_price:
            rank_price = 0.0
    held = np.zeros((1, 1), np.bool_) if held_RE is None else held_RE
    best = anneal_home(
        bits_PM, start_W, weight_W, row_P, cost_WP, slots, problem.rank_of_slot_P, first_R, first_N,
        problem.ranks_per_node, problem.speed_R, limits.base_W, limits.cap_W, limits.slope, limits.steep,
        node_price, rank_price, held, move_price,
        0.3 if held_RE is None else 0.1, proposals, problem.seed * 2003 + layer,
    )  # fmt: skip
    return np.where(best < 0, EMPTY, row_P[np.maximum(best, 0)])


def _within_budget(ready: Prepared, current: Placement, max_moves: int, clock: _Clock, notes: list[str]) -> Placement:
    """The best plan found within ``max_moves`` of ``current``: a price per move, bisected until the budget is met.

    Copies per expert stay as they are.
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
    best, best_value = current, objective_value(problem, current)
    spread = [_limits(ready, l, row) for l, row in enumerate(start_LP)]
    low, high = 0.0, 2.0 * best_value
    price = 1e-3 * best_value
    for step in range(BUDGET_STEPS):

        def search(layer: int, price: float = price) -> Rows:
            today = spread[layer]
            limits = _Limits(np.ones_like(today.base_W), np.maximum(today.base_W - 1, 0.05), today.slope, today.steep)
            return _search_layer(ready, layer, start_LP[layer], limits, BUDGET_PROPOSALS, held[layer], price)

        found = problem.placement(_each_layer(clock, f"fit the budget {step + 1}", len(start_LP), search, start_LP))
        moved = int(moves_needed(current, found).sum())
        value = objective_value(problem, found)
        if moved <= max_moves and value < best_value:
            best, best_value = found, value
        low, high = (price, high) if moved > max_moves else (low, price)
        price = (max(low, 1e-9 * best_value) * high) ** 0.5
        if clock.over():
            break
    notes.append(f"{int(moves_needed(current, best).sum())} of {max_moves} moves allowed are made")
    return best


def _stay(ready: Prepared, base_LP: Rows, clock: _Clock, notes: list[str]) -> Rows:
    """``stay``: nodes first, then ranks inside each node, then both together at a low temperature."""
    problem = ready.problem
    transitions = transitions_of(problem.load)
    if transitions is None:
        notes.append("the input holds counts only: transitions between layers are unknown, load alone is planned")
        return base_LP
    flow = transitions / transitions.sum(axis=(1, 2), keepdims=True)
    back = np.ascontiguousarray(flow.transpose(0, 2, 1))
    costs, nodes, ranks = problem.costs, problem.num_nodes, int((problem.slots_R > 0).sum())
    copies = costs.tokens_per_step * (problem.load.top_k or 1)
    rank_value = copies * costs.per_rank_copy_s / problem.num_ranks
    node_value = max(copies * costs.per_node_copy_s / nodes - rank_value, 0.0) if nodes > 1 else 0.0
    row_LP = base_LP.copy()
    limits = [_limits(ready, l, row) for l, row in enumerate(base_LP)]
    base_LW, cap_LW = np.stack([x.base_W for x in limits]), np.stack([x.cap_W for x in limits])
    slope, steep = float(np.mean([x.slope for x in limits])), float(np.mean([x.steep for x in limits]))

    def shares(rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        cost = np.stack([_copy_costs(ready.layers[l], row) for l, row in enumerate(rows)])
        return problem.placement(rows).slot_share_LP, cost

    nothing_held = np.zeros((1, 1, 1), np.bool_)
    even = (problem.slots_R == problem.slots_R[0]).all() and len(set(problem.speed_R.tolist())) == 1
    if nodes > 1 and even and not clock.over():
        share_LP, cost_LWP = shares(row_LP)
        node_of_slot = np.repeat(np.arange(nodes, dtype=np.int32), problem.num_slots // nodes)
        per_node = cost_LWP / problem.ranks_per_node
        anneal_stay(
            flow, back, row_LP, share_LP, per_node, node_of_slot, 1, np.full(nodes, problem.speed_R[0]),
            np.ones_like(base_LW), np.maximum(cap_LW / 2, 1e-3), slope * ranks / nodes, steep, 0.0, node_value,
            STAY_SWEEPS, STAY_PROPOSALS, nothing_held, 0.0, 0.4, False, problem.seed,
        )  # fmt: skip
        problem.progress("search traffic", 0.4)
        row_LP = _each_layer(
            clock, "spread over ranks", len(row_LP), lambda l: _inside_nodes(ready, l, row_LP[l]), row_LP
        )
    if not clock.over():
        share_LP, cost_LWP = shares(row_LP)
        anneal_stay(
            flow, back, row_LP, share_LP, cost_LWP, problem.rank_of_slot_P, problem.ranks_per_node, problem.speed_R,
            base_LW, cap_LW, slope, steep, node_value, rank_value,
            STAY_SWEEPS, STAY_PROPOSALS, nothing_held, 0.0, STAY_HEAT if nodes > 1 and even else 0.4, True,
            problem.seed + 1,
        )  # fmt: skip
    problem.progress("search traffic", 1.0)
    return row_LP


def _inside_nodes(ready: Prepared, layer: int, row_P: Rows) -> Rows:
    """Balance the copies of each node over its ranks, every copy an item of its own; then part equal copies."""
    problem = ready.problem
    size = problem.num_slots // problem.num_nodes
    per_node = problem.ranks_per_node
    cost_WP = _copy_costs(ready.layers[layer], row_P)
    out = row_P.copy()
    for node in range(problem.num_nodes):
        part = slice(node * size, (node + 1) * size)
        items = LayerLoad(
            copy_WEC=np.ascontiguousarray(cost_WP[:, part, None]),
            rank_of_slot_P=problem.rank_of_slot_P[:size],
            speed_R=problem.speed_R[:per_node],
            group_R=np.arange(per_node, dtype=np.int64),
        )
        out[part] = row_P[part][balance_layer(items, BALANCE_PROPOSALS // 8, problem.seed * 31 + layer)]
    weight_E = ready.layers[layer].total_EC[:, 0]
    parted, _, _ = separate_copies(out, problem.rank_of_slot_P, weight_E, problem.speed_R, per_node)
    return parted
