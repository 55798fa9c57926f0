"""Compiled search for ``return_home``: where a token goes home after each layer, layers separate.

Each layer is a balanced hypergraph partition: tokens are hyperedges over the copies of their experts, nodes and
ranks are the parts, and what a token pays is the number of distinct parts it touches (the connectivity objective).
Tokens are bits: the tokens that touch a group are one bit row, so that a proposed swap of two copies is priced,
exactly, by a few word operations and population counts per 64 tokens. A token that is at home in a node does not
arrive there: where homes are recorded, ``away_NM`` holds, for each node, the tokens that come from elsewhere.

``P`` copies (one per slot), ``G`` groups (ranks or nodes), ``M`` words of 64 tokens, ``W`` windows, ``R`` ranks.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

__all__ = [
    "anneal_home",
    "arrivals_after",
    "fill_group",
    "group_arrivals",
    "load_price",
    "pack_tokens",
    "peak_and_mean",
    "slowest_and_mean",
]


@intrinsic
def _popcount(_typingctx, word):
    def codegen(_context, builder, _signature, args):
        function = builder.module.declare_intrinsic("llvm.ctpop", (ir.IntType(64),))
        return builder.call(function, args)

    return types.uint64(types.uint64), codegen


def pack_tokens(
    copies_TK: NDArray[np.int32], window_T: NDArray[np.int64], num_copies: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Bit rows of the tokens of each copy, windows starting on word boundaries.

    Args:
        copies_TK: copy that each selection of each token goes to; -1 for none.
        window_T: window of each token, rising.
        num_copies: ``P``.

    Returns:
        ``bits_PM`` and the word where each window starts, with the end appended (``[W + 1]``).
    """
    tokens_W = np.bincount(window_T)
    words_W = (tokens_W + 63) // 64
    start_W = np.concatenate([[0], np.cumsum(words_W)]).astype(np.int64)
    offset_T = np.arange(len(window_T)) - np.concatenate([[0], np.cumsum(tokens_W)])[window_T]
    position_T = start_W[window_T] * 64 + offset_T
    bits = np.zeros((num_copies, int(start_W[-1])), dtype=np.uint64)
    for column in copies_TK.T:
        used = column >= 0
        np.bitwise_or.at(
            bits,
            (column[used], position_T[used] // 64),
            np.uint64(1) << (position_T[used] % 64).astype(np.uint64),
        )
    return bits, start_W


@njit(cache=True, nogil=True)
def fill_group(bits_PM, copy_of_slot_P, first, last, away_M, occupied_M, once_M):
    """Of the tokens ``away_M`` those that touch the slots ``first..last-1`` at all, and those that touch one of them
    exactly.
    """
    words = bits_PM.shape[1]
    for m in range(words):
        occupied_M[m] = np.uint64(0)
        once_M[m] = np.uint64(0)
    for s in range(first, last):
        c = copy_of_slot_P[s]
        if c >= 0:
            for m in range(words):
                bit = bits_PM[c, m] & away_M[m]
                once_M[m] = (once_M[m] & ~bit) | (bit & ~occupied_M[m])
                occupied_M[m] |= bit


@njit(cache=True, nogil=True)
def _arrivals(occupied_M, start_W, out_W):
    for w in range(len(start_W) - 1):
        n = np.uint64(0)
        for m in range(start_W[w], start_W[w + 1]):
            n += _popcount(occupied_M[m])
        out_W[w] = np.float64(n)


@njit(cache=True, nogil=True)
def arrivals_after(occupied_M, once_M, leaving_M, coming_M, away_M, start_W, out_W):
    """Distinct tokens of a group per window once one copy has left and another has come."""
    for w in range(len(start_W) - 1):
        n = np.uint64(0)
        for m in range(start_W[w], start_W[w + 1]):
            n += _popcount((occupied_M[m] & ~(once_M[m] & leaving_M[m])) | (coming_M[m] & away_M[m]))
        out_W[w] = np.float64(n)


@njit(cache=True, nogil=True)
def group_arrivals(bits_PM, copy_of_slot_P, group_first_G, away_GM, start_W):
    """Distinct tokens that touch each group from outside, per window: ``[W, G]``.

    ``group_first_G`` has the end appended; ``away_GM`` with one row serves all groups.
    """
    groups = len(group_first_G) - 1
    windows = len(start_W) - 1
    out_WG = np.zeros((windows, groups))
    occupied_M = np.empty(bits_PM.shape[1], np.uint64)
    once_M = np.empty(bits_PM.shape[1], np.uint64)
    row_W = np.empty(windows)
    for g in range(groups):
        away_M = away_GM[min(g, len(away_GM) - 1)]
        fill_group(bits_PM, copy_of_slot_P, group_first_G[g], group_first_G[g + 1], away_M, occupied_M, once_M)
        _arrivals(occupied_M, start_W, row_W)
        out_WG[:, g] = row_W
    return out_WG


@njit(cache=True, nogil=True)
def slowest_and_mean(arrivals_G, pace_X, nodes, between):
    """Arrivals at the place that takes longest, times its pace, and the mean over places.

    A place carries the arrivals of neighbouring groups. It sends what places of the other nodes (``between``), or of
    its own, take in in the mean, at the same time: that counts where it is slower than others.
    """
    places = len(pace_X)
    share = len(arrivals_G) // places
    per_node = places // nodes
    fastest = pace_X.min()
    total = arrivals_G.sum()
    peak = 0.0
    mean = 0.0
    for x in range(places):
        carried = arrivals_G[x * share : (x + 1) * share].sum()
        if pace_X[x] > fastest:
            first = x // per_node * per_node * share
            inside = arrivals_G[first : first + per_node * share].sum()
            if not between:
                carried = max(carried, inside / per_node)
            elif nodes > 1:
                carried = max(carried, (total - inside) / (places - per_node))
        peak = max(peak, carried * pace_X[x])
        mean += carried * pace_X[x] / places
    return peak, mean


@njit(cache=True, nogil=True)
def peak_and_mean(arrivals_WG, weight_W, pace_X, nodes, between):
    """Half the slowest place plus half the mean: the peak is what is paid, the mean keeps the slope."""
    total = 0.0
    for w in range(len(weight_W)):
        peak, mean = slowest_and_mean(arrivals_WG[w], pace_X, nodes, between)
        total += weight_W[w] * 0.5 * (peak + mean)
    return total


@njit(cache=True, nogil=True)
def load_price(load, base, slope, cap, steep):
    """Price of one rank's load above the balanced plan's: rises to ``slope`` at the cap, ``steep`` beyond it."""
    over = load - base
    if over <= 0.0:
        return 0.0
    price = 0.5 * slope * over * over / cap
    if over > cap:
        price += steep * (over - cap)
    return price


@njit(cache=True, nogil=True)
def anneal_home(
    bits_PM,
    away_NM,
    start_W,
    weight_W,
    expert_of_copy_P,
    load_WP,
    copy_of_slot_P,
    rank_of_slot_P,
    rank_first_R,
    node_first_N,
    ranks_per_node,
    speed_R,
    pace_X,
    pace_R,
    whole,
    most_copies,
    base_W,
    cap_W,
    held_P,
    most_held,
    load_slope,
    load_steep,
    load_peak,
    node_price,
    rank_price,
    heat,
    proposals,
    seed,
):
    """Simulated annealing over swaps of two slots' copies; returns the best arrangement found within the limit of what
    a rank holds, or the one nearest to it.

    Args:
        bits_PM, start_W: from :func:`pack_tokens`.
        away_NM: tokens that are not at home in each node; all ones where homes are unknown.
        weight_W: price weight of each window (times 1 / its tokens).
        load_WP: load of each copy per window, scaled so that the mean over ranks is 1.
        copy_of_slot_P: start; the copy in each slot, -1 for an empty one.
        rank_first_R, node_first_N: first slot of each rank / node, end appended.
        pace_X, pace_R: time of an arrival over the usual one, by the links of each node or NIC / rank.
        whole: how many nodes there are.
        most_copies: of one expert on a rank; 1, or more where ranks stand for nodes.
        base_W, cap_W: the balanced plan's busiest rank, and how far above it a rank had better not go.
        held_P, most_held: what a copy adds to its rank, over the rank's speed, and what a rank may hold.
        load_slope, load_steep, load_peak, node_price, rank_price: seconds per unit of load up to the cap and beyond
            it, of the busiest rank's load, per node arrival and rank arrival.
        heat: start temperature over the mean change of a proposal.
        proposals: how many swaps to propose; the budget, so that the same seed gives the same answer.
    """
    np.random.seed(seed)
    slots = len(copy_of_slot_P)
    ranks = len(speed_R)
    nodes = len(node_first_N) - 1
    windows = len(start_W) - 1
    words = bits_PM.shape[1]
    all_M = ~np.zeros(words, np.uint64)
    use_nodes = node_price > 0.0 and nodes > 1
    use_ranks = rank_price > 0.0 and ranks > 1

    load_WR = np.zeros((windows, ranks))
    held_R = np.zeros(ranks)
    holds_RE = np.zeros((ranks, expert_of_copy_P.max() + 1), np.int32)
    for s in range(slots):
        c = copy_of_slot_P[s]
        if c >= 0:
            r = rank_of_slot_P[s]
            holds_RE[r, expert_of_copy_P[c]] += 1
            held_R[r] += held_P[c] / speed_R[r]
            for w in range(windows):
                load_WR[w, r] += load_WP[w, c] / speed_R[r]

    node_occ = np.zeros((nodes, words), np.uint64)
    node_once = np.zeros((nodes, words), np.uint64)
    node_WN = np.zeros((windows, nodes))
    rank_occ = np.zeros((ranks, words), np.uint64)
    rank_once = np.zeros((ranks, words), np.uint64)
    rank_WR = np.zeros((windows, ranks))
    a_W = np.empty(windows)
    b_W = np.empty(windows)
    c_W = np.empty(windows)
    d_W = np.empty(windows)
    if use_nodes:
        for n in range(nodes):
            fill_group(
                bits_PM, copy_of_slot_P, node_first_N[n], node_first_N[n + 1], away_NM[n], node_occ[n], node_once[n]
            )
            _arrivals(node_occ[n], start_W, a_W)
            node_WN[:, n] = a_W
    if use_ranks:
        for r in range(ranks):
            fill_group(
                bits_PM, copy_of_slot_P, rank_first_R[r], rank_first_R[r + 1], all_M, rank_occ[r], rank_once[r]
            )
            _arrivals(rank_occ[r], start_W, a_W)
            rank_WR[:, r] = a_W

    current_node = peak_and_mean(node_WN, weight_W, pace_X, whole, True)
    current_rank = peak_and_mean(rank_WR, weight_W, pace_R, whole, False)
    energy = node_price * current_node + rank_price * current_rank
    for w in range(windows):
        for r in range(ranks):
            energy += load_price(load_WR[w, r], base_W[w], load_slope, cap_W[w], load_steep) / windows
        energy += load_peak * load_WR[w].max() / windows
    best = copy_of_slot_P.copy()
    best_energy = energy
    best_held = max(held_R.max(), most_held)

    warm = min(500, proposals // 10)
    changes = 0.0
    temperature = 1e30
    cooling = 1.0
    for step in range(proposals):
        if step == warm:
            temperature = heat * changes / max(1, warm)
            cooling = (2e-3) ** (1.0 / max(1, proposals - warm))
        temperature *= cooling
        s1 = np.random.randint(slots)
        s2 = np.random.randint(slots)
        r1 = rank_of_slot_P[s1]
        r2 = rank_of_slot_P[s2]
        c1 = copy_of_slot_P[s1]
        c2 = copy_of_slot_P[s2]
        if r1 == r2 or c1 < 0 or c2 < 0:
            continue
        e1 = expert_of_copy_P[c1]
        e2 = expert_of_copy_P[c2]
        if e1 == e2 or holds_RE[r1, e2] >= most_copies or holds_RE[r2, e1] >= most_copies:
            continue
        delta = 0.0
        for w in range(windows):
            q = load_WP[w, c2] - load_WP[w, c1]
            x = load_WR[w, r1]
            y = load_WR[w, r2]
            new_x = x + q / speed_R[r1]
            new_y = y - q / speed_R[r2]
            delta += (
                load_price(new_x, base_W[w], load_slope, cap_W[w], load_steep)
                + load_price(new_y, base_W[w], load_slope, cap_W[w], load_steep)
                - load_price(x, base_W[w], load_slope, cap_W[w], load_steep)
                - load_price(y, base_W[w], load_slope, cap_W[w], load_steep)
            )
            if load_peak > 0.0:
                others = 0.0
                for r in range(ranks):
                    if r != r1 and r != r2:
                        others = max(others, load_WR[w, r])
                delta += load_peak * (max(others, new_x, new_y) - max(others, x, y))
        delta /= windows
        threshold = -temperature * np.log(np.random.random() + 1e-300)
        n1 = r1 // ranks_per_node
        n2 = r2 // ranks_per_node
        crosses = use_nodes and n1 != n2
        # A swap rarely saves more than a tenth of the traffic: skip what its load already rules out.
        if step >= warm and delta > threshold + 0.1 * (node_price * current_node + rank_price * current_rank):
            continue
        new_node = current_node
        new_rank = current_rank
        if crosses:
            arrivals_after(node_occ[n1], node_once[n1], bits_PM[c1], bits_PM[c2], away_NM[n1], start_W, a_W)
            arrivals_after(node_occ[n2], node_once[n2], bits_PM[c2], bits_PM[c1], away_NM[n2], start_W, b_W)
            for w in range(windows):
                a_W[w], node_WN[w, n1] = node_WN[w, n1], a_W[w]
                b_W[w], node_WN[w, n2] = node_WN[w, n2], b_W[w]
            new_node = peak_and_mean(node_WN, weight_W, pace_X, whole, True)
            delta += node_price * (new_node - current_node)
        if use_ranks:
            arrivals_after(rank_occ[r1], rank_once[r1], bits_PM[c1], bits_PM[c2], all_M, start_W, c_W)
            arrivals_after(rank_occ[r2], rank_once[r2], bits_PM[c2], bits_PM[c1], all_M, start_W, d_W)
            for w in range(windows):
                c_W[w], rank_WR[w, r1] = rank_WR[w, r1], c_W[w]
                d_W[w], rank_WR[w, r2] = rank_WR[w, r2], d_W[w]
            new_rank = peak_and_mean(rank_WR, weight_W, pace_R, whole, False)
            delta += rank_price * (new_rank - current_rank)
        if step < warm:
            changes += abs(delta)
        if delta > (0.0 if step < warm else threshold):
            if crosses:
                for w in range(windows):
                    node_WN[w, n1] = a_W[w]
                    node_WN[w, n2] = b_W[w]
            if use_ranks:
                for w in range(windows):
                    rank_WR[w, r1] = c_W[w]
                    rank_WR[w, r2] = d_W[w]
            continue
        for w in range(windows):
            q = load_WP[w, c2] - load_WP[w, c1]
            load_WR[w, r1] += q / speed_R[r1]
            load_WR[w, r2] -= q / speed_R[r2]
        held_R[r1] += (held_P[c2] - held_P[c1]) / speed_R[r1]
        held_R[r2] += (held_P[c1] - held_P[c2]) / speed_R[r2]
        copy_of_slot_P[s1] = c2
        copy_of_slot_P[s2] = c1
        holds_RE[r1, e1] -= 1
        holds_RE[r1, e2] += 1
        holds_RE[r2, e2] -= 1
        holds_RE[r2, e1] += 1
        current_node = new_node
        current_rank = new_rank
        energy += delta
        if crosses:
            fill_group(
                bits_PM, copy_of_slot_P, node_first_N[n1], node_first_N[n1 + 1], away_NM[n1], node_occ[n1],
                node_once[n1],
            )
            fill_group(
                bits_PM, copy_of_slot_P, node_first_N[n2], node_first_N[n2 + 1], away_NM[n2], node_occ[n2],
                node_once[n2],
            )
        if use_ranks:
            fill_group(
                bits_PM, copy_of_slot_P, rank_first_R[r1], rank_first_R[r1 + 1], all_M, rank_occ[r1], rank_once[r1]
            )
            fill_group(
                bits_PM, copy_of_slot_P, rank_first_R[r2], rank_first_R[r2 + 1], all_M, rank_occ[r2], rank_once[r2]
            )
        held = max(held_R.max(), most_held)
        if held < best_held or (held == best_held and energy < best_energy - 1e-15):
            best_held = held
            best_energy = energy
            best[:] = copy_of_slot_P
    return best
