"""The default planner: expert load and traffic together, by compiled search; small cases exactly.

Every layer is first balanced for load alone (:mod:`moeplan.planning.balance`). From there

- ``return_home``: layers separate; swaps trade load, within ``max_imbalance`` of the balanced plan, for fewer nodes
  (or ranks) per token (:mod:`moeplan.planning.search_home`), over nodes first, then over ranks;
- ``stay``: all layers together; experts are first spread over nodes, then over the ranks of each node, then both are
  refined (:mod:`moeplan.planning.search_stay`);
- few experts and ranks: every arrangement, or a dynamic programme over them (:mod:`moeplan.planning.exact`).

The balanced plan is returned where the search does not beat it on the objective.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.plan import Status
from moeplan.costs.counting import count_slots
from moeplan.costs.evaluation import Evaluation, evaluate, transitions_of
from moeplan.planning.balance import LayerLoad, balance_layer
from moeplan.planning.budget import within_budget
from moeplan.planning.clock import Clock, each_layer
from moeplan.planning.exact import exact_placement
from moeplan.planning.prepare import (
    LayerTokens,
    Prepared,
    copy_costs,
    layer_tokens,
    merges_or_knows_homes,
    objective_value,
    prepare,
    window_seconds,
)
from moeplan.planning.problem import STEP_TIME, PlanningProblem, PlanningResult
from moeplan.planning.search_home import anneal_home
from moeplan.planning.search_load import rank_loads
from moeplan.planning.search_stay import anneal_stay
from moeplan.planning.simple import contiguous
from moeplan.planning.slots import require_room, separate_copies

__all__ = ["joint"]

BALANCE_PROPOSALS = 40_000
HOME_PROPOSALS = 50_000_000  # over the slots of a layer: its arrangements are the fewer
HOME_SWEEPS = 500  # proposals per pair of slots, at most: what few slots can be arranged to is soon found
HOME_HEAT = 0.02  # of the last search over ranks, where nodes have been settled
NODE_ROOMS = (0.5, 1.0)  # parts of the load allowance that nodes may use; what remains is for the ranks inside
STAY_SWEEPS, STAY_PROPOSALS, STAY_HEAT = 100, 5_000, 0.005
ROUNDS = 3

Rows = NDArray[np.int64]


def joint(problem: PlanningProblem) -> PlanningResult:
    """Place all layers; see the module.

    Where the worst windows count, the searches, which look at means, are repeated with more weight on the windows that
    came out slowest (multiplicative weights, Freund & Schapire 1999), and the best plan for the objective is kept.

    Raises:
        InfeasibleError: fewer slots than experts.
    """
    require_room(problem)
    clock = Clock(problem)
    if problem.current is not None and problem.max_moves is not None:
        budgeted, note = within_budget(problem, problem.current, problem.max_moves, clock)
        return PlanningResult(budgeted, clock.status, notes=(note,))
    if (node := _one_node(problem)) is not None:
        return _in_every_node(problem, joint(node))
    best = _plan(prepare(problem), clock)
    windows = len(problem.load.windows)
    if windows == 1 or problem.objective.aggregate == "mean":
        return best
    last, weight_W = best, np.full(windows, 1.0 / windows)
    try:
        best_value = objective_value(problem, best.placement)
        for _ in range(ROUNDS):
            if clock.over():
                break
            seconds_W = window_seconds(problem, last.placement)
            weight_W *= np.exp(8.0 * (seconds_W / seconds_W.mean() - 1.0))
            weight_W /= weight_W.sum()
            last = _plan(prepare(problem, weight_W), clock)
            if (value := objective_value(problem, last.placement)) < best_value:
                best, best_value = last, value
    except KeyboardInterrupt:
        clock.status = "interrupted"
    return replace(best, status=clock.status if best.status != "optimal" else best.status)


def _one_node(problem: PlanningProblem) -> PlanningProblem | None:
    """One node's problem, where the nearest copy serves and nodes can hold all experts: no token leaves its own."""
    per_node, trace = problem.ranks_per_node, problem.load.trace
    room = problem.num_slots >= problem.num_nodes * int(problem.experts_L.max())
    if problem.objective.replica_split != "nearest" or not (problem.num_nodes > 1 and problem.ranks_alike and room):
        return None
    return replace(
        problem,
        load=replace(problem.load, trace=None if trace is None else replace(trace, source_rank_T=None)),
        slots_R=problem.slots_R[:per_node],
        speed_R=problem.speed_R[:per_node],
        costs=replace(
            problem.costs,
            tokens_per_step=-(-problem.costs.tokens_per_step // problem.num_nodes),
            link_R=problem.costs.link_R[:per_node],
        ),
        current=None,
    )


def _in_every_node(problem: PlanningProblem, node: PlanningResult) -> PlanningResult:
    """One node's plan in all of them, unless the placement in use is as good or the contiguous one better."""
    ready, rows = prepare(problem), np.tile(node.placement.physical_to_logical_LP, problem.num_nodes)
    found, notes = _unbeaten(ready, problem.placement(rows), problem.placement(rows))
    status: Status = "feasible" if node.status == "optimal" else node.status
    return PlanningResult(found, status, notes=(*node.notes, "every node holds all experts alike", *notes))


def _plan(ready: Prepared, clock: Clock) -> PlanningResult:
    problem = ready.problem
    layers = len(ready.layers)

    def balanced(layer: int) -> Rows:
        return balance_layer(ready.layers[layer], BALANCE_PROPOSALS, problem.seed * 1009 + layer)

    base_LP = np.stack(each_layer(clock, "balance load", layers, balanced))
    base = problem.placement(base_LP)
    if problem.objective.kind == "load":
        return PlanningResult(base, clock.status)
    best, notes = base, list[str]()
    try:
        exact = exact_placement(ready)
        if exact is not None:
            quantity = STEP_TIME if problem.objective.kind == "time" else "dispatch and combine time"
            best = problem.placement(exact.row_LP)
            now = _current(problem)
            if now is not None and np.isclose(objective_value(problem, now), objective_value(problem, best), 1e-9, 0):
                best = now
            return PlanningResult(best, "optimal", quantity, argument=exact.argument)
        traffic = _stay if problem.objective.return_mode == "stay" else _home
        best = problem.placement(traffic(ready, base_LP, clock, notes))
        if objective_value(problem, best) > objective_value(problem, base):
            best = base
            notes.append("the balanced plan was not beaten: traffic traded for load would cost more than it saves")
        best, more = _unbeaten(ready, base, best)
        notes += more
    except KeyboardInterrupt:
        clock.status = "interrupted"
    return PlanningResult(best, clock.status, notes=tuple(notes))


@dataclass(frozen=True, slots=True, eq=False)
class _Limits:
    """What load a rank may take: the balanced plan's busiest per window, and prices in seconds above it; and how many
    tokens over its speed, all windows together.

    The step pays for the busiest rank alone, but a price on the peak alone gives a search no slope: half is charged
    on the peak, and each rank above the balanced plan's busiest pays up to ``slope``. Beyond the cap each pays twice
    the whole.
    """

    base_W: NDArray[np.float64]
    cap_W: NDArray[np.float64]
    most_held: float
    slope: float
    steep: float


def _held(problem: PlanningProblem, layer: int, row_P: Rows) -> NDArray[np.float64]:
    """Tokens of the copy in each slot, all windows together; copies of an expert share them evenly."""
    load_WLE = problem.load.load_LE[None, layer : layer + 1]
    held_P: NDArray[np.float64] = count_slots(load_WLE, problem.placement(row_P[None]))[0, 0]
    return held_P


def _limits(ready: Prepared, layer: int, row_P: Rows) -> _Limits:
    load, seconds = ready.layers[layer], float(ready.seconds_L[layer])
    base_W = rank_loads(load.copy_WEC, row_P, load.rank_of_slot_P, load.speed_R).max(axis=1)
    ranks = int(ready.problem.live_R.sum())
    by_traffic = ready.problem.objective.kind == "traffic"
    held_R = np.bincount(load.rank_of_slot_P, _held(ready.problem, layer, row_P), len(load.speed_R))
    return _Limits(
        base_W=base_W,
        cap_W=np.maximum(ready.max_imbalance, 1e-3) * base_W,
        most_held=float((held_R / load.speed_R).max()) * (1 + ready.max_imbalance) * (1 + 1e-9),
        slope=1e-3 * seconds if by_traffic else 0.5 * seconds / ranks,
        steep=2.0 * seconds,
    )


def _home(ready: Prepared, base_LP: Rows, clock: Clock, notes: list[str]) -> Rows:
    """``return_home``: trade load for fewer nodes per token, layer by layer."""
    problem = ready.problem
    trace = problem.load.trace
    if not merges_or_knows_homes(problem):
        notes.append(f"dispatch {problem.objective.dispatch}: placement changes load only, traffic is not searched")
        return base_LP
    if trace is None or ready.token_T is None:
        notes.append("the input holds counts only: distinct nodes per token are unknown, load alone is planned")
        return base_LP
    if len(ready.token_T) < trace.num_tokens:
        notes.append(f"the search looks at {len(ready.token_T)} of {trace.num_tokens} tokens, evenly spaced")

    rooms: tuple[float, ...] = NODE_ROOMS if _nodes_alike(problem) else ()
    if problem.objective.dispatch != "per_node" and problem.ranks_per_node > 1:
        rooms = rooms or (1.0,)  # no node is entered as one: ranks at once
    elif not (rooms and problem.ranks_alike):
        rooms = (*rooms, 0.0)

    def search(layer: int) -> Rows:
        row_P = base_LP[layer]
        data, limits = layer_tokens(ready, layer, row_P), _limits(ready, layer, row_P)
        return np.stack([row_P, *(_search_layer(ready, layer, row_P, data, limits, x) for x in rooms)])

    unfinished_LCP = np.repeat(base_LP[:, None], 1 + len(rooms), axis=1)
    return _best_of(ready, np.stack(each_layer(clock, "search traffic", len(base_LP), search, list(unfinished_LCP))))


def _nodes_alike(problem: PlanningProblem) -> bool:
    """Whether experts can be spread over nodes first: several, of equal slots and speeds."""
    alike = all((each_R == each_R[0]).all() for each_R in (problem.slots_R, problem.speed_R))
    return problem.num_nodes > 1 and alike


def _node_of_slot(problem: PlanningProblem) -> NDArray[np.int32]:
    return np.repeat(np.arange(problem.num_nodes, dtype=np.int32), problem.num_slots // problem.num_nodes)


def _best_of(ready: Prepared, rows_LCP: Rows) -> Rows:
    """The best of each layer's ``C`` arrangements; the first, balanced one gives the limit of load.

    Both paths of the exchange are charged, not the slower alone: tables measure them together, how far one hides
    the other is not known, and few copies between nodes leave the network to others.
    """
    problem = ready.problem
    weight_W = ready.weight_W if ready.weight_W is not None else np.full(len(problem.load.windows), 1.0)
    price_CL = np.zeros(rows_LCP.shape[1::-1])
    for c, rows_LP in enumerate(rows_LCP.transpose(1, 0, 2)):
        found = evaluate(problem.load, problem.placement(rows_LP), problem.costs, problem.objective, problem.speed_R)
        experts_WL = 0.0 if problem.objective.kind == "traffic" else found.expert_WL
        price_CL[c] = weight_W @ (experts_WL + found.node_path_WL + found.rank_path_WL)
        # Windows held the search to the limit; all of them together must keep it as well.
        busiest_L = _busiest(problem, found)
        if c == 0:
            limit_L = busiest_L * (1 + ready.max_imbalance) * (1 + 1e-9)
        price_CL[c, busiest_L > limit_L] = np.inf
    best_LP: Rows = rows_LCP[np.arange(len(rows_LCP)), price_CL.argmin(axis=0)]
    return best_LP


def _unbeaten(ready: Prepared, base: Placement, found: Placement) -> tuple[Placement, list[str]]:
    """``found``, unless the contiguous placement is better or the one in use as good; within a limit of load given."""
    problem, notes = ready.problem, []
    limited = problem.objective.max_imbalance is not None
    for name, other in (("contiguous", contiguous(problem).placement), ("current", _current(problem))):
        if other is None or (limited and not _within_load(ready, base, other)):
            continue
        ours, theirs = objective_value(problem, found), objective_value(problem, other)
        if theirs < ours or (name == "current" and theirs == ours):
            found, notes = other, [f"the {name} placement was not beaten"]
    return found, notes


def _current(problem: PlanningProblem) -> Placement | None:
    """The placement in use where it could be the plan: the same slots, no expert twice on a rank."""
    now = problem.current
    if now is None or now.num_slots != problem.num_slots or (now.rank_of_slot_P != problem.rank_of_slot_P).any():
        return None
    return None if now.duplicates() else now


def _within_load(ready: Prepared, base: Placement, plan: Placement) -> bool:
    """Whether a plan keeps the limit of load in every layer, which the balanced one gives."""
    problem = ready.problem
    base_L, plan_L = (
        _busiest(problem, evaluate(problem.load, each, problem.costs, problem.objective, problem.speed_R))
        for each in (base, plan)
    )
    return bool((plan_L <= base_L * (1 + ready.max_imbalance) * (1 + 1e-9)).all())


def _busiest(problem: PlanningProblem, found: Evaluation) -> NDArray[np.float64]:
    """Tokens of each layer's busiest rank over its speed, all windows together."""
    busiest_L: NDArray[np.float64] = (found.load_LR / problem.speed_R).max(axis=1)
    return busiest_L


def _search_layer(
    ready: Prepared, layer: int, row_P: Rows, data: LayerTokens, limits: _Limits, node_room: float
) -> Rows:
    """One layer's annealing from ``row_P`` and its tokens ``data``: over nodes that may exceed the mean load by
    ``node_room`` of what ranks may, then over the ranks of each node, then both at a low temperature; with no node
    room over ranks at once. Where copies do not merge by node ranks are searched at once, within that part of the room.
    """
    problem = ready.problem
    budget = min(HOME_PROPOSALS // len(row_P), HOME_SWEEPS * len(row_P) ** 2)
    seed, heat = problem.seed * 2003 + layer, 0.3
    half = 0.5 * float(ready.seconds_L[layer]) if problem.objective.kind == "time" else 0.0
    cap_W = limits.cap_W
    if data.ranks_per_group < problem.ranks_per_node:
        cap_W, node_room = cap_W * node_room, 0.0
    if node_room:
        even_W = np.ones(len(limits.base_W))
        best = anneal_home(
            data.bits_PM, data.away_GM, data.start_W, data.weight_W, row_P, data.cost_WP / problem.ranks_per_node,
            data.copy_of_slot_P.copy(), _node_of_slot(problem), data.first_G, data.first_G, 1,
            problem.speed_R[:: problem.ranks_per_node], data.pace_X, data.pace_X, problem.num_nodes,
            problem.ranks_per_node, even_W, even_W * max(node_room * ready.max_imbalance, 1e-3), np.zeros(len(row_P)),
            0.0, limits.slope * problem.ranks_per_node, limits.steep, 0.0, data.group_price, 0.0, heat, budget // 2,
            seed,
        )  # fmt: skip
        row_P = _inside_nodes(ready, layer, np.where(best < 0, EMPTY, row_P[np.maximum(best, 0)]))
        data, budget, heat = layer_tokens(ready, layer, row_P), budget // 4, HOME_HEAT
    best = anneal_home(
        data.bits_PM, data.away_GM, data.start_W, data.weight_W, row_P, data.cost_WP, data.copy_of_slot_P.copy(),
        problem.rank_of_slot_P, data.first_R, data.first_G, data.ranks_per_group, problem.speed_R, data.pace_X,
        data.pace_R, problem.num_nodes, 1, limits.base_W, cap_W, _held(problem, layer, row_P), limits.most_held,
        0.5 * limits.slope, limits.steep, half, data.group_price, data.rank_price, heat, budget, seed,
    )  # fmt: skip
    return np.where(best < 0, EMPTY, row_P[np.maximum(best, 0)])


def _stay(ready: Prepared, base_LP: Rows, clock: Clock, notes: list[str]) -> Rows:
    """``stay``: nodes first, then ranks inside each node, then both together at a low temperature."""
    problem = ready.problem
    transitions = transitions_of(problem.load)
    if transitions is None:
        notes.append("the input holds counts only: transitions between layers are unknown, load alone is planned")
        return base_LP
    flow = transitions / transitions.sum(axis=(1, 2), keepdims=True)
    back = np.ascontiguousarray(flow.transpose(0, 2, 1))
    costs, nodes, ranks = problem.costs, problem.num_nodes, int(problem.live_R.sum())
    copies = costs.tokens_per_step * (problem.load.top_k or 1)
    rank_value, away_value = (copies * hop_s for hop_s in costs.hop_s(problem.num_ranks, nodes))
    node_value = max(away_value - rank_value, 0.0) if nodes > 1 else 0.0
    row_LP = base_LP.copy()
    limits = [_limits(ready, l, row) for l, row in enumerate(base_LP)]
    base_LW, cap_LW = np.stack([x.base_W for x in limits]), np.stack([x.cap_W for x in limits])
    slope, steep = float(np.mean([x.slope for x in limits])), float(np.mean([x.steep for x in limits]))

    def shares(rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        cost = np.stack([copy_costs(ready.layers[l], row) for l, row in enumerate(rows)])
        return problem.placement(rows).slot_share_LP, cost

    alike = _nodes_alike(problem)
    if alike and not clock.over():
        share_LP, cost_LWP = shares(row_LP)
        per_node = cost_LWP / problem.ranks_per_node
        anneal_stay(
            flow, back, row_LP, share_LP, per_node, _node_of_slot(problem), 1,
            problem.speed_R[:: problem.ranks_per_node],
            np.ones_like(base_LW), np.maximum(cap_LW / 2, 1e-3), slope * ranks / nodes, steep, 0.0, node_value,
            STAY_SWEEPS, STAY_PROPOSALS, 0.4, False, problem.seed,
        )  # fmt: skip
        problem.progress("search traffic", 0.4)
        on_node = list(row_LP)
        spread = each_layer(
            clock, "spread over ranks", len(on_node), lambda l: _inside_nodes(ready, l, on_node[l]), on_node
        )
        row_LP = np.stack(spread)
    if not clock.over():
        share_LP, cost_LWP = shares(row_LP)
        anneal_stay(
            flow, back, row_LP, share_LP, cost_LWP, problem.rank_of_slot_P, problem.ranks_per_node, problem.speed_R,
            base_LW, cap_LW, slope, steep, node_value, rank_value,
            STAY_SWEEPS, STAY_PROPOSALS, STAY_HEAT if alike else 0.4, True,
            problem.seed + 1,
        )  # fmt: skip
    problem.progress("search traffic", 1.0)
    return row_LP


def _inside_nodes(ready: Prepared, layer: int, row_P: Rows) -> Rows:
    """Balance the copies of each node over its ranks, every copy an item of its own; then part equal copies."""
    problem = ready.problem
    size = problem.num_slots // problem.num_nodes
    per_node = problem.ranks_per_node
    cost_WP = copy_costs(ready.layers[layer], row_P)
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
