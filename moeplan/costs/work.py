"""What slower ranks and links make of a time, by one rule for steps, services and training.

- What a rank computes takes ``1 / speed`` of it. Whoever works together waits for the slowest: ranks of a collective
  for each other, and in every layer all ranks, since all exchange with all.
- Parts that a group does one after the other without waiting for another group take what the slowest group needs for
  all of them (:func:`in_turn`), not each what its own slowest does.
- Of a collective the bytes take ``1 / link_speed`` at the slowest link of the group: each rank of a ring passes on all
  of them, and each NIC of a node carries one channel of the ring. What it takes besides stays: launches are the
  host's, hops the network's. So do its reductions: they move three bytes of memory for one of a link, and an H100
  moves six in that time, so they would only show below half its speed.
- Dispatch and combine are costed by copies (:mod:`moeplan.costs.exchange`): those of a rank, and those of a NIC
  (:mod:`moeplan.costs.nics`), take ``1 / link_speed``. The fixed part stays.
- What pipeline stages send on takes ``1 / link_speed`` where it comes in over a slow link and where it goes on over it.
- A cache that goes to another pool takes ``1 / link_speed`` at the slowest rank of the group that it leaves, or that it
  comes to.
- Inside a rank, and between it and its host, ``link_speed`` means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.tables import Seconds
from moeplan.specs.cluster import ClusterSpec

__all__ = ["Work", "in_turn", "link_speeds", "speeds", "working"]


def working(cluster: ClusterSpec) -> NDArray[np.bool_]:
    """Ranks that have not failed ``[R]``."""
    return np.array([not cluster.rank(r).failed for r in range(cluster.num_ranks)])


def speeds(cluster: ClusterSpec) -> NDArray[np.float64]:
    """Relative speed of each rank."""
    return np.array([cluster.rank(r).speed for r in range(cluster.num_ranks)], dtype=np.float64)


def link_speeds(cluster: ClusterSpec) -> NDArray[np.float64]:
    """Part of the links' usual bandwidth that each rank has; 1 where it has failed, as its link is not used."""
    ranks = map(cluster.rank, range(cluster.num_ranks))
    return np.array([1.0 if rank.failed else rank.link_speed for rank in ranks], dtype=np.float64)


def in_turn(seconds_GP: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each of ``P`` parts adds to the time of the slowest of ``G`` groups that do them in this order and wait for
    each other after the last: together the largest sum of a group."""
    added_P: NDArray[np.float64] = seconds_GP.cumsum(1).max(0)
    added_P[1:] -= added_P[:-1].copy()
    return added_P


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds at usual speeds. Of ``total_s``, ``elsewhere_s`` pass in collectives and on the host; of those ``wire_s``
    move bytes over links."""

    total_s: float = 0.0
    elsewhere_s: float = 0.0
    wire_s: float = 0.0

    @classmethod
    def of(cls, parts: Iterable[Seconds]) -> Work:
        """One after another."""
        answer = cls()
        for part in parts:
            elsewhere = (0.0, 0.0) if part.wire is None else (part.total, float(part.wire.sum()))
            answer += cls(part.total, *elsewhere)
        return answer

    @property
    def computed_s(self) -> float:
        """The rest."""
        return self.total_s - self.elsewhere_s

    def __add__(self, other: Work) -> Work:
        return Work(
            self.total_s + other.total_s, self.elsewhere_s + other.elsewhere_s, self.wire_s + other.wire_s
        )

    def __mul__(self, factor: float) -> Work:
        return Work(factor * self.total_s, factor * self.elsewhere_s, factor * self.wire_s)

    def at(self, speed: Any, link_speed: Any) -> Any:
        """Seconds where the slowest rank and link of those that work together have these speeds, numbers or arrays."""
        return self.total_s + self.computed_s * (1 / speed - 1) + self.wire_s * (1 / link_speed - 1)
