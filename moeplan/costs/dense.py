"""Seconds of dense products and of passes over activations on one rank.

``m`` tokens, ``n`` columns, ``k`` inner size of a product; ``H`` hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.experts import TABLE_DTYPES
from moeplan.costs.tables import Seconds, TableCosts
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype

__all__ = ["DenseCosts"]

Floats = NDArray[np.float64]


class DenseCosts:
    """Products with weights of one type on one device; measured where the profile has them, by ``backend`` if named."""

    def __init__(
        self,
        accelerator: AcceleratorSpec,
        dtype: Dtype,
        profile: HardwareProfile | None = None,
        backend: str | None = None,
    ) -> None:
        self._bandwidth = roofline.MEMORY_EFFICIENCY * accelerator.memory_bandwidth
        width, flops = DTYPE_BYTES[dtype], roofline.matmul_flops(accelerator, dtype)

        def law(mnk: Floats) -> Floats:
            m, n, k = mnk.T
            moved = (n * k * width + 2 * m * (n + k)) / self._bandwidth
            seconds: Floats = np.maximum(moved, 2 * m * n * k / flops)
            return seconds

        names: dict[str, Any] = {"batch": 1, "direction": "forward"} | ({"backend": backend} if backend else {})
        # Scaled by blocks and by tensor are different kernels: the first kind that is measured serves alone.
        kinds = TABLE_DTYPES.get(dtype, (dtype,))
        measured = (kind for kind in kinds if profile is not None and profile.select("gemm", dtype=kind, **names))
        names["dtype"] = next(measured, kinds[0])
        self._products = TableCosts(profile, "gemm", ("m", "n", "k"), names, law, accelerator.name)
        self._device = accelerator.name

    def product(self, tokens: Any, columns: Any, inner: Any) -> Seconds:
        """``[m, k] x [k, n]``."""
        return self._products.seconds(tokens, columns, inner)

    def ffn(self, tokens: Any, hidden: int, inter: float, gated: bool) -> Seconds:
        """Up (and gate) and down products of a feed-forward block, on the last axis."""
        widths = np.array([inter * (2 if gated else 1), hidden])
        return self.product(np.asarray(tokens, float)[..., None], widths, np.array([hidden, inter]))

    def passes(self, elements: float, count: float = 1.0) -> Seconds:
        """``count`` reads and writes of bf16 activations: norms, router top-k, permutation, embedding rows."""
        seconds = np.array([count * 4 * elements / self._bandwidth])
        return Seconds(seconds, roofline.RELATIVE_ERROR, f"roofline of {self._device}", True)
