"""Solve integer programs with HiGHS through PuLP: same answer every time, honest status, own gap, Ctrl-C
works.

PuLP calls an answer "Optimal" that a time limit cut short and knows no node limit, so what HiGHS itself
reports is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
import pulp
from numpy.typing import NDArray

__all__ = ["Answer", "solve", "values", "variables"]


@dataclass(frozen=True, slots=True)
class Answer:
    """How far a solve came. ``gap`` is ``(objective - bound) / objective``, 0 for a proven optimum."""

    found: bool
    infeasible: bool
    objective: float
    bound: float
    timed_out: bool

    @property
    def gap(self) -> float:
        """Relative to the objective; infinite where nothing was found."""
        if not self.found:
            return float("inf")
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-12)


def variables(model: pulp.LpProblem, name: str, *shape: int, binary: bool = False) -> NDArray[np.object_]:
    """An array of new variables, 0 or more."""
    array = np.empty(shape, dtype=object)
    for index in np.ndindex(shape):
        full_name = "_".join(map(str, (name, *index)))
        array[index] = model.add_variable(full_name, 0, None, "Binary" if binary else "Continuous")
    return array


def values(array: NDArray[np.object_]) -> NDArray[np.float64]:
    """The values of an array of variables after a solve."""
    return np.array([pulp.value(variable) for variable in array.ravel()], dtype=np.float64).reshape(
        array.shape
    )


class _Silent(highspy.Highs):  # type: ignore[misc]
    """HiGHS greets on the standard output, where answers go, as soon as callbacks are enabled: before any option."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    def __init__(self, start: Mapping[Any, float] | None, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.start, self.settings = start, settings

    def createAndConfigureSolver(self, lp: Any) -> None:
        lp.solverModel = _Silent()
        for name, value in self.settings.items():
            lp.solverModel.setOptionValue(name, value)

    def callSolver(self, lp: Any) -> None:
        model = lp.solverModel
        if self.start is not None:
            solution = highspy.HighsSolution()
            solution.col_value = [float(self.start.get(variable, 0.0)) for variable in lp.variables()]
            model.setSolution(solution)
        model.HandleUserInterrupt = True
        model.startSolve()
        try:
            while not model.wait(0.1)[0]:
                pass
        except KeyboardInterrupt:
            model.cancelSolve()
            model.wait()
            raise

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:
        model = lp.solverModel
        status, info = model.getModelStatus(), model.getInfo()
        if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
            for variable, value in zip(lp.variables(), model.getSolution().col_value, strict=True):
                variable.varValue = value
            proven = status == highspy.HighsModelStatus.kOptimal
            return pulp.LpStatusOptimal, pulp.LpSolutionOptimal if proven else pulp.LpSolutionIntegerFeasible
        if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
            return pulp.LpStatusInfeasible, pulp.LpSolutionInfeasible
        return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound


def solve(
    model: pulp.LpProblem,
    *,
    tolerance: float = 0.0,
    max_nodes: int | None = None,
    time_limit_s: float | None = None,
    start: Mapping[Any, float] | None = None,
) -> Answer:
    """Solve in place, on one thread and with a fixed seed, to a relative gap of ``tolerance``.

    ``max_nodes`` limits the branch-and-bound tree, which stops at the same place every time;
    ``time_limit_s`` does not. ``start`` is a solution to begin with (variables not named are 0).
    """
    settings: dict[str, Any] = {"threads": 1, "random_seed": 0, "mip_rel_gap": tolerance}
    if max_nodes is not None:
        settings["mip_max_nodes"] = max_nodes
    if time_limit_s is not None:
        settings["time_limit"] = time_limit_s
    model.solve(_Highs(start, settings))
    info = model.solverModel.getInfo()
    return Answer(
        found=model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible),
        infeasible=model.sol_status == pulp.LpSolutionInfeasible,
        objective=info.objective_function_value,
        bound=info.mip_dual_bound,
        timed_out=model.solverModel.getModelStatus() == highspy.HighsModelStatus.kTimeLimit,
    )
