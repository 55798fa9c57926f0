"""Transfers that share links: a fluid model with max-min fair rates.

Every transfer in flight gets the largest rate such that no link is over its capacity and no transfer could have
more without taking from one that has less (Bertsekas and Gallager, Data Networks, 2nd ed., section 6.5.2). Rates
change when a transfer starts or ends, and at no other time.

``F`` transfers, ``X`` links.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import simpy
from numba import njit
from numpy.typing import NDArray

__all__ = ["Links", "max_min_rates"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_DONE = 1e-9  # part of a transfer below which it has arrived


@njit(cache=True, nogil=True)
def max_min_rates(start_F, links, capacity_X):
    """Fair rates ``[F]``. Transfer ``f`` uses ``links[start_F[f] : start_F[f + 1]]``; one without links is
    infinitely fast. By filling: the link with least capacity left per transfer decides first."""
    F = len(start_F) - 1
    rate_F = np.full(F, np.inf)
    open_F = np.ones(F, np.bool_)
    left_X = capacity_X.copy()
    using_X = np.zeros(len(capacity_X), np.int64)
    waiting = 0
    for f in range(F):
        if start_F[f] == start_F[f + 1]:
            open_F[f] = False
            continue
        waiting += 1
        for i in range(start_F[f], start_F[f + 1]):
            using_X[links[i]] += 1
    while waiting > 0:
        share = np.inf
        for x in range(len(left_X)):
            if using_X[x] > 0:
                share = min(share, left_X[x] / using_X[x])
        limit = share * (1 + 1e-12)
        full_X = np.zeros(len(left_X), np.bool_)
        for x in range(len(left_X)):
            full_X[x] = using_X[x] > 0 and left_X[x] / using_X[x] <= limit
        for f in range(F):
            if not open_F[f]:
                continue
            meets = False
            for i in range(start_F[f], start_F[f + 1]):
                meets = meets or full_X[links[i]]
            if meets:
                open_F[f] = False
                waiting -= 1
                rate_F[f] = share
                for i in range(start_F[f], start_F[f + 1]):
                    using_X[links[i]] -= 1
                    left_X[links[i]] = max(0.0, left_X[links[i]] - share)
    return rate_F


class Links:
    """The links of a cluster in a running simulation. ``moved_X``: bytes that have crossed each link."""

    def __init__(self, env: simpy.Environment, capacity_X: Floats) -> None:
        self._env, self._capacity_X = env, np.ascontiguousarray(capacity_X, float)
        self.moved_X = np.zeros(len(capacity_X))
        self._left_F = np.zeros(0)
        self._size_F = np.zeros(0)
        self._count_F = np.zeros(0, np.int64)
        self._links = np.zeros(0, np.int64)
        self._arrived: list[Callable[[int], None]] = []
        self._keys: list[int] = []
        self._wake = env.event()
        env.process(self._run())

    def send(
        self, count_F: Ints, links: Ints, size_bytes_F: Floats, keys: Sequence[int], arrived: Callable[[int], None]
    ) -> None:
        """Start transfers now; ``arrived(keys[f])`` is called when transfer ``f`` is through.

        ``links`` holds the links of all transfers one after another, ``count_F`` of them each.
        """
        self._count_F = np.concatenate([self._count_F, count_F])
        self._links = np.concatenate([self._links, links])
        self._left_F = np.concatenate([self._left_F, size_bytes_F])
        self._size_F = np.concatenate([self._size_F, size_bytes_F])
        self._keys.extend(keys)
        self._arrived.extend([arrived] * len(keys))
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        env = self._env
        while True:
            if not len(self._left_F):
                yield self._wake
            # What starts at the same instant is sent before rates are worked out.
            yield env.timeout(0)
            self._wake = env.event()
            starts = np.concatenate([[0], np.cumsum(self._count_F)])
            rate_F = max_min_rates(starts, self._links, self._capacity_X)
            began, known = env.now, len(rate_F)
            first = float((self._left_F / rate_F).min(initial=np.inf))
            yield env.timeout(first) | self._wake
            elapsed = first if env.now >= began + first * (1 - 1e-15) else env.now - began
            with np.errstate(invalid="ignore"):
                moved_F = np.where(np.isinf(rate_F), self._left_F[:known], rate_F * elapsed)
            np.add.at(self.moved_X, self._links[: starts[-1]], np.repeat(moved_F, self._count_F[:known]))
            self._left_F[:known] -= moved_F
            self._finish(known)

    def _finish(self, known: int) -> None:
        done_F = np.zeros(len(self._left_F), bool)
        done_F[:known] = self._left_F[:known] <= _DONE * self._size_F[:known]
        if not done_F.any():
            return
        calls = [(self._arrived[f], self._keys[f]) for f in np.flatnonzero(done_F)]
        stay = ~done_F
        self._links = self._links[np.repeat(stay, self._count_F)]
        self._count_F, self._left_F, self._size_F = self._count_F[stay], self._left_F[stay], self._size_F[stay]
        self._arrived = [call for call, keep in zip(self._arrived, stay, strict=True) if keep]
        self._keys = [key for key, keep in zip(self._keys, stay, strict=True) if keep]
        for call, key in calls:
            call(key)
