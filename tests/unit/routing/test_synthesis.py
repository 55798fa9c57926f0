"""What comes out of the generator is what was asked for, measured by statistics that are tested by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import SpecError
from moeplan.routing.choice import choose
from moeplan.routing.io import read_trace
from moeplan.routing.loads import expert_load
from moeplan.routing.popularity import block_transitions, lognormal_profile, profile_for, solve, zipf_profile
from moeplan.routing.statistics import cosine_drift, describe, max_over_mean, variation_drift
from moeplan.routing.synthesis import synthesise
from moeplan.routing.targets import SynthSpec, targets_like, targets_of
from moeplan.routing.validation import validate

SMALL = {"tokens": 3000, "layers": 4, "experts": 32, "top_k": 4, "seed": 5}


def made(**options) -> RoutingTrace:
    return synthesise(SynthSpec(**(SMALL | options)))


def test_skew_coactivation_and_dependency_together():
    found = describe(made(max_over_mean=3.0, coactivation=0.6, dependency=0.5))
    np.testing.assert_allclose(found.max_over_mean_L, 3.0, rtol=0.04)
    np.testing.assert_allclose(found.coactivation_bits_L, 0.6, rtol=0.12)
    np.testing.assert_allclose(found.mutual_information_M, 0.5, rtol=0.1)


def test_without_structure_asked_there_is_none():
    found = describe(made(max_over_mean=2.0))
    # what is left is the estimate's own bias, (E-1)^2 / (2 N ln 2) for N pairs
    bias = 31**2 / (2 * np.log(2) * 3000 * 16)
    assert found.mutual_information_M.max() < 2 * bias
    assert found.coactivation_bits_L.max() < 3 * bias


def test_dependency_alone_brings_the_coactivation_it_needs():
    found = describe(made(dependency=0.8))
    np.testing.assert_allclose(found.mutual_information_M, 0.8, rtol=0.1)


def test_loads_of_each_layer_are_met_within_sampling_error():
    spec = SynthSpec(**SMALL, max_over_mean=(1.2, 2.0, 3.0, 4.0), coactivation=0.5, dependency=0.4)
    wanted = targets_of(spec).load_DWLE[0, 0] / 32 * 3000 * 4
    got = expert_load(synthesise(spec)).load_LE
    assert (np.abs(got - wanted) < 1.5 + np.sqrt(wanted)).all()
    np.testing.assert_allclose(max_over_mean(got), [1.2, 2.0, 3.0, 4.0], rtol=0.04)


def test_one_expert_twenty_times_the_mean():
    trace = made(layers=3, experts=128, top_k=4, skew=0.5, hot=20.0, hot_layer=1)
    skew = max_over_mean(expert_load(trace).load_LE)
    assert skew[1] == pytest.approx(20, rel=0.03)
    assert skew[[0, 2]].max() < 6


def test_domains_keep_their_skew_and_differ_as_asked():
    trace = made(max_over_mean=4.0, domains=("law", "code", "chat"), domain_cosine=0.7)
    load = expert_load(trace, "domain")
    assert load.windows == ("law", "code", "chat")
    np.testing.assert_allclose(max_over_mean(load.load_WLE), 4.0, rtol=0.06)
    similar = cosine_drift(load.load_WLE)[np.triu_indices(3, 1)]
    assert similar.mean() == pytest.approx(0.7, abs=0.02)


def test_loads_drift_over_time():
    load = expert_load(made(max_over_mean=4.0, windows=3, drift_cosine=0.75), "time:3")
    similar = cosine_drift(load.load_WLE)
    assert similar[0, 2] == pytest.approx(0.75, abs=0.03)
    assert similar[0, 1] > similar[0, 2] + 0.05
    assert similar[1, 2] > similar[0, 2] + 0.05


@pytest.mark.parametrize("phase", ["decode", "mix"])
def test_phases_stand_as_recorders_write_them(phase):
    """The tokens of prefill in another order: prompts whole, then steps of one token per sequence."""
    options = {"tokens": 1200, "domains": ("a", "b"), "windows": 2, "dependency": 0.4, "persistence": 0.9,
               "source_ranks": 2, "source_affinity": 0.5}  # fmt: skip
    plain, trace = made(**options), made(**options, phase=phase)
    ends_S = np.cumsum(plain.seq_lens_S)
    sequences = list(zip(ends_S - plain.seq_lens_S, ends_S, strict=True))
    order, lens, phases = [], [], []
    for stretch in range(4):  # of 300 tokens: two windows of two domains
        mine = [(a, b, a if phase == "decode" else a + (b - a + 1) // 2) for a, b in sequences if a // 300 == stretch]
        for a, _, cut in mine:
            order += range(a, cut)
            lens += [cut - a] if cut > a else []
            phases += [0] * (cut - a)
        for step in range(300):
            order += [cut + step for _, b, cut in mine if cut + step < b]
        lens += [1] * (len(order) - sum(lens))
        phases += [1] * (len(order) - len(phases))
    assert len(order) == 1200
    np.testing.assert_array_equal(trace.experts_TLK, plain.experts_TLK[order])
    np.testing.assert_array_equal(trace.source_rank_T, plain.source_rank_T[order])
    np.testing.assert_array_equal(trace.domain_T, plain.domain_T[order])
    assert (trace.seq_lens_S.tolist(), trace.phase_T.tolist()) == (lens, phases)
    assert not [finding for finding in validate(trace) if finding.code == "interleaved-sequences"]


def test_group_limited_choices():
    trace = made(experts=32, n_group=8, topk_group=2, dependency=0.3)
    groups_per_token = [len({e // 4 for e in row}) for row in trace.experts_TLK[:, 1].tolist()]
    assert max(groups_per_token) == 2


def test_source_ranks_prefer_experts_of_their_own():
    near = expert_load(made(dependency=0.5, source_ranks=4, source_affinity=0.9)).source_SLE
    far = expert_load(made(dependency=0.5, source_ranks=4, source_affinity=0.0)).source_SLE
    assert near.shape == (4, 4, 32)
    assert variation_drift(near)[0, 1:].min() > 2 * variation_drift(far)[0, 1:].max()


@given(st.integers(0, 2**16), st.integers(2, 300), st.sampled_from([(8, 1), (16, 4), (24, 3)]))
@settings(max_examples=15, deadline=None)
def test_any_trace_is_valid_and_the_same_again(seed, tokens, shape):
    options = {"tokens": tokens, "layers": 2, "experts": shape[0], "top_k": shape[1], "seed": seed}
    spec = SynthSpec(**options, skew=0.3, dependency=0.3, sequence_length=20)
    trace, again = synthesise(spec), synthesise(spec)
    np.testing.assert_array_equal(trace.experts_TLK, again.experts_TLK)
    assert int(trace.seq_lens_S.sum()) == tokens
    ordered = np.sort(trace.experts_TLK, axis=2)
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    assert trace.origin["synthetic"] is True


def test_more_tokens_than_are_fitted(monkeypatch):
    monkeypatch.setattr("moeplan.routing.synthesis._FIT_SELECTIONS", 2048 * 32)
    found = describe(made(tokens=7000, max_over_mean=2.0, dependency=0.5))
    np.testing.assert_allclose(found.max_over_mean_L, 2.0, rtol=0.12)
    np.testing.assert_allclose(found.mutual_information_M, 0.5, rtol=0.12)


def test_like_another_trace():
    source = made(
        tokens=4000, max_over_mean=(1.5, 3.0, 2.0, 4.0), dependency=0.6, domains=("a", "b"), domain_cosine=0.8
    )
    spec = SynthSpec(**(SMALL | {"tokens": 4000, "seed": 99}), domains=("a", "b"))
    a, b = describe(source), describe(synthesise(spec, targets_like(source)))
    np.testing.assert_allclose(b.load_LE, a.load_LE, atol=8 + 0.1 * a.load_LE.max())
    np.testing.assert_allclose(b.max_over_mean_L, a.max_over_mean_L, rtol=0.06)
    np.testing.assert_allclose(b.mutual_information_M, a.mutual_information_M, rtol=0.1)
    np.testing.assert_allclose(b.cosine_WW, a.cosine_WW, atol=0.03)


def test_like_a_real_trace(data_dir):
    source = read_trace(data_dir / "routing/flame_moe_290m_sample_routing.npz", domain="prefill")
    spec = SynthSpec(tokens=source.num_tokens, layers=8, experts=64, top_k=6, seed=1)
    a, b = describe(source), describe(synthesise(spec, targets_like(source)))
    np.testing.assert_allclose(b.max_over_mean_L, a.max_over_mean_L, rtol=0.04)
    np.testing.assert_allclose(b.mutual_information_M, a.mutual_information_M, rtol=0.1)
    np.testing.assert_allclose(b.coactivation_bits_L, a.coactivation_bits_L, rtol=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_over_mean": 9.0}, r"load max/mean \(9\) is over experts / top_k \(8\)"),
        ({"max_over_mean": 0.5}, r"max_over_mean \(0.5\) must be at least 1"),
        ({"skew": float("nan")}, r"skew \(nan\): must be a finite number"),
        ({"hot": 8.0}, r"hot \(8.0\) must be at most 0.98 \* experts / top_k"),
        ({"skew": 1.0, "max_over_mean": 2.0}, "two ways to say one thing"),
        ({"top_k": 32}, r"top_k \(32\) must be below experts \(32\)"),
        ({"n_group": 5}, r"n_group \(5\) must divide experts \(32\)"),
        ({"n_group": 16, "topk_group": 1}, "hold fewer experts than top_k"),
        (
            {"max_over_mean": 1.5, "domains": ("a", "b"), "domain_cosine": 0.5},
            "domain_cosine .* more skew",
        ),
        ({"max_over_mean": (1.0, 2.0)}, "max_over_mean has 2 entries, layers is 4"),
        ({"tokens": 2, "windows": 3}, "fewer than domains x windows"),
        ({"skew": 0.2, "hot": 1.01}, r"hot \(1.01\) is below the next expert's load"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_cannot_be_had_is_refused(options, message):
    with pytest.raises(SpecError, match=message):
        synthesise(SynthSpec.parse(SMALL | options, "synth"))


def test_targets_of_another_shape_are_refused():
    with pytest.raises(SpecError, match="targets have 4 layers x 32 experts, the spec 3 x 32"):
        synthesise(SynthSpec(**(SMALL | {"layers": 3})), targets_of(SynthSpec(**SMALL)))


def test_choices_follow_the_weights():
    """One draw of one expert is in proportion to its weight; the topic's weigh ``boost`` times as much."""
    rng = np.random.default_rng(0)
    weights = np.array([[1.0, 2.0, 3.0, 4.0]])
    noise = rng.standard_exponential((200_000, 4), dtype=np.float32)
    zeros = np.zeros(200_000, np.int64)
    chosen = choose(noise, weights, zeros, zeros, np.array([0, 1, 0, 1]), 5.0, 1, 1, 1)
    shares = np.bincount(chosen[:, 0], minlength=4) / 200_000
    np.testing.assert_allclose(shares, np.array([5, 2, 15, 4]) / 26, atol=0.004)


def test_choices_are_the_smallest_keys_in_order():
    noise = np.random.default_rng(1).standard_exponential((50, 12), dtype=np.float32)
    zeros = np.zeros(50, np.int64)
    chosen = choose(noise, np.ones((1, 12)), zeros, zeros, np.zeros(12, np.int64), 1.0, 1, 1, 5)
    np.testing.assert_array_equal(chosen, noise.argsort(axis=1)[:, :5])


def test_profiles():
    np.testing.assert_allclose(zipf_profile(4, 1.0) / zipf_profile(4, 1.0)[0], [1, 1 / 2, 1 / 3, 1 / 4])
    middle = np.log(lognormal_profile(1001, 0.7))
    assert middle.std() == pytest.approx(0.7, rel=0.01)
    for kind in ("lognormal", "zipf"):
        profile = profile_for(64, 6, kind, None, 5.0)
        assert profile[0] == pytest.approx(5.0, rel=1e-3)
        assert profile.mean() == pytest.approx(1.0)


def test_solve_finds_the_place_with_and_without_a_guess():
    for guess in (None, 0.1, 2.7, 9.0):
        assert solve(lambda x: x**3, 0.0, 9.0, 20.0, 1e-3, guess) == pytest.approx(20 ** (1 / 3), abs=1e-3)
    assert solve(lambda x: x, 0.0, 1.0, 5.0, 1e-3) == 1.0
    assert solve(lambda x: x, 0.0, 1.0, -5.0, 1e-3, 0.9) == 0.0


@pytest.mark.parametrize("kind", ["lognormal", "zipf"])
def test_block_transitions_carry_the_loads_and_the_affinity(kind):
    load, tables = block_transitions(4, 32, 0.6, 0.5, np.random.default_rng(0), kind=kind, tokens=1000)
    np.testing.assert_allclose(load.sum(axis=1), 1000)
    np.testing.assert_allclose(tables.sum(axis=2), load[:-1], rtol=1e-3)
    np.testing.assert_allclose(tables.sum(axis=1), load[1:], rtol=1e-6)
    free = block_transitions(4, 32, 0.6, 0.0, np.random.default_rng(0), kind=kind, noise=0.0)
    np.testing.assert_allclose(free[1][0], np.outer(free[0][0], free[0][1]), rtol=1e-9)
    blocks = block_transitions(4, 32, 0.0, 1.0, np.random.default_rng(0), noise=0.0)[1][0]
    assert ((blocks > 1e-12).sum(axis=1) == 8).all()  # all mass stays within the topic's 8 experts


def test_block_transitions_refuse_what_makes_no_sense():
    rng = np.random.default_rng(0)
    with pytest.raises(SpecError, match=r"affinity \(1.5\) must lie within 0..1"):
        block_transitions(2, 8, 0.5, 1.5, rng)
    with pytest.raises(SpecError, match="must be 'lognormal' or 'zipf'"):
        block_transitions(2, 8, 0.5, 0.5, rng, kind="pareto")
