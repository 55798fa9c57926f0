"""The page of a plan: one HTML file that needs nothing else, and the one picture of it.

Every text that comes from a plan file is escaped by jinja2 (autoescape) or by the SVG writer: a plan is input
and may hold anything. The same plan and evidence give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.plan import Plan, Verdict
from moeplan.reports import figures
from moeplan.reports.summary import (
    STATUS_TEXT,
    Evidence,
    LayerRow,
    headline,
    key_figures,
    layer_rows,
    relative_loads,
)
from moeplan.reports.wording import format_bytes, format_number, format_percent, format_seconds

__all__ = ["plan_svg", "render_plan_page"]

MAX_MOVES_SHOWN = 60


def render_plan_page(plan: Plan, evidence: Evidence) -> str:
    """One self-contained HTML page; what is not known is missing on the page with the reason.

    Raises:
        PlanError: the load does not fit the placements.
    """
    from moeplan.reports.templating import page_environment

    environment = page_environment()
    environment.filters |= {
        "seconds": format_seconds,
        "size": format_bytes,
        "percent": format_percent,
        "number": format_number,
    }
    rows, replicas_LE = layer_rows(plan, evidence), plan.placement.replicas_LE
    verdict_class, verdict_text = headline(plan)
    return environment.get_template("plan.html.j2").render(
        plan=plan,
        evidence=evidence,
        placement=plan.placement,
        verdict_class=verdict_class,
        verdict_text=verdict_text,
        gauge=None if plan.verdict is None else _gauge(plan.verdict),
        figures=[f for f in key_figures(plan, evidence) if f.label != "Break-even"],  # which is in the verdict
        status_text=STATUS_TEXT[plan.status],
        load_maps=_load_maps(plan, evidence),
        traffic_maps=_traffic_maps(plan, evidence),
        layer_plots=_layer_plots(plan, evidence, rows),
        columns=_columns(rows),
        rows=rows,
        moves=_moves(plan),
        replica_map=figures.replica_map(replicas_LE, plan.layer_ids) if (replicas_LE > 1).any() else None,
        sources=[_source(part, text) for part, text in plan.prediction.source.items()]
        if plan.prediction
        else [],
        workload=_fields(plan.workload.model_dump(mode="json")),
        objective=_fields(plan.objective.model_dump(mode="json")),
    )


@dataclass(frozen=True, slots=True)
class _Gauge:
    """Places on the gain axis, in per cent of its width."""

    zero: float
    expected: float
    low: float
    high: float
    largest: float


def _gauge(verdict: Verdict) -> _Gauge:
    gains = (
        verdict.expected_gain,
        verdict.expected_gain_low,
        verdict.expected_gain_high,
        verdict.largest_possible_gain,
    )
    start, end = min(0.0, *gains), max(0.0, *gains)
    width = (end - start) or 1.0

    def place(gain: float) -> float:
        return round(100 * (gain - start) / width, 2)

    return _Gauge(place(0.0), *(place(gain) for gain in gains))


def _sides(evidence: Evidence, *maps: NDArray[np.float64] | None) -> list[tuple[str, NDArray[np.float64]]]:
    """Maps before and after with their titles, those that are known."""
    before = "Before" if evidence.before_name == "before" else f"Before: {evidence.before_name}"
    names = (before, "After: this plan")
    return [(name, values) for name, values in zip(names, maps, strict=True) if values is not None]


def _load_maps(plan: Plan, evidence: Evidence) -> list[str]:
    sides = _sides(evidence, *relative_loads(plan, evidence))
    if not sides:
        return []
    limits = figures.colour_limits(*(values for _, values in sides))
    return [
        figures.load_heat_map(values, plan.layer_ids, plan.ranks_per_node, limits, name) for name, values in sides
    ]


def _traffic_maps(plan: Plan, evidence: Evidence) -> list[str]:
    sides = _sides(evidence, evidence.traffic_before_RR, evidence.traffic_after_RR)
    if not sides:
        return []
    limits = figures.colour_limits(*(matrix for _, matrix in sides))
    words = (
        ("from rank", "to rank")
        if plan.objective.return_mode == "stay"
        else ("home rank", "rank of the expert")
    )
    return [
        figures.matrix_heat_map(matrix, plan.ranks_per_node, limits, name, evidence.traffic_unit, words)
        for name, matrix in sides
    ]


def _layer_plots(plan: Plan, evidence: Evidence, rows: list[LayerRow]) -> list[str]:
    names = (evidence.before_name, "this plan")
    scaled_L = _time_bound(plan)
    unit, factor = _time_unit([row.time_s for row in rows])
    quantities: list[tuple[str, list[float | None], list[float | None], list[float] | None]] = [
        ("Max/mean load", [r.max_over_mean for r in rows], [r.max_over_mean_before for r in rows], None),
        (
            "Nodes per token",
            [r.nodes_per_token for r in rows],
            [r.nodes_per_token_before for r in rows],
            None,
        ),
        (
            "Ranks per token",
            [r.ranks_per_token for r in rows],
            [r.ranks_per_token_before for r in rows],
            None,
        ),
        (
            f"Layer time, {unit}",
            [None if r.time_s is None else r.time_s / factor for r in rows],
            [None if r.time_before_s is None else r.time_before_s / factor for r in rows],
            None if scaled_L is None else [value / factor for value in scaled_L],
        ),
        (
            "Same-node share",
            [r.same_node_share for r in rows],
            [r.same_node_share_before for r in rows],
            None,
        ),
    ]
    return [
        figures.layer_plot(plan.layer_ids, title, after, before if _any(before) else None, bound, names)
        for title, after, before, bound in quantities
        if _any(after)
    ]


def _any(values: list[float | None]) -> bool:
    return any(value is not None for value in values)


def _time_bound(plan: Plan) -> tuple[float, ...] | None:
    for bound in plan.bounds:
        if "time" in bound.quantity and len(bound.bound_L) == len(plan.layer_ids):
            return bound.bound_L
    return None


def _time_unit(times: list[float | None]) -> tuple[str, float]:
    largest = max((t for t in times if t is not None), default=1.0)
    return ("µs", 1e-6) if largest < 1e-3 else ("ms", 1e-3) if largest < 1.0 else ("s", 1.0)


def _columns(rows: list[LayerRow]) -> list[str]:
    """Names of the columns that hold anything."""
    names = [name for name in LayerRow.__slots__ if name != "layer_id"]
    return [name for name in names if any(getattr(row, name) is not None for row in rows)]


def _moves(plan: Plan) -> dict[str, Any] | None:
    if plan.migration is None or not plan.migration.moves:
        return None
    moves = plan.migration.moves
    matrix_RR = np.zeros((plan.num_ranks, plan.num_ranks))
    np.add.at(matrix_RR, ([m.source_rank for m in moves], [m.target_rank for m in moves]), 1)
    per_layer = Counter(m.layer_id for m in moves)
    node_R = np.arange(plan.num_ranks) // plan.ranks_per_node
    return {
        "count": len(moves),
        "between_nodes": int(matrix_RR[node_R[:, None] != node_R[None, :]].sum()),
        "layers": len(per_layer),
        "shown": moves[:MAX_MOVES_SHOWN],
        "matrix": figures.matrix_heat_map(
            matrix_RR,
            plan.ranks_per_node,
            figures.colour_limits(matrix_RR),
            "Copies by rank pair",
            "expert copies",
        ),
        "per_layer": figures.layer_bars(
            plan.layer_ids, "Copies by layer", [per_layer[i] for i in plan.layer_ids]
        ),
    }


def _source(part: str, text: str) -> tuple[str, str, str]:
    """(part, kind, text): ``kind`` is the first of the words of provenance that the text holds."""
    words = ("extrapolated", "interpolated", "measured", "modelled")
    return part, next((word for word in words if word in text.lower()), ""), text


def _fields(values: dict[str, Any]) -> list[tuple[str, str]]:
    def words(value: Any) -> str:
        return "default" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    return [(name.replace("_", " "), words(value)) for name, value in values.items()]


def plan_svg(plan: Plan, evidence: Evidence) -> str:
    """One picture that stands alone: load of ranks by layer where it is known, else the expert in every slot.

    Raises:
        PlanError: the load does not fit the placements.
    """
    placement = plan.placement
    subtitle = (
        f"{len(plan.layer_ids)} MoE layers, {plan.num_experts} experts on {placement.num_slots} slots,"
        f" {plan.num_ranks} ranks in {placement.num_nodes} {'node' if placement.num_nodes == 1 else 'nodes'},"
        f" planner {plan.planner}"
    )
    names = (evidence.before_name, "this plan")
    panels = [(n, v) for n, v in zip(names, relative_loads(plan, evidence), strict=True) if v is not None]
    if panels:
        return figures.plan_picture(
            f"{plan.model}: load of every rank in every layer",
            subtitle,
            panels,
            plan.layer_ids,
            plan.ranks_per_node,
            "load of a rank / mean of the layer",
            "rank",
        )
    expert_LP = placement.physical_to_logical_LP.astype(np.float64)
    expert_LP[expert_LP < 0] = np.nan
    per_node = int(np.searchsorted(placement.node_of_slot_P, 1)) or placement.num_slots
    return figures.plan_picture(
        f"{plan.model}: the expert in every slot",
        subtitle,
        [("this plan", expert_LP)],
        plan.layer_ids,
        per_node,
        "logical expert",
        "slot, in rank order",
        ranges=False,
    )
