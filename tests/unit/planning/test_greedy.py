from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeplan.errors import SpecError
from moeplan.planning.greedy import greedy, rebalance_experts
from moeplan.planning.slots import rank_loads
from moeplan.testing.problems import make_problem

# The example of the README of github.com/deepseek-ai/EPLB.
WEIGHT_LE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
EXPECTED_LP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_gives_the_published_example() -> None:
    physical_LP, logical_LEX, replicas_LE = rebalance_experts(WEIGHT_LE, 16, 4, 2, 8)
    assert physical_LP.tolist() == EXPECTED_LP
    for layer, expert in itertools.product(range(2), range(12)):
        slots = np.nonzero(physical_LP[layer] == expert)[0].tolist()
        assert replicas_LE[layer, expert] == len(slots)
        assert sorted(s for s in logical_LEX[layer, expert].tolist() if s >= 0) == slots


def test_replica_counts_minimise_the_largest_load_per_copy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        weight_E = rng.integers(1, 100, 4).astype(float)
        replicas_E = rebalance_experts(weight_E[None], 8, 1, 1, 2)[2][0]
        best = min(max(weight_E / counts) for counts in itertools.product(range(1, 6), repeat=4) if sum(counts) == 8)
        assert max(weight_E / replicas_E) == pytest.approx(best)


def test_the_hierarchical_policy_keeps_groups_on_nodes_and_the_global_one_need_not() -> None:
    physical_LP = rebalance_experts(WEIGHT_LE, 16, 4, 2, 8)[0]
    for row in physical_LP:
        groups = [set(row[:8] // 3), set(row[8:] // 3)]
        assert not groups[0] & groups[1]
    assert set(rebalance_experts(WEIGHT_LE, 16, 1, 2, 8)[0][0][:8] // 3) == {0, 1, 2, 3}


def test_heaviest_first_is_the_textbook_packing() -> None:
    # 7 6 5 4 3 2 on two bins of three: 7 | 6, 5 -> bin 1 (11), 4 -> bin 0 (11), 3 -> bin 0, 2 -> bin 1
    assert rebalance_experts(np.array([[7, 6, 5, 4, 3, 2]]), 6, 1, 1, 2)[0].tolist() == [[0, 3, 4, 1, 2, 5]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((16, 5, 5, 10), r"num_experts \(12\) is not a multiple of num_groups \(5\)"),
        ((16, 4, 2, 3), r"num_ranks \(3\) is not a multiple of num_nodes \(2\)"),
        ((18, 4, 2, 4), r"num_replicas \(18\) is not a multiple of num_ranks \(4\)"),
        ((8, 4, 2, 4), r"num_replicas \(8\) is less than num_experts \(12\)"),
    ],
)
def test_counts_that_do_not_divide_are_named(args: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        rebalance_experts(WEIGHT_LE, *args)


def test_the_planner_answers_as_the_policy_where_no_rank_holds_an_expert_twice() -> None:
    problem = make_problem(experts=12, ranks=4, ranks_per_node=2, num_groups=2)
    expected_LP = rebalance_experts(problem.load.load_LE, 12, 2, 2, 4)[0]
    result = greedy(problem)
    assert result.placement.physical_to_logical_LP.tolist() == expected_LP.tolist()
    assert result.notes == ()


def test_second_copies_are_moved_and_counted() -> None:
    problem = make_problem(layers=4, experts=8, ranks=4, slots=4, hot=0.9, num_groups=1)
    raw_LP = rebalance_experts(problem.load.load_LE, 16, 1, 1, 4)[0]
    assert any(len(set(rank)) < 4 for rank in raw_LP.reshape(-1, 4)), "the example must need a repair"
    result = greedy(problem)
    result.placement.require_valid()
    assert any("held an expert twice" in note for note in result.notes)


def test_unequal_speeds_finish_sooner_than_with_the_policy_blind_to_them() -> None:
    problem = make_problem(layers=2, experts=32, ranks=4, speeds=[1.0, 1.0, 1.0, 0.5], slots=10, tokens=4000)
    result = greedy(problem)
    result.placement.require_valid()
    assert any("heaviest first" in note for note in result.notes)
    blind_LP = rebalance_experts(problem.load.load_LE, 40, 1, 1, 4)[0]
    for layer, load_E in enumerate(problem.load.load_LE):
        time_s, blind_s = (
            (rank_loads(row_P.astype(np.int64), problem.rank_of_slot_P, load_E, 4) / problem.speed_R).max()
            for row_P in (result.placement.physical_to_logical_LP[layer], blind_LP[layer])
        )
        assert time_s < 0.9 * blind_s


def test_a_change_of_policy_is_said() -> None:
    result = greedy(make_problem(experts=8, ranks=4, ranks_per_node=2, num_groups=1))
    assert any("num_groups (1) is no multiple of num_nodes (2)" in note for note in result.notes)
