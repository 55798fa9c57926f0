"""Skewed choices as public kernel benchmarks draw them, and what they cost by balanced measurements alone.

The power-law benchmark draws one weight per expert from a bounded power law with exponent ``alpha`` (between 1
and 0.8 T, or between 0.01 and 2 when ``T K <= E``), scales the weights to ``T K`` choices, caps an expert at
``T`` tokens and hands the overflow to the least loaded experts, rank by rank; the busiest contiguous rank is the
one measured. Its ``eplb`` variant first copies the busiest experts into the spare slots and packs greedily.

``D`` draws, ``E`` experts, ``e`` experts of the measured rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.exchange import touched_share
from moeplan.costs.experts import ExpertCosts

__all__ = ["busiest_rank", "busiest_rank_eplb", "draw_choices", "skewed_over_balanced"]

Floats = NDArray[np.float64]


def draw_choices(
    tokens: int, top_k: int, num_experts: int, alpha: float, ep: int, draws: int, rng: np.random.Generator
) -> Floats:
    """Tokens per expert ``[D, E]`` of the power-law benchmark; rows sum to ``T K``."""
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > num_experts else (0.01, 2.0)
    power = 1 - alpha
    uniform = rng.random((draws, num_experts))
    weights = ((high**power - low**power) * uniform + low**power) ** (1 / power)
    counts: Floats = np.rint(weights / weights.sum(1, keepdims=True) * tokens * top_k)
    for row in counts:
        _settle(row, tokens, top_k * tokens, ep)
    return counts


def _settle(row_E: Floats, cap: int, total: int, ep: int) -> None:
    """Cap every expert and make the sum ``total``, raising each rank's least loaded experts in equal shares."""
    np.minimum(row_E, cap, out=row_E)
    short = total - row_E.sum()
    if short < 0:  # rounding up: take from the busiest
        row_E[np.argmax(row_E)] += short
        return
    by_rank = row_E.reshape(ep, -1)
    while short > 0.5:
        room = [rank for rank in by_rank if rank.min() < cap]
        for rank in room:
            order = np.argsort(rank)
            # Pour an equal share over the lowest experts until they are level.
            levels = np.append(rank[order], np.inf)
            level = (np.cumsum(levels[:-1]) + short / len(room)) / np.arange(1, len(rank) + 1)
            last = int(np.argmax(level <= levels[1:]))
            rank[order[: last + 1]] = np.minimum(level[last], cap)
        short = total - row_E.sum()


def busiest_rank(counts_DE: Floats, ep: int) -> Floats:
    """Tokens per local expert ``[D, e]`` of the contiguous rank with most."""
    per_rank = counts_DE.reshape(len(counts_DE), ep, -1)
    busiest: Floats = per_rank[np.arange(len(per_rank)), per_rank.sum(2).argmax(1)]
    return busiest


def busiest_rank_eplb(counts_DE: Floats, ep: int, num_slots: int) -> Floats:
    """Tokens per slot ``[D, slots / ep]`` of the busiest rank after copying and greedy packing."""
    local = num_slots // ep
    answer = np.zeros((len(counts_DE), local))
    for number, counts in enumerate(counts_DE):
        copies = np.ones(len(counts))
        for _ in range(num_slots - len(counts)):
            copies[np.argmax(counts / copies)] += 1
        slots = np.sort(np.repeat(counts / copies, copies.astype(int)))[::-1]
        load, used = np.zeros(ep), np.zeros(ep, np.int64)
        held = np.zeros((ep, local))
        for tokens in slots:
            rank = int(np.argmin(np.where(used < local, load, np.inf)))
            held[rank, used[rank]] = tokens
            load[rank] += tokens
            used[rank] += 1
        answer[number] = held[load.argmax()]
    return answer


def skewed_over_balanced(
    costs: ExpertCosts, vectors_De: Floats, tokens: int, top_k: int, num_experts: int, ep: int, dispatched: bool = False
) -> float:
    """Predicted time of a skewed rank over that of a balanced one, averaged over draws.

    ``dispatched``: the skewed rank is sent its own tokens only (wide expert parallelism), where the balanced one
    was measured with all tokens of the group in its memory; what is paid per token whatever its experts then
    falls to the part that arrives.
    """
    mean = tokens * top_k / num_experts
    balanced = costs.rank_s(np.full(num_experts // ep, mean), mean)
    if not dispatched:
        return float(costs.rank_s(vectors_De, mean).mean() / balanced)
    arriving = touched_share(vectors_De.sum(1) / (tokens * top_k), top_k)
    skewed = [costs.rank_s(vector, mean * part) for vector, part in zip(vectors_De, arriving, strict=True)]
    return float(np.mean(skewed) / balanced)
