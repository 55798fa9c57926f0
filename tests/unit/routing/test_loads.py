from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import TraceError
from moeplan.routing.joining import join_traces
from moeplan.routing.loads import expert_load, pick_tokens, split_trace, stream_load, without_stretches


def trace_of(tokens: int = 12, **fields) -> RoutingTrace:
    rng = np.random.default_rng(tokens)
    ids = rng.random((tokens, 2, 8)).argsort(axis=2)[:, :, :3].astype(np.uint8)
    return RoutingTrace(experts_TLK=ids, num_experts=8, layer_ids=(1, 4), **fields)


def by_hand(trace: RoutingTrace, tokens) -> np.ndarray:
    load = np.zeros((trace.num_layers, trace.num_experts))
    for t in tokens:
        for layer in range(trace.num_layers):
            for e in trace.experts_TLK[t, layer]:
                load[layer, e] += 1
    return load


def test_windows_of_time_domain_and_phase():
    domain_T = np.array([0] * 5 + [2] * 7, np.int32)
    trace = trace_of(domain_T=domain_T, domains=("a", "empty", "b"), phase_T=np.array([1] * 12, np.uint8))
    by_domain = expert_load(trace, "domain")
    assert by_domain.windows == ("a", "b")
    np.testing.assert_array_equal(by_domain.load_WLE, [by_hand(trace, range(5)), by_hand(trace, range(5, 12))])
    assert expert_load(trace, "phase").windows == ("decode",)
    by_time = expert_load(trace, "time:5")
    ends = [0, *(next(t for t in range(13) if t == 12 or t * 5 // 12 > w) for w in range(5))]
    parts = [by_hand(trace, range(a, b)) for a, b in pairwise(ends)]
    np.testing.assert_array_equal(by_time.load_WLE, parts)
    assert by_time.trace is trace
    assert by_time.top_k == 3


def test_source_ranks_are_counted():
    source_T = np.array([0, 2] * 6, np.int32)
    load = expert_load(trace_of(source_rank_T=source_T))
    expected = [by_hand(load.trace, range(0, 12, 2)), np.zeros((2, 8)), by_hand(load.trace, range(1, 12, 2))]
    np.testing.assert_array_equal(load.source_SLE, expected)


def test_an_absurd_source_rank_is_refused():
    with pytest.raises(TraceError, match="source_rank goes up to 2000000000; ranks must lie within"):
        expert_load(trace_of(source_rank_T=np.full(12, 2_000_000_000, np.int32)))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ("domain", "need a trace with domains"),
        ("phase", "need a trace with phases"),
        ("time:0", "N up to the tokens"),
        ("time:13", "N up to the tokens"),
        ("hour", "must be 'all', 'domain', 'phase' or 'time:N'"),
    ],
)
def test_windows_that_cannot_be(windows, message):
    with pytest.raises(TraceError, match=message):
        expert_load(trace_of(), windows)


def test_a_load_passes_through_and_an_empty_stream_does_not():
    load = expert_load(trace_of())
    assert expert_load(load, "domain") is load
    with pytest.raises(TraceError, match="no tokens"):
        stream_load([])


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 3),
    st.floats(0.1, 0.9),
    st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_a_split_is_a_partition_at_sequence_boundaries(lens, domains, fraction, seed):
    tokens = sum(lens)
    if tokens < 2:
        return
    rng = np.random.default_rng(seed)
    domain_S = rng.integers(0, domains, len(lens))
    trace = trace_of(
        tokens,
        seq_lens_S=np.array(lens),
        domain_T=np.repeat(domain_S, lens).astype(np.int32),
        domains=tuple("abc"[:domains]),
        source_rank_T=np.arange(tokens, dtype=np.int32),  # names each token
    )
    first, second = split_trace(trace, fraction)
    named = np.concatenate([first.source_rank_T, second.source_rank_T])
    np.testing.assert_array_equal(np.sort(named), np.arange(tokens))
    assert first.seq_lens_S.sum() == first.num_tokens
    sequence_T = np.repeat(np.arange(len(lens)), lens)
    cut = set(sequence_T[first.source_rank_T]) & set(sequence_T[second.source_rank_T])
    for sequence in cut:  # only the single sequence of its domain may be cut, or a trace too short to share
        alone = (domain_S == domain_S[sequence]).sum() == 1
        assert alone or len(set(domain_S)) == len(lens)


def test_a_split_is_nearest_to_the_fraction():
    trace = trace_of(20, seq_lens_S=np.array([6, 6, 4, 4]))
    first, second = split_trace(trace, 0.5)
    assert (first.num_tokens, second.num_tokens) == (12, 8)
    assert first.seq_lens_S.tolist() == [6, 6]
    with pytest.raises(TraceError, match="must lie between 0 and 1"):
        split_trace(trace, 1.0)
    with pytest.raises(TraceError, match="cannot be split"):
        split_trace(trace_of(1))


def test_picked_tokens_keep_their_sequences():
    part = pick_tokens(trace_of(6, seq_lens_S=np.array([2, 1, 3])), np.array([1, 0, 0, 1, 1, 0], bool))
    assert part.seq_lens_S.tolist() == [1, 2]


def test_joining_matches_domains_by_name():
    one = trace_of(2, domain_T=np.zeros(2, np.int32), domains=("a",), phase_T=np.zeros(2, np.uint8))
    two = trace_of(3, domain_T=np.array([0, 1, 1], np.int32), domains=("b", "a"))
    both = join_traces([one, two])
    assert [both.domains[d] for d in both.domain_T] == ["a", "a", "b", "a", "a"]
    assert both.phase_T is None
    other = RoutingTrace(np.zeros((1, 2, 3), np.uint8), 9, (1, 4))
    with pytest.raises(TraceError, match=r"num_experts of part 1 \(9\) is not part 0's \(8\)"):
        join_traces([one, other])


def test_each_stretch_is_left_out_of_every_window_once():
    domain_T = np.array([0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0], np.int32)
    trace = trace_of(domain_T=domain_T, domains=("a", "b"))
    first, second = without_stretches(expert_load(trace, "domain"), 2)
    for load, kept in ((first, [(6, 7, 8, 11), (9, 10)]), (second, [(0, 2, 3, 5), (1, 4)])):
        assert load.windows == ("a", "b")
        np.testing.assert_array_equal(load.load_WLE, [by_hand(trace, part) for part in kept])
        np.testing.assert_array_equal(load.trace.experts_TLK, trace.experts_TLK[sorted(kept[0] + kept[1])])
        np.testing.assert_array_equal(load.window_T, load.trace.domain_T)
    with pytest.raises(TraceError, match="fewer than 5 tokens"):
        without_stretches(expert_load(trace, "domain"), 5)
