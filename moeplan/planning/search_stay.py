"""Compiled search for ``stay``: a token goes on from the rank of its expert, so consecutive layers are coupled.

The price of a copy at a rank is linear in where the experts of the two neighbouring layers are; those sums are kept
per expert and rank, so that a swap is priced in a few operations whatever the number of experts.
``L`` layers, ``E`` experts, ``P`` slots, ``R`` ranks, ``N`` nodes, ``W`` windows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moeplan.planning.search_home import load_price

__all__ = ["anneal_stay", "kept_value"]


@njit(cache=True, nogil=True)
def _add_expert(flow_LEE, flow_back_LEE, layer, expert, rank, node, share, at_rank_LRE, at_node_LNE):
    """Tell the two neighbouring layers that ``share`` of an expert has come to (or, negative, left) a rank."""
    layers = at_rank_LRE.shape[0]
    experts = at_rank_LRE.shape[2]
    if layer > 0:
        for f in range(experts):
            moved = share * flow_back_LEE[layer - 1, expert, f]
            at_rank_LRE[layer - 1, rank, f] += moved
            at_node_LNE[layer - 1, node, f] += moved
    if layer < layers - 1:
        for f in range(experts):
            moved = share * flow_LEE[layer, expert, f]
            at_rank_LRE[layer + 1, rank, f] += moved
            at_node_LNE[layer + 1, node, f] += moved


@njit(cache=True, nogil=True)
def kept_value(flow_LEE, expert_LP, share_LP, rank_of_slot_P, ranks, per_node, node_value, rank_value):
    """Value of the flow that stays in a node (``node_value``) and on a rank (``rank_value`` on top)."""
    layers, slots = expert_LP.shape
    experts = flow_LEE.shape[1]
    where = np.zeros((layers, experts, ranks))
    for l in range(layers):
        for s in range(slots):
            if expert_LP[l, s] >= 0:
                where[l, expert_LP[l, s], rank_of_slot_P[s]] += share_LP[l, s]
    total = 0.0
    for l in range(layers - 1):
        reached = flow_LEE[l] @ where[l + 1]
        for e in range(experts):
            for r in range(ranks):
                if where[l, e, r] > 0.0:
                    total += where[l, e, r] * rank_value * reached[e, r]
                    first = (r // per_node) * per_node
                    for q in range(first, first + per_node):
                        total += where[l, e, r] * node_value * reached[e, q]
    return total


@njit(cache=True, nogil=True)
def anneal_stay(
    flow_LEE,
    flow_back_LEE,
    expert_LP,
    share_LP,
    load_LWP,
    rank_of_slot_P,
    per_node,
    speed_R,
    base_LW,
    cap_LW,
    load_slope,
    load_steep,
    node_value,
    rank_value,
    sweeps,
    proposals_per_layer,
    heat,
    exclusive,
    seed,
):
    """Simulated annealing over swaps of two slots of a layer; arrays are changed in place to the best seen.

    Args:
        flow_LEE, flow_back_LEE: transitions ``[L-1, E, E]`` and each layer's transpose.
        expert_LP, share_LP, load_LWP: expert, share and load of each slot (load per window, ranks average 1).
        base_LW, cap_LW: the balanced plan's busiest rank, and how far above it a rank may go.
        load_slope, load_steep, node_value, rank_value: seconds per load up to the cap and beyond it, per unit of flow
            kept in a node, and on a rank on top.
        sweeps, proposals_per_layer: the budget; every sweep visits all layers.
        heat: start temperature over the mean change of a proposal.
        exclusive: whether a rank may hold one copy of an expert at most (not so where ranks stand for nodes).

    Returns:
        The value kept less the price of load, of the arrangement returned.
    """
    np.random.seed(seed)
    layers, slots = expert_LP.shape
    experts = flow_LEE.shape[1]
    ranks = len(speed_R)
    nodes = ranks // per_node
    windows = load_LWP.shape[1]
    at_rank = np.zeros((layers, ranks, experts))
    at_node = np.zeros((layers, nodes, experts))
    load_LWR = np.zeros((layers, windows, ranks))
    holds = np.zeros((layers, ranks, experts), np.bool_)
    for l in range(layers):
        for s in range(slots):
            e = expert_LP[l, s]
            if e < 0:
                continue
            r = rank_of_slot_P[s]
            _add_expert(flow_LEE, flow_back_LEE, l, e, r, r // per_node, share_LP[l, s], at_rank, at_node)
            holds[l, r, e] = True
            for w in range(windows):
                load_LWR[l, w, r] += load_LWP[l, w, s] / speed_R[r]
    value = kept_value(flow_LEE, expert_LP, share_LP, rank_of_slot_P, ranks, per_node, node_value, rank_value)
    for l in range(layers):
        for w in range(windows):
            for r in range(ranks):
                value -= load_price(load_LWR[l, w, r], base_LW[l, w], load_slope, cap_LW[l, w], load_steep) / windows
    best_value = value
    best_expert = expert_LP.copy()
    best_share = share_LP.copy()
    best_load = load_LWP.copy()

    changes = 0.0
    moved = 0.0
    tried = 0
    temperature = 0.0
    cooling = (3e-3) ** (1.0 / max(1, sweeps - 2))
    for sweep in range(sweeps):
        if sweep == 1:
            # Hot experts put loads far beyond the cap: that much heat would melt what traffic gains.
            temperature = heat * min(changes, 10.0 * moved) / max(1, tried)
        elif sweep > 1:
            temperature *= cooling
        for l in np.random.permutation(layers):
            for _ in range(proposals_per_layer):
                s1 = np.random.randint(slots)
                s2 = np.random.randint(slots)
                r1 = rank_of_slot_P[s1]
                r2 = rank_of_slot_P[s2]
                e1 = expert_LP[l, s1]
                e2 = expert_LP[l, s2]
                if r1 == r2 or e1 < 0 or e2 < 0 or e1 == e2:
                    continue
                if exclusive and (holds[l, r1, e2] or holds[l, r2, e1]):
                    continue
                n1 = r1 // per_node
                n2 = r2 // per_node
                a = share_LP[l, s1]
                b = share_LP[l, s2]
                delta = rank_value * (
                    a * (at_rank[l, r2, e1] - at_rank[l, r1, e1])
                    + b * (at_rank[l, r1, e2] - at_rank[l, r2, e2])
                )
                if n1 != n2:
                    delta += node_value * (
                        a * (at_node[l, n2, e1] - at_node[l, n1, e1])
                        + b * (at_node[l, n1, e2] - at_node[l, n2, e2])
                    )
                price = 0.0
                for w in range(windows):
                    q1 = (load_LWP[l, w, s2] - load_LWP[l, w, s1]) / speed_R[r1]
                    q2 = (load_LWP[l, w, s1] - load_LWP[l, w, s2]) / speed_R[r2]
                    x = load_LWR[l, w, r1]
                    y = load_LWR[l, w, r2]
                    base = base_LW[l, w]
                    cap = cap_LW[l, w]
                    price += load_price(x + q1, base, load_slope, cap, load_steep)
                    price -= load_price(x, base, load_slope, cap, load_steep)
                    price += load_price(y + q2, base, load_slope, cap, load_steep)
                    price -= load_price(y, base, load_slope, cap, load_steep)
                gain = delta - price / windows
                if sweep == 0:
                    changes += abs(gain)
                    moved += abs(delta)
                    tried += 1
                if gain < 0.0 and (temperature == 0.0 or np.random.random() >= np.exp(gain / temperature)):
                    continue
                value += gain
                for w in range(windows):
                    q = load_LWP[l, w, s2] - load_LWP[l, w, s1]
                    load_LWR[l, w, r1] += q / speed_R[r1]
                    load_LWR[l, w, r2] -= q / speed_R[r2]
                    load_LWP[l, w, s1], load_LWP[l, w, s2] = load_LWP[l, w, s2], load_LWP[l, w, s1]
                _add_expert(flow_LEE, flow_back_LEE, l, e1, r1, n1, -a, at_rank, at_node)
                _add_expert(flow_LEE, flow_back_LEE, l, e1, r2, n2, a, at_rank, at_node)
                _add_expert(flow_LEE, flow_back_LEE, l, e2, r2, n2, -b, at_rank, at_node)
                _add_expert(flow_LEE, flow_back_LEE, l, e2, r1, n1, b, at_rank, at_node)
                expert_LP[l, s1], expert_LP[l, s2] = e2, e1
                share_LP[l, s1], share_LP[l, s2] = b, a
                holds[l, r1, e1] = False
                holds[l, r1, e2] = True
                holds[l, r2, e2] = False
                holds[l, r2, e1] = True
        if value > best_value + 1e-15:
            best_value = value
            best_expert[:] = expert_LP
            best_share[:] = share_LP
            best_load[:] = load_LWP
    expert_LP[:] = best_expert
    share_LP[:] = best_share
    load_LWP[:] = best_load
    return best_value
