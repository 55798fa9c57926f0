"""The compiled part of :mod:`moeplan.costs.serving`: attention and token-wise seconds of every group, and table rows.

``D`` groups, ``B`` grid points of tokens, ``S`` of sequences, ``C`` of context, ``L`` layers, ``R`` ranks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["group_seconds", "row_at"]


@njit(cache=True, nogil=True)
def _place(points, value):
    """Interval of a rising grid and weight in it; extended beyond the last point, clipped at the first."""
    last = len(points) - 1
    if value <= points[0]:
        return 0, 0.0
    i = min(np.searchsorted(points, value, side="right") - 1, last - 1)
    return i, (value - points[i]) / (points[i + 1] - points[i])


@njit(cache=True, nogil=True)
def row_at(rows_B, b, w):
    """The line between rows ``b`` and ``b + 1``."""
    return rows_B[b] + w * (rows_B[b + 1] - rows_B[b])


@njit(cache=True, nogil=True)
def group_seconds(
    decodes_D, cached_D, chunk_s_D4, tokens_D, speed_D, link_D, share, points_B, fixed_DB4, points_S, points_C,
    decode_s_SC, merge_s_DS, launch_s,
):
    """Seconds of each group, ``[D, 3]``: attention and token-wise parts of one layer; shared experts of one layer;
    other layers and head of the step. ``share``: the part of the batch that runs at once; the last column is whole.
    ``fixed_DB4`` and ``merge_s_DS``, what decodes exchange around their kernel, are at each group's speeds already;
    ``speed_D`` is for the kernels, ``link_D`` for what is sent for chunks.
    """
    out = np.zeros((len(decodes_D), 3))
    for d in range(len(decodes_D)):
        tokens, decodes = tokens_D[d], decodes_D[d]
        if tokens == 0:
            continue
        kernels = np.zeros(2)  # of the share, of the whole
        for which in range(2):
            part, merge = share if which == 0 else 1.0, 0.0
            if which == 1 and share == 1.0:
                kernels[1] = kernels[0]
                break
            if decodes > 0:
                i, w = _place(points_S, decodes * part)
                j, v = _place(points_C, cached_D[d] / decodes + 1.0)
                low = decode_s_SC[i, j] + v * (decode_s_SC[i, j + 1] - decode_s_SC[i, j])
                high = decode_s_SC[i + 1, j] + v * (decode_s_SC[i + 1, j + 1] - decode_s_SC[i + 1, j])
                kernels[which] = low + w * (high - low)
                merge = merge_s_DS[d, i] + w * (merge_s_DS[d, i + 1] - merge_s_DS[d, i])
            if chunk_s_D4[d, 0] >= 0:
                kernels[which] += launch_s + part * chunk_s_D4[d, 0]
                merge += part * (chunk_s_D4[d, 1] + chunk_s_D4[d, 2] / link_D[d])
            kernels[which] = kernels[which] / speed_D[d] + merge
        fixed_B4 = fixed_DB4[d]
        b, w = _place(points_B, tokens * share)
        out[d, 0] = fixed_B4[b, 0] + w * (fixed_B4[b + 1, 0] - fixed_B4[b, 0]) + kernels[0]
        out[d, 1] = fixed_B4[b, 1] + w * (fixed_B4[b + 1, 1] - fixed_B4[b, 1])
        b, w = _place(points_B, tokens)
        out[d, 2] = fixed_B4[b, 2] + w * (fixed_B4[b + 1, 2] - fixed_B4[b, 2]) + fixed_B4[b, 3] * kernels[1]
    return out
