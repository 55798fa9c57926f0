from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Migration, Move
from moeplan.costs.counting import count_loads, count_trace
from moeplan.planning.joint import joint
from moeplan.planning.migration import align, held_experts, migration_of, moves_needed
from moeplan.planning.prepare import objective_value
from moeplan.planning.simple import contiguous, random
from moeplan.planning.verdict import judge
from moeplan.specs.workload import Objective
from moeplan.testing.problems import make_problem


def valid_rows(rng, experts, ranks, size, layers=2) -> np.ndarray:
    """Random placements with copies, no expert twice on a rank."""
    rows = []
    for _ in range(layers):
        while True:
            row = np.concatenate([rng.permutation(experts)[:size] for _ in range(ranks)])
            if set(row.tolist()) == set(range(experts)):
                rows.append(row)
                break
    return np.stack(rows)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["return_home", "stay"]))
def test_alignment_changes_no_load_and_needs_no_more_moves(seed, mode):
    rng = np.random.default_rng(seed)
    problem = make_problem(
        layers=2, experts=6, ranks=4, ranks_per_node=2, slots=3, tokens=60, objective=Objective(return_mode=mode)
    )
    now, then = (problem.placement(valid_rows(rng, 6, 4, 3)) for _ in range(2))
    aligned = align(now, then, problem)
    aligned.require_valid()
    assert moves_needed(now, aligned).sum() <= moves_needed(now, then).sum()
    for plan in (then, aligned):
        loads = count_loads(problem.load.load_LE[None], plan)[0]
        nodes = loads.reshape(2, 2, 2).sum(axis=2)
        assert np.sort(loads, axis=1) == pytest.approx(
            np.sort(count_loads(problem.load.load_LE[None], then)[0], axis=1)
        )
        assert np.sort(nodes, axis=1) == pytest.approx(
            np.sort(count_loads(problem.load.load_LE[None], then)[0].reshape(2, 2, 2).sum(axis=2), axis=1)
        )
    if mode == "stay":
        assert objective_value(problem, aligned) == pytest.approx(objective_value(problem, then))
    # what stays on its rank stays in its slot
    kept = held_experts(now) & held_experts(aligned)
    for layer in range(2):
        for slot, expert in enumerate(now.physical_to_logical_LP[layer]):
            if kept[layer, now.rank_of_slot_P[slot], expert]:
                assert aligned.physical_to_logical_LP[layer, slot] == expert


def test_renamed_ranks_need_no_move_at_all():
    problem = make_problem(layers=3, experts=8, ranks=4, ranks_per_node=2)
    now = random(problem).placement
    swapped = now.physical_to_logical_LP.reshape(3, 4, 2)[:, [3, 2, 0, 1]].reshape(3, 8)
    aligned = align(now, problem.placement(swapped), problem)
    assert aligned.physical_to_logical_LP.tolist() == now.physical_to_logical_LP.tolist()


def test_unequal_ranks_and_recorded_homes_keep_their_names():
    slow = make_problem(layers=1, experts=8, ranks=4, speeds=[1, 1, 1, 0.5])
    now = contiguous(slow).placement
    turned = slow.placement(np.roll(now.physical_to_logical_LP, 2, axis=1))
    assert moves_needed(now, align(now, turned, slow)).sum() == 8
    alike = make_problem(layers=1, experts=8, ranks=4)
    trace = alike.load.trace
    homes = replace(trace, source_rank_T=np.zeros(trace.num_tokens, np.int32))
    recorded = replace(alike, load=replace(alike.load, trace=homes))
    assert moves_needed(now, align(now, turned, recorded)).sum() == 8
    assert moves_needed(now, align(now, turned, alike)).sum() == 0


def test_a_current_placement_with_two_copies_on_a_rank_loses_no_expert():
    problem = make_problem(layers=1, experts=4, ranks=2, slots=3)
    now = problem.placement(np.array([[0, 0, 1, 2, 3, 0]]))
    target = problem.placement(np.array([[0, 1, 3, 2, 0, 1]]))
    aligned = align(now, target, problem)
    aligned.require_valid()
    assert sorted(aligned.physical_to_logical_LP[0, :3].tolist()) in ([0, 1, 3], [0, 1, 2])


def test_other_slots_leave_the_target_as_it_is():
    problem = make_problem(layers=1, experts=4, ranks=2, slots=3)
    small = make_problem(layers=1, experts=4, ranks=2)
    target = problem.placement(np.array([[0, 1, 3, 2, 0, 1]]))
    assert align(small.placement(np.array([[0, 1, 2, 3]])), target, problem) is target


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_moves_bring_exactly_the_missing_experts(seed):
    rng = np.random.default_rng(seed)
    problem = make_problem(layers=3, experts=6, ranks=4, ranks_per_node=2, slots=3, tokens=60)
    now, then = (problem.placement(valid_rows(rng, 6, 4, 3, 3)) for _ in range(2))
    gain_L = rng.random(3)
    found = migration_of(now, then, (3, 5, 9), gain_L, 10.0, 100.0, 20.0)
    before, after = held_experts(now), held_experts(then)
    wanted = {(l, r, e) for l, r, e in np.argwhere(after & ~before).tolist()}
    layer = {3: 0, 5: 1, 9: 2}
    assert [len(found.moves), len(wanted)] == [int(moves_needed(now, then).sum())] * 2
    assert {(layer[m.layer_id], m.target_rank, m.expert) for m in found.moves} == wanted
    sent, received = np.zeros(4), np.zeros(4)
    for move in found.moves:
        l = layer[move.layer_id]
        assert then.physical_to_logical_LP[l, move.slot] == move.expert
        assert then.rank_of_slot_P[move.slot] == move.target_rank
        assert before[l, move.source_rank, move.expert]
        inside = move.source_rank // 2 == move.target_rank // 2
        assert inside or not before[l, [move.target_rank // 2 * 2, move.target_rank // 2 * 2 + 1], move.expert].any()
        sent[move.source_rank] += 10.0 / (100.0 if inside else 20.0)
        received[move.target_rank] += 10.0 / (100.0 if inside else 20.0)
    assert found.bytes == 10.0 * len(found.moves)
    assert found.seconds == pytest.approx(max(sent.max(), received.max()))
    # a layer at a time, most gain per move first
    order = list(dict.fromkeys(layer[m.layer_id] for m in found.moves))
    assert [layer[m.layer_id] for m in found.moves] == sorted((layer[m.layer_id] for m in found.moves), key=order.index)
    worth = [gain_L[l] / moves_needed(now, then)[l] for l in order]
    assert worth == sorted(worth, reverse=True)


def test_no_moves_take_no_time():
    plan = contiguous(make_problem()).placement
    found = migration_of(plan, plan, (0, 1, 2), np.ones(3), 1.0, 1.0, 1.0)
    assert (found.moves, found.bytes, found.seconds) == ((), 0.0, 0.0)


@pytest.mark.parametrize("budget", [0, 3, 12])
def test_a_budget_is_kept_and_used_for_gain(budget):
    problem = make_problem(layers=3, experts=16, ranks=4, ranks_per_node=2, tokens=800, sigma=1.0)
    now = contiguous(problem).placement
    result = joint(replace(problem, current=now, max_moves=budget))
    result.placement.require_valid()
    assert moves_needed(now, result.placement).sum() <= budget
    before, after = objective_value(problem, now), objective_value(problem, result.placement)
    assert after < before if budget == 12 else after <= before
    assert any("moves allowed" in note for note in result.notes)


def test_a_plan_that_would_take_too_long_to_reach_makes_fewer_moves():
    problem = make_problem(layers=3, experts=16, ranks=4, ranks_per_node=2, tokens=800, sigma=1.0)
    now = contiguous(problem).placement

    def moves(most: int) -> int:
        few = replace(problem, current=now, max_moves=12, affordable=lambda plan: moves_needed(now, plan).sum() <= most)
        return int(moves_needed(now, joint(few).placement).sum())

    assert moves(0) == 0 < moves(5) <= 5 < moves(12) <= 12


def test_a_time_limit_holds_within_a_budget_of_moves():
    problem = make_problem(layers=3, experts=16, ranks=4, ranks_per_node=2, tokens=800, sigma=1.0)
    now = contiguous(problem).placement
    result = joint(replace(problem, current=now, max_moves=12, time_limit_s=1e-9))
    assert result.status == "time_limit"
    assert moves_needed(now, result.placement).sum() == 0


@pytest.mark.parametrize("stage", ["prepare", "search", "spend"])
def test_ctrl_c_within_a_budget_keeps_the_best_plan_so_far(stage, monkeypatch):
    told = []

    def stop(*words):
        told.append(words)
        raise KeyboardInterrupt

    problem = make_problem(layers=5, experts=16, ranks=4, ranks_per_node=2, tokens=800, sigma=1.0)
    now = contiguous(problem).placement
    problem = replace(problem, current=now, max_moves=12)
    if stage == "search":
        problem = replace(problem, progress=stop)
    else:
        monkeypatch.setattr(f"moeplan.planning.budget.{'prepare' if stage == 'prepare' else '_spend'}", stop)
    result = joint(problem)
    assert told
    assert result.status == "interrupted"
    moves_L = moves_needed(now, result.placement)
    assert moves_L.sum() <= 12
    if stage == "search":  # the layer that was done has its moves, those not begun stay
        assert 0 < (moves_L > 0).sum() < 5
        assert objective_value(problem, result.placement) < objective_value(problem, now)
    else:
        assert (result.placement.physical_to_logical_LP == now.physical_to_logical_LP).all()
        assert "interrupted" in result.notes[0]


def moved(seconds: float, moves: int = 1) -> Migration:
    one = Move(layer_id=0, expert=0, source_rank=0, target_rank=1, slot=2)
    return Migration(moves=(one,) * moves, bytes=1.0, seconds=seconds, source="test")


def test_a_gain_that_holds_is_worth_applying():
    # three parts that each save something else: of a mean the jackknife gives the spread of the mean
    part_H = np.array([0.2, 0.18, 0.19])
    without_H = (part_H.sum() - part_H) / 2
    verdict = judge("contiguous", 1.0, part_H.mean(), without_H, 0.5, "the rest", "", None)
    half = 4.303 * part_H.std(ddof=1) / 3**0.5
    assert verdict.apply
    assert verdict.expected_gain == pytest.approx(0.19)
    assert verdict.expected_gain_low == pytest.approx(0.19 - half, rel=1e-3)
    assert verdict.expected_gain_high == pytest.approx(0.19 + half, rel=1e-3)
    assert (verdict.largest_possible_gain, verdict.migration_s, verdict.break_even_s) == (0.5, None, None)
    assert "19.0 %" in verdict.reason


def test_no_end_of_the_interval_is_beyond_the_largest_possible_gain():
    seen = judge("contiguous", 1.0, 0.4, np.empty(0), 0.45, "the data planned on", "record more", None)
    assert (seen.expected_gain_low, seen.expected_gain_high) == (pytest.approx(0.0), 0.45)
    spread = judge("contiguous", 1.0, 0.27, np.array([0.2, 0.3, 0.5]), 0.3, "the rest", "", None)
    assert spread.expected_gain_low < 0 < spread.expected_gain_high == 0.3


def test_break_even_is_when_the_time_saved_has_paid_for_the_moves():
    verdict = judge("current", 1.0, 0.2, np.array([0.2, 0.2]), 0.5, "the rest", "", moved(3.0))
    # a step of 0.8 s saves 0.2 s: 15 steps save 3 s and take 12 s
    assert verdict.break_even_s == pytest.approx(12.0)
    assert verdict.break_even_steps == 15
    assert "paid after 15 steps" in verdict.reason
    assert verdict.migration_s == 3.0
    assert verdict.apply


@pytest.mark.parametrize(
    ("gain", "without", "unchecked", "migration", "words"),
    [
        (-0.15, [-0.1, -0.2], "", None, "no gain over base"),
        (-0.05, [0.0, -0.1], "", moved(1.0), "no gain over base"),
        (0.1, [0.3, -0.2, 0.2], "", None, "not above its spread"),
        (0.2, [], "record more", None, "only on the data planned on; record more"),
        (0.2, [0.2, 0.2], "", moved(0.0, moves=0), "nothing to move"),
    ],
)
def test_no_recommendation_without_grounds(gain, without, unchecked, migration, words):
    verdict = judge("base", 1.0, gain, np.array(without), -0.1, "the rest", unchecked, migration)
    assert not verdict.apply
    assert words in verdict.reason
    assert verdict.largest_possible_gain == 0.0
    assert verdict.expected_gain_low <= verdict.expected_gain <= verdict.expected_gain_high


def test_alignment_keeps_nodes_per_token():
    problem = make_problem(layers=2, experts=8, ranks=4, ranks_per_node=2)
    now, then = contiguous(problem).placement, random(problem).placement
    aligned = align(now, then, problem)
    for name in ("nodes_per_token_WL", "ranks_per_token_WL"):
        counts = [getattr(count_trace(problem.load, plan), name) for plan in (then, aligned)]
        assert counts[0] == pytest.approx(counts[1])
    assert isinstance(aligned, Placement)


def test_a_failed_rank_sends_only_what_no_other_rank_holds():
    before = make_problem(layers=1, experts=4, ranks=3, slots=2).placement(np.array([[0, 1, 1, 2, 3, 0]]))
    after = make_problem(layers=1, experts=4, ranks=3, slots=[0, 2, 2]).placement(np.array([[0, 1, 2, 3]]))
    found = migration_of(before, after, (0,), np.ones(1), 1.0, 1.0, 1.0)
    assert {(m.expert, m.source_rank, m.target_rank) for m in found.moves} == {(0, 2, 1), (2, 1, 2)}
