"""What no placement can keep from travelling, where it counts from which node a token comes.

``E`` experts, ``N`` nodes, ``T`` tokens, ``K`` top-k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from moeplan.costs.counting import home_ranks
from moeplan.planning.problem import PlanningProblem

__all__ = ["fewest_away", "pairs_at_home"]


def pairs_at_home(problem: PlanningProblem, layer: int, weight_T: NDArray[np.float64]) -> tuple[float, float]:
    """Most (token, expert) pairs that any placement serves in the token's own node, and all pairs; per token.

    Every expert has its first copy in one node, and each spare slot adds one expert to one node at most.
    """
    trace, live = problem.load.trace, np.flatnonzero(problem.live_R)
    assert trace is not None, "homes are counted on tokens"
    node_T = home_ranks(problem.load, live) // problem.ranks_per_node
    chosen_TK = trace.experts_TLK[:, layer].astype(np.int64)
    token, place = np.nonzero(chosen_TK >= 0)
    at_home_EN = np.zeros((problem.load.num_experts, problem.num_nodes))
    np.add.at(at_home_EN, (chosen_TK[token, place], node_T[token]), weight_T[token])
    ranked_EN = np.sort(at_home_EN, axis=1)
    spare = min(int(problem.spare_L[layer]), ranked_EN[:, :-1].size)
    copies = np.sort(ranked_EN[:, :-1], axis=None)[ranked_EN[:, :-1].size - spare :]
    return float(ranked_EN[:, -1].sum() + copies.sum()), float(at_home_EN.sum())


def fewest_away(together: float, at_home: float, top_k: int, nodes: int) -> float:
    """Least mean number of distinct nodes that a token is sent to from its own.

    A token with ``q`` of its ``top_k`` experts at home and the others in ``d`` nodes has ``q (q - 1) / 2`` and at least
    ``s(d)`` (the even split) pairs that share a node. A linear programme mixes such tokens so that on average at most
    ``at_home`` experts are at home and ``together`` pairs share a node.
    """
    kinds = [(top_k, 0, top_k * (top_k - 1) / 2)]
    for q in range(top_k):
        for d in range(1, min(nodes - 1, top_k - q) + 1):
            each, more = divmod(top_k - q, d)
            kinds.append((q, d, q * (q - 1) / 2 + d * each * (each - 1) / 2 + more * each))
    home_X, away_X, pairs_X = np.array(kinds, dtype=float).T
    found = linprog(
        away_X,
        A_ub=np.stack([home_X, pairs_X]),
        b_ub=np.array([at_home, together]),
        A_eq=np.ones((1, len(kinds))),
        b_eq=np.ones(1),
        bounds=(0, None),
        method="highs",
    )
    return float(found.fun) if found.status == 0 else 0.0
