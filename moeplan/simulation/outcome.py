"""Figures of a served run: latencies, throughput, goodput, where ranks spend their time. ``Q`` requests, ``R`` ranks.

Latencies are of requests that came after the warm-up; the times between two tokens (ITL) and shares of time are from
its end to the end of the run. Rates and queues count what happened from the warm-up's end to the end of
``requests.duration`` or, without one, of the run; a request's further tokens are spread evenly from its first to its
last. TTFT runs from arrival to first token, TPOT is the mean time per further token. With drafts, tokens of one step
come together and ITL is the time from one step's to the next one's; the accept length is the mean number that a step
brings a sequence, without what its last step drops. A service that only decodes is
credited with neither prompts nor first tokens, which come to it with the cache.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.simulation_result import RankTimes, Timeline, TrafficMatrix
from moeplan.errors import SpecError
from moeplan.simulation.request import NEVER
from moeplan.simulation.service import Served
from moeplan.specs.serving import ServingSpec

__all__ = ["DIRECTIONS", "Outcome", "outcome_of"]

Floats = NDArray[np.float64]
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
_BINS = 120

# headline -> (unit, which way is good); latencies are added below
DIRECTIONS: dict[str, tuple[str, str]] = {
    "output_tokens_per_s": ("tokens/s", "higher"),
    "output_tokens_per_s_per_gpu": ("tokens/s", "higher"),
    "output_tokens_per_s_per_node": ("tokens/s", "higher"),
    "input_tokens_per_s_per_gpu": ("tokens/s", "higher"),
    "requests_per_s": ("requests/s", "higher"),
    "goodput_requests_per_s": ("requests/s", "higher"),
    "slo_attainment": ("1", "higher"),
    "usd_per_million_output_tokens": ("USD", "lower"),
    "compute_share": ("1", "higher"),
    "exchange_share": ("1", "lower"),
    "bubble_share": ("1", "lower"),
    "accept_length": ("tokens", "higher"),
    "mean_queue_length": ("1", "lower"),
    "longest_queue": ("1", "lower"),
    **{
        f"{name}_{quantile}_s": ("s", "lower")
        for name in ("ttft", "tpot", "itl", "e2e", "queue")
        for quantile in ("mean", "p50", "p90", "p99")
    },
}


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Figures of one run, by the names of :data:`DIRECTIONS`; the rest as in the result."""

    headlines: dict[str, float]
    counts: dict[str, float]
    distributions: dict[str, tuple[float, ...]]
    ranks: RankTimes | None
    timeline: Timeline | None
    end_s: float
    traffic: tuple[TrafficMatrix, ...] = ()


def outcome_of(served: Served, spec: ServingSpec) -> Outcome:
    """The figures of a run.

    Raises:
        SpecError: no request came after the warm-up.
    """
    requests = served.requests
    columns = np.array(
        [(r.arrival_ns, r.admit_ns, r.first_ns, r.finish_ns, r.input, r.output) for r in requests], np.float64
    )
    arrival, admit, first, finish = columns[:, :4].T * 1e-9
    inputs, outputs = columns[:, 4:].T
    done = columns[:, 3] != NEVER
    counted = done & (arrival >= spec.warmup)
    if not counted.any():
        last = arrival.max()
        raise SpecError(
            f"warmup ({spec.warmup:g} s): zero finished requests arrive after it (the last comes at {last:g} s);"
            " shorten it"
        )
    start, end = spec.warmup, min(served.end_s, spec.requests.duration or served.end_s)
    span = max(end - start, 1e-9)
    ttft, e2e = (first - arrival)[counted], (finish - arrival)[counted]
    longer = counted & (outputs > 1)
    tpot = ((finish - first) / np.maximum(outputs - 1, 1))[longer]
    queued = np.where(columns[:, 1] == NEVER, 0.0, admit - arrival)[counted]
    gaps: Counter[int] = Counter()
    for instance in served.instances:
        gaps.update(instance.stats.gaps)
    gap_s = np.array(sorted(gaps)) * 1e-9
    gap_counts = np.array([gaps[gap] for gap in sorted(gaps)], float)

    figures: dict[str, float] = {}
    distributions: dict[str, tuple[float, ...]] = {}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e), ("queue", queued)):
        if len(values):
            figures[f"{name}_mean_s"] = float(values.mean())
            for label, q in _QUANTILES:
                figures[f"{name}_{label}_s"] = float(np.quantile(values, q))
            distributions[name] = tuple(np.quantile(values, np.linspace(0, 1, 101)).tolist())
    if len(gap_s):
        figures["itl_mean_s"] = float(gap_s @ gap_counts / gap_counts.sum())
        for label, q in _QUANTILES:
            figures[f"itl_{label}_s"] = float(_weighted(gap_s, gap_counts, np.array([q]))[0])
        distributions["itl"] = tuple(_weighted(gap_s, gap_counts, np.linspace(0, 1, 101)).tolist())

    num_ranks = sum(len(instance.stats.busy_R) for instance in served.instances)
    begun = done & (first > start) & (first <= end) & (spec.role != "decode")
    tokens = float(begun.sum()) + _tokens_between(first[done], finish[done], outputs[done] - 1, start, end)
    figures["output_tokens_per_s"] = tokens / span
    figures["output_tokens_per_s_per_gpu"] = tokens / span / num_ranks
    figures["output_tokens_per_s_per_node"] = tokens / span / served.num_nodes
    if spec.role != "decode":
        figures["input_tokens_per_s_per_gpu"] = float(inputs[begun].sum()) / span / num_ranks
    in_time = done & (finish > start) & (finish <= end)
    figures["requests_per_s"] = float(in_time.sum()) / span
    if (kept := _keeps_slo(spec, first - arrival, finish - first, finish - arrival, outputs)) is not None:
        figures["goodput_requests_per_s"] = float((in_time & kept).sum()) / span
        asked = float((arrival >= spec.warmup).sum())  # those turned away, too
        figures["slo_attainment"] = float((counted & kept).sum()) / asked
    if spec.price is not None and tokens:
        figures["usd_per_million_output_tokens"] = spec.price * num_ranks / 3600 / (tokens / span) * 1e6
    ranks = _rank_times(served, start)
    for name, shares in (("compute", ranks.compute), ("exchange", ranks.exchange), ("bubble", ranks.bubble)):
        figures[f"{name}_share"] = float(np.mean(shares))
    checked = [i.stats for i in served.instances if i.spec.speculative is not None]
    if steps := sum(stats.sequence_steps for stats in checked):
        figures["accept_length"] = sum(stats.decoded for stats in checked) / steps
    figures["mean_queue_length"], figures["longest_queue"] = _queues(served, start, start + span)
    return Outcome(
        figures, _counts(served), distributions, ranks, _timeline(served), served.end_s, _traffic(served)
    )


def _traffic(served: Served) -> tuple[TrafficMatrix, ...]:
    """One matrix for each pool: the mean step of its instances."""
    found = []
    for role in dict.fromkeys(instance.role for instance in served.instances):
        mine = [i for i in served.instances if i.role == role and i.traffic is not None and i.traffic.steps]
        runs = [i.traffic for i in mine if i.traffic is not None]
        if not runs:
            continue
        steps = sum(run.steps for run in runs)
        sent_RR = np.sum([run.sent_RR * run.steps for run in runs], axis=0) / steps
        before = [run.unchanged_RR for run in runs]
        moved = any(each is not None for each in before) and not any(run.ranks_changed for run in runs)
        unchanged_RR = None
        if moved:  # an instance that kept its placement would have sent what it sent
            kept = [run.sent_RR if each is None else each for run, each in zip(runs, before, strict=True)]
            unchanged_RR = np.sum([each * run.steps for each, run in zip(kept, runs, strict=True)], axis=0) / steps
        tokens = sum(run.tokens for run in runs)
        source = f"counted on {tokens:,} recorded tokens" if tokens else ""
        if any(run.expected for run in runs):
            source += " and " * bool(source) + "expected from loads, a token's choices taken as independent"
        cluster, pp = mine[0].costs.cluster, mine[0].spec.pp
        name = {"both": "serving", "prefill": "prefill", "decode": "decode"}[role]
        alike = all(costs is i.costs and placement is i.placement for i in mine for costs, placement in i.stages)
        name += (f", {pp} stages on each other" if alike else f", first of {pp} stages") if pp > 1 else ""
        name += f", mean of {len(mine)} instances" if len(mine) > 1 else ""
        found.append(TrafficMatrix.of(name, sent_RR, unchanged_RR, steps, cluster.ranks_per_node, source))
    return tuple(found)


def _weighted(values: Floats, counts: Floats, quantiles: Floats) -> Floats:
    """Quantiles of values that occur ``counts`` times, the lower of two neighbours."""
    reached = np.cumsum(counts) / counts.sum()
    return values[np.minimum(np.searchsorted(reached, quantiles - 1e-12), len(values) - 1)]


def _tokens_between(first: Floats, finish: Floats, further: Floats, start: float, end: float) -> float:
    """Of tokens that are spread evenly from first to last, those between ``start`` and ``end``."""
    length = finish - first
    inside = np.clip(np.minimum(finish, end) - np.maximum(first, start), 0.0, None)
    part = np.where(length > 0, inside / np.maximum(length, 1e-12), (finish >= start) & (finish <= end))
    return float((part * further).sum())


def _mean_between(edges: Floats, at_s: Floats, value: Floats) -> Floats:
    """Mean of what is ``value`` from ``at_s`` on, 0 before, in each stretch between two edges."""
    if not len(at_s):
        return np.zeros(len(edges) - 1)
    until = np.append(at_s, max(at_s[-1], edges[-1]))
    area = np.concatenate([[0.0], np.cumsum(value * np.diff(until))])
    mean: Floats = np.diff(np.interp(edges, until, area)) / np.diff(edges)
    return mean


def _queues(served: Served, start: float, end: float) -> tuple[float, float]:
    """Requests that wait in all queues together, from ``start`` to ``end``: their mean number and the largest."""
    stats = [instance.stats for instance in served.instances]
    at_s = np.concatenate([each.at_s for each in stats])
    order = np.argsort(at_s, kind="stable")
    change = np.concatenate([np.diff(each.waiting_at, prepend=0.0) for each in stats])
    at_s, waiting = at_s[order], np.cumsum(change[order])
    until = np.append(at_s[1:], np.inf)
    lasting = (np.maximum(at_s, start) < np.minimum(until, end)) if len(at_s) else np.zeros(0, bool)
    mean = float(_mean_between(np.array([start, end]), at_s, waiting)[0])
    return mean, float(waiting[lasting].max(initial=0.0))


def _keeps_slo(
    spec: ServingSpec, ttft: Floats, decode: Floats, e2e: Floats, outputs: Floats
) -> NDArray[np.bool_] | None:
    """Which requests keep every limit that is given; None where none is."""
    slo = spec.slo
    if slo.ttft is None and slo.tpot is None and slo.e2e is None:
        return None
    kept = np.ones(len(ttft), bool)
    if slo.ttft is not None:
        kept &= ttft <= slo.ttft
    if slo.tpot is not None:
        kept &= decode <= slo.tpot * (outputs - 1) + 1e-12
    if slo.e2e is not None:
        kept &= e2e <= slo.e2e
    return kept


def _rank_times(served: Served, start: float) -> RankTimes:
    compute, exchange, bubble, idle = [], [], [], []
    run = max(served.end_s - start, 1e-9)
    for instance in served.instances:
        stats = instance.stats
        for busy in (stats.busy_R / run).tolist():
            stepping, exposed = stats.stepping_s / run, stats.exposed_s / run
            compute.append(busy)
            exchange.append(exposed)
            bubble.append(max(0.0, stepping - exposed - busy))
            idle.append(max(0.0, 1.0 - stepping))
    return RankTimes(compute=tuple(compute), exchange=tuple(exchange), bubble=tuple(bubble), idle=tuple(idle))


def _counts(served: Served) -> dict[str, float]:
    stats = [instance.stats for instance in served.instances]
    requests = served.requests
    return {
        "requests": len(requests),
        "finished": sum(r.finish_ns != NEVER for r in requests),
        "rejected": served.rejected,
        "preemptions": sum(s.preemptions for s in stats),
        "steps": sum(s.steps for s in stats),
        "input_tokens": sum(r.input for r in requests),
        "output_tokens": sum(r.output for r in requests if r.finish_ns != NEVER),
        "prefilled_tokens": sum(s.prefilled for s in stats),
        "reused_prompt_tokens": sum(s.reused for s in stats),
        "recomputed_tokens": sum(s.recomputed for s in stats),
        "kv_transferred_bytes": served.transferred_bytes,
        "kv_swapped_bytes": sum(s.swapped_bytes for s in stats),
        "migrated_bytes": sum(s.migrated_bytes for s in stats),
        "stalled_s": sum(s.stalled_s for s in stats),
    }


def _timeline(served: Served) -> Timeline:
    """Means in equal stretches of time; the tokens of a step are spread evenly over it."""
    edges = np.linspace(0.0, max(served.end_s, 1e-9), _BINS + 1)
    tokens, running, waiting, cache = np.zeros((4, _BINS))
    for instance in served.instances:
        stats = instance.stats
        start_s, rate = np.asarray(stats.start_s), np.asarray(stats.tokens) / np.asarray(stats.length_s)
        change_s = np.concatenate([start_s, start_s + np.asarray(stats.length_s)])
        order = np.argsort(change_s, kind="stable")
        tokens += _mean_between(edges, change_s[order], np.cumsum(np.concatenate([rate, -rate])[order]))
        at_s = np.asarray(stats.at_s)
        running += _mean_between(edges, at_s, np.asarray(stats.running_at))
        waiting += _mean_between(edges, at_s, np.asarray(stats.waiting_at))
        cache += _mean_between(edges, at_s, np.asarray(stats.cache_at)) / len(served.instances)
    middle = (edges[:-1] + edges[1:]) / 2
    columns = (middle, np.maximum(tokens, 0.0), running, waiting, cache)
    time_s, tokens_per_s, run, wait, part = (tuple(column.tolist()) for column in columns)
    return Timeline(time_s=time_s, tokens_per_s=tokens_per_s, running=run, waiting=wait, cache=part)
