"""MoETuner's first program: the experts of a layer into clusters of even load (arXiv 2502.06643, section 4).

``E`` experts, ``G`` clusters, one per rank.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pulp
from numpy.typing import NDArray

from moeplan.errors import InfeasibleError
from moeplan.planning.milp import Answer, solve, values, variables

__all__ = ["Balance", "cluster_experts"]

Balance = Literal["deviation", "max"]


def cluster_experts(
    weight_E: NDArray[np.float64],
    size_G: NDArray[np.int64],
    *,
    equal_sizes: bool = True,
    balance: Balance = "deviation",
    tolerance: float = 0.025,
    max_nodes: int | None = None,
    time_limit_s: float | None = None,
) -> tuple[NDArray[np.int64], Answer]:
    """The cluster of each expert, and how close to the optimum.

    ``deviation`` minimises ``sum_c |T_c - mean|`` as printed (1)-(5), in units of the mean; its linear
    relaxation is worth nothing (bound 0), so that large layers end at ``max_nodes`` unproven. ``max``
    minimises the largest ``T_c``, which HiGHS proves much sooner. Added to the paper: each expert is in
    exactly one cluster, which it leaves unsaid. ``size_G`` are the exact sizes; with
    ``equal_sizes=False`` they are upper limits, and a cluster has at least one expert (7).

    Raises:
        InfeasibleError: fewer experts than clusters, or more than the sizes allow.
    """
    experts, clusters = len(weight_E), len(size_G)
    smallest = 0 if equal_sizes else 1
    if not clusters * smallest <= experts <= size_G.sum():
        raise InfeasibleError(
            f"num_experts ({experts}) do not fit {clusters} clusters of {smallest} to {int(size_G.max())}"
        )
    mean = weight_E.sum() / clusters
    scaled_E = weight_E / mean if mean > 0 else weight_E
    order_E = np.argsort(-scaled_E, kind="stable")
    model = pulp.LpProblem("clusters")
    x_CE = variables(model, "x", clusters, experts, binary=True)
    cost_C = variables(model, "d", clusters if balance == "deviation" else 1)
    model.setObjective(pulp.lpSum(cost_C))
    for e in range(experts):
        model.addConstraint(pulp.lpSum(x_CE[:, e]) == 1)
    for c in range(clusters):
        size = pulp.lpSum(x_CE[c])
        load = pulp.LpAffineExpression(zip(x_CE[c], scaled_E.tolist(), strict=True))
        if equal_sizes:
            model.addConstraint(size == int(size_G[c]))
        else:
            model.addConstraint(size >= 1)
            model.addConstraint(size <= int(size_G[c]))
        if balance == "deviation":
            model.addConstraint(cost_C[c] >= load - 1)
            model.addConstraint(cost_C[c] >= 1 - load)
        else:
            model.addConstraint(cost_C[0] >= load)
    start_E = _swapped(_heaviest_first(scaled_E, order_E, size_G, reserve=smallest), scaled_E, clusters)
    if (size_G == size_G[0]).all():  # clusters are alike: the i-th heaviest expert is in one of the first i
        for i, e in enumerate(order_E[: clusters - 1]):
            for variable in x_CE[i + 1 :, e]:
                variable.upBound = 0
        _, first_I, cluster_E = np.unique(start_E[order_E], return_index=True, return_inverse=True)
        start_E[order_E] = first_I.argsort().argsort()[cluster_E]
    load_C = np.bincount(start_E, weights=scaled_E, minlength=clusters)
    start = {x_CE[c, e]: 1.0 for e, c in enumerate(start_E)}
    start |= dict(zip(cost_C, np.abs(load_C - 1) if balance == "deviation" else [load_C.max()], strict=True))
    answer = solve(model, tolerance=tolerance, max_nodes=max_nodes, time_limit_s=time_limit_s, start=start)
    if not answer.found:
        return start_E, answer
    return values(x_CE).argmax(axis=0), answer


def _heaviest_first(
    weight_E: NDArray[np.float64], order_E: NDArray[np.intp], size_G: NDArray[np.int64], reserve: int
) -> NDArray[np.int64]:
    """Each expert to the lightest cluster with room; the last ``reserve`` per empty cluster are kept for
    those.
    """
    cluster_E = np.zeros(len(weight_E), dtype=np.int64)
    load_G, count_G = np.zeros(len(size_G)), np.zeros(len(size_G), dtype=np.int64)
    for i, expert in enumerate(order_E):
        must_fill = reserve * int((count_G == 0).sum()) >= len(order_E) - i
        open_G = (count_G == 0) if must_fill else (count_G < size_G)
        cluster = int(np.where(open_G, load_G, np.inf).argmin())
        cluster_E[expert] = cluster
        load_G[cluster] += weight_E[expert]
        count_G[cluster] += 1
    return cluster_E


def _swapped(cluster_E: NDArray[np.int64], weight_E: NDArray[np.float64], clusters: int) -> NDArray[np.int64]:
    """Swap an expert of the busiest cluster with another as long as that makes the busier of the two less
    busy.
    """
    cluster_E = cluster_E.copy()
    while True:
        load_G = np.bincount(cluster_E, weights=weight_E, minlength=clusters)
        busiest = int(load_G.argmax())
        mine_I = np.nonzero(cluster_E == busiest)[0]
        given_IE = weight_E[mine_I][:, None] - weight_E
        after_IE = np.maximum(load_G[busiest] - given_IE, load_G[cluster_E] + given_IE)
        after_IE[:, mine_I] = np.inf
        i, other = np.unravel_index(int(after_IE.argmin()), after_IE.shape)
        if after_IE[i, other] >= load_G[busiest] * (1 - 1e-9):
            return cluster_E
        cluster_E[mine_I[i]], cluster_E[other] = cluster_E[other], busiest
