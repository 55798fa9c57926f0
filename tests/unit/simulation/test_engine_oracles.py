"""The engine against the same rules token by token, and against servers without an engine."""

from __future__ import annotations

import numpy as np
import pytest
from service_pools import plain_pool, serve

from moeplan.artifacts.request_trace import RequestTrace
from moeplan.simulation.acceptance import Acceptance
from moeplan.simulation.oracles import PlainCosts, token_by_token
from moeplan.simulation.recursion import first_come_first_served


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(25))
def test_equals_token_by_token(seed: int, drafts: int) -> None:
    rng = np.random.default_rng(seed)
    groups, count = int(rng.integers(1, 4)), 30
    engine = {
        "max_num_seqs": int(rng.integers(2, 7)),
        "max_num_batched_tokens": int(rng.integers(8, 40)),
        "block_size": int(rng.choice([1, 4, 8])),
    }
    rates = tuple(np.sort(rng.random(drafts))[::-1].tolist())
    speculative = {"num_speculative_tokens": drafts, "acceptance_rates": rates} if drafts else None
    engine |= {"speculative": speculative, "max_num_batched_tokens": engine["max_num_batched_tokens"] * (1 + drafts)}
    inputs, outputs = rng.integers(1, 60, count), rng.integers(1, 30, count)
    blocks = int(rng.integers(90, 200)) // engine["block_size"] + 1  # the longest fits; several do not
    arrival_ns = np.sort(rng.integers(0, 3_000_000, count)) // 1000 * 1000
    pool = plain_pool(groups, engine, base_s=1e-4, per_token_s=3e-6, capacity_tokens=blocks * engine["block_size"])
    trace = RequestTrace(inputs, outputs, arrival_ns * 1e-9)
    served = serve(pool, trace, router="round-robin")

    def step_ns(tokens: list[int]) -> int:
        return round((1e-4 + 3e-6 * max(tokens)) * 1e9)

    wanted = token_by_token(
        list(zip(arrival_ns.tolist(), inputs.tolist(), outputs.tolist(), strict=True)),
        pool.engine, groups, blocks, step_ns,
        Acceptance(pool.engine.speculative, 0, int(outputs.max())) if pool.engine.speculative else None,
    )  # fmt: skip
    assert [(r.first_ns, r.finish_ns) for r in served.requests] == wanted
    stats = served.instances[0].stats
    assert stats.generated == outputs.sum()
    assert stats.prefilled == inputs.sum() + stats.recomputed
    assert served.instances[0].free_D.tolist() == [blocks] * groups


def test_some_of_these_cases_preempt() -> None:
    preempted = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pool = plain_pool(1, {"max_num_seqs": 6, "max_num_batched_tokens": 64}, 1e-4, 3e-6, capacity_tokens=112)
        trace = RequestTrace(rng.integers(1, 60, 30), rng.integers(1, 30, 30), np.zeros(30))
        preempted += serve(pool, trace).instances[0].stats.preemptions
    assert preempted > 5


def test_one_server_equals_the_recursion() -> None:
    rng = np.random.default_rng(1)
    tokens = np.maximum(1, np.rint(rng.exponential(1000, 2000))).astype(np.int64)
    arrival_s = np.cumsum(rng.exponential(1.25e-3, 2000))
    engine = {"max_num_seqs": 1, "max_num_batched_tokens": 10**6, "chunked_prefill": False}
    pool = plain_pool(1, engine, base_s=0.0, per_token_s=1e-6, role="prefill")
    served = serve(pool, RequestTrace(tokens, np.ones_like(tokens), arrival_s), role="prefill")
    start = np.array([r.admit_ns for r in served.requests]) * 1e-9
    assert np.abs(start - first_come_first_served(arrival_s, tokens * 1e-6, 1)).max() < 1e-5  # nanoseconds add up


def test_slots_of_a_batch_are_servers_of_one_queue() -> None:
    rng = np.random.default_rng(2)
    tokens = np.maximum(1, np.rint(rng.lognormal(3.5, 0.5, 600))).astype(np.int64)
    arrival_s = np.cumsum(rng.exponential(8e-3, 600))
    pool = plain_pool(1, {"max_num_seqs": 8}, base_s=1e-3, per_token_s=0.0, role="decode")
    served = serve(pool, RequestTrace(np.ones_like(tokens), tokens + 1, arrival_s), role="decode")
    start = np.array([r.finish_ns for r in served.requests]) * 1e-9 - tokens * 1e-3
    late = start - first_come_first_served(arrival_s, tokens * 1e-3, 8)
    assert late.min() > -1e-6
    assert late.max() < 1e-3 + 1e-6  # a batch takes a request in at its next step
    assert late.max() > 1e-4


def test_plain_costs_take_the_fullest_group() -> None:
    pool = plain_pool(2, {}, base_s=1.0, per_token_s=0.5)
    costs = pool.costs(pool.cluster)
    assert isinstance(costs, PlainCosts)
    trace = RequestTrace(np.array([4, 10]), np.array([1, 1]), np.zeros(2))
    assert serve(pool, trace, router="round-robin").end_s == pytest.approx(6.0)
