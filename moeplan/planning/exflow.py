"""ExFlow (Yao et al., IPDPS 2024, arXiv 2401.08383): experts that follow each other in neighbouring layers
together.

The integer program has ``x_le,g = 1`` where expert ``e`` of layer ``l`` is in group ``g``, as many experts
in every group, and pays for each token that goes from an expert of one layer to one of the next in another
group: ``hop_lef >= x_le,g - x_(l+1)f,g`` for every group. Groups are nodes first, then the ranks inside
each node. Load is not looked at. ``L`` layers, ``E`` experts of a layer, ``G`` groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pulp
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moeplan.artifacts.plan import Status
from moeplan.planning.milp import Answer, solve, values, variables
from moeplan.planning.problem import PlanningProblem, PlanningResult
from moeplan.planning.slots import base_slots, expert_transitions, finish_rows, require_room

__all__ = ["Level", "by_program", "by_sweeps", "exflow", "hops"]

Groups = list[NDArray[np.int64]]
"""The group of each expert, layer by layer."""

_PROGRAM_LIMIT = 256
"""Hop constraints up to which HiGHS is asked: its bound starts at 0 (all ``x = 1/G``), and 3 layers of 8
experts on 4 ranks already end 200 nodes with a gap of 76 %.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """One level of grouping: ``size_LG`` experts per group, and the groups open to each expert
    (``open_L[l][e, g]``).
    """

    transitions_LEE: NDArray[np.float64]
    size_LG: NDArray[np.int64]
    open_L: list[NDArray[np.bool_]]

    @property
    def hop_constraints(self) -> int:
        """How large the integer program is."""
        return int(np.count_nonzero(self.transitions_LEE)) * int(self.size_LG.shape[1])


def hops(transitions_LEE: NDArray[np.float64], group_LE: Groups) -> float:
    """Tokens that change group from layer to layer."""
    total = 0.0
    for layer, transitions_EE in enumerate(transitions_LEE):
        now_E, next_E = group_LE[layer], group_LE[layer + 1]
        total += float(transitions_EE[: len(now_E), : len(next_E)][now_E[:, None] != next_E].sum())
    return total


def by_sweeps(level: Level, *, sweeps: int = 10) -> Groups:
    """Layers one after the other, each the exact answer given its neighbours: an assignment of experts to
    places.

    The first pass knows the layer before only; up to ``sweeps`` more know both, until hops stop falling.
    """
    layers, groups = level.size_LG.shape
    group_LE: Groups = []
    fewest = np.inf
    for sweep in range(1 + sweeps):
        for layer in range(layers):
            open_EG = level.open_L[layer]
            stay_EG = np.zeros(open_EG.shape)
            if layer > 0:
                before_FG = np.eye(groups)[group_LE[layer - 1]]
                stay_EG += level.transitions_LEE[layer - 1][: len(before_FG), : len(open_EG)].T @ before_FG
            if sweep and layer < layers - 1:
                after_FG = np.eye(groups)[group_LE[layer + 1]]
                stay_EG += level.transitions_LEE[layer][: len(open_EG), : len(after_FG)] @ after_FG
            group_of_place_E = np.repeat(np.arange(groups), level.size_LG[layer])
            closed = -(1.0 + stay_EG.sum())
            _, place_E = linear_sum_assignment(
                np.where(open_EG, stay_EG, closed)[:, group_of_place_E], maximize=True
            )
            group_LE[layer:] = [group_of_place_E[place_E], *group_LE[layer + 1 :]]
        total = hops(level.transitions_LEE, group_LE)
        if total >= fewest:
            break
        fewest = total
    return group_LE


def by_program(
    level: Level, start_LE: Groups, *, max_nodes: int | None = None, time_limit_s: float | None = None
) -> tuple[Groups, Answer]:
    """The integer program, from a start; for small problems."""
    layers, groups = level.size_LG.shape
    model = pulp.LpProblem("exflow")
    x_L = [variables(model, f"x_{layer}", *level.open_L[layer].shape, binary=True) for layer in range(layers)]
    start: dict[pulp.LpVariable, float] = {}
    for x_EG, size_G, open_EG, start_E in zip(x_L, level.size_LG, level.open_L, start_LE, strict=True):
        for x_G in x_EG:
            model.addConstraint(pulp.lpSum(x_G) == 1)
        for group in range(groups):
            model.addConstraint(pulp.lpSum(x_EG[:, group]) == int(size_G[group]))
        for variable in x_EG[~open_EG]:
            variable.upBound = 0
        start |= {x_G[group]: 1.0 for x_G, group in zip(x_EG, start_E, strict=True)}
    cost = []
    for layer, transitions_EE in enumerate(level.transitions_LEE):
        for e, f in zip(*np.nonzero(transitions_EE), strict=True):
            hop = variables(model, f"hop_{layer}_{e}_{f}")[()]
            cost.append((hop, float(transitions_EE[e, f])))
            start[hop] = float(start_LE[layer][e] != start_LE[layer + 1][f])
            for x, y in zip(x_L[layer][e], x_L[layer + 1][f], strict=True):
                model.addConstraint(hop >= x - y)
    model.setObjective(pulp.LpAffineExpression(cost))
    answer = solve(model, max_nodes=max_nodes, time_limit_s=time_limit_s, start=start)
    return ([values(x_EG).argmax(axis=1) for x_EG in x_L] if answer.found else start_LE), answer


def exflow(problem: PlanningProblem, *, max_nodes: int = 200) -> PlanningResult:
    """Place experts for the fewest hops between nodes, then between ranks of a node.

    Each level is solved by HiGHS where the program is small (from the sweeps' answer), else by sweeps of
    exact assignments, one layer at a time; the notes say which. Spare slots are filled with copies
    afterwards.

    Raises:
        InfeasibleError: fewer slots than experts.
        TraceError: the load has neither tokens nor transition counts.
    """
    require_room(problem)
    transitions_LEE = expert_transitions(problem, "exflow")
    size_LR = np.stack([base_slots(problem.slots_R, experts) for experts in problem.experts_L.tolist()])
    node_R = np.arange(problem.num_ranks) // problem.ranks_per_node
    size_LN = np.add.reduceat(size_LR, np.arange(0, problem.num_ranks, problem.ranks_per_node), axis=1)
    group_LE: Groups = [np.zeros(experts, dtype=np.int64) for experts in problem.experts_L.tolist()]
    notes, answers = [], []
    levels = [("nodes", size_LN, np.zeros(problem.num_nodes, dtype=np.int64)), ("ranks", size_LR, node_R)]
    if 1 in (problem.num_nodes, problem.ranks_per_node):
        levels = [("ranks", size_LR, np.zeros(problem.num_ranks, dtype=np.int64))]
    for name, size_LG, parent_G in levels:
        level = Level(transitions_LEE, size_LG, [parent_E[:, None] == parent_G for parent_E in group_LE])
        group_LE = by_sweeps(level)
        if level.hop_constraints <= _PROGRAM_LIMIT:
            group_LE, answer = by_program(
                level, group_LE, max_nodes=max_nodes, time_limit_s=problem.time_limit_s
            )
            answers.append(answer)
            notes.append(f"{name}: integer program by HiGHS, gap {answer.gap:.1%}")
        else:
            notes.append(
                f"{name}: integer program of {level.hop_constraints} hop constraints is out of reach; layers"
                " assigned one after the other, each exactly given its neighbours"
            )
    placement, more = finish_rows(problem, group_LE)
    proven = len(levels) == len(answers) == 1 and answers[0].gap < 1e-6
    status: Status = "optimal" if proven else "feasible"
    if any(answer.timed_out for answer in answers):
        status = "time_limit"
    quantity = "tokens that change rank from layer to layer, one copy per expert" if proven else None
    return PlanningResult(placement, status, quantity, (*notes, "load is not looked at", *more))
