"""The contract of planners. Inherit, name your planner, and pytest runs it::

    class TestMine(PlannerContract):
        planner = staticmethod(my_package.mine)

A planner that refuses some problems declares them: ``refuses = {"unequal speeds": SpecError}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest

from moeplan.errors import InfeasibleError, MoeplanError
from moeplan.planning.problem import Planner, PlanningProblem, PlanningResult
from moeplan.testing.problems import make_problem

__all__ = ["PROBLEMS", "PlannerContract"]

PROBLEMS: Mapping[str, Callable[[], PlanningProblem]] = {
    "tiny": lambda: make_problem(layers=2, experts=4, ranks=2),
    "two nodes": lambda: make_problem(experts=8, ranks=4, ranks_per_node=2),
    "groups on nodes": lambda: make_problem(experts=8, ranks=4, ranks_per_node=2, num_groups=4, slots=3),
    "replicas": lambda: make_problem(experts=8, ranks=4, slots=3),
    "every rank holds all": lambda: make_problem(experts=4, ranks=2, slots=4),
    "unequal slots": lambda: make_problem(experts=8, ranks=4, slots=[4, 3, 2, 1]),
    "more slots than experts": lambda: make_problem(experts=4, ranks=3, slots=[6, 2, 2]),
    "unequal speeds": lambda: make_problem(experts=8, ranks=4, slots=3, speeds=[1.0, 1.0, 0.5, 0.7]),
    "failed rank": lambda: make_problem(experts=8, ranks=4, ranks_per_node=2, slots=[3, 0, 3, 3]),
    "failed node": lambda: make_problem(experts=8, ranks=4, ranks_per_node=2, slots=[4, 4, 0, 0]),
    "counts that do not divide": lambda: make_problem(experts=7, ranks=3, slots=3),
    "layers of different size": lambda: make_problem(experts=[8, 4, 6], ranks=4, slots=2),
    "one hot expert": lambda: make_problem(experts=8, ranks=4, slots=3, hot=0.9),
    "one rank": lambda: make_problem(experts=6, ranks=1),
    "one layer": lambda: make_problem(layers=1, experts=8, ranks=4),
    "one expert per rank": lambda: make_problem(experts=6, ranks=6),
    "more ranks than experts": lambda: make_problem(experts=4, ranks=6, slots=1),
}
"""Problems every planner answers or declares that it refuses, by what is special about them."""


def _arrays(problem: PlanningProblem) -> dict[str, bytes]:
    load = problem.load
    found = {
        "load_WLE": load.load_WLE,
        "experts_L": problem.experts_L,
        "slots_R": problem.slots_R,
        "speed_R": problem.speed_R,
    }
    if load.trace is not None:
        found["experts_TLK"] = load.trace.experts_TLK
    return {name: array.tobytes() for name, array in found.items()}


def _same(one: PlanningResult, other: PlanningResult) -> bool:
    """Whether two answers are equal to the last byte."""
    first, second = one.placement, other.placement
    return (
        first.physical_to_logical_LP.tobytes() == second.physical_to_logical_LP.tobytes()
        and first.rank_of_slot_P.tobytes() == second.rank_of_slot_P.tobytes()
        and first.slot_share_LP.tobytes() == second.slot_share_LP.tobytes()
        and (one.status, one.optimal_for, one.notes) == (other.status, other.optimal_for, other.notes)
    )


@cache
def _solved(planner: Planner, name: str) -> tuple[PlanningProblem, PlanningResult]:
    problem = PROBLEMS[name]()
    return problem, planner(problem)


class PlannerContract:
    """What every planner keeps to. Set ``planner``; ``refuses`` names problems of :data:`PROBLEMS` it
    turns down.
    """

    planner: ClassVar[Planner]
    refuses: ClassVar[Mapping[str, type[MoeplanError]]] = {}

    @pytest.fixture(params=list(PROBLEMS))
    def name(self, request: pytest.FixtureRequest) -> str:
        """One problem after the other."""
        return str(request.param)

    def _solve(self, name: str) -> tuple[PlanningProblem, PlanningResult]:
        """The problem and its answer, found once for all tests."""
        planner: Any = type(self).planner
        if name in self.refuses:
            with pytest.raises(self.refuses[name], match=r"\w"):
                planner(PROBLEMS[name]())
            pytest.skip(f"refused as declared: {name}")
        return _solved(planner, name)

    def test_answers_with_a_valid_placement_over_the_slots_asked(self, name: str) -> None:
        """Every expert has a slot, no rank holds one twice, ranks have their slots, failed ones none."""
        problem, result = self._solve(name)
        placement = result.placement
        placement.require_valid(tuple(problem.experts_L.tolist()))
        assert placement.num_layers == problem.load.num_layers
        np.testing.assert_array_equal(placement.rank_of_slot_P, problem.rank_of_slot_P)
        np.testing.assert_array_equal(
            np.bincount(placement.rank_of_slot_P, minlength=problem.num_ranks), problem.slots_R
        )
        assert placement.ranks_per_node == problem.ranks_per_node
        assert result.status in ("optimal", "feasible")
        assert (result.optimal_for is not None) == (result.status == "optimal")

    def test_shares_of_an_expert_add_up_to_one(self, name: str) -> None:
        """The copies of an expert take all of its tokens between them."""
        problem, result = self._solve(name)
        row_LP, share_LP = result.placement.physical_to_logical_LP, result.placement.slot_share_LP
        assert (share_LP >= 0).all()
        for row_P, share_P, experts in zip(row_LP, share_LP, problem.experts_L, strict=True):
            total_E = np.bincount(row_P[row_P >= 0], weights=share_P[row_P >= 0], minlength=int(experts))
            np.testing.assert_allclose(total_E, 1.0, atol=1e-9)

    def test_a_slot_is_empty_only_where_nothing_can_fill_it(self, name: str) -> None:
        """Empty slots stand only on ranks that hold every expert of the layer."""
        problem, result = self._solve(name)
        for row_P, experts in zip(result.placement.physical_to_logical_LP, problem.experts_L, strict=True):
            for rank in set(problem.rank_of_slot_P[row_P < 0].tolist()):
                mine_P = row_P[problem.rank_of_slot_P == rank]
                assert (mine_P >= 0).sum() == experts

    def test_one_seed_gives_one_answer(self, name: str) -> None:
        """Twice the same problem: the same bytes, status and notes."""
        _, first = self._solve(name)
        planner: Any = type(self).planner
        assert _same(first, planner(PROBLEMS[name]()))

    def test_inputs_stay_as_they_were(self, name: str) -> None:
        """A planner writes into no array of its problem."""
        before = _arrays(PROBLEMS[name]())
        assert _arrays(self._solve(name)[0]) == before

    @pytest.mark.parametrize("slots", [[2, 2, 2, 1], [3, 0, 2, 2]])
    def test_too_few_slots_are_infeasible_and_the_numbers_named(self, slots: list[int]) -> None:
        """8 experts do not fit 7 slots."""
        planner: Any = type(self).planner
        with pytest.raises(InfeasibleError, match=r"8 experts.*\b7\b"):
            planner(make_problem(experts=8, ranks=4, slots=slots))
