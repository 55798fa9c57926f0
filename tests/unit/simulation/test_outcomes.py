"""Figures of served runs by hand: which time counts, queues, what a pool is credited with, the run over time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from service_pools import Planner, plain_pool, serve, serving, trace

from moeplan.artifacts.request_trace import RequestTrace
from moeplan.simulation.outcome import Outcome, outcome_of
from moeplan.simulation.service import Served, simulate_service


def figures(served: Served, **fields: Any) -> Outcome:
    return outcome_of(served, serving(**fields))


def test_times_between_tokens_and_shares_of_time_are_of_after_the_warm_up() -> None:
    # Request 0 decodes while 1 is prefilled, in a step of 1 + 0.1 x 51 s; request 2 comes alone, 1.1 s a step.
    pool = plain_pool(1, {"max_num_batched_tokens": 100}, base_s=1.0, per_token_s=0.1)
    served = serve(pool, trace([0.0, 2.1, 20.0], [10, 50, 10], [3, 1, 3]), warmup="15 s")
    found = figures(served, warmup="15 s")
    assert found.headlines["itl_mean_s"] == found.headlines["itl_p99_s"] == pytest.approx(1.1)
    assert found.headlines["itl_mean_s"] == pytest.approx(found.headlines["tpot_mean_s"])
    assert served.end_s == pytest.approx(24.2)
    assert found.headlines["compute_share"] == pytest.approx(4.2 / (24.2 - 15.0))
    assert figures(serve(pool, trace([0.0, 2.1], [10, 50], [3, 1]))).headlines["itl_p99_s"] == pytest.approx(6.1)


def test_who_is_turned_away_during_the_warm_up_is_not_counted() -> None:
    pool = plain_pool(1, {"max_num_seqs": 1, "max_waiting": 1}, base_s=1.0, per_token_s=0.0)
    served = serve(pool, trace([0.0, 0.1, 0.2, 0.3, 10.0], [1] * 5, [2] * 5), warmup="5 s")
    assert served.rejected == 2
    assert figures(served, warmup="5 s", slo={"e2e": "10 s"}).headlines["slo_attainment"] == 1.0
    assert figures(served, slo={"e2e": "10 s"}).headlines["slo_attainment"] == pytest.approx(3 / 5)


def test_queues_of_all_instances_together_over_the_time_that_counts() -> None:
    # Two servers of one slot and 1 s per request; three each wait for 1, 2 and 3 s.
    pool = plain_pool(1, {"max_num_seqs": 1}, base_s=1.0, per_token_s=0.0, instances=2)
    served = serve(pool, trace([0.0] * 8 + [50.0], [1] * 9, [1] * 9))
    found = figures(served).headlines
    assert found["longest_queue"] == 6.0
    assert found["mean_queue_length"] == pytest.approx(2 * (1 + 2 + 3) / 51.0)
    assert found["queue_mean_s"] * 9 / 51.0 == pytest.approx(found["mean_queue_length"])  # Little
    late = figures(served, warmup="2.5 s").headlines
    assert late["longest_queue"] == 2.0
    assert late["mean_queue_length"] == pytest.approx(2 * 0.5 / (51.0 - 2.5))


def test_who_waits_again_after_a_preemption_is_in_the_queue() -> None:
    engine = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 4}
    served = serve(plain_pool(1, engine, 1.0, 0.0, capacity_tokens=32), trace([0.0, 0.0], [8, 8], [12, 12]))
    stats = served.instances[0].stats
    assert stats.preemptions == 1
    found = figures(served).headlines
    assert found["queue_mean_s"] == 0.0  # to the first admission
    assert found["longest_queue"] == 1.0
    assert found["mean_queue_length"] > 0.1


def test_a_pool_is_credited_with_what_it_does() -> None:
    arrivals = trace([0.0, 0.0], [100, 100], [5, 5])
    pool = plain_pool(1, {}, base_s=1.0, per_token_s=0.0, role="decode")
    decode = figures(serve(pool, arrivals, role="decode"), role="decode").headlines
    assert decode["output_tokens_per_s"] == 2 * 4 / 4.0  # first tokens come with the cache
    assert "input_tokens_per_s_per_gpu" not in decode
    pool = plain_pool(1, {}, base_s=1.0, per_token_s=0.0, role="prefill")
    served = serve(pool, arrivals, role="prefill")
    prefill = figures(served, role="prefill")
    assert [r.finish_ns for r in served.requests] == [10**9] * 2  # they end with their first token
    assert prefill.headlines["output_tokens_per_s"] == 2.0
    assert prefill.headlines["input_tokens_per_s_per_gpu"] == 200.0
    assert prefill.counts["output_tokens"] == 2


def test_a_closed_loop_in_step_has_its_rates_whatever_the_edges() -> None:
    # Four requests of 5 s each at a time; some end at the very end of the warm-up, and of the duration.
    requests = {"arrivals": "closed-loop", "concurrency": 4, "duration": "100 s"}
    spec = serving(requests=requests | {"input_tokens": 10, "output_tokens": 5}, warmup="10 s")
    arrivals = RequestTrace(np.full(200, 10), np.full(200, 5))
    served = simulate_service(spec, arrivals, [plain_pool(1, {}, 1.0, 0.0)])
    found = outcome_of(served, spec).headlines
    assert served.end_s == 105.0
    assert found["requests_per_s"] == pytest.approx(0.8)
    assert found["output_tokens_per_s"] == pytest.approx(4.0)


def test_the_run_over_time_adds_up_whatever_the_steps() -> None:
    # Steps of 10 s and more are longer than a stretch of the picture.
    pool = plain_pool(1, {"max_num_seqs": 2, "max_num_batched_tokens": 64}, base_s=10.0, per_token_s=0.1)
    served = serve(pool, trace([0.0, 1.0, 2.0, 300.0], [30, 40, 50, 20], [4, 6, 2, 3]))
    found = figures(served)
    shown, stats = found.timeline, served.instances[0].stats
    assert shown is not None
    width = served.end_s / len(shown.time_s)
    assert np.sum(shown.tokens_per_s) * width == pytest.approx(stats.prefilled + stats.generated - 4)
    assert np.mean(shown.waiting) == pytest.approx(found.headlines["mean_queue_length"])
    inside = sum(r.finish_ns - r.admit_ns for r in served.requests) * 1e-9
    assert np.mean(shown.running) * served.end_s == pytest.approx(inside)
    assert shown.running[0] == 1.0
    assert max(shown.running) == 2.0
    assert min(shown.tokens_per_s[: int(60 / width)]) > 0


def test_a_stall_shows_in_the_run_over_time() -> None:
    pool = plain_pool(2, {"max_num_seqs": 8}, base_s=1.0, per_token_s=0.0)
    faults = [{"kind": "rank-loss", "at": "2.5 s", "rank": 1, "detect": "40 s"}]
    arrivals = trace([0.0, *np.arange(10.0, 30.0)], [4] * 21, [3] * 21)
    served = serve(pool, arrivals, Planner(2), faults=faults)
    shown = figures(served).timeline
    assert shown is not None
    waiting = np.interp([20.0, 40.0], shown.time_s, shown.waiting)
    assert waiting == pytest.approx([11, 20], abs=1)
