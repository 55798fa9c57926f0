"""A chunk apart: its pass, for who plays it event by event, and its parts, each as long as somebody asks.

``W`` windows of load, ``L`` MoE layers, ``R`` ranks of one expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moeplan.costs.step import BatchParts
from moeplan.costs.training import Chunk, TrainingCosts

__all__ = ["chunk_parts", "scaled"]


def scaled(costs: TrainingCosts, chunk: Chunk, factor: Mapping[str, float]) -> Chunk:
    """A chunk whose parts (:attr:`TrainingCosts.part_errors`) take ``factor`` times as long; those not named, as long
    as they do."""
    rows, spec = list(chunk.moe_rows), costs.spec
    expert, exchange, rest = (factor.get(name, 1.0) for name in ("experts", "exchange", "attention and dense parts"))
    expert_s_W = np.array([batch.expert_s_LR.max(1)[rows].sum() for batch in chunk.team.batches_W])
    exchange_s_WL = np.stack([batch.exchange_s_L[rows] for batch in chunk.team.batches_W])
    again_s_W = exchange_s_WL.sum(1) * (spec.recompute == "full")
    hidden_s = chunk.team.shared_s[0] if spec.overlap == "shared_expert" else 0.0
    back = costs.experts_back
    links, shared_s = factor.get("gradients and weights", 1.0), rest * hidden_s
    return replace(
        chunk,
        forward_s_W=rest * (chunk.forward_s_W - expert_s_W) + expert * expert_s_W,
        backward_s_W=rest * (chunk.backward_s_W - back * expert_s_W - again_s_W)
        + expert * back * expert_s_W
        + exchange * again_s_W,
        exchange_s_W=np.maximum(0.0, exchange * exchange_s_WL - shared_s).sum(1),
        sync_s=links * chunk.sync_s,
        gather_s=links * chunk.gather_s,
        tied_s=links * chunk.tied_s,
        optimizer_s=factor.get("optimizer", 1.0) * chunk.optimizer_s,
    )


def chunk_parts(costs: TrainingCosts, chunk: Chunk, window: int, backward: bool) -> tuple[BatchParts, float]:
    """One micro-batch of a chunk in one direction: its MoE layers, and seconds of everything else.

    Backward runs the layers from the last to the first. What it does of a shared expert beyond a forward counts as
    attention: like the step mode, exchanges hide no more than a forward's. Exchanges that are recomputed are among
    everything else.
    """
    rows = list(chunk.moe_rows[::-1] if backward else chunk.moe_rows)
    team = chunk.team
    whole, factor = team.batches_W[window], costs.experts_back if backward else 1.0
    more_s = backward * (team.shared_s[1] - team.shared_s[0])
    parts = replace(
        whole,
        attention_s_R=np.full_like(whole.attention_s_R, team.attention_s[int(backward)] + more_s),
        shared_s_R=np.full_like(whole.shared_s_R, team.shared_s[0]),
        expert_s_LR=factor * whole.expert_s_LR[rows],
        exchange_s_L=whole.exchange_s_L[rows],
        gather_s_L=whole.gather_s_L[rows],
        pairs_LR=whole.pairs_LR[rows],
    )
    layer_s = float((parts.attention_s_R + parts.shared_s_R).max())
    spent_s = len(rows) * layer_s + float(parts.expert_s_LR.max(1, initial=0.0).sum())
    seconds = float((chunk.backward_s_W if backward else chunk.forward_s_W)[window])
    return parts, max(0.0, seconds - spent_s)
