"""How well tables predict themselves: every 4th grid point held out, beside the plain log-log line.

Rows are sorted by all names and then by size; each 4th of them is hidden, all rows alike, whatever they are
predicted to be. Marked rows serve like the others here, but not those of kernels that timed something else than they
say (:data:`~moeplan.artifacts.profile_tables.MISMEASURED`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moeplan.artifacts.profile import USABLE_MARKS
from moeplan.artifacts.profile_tables import MISMEASURED
from moeplan.costs.interpolation import GridInterpolator, Steps
from moeplan.costs.waves import active_experts

__all__ = ["AXES", "PARTS", "HeldOut", "families", "hidden_rows", "hold_out", "pooled"]

Floats = NDArray[np.float64]

# Numeric axes a table is interpolated over, its size first.
AXES: dict[str, tuple[str, ...]] = {
    "experts": ("tokens", "ep", "tp", "skew"),
    "alltoall": ("tokens_per_rank", "sms", "top_k", "hidden", "nodes"),
    "collectives": ("message_size_bytes", "ranks"),
    "attention": ("context_tokens", "batch", "heads", "kv_heads"),
    "gemm": ("m", "n", "k"),
}
# Columns that name a kernel on a type: tables of their own.
_FAMILY: dict[str, tuple[str, ...]] = {
    "experts": ("dtype",),
    "alltoall": ("mode", "phase", "dtype"),
    "collectives": ("op", "dtype"),
    "attention": ("kind", "phase", "scope", "dtype", "kv_dtype"),
    "gemm": ("dtype", "source"),
}
PARTS = {"experts": "distribution", "alltoall": "mode", "collectives": "op", "attention": "phase", "gemm": "dtype"}
_NO_NAMES = {"mark", "samples", "rank_pairs", "active_experts", "rank_tokens", "vector", "query_tokens"}


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Relative errors of the held-out rows: ours, and the plain line's (nan where it has no two ends).

    ``part`` is what :data:`PARTS` names: distribution, mode, operation, phase or type. ``marked`` rows are scored
    here, but do not serve plans. ``mismeasured`` more rows were held out and left out, since their kernel timed
    something else.
    """

    backend: NDArray[np.str_]
    part: NDArray[np.str_]
    ours: Floats
    plain: Floats
    inside: NDArray[np.bool_]
    marked: NDArray[np.bool_]
    mismeasured: int = 0

    def figures(
        self, backend: str | None = None, part: str | None = None, serving: bool = False
    ) -> dict[str, float | int | None]:
        """Count, coverage, median and 90th percentile of both; the comparison on points that both cover. None where
        there are none. ``serving``: of rows without a mark, as plans use them."""
        mine = ~self.marked if serving else np.ones(len(self.ours), bool)
        mine &= True if backend is None else self.backend == backend
        mine &= True if part is None else self.part == part
        ours, plain = np.abs(self.ours[mine]), np.abs(self.plain[mine])
        both = np.isfinite(ours) & np.isfinite(plain)
        known = ours[np.isfinite(ours)]
        return {
            "held_out": int(mine.sum()),
            "coverage": float(self.inside[mine].mean()) if mine.any() else None,
            "median": _quantile(known, 0.5),
            "p90": _quantile(known, 0.9),
            "plain_coverage": float(np.isfinite(plain).mean()) if mine.any() else None,
            "plain_median": _quantile(plain[both], 0.5),
            "plain_p90": _quantile(plain[both], 0.9),
            "median_on_plain": _quantile(ours[both], 0.5),
            "p90_on_plain": _quantile(ours[both], 0.9),
        }


def pooled(parts: list[HeldOut]) -> HeldOut:
    """Rows of several systems as one."""
    names = ("backend", "part", "ours", "plain", "inside", "marked")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return HeldOut(**columns, mismeasured=sum(part.mismeasured for part in parts))


def _quantile(values: Floats, part: float) -> float | None:
    return float(np.quantile(values, part)) if len(values) else None


def _codes(table: pa.Table, columns: list[str]) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = np.zeros(table.num_rows, np.int64)
    for column in columns:
        values = table[column].combine_chunks()
        if pa.types.is_string(values.type):
            values = values.dictionary_encode()
        if pa.types.is_dictionary(values.type):
            codes = values.indices.to_numpy().astype(np.int64)
        else:
            codes = np.unique(values.to_numpy(), return_inverse=True)[1]
        ids = np.unique(ids * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]
    return ids


def _skew(table: pa.Table) -> Floats:
    """Distributions as numbers: 1 balanced, then by exponent; eplb variants apart."""
    names = table["distribution"].to_pylist()
    order = {name: i + 1.0 for i, name in enumerate(sorted(set(names), key=_exponent))}
    return np.array([order[name] for name in names])


def _exponent(name: str) -> tuple[bool, float]:
    parts = name.split("_")
    numbers = [float(p) for p in parts if p.replace(".", "", 1).isdigit()]
    return parts[-1] == "eplb", numbers[0] if numbers else 0.0


def hidden_rows(name: str, table: pa.Table, first: int = 2) -> NDArray[np.bool_]:
    """Each 4th row from number ``first`` on, in the order of all names and then of size."""
    numbers = {c for c in table.column_names if pa.types.is_floating(table[c].type)}
    size = AXES[name][0]
    lines = _codes(table, [c for c in table.column_names if c not in {size, *_NO_NAMES, *numbers}])
    hidden = np.zeros(table.num_rows, bool)
    hidden[np.lexsort((table[size].to_numpy(), lines))[first::4]] = True
    return hidden


def families(name: str, table: pa.Table) -> NDArray[np.int64]:
    """Number of each row's kernel on a type: a table of its own."""
    return _codes(table, ["backend", "kernel", *_FAMILY[name]])


def hold_out(name: str, table: pa.Table, steps: Steps | None = None, first: int = 2) -> HeldOut:
    """Predict each 4th row of ``table`` from the others; ``steps`` as :class:`GridInterpolator` takes them, ``first``
    as :func:`hidden_rows`."""
    axes = AXES[name]
    coords = [_skew(table) if a == "skew" else table[a].to_numpy().astype(float) for a in axes]
    coords_nA = np.maximum(np.stack(coords, 1), 0.5)
    numbers = {c for c in table.column_names if pa.types.is_floating(table[c].type)}
    skip = {*axes, *_NO_NAMES, *numbers} | ({"distribution"} if name == "experts" else set())
    skip |= {"ranks"} if name == "alltoall" else set()
    series = _codes(table, [c for c in table.column_names if c not in skip])
    if name == "experts":
        rows = np.unique(series, return_index=True)[1]
        steps = active_experts(*(table[column].to_numpy()[rows] for column in ("num_experts", "top_k")))
    family, hidden = families(name, table), hidden_rows(name, table, first)
    mark = np.array(table["mark"].to_pylist())
    own = ~np.isin(mark, MISMEASURED)
    left_out = int((hidden & ~own).sum())
    known, hidden = ~hidden & own, hidden & own
    latency = table["latency_us"].to_numpy()
    ours, plain = np.full(len(latency), np.nan), np.full(len(latency), np.nan)
    inside = np.zeros(len(latency), bool)
    for number in range(family.max(initial=-1) + 1):
        train = np.flatnonzero((family == number) & known)
        test = np.flatnonzero((family == number) & hidden)
        test = test[np.isin(series[test], series[train])]
        if not len(test):
            continue
        model = GridInterpolator(series[train], coords_nA[train], latency[train], steps=steps)
        answer = model.predict(series[test], coords_nA[test])
        ours[test], inside[test] = answer.latency_us / latency[test] - 1, answer.inside
        plain[test] = model.plain(series[test], coords_nA[test]) / latency[test] - 1
    backend = np.array(table["backend"].to_pylist())
    part = np.array(table[PARTS[name]].to_pylist())
    marked = ~np.isin(mark, USABLE_MARKS)
    return HeldOut(
        backend[hidden], part[hidden], ours[hidden], plain[hidden], inside[hidden], marked[hidden], left_out
    )
