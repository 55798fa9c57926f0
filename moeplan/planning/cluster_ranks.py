"""MoETuner's second program: clusters of each layer to ranks (arXiv 2502.06643, section 4), three ways.

``L`` layers, ``G`` clusters and as many ranks. ``traffic_LGG[l, c, d]`` counts tokens from cluster ``c``
of layer ``l`` to cluster ``d`` of the next; ``cost_GG[g, h]`` is the time of one token from rank ``g`` to
``h``, the inverse of the paper's bandwidth, and 0 on a rank itself. Each answer is ``cluster_LG``, the
cluster on each rank; all minimise ``sum_l max_{g,h} traffic * cost``, the slowest pair of ranks of each
layer. ``allowed_LCG[l, c, g]`` says where a cluster fits.
"""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pulp
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from moeplan.errors import InfeasibleError
from moeplan.planning.milp import Answer, solve, values, variables

__all__ = ["by_dynamic_programming", "by_program", "by_sweeps"]

Floats = NDArray[np.float64]


def by_program(
    traffic_LGG: Floats,
    cost_GG: Floats,
    allowed_LCG: NDArray[np.bool_],
    *,
    experts_LC: NDArray[np.int64] | None = None,
    tolerance: float = 0.025,
    max_nodes: int | None = None,
    time_limit_s: float | None = None,
) -> tuple[NDArray[np.int64], Answer]:
    """The integer program (8)-(15), its products made linear: exact, for few ranks (``G^4 (L-1)`` products).

    Two things are mended: the printed sum over rank pairs stands inside a maximum that its text takes
    over them, and a token that stays on its rank costs nothing. A product ``y_cg y'_dh`` becomes ``w_cgdh
    >= 0`` with ``sum_d w_cgdh = y_cg`` for each ``h`` and ``sum_c w_cgdh = y'_dh`` for each ``g``. With
    ``experts_LC`` (cluster sizes) every rank also holds the same number of experts over all layers (13),
    to within one.

    Raises:
        InfeasibleError: the memory constraint cannot be met.
    """
    layers, ranks = allowed_LCG.shape[0], len(cost_GG)
    scale = max(float((traffic_LGG * cost_GG.max()).sum()) / max(1, layers - 1), 1e-300)
    model = pulp.LpProblem("clusters_to_ranks")
    G = range(ranks)
    y_LCG = [variables(model, f"y_{layer}", ranks, ranks, binary=True) for layer in range(layers)]
    z_L = variables(model, "z", layers - 1)
    model.setObjective(pulp.lpSum(z_L))
    for y_CG, allowed_CG in zip(y_LCG, allowed_LCG, strict=True):
        for i in G:
            model.addConstraint(pulp.lpSum(y_CG[i]) == 1)
            model.addConstraint(pulp.lpSum(y_CG[:, i]) == 1)
        for variable in y_CG[~allowed_CG]:
            variable.upBound = 0
    for layer, traffic_CD in enumerate(traffic_LGG):
        w_CGDH = variables(model, f"w_{layer}", ranks, ranks, ranks, ranks)
        for g, h in product(G, G):
            for i in G:
                model.addConstraint(pulp.lpSum(w_CGDH[i, g, :, h]) == y_LCG[layer][i, g])
                model.addConstraint(pulp.lpSum(w_CGDH[:, g, i, h]) == y_LCG[layer + 1][i, h])
            if g != h:
                cost_CD = traffic_CD * cost_GG[g, h] / scale
                pair = pulp.LpAffineExpression(
                    zip(w_CGDH[:, g, :, h].ravel(), cost_CD.ravel().tolist(), strict=True)
                )
                model.addConstraint(z_L[layer] >= pair)
    if experts_LC is not None:
        total = int(experts_LC.sum())
        for g in G:
            held = pulp.lpSum(
                int(experts) * variable
                for experts_C, y_CG in zip(experts_LC, y_LCG, strict=True)
                for experts, variable in zip(experts_C, y_CG[:, g], strict=True)
            )
            model.addConstraint(held >= total // ranks)
            model.addConstraint(held <= -(-total // ranks))
    answer = solve(model, tolerance=tolerance, max_nodes=max_nodes, time_limit_s=time_limit_s)
    if answer.infeasible:
        raise InfeasibleError(
            "clusters of these sizes cannot give every rank the same number of experts over all layers"
            " (MoETuner's memory constraint 13); use equal_slots=True"
        )
    if not answer.found:
        return np.tile(np.arange(ranks), (layers, 1)), answer
    return values(np.stack(y_LCG)).argmax(axis=1), answer


def by_dynamic_programming(
    traffic_LGG: Floats, cost_GG: Floats, allowed_LCG: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The proven optimum of the same program, over all permutations: ``O(L (G!)^2)``, for ``G <= 6``."""
    ranks = len(cost_GG)
    perms_XG = np.array(list(permutations(range(ranks))))
    fits_LX = np.logical_and.reduce(allowed_LCG[:, perms_XG, np.arange(ranks)], axis=2)
    best_X = np.where(fits_LX[0], 0.0, np.inf)
    came_from = []
    for layer, traffic_GG in enumerate(traffic_LGG):
        step_XX = np.zeros((len(perms_XG), len(perms_XG)))
        for g, h in permutations(range(ranks), 2):
            np.maximum(
                step_XX, traffic_GG[np.ix_(perms_XG[:, g], perms_XG[:, h])] * cost_GG[g, h], out=step_XX
            )
        step_XX += best_X[:, None]
        came_from.append(step_XX.argmin(axis=0))
        best_X = np.where(fits_LX[layer + 1], step_XX.min(axis=0), np.inf)
    state = int(best_X.argmin())
    states = [state]
    for previous_X in reversed(came_from):
        state = int(previous_X[state])
        states.append(state)
    return perms_XG[states[::-1]]


def _two_bottlenecks(before_CG: Floats, after_CG: Floats) -> NDArray[np.int64]:
    """The assignment with the least ``max before + max after``, of those met the one with the least total;
    a cluster per rank.

    Thresholds of ``before`` rise while the lowest threshold of ``after`` with a perfect matching falls.
    """
    ranks = len(before_CG)

    def perfect(before: float, after: float) -> bool:
        within_CG = np.where(before_CG <= before, after_CG <= after, False)
        return bool((maximum_bipartite_matching(csr_array(within_CG)) >= 0).all())

    after_V = np.unique(after_CG[np.isfinite(after_CG)])
    lowest = len(after_V)
    best, thresholds = np.inf, (np.inf, np.inf)
    for value in np.unique(before_CG[np.isfinite(before_CG)]):
        if value + after_V[0] >= best:
            break
        while lowest > 0 and perfect(value, after_V[lowest - 1]):
            lowest -= 1
        if lowest < len(after_V) and value + after_V[lowest] < best:
            best, thresholds = value + after_V[lowest], (value, after_V[lowest])
    allowed_CG = (before_CG <= thresholds[0]) & (after_CG <= thresholds[1]) & np.isfinite(before_CG)
    total_CG = np.where(np.isfinite(before_CG), before_CG + after_CG, 0.0)
    cluster_C, rank_C = linear_sum_assignment(np.where(allowed_CG, total_CG, (total_CG.max() + 1) * ranks))
    cluster_G = np.empty(ranks, dtype=np.int64)
    cluster_G[rank_C] = cluster_C
    return cluster_G


def by_sweeps(
    traffic_LGG: Floats, cost_GG: Floats, allowed_LCG: NDArray[np.bool_], *, sweeps: int = 4
) -> NDArray[np.int64]:
    """A good answer for any number of ranks: layers one after the other, each exactly given its neighbours.

    The first pass knows the layer before only; up to ``sweeps`` more know both, until nothing changes.
    Each step is a bottleneck assignment, so the sum never rises after the first pass.
    """
    layers, ranks = allowed_LCG.shape[0], len(cost_GG)
    cluster_LG = np.tile(np.arange(ranks), (layers, 1))
    for sweep in range(1 + sweeps):
        previous_LG = cluster_LG.copy()
        for layer in range(0 if sweep else 1, layers):
            before_CG = after_CG = np.zeros((ranks, ranks))
            if layer > 0:
                # [cluster d, rank h]: the slowest pair (g, h) if d were on h
                pairs_GD = traffic_LGG[layer - 1][cluster_LG[layer - 1]]
                before_CG = (pairs_GD[:, :, None] * cost_GG[:, None, :]).max(axis=0)
            if sweep and layer < layers - 1:
                pairs_CH = traffic_LGG[layer][:, cluster_LG[layer + 1]]
                after_CG = (pairs_CH[:, None, :] * cost_GG[None, :, :]).max(axis=2)
            before_CG = np.where(allowed_LCG[layer], before_CG, np.inf)
            cluster_LG[layer] = _two_bottlenecks(before_CG, after_CG)
        if sweep and (cluster_LG == previous_LG).all():
            break
    return cluster_LG
