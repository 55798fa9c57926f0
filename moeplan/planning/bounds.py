"""Lower bounds: what no placement can beat, so that every plan carries its gap.

- load: :func:`moeplan.planning.balance.load_bound`, and linear programmes over numbers of copies
  (:mod:`moeplan.planning.copies_bound`) where ranks are alike;
- distinct nodes per token: the most pairs of a token's experts that can share a node bounds them, by a convex
  envelope; pairs are bounded by the eigenvalues of the co-activation matrix with a free diagonal
  (Donath & Hoffman 1973; projection after Rendl & Wolkowicz 1995);
- nodes that a token is sent to from its home, where homes count (:mod:`moeplan.planning.homes_bound`);
- hops between layers (``stay``): the least of a knapsack bound per row, one per column, and the singular values of
  the degree-normalised transition matrix.

``L`` layers, ``E`` experts, ``G`` groups (ranks or nodes), ``W`` windows, ``K`` top-k.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Bound
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.counting import count_loads
from moeplan.costs.evaluation import Evaluation, aggregate, copy_seconds, evaluate, transitions_of
from moeplan.costs.exchange import touched_share
from moeplan.planning.balance import LayerLoad, load_bound
from moeplan.planning.copies_bound import copies_bound
from moeplan.planning.homes_bound import fewest_away, pairs_at_home
from moeplan.planning.problem import STEP_TIME, PlanningProblem, PlanningResult
from moeplan.routing.pairs import weighted_pairs

__all__ = ["bounds_of", "fewest_groups", "most_kept", "pairs_bound"]

ROUNDING = 1e-7  # part of a value that its bound may lie above it


def _layer_load(problem: PlanningProblem, cost_EC: NDArray[np.float64]) -> LayerLoad:
    return LayerLoad(
        copy_WEC=cost_EC[None],
        rank_of_slot_P=problem.rank_of_slot_P,
        speed_R=problem.speed_R,
        group_R=np.arange(problem.num_ranks, dtype=np.int64),
    )


def _most_copies(problem: PlanningProblem, layer: int) -> int:
    spare = problem.num_slots - int(problem.experts_L[layer])
    return max(1, min(int(problem.live_R.sum()), spare + 1))


def _token_load_bound(problem: PlanningProblem, layer: int, value: float) -> float:
    """Bound on max/mean tokens of a layer, all windows together; ``value`` is the plan's."""
    experts = int(problem.experts_L[layer])
    load_E = problem.load.load_LE[layer, :experts]
    scaled = load_E / load_E.sum() * problem.live_speed
    most = _most_copies(problem, layer)
    bound = load_bound(_layer_load(problem, scaled[:, None] / np.arange(1, most + 1)))
    if _alike(problem) and problem.num_slots > experts and value > bound * 1.005:
        bound = copies_bound(scaled, problem.num_ranks, int(problem.slots_R[0]), bound, value)
    return bound


def _alike(problem: PlanningProblem) -> bool:
    """Whether copies share an expert's load evenly over ranks of equal slots, two or more, and equal speed."""
    slots, split = problem.slots_R, problem.objective.replica_split
    even = split == "even" or (split == "nearest" and problem.load.trace is None)
    return even and bool((slots == slots[0]).all() and slots[0] > 1 and (problem.speed_R == 1).all())


def _expert_bound(problem: PlanningProblem, layer: int, window: int) -> float:
    """Bound on the busiest rank's expert seconds in one window."""
    costs = problem.costs
    load_E = problem.load.load_WLE[window : window + 1, layer, : int(problem.experts_L[layer])]
    top_k = problem.load.top_k or 1
    table = [copy_seconds(load_E, costs, top_k, c)[0] for c in range(1, _most_copies(problem, layer) + 1)]
    return load_bound(_layer_load(problem, np.stack(table, axis=1))) + costs.expert_fixed_s


def fewest_groups(pairs: float, top_k: int, groups: int) -> float:
    """Least mean number of distinct groups when on average ``pairs`` of a token's pairs share a group.

    With ``d`` groups at least ``s(d)`` pairs share one (the even split), so a token with fewer than ``s(d)`` pairs
    touches more than ``d``; averages follow the lower convex envelope of the points ``(s(d), d)``.
    """
    most = min(top_k, groups)
    spread = [divmod(top_k, d) for d in range(1, most + 1)]
    points = [(r * (q + 1) * q / 2 + (d - r) * q * (q - 1) / 2, float(d)) for d, (q, r) in enumerate(spread, start=1)]
    best = 1.0
    for i, (x1, d1) in enumerate(points):
        for x2, d2 in points[i + 1 :]:  # x falls as d rises
            slope = (d2 - d1) / (x2 - x1)
            if all(d >= d1 + slope * (x - x1) - 1e-9 for x, d in points):
                best = max(best, d1 + slope * (pairs - x1))
    return best


def pairs_bound(together_EE: NDArray[np.float64], groups: int, size: int) -> float:
    """Upper bound on the weight of pairs inside groups, over partitions into ``groups`` groups of ``size``.

    ``together_EE`` is symmetric with a zero diagonal; each pair counts once. For every diagonal shift ``u`` with
    ``B = A + diag(u)``, ``tr(X' A X) <= 1'B1/G + size * sum of the G-1 largest eigenvalues of B beside 1 - sum(u)``;
    ``u`` is chosen to make it small.
    """
    experts = len(together_EE)
    beside = np.linalg.qr(np.column_stack([np.ones(experts), np.eye(experts)[:, 1:]]))[0][:, 1:]

    def value(u: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        shifted = together_EE + np.diag(u)
        eigenvalues, vectors = np.linalg.eigh(beside.T @ shifted @ beside)
        top = beside @ vectors[:, -(groups - 1) :]
        total = shifted.sum() / groups + size * eigenvalues[-(groups - 1) :].sum() - u.sum()
        gradient = 1.0 / groups + size * (top**2).sum(axis=1) - 1.0
        return float(total), gradient

    start = -together_EE.sum(axis=1) / groups
    steps = 20 if experts <= 128 else 12
    found = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return float(min(value(found.x)[0], together_EE.sum())) / 2


def _weights(load: ExpertLoad, trace: RoutingTrace) -> NDArray[np.float64]:
    """Of tokens in means: windows count alike, whatever their tokens, as they do in a plan's figures."""
    if load.window_T is None:
        return np.full(trace.num_tokens, 1.0 / trace.num_tokens)
    weight_T: NDArray[np.float64] = 1.0 / np.bincount(load.window_T)[load.window_T] / len(load.windows)
    return weight_T


def _together(load: ExpertLoad, trace: RoutingTrace, layer: int) -> tuple[NDArray[np.float64], float, float]:
    """Times two experts are chosen by one token ``[E, E]``, distinct experts, and whether any: means per token."""
    chosen_TK, weight_T = np.ascontiguousarray(trace.experts_TLK[:, layer]), _weights(load, trace)
    together = weighted_pairs(chosen_TK, weight_T, load.num_experts)
    mean = float(np.trace(together))
    np.fill_diagonal(together, 0.0)
    return together, mean, float(weight_T[(chosen_TK >= 0).any(axis=1)].sum())


def _groups_bound(problem: PlanningProblem, layer: int, groups: int) -> tuple[float, float]:
    """Bounds on the mean distinct groups of a token, the part of tokens with any expert where the argument ends, and,
    where homes count, on those that it is sent to from its home: nodes, or (token, expert) pairs by ``per_expert``.
    """
    trace = problem.load.trace
    if trace is None:
        return 1.0, 0.0
    experts = int(problem.experts_L[layer])
    top_k = problem.load.top_k or 1
    equal = problem.num_slots == experts and experts % groups == 0 and len(set(problem.slots_R.tolist())) == 1
    together, mean, any_expert = _together(problem.load, trace, layer)
    # With padding or repeated choices a token has fewer than top-k distinct experts: the envelope does not hold.
    whole = mean > top_k - 1e-9
    pairs, distinct = top_k * (top_k - 1) / 2, any_expert
    if equal and groups > 1 and whole:
        pairs = pairs_bound(together[:experts, :experts], groups, experts // groups)
        distinct = fewest_groups(pairs, top_k, groups)
    if not problem.counts_homes:
        return distinct, 0.0
    at_home, every = pairs_at_home(problem, layer, _weights(problem.load, trace))
    if problem.objective.dispatch == "per_expert":
        return distinct, max(0.0, every - at_home)
    return distinct, fewest_away(pairs, at_home, top_k, groups) if whole else max(0.0, any_expert - at_home)


def most_kept(flow_EE: NDArray[np.float64], groups: int, size: int, cap: float) -> float:
    """Upper bound on the part of a transition matrix that can stay inside groups.

    Valid for all placements, copies included, with at most ``size`` slots per group and at most ``cap`` times the
    mean load on any group of either layer. ``flow_EE`` sums to 1.
    """
    before, after = flow_EE.sum(axis=1), flow_EE.sum(axis=0)
    limit = min(cap / groups, 1.0)
    scaled = flow_EE / np.sqrt(np.maximum(before, 1e-300))[:, None] / np.sqrt(np.maximum(after, 1e-300))[None, :]
    singular = np.linalg.svd(scaled, compute_uv=False)
    whole = int(1.0 / limit)
    spectral = limit * singular[:whole].sum() + max(0.0, 1.0 - whole * limit) * (
        singular[whole] if whole < len(singular) else 0.0
    )
    return float(
        min(1.0, spectral, _knapsacks(flow_EE, after, size, limit), _knapsacks(flow_EE.T, before, size, limit))
    )


def _knapsacks(flow_EE: NDArray[np.float64], load_E: NDArray[np.float64], size: int, limit: float) -> float:
    """Each row keeps at most the best experts that fit one group: fractional knapsack by load, and by number."""
    by_number = np.sort(flow_EE, axis=1)[:, ::-1][:, :size].sum(axis=1)
    order = np.argsort(-flow_EE / np.maximum(load_E, 1e-300), axis=1, kind="stable")
    value, weight = np.take_along_axis(flow_EE, order, axis=1), load_E[order]
    filled = np.cumsum(weight, axis=1)
    part = np.clip((limit - (filled - weight)) / np.maximum(weight, 1e-300), 0.0, 1.0)
    return float(np.minimum(by_number, (value * part).sum(axis=1)).sum())


def _exchange_bound(
    problem: PlanningProblem, plan: Placement, layer: int, flow: NDArray[np.float64] | None, groups: float, away: float
) -> float:
    """Bound on a layer's exchange seconds beyond the fixed part; ``groups`` bounds the places that a token touches:
    ranks for ``per_rank`` dispatch, else nodes, where there are several; ``away`` what of it is not at home where homes
    count."""
    costs, objective = problem.costs, problem.objective
    T, top_k, nodes, ranks = (
        costs.tokens_per_step,
        problem.load.top_k or 1,
        problem.num_nodes,
        problem.num_ranks,
    )
    if objective.return_mode == "stay":
        if flow is None or layer >= len(flow):
            return 0.0
        part = flow[layer] / flow[layer].sum()
        moved_WLE = np.zeros((1, plan.num_layers, part.shape[0]))
        moved_WLE[0, layer], moved_WLE[0, layer + 1] = part.sum(axis=1), part.sum(axis=0)
        loads = count_loads(moved_WLE, plan)[0, layer : layer + 2]
        node_slots = int(problem.slots_R.reshape(nodes, -1).sum(axis=1).max())
        node_cap = nodes * float(loads.reshape(2, nodes, -1).sum(axis=2).max())
        on_node = most_kept(part, nodes, node_slots, node_cap) if nodes > 1 else 1.0
        on_rank = min(on_node, most_kept(part, ranks, int(problem.slots_R.max()), ranks * float(loads.max())))
        rank_s, node_s = costs.hop_s(ranks, nodes)
        # Where leaving the node is the cheaper hop, what stays in the node had better stay on the rank.
        kept = on_node if node_s >= rank_s else on_rank
        return T * top_k * max(0.0, float((kept - on_rank) * rank_s + (1 - kept) * node_s))
    counts_only = problem.load.trace is None
    if objective.dispatch == "allgather":
        return 0.0
    paths = [(costs.per_rank_copy_s, 1 / costs.links(ranks)[problem.live_R])]
    if nodes > 1:
        paths.append((costs.per_node_copy_s, _pace_between(problem)))
    busy = float((problem.load.load_WLE[:, layer].sum(axis=1) > 0).mean())  # part of the windows with any tokens
    if problem.counts_homes:
        touched = (top_k * busy if objective.dispatch == "per_expert" else groups, away)
        return T * max(each * copy_s * _shared(pace_X) for each, (copy_s, pace_X) in zip(touched, paths, strict=True))
    if objective.dispatch == "per_expert" or counts_only:
        if objective.dispatch == "per_expert":
            return T * busy * top_k * max(copy_s * _shared(pace_X) for copy_s, pace_X in paths)
        # Some place gets the even part of all pairs or more, and what it touches rises with it.
        return T * busy * max(
            copy_s * float(touched_share(np.array([1 / len(pace_X)]), top_k)[0] * pace_X.min())
            for copy_s, pace_X in paths
        )
    copy_s, pace_X = paths[-1]
    return T * groups * copy_s * _shared(pace_X)


def _shared(pace_X: NDArray[np.float64]) -> float:
    """Time of one copy at the busiest of places that share copies at best, each taking ``pace_X`` for all of it."""
    return 1.0 / float((1 / pace_X).sum()) if pace_X.all() else 0.0


def _pace_between(problem: PlanningProblem) -> NDArray[np.float64]:
    """Time of a copy to each place between nodes that works, over the usual, in units of a node and, by chance,
    for the part that comes from other nodes: nodes for ``per_node`` dispatch, else NICs (:mod:`moeplan.costs.nics`)."""
    nics = problem.costs.nics(problem.objective.dispatch, problem.num_ranks, problem.num_nodes)
    pace_G = nics.pace_G * (1 if nics.merges else nics.per_node)
    if not problem.counts_homes:
        pace_G = pace_G * nics.away_N.repeat(len(pace_G) // problem.num_nodes)
    working: NDArray[np.float64] = pace_G[problem.live_R.reshape(len(pace_G), -1).any(1)]
    return working


def _bound(quantity: str, values: NDArray[np.float64], bounds: NDArray[np.float64], mean: bool, argument: str) -> Bound:
    above = bounds > values * (1 + ROUNDING)
    if above.any():  # better no bound than one that proves a plan best
        argument += f"; withheld where it exceeds what was found ({above.sum()} of {len(above)}): a fault"
    bounds = np.where(above, 0.0, np.minimum(bounds, values))
    value, bound = (float(x.mean() if mean else x.sum()) for x in (values, bounds))
    return Bound(
        quantity=quantity,
        value=value,
        bound=bound,
        gap=value / bound - 1 if bound > 0 else 0.0 if value == 0 else 1e9,
        argument=argument,
        value_L=tuple(float(x) for x in values),
        bound_L=tuple(float(x) for x in bounds),
    )


def bounds_of(
    problem: PlanningProblem, result: PlanningResult, evaluation: Evaluation | None = None
) -> tuple[Bound, ...]:
    """Bounds on a plan's step time, its load, and its distinct nodes per token where those are planned for."""
    plan, objective = result.placement, problem.objective
    found = evaluation or evaluate(problem.load, plan, problem.costs, objective, problem.speed_R)
    L, W = plan.num_layers, len(problem.load.windows)
    load_value = (found.load_LR / problem.speed_R).max(axis=1) / (problem.load.load_LE.sum(axis=1) / problem.live_speed)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        load_floor = np.asarray(list(pool.map(lambda l: _token_load_bound(problem, l, float(load_value[l])), range(L))))
    answers = []
    groups_L = touched_L = np.ones(L)
    away_L = np.zeros(L)
    if objective.return_mode == "return_home":
        parts = problem.num_nodes if problem.num_nodes > 1 else problem.num_ranks
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            groups_L, away_L = np.asarray(list(pool.map(lambda l: _groups_bound(problem, l, parts), range(L)))).T
            touched_L = groups_L
            if objective.dispatch == "per_rank" and parts < problem.num_ranks:
                ranks_L = list(pool.map(lambda l: _groups_bound(problem, l, problem.num_ranks)[0], range(L)))
                touched_L = np.maximum(groups_L, ranks_L)
    flow = transitions_of(problem.load) if objective.return_mode == "stay" else None
    seconds_L = np.asarray([aggregate(found.time_WL[:, l], objective) for l in range(L)])
    if result.status == "optimal" and result.optimal_for == STEP_TIME:
        argument = f"{result.argument}, within the load limit"
        answers.append(_bound("step time, s", seconds_L, seconds_L, False, argument))
    else:
        floor_WL = np.zeros((W, L))
        for l in range(L):
            exchange = problem.costs.exchange_fixed_s + _exchange_bound(problem, plan, l, flow, touched_L[l], away_L[l])
            floor_WL[:, l] = [_expert_bound(problem, l, w) + exchange for w in range(W)]
        floor_L = floor_WL.mean(axis=0)  # the mean over windows is never above their worst or their tail
        total = aggregate(found.time_WL.sum(axis=1), objective)
        argument = "expert time: mean, costliest copy and pigeonhole; exchange: " + (
            "knapsack and singular values of the transitions, over plans no more unbalanced than this one"
            if objective.return_mode == "stay"
            else "eigenvalues of the co-activation matrix"
            + (" and most experts at home" if problem.counts_homes else "")
            + "; the two added"
        )
        if objective.aggregate != "mean":
            # Worst windows of single layers add up to more than the worst step: less of what is above the bound.
            above_L = seconds_L - floor_L
            seconds_L = floor_L + above_L * ((total - floor_L.sum()) / max(above_L.sum(), 1e-300))
        answers.append(_bound("step time, s", seconds_L, floor_L, False, argument))
    programmes = "; numbers of copies as linear programmes" if _alike(problem) else ""
    argument = f"mean, costliest copy and pigeonhole{programmes}"
    answers.append(_bound("max/mean load", load_value, load_floor, True, argument))
    counts = found.counts
    if counts is not None and objective.return_mode == "return_home" and problem.num_nodes > 1:
        nodes_L = counts.nodes_per_token_WL.mean(axis=0)
        answers.append(_bound("nodes per token", nodes_L, groups_L, True, "eigenvalues of the co-activation matrix"))
    return tuple(answers)
