"""How far work has come, as whoever asked for it wants to hear."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "no_progress"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the finished fraction (0..1)."""


def no_progress(_what: str, _done: float) -> None:
    """Report nothing."""
