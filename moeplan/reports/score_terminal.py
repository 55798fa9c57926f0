"""Scored placements in the terminal: one, a line per layer; several, a line each; and what the costs are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from moeplan.reports.wording import format_seconds

__all__ = ["score_view", "scores_view"]

_COLUMNS = {
    "max_over_mean_load": "max/mean load", "nodes_per_token": "nodes/token", "ranks_per_token": "ranks/token",
    "same_node_share": "stays in node", "time_s": "time",
}  # fmt: skip


def score_view(score: Mapping[str, Any], title: str) -> RenderableType:
    """The answer of :meth:`moeplan.pipeline.evaluate.Score.to_json`, its columns that are known.

    Where a token's next expert is counts only when it stays there: that column is of ``stay`` mode alone.
    """
    names = _names(score)
    heads = [Column(_COLUMNS[name], justify="right", no_wrap=True) for name in names]
    table = Table(Column("layer", justify="right"), *heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in score["layers"]:
        table.add_row(str(row["layer_id"]), *(_cell(name, row[name]) for name in names))
    table.add_section()
    table.add_row("all", *(_cell(name, score[name]) for name in names), style="bold")
    return Group(Text(title), table, *_point(score))


def scores_view(
    plans: Sequence[str],
    scores: Sequence[Mapping[str, Any]],
    changes: Sequence[Mapping[str, float | None]],
    title: str,
) -> RenderableType:
    """Totals of several placements side by side; under each but the first's the change from it, in percent."""
    names = _names(scores[0])
    heads = [Column(_COLUMNS[name], justify="right") for name in names]
    table = Table(Column("placement", overflow="fold"), *heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row, (plan, score, change) in enumerate(zip(plans, scores, changes, strict=True)):
        cells = [_cell(name, score[name]) + (_change(change[name]) if row else "") for name in names]
        table.add_row(Text(plan), *cells)
    return Group(Text(title), table, *_point(scores[0]))


def _names(score: Mapping[str, Any]) -> list[str]:
    stays = score["objective"]["return_mode"] == "stay"
    return [name for name in _COLUMNS if score[name] is not None and (stays or name != "same_node_share")]


def _change(part: float | None) -> str:
    return "" if part is None else f"\n{100 * part:+.1f} %"


def _point(score: Mapping[str, Any]) -> list[RenderableType]:
    workload = score["workload"]
    point = f"{workload['phase']}, {workload['batch_per_rank']:,} tokens per rank; costs are from"
    sources = [Padding(Text(f"{part}: {source}"), (0, 0, 0, 2)) for part, source in score["source"].items()]
    return [Text(point), *sources]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return format_seconds(value) if name == "time_s" else f"{value:.3f}"
