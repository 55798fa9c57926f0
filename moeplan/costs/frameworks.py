"""Frameworks that a backend may name, and whose measured rows stand for one: its own, unless they time something else
than its servers run."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moeplan.artifacts.profile import HardwareProfile
from moeplan.errors import UnknownNameError

__all__ = ["FRAMEWORKS", "FRAMEWORK_TABLES", "framework_that_serves", "require_backend"]

FRAMEWORKS = ("sglang", "trtllm", "vllm")
FRAMEWORK_TABLES = ("experts", "gemm", "attention")
"""Tables whose rows are chosen by framework."""


def require_backend(where: str, backend: str | None, profile: HardwareProfile | None) -> None:
    """``backend``, of the field ``where``, is a framework that is known or that the profile has rows of.

    Raises:
        UnknownNameError: it is neither; says which are.
    """
    if backend is not None and backend not in (known := _known(profile)):
        raise UnknownNameError(where, backend, known)


@lru_cache(maxsize=64)
def _known(profile: HardwareProfile | None) -> frozenset[str]:
    tables = [] if profile is None else [profile.select(table) for table in FRAMEWORK_TABLES]
    return frozenset(FRAMEWORKS).union(*(pc.unique(rows["backend"]).to_pylist() for rows in tables))


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
