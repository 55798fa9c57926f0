"""How often tokens go from one expert to another in the next MoE layer.

``T`` tokens, ``L`` MoE layers, ``K`` top-k, ``E`` experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import RoutingTrace

__all__ = ["transition_counts"]

_PAIRS_AT_ONCE = 1 << 18


def transition_counts(trace: RoutingTrace) -> NDArray[np.float64]:
    """Transitions ``[L-1, E, E]``: entry ``l, e, f`` tokens from ``e`` to ``f`` in the layer after ``l``.

    A token with top-k routing takes all ``K * K`` pairs at once, each weighted ``1/K``, so that rows and
    columns sum to the loads of the two layers (the counts ``R`` of MoETuner's second ILP, arXiv 2502.06643).
    Pairs with padding (``-1``) do not count.
    """
    tokens, layers, top_k = trace.experts_TLK.shape
    wide = trace.num_experts + 1  # one more row and column, cut off below, take the padding
    counts_LEE = np.zeros((layers - 1, wide * wide), dtype=np.int64)
    step = max(1, _PAIRS_AT_ONCE // (top_k * top_k))
    for start in range(0, tokens, step):
        experts_LTK = trace.experts_TLK[start : start + step].transpose(1, 0, 2).astype(np.int64, order="C")
        experts_LTK[experts_LTK < 0] = trace.num_experts
        for layer in range(layers - 1):
            pairs_TKK = experts_LTK[layer, :, :, None] * wide + experts_LTK[layer + 1, :, None, :]
            counts_LEE[layer] += np.bincount(pairs_TKK.ravel(), minlength=wide * wide)
    transitions_LEE: NDArray[np.float64] = counts_LEE.reshape(-1, wide, wide)[:, :-1, :-1] / top_k
    return transitions_LEE
