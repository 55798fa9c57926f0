"""Seconds of dense products and of passes over activations on one rank.

Scaled by blocks and by tensor are different kernels: of the kinds of a type the first that is measured serves alone.

``m`` tokens, ``n`` columns, ``k`` inner size of a product; ``H`` hidden.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.experts import TABLE_DTYPES
from moeplan.costs.frameworks import framework_that_serves
from moeplan.costs.tables import Seconds, TableCosts
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype

__all__ = ["DenseCosts"]

Floats = NDArray[np.float64]

# Kernels of two frameworks differ by up to 2.8 (median over weights); vLLM's block-scaled ones, timed with the host's
# work for each call, by 4 to 50, whatever the tokens.
_HOST = 3.0
_FEW = (1, 4, 16, 64)


class DenseCosts:
    """Products with weights of one type on one device; measured where the profile has them.

    Rows are those of ``backend``; of the framework with the fastest products of few tokens where none is named, or
    where the named one has none or takes over ``_HOST`` times as long: then it has timed its host, not the kernel.
    """

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

        kind, framework = _kind_and_framework(profile, dtype, backend) if profile is not None else (dtype, None)
        names: dict[str, Any] = {"dtype": kind, "batch": 1, "direction": "forward"}
        names |= {"backend": framework} if framework else {}
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


@lru_cache(maxsize=256)
def _kind_and_framework(profile: HardwareProfile, dtype: Dtype, backend: str | None) -> tuple[str, str | None]:
    """The kind of ``dtype`` in the tables and whose rows serve; None without rows of few tokens."""
    kinds = TABLE_DTYPES.get(dtype, (dtype,))
    where: dict[str, Any] = {"batch": 1, "direction": "forward"}
    kind = next((kind for kind in kinds if profile.select("gemm", dtype=kind, **where)), kinds[0])
    rows = profile.select("gemm", dtype=kind, m=_FEW, **where)
    return kind, framework_that_serves(rows, ("m", "n", "k"), backend, _HOST)
