"""Exact plans where experts and ranks are few: every arrangement of a layer, chained by dynamic programming.

One copy per expert, equal ranks. An arrangement is a partition of the experts over labelled ranks. In ``return_home``
layers separate and the best arrangement of each is found by looking at all. In ``stay`` the hops between two layers
depend on both: a dynamic programme over the chain of layers is exact (``O(L A^2)`` for ``A`` arrangements; 2,520 for 8
experts on 4 ranks). With one expert per rank, ranks inside a node are interchangeable: arrangements are then splits
over nodes, and the best match of the ranks of two layers is found inside each pair of splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moeplan.costs.counting import shares
from moeplan.costs.evaluation import copy_seconds, transitions_of
from moeplan.costs.exchange import touched_share
from moeplan.planning.prepare import Prepared

__all__ = ["ExactPlan", "arrangements", "exact_placement"]

MAX_ARRANGEMENTS = 3000
MAX_EXPERTS = 12


@dataclass(frozen=True, slots=True, eq=False)
class ExactPlan:
    """Expert in each slot, and the argument that nothing is better."""

    row_LP: NDArray[np.int64]
    argument: str


def arrangements(experts: int, groups: int) -> NDArray[np.int64]:
    """All partitions of the experts into labelled groups of equal size: group of each expert ``[A, E]``."""
    size = experts // groups
    found: list[list[int]] = []

    def extend(row: list[int], free: list[int]) -> None:
        if len(row) == experts:
            found.append(row)
            return
        for g in range(groups):
            if free[g]:
                free[g] -= 1
                extend([*row, g], free)
                free[g] += 1

    extend([], [size] * groups)
    return np.asarray(found, dtype=np.int64)


def _count(experts: int, groups: int) -> int:
    return factorial(experts) // int(factorial(experts // groups) ** groups)


@njit(cache=True, nogil=True)
def _chain(flow_LEE, rank_AE, per_node, node_value, rank_value, cost_LA):
    """Cheapest chain: value per arrangement of the last layer, and where each came from."""
    layers = flow_LEE.shape[0] + 1
    many, experts = rank_AE.shape
    value = cost_LA[0].copy()
    came = np.zeros((layers, many), np.int64)
    worth = np.zeros((experts, rank_AE.max() + 1))
    for l in range(1, layers):
        new = np.full(many, np.inf)
        for a in range(many):
            # What each expert of the new layer is worth on each rank, the old layer standing as a.
            worth[:] = 0.0
            for e in range(experts):
                r = rank_AE[a, e]
                first = (r // per_node) * per_node
                for f in range(experts):
                    kept = flow_LEE[l - 1, e, f]
                    worth[f, r] += rank_value * kept
                    for q in range(first, first + per_node):
                        worth[f, q] += node_value * kept
            for b in range(many):
                total = value[a]
                for f in range(experts):
                    total -= worth[f, rank_AE[b, f]]
                if total < new[b] - 1e-15:
                    new[b] = total
                    came[l, b] = a
        for b in range(many):
            new[b] += cost_LA[l, b]
        value = new
    return value, came


@njit(cache=True, nogil=True)
def _chain_split(flow_LEE, node_AE, orders, node_value, rank_value, cost_LA):
    """As :func:`_chain` for splits over nodes with one expert per rank; ``orders`` are the matches inside a node.

    The third result is the order used in each node, ``[L, A, N]``.
    """
    layers = flow_LEE.shape[0] + 1
    many, experts = node_AE.shape
    nodes = node_AE.max() + 1
    size = experts // nodes
    member = np.zeros((many, nodes, size), np.int64)
    for a in range(many):
        n = np.zeros(nodes, np.int64)
        for e in range(experts):
            g = node_AE[a, e]
            member[a, g, n[g]] = e
            n[g] += 1
    value = cost_LA[0].copy()
    came = np.zeros((layers, many), np.int64)
    used = np.zeros((layers, many, nodes), np.int64)
    order_now = np.zeros(nodes, np.int64)
    for l in range(1, layers):
        new = np.full(many, np.inf)
        for b in range(many):
            for a in range(many):
                total = value[a]
                for n in range(nodes):
                    inside = 0.0
                    best = -1.0
                    for o in range(len(orders)):
                        matched = 0.0
                        for i in range(size):
                            matched += flow_LEE[l - 1, member[a, n, i], member[b, n, orders[o, i]]]
                        if matched > best:
                            best = matched
                            order_now[n] = o
                    for i in range(size):
                        for j in range(size):
                            inside += flow_LEE[l - 1, member[a, n, i], member[b, n, j]]
                    total -= node_value * inside + rank_value * best
                if total < new[b] - 1e-15:
                    new[b] = total
                    came[l, b] = a
                    used[l, b] = order_now
        for b in range(many):
            new[b] += cost_LA[l, b]
        value = new
    return value, came, used


def _touched(ready: Prepared, layer: int) -> NDArray[np.float64]:
    """Part of each window's tokens that choose any expert of a set, for every set of experts: ``[W, 2^E]``."""
    load = ready.problem.load
    trace = load.trace
    E = load.num_experts
    if trace is None:  # as evaluation takes counts: choices are independent
        load_WE = load.load_WLE[:, layer]
        set_SE = (np.arange(1 << E)[:, None] >> np.arange(E)) & 1
        share_WE = shares(load_WE)
        return touched_share(share_WE @ set_SE.T, load.top_k or 1)
    window_T = np.zeros(trace.num_tokens, np.int64) if load.window_T is None else load.window_T.astype(np.int64)
    chosen_TK = trace.experts_TLK[:, layer].astype(np.int64)
    set_T = np.bitwise_or.reduce(np.where(chosen_TK < 0, 0, np.int64(1) << np.maximum(chosen_TK, 0)), axis=1)
    inside = np.zeros((len(load.windows), 1 << E))
    np.add.at(inside, (window_T, set_T), 1.0)
    tokens_W = inside.sum(axis=1, keepdims=True)
    for e in range(E):  # tokens whose experts all lie in a set (sum over subsets)
        halves = inside.reshape(len(inside), -1, 2, 1 << e)
        halves[:, :, 1] += halves[:, :, 0]
    outside: NDArray[np.float64] = inside[:, ::-1]  # the complement of a set has the reversed index
    touched: NDArray[np.float64] = 1.0 - outside / np.maximum(tokens_W, 1.0)
    return touched


def _layer_costs(ready: Prepared, rank_AE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds of each layer in each arrangement ``[L, A]``, hops apart; infinite where load exceeds its limit."""
    problem = ready.problem
    objective, costs, load = problem.objective, problem.costs, problem.load
    ranks, nodes = problem.num_ranks, problem.num_nodes
    cost = np.zeros((len(ready.layers), len(rank_AE)))
    on_rank = (rank_AE[:, :, None] == np.arange(ranks)).astype(np.float64)
    on_node = on_rank.reshape(*rank_AE.shape, nodes, -1).sum(axis=3)
    power_E = 1 << np.arange(rank_AE.shape[1])
    rank_set, node_set = (np.einsum("aeg,e->ag", where, power_E).astype(np.int64) for where in (on_rank, on_node))
    nics = costs.nics(objective.dispatch, ranks, nodes)
    top_k, link = load.top_k or 1, nics.link_X[0]  # links are alike
    node_price_s, rank_price_s = ready.node_price_s / link, ready.rank_price_s / link

    def slower(between_AWG: NDArray[np.float64], rank_AWR: NDArray[np.float64]) -> NDArray[np.float64]:
        paths_2AW = between_AWG.max(axis=2) * node_price_s, rank_AWR.max(axis=2) * rank_price_s
        mean_A: NDArray[np.float64] = np.maximum(*paths_2AW).mean(axis=1)
        return mean_A

    for l in range(len(cost)):
        load_WE = load.load_WLE[:, l]
        if objective.kind != "traffic":
            seconds_WE = copy_seconds(load_WE, costs, top_k, 1)
            busiest = np.einsum("we,aer->awr", seconds_WE, on_rank).max(axis=2)
            cost[l] += busiest.mean(axis=1) / problem.speed_R[0]
        if objective.return_mode == "return_home" and objective.dispatch == "per_expert":
            rank_AWR = np.einsum("we,aer->awr", shares(load_WE) * top_k, on_rank)
            cost[l] += slower(nics.of_ranks(rank_AWR), rank_AWR)
        if objective.return_mode == "return_home" and objective.dispatch in ("per_node", "per_rank"):
            touched = _touched(ready, l)
            rank_AWR = touched[:, rank_set].transpose(1, 0, 2)
            merged = objective.dispatch == "per_node"
            cost[l] += slower(touched[:, node_set].transpose(1, 0, 2) if merged else nics.of_ranks(rank_AWR), rank_AWR)
        peak_A = np.einsum("e,aer->ar", load_WE.sum(axis=0), on_rank).max(axis=1)
        cost[l, peak_A > peak_A.min() * (1 + ready.max_imbalance) + 1e-9] = np.inf
    return cost


def _applies(ready: Prepared) -> bool:
    problem = ready.problem
    objective, load = problem.objective, problem.load
    experts = load.num_experts
    homes_count = objective.return_mode == "return_home" and (
        problem.knows_homes or objective.replica_split == "nearest"
    )
    return (
        problem.ranks_alike
        and experts <= MAX_EXPERTS
        and problem.num_slots == experts
        and (problem.experts_L == experts).all()
        and (len(load.windows) == 1 or objective.aggregate == "mean")
        and not homes_count
    )


def exact_placement(ready: Prepared) -> ExactPlan | None:
    """The best placement, or None where the case is too large or not of the kind described above."""
    problem = ready.problem
    if not _applies(ready):
        return None
    experts, ranks, nodes = problem.load.num_experts, problem.num_ranks, problem.num_nodes
    one_each = experts == ranks and nodes > 1 and problem.ranks_change_places
    groups = nodes if one_each else ranks
    if _count(experts, groups) > MAX_ARRANGEMENTS:
        return None
    group_AE = arrangements(experts, groups)
    rank_AE = np.argsort(np.argsort(group_AE, axis=1, kind="stable"), axis=1) if one_each else group_AE
    cost_LA = _layer_costs(ready, rank_AE)
    L = len(ready.layers)
    flow = transitions_of(problem.load) if problem.objective.return_mode == "stay" else None
    if problem.objective.return_mode == "stay" and flow is None:
        return None
    if flow is None or L == 1:
        chosen_LE = rank_AE[cost_LA.argmin(axis=1)]
        argument = f"every one of {len(rank_AE)} arrangements of each layer"
    else:
        costs = problem.costs
        copies = costs.tokens_per_step * (problem.load.top_k or 1)
        share = flow / flow.sum(axis=(1, 2), keepdims=True)
        rank_value, away_value = (copies * hop_s for hop_s in costs.hop_s(ranks, nodes))
        node_value = away_value - rank_value if nodes > 1 else 0.0
        argument = f"exact dynamic programme over {len(rank_AE)} arrangements of each layer"
        if one_each:
            orders = np.asarray(list(permutations(range(experts // nodes))), dtype=np.int64)
            value, came, used = _chain_split(share, group_AE, orders, node_value, rank_value, cost_LA)
            chosen_LE = _unfold(group_AE, orders, value, came, used)
        else:
            value, came = _chain(share, rank_AE, problem.ranks_per_node, node_value, rank_value, cost_LA)
            chosen_LE = rank_AE[_path(value, came)]
    # Slots of a rank stand together, so sorting experts by rank puts them in their slots.
    return ExactPlan(np.argsort(chosen_LE, axis=1, kind="stable"), argument)


def _path(value_A: NDArray[np.float64], came_LA: NDArray[np.int64]) -> NDArray[np.int64]:
    """Arrangement of each layer on the cheapest chain."""
    path = [int(value_A.argmin())]
    for l in range(len(came_LA) - 1, 0, -1):
        path.append(int(came_LA[l, path[-1]]))
    return np.asarray(path[::-1])


def _unfold(
    group_AE: NDArray[np.int64],
    orders: NDArray[np.int64],
    value_A: NDArray[np.float64],
    came_LA: NDArray[np.int64],
    used_LAN: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Rank of each expert: the ranks of each node follow the matches from layer to layer."""
    nodes = int(group_AE.max()) + 1
    size = group_AE.shape[1] // nodes
    path = _path(value_A, came_LA)
    rank_LE = np.zeros((len(path), group_AE.shape[1]), dtype=np.int64)
    for n in range(nodes):
        before = np.flatnonzero(group_AE[path[0]] == n)
        rank_LE[0, before] = n * size + np.arange(size)
        for l in range(1, len(path)):
            members = np.flatnonzero(group_AE[path[l]] == n)
            old = np.flatnonzero(group_AE[path[l - 1]] == n)
            rank_LE[l, members[orders[used_LAN[l, path[l], n]]]] = rank_LE[l - 1, old]
    return rank_LE
