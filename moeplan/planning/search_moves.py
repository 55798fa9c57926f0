"""Compiled search for few moves: from the placement in use, the swaps that save most per expert moved.

One layer at a time. Symbols as in :mod:`moeplan.planning.search_home`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moeplan.planning.search_home import arrivals_after, fill_group, group_arrivals, peak_and_mean

__all__ = ["descend"]

PAIRS = 4000


@njit(cache=True, nogil=True)
def _high_power(x):
    """``x ** 16``: a sum of these follows the largest, and still feels the others."""
    x *= x
    x *= x
    x *= x
    return x * x


@njit(cache=True, nogil=True)
def _load_seconds(power_W, ranks, seconds):
    total = 0.0
    for w in range(len(power_W)):
        total += (power_W[w] / ranks) ** 0.0625
    return seconds * total / len(power_W)


@njit(cache=True, nogil=True)
def descend(
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
    held_RE,
    load_seconds,
    node_price,
    rank_price,
    steps,
    seed,
):
    """Steepest descent: at each step the swap that saves most seconds per expert that it brings somewhere new.

    Args:
        held_RE: what each rank holds today.
        load_seconds: seconds of a rank of mean load.
        steps: swaps at most; ends earlier where no swap saves anything.

    Returns:
        The arrangements after each step ``[S, P]``.
    """
    np.random.seed(seed)
    slots, ranks, nodes = len(copy_of_slot_P), len(speed_R), len(node_first_N) - 1
    windows, words = len(weight_W), bits_PM.shape[1]
    all_1M = ~np.zeros((1, words), np.uint64)
    copy_of_slot_P = copy_of_slot_P.copy()
    trail_SP = np.zeros((steps, slots), np.int64)
    load_WR = np.zeros((windows, ranks))
    holds_RE = np.zeros(held_RE.shape, np.bool_)
    for s in range(slots):
        c = copy_of_slot_P[s]
        if c >= 0:
            r = rank_of_slot_P[s]
            holds_RE[r, expert_of_copy_P[c]] = True
            for w in range(windows):
                load_WR[w, r] += load_WP[w, c] / speed_R[r]
    node_occ, node_once = np.zeros((nodes, words), np.uint64), np.zeros((nodes, words), np.uint64)
    rank_occ, rank_once = np.zeros((ranks, words), np.uint64), np.zeros((ranks, words), np.uint64)
    for n in range(nodes):
        fill_group(bits_PM, copy_of_slot_P, node_first_N[n], node_first_N[n + 1], away_NM[n], node_occ[n], node_once[n])
    for r in range(ranks):
        fill_group(bits_PM, copy_of_slot_P, rank_first_R[r], rank_first_R[r + 1], all_1M[0], rank_occ[r], rank_once[r])
    node_WN = group_arrivals(bits_PM, copy_of_slot_P, node_first_N, away_NM, start_W)
    rank_WR = group_arrivals(bits_PM, copy_of_slot_P, rank_first_R, all_1M, start_W)
    a_W, b_W, c_W, d_W = np.empty(windows), np.empty(windows), np.empty(windows), np.empty(windows)
    power_W, new_W = np.zeros(windows), np.zeros(windows)
    live = 0
    for r in range(ranks):
        live += rank_first_R[r + 1] > rank_first_R[r]
    pairs = slots * (slots - 1) // 2
    done = 0
    for step in range(steps):
        for w in range(windows):
            power_W[w] = 0.0
            for r in range(ranks):
                power_W[w] += _high_power(load_WR[w, r])
        now = _load_seconds(power_W, live, load_seconds)
        now += node_price * peak_and_mean(node_WN, weight_W, pace_X, whole, True)
        now += rank_price * peak_and_mean(rank_WR, weight_W, pace_R, whole, False)
        best_rate = 1e-9
        best_1 = -1
        best_2 = -1
        for i in range(min(pairs, PAIRS)):
            if pairs <= PAIRS:
                # The i-th pair of slots.
                s1 = np.int64((1.0 + np.sqrt(1.0 + 8.0 * i)) / 2.0)
                if s1 * (s1 - 1) // 2 > i:
                    s1 -= 1
                s2 = i - s1 * (s1 - 1) // 2
            else:
                s1, s2 = np.random.randint(slots), np.random.randint(slots)
            c1, c2 = copy_of_slot_P[s1], copy_of_slot_P[s2]
            r1, r2 = rank_of_slot_P[s1], rank_of_slot_P[s2]
            if r1 == r2 or c1 < 0 or c2 < 0:
                continue
            e1, e2 = expert_of_copy_P[c1], expert_of_copy_P[c2]
            if e1 == e2 or holds_RE[r1, e2] or holds_RE[r2, e1]:
                continue
            for w in range(windows):
                q = load_WP[w, c2] - load_WP[w, c1]
                x, y = load_WR[w, r1], load_WR[w, r2]
                new_W[w] = (
                    power_W[w]
                    - _high_power(x)
                    - _high_power(y)
                    + _high_power(x + q / speed_R[r1])
                    + _high_power(y - q / speed_R[r2])
                )
            then = _load_seconds(new_W, live, load_seconds)
            n1, n2 = r1 // ranks_per_node, r2 // ranks_per_node
            if node_price > 0.0 and n1 != n2:
                arrivals_after(node_occ[n1], node_once[n1], bits_PM[c1], bits_PM[c2], away_NM[n1], start_W, a_W)
                arrivals_after(node_occ[n2], node_once[n2], bits_PM[c2], bits_PM[c1], away_NM[n2], start_W, b_W)
                for w in range(windows):
                    a_W[w], node_WN[w, n1] = node_WN[w, n1], a_W[w]
                    b_W[w], node_WN[w, n2] = node_WN[w, n2], b_W[w]
                then += node_price * peak_and_mean(node_WN, weight_W, pace_X, whole, True)
                for w in range(windows):
                    node_WN[w, n1], node_WN[w, n2] = a_W[w], b_W[w]
            else:
                then += node_price * peak_and_mean(node_WN, weight_W, pace_X, whole, True)
            if rank_price > 0.0:
                arrivals_after(rank_occ[r1], rank_once[r1], bits_PM[c1], bits_PM[c2], all_1M[0], start_W, c_W)
                arrivals_after(rank_occ[r2], rank_once[r2], bits_PM[c2], bits_PM[c1], all_1M[0], start_W, d_W)
                for w in range(windows):
                    c_W[w], rank_WR[w, r1] = rank_WR[w, r1], c_W[w]
                    d_W[w], rank_WR[w, r2] = rank_WR[w, r2], d_W[w]
                then += rank_price * peak_and_mean(rank_WR, weight_W, pace_R, whole, False)
                for w in range(windows):
                    rank_WR[w, r1], rank_WR[w, r2] = c_W[w], d_W[w]
            brought = (
                np.int64(held_RE[r1, e1])
                + np.int64(held_RE[r2, e2])
                - np.int64(held_RE[r1, e2])
                - np.int64(held_RE[r2, e1])
            )
            # Going back brings nothing new; it may cost seconds, but never saves moves for nothing.
            rate = (now - then) / (brought if brought > 0 else 0.5)
            if rate > best_rate:
                best_rate, best_1, best_2 = rate, s1, s2
        if best_1 < 0:
            break
        c1, c2 = copy_of_slot_P[best_1], copy_of_slot_P[best_2]
        r1, r2 = rank_of_slot_P[best_1], rank_of_slot_P[best_2]
        e1, e2 = expert_of_copy_P[c1], expert_of_copy_P[c2]
        copy_of_slot_P[best_1], copy_of_slot_P[best_2] = c2, c1
        holds_RE[r1, e1], holds_RE[r1, e2] = False, True
        holds_RE[r2, e2], holds_RE[r2, e1] = False, True
        for w in range(windows):
            q = load_WP[w, c2] - load_WP[w, c1]
            load_WR[w, r1] += q / speed_R[r1]
            load_WR[w, r2] -= q / speed_R[r2]
        for r in (r1, r2):
            n = r // ranks_per_node
            first, last = rank_first_R[r], rank_first_R[r + 1]
            fill_group(bits_PM, copy_of_slot_P, first, last, all_1M[0], rank_occ[r], rank_once[r])
            first, last = node_first_N[n], node_first_N[n + 1]
            fill_group(bits_PM, copy_of_slot_P, first, last, away_NM[n], node_occ[n], node_once[n])
        node_WN = group_arrivals(bits_PM, copy_of_slot_P, node_first_N, away_NM, start_W)
        rank_WR = group_arrivals(bits_PM, copy_of_slot_P, rank_first_R, all_1M, start_W)
        trail_SP[step] = copy_of_slot_P
        done = step + 1
    return trail_SP[:done]
