"""What the joint planner works on: costs of copies per window, tokens as bits, prices in seconds.

``W`` windows, ``L`` layers, ``E`` experts, ``C`` most copies, ``T`` tokens, ``R`` ranks, ``P`` slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.costs.counting import choose_slots, home_ranks, shares
from moeplan.costs.evaluation import aggregate, copy_seconds, evaluate
from moeplan.planning.balance import LayerLoad
from moeplan.planning.problem import PlanningProblem
from moeplan.planning.search_home import group_arrivals, pack_tokens, slowest_and_mean
from moeplan.routing.loads import count_selections
from moeplan.specs.workload import ReplicaSplit

__all__ = [
    "LayerTokens",
    "Prepared",
    "copy_costs",
    "layer_tokens",
    "merges_or_knows_homes",
    "objective_value",
    "prepare",
    "window_seconds",
]

TIME_WINDOWS = 4  # a plan made for several stretches of time holds better on the next one than one for their sum
MIN_WINDOW_TOKENS = 1024  # shorter stretches differ by chance
MAX_SEARCH_TOKENS = 32768


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A planning problem made ready for the searches.

    ``seconds_L`` is the mean rank's seconds of expert work, the unit of ``layers[l].copy_WEC``. ``token_T`` are the
    tokens the search looks at, ``window_T`` their windows (rising); both None without token-level routing.
    ``node_price_s`` and ``rank_price_s``: seconds per step if every token arrives at the busiest node or rank.
    """

    problem: PlanningProblem
    layers: tuple[LayerLoad, ...]
    seconds_L: NDArray[np.float64]
    token_T: NDArray[np.int64] | None
    window_T: NDArray[np.int64] | None
    node_price_s: float
    rank_price_s: float
    weight_W: NDArray[np.float64] | None = None

    @property
    def max_imbalance(self) -> float:
        """Load that may be traded for traffic: the objective's, by default 5 % on several nodes and none on one."""
        given = self.problem.objective.max_imbalance
        if given is not None:
            return given
        return 0.05 if self.problem.num_nodes > 1 else 0.0


def _windows(
    problem: PlanningProblem,
) -> tuple[NDArray[np.float64], NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Loads per window, and the tokens to look at with their windows."""
    load = problem.load
    trace = load.trace
    if trace is None:
        return load.load_WLE, None, None
    window_T = np.zeros(trace.num_tokens, np.int64) if load.window_T is None else load.window_T.astype(np.int64)
    load_WLE = load.load_WLE
    if len(load.windows) == 1 and trace.num_tokens >= 2 * MIN_WINDOW_TOKENS:
        count = min(TIME_WINDOWS, trace.num_tokens // MIN_WINDOW_TOKENS)
        window_T = np.arange(trace.num_tokens) * count // trace.num_tokens
        load_WLE = np.zeros((count, load.num_layers, load.num_experts))
        for w in range(count):
            first, end = np.searchsorted(window_T, (w, w + 1))
            load_WLE[w] = count_selections(trace.experts_TLK[first:end], load.num_experts)
        if (load_WLE.sum(axis=2) == 0).any():
            load_WLE, window_T = load.load_WLE, np.zeros_like(window_T)
    token_T = np.argsort(window_T, kind="stable")
    if len(token_T) > MAX_SEARCH_TOKENS:
        spaced = np.linspace(0, len(token_T) - 1, MAX_SEARCH_TOKENS).astype(np.int64)
        first_W = np.unique(window_T[token_T], return_index=True)[1]  # a small window keeps a token at least
        token_T = token_T[np.union1d(spaced, first_W)]
    return load_WLE, token_T, window_T[token_T]


def prepare(problem: PlanningProblem, weight_W: NDArray[np.float64] | None = None) -> Prepared:
    """Turn a problem into what the searches take; ``weight_W`` are the windows' weights, summing to 1 (None: equal).

    A window of more weight has its costs scaled up: the searches take means over windows.
    """
    load_WLE, token_T, window_T = _windows(problem)
    costs, objective = problem.costs, problem.objective
    live = int(problem.live_R.sum())
    spare = max(0, problem.num_slots - int(problem.experts_L.min()))
    top_k = problem.load.top_k or 1
    # Token counts decide where there is no per-expert cost (load objective), seconds everywhere else.
    by_load = objective.kind == "load"
    layers, seconds = [], []
    for layer in range(problem.load.num_layers):
        experts = int(problem.experts_L[layer])
        load_WE = load_WLE[:, layer, :experts]
        group_R = _apart(problem, experts)
        most = max(1, min(len(np.unique(group_R[problem.live_R])), spare + 1))
        table = [
            shares(load_WE) / c
            if by_load
            else copy_seconds(load_WE, costs, top_k, c)
            for c in range(1, most + 1)
        ]
        copy_WEC = np.stack(table, axis=2)
        if weight_W is not None:
            copy_WEC *= (weight_W * len(weight_W))[:, None, None]
        unit = float(copy_WEC[:, :, 0].sum(axis=1).mean()) / problem.live_speed
        layers.append(
            LayerLoad(
                copy_WEC=np.ascontiguousarray(copy_WEC / unit),
                rank_of_slot_P=problem.rank_of_slot_P,
                speed_R=problem.speed_R,
                group_R=group_R,
            )
        )
        seconds.append(unit if not by_load else costs.per_pair_s * costs.tokens_per_step * top_k / live)
    nodes = problem.num_nodes
    return Prepared(
        problem=problem,
        layers=tuple(layers),
        seconds_L=np.asarray(seconds),
        token_T=token_T,
        window_T=window_T,
        node_price_s=costs.tokens_per_step * costs.per_node_copy_s * (1 - 1 / nodes),
        rank_price_s=costs.tokens_per_step * costs.per_rank_copy_s,
        weight_W=weight_W,
    )


def _apart(problem: PlanningProblem, experts: int) -> NDArray[np.int64]:
    """Groups of ranks that hold one copy of an expert at most: nodes where the nearest copy serves and every slot of a
    node can hold an expert of its own, else the ranks themselves.
    """
    rank_R = np.arange(problem.num_ranks)
    node_R = rank_R // problem.ranks_per_node
    room = np.bincount(node_R, problem.slots_R).max() <= experts
    spread = problem.objective.replica_split == "nearest" and problem.num_nodes > 1 and room
    return (node_R if spread else rank_R).astype(np.int64)


def copy_costs(layer: LayerLoad, row_P: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cost of the copy in each slot per window, ``[W, P]``; 0 for empty slots."""
    used = row_P != EMPTY
    copies = np.bincount(row_P[used], minlength=layer.copy_WEC.shape[1])
    cost = np.zeros((layer.copy_WEC.shape[0], len(row_P)))
    cost[:, used] = layer.copy_WEC[:, row_P[used], copies[row_P[used]] - 1]
    return cost


@dataclass(frozen=True, slots=True, eq=False)
class LayerTokens:
    """One layer as the token searches take it: the copy in slot ``s`` of the start is copy ``s``.

    Without tokens, or where dispatch does not look at them, there are no bits and nothing is charged for them.
    Copies between nodes enter groups ``G``: nodes where they merge (``per_node``), else ranks.
    ``away_GM``: tokens that are not at home in their nodes; where homes are not recorded, all of them. ``pace_X``
    (nodes, or NICs of neighbouring ranks), ``pace_R``: time of an arrival over the usual one, by the links there.
    """

    bits_PM: NDArray[np.uint64]
    away_GM: NDArray[np.uint64]
    start_W: NDArray[np.int64]
    weight_W: NDArray[np.float64]
    cost_WP: NDArray[np.float64]
    copy_of_slot_P: NDArray[np.int64]
    first_R: NDArray[np.int64]
    first_G: NDArray[np.int64]
    pace_X: NDArray[np.float64]
    pace_R: NDArray[np.float64]
    ranks_per_group: int
    group_price: float
    rank_price: float


def merges_or_knows_homes(problem: PlanningProblem) -> bool:
    """Whether an arrangement of equal load can send fewer copies than another.

    Copies per expert do not merge: all arrangements send as many, but those to a token's own node travel nowhere.
    """
    dispatch = problem.objective.dispatch
    return dispatch in ("per_node", "per_rank") or (dispatch == "per_expert" and problem.counts_homes)


def layer_tokens(ready: Prepared, layer: int, row_P: NDArray[np.int64]) -> LayerTokens:
    """Bits, costs and prices of one layer, its experts placed as ``row_P``."""
    problem = ready.problem
    trace, token_T, window_T = problem.load.trace, ready.token_T, ready.window_T
    cost_WP = copy_costs(ready.layers[layer], row_P)
    first_R = np.concatenate([[0], np.cumsum(problem.slots_R)]).astype(np.int64)
    slots = np.where(row_P == EMPTY, -1, np.arange(len(row_P)))
    dispatch = problem.objective.dispatch
    nics = problem.costs.nics(dispatch, problem.num_ranks, problem.num_nodes)
    pace_R, pace_X = 1.0 / problem.costs.links(problem.num_ranks), nics.pace_G
    ranks_per_group = problem.ranks_per_node if nics.merges else 1
    first_G = first_R[::ranks_per_group].copy()
    groups = len(first_G) - 1
    if trace is None or token_T is None or window_T is None or not merges_or_knows_homes(problem):
        bits_PM, start_W = np.zeros((len(row_P), 0), np.uint64), np.zeros(len(cost_WP) + 1, np.int64)
        weight_W = np.full(len(cost_WP), 1.0 / len(cost_WP))
        away_GM = np.zeros((groups, 0), np.uint64)
        return LayerTokens(
            bits_PM, away_GM, start_W, weight_W, cost_WP, slots, first_R, first_G, pace_X, pace_R, ranks_per_group,
            0.0, 0.0,
        )  # fmt: skip
    live = np.flatnonzero(problem.live_R).astype(np.int32)
    home_T = live[np.arange(len(token_T)) % len(live)]  # every rank's alike, however the tokens looked at are spaced
    if problem.knows_homes:
        home_T = home_ranks(problem.load, live)[token_T]
    # Where the nearest copy serves, copies keep the tokens that they serve at the start: searches find them new nodes.
    split: ReplicaSplit = "nearest" if problem.objective.replica_split == "nearest" else "even"
    slot_TK = choose_slots(trace.experts_TLK[token_T, layer], home_T, problem.placement(row_P[None]), 0, split)
    weight_W = 1.0 / np.maximum(np.bincount(window_T, minlength=len(cost_WP)), 1) / len(cost_WP)
    if dispatch == "per_expert":  # every pair is a token of its own
        home_T = np.repeat(home_T, slot_TK.shape[1])
        window_T = np.repeat(window_T, slot_TK.shape[1])
        slot_TK = slot_TK.reshape(-1, 1)
    bits_PM, start_W = pack_tokens(slot_TK, window_T, len(row_P))
    everyone_GM = ~np.zeros((1, bits_PM.shape[1]), np.uint64)
    away_GM, group_price, rank_price = everyone_GM.repeat(groups, 0), ready.node_price_s, ready.rank_price_s
    if not nics.merges:
        group_price *= nics.per_node  # of a node's NICs each brings in its own part
    if problem.counts_homes:
        away_GM = ~pack_tokens((home_T // problem.ranks_per_node)[:, None], window_T, problem.num_nodes)[0]
        away_GM = away_GM.repeat(groups // problem.num_nodes, 0)
        group_price /= 1 - 1 / problem.num_nodes  # the share that is at home by chance is now counted
    if ready.weight_W is not None:
        weight_W *= ready.weight_W * len(cost_WP)

    def slowest(first_G: NDArray[np.int64], away_GM: NDArray[np.uint64], pace_X: NDArray[np.float64]) -> float:
        arrivals_G = weight_W @ group_arrivals(bits_PM, slots, first_G, away_GM, start_W)
        return float(slowest_and_mean(arrivals_G, pace_X, problem.num_nodes, away_GM is not everyone_GM)[0])

    # Dispatch takes the slower of two paths. Fewer nodes also means fewer ranks, not the other way round: ranks are
    # left out where nodes decide, nodes never.
    if slowest(first_G, away_GM, pace_X) * group_price >= 1.3 * slowest(first_R, everyone_GM, pace_R) * rank_price:
        rank_price = 0.0
    return LayerTokens(
        bits_PM, away_GM, start_W, weight_W, cost_WP, slots, first_R, first_G, pace_X, pace_R, ranks_per_group,
        group_price, rank_price,
    )  # fmt: skip


def window_seconds(problem: PlanningProblem, placement: Placement) -> NDArray[np.float64]:
    """Seconds of a step over all layers, per window: of dispatch and combine alone where traffic is the objective."""
    found = evaluate(problem.load, placement, problem.costs, problem.objective, problem.speed_R)
    seconds_WL = found.exchange_WL if problem.objective.kind == "traffic" else found.time_WL
    total_W: NDArray[np.float64] = seconds_WL.sum(axis=1)
    return total_W


def objective_value(problem: PlanningProblem, placement: Placement) -> float:
    """Seconds of a step over all layers, aggregated over windows as the objective says."""
    return aggregate(window_seconds(problem, placement), problem.objective)
