"""Speculative decoding: what a step costs and yields, which drafts are accepted, and that no token is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from service_pools import plain_pool, serve, trace

from moeplan.artifacts.request_trace import RequestTrace
from moeplan.errors import SpecError
from moeplan.simulation.acceptance import Acceptance, acceptance_rates
from moeplan.simulation.oracles import PlainCosts
from moeplan.simulation.outcome import outcome_of
from moeplan.simulation.service import Served, simulate_service
from moeplan.specs.serving import EngineSpec, ServingSpec, SpeculativeSpec

Rates = tuple[float, ...]


def engine(rates: Rates, **fields: Any) -> dict[str, Any]:
    return fields | {"speculative": {"num_speculative_tokens": len(rates), "acceptance_rates": rates}}


def alone(rates: Rates, output: int) -> Served:
    """One request; a step takes 1 s and 0.1 s for each token."""
    return serve(plain_pool(1, engine(rates), base_s=1.0, per_token_s=0.1), trace([0.0], [10], [output]))


@pytest.mark.parametrize("drafts", [1, 3])
def test_refused_drafts_yield_one_token_for_the_step_of_all(drafts: int) -> None:
    served = alone((0.0,) * drafts, 6)
    assert served.requests[0].finish_ns * 1e-9 == pytest.approx(2.0 + 5 * (1 + 0.1 * (1 + drafts)))
    assert served.instances[0].stats.gaps == {round((1 + 0.1 * (1 + drafts)) * 1e9): 5}


@pytest.mark.parametrize(("output", "steps", "length"), [(9, 2, 4.0), (8, 2, 3.5), (2, 1, 1.0)])
def test_accepted_drafts_yield_all_and_the_last_step_is_cut(output: int, steps: int, length: float) -> None:
    served = alone((1.0, 1.0, 1.0), output)
    stats = served.instances[0].stats
    assert served.requests[0].finish_ns * 1e-9 == pytest.approx(2.0 + steps * 1.4)
    assert (stats.generated, stats.steps) == (output, 1 + steps)
    spec = ServingSpec.parse({"requests": {"arrivals": "constant", "rate": "1 /s", "count": 1, "input_tokens": 1,
                                           "output_tokens": 1}}, "test")  # fmt: skip
    assert outcome_of(served, spec).headlines["accept_length"] == length


def test_the_last_stage_of_a_pipeline_drafts_and_sets_the_pace() -> None:
    """Of 1 s each of two stages takes half, the last 0.3 s more to draft: a batch is out after 1.3 s, and the next one
    follows 0.8 s after it. A sequence steps again once its drafts are there and the first stage is free."""
    pool = plain_pool(1, engine((0.0,), pp=2, max_num_seqs=2, max_num_batched_tokens=100), 1.0, 0.0)
    pool = replace(pool, costs=lambda changed: PlainCosts(changed, 1.0, 0.0, draft_s=0.3))
    one = serve(pool, trace([0.0], [10], [3]))
    assert one.requests[0].finish_ns * 1e-9 == pytest.approx(3 * 1.3)  # alone it waits for its own drafts
    served = serve(pool, trace([0.0, 0.0], [10, 10], [3, 3]))
    assert [r.first_ns * 1e-9 for r in served.requests] == pytest.approx([1.3, 2.1])
    assert [r.finish_ns * 1e-9 for r in served.requests] == pytest.approx([1.3 + 2 * 1.6, 2.1 + 2 * 1.6])
    stats = served.instances[0].stats
    assert stats.busy_R == pytest.approx([6 * 0.5, 6 * 0.8])
    assert stats.stepping_s == pytest.approx(6 * 0.8)  # the first stage waits for the last


def test_draws_have_the_rates_asked_for_and_are_each_requests_own() -> None:
    spec = SpeculativeSpec(num_speculative_tokens=3, acceptance_rates=(0.8, 0.5, 0.4))
    drawn = Acceptance(spec, 0, 20_000)
    steps = np.diff(drawn.tokens_after(0, 1, 20_000))
    found = [(steps > place).mean() for place in (1, 2, 3)]
    assert found == pytest.approx([0.8, 0.5, 0.4], abs=0.02)
    assert np.array_equal(drawn.tokens_after(3, 1, 50), Acceptance(spec, 0, 99).tokens_after(3, 1, 50))
    others = (drawn.tokens_after(4, 1, 50), Acceptance(spec, 1, 50).tokens_after(3, 1, 50))
    assert not any(np.array_equal(drawn.tokens_after(3, 1, 50), each) for each in others)


@pytest.mark.parametrize(("length", "likely"), [(1.0, 0.0), (1 + 0.7 + 0.49 + 0.343, 0.7), (4.0, 1.0)])
def test_a_mean_length_stands_for_drafts_that_are_alike(length: float, likely: float) -> None:
    spec = SpeculativeSpec(num_speculative_tokens=3, accept_length=length)
    assert acceptance_rates(spec) == pytest.approx([likely, likely**2, likely**3])


@pytest.mark.parametrize(
    "fields",
    [{}, {"preemption": "swap"}, {"prefix_caching": True}, {"chunked_prefill": False},
     {"chunked_prefill": False, "preemption": "swap"}, {"pp": 2}, {"pp": 2, "chunked_prefill": False}],
)  # fmt: skip
@pytest.mark.parametrize("split", [False, True])
def test_tokens_and_blocks_are_conserved_where_the_cache_is_short(fields: dict[str, Any], split: bool) -> None:
    rng, count = np.random.default_rng(5), 60
    inputs, outputs = rng.integers(16, 120, count), rng.integers(1, 120, count)
    prefix = tuple(tuple(range(q % 9 * 100, q % 9 * 100 + int(length) // 16)) for q, length in enumerate(inputs))
    arrivals = RequestTrace(inputs, outputs, np.cumsum(rng.exponential(2e-3, count)), prefix, 16)
    given = engine((0.8, 0.6, 0.5), max_num_seqs=32, max_num_batched_tokens=256, **fields)
    roles = ("prefill", "decode") if split else ("both",)
    pools = [plain_pool(2, given, 1e-3, 1e-5, 480, role, link_bytes_per_s=1e9) for role in roles]
    served = serve(pools, arrivals, **({"prefill": {"ranks": 2}} if split else {}))
    stats = served.instances[-1].stats
    assert stats.preemptions > 0
    assert sum(i.stats.generated for i in served.instances) == outputs.sum()
    assert 1.0 < stats.decoded / stats.sequence_steps < 1 + 0.8 + 0.6 + 0.5
    for instance in served.instances:
        assert [pool.available for pool in instance.pools] == [pool.capacity for pool in instance.pools]
        assert not any(lane.cached_D.any() or lane.growth_DB.any() for lane in instance.lanes)


def test_a_step_has_no_more_tokens_than_it_may() -> None:
    """Also where a cache comes in beside a prompt that is computed again."""
    given = engine((0.8, 0.6, 0.5), max_num_seqs=6, max_num_batched_tokens=26, block_size=4)
    arrivals = RequestTrace(*np.random.default_rng(3).integers(20, 90, (2, 60)), np.zeros(60))
    stats = serve(plain_pool(1, given, 1e-3, 1e-5, 200, "decode"), arrivals, role="decode").instances[0].stats
    assert stats.preemptions > 0
    assert max(stats.tokens) <= 26


def test_runs_repeat_and_seeds_differ() -> None:
    pool = plain_pool(1, engine((0.5,)), base_s=1.0, per_token_s=0.0)
    spec = ServingSpec.parse({"requests": {"arrivals": "constant", "rate": "1 /s", "count": 1, "input_tokens": 1,
                                           "output_tokens": 1}}, "test")  # fmt: skip
    first, again, other = (
        [r.finish_ns for r in simulate_service(spec, trace([0.0] * 9, [5] * 9, [50] * 9), [pool], seed=seed).requests]
        for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"give either accept_length or acceptance_rates"),
        ({"accept_length": 1.5, "acceptance_rates": [0.5, 0.4]}, r"give either accept_length or acceptance_rates"),
        ({"accept_length": 3.2}, r"accept_length \(3.2\) is outside 1..3 \(1 \+ num_speculative_tokens\)"),
        ({"accept_length": 0.8}, r"accept_length \(0.8\) is outside 1..3"),
        ({"acceptance_rates": [0.5]}, r"has 1 entries for num_speculative_tokens \(2\)"),
        ({"acceptance_rates": [0.5, 0.6]}, r"\[0.5, 0.6\] must lie within 0..1 and not rise"),
        ({"acceptance_rates": [1.5, 0.6]}, r"must lie within 0..1"),
    ],
)
def test_what_acceptance_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SpeculativeSpec.parse({"num_speculative_tokens": 2} | fields, "test")


def test_what_engines_cannot_do() -> None:
    drafts = {"speculative": {"num_speculative_tokens": 3, "accept_length": 2.0}}
    with pytest.raises(SpecError, match=r"max_num_batched_tokens \(512\) is less than the 1024 tokens of max_num_seqs"):
        EngineSpec.parse(drafts | {"max_num_batched_tokens": 512}, "test")
    requests = {"arrivals": "constant", "rate": "1 /s", "count": 1, "input_tokens": 1, "output_tokens": 1}
    with pytest.raises(SpecError, match=r"engine.speculative: both pools hold the prediction layer"):
        ServingSpec.parse({"requests": requests, "prefill": {"ranks": 4, "engine": drafts}}, "test")
