"""Weighted copies: how much of an expert's tokens each copy takes, so that the busiest rank has least to do.

``L`` layers, ``P`` slots, ``E`` experts, ``R`` ranks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

from moeplan.artifacts.placement import EMPTY, Placement

__all__ = ["weighted_shares"]


def weighted_shares(
    placement: Placement, load_LE: NDArray[np.float64], speed_R: NDArray[np.float64]
) -> Placement:
    """The placement with the shares that make each layer's busiest rank least busy: a linear programme per layer.

    Variables are the share of every slot and the busiest rank's load over its speed; shares of an expert sum to 1.
    """
    shares = np.zeros(placement.physical_to_logical_LP.shape)
    for layer, row in enumerate(placement.physical_to_logical_LP):
        used = np.flatnonzero(row != EMPTY)
        experts, index = np.unique(row[used], return_inverse=True)
        n = len(used)
        load = load_LE[layer, row[used]] / load_LE[layer].sum()
        ranks = placement.rank_of_slot_P[used]
        every = np.arange(placement.num_ranks)
        value = np.append(load / speed_R[ranks], -np.ones(len(every)))
        place = (np.append(ranks, every), np.append(np.arange(n), np.full(len(every), n)))
        busy = csr_array((value, place), shape=(len(every), n + 1))
        whole = csr_array((np.ones(n), (index, np.arange(n))), shape=(len(experts), n + 1))
        answer = linprog(
            np.append(np.zeros(n), 1.0),
            A_ub=busy,
            b_ub=np.zeros(placement.num_ranks),
            A_eq=whole,
            b_eq=np.ones(len(experts)),
            bounds=(0, None),
            method="highs",
        )
        shares[layer, used] = np.clip(answer.x[:n], 0.0, 1.0)
    return replace(placement, share_LP=shares)
