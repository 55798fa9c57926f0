"""Counting what a placement does to recorded tokens: load, distinct nodes and ranks, hops between layers.

``T`` tokens, ``L`` layers, ``K`` top-k, ``P`` slots, ``R`` ranks, ``N`` nodes, ``W`` windows.

How a token's selection of an expert with several copies finds one of them:

- ``even``: by the token's number, so that all copies get the same share;
- ``nearest``: a copy on the token's home rank, else one on its home node, else evenly among all (where no expert has
  copies, ``even`` in all respects);
- ``weighted``: by the shares of the placement.

A token's home is its recorded source rank, or else its number modulo the live ranks.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.costs.nics import away_shares
from moeplan.errors import PlanError
from moeplan.specs.workload import ReplicaSplit

__all__ = [
    "TraceCounts",
    "choose_slots",
    "count_loads",
    "count_slots",
    "count_trace",
    "home_ranks",
    "hop_shares",
    "served_slots",
    "shares",
    "sum_by_rank",
]

_TOKENS_AT_ONCE = 1 << 16
_EVEN, _NEAREST, _WEIGHTED = 0, 1, 2
_SPLIT = {"even": _EVEN, "nearest": _NEAREST, "weighted": _WEIGHTED}


@dataclass(frozen=True, slots=True, eq=False)
class TraceCounts:
    """Counts per window; tokens and pairs as parts of the window's tokens, so that windows compare.

    ``pairs_WLP``, ``pairs_WLR``: (token, expert) pairs of a slot and of a rank, per token. ``node_arrivals_WLN``:
    tokens that touch a node and come from another one. ``rank_arrivals_WLR``: tokens that touch a rank; of those that
    come from another node ``away_rank_arrivals_WLR``, with the (token, expert) pairs ``away_pairs_WLR`` there.
    ``nodes_per_token_WL`` and ``ranks_per_token_WL``: distinct ones a token touches, its home not counted apart.
    """

    pairs_WLP: NDArray[np.float64]
    pairs_WLR: NDArray[np.float64]
    node_arrivals_WLN: NDArray[np.float64]
    rank_arrivals_WLR: NDArray[np.float64]
    away_rank_arrivals_WLR: NDArray[np.float64]
    away_pairs_WLR: NDArray[np.float64]
    nodes_per_token_WL: NDArray[np.float64]
    ranks_per_token_WL: NDArray[np.float64]


def home_ranks(load: ExpertLoad, live_ranks: NDArray[np.integer]) -> NDArray[np.int32]:
    """Home rank of each token: the recorded one, or its number modulo the live ranks.

    Raises:
        PlanError: the trace was recorded on ranks the placement does not have.
    """
    trace = load.trace
    if trace is None:
        raise PlanError(
            "home ranks need token-level routing, but the input holds counts only; record per token"
        )
    if trace.source_rank_T is None:
        return live_ranks[np.arange(trace.num_tokens) % len(live_ranks)].astype(np.int32)
    unknown = ~np.isin(trace.source_rank_T, live_ranks)
    if unknown.any():
        token = int(np.argmax(unknown))
        raise PlanError(
            f"source_rank ({int(trace.source_rank_T[token])}, token {token}) is not a live rank of the placement;"
            " leave source_rank out of the trace to spread tokens evenly"
        )
    return trace.source_rank_T.astype(np.int32)


@njit(cache=True, nogil=True)
def _mix(token, expert):
    """A fixed hash of token and expert: stands for the engine's even spread over copies."""
    x = np.uint64(token) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(expert) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(31)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(29))


@njit(cache=True, nogil=True)
def _choose(
    experts_TK, first_token, home_T, first_E, slot_of_copy, share_of_copy, rank_of_slot_P, per_node, split, out_TK
):
    for t in range(experts_TK.shape[0]):
        for k in range(experts_TK.shape[1]):
            e = experts_TK[t, k]
            if e < 0:
                out_TK[t, k] = -1
                continue
            begin = first_E[e]
            copies = first_E[e + 1] - begin
            if copies == 1:
                out_TK[t, k] = slot_of_copy[begin]
                continue
            x = _mix(first_token + t, e)
            chosen = -1
            if split == 1:
                here = 0
                for c in range(copies):
                    r = rank_of_slot_P[slot_of_copy[begin + c]]
                    if r == home_T[t]:
                        chosen = slot_of_copy[begin + c]
                        break
                    if r // per_node == home_T[t] // per_node:
                        here += 1
                if chosen < 0 and here > 0:
                    skip = np.int64(x % np.uint64(here))
                    for c in range(copies):
                        if rank_of_slot_P[slot_of_copy[begin + c]] // per_node == home_T[t] // per_node:
                            if skip == 0:
                                chosen = slot_of_copy[begin + c]
                                break
                            skip -= 1
            elif split == 2:
                u = np.float64(x >> np.uint64(11)) / 9007199254740992.0
                for c in range(copies):
                    chosen = slot_of_copy[begin + c]
                    u -= share_of_copy[begin + c]
                    if u < 0.0:
                        break
            if chosen < 0:
                chosen = slot_of_copy[begin + np.int64(x % np.uint64(copies))]
            out_TK[t, k] = chosen


def choose_slots(
    experts_TK: NDArray[np.integer],
    home_T: NDArray[np.int32],
    placement: Placement,
    layer: int,
    split: ReplicaSplit,
    first_token: int = 0,
) -> NDArray[np.int32]:
    """Slot that each selection of one layer goes to, ``[T, K]``; -1 for padding. The first token's number counts where
    tokens are spread over copies.
    """
    p2l = placement.physical_to_logical_LP[layer]
    slots = np.flatnonzero(p2l != EMPTY)
    order = slots[np.argsort(p2l[slots], kind="stable")]
    first = np.searchsorted(p2l[order], np.arange(placement.num_experts + 1)).astype(np.int64)
    share = placement.slot_share_LP[layer][order] if split == "weighted" else np.empty(0)
    out = np.empty(experts_TK.shape, dtype=np.int32)
    _choose(
        np.ascontiguousarray(experts_TK, dtype=np.int32),
        first_token,
        home_T,
        first,
        order.astype(np.int32),
        share,
        placement.rank_of_slot_P,
        placement.ranks_per_node,
        _SPLIT[split],
        out,
    )
    return out


@njit(cache=True, nogil=True)
def _count(
    slot_TK, home_T, window_T, rank_of_slot_P, per_node, homes_known, away_N, pairs, nodes_in, pairs_in, ranks_in,
    ranks_away, nodes, ranks,
):  # fmt: skip
    """Adds one layer's counts to the window rows of the seven result arrays."""
    num_nodes = nodes_in.shape[1]
    seen_rank = np.full(ranks_in.shape[1], -1, np.int64)
    seen_node = np.full(num_nodes, -1, np.int64)
    for t in range(slot_TK.shape[0]):
        w = window_T[t]
        for k in range(slot_TK.shape[1]):
            s = slot_TK[t, k]
            if s < 0:
                continue
            r = rank_of_slot_P[s]
            pairs[w, s] += 1.0
            n = r // per_node
            from_elsewhere = away_N[n]
            if homes_known:
                from_elsewhere = 1.0 if home_T[t] // per_node != n else 0.0
            pairs_in[w, r] += from_elsewhere
            if seen_rank[r] != t:
                seen_rank[r] = t
                ranks_in[w, r] += 1.0
                ranks_away[w, r] += from_elsewhere
                ranks[w] += 1.0
                if seen_node[n] != t:
                    seen_node[n] = t
                    nodes[w] += 1.0
                    nodes_in[w, n] += from_elsewhere


def count_trace(load: ExpertLoad, placement: Placement, split: ReplicaSplit = "even") -> TraceCounts:
    """Count every token of ``load.trace`` under a placement.

    Homes decide arrivals exactly where they are recorded or where there are copies to choose by nearness; elsewhere
    a token's home is any node with equal chance.

    Raises:
        PlanError: the load has no tokens, or another number of layers or experts than the placement.
    """
    trace = load.trace
    if trace is None:
        raise PlanError("distinct nodes per token need token-level routing, but the input holds counts only")
    if trace.num_layers != placement.num_layers or trace.num_experts > placement.num_experts:
        raise PlanError(
            f"the trace has {trace.num_layers} layers x {trace.num_experts} experts, the placement"
            f" {placement.num_layers} x {placement.num_experts}; they must be of one model"
        )
    home_T = home_ranks(load, np.flatnonzero(placement.live_R))
    away_N = away_shares(placement.live_R, placement.num_nodes)
    homes_known = trace.source_rank_T is not None or (split == "nearest" and placement.has_copies)
    window_T = (
        np.zeros(trace.num_tokens, np.int64) if load.window_T is None else load.window_T.astype(np.int64)
    )
    W, L, R, N = len(load.windows), placement.num_layers, placement.num_ranks, placement.num_nodes
    if int(window_T.max()) >= W:
        raise PlanError(f"the trace names window {int(window_T.max())} but the load has {W} windows")
    pairs, nodes_in = np.zeros((W, L, placement.num_slots)), np.zeros((W, L, N))
    pairs_in, arrivals, away = np.zeros((3, W, L, R))
    nodes, ranks = np.zeros((W, L)), np.zeros((W, L))

    def count_layer(layer: int) -> None:
        for start in range(0, trace.num_tokens, _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            slot_TK = choose_slots(trace.experts_TLK[part, layer], home_T[part], placement, layer, split, start)
            _count(
                slot_TK, home_T[part], window_T[part], placement.rank_of_slot_P, placement.ranks_per_node, homes_known,
                away_N, pairs[:, layer], nodes_in[:, layer], pairs_in[:, layer], arrivals[:, layer], away[:, layer],
                nodes[:, layer], ranks[:, layer],
            )  # fmt: skip

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads are not worth starting for few tokens
        list((pool.map if trace.num_tokens > _TOKENS_AT_ONCE else map)(count_layer, range(L)))
    tokens_W = np.maximum(np.bincount(window_T, minlength=W), 1).astype(np.float64)
    pairs_WLP = pairs / tokens_W[:, None, None]
    return TraceCounts(
        pairs_WLP=pairs_WLP,
        pairs_WLR=sum_by_rank(pairs_WLP, placement),
        node_arrivals_WLN=nodes_in / tokens_W[:, None, None],
        rank_arrivals_WLR=arrivals / tokens_W[:, None, None],
        away_rank_arrivals_WLR=away / tokens_W[:, None, None],
        away_pairs_WLR=pairs_in / tokens_W[:, None, None],
        nodes_per_token_WL=nodes / tokens_W[:, None],
        ranks_per_token_WL=ranks / tokens_W[:, None],
    )


def count_slots(load_WLE: NDArray[np.float64], placement: Placement) -> NDArray[np.float64]:
    """Selections per window, layer and slot ``[W, L, P]`` from expert counts and the copies' shares."""
    experts_LP = np.maximum(placement.physical_to_logical_LP, 0)
    slots: NDArray[np.float64] = load_WLE[:, np.arange(placement.num_layers)[:, None], experts_LP]
    return slots * placement.slot_share_LP


def shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Parts of what all have together, along the last axis; of nothing 0."""
    parts: NDArray[np.float64] = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-300)
    return parts


def served_slots(
    load: ExpertLoad, placement: Placement, split: ReplicaSplit, counts: TraceCounts | None
) -> NDArray[np.float64]:
    """Selections per window, layer and slot ``[W, L, P]``: where the nearest copy serves as ``counts`` found them on
    the tokens, elsewhere by the copies' shares.
    """
    if counts is None or split != "nearest":
        return count_slots(load.load_WLE, placement)
    slots: NDArray[np.float64] = shares(counts.pairs_WLP) * load.load_WLE.sum(axis=2)[:, :, None]
    return slots


def sum_by_rank(slot_WLP: NDArray[np.float64], placement: Placement) -> NDArray[np.float64]:
    """What the slots of each rank have together, ``[W, L, R]``."""
    out = np.zeros((*slot_WLP.shape[:2], placement.num_ranks))
    np.add.at(out.transpose(2, 0, 1), placement.rank_of_slot_P, slot_WLP.transpose(2, 0, 1))
    return out


def count_loads(load_WLE: NDArray[np.float64], placement: Placement) -> NDArray[np.float64]:
    """Selections per window, layer and rank ``[W, L, R]`` from expert counts and the copies' shares."""
    return sum_by_rank(count_slots(load_WLE, placement), placement)


def hop_shares(
    transitions_LEE: NDArray[np.float64], placement: Placement
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``stay`` mode: part of the transitions out of each layer that stay on a rank, and inside a node.

    Copies share an expert's tokens independently of where the token was. Two arrays ``[L - 1]``.
    """
    L, E = placement.num_layers, placement.num_experts
    on_rank = np.zeros((L, E, placement.num_ranks))
    share_LP = placement.slot_share_LP
    for layer in range(L):
        used = placement.physical_to_logical_LP[layer] != EMPTY
        experts = placement.physical_to_logical_LP[layer, used]
        np.add.at(on_rank[layer], (experts, placement.rank_of_slot_P[used]), share_LP[layer, used])
    on_node = on_rank.reshape(L, E, placement.num_nodes, -1).sum(axis=3)
    total = np.maximum(transitions_LEE.sum(axis=(1, 2)), 1e-300)

    def share(where: NDArray[np.float64]) -> NDArray[np.float64]:
        reached = np.matmul(transitions_LEE, where[1:])
        kept: NDArray[np.float64] = (where[:-1] * reached).sum(axis=(1, 2)) / total
        return kept

    return share(on_rank), share(on_node)
