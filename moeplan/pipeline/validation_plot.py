"""``moeplan validate ... --plot FILE``: the answer of a validation as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeplan.files import write_text
from moeplan.reports.validation_figures import errors_picture, targets_picture

__all__ = ["plot_validation"]


def plot_validation(answer: dict[str, Any], title: str, path: Path, within: float = 0.15) -> None:
    """Write an SVG: row by row where the answer lists measured rows, else its figures over their targets.

    Raises:
        InputError: the file cannot be written.
    """
    if any("measured" in row for row in answer.get("rows", ())):
        ratios: dict[str, list[float]] = {}
        for row in answer["rows"]:
            if row["error"] is not None and row["within"] is not None:
                ratios.setdefault(row["section"], []).append(1 + row["error"])
        picture = errors_picture(title, ratios, within)
    else:
        bars = [bar for figure in answer["figures"] for bar in _bars(figure)]
        picture = targets_picture(title, bars)
    write_text(path, picture + "\n")


def _bars(figure: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(name, value, target, reached) of a figure; one for each target that it has."""
    name, target, reached = figure["figure"], figure.get("target"), bool(figure["reached"])
    if isinstance(target, dict):
        known = {key: limit for key, limit in target.items() if isinstance(figure.get(key), float)}
        return [(f"{name}, {key}", figure[key], limit, figure[key] <= limit) for key, limit in known.items()]
    if not target or figure.get("value") is None:
        return []
    return [(name, float(figure["value"]), float(target), reached)]
