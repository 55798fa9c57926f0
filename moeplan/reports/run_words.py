"""Figures of runs in words, for pages and the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeplan.artifacts.simulation_result import Headline
from moeplan.reports.wording import format_bytes, format_number, format_percent, format_seconds

__all__ = ["case_words", "change_text", "interval", "shown", "verdicts_text"]


def shown(value: float, unit: str, name: str = "") -> str:
    """A figure with its unit, as people read it; shares in per cent, but for the length of a queue."""
    if unit == "s":
        return format_seconds(value)
    if unit == "bytes":
        return format_bytes(value)
    if unit == "1":
        return format_number(value) if "queue" in name else format_percent(value)
    return f"{format_number(value)} {unit}"


def interval(line: Headline, name: str = "") -> str:
    """Its ends; ``exact`` where it has none, empty where they meet."""
    if line.exact:
        return "exact"
    if line.high - line.low <= 1e-6 * abs(line.high):
        return ""
    low, high = (shown(value, line.unit, name) for value in (line.low, line.high))
    same_unit = low.split()[1:] == high.split()[1:]  # said once
    return f"{low.split()[0] if same_unit else low} to {high}"


def case_words(case: Mapping[str, Any]) -> str:
    """A case of a sweep by its values."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {'none' if value is None else value}" for name, value in case.items()
    )


def change_text(relative: float | None) -> str:
    """A relative change in per cent, with its sign unless it rounds to none."""
    if relative is None:
        return "-"
    return f"{100 * relative:+.1f}\u00a0%" if abs(relative) >= 5e-4 else "0.0\u00a0%"


def verdicts_text(differences: Sequence[Any]) -> str:
    """How many figures are better, worse and neither, in a sentence."""
    better, worse = (sum(d.verdict == word for d in differences) for word in ("better", "worse"))
    words = f"Of {len(differences)} figures {better} are better, {worse} worse"
    untold = sum(d.verdict == "not told apart" for d in differences)
    return f"{words}, {untold} not told apart (the change may be none)." if untold else f"{words}."
