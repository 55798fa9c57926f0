"""What an engine instance counts while it runs. ``R`` ranks."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["InstanceStats"]

Floats = NDArray[np.float64]


@dataclass(slots=True, eq=False)
class InstanceStats:
    """What an instance did. ``busy_R``: seconds in which a rank computed; ``exposed_s``: exchange that nothing hid.

    ``gaps``: nanoseconds between two times at which a sequence has tokens -> how often; ``decoded`` tokens in so many
    ``sequence_steps``, a step of one decoding sequence each. One entry of ``start_s``, ``length_s`` and
    ``tokens`` per step; of the ``at`` arrays whenever a request or a step comes, or the last one ends: what then holds.
    """

    busy_R: Floats
    stepping_s: float = 0.0
    exposed_s: float = 0.0
    stalled_s: float = 0.0
    steps: int = 0
    prefilled: int = 0
    generated: int = 0
    decoded: int = 0
    sequence_steps: int = 0
    reused: int = 0
    recomputed: int = 0
    preemptions: int = 0
    transferred_bytes: float = 0.0
    swapped_bytes: float = 0.0
    migrated_bytes: float = 0.0
    gaps: dict[int, int] = field(default_factory=dict)
    start_s: array[float] = field(default_factory=lambda: array("d"))
    length_s: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))
    at_s: array[float] = field(default_factory=lambda: array("d"))
    running_at: array[float] = field(default_factory=lambda: array("d"))
    waiting_at: array[float] = field(default_factory=lambda: array("d"))
    cache_at: array[float] = field(default_factory=lambda: array("d"))

    def gap(self, gap_ns: int, count: int) -> None:
        """``count`` sequences had tokens ``gap_ns`` after the ones before."""
        self.gaps[gap_ns] = self.gaps.get(gap_ns, 0) + count

    def brought(self, tokens: int, sequences: int) -> None:
        """A step brought so many decoding sequences so many tokens together."""
        self.generated += tokens
        self.decoded += tokens
        self.sequence_steps += sequences

    def warmed_up(self) -> None:
        """Times count from now on."""
        self.busy_R = np.zeros_like(self.busy_R)
        self.stepping_s = self.exposed_s = 0.0
        self.decoded = self.sequence_steps = 0
        self.gaps = {}
