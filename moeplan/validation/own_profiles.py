"""What ``validate kernels`` asks of machines at hand: profiles measured by this tool predict their held-out sizes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from moeplan.pipeline.profile_checks import check_profile
from moeplan.pipeline.profile_request import profile_request
from moeplan.progress import Progress

__all__ = ["CPU_TARGET", "cpu_figures", "find_measured", "h200_figure"]

CPU_TARGET, _H200_TARGET = 0.10, 0.05
_CPU_TABLES = {"experts": "expert FFN", "alltoall": "gloo all-to-all"}
_MEASURE = "moeplan profile all --preset cpu --realtime --out profiles/cpu-NAME"


def find_measured(pattern: str) -> Path | None:
    """The first profile directory under ``profiles/`` of the working directory that matches ``pattern``."""
    return next((path for path in sorted(Path("profiles").glob(pattern)) if (path / "profile.json").is_file()), None)


def cpu_figures(directory: Path | None, live_s: float | None, progress: Progress) -> list[dict[str, Any]]:
    """Median error at held-out sizes of a CPU profile, every 4th of each series, with the spread of its samples.

    ``live_s``: measured now for so many seconds, instead of read from ``directory``.

    Raises:
        ProfileError: the directory holds no profile, or a rank died while measuring.
        MissingExtraError: ``live_s`` is given and torch is not installed.
    """
    if live_s is not None:
        from moeplan.profiling.device import may_be_realtime

        realtime = may_be_realtime()
        with tempfile.TemporaryDirectory() as room:
            check = _measure(Path(room) / "cpu", live_s, realtime, progress)
        return _checked(check, "measured now" if realtime else "measured now, without real-time priority")
    if directory is None:
        note = f"no profiles/cpu-* here; measure one with: {_MEASURE}"
        return [_figure(what, None, {"note": note}) for what in _CPU_TABLES.values()]
    return _checked(check_profile(directory), directory.name)


def _measure(out: Path, live_s: float, realtime: bool, progress: Progress) -> dict[str, Any]:
    from moeplan.pipeline.profiling import measure_profile

    for part, ops in (("experts", ()), ("collectives", ("alltoall",))):
        options = {"budget_s": live_s / 2, "realtime": realtime, "ops": ops}
        measure_profile(profile_request(part, "cpu", options), out, progress=progress)
    return check_profile(out)


def _checked(check: dict[str, Any], source: str) -> list[dict[str, Any]]:
    figures = []
    for table, what in _CPU_TABLES.items():
        found = check["tables"].get(table)
        more: dict[str, Any] = {"profile": source, "device": check["device"]}
        if found is not None:
            more |= {"held_out": found["held_out"]["points"], "p90": found["held_out"]["p90"]}
            more |= {"plain_line": found["held_out"]["plain_median"], "spread_of_samples": found["median_spread"]}
            more["foreign_cpu_share"] = check["foreign_cpu_share"]
        if found is None or not found["held_out"]["points"]:
            more["note"] = f"no table {table}" if found is None else f"too few rows in {table} to hold any out"
        figures.append(_figure(what, found["held_out"]["median"] if found else None, more))
    return figures


def _figure(what: str, value: float | None, more: dict[str, Any]) -> dict[str, Any]:
    reached = value is not None and value <= CPU_TARGET
    name = f"CPU, {what} at held-out sizes"
    return {"figure": name, "value": value, "target": CPU_TARGET, "reached": reached, **more}


def h200_figure(directory: Path | None) -> dict[str, Any]:
    """Skewed token vectors of an H200 profile predicted from its balanced rows; not scored where there is none."""
    figure: dict[str, Any] = {"figure": "H200, expert FFN at held-out token vectors", "target": _H200_TARGET}
    if directory is None:
        note = "no profiles/h200* here; on an H200: moeplan profile all --preset h200 --out profiles/h200-NAME"
        return {**figure, "value": None, "reached": None, "note": note}
    vectors = check_profile(directory)["vectors"]
    value = vectors["median"] if vectors else None
    return {**figure, "value": value, "reached": value is not None and value <= _H200_TARGET, **(vectors or {})}
