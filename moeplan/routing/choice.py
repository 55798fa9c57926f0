"""Drawing top-k choices from expert weights. ``T`` tokens, ``S`` segments, ``E`` experts, ``K`` top-k.

A token takes the K experts with the smallest ``noise / (weight * boost)``, noise being exponential: this
is drawing without replacement in proportion to the weights (the Gumbel top-k trick: W. Kool and others,
ICML 2019).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["choose", "fit_weights", "segment_counts"]


def choose(
    noise_TE: NDArray[np.float32],
    weight_SE: NDArray[np.float64],
    segment_T: NDArray[np.int64],
    topic_T: NDArray[np.int64],
    topic_of_expert_E: NDArray[np.int64],
    boost: float,
    n_group: int,
    topk_group: int,
    top_k: int,
) -> NDArray[np.int32]:
    """Experts of each token, best first; experts of the token's topic weigh ``boost`` times as much.

    With ``n_group > 1`` only the ``topk_group`` groups (contiguous, equal) with the best single expert may
    serve a token, as in DeepSeek-V2's group-limited routing.
    """
    topics_Z = np.arange(int(topic_T.max()) + 1)
    boost_ZE = np.where(topic_of_expert_E == topics_Z[:, None], boost, 1.0)
    inverse_SZE = (1.0 / (weight_SE[:, None] * boost_ZE)).astype(np.float32)
    chosen_TK: NDArray[np.int32] = _choose(noise_TE, inverse_SZE, segment_T, topic_T, n_group, topk_group, top_k)
    return chosen_TK


@njit(cache=True, nogil=True)
def _choose(
    noise_TE: NDArray[np.float32],
    inverse_SZE: NDArray[np.float32],
    segment_T: NDArray[np.int64],
    topic_T: NDArray[np.int64],
    n_group: int,
    topk_group: int,
    top_k: int,
) -> NDArray[np.int32]:
    T, E = noise_TE.shape
    chosen_TK = np.empty((T, top_k), np.int32)
    key_E = np.empty(E, np.float32)
    best_K = np.empty(top_k, np.float32)
    group_size = E // n_group
    group_key_G = np.empty(n_group, np.float32)
    for t in range(T):
        inverse_E = inverse_SZE[segment_T[t], topic_T[t]]
        for e in range(E):
            key_E[e] = noise_TE[t, e] * inverse_E[e]
        if topk_group < n_group:
            for g in range(n_group):
                group_key_G[g] = key_E[g * group_size : (g + 1) * group_size].min()
            limit = np.sort(group_key_G)[topk_group - 1]
            for g in range(n_group):
                if group_key_G[g] > limit:
                    key_E[g * group_size : (g + 1) * group_size] = np.inf
        for k in range(top_k):
            best_K[k] = np.inf
            chosen_TK[t, k] = -1
        for e in range(E):
            key = key_E[e]
            if key < best_K[top_k - 1]:
                place = top_k - 1
                while place > 0 and best_K[place - 1] > key:
                    best_K[place] = best_K[place - 1]
                    chosen_TK[t, place] = chosen_TK[t, place - 1]
                    place -= 1
                best_K[place] = key
                chosen_TK[t, place] = e
    return chosen_TK


@njit(cache=True, nogil=True)
def segment_counts(
    chosen_TK: NDArray[np.int32], segment_T: NDArray[np.int64], segments: int, num_experts: int
) -> NDArray[np.float64]:
    """Selections of each expert in each segment."""
    counts_SE = np.zeros((segments, num_experts))
    for t in range(chosen_TK.shape[0]):
        for k in range(chosen_TK.shape[1]):
            counts_SE[segment_T[t], chosen_TK[t, k]] += 1
    return counts_SE


def fit_weights(
    noise_TE: NDArray[np.float32],
    weight_SE: NDArray[np.float64],
    target_SE: NDArray[np.float64],
    segment_T: NDArray[np.int64],
    rounds: int,
    **rest: Any,
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Weights that make each expert serve ``target_SE`` (a share of the segment's tokens), and the choices.

    Fixed-point steps on the logit of the share. The tokens' noise is held fixed, so that the fit holds on
    these very tokens; it stops when every count is well within its own sampling error.
    """
    segments, E = target_SE.shape
    tokens_S = np.maximum(np.bincount(segment_T, minlength=segments), 1)[:, None]
    floor_S = 0.25 / tokens_S
    goal = np.clip(target_SE, floor_S, 1 - floor_S)
    close = 1 + 0.1 * np.sqrt(goal * tokens_S)
    chosen_TK = choose(noise_TE, weight_SE, segment_T, **rest)
    for _ in range(rounds):
        counts_SE = segment_counts(chosen_TK, segment_T, segments, E)
        if (np.abs(counts_SE - goal * tokens_S) <= close).all():
            break
        share = np.clip(counts_SE / tokens_S, floor_S, 1 - floor_S)
        step = np.log(goal * (1 - share)) - np.log(share * (1 - goal))
        weight_SE = weight_SE * np.exp(np.clip(step, -2.0, 2.0))
        weight_SE = weight_SE / weight_SE.mean(axis=1, keepdims=True)
        chosen_TK = choose(noise_TE, weight_SE, segment_T, **rest)
    return weight_SE, chosen_TK
