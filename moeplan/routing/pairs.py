"""Counting pairs of experts, compiled. ``T`` tokens, ``K`` top-k, ``E`` experts; ids below 0 are skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["coactivation_pairs", "lag_overlap", "transition_pairs", "weighted_pairs"]


@njit(cache=True, nogil=True)
def transition_pairs(first_TK: NDArray[Any], next_TK: NDArray[Any], num_experts: int) -> NDArray[np.int64]:
    """How often a token's experts of a layer [row] meet those of the next [column]: all K x K pairs."""
    counts_EE = np.zeros((num_experts, num_experts), np.int64)
    for t in range(first_TK.shape[0]):
        for i in range(first_TK.shape[1]):
            e = np.int64(first_TK[t, i])
            if e >= 0:
                for j in range(next_TK.shape[1]):
                    f = np.int64(next_TK[t, j])
                    if f >= 0:
                        counts_EE[e, f] += 1
    return counts_EE


@njit(cache=True, nogil=True)
def coactivation_pairs(experts_TK: NDArray[Any], num_experts: int) -> NDArray[np.int64]:
    """How often two different experts serve the same token in one layer; symmetric, zero diagonal."""
    counts_EE = np.zeros((num_experts, num_experts), np.int64)
    for t in range(experts_TK.shape[0]):
        for i in range(experts_TK.shape[1]):
            e = np.int64(experts_TK[t, i])
            for j in range(i + 1, experts_TK.shape[1]):
                f = np.int64(experts_TK[t, j])
                if e >= 0 and f >= 0 and e != f:
                    counts_EE[e, f] += 1
                    counts_EE[f, e] += 1
    return counts_EE


@njit(cache=True, nogil=True)
def weighted_pairs(experts_TK: NDArray[Any], weight_T: NDArray[np.float64], num_experts: int) -> NDArray[np.float64]:
    """Weight of the tokens that choose two experts in one layer; symmetric, of one expert alone on the diagonal.

    An expert that a token names twice counts once.
    """
    weight_EE = np.zeros((num_experts, num_experts))
    own_K = np.empty(experts_TK.shape[1], np.int64)
    for t in range(experts_TK.shape[0]):
        n = 0
        for k in range(experts_TK.shape[1]):
            e = np.int64(experts_TK[t, k])
            new = e >= 0
            for i in range(n):
                new = new and own_K[i] != e
            if new:
                own_K[n] = e
                n += 1
        for i in range(n):
            for j in range(n):
                weight_EE[own_K[i], own_K[j]] += weight_T[t]
    return weight_EE


@njit(cache=True, nogil=True)
def lag_overlap(
    experts_TLK: NDArray[Any], sequence_T: NDArray[np.int64], max_lag: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Sum and sum of squares of the share of experts that tokens ``t`` and ``t + lag`` of a sequence share.

    Entry ``lag`` of each result belongs to that lag (entry 0 is unused); the third is the number of
    pairs. A pair's share is its mean over layers.
    """
    total = np.zeros(max_lag + 1)
    squares = np.zeros(max_lag + 1)
    pairs = np.zeros(max_lag + 1, np.int64)
    T, L, K = experts_TLK.shape
    for t in range(T):
        for lag in range(1, min(max_lag, T - 1 - t) + 1):
            if sequence_T[t] != sequence_T[t + lag]:
                break
            common = 0
            for layer in range(L):
                for i in range(K):
                    for j in range(K):
                        e = experts_TLK[t, layer, i]
                        if e >= 0 and e == experts_TLK[t + lag, layer, j]:
                            common += 1
            share = common / (L * K)
            total[lag] += share
            squares[lag] += share * share
            pairs[lag] += 1
    return total, squares, pairs
