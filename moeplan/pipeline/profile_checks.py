"""Does a profile hold: files and sense, prediction of held-out and of fresh sizes; two side by side.

``n`` rows of a table.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.artifacts.profile_tables import columns_of
from moeplan.costs.expert_law import expert_weight_bytes, fit_experts
from moeplan.costs.interpolation import GridInterpolator
from moeplan.errors import ProfileError
from moeplan.pipeline.profile_peaks import peaks
from moeplan.pipeline.profile_series import NOT_KEY, residuals, usable_rows
from moeplan.profiling.sanity import SIZE_AXIS, group_ids, mark_rows
from moeplan.progress import Progress, no_progress

__all__ = ["check_profile", "diff_profiles", "vector_errors"]

Floats = NDArray[np.float64]
_PREDICTED = 0.10  # of a table worth keeping held-out sizes are off by no more in the median
_FORMS = {"collectives": ("algorithm", "op"), "alltoall": ("mode", "phase")}  # column of the form, and of what is done


def _figures(residual: Floats) -> dict[str, Any]:
    off = np.abs(residual[np.isfinite(residual)])
    if not len(off):
        return {"points": 0, "median": None, "p90": None}
    return {"points": len(off), "median": float(np.median(off)), "p90": float(np.quantile(off, 0.9))}


def _two_level(name: str, table: pa.Table, own: Floats) -> list[dict[str, Any]]:
    """Of each two-level form the residuals ``own`` of its held-out sizes, and its time over the flat form's by size."""
    if name not in _FORMS:
        return []
    column, op = _FORMS[name]
    form, size, us = (table[c].to_numpy() for c in (column, SIZE_AXIS[name], "latency_us"))
    skip = NOT_KEY | {SIZE_AXIS[name], column}
    series = group_ids(table, [c for c in columns_of(name) if c not in skip])
    answer = []
    for group in np.unique(series[form == "two_level"]):
        two, flat = (np.flatnonzero((series == group) & (form == of)) for of in ("two_level", "flat"))
        both, at_two, at_flat = np.intersect1d(size[two], size[flat], return_indices=True)
        over = us[two[at_two]] / us[flat[at_flat]]
        where = {c: table[c][int(two[0])].as_py() for c in (op, "ranks", "nodes")}
        over_flat = dict(zip(both.tolist(), over.tolist(), strict=True))
        answer.append({**where, "held_out": _figures(own[two]), "over_flat": over_flat})
    return answer


def vector_errors(profile: HardwareProfile) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """Rows of skewed vectors in forward direction, those of one shape and kernel at a time, and what the cost model,
    which sees the balanced ones alone, predicts for them over what was measured, less 1."""
    table = profile.select("experts", direction="forward")
    shape = group_ids(table, ["backend", "kernel", "hidden", "inter", "num_experts", "top_k", "tp", "dtype", "scope"])
    even = np.array(table["distribution"].to_pylist()) == "balanced"
    skewed = np.array(table["distribution"].to_pylist()) == "explicit"
    pairs, active = (table[c].to_numpy().astype(float) for c in ("rank_pairs", "active_experts"))
    seconds, vectors = table["latency_us"].to_numpy() * 1e-6, table["vector"].to_pylist()
    bandwidth = peaks(profile)[0] or np.inf
    for group in np.unique(shape[skewed]):
        rows = np.flatnonzero(even & (shape == group) & (active > 0))
        if len(rows) < 6:
            continue
        weight_s = expert_weight_bytes(table.slice(int(rows[0]), 1).to_pylist()[0]) / bandwidth
        fit = fit_experts(pairs[rows], active[rows], seconds[rows], "", weight_s)
        told = [row for row in np.flatnonzero(skewed & (shape == group)) if vectors[row]]
        if fit and told:
            counts = [np.array(vectors[row].split(), float) for row in told]
            predicted = np.array([float(fit.rank_s(each, each.mean())) for each in counts])
            yield np.array(told), predicted / seconds[told] - 1


def _vectors(profile: HardwareProfile) -> dict[str, Any] | None:
    """Skewed vectors predicted from balanced rows of the same shape and kernel, by the cost model."""
    off = [errors for _, errors in vector_errors(profile)]
    return _figures(np.concatenate(off)) if off else None


def check_profile(
    directory: Path, every: int = 4, fresh_s: float | None = None, progress: Progress = no_progress
) -> dict[str, Any]:
    """Read every table, count doubtful rows, predict every ``every``-th size from the others. ``warnings`` say what
    speaks against keeping the profile.

    With ``fresh_s`` sizes between the profile's are measured now, on the machine at hand.

    Raises:
        ProfileError: no profile, an older one, a changed or corrupt table; or ``fresh_s`` on another device.
    """
    profile = load_profile(directory)
    tables = {}
    for name in profile.table_names:
        whole = profile.table(name)
        part = usable_rows(profile, name)
        marks: Any = mark_rows(name, part) if part.num_rows > 2 else []
        own, plain = residuals(name, part, every)
        spread = whole["spread"].to_numpy()
        known = spread[np.isfinite(spread)]
        tables[name] = {
            "rows": whole.num_rows,
            "doubtful": dict(Counter(str(mark) for mark in marks if mark)),
            "held_out": {**_figures(own), "plain_median": _figures(plain)["median"]},
            "median_spread": float(np.median(known)) if len(known) else None,
            "two_level": _two_level(name, part, own),
        }
    warnings = profile.warnings + [
        f"held-out sizes of {name} are predicted to {median:.0%} in the median, above {_PREDICTED:.0%}: the grid is too"
        " coarse or the times too noisy; measure with a larger --budget"
        for name, entry in tables.items()
        if (median := entry["held_out"]["median"]) is not None and median > _PREDICTED
    ]
    return {
        "name": profile.meta.name,
        "device": profile.meta.device,
        "command": profile.meta.command,
        "foreign_cpu_share": profile.meta.system.get("foreign_cpu_share"),
        "tables": tables,
        "warnings": warnings,
        "vectors": _vectors(profile),
        "fresh": None if fresh_s is None else fresh_sample(profile, fresh_s, progress),
    }


def fresh_sample(profile: HardwareProfile, budget_s: float, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure expert FFNs between the profile's sizes now, and compare with what the profile predicts.

    Some of the profile's own sizes are timed again in the same passes: ``drift`` is how much slower the machine
    is at them now, and ``median_without_drift`` the error with all predictions times that.

    A profile taken at real-time priority is sampled at it where this process may; ``realtime`` tells.

    Raises:
        ProfileError: the profile was measured on another device, or has no expert rows.
    """
    from moeplan.profiling import system
    from moeplan.profiling.device import find_device, may_be_realtime, pinned
    from moeplan.profiling.experts import ExpertShape, expert_bench
    from moeplan.profiling.journal import Journal
    from moeplan.profiling.protocol import CpuTimer, CudaTimer, Rig, run_benches, statistics

    device = find_device("cpu" if profile.meta.accelerator == "cpu" else "cuda")
    here = system.device_name(device)
    if here != profile.meta.device:
        raise ProfileError(f"profile {profile.meta.name} is of {profile.meta.device}, this machine has {here}")
    table = profile.require("experts", backend="moeplan", distribution="balanced", direction="forward")
    keys = ("hidden", "inter", "num_experts", "top_k", "ep", "tp", "dtype", "kernel")
    series = group_ids(table, list(keys))
    size, measured = table["tokens"].to_numpy(), table["latency_us"].to_numpy()
    model = GridInterpolator(series, size[:, None].astype(float), measured)
    rows = table.select(list(keys)).to_pylist()
    benches, at = [], {}
    for group in np.unique(series):
        first = rows[int(np.flatnonzero(series == group)[0])]
        shape = ExpertShape(*(first[k] for k in keys[:6]))
        sizes = np.unique(size[series == group])
        between = sorted({round(float(np.sqrt(a * b))) for a, b in pairwise(sizes) if b > a + 1})
        if not between:
            continue
        bench = expert_bench(device, shape, first["dtype"], [first["kernel"]], max_tokens=int(sizes[-1]))
        again = [int(s) for s in sizes[1::3]]
        own = replace(bench.series[0], sizes=tuple(sorted({*between, *again})), refine=False)
        benches.append(replace(bench, series=(own,)))
        at[shape, first["dtype"], first["kernel"]] = group
    facts = profile.meta.system
    threads = 0 if device.is_cuda else int(float(facts.get("threads", 0)))
    realtime = bool(facts.get("realtime", 0.0)) and may_be_realtime()
    journal = Journal(None, {})
    with pinned(device.torch, threads, realtime):
        rig = Rig(CudaTimer() if device.is_cuda else CpuTimer(), journal, random.Random(1))
        run_benches(benches, rig, budget_s, progress)
    now, known = [], []
    for _, row, samples in journal.points.values():
        group = at[ExpertShape(*(row[k] for k in keys[:6])), row["dtype"], row["kernel"]]
        found = model.predict(np.array([group]), np.array([[float(row["tokens"])]]))
        now.append(float(found.latency_us[0]) / statistics(samples)["latency_us"])
        known.append(bool(found.measured[0]))
    ratio, is_known = np.array(now), np.array(known, bool)
    drift = float(np.median(ratio[is_known])) if is_known.any() else 1.0
    return {
        **_figures(ratio[~is_known] - 1),
        "drift": 1 / drift,
        "median_without_drift": _figures(ratio[~is_known] / drift - 1)["median"],
        "realtime": realtime,
    }


def diff_profiles(first: Path, second: Path) -> dict[str, Any]:
    """Time of the second over the first at the points both have, by table.

    Raises:
        ProfileError: one of them cannot be read.
    """
    a, b = load_profile(first), load_profile(second)
    tables = {}
    for name in dict.fromkeys((*a.table_names, *b.table_names)):
        keyed = [_by_key(p, name) for p in (a, b)]
        shared = sorted(set(keyed[0]) & set(keyed[1]))
        ratio = np.array([keyed[1][key] / keyed[0][key] for key in shared])
        quantiles = np.quantile(ratio, [0.5, 0.1, 0.9]).tolist() if shared else [None] * 3
        tables[name] = {
            "shared": len(shared),
            "only_first": len(keyed[0]) - len(shared),
            "only_second": len(keyed[1]) - len(shared),
            **dict(zip(("median", "p10", "p90"), quantiles, strict=True)),
        }
    return {"first": a.meta.name, "second": b.meta.name, "tables": tables}


def _by_key(profile: HardwareProfile, name: str) -> dict[tuple[Any, ...], float]:
    if name not in profile.table_names:
        return {}
    table = profile.table(name)
    columns = [c for c in columns_of(name) if c not in NOT_KEY]
    return dict(
        zip(zip(*(table[c].to_pylist() for c in columns), strict=True), table["latency_us"].to_pylist(), strict=True)
    )
