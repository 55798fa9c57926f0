"""A plan in the terminal: verdict, key figures, layers and load, to the width there is.

Nothing is said by colour alone, so ``NO_COLOR`` loses nothing; terminals without block characters get ASCII.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from moeplan.artifacts.plan import Plan
from moeplan.reports.figures import colour_limits
from moeplan.reports.run_words import brief_notes
from moeplan.reports.summary import (
    STATUS_TEXT,
    Evidence,
    LayerRow,
    gain_text,
    headline,
    key_figures,
    layer_rows,
    relative_loads,
)
from moeplan.reports.wording import format_percent, format_seconds

__all__ = ["LoadMap", "plan_view"]

MAX_MAP_ROWS = 20
NARROW = 90
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_COLOURS = (
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
)
_STYLE = {"apply": "bold green", "refuse": "bold yellow", "open": "bold"}


def plan_view(plan: Plan, evidence: Evidence, width: int) -> RenderableType:
    """Everything ``moeplan show`` prints, as one rich renderable; without explanations where it is narrow.

    Raises:
        PlanError: the load of the evidence does not fit the plan.
    """
    placement = plan.placement
    title = Text.assemble(
        (plan.model, "bold"), f"  {len(plan.layer_ids)} MoE layers, {plan.num_experts} experts"
    )
    if plan.num_redundant_experts:
        title.append(f" + {plan.num_redundant_experts} redundant")
    nodes = placement.num_nodes
    title.append(f", {plan.num_ranks} ranks in {nodes} {'node' if nodes == 1 else 'nodes'}")
    kind = Text(
        f"{plan.workload.phase}, {plan.workload.batch_per_rank:,} tokens per rank,"
        f" {plan.objective.return_mode}, {plan.objective.dispatch};"
        f" planner {plan.planner}: {STATUS_TEXT[plan.status]}",
        style="dim",
    )
    rows = layer_rows(plan, evidence)
    parts: list[RenderableType] = [title, kind, Text(), _verdict(plan), Text(), _figures(plan, evidence, width)]
    if any(row.max_over_mean is not None for row in rows):
        parts += [Text(), _layers(rows, width)]
    names = (evidence.before_name, "this plan")
    if sides := [(n, v) for n, v in zip(names, relative_loads(plan, evidence), strict=True) if v is not None]:
        parts += [Text(), LoadMap(sides, plan.layer_ids)]
    else:
        parts += [Text(), Text("no load in a plan file: give --trace FILE for the load of every rank", style="dim")]
    parts += [Text(f"note: {note}", style="dim") for note in brief_notes(plan.notes)]
    return Group(*parts)


def _verdict(plan: Plan) -> RenderableType:
    kind, words = headline(plan)
    text = Text(words, style=_STYLE[kind])
    if (v := plan.verdict) is None:
        return text
    text.append(f"\n{v.reason}", style="default")
    text.append(f"\nexpected gain {gain_text(plan)}", style="not bold")
    text.append(
        f"\nno placement can gain more than {format_percent(v.largest_possible_gain)}", style="not bold"
    )
    return text


def _figures(plan: Plan, evidence: Evidence, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    if width >= NARROW:
        table.add_column(style="dim", overflow="fold")
    for figure in key_figures(plan, evidence):
        value = figure.after if figure.before is None else f"{figure.before} → {figure.after}"
        table.add_row(figure.label, Text(value), *([Text(figure.detail)] if width >= NARROW else []))
    return table


def _layers(rows: Sequence[LayerRow], width: int) -> Table:
    """All layers when few; else the five worst, the median and the best by max/mean load."""
    ranked = sorted(rows, key=lambda row: -(row.max_over_mean or 0.0))
    chosen: Iterable[tuple[str, LayerRow]] = [("", row) for row in rows]
    if len(rows) > 8:
        chosen = [("worst", row) for row in ranked[:5]]
        chosen += [("median", ranked[len(ranked) // 2]), ("best", ranked[-1])]
    columns: list[tuple[str, str]] = [
        ("max/mean", "max_over_mean"),
        ("before", "max_over_mean_before"),
        ("busiest rank", "busiest_rank"),
        ("nodes/token", "nodes_per_token"),
        ("before", "nodes_per_token_before"),
        ("time", "time_s"),
        ("before", "time_before_s"),
    ]
    if width < NARROW:
        columns = [columns[i] for i in (0, 1, 3, 5)]
    columns = [(head, name) for head, name in columns if any(getattr(row, name) is not None for row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title_justify="left")
    table.add_column("")
    for head in ("layer", *(head for head, _ in columns)):
        table.add_column(head, justify="right", no_wrap=True)
    for word, row in chosen:
        table.add_row(word, str(row.layer_id), *(_cell(name, getattr(row, name)) for _, name in columns))
    return table


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.startswith("time"):
        return format_seconds(value)
    return str(value) if name == "busiest_rank" else f"{value:.3f}"


class LoadMap:
    """Heat maps of load, layers down and ranks across; a mark is the largest of the cells that share it."""

    def __init__(self, sides: Sequence[tuple[str, NDArray[np.float64]]], layer_ids: Sequence[int]) -> None:
        """``sides`` are names and load over the layer's mean [L, R]."""
        self.sides = sides
        self.layer_ids = layer_ids
        self.limits = colour_limits(*(values for _, values in sides))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Side by side where the width allows it, else one below the other."""
        ranks = self.sides[0][1].shape[1]
        label = max(len(str(i)) for i in self.layer_ids) + 1
        # With the maps side by side each has this many columns of marks to itself.
        beside = (options.max_width - label) // len(self.sides) - 3
        marks = _BLOCKS if not options.ascii_only else _ASCII
        low, high = self.limits
        scale = f"load of a rank / mean of its layer, {marks[0]} {low:.2f} to {marks[-1]} {high:.2f}"
        largest = max(float(np.nanmax(values)) for _, values in self.sides)
        if largest > high:
            scale += f" and more (largest {largest:.2f})"
        yield Text(scale, style="dim")
        stacked = len(self.sides) > 1 and beside < ranks
        columns = min(ranks, options.max_width - label if stacked else beside)
        if stacked:
            for side in self.sides:
                yield self._table([side], columns, marks)
        else:
            yield self._table(self.sides, columns, marks)
        layers, columns = len(self.layer_ids), max(columns, 1)
        shared = [f"{-(-layers // MAX_MAP_ROWS)} layers"] if layers > MAX_MAP_ROWS else []
        shared += [f"{-(-ranks // columns)} ranks"] if ranks > columns else []
        if shared:
            yield Text(f"each mark is the largest of {' by '.join(shared)}", style="dim")

    def _table(self, sides: Sequence[tuple[str, NDArray[np.float64]]], columns: int, marks: str) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        table.add_column("", justify="right", style="dim")
        ranks_shared = max(1, -(-sides[0][1].shape[1] // max(columns, 1)))
        layers_shared = max(1, -(-len(self.layer_ids) // MAX_MAP_ROWS))
        for name, _ in sides:
            table.add_column(Text(name), no_wrap=True)
        grids = [_largest(values, layers_shared, ranks_shared) for _, values in sides]
        for row in range(len(grids[0])):
            lines = [self._line(grid[row], marks) for grid in grids]
            table.add_row(str(self.layer_ids[row * layers_shared]), *lines)
        return table

    def _line(self, values: NDArray[np.float64], marks: str) -> Text:
        low, high = self.limits
        text = Text()
        for value in values:
            if not np.isfinite(value):
                text.append(" ")
                continue
            level = float(np.clip((value - low) / (high - low), 0.0, 1.0))
            text.append(
                marks[round(level * (len(marks) - 1))], style=_COLOURS[round(level * (len(_COLOURS) - 1))]
            )
        return text


def _largest(values_LR: NDArray[np.float64], layers: int, ranks: int) -> NDArray[np.float64]:
    """Largest value of each block of ``layers`` by ``ranks`` cells (NaN where all are)."""
    filled = np.where(np.isfinite(values_LR), values_LR, -np.inf)
    blocks = np.maximum.reduceat(filled, np.arange(0, filled.shape[0], layers), axis=0)
    blocks = np.maximum.reduceat(blocks, np.arange(0, filled.shape[1], ranks), axis=1)
    return np.where(np.isfinite(blocks), blocks, np.nan)
