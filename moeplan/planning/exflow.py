"""ExFlow (Yao et al., IPDPS 2024, arXiv 2401.08383): experts that follow each other in neighbouring layers
together.

The integer program has ``x_le,g = 1`` where expert ``e`` of layer ``l`` is in group ``g``, as many experts
in every group, and pays for each token that goes from an expert of one layer to one of the next in another
group. Groups are nodes first, then the ranks inside each node. Load is not looked at. ``L`` layers, ``E``
experts of a layer and ``F`` of the next, ``G`` groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

_PROGRAM_LIMIT = 4096
"""Products (see :func:`by_program`) up to which HiGHS is asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """One level of grouping: ``size_LG`` experts per group, and the groups open to each expert
    (``open_L[l][e, g]``).
    """

    transitions_LEE: NDArray[np.float64]
    size_LG: NDArray[np.int64]
    open_L: list[NDArray[np.bool_]]

    @property
    def products(self) -> int:
        """How large the integer program is."""
        experts_L = self.size_LG.sum(axis=1)
        return int((experts_L[:-1] * experts_L[1:]).sum()) * int(self.size_LG.shape[1])


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
    """The integer program, from a start; for small problems.

    The paper's ``hop_ef >= x_eg - y_fg`` bounds nothing (all ``x = 1/G`` hop nowhere), so products stand
    in its place: ``stay_efg <= x_eg, y_fg``, of which an expert in group ``g`` has as many as the next
    layer has experts there, ``sum_f stay_efg = size_g x_eg`` and likewise ``sum_e stay_efg = size_g
    y_fg``. The optimum is the same.
    """
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
        x_EG, y_FG = x_L[layer], x_L[layer + 1]
        stay_EFG = variables(model, f"stay_{layer}", len(x_EG), len(y_FG), groups)
        for g in range(groups):
            for e, x_G in enumerate(x_EG):
                model.addConstraint(
                    pulp.lpSum(stay_EFG[e, :, g]) == int(level.size_LG[layer + 1, g]) * x_G[g]
                )
            for f, y_G in enumerate(y_FG):
                model.addConstraint(pulp.lpSum(stay_EFG[:, f, g]) == int(level.size_LG[layer, g]) * y_G[g])
        for (e, f, g), stay in np.ndenumerate(stay_EFG):
            model.addConstraint(stay <= x_EG[e, g])
            model.addConstraint(stay <= y_FG[f, g])
            start[stay] = float(start_LE[layer][e] == g and start_LE[layer + 1][f] == g)
            cost.append((stay, -float(transitions_EE[e, f])))
    model.setObjective(pulp.LpAffineExpression(cost))
    answer = solve(model, max_nodes=max_nodes, time_limit_s=time_limit_s, start=start)
    tokens = sum(
        float(transitions_EE[: len(now_E), : len(next_E)].sum())
        for transitions_EE, now_E, next_E in zip(level.transitions_LEE, start_LE, start_LE[1:], strict=False)
    )
    answer = replace(answer, objective=answer.objective + tokens, bound=answer.bound + tokens)
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
        if level.products <= _PROGRAM_LIMIT:
            group_LE, answer = by_program(
                level, group_LE, max_nodes=max_nodes, time_limit_s=problem.time_limit_s
            )
            answers.append(answer)
            notes.append(f"{name}: integer program by HiGHS, gap {answer.gap:.1%}")
        else:
            notes.append(
                f"{name}: integer program of {level.products} products is out of reach; layers"
                " assigned one after the other, each exactly given its neighbours"
            )
    placement, more = finish_rows(problem, group_LE)
    proven = len(levels) == len(answers) == 1 and answers[0].gap < 1e-6
    status: Status = "optimal" if proven else "feasible"
    if any(answer.timed_out for answer in answers):
        status = "time_limit"
    quantity = "tokens that change rank from layer to layer, one copy per expert" if proven else None
    return PlanningResult(placement, status, quantity, (*notes, "load is not looked at", *more))
