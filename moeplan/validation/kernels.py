"""``moeplan validate kernels``: the cost model against measurements it has not seen, with every figure's target."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.costs.exchange import touched
from moeplan.costs.heldout import AXES, PARTS, HeldOut, hold_out, pooled
from moeplan.costs.waves import steps_of
from moeplan.errors import ProfileError
from moeplan.pipeline.aic import MAIN_SYSTEMS, full_profile
from moeplan.progress import Progress, no_progress
from moeplan.specs.clusters import find_accelerator
from moeplan.validation.own_profiles import cpu_figures, find_measured, h200_figure
from moeplan.validation.skew import Row, skew_rows

__all__ = ["PUBLISHED_DEEPEP", "validate_kernels"]

_TABLES = {"experts": "MoE GEMM", "alltoall": "all-to-all", "attention": "attention", "gemm": "GEMM"}
_MEDIAN, _P90, _SKEW, _DEEPEP = 0.02, 0.10, 0.10, 0.15

# DeepEP README and docs/legacy.md (H800, ConnectX-7 400 Gb/s, hidden 7168, top-8, fp8 dispatch, bf16 combine).
# Low latency: 128 tokens, microseconds of dispatch and combine. Normal: 4,096 tokens, GB/s of what it counts.
PUBLISHED_DEEPEP: dict[str, dict[int, tuple[float, float]]] = {
    "low_latency": {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)},
    "normal": {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)},
}


def _figure(name: str, value: float | None, target: float, **more: Any) -> dict[str, Any]:
    reached = value is not None and np.isfinite(value) and value <= target
    return {"figure": name, "value": value, "target": target, "reached": bool(reached), **more}


# ---------------------------------------------------------------------- held-out grid points


def _hold_out(profile: HardwareProfile, table: str) -> HeldOut:
    return hold_out(table, profile.table(table), steps_of(profile, table))


def _at_most(found: float | None, limit: float | None) -> bool:
    """Whether it is; where a table is too small for one of them, nothing says otherwise."""
    return found is None or limit is None or found <= limit


def _held_out(table: str, where: str, answer: HeldOut) -> dict[str, Any]:
    total, serving = answer.figures(), answer.figures(serving=True)
    better = all(_at_most(total[f"{name}_on_plain"], total[f"plain_{name}"]) for name in ("median", "p90"))
    reached = _at_most(total["median"], _MEDIAN) and _at_most(total["p90"], _P90) and better
    return {
        "figure": f"held-out grid points, {_TABLES[table]}, {where}",
        **total,
        "left_out_mismeasured": answer.mismeasured,
        "rows_that_serve": {key: serving[key] for key in ("held_out", "median", "p90")},
        "target": {"median": _MEDIAN, "p90": _P90, "not worse than the plain line": True},
        "reached": reached if total["median"] is not None else None,
        **({} if better else {"note": "worse than the plain line where that one predicts"}),
        "backends": {str(b): answer.figures(str(b)) for b in np.unique(answer.backend)},
        PARTS[table]: {str(p): answer.figures(part=str(p)) for p in np.unique(answer.part)},
    }


# ---------------------------------------------------------------------- skewed rows from balanced ones


def _skew_figures(rows: list[tuple[str, Row]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The figures by framework and of ``_eplb`` rows, and those by framework and system, of rows with their system."""
    by_backend: dict[str, list[Row]] = {}
    by_system: dict[tuple[str, str], list[Row]] = {}
    for system, row in rows:
        by_backend.setdefault(row["backend"], []).append(row)
        by_system.setdefault((row["backend"], system), []).append(row)
    figures = [_skew_figure(backend, part) for backend, part in sorted(by_backend.items())]
    if copied := [row for _, row in rows if row["eplb"]]:
        figures.append(_skew_figure("eplb rows", copied))
    detail = [_skew_figure(f"{backend} on {system}", part) for (backend, system), part in sorted(by_system.items())]
    return figures, detail


def _skew_figure(name: str, rows: list[Row]) -> dict[str, Any]:
    measured = np.array([row["measured"] for row in rows])
    median = {
        who: float(np.median(np.abs(values / measured - 1)))
        for who, values in (
            ("ours", np.array([row["ours"] for row in rows])),
            ("ratio_1", np.ones(len(rows))),
            ("busiest_rank_token_sum", np.array([row["token_sum"] for row in rows])),
        )
    }
    best = min(median["ratio_1"], median["busiest_rank_token_sum"])
    target = min(_SKEW, best / 2)
    more = {
        "rows": len(rows),
        "baselines": {k: v for k, v in median.items() if k != "ours"},
        "rows_marked_by_the_sanity_pass": sum(bool(row["mark"]) for row in rows),
        "median_measured_ratio": float(np.median(measured)),
    }
    return _figure(f"skewed over balanced, {name}", median["ours"], target, **more)


# ---------------------------------------------------------------------- DeepEP as published


def _copies(ranks: int) -> tuple[float, float]:
    """(node copies, rank copies) per token, the own ones too, as DeepEP's test draws choices and counts bytes.

    Top-8 among the experts of the best 4 groups, a group per node.
    """
    nodes = min(max(ranks // 8, 1), 4)
    return touched(nodes, 8), touched(8 * nodes, 8)


def _counted_bytes(ranks: int, phase: str) -> float:
    """Bytes of 4,096 tokens that DeepEP divides by the time: node copies, on one node rank copies."""
    between, inside = _copies(ranks)
    return 4096 * (between if ranks > 8 else inside) * 7168 * (1 + 4 / 128 if phase == "dispatch" else 2)


def _on_h800_us(us_by_nodes: dict[int, float], ranks: int, scale_up: float) -> float | None:
    """A normal exchange on the published machine (H800) from times measured on one with faster NVLink.

    The slower of two paths counts. Inside a node: the time on one node, by rank copies and by link speed.
    Between nodes: the time at the nearest number of nodes measured (no more than asked), by the copies that leave
    a node, through a NIC of the same speed.
    """
    nodes = ranks // 8
    paths = []
    if 1 in us_by_nodes:
        slower = scale_up / find_accelerator("h800").scale_up_bandwidth
        paths.append(us_by_nodes[1] * slower * _copies(ranks)[1] / _copies(8)[1])
    if nodes > 1:
        near = max((n for n in us_by_nodes if 1 < n <= nodes), default=0)
        if not near:
            return None
        leaving = [_copies(8 * n)[0] * (1 - 1 / n) for n in (nodes, near)]
        paths.append(us_by_nodes[near] * leaving[0] / leaving[1])
    return max(paths, default=None)


def _deepep(profile: HardwareProfile) -> list[dict[str, Any]]:
    answer = []
    for mode, published in PUBLISHED_DEEPEP.items():
        tokens = 128 if mode == "low_latency" else 4096
        for ranks, values in published.items():
            for phase, value in zip(("dispatch", "combine"), values, strict=True):
                where: dict[str, Any] = {"mode": mode, "phase": phase, "tokens_per_rank": tokens, "num_experts": 256}
                where |= {"hidden": 7168, "top_k": 8, "kernel": "deepep", "backend": "sglang"}
                found = profile.select("alltoall", usable=False, ranks=ranks, **where)
                read = min(found["latency_us"].to_pylist(), default=None)
                ours, unit = read, "us"
                if mode == "normal":
                    rows = profile.select("alltoall", **where)
                    times = sorted(zip(rows["nodes"].to_pylist(), rows["latency_us"].to_pylist(), strict=True))
                    best = dict(reversed(times))  # the number of SMs with least time
                    ours = _on_h800_us(best, ranks, find_accelerator(profile.meta.accelerator).scale_up_bandwidth)
                    unit, size = "GB/s", _counted_bytes(ranks, phase) * 1e-3
                    read, ours = (size / us if us else None for us in (read, ours))
                off = abs(ours / value - 1) if ours is not None else None
                name = f"DeepEP {mode} {phase}, EP{ranks}"
                figure = _figure(name, off, _DEEPEP, published=value, predicted=ours, from_table=read, unit=unit)
                if not 16 <= ranks <= 64:
                    figure |= {"target": None, "reached": None, "note": "reported beside, not scored"}
                answer.append(figure)
    return answer


# ---------------------------------------------------------------------- all of it


def validate_kernels(
    systems: list[str] | None = None,
    profile: str | Path | None = None,
    cpu: Path | None = None,
    live_s: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Every figure with its target. Inputs: the public tables of ``systems``, or one profile directory or name.

    With the public tables also what this tool measured: the CPU profile ``cpu`` (``profiles/cpu-*`` where it is not
    given), or one measured now for ``live_s`` seconds; and ``profiles/h200*``.

    ``reached`` of the whole: false where a figure misses its target, None where none does but systems are missing.

    Raises:
        MissingExtraError: no profile is given and the public tables are not installed.
        ProfileError: the profile has none of the tables that are held out, or ``cpu`` holds no profile.
    """
    if cpu is not None:
        HardwareProfile.open(cpu)  # refused now, not after the tables
    read: Callable[[str], HardwareProfile]
    if profile is not None:
        names, read = [str(profile)], load_profile
        command = f"moeplan validate kernels --profile {profile}"
    else:
        names, read = systems or list(MAIN_SYSTEMS), full_profile
        command = f"moeplan validate kernels --systems {','.join(names)}"
    figures: list[dict[str, Any]] = []
    held_out: dict[str, list[HeldOut]] = {}
    skew: list[tuple[str, Row]] = []
    inputs = []
    deepep: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        progress("validate", number / len(names))
        one = read(name)
        inputs.append({"profile": one.meta.name, "rows": {t: one.table(t).num_rows for t in one.table_names}})
        tables = [table for table in AXES if table in one.table_names and table in _TABLES]
        if not tables:
            raise ProfileError(
                f"profile {one.meta.name} has tables {', '.join(one.table_names) or '(none)'}, but none of"
                f" {', '.join(_TABLES)}, whose points are held out; measure one: moeplan profile --help"
            )
        with ThreadPoolExecutor() as pool:  # compiled parts run side by side
            answers = pool.map(_hold_out, [one] * len(tables), tables)
            for done, (table, answer) in enumerate(zip(tables, answers, strict=True), 1):
                held_out.setdefault(table, []).append(answer)
                figures.append(_held_out(table, one.meta.name, answer))
                progress("validate", (number + done / (len(tables) + 1)) / len(names))
        if "experts" in tables:
            skew += [(one.meta.name, row) for row in skew_rows(one)]
        multi_node = one.select("alltoall", usable=False, nodes=[2, 4, 8], kernel="deepep")
        if not deepep and multi_node.num_rows:
            deepep = _deepep(one)
    skewed, detail = _skew_figures(skew)
    detail += [_held_out(table, "all systems", pooled(parts)) for table, parts in held_out.items() if len(parts) > 1]
    figures += skewed + deepep
    if cpu or live_s is not None or profile is None:
        figures += cpu_figures(cpu or find_measured("cpu-*"), live_s, progress)
    if profile is None:
        figures.append(h200_figure(find_measured("h200*")))
    progress("validate", 1.0)
    reached = all(figure["reached"] for figure in figures if figure["reached"] is not None)
    covered = {each["profile"] for each in inputs}
    not_covered = [name for name in MAIN_SYSTEMS if name.replace("_", "-") not in covered]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "inputs": inputs,
        "figures": figures,
        "detail": detail,
        "not_covered": not_covered,
        "reached": None if reached and not_covered else reached,
    }
