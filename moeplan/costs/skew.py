"""Skewed choices as public kernel benchmarks draw them, and what they cost by balanced measurements alone.

The power-law benchmark draws one weight per expert from a bounded power law with exponent ``alpha`` (between 1
and 0.8 T, or between 0.01 and 2 when ``T K <= E``), scales the weights to ``T K`` choices, caps an expert at
``T`` tokens and hands the overflow to the least loaded experts, rank by rank; the busiest contiguous rank is the
one measured. Its ``eplb`` variant first copies the busiest experts into the spare slots and packs greedily.
Choices are dealt out without chance: the busiest slot takes the first tokens, the next slot goes on from there,
round the tokens ``K`` times (aiconfigurator, collector/helper.py: ``power_law_logits_v3``). Which tokens arrive at
the measured rank follows, and their number is what wide-EP tables record of their draw.

``D`` draws, ``E`` experts, ``P`` slots, ``e`` experts of the measured rank.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import nnls

from moeplan.costs.expert_law import ExpertCosts

__all__ = [
    "busiest_rank",
    "busiest_rank_eplb",
    "draw_choices",
    "nearest_draws",
    "router_logit_s",
    "skewed_over_balanced",
]

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


@njit(cache=True, nogil=True)
def _settle(row_E: Floats, cap: float, total: float, ep: int) -> None:
    """Cap every expert and make the sum ``total``, raising each rank's least loaded experts in equal shares."""
    np.minimum(row_E, cap, row_E)
    short = total - row_E.sum()
    if short < 0:  # rounding up: take from the busiest
        row_E[np.argmax(row_E)] += short
        return
    by_rank = row_E.reshape(ep, -1)
    while short > 0.5:
        room = np.array([rank for rank in range(ep) if by_rank[rank].min() < cap])
        for rank in room:
            # Pour an equal share over the lowest experts until they are level.
            rising = np.sort(by_rank[rank])
            poured, level = short / len(room), 0.0
            for number in range(len(rising)):
                poured += rising[number]
                level = poured / (number + 1)
                if number + 1 == len(rising) or level <= rising[number + 1]:
                    break
            by_rank[rank] = np.maximum(by_rank[rank], min(level, cap))
        short = total - row_E.sum()


def busiest_rank(counts_DE: Floats, ep: int, tokens: int) -> tuple[Floats, Floats]:
    """Of the contiguous rank with most: tokens per local expert ``[D, e]``, and tokens that arrive ``[D]``."""
    draws, experts = counts_DE.shape
    local = experts // ep
    busiest_D = counts_DE.reshape(draws, ep, local).sum(2).argmax(1)
    vectors_De = counts_DE.reshape(draws, ep, local)[np.arange(draws), busiest_D]
    arriving = np.zeros(draws)
    for number, counts in enumerate(counts_DE):
        order = np.argsort(-counts, kind="stable")
        arriving[number] = _arriving(counts[order], order // local == busiest_D[number], tokens)
    return vectors_De, arriving


def busiest_rank_eplb(counts_DE: Floats, ep: int, num_slots: int, tokens: int) -> tuple[Floats, Floats]:
    """As :func:`busiest_rank`, after copying and greedy packing: ``[D, slots / ep]`` and ``[D]``."""
    local = num_slots // ep
    vectors, arriving = np.zeros((len(counts_DE), local)), np.zeros(len(counts_DE))
    for number, counts in enumerate(counts_DE):
        copies = np.ones(len(counts), np.int64)
        heaviest = [(-count, expert) for expert, count in enumerate(counts)]
        heapq.heapify(heaviest)
        for _ in range(num_slots - len(counts)):
            expert = heaviest[0][1]
            copies[expert] += 1
            heapq.heapreplace(heaviest, (-counts[expert] / copies[expert], expert))
        slots_P = np.sort(np.repeat(counts / copies, copies))[::-1]
        lightest = [(0.0, rank) for rank in range(ep)]
        used, rank_P = np.zeros(ep, np.int64), np.zeros(num_slots, np.int64)
        for slot, more in enumerate(slots_P):
            load, rank = heapq.heappop(lightest)
            rank_P[slot] = rank
            used[rank] += 1
            if used[rank] < local:
                heapq.heappush(lightest, (load + more, rank))
        mine_P = rank_P == np.bincount(rank_P, slots_P).argmax()
        vectors[number], arriving[number] = slots_P[mine_P], _arriving(slots_P, mine_P, tokens)
    return vectors, arriving


def _arriving(falling_P: Floats, mine_P: NDArray[np.bool_], tokens: int) -> float:
    """Tokens that choose one of the slots ``mine``: the union of the slots' runs, dealt round the tokens."""
    first = (np.cumsum(falling_P) - falling_P)[mine_P] % tokens
    last = first + falling_P[mine_P]
    runs = [*zip(first, np.minimum(last, tokens), strict=True), *((0.0, end - tokens) for end in last if end > tokens)]
    covered = reached = 0.0
    for start, end in sorted(runs):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def nearest_draws(arriving_D: Floats, recorded: float, keep: int) -> NDArray[np.intp]:
    """The draws whose number of arriving tokens is nearest to that of the measured one."""
    return np.argsort(np.abs(arriving_D - recorded), kind="stable")[:keep]


def router_logit_s(logits_n: Floats, older_s_n: Floats, later_s_n: Floats) -> float:
    """Seconds a logit that choosing experts takes longer in an older release than in a later one, from times of both
    at the same points and the logits there: least relative squares beside a launch, neither negative."""
    design = np.stack([np.ones(len(logits_n)), logits_n], 1) / later_s_n[:, None]
    return float(nnls(design, older_s_n / later_s_n - 1)[0][1])


def skewed_over_balanced(
    costs: ExpertCosts,
    vectors_De: Floats,
    tokens: int,
    top_k: int,
    num_experts: int,
    ep: int,
    arriving_D: Floats | None = None,
    balanced_s: float | None = None,
    longer_s: float = 0.0,
) -> float:
    """Predicted time of a skewed rank over that of a balanced one, averaged over draws.

    ``balanced_s``: the balanced rank's time as measured, to be used where it is of another program than the skewed
    one's: what sets it apart from the law (an autotuner's choice, say) does then not set the skewed one apart too.
    ``longer_s``: what the skewed rank takes longer, whatever its experts (:func:`router_logit_s`).

    ``arriving_D``: the skewed rank is sent its own tokens only (wide expert parallelism), so many, where the
    balanced one was measured with all tokens of the group in its memory; what is paid per token whatever its
    experts then falls to the part that arrives.
    """
    mean = tokens * top_k / num_experts
    balanced = costs.rank_s(np.full(num_experts // ep, mean), mean) if balanced_s is None else balanced_s
    parts = np.ones(1) if arriving_D is None else arriving_D / tokens
    shared = np.mean([costs.shared_s(mean * part) for part in parts])
    return float((longer_s + shared + costs.one_expert_s(vectors_De).sum(-1).mean()) / balanced)
