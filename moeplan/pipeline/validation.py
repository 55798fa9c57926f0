"""``moeplan validate kernels``: the cost model against measurements it has not seen, with every figure's target."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.costs.exchange import touched
from moeplan.costs.experts import ExpertCosts, fit_experts
from moeplan.costs.heldout import AXES, PARTS, hold_out
from moeplan.costs.interpolation import line
from moeplan.costs.skew import busiest_rank, busiest_rank_eplb, draw_choices, nearest_draws, skewed_over_balanced
from moeplan.costs.waves import steps_of
from moeplan.pipeline.aic import MAIN_SYSTEMS, full_profile
from moeplan.pipeline.validation_live import cpu_figures, find_measured, h200_figure
from moeplan.specs.clusters import find_accelerator

__all__ = ["PUBLISHED_DEEPEP", "validate_kernels"]

Progress = Callable[[str, float], None]

_TABLES = {"experts": "MoE GEMM", "alltoall": "all-to-all", "attention": "attention", "gemm": "GEMM"}
_DRAWS = 32
_RECORDED_DRAWS, _NEAREST = 64, 8  # where a table records how many tokens its draw sent
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


def _held_out(profile: HardwareProfile, name: str) -> dict[str, Any]:
    answer = hold_out(name, profile.table(name), steps_of(profile, name))
    total = answer.figures()
    better = total["median_on_plain"] <= total["plain_median"] and total["p90_on_plain"] <= total["plain_p90"]
    reached = total["median"] <= _MEDIAN and total["p90"] <= _P90 and better
    return {
        "figure": f"held-out grid points, {_TABLES.get(name, name)}, {profile.meta.name}",
        **total,
        "target": {"median": _MEDIAN, "p90": _P90, "not worse than the plain line": True},
        "reached": bool(reached),
        "backends": {str(b): answer.figures(str(b)) for b in np.unique(answer.backend)},
        PARTS[name]: {str(p): answer.figures(part=str(p)) for p in np.unique(answer.part)},
    }


# ---------------------------------------------------------------------- skewed rows from balanced ones


@cache
def _vectors(tokens: int, top_k: int, experts: int, alpha: float, ep: int, slots: int, draws: int) -> Any:
    # One generator per case: its draws do not depend on what else is validated.
    rng = np.random.default_rng([tokens, top_k, experts, round(alpha * 100), ep])
    counts = draw_choices(tokens, top_k, experts, alpha, ep, draws, rng)
    return busiest_rank_eplb(counts, ep, slots, tokens) if slots else busiest_rank(counts, ep, tokens)


def _balanced_of(family: str) -> str:
    """Kernel whose balanced rows stand for a family: the wide-EP cutlass file has none of its own."""
    return "moe_torch_flow_cutlass" if family.startswith("wideep_compute") else family


def _release(row: dict[str, Any]) -> str:
    """The release of the framework a row is from: its source without the kind of file."""
    return str(row["source"]).rsplit("/", 1)[0]


_SHAPE = ("backend", "dtype", "hidden", "inter", "num_experts", "top_k", "tp")


def _skew_rows(profile: HardwareProfile, min_tokens: int = 4096) -> list[dict[str, Any]]:
    """Each skewed row at EP >= 8 and many tokens: measured ratio, ours, and the two baselines'."""
    table = profile.table("experts").filter(pc.equal(profile.table("experts")["scope"], "experts"))
    rows = table.to_pylist()
    balanced: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["distribution"] == "balanced":
            key = (*(row[c] for c in _SHAPE), row["kernel"])
            balanced.setdefault((*key, _release(row)), []).append(row)
            balanced.setdefault((*key, ""), []).append(row)
    fits: dict[tuple[Any, ...], tuple[ExpertCosts | None, dict[tuple[int, int], float]]] = {}
    answer = []
    for row in rows:
        ep, tokens, experts = row["ep"], row["tokens"], row["num_experts"]
        name = row["distribution"]
        if name == "balanced" or not name.startswith("power_law") or ep < 8 or tokens < min_tokens or experts % ep:
            continue
        kernel = _balanced_of(row["kernel"])
        key = (*(row[c] for c in _SHAPE), kernel, _release(row))
        same_release = key in balanced
        if not same_release and kernel != row["kernel"]:
            key = (*key[:-1], "")
        if key not in fits:
            base = balanced.get(key, [])
            fits[key] = _fit(base), {(r["ep"], r["tokens"]): r["latency_us"] for r in base}
        fit, times = fits[key]
        if (ep, tokens) not in times or fit is None:
            continue
        eplb = name.endswith("_eplb")
        slots = row["num_slots"] or experts
        if slots % ep:
            continue
        alpha = float(name.split("_")[2])
        recorded = row["rank_tokens"]
        draws = _DRAWS if recorded < 0 else _RECORDED_DRAWS
        vectors, arriving = _vectors(tokens, row["top_k"], experts, alpha, ep, slots if eplb else 0, draws)
        if recorded >= 0:  # one draw was measured: the like of it
            near = nearest_draws(arriving, recorded, _NEAREST)
            vectors, arriving = vectors[near], np.full(len(near), float(recorded))
        sent = arriving if kernel != row["kernel"] else None
        reference = None if same_release else times[ep, tokens] * 1e-6
        sizes = np.array(sorted(t for e, t in times if e == ep), float)
        took = np.array([times[ep, int(t)] for t in sizes])
        busiest = vectors.sum(1) * ep / row["top_k"]
        scaled = line(sizes, took, np.minimum(busiest, sizes[-1])) * np.maximum(busiest / sizes[-1], 1)
        answer.append(
            {
                "backend": row["backend"],
                "kernel": row["kernel"],
                "eplb": eplb,
                "mark": row["mark"],
                "ep": ep,
                "tokens": tokens,
                "experts": experts,
                "slots": slots,
                "alpha": alpha,
                "measured": row["latency_us"] / times[ep, tokens],
                "ours": skewed_over_balanced(fit, vectors, tokens, row["top_k"], experts, ep, sent, reference),
                "token_sum": float(scaled.mean()) / times[ep, tokens],
            }
        )
    return answer


def _fit(base: list[dict[str, Any]]) -> ExpertCosts | None:
    spread = [r for r in base if r["ep"] > 1 and r["active_experts"] > 0]
    if len(spread) < 6:
        return None
    columns = [np.array([float(r[c]) for r in spread]) for c in ("rank_pairs", "active_experts", "latency_us")]
    return fit_experts(columns[0], columns[1], columns[2] * 1e-6, "")


def _skew_figure(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
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
    progress: Progress = lambda _what, _done: None,
) -> dict[str, Any]:
    """Every figure with its target. Inputs: the public tables of ``systems``, or one profile directory or name.

    With the public tables also what this tool measured: the CPU profile ``cpu`` (``profiles/cpu-*`` where it is not
    given), or one measured now for ``live_s`` seconds; and ``profiles/h200*``.

    Raises:
        MissingExtraError: no profile is given and the public tables are not installed.
    """
    read: Callable[[str], HardwareProfile]
    if profile is not None:
        names, read = [str(profile)], load_profile
        command = f"moeplan validate kernels --profile {profile}"
    else:
        names, read = systems or list(MAIN_SYSTEMS), full_profile
        command = f"moeplan validate kernels --systems {','.join(names)}"
    figures: list[dict[str, Any]] = []
    skew: list[dict[str, Any]] = []
    inputs = []
    deepep: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        progress("validate", number / len(names))
        one = read(name)
        inputs.append({"profile": one.meta.name, "rows": {t: one.table(t).num_rows for t in one.table_names}})
        tables = [table for table in AXES if table in one.table_names and table in _TABLES]
        with ThreadPoolExecutor() as pool:  # compiled parts run side by side
            for done, figure in enumerate(pool.map(_held_out, [one] * len(tables), tables), 1):
                figures.append(figure)
                progress("validate", (number + done / (len(tables) + 1)) / len(names))
        rows = _skew_rows(one) if "experts" in one.table_names else []
        skew += [{**row, "system": one.meta.name} for row in rows]
        multi_node = one.select("alltoall", usable=False, nodes=[2, 4, 8], kernel="deepep")
        if not deepep and multi_node.num_rows:
            deepep = _deepep(one)
    figures += [
        _skew_figure(backend, [row for row in skew if row["backend"] == backend])
        for backend in sorted({row["backend"] for row in skew})
    ]
    copied = [row for row in skew if row["eplb"]]
    if copied:
        figures.append(_skew_figure("eplb rows", copied))
    detail = [
        _skew_figure(f"{backend} on {system}", part)
        for backend, system in sorted({(row["backend"], row["system"]) for row in skew})
        if (part := [row for row in skew if (row["backend"], row["system"]) == (backend, system)])
    ]
    figures += deepep
    if cpu or live_s is not None or profile is None:
        figures += cpu_figures(cpu or find_measured("cpu-*"), live_s, progress)
    if profile is None:
        figures.append(h200_figure(find_measured("h200*")))
    progress("validate", 1.0)
    scored = [figure for figure in figures if figure["reached"] is not None]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "inputs": inputs,
        "figures": figures,
        "detail": detail,
        "reached": bool(scored) and all(figure["reached"] for figure in scored),
    }
