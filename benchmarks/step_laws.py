"""How far off is what a step uses at balanced rows that it has not seen? Prints one JSON object. Extra: aic.

``moeplan validate kernels`` scores the tables' interpolation. A step takes experts from the law that ``kernel_fits``
reads off balanced rows, times what an evenly loaded rank takes as measured over what the law says, and exchanges from
straight lines between measured sizes. Here each 4th row is hidden as there, in the order of all names and then of size;
rows whose mark keeps them from serving are neither used nor scored.

Experts: ``law`` at the row's own counts alone; ``step`` that times the correction; ``table`` the tables' interpolation
of the same rows, all shapes of a kernel together. ``no_law`` rows are of kernels whose other rows do not tell one.
Exchanges: dispatch and combine apart, each on the rows of one library, machine size and model shape.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from moeplan.artifacts.profile import USABLE_MARKS, HardwareProfile
from moeplan.artifacts.profile_tables import MISMEASURED
from moeplan.costs.expert_law import kernel_fits
from moeplan.costs.experts import _Kernel
from moeplan.costs.heldout import hidden_rows, hold_out
from moeplan.costs.tables import kernel_names
from moeplan.pipeline.aic import full_profile
from moeplan.specs.clusters import find_accelerator

SYSTEMS = ("h100_sxm", "gb200")
NAMES = ("hidden", "inter", "tp", "dtype", "source", "kernel", "distribution", "direction", "scope")
LAW = ("hidden", "inter", "tp", "dtype")  # of one law, kernels apart
CURVE = ("mode", "phase", "nodes", "ranks", "hidden", "top_k", "num_experts", "dtype", "sms", "kernel", "source")


def _groups(table: pa.Table, columns: tuple[str, ...]) -> Iterator[np.ndarray]:
    keys = np.array([repr(key) for key in zip(*(table[column].to_pylist() for column in columns), strict=True)])
    for key in np.unique(keys):
        yield np.flatnonzero(keys == key)


def _split(name: str, table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Balanced rows that serve and are not hidden; those that are; the tables' relative error at each of these."""
    marks = np.array(table["mark"].to_pylist())
    serves = np.isin(marks, USABLE_MARKS) & (np.array(table["distribution"].to_pylist()) == "balanced")
    hidden = hidden_rows(name, table)
    errors = np.full(table.num_rows, np.nan)
    errors[hidden & ~np.isin(marks, MISMEASURED)] = hold_out(name, table).ours
    return serves & ~hidden, serves & hidden, errors


def _experts(profile: HardwareProfile) -> dict[str, Any]:
    table = profile.select("experts", usable=False, scope="experts", direction="forward")
    known, asked, errors = _split("experts", table)
    names = np.array(kernel_names(table))
    column = {c: table[c].to_pylist() for c in ("ep", "tokens", "top_k", "num_experts", *NAMES)}
    others = HardwareProfile(profile.meta.model_copy(update={"tables": {}}), {"experts": table.filter(pa.array(known))})
    seconds = table["latency_us"].to_numpy() * 1e-6
    pairs, active = (table[c].to_numpy().astype(float) for c in ("rank_pairs", "active_experts"))
    law, step = np.full(len(seconds), np.nan), np.full(len(seconds), np.nan)
    bandwidth = find_accelerator(profile.meta.accelerator).memory_bandwidth
    for group in _groups(table, LAW):
        fits = kernel_fits(table.take(group[known[group]]), bandwidth)
        kernels: dict[str, _Kernel] = {}
        for row in group[asked[group] & (active[group] > 0)]:
            if (fit := fits.get(names[row])) is None:
                continue
            each = pairs[row] / active[row]
            told = fit.shared_s(each) + active[row] * fit.one_expert_s(each)
            kernel = kernels.setdefault(names[row], _Kernel(fit, fit, others, {c: column[c][row] for c in NAMES}))
            at = (column[c][row] for c in ("num_experts", "top_k", "tokens", "ep"))
            law[row], step[row] = told / seconds[row] - 1, told * kernel.over_law(*at)[0] / seconds[row] - 1
    mean = np.array(column["tokens"]) * np.array(column["top_k"]) / np.array(column["num_experts"])
    parts = {
        "all": asked,
        "expert parallel": asked & (np.array(column["ep"]) > 1),
        "below 1 token per expert": asked & (mean < 1),
        "1 to 64": asked & (mean >= 1) & (mean < 64),
        "64 and more": asked & (mean >= 64),
    }
    return _figures(table, parts, {"law": law, "step": step, "table": errors})


def _exchanges(profile: HardwareProfile) -> dict[str, Any]:
    table = profile.select("alltoall", usable=False)
    known, asked, errors = _split("alltoall", table)
    tokens, us = table["tokens_per_rank"].to_numpy().astype(float), table["latency_us"].to_numpy()
    law = np.full(len(us), np.nan)
    for group in _groups(table, CURVE):
        have = group[known[group]]
        have = have[np.argsort(tokens[have])]
        if len(np.unique(tokens[have])) < 3:
            continue
        rows = group[asked[group]]
        beyond = np.maximum(1.0, tokens[rows] / tokens[have[-1]])
        law[rows] = np.interp(tokens[rows], tokens[have], np.maximum.accumulate(us[have])) * beyond / us[rows] - 1
    return _figures(table, {"all": asked}, {"law": law, "table": errors})


def _figures(table: pa.Table, parts: dict[str, np.ndarray], errors: dict[str, np.ndarray]) -> dict[str, Any]:
    backends = np.array(table["backend"].to_pylist())
    parts = parts | {backend: parts["all"] & (backends == backend) for backend in np.unique(backends[parts["all"]])}
    answer: dict[str, Any] = {}
    for name, rows in parts.items():
        known = rows & np.isfinite(errors["law"])
        answer[name] = {"rows": int(known.sum()), "no_law": int((rows & ~known).sum())}
        answer[name] |= {who: _quantiles(values[known & np.isfinite(values)]) for who, values in errors.items()}
    return answer


def _quantiles(off: np.ndarray) -> dict[str, float] | None:
    if not len(off):
        return None
    size = np.abs(off)
    return {"median": float(np.median(size)), "p90": float(np.quantile(size, 0.9)), "bias": float(np.median(off))}


def main() -> None:
    """Measure the systems asked for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("systems", nargs="*", default=SYSTEMS, help="names of the public tables (h100_sxm gb200)")
    found = {}
    for system in options.parse_args().systems:
        profile = full_profile(system)
        found[system] = {"experts": _experts(profile), "exchanges": _exchanges(profile)}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(json.dumps({"date": today, "command": "python benchmarks/step_laws.py", "systems": found}, indent=1))


if __name__ == "__main__":
    main()
