"""A sweep in the terminal: cases that have no result, and why; then those that have one, of training the best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from moeplan.artifacts.simulation_result import Headline
from moeplan.reports.run_terminal import WIDE
from moeplan.reports.run_words import interval, shown
from moeplan.reports.wording import format_number

__all__ = ["sweep_view"]

_FOLDED = 12  # columns of a list
_UNBOUND = 1000  # columns to measure a table on
_SERVED = {
    "ttft_p50_s": "TTFT p50", "tpot_p50_s": "TPOT p50", "output_tokens_per_s_per_gpu": "per GPU",
    "goodput_requests_per_s": "goodput",
}  # fmt: skip
# Columns of a training sweep: headline, what stands above it, units in one of its own.
_TRAINED = (
    ("mfu", "MFU\n%", 100), ("bubble_share", "bubble\n%", 100), ("exposed_exchange_share", "exchange\n%", 100),
    ("exposed_sync_share", "sync\n%", 100), ("peak_memory_bytes", "memory\nGiB", 2**-30),
)  # fmt: skip

_Row = tuple[str, ...]
_Fields = Mapping[str, bool]  # those that are swept, and whether their values are lists, which fold


def sweep_view(swept: Any, width: int) -> RenderableType:
    """Cases of a sweep (:class:`moeplan.pipeline.simulate.Sweep`) on so many columns."""
    short = [name.rpartition(".")[2] for name in swept.cases[0]]
    fields = [word if short.count(word) == 1 else name for name, word in zip(swept.cases[0], short, strict=True)]
    cases = [tuple(map(_words, case.values())) for case in swept.cases]
    folds = [any(", " in cell for cell in column) for column in zip(*cases, strict=True)]
    heads = dict(zip(fields, folds, strict=True))
    parts: list[RenderableType] = []
    missing = [number for number, result in enumerate(swept.results) if result is None]
    if missing:
        title = f"{len(missing)} of {len(cases)} cases without a result"
        parts.append(Text(f"{title}, {len(swept.impossible)} of them impossible"))
        parts.append(_without_result(heads, cases, {n: swept.failures.get(n, "not run") for n in missing}))
    if ranked := swept.ranked:
        training = swept.results[ranked[0]].kind == "training"
        title = f"{len(ranked)} of {len(cases)} cases, {swept.resumed} of them kept from before"
        parts.append(Text(title + ", best first" * training))
        rows = [(cases[number], swept.results[number].headlines) for number in ranked]
        wide = width >= WIDE
        parts.append(_trained(heads, rows, wide or not any(folds), width) if training else _served(heads, rows, wide))
    return Group(*parts)


def _without_result(fields: _Fields, cases: Sequence[_Row], reasons: Mapping[int, str]) -> Table:
    grid = _table(fields, Column("why", overflow="fold"))
    for reason in dict.fromkeys(reasons.values()):
        for row in _rows([cases[number] for number, own in reasons.items() if own == reason]):
            grid.add_row(*row, reason)
    return grid


def _rows(cases: list[_Row]) -> list[_Row]:
    """Cases as one row, where they are all combinations of its values."""
    values = [list(dict.fromkeys(column)) for column in zip(*cases, strict=True)]
    return [tuple("/".join(each) for each in values)] if len(cases) == prod(map(len, values)) else cases


def _trained(fields: _Fields, rows: list[tuple[_Row, Mapping[str, Headline]]], ends: bool, width: int) -> Table:
    """``ends``: with those of the interval of throughput; these, then shares, are left out where they do not fit."""
    for shown_ends, others in ((ends, _TRAINED), (False, _TRAINED), (False, (_TRAINED[0], _TRAINED[-1]))):
        heads = ["tokens/s\nper GPU", *(["from", "to"] if shown_ends else []), *(head for _, head, _ in others)]
        grid = _table(fields, *(Column(head, justify="right", no_wrap=True) for head in heads))
        for case, lines in rows:
            rate = lines["tokens_per_s_per_gpu"]
            rates = [rate.value, *([rate.low, rate.high] if shown_ends else [])]
            cells = (f"{abs(factor * lines[name].value):.1f}" for name, _, factor in others)  # no sign where none is
            grid.add_row(*case, *(format_number(value, 4) for value in rates), *cells)
        if Console(width=_UNBOUND).measure(grid).minimum <= width:
            break
    return grid


def _served(fields: _Fields, rows: list[tuple[_Row, Mapping[str, Headline]]], ends: bool) -> Table:
    """``ends``: with those of each figure's interval."""
    names = [name for name in _SERVED if any(name in lines for _, lines in rows)]
    grid = _table(fields, *(Column(_SERVED[name], justify="right", no_wrap=True) for name in names))
    for case, lines in rows:
        grid.add_row(*case, *(_cell(lines.get(name), name, ends) for name in names))
    return grid


def _cell(line: Headline | None, name: str, ends: bool) -> str:
    if line is None:
        return "-"
    between = interval(line, name) if ends else ""
    return shown(line.value, line.unit, name) + (f" ({between})" if between else "")


def _table(fields: _Fields, *more: Column) -> Table:
    own = (
        Column(name.replace("_", "\n"), no_wrap=not fold, min_width=_FOLDED * fold, overflow="fold")
        for name, fold in fields.items()
    )
    return Table(*own, *more, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
