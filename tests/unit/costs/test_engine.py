"""Passes of a serving engine: by hand from a small made-up profile, and sane where only the roofline answers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.costs.engine import EngineCosts, EngineSetup
from moeplan.costs.fastest import FastestTable
from moeplan.costs.served import CALIBRATED, ServedPool, kv_capacity_tokens, pass_times, served
from moeplan.errors import InputError
from moeplan.specs.attention_layers import attention_layers
from moeplan.specs.clusters import find_accelerator
from moeplan.specs.models import find_model

META = ProfileMeta(name="made up", accelerator="H200", date="", command="")
EMPTY = HardwareProfile(META, {})


def engine(**changes: object) -> EngineCosts:
    setup = {"model": find_model("deepseek-v3"), "accelerator": find_accelerator("h200"), "backend": "sglang", "tp": 8}
    return EngineCosts(EngineSetup(**{**setup, **changes}), EMPTY)  # type: ignore[arg-type]


def gemm_rows(kernel: str, us: list[float]) -> pa.Table:
    n = len(us)
    return pa.table(
        {
            "m": [1, 10, 100][:n],
            "n": [64] * n,
            "k": [64] * n,
            "dtype": ["bf16"] * n,
            "backend": ["sglang"] * n,
            "kernel": [kernel] * n,
            "source": ["made up"] * n,
            "latency_us": us,
        }
    )


def test_the_fastest_kernel_answers_at_each_point() -> None:
    rows = pa.concat_tables([gemm_rows("steady", [10.0, 10.0, 10.0]), gemm_rows("growing", [1.0, 10.0, 100.0])])
    profile = HardwareProfile(META, {"gemm": rows})

    def law(coords: np.ndarray) -> np.ndarray:
        return np.ones(len(coords))

    axes, names = ("m", "n", "k"), {"dtype": "bf16"}
    table = FastestTable(profile, "gemm", axes, names, law, "made up", ({"backend": "vllm"}, {"backend": "sglang"}))
    assert table.measured
    assert table.source == "growing, steady"
    np.testing.assert_allclose(table.seconds(np.array([1.0, 10, 100]), 64, 64), [1e-6, 10e-6, 10e-6], rtol=1e-6)
    nothing = FastestTable(profile, "gemm", axes, {"dtype": "fp8"}, law, "made up")
    assert not nothing.measured
    assert nothing.seconds(3.0, 1.0, 1.0) == pytest.approx(1.0)


def test_decode_grows_with_batch_and_cache_and_shrinks_with_width() -> None:
    batch, context = np.array([[1.0], [8.0], [64.0]]), np.array([[1000.0, 8000.0]])
    seconds = engine().decode_s(batch, context)
    assert (np.diff(seconds, axis=0) > 0).all()
    assert (np.diff(seconds, axis=1) > 0).all()
    assert (engine(tp=4).decode_s(64.0, 1000.0) > engine(tp=8).decode_s(64.0, 1000.0)).all()


def test_a_decode_step_reads_at_least_the_weights_it_uses() -> None:
    # 512 sequences hit all 256 experts: no faster than reading every expert and dense weight once at full bandwidth.
    model = find_model("deepseek-v3")
    seconds = engine().decode_s(512.0, 1000.0).item()
    assert seconds >= model.total_parameters / 8 / find_accelerator("h200").memory_bandwidth


def test_prefill_of_one_prompt_keeps_other_groups_idle() -> None:
    wide = engine(tp=1, dp=8, ep=8)
    one, eight, nine = wide.prefill_s(np.array([1.0, 8.0, 9.0]), 1000.0)
    assert one < eight < nine
    assert eight < 8 * one


def test_drafts_make_a_step_longer_but_less_than_in_proportion() -> None:
    plain, drafted = (engine(draft_tokens=k).decode_s(4.0, 1000.0).item() for k in (0, 3))
    assert plain < drafted < 4 * plain


@pytest.mark.parametrize("name", ["gpt-oss-120b", "qwen3.5-397b-a17b", "glm-5", "kimi-k2", "minimax-m2"])
def test_every_layer_has_an_attention(name: str) -> None:
    model = find_model(name)
    assert sum(part.count for part in attention_layers(model)) == model.num_layers
    costs = engine(model=model, tp=2)
    assert np.isfinite(costs.decode_s(np.array([1.0, 32.0]), 4000.0)).all()
    assert (costs.prefill_s(1.0, np.array([1000.0, 4000.0])) > 0).all()


def test_windows_stop_the_growth_with_context() -> None:
    model = find_model("gpt-oss-120b")
    windowed, full = attention_layers(model)
    assert (windowed.count, full.count, windowed.window) == (18, 18, 128)
    costs = engine(model=model, tp=1)
    at = np.array([1000.0, 64_000.0])
    assert np.ptp(costs._attention(windowed, True, np.array(64.0), at)) == pytest.approx(0, abs=1e-12)
    assert np.ptp(costs._attention(full, True, np.array(64.0), at)) > 1e-4


def test_cache_beside_the_weights_by_hand() -> None:
    model, device = find_model("deepseek-v3"), find_accelerator("h200")
    setup = EngineSetup(model, device, "sglang", tp=8)
    experts = 58 * 256 * 3 * 7168 * 2048 / 8
    free = 0.9 * device.memory - experts - model.non_expert_parameters / 8
    assert kv_capacity_tokens(setup, 0.9) == pytest.approx(free / (61 * (512 + 64) * 2))
    with pytest.raises(InputError, match=r"weights of DeepSeek-V3 .* exceed 90%"):
        kv_capacity_tokens(EngineSetup(model, device, "sglang", tp=2), 0.9)


def test_served_latencies_hold_their_parts() -> None:
    costs = engine()
    times = pass_times(costs, costs, 1024, 256)
    one = served(times, ServedPool(costs.setup), None, CALIBRATED, 1024, 256, 1)
    many = served(times, ServedPool(costs.setup), None, CALIBRATED, 1024, 256, 32)
    step = costs.decode_s(1.0, 0.9 * 1024 + 0.45 * 256).item() + CALIBRATED.step_s["sglang"]
    assert one.tpot_mean_s == pytest.approx(step, rel=0.02)
    assert many.tpot_mean_s > one.tpot_mean_s
    assert many.ttft_mean_s > one.ttft_mean_s
    with pytest.raises(InputError, match="is below one request's"):
        served(times, ServedPool(costs.setup), None, CALIBRATED, 2_000_000, 256, 1)
