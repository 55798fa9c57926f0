"""The closed loop against the same rules request by request, and against cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.costs.closed_loop import PassTimes, Pools, closed_loop, lengths

TIMES = PassTimes(
    batch_b=np.array([1.0, 2.0, 8.0, 64.0]),
    context_2=np.array([100.0, 300.0]),
    decode_s_b2=np.array([[0.010, 0.012], [0.011, 0.014], [0.020, 0.030], [0.080, 0.160]]),
    tokens_p=np.array([50.0, 100.0, 800.0]),
    prefill_s_p=np.array([0.02, 0.03, 0.20]),
)


def decode_s(running: int, groups: int, context: float) -> float:
    """The grids of TIMES by hand."""
    b = max(1.0, running / groups)
    low, high = (np.interp(b, TIMES.batch_b, TIMES.decode_s_b2[:, side]) for side in (0, 1))
    return float(low + (context - 100) / 200 * (high - low))


def prefill_s(tokens: float) -> float:
    if tokens >= 800:
        return 0.20 * tokens / 800
    return float(np.interp(tokens, TIMES.tokens_p, TIMES.prefill_s_p))


def one_pool(
    budget: float, alone: bool, lanes: int, inputs: list[int], outputs: list[int]
) -> tuple[list[float], list[float]]:
    """Request by request: lists of (context, tokens still to come), in plain Python."""
    now, arrived = 0.0, [0.0] * lanes
    waiting = list(range(lanes))
    running: dict[int, list[int]] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    following = lanes
    while len(last) < len(inputs):
        taken: list[int] = []
        while waiting and (not taken or sum(inputs[i] for i in taken) + inputs[waiting[0]] <= budget):
            taken.append(waiting.pop(0))
        decoding = bool(running) and not (alone and taken)
        if taken:
            now += prefill_s(sum(inputs[i] for i in taken))
        if decoding:
            now += decode_s(len(running), 1, sum(context for context, _ in running.values()) / len(running))
            if taken:  # in one pass the weights are read once
                now -= min(0.010, prefill_s(sum(inputs[i] for i in taken)))
            for state in running.values():
                state[0] += 1
                state[1] -= 1
            for i in [i for i, state in running.items() if state[1] == 0]:
                del running[i]
                last[i] = now
                if following < len(inputs):
                    arrived.append(now)
                    waiting.append(following)
                    following += 1
        for i in taken:
            first[i] = now
            running[i] = [inputs[i], outputs[i] - 1]
    n = range(len(inputs))
    return [first[i] - arrived[i] for i in n], [(last[i] - first[i]) / (outputs[i] - 1) for i in n]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("lanes", "budget"), [(1, 200.0), (3, 130.0), (7, 450.0)])
def test_one_pool_is_the_same_request_by_request(alone: bool, lanes: int, budget: float) -> None:
    rng = np.random.default_rng(lanes)
    inputs, outputs = lengths(120, 5 * lanes, rng), lengths(40, 5 * lanes, rng)
    found = closed_loop(TIMES, Pools(1, budget, alone=alone), lanes, inputs, outputs)
    ttft, tpot = one_pool(budget, alone, lanes, inputs.tolist(), outputs.tolist())
    assert found.ttft_mean_s == pytest.approx(np.mean(ttft), rel=1e-9)
    assert found.ttft_median_s == pytest.approx(np.median(ttft), rel=1e-9)
    assert found.tpot_mean_s == pytest.approx(np.mean(tpot), rel=1e-9)


def test_one_request_at_a_time_costs_its_own_passes() -> None:
    inputs, outputs = np.full(4, 100), np.full(4, 101)
    found = closed_loop(TIMES, Pools(1, 1000.0), 1, inputs, outputs)
    assert found.ttft_mean_s == pytest.approx(0.03)
    # 100 steps over 100, 101, ... 199 cached tokens: a line between 10 ms at 100 and 12 ms at 300.
    assert found.tpot_mean_s == pytest.approx(0.010 + 0.002 * 49.5 / 200)


def test_accepted_drafts_save_steps() -> None:
    flat = PassTimes(TIMES.batch_b, TIMES.context_2, np.full((4, 2), 0.01), TIMES.tokens_p, TIMES.prefill_s_p)
    inputs, outputs = np.full(4, 100), np.full(4, 101)
    found = closed_loop(flat, Pools(1, 1000.0, tokens_per_step=2.0), 1, inputs, outputs)
    assert found.tpot_mean_s == pytest.approx(0.005)


def test_with_prefill_elsewhere_decoding_is_not_held_up() -> None:
    inputs, outputs = np.full(40, 100), np.full(40, 51)
    flat = PassTimes(TIMES.batch_b, TIMES.context_2, np.full((4, 2), 0.01), TIMES.tokens_p, TIMES.prefill_s_p)
    together = closed_loop(flat, Pools(1, 100.0), 4, inputs, outputs)
    apart = closed_loop(flat, Pools(1, 100.0, prefill_workers=1, transfer_s=0.05), 4, inputs, outputs)
    assert apart.tpot_mean_s < together.tpot_mean_s
    # A request joins at the next pass, which is when its first token is sent.
    assert apart.tpot_mean_s == pytest.approx(0.01)
    assert 0.03 + 0.05 - 1e-12 <= apart.ttft_median_s <= 0.03 + 0.05 + 0.01 + 1e-12


def test_first_requests_queue_for_a_single_prefill_worker() -> None:
    # 8 arrive at once and none comes after: the i-th waits for i prompts of 30 ms, one by one.
    inputs, outputs = np.full(8, 100), np.full(8, 11)
    quick = PassTimes(TIMES.batch_b, TIMES.context_2, np.full((4, 2), 1e-9), TIMES.tokens_p, TIMES.prefill_s_p)
    found = closed_loop(quick, Pools(1, 100.0, prefill_workers=1), 8, inputs, outputs)
    assert found.ttft_mean_s == pytest.approx(0.03 * 4.5)
    two = closed_loop(quick, Pools(1, 100.0, prefill_workers=2), 8, inputs, outputs)
    assert two.ttft_mean_s == pytest.approx(0.03 * 2.5)


def test_requests_are_dealt_to_decode_workers_in_turn_and_wait_for_a_place_there() -> None:
    at_once = np.full_like(TIMES.prefill_s_p, 1e-9)
    times = PassTimes(TIMES.batch_b, TIMES.context_2, np.full((4, 2), 0.01), TIMES.tokens_p, at_once)
    inputs, outputs = np.full(4, 100), np.array([11, 101, 11, 11])
    one = closed_loop(times, Pools(1, 400.0, max_running=2, prefill_workers=1), 2, inputs, outputs)
    assert one.ttft_mean_s == pytest.approx(0, abs=0.011)
    # The last one comes at 0.2 s and is dealt to the second worker, whose place is taken until 1 s.
    two = closed_loop(times, Pools(1, 400.0, 2, max_running=1, prefill_workers=1), 2, inputs, outputs)
    assert 4 * two.ttft_mean_s == pytest.approx(0.8, abs=0.04)
    assert two.tpot_mean_s == pytest.approx(0.01)


def test_running_sequences_count_against_the_tokens_of_a_pass() -> None:
    rng = np.random.default_rng(3)
    inputs, outputs = lengths(100, 80, rng), lengths(60, 80, rng)
    free = closed_loop(TIMES, Pools(1, 130.0), 8, inputs, outputs)
    full = closed_loop(TIMES, Pools(1, 130.0, query_tokens=20.0), 8, inputs, outputs)
    assert full.ttft_mean_s > free.ttft_mean_s


def test_no_more_run_than_there_is_cache_for() -> None:
    inputs, outputs = np.full(12, 100), np.full(12, 21)
    flat = PassTimes(TIMES.batch_b, TIMES.context_2, np.full((4, 2), 0.01), TIMES.tokens_p, TIMES.prefill_s_p)
    free = closed_loop(flat, Pools(1, 400.0), 4, inputs, outputs)
    tight = closed_loop(flat, Pools(1, 400.0, max_running=2), 4, inputs, outputs)
    assert tight.ttft_mean_s > 1.5 * free.ttft_mean_s


def test_a_prompt_waits_until_every_group_has_one() -> None:
    at_once = np.full_like(TIMES.prefill_s_p, 1e-9)
    times = PassTimes(TIMES.batch_b, TIMES.context_2, np.full((4, 2), 0.01), TIMES.tokens_p, at_once)
    # Of two groups the first one's sequence ends at 0.1 s, the second one's at 1 s; then both have a prompt.
    inputs, outputs = np.full(4, 100), np.array([11, 101, 11, 11])
    waits = closed_loop(times, Pools(2, 400.0, gather_passes=1000), 2, inputs, outputs)
    assert 4 * waits.ttft_mean_s == pytest.approx(0.9, abs=0.03)
    gives_up = closed_loop(times, Pools(2, 400.0, gather_passes=20), 2, inputs, outputs)
    # Two requests come to the first group one after the other and wait 0.2 s each.
    assert 4 * gives_up.ttft_mean_s == pytest.approx(0.4, abs=0.03)


def test_prompts_wait_for_one_per_group() -> None:
    rng = np.random.default_rng(1)
    inputs, outputs = lengths(100, 80, rng), lengths(60, 80, rng)
    at_once = closed_loop(TIMES, Pools(4, 100.0), 8, inputs, outputs)
    gathered = closed_loop(TIMES, Pools(4, 100.0, gather_passes=20), 8, inputs, outputs)
    assert gathered.ttft_median_s > at_once.ttft_median_s


def test_lengths_are_within_the_range_and_evenly_spread() -> None:
    drawn = lengths(1000, 20_000, np.random.default_rng(0))
    assert drawn.min() == 800
    assert drawn.max() == 1000
    assert drawn.mean() == pytest.approx(900, rel=0.01)
