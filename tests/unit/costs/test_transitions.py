from __future__ import annotations

import itertools

import numpy as np

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.transitions import transition_counts


def _trace(experts_TLK: np.ndarray, num_experts: int) -> RoutingTrace:
    return RoutingTrace(experts_TLK, num_experts, tuple(range(experts_TLK.shape[1])))


def test_agrees_with_counting_pair_by_pair() -> None:
    rng = np.random.default_rng(1)
    experts = np.array([[rng.permutation(6)[:2] for _ in range(4)] for _ in range(37)], dtype=np.int16)
    experts[5, 2, 1] = -1
    expected = np.zeros((3, 6, 6))
    for token in experts:
        for layer in range(3):
            for e, f in itertools.product(token[layer], token[layer + 1]):
                if e >= 0 and f >= 0:
                    expected[layer, e, f] += 0.5
    np.testing.assert_array_equal(transition_counts(_trace(experts, 6)), expected)


def test_rows_and_columns_sum_to_the_loads() -> None:
    rng = np.random.default_rng(2)
    experts = np.argsort(rng.random((100, 3, 16)), axis=-1)[..., :4].astype(np.uint8)
    counts = transition_counts(_trace(experts, 16))
    loads = np.stack([np.bincount(experts[:, layer].ravel(), minlength=16) for layer in range(3)])
    np.testing.assert_allclose(counts.sum(axis=2), loads[:-1])
    np.testing.assert_allclose(counts.sum(axis=1), loads[1:])


def test_one_layer_has_no_transitions() -> None:
    assert transition_counts(_trace(np.zeros((3, 1, 1), dtype=np.int64), 2)).shape == (0, 2, 2)


def test_a_trace_is_counted_once() -> None:
    trace = _trace(np.arange(12, dtype=np.uint8).reshape(2, 3, 2), 12)
    assert transition_counts(trace) is transition_counts(trace)
    other = _trace(trace.experts_TLK[:1], 12)
    assert transition_counts(other).sum() == transition_counts(trace).sum() / 2
