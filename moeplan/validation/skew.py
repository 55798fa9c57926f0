"""Skewed kernel rows told from balanced ones alone: the ratios that ``moeplan validate kernels`` scores."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moeplan.artifacts.profile import HardwareProfile
from moeplan.artifacts.profile_tables import MISMEASURED
from moeplan.costs.expert_law import ExpertCosts, expert_weight_bytes, fit_experts
from moeplan.costs.interpolation import line
from moeplan.costs.skew import (
    busiest_rank,
    busiest_rank_eplb,
    draw_choices,
    nearest_draws,
    router_logit_s,
    skewed_over_balanced,
)
from moeplan.specs.clusters import find_accelerator

__all__ = ["Row", "skew_rows"]

_DRAWS = 32
_MANY = 4096  # tokens from which on rows count
_RECORDED_DRAWS, _NEAREST = 64, 8  # where a table records how many tokens its draw sent
_WIDE, _BALANCED_OF_WIDE = "wideep_compute", "moe_torch_flow_cutlass"  # the wide-EP file has no balanced rows
_SHAPE = ("backend", "dtype", "hidden", "inter", "num_experts", "top_k", "tp")

Row = dict[str, Any]


def _release(row: Row) -> str:
    """The framework and release a row is from, such as trtllm-1.3.0rc10."""
    parts = str(row["source"]).split("/")
    return parts[-2] if len(parts) > 1 else parts[0]


def _experts(profile: HardwareProfile) -> pa.Table:
    """Rows of expert kernels that timed what they say."""
    table = profile.table("experts")
    bad = pc.is_in(table["mark"].cast("string"), value_set=pa.array(MISMEASURED))
    return table.filter(pc.and_(pc.equal(table["scope"], "experts"), pc.invert(bad)))


def _router_logit_s(rows: list[Row]) -> dict[str, float]:
    """Release of wide-EP rows -> seconds a logit that choosing experts takes longer there than in later releases.

    Read off balanced rows of both releases at the same points, of the kernel that stands for wide-EP rows, at the
    shapes and group sizes that these have: there the difference goes with the logits, whatever the experts.
    """
    wide = [row for row in rows if row["kernel"].startswith(_WIDE)]
    older = {_release(row) for row in wide}
    cases = {(*(row[c] for c in _SHAPE), row["ep"]) for row in wide}
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        case = (*(row[c] for c in _SHAPE), row["ep"])
        if case in cases and (row["kernel"], row["distribution"]) == (_BALANCED_OF_WIDE, "balanced"):
            point = (*case, row["tokens"], row["tokens"] * row["num_experts"])
            times.setdefault(point, {})[_release(row)] = row["latency_us"] * 1e-6
    found: dict[str, list[tuple[float, float, float]]] = {}
    for (*_, logits), taken in times.items():
        for old in older & taken.keys():
            found.setdefault(old, []).extend((logits, taken[old], taken[new]) for new in taken.keys() - {old})
    return {old: router_logit_s(*np.array(points).T) for old, points in found.items() if points}


@cache
def _vectors(tokens: int, top_k: int, experts: int, alpha: float, ep: int, slots: int, draws: int) -> Any:
    # One generator per case: its draws do not depend on what else is validated.
    rng = np.random.default_rng([tokens, top_k, experts, round(alpha * 100), ep])
    counts = draw_choices(tokens, top_k, experts, alpha, ep, draws, rng)
    return busiest_rank_eplb(counts, ep, slots, tokens) if slots else busiest_rank(counts, ep, tokens)


def skew_rows(profile: HardwareProfile) -> list[Row]:
    """Each skewed row at EP >= 8 and many tokens: measured ratio, ours, and the two baselines'."""
    rows = _experts(profile).to_pylist()
    logit_s, bandwidth = _router_logit_s(rows), find_accelerator(profile.meta.accelerator).memory_bandwidth
    balanced: dict[tuple[Any, ...], list[Row]] = {}
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
        if name == "balanced" or not name.startswith("power_law") or ep < 8 or tokens < _MANY or experts % ep:
            continue
        wide = row["kernel"].startswith(_WIDE)
        key = (*(row[c] for c in _SHAPE), _BALANCED_OF_WIDE if wide else row["kernel"], _release(row))
        same_release = key in balanced
        if not same_release and wide:
            key = (*key[:-1], "")
        if key not in fits:
            base = balanced.get(key, [])
            times = {(r["ep"], r["tokens"]): r["latency_us"] for r in base}
            fits[key] = _fit(base, bandwidth), times
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
        reference = None if same_release else times[ep, tokens] * 1e-6
        longer = 0.0
        if wide and same_release:  # the rank chooses for its own tokens; the law has it choose for those that arrive
            longer = logit_s.get(_release(row), 0.0) * (slots * tokens / ep - experts * float(arriving.mean()))
        sizes = np.array(sorted(t for e, t in times if e == ep), float)
        took = np.array([times[ep, int(t)] for t in sizes])
        busiest = vectors.sum(1) * ep / row["top_k"]
        scaled = line(sizes, took, np.minimum(busiest, sizes[-1])) * np.maximum(busiest / sizes[-1], 1)
        ours = skewed_over_balanced(
            fit, vectors, tokens, row["top_k"], experts, ep, arriving if wide else None, reference, longer
        )
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
                "ours": ours,
                "token_sum": float(scaled.mean()) / times[ep, tokens],
            }
        )
    return answer


def _fit(base: list[Row], memory_bandwidth: float) -> ExpertCosts | None:
    spread = [r for r in base if r["ep"] > 1 and r["active_experts"] > 0]
    if len(spread) < 6:
        return None
    columns = [np.array([float(r[c]) for r in spread]) for c in ("rank_pairs", "active_experts", "latency_us")]
    weight_s = expert_weight_bytes(spread[0]) / memory_bandwidth
    return fit_experts(columns[0], columns[1], columns[2] * 1e-6, "", weight_s)
