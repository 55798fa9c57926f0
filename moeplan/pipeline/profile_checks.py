"""Does a profile hold: files and sense, prediction of held-out and of fresh sizes; pictures; two side by side.

``n`` rows of a table.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.artifacts.profile_tables import MEASURED, columns_of
from moeplan.costs.expert_law import expert_weight_bytes, fit_experts
from moeplan.costs.interpolation import GridInterpolator
from moeplan.costs.number_formats import WEIGHT_BYTES
from moeplan.costs.roofline import matmul_flops
from moeplan.errors import ProfileError, SpecError, UnknownNameError
from moeplan.files import write_text
from moeplan.profiling.sanity import SIZE_AXIS, group_ids, mark_rows
from moeplan.progress import Progress, no_progress
from moeplan.specs.clusters import find_accelerator

__all__ = ["check_profile", "diff_profiles", "show_profile"]

Floats = NDArray[np.float64]
_PREDICTED = 0.10  # of a table worth keeping held-out sizes are off by no more in the median
_NOT_KEY = {*MEASURED, "source", "mark"}
_FORMS = {"collectives": ("algorithm", "op"), "alltoall": ("mode", "phase")}  # column of the form, and of what is done
_FOLLOWS = {"experts": {"rank_pairs", "active_experts", "rank_tokens", "vector"}, "attention": {"query_tokens"}}


def _usable(profile: HardwareProfile, name: str) -> pa.Table:
    """Rows with one size axis: expert rows of explicit vectors have none, and are left to :func:`_vectors`."""
    if name != "experts":
        return profile.select(name)
    kinds = set(profile.table(name)["distribution"].to_pylist()) - {"explicit"}
    return profile.select(name, distribution=kinds)


def _series(name: str, table: pa.Table) -> NDArray[np.int64]:
    skip = _NOT_KEY | {SIZE_AXIS[name]} | _FOLLOWS.get(name, set())
    return group_ids(table, [column for column in columns_of(name) if column not in skip])


def _residuals(name: str, table: pa.Table, every: int) -> tuple[Floats, Floats]:
    """Predicted over measured minus 1 of held-out rows, by the cost model's interpolation and by plain log-log.

    Of each series every ``every``-th point is held out, its ends never; nan where a point is not held out.
    """
    series, size = _series(name, table), table[SIZE_AXIS[name]].to_numpy().astype(float)
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
    skip = _NOT_KEY | {SIZE_AXIS[name], column}
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


def _vectors(profile: HardwareProfile) -> dict[str, Any] | None:
    """Skewed vectors predicted from balanced rows of the same shape and kernel, by the cost model."""
    if "experts" not in profile.table_names:
        return None
    table = profile.select("experts", direction="forward")
    shape = group_ids(table, ["backend", "kernel", "hidden", "inter", "num_experts", "top_k", "tp", "dtype", "scope"])
    even = np.array(table["distribution"].to_pylist()) == "balanced"
    skewed = np.array(table["distribution"].to_pylist()) == "explicit"
    pairs, active = (table[c].to_numpy().astype(float) for c in ("rank_pairs", "active_experts"))
    seconds, vectors = table["latency_us"].to_numpy() * 1e-6, table["vector"].to_pylist()
    off, bandwidth = [], _peaks(profile)[0] or np.inf
    for group in np.unique(shape[skewed]):
        rows = np.flatnonzero(even & (shape == group) & (active > 0))
        if len(rows) < 6:
            continue
        weight_s = expert_weight_bytes(table.slice(int(rows[0]), 1).to_pylist()[0]) / bandwidth
        fit = fit_experts(pairs[rows], active[rows], seconds[rows], "", weight_s)
        for row in np.flatnonzero(skewed & (shape == group)) if fit else ():
            vector = np.array(vectors[row].split(), float)
            if fit and len(vector):
                off.append(float(fit.rank_s(vector, vector.mean())) / seconds[row] - 1)
    return _figures(np.array(off)) if off else None


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
        part = _usable(profile, name)
        marks: Any = mark_rows(name, part) if part.num_rows > 2 else []
        own, plain = _residuals(name, part, every)
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


# ---------------------------------------------------------------------- pictures


def _peaks(profile: HardwareProfile) -> tuple[float, dict[str, float], str]:
    """(bytes per second of the best copy, operations per second of the best product by type, where these are from).

    Where the profile has no copy or no product of a type, the accelerator registry's figure stands in.
    """
    copies = profile.select("memory", op="device_copy")
    moved = 2 * copies["message_size_bytes"].to_numpy() / copies["latency_us"].to_numpy() * 1e6
    products = profile.select("gemm", direction="forward")
    best: dict[str, float] = {}
    if products.num_rows:
        batch, m, n, k, us = (products[c].to_numpy().astype(float) for c in ("batch", "m", "n", "k", "latency_us"))
        for dtype, rate in zip(products["dtype"].to_pylist(), 2 * batch * m * n * k / us * 1e6, strict=True):
            best[dtype] = max(best.get(dtype, 0.0), float(rate))
    # The largest copies do not fit into caches.
    large = moved[np.argsort(copies["message_size_bytes"].to_numpy())[-2:]]
    bandwidth = float(large.max()) if len(large) else 0.0
    own = [*(["copy"] if bandwidth else []), *(f"{dtype} product" for dtype in sorted(best))]
    said = [f"best {', '.join(own)} of this profile"] if own else []
    try:
        sheet = find_accelerator(profile.meta.accelerator)
    except UnknownNameError:
        return bandwidth, best, "; ".join(said)
    listed = {name: matmul_flops(sheet, _LIKE.get(name, name)) for name in WEIGHT_BYTES}
    if not bandwidth or listed.keys() - best.keys():
        said.append(f"otherwise the accelerator registry's {sheet.name}")
    return bandwidth or sheet.memory_bandwidth, listed | best, "; ".join(said)


_LIKE: dict[str, Any] = {"fp8_block": "fp8", "w4a8_mxfp4_mxfp8": "fp8", "nvfp4": "fp4", "int8_wo": "bf16"}


_MOVED: dict[str, Callable[[dict[str, Any]], int]] = {  # numbers read and written for a token
    "router": lambda row: int(row["num_experts"]),
    **dict.fromkeys(("permute", "unpermute"), lambda row: int(row["hidden"] * (1 + row["top_k"]))),
    **dict.fromkeys(("norm", "embedding"), lambda row: int(2 * row["hidden"])),
    "activation": lambda row: int(3 * row["hidden"]),
    "optimizer": lambda row: int(7 * row["hidden"]),
}


def _roofline_us(name: str, row: dict[str, Any], bandwidth: float, peak: dict[str, float]) -> float:
    """max(bytes / bandwidth, operations / peak) of a row; nan where the profile does not tell."""
    rate = peak.get(row.get("dtype", ""), 0.0)
    if not (bandwidth and row.get("dtype") in WEIGHT_BYTES and row.get("direction") == "forward"):
        return float("nan")
    each = WEIGHT_BYTES[row["dtype"]]
    if name == "elementwise" and row["op"] in _MOVED:
        return float(row["tokens"] * _MOVED[row["op"]](row) * each / bandwidth * 1e6)
    if not rate:
        return float("nan")
    if name == "experts" and row["active_experts"] > 0:
        weights = 3 * row["hidden"] * row["inter"] / row["tp"]
        moved, work = row["active_experts"] * weights * each, 2 * row["rank_pairs"] * weights
    elif name == "gemm":
        m, n, k = row["m"], row["n"], row["k"]
        moved, work = row["batch"] * (m * k + k * n + m * n) * each, 2 * row["batch"] * m * n * k
    elif name == "attention" and (row["kind"], row["scope"]) == ("gqa", "kernel") and row["kv_dtype"] in WEIGHT_BYTES:
        queries, context = row["query_tokens"], row["context_tokens"]
        window = row["window"] or context
        seen = min(context - (queries - 1) / 2, window)  # keys of a query, on average: it sees none after its own
        read = 2 * row["kv_heads"] * min(context, window + queries - 1) * WEIGHT_BYTES[row["kv_dtype"]]
        moved = row["batch"] * row["head_dim"] * (read + 2 * row["heads"] * queries * each)
        work = 4 * row["batch"] * row["head_dim"] * row["heads"] * queries * seen
    else:
        return float("nan")
    return float(max(moved / bandwidth, work / rate) * 1e6)


def show_profile(directory: Path, out: Path, most: int = 8) -> dict[str, Any]:
    """Write an HTML page with pictures of every table; at most ``most`` curves in one, longest series first.

    Raises:
        SpecError: ``out`` is not named as a page; ProfileError: the profile cannot be read; InputError: ``out`` cannot
        be written.
    """
    if out.suffix != ".html":
        raise SpecError(f"out ({out}) must end in .html: it becomes a page")
    from moeplan.reports.profile_figures import page, profile_picture

    profile = load_profile(directory)
    sections = []
    for name in profile.table_names:
        pictures = [
            profile_picture(title, SIZE_AXIS[name].replace("_", " "), curves)
            for title, curves in _pictures(profile, name, most)
        ]
        sections.append((name, pictures))
    meta = profile.meta
    facts = [("device", meta.device), ("driver", meta.driver), ("date", meta.date), ("command", meta.command)]
    facts += [(f"version of {k}", v) for k, v in meta.libraries.items()]
    for key, value in meta.system.items():
        facts.append((key.replace("_", " "), value if isinstance(value, str) else f"{value:,.12g}"))
    facts += [("roofline", _peaks(profile)[2]), ("note", meta.note), ("left out", "; ".join(meta.left_out))]
    facts += [("warning", warning) for warning in profile.warnings]
    write_text(out, page(f"Profile {meta.name}", [fact for fact in facts if fact[1]], sections))
    count = sum(len(pictures) for _, pictures in sections)
    return {"out": str(out), "pictures": count, "warnings": profile.warnings}


def _pictures(profile: HardwareProfile, name: str, most: int) -> list[tuple[str, list[Any]]]:
    """Curves of a table, gathered into pictures by the first columns that tell them apart; the others label them."""
    from moeplan.reports.profile_figures import Curve

    table = _usable(profile, name)
    if not table.num_rows:
        return []
    residual = _residuals(name, table, 2)[0]
    series, size = _series(name, table), table[SIZE_AXIS[name]].to_numpy().astype(float)
    rows = table.to_pylist()
    bandwidth, peak, _ = _peaks(profile)
    skip = _NOT_KEY | {SIZE_AXIS[name]} | _FOLLOWS.get(name, set())

    def told(among: list[dict[str, Any]]) -> list[str]:
        return [c for c in columns_of(name) if c not in skip and len({row[c] for row in among}) > 1]

    split = [c for c in told(rows) if c in ("hidden", "op", "kind", "phase", "dtype", "direction")]
    found: dict[str, list[NDArray[np.int64]]] = {}
    for group in np.unique(series):
        index = np.flatnonzero(series == group)
        title = " ".join([name, *(f"{c} {rows[index[0]][c]}" for c in split)])
        found.setdefault(title, []).append(index[np.argsort(size[index])])
    pictures = []
    for title, groups in found.items():
        longest = sorted(groups, key=lambda index: -len(index))[:most]
        labels = told([rows[index[0]] for index in longest])
        curves = []
        for index in longest:
            line = np.array([_roofline_us(name, rows[i], bandwidth, peak) for i in index])
            curve = Curve(
                label=" ".join(f"{c} {rows[index[0]][c]}" for c in labels) or name,
                size_n=size[index],
                latency_us_n=np.array([rows[i]["latency_us"] for i in index]),
                spread_n=np.array([rows[i]["spread"] for i in index]),
                residual_n=residual[index],
                roofline_us_n=line if np.isfinite(line).all() else np.array([]),
            )
            curves.append(curve)
        pictures.append((title, curves))
    return pictures


# ---------------------------------------------------------------------- two profiles


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
    columns = [c for c in columns_of(name) if c not in _NOT_KEY]
    return dict(
        zip(zip(*(table[c].to_pylist() for c in columns), strict=True), table["latency_us"].to_pylist(), strict=True)
    )
