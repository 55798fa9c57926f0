"""Simulations in the terminal: one, or two to compare; on 80 columns without intervals where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from moeplan.artifacts.simulation_result import SimulationResult
from moeplan.reports.run_words import case_words, change_text, interval, shown, verdicts_text
from moeplan.reports.wording import format_number

__all__ = ["WIDE", "comparison_view", "result_view"]

WIDE = 110
_MAIN = (
    "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "accept_length", "e2e_p50_s", "output_tokens_per_s",
    "output_tokens_per_s_per_gpu", "requests_per_s", "goodput_requests_per_s", "slo_attainment",
    "usd_per_million_output_tokens", "compute_share", "exchange_share", "bubble_share", "mean_queue_length",
)  # fmt: skip


def result_view(result: SimulationResult) -> RenderableType:
    """Main figures of a run, each with its interval."""
    counts, training = result.counts, result.kind == "training"
    what = f"{counts['steps']:,.0f} steps" if training else f"{counts['finished']:,.0f} requests"
    title = f"{result.model} on {result.num_ranks} ranks of {result.cluster}: {what} in {result.simulated_s:,.1f} s"
    table = _table(Column("figure"), _number("value"), _number("interval"))
    for name in result.headlines if training else _MAIN:
        if (line := result.headlines.get(name)) is not None:
            table.add_row(name, shown(line.value, line.unit, name), interval(line, name))
    return Group(Text(title), table)


def comparison_view(found: Sequence[tuple[Mapping[str, Any], Sequence[Any]]], width: int) -> RenderableType:
    """Figures of two runs, or case by case of two sweeps (as :func:`moeplan.pipeline.compare.compare` gives them)."""
    parts: list[RenderableType] = []
    for case, differences in found:
        wide = [_number("change from"), _number("to")] if width >= WIDE else []
        table = _table(Column("figure", overflow="fold"), _number("a"), _number("b"), _number("change"), *wide, "")
        for d in differences:
            values = (d.a.value, d.b.value, d.change_low, d.change_high)
            a, b, low, high = (_short(value, d.unit, d.name) for value in values)
            table.add_row(d.name, a, b, change_text(d.relative), *([low, high] if wide else []), d.verdict)
        parts += [Text(case_words(case))] if case else []
        parts += [table, Text(verdicts_text(differences))]
    return Group(*parts)


def _table(*columns: Column | str) -> Table:
    return Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


def _short(value: float, unit: str, name: str) -> str:
    """Without a unit that stands in the name, as of tokens_per_s."""
    return shown(value, unit, name) if unit in ("s", "bytes", "1") else format_number(value)


def _number(head: str) -> Column:
    return Column(head, justify="right", no_wrap=True)
