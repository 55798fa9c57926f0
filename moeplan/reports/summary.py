"""What a plan comes to: the figures that the page and the terminal both show.

``L`` layers, ``E`` experts, ``P`` slots, ``R`` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import LayerEvaluation, Plan
from moeplan.errors import PlanError
from moeplan.reports.wording import format_bytes, format_percent, format_seconds

__all__ = [
    "STATUS_TEXT",
    "Evidence",
    "KeyFigure",
    "LayerRow",
    "Locality",
    "gain_text",
    "headline",
    "key_figures",
    "layer_rows",
    "rank_load",
    "relative_load",
    "relative_loads",
]

STATUS_TEXT = {
    "optimal": "proven optimal for its objective",
    "feasible": "best found within the search budget",
    "time_limit": "stopped by the wall-clock limit: another run may give another plan",
    "interrupted": "interrupted: the best plan found so far",
}


@dataclass(frozen=True, slots=True)
class Locality:
    """How far tokens travel in each layer, counted token by token; None where not counted."""

    nodes_per_token_L: tuple[float, ...] | None = None
    ranks_per_token_L: tuple[float, ...] | None = None
    same_node_share_L: tuple[float | None, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What is known beyond the plan file; every part may be missing.

    ``load_LE`` are tokens per layer and expert, ``load_*_LR`` those that each rank works on as evaluation counts them
    (None: every slot takes its share), ``load_note`` says where they are not those planned on, ``before``
    is the placement compared with and ``evaluation_before`` what it does to each layer, ``traffic_*_RR`` (from
    home or source rank, to rank) are in ``traffic_unit``, ``locality_*`` are counted on the tokens of the load,
    ``speed_R`` is the relative speed of each rank (None: equal).
    """

    load_LE: NDArray[np.float64] | None = None
    load_before_LR: NDArray[np.float64] | None = None
    load_after_LR: NDArray[np.float64] | None = None
    load_note: str = ""
    before: Placement | None = None
    before_name: str = "before"
    evaluation_before: tuple[LayerEvaluation, ...] = ()
    traffic_before_RR: NDArray[np.float64] | None = None
    traffic_after_RR: NDArray[np.float64] | None = None
    traffic_unit: str = "bytes"
    traffic_note: str = ""
    locality_before: Locality = Locality()
    locality_after: Locality = Locality()
    speed_R: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One figure of the first screen; ``before`` is None where there is nothing to compare with."""

    label: str
    before: str | None
    after: str
    detail: str


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer, before and after; None where not known."""

    layer_id: int
    max_over_mean: float | None
    max_over_mean_before: float | None
    busiest_rank: int | None
    nodes_per_token: float | None
    nodes_per_token_before: float | None
    ranks_per_token: float | None
    ranks_per_token_before: float | None
    same_node_share: float | None
    same_node_share_before: float | None
    time_s: float | None
    time_before_s: float | None


def rank_load(placement: Placement, load_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens that each rank works on in each layer: every slot takes its share of its expert's tokens.

    Raises:
        PlanError: the load has other layers or experts than the placement.
    """
    if load_LE.shape != (placement.num_layers, placement.num_experts):
        raise PlanError(
            f"load has shape {load_LE.shape} but the placement has {placement.num_layers} layers of"
            f" {placement.num_experts} experts; take the load of the same model"
        )
    from moeplan.costs.counting import count_loads  # here: it brings a compiler that a bare plan does not need

    load_LR: NDArray[np.float64] = count_loads(load_LE[None], placement)[0]
    return load_LR


def relative_load(
    placement: Placement, load_LR: NDArray[np.float64], speed_R: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Load of each rank over the mean of its layer, speeds accounted for; NaN for ranks without slots."""
    speed_R = np.ones(placement.num_ranks) if speed_R is None else speed_R
    live_R = np.bincount(placement.rank_of_slot_P, minlength=placement.num_ranks) > 0
    mean_L = load_LR.sum(axis=1) / speed_R[live_R].sum()
    relative_LR = np.full(load_LR.shape, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative_LR[:, live_R] = load_LR[:, live_R] / speed_R[live_R] / mean_L[:, None]
    return relative_LR


def relative_loads(plan: Plan, evidence: Evidence) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Relative load under the placement compared with and under the plan; None where it is not known.

    Raises:
        PlanError: the load has other layers or experts than the placements.
    """

    def relative(placement: Placement | None, load_LR: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        if placement is None or evidence.load_LE is None:
            return None
        load_LR = rank_load(placement, evidence.load_LE) if load_LR is None else load_LR
        return relative_load(placement, load_LR, evidence.speed_R)

    return relative(evidence.before, evidence.load_before_LR), relative(plan.placement, evidence.load_after_LR)


def layer_rows(plan: Plan, evidence: Evidence) -> list[LayerRow]:
    """One row per layer. Where the evidence has a load, both sides come from it and can be compared."""
    after_L = {item.layer_id: item for item in plan.evaluation}
    before_L = {item.layer_id: item for item in evidence.evaluation_before}
    relative_before, relative = relative_loads(plan, evidence)
    stays = plan.objective.return_mode == "stay"  # else tokens go home, whatever the next layer's experts
    rows = []
    for index, layer_id in enumerate(plan.layer_ids):
        after, before = after_L.get(layer_id), before_L.get(layer_id)
        busiest = peak = peak_before = None
        if relative is not None:
            busiest = int(np.nanargmax(relative[index]))
            peak = float(relative[index, busiest])
        elif after is not None:
            peak = after.max_over_mean_load
        if relative_before is not None:
            peak_before = float(np.nanmax(relative_before[index]))
        elif before is not None:
            peak_before = before.max_over_mean_load
        far = _locality(evidence.locality_after, index, after, stays)
        far_before = _locality(evidence.locality_before, index, before, stays)
        rows.append(
            LayerRow(
                layer_id=layer_id,
                max_over_mean=peak,
                max_over_mean_before=peak_before,
                busiest_rank=busiest,
                nodes_per_token=far[0],
                nodes_per_token_before=far_before[0],
                ranks_per_token=far[1],
                ranks_per_token_before=far_before[1],
                same_node_share=far[2],
                same_node_share_before=far_before[2],
                time_s=after.time_s if after else None,
                time_before_s=before.time_s if before else None,
            )
        )
    return rows


def _locality(
    counted: Locality, index: int, item: LayerEvaluation | None, stays: bool
) -> tuple[float | None, ...]:
    """Nodes and ranks per token and, where tokens stay, same-node share of a layer: as counted, else as evaluated."""
    names = ("nodes_per_token", "ranks_per_token", "same_node_share")
    known = [getattr(counted, f"{name}_L") for name in names]
    return tuple(
        None if name == "same_node_share" and not stays else values[index] if values else getattr(item, name, None)
        for name, values in zip(names, known, strict=True)
    )


def headline(plan: Plan) -> tuple[str, str]:
    """The verdict as ``(apply | refuse | open, sentence)``."""
    if plan.verdict is None:
        return "open", "No verdict in this plan"
    return ("apply", "Apply this plan") if plan.verdict.apply else ("refuse", "Do not apply this plan")


def key_figures(plan: Plan, evidence: Evidence) -> list[KeyFigure]:
    """The figures of the first screen, those that are known."""
    rows = layer_rows(plan, evidence)
    figures = []
    p, other = plan.prediction, ""
    if p is not None and evidence.before is not None and evidence.before_name != p.baseline:
        other = f" ({evidence.before_name})"  # a plan keeps the seconds of its own baseline: two placements before
    if p is not None:
        figures.append(
            KeyFigure(
                "Predicted step time",
                format_seconds(p.baseline_time_s) + (f" ({p.baseline})" if other else ""),
                format_seconds(p.time_s),
                f"routed experts of all layers, {p.tokens_per_step:,} tokens; interval"
                f" {format_seconds(p.time_low_s)} to {format_seconds(p.time_high_s)}; before: {p.baseline}",
            )
        )
    if (peak := _mean([row.max_over_mean for row in rows])) is not None:
        before = _mean([row.max_over_mean_before for row in rows])
        worst = max(rows, key=lambda row: row.max_over_mean or 0)
        figures.append(
            KeyFigure(
                "Max/mean load",
                None if before is None else f"{before:.3f}{other}",
                f"{peak:.3f}",
                f"busiest rank over the mean, averaged over layers; worst is layer {worst.layer_id}"
                f" with {worst.max_over_mean:.3f}",
            )
        )
    if (nodes := _mean([row.nodes_per_token for row in rows])) is not None:
        before = _mean([row.nodes_per_token_before for row in rows])
        figures.append(
            KeyFigure(
                "Nodes per token",
                None if before is None else f"{before:.2f}{other}",
                f"{nodes:.2f}",
                f"distinct nodes that a token's experts touch, of {plan.placement.num_nodes}",
            )
        )
    if (share := _mean([row.same_node_share for row in rows])) is not None:
        before = _mean([row.same_node_share_before for row in rows])
        figures.append(
            KeyFigure(
                "Same-node share",
                None if before is None else format_percent(before) + other,
                format_percent(share),
                "steps to the next layer that stay inside a node",
            )
        )
    if plan.bounds:
        bound = plan.bounds[0]
        figures.append(
            KeyFigure("Proven gap", None, format_percent(bound.gap), f"{bound.quantity}; {bound.argument}")
        )
    if (m := plan.migration) is not None:
        copies = f"{len(m.moves):,} expert {'copy' if len(m.moves) == 1 else 'copies'}"
        figures.append(
            KeyFigure(
                "Migration",
                None,
                format_bytes(m.bytes),
                f"{copies} in {format_seconds(m.seconds)}; {m.source}",
            )
        )
    if (v := plan.verdict) is not None and v.break_even_s is not None:
        steps = "" if v.break_even_steps is None else f"{v.break_even_steps:,} steps, "
        figures.append(
            KeyFigure(
                "Break-even",
                None,
                f"{steps}{format_seconds(v.break_even_s)}",
                "of MoE work until the migration has paid for itself",
            )
        )
    return figures


def gain_text(plan: Plan) -> str | None:
    """Expected gain with its interval, in words; None without a verdict."""
    if (v := plan.verdict) is None:
        return None
    return (
        f"{format_percent(v.expected_gain)} ({format_percent(v.expected_gain_low)} to"
        f" {format_percent(v.expected_gain_high)}) of step time, on {v.held_out}"
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
