"""``moeplan compare``: two simulations, or two sweeps case by case, headline by headline.

Runs that share seeds are taken seed by seed, and those that share their costs (:attr:`Replays.costs_sha256`) with each
error of these in both at once: what moves both alike is no difference (common random numbers: Law, Simulation Modeling
and Analysis, chapter 11). The change's interval joins what seeds leave open, ``t s / sqrt(n)`` of the differences, and
how far the change moves where the costs are off (:mod:`moeplan.pipeline.intervals`), added in squares. What is not
shared counts as independent, the sides of both runs added in squares; so do whole intervals of results that have no
:class:`Replays`, written by an older version.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.simulation_result import Headline, Replays, SimulationResult
from moeplan.errors import InputError
from moeplan.files import canonical_json, read_json
from moeplan.pipeline.intervals import cost_sides, seed_side

__all__ = ["Difference", "compare"]

Paired = Literal["seeds and costs", "seeds", "costs", "nothing", "not kept"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A headline of two results. ``verdict``: better, worse, or not told apart where the change may be none.

    ``paired``: what both share and were compared by; ``seeds``: how many the spread is over, 0 where nothing is drawn.
    """

    name: str
    unit: str
    a: Headline
    b: Headline
    change: float
    change_low: float
    change_high: float
    relative: float | None
    verdict: Literal["better", "worse", "not told apart", "equal"]
    paired: Paired = "not kept"
    seeds: int = 0


def compare(a: Path, b: Path) -> list[tuple[dict[str, Any], list[Difference]]]:
    """Headlines of ``b`` against ``a``: two results, or two sweeps case by case.

    Raises:
        InputError: not simulations, or sweeps without a case in common.
    """
    pairs = _pairs(a, b)
    return [(case, _differences(x, y)) for case, x, y in pairs]


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


def _differences(a: SimulationResult, b: SimulationResult) -> list[Difference]:
    """Headlines that both have. See the module for how they are taken."""
    paired = _paired(a, b)
    names = [name for name in a.headlines if name in b.headlines]
    return [_difference(name, a, b, paired) for name in names]


def _paired(a: SimulationResult, b: SimulationResult) -> Paired:
    """What both runs share, and brought along to be compared by."""
    if a.replays is None or b.replays is None:
        return "not kept"
    seeds = a.seeds == b.seeds
    costs = (a.replays.costs_sha256, a.replays.parts) == (b.replays.costs_sha256, b.replays.parts)
    return "seeds and costs" if seeds and costs else "seeds" if seeds else "costs" if costs else "nothing"


def _difference(name: str, a: SimulationResult, b: SimulationResult, paired: Paired) -> Difference:
    one, two = a.headlines[name], b.headlines[name]
    change = two.value - one.value
    if a.replays is None or b.replays is None:
        below = float(np.hypot(two.value - two.low, one.high - one.value))
        above = float(np.hypot(two.high - two.value, one.value - one.low))
    else:
        seeds = _seed_side(a.replays.seeds[name], b.replays.seeds[name], "seeds" in paired)
        below, above = (
            float(np.hypot(seeds, costs)) for costs in _cost_sides(name, a.replays, b.replays, "costs" in paired)
        )
    low, high = change - below, change + above
    verdict: Literal["better", "worse", "not told apart", "equal"] = "not told apart"
    if change == 0 and (paired == "not kept" or low == high):
        verdict = "equal"
    elif low > 0 or high < 0:
        verdict = "better" if (change < 0) == (one.better == "lower") else "worse"
    relative = change / one.value if one.value else None
    return Difference(name, one.unit, one, two, change, low, high, relative, verdict, paired, min(_runs(a), _runs(b)))


def _runs(result: SimulationResult) -> int:
    """Over how many seeds it can spread."""
    return len(result.seeds) if result.kind == "serving" else 0


def _seed_side(a: Sequence[float], b: Sequence[float], paired: bool) -> float:
    if paired:
        return seed_side((np.array(b) - a).tolist())
    return float(np.hypot(seed_side(a), seed_side(b)))


def _cost_sides(name: str, a: Replays, b: Replays, paired: bool) -> tuple[float, float]:
    """How far below and above the change lies for the costs' errors."""
    moved_a, moved_b = (_moved(name, each) for each in (a, b))
    if paired:
        return cost_sides(moved_b - moved_a)
    (below_a, above_a), (below_b, above_b) = cost_sides(moved_a), cost_sides(moved_b)
    return float(np.hypot(below_b, above_a)), float(np.hypot(above_b, below_a))


def _moved(name: str, replays: Replays) -> NDArray[np.float64]:
    """How far a figure moves at both ends of each way the costs may be off; not at all where it is exact."""
    first = replays.seeds[name][0]
    return np.array(replays.ends.get(name, ((first, first),) * (1 + len(replays.parts)))) - first
