"""Figures of runs in words, for pages and the terminal alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moeplan.artifacts.simulation_result import Headline
from moeplan.reports.wording import format_bytes, format_number, format_percent, format_seconds

__all__ = ["brief_notes", "case_words", "change_text", "interval", "shown", "verdicts_text"]


_GAP = re.compile(
    r"scaled or modelled: profile (?P<profile>.+?) does not cover (?P<table>\w+) at .*?: "
    r"(?:(?P<place>[^:]+?) is not there.*|it has no table \w+); measure it: .*",
    re.DOTALL,
)
_BEYOND = "extrapolated beyond measurements: "


def brief_notes(notes: Iterable[str]) -> list[str]:
    """Notes as a terminal shows them: what a profile lacks in one line per table, what is extrapolated in one line, all
    others as they are. Regions and the commands that measure them stay in the notes themselves."""
    lacks: dict[str, list[str]] = {}
    beyond: list[str] = []
    others: list[str] = []
    for note in notes:
        if (gap := _GAP.fullmatch(note)) is not None:
            head = f"scaled or modelled: {gap['table']} (profile {gap['profile']} has no"
            lacks.setdefault(head, []).append(gap["place"] or "such table")
        elif note.startswith(_BEYOND):
            beyond.append(note.removeprefix(_BEYOND))
        else:
            others.append(note)
    gaps = [f"{head} {', '.join(dict.fromkeys(places))})" for head, places in lacks.items()]
    if gaps:
        gaps.append("commands that measure these are in the notes of --json and of the page")
    return others + gaps + ([_BEYOND + ", ".join(beyond)] if beyond else [])

_BASIS = {
    "seeds and costs": "Both runs share seeds and costs: taken seed by seed, each error of the costs in both at once.",
    "seeds": "Both runs share seeds, and are taken seed by seed; model, cluster, profile or technique differ, so errors"
    " of their costs count as independent.",
    "costs": "Both runs share costs, each error of which is in both at once; seeds differ and count as independent.",
    "nothing": "The runs share neither seeds nor costs, and count as independent.",
    "not kept": "Taken as independent, which is wide: a result of an older version keeps no figures run by run;"
    " simulate it again.",
}  # by Difference.paired


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
    """How many figures are better, worse and neither, and what that rests on."""
    better, worse = (sum(d.verdict == word for d in differences) for word in ("better", "worse"))
    basis = "".join(f" {_BASIS[word]}" for word in dict.fromkeys(d.paired for d in differences))
    if any(d.seeds == 1 for d in differences):
        basis += " One seed: what others would change is not in the intervals."
    words = f"Of {len(differences)} figures {better} are better, {worse} worse"
    untold = sum(d.verdict == "not told apart" for d in differences)
    return f"{words}, {untold} not told apart (the change may be none).{basis}" if untold else f"{words}.{basis}"
