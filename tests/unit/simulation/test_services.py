"""What a service does beyond batching: caches, preemption, routers, transfers, faults, order of events."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from service_pools import Planner, even_placement, plain_pool, serve, serving, trace

from moeplan.artifacts.request_trace import RequestTrace
from moeplan.errors import InfeasibleError, SpecError
from moeplan.simulation.clock import Clock, Order
from moeplan.simulation.oracles import PlainCosts
from moeplan.simulation.outcome import outcome_of
from moeplan.simulation.pools import Pool
from moeplan.simulation.service import simulate_service


def times(served: object, field: str) -> list[float]:
    return [getattr(r, field) * 1e-9 for r in served.requests]  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- order of events


def test_equal_times_are_ordered_by_priority_then_sequence() -> None:
    clock, seen = Clock(), []

    def wait(name: str, order: Order):
        yield clock.at(5, order)
        seen.append(name)

    for name, order in (("step", Order.STEP), ("a", Order.ARRIVAL), ("b", Order.ARRIVAL), ("fault", Order.FAULT)):
        clock.process(wait(name, order))
    clock.run()
    assert seen == ["fault", "a", "b", "step"]


def test_a_request_that_comes_as_a_step_ends_is_in_the_next_one() -> None:
    # The first prompt takes 1 s; the second comes at that instant and does not wait for a third step.
    pool = plain_pool(1, {"max_num_batched_tokens": 100}, base_s=1.0, per_token_s=0.0)
    served = serve(pool, trace([0.0, 1.0], [10, 10], [3, 1]))
    assert times(served, "first_ns") == [1.0, 2.0]
    assert times(served, "finish_ns") == [3.0, 2.0]
    assert served.instances[0].stats.steps == 3


# ---------------------------------------------------------------------- batching by hand


def test_chunked_prefill_by_hand() -> None:
    # 25 prompt tokens at 10 a step: three steps, the third with 5. Then one decode. 1 s + 0.1 s per token.
    pool = plain_pool(1, {"max_num_batched_tokens": 10}, base_s=1.0, per_token_s=0.1)
    served = serve(pool, trace([0.0], [25], [2]))
    assert times(served, "first_ns") == pytest.approx([2.0 + 2.0 + 1.5])
    assert times(served, "finish_ns") == pytest.approx([5.5 + 1.1])


def test_whole_prompts_make_decodes_wait() -> None:
    # Request 1 comes while 0 decodes: its prompt has a step to itself, 0 goes on after it.
    engine = {"max_num_batched_tokens": 100, "chunked_prefill": False}
    pool = plain_pool(1, engine, base_s=1.0, per_token_s=0.0)
    served = serve(pool, trace([0.0, 1.5], [10, 10], [3, 2]))
    assert times(served, "first_ns") == [1.0, 3.0]
    assert times(served, "finish_ns") == [4.0, 4.0]
    assert served.instances[0].stats.gaps == {1_000_000_000: 2, 2_000_000_000: 1}


def test_groups_step_together_and_wait_for_the_fullest() -> None:
    pool = plain_pool(2, {"max_num_batched_tokens": 100}, base_s=0.0, per_token_s=0.1)
    served = serve(pool, trace([0.0, 0.0], [10, 50], [1, 1]), router="round-robin")
    assert times(served, "first_ns") == pytest.approx([5.0, 5.0])


def test_two_stages_take_two_batches_half_a_step_apart() -> None:
    pool = plain_pool(1, {"pp": 2, "max_num_seqs": 1, "max_num_batched_tokens": 100}, base_s=1.0, per_token_s=0.0)
    served = serve(pool, trace([0.0, 0.0, 0.0], [10, 10, 10], [1, 1, 1]))
    assert times(served, "first_ns") == [1.0, 1.5, 2.0]


def test_batches_of_a_pipeline_have_an_even_part_of_the_slots() -> None:
    pool = plain_pool(1, {"pp": 2, "max_num_seqs": 4, "max_num_batched_tokens": 100}, base_s=0.0, per_token_s=1.0)
    stats = serve(pool, trace([0.0] * 6, [1] * 6, [5] * 6)).instances[0].stats
    assert max(stats.running_at) == 4
    assert set(stats.tokens) == {2.0}


# ---------------------------------------------------------------------- caches


def test_swap_brings_the_cache_back_and_takes_its_time() -> None:
    engine = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 4, "preemption": "swap"}
    arrivals = trace([0.0, 0.0], [8, 8], [12, 12])
    pool = plain_pool(1, engine, 1e-3, 0.0, capacity_tokens=32, kv_bytes=32e6)  # 1 ms a token over 32 GB/s or more
    swap, recompute = (
        serve(p, arrivals) for p in (pool, plain_pool(1, engine | {"preemption": "recompute"}, 1e-3, 0.0, 32))
    )
    stats = swap.instances[0].stats
    assert stats.preemptions == recompute.instances[0].stats.preemptions == 1
    assert stats.recomputed == 0 < recompute.instances[0].stats.recomputed
    assert stats.prefilled == 16
    host_s = stats.stepping_s - stats.steps * 1e-3
    assert host_s == pytest.approx(2 * 16 * 32e6 / pool.cluster.accelerator.pcie_bandwidth, rel=1e-3)
    preempted = next(r for r in swap.requests if r.preemptions)
    assert stats.swapped_bytes == 2 * 32e6 * 16  # out and back, 16 tokens
    assert preempted.finish_ns > max(r.finish_ns for r in recompute.requests)  # the bus is slower than computing again


def test_prompts_that_begin_alike_are_prefilled_once() -> None:
    engine = {"max_num_batched_tokens": 1000, "block_size": 4, "prefix_caching": True}
    prefix = ((1, 2, 3), (1, 2, 4), (1, 2, 3), (9,))
    arrivals = trace([0.0, 10.0, 20.0, 30.0], [12, 14, 12, 5], [1, 1, 1, 1], prefix_Q=prefix, prefix_tokens=4)
    pool = plain_pool(1, engine, base_s=0.0, per_token_s=0.1, capacity_tokens=400)
    served = serve(pool, arrivals)
    # The last token of a prompt is always computed: request 2 finds all three blocks and takes two.
    assert [r.hit_tokens for r in served.requests] == [0, 8, 8, 0]
    assert np.array(times(served, "first_ns")) - arrivals.arrival_s_Q == pytest.approx([1.2, 0.6, 0.4, 0.5])
    assert served.instances[0].stats.prefilled == 12 + 6 + 4 + 5


def test_cached_prompts_give_way_the_longest_unused_first() -> None:
    engine = {"max_num_batched_tokens": 1000, "block_size": 4, "prefix_caching": True}
    prefix = ((1,), (2,), (3,), (1,), (3,))
    # Room for 3 blocks. Each prompt of 5 tokens needs 2, one of them kept as prefix.
    arrivals = trace([0.0, 10.0, 20.0, 30.0, 40.0], [5] * 5, [1] * 5, prefix_Q=prefix, prefix_tokens=4)
    served = serve(plain_pool(1, engine, 0.0, 0.1, capacity_tokens=12), arrivals)
    assert [r.hit_tokens for r in served.requests] == [0, 0, 0, 0, 4]


def test_a_request_that_never_fits_is_refused() -> None:
    """With all its tokens, as engines ask, though the last one's keys and values are never kept."""
    serve(plain_pool(1, {}, 1.0, 0.0, capacity_tokens=50), trace([0.0, 0.0], [10, 38], [5, 10]))
    with pytest.raises(InfeasibleError, match=r"request 1 has 49 tokens, .* 1 more than .* a group holds \(48\)"):
        serve(plain_pool(1, {}, 1.0, 0.0, capacity_tokens=50), trace([0.0, 0.0], [10, 39], [5, 10]))
    with pytest.raises(InfeasibleError, match=r"request 1 has 60 tokens, .* 12 more than .* a group holds \(48\)"):
        serve(plain_pool(1, {}, 1.0, 0.0, capacity_tokens=50), trace([0.0, 0.0], [10, 50], [5, 10]))


def test_prompts_that_are_not_cut_must_fit_a_step() -> None:
    engine = {"chunked_prefill": False, "max_num_batched_tokens": 32}
    with pytest.raises(SpecError, match=r"max_num_batched_tokens \(32\) is less than the longest prompt \(40\)"):
        serve(plain_pool(1, engine, 1.0, 0.0), trace([0.0], [40], [1]))


def test_prefix_blocks_must_be_whole_cache_blocks() -> None:
    arrivals = trace([0.0], [40], [1], prefix_Q=((1,),), prefix_tokens=24)
    with pytest.raises(SpecError, match=r"block_size \(16\) does not divide the .* prefix blocks \(24 tokens\)"):
        serve(plain_pool(1, {"prefix_caching": True}, 1.0, 0.0), arrivals)


# ---------------------------------------------------------------------- routing of requests


def test_round_robin_counts_on_and_least_loaded_looks() -> None:
    arrivals = trace([0.0, 0.1, 0.2, 2.05, 2.1], [10, 1, 1, 1, 1], [50, 1, 50, 1, 1])
    pool = plain_pool(2, {"max_num_batched_tokens": 100}, base_s=1.0, per_token_s=0.0)
    groups = {
        policy: [r.group for r in serve(pool, arrivals, router=policy).requests]
        for policy in ("round-robin", "least-loaded")
    }
    assert groups["round-robin"] == [0, 1, 0, 1, 0]
    assert groups["least-loaded"] == [0, 1, 0, 1, 1]


def test_round_robin_goes_round_each_pool_by_itself() -> None:
    engine, link = {"max_num_batched_tokens": 1000}, {"link_bytes_per_s": 1e9, "link_latency_s": 0.0}
    pools = [plain_pool(2, engine, 0.1, 0.0, role="prefill", **link), plain_pool(2, engine, 0.1, 0.0, role="decode")]
    arrivals = trace([0.0, 1.0, 2.0, 3.0], [10] * 4, [2] * 4)
    log = serve(pools, arrivals, prefill={"ranks": 2}, router="round-robin").log
    assert log is not None
    assert log.rank_V[log.of_kind("admit")].tolist() == [0, 2, 1, 3, 0, 2, 1, 3]


def test_prefix_aware_goes_where_the_prompt_is() -> None:
    engine = {"max_num_batched_tokens": 1000, "block_size": 4, "prefix_caching": True}
    prefix = ((1, 2), (5, 6), (5, 6), (1, 2), (8,))
    arrivals = trace([0.0, 1.0, 20.0, 30.0, 40.0], [9] * 5, [1] * 5, prefix_Q=prefix, prefix_tokens=4)
    pool = plain_pool(2, engine, base_s=2.0, per_token_s=0.0)
    served = serve(pool, arrivals, router="prefix-aware")
    assert [r.group for r in served.requests] == [0, 1, 1, 0, 0]
    assert [r.hit_tokens for r in served.requests] == [0, 0, 8, 8, 0]


def test_full_queues_reject() -> None:
    pool = plain_pool(1, {"max_num_seqs": 1, "max_waiting": 1}, base_s=1.0, per_token_s=0.0)
    served = serve(pool, trace([0.0, 0.1, 0.2], [1, 1, 1], [5, 1, 1]))
    assert served.rejected == 1
    assert served.requests[2].finish_ns == -1
    found = outcome_of(served, serving(slo={"e2e": "10 s"}))
    assert found.headlines["slo_attainment"] == pytest.approx(2 / 3)
    assert found.counts["finished"] == 2


def test_a_closed_loop_holds_its_concurrency() -> None:
    requests = {"arrivals": "closed-loop", "concurrency": 2, "count": 6, "input_tokens": 4, "output_tokens": 3,
                "think_time": "1 s"}  # fmt: skip
    pool = plain_pool(1, {"max_num_batched_tokens": 100}, base_s=1.0, per_token_s=0.0)
    spec = serving(requests=requests)
    arrivals = RequestTrace(np.full(6, 4), np.full(6, 3))
    served = simulate_service(spec, arrivals, [pool])
    assert times(served, "arrival_ns") == [0.0, 0.0, 4.0, 4.0, 8.0, 8.0]
    assert served.end_s == 11.0
    events = sorted([(t, 1) for t in times(served, "arrival_ns")] + [(t, -1) for t in times(served, "finish_ns")])
    inside = np.cumsum([change for _, change in events])
    assert inside.max() == 2


def test_a_closed_loop_that_is_turned_away_at_once_is_refused() -> None:
    requests = {"arrivals": "closed-loop", "concurrency": 5, "count": 100, "input_tokens": 4, "output_tokens": 3}
    pool = plain_pool(1, {"max_num_seqs": 1, "max_waiting": 2}, base_s=1.0, per_token_s=0.0)
    arrivals = RequestTrace(np.full(100, 4), np.full(100, 3))
    with pytest.raises(SpecError, match=r"max_waiting \(2\) turns requests .* give think_time, .*concurrency \(5\)"):
        simulate_service(serving(requests=requests), arrivals, [pool])
    served = simulate_service(serving(requests=requests | {"think_time": "1 s"}), arrivals, [pool])
    assert served.rejected + sum(r.finish_ns > 0 for r in served.requests) == 100


# ---------------------------------------------------------------------- disaggregation


def test_prefilled_requests_travel_over_one_link_after_the_other() -> None:
    engine = {"max_num_batched_tokens": 1000}
    link = {"kv_bytes": 1e6, "link_bytes_per_s": 1e7, "link_latency_s": 0.5}
    pools = [plain_pool(1, engine, 1.0, 0.0, role="prefill", **link), plain_pool(1, engine, 0.1, 0.0, role="decode")]
    served = serve(pools, trace([0.0, 0.0, 0.0], [10, 20, 5], [3, 3, 1]), prefill={"ranks": 1})
    # All three prompts end at 1 s; 10 tokens take 0.5 + 1 s, 20 take 0.5 + 2 s after that; the last needs no decode. A
    # first token is sent when decoding begins.
    assert times(served, "first_ns") == pytest.approx([2.5, 5.0, 1.0])
    assert times(served, "finish_ns") == pytest.approx([2.7, 5.2, 1.0])
    assert served.transferred_bytes == 30e6
    assert (served.instances[0].free_D == served.instances[0].capacity).all()
    # At half the link's speed 0.5 + 2 s and 0.5 + 4 s, at whichever end; where a rank gets a fifth of each token's
    # bytes, its link may be that much slower.
    fault = {"kind": "slow-link", "rank": 0, "speed": 0.5, "at": "0 s"}
    for pool, received in (("prefill", 100.0), ("decode", 1e6), ("decode", 2e5)):
        pools[1] = replace(pools[1], kv_bytes=received)
        faults = [fault | {"pool": pool}]
        late = serve(pools, trace([0.0, 0.0, 0.0], [10, 20, 5], [3, 3, 1]), prefill={"ranks": 1}, faults=faults)
        want = [2.5, 5.0, 1.0] if received == 2e5 else [3.5, 8.0, 1.0]
        assert times(late, "first_ns") == pytest.approx(want), (pool, received)


def test_a_decode_group_takes_in_one_cache_after_the_other() -> None:
    engine, kv = {"max_num_batched_tokens": 1000}, {"kv_bytes": 1e6}
    link = {"link_bytes_per_s": 1e7, "link_latency_s": 0.5, **kv}
    for groups, second in ((1, 4.0), (2, 2.5)):
        pools = [
            plain_pool(2, engine, 1.0, 0.0, role="prefill", **link),
            plain_pool(groups, engine, 0.1, 0.0, role="decode", **kv),
        ]
        served = serve(pools, trace([0.0, 0.0], [10, 10], [3, 3]), prefill={"ranks": 2}, router="round-robin")
        assert times(served, "first_ns") == pytest.approx([2.5, second])


@pytest.mark.parametrize("short_of", ["slots", "room"])
def test_a_cache_stays_where_it_is_until_a_decode_group_has_a_slot_and_room(short_of: str) -> None:
    engine, link = {"max_num_batched_tokens": 1000}, {"link_bytes_per_s": 1e7, "link_latency_s": 0.5}
    decode = {"slots": (engine | {"max_num_seqs": 1}, 10**9), "room": (engine, 48)}[short_of]
    pools = [
        plain_pool(1, engine, 1.0, 0.0, role="prefill", capacity_tokens=32, kv_bytes=1e6, **link),
        plain_pool(1, decode[0], 0.1, 0.0, role="decode", capacity_tokens=decode[1]),
    ]
    served = serve(pools, trace([0.0] * 4, [16] * 4, [31] * 4), prefill={"ranks": 1})
    # A prompt fills one of two blocks for prefill, of three for decoding, where each grows to three. The first two are
    # prefilled by 1 s. A cache takes 0.5 + 1.6 s, and 3 s to decode; the next is fetched then, and gives its block to
    # another prompt when it is there.
    fetched = [1.0, 6.1, 11.2, 16.3]
    assert times(served, "first_ns") == pytest.approx([at + 2.1 for at in fetched])
    assert times(served, "finish_ns") == pytest.approx([at + 5.1 for at in fetched])
    assert times(served, "admit_ns") == pytest.approx([0.0, 0.0, 3.1, 8.2])
    log = served.log
    assert log is not None
    assert log.start_s_V[log.of_kind("transfer")] == pytest.approx(fetched)
    for instance in served.instances:
        assert (instance.free_D == instance.capacity).all()


def test_a_full_queue_for_decoding_gives_the_cache_up() -> None:
    link = {"kv_bytes": 1e6, "link_bytes_per_s": 1e9, "link_latency_s": 0.0}
    pools = [
        plain_pool(1, {}, 1.0, 0.0, role="prefill", **link),
        plain_pool(1, {"max_num_seqs": 1, "max_waiting": 1}, 1.0, 0.0, role="decode"),
    ]
    served = serve(pools, trace([0.0] * 4, [10] * 4, [9] * 4), prefill={"ranks": 1})
    assert served.rejected == 3
    assert served.instances[0].load_D.tolist() == [0]
    assert (served.instances[0].free_D == served.instances[0].capacity).all()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_lost_on_either_side_all_is_served_and_given_back(seed: int) -> None:
    rng = np.random.default_rng([31, seed])
    link = {"kv_bytes": 1e6, "link_bytes_per_s": 4e7, "link_latency_s": 0.05}
    engine = {"max_num_batched_tokens": 64, "block_size": 4, "max_num_seqs": 3, "chunked_prefill": bool(seed % 2)}
    pools = [
        plain_pool(2, engine, 0.2, 0.0, role=role, capacity_tokens=room, **(link if role == "prefill" else {}))
        for role, room in (("prefill", 80), ("decode", 120))
    ]
    losses = (("decode", 1, 2.5 + seed / 3), ("prefill", 0, 4.1), ("prefill", 1, 9.0), ("decode", 0, 11.0))
    faults = [
        {"kind": "rank-loss", "pool": pool, "rank": rank, "at": f"{at} s", "until": f"{at + 4} s", "detect": "0.5 s"}
        for pool, rank, at in losses
    ]
    at_s, lengths = np.sort(rng.uniform(0, 12, 40)).tolist(), rng.integers((4, 1), (40, 30), (40, 2)).T
    arrivals = trace(at_s, *lengths.tolist())
    served = serve(pools, arrivals, Planner(2, capacity=80), faults=faults, prefill={"ranks": 2})
    assert [r.generated for r in served.requests] == arrivals.output_tokens_Q.tolist()
    assert all(r.kept is None for r in served.requests)
    assert served.transferred_bytes > 0
    gaps_ns = sum(gap * count for instance in served.instances for gap, count in instance.stats.gaps.items())
    assert gaps_ns == sum(r.finish_ns - r.first_ns for r in served.requests)
    for instance in served.instances:
        assert instance.load_D.tolist() == [0, 0]
        assert (instance.num_running, instance.num_waiting) == (0, 0)
        assert (instance.free_D == instance.capacity).all()


def test_a_decode_service_begins_with_the_cache() -> None:
    pool = plain_pool(1, {}, base_s=1.0, per_token_s=0.0, role="decode")
    served = serve(pool, trace([0.0, 0.0], [100, 50], [4, 1]), role="decode")
    assert times(served, "finish_ns") == [3.0, 0.0]
    assert served.instances[0].stats.prefilled == 0


# ---------------------------------------------------------------------- re-balancing and faults


def test_bulk_stalls_once_and_layer_wise_between_steps() -> None:
    arrivals = trace([0.0], [1], [9])
    ends = {}
    for apply in ("bulk", "layer-wise"):
        pool = plain_pool(2, {}, base_s=1.0, per_token_s=0.0)
        pool = Pool(
            **{f: getattr(pool, f) for f in pool.__slots__ if f != "placement"}, placement=even_placement(2, layers=2)
        )
        planner = Planner(2, layers=2)
        rebalance = {"interval": "3.5 s", "window": "3 s", "planner": "greedy", "apply": apply}
        served = serve(pool, arrivals, planner, rebalance=rebalance)
        stats = served.instances[0].stats
        assert planner.asked[0][2] == "greedy"
        assert stats.migrated_bytes == 14.0 * len(planner.asked)
        assert (served.instances[0].placement.physical_to_logical_LP == [[1, 0], [1, 0]]).all()
        log = served.log
        assert log is not None
        migrations = np.flatnonzero(log.of_kind("migrate"))
        ends[apply] = (migrations.size // len(planner.asked), log.layer_V[migrations].tolist())
    assert ends["bulk"][0] == 1
    assert set(ends["bulk"][1]) == {-1}
    assert ends["layer-wise"] == (2, [0, 1] * (len(ends["layer-wise"][1]) // 2))


def test_a_lost_rank_loses_its_caches_and_comes_back() -> None:
    planner = Planner(2)
    pool = plain_pool(2, {"max_num_seqs": 8}, base_s=1.0, per_token_s=0.0)
    faults = [{"kind": "rank-loss", "at": "2.5 s", "until": "50 s", "rank": 1, "detect": "4 s"}]
    arrivals = trace([0.0, 0.0, 20.0, 60.0, 60.0], [4] * 5, [6, 6, 3, 2, 2])
    served = serve(pool, arrivals, planner, faults=faults, router="round-robin")
    first, second = served.requests[:2]
    # Request 1 ran on the lost rank: two tokens were out, all of it is computed again on rank 0 after 4 + 2 s.
    assert (first.group, second.group, second.preemptions) == (0, 0, 1)
    assert first.finish_ns < second.finish_ns
    assert served.instances[0].stats.recomputed == 4 + 2
    assert [failed for _, failed, _ in planner.asked] == [[False, True], [False, False]]
    assert served.requests[2].group == 0  # the only one left
    assert {served.requests[3].group, served.requests[4].group} == {0, 1}  # both again
    log = served.log
    assert log is not None
    assert log.start_s_V[log.of_kind("fault")].tolist() == [2.5, 50.0]
    steps = log.start_s_V[log.of_kind("step")]
    assert not ((steps > 3.0) & (steps < 8.5)).any()


def test_a_lost_prefill_rank_computes_again_what_it_had_not_sent() -> None:
    link = {"kv_bytes": 1e6, "link_bytes_per_s": 1e7, "link_latency_s": 0.0}
    engine, tail = {"max_num_batched_tokens": 1000}, {"role": "decode"}
    pools = [plain_pool(2, engine, 1.0, 0.0, role="prefill", **link), plain_pool(1, engine, 0.1, 0.0, **tail)]
    faults = [{"kind": "rank-loss", "pool": "prefill", "at": "1.5 s", "rank": 1, "detect": "3 s"}]
    arrivals = trace([0.0, 0.0, 1.2], [10, 10, 10], [3, 3, 3])
    served = serve(pools, arrivals, Planner(2), faults=faults, prefill={"ranks": 2}, router="round-robin")
    # Both prompts end at 1 s and are on their links till 2 s. Rank 1 is lost with the second one's cache: it waits for
    # rank 0 from 2 s on, which stalls for 3 + 2 s from the loss, and computes its first token again. The third was in
    # the step of 1.2 s, whose rank stays.
    kept, again, third = served.requests
    assert times(served, "first_ns")[:2] == pytest.approx([2.0, 8.5])
    assert kept.finish_ns == pytest.approx(2.2e9)
    assert (again.generated, again.group, third.group) == (3, 0, 0)
    prefill = served.instances[0]
    assert prefill.stats.recomputed == 10
    steps = served.log.start_s_V[served.log.of_kind("step") & (served.log.rank_V == 0)]  # type: ignore[union-attr]
    assert not ((steps > 1.5) & (steps < 6.5)).any()
    # From 6.5 s a step of 1 s yields its first token, 10 tokens take 1 s over the link, decode steps the other two.
    assert again.finish_ns == pytest.approx(8.7e9)
    assert prefill.load_D.tolist() == [0, 0]
    assert prefill.alive_D.tolist() == [True, False]
    assert (prefill.free_D == prefill.capacity).all()
    assert served.instances[1].stats.generated == 2 + 2 + 2
    assert sum(sum(instance.stats.gaps.values()) for instance in served.instances) == 2 + 2 + 2


def test_a_plan_made_before_a_loss_is_not_put_in_place_after_it() -> None:
    planner = Planner(2)
    faults = [{"kind": "rank-loss", "at": "4 s", "rank": 1, "detect": "1 s"}]
    rebalance = {"interval": "3.5 s", "window": "3 s", "apply": "bulk", "delay": "20 s"}
    pool = plain_pool(2, {}, base_s=1.0, per_token_s=0.0)
    served = serve(pool, trace([0.0], [1], [25]), planner, faults=faults, rebalance=rebalance)
    assert [failed[1] for _, failed, _ in planner.asked[:2]] == [False, True]
    assert served.end_s > 23.5
    assert served.instances[0].stats.migrated_bytes == 7.0  # of the loss


def test_re_balancing_does_not_go_on_for_ever() -> None:
    # After the loss a group holds 16 tokens, fewer than the request needs by then.
    faults = [{"kind": "rank-loss", "at": "2.5 s", "rank": 1, "detect": "1 s"}]
    rebalance = {"interval": "3 s", "window": "3 s"}
    pool = plain_pool(2, {"block_size": 4}, base_s=1.0, per_token_s=0.0, capacity_tokens=1000)
    with pytest.raises(InfeasibleError, match=r"1 requests can never be served: .* no group has room"):
        serve(pool, trace([0.0], [14], [20]), Planner(2, capacity=16), faults=faults, rebalance=rebalance)


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_caches_that_are_kept_or_travel_may_take_more_than_a_loss_leaves(pool: str) -> None:
    link = {"kv_bytes": 1e6, "link_bytes_per_s": 1e9, "link_latency_s": 5.0}
    seqs = {"prefill": 1, "decode": 8}[pool]  # caches stay until a slot is free, or travel at once
    pools = [
        plain_pool(2, {}, 1.0, 0.0, role="prefill", capacity_tokens=1000, **link),
        plain_pool(2, {"max_num_seqs": seqs}, 0.1, 0.0, role="decode", capacity_tokens=1000),
    ]
    faults = [{"kind": "rank-loss", "pool": pool, "at": "3 s", "rank": 1, "detect": "0 s"}]
    arrivals = trace([0.0] * 8 + [4.0], [16] * 9, [3] * 9)
    served = serve(pools, arrivals, Planner(2, capacity=32), faults=faults, prefill={"ranks": 2}, router="round-robin")
    assert [r.generated for r in served.requests] == [3] * 9
    for instance in served.instances:
        assert (instance.free_D == instance.capacity).all()
        assert instance.load_D.tolist() == [0, 0]


def test_requests_wait_for_room_that_comes_back_with_a_rank() -> None:
    planner = Planner(2)

    def replan(load_LE, cluster, current, name):  # type: ignore[no-untyped-def]
        room = 16 if cluster.rank(1).failed else 1000
        return replace(planner(load_LE, cluster, current, name), capacity_tokens=room)

    faults = [{"kind": "rank-loss", "at": "2.5 s", "until": "50 s", "rank": 1, "detect": "1 s"}]
    pool = plain_pool(2, {"block_size": 4}, base_s=1.0, per_token_s=0.0, capacity_tokens=1000)
    served = serve(pool, trace([0.0], [14], [20]), replan, faults=faults)
    assert served.requests[0].generated == 20
    assert served.end_s > 50.0


def test_what_breaks_inside_a_step_is_no_want_of_room() -> None:
    class Broken(PlainCosts):
        def step(self, batch, placement, load_LE):  # type: ignore[no-untyped-def]
            raise RuntimeError("broken")

    pool = replace(plain_pool(1, {}, 1.0, 0.0), costs=lambda cluster: Broken(cluster, 1.0, 0.0))
    with pytest.raises(RuntimeError, match="broken"):
        serve(pool, trace([0.0], [1], [2]))


def test_a_cache_lost_in_a_queue_for_decoding_is_no_token_sent() -> None:
    link = {"kv_bytes": 1e6, "link_bytes_per_s": 1e9, "link_latency_s": 0.0}
    pools = [
        plain_pool(1, {}, 1.0, 0.0, role="prefill", **link),
        plain_pool(2, {"max_num_seqs": 1}, 1.0, 0.0, role="decode"),
    ]
    faults = [{"kind": "rank-loss", "at": "3.5 s", "rank": 1, "detect": "1 s"}]
    arrivals = trace([0.0] * 4, [10] * 4, [3] * 4)
    served = serve(pools, arrivals, Planner(2), faults=faults, prefill={"ranks": 1}, router="round-robin")
    assert all(r.generated == 3 for r in served.requests)
    gaps_ns = sum(gap * count for instance in served.instances for gap, count in instance.stats.gaps.items())
    assert gaps_ns == sum(r.finish_ns - r.first_ns for r in served.requests)


def test_a_slow_stage_sets_the_pace_of_a_pipeline() -> None:
    pool = plain_pool(1, {"pp": 2, "max_num_seqs": 1, "max_num_batched_tokens": 100}, base_s=1.0, per_token_s=0.0)
    pool = replace(pool, costs=lambda cluster: PlainCosts(cluster, 1.0 / cluster.rank(0).speed, 0.0))
    arrivals = trace([0.0] * 3 + [20.0], [10] * 4, [1] * 4)
    for rank in (0, 1):
        fault = {"kind": "slow-rank", "rank": rank, "speed": 0.25, "at": "0 s", "until": "10 s"}
        served = serve(pool, arrivals, faults=[fault])
        # 0.5 s in the one stage, 2 s in the other, which takes the next batch when it has handed on the last.
        assert times(served, "first_ns") == [2.5, 4.5, 6.5, 21.0]
        busy_R = served.instances[0].stats.busy_R
        assert busy_R[rank] == pytest.approx(3 * 2.0 + 0.5)
        assert busy_R[1 - rank] == pytest.approx(4 * 0.5)


def test_a_rank_lost_in_one_stage_of_a_pipeline_moves_that_stages_layers() -> None:
    planner = Planner(2, layers=4)
    pool = plain_pool(2, {"pp": 2, "max_num_seqs": 4}, base_s=1.0, per_token_s=0.0)
    pool = replace(pool, placement=even_placement(2, layers=4))
    fault = {"kind": "rank-loss", "rank": 3, "at": "2.2 s", "until": "50 s", "detect": "1 s"}
    served = serve(pool, trace([0.0, 0.0, 60.0], [4] * 3, [6] * 3), planner, faults=[fault], router="round-robin")
    instance = served.instances[0]
    assert [failed for _, failed, _ in planner.asked] == [[False, True], [False, False]]
    assert [request.preemptions for request in served.requests] == [0, 1, 0]
    first, second = (placement.physical_to_logical_LP for _, placement in instance.stages)
    assert first.tolist() == [[0, 1]] * 4
    assert second.tolist() == [[1, 0]] * 4
    # Two of four layers move, 2 s each, once for the loss and once for the return.
    assert instance.stats.migrated_bytes == 2 * 2 * 7.0
    assert instance.stats.stalled_s == pytest.approx(2 * 2 * 2.0 + 1.0)
    assert instance.alive_D.all()


def test_losing_every_rank_is_an_error() -> None:
    faults = [{"kind": "rank-loss", "at": "1 s", "rank": 0}]
    with pytest.raises(InfeasibleError, match=r"faults: the last rank is lost at 1 s"):
        serve(plain_pool(1, {}, 1.0, 0.0), trace([0.0], [1], [9]), Planner(1), faults=faults)
    # Rank 1 of the first stage and rank 0 of the second are there: of either group a half.
    faults = [{"kind": "rank-loss", "at": f"{rank + 1} s", "rank": rank} for rank in (0, 3)]
    pool = replace(plain_pool(2, {"pp": 2}, 1.0, 0.0), placement=even_placement(2, layers=2))
    with pytest.raises(InfeasibleError, match=r"faults: at 4 s every group has lost a rank; none is left to serve"):
        serve(pool, trace([0.0], [1], [9]), Planner(2, layers=2), faults=faults)


def test_less_room_after_a_fault_preempts() -> None:
    planner = Planner(2, capacity=64)
    pool = plain_pool(2, {"max_num_seqs": 8, "block_size": 4}, base_s=1.0, per_token_s=0.0, capacity_tokens=1000)
    faults = [{"kind": "rank-loss", "at": "2.5 s", "rank": 1, "detect": "1 s"}]
    served = serve(pool, trace([0.0] * 4, [30] * 4, [20] * 4), planner, faults=faults)
    assert served.instances[0].stats.preemptions > 2  # two by the loss, more for want of room
    assert all(r.finish_ns > 0 for r in served.requests)
    assert served.instances[0].free_D[0] == 16
