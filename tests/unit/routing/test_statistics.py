from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import pytest

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.routing.io import read_trace
from moeplan.routing.loads import expert_load
from moeplan.routing.pairs import coactivation_pairs, lag_overlap, transition_pairs, weighted_pairs
from moeplan.routing.statistics import (
    coactivation_bits,
    coactivation_lift,
    contiguous_imbalance,
    cosine_drift,
    describe,
    entropy,
    gini,
    max_over_mean,
    mutual_information,
    quasi_independent,
    top_share,
    transitions,
    variation_drift,
)


def random_ids(tokens=30, layers=3, experts=8, top_k=3, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k].astype(np.int16)


def test_skew_by_hand():
    load = np.array([[1.0, 1, 1, 1], [4, 0, 0, 0], [1, 2, 3, 4]])
    np.testing.assert_allclose(max_over_mean(load), [1, 4, 1.6])
    mean_difference = sum(abs(a - b) for a, b in product(load[2], repeat=2)) / 16
    np.testing.assert_allclose(gini(load), [0, 0.75, mean_difference / 2 / 2.5])
    np.testing.assert_allclose(entropy(load)[:2], [2, 0])
    np.testing.assert_allclose(contiguous_imbalance(load, 2), [1, 2, 1.4])


def test_drift_by_hand():
    load = np.array([[[1.0, 0], [1, 1]], [[0, 1], [2, 2]]])
    np.testing.assert_allclose(cosine_drift(load), [[1, 0.5], [0.5, 1]])
    np.testing.assert_allclose(variation_drift(load), [[0, 0.5], [0.5, 0]])


def test_pairs_against_counting_one_by_one():
    ids = random_ids()
    ids[3, 1, 2] = -1
    ids[4, 0, 0] = -1
    across, within = np.zeros((8, 8)), np.zeros((8, 8))
    for token in ids:
        for a, b in product(token[0], token[1]):
            if a >= 0 and b >= 0:
                across[a, b] += 1
        for a, b in permutations(token[0], 2):
            if a >= 0 and b >= 0:
                within[a, b] += 1
    first, second = np.ascontiguousarray(ids[:, 0]), np.ascontiguousarray(ids[:, 1])
    np.testing.assert_array_equal(transition_pairs(first, second, 8), across)
    np.testing.assert_array_equal(coactivation_pairs(first, 8), within)
    np.testing.assert_array_equal(transitions(RoutingTrace(ids, 8, (0, 1, 2)))[0], across)


def test_information_and_top_share_by_hand():
    assert mutual_information(np.eye(8)) == pytest.approx(3)
    assert mutual_information(np.ones((4, 4))) == pytest.approx(0)
    assert mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(1 - 0.8112781, abs=1e-6)
    table = np.arange(16.0).reshape(1, 16)
    assert top_share(table) == pytest.approx((15 + 14) / 120)


def test_chance_has_no_diagonal_and_the_margins_asked_for():
    margin = np.array([5.0, 3, 2, 2, 1])
    table = quasi_independent(margin)
    np.testing.assert_allclose(table.sum(axis=1), margin / margin.sum(), rtol=1e-6)
    np.testing.assert_array_equal(np.diag(table), 0)
    for a, b, c, d in combinations(range(5), 4):  # odds ratios off the diagonal are 1
        assert table[a, c] * table[b, d] == pytest.approx(table[a, d] * table[b, c])


def test_independent_choices_show_no_coactivation_and_companions_do():
    rng = np.random.default_rng(1)
    free = np.stack([rng.choice(8, 2, replace=False, p=np.arange(1, 9) / 36) for _ in range(20_000)])
    assert coactivation_bits(coactivation_pairs(free, 8)) < 0.01
    pairs = 2 * rng.integers(0, 4, (20_000, 1)) + np.array([[0, 1]])  # always 2i with 2i + 1
    counts = coactivation_pairs(pairs, 8)
    # of seven possible partners one is real
    assert coactivation_bits(counts) == pytest.approx(np.log2(7), abs=0.01)
    assert coactivation_lift(counts)[0, 1] == pytest.approx(7, rel=0.05)


def test_lag_overlap_by_hand():
    ids = random_ids(20, 2, 6, 2)
    sequence = np.repeat([0, 1], [12, 8])
    total, squares, pairs = lag_overlap(ids, sequence, 3)
    for lag in (1, 2, 3):
        shares = [
            np.mean([len(set(ids[t, layer]) & set(ids[t + lag, layer])) / 2 for layer in range(2)])
            for t in range(20 - lag)
            if sequence[t] == sequence[t + lag]
        ]
        assert pairs[lag] == len(shares)
        assert total[lag] == pytest.approx(sum(shares))
        assert squares[lag] == pytest.approx(sum(x * x for x in shares))


def test_describe_a_load_leaves_out_what_needs_tokens():
    load = expert_load(RoutingTrace(random_ids(), 8, (0, 1, 2)))
    counts_only = type(load)(load.load_WLE, load.windows, load.layer_ids)
    found = describe(counts_only)
    assert found.mutual_information_M is None
    assert found.to_json()["tokens"] is None
    np.testing.assert_allclose(found.max_over_mean_L, max_over_mean(load.load_LE))


def test_the_control_of_a_copied_layer_is_skew_and_noise_only():
    ids = random_ids(5000, 2, 8, 1)
    ids[:, 1] = ids[:, 0]
    found = describe(RoutingTrace(ids, 8, (0, 1)))
    assert found.mutual_information_M == pytest.approx([entropy(found.load_LE)[0]])
    assert found.control_information_M[0] < 0.02
    assert found.top_share_M == pytest.approx([1.0])
    assert found.control_share_M[0] < 0.2


def spread(values) -> tuple[float, float]:
    return float(np.min(values)), float(np.max(values))


class TestRealRouting:
    """The ranges that the data's own description gives, from its independent measurement.

    One of its four DeepSeek-V2-Lite tasks is not in the file: those ranges bound ours; FLAME's are complete.
    """

    def test_flame(self, data_dir):
        found = describe(read_trace(data_dir / "routing/flame_moe_290m_sample_routing.npz", domain="prefill"))
        assert spread(found.max_over_mean_L) == pytest.approx((1.4, 1.9), abs=0.05)
        assert spread(found.contiguous_ep8_L) == pytest.approx((1.1, 1.2), abs=0.05)
        assert spread(found.top_share_M) == pytest.approx((0.26, 0.48), abs=0.005)
        assert found.control_share_M == pytest.approx(np.full(7, 0.19), abs=0.012)
        assert spread(found.mutual_information_M) == pytest.approx((0.20, 0.92), abs=0.005)

    def test_one_task(self, data_dir):
        path = data_dir / "routing/deepseek_v2_lite_esft.npz"
        tasks = [describe(read_trace(path, domain=name)) for name in ("intent", "law", "summary")]
        skew = spread([t.max_over_mean_L for t in tasks])
        assert skew[0] == pytest.approx(1.9, abs=0.06)
        assert 6.5 < skew[1] < 7.75
        ranks = spread([t.contiguous_ep8_L for t in tasks])
        assert ranks == pytest.approx((1.1, 2.3), abs=0.05)
        share = spread([t.top_share_M for t in tasks])
        assert share[0] == pytest.approx(0.39, abs=0.005)
        assert 0.6 < share[1] < 0.675
        control = spread([t.control_share_M for t in tasks])
        assert control[0] == pytest.approx(0.19, abs=0.005)
        assert control[1] < 0.555
        assert spread([t.mutual_information_M for t in tasks]) == pytest.approx((0.41, 1.11), abs=0.012)

    def test_tasks_mixed(self, data_dir):
        found = describe(read_trace(data_dir / "routing/deepseek_v2_lite_esft.npz"))
        assert found.windows == ("intent", "law", "summary")
        assert spread(found.max_over_mean_L) == pytest.approx((1.9, 3.4), abs=0.1)
        assert spread(found.contiguous_ep8_L) == pytest.approx((1.1, 1.5), abs=0.05)
        assert spread(found.top_share_M) == pytest.approx((0.39, 0.51), abs=0.02)
        assert spread(found.control_share_M) == pytest.approx((0.22, 0.29), abs=0.02)
        assert spread(found.mutual_information_M) == pytest.approx((0.41, 0.83), abs=0.09)
        apart = found.cosine_WW[np.triu_indices(3, 1)]
        assert ((apart > 0.585) & (apart < 0.735)).all()

    def test_olmoe_and_mixtral_counts(self, data_dir):
        with np.load(data_dir / "routing/olmoe_mixtral_expert_counts.npz") as counts:
            assert spread(max_over_mean(counts["olmoe__expert_counts__c4"])) == pytest.approx((2.5, 3.0), abs=0.05)
            arxiv = max_over_mean(counts["olmoe__expert_counts__arxiv"])
            assert spread(arxiv) == pytest.approx((6.3, 7.8), abs=0.05)
            names = [n for n in counts.files if n.startswith("mistral__expert_counts__")]
            skew = spread([max_over_mean(counts[n]) for n in names])
            assert skew[0] == pytest.approx(1.1, abs=0.05)


def test_weights_of_pairs_are_those_of_going_through_every_token():
    rng = np.random.default_rng(3)
    experts_TK, weight_T = rng.integers(-1, 6, (200, 4)).astype(np.int8), rng.random(200)
    expected = np.zeros((6, 6))
    for row, weight in zip(experts_TK.tolist(), weight_T, strict=True):
        own = sorted({e for e in row if e >= 0})
        expected[np.ix_(own, own)] += weight
    np.testing.assert_allclose(weighted_pairs(experts_TK, weight_T, 6), expected)
