"""Recorded requests: when they came, how long prompt and answer were, and which prompts begin alike. ``Q`` requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import TraceError

__all__ = ["RequestTrace"]


@dataclass(frozen=True, slots=True, eq=False)
class RequestTrace:
    """Requests in order of arrival.

    ``arrival_s_Q`` counts from the first; None where the recording has no times. ``prefix_Q`` holds, for each request,
    ids of its prompt's blocks of ``prefix_tokens`` tokens: two prompts whose first ids agree begin with the same
    tokens. None where unknown.
    """

    input_tokens_Q: NDArray[np.int64]
    output_tokens_Q: NDArray[np.int64]
    arrival_s_Q: NDArray[np.float64] | None = None
    prefix_Q: tuple[tuple[int, ...], ...] | None = None
    prefix_tokens: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.input_tokens_Q) == 0:
            raise TraceError("requests: the recording holds none; zero arrivals leave nothing to simulate")
        for name in ("input_tokens", "output_tokens"):
            tokens = getattr(self, f"{name}_Q")
            if tokens.min() < 1:
                raise TraceError(f"request {int(tokens.argmin())}: {name} ({tokens.min()}) must be 1 or more")
        if self.arrival_s_Q is not None:
            if not np.isfinite(self.arrival_s_Q).all():
                raise TraceError("arrival times hold NaN or infinite values")
            if (np.diff(self.arrival_s_Q) < 0).any():
                late = int((np.diff(self.arrival_s_Q) < 0).argmax()) + 1
                raise TraceError(f"request {late} arrives before the one above it; sort the recording by time")

    def __len__(self) -> int:
        return len(self.input_tokens_Q)
