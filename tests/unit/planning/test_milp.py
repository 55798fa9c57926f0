from __future__ import annotations

import subprocess
import sys
from typing import Any

import highspy
import numpy as np
import pulp
import pytest

from moeplan.planning.milp import Answer, solve, values, variables


def _knapsack(items: int) -> tuple[pulp.LpProblem, Any]:
    """Equal-sum split into three: its linear relaxation is worth nothing, so that it needs branching."""
    weight_I = np.random.default_rng(0).lognormal(0, 1, items)
    model = pulp.LpProblem("split")
    x_GI = variables(model, "x", 3, items, binary=True)
    d_G = variables(model, "d", 3)
    for i in range(items):
        model.addConstraint(pulp.lpSum(x_GI[:, i]) == 1)
    for g in range(3):
        load = pulp.LpAffineExpression(zip(x_GI[g], weight_I.tolist(), strict=True))
        model.addConstraint(d_G[g] >= load - weight_I.sum() / 3)
        model.addConstraint(d_G[g] >= weight_I.sum() / 3 - load)
    model.setObjective(pulp.lpSum(d_G))
    return model, x_GI


def test_a_proven_optimum_has_no_gap() -> None:
    model = pulp.LpProblem("two")
    x_I = variables(model, "x", 2, binary=True)
    model.setObjective(3 * x_I[0] + 2 * x_I[1])
    model.addConstraint(x_I[0] + x_I[1] >= 1)
    answer = solve(model)
    assert (answer.found, answer.infeasible, answer.timed_out, answer.gap) == (True, False, False, 0.0)
    assert values(x_I).tolist() == [0.0, 1.0]
    assert answer.objective == 2.0


def test_the_solver_prints_nothing() -> None:
    """In a process of its own: HiGHS greets once in a process, and C buffers what it prints."""
    solves = """
import pulp
from moeplan.planning.milp import solve, variables
model = pulp.LpProblem("one")
model.setObjective(pulp.lpSum(variables(model, "x", 2, binary=True)))
assert solve(model).found
"""
    done = subprocess.run([sys.executable, "-c", solves], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_an_infeasible_program_is_called_so() -> None:
    model = pulp.LpProblem("none")
    x_I = variables(model, "x", 2, binary=True)
    model.setObjective(pulp.lpSum(x_I))
    model.addConstraint(pulp.lpSum(x_I) >= 3)
    answer = solve(model)
    assert answer.infeasible
    assert not answer.found
    assert answer.gap == float("inf")


def test_a_node_limit_is_neither_an_error_nor_a_proof() -> None:
    model, _ = _knapsack(60)
    answer = solve(model, max_nodes=1)
    assert answer.found
    assert answer.gap > 0.5
    assert not answer.timed_out
    assert model.sol_status == pulp.LpSolutionIntegerFeasible


def test_a_time_limit_is_not_called_optimal() -> None:
    model, _ = _knapsack(60)
    answer = solve(model, time_limit_s=0.2)
    assert answer.timed_out
    assert answer.gap > 0.5
    assert model.sol_status != pulp.LpSolutionOptimal


def test_a_start_is_never_made_worse() -> None:
    model, x_GI = _knapsack(9)
    best = solve(model)
    start = {variable: round(float(pulp.value(variable))) for variable in x_GI.ravel()}
    again, x_again_GI = _knapsack(9)
    renamed = {x_again_GI[index]: start[x_GI[index]] for index in np.ndindex(x_GI.shape)}
    assert solve(again, start=renamed, max_nodes=1).objective <= best.objective + 1e-6


def test_the_same_program_gives_the_same_answer() -> None:
    one, other = _knapsack(24), _knapsack(24)
    answers = [solve(model, max_nodes=20) for model, _ in (one, other)]
    assert answers[0] == answers[1]
    np.testing.assert_array_equal(values(one[1]), values(other[1]))


def test_ctrl_c_stops_the_solver_and_goes_on_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    wait, calls = highspy.Highs.wait, []

    def interrupted(self: Any, timeout: float = -1.0) -> Any:
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(highspy.Highs, "wait", interrupted)
    model, _ = _knapsack(60)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        solve(model)
    assert len(calls) == 2, "the solver is waited for, without a limit, after it is told to stop"


def test_gap_is_relative_to_the_objective() -> None:
    assert Answer(True, False, 10.0, 8.0, False).gap == pytest.approx(0.2)
