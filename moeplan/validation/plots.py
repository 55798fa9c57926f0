"""``moeplan validate ... --plot FILE``: the answer of a validation as a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from moeplan.errors import InputError
from moeplan.files import write_text
from moeplan.reports.validation_figures import errors_picture, rows_picture, targets_picture, times_picture
from moeplan.validation.silicon import measured_rows

__all__ = ["plot_peers", "plot_silicon", "plot_validation"]

_WITHIN = 0.15


def plot_validation(answer: dict[str, Any], title: str, path: Path) -> None:
    """Write an SVG: row by row where the answer lists measured rows, else its figures over their targets.

    Raises:
        InputError: the file cannot be written.
    """
    if any("measured" in row for row in answer.get("rows", ())):
        ratios: dict[str, list[float]] = {}
        for row in answer["rows"]:
            if row["error"] is not None and row["within"] is not None:
                ratios.setdefault(row["section"], []).append(1 + row["error"])
        picture = errors_picture(title, ratios, _WITHIN)
    else:
        bars = [bar for figure in answer["figures"] for bar in _bars(figure)]
        picture = targets_picture(title, bars)
    write_text(path, picture + "\n")


def plot_silicon(rows: Path, path: Path) -> None:
    """Write an SVG of the rows of (b) and (c), from the file of predictions that ``--rows`` writes.

    Raises:
        InputError: the file of rows is another's, or the picture cannot be written.
        MissingExtraError: the package with the measurements is not installed.
    """
    measured = {row.id: row for row in measured_rows()}
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {
        (part, name): {} for part in "bc" for name in ("tpot", "ttft")
    }
    with rows.open(encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            part, row = line.get("split", ""), measured.get(line.get("id", ""))
            if part not in ("b", "c") or row is None:
                continue
            for name, value in (("tpot", row.tpot_ms), ("ttft", row.ttft_ms)):
                if predicted := line[f"predicted_{name}_ms"]:
                    found[part, name].setdefault(row.backend, []).append((value / 1e3, float(predicted) / 1e3))
    if not any(found.values()):
        raise InputError(f"{rows} holds no predictions of measured rows; write it with --rows")
    panels = [(f"({part}) {name.upper()}", groups) for (part, name), groups in found.items()]
    write_text(path, rows_picture("Served latencies of whole groups never tuned on", panels, _WITHIN) + "\n")


def plot_peers(answer: dict[str, Any], path: Path) -> None:
    """Write an SVG of run times beside those of the peers that ran.

    Raises:
        InputError: none ran, or the file cannot be written.
    """
    rows = [(f["figure"], f["ours_s"], f["peer_s"]) for f in answer["figures"] if f.get("peer_s") is not None]
    if not rows:
        raise InputError("no peer ran: there is nothing to draw; --json says why")
    write_text(path, times_picture("Run times, ours and the peers'", rows) + "\n")


def _bars(figure: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(name, value, target, reached) of a figure; one for each target that it has."""
    name, target, reached = figure["figure"], figure.get("target"), bool(figure["reached"])
    if isinstance(target, dict):
        known = {key: limit for key, limit in target.items() if isinstance(figure.get(key), float)}
        return [(f"{name}, {key}", figure[key], limit, figure[key] <= limit) for key, limit in known.items()]
    if not target or figure.get("value") is None:
        return []
    return [(name, float(figure["value"]), float(target), reached)]
