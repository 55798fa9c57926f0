"""Where times jump as sizes grow: the last wave of a dense product, the experts that a batch reaches.

A product ``[m, k] x [k, n]`` is cut into tiles, and a device of ``S`` multiprocessors takes them in waves of
``S``; the last one takes as long as a full one (NVIDIA, Matrix Multiplication Background User's Guide, "Tile
Quantization" and "Wave Quantization"). Which tile a library picks is not known: common ones stand side by side.

A grouped product of few tokens grows with the experts they reach, of many with the tokens; between lies a bend.
Benchmarks draw power-law choices from another range below ``T K = E`` (``costs/skew.py``): a jump.

Both serve :class:`~moeplan.costs.interpolation.GridInterpolator` as further coordinates. ``q`` queries, ``S`` series.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.interpolation import Steps
from moeplan.errors import UnknownNameError
from moeplan.specs.clusters import find_accelerator

__all__ = ["active_experts", "idle_share", "steps_of"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_TILES_T2 = np.array([(64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128)])
_WAVE_WEIGHT = 0.5


@cache
def idle_share(multiprocessors: int) -> Steps:
    """For coordinates ``(m, n, ...)``: half the log of slots taken over tiles done ``[q, T]``, by tile."""

    def of(_series_q: Ints, mnk_qA: Floats) -> Floats:
        tiles_qT = np.ceil(np.rint(mnk_qA[:, None, :2]) / _TILES_T2).prod(2)
        slots: Floats = np.ceil(tiles_qT / multiprocessors) * multiprocessors / tiles_qT
        return _WAVE_WEIGHT * np.log(slots)

    return of


def active_experts(experts_S: Ints, top_k_S: Ints) -> Steps:
    """For coordinates ``(tokens, ep, tp, skew)``: log of the experts that a rank's share of the choices can reach,
    and whether choices are skewed and fewer than experts ``[q, 2]``; experts and choices per token by series."""

    def of(series_q: Ints, coords_qA: Floats) -> Floats:
        tokens, ep, skew = coords_qA[:, 0], coords_qA[:, 1], coords_qA[:, 3]
        experts, pairs = experts_S[series_q], tokens * top_k_S[series_q]
        active = np.minimum(experts, np.maximum(pairs, ep)) / ep
        return np.stack([np.log(active), (pairs <= experts) & (skew > 1)], 1)

    return of


def steps_of(profile: HardwareProfile, table: str) -> Steps | None:
    """Where times of ``table`` jump: for products by the device's multiprocessors, as measured or from the registry.

    None for other tables, and for a device of which the number is not known.
    """
    if table != "gemm":
        return None
    count = profile.meta.system.get("multiprocessors")
    if count is None:
        try:
            count = find_accelerator(profile.meta.accelerator).multiprocessors
        except UnknownNameError:
            return None
    return idle_share(int(count)) if count else None
