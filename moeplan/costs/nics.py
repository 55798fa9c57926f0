"""Copies between nodes at the NICs that carry them.

Where they end is what engines' kernels do. ``per_expert`` (DeepEP's low-latency mode, ``internode_ll.cu``) and
``per_rank`` put a copy straight to the rank that works on it: its own NIC takes it in. ``per_node`` (the normal mode,
``internode.cu``) puts it to the rank with its home's place in the node, so that all NICs of a node take in alike; the
next rank that works stands in for one that has failed. An all-gather spreads over all that work. What comes in as
copies of dispatch goes out as results of combine, and links carry both ways at once: of what a NIC takes in and sends
the larger counts. Ranks that work are home to as many tokens each.

Everything is per token of a step, and in units of a node: copies of a NIC times the NICs of a node.

``R`` ranks, ``N`` nodes, ``X`` NICs, each of neighbours of one node; other axes come before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moeplan.specs.workload import DispatchKind

__all__ = ["Nics", "away_shares", "entries", "nics_of"]

Floats = NDArray[np.float64]


def entries(live_R: NDArray[np.bool_], nodes: int, dispatch: DispatchKind) -> Floats:
    """``[R, R]``: part of the copies of a rank's tokens to a node that each rank of it takes in, where copies merge."""
    per_node, place_R = len(live_R) // nodes, np.arange(len(live_R)) % (len(live_R) // nodes)
    part_RR = np.zeros((len(live_R), len(live_R)))
    for node in range(nodes):
        ranks = np.flatnonzero(live_R[node * per_node : (node + 1) * per_node])
        if len(ranks) < per_node and dispatch == "allgather":
            part_RR[:, node * per_node + ranks] = 1 / max(1, len(ranks))
        elif len(ranks):
            taker_R = ranks[np.searchsorted(ranks, place_R) % len(ranks)]
            part_RR[np.arange(len(live_R)), node * per_node + taker_R] = 1.0
    return part_RR


def away_shares(live_R: NDArray[np.bool_], nodes: int) -> Floats:
    """Part of all tokens that are at home outside each node ``[N]``."""
    away_N: Floats = 1.0 - live_R.reshape(nodes, -1).sum(1) / live_R.sum()
    return away_N


@dataclass(frozen=True, slots=True, eq=False)
class Nics:
    """NICs of a cluster under one dispatch kind.

    ``link_X``: part of its usual bandwidth that each has, the slowest ``link_speed`` of the ranks that share it.
    ``home_X``: part of all tokens that are at home at its ranks, in units of a node. ``away_N``: part at home outside
    each node. ``uneven_X``: where copies merge by node, what a NIC takes in over an even part of it; else 1.
    ``taken_RX``: part of a rank's copies to all other nodes that it takes in where they merge, in those of a rank;
    else 0. ``alike``: no rank has failed or another link than the others.
    """

    merges: bool
    link_X: Floats
    home_X: Floats
    away_N: Floats
    uneven_X: Floats
    taken_RX: Floats
    alike: bool

    @property
    def per_node(self) -> int:
        """NICs of a node."""
        return len(self.link_X) // len(self.away_N)

    @property
    def pace_G(self) -> Floats:
        """Time that a copy takes where copies come in, over the usual: at nodes where they merge, else at NICs."""
        pace_X = self.uneven_X / self.link_X
        return pace_X.reshape(len(self.away_N), -1).max(1) if self.merges else pace_X

    def of_ranks(self, copies_R: Floats) -> Floats:
        """Copies ``[..., X]`` over each NIC, from those ``[..., R]`` of each rank."""
        by_nic = copies_R.reshape(*copies_R.shape[:-1], len(self.link_X), -1).sum(-1)
        copies_X: Floats = by_nic * self.per_node
        return copies_X

    def slowest(self, into_X: Floats, reach_N: Floats) -> Floats:
        """Copies over the NIC that takes longest, at usual bandwidth; ``into_X`` those taken in, ``reach_N`` copies
        into each node of the tokens of all."""
        if self.alike:  # the busiest takes in no less than any sends: homes send alike, and no node is sent more
            return self.at(into_X)
        others_N = reach_N.sum(-1, keepdims=True) - reach_N
        return self.at(np.maximum(into_X, self.home_X * others_N.repeat(self.per_node, -1)))

    def tokens(self, tokens_R: Floats) -> float:
        """Tokens on each rank alike with which an exchange takes as long as with ``tokens_R`` at home on them, choices
        falling evenly, by what the NIC that takes longest sends or takes in from those with its place."""
        sent_X = self.of_ranks(tokens_R) / len(tokens_R) * len(self.away_N)
        return float(self.at(np.maximum(sent_X, tokens_R @ self.taken_RX)))

    def at(self, most_X: Floats) -> Floats:
        """As :meth:`slowest`, of what each NIC carries."""
        slowest: Floats = (most_X / self.link_X).max(-1)
        return slowest

    def into(self, node_N: Floats) -> Floats:
        """Copies ``[..., X]`` that NICs take in, of those ``[..., N]`` that come to nodes and merge there."""
        into_X: Floats = node_N.repeat(self.per_node, -1) * self.uneven_X
        return into_X

    def busiest(self, node_N: Floats, rank_R: Floats) -> Floats:
        """:meth:`slowest` of copies wherever their tokens are at home: ``node_N`` that each node needs where they merge
        by node, ``rank_R`` that each rank needs."""
        if self.merges:
            return self.slowest(self.into(node_N * self.away_N), node_N)
        away_R = self.away_N.repeat(rank_R.shape[-1] // len(self.away_N))
        reach_N = rank_R.reshape(*rank_R.shape[:-1], len(self.away_N), -1).sum(-1)
        return self.slowest(self.of_ranks(rank_R * away_R), reach_N)


@lru_cache(maxsize=64)
def nics_of(
    dispatch: DispatchKind,
    link_R: tuple[float, ...],
    nodes: int,
    ranks_per_nic: int = 1,
    lost: tuple[int, ...] = (),
) -> Nics:
    """NICs of ranks with parts ``link_R`` of their usual bandwidth, of which ``lost`` have failed."""
    R, per_node = len(link_R), len(link_R) // nodes
    nics, node_R = per_node // ranks_per_nic, np.arange(R) // per_node
    live_R = np.ones(R, bool)
    live_R[list(lost)] = False
    merges, live = dispatch in ("per_node", "allgather"), int(live_R.sum())
    uneven_X, taken_RX = np.ones(nodes * nics), np.zeros((R, nodes * nics))
    if merges and nodes > 1:
        elsewhere_RR = entries(live_R, nodes, dispatch) * live_R[:, None] * (node_R[:, None] != node_R)
        taken_RX = elsewhere_RR.reshape(R, -1, ranks_per_nic).sum(2)
        if lost:
            elsewhere_N = live - live_R.reshape(nodes, -1).sum(1)
            uneven_X = taken_RX.sum(0) * nics / np.maximum(elsewhere_N, 1).repeat(nics)
        taken_RX /= (nodes - 1) * ranks_per_nic
    return Nics(
        merges=merges,
        link_X=np.array(link_R).reshape(-1, ranks_per_nic).min(1),
        home_X=live_R.reshape(-1, ranks_per_nic).sum(1) * nics / live,
        away_N=away_shares(live_R, nodes),
        uneven_X=uneven_X,
        taken_RX=taken_RX,
        alike=not lost and len(set(link_R)) == 1,
    )
