"""A MoE layer in one process, token by token, from the definition: what the parallel layer is compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import linear, silu

from moeplan.artifacts.placement import EMPTY, Placement


def dense_moe(x_TH, experts_TK, weights_TK, rows_EW, hidden, intermediate):
    """Sum over choices of weight * down(silu(gate x) * up x); float64 where the inputs are."""
    cut = intermediate * hidden
    out = torch.zeros_like(x_TH)
    for e in range(len(rows_EW)):
        gate = rows_EW[e, :cut].view(intermediate, hidden)
        up = rows_EW[e, cut : 2 * cut].view(intermediate, hidden)
        down = rows_EW[e, 2 * cut :].view(hidden, intermediate)
        weight_T = (weights_TK * (experts_TK == e)).sum(1)
        y = linear(silu(linear(x_TH, gate)) * linear(x_TH, up), down)
        out = out + weight_T[:, None] * y
    return out


def random_placement(rng, layers, experts, ranks, per_node, extra, weighted=False, empty=False):
    """Every expert somewhere, ``extra`` copies elsewhere, slots unequal over ranks, some empty."""
    slots_R = np.full(ranks, experts // ranks)
    slots_R[: experts % ranks] += 1
    for _ in range(extra):
        slots_R[rng.integers(ranks)] += 1
    if ranks > 1:
        moved = rng.integers(0, slots_R[0])  # unequal slots
        slots_R[0] -= moved
        slots_R[-1] += moved
    slots_R = np.minimum(slots_R, experts)
    while slots_R.sum() < experts:
        slots_R[np.argmin(slots_R)] += 1
    rank_of_slot = np.repeat(np.arange(ranks), slots_R)
    rows = []
    for _ in range(layers):
        while True:
            row = np.full(len(rank_of_slot), EMPTY)
            row[rng.permutation(len(row))[:experts]] = rng.permutation(experts)
            for slot in np.flatnonzero(row == EMPTY):
                here = set(row[rank_of_slot == rank_of_slot[slot]].tolist())
                others = [e for e in range(experts) if e not in here]
                if others and not (empty and rng.random() < 0.3):
                    row[slot] = rng.choice(others)
            break
        rows.append(row)
    p2l = np.array(rows, np.int32)
    share = None
    if weighted:
        share = np.zeros(p2l.shape)
        for l, row in enumerate(p2l):
            for e in range(experts):
                at = np.flatnonzero(row == e)
                share[l, at] = rng.dirichlet(np.ones(len(at)))
    placement = Placement(p2l, rank_of_slot.astype(np.int32), experts, ranks, per_node, share)
    placement.require_valid()
    return placement
