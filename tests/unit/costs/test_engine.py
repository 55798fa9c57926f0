"""Passes of a serving engine: by hand from a small made-up profile, and sane where only the roofline answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.costs.dense import DenseCosts
from moeplan.costs.engine import EngineCosts, EngineSetup
from moeplan.costs.fastest import FastestTable
from moeplan.costs.frameworks import framework_that_serves
from moeplan.costs.served import CALIBRATED, ServedPool, kv_capacity_tokens, pass_times, served
from moeplan.errors import InputError
from moeplan.specs.attention_layers import attention_layers
from moeplan.specs.clusters import find_accelerator
from moeplan.specs.model import DTYPE_BYTES
from moeplan.specs.models import find_model

META = ProfileMeta(name="made up", accelerator="H200", date="", command="")
EMPTY = HardwareProfile(META, {})


def engine(**changes: object) -> EngineCosts:
    setup = {"model": find_model("deepseek-v3"), "accelerator": find_accelerator("h200"), "backend": "sglang", "tp": 8}
    return EngineCosts(EngineSetup(**{**setup, **changes}), EMPTY)  # type: ignore[arg-type]


def gemm_rows(kernel: str, us: list[float], dtype: str = "bf16", backend: str = "sglang") -> pa.Table:
    n = len(us)
    return pa.table(
        {
            "m": [1, 10, 100][:n],
            "n": [64] * n,
            "k": [64] * n,
            "dtype": [dtype] * n,
            "backend": [backend] * n,
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


def test_products_take_block_scaled_rows_of_the_framework_that_timed_kernels() -> None:
    device = find_accelerator("h200")
    blocks = {"sglang": 10.0, "trtllm": 12.0, "vllm": 175.0}  # vLLM's with the host's work
    tables = [gemm_rows("block", [us, us, us], "fp8_block", name) for name, us in blocks.items()]
    tensors = [gemm_rows("tensor", [5.0, 5.0, 5.0], "fp8", name) for name in blocks]
    both = HardwareProfile(META, {"gemm": pa.concat_tables(tables + tensors)})
    for backend, us in (("sglang", 10.0), ("trtllm", 12.0), ("vllm", 10.0), ("other", 10.0), (None, 10.0)):
        product = DenseCosts(device, "fp8", both, backend).product(10.0, 64, 64)
        assert product.value.item() == pytest.approx(us * 1e-6)
    alone = HardwareProfile(META, {"gemm": pa.concat_tables(tensors)})
    assert DenseCosts(device, "fp8", alone, "vllm").product(10.0, 64, 64).value.item() == pytest.approx(5e-6)
    assert DenseCosts(device, "bf16", both, "vllm").product(10.0, 64, 64).extrapolated


def test_a_framework_whose_rows_time_something_else_gives_way_to_the_fastest() -> None:
    tables = [gemm_rows("k", us, "bf16", name) for name, us in (("one", [1.0, 9.0]), ("two", [2.0, 3.0, 4.0]))]
    rows = pa.concat_tables(tables)  # shared points: 1 against 2, 9 against 3
    axes = ("m", "n", "k")
    assert framework_that_serves(rows, axes, "one", 2.0) == "one"  # in the median of 1 and 3
    assert framework_that_serves(rows, axes, "one", 1.9) == "two"
    assert framework_that_serves(rows, axes, "two", 1.6) == "two"
    assert framework_that_serves(rows, axes, "neither", 9.0) == framework_that_serves(rows, axes, None, 9.0) == "two"
    assert framework_that_serves(rows.slice(0, 0), axes, "one", 2.0) is None


def attention_rows(phase: str, backend: str, us: float, scope: str = "kernel", kv_dtype: str = "bf16") -> pa.Table:
    """Two contexts of one sequence of latent attention, ``us`` per thousand tokens."""
    names = {"kind": "mla", "phase": phase, "scope": scope, "heads": 16, "kv_heads": 1, "head_dim": 128, "batch": 1}
    names |= {"dtype": "bf16", "kv_dtype": kv_dtype, "gemm_dtype": "bf16", "direction": "forward", "window": 0}
    names |= {"query_tokens": 1, "backend": backend, "kernel": "k", "source": "made up"}
    contexts = (256, 4096)
    return pa.Table.from_pylist([names | {"context_tokens": c, "latency_us": us * c / 1000} for c in contexts])


def test_absorbed_products_timed_in_prefill_give_way_to_what_servers_run() -> None:
    at = np.array(1.0), np.array(4096.0)
    for phase, own, us in (("prefill", 250.0, 100.0), ("prefill", 150.0, 150.0), ("decode", 150.0, 150.0)):
        tables = [attention_rows(phase, "sglang", own), attention_rows(phase, "trtllm", 100.0)]
        profile = HardwareProfile(META, {"attention": pa.concat_tables(tables)})
        costs = EngineCosts(engine(attention_dtype="bf16").setup, profile)
        kernel = costs._kernels(costs._layers[0], phase == "decode").kernel(*at)
        assert kernel.value.item() == pytest.approx(us * 4.096e-6)


def test_attention_of_a_shape_that_the_fastest_framework_lacks_is_anothers() -> None:
    tables = [attention_rows("decode", "fast", 100.0), attention_rows("decode", "slow", 300.0)]
    tables.append(attention_rows("decode", "slow", 200.0, kv_dtype="fp8"))
    profile = HardwareProfile(META, {"attention": pa.concat_tables(tables)})
    for backend in ("slow", "fast", "other"):
        for kv_dtype, us in (("bf16", 100.0), ("fp8", 200.0)):
            setup = engine(attention_dtype="bf16", kv_dtype=kv_dtype, backend=backend).setup
            costs = EngineCosts(setup, profile)
            kernel = costs._kernels(costs._layers[0], True).kernel(np.array(1.0), np.array(4096.0))
            assert kernel.value.item() == pytest.approx(us * 4.096e-6)


def test_a_block_of_attention_serves_unless_its_host_was_timed() -> None:
    few = np.array(1.0), np.array(256.0)
    for phase in ("decode", "prefill"):
        bare = EngineCosts(engine(attention_dtype="bf16").setup, EMPTY)
        part = bare._layers[0]
        parts = bare._kernel_and_products(part, phase == "decode", *few).item()
        for slower in (1.4, 1.6):
            block = attention_rows(phase, "sglang", slower * parts * 1e9 / 256, "module")
            costs = EngineCosts(bare.setup, HardwareProfile(META, {"attention": block}))
            took = costs._attention(part, phase == "decode", *few).item()
            assert took == pytest.approx(parts * (slower if slower < 1.5 else 1.0))


def test_activations_are_scaled_before_products_in_few_bits() -> None:
    tokens = np.array([1.0, 65536.0])
    device = find_accelerator("b200")
    cases = (("sglang", "fp8", 1), ("sglang", "bf16", 0), ("sglang", "fp4", 1), ("trtllm", "fp4", 0))
    for backend, dtype, scaled in cases:
        costs = engine(accelerator=device, backend=backend, dense_dtype=dtype)
        products = costs._tables.dense(costs.setup.dense_dtype).ffn(tokens, 7168, 2048 / 8, True).value.sum(-1)
        few, many = costs._ffn(tokens, 2048.0) - products
        assert few == pytest.approx(scaled * 2 * 2e-6)
        moved = 65536 * 7168 * (2 + DTYPE_BYTES[costs.setup.dense_dtype]) / device.memory_bandwidth
        assert scaled * moved <= many <= scaled * 2 * moved


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


def test_a_draft_takes_a_layer_and_the_head() -> None:
    # A vocabulary 100 times as large: a draft takes that much longer too, by the whole product, not by a 61st of it.
    model = find_model("deepseek-v3")
    more = []
    for vocabulary in (1, 100):
        wide = model.model_copy(update={"vocab_size": vocabulary * model.vocab_size})
        plain, drafted = (engine(model=wide, draft_tokens=k).decode_s(1.0, 1000.0).item() for k in (0, 1))
        more.append((plain, drafted - plain))
    assert more[1][1] - more[0][1] > 0.9 * (more[1][0] - more[0][0])


def test_drafts_multiply_products_and_work_but_read_the_cache_once() -> None:
    # Linear attention keeps a state per drafted token, so its recurrence is done once for each.
    for name in ("deepseek-v3", "qwen3.5-397b-a17b"):
        costs = engine(model=find_model(name))
        batch, context = np.array(256.0), np.array(64_000.0)
        for part in attention_layers(find_model(name)):
            one, four = (costs._attention(part, True, batch, context, q) for q in (1.0, 4.0))
            assert one < four < 4.001 * one
    latent = attention_layers(find_model("deepseek-v3"))[0]
    bare = engine(tp=1, dp=8)._bare(latent, True)  # all 128 heads: bound by work from two queries on
    work = 2 * 256 * 128 * 64_000 * (2 * 512 + 64) / find_accelerator("h200").bf16
    assert bare.work(batch, context, 4.0) == pytest.approx(4 * work)


def exchange_rows(mode: str, phases: dict[str, float], ranks: int, dtype: str) -> pa.Table:
    """Two sizes of one all-to-all, ``phases`` with microseconds at one token per rank, ten times at a hundred."""
    rows = [
        {"mode": mode, "phase": phase, "ranks": ranks, "tokens_per_rank": tokens, "latency_us": us}
        for phase, first in phases.items()
        for tokens, us in ((1, first), (100, 10 * first))
    ]
    names = {"hidden": 7168, "top_k": 8, "num_experts": 256, "nodes": 2, "dtype": dtype, "backend": "x", "kernel": "k"}
    names["source"] = "made up"
    return pa.Table.from_pylist([row | names for row in rows])


def test_tokens_sent_take_the_phases_of_the_tables_and_the_fastest_way_is_taken() -> None:
    rack = find_accelerator("gb200")
    two = exchange_rows("nvlink_two_sided", {"prepare": 1.0, "dispatch": 2.0, "combine": 3.0}, 16, "fp8")
    ll = exchange_rows("low_latency", {"dispatch": 5.0, "combine": 7.0}, 16, "fp8")
    profile = HardwareProfile(META, {"alltoall": pa.concat_tables([two, ll])})
    model = find_model("deepseek-v3")

    def costs(accelerator: object, exchange: str) -> EngineCosts:
        setup = EngineSetup(model, accelerator, "trtllm", dp=16, ep=16, exchange=exchange)  # type: ignore[arg-type]
        return EngineCosts(setup, profile)

    every = np.array([16.0, 1600.0])
    np.testing.assert_allclose(costs(rack, "sent")._links.exchange(every, True), [6e-6, 60e-6], rtol=1e-6)
    boxes = costs(find_accelerator("h200"), "sent")
    np.testing.assert_allclose(boxes._links.exchange(every, True), [12e-6, 120e-6], rtol=1e-6)
    gathered = costs(rack, "gathered")._links.exchange(every, True)
    fastest = costs(rack, "fastest")._links.exchange(every, True)
    np.testing.assert_allclose(fastest, np.minimum(gathered, [6e-6, 60e-6]), rtol=1e-6)
    four_bits = EngineSetup(model, rack, "trtllm", dp=16, ep=16, gather_dtype="fp4")
    assert (EngineCosts(four_bits, EMPTY)._links.exchange(every, True) < gathered).all()


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
    whole = 58 * 7168 * 256 + 61 * 7168 * (1536 + 512 + 64)  # routers, down-projections
    free = 0.9 * device.memory - experts - (model.non_expert_parameters - whole) / 8 - whole
    assert kv_capacity_tokens(setup, 0.9, 4096) == pytest.approx(free / (61 * (512 + 64) * 2))
    with pytest.raises(InputError, match=r"weights of DeepSeek-V3 .* exceed 90%"):
        kv_capacity_tokens(EngineSetup(model, device, "sglang", tp=2), 0.9, 4096)


def test_served_latencies_hold_their_parts() -> None:
    costs = engine()
    times = pass_times(costs, costs, 1024, 256)
    one = served(times, ServedPool(costs.setup), None, CALIBRATED, 1024, 256, 1)
    many = served(times, ServedPool(costs.setup), None, CALIBRATED, 1024, 256, 32)
    step = costs.decode_s(1.0, 0.9 * 1024 + 0.45 * 256).item() + 61 * CALIBRATED.layer_gap_s["sglang"]
    assert one.tpot_mean_s == pytest.approx(step, rel=0.02)
    assert many.tpot_mean_s > one.tpot_mean_s
    assert many.ttft_mean_s > one.ttft_mean_s
    late = served(times, ServedPool(costs.setup, first_steps=100.0), None, CALIBRATED, 1024, 256, 1)
    assert late.ttft_mean_s - one.ttft_mean_s == pytest.approx(100 * one.tpot_mean_s)
    new = served(times, ServedPool(costs.setup, late=True), None, CALIBRATED, 1024, 256, 32)
    assert new.ttft_mean_s < many.ttft_mean_s
    few = served(times, ServedPool(costs.setup, max_running=2), None, CALIBRATED, 1024, 256, 32)
    assert few.tpot_mean_s < many.tpot_mean_s
    assert few.ttft_mean_s > 5 * many.ttft_mean_s
    with pytest.raises(InputError, match="is below one request's"):
        served(times, ServedPool(costs.setup), None, CALIBRATED, 2_000_000, 256, 1)


def test_as_many_requests_run_as_the_cache_holds_at_their_mean_length() -> None:
    """Of 64 and 512 tokens at 0.9 of it, an answer half there: 288 tokens, of which windowed layers keep 128."""
    model = find_model("gpt-oss-120b")
    costs = engine(model=model, tp=1)
    setup, times = costs.setup, pass_times(costs, costs, 64, 512)
    per_token = 18 * 8 * 64 * 2 * 2 * (1 + 128 / 288)
    wanted = 6.5 * 288 / setup.dp  # tokens of a group
    share = 0.9 + (wanted - kv_capacity_tokens(setup, 0.9, 288)) * per_token / setup.accelerator.memory
    tight = replace(CALIBRATED, memory_share=share)
    found = served(times, ServedPool(setup), None, tight, 64, 512, 16)
    assert found == served(times, ServedPool(setup, max_running=6), None, CALIBRATED, 64, 512, 16)
    for other in (5, 7):
        assert found != served(times, ServedPool(setup, max_running=other), None, CALIBRATED, 64, 512, 16)


def test_launching_a_prompt_takes_the_host_a_while_however_few_the_tokens() -> None:
    costs = engine()
    times = pass_times(costs, costs, 64, 64)
    waits = []
    for host in (0.0, 5e-3, 10e-3):
        constants = replace(CALIBRATED, launch_s={"sglang": host})
        waits.append(served(times, ServedPool(costs.setup), None, constants, 64, 64, 1).ttft_mean_s)
    assert waits[0] < waits[1]
    assert waits[2] - waits[1] == pytest.approx((1 + CALIBRATED.prompt_latency) * 61 * 5e-3)


def test_a_prompt_of_an_fp8_model_adds_to_its_pass_however_short_it_is() -> None:
    for dtype, adds in (("fp8", 1), ("bf16", 0)):
        costs = engine(expert_dtype=dtype, tp=16)
        times = pass_times(costs, costs, 1024, 64)
        waits = [
            served(times, ServedPool(costs.setup), None, replace(CALIBRATED, fp8_prompt_s={"sglang": s}), 1024, 64, 1)
            for s in (0.0, 1.0)
        ]
        seconds = adds * (1 + CALIBRATED.prompt_latency)
        assert waits[1].ttft_mean_s - waits[0].ttft_mean_s == pytest.approx(seconds, rel=0.05)


def test_every_rank_of_the_worker_that_takes_a_prompt_is_told_of_it() -> None:
    decode, prefill = engine(tp=8), engine(tp=4)
    times = pass_times(decode, prefill, 1024, 64)
    for pool, ranks in ((None, 8), (ServedPool(prefill.setup), 4)):
        waits = [
            served(times, ServedPool(decode.setup), pool, replace(CALIBRATED, rank_s={"sglang": s}), 1024, 64, 1)
            for s in (0.0, 1.0)
        ]
        assert waits[1].ttft_mean_s - waits[0].ttft_mean_s == pytest.approx(ranks - 1)


def test_the_steps_before_a_first_token_are_steps_with_drafts_too() -> None:
    for drafts in (0, 2):
        costs = engine(backend="trtllm", draft_tokens=drafts)
        times = pass_times(costs, costs, 1024, 256)
        none, nine = (
            served(times, ServedPool(costs.setup), None, replace(CALIBRATED, first_steps={"trtllm": n}), 1024, 256, 1)
            for n in (0.0, 9.0)
        )
        tokens = 9 * CALIBRATED.tokens_per_step(drafts)
        assert nine.ttft_mean_s - none.ttft_mean_s == pytest.approx(tokens * nine.tpot_mean_s)


def test_early_latent_attention_takes_longer_as_it_still_does_on_hopper() -> None:
    for device, late, gap in (("b200", False, 1), ("b200", True, 0), ("h200", False, 1), ("h200", True, 1)):
        costs = engine(accelerator=find_accelerator(device), backend="trtllm")
        times = pass_times(costs, costs, 1024, 256)
        free = replace(CALIBRATED, early_latent_gap_s={})
        pool = ServedPool(costs.setup, late=late)
        more, less = (served(times, pool, None, c, 1024, 256, 1).tpot_mean_s for c in (CALIBRATED, free))
        assert more - less == pytest.approx(gap * 61 * CALIBRATED.early_latent_gap_s["trtllm"])


def test_the_host_handles_every_drafted_sequence() -> None:
    costs = engine(draft_tokens=2)
    times = pass_times(costs, costs, 1024, 256)
    free = replace(CALIBRATED, draft_host_s={})
    for lanes in (1, 16):
        more, less = (served(times, ServedPool(costs.setup), None, c, 1024, 256, lanes) for c in (CALIBRATED, free))
        host = lanes * CALIBRATED.draft_host_s["sglang"] / CALIBRATED.tokens_per_step(2)
        assert more.tpot_mean_s - less.tpot_mean_s == pytest.approx(host, rel=0.1)


def test_the_library_asked_for_serves_else_the_fastest() -> None:
    setup = replace(engine(ep=8).setup, tp=8)
    names = {"hidden": 7168, "inter": 2048, "num_experts": 256, "num_slots": 0, "top_k": 8, "ep": 8, "tp": 1}
    names |= {"dtype": "fp8_block", "distribution": "power_law_1.01", "direction": "forward", "scope": "experts"}
    rows = [
        {**names, "tokens": tokens, "backend": "x", "kernel": kernel, "latency_us": us, "source": "made up"}
        for kernel, us in (("deepgemm", 50.0), ("x_flashinfer_trtllm_moe", 80.0))
        for tokens in (1, 16)
    ]
    profile = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows)})
    for library, us in (("", 50.0), ("trtllm", 80.0), ("deepgemm", 50.0), ("cutlass", 50.0)):
        costs = EngineCosts(replace(setup, expert_kernels=library), profile)
        assert costs._experts(np.array(16.0), "decode").item() == pytest.approx(us * 1e-6)


def test_rows_of_a_like_machine_join_a_copy() -> None:
    one, more = (exchange_rows("low_latency", {"dispatch": us}, 8, "fp8") for us in (5.0, 7.0))
    alone = HardwareProfile(META, {"alltoall": one})
    both = alone.with_rows("alltoall", HardwareProfile(META, {"alltoall": more}).select("alltoall"))
    assert both.select("alltoall")["latency_us"].to_pylist() == [5.0, 50.0, 7.0, 70.0]
    assert alone.select("alltoall").num_rows == 2
