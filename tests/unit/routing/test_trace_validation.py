from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.routing.io import read_trace
from moeplan.routing.loads import expert_load
from moeplan.routing.synthesis import synthesise
from moeplan.routing.targets import SynthSpec
from moeplan.routing.validation import validate


@pytest.fixture(scope="module")
def sound() -> RoutingTrace:
    spec = SynthSpec(tokens=3000, layers=5, experts=32, top_k=4, max_over_mean=2.0, dependency=0.6, seed=3)
    return synthesise(spec)


def codes(trace: RoutingTrace) -> list[str]:
    return [finding.code for finding in validate(trace)]


def test_a_sound_trace_has_no_findings(sound):
    assert codes(sound) == []


def test_a_shifted_layer(sound):
    ids = sound.experts_TLK.copy()
    ids[:, 3:] = np.roll(ids[:, 3:], 2, axis=0)
    (finding,) = validate(replace(sound, experts_TLK=ids))
    assert (finding.code, finding.severity) == ("misaligned-layers", "error")
    assert finding.evidence["layers"] == [2, 3]
    assert finding.evidence["shift"] == 2


def test_a_repeated_layer(sound):
    ids = sound.experts_TLK.copy()
    ids[:, 4] = ids[:, 1, ::-1]
    found = [f for f in validate(replace(sound, experts_TLK=ids)) if f.code == "repeated-layers"]
    assert [f.evidence["layers"] for f in found] == [[1, 4]]


@pytest.mark.parametrize("ways", [4, 7])
def test_interleaved_sequences(sound, ways):
    tokens = 3000 // ways * ways
    order = np.arange(tokens).reshape(ways, -1).T.reshape(-1)
    mixed = replace(
        sound, experts_TLK=sound.experts_TLK[order], seq_lens_S=None, phase_T=None, domain_T=None, domains=()
    )
    (finding,) = validate(mixed)
    assert (finding.code, finding.severity) == ("interleaved-sequences", "warning")
    assert finding.evidence["lag"] == ways


def test_an_expert_twice_in_a_token(sound):
    ids = sound.experts_TLK.copy()
    ids[7, 2, 1] = ids[7, 2, 0]
    (finding,) = validate(replace(sound, experts_TLK=ids))
    assert (finding.code, finding.severity) == ("duplicate-experts", "error")
    assert finding.evidence == {"count": 1, "layer": 2, "token": 7}


def test_a_layer_that_was_not_written(sound):
    ids = sound.experts_TLK.copy()
    ids[:, 1] = [0, 1, 2, 3]
    assert "constant-layer" in codes(replace(sound, experts_TLK=ids))


def test_the_same_sequences_twice(sound):
    ids = np.concatenate([sound.experts_TLK[:500]] * 2)
    twice = RoutingTrace(ids, 32, sound.layer_ids, seq_lens_S=np.array([300, 200, 300, 200]))
    found = [f for f in validate(twice) if f.code == "repeated-sequences"]
    assert [f.evidence for f in found] == [{"sequences": 2, "tokens": 500}]


def test_padding_few_tokens_and_inferred_experts(sound):
    few = replace(sound.tokens(slice(0, 20)), dropped_padding=5, origin={"num_experts_from": "highest id"})
    assert {"padding", "few-tokens", "experts-inferred"} <= set(codes(few))


def test_counts_of_unequal_layers_and_unused_experts(sound):
    load = expert_load(sound)
    counts = load.load_WLE.copy()
    counts[0, 1] *= 2
    counts[0, 2, 5] = 0
    found = validate(replace(load, load_WLE=counts, trace=None))
    assert [f.code for f in found] == ["unused-experts", "unequal-layers"]
    assert found[1].evidence["layers"][0] == 1


def test_real_traces(data_dir):
    lite = read_trace(data_dir / "routing/deepseek_v2_lite_esft.npz", domain="law")
    assert codes(lite) == []
    # stored position by position: eight sequences of 256 tokens side by side
    flame = read_trace(data_dir / "routing/flame_moe_290m_sample_routing.npz", domain="prefill")
    (finding,) = validate(flame)
    assert (finding.code, finding.evidence["lag"]) == ("interleaved-sequences", 8)
