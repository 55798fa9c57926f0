"""Does a measured table make sense? One mark per row; nothing is judged by how well a model fits it.

- ``outlier``: lies more than :data:`OUTLIER` above or below the line (in logs) through its two neighbours on
  the size axis; or an exchange whose bandwidth per copy falls below half of that on half as many nodes.
- ``non_monotone``: some larger size of the same series takes less than :data:`FALL` of its time.
- ``skew_faster``: at large batch a skewed row is faster than :data:`FALL_SKEW` of the balanced row beside it;
  at small batch skew can really be faster, since fewer experts' weights are read.
- ``not_sharded``, of all rows at EP > 1 of a kernel: balanced at large batch and EP 8 it takes more than
  :data:`SHARDED` of its time at EP 1 (median). The rank was given choices of other ranks' experts too (SGLang 0.5.10:
  the collector sent them all to expert 0), or all experts.
- ``too_fast``: a balanced row of experts that would have read two matrices of each expert it hits faster than memory
  gives them: it hit fewer, or they were in a cache. Of attention in decode, all rows of a kernel where over
  :data:`FAST` of those that read more than any cache holds would have read it faster than memory gives it.
- ``host_bound``, of whole kernels: their shortest products (the shortest hundredth) take more than :data:`HOST` times
  as long (median) as the fastest product of another kernel of the type that is no smaller in any size. What was timed
  is the host's work for a call, whatever the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moeplan.artifacts.profile_tables import MEASURED, columns_of
from moeplan.costs.number_formats import WEIGHT_BYTES

__all__ = ["SIZE_AXIS", "group_ids", "mark_host_bound", "mark_rows", "too_fast"]

OUTLIER = 2.0
FALL = 0.8
FALL_SKEW = 0.95
LARGE_BATCH_TOKENS = 1024
SHARDED, SHARDED_TOKENS, SHARDED_ROWS = 0.75, 4096, 4  # public tables: 0.8 to 1 where due, at most 0.7 elsewhere
HOST = 5.0  # public tables: 7 to 45 where the host was timed, at most 3.6 elsewhere
FAST, UNCACHED_BYTES = 0.1, 5e8  # public tables: 0.57 of TensorRT-LLM 1.0.0's on A100, at most 0.01 elsewhere

SIZE_AXIS = {
    "experts": "tokens",
    "alltoall": "tokens_per_rank",
    "collectives": "message_size_bytes",
    "attention": "context_tokens",
    "gemm": "m",
    "elementwise": "tokens",
    "memory": "message_size_bytes",
}
_DEPENDENT = {
    "experts": {"rank_pairs", "active_experts", "rank_tokens", "vector"},
    "attention": {"query_tokens"},
}


def group_ids(table: pa.Table, columns: list[str]) -> NDArray[np.int64]:
    """One number per distinct combination of ``columns``."""
    ids: NDArray[np.int64] = np.zeros(table.num_rows, np.int64)
    for column in columns:
        values = table[column].combine_chunks()
        if pa.types.is_dictionary(values.type):
            codes = values.indices.to_numpy().astype(np.int64)
        else:
            codes = np.unique(values.to_numpy(zero_copy_only=False), return_inverse=True)[1]
        ids = np.unique(ids * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]
    return ids


def _series(name: str, table: pa.Table, without: set[str]) -> NDArray[np.int64]:
    skip = without | {SIZE_AXIS[name], "mark", *MEASURED} | _DEPENDENT.get(name, set())
    return group_ids(table, [column for column in columns_of(name) if column not in skip])


def _size_marks(size: NDArray[Any], log_us: NDArray[Any], ids: NDArray[Any]) -> tuple[Any, Any]:
    """(outlier, falls) per row, from the order of sizes within each series."""
    order = np.lexsort((size, ids))
    x, y, g = np.log(size[order]), log_us[order], ids[order]
    middle = np.flatnonzero((g[:-2] == g[2:]) & (x[:-2] < x[1:-1]) & (x[1:-1] < x[2:])) + 1
    weight = (x[middle] - x[middle - 1]) / (x[middle + 1] - x[middle - 1])
    line = (1 - weight) * y[middle - 1] + weight * y[middle + 1]
    off = np.zeros(len(x) + 2)
    off[middle + 1] = np.abs(y[middle] - line)
    # A spike bends its neighbours' lines too, by less: only the worst of three is the outlier.
    worst = (off[1:-1] >= off[:-2]) & (off[1:-1] >= off[2:])
    outlier = worst & (off[1:-1] > np.log(OUTLIER))
    # Smallest later time of the same series: offsetting each series far below the last makes one sweep do.
    span = np.ptp(y) + 1 if len(y) else 1.0
    floor = np.minimum.accumulate((y + g * span)[::-1])[::-1] - g * span
    falls = floor < y + np.log(FALL)
    back = np.empty(len(x), np.int64)
    back[order] = np.arange(len(x))
    return outlier[back], falls[back]


def _skew_marks(table: pa.Table, log_us: NDArray[Any], tokens: NDArray[Any]) -> Any:
    slots = _series("experts", table, {"distribution", "num_slots"})
    ids = np.unique(slots * (tokens.max(initial=0) + 1) + tokens, return_inverse=True)[1]
    even = np.array(table["distribution"].to_pylist()) == "balanced"
    reference = np.full(ids.max(initial=0) + 1, np.nan)
    reference[ids[even]] = log_us[even]
    with np.errstate(invalid="ignore"):
        faster = log_us < reference[ids] + np.log(FALL_SKEW)
    return ~even & (tokens >= LARGE_BATCH_TOKENS) & faster


def _sharding_marks(table: pa.Table, log_us: NDArray[Any], tokens: NDArray[Any]) -> Any:
    cases = _series("experts", table, {"ep"})
    cases = np.unique(cases * (tokens.max(initial=0) + 1) + tokens, return_inverse=True)[1]
    kernels, ep = group_ids(table, ["backend", "kernel", "dtype", "source"]), table["ep"].to_numpy()
    even = np.array(table["distribution"].to_pylist()) == "balanced"
    whole = np.full(cases.max(initial=-1) + 1, np.nan)
    whole[cases[even & (ep == 1)]] = log_us[even & (ep == 1)]
    rows = np.flatnonzero(even & (ep == 8) & (tokens >= SHARDED_TOKENS) & np.isfinite(whole[cases]))
    part = log_us[rows] - whole[cases[rows]]
    of = {k: part[kernels[rows] == k] for k in np.unique(kernels[rows])}
    bad = [k for k, logs in of.items() if len(logs) >= SHARDED_ROWS and np.median(logs) > np.log(SHARDED)]
    return (ep > 1) & np.isin(kernels, bad)


def _node_marks(table: pa.Table, log_us: NDArray[Any]) -> NDArray[np.bool_]:
    """Exchanges over a number of nodes at which bandwidth collapses against half as many.

    All rows of that phase and number of nodes: what slowed the largest sizes slowed the others too.
    """
    nodes = table["nodes"].to_numpy()
    # Copies a token sends to other nodes when its top-k falls evenly: (N - 1) (1 - (1 - 1/N)^K).
    remote = (nodes - 1) * (1 - (1 - 1 / nodes) ** table["top_k"].to_numpy())
    ids = _series("alltoall", table, {"nodes", "ranks", "tokens_per_rank"})
    sizes = table["tokens_per_rank"].to_numpy()
    at = {key: row for row, key in enumerate(zip(ids.tolist(), sizes.tolist(), nodes.tolist(), strict=True))}
    bad = np.zeros(table.num_rows, bool)
    largest = {key: max(s for i, s, n in at if (i, n) == key) for key in {(i, n) for i, _, n in at}}
    for (group, size, count), row in at.items():
        half = at.get((group, size, count // 2))
        # Only where bytes rule: at least half the series' largest size.
        if half is None or count < 4 or 2 * size < largest[group, count]:
            continue
        bad[row] = log_us[row] - log_us[half] > np.log(2 * remote[row] / remote[half])
    places = _series("alltoall", table, {"sms", "tokens_per_rank"})
    collapsed: NDArray[np.bool_] = np.isin(places, places[bad])
    return collapsed


def mark_rows(name: str, table: pa.Table) -> NDArray[np.str_]:
    """A mark per row, empty where it makes sense; of several not_sharded holds, or the first of the other three."""
    log_us = np.log(table["latency_us"].to_numpy())
    size = table[SIZE_AXIS[name]].to_numpy()
    outlier, falls = _size_marks(size, log_us, _series(name, table, set()))
    if name == "alltoall":
        outlier |= _node_marks(table, log_us)
    marks = np.where(outlier, "outlier", np.where(falls, "non_monotone", ""))
    if name == "experts":
        marks = np.where((marks == "") & _skew_marks(table, log_us, size), "skew_faster", marks)
        marks = np.where(_sharding_marks(table, log_us, size), "not_sharded", marks)
    return marks


def too_fast(name: str, table: pa.Table, bandwidth_bytes_per_s: float) -> NDArray[np.bool_]:
    """Rows that a memory of this bandwidth cannot have given what they read."""
    read = _weights_read(table) if name == "experts" else _cache_read(table)
    fast: NDArray[np.bool_] = table["latency_us"].to_numpy() * 1e-6 < read / bandwidth_bytes_per_s
    if name == "experts":
        return fast
    kernels = group_ids(table, ["backend", "kernel", "dtype", "kv_dtype", "kind", "phase", "source"])
    large = read > UNCACHED_BYTES
    share = np.bincount(kernels, fast & large) / np.maximum(1, np.bincount(kernels, large))
    whole: NDArray[np.bool_] = (share > FAST)[kernels]
    return whole


def _weights_read(table: pa.Table) -> NDArray[np.float64]:
    """Bytes of two matrices of each expert hit."""
    active, hidden, inter, tp = (
        table[name].to_numpy().astype(float) for name in ("active_experts", "hidden", "inter", "tp")
    )
    each = np.array([WEIGHT_BYTES.get(name, 0.0) for name in table["dtype"].to_pylist()])
    read: NDArray[np.float64] = 2 * np.maximum(active, 0.0) * hidden * inter / tp * each
    return read


def _cache_read(table: pa.Table) -> NDArray[np.float64]:
    """Bytes of keys and values that grouped-query attention sees in decode; 0 for other rows."""
    context, window, batch, heads, size = (
        table[name].to_numpy().astype(float)
        for name in ("context_tokens", "window", "batch", "kv_heads", "head_dim")
    )
    known = zip(*(table[name].to_pylist() for name in ("kind", "phase", "scope", "kv_dtype")), strict=True)
    each = [WEIGHT_BYTES.get(dtype, 0.0) * ((*of,) == ("gqa", "decode", "kernel")) for *of, dtype in known]
    seen = np.where(window > 0, np.minimum(window, context), context)
    read: NDArray[np.float64] = 2 * batch * seen * heads * size * np.array(each)
    return read


def mark_host_bound(table: pa.Table) -> pa.Table:
    """The products of all frameworks of one system, with the mark ``host_bound`` where it is due."""
    kernels = group_ids(table, ["dtype", "backend", "kernel", "source"])
    alike = group_ids(table, ["dtype", "batch", "direction"])
    latency = table["latency_us"].to_numpy()
    sizes = np.stack([table[axis].to_numpy() for axis in ("m", "n", "k")])
    marks = np.array(table["mark"].to_pylist(), object)
    for kernel in np.unique(kernels):
        own = np.flatnonzero(kernels == kernel)
        others = np.flatnonzero((kernels != kernel) & np.isin(alike, alike[own]))
        their_sizes, their_latency, theirs = sizes[:, others], latency[others], alike[others]
        longer = []
        for row in own[np.argsort(latency[own], kind="stable")[: -(-len(own) // 100)]]:
            no_smaller = (their_sizes >= sizes[:, [row]]).all(0) & (theirs == alike[row])
            longer.append(latency[row] / their_latency[no_smaller].min(initial=np.inf))
        if np.median(longer) > HOST:
            marks[own] = "host_bound"
    return table.set_column(table.column_names.index("mark"), "mark", pa.array(marks, pa.string()))
