"""How often tokens go from one expert to another in the next MoE layer.

``T`` tokens, ``L`` MoE layers, ``K`` top-k, ``E`` experts.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import RoutingTrace

__all__ = ["transition_counts"]

_counted: WeakKeyDictionary[RoutingTrace, NDArray[np.float64]] = WeakKeyDictionary()


@njit(cache=True, nogil=True)
def _add_pairs(first_TK, next_TK, counts_EE):
    for t in range(first_TK.shape[0]):
        for i in range(first_TK.shape[1]):
            e = np.int64(first_TK[t, i])
            if e >= 0:
                for j in range(next_TK.shape[1]):
                    f = np.int64(next_TK[t, j])
                    if f >= 0:
                        counts_EE[e, f] += 1


def transition_counts(trace: RoutingTrace) -> NDArray[np.float64]:
    """Transitions ``[L-1, E, E]``: entry ``l, e, f`` tokens from ``e`` to ``f`` in the layer after ``l``.

    A token with top-k routing takes all ``K * K`` pairs at once, each weighted ``1/K``, so that rows and
    columns sum to the loads of the two layers (the counts ``R`` of MoETuner's second ILP, arXiv 2502.06643).
    Pairs with padding (``-1``) do not count. A trace is counted once: planners ask again for every placement.
    """
    if trace not in _counted:
        counts_LEE = np.zeros((trace.num_layers - 1, trace.num_experts, trace.num_experts), np.int64)
        for layer, counts_EE in enumerate(counts_LEE):
            first_TK, next_TK = (np.ascontiguousarray(trace.experts_TLK[:, l]) for l in (layer, layer + 1))
            _add_pairs(first_TK, next_TK, counts_EE)
        transitions_LEE = counts_LEE / trace.top_k
        transitions_LEE.flags.writeable = False
        _counted[trace] = transitions_LEE
    return _counted[trace]
