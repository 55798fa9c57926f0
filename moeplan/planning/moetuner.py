"""MoETuner (Go and Mahajan, arXiv 2502.06643): experts into balanced clusters, then clusters onto ranks.

Two integer programs, as published: each layer's experts into one cluster per rank so that loads are even
(:mod:`~moeplan.planning.clustering`), then the clusters of neighbouring layers onto ranks so that the
slowest pair of ranks of each layer is as fast as can be (:mod:`~moeplan.planning.cluster_ranks`). Mended
where the print leaves a gap: every expert is in exactly one cluster; traffic of layer ``l`` pairs
clusters of layers ``l`` and ``l+1``; the maximum is over pairs of ranks; what stays on a rank is free.
The paper's clusters may differ in size under a memory constraint over all layers; serving engines need
equal slots, so equal sizes are the default here. It has no replicas and no speeds: spare slots are filled
afterwards, and speeds are not looked at; both are noted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.plan import Status
from moeplan.planning.cluster_ranks import by_dynamic_programming, by_program, by_sweeps
from moeplan.planning.clustering import Balance, cluster_experts
from moeplan.planning.milp import Answer
from moeplan.planning.problem import PlanningProblem, PlanningResult
from moeplan.planning.slots import base_slots, expert_transitions, finish_rows, require_room

__all__ = ["moetuner"]

Assign = Literal["auto", "program", "exact", "sweeps"]

_DEVIATION_LIMIT = 512
"""Experts times clusters up to which the printed first objective is used: it takes 1 to 2 s a layer at 64
x 8 and over 20 s at 256 x 32, most of it before the first branch.
"""

_EXACT_LIMIT = 6
"""Ranks up to which all permutations are compared."""


def moetuner(
    problem: PlanningProblem,
    *,
    equal_slots: bool = True,
    balance: Balance | None = None,
    assign: Assign = "auto",
    tolerance: float = 0.025,
    max_nodes: int = 100,
) -> PlanningResult:
    """Place experts by MoETuner's two programs.

    ``balance`` is the first program's objective (None: as printed, or the largest load where that is out
    of reach); ``assign`` is how the second is solved (``auto``: exactly over permutations up to 6 ranks,
    else by sweeps). ``tolerance`` is the paper's; ``max_nodes`` limits each search tree. With
    ``equal_slots=False`` clusters have 1 to ``slots`` experts, every rank holds as many over all layers,
    and the second program is always solved as printed, for few ranks.

    Raises:
        InfeasibleError: fewer slots than experts, or the memory constraint cannot be met.
        TraceError: the load has neither tokens nor transition counts.
    """
    require_room(problem)
    transitions_LEE = expert_transitions(problem, "moetuner")
    live_G = np.nonzero(problem.slots_R)[0]
    slots_G = problem.slots_R[live_G]
    notes = []
    clusters_L, sizes_LG, answers = [], [], []
    for layer, experts in enumerate(problem.experts_L.tolist()):
        size_G = base_slots(slots_G, experts) if equal_slots else slots_G
        objective: Balance = balance or ("deviation" if experts * len(live_G) <= _DEVIATION_LIMIT else "max")
        cluster_E, answer = cluster_experts(
            problem.load.load_LE[layer, :experts],
            size_G,
            equal_sizes=equal_slots,
            balance=objective,
            tolerance=tolerance,
            max_nodes=max_nodes,
            time_limit_s=None
            if problem.time_limit_s is None
            else problem.time_limit_s / len(problem.experts_L),
        )
        clusters_L.append(cluster_E)
        sizes_LG.append(np.bincount(cluster_E, minlength=len(live_G)))
        answers.append(answer)
        problem.progress("clusters of experts", (layer + 1) / len(problem.experts_L))
    notes.append(_clusters_note(answers, objective, balance, tolerance))

    sizes_LC = np.stack(sizes_LG)
    traffic_LGG = _cluster_traffic(transitions_LEE, clusters_L, len(live_G))
    cost_GG = _pair_costs(problem)[np.ix_(live_G, live_G)]
    allowed_LCG = sizes_LC[:, :, None] <= slots_G
    if not equal_slots:
        assign = "program"
    elif assign == "auto":
        assign = "exact" if len(live_G) <= _EXACT_LIMIT else "sweeps"
    if assign == "program":
        memory_LC = None if equal_slots else sizes_LC
        cluster_LG, answer = by_program(
            traffic_LGG,
            cost_GG,
            allowed_LCG,
            experts_LC=memory_LC,
            tolerance=tolerance,
            max_nodes=max_nodes,
            time_limit_s=problem.time_limit_s,
        )
        answers.append(answer)
        notes.append(f"second program by HiGHS: gap {answer.gap:.1%}")
    elif assign == "exact":
        cluster_LG = by_dynamic_programming(traffic_LGG, cost_GG, allowed_LCG)
        notes.append("second program solved to its optimum over all permutations of clusters, without HiGHS")
    else:
        cluster_LG = by_sweeps(traffic_LGG, cost_GG, allowed_LCG)
        notes.append(
            f"second program: {len(live_G)} ranks make {len(live_G) ** 4} products per pair of layers, out of"
            " a solver's reach; layers assigned one after the other, each exactly given its neighbours"
        )
    rank_LE = [
        live_G[cluster_G.argsort()[cluster_E]]
        for cluster_G, cluster_E in zip(cluster_LG, clusters_L, strict=True)
    ]
    placement, more = finish_rows(problem, rank_LE, fill=equal_slots)
    status: Status = "time_limit" if any(answer.timed_out for answer in answers) else "feasible"
    return PlanningResult(placement, status, notes=(*notes, *more))


def _clusters_note(
    answers: Iterable[Answer], objective: Balance, asked: Balance | None, tolerance: float
) -> str:
    """How the first program ended."""
    gaps = [answer.gap for answer in answers]
    name = "sum of |load - mean| as printed" if objective == "deviation" else "largest load"
    why = (
        ""
        if objective == "deviation" or asked
        else ", as the printed one is out of a solver's reach at this size"
    )
    proven = sum(gap <= tolerance + 1e-9 for gap in gaps)
    return f"first program, objective {name}{why}: {proven} of {len(gaps)} layers within {tolerance:.1%}"


def _pair_costs(problem: PlanningProblem) -> NDArray[np.float64]:
    """Seconds of one token between two ranks ``[R, R]``: scale-up link inside a node, one rank's NIC
    between nodes.
    """
    node_R = np.arange(problem.num_ranks) // problem.ranks_per_node
    inside_s = problem.costs.per_rank_copy_s
    between_s = problem.costs.per_node_copy_s * problem.ranks_per_node
    cost_RR = np.where(node_R[:, None] == node_R, inside_s, between_s)
    np.fill_diagonal(cost_RR, 0.0)
    return cost_RR


def _cluster_traffic(
    transitions_LEE: NDArray[np.float64], clusters_L: list[NDArray[np.int64]], clusters: int
) -> NDArray[np.float64]:
    """Tokens from cluster to cluster ``[L-1, G, G]`` (9), (12)."""
    member_LEG = np.zeros((len(clusters_L), transitions_LEE.shape[-1], clusters))
    for member_EG, cluster_E in zip(member_LEG, clusters_L, strict=True):
        member_EG[np.arange(len(cluster_E)), cluster_E] = 1
    traffic_LGG: NDArray[np.float64] = member_LEG[:-1].transpose(0, 2, 1) @ transitions_LEE @ member_LEG[1:]
    return traffic_LGG
