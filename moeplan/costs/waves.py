"""The idle part of a dense product's last wave: its time jumps with it as the sizes grow.

A product ``[m, k] x [k, n]`` is cut into tiles, and a device of ``S`` multiprocessors takes them in waves of
``S``; the last one takes as long as a full one (NVIDIA, Matrix Multiplication Background User's Guide, "Tile
Quantization" and "Wave Quantization"). Which tile a library picks is not known: common ones stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.errors import UnknownNameError
from moeplan.specs.clusters import find_accelerator

__all__ = ["idle_share", "steps_of"]

Floats = NDArray[np.float64]

_TILES_T2 = np.array([(64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128)])


@cache
def idle_share(multiprocessors: int) -> Callable[[Floats], Floats]:
    """Function from sizes ``[q, (m, n, ...)]`` to ``[q, T]``: log of slots taken over tiles done, by tile."""

    def of(mnk_qA: Floats) -> Floats:
        tiles_qT = np.ceil(np.rint(mnk_qA[:, None, :2]) / _TILES_T2).prod(2)
        slots: Floats = np.ceil(tiles_qT / multiprocessors) * multiprocessors / tiles_qT
        return np.log(slots)

    return of


def steps_of(profile: HardwareProfile, table: str) -> Callable[[Floats], Floats] | None:
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
