"""Planning problems made up from a seed, for tests and benchmarks. Their figures describe no real machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.layer import LayerCosts
from moeplan.planning.problem import PlanningProblem
from moeplan.specs.workload import Objective

__all__ = ["make_problem"]


def make_problem(
    *,
    layers: int = 3,
    experts: int | Sequence[int] = 8,
    ranks: int = 4,
    ranks_per_node: int | None = None,
    slots: int | Sequence[int] | None = None,
    speeds: Sequence[float] | None = None,
    top_k: int = 2,
    tokens: int = 400,
    sigma: float = 0.6,
    affinity: float = 0.5,
    hot: float = 0.0,
    seed: int = 0,
    **fields: Any,
) -> PlanningProblem:
    """A problem with a token-level trace.

    Each expert's popularity is log-normal (``sigma``). A token has one of ``experts // 4`` (at least 2)
    topics, and in each layer a topic owns a random block of experts; with probability ``affinity`` a
    choice comes from the token's block, and with probability ``hot`` the first choice is expert 0.
    ``slots`` is per rank (one number for all; default: just enough), 0 for a failed rank. Other ``fields``
    go to :class:`PlanningProblem`.
    """
    rng = np.random.default_rng(seed)
    experts_L = np.full(layers, experts) if isinstance(experts, int) else np.asarray(experts)
    most = int(experts_L.max())
    topics = max(2, most // 4)
    topic_T = rng.integers(topics, size=tokens)
    chosen_TLK = np.empty((tokens, len(experts_L), top_k), dtype=np.int64)
    for layer, count in enumerate(experts_L):
        log_popularity_E = rng.normal(0.0, sigma, count)
        block_E = rng.permutation(count) % topics
        inside_TE = (block_E == topic_T[:, None]) & (rng.random((tokens, 1)) < affinity)
        # The top k of logit + Gumbel noise are k draws without repetition from the softmax of the logits.
        score_TE = log_popularity_E + 8.0 * inside_TE + rng.gumbel(size=(tokens, count))
        score_TE[rng.random(tokens) < hot, 0] = np.inf
        chosen_TLK[:, layer] = np.argsort(-score_TE, axis=1, kind="stable")[:, :top_k]
    trace = RoutingTrace(chosen_TLK, most, tuple(range(len(experts_L))))
    load_LE = np.stack(
        [np.bincount(chosen_TLK[:, layer].ravel(), minlength=most) for layer in range(len(experts_L))]
    )
    if slots is None or isinstance(slots, int):
        slots = [-(-most // ranks) if slots is None else slots] * ranks
    return PlanningProblem(
        load=ExpertLoad(load_LE[None].astype(np.float64), ("all",), trace.layer_ids, top_k, trace),
        experts_L=experts_L.astype(np.int64),
        slots_R=np.asarray(slots, dtype=np.int64),
        speed_R=np.ones(ranks) if speeds is None else np.asarray(speeds, dtype=np.float64),
        ranks_per_node=ranks_per_node or ranks,
        **{
            "costs": LayerCosts(
                tokens_per_step=1024 * ranks,
                expert_fixed_s=10e-6,
                per_active_expert_s=5e-6,
                per_pair_s=50e-9,
                exchange_fixed_s=20e-6,
                per_node_copy_s=40e-9,
                per_rank_copy_s=20e-9,
                source={"all": "made up"},
            ),
            "objective": Objective(),
            "seed": seed,
            **fields,
        },
    )
