"""Copies of tokens from rank to rank in one layer: counted on a trace under a placement, or expected from loads.

A copy takes one or two hops. ``between`` goes over the NICs of two ranks, ``inside`` over scale-up links. With
``per_node`` dispatch and ``allgather`` a token goes once to each node it touches, to the rank with its home's place
in that node (:func:`moeplan.costs.nics.entries`), which passes it on inside; a copy that is passed on crosses the port
of the rank that gets it even where that is the forwarder. Combine takes the same ways back.

``T`` tokens, ``L`` layers, ``K`` top-k, ``R`` ranks, ``N`` nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.counting import choose_slots, count_trace, home_ranks
from moeplan.costs.exchange import touched_share
from moeplan.costs.nics import away_shares, entries
from moeplan.costs.roofline import is_joined
from moeplan.costs.work import working
from moeplan.errors import PlanError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.workload import DispatchKind, ReplicaSplit

__all__ = [
    "Reach",
    "Traffic",
    "counted_reach",
    "counted_traffic",
    "expected_reach",
    "expected_traffic",
    "spread",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Copies per token of a step: ``between_LRR`` from rank to rank of another node, ``inside_LRR`` in a node."""

    between_LRR: Floats
    inside_LRR: Floats

    def arrivals(self, ranks_per_node: int) -> tuple[Floats, Floats]:
        """Copies per token into nodes from others ``[L, N]`` and into ranks from others of the node ``[L, R]``."""
        return self._ends(1, ranks_per_node)

    def busiest(self, ranks_per_nic: int) -> tuple[Floats, Floats]:
        """Copies per token over each NIC ``[L, X]``, and over each rank's links in its node ``[L, R]``: the larger of
        what they take in and send, as both go at once."""
        into, out = (self._ends(axis, ranks_per_nic) for axis in (1, 2))
        return np.maximum(into[0], out[0]), np.maximum(into[1], out[1])

    def _ends(self, axis: int, neighbours: int) -> tuple[Floats, Floats]:
        between_LR = self.between_LRR.sum(axis)
        return between_LR.reshape(len(between_LR), -1, neighbours).sum(2), self.inside_LRR.sum(axis)


@njit(cache=True, nogil=True)
def _count(slot_TK, home_T, rank_of_slot_P, per_node, per_expert, forward, peer_RN, between, inside):
    """Adds one layer's hops. ``forward``: once per node, then passed on inside it."""
    seen_rank = np.full(inside.shape[0], -1, np.int64)
    seen_node = np.full(inside.shape[0] // per_node, -1, np.int64)
    for t in range(slot_TK.shape[0]):
        home = home_T[t]
        for k in range(slot_TK.shape[1]):
            s = slot_TK[t, k]
            if s < 0:
                continue
            r = rank_of_slot_P[s]
            if r == home or (not per_expert and seen_rank[r] == t):
                continue
            seen_rank[r] = t
            node = r // per_node
            if node == home // per_node:
                inside[home, r] += 1.0
            elif forward:
                peer = peer_RN[home, node]
                inside[peer, r] += 1.0
                if seen_node[node] != t:
                    seen_node[node] = t
                    between[home, peer] += 1.0
            else:
                between[home, r] += 1.0


def counted_traffic(
    load: ExpertLoad, placement: Placement, cluster: ClusterSpec, dispatch: DispatchKind, split: ReplicaSplit = "even"
) -> Traffic:
    """Count every token of ``load.trace``; homes are those recorded, or ranks in turn.

    Raises:
        PlanError: the load has no tokens, or the placement is of another cluster or model.
    """
    trace = load.trace
    if trace is None:
        raise PlanError("a traffic matrix needs token-level routing, but the input holds counts only")
    if placement.num_ranks != cluster.num_ranks or trace.num_layers != placement.num_layers:
        raise PlanError(
            f"placement ({placement.num_layers} layers, {placement.num_ranks} ranks) does not fit the trace"
            f" ({trace.num_layers} layers) and cluster.num_ranks ({cluster.num_ranks})"
        )
    live_R = working(cluster)
    if dispatch == "allgather":
        return expected_traffic(np.zeros((trace.num_layers, cluster.num_ranks)), cluster, dispatch, trace.top_k)
    home_T = home_ranks(load, np.flatnonzero(live_R))
    L, R = placement.num_layers, placement.num_ranks
    between, inside = np.zeros((L, R, R)), np.zeros((L, R, R))
    per_node = R if is_joined(cluster) else cluster.ranks_per_node
    peer_RN = entries(live_R, cluster.num_nodes, dispatch).reshape(R, cluster.num_nodes, -1).argmax(2)
    peer_RN += np.arange(cluster.num_nodes) * cluster.ranks_per_node
    for layer in range(L):
        slot_TK = choose_slots(trace.experts_TLK[:, layer], home_T, placement, layer, split)
        _count(
            slot_TK, home_T, placement.rank_of_slot_P, per_node, dispatch == "per_expert", dispatch == "per_node",
            peer_RN, between[layer], inside[layer],
        )  # fmt: skip
    return Traffic(between / trace.num_tokens, inside / trace.num_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """Copies per token, wherever tokens are at home: ``rank_LR`` that each rank needs, ``node_LN`` each node where
    copies merge by node."""

    rank_LR: Floats
    node_LN: Floats

    def over_groups(self, expert_tp: int) -> Reach:
        """Each rank becomes ``expert_tp`` neighbours that split its experts and need the same tokens."""
        return Reach(self.rank_LR.repeat(expert_tp, 1), self.node_LN)


def expected_reach(
    share_LR: Floats, cluster: ClusterSpec, dispatch: DispatchKind, top_k: int, expert_tp: int = 1
) -> Reach:
    """Where a token's K choices are independent, as ``StepModel`` takes them.

    ``share_LR``: part of all (token, expert) pairs that each rank works on (not looked at for ``allgather``), all those
    of its experts on each of ``expert_tp`` neighbours that split them.
    """
    if dispatch == "allgather":
        live = working(cluster).astype(float)
        return Reach(np.broadcast_to(live, share_LR.shape), np.ones((len(share_LR), cluster.num_nodes)))
    rank_LR = share_LR * top_k if dispatch == "per_expert" else touched_share(share_LR, top_k)
    share_LN = share_LR.reshape(len(share_LR), cluster.num_nodes, cluster.ranks_per_node).sum(2) / expert_tp
    return Reach(rank_LR, touched_share(share_LN, top_k))


def counted_reach(
    trace: RoutingTrace, placement: Placement, cluster: ClusterSpec, dispatch: DispatchKind
) -> Reach:
    """Counted on every token of ``trace``; copies of an expert share by the placement, else evenly.

    Raises:
        PlanError: the trace has another number of layers or experts than the placement.
    """
    if dispatch == "allgather":
        return expected_reach(np.zeros((trace.num_layers, cluster.num_ranks)), cluster, dispatch, trace.top_k)
    load = ExpertLoad(
        np.ones((1, trace.num_layers, trace.num_experts)), ("all",), trace.layer_ids, trace.top_k,
        replace(trace, source_rank_T=None),
    )  # fmt: skip
    counts = count_trace(load, placement, "even" if placement.share_LP is None else "weighted")
    rank_LR = counts.pairs_WLR[0] if dispatch == "per_expert" else counts.rank_arrivals_WLR[0]
    away_N = away_shares(placement.live_R, placement.num_nodes)  # homes are even: so much of what a node needs comes in
    return Reach(rank_LR, counts.node_arrivals_WLN[0] / np.where(away_N > 0, away_N, 1.0))


def spread(
    reach: Reach, cluster: ClusterSpec, dispatch: DispatchKind, home_R: Floats | None = None, expert_tp: int = 1
) -> Traffic:
    """Traffic of tokens at home as ``home_R`` says (parts of all tokens; left out: evenly on the ranks that work).

    Of ``expert_tp`` neighbours that split experts the one with its home's place gets a ``per_expert`` copy: what they
    gather from each other is left out (:attr:`moeplan.costs.technique.Technique.gathers`).
    """
    live_R = working(cluster)
    R, per_node = cluster.num_ranks, cluster.ranks_per_node
    home_R = live_R / live_R.sum() if home_R is None else home_R
    node_R = np.arange(R) // per_node
    same_node = np.ones((R, R), bool) if is_joined(cluster) else node_R[:, None] == node_R[None, :]
    others = ~np.eye(R, dtype=bool)
    direct_LRR = home_R[None, :, None] * reach.rank_LR[:, None, :]
    if dispatch == "per_expert":
        place_R = np.arange(R) % expert_tp
        direct_LRR = direct_LRR * (place_R[:, None] == place_R)
    inside_LRR = direct_LRR * (same_node & others)
    between_LRR = direct_LRR * ~same_node
    if dispatch in ("per_node", "allgather") and not same_node.all():
        taken_RR = home_R[:, None] * entries(live_R, cluster.num_nodes, dispatch) * ~same_node
        between_LRR = taken_RR * reach.node_LN.repeat(per_node, 1)[:, None, :]
        passed_on_R = taken_RR.sum(0)  # each rank passes on inside its own node
        inside_LRR += passed_on_R[:, None] * reach.rank_LR[:, None, :] * same_node
    return Traffic(between_LRR, inside_LRR)


def expected_traffic(
    share_LR: Floats,
    cluster: ClusterSpec,
    dispatch: DispatchKind,
    top_k: int,
    home_R: Floats | None = None,
    expert_tp: int = 1,
) -> Traffic:
    """:func:`expected_reach`, spread from the tokens' homes."""
    reach = expected_reach(share_LR, cluster, dispatch, top_k, expert_tp)
    return spread(reach, cluster, dispatch, home_R, expert_tp)
