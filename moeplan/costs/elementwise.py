"""Passes over activations and parameters: seconds and bytes per second, measured where a profile has them, else by the
roofline.

``T`` tokens, ``H`` hidden, ``E`` experts, ``K`` top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.number_formats import table_dtypes
from moeplan.costs.tables import Seconds, TableCosts
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype

__all__ = ["PassCosts", "Stream", "stream"]

Floats = NDArray[np.float64]
Pass = Literal["router", "permute", "unpermute", "norm", "embedding"]

# Reads and writes of a number per pass: a norm's input and output; with them the gradient in its backward; weight,
# gradient and two moments in a step of Adam, all but the gradient written back.
_MOVED = {("norm", "forward"): 2, ("norm", "backward"): 3, ("optimizer", "forward"): 7}


@dataclass(frozen=True, slots=True)
class Stream:
    """A bandwidth, where it is from, whether it was measured, and how far measured sizes lie from it."""

    bytes_per_s: float
    source: str
    measured: bool
    relative_error: float = roofline.RELATIVE_ERROR


@lru_cache(maxsize=256)
def stream(profile: HardwareProfile | None, accelerator: AcceleratorSpec, op: str, direction: str) -> Stream:
    """Bandwidth of ``norm`` (either direction) or ``optimizer`` (forward) at the largest sizes measured.

    The median over sizes of at least half the largest.
    """
    rows = profile.select("elementwise", op=op, direction=direction) if profile is not None else None
    if rows is None or not rows.num_rows:
        bandwidth = roofline.MEMORY_EFFICIENCY * accelerator.memory_bandwidth
        return Stream(bandwidth, f"roofline of {accelerator.name}", False)
    width = np.array([DTYPE_BYTES[dtype] for dtype in rows["dtype"].to_pylist()])
    moved = _MOVED[op, direction] * width * rows["tokens"].to_numpy() * rows["hidden"].to_numpy()
    large = 2 * moved >= moved.max()
    each = moved[large] / rows["latency_us"].to_numpy()[large] * 1e6
    bandwidth, first = float(np.median(each)), int(np.flatnonzero(large)[0])
    source = f"measured: {rows['source'][first].as_py()} ({rows['kernel'][first].as_py()})"
    return Stream(bandwidth, source, True, float(np.expm1(np.abs(np.log(each / bandwidth)).max())))


class PassCosts:
    """Passes over tokens of one ``H`` in the type of activations: the router's choice among ``E`` (softmax and top-k,
    without its product), rows brought into the order of experts and back, a norm, rows of the embedding.

    Measured ones serve at the ``H``, ``E`` and ``K`` that they were measured at.
    """

    def __init__(
        self,
        accelerator: AcceleratorSpec,
        dtype: Dtype,
        hidden: int,
        num_experts: int,
        top_k: int,
        profile: HardwareProfile | None = None,
    ) -> None:
        self._bandwidth = roofline.MEMORY_EFFICIENCY * accelerator.memory_bandwidth
        self._device, self._profile, self._dtype = accelerator.name, profile, dtype
        self._shape = {"hidden": hidden, "num_experts": num_experts, "top_k": top_k}

    def seconds(self, op: Pass, tokens: Any) -> Seconds:
        """One pass over ``tokens``."""
        shape, wide = self._shape, DTYPE_BYTES[self._dtype]
        routed = op in ("router", "permute", "unpermute")
        names: dict[str, Any] = {"op": op, "direction": "forward", **(shape if routed else {"hidden": shape["hidden"]})}
        rows = shape["top_k"] if op in ("permute", "unpermute") else 1
        width = shape["num_experts"] if op == "router" else shape["hidden"]

        def law(size: Floats) -> Floats:
            seconds: Floats = 2 * wide * rows * width * size[:, 0] / self._bandwidth
            return seconds

        def table(dtype: str) -> TableCosts:
            return TableCosts(self._profile, "elementwise", ("tokens",), names | {"dtype": dtype}, law, self._device)

        tables = [table(dtype) for dtype in table_dtypes(self._dtype)]
        return next((each for each in tables if each.measured), tables[0]).seconds(tokens)
