"""What the joint planner works on: costs of copies per window, tokens as bits, prices in seconds.

``W`` windows, ``L`` layers, ``E`` experts, ``C`` most copies, ``T`` tokens, ``R`` ranks, ``P`` slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.evaluation import copy_seconds
from moeplan.planning.balance import LayerLoad
from moeplan.planning.problem import PlanningProblem

__all__ = ["Prepared", "live_speed", "prepare"]

TIME_WINDOWS = 4  # a plan made for several stretches of time holds better on the next one than one for their sum
MIN_WINDOW_TOKENS = 256
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

    @property
    def max_imbalance(self) -> float:
        """Load that may be traded for traffic: the objective's, by default 5 % on several nodes and none on one."""
        given = self.problem.objective.max_imbalance
        if given is not None:
            return given
        return 0.05 if self.problem.num_nodes > 1 else 0.0


def live_speed(problem: PlanningProblem) -> float:
    """Summed speed of the ranks that have slots."""
    return float(problem.speed_R[problem.slots_R > 0].sum())


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
            part = trace.experts_TLK[window_T == w].astype(np.int64)
            for layer in range(load.num_layers):
                chosen = part[:, layer].ravel()
                load_WLE[w, layer] = np.bincount(chosen[chosen >= 0], minlength=load.num_experts)
        if (load_WLE.sum(axis=2) == 0).any():
            load_WLE, window_T = load.load_WLE, np.zeros_like(window_T)
    token_T = np.argsort(window_T, kind="stable")
    if len(token_T) > MAX_SEARCH_TOKENS:
        spaced = np.linspace(0, len(token_T) - 1, MAX_SEARCH_TOKENS).astype(np.int64)
        first_W = np.unique(window_T[token_T], return_index=True)[1]  # a small window keeps a token at least
        token_T = token_T[np.union1d(spaced, first_W)]
    return load_WLE, token_T, window_T[token_T]


def prepare(problem: PlanningProblem) -> Prepared:
    """Turn a problem into what the searches take."""
    load_WLE, token_T, window_T = _windows(problem)
    costs, objective = problem.costs, problem.objective
    live = int((problem.slots_R > 0).sum())
    spread_nodes = objective.replica_split == "nearest" and problem.num_nodes > 1
    group_R = np.arange(problem.num_ranks) // (problem.ranks_per_node if spread_nodes else 1)
    groups = len(np.unique(group_R[problem.slots_R > 0]))
    spare = max(0, problem.num_slots - int(problem.experts_L.min()))
    most = max(1, min(groups, spare + 1))
    top_k = problem.load.top_k or 1
    # Token counts decide where there is no per-expert cost (load objective), seconds everywhere else.
    by_load = objective.kind == "load"
    layers, seconds = [], []
    for layer in range(problem.load.num_layers):
        experts = int(problem.experts_L[layer])
        load_WE = load_WLE[:, layer, :experts]
        table = [
            load_WE / np.maximum(load_WE.sum(axis=1, keepdims=True), 1e-300) / c
            if by_load
            else copy_seconds(load_WE, costs, top_k, c)
            for c in range(1, most + 1)
        ]
        copy_WEC = np.stack(table, axis=2)
        unit = float(copy_WEC[:, :, 0].sum(axis=1).mean()) / live_speed(problem)
        layers.append(
            LayerLoad(
                copy_WEC=np.ascontiguousarray(copy_WEC / unit),
                rank_of_slot_P=problem.rank_of_slot_P,
                speed_R=problem.speed_R,
                group_R=group_R.astype(np.int64),
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
    )
