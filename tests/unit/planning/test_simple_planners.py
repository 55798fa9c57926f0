from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.artifacts.placement import EMPTY
from moeplan.planning.simple import contiguous, random, round_robin
from moeplan.planning.slots import base_slots, fill_spare_slots, rank_loads, separate_copies
from moeplan.testing.problems import make_problem


def _rows(planner, **fields) -> list[list[int]]:  # type: ignore[no-untyped-def]
    problem = make_problem(layers=1, tokens=20, **fields)
    return planner(problem).placement.physical_to_logical_LP.tolist()


def test_contiguous_is_the_block_placement_and_repeats_from_expert_0() -> None:
    assert _rows(contiguous, experts=8, ranks=4) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert _rows(contiguous, experts=6, ranks=4, slots=2) == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert _rows(contiguous, experts=6, ranks=4, slots=[3, 0, 2, 2]) == [[0, 1, 2, 3, 4, 5, 0]]


def test_round_robin_deals_in_turn() -> None:
    assert _rows(round_robin, experts=8, ranks=4) == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert _rows(round_robin, experts=5, ranks=3, slots=[3, 0, 2]) == [[0, 2, 4, 1, 3]]
    # experts 0 and 2 come round to rank 0 again; swapping keeps copies apart
    row = _rows(round_robin, experts=4, ranks=2, slots=4)[0]
    assert sorted(row[:4]) == sorted(row[4:]) == [0, 1, 2, 3]


def test_a_rank_with_more_slots_than_experts_leaves_the_rest_empty() -> None:
    for planner in (contiguous, round_robin, random):
        row = _rows(planner, experts=3, ranks=2, slots=[5, 2])[0]
        assert sorted(row[:3]) == [0, 1, 2]
        assert row[3:5] == [EMPTY, EMPTY]


def test_random_depends_on_the_seed_and_on_the_layer() -> None:
    problem = make_problem(layers=2, experts=16, seed=1)
    first = random(problem).placement.physical_to_logical_LP
    other = random(make_problem(layers=2, experts=16, seed=2)).placement.physical_to_logical_LP
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_separate_copies_never_leaves_two_on_a_rank_nor_loses_an_expert(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 6))
    sizes = data.draw(st.lists(st.integers(0, experts), min_size=1, max_size=5).filter(lambda s: sum(s) >= experts))
    spare = data.draw(
        st.lists(st.integers(0, experts - 1), min_size=sum(sizes) - experts, max_size=sum(sizes) - experts)
    )
    row_P = np.array(data.draw(st.permutations(list(range(experts)) + spare)))
    ranks_P = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    result_P, _, replacements = separate_copies(row_P, ranks_P, np.ones(experts), np.ones(len(sizes)))
    assert set(result_P) == set(range(experts))
    assert len(set(zip(ranks_P, result_P, strict=True))) == len(row_P)
    if replacements == 0:
        assert sorted(result_P) == sorted(row_P)


def test_separate_copies_takes_the_swap_that_leaves_the_lowest_busiest_rank() -> None:
    rng = np.random.default_rng(0)
    ranks_P = np.repeat(np.arange(3, dtype=np.int32), 3)
    for _ in range(50):
        weight_E = rng.integers(1, 100, 8).astype(float)
        row_P = np.concatenate([[0, 0, 1], rng.permutation(np.arange(2, 8))])
        result_P, swaps, replacements = separate_copies(row_P, ranks_P, weight_E, np.ones(3))
        assert (swaps, replacements) == (1, 0)
        options = []
        for slot in range(3, 9):
            tried_P = row_P.copy()
            tried_P[1], tried_P[slot] = tried_P[slot], tried_P[1]
            options.append(rank_loads(tried_P, ranks_P, weight_E, 3).max())
        assert rank_loads(result_P, ranks_P, weight_E, 3).max() == pytest.approx(min(options))


def test_separate_copies_stays_in_the_node_where_asked() -> None:
    ranks_P = np.repeat(np.arange(4, dtype=np.int32), 2)
    row_P = np.array([0, 0, 1, 2, 3, 4, 5, 6])
    result_P, _, _ = separate_copies(row_P, ranks_P, np.array([9.0, 5, 5, 0, 0, 0, 0]), np.ones(4), ranks_per_node=2)
    assert set(result_P[:4]) == {0, 1, 2}


def test_base_slots_fit_and_are_fair() -> None:
    assert base_slots(np.array([2, 2, 2, 2]), 6).tolist() == [2, 2, 1, 1]
    assert base_slots(np.array([4, 0, 2]), 3).tolist() == [2, 0, 1]
    rng = np.random.default_rng(1)
    for _ in range(200):
        slots_R = rng.integers(0, 9, 5)
        slots_R[0] += 1
        experts = int(rng.integers(1, slots_R.sum() + 1))
        base_R = base_slots(slots_R, experts)
        assert base_R.sum() == experts
        assert (base_R <= slots_R).all()


def test_spare_slots_take_the_hottest_expert_on_the_least_busy_rank() -> None:
    ranks_P = np.repeat(np.arange(3, dtype=np.int32), 2)
    row_P = np.array([0, EMPTY, 1, EMPTY, 2, EMPTY])
    filled_P, filled = fill_spare_slots(row_P, ranks_P, np.array([12.0, 4.0, 2.0]), np.ones(3))
    # 12 on rank 2 (load 2), then 12/2 on rank 1, then 4 on rank 0 or 2 (which is less busy: 4 against 6)
    assert filled == 3
    assert filled_P.tolist() == [0, 1, 1, 0, 2, 0]
