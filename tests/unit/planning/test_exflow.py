from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from moeplan.costs.transitions import transition_counts
from moeplan.errors import TraceError
from moeplan.planning.exflow import Level, by_program, by_sweeps, exflow, hops
from moeplan.planning.simple import contiguous
from moeplan.testing.problems import make_problem


def _halves(experts: int) -> list[np.ndarray]:
    """Every split of the experts into two groups of equal size."""
    splits = []
    for chosen in combinations(range(experts), experts // 2):
        group_E = np.ones(experts, dtype=np.int64)
        group_E[list(chosen)] = 0
        splits.append(group_E)
    return splits


def _level(seed: int, layers: int = 3) -> Level:
    rng = np.random.default_rng(seed)
    return Level(
        transitions_LEE=rng.integers(0, 50, (layers - 1, 4, 4)).astype(float),
        size_LG=np.full((layers, 2), 2),
        open_L=[np.ones((4, 2), dtype=bool)] * layers,
    )


def test_hops_counts_what_changes_group() -> None:
    transitions_LEE = np.array([[[5.0, 1.0], [2.0, 7.0]]])
    assert hops(transitions_LEE, [np.array([0, 1]), np.array([0, 1])]) == 3.0
    assert hops(transitions_LEE, [np.array([0, 1]), np.array([1, 0])]) == 12.0


@pytest.mark.parametrize("seed", range(4))
def test_the_program_reaches_the_brute_force_optimum(seed: int) -> None:
    level = _level(seed)
    best = min(hops(level.transitions_LEE, list(groups)) for groups in product(_halves(4), repeat=3))
    start_LE = [np.array([0, 0, 1, 1])] * 3
    group_LE, answer = by_program(level, start_LE)
    assert hops(level.transitions_LEE, group_LE) == pytest.approx(best)
    assert answer.objective == pytest.approx(best)
    assert answer.gap < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_sweeps_cannot_be_bettered_in_one_layer(seed: int) -> None:
    level = _level(seed, layers=4)
    group_LE = by_sweeps(level, sweeps=50)
    reached = hops(level.transitions_LEE, group_LE)
    for layer in range(4):
        for group_E in _halves(4):
            assert reached <= hops(level.transitions_LEE, [*group_LE[:layer], group_E, *group_LE[layer + 1 :]]) + 1e-9


def test_closed_groups_are_kept_closed() -> None:
    level = _level(0)
    open_EG = np.array([[True, False], [True, True], [True, True], [False, True]])
    level = Level(level.transitions_LEE, level.size_LG, [open_EG] * 3)
    for group_LE in (by_sweeps(level), by_program(level, by_sweeps(level))[0]):
        assert all(group_E[0] == 0 and group_E[3] == 1 for group_E in group_LE)


def test_a_small_problem_is_solved_to_a_proven_optimum() -> None:
    problem = make_problem(layers=3, experts=8, ranks=2, affinity=0.8)
    transitions_LEE = transition_counts(problem.load.trace)  # type: ignore[arg-type]
    result = exflow(problem)
    assert result.status == "optimal"
    assert result.optimal_for is not None
    group_LE = [np.argsort(row_P) // 4 for row_P in result.placement.physical_to_logical_LP]
    splits = _halves(8)
    # exact by dynamic programming over the splits of each layer
    step_LXX = [[hops(t[None], [a, b]) for a in splits for b in splits] for t in transitions_LEE]
    best_X = np.zeros(len(splits))
    for step_XX in step_LXX:
        best_X = (best_X[:, None] + np.reshape(step_XX, (len(splits), -1))).min(axis=0)
    assert hops(transitions_LEE, group_LE) == pytest.approx(best_X.min())


def test_a_large_problem_falls_to_sweeps_and_says_so() -> None:
    problem = make_problem(layers=6, experts=32, ranks=8, ranks_per_node=4, affinity=0.8, tokens=1000)
    transitions_LEE = transition_counts(problem.load.trace)  # type: ignore[arg-type]
    result = exflow(problem)
    assert sum("out of reach" in note for note in result.notes) == 2
    assert "load is not looked at" in result.notes

    def share(placement, slots: int) -> float:  # type: ignore[no-untyped-def]
        groups = [np.argsort(row_P) // slots for row_P in placement.physical_to_logical_LP]
        return hops(transitions_LEE, groups) / float(transitions_LEE.sum())

    base = contiguous(problem).placement
    assert share(result.placement, 16) < 0.8 * share(base, 16)
    assert share(result.placement, 4) < 0.9 * share(base, 4)


def test_a_load_of_counts_only_is_refused() -> None:
    problem = make_problem()
    object.__setattr__(problem.load, "trace", None)
    with pytest.raises(TraceError, match="exflow plans by how tokens go from layer to layer"):
        exflow(problem)
