"""What an engine must know of its costs."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.costs.passes import Batch, StepSeconds
from moeplan.specs.cluster import ClusterSpec

__all__ = ["StepCosts"]

Floats = NDArray[np.float64]


class StepCosts(Protocol):
    """:class:`moeplan.costs.serving.ServingCosts` are those of a model."""

    groups: int
    cluster: ClusterSpec
    source: dict[str, str]
    extrapolated: set[str]
    part_errors: dict[str, float]  # the largest relative error of each part met so far

    def chunk_s(self, before: int, new: int) -> Floats:
        """Prefill attention over ``new`` tokens after ``before``: a row of :attr:`Batch.chunk_s_D4`."""
        ...

    def swap_s(self, size_bytes: float, to_host: bool) -> float:
        """A rank's part of a cache to its host, or back."""
        ...

    def step(self, batch: Batch, placement: Placement, load_LE: Floats) -> StepSeconds:
        """Seconds of a step."""
        ...

    def forget(self, placement: Placement) -> None:
        """The placement is no longer in use."""
        ...
