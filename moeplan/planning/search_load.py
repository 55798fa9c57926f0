"""Compiled search for balanced load: which experts get copies, and which rank holds which copy.

One layer at a time. ``P`` slots, ``E`` experts, ``R`` ranks, ``W`` windows, ``X`` exclusive groups (no two copies of
an expert in one: ranks, or nodes where replicas are chosen by nearness), ``C`` most copies of one expert.
``copy_WEC[w, e, c - 1]`` is what one of ``c`` copies of an expert costs its rank, scaled so that ranks average 1.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["anneal_load", "rank_loads"]


@njit(cache=True, nogil=True)
def rank_loads(copy_WEC, expert_of_slot_P, rank_of_slot_P, speed_R):
    """Load of each rank per window over its speed: ``[W, R]``."""
    windows, experts, _most = copy_WEC.shape
    copies_E = np.zeros(experts, np.int64)
    for e in expert_of_slot_P:
        if e >= 0:
            copies_E[e] += 1
    out_WR = np.zeros((windows, len(speed_R)))
    for s in range(len(expert_of_slot_P)):
        e = expert_of_slot_P[s]
        if e >= 0:
            r = rank_of_slot_P[s]
            for w in range(windows):
                out_WR[w, r] += copy_WEC[w, e, copies_E[e] - 1] / speed_R[r]
    return out_WR


@njit(cache=True, nogil=True)
def _excess(load, target):
    over = load - target
    return over * over if over > 0.0 else 0.0


@njit(cache=True, nogil=True)
def anneal_load(
    copy_WEC, expert_of_slot_P, rank_of_slot_P, group_of_rank_R, speed_R, target_W, replicate, heat, proposals, seed
):
    """Simulated annealing on the squared excess of rank loads over ``target_W``.

    Proposals swap two slots' experts or, with ``replicate``, give a slot of an expert with several copies to another
    expert.

    Args:
        expert_of_slot_P: start, valid; -1 for an empty slot.
        target_W: load per window that no rank needs to go below, e.g. the lower bound.
        heat: start temperature, in squared loads.
        proposals: the budget.

    Returns:
        The arrangement whose busiest rank, averaged over windows, is the least seen.
    """
    np.random.seed(seed)
    windows, experts, most = copy_WEC.shape
    slots = len(expert_of_slot_P)
    ranks = len(speed_R)
    copies_E = np.zeros(experts, np.int64)
    holds_XE = np.zeros((group_of_rank_R.max() + 1, experts), np.int64)
    for s in range(slots):
        e = expert_of_slot_P[s]
        if e >= 0:
            copies_E[e] += 1
            holds_XE[group_of_rank_R[rank_of_slot_P[s]], e] += 1
    load_WR = rank_loads(copy_WEC, expert_of_slot_P, rank_of_slot_P, speed_R)
    change_WR = np.zeros((windows, ranks))
    touched = np.zeros(ranks, np.bool_)

    peak = 0.0
    for w in range(windows):
        peak += load_WR[w].max() / windows
    best_peak = peak
    best = expert_of_slot_P.copy()
    cooling = (1e-10 / heat) ** (1.0 / max(1, proposals))
    temperature = heat
    for _ in range(proposals):
        temperature *= cooling
        s1 = np.random.randint(slots)
        e1 = expert_of_slot_P[s1]
        r1 = rank_of_slot_P[s1]
        g1 = group_of_rank_R[r1]
        if e1 < 0:
            continue
        delta = 0.0
        if replicate and np.random.random() < 0.15:
            e2 = np.random.randint(experts)
            if (
                copies_E[e1] < 2
                or e2 == e1
                or copies_E[e2] == 0
                or holds_XE[g1, e2] > 0
                or copies_E[e2] >= most
            ):
                continue
            for s in range(slots):
                e = expert_of_slot_P[s]
                if e != e1 and e != e2:
                    continue
                r = rank_of_slot_P[s]
                if not touched[r]:
                    touched[r] = True
                    change_WR[:, r] = 0.0
                for w in range(windows):
                    if s == s1:
                        q = copy_WEC[w, e2, copies_E[e2]] - copy_WEC[w, e1, copies_E[e1] - 1]
                    elif e == e1:
                        q = copy_WEC[w, e1, copies_E[e1] - 2] - copy_WEC[w, e1, copies_E[e1] - 1]
                    else:
                        q = copy_WEC[w, e2, copies_E[e2]] - copy_WEC[w, e2, copies_E[e2] - 1]
                    change_WR[w, r] += q / speed_R[r]
            for r in range(ranks):
                if touched[r]:
                    for w in range(windows):
                        delta += _excess(load_WR[w, r] + change_WR[w, r], target_W[w]) - _excess(
                            load_WR[w, r], target_W[w]
                        )
            accepted = delta <= 0.0 or np.random.random() < np.exp(-delta / temperature)
            for r in range(ranks):
                if touched[r]:
                    touched[r] = False
                    if accepted:
                        load_WR[:, r] += change_WR[:, r]
            if not accepted:
                continue
            expert_of_slot_P[s1] = e2
            copies_E[e1] -= 1
            copies_E[e2] += 1
            holds_XE[g1, e1] -= 1
            holds_XE[g1, e2] += 1
        else:
            s2 = np.random.randint(slots)
            e2 = expert_of_slot_P[s2]
            r2 = rank_of_slot_P[s2]
            g2 = group_of_rank_R[r2]
            if r1 == r2 or e1 == e2 or e2 < 0:
                continue
            if g1 != g2 and (holds_XE[g1, e2] > 0 or holds_XE[g2, e1] > 0):
                continue
            for w in range(windows):
                q = copy_WEC[w, e2, copies_E[e2] - 1] - copy_WEC[w, e1, copies_E[e1] - 1]
                x = load_WR[w, r1]
                y = load_WR[w, r2]
                delta += (
                    _excess(x + q / speed_R[r1], target_W[w])
                    + _excess(y - q / speed_R[r2], target_W[w])
                    - _excess(x, target_W[w])
                    - _excess(y, target_W[w])
                )
            if delta > 0.0 and np.random.random() >= np.exp(-delta / temperature):
                continue
            for w in range(windows):
                q = copy_WEC[w, e2, copies_E[e2] - 1] - copy_WEC[w, e1, copies_E[e1] - 1]
                load_WR[w, r1] += q / speed_R[r1]
                load_WR[w, r2] -= q / speed_R[r2]
            expert_of_slot_P[s1] = e2
            expert_of_slot_P[s2] = e1
            holds_XE[g1, e1] -= 1
            holds_XE[g1, e2] += 1
            holds_XE[g2, e2] -= 1
            holds_XE[g2, e1] += 1
        peak = 0.0
        for w in range(windows):
            peak += load_WR[w].max() / windows
        if peak < best_peak - 1e-12:
            best_peak = peak
            best[:] = expert_of_slot_P
    return best
