"""``moeplan validate queues``: the simulator against queueing theory, conservation, and the same rules token by token.

Service times are made exact by engines whose steps have known seconds: a prompt that is prefilled alone is one server
with service time proportional to its tokens; ``k`` slots of a decoding batch are ``k`` servers of one queue, to within
one step. Waits: M/M/1 ``rho / (mu - lambda)``; M/G/1 ``lambda E[S^2] / (2 (1 - rho))`` (Pollaczek, Khinchine), of which
M/D/1 is a case; M/M/k Erlang C; M/G/k the approximation ``cv^2 M/M/k + (1 - cv^2) M/D/k`` (Bjorklund, Elldin 1964) with
M/D/k as Cosmetatos (1975) has it.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.progress import Progress, no_progress
from moeplan.simulation.expert_loads import ExpertLoads
from moeplan.simulation.oracles import PlainCosts, token_by_token
from moeplan.simulation.pools import Pool, Role
from moeplan.simulation.recursion import first_come_first_served
from moeplan.simulation.service import Served, simulate_service
from moeplan.specs.clusters import cluster_for
from moeplan.specs.serving import EngineSpec, ServingSpec

__all__ = ["validate_queues"]

Floats = NDArray[np.float64]

_SERVICE_S = 1e-3  # mean, of one server
_TOKENS = 20_000  # of a mean prompt: what rounding to tokens adds is far below the targets
_MEAN, _APPROXIMATE, _EXACT = 0.02, 0.05, 1e-9
_WALK = 10_000_000  # requests of the recursions, which stand between simulations and formulas


def _pool(
    groups: int, engine: dict[str, Any], base_s: float, per_token_s: float, role: Role, capacity: int = 10**9
) -> Pool:
    cluster = cluster_for("h100", 1, groups)
    return Pool(
        role, 1, EngineSpec.parse(engine, "engine"), cluster, Placement.contiguous(1, groups, groups, groups),
        ExpertLoads({"decode": [np.ones((1, groups))]}, 1.0),
        lambda changed: PlainCosts(changed, base_s, per_token_s), capacity, 100.0, 1e9, 1e-5,
    )  # fmt: skip


def _serve(pools: list[Pool], trace: RequestTrace, keep_log: bool = False, **fields: Any) -> Served:
    requests = {"arrivals": "constant", "rate": "1 /s", "count": 1, "input_tokens": 1, "output_tokens": 1}
    spec = ServingSpec.parse({"requests": requests, **fields}, "queue")
    return simulate_service(spec, trace, pools, keep_log=keep_log)


def _figure(name: str, value: float, target: float, **more: Any) -> dict[str, Any]:
    return {"figure": name, "value": value, "target": target, "reached": bool(abs(value) <= target), **more}


# ---------------------------------------------------------------------- one server


def _waits(arrival_s: Floats, service_s: Floats) -> Floats:
    """Waits of one server by Lindley's recursion (1952): a random walk less its running minimum."""
    walk = np.concatenate([[0.0], np.cumsum(service_s[:-1] - np.diff(arrival_s))])
    waits: Floats = walk - np.minimum.accumulate(walk)
    return waits


def _one_server(name: str, rho: float, draw: Callable[[int], Floats], formula_s: float, count: int) -> list[Any]:
    """Every simulated start against the recursion; the recursion over many more requests against the formula."""
    rng = np.random.default_rng([17, round(rho * 100)])
    tokens = np.maximum(1, np.rint(draw(count) / _SERVICE_S * _TOKENS)).astype(np.int64)
    per_token = _SERVICE_S / _TOKENS
    arrival = np.cumsum(rng.exponential(_SERVICE_S / rho, count))
    engine = {"max_num_seqs": 1, "max_num_batched_tokens": 10**9, "chunked_prefill": False}
    pool = _pool(1, engine, 0.0, per_token, "prefill")
    served = _serve([pool], RequestTrace(tokens, np.ones(count, np.int64), arrival), role="prefill")
    arrived = np.array([r.arrival_ns for r in served.requests]) * 1e-9
    wait = np.array([r.admit_ns for r in served.requests]) * 1e-9 - arrived
    service = np.asarray(np.rint(tokens * per_token * 1e9) * 1e-9, np.float64)
    apart = float(np.abs(wait - _waits(arrived, service)).max())
    mean_s = float(_waits(np.cumsum(rng.exponential(_SERVICE_S / rho, _WALK)), draw(_WALK)).mean())
    return [
        _figure(f"{name}, rho {rho}: largest difference of a wait from the recursion, s", apart, 1e-6, requests=count),
        _figure(
            f"{name}, rho {rho}: mean wait of the recursion, relative to the formula", mean_s / formula_s - 1, _MEAN,
            recursion_s=mean_s, formula_s=formula_s, requests=_WALK, simulated_s=float(wait.mean()),
        ),
    ]  # fmt: skip


# ---------------------------------------------------------------------- k servers


def _erlang_c_wait(servers: int, rho: float, service_s: float) -> float:
    offered = servers * rho
    terms = [offered**n / math.factorial(n) for n in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - rho)
    return last / (sum(terms) + last) * service_s / (servers * (1 - rho))


def _deterministic_wait(servers: int, rho: float, service_s: float) -> float:
    more = (1 - rho) * (servers - 1) * (math.sqrt(4 + 5 * servers) - 2) / (16 * rho * servers)
    return (1 + more) / 2 * _erlang_c_wait(servers, rho, service_s)


def _k_servers(name: str, servers: int, rho: float, draw: Callable[[int], Floats], cv: float, count: int) -> list[Any]:
    """A decoding batch against the recursion, request by request; the recursion against the formula."""
    rng = np.random.default_rng([18, servers, round(cv * 100)])
    step = _SERVICE_S / 100
    tokens = np.maximum(1, np.rint(draw(count) / step)).astype(np.int64)
    arrival = np.cumsum(rng.exponential(_SERVICE_S / rho / servers, count))
    pool = _pool(1, {"max_num_seqs": servers}, step, 0.0, "decode")
    served = _serve([pool], RequestTrace(np.ones(count, np.int64), tokens + 1, arrival), role="decode")
    arrived = np.array([r.arrival_ns for r in served.requests]) * 1e-9
    start = np.array([r.finish_ns for r in served.requests]) * 1e-9 - tokens * step
    late = start - first_come_first_served(arrived, np.asarray(tokens * step, np.float64), servers)
    many = np.cumsum(rng.exponential(_SERVICE_S / rho / servers, _WALK))
    wait = float((first_come_first_served(many, draw(_WALK), servers) - many).mean())
    exponential, constant = (wait_of(servers, rho, _SERVICE_S) for wait_of in (_erlang_c_wait, _deterministic_wait))
    formula = cv**2 * exponential + (1 - cv**2) * constant
    target = _MEAN if cv == 1 else _APPROXIMATE
    return [
        _figure(
            f"{name}, k {servers}, rho {rho}: largest delay after the recursion, steps",
            float(np.abs(late).max()) / step, 1 + 1e-3, least=float(late.min()) / step, requests=count,
        ),
        _figure(
            f"{name}, k {servers}, rho {rho}: mean wait of the recursion, relative to the formula", wait / formula - 1,
            target, recursion_s=wait, formula_s=formula, requests=_WALK,
        ),
    ]  # fmt: skip


# ---------------------------------------------------------------------- conservation


def _mixed(seed: int, **engine: Any) -> tuple[Pool, RequestTrace]:
    """A busy engine short of cache, with prompts that begin alike."""
    rng = np.random.default_rng(seed)
    count = 400
    inputs, outputs = rng.integers(16, 200, count), rng.integers(1, 120, count)
    prefix = tuple(
        tuple(range(topic * 100, topic * 100 + int(length) // 16))
        for topic, length in zip(rng.integers(0, 6, count), inputs, strict=True)
    )
    arrival = np.cumsum(rng.exponential(4e-3, count))
    given = {"max_num_seqs": 32, "max_num_batched_tokens": 256, "block_size": 16, **engine}
    pool = _pool(2, given, 1e-3, 1e-5, "both", capacity=2000)
    return pool, RequestTrace(inputs, outputs, arrival, prefix, 16)


def _conservation() -> list[dict[str, Any]]:
    figures = []
    for name, engine in (
        ("recompute", {}),
        ("swap", {"preemption": "swap"}),
        ("prefix caching", {"prefix_caching": True}),
        ("whole prompts", {"chunked_prefill": False}),
    ):
        pool, trace = _mixed(3, **engine)
        served = _serve([pool], trace, keep_log=True)
        stats, instance = served.instances[0].stats, served.instances[0]
        finished = _logged(served, "finish")
        made = int(trace.output_tokens_Q.sum())
        lost = [
            abs(stats.generated - made),
            abs(finished - made),
            abs(stats.prefilled + stats.reused - int(trace.input_tokens_Q.sum()) - stats.recomputed),
            abs(sum(stats.gaps.values()) - (made - len(trace))),
            sum(abs(pool.capacity - pool.available) for pool in instance.pools),
        ]
        figures.append(
            _figure(
                f"conservation, {name}: tokens made, logged, prefilled and between tokens, blocks given back",
                max(lost), 0.0, preemptions=stats.preemptions, reused=stats.reused, recomputed=stats.recomputed,
            )
        )  # fmt: skip
        if name == "swap":
            out_and_in = stats.swapped_bytes / 100.0 / 2
            lost_bytes = abs(out_and_in - _logged(served, "preempt")) * 100.0
            figures.append(
                _figure("conservation: bytes swapped out come back", lost_bytes, 0.0, bytes=stats.swapped_bytes)
            )
        figures.append(_little(name, served))
    prefill, trace = _mixed(4)
    pools = [replace(prefill, role="prefill"), replace(prefill, role="decode")]
    served = _serve(pools, trace, keep_log=True, prefill={"ranks": 2})
    sent = float(((trace.input_tokens_Q) * (trace.output_tokens_Q > 1)).sum()) * 100.0
    figures.append(
        _figure(
            "conservation: bytes of KV cache transferred and logged",
            max(abs(served.transferred_bytes - sent), abs(_logged(served, "transfer") - sent)), 0.0, bytes=sent,
        )
    )  # fmt: skip
    return figures


def _logged(served: Served, kind: str) -> float:
    assert served.log is not None
    return float(served.log.amount_V[served.log.of_kind(kind)].sum())


def _little(name: str, served: Served) -> dict[str, Any]:
    """Time-average number in the system, integrated over the log, against arrival rate times mean time in it."""
    log = served.log
    assert log is not None
    come, go = log.of_kind("arrival"), log.of_kind("finish")
    at = np.concatenate([log.start_s_V[come], log.start_s_V[go]])
    change = np.concatenate([np.ones(come.sum()), -np.ones(go.sum())])
    order = np.argsort(at, kind="stable")
    inside = np.cumsum(change[order])[:-1]
    mean_inside = float((inside * np.diff(at[order])).sum() / (at.max() - at.min()))
    stay = np.array([r.finish_ns - r.arrival_ns for r in served.requests]) * 1e-9
    rate = len(stay) / (at.max() - at.min())
    return _figure(f"Little's law, {name}: L against lambda W", mean_inside / (rate * float(stay.mean())) - 1, _EXACT)


# ---------------------------------------------------------------------- tiny cases


def _tiny(cases: int) -> dict[str, Any]:
    """Random small engines with preemption: first and last token of every request, to the nanosecond."""
    different = preemptions = 0
    for case in range(cases):
        rng = np.random.default_rng([19, case])
        groups, count, block = int(rng.integers(1, 4)), 30, int(rng.choice([1, 4, 8]))
        engine = {
            "max_num_seqs": int(rng.integers(2, 7)),
            "max_num_batched_tokens": int(rng.integers(8, 40)),
            "block_size": block,
        }
        inputs, outputs = rng.integers(1, 60, count), rng.integers(1, 30, count)
        blocks = int(rng.integers(90, 200)) // block + 1
        arrival = np.sort(rng.integers(0, 3_000_000, count)) // 1000 * 1000
        pool = _pool(groups, engine, 1e-4, 3e-6, "both", capacity=blocks * block)
        at_s = np.asarray(arrival * 1e-9, np.float64)
        served = _serve([pool], RequestTrace(inputs, outputs, at_s), router="round-robin")
        wanted = token_by_token(
            list(zip(arrival.tolist(), inputs.tolist(), outputs.tolist(), strict=True)), pool.engine, groups, blocks,
            lambda tokens: round((1e-4 + 3e-6 * max(tokens)) * 1e9),
        )  # fmt: skip
        different += sum((r.first_ns, r.finish_ns) != w for r, w in zip(served.requests, wanted, strict=True))
        preemptions += served.instances[0].stats.preemptions
    name = f"{cases} tiny engines: requests whose first or last token differs from the same rules token by token"
    return _figure(name, different, 0.0, preemptions=preemptions)


# ---------------------------------------------------------------------- all of it


def validate_queues(progress: Progress = no_progress, scale: float = 1.0) -> dict[str, Any]:
    """Every figure with its target; ``scale`` shortens the simulated runs."""
    rng = np.random.default_rng(16)
    count = max(500, round(20_000 * scale))
    sigma = math.sqrt(math.log1p(4.0))  # cv 2

    def exponential(n: int) -> Floats:
        return rng.exponential(_SERVICE_S, n)

    def constant(n: int) -> Floats:
        return np.full(n, _SERVICE_S)

    def lognormal(n: int) -> Floats:
        return rng.lognormal(math.log(_SERVICE_S) - sigma**2 / 2, sigma, n)

    def half(n: int) -> Floats:
        spread = math.sqrt(math.log1p(0.25))  # cv 0.5
        return rng.lognormal(math.log(_SERVICE_S) - spread**2 / 2, spread, n)

    figures: list[dict[str, Any]] = []
    cases: list[tuple[str, float, Callable[[int], Floats], float]] = [
        ("M/M/1", 0.5, exponential, 1.0),
        ("M/M/1", 0.8, exponential, 1.0),
        ("M/D/1", 0.5, constant, 0.0),
        ("M/D/1", 0.8, constant, 0.0),
        ("M/G/1 (log-normal, cv 2)", 0.5, lognormal, 2.0),
    ]
    for number, (name, rho, draw, cv) in enumerate(cases):
        progress("queues", number / 10)
        formula = rho * (1 + cv**2) * _SERVICE_S / (2 * (1 - rho))
        figures += _one_server(name, rho, draw, formula, count)
    progress("queues", 0.5)
    figures += _k_servers("M/M/k", 8, 0.8, exponential, 1.0, max(300, count // 4))
    progress("queues", 0.7)
    figures += _k_servers("M/G/k (log-normal, cv 0.5)", 8, 0.8, half, 0.5, max(300, count // 4))
    progress("queues", 0.85)
    figures += _conservation()
    figures.append(_tiny(max(5, round(100 * scale))))
    progress("queues", 1.0)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "moeplan validate queues --json",
        "figures": figures,
        "reached": all(figure["reached"] for figure in figures),
    }
