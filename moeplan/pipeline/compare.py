"""``moeplan compare``: two simulations, or two sweeps case by case, headline by headline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeplan.artifacts.simulation_result import Headline, SimulationResult
from moeplan.errors import InputError
from moeplan.files import canonical_json, read_json

__all__ = ["Difference", "compare"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A headline of two results. ``verdict``: better, worse, or not told apart where the intervals overlap."""

    name: str
    unit: str
    a: Headline
    b: Headline
    change: float
    change_low: float
    change_high: float
    relative: float | None
    verdict: Literal["better", "worse", "not told apart", "equal"]


def compare(a: Path, b: Path) -> list[tuple[dict[str, Any], list[Difference]]]:
    """Headlines of ``b`` against ``a``: two results, or two sweeps case by case.

    Raises:
        InputError: not simulations, or sweeps without a case in common.
    """
    pairs = _pairs(a, b)
    return [(case, [_difference(name, one, two) for name, one, two in _shared(x, y)]) for case, x, y in pairs]


def _pairs(a: Path, b: Path) -> list[tuple[dict[str, Any], SimulationResult, SimulationResult]]:
    sweeps = [(path / "sweep.json").is_file() for path in (a, b)]
    if sweeps[0] != sweeps[1]:
        raise InputError(f"{a} and {b}: one is a sweep and the other a single simulation; name one of its cases")
    if not sweeps[0]:
        return [({}, SimulationResult.load(a), SimulationResult.load(b))]
    first, second = _swept(a), _swept(b)
    shared = [key for key in first if key in second]
    if not shared:
        raise InputError(f"the sweeps {a} and {b} have no case in common")
    return [(json.loads(key), SimulationResult.load(first[key]), SimulationResult.load(second[key])) for key in shared]


def _swept(path: Path) -> dict[str, Path]:
    document = read_json(path / "sweep.json")
    return {canonical_json(row["case"]): path / row["path"] for row in document["cases"] if row["path"]}


def _shared(a: SimulationResult, b: SimulationResult) -> list[tuple[str, Headline, Headline]]:
    return [(name, one, b.headlines[name]) for name, one in a.headlines.items() if name in b.headlines]


def _difference(name: str, a: Headline, b: Headline) -> Difference:
    """Interval of the change: both intervals taken as independent, their sides added in squares.

    Errors that both share, such as those of one cost table, count twice: the interval is on the safe side.
    """
    change = b.value - a.value
    low = change - float(np.hypot(b.value - b.low, a.high - a.value))
    high = change + float(np.hypot(b.high - b.value, a.value - a.low))
    verdict: Literal["better", "worse", "not told apart", "equal"] = "not told apart"
    if change == 0:
        verdict = "equal"
    elif low > 0 or high < 0:
        verdict = "better" if (change < 0) == (a.better == "lower") else "worse"
    return Difference(name, a.unit, a, b, change, low, high, change / a.value if a.value else None, verdict)
