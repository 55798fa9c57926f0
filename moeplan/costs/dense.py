"""Seconds of dense products on one rank.

Scaled by blocks and by tensor are different kernels: of the kinds of a type the first that is measured serves alone.

``m`` tokens, ``n`` columns, ``k`` inner size of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.fastest import FastestTable
from moeplan.costs.frameworks import framework_that_serves
from moeplan.costs.number_formats import table_dtypes
from moeplan.costs.tables import Seconds, TableCosts
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, activations_beside

__all__ = ["DenseCosts", "Direction"]

Floats = NDArray[np.float64]
Direction = Literal["forward", "backward"]

# Kernels of two frameworks differ by up to 2.8 (median over weights); vLLM's block-scaled ones, timed with the host's
# work for each call, by 4 to 50, whatever the tokens.
_HOST = 3.0
_FEW = (1, 4, 16, 64)


class DenseCosts:
    """Products with weights of one type on one device, or their backward; measured where the profile has them.

    Rows are those of ``backend``; of the framework with the fastest products of few tokens where none is named, or
    where the named one has none or takes over ``_HOST`` times as long: then it has timed its host, not the kernel.
    """

    def __init__(
        self,
        accelerator: AcceleratorSpec,
        dtype: Dtype,
        profile: HardwareProfile | None = None,
        backend: str | None = None,
        direction: Direction = "forward",
    ) -> None:
        self.activations = activations_beside(dtype)
        law = _law(accelerator, dtype)
        none: tuple[str, str | None] = dtype, None
        kind, framework = none if profile is None else _kind_and_framework(profile, dtype, backend, direction)
        names: dict[str, Any] = {"dtype": kind, "batch": 1, "direction": direction}
        names |= {"backend": framework} if framework else {}
        self._of = (profile, accelerator, dtype, backend)
        self._products = TableCosts(profile, "gemm", ("m", "n", "k"), names, law, accelerator.name)
        self.measured = self._products.measured

    def product(self, tokens: Any, columns: Any, inner: Any) -> Seconds:
        """``[m, k] x [k, n]``."""
        return self._products.seconds(tokens, columns, inner)

    def batched(self, tokens: Any, count: float, columns: int, inner: int) -> Seconds | None:
        """``count`` independent products ``[m, k] x [k, n]`` in one call, weights of the own type or of 16 bits,
        whichever was measured to be quicker; None where none was."""
        table = _batched(*self._of, columns, inner)
        return None if table is None else table.told(tokens, count)

    def ffn(self, tokens: Any, hidden: int, inter: float, gated: bool) -> Seconds:
        """Up (and gate) and down products of a feed-forward block, on the last axis."""
        widths = np.array([inter * (2 if gated else 1), hidden])
        return self.product(np.asarray(tokens, float)[..., None], widths, np.array([hidden, inter]))


def _law(accelerator: AcceleratorSpec, dtype: Dtype) -> Callable[[Floats], Floats]:
    """Roofline seconds of products at ``[q, (m, n, k)]``."""
    bandwidth = roofline.MEMORY_EFFICIENCY * accelerator.memory_bandwidth
    width, wide = DTYPE_BYTES[dtype], DTYPE_BYTES[activations_beside(dtype)]
    flops = roofline.matmul_flops(accelerator, dtype)

    def law(mnk: Floats) -> Floats:
        m, n, k = mnk.T
        moved = (n * k * width + wide * m * (n + k)) / bandwidth
        seconds: Floats = np.maximum(moved, 2 * m * n * k / flops)
        return seconds

    return law


@lru_cache(maxsize=64)
def _batched(
    profile: HardwareProfile | None,
    accelerator: AcceleratorSpec,
    dtype: Dtype,
    backend: str | None,
    columns: int,
    inner: int,
) -> FastestTable | None:
    """Several products of one size in one call; None where they were not measured."""
    types = sorted({*table_dtypes(dtype), *table_dtypes(activations_beside(dtype))})
    names: dict[str, Any] = {"n": columns, "k": inner, "dtype": types, "direction": "forward"}
    rows = None if profile is None else profile.select("gemm", **names)
    if rows is None or not (several := rows.filter(pc.greater(rows["batch"], 1))).num_rows:
        return None
    one = _law(accelerator, dtype)

    def law(coords: Floats) -> Floats:
        m, batch = coords.T
        seconds: Floats = batch * one(np.stack([m, np.full_like(m, columns), np.full_like(m, inner)], -1))
        return seconds

    names["kernel"] = pc.unique(several["kernel"]).to_pylist()
    owners: list[dict[str, Any]] = [{"backend": backend}] if backend else []
    return FastestTable(profile, "gemm", ("m", "batch"), names, law, accelerator.name, (*owners, {}))


@lru_cache(maxsize=256)
def _kind_and_framework(
    profile: HardwareProfile, dtype: Dtype, backend: str | None, direction: Direction
) -> tuple[str, str | None]:
    """The kind of ``dtype`` in the tables and whose rows serve; None without rows of few tokens."""
    kinds = table_dtypes(dtype)
    where: dict[str, Any] = {"batch": 1, "direction": direction}
    kind = next((kind for kind in kinds if profile.select("gemm", dtype=kind, **where).num_rows), kinds[0])
    rows = profile.select("gemm", dtype=kind, m=_FEW, **where)
    return kind, framework_that_serves(rows, ("m", "n", "k"), backend, _HOST)
