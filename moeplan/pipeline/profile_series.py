"""Rows of a profile's table as series over its size: which rows belong together, and how well sizes are predicted that
are held out. ``n`` rows of a table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.artifacts.profile_tables import MEASURED, columns_of
from moeplan.costs.interpolation import GridInterpolator
from moeplan.profiling.sanity import SIZE_AXIS, group_ids

__all__ = ["FOLLOWS", "NOT_KEY", "residuals", "series_of", "usable_rows"]

Floats = NDArray[np.float64]
NOT_KEY = {*MEASURED, "source", "mark"}
FOLLOWS = {"experts": {"rank_pairs", "active_experts", "rank_tokens", "vector"}, "attention": {"query_tokens"}}


def usable_rows(profile: HardwareProfile, name: str) -> pa.Table:
    """Rows with one size axis: expert rows of explicit vectors have none, and are left to others."""
    if name != "experts":
        return profile.select(name)
    kinds = set(profile.table(name)["distribution"].to_pylist()) - {"explicit"}
    return profile.select(name, distribution=kinds)


def series_of(name: str, table: pa.Table) -> NDArray[np.int64]:
    """One number per series: rows alike in all but their size and what follows from it."""
    skip = NOT_KEY | {SIZE_AXIS[name]} | FOLLOWS.get(name, set())
    return group_ids(table, [column for column in columns_of(name) if column not in skip])


def residuals(name: str, table: pa.Table, every: int) -> tuple[Floats, Floats]:
    """Predicted over measured minus 1 of held-out rows, by the cost model's interpolation and by plain log-log.

    Of each series every ``every``-th point is held out, its ends never; nan where a point is not held out.
    """
    series, size = series_of(name, table), table[SIZE_AXIS[name]].to_numpy().astype(float)
    measured = table["latency_us"].to_numpy()
    order = np.lexsort((size, series))
    place = np.empty(len(order), np.int64)
    starts = np.flatnonzero(np.r_[True, np.diff(series[order]) > 0])
    lengths = np.diff(np.r_[starts, len(order)])
    place[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    length = np.empty(len(order), np.int64)
    length[order] = np.repeat(lengths, lengths)
    held = (place % every == every // 2) & (place > 0) & (place < length - 1)
    own, plain = np.full(len(size), np.nan), np.full(len(size), np.nan)
    if held.any() and (~held).sum() >= 2:
        model = GridInterpolator(series[~held], size[~held, None], measured[~held])
        own[held] = model.predict(series[held], size[held, None]).latency_us / measured[held] - 1
        plain[held] = model.plain(series[held], size[held, None]) / measured[held] - 1
    return own, plain
