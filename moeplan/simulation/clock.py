"""Simulated time: whole nanoseconds, and an order for what happens at one instant.

SimPy's event key is (time, priority, sequence). Times are integers, so that equal times are equal, and every event
states its priority, :class:`Order`; among equals the one scheduled first comes first.
"""

from __future__ import annotations

from enum import IntEnum

import simpy

__all__ = ["Clock", "Order", "nanoseconds"]


class Order(IntEnum):
    """What goes first when times are equal; SimPy's own (0 urgent, 1 normal) go before all of these."""

    FAULT = 10
    ARRIVAL = 20
    TRANSFER = 30
    STEP = 40
    REBALANCE = 50
    START = 60


def nanoseconds(seconds: float) -> int:
    """Seconds as simulated time."""
    return round(seconds * 1e9)


class Clock(simpy.Environment):
    """An environment whose ``now`` is an integer of nanoseconds."""

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return float(self.now) * 1e-9

    @property
    def pending(self) -> int:
        """Events that are still to come."""
        return len(self._queue)

    def at(self, time_ns: int, order: Order) -> simpy.Event:
        """An event at an instant, no earlier than now."""
        event = simpy.Event(self)
        event._ok, event._value = True, None
        self.schedule(event, order, max(0, time_ns - int(self.now)))  # type: ignore[arg-type]
        return event
