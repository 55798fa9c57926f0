"""Times to first token and per output token of a closed loop: so many requests in flight, one comes as one goes.

That is what ``benchmark_serving.py --request-rate inf --max-concurrency C --num-prompts 10C`` does: all ``C``
first requests arrive together, and lengths are uniform in [0.8, 1] of the nominal ones. The engine is costed
pass by pass with :class:`PassTimes`, whose numbers come from ``costs.engine``:

- one pool: a pass decodes every running sequence and takes waiting prompts up to ``prompt_tokens`` per group;
  ``alone`` runs prompts in a pass of their own, while decoding waits, as SGLang does by default;
- two pools (prefill and decode on different workers): prompts queue for the first free prefill worker, cross
  over in ``transfer_s``, and join their decode worker, to which they are dealt in turn, at its next pass with a free
  place. The first token is sent then.

``n`` requests, ``b`` grid of sequences per attention group, ``p`` grid of prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["Latencies", "PassTimes", "Pools", "closed_loop", "lengths"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PassTimes:
    """Seconds of passes: decode at ``batch_b`` sequences per group with ``context_2`` tokens of cache (a line
    between), prefill of ``tokens_p`` prompt tokens over a worker; lines between grid points, in proportion beyond."""

    batch_b: Floats
    context_2: Floats
    decode_s_b2: Floats
    tokens_p: Floats
    prefill_s_p: Floats


@dataclass(frozen=True, slots=True)
class Pools:
    """Groups are data-parallel attention groups over all workers of a pool; ``prefill_workers`` 0: one pool.

    ``tokens_per_step`` more than 1 with accepted drafts; ``max_running`` sequences of each of ``decode_workers``;
    ``query_tokens`` of a running sequence count against ``prompt_tokens``; ``alone``: prompts run in passes of their
    own; ``gather_passes``: prompts wait until every group has one, at most so long.
    """

    decode_groups: int
    prompt_tokens: float
    decode_workers: int = 1
    tokens_per_step: float = 1.0
    max_running: int = 1 << 30
    query_tokens: float = 0.0
    alone: bool = False
    prefill_workers: int = 0
    prefill_groups: int = 1
    transfer_s: float = 0.0
    gather_passes: int = 0


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds over all requests: means and medians."""

    ttft_mean_s: float
    ttft_median_s: float
    tpot_mean_s: float
    tpot_median_s: float


def lengths(nominal: int, count: int, rng: np.random.Generator, ratio: float = 0.8) -> Ints:
    """Lengths as the benchmark draws them: uniform whole numbers in [ratio, 1] of the nominal one."""
    return rng.integers(max(1, round(nominal * ratio)), nominal, count, endpoint=True)


def closed_loop(times: PassTimes, pools: Pools, concurrency: int, inputs_n: Ints, outputs_n: Ints) -> Latencies:
    """Serve all requests in order with ``concurrency`` in flight."""
    ttft, tpot = _serve(
        times.batch_b,
        times.context_2,
        times.decode_s_b2,
        times.tokens_p,
        times.prefill_s_p,
        float(pools.decode_groups),
        pools.decode_workers,
        pools.prompt_tokens,
        pools.tokens_per_step,
        pools.max_running,
        pools.query_tokens,
        pools.alone,
        pools.prefill_workers,
        float(pools.prefill_groups),
        pools.transfer_s,
        pools.gather_passes,
        concurrency,
        inputs_n,
        outputs_n,
    )
    return Latencies(float(ttft.mean()), float(np.median(ttft)), float(tpot.mean()), float(np.median(tpot)))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _line(x: Floats, y: Floats, at: float) -> float:
    if at >= x[-1]:
        return float(y[-1] * at / x[-1])
    return float(np.interp(at, x, y))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _decode(batch_b: Floats, context_2: Floats, seconds_b2: Floats, b: float, context: float) -> float:
    low, high = _line(batch_b, seconds_b2[:, 0], b), _line(batch_b, seconds_b2[:, 1], b)
    share = (context - context_2[0]) / (context_2[1] - context_2[0])
    return float(low + share * (high - low))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _serve(
    batch_b: Floats,
    context_2: Floats,
    decode_b2: Floats,
    tokens_p: Floats,
    prefill_p: Floats,
    groups: float,
    decode_workers: int,
    prompt_tokens: float,
    per_step: float,
    max_running: int,
    query_tokens: float,
    alone: bool,
    prefill_workers: int,
    prefill_groups: float,
    transfer: float,
    gather: int,
    concurrency: int,
    inputs: Ints,
    outputs: Ints,
) -> tuple[Floats, Floats]:
    n = len(inputs)
    arrival, first, end = np.zeros(n), np.zeros(n), np.zeros(n)
    steps = np.ceil((outputs - 1) / per_step).astype(np.int64)
    # Running sequences by the pass in which they end, as linked lists over a ring.
    ring = steps.max() + 2
    head, link = np.full(ring, -1), np.full(n, -1)
    come = min(concurrency, n)  # requests that have arrived; they are served in order of number
    begun = 0  # of them, those whose prefill has begun
    ready = np.full(n, np.inf)  # two pools: when the prompt's cache is on the decode side
    waiting = np.zeros(n, np.int64)  # two pools: begun and not yet decoding, first to last
    waiting_low, waiting_high = 0, 0
    free = np.zeros(max(1, prefill_workers))
    here = np.zeros(decode_workers, np.int64)  # running sequences of each decode worker
    now, step, running, done, cached = 0.0, 0, 0, 0, 0.0
    held = 0  # passes that prompts have waited for others
    ranks = int(groups)  # one pool: a request takes the place of the one that made way for it
    group = np.arange(n) % ranks
    pending = np.bincount(group[:come], minlength=ranks)
    admitted = np.zeros(n, np.int64)
    while done < n:
        taken, tokens = 0, 0.0
        if prefill_workers == 0:
            budget = prompt_tokens * groups - running * query_tokens
            held = held + 1 if begun < come else 0
            if 0 < held <= gather and running > 0 and pending.min() == 0:
                budget = -1.0
            while budget > 0 and begun < come and here[begun % decode_workers] < max_running:
                if tokens > 0 and tokens + inputs[begun] > budget:
                    break
                tokens += inputs[begun]
                here[begun % decode_workers] += 1
                pending[group[begun]] -= 1
                admitted[taken] = begun
                taken += 1
                begun += 1
        else:
            while begun < come:
                worker = int(np.argmin(free))
                start = max(free[worker], arrival[begun])
                if start > now and running > 0:
                    break
                lot, size = 0, 0.0
                while begun + lot < come and arrival[begun + lot] <= start:
                    if lot > 0 and size + inputs[begun + lot] > prompt_tokens * prefill_groups:
                        break
                    size += inputs[begun + lot]
                    lot += 1
                free[worker] = start + _line(tokens_p, prefill_p, size)
                for request in range(begun, begun + lot):
                    ready[request] = free[worker] + transfer
                    waiting[waiting_high] = request
                    waiting_high += 1
                begun += lot
            if running == 0 and waiting_low < waiting_high:
                now = max(now, ready[waiting[waiting_low : waiting_high]].min())
            position = waiting_low
            for at in range(waiting_low, waiting_high):
                request = waiting[at]
                worker = request % decode_workers
                if ready[request] <= now and here[worker] < max_running:
                    here[worker] += 1
                    admitted[taken] = request
                    taken += 1
                else:
                    waiting[position] = request
                    position += 1
            waiting_high = position
        prompts_s = 0.0
        if prefill_workers == 0 and taken > 0:
            held = 0
            prompts_s = _line(tokens_p, prefill_p, tokens)
        decodes = running > 0 and not (alone and prompts_s > 0)
        if prefill_workers > 0:
            for at in range(taken):
                request = admitted[at]
                first[request] = now
                ends = (step + max(1, steps[request]) - 1) % ring
                link[request], head[ends] = head[ends], request
                cached += inputs[request]
            running += taken
            decodes = running > 0
        decode_s = 0.0
        if decodes:
            decode_s = _decode(batch_b, context_2, decode_b2, max(1.0, running / groups), cached / running)
        now += prompts_s + decode_s
        if decodes and prompts_s > 0:
            now -= min(prompts_s, decode_b2[0, 0])  # one pass reads the weights once
        if decodes:
            cached += running * per_step
            request = head[step % ring]
            head[step % ring] = -1
            while request >= 0:
                end[request] = now
                done += 1
                running -= 1
                here[request % decode_workers] -= 1
                cached -= inputs[request] + steps[request] * per_step
                if come < n:
                    arrival[come] = now
                    group[come] = group[request]
                    pending[group[come]] += 1
                    come += 1
                request = link[request]
            step += 1
        if prefill_workers == 0:
            for at in range(taken):
                request = admitted[at]
                first[request] = now
                ends = (step + max(1, steps[request]) - 1) % ring
                link[request], head[ends] = head[ends], request
                cached += inputs[request]
            running += taken
    return first - arrival, (end - first) / np.maximum(1, outputs - 1)
