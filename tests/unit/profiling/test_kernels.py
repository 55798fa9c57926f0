"""Kernels compute what they say: every one against the plain formula, float64, expert by expert."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from moeplan.errors import SpecError, UnknownNameError

torch = pytest.importorskip("torch", reason="profilers need torch")

from moeplan.profiling.attention import attention_bench, banded_attention
from moeplan.profiling.dense import elementwise_bench, gemm_bench, gemm_shapes, optimizer_bench
from moeplan.profiling.device import Device, find_device
from moeplan.profiling.expert_kernels import make_weights, runner, usable_kernels
from moeplan.profiling.experts import ExpertShape, balanced_vector, expert_bench, skewed_vector
from moeplan.profiling.memory import memory_bench
from moeplan.specs.model import AttentionSpec
from moeplan.specs.models import find_model


@pytest.fixture(scope="module")
def cpu() -> Device:
    return Device("cpu", torch, cache_bytes=1 << 16)


def _plain(x, weights, counts, first):
    """SwiGLU of each expert's rows, one after the other."""
    out, row = [], 0
    for expert, count in enumerate(c for c in counts if c):
        h = x[row : row + count].double() @ weights.w13_EGH[first + expert].double().T
        gate, up = h.chunk(2, -1)
        out.append((gate * torch.sigmoid(gate) * up) @ weights.w2_EHF[first + expert].double().T)
        row += count
    return torch.cat(out)


@pytest.mark.parametrize("kernel", ["grouped_mm", "loop", "bmm"])
@pytest.mark.parametrize(("counts", "first"), [((3, 2, 1, 0, 0), 1), ((2, 2, 2, 2, 2), 0), ((4, 0, 0, 0, 0), 4)])
def test_float_kernels(cpu, kernel, counts, first):
    weights = make_weights(cpu, "fp32", 5, 32, 48)
    if kernel == "bmm" and len({c for c in counts if c}) > 1:
        pytest.skip("bmm pads: its rows are equal by definition")
    x = cpu.normal((sum(counts), 32), torch.float32)
    y = runner(cpu, kernel, "fp32", counts, first)(x, weights)
    assert torch.allclose(y.double(), _plain(x, weights, counts, first), atol=1e-4)


def test_triton_kernel_in_its_interpreter(cpu, monkeypatch):
    """The same values as the plain formula; Triton's interpreter runs the kernel without a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Triton is not installed")
    weights = make_weights(cpu, "fp32", 4, 96, 80)
    counts = (70, 3, 1)  # more rows than one block, fewer than one, and sizes that no block divides
    x = cpu.normal((74, 96), torch.float32)
    y = runner(cpu, "triton", "fp32", counts, 1)(x, weights)
    assert torch.allclose(y.double(), _plain(x, weights, counts, 1), atol=1e-4)


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_triton_is_refused_where_it_is_not_installed():
    with pytest.raises(SpecError, match=r"kernel \(triton\) needs Triton, .* another of grouped_mm, bmm, loop$"):
        usable_kernels("bf16", ["triton"])
    assert usable_kernels("bf16", ["triton", "loop"]) == ["loop"]


def test_what_an_expert_bench_leaves_out_is_said(cpu, monkeypatch):
    """Kernels without code, tokens beyond the memory; what nothing is left of is refused before a weight is made."""
    shape = ExpertShape(128, 128, 4, 2)
    bench = expert_bench(cpu, shape, "int8", ["bmm", "loop"], max_tokens=64)
    assert {series.row(1)["kernel"] for series in bench.series} == {"loop"}
    name = "experts H128 F128 E4 K2"
    assert bench.left_out == (f"{name} int8: kernel (bmm) has no code for dtype (int8); use loop",)
    with pytest.raises(SpecError, match=r"dtype \(int4\): hidden \(128\) and inter \(64\) must divide by 128; leave"):
        expert_bench(cpu, ExpertShape(128, 128, 4, 2, tp=2), "int4", ["loop"])
    monkeypatch.setattr(Device, "available_bytes", 10 * 2**20)
    assert expert_bench(cpu, shape, "fp32", ["loop"], max_tokens=384).left_out == ()
    (said,) = expert_bench(cpu, shape, "fp32", ["loop"], max_tokens=10000).left_out
    assert said == f"{name} fp32: tokens from 385 to 10,000 do not fit into the memory, measured to 384"
    with pytest.raises(SpecError, match=r"weights \(0.0 GiB\) do not fit .* give a larger --ep or --tp"):
        expert_bench(cpu, ExpertShape(512, 512, 4, 2), "fp32", ["loop"])


def test_what_other_benches_shrink_is_said(cpu, monkeypatch):
    monkeypatch.setattr(Device, "available_bytes", 10 * 2**20)
    gqa = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=64)
    bench = attention_bench(cpu, gqa, "fp32", max_tokens=8192)
    assert [said.rsplit(" ", 1)[1] for said in bench.left_out] == ["4,096", "512", "64"]  # decode of 1, 8, 64 sequences
    assert attention_bench(cpu, gqa, "fp32", max_tokens=8).series[0].start[-1] == 8, "no more than was asked for"
    for made, unit in (
        (gemm_bench(cpu, [(128, 128)], "fp32", max_tokens=8192), "tokens"),
        (elementwise_bench(cpu, 128, 128, 4, 2, "fp32", max_tokens=8192), "tokens"),
        (memory_bench(cpu, 2**26), "bytes"),
    ):
        (said,) = made.left_out
        high = made.series[0].high
        assert said.endswith(f"do not fit into the memory, measured to {high:,}")
        assert f": {unit} from {high + 1:,} to " in said


def test_weight_only_int8_against_dequantised_weights(cpu):
    weights = make_weights(cpu, "int8", 3, 64, 128)
    x = cpu.normal((4, 64), torch.bfloat16)
    y = runner(cpu, "loop", "int8", (3, 1, 0), 1)(x, weights)

    class Plain:
        w13_EGH = torch.stack(
            [w.float() * s.float()[:, None] for w, s in zip(weights.w13_EGH, weights.scale13, strict=True)]
        )
        w2_EHF = torch.stack(
            [w.float() * s.float()[:, None] for w, s in zip(weights.w2_EHF, weights.scale2, strict=True)]
        )

    want = _plain(x, Plain, (3, 1, 0), 1)
    assert (y.double() - want).norm() / want.norm() < 0.03


def test_weight_only_int4_runs_and_is_finite(cpu):
    weights = make_weights(cpu, "int4", 2, 128, 256)
    y = runner(cpu, "loop", "int4", (2, 1))(cpu.normal((3, 128), torch.bfloat16), weights)
    assert y.shape == (3, 128)
    assert bool(torch.isfinite(y).all())


def test_types_and_kernels_that_cannot_be_are_refused(cpu):
    with pytest.raises(SpecError, match=r"dtype \(fp8\) needs a GPU of compute capability 8.9.*this device is cpu"):
        cpu.dtype("fp8")
    with pytest.raises(SpecError, match=r"dtype \(fp4\): torch has no fp4 expert kernel"):
        cpu.dtype("fp4")
    with pytest.raises(UnknownNameError, match="dtype 'fp17' is not known; did you mean 'fp16'"):
        cpu.dtype("fp17")
    with pytest.raises(SpecError, match=r"kernel \(bmm\) has no code for dtype \(int8\); use loop"):
        usable_kernels("int8", ["bmm"])
    with pytest.raises(UnknownNameError, match="kernel 'cutlass' is not known"):
        usable_kernels("bf16", ["cutlass"])
    with pytest.raises(SpecError, match=r"inter \(200\) must divide by 128"):
        make_weights(cpu, "int4", 2, 128, 200)
    with pytest.raises(SpecError, match=r"direction \(backward\) is not measured for dtype \(int8\)"):
        expert_bench(cpu, ExpertShape(64, 64, 4, 1), "int8", ["loop"], ["backward"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said():
    with pytest.raises(SpecError, match=r"device \(cuda\): torch .* sees no GPU; use --device cpu"):
        find_device("cuda")


def test_vectors_keep_their_sums():
    shape = ExpertShape(64, 64, 8, 2, ep=2)
    assert balanced_vector(shape, 6) == [2, 2, 1, 1]  # 6 tokens x top-2 over 2 ranks: 6 pairs on 4 experts
    assert balanced_vector(shape, 1) == [1, 0, 0, 0]
    for exponent in (0.8, 1.2):
        vector = skewed_vector(shape, 1000, exponent, seed=3)
        assert vector == sorted(vector, reverse=True)
        assert max(vector) <= 1000
        assert sum(vector) >= 1000 * 2 / 2, "the busiest rank gets at least the mean"
    assert skewed_vector(shape, 1000, 0.8, 3) == skewed_vector(shape, 1000, 0.8, 3)


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(SpecError, match=r"num_experts \(10\) must divide by ep \(4\)"):
        ExpertShape(64, 64, 10, 2, ep=4)
    with pytest.raises(SpecError, match=r"inter \(65\) must divide by tp \(2\)"):
        ExpertShape(64, 65, 8, 2, tp=2)


def _calls(bench, size):
    prepare = bench.open()
    for series in bench.series:
        call = prepare(series, min(size, series.high))
        yield series, [call(i) for i in (-1, 0, 1)]


def test_expert_bench_forward_and_backward_on_every_series(cpu):
    bench = expert_bench(
        cpu, ExpertShape(64, 96, 8, 2, ep=2, tp=2), "fp32", ["grouped_mm", "bmm", "loop"], ["forward", "backward"], 32
    )
    seen = set()
    for series, results in _calls(bench, 4):
        row = series.row(min(4, series.high))
        seen.add((row["kernel"], row["direction"], row["distribution"]))
        vector = [int(n) for n in row["vector"].split()]
        assert len(vector) == 4
        assert (sum(vector), sum(n > 0 for n in vector)) == (row["rank_pairs"], row["active_experts"])
        if row["direction"] == "backward":
            assert [tuple(g.shape) for g in results[0]][1:] == [(4, 96, 64), (4, 64, 48)]
        else:
            assert results[0].shape[1] == 64
    assert ("bmm", "forward", "explicit") in seen
    assert ("grouped_mm", "backward", "balanced") in seen


def test_few_active_experts_are_not_read_from_the_cache(cpu):
    # The layer is far larger than the cache, one expert is not: calls must go from expert to expert.
    small = Device("cpu", torch, cache_bytes=64 * 64 * 3 * 4 * 2)
    bench = expert_bench(small, ExpertShape(64, 64, 16, 1), "fp32", ["loop"], max_tokens=16)
    series = next(s for s in bench.series if "one_token_each" in s.label)
    call = bench.open()(series, 1)
    assert len({tuple(call(i)[0, :4].tolist()) for i in range(4)}) == 4


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v2-lite"])
def test_attention_of_both_kinds(cpu, model):
    given = find_model(model).attention
    assert given is not None
    small = given.model_copy(update={"num_heads": 4, "num_kv_heads": 4 if given.is_mla else 2})
    bench = attention_bench(cpu, small, "fp32", directions=("forward", "backward"), max_tokens=128, windows=(0, 6))
    seen = set()
    for series, results in _calls(bench, 16):
        row = series.row(16)
        seen.add((row["phase"], row.get("window", 0), row["batch"], row["direction"]))
        parts = list(results[0]) if isinstance(results[0], (list, tuple)) else [results[0]]
        queries = 16 if row["phase"] == "prefill" else 1
        assert row["query_tokens"] == queries
        if row["direction"] == "forward":
            assert sum(part.numel() for part in parts) == row["batch"] * 4 * queries * (
                512 if given.is_mla and row["phase"] == "decode" else given.head_dim
            )
        assert all(bool(torch.isfinite(part).all()) for part in parts)
    prefill = {("prefill", w, b, d) for w in (0, 6) for b in (1, 8) for d in ("forward", "backward")}
    assert seen == prefill | {("decode", w, b, "forward") for w in (0, 6) for b in (1, 8, 64)}


def test_gqa_against_written_out_attention(cpu):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8)
    bench = attention_bench(cpu, spec, "fp32", max_tokens=16)
    decode = next(s for s in bench.series if "decode B8" in s.label)
    torch.manual_seed(5)
    call = bench.open()(decode, 16)
    torch.manual_seed(5)
    q, k, v = (cpu.normal(s, torch.float32) for s in ((8, 4, 1, 8), (8, 2, 16, 8), (8, 2, 16, 8)))
    k, v = (part.repeat_interleave(2, 1) for part in (k, v))
    want = ((q @ k.transpose(2, 3)) / 8**0.5).softmax(-1) @ v
    assert torch.allclose(call(0)[0], want, atol=1e-5)


@pytest.mark.parametrize("window", [1, 5, 200])
@pytest.mark.parametrize("group", [1, 3])
def test_a_band_against_a_masked_square(cpu, window, group):
    """One token out of sight, whole blocks, a rest; blocks narrower than the window too. Gradients as well."""
    for tokens in (window + 1, 2 * window, 3 * window + 2, window + 256):
        leaves = [
            cpu.normal(shape, torch.float64).requires_grad_()
            for shape in ((2, 2, tokens, group, 8), (2, 2, tokens, 8), (2, 2, tokens, 4))
        ]
        got = torch.cat(banded_attention(cpu, window, group, torch.float64)(*leaves), 2)
        q_BGTJD, k_BGTD, v_BGTD = leaves
        back_TC = torch.arange(tokens)[:, None] - torch.arange(tokens)
        score = torch.einsum("bgtjd,bgcd->bgjtc", q_BGTJD, k_BGTD) / 8**0.5
        score = score.masked_fill((back_TC < 0) | (back_TC >= window), float("-inf"))
        want = torch.einsum("bgjtc,bgcd->bgtjd", score.softmax(-1), v_BGTD)
        assert torch.allclose(got, want, atol=1e-10)
        gradient = cpu.normal(want.shape, torch.float64)
        pairs = zip(*(torch.autograd.grad(out, leaves, gradient) for out in (got, want)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs)


def test_series_of_windows_and_batches(cpu):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8)
    bench = attention_bench(cpu, spec, "fp32", max_tokens=1024, windows=(0, 100))
    series = {s.label: s for s in bench.series}
    name = "attention gqa 4/2 heads of 8 fp32"
    old = [series[f"{name} {kind} forward"] for kind in ("prefill B1", "decode B1", "decode B8", "decode B64")]
    assert all("window" not in s.row(16) for s in old), "points of journals of before are found"
    banded = series[f"{name} prefill window 100 B8 forward"]
    assert (banded.row(50)["kernel"], banded.row(50)["window"]) == ("sdpa_banded", 100)
    assert banded.start[-1] == 128, "1,024 tokens in eight sequences"
    assert 100 in banded.start
    decode = series[f"{name} decode window 100 B64 forward"]
    assert (decode.start[-1], decode.row(1024)["context_tokens"]) == (1024, 1024)
    prepare = bench.open()
    for phase, size, same in (("decode", 1024, 100), ("decode", 64, 64), ("prefill", 100, 100)):
        outs = []
        for window, context in ((" window 100", size), ("", same)):
            torch.manual_seed(5)
            outs.append(prepare(series[f"{name} {phase}{window} B8 forward"], context)(0)[0])
        assert torch.equal(*outs)
    few = attention_bench(cpu, spec, "fp32", max_tokens=4)
    assert not any("prefill B8" in s.label for s in few.series), "eight tokens are more than four"


def test_gemm_shapes_of_mixtral():
    shapes = gemm_shapes(find_model("mixtral-8x7b"))
    # 32 query and 8 key-value heads of 128, hidden 4096, 8 experts, vocabulary 32,000.
    assert set(shapes) == {(6144, 4096), (4096, 4096), (8, 4096), (32000, 4096)}


def test_gemm_shapes_of_experts_without_gate_and_of_a_latent_width():
    nano = find_model("nemotron-3-nano-30b-a3b")
    assert {(3712, 2688), (2688, 3712)} <= set(gemm_shapes(nano))
    assert (7424, 2688) not in gemm_shapes(nano)
    latent = find_model("kimi-k3")
    assert (latent.hidden_size, latent.routed_hidden_size) == (7168, 3584)
    for tp in (1, 8):
        assert {(3584, 7168), (7168, 3584)} <= set(gemm_shapes(latent, tp)), "whole on every rank"


def test_experts_of_a_latent_width_are_permuted_at_it(cpu):
    for directions in (("forward",), ("backward",)):
        bench = elementwise_bench(cpu, 32, 48, 8, 2, "fp32", 16, directions, routed_hidden=12)
        rows = {series.row(4)["op"]: (series.row(4), results[0]) for series, results in _calls(bench, 4)}
        assert {op: row["hidden"] for op, (row, _) in rows.items() if op in ("permute", "unpermute", "norm")} == {
            "permute": 12,
            "unpermute": 12,
            "norm": 32,
        }
        if directions == ("forward",):
            assert rows["router"][0]["hidden"] == 32
            assert [tuple(rows[op][1].shape) for op in ("permute", "unpermute")] == [(8, 12), (4, 12)]
        else:
            assert [tuple(rows[op][1][0].shape) for op in ("permute", "unpermute")] == [(4, 12), (4, 24)]


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(8, 3, 1), (30, 10, 3)])
def test_heads_that_key_value_heads_do_not_divide_are_refused(cpu, heads, kv_heads, tp):
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=8)
    with pytest.raises(SpecError, match=rf"kv_heads \({kv_heads}\) must divide heads \({heads}\), .*tp \({tp}\)"):
        attention_bench(cpu, spec, "fp32", tp, max_tokens=16)


def test_dense_and_elementwise_run(cpu):
    for series, results in _calls(gemm_bench(cpu, [(48, 32)], "fp32", ["forward", "backward"], 8), 4):
        row = series.row(4)
        assert (row["m"], row["n"], row["k"]) == (4, 48, 32)
        assert tuple((results[0][1] if row["direction"] == "backward" else results[0]).shape) in {(48, 32), (4, 48)}
    ops = {}
    for series, results in _calls(elementwise_bench(cpu, 32, 48, 8, 2, "fp32", 16), 4):
        ops[series.row(4)["op"]] = results[0]
    assert ops["permute"].shape == (8, 32)
    assert ops["unpermute"].shape == (4, 32)
    assert torch.allclose(ops["router"][0].sum(1), torch.ones(4))
    assert set(ops) == {"router", "permute", "unpermute", "norm", "activation", "embedding"}


def test_backward_passes_give_the_gradients(cpu):
    bench = elementwise_bench(cpu, 32, 48, 8, 2, "fp32", 16, ("backward",))
    gradients = {series.row(4)["op"]: results[0][0] for series, results in _calls(bench, 4)}
    shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
    assert shapes == {"permute": (4, 32), "unpermute": (4, 64), "norm": (4, 32), "activation": (4, 96)}
    assert {series.row(4)["direction"] for series in bench.series} == {"backward"}
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())


def test_an_optimizer_step_moves_every_weight(cpu):
    (series,) = optimizer_bench(cpu, 32).series
    row = series.row(8)
    assert (row["op"], row["kernel"], row["tokens"], row["hidden"]) == ("optimizer", "fused_adam", 8, 32)
    call = optimizer_bench(cpu, 32).open()(series, 8)
    before = call(0).detach().clone()
    after = call(1).detach()
    # Adam's steps with a constant gradient are its learning rate, whatever the gradient's size.
    assert torch.allclose((after - before).abs(), torch.full((8, 32), 1e-3), rtol=0.01)


def test_memory_on_a_cpu_has_no_host_copies(cpu):
    bench = memory_bench(cpu, 1 << 16)
    assert {series.row(4096)["op"] for series in bench.series} == {"device_copy", "allocate"}
    for series, results in _calls(bench, 4096):
        if series.row(4096)["op"] == "device_copy":
            assert float(results[0].float().std()) > 50, "random bytes, not zeros"
            assert results[0].numel() == 4096
    assert np.all([s.low >= 4096 for s in bench.series])
