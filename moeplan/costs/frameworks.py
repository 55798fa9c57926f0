"""Whose measured rows stand for a framework: its own, unless they time something else than its servers run."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa

__all__ = ["framework_that_serves"]


def framework_that_serves(rows: pa.Table, axes: tuple[str, ...], own: str | None, limit: float) -> str | None:
    """``own`` if it has rows that take at most ``limit`` times as long as the fastest framework's at the points that
    all share (median), else the framework with the fastest; None without rows. ``axes`` tell points apart."""
    took: dict[str, dict[tuple[object, ...], float]] = defaultdict(dict)
    for name, us, *at in zip(*(rows[c].to_pylist() for c in ("backend", "latency_us", *axes)), strict=True):
        took[name][tuple(at)] = min(us, took[name].get(tuple(at), us))
    if not took:
        return None
    shared = set.intersection(*(set(of) for of in took.values()))
    fastest = {at: min(of[at] for of in took.values()) for at in shared}
    slower = {name: float(np.median([of[at] / us for at, us in fastest.items()] or [1.0])) for name, of in took.items()}
    if own is not None and slower.get(own, np.inf) <= limit:
        return own
    return min(slower, key=lambda name: slower[name])
