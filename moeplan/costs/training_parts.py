"""A chunk's pass apart, for who plays it event by event.

``W`` windows of load, ``L`` MoE layers, ``R`` ranks of one expert-parallel group.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.costs.step import BatchParts
from moeplan.costs.training import Chunk, TrainingCosts

__all__ = ["chunk_parts"]


def chunk_parts(costs: TrainingCosts, chunk: Chunk, window: int, backward: bool) -> tuple[BatchParts, float]:
    """One micro-batch of a chunk in one direction: its MoE layers, and seconds of everything else.

    Backward runs the layers from the last to the first. What it does of a shared expert beyond a forward counts as
    attention: like the step mode, exchanges hide no more than a forward's. Exchanges that are recomputed are among
    everything else.
    """
    rows = list(chunk.moe_rows[::-1] if backward else chunk.moe_rows)
    whole, factor = costs.batches_W[window], costs.backward_factor if backward else 1.0
    more_R = (factor - 1) * whole.shared_s_R
    parts = replace(
        whole,
        attention_s_R=np.full_like(whole.attention_s_R, costs.attention_s[backward]) + more_R,
        expert_s_LR=factor * whole.expert_s_LR[rows],
        exchange_s_L=whole.exchange_s_L[rows],
        pairs_LR=whole.pairs_LR[rows],
    )
    layer_s = float((parts.attention_s_R + parts.shared_s_R).max())
    spent_s = len(rows) * layer_s + float(parts.expert_s_LR.max(1, initial=0.0).sum())
    seconds = float((chunk.backward_s_W if backward else chunk.forward_s_W)[window])
    return parts, max(0.0, seconds - spent_s)
