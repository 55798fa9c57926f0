"""Seconds of a placement under a load: what planners minimise, what plans report.

``W`` windows, ``L`` layers, ``E`` experts, ``R`` ranks. The one place where counts meet coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.costs.counting import TraceCounts, count_trace, hop_shares, served_slots, shares, sum_by_rank
from moeplan.costs.exchange import touched_share
from moeplan.costs.layer import LayerCosts
from moeplan.costs.nics import Nics
from moeplan.costs.transitions import transition_counts
from moeplan.specs.workload import DispatchKind, Objective

__all__ = ["Evaluation", "aggregate", "copy_seconds", "evaluate", "transitions_of"]

_TINY = 1e-300  # keeps the share of nothing at 0


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a placement does, per window and layer. Arrays that need tokens or transitions are None without them.

    ``time_WL = expert_WL + exchange_WL`` in seconds; ``node_path_WL`` (between nodes) and ``rank_path_WL`` (inside) are
    the two paths of the exchange in ``return_home``, of which it takes the slower. ``max_over_mean_WL`` is the busiest
    rank's token load over the mean, each divided by the rank's speed (1 where a window has no tokens). Where the
    nearest copy serves and tokens are known, loads are those counted on them; elsewhere copies take their shares.
    ``hops`` counts the parts of the hops that stay on a rank, and inside a node, per layer ``[L]``; the last layer has
    none (0). They are counted when asked for: in ``return_home`` no time hangs on them.
    """

    expert_WL: NDArray[np.float64]
    exchange_WL: NDArray[np.float64]
    node_path_WL: NDArray[np.float64]
    rank_path_WL: NDArray[np.float64]
    max_over_mean_WL: NDArray[np.float64]
    load_LR: NDArray[np.float64]
    counts: TraceCounts | None
    hops: Callable[[], tuple[NDArray[np.float64], NDArray[np.float64]] | None]

    @property
    def same_rank_L(self) -> NDArray[np.float64] | None:
        """Part of the hops out of each layer that stay on a rank."""
        found = self.hops()
        return None if found is None else found[0]

    @property
    def same_node_L(self) -> NDArray[np.float64] | None:
        """Part of the hops out of each layer that stay inside a node."""
        found = self.hops()
        return None if found is None else found[1]

    @property
    def time_WL(self) -> NDArray[np.float64]:
        """Seconds of each layer in each window."""
        return self.expert_WL + self.exchange_WL


def aggregate(values_W: NDArray[np.float64], objective: Objective) -> float:
    """One figure over windows: mean, worst, or the mean of the worst ``cvar_tail`` (Rockafellar & Uryasev 2000)."""
    if objective.aggregate == "mean":
        return float(values_W.mean())
    if objective.aggregate == "worst":
        return float(values_W.max())
    tail = max(1, int(np.ceil(objective.cvar_tail * len(values_W) - 1e-9)))
    return float(np.sort(values_W)[-tail:].mean())


def transitions_of(load: ExpertLoad) -> NDArray[np.float64] | None:
    """Transitions between consecutive MoE layers ``[L - 1, E, E]``, given or counted; None where unknown."""
    if load.transitions_LEE is not None:
        return load.transitions_LEE
    if load.trace is None or load.trace.num_layers < 2:
        return None
    return transition_counts(load.trace)


def copy_seconds(
    load_WE: NDArray[np.float64], costs: LayerCosts, top_k: int, copies: int
) -> NDArray[np.float64]:
    """Seconds that one of ``copies`` copies of each expert costs its rank at speed 1, ``[W, E]``.

    A window without tokens costs nothing.
    """
    total = np.maximum(load_WE.sum(axis=1, keepdims=True), _TINY)
    return _chosen_seconds(load_WE * top_k / total / copies, costs)


def _chosen_seconds(chance: NDArray[np.float64], costs: LayerCosts) -> NDArray[np.float64]:
    """Seconds at speed 1 of copies that a token selects with chance ``p``.

    ``T p`` pairs are worked on, and the weights are read if any of ``T`` tokens comes: ``1 - (1 - p)^T`` (tokens
    independent).
    """
    p = np.minimum(chance, 1.0)
    hit = -np.expm1(costs.tokens_per_step * np.log1p(-np.minimum(p, 1 - 1e-12)))
    seconds: NDArray[np.float64] = costs.per_active_expert_s * hit + costs.per_pair_s * costs.tokens_per_step * p
    return seconds


def _by_node(rank_WLR: NDArray[np.float64], placement: Placement) -> NDArray[np.float64]:
    sums: NDArray[np.float64] = rank_WLR.reshape(*rank_WLR.shape[:2], placement.num_nodes, -1).sum(axis=3)
    return sums


def _arrivals(
    load: ExpertLoad,
    load_WLR: NDArray[np.float64],
    counts: TraceCounts | None,
    placement: Placement,
    dispatch: DispatchKind,
    nics: Nics,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Copies per token over the NIC that takes longest ``[W, L]`` (:mod:`moeplan.costs.nics`) and to each rank
    ``[W, L, R]``, in ``return_home``."""
    share_WLR, top_k = shares(load_WLR), load.top_k or 1
    rank_WLR = share_WLR * top_k
    if dispatch != "per_expert":
        rank_WLR = touched_share(share_WLR, top_k) if counts is None else counts.rank_arrivals_WLR
    homes = load.trace is not None and load.trace.source_rank_T is not None
    if counts is None or not (homes or dispatch == "per_node"):
        return nics.busiest(touched_share(_by_node(share_WLR, placement), top_k), rank_WLR), rank_WLR
    if dispatch == "per_node":
        away_WLN = counts.node_arrivals_WLN
        into_WLX = nics.into(away_WLN)
    else:
        away_WLR = counts.away_pairs_WLR if dispatch == "per_expert" else counts.away_rank_arrivals_WLR
        away_WLN, into_WLX = _by_node(away_WLR, placement), nics.of_ranks(away_WLR)
    # A node's own tokens reach the others as those of all nodes do; what is served at home is not sent.
    return nics.slowest(into_WLX, away_WLN / np.maximum(nics.away_N, _TINY)), rank_WLR


def _hops(load: ExpertLoad, placement: Placement) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """:func:`hop_shares` with the last layer's, which are 0; None where transitions are unknown."""
    transitions_LEE = transitions_of(load)
    if transitions_LEE is None:
        return None
    rank_share, node_share = hop_shares(transitions_LEE, placement)
    return np.append(rank_share, 0.0), np.append(node_share, 0.0)


def _met(load_WLR: NDArray[np.float64], placement: Placement) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As :func:`hop_shares` by chance, ``[W, L]``: parts of the hops that stay on a rank, and inside a node."""
    share_WLR = shares(load_WLR)

    def kept(share: NDArray[np.float64]) -> NDArray[np.float64]:
        met: NDArray[np.float64] = (share * np.roll(share, -1, axis=1)).sum(axis=2)
        return met

    return kept(share_WLR), kept(_by_node(share_WLR, placement))


def evaluate(
    load: ExpertLoad,
    placement: Placement,
    costs: LayerCosts,
    objective: Objective,
    speed_R: NDArray[np.float64] | None = None,
) -> Evaluation:
    """Seconds, loads and distinct nodes of a placement on a load.

    Exchange in ``return_home``: the slower of the busiest NIC's arrivals and the busiest rank's, by dispatch kind
    (``per_expert`` sends one copy per pair, from the recorded homes or from any node alike; ``allgather`` does not
    depend on the placement). In ``stay``: transitions that leave the rank pay the scale-up price, those that leave the
    node the node price, spread over ranks and nodes; the slowest link decides. Choices of tokens that are not known are
    taken as independent.

    Raises:
        PlanError: load and placement are not of one model.
    """
    speed = np.ones(placement.num_ranks) if speed_R is None else speed_R
    counts = count_trace(load, placement, objective.replica_split) if load.trace is not None else None
    slot_WLP = served_slots(load, placement, objective.replica_split, counts)
    total_WL = load.load_WLE.sum(axis=2)
    load_WLR = sum_by_rank(slot_WLP, placement)
    relative = load_WLR / speed
    capacity = speed[np.unique(placement.rank_of_slot_P)].sum()
    mean_WL = load_WLR.sum(axis=2) / capacity
    max_over_mean = np.where(mean_WL > 0, relative.max(axis=2) / np.maximum(mean_WL, _TINY), 1.0)

    W, L = load.load_WLE.shape[:2]
    T, top_k = costs.tokens_per_step, load.top_k or 1
    chance_WLP = slot_WLP * top_k / np.maximum(total_WL, _TINY)[:, :, None]
    expert_WLR = sum_by_rank(_chosen_seconds(chance_WLP, costs), placement) / speed
    expert_WL = expert_WLR.max(axis=2) + costs.expert_fixed_s
    exchange = np.full((W, L), costs.exchange_fixed_s)
    node, rank = np.zeros((W, L)), np.zeros((W, L))
    hops = cache(lambda: _hops(load, placement))
    if objective.return_mode == "stay":
        kept_rank, kept_node = hops() or _met(load_WLR, placement)
        rank_s, node_s = costs.hop_s(placement.num_ranks, placement.num_nodes)
        hop_s = (kept_node - kept_rank) * rank_s + (1 - kept_node) * node_s
        hop_s[..., -1] = 0.0
        exchange += T * top_k * hop_s
    elif objective.dispatch != "allgather":
        nics = costs.nics(objective.dispatch, placement.num_ranks, placement.num_nodes)
        node, rank_WLR = _arrivals(load, load_WLR, counts, placement, objective.dispatch, nics)
        rank = costs.slowest_rank(rank_WLR, placement.num_nodes)
    node_path, rank_path = T * costs.per_node_copy_s * node, T * costs.per_rank_copy_s * rank
    return Evaluation(
        expert_WL=expert_WL,
        exchange_WL=exchange + np.maximum(node_path, rank_path),
        node_path_WL=node_path,
        rank_path_WL=rank_path,
        max_over_mean_WL=max_over_mean,
        load_LR=load_WLR.sum(axis=0),
        counts=counts,
        hops=hops,
    )
