"""Bytes per second of passes over activations and parameters: measured where a profile has them, else the roofline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import DTYPE_BYTES

__all__ = ["Stream", "stream"]

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
