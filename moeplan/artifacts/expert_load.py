"""Expert loads: how many tokens each expert got. ``W`` windows, ``L`` layers, ``E`` experts, ``S`` source ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import TraceError

__all__ = ["ExpertLoad"]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoad:
    """Token counts per window, layer and expert, and what is known beyond counts.

    ``load_WLE`` counts selections (a token counts once for each of its experts). ``windows`` names them
    (a domain, a phase, a stretch of time). ``trace`` keeps the token-level choices where the input had them:
    distinct ranks and nodes per token, and layer-to-layer transitions, cannot be had from counts alone.
    ``window_T`` is the window of each token of ``trace``. ``source_SLE`` counts selections by the rank they came from,
    where recorded. ``transitions_LEE`` (``L-1`` of them) is given where the input had transition counts but no tokens.
    """

    load_WLE: NDArray[np.float64]
    windows: tuple[str, ...]
    layer_ids: tuple[int, ...]
    top_k: int | None = None
    trace: RoutingTrace | None = None
    window_T: NDArray[np.integer[Any]] | None = None
    source_SLE: NDArray[np.float64] | None = None
    transitions_LEE: NDArray[np.float64] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.load_WLE.shape
        if len(shape) != 3 or 0 in shape:
            raise TraceError(f"load has shape {shape}; it must be [windows, layers, experts] and not empty")
        if len(self.windows) != shape[0]:
            raise TraceError(f"windows names {len(self.windows)} but load has {shape[0]} (axis 0)")
        if len(self.layer_ids) != shape[1]:
            raise TraceError(f"moe_layers has {len(self.layer_ids)} entries but load has {shape[1]} layers (axis 1)")
        if not np.isfinite(self.load_WLE).all():
            w, l, e = (int(i[0]) for i in np.nonzero(~np.isfinite(self.load_WLE)))
            raise TraceError(f"load at window {w}, layer {l}, expert {e} is not finite; counts must be numbers")
        if self.load_WLE.max() > 2**53:
            w, l, e = (int(i[0]) for i in np.nonzero(self.load_WLE > 2**53))
            raise TraceError(f"load at window {w}, layer {l}, expert {e} is above 2^53; counts are of tokens")
        if (self.load_WLE < 0).any():
            w, l, e = (int(i[0]) for i in np.nonzero(self.load_WLE < 0))
            raise TraceError(f"load at window {w}, layer {l}, expert {e} is negative; counts must be 0 or more")
        empty = np.nonzero(self.load_WLE.sum(axis=(0, 2)) == 0)[0]
        if len(empty):
            raise TraceError(f"layer {self.layer_ids[int(empty[0])]} has no tokens at all; drop it or record again")

    @property
    def load_LE(self) -> NDArray[np.float64]:
        """All windows together."""
        total: NDArray[np.float64] = self.load_WLE.sum(axis=0)
        return total

    @property
    def num_layers(self) -> int:
        """``L``."""
        return int(self.load_WLE.shape[1])

    @property
    def num_experts(self) -> int:
        """``E``."""
        return int(self.load_WLE.shape[2])
