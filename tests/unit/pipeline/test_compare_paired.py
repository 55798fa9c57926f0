"""Two runs that share seeds or costs are compared run by run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeplan.artifacts.simulation_result import Headline, Replays, SimulationResult
from moeplan.pipeline.compare import Difference, compare
from moeplan.pipeline.intervals import cost_sides, seed_side
from moeplan.reports.run_words import verdicts_text


def _result(
    values: tuple[float, ...], ends: tuple[tuple[float, float], ...], costs: str = "x", first: int = 0
) -> SimulationResult:
    """A latency with its value for each seed, and at the ends of its costs: together, experts, exchange."""
    mean = float(np.mean(values))
    line = Headline(value=mean, low=0.5 * mean, high=1.5 * mean, unit="s", better="lower")
    replays = Replays(
        costs_sha256=costs, parts=("experts", "exchange"), seeds={"ttft_p50_s": values}, ends={"ttft_p50_s": ends}
    )
    return SimulationResult(
        model="m", cluster="c", num_ranks=1, num_nodes=1, seeds=tuple(range(first, first + len(values))),
        simulated_s=1.0, headlines={"ttft_p50_s": line}, replays=replays,
    )  # fmt: skip


def _compared(tmp_path: Path, a: SimulationResult, b: SimulationResult) -> Difference:
    for name, result in (("a", a), ("b", b)):
        (tmp_path / name).mkdir(exist_ok=True)
        result.save(tmp_path / name / "result.json")
    ((_, (found,)),) = compare(tmp_path / "a", tmp_path / "b")
    return found


A = _result((10.0, 20.0, 30.0), ((5.0, 15.0), (8.0, 12.0), (7.0, 13.0)))
B = _result((9.0, 18.9, 29.1), ((4.4, 13.6), (7.2, 10.8), (6.1, 11.9)))  # 1 better with each seed, 10 % of it noise


def test_what_both_share_is_no_difference(tmp_path: Path) -> None:
    found = _compared(tmp_path, A, B)
    assert (found.paired, found.verdict, found.seeds) == ("seeds and costs", "better", 3)
    # Differences -1.0, -1.1, -0.9: t (2 degrees) 4.3027 times 0.1 / sqrt(3). Together the change moves by +0.4 at the
    # low and -0.4 at the high end; experts alone by +0.2, -0.2, exchange by +0.1, -0.1, which is less in squares.
    side = np.hypot(4.3027 * 0.1 / 3**0.5, 0.4)
    assert (found.change_low, found.change_high) == pytest.approx((-1 - side, -1 + side), rel=1e-4)
    assert "1 are better, 0 worse. Both runs share seeds and costs" in verdicts_text([found])


def test_parts_that_pull_apart_widen_the_change() -> None:
    """Together they cancel, each alone moves it: the parts count, in squares."""
    assert cost_sides(np.array([[0.0, 0.0], [-3.0, 3.0], [4.0, -4.0]])) == pytest.approx((5.0, 5.0))
    assert cost_sides(np.array([[-2.0, 9.0], [-3.0, 3.0], [4.0, 4.0]])) == pytest.approx((3.0, 9.0))
    assert seed_side([1.0]) == 0.0


@pytest.mark.parametrize(
    ("b", "paired", "words"),
    [
        (B.model_copy(update={"replays": None}), "not kept", "simulate it again"),
        (_result(B.replays.seeds["ttft_p50_s"], B.replays.ends["ttft_p50_s"], "y"), "seeds", "seed by seed; model"),
        (_result(B.replays.seeds["ttft_p50_s"], B.replays.ends["ttft_p50_s"], first=7), "costs", "seeds differ"),
        (_result(B.replays.seeds["ttft_p50_s"], B.replays.ends["ttft_p50_s"], "y", 7), "nothing", "neither seeds nor"),
    ],
)  # fmt: skip
def test_what_is_not_shared_counts_as_independent(tmp_path: Path, b: SimulationResult, paired: str, words: str) -> None:
    found = _compared(tmp_path, A, b)
    assert (found.paired, found.verdict) == (paired, "not told apart")
    assert words in verdicts_text([found])
    if paired == "not kept":  # both intervals' sides in squares
        assert found.change_high == pytest.approx(-1 + np.hypot(9.5, 10.0))


def test_a_run_against_itself_is_equal_and_one_seed_is_said(tmp_path: Path) -> None:
    found = _compared(tmp_path, A, A)
    assert (found.verdict, found.change_low, found.change_high) == ("equal", 0.0, 0.0)
    one = _result((10.0,), ((5.0, 15.0), (8.0, 12.0), (7.0, 13.0)))
    assert "One seed" in verdicts_text([_compared(tmp_path, one, one)])
    moved = _result((10.0,), ((5.0, 14.0), (8.0, 12.0), (7.0, 13.0)))
    assert _compared(tmp_path, one, moved).verdict == "not told apart"  # the same value, not at the costs' high end
