"""What one measured oneself is what costs use: every part, in the type it was measured in, both directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, load_profile
from moeplan.costs.attention import AttentionCosts
from moeplan.costs.backward import BackwardOverForward, backward_over_forward
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.dense import DenseCosts
from moeplan.costs.elementwise import PassCosts
from moeplan.costs.experts import expert_costs
from moeplan.costs.fixed import fixed_costs
from moeplan.costs.kv_cache import kv_bytes_per_token
from moeplan.costs.memory import memory_report
from moeplan.costs.step import StepCost, StepModel
from moeplan.costs.technique import Technique
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.model import AttentionSpec, Dtype, ModelSpec, activations_beside, dense_beside
from moeplan.specs.models import find_model
from moeplan.specs.serving import EngineSpec
from moeplan.specs.workload import Phase, Workload

META = ProfileMeta(name="toy", accelerator="toy", date="2026-11-30", command="none")
CPU = AcceleratorSpec.model_validate(
    {
        "name": "cpu",
        "memory": "8 GB",
        "memory_bandwidth": "20 GB/s",
        "bf16": "0.1 TFLOPS",
        "scale_up_bandwidth": "1 GB/s",
        "scale_up_domain": 2,
        "nic_bandwidth": "1 GB/s",
    }
)
CLUSTER = ClusterSpec(name="cpus", accelerator=CPU, num_nodes=1, ranks_per_node=2)
ATTENTION = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64)
MODEL = ModelSpec(
    name="toy",
    num_layers=4,
    moe_layer_ids=(0, 1, 2, 3),
    hidden_size=512,
    num_experts=16,
    top_k=2,
    expert_intermediate_size=1024,
    vocab_size=32768,
    attention=ATTENTION,
)
PROFILE = Path(__file__).parents[3] / "profiles" / "cpu-amd-epyc"


def cost(phase: Phase, dtype: Dtype, batch: int) -> StepCost:
    work = Workload(phase=phase, batch_per_rank=batch, context=128, weight_dtype=dtype, activation_dtype=dtype)
    place = Placement(
        np.tile(np.arange(16, dtype=np.int32), (4, 1)), np.repeat(np.arange(2), 8).astype(np.int32), 16, 2, 2
    )
    how = Technique(dispatch="per_expert")  # as the profile was measured
    return StepModel(MODEL, CLUSTER, work, how, load_profile(PROFILE)).step(place, np.ones((4, 16)))


def test_every_part_of_a_cpu_step_is_what_the_cpu_profile_measured() -> None:
    """Of the very shape that the profile was measured at; its arithmetic, cache and wire are in fp32."""
    found = cost("decode", "fp32", 64)
    kernels = {
        "experts": ["grouped_mm"],
        "exchange inside a node": ["gloo_alltoall"],
        "attention": ["linear", "sdpa"],
        "norms": ["rms_norm"],
        "router and permutation": ["argsort_gather", "index_add", "linear", "softmax_topk"],
    }
    assert found.source.keys() == kernels.keys()
    for part, names in kernels.items():
        assert "roofline" not in found.source[part], part
        assert all(f"({name})" in found.source[part] for name in names), part
    assert found.extrapolated == ()
    # Rows in fp32 tell nothing of 16 bits: neither does the answer in them say that they did.
    assert "roofline" in cost("decode", "bf16", 64).source["attention"]


def rows(table: str, **columns: object) -> HardwareProfile:
    return HardwareProfile(META, {table: pa.Table.from_pylist(_listed(columns))})


def _listed(columns: dict[str, object]) -> list[dict[str, object]]:
    """One row for each value of the columns that are lists, all of one length."""
    count = max(len(v) for v in columns.values() if isinstance(v, list))
    common = {"backend": "moeplan", "kernel": "k", "source": "s"}
    return [common | {c: v[i] if isinstance(v, list) else v for c, v in columns.items()} for i in range(count)]


def test_types_beside_weights() -> None:
    assert [activations_beside(d) for d in ("fp32", "fp16", "bf16", "fp8", "int4")] == [
        "fp32", "fp16", "bf16", "bf16", "bf16"
    ]  # fmt: skip
    assert [dense_beside(d) for d in ("fp32", "fp8", "int8", "int4", "fp4")] == ["fp32", "fp8", "int8", "bf16", "bf16"]


@pytest.mark.parametrize(("weights", "measured"), [("fp16", "fp16"), ("bf16", "fp16"), ("fp8", "bf16")])
def test_both_kinds_of_16_bits_serve_each_other(weights: Dtype, measured: str) -> None:
    sizes = [16, 64, 256, 1024]
    attention = rows(
        "attention", kind="gqa", phase="decode", batch=8, query_tokens=1, context_tokens=sizes, heads=8, kv_heads=2,
        head_dim=64, dtype=measured, kv_dtype=measured, latency_us=[float(x) for x in sizes],
    )  # fmt: skip
    costs = AttentionCosts(ATTENTION, 512, CPU, True, DenseCosts(CPU, weights), profile=attention)
    assert costs.kernel(8, 256).value.item() == pytest.approx(256e-6)
    alone = AttentionCosts(ATTENTION, 512, CPU, True, DenseCosts(CPU, "fp32"), profile=attention)
    assert alone.kernel(8, 256).extrapolated


def test_a_wider_cache_takes_its_bytes() -> None:
    """The roofline of decode: keys and values of 8 x 1024 tokens, 2 heads of 64, in 4, 2 and 1 bytes."""
    kept, queries, quick = 8 * 1024 * 2 * 2 * 64, 2 * 8 * 8 * 64, CPU.model_copy(update={"bf16": 1e15})
    widths: tuple[tuple[Dtype, Dtype, int, int], ...] = (
        ("fp32", "bf16", 4, 4), ("bf16", "bf16", 2, 2), ("fp32", "fp8", 1, 4)
    )  # fmt: skip
    for weights, kv, cache, wide in widths:
        costs = AttentionCosts(ATTENTION, 512, quick, True, DenseCosts(CPU, weights), kv)
        expected = (kept * cache + queries * wide) / (0.8 * 20e9)
        assert costs.kernel(8, 1024).value.item() == pytest.approx(expected), (weights, kv)
    full, half = (kv_bytes_per_token(MODEL, EngineSpec(), 4096, weights) for weights in ("fp32", "fp8"))  # type: ignore[arg-type]
    assert full == 2 * half  # type: ignore[operator]
    assert kv_bytes_per_token(MODEL, EngineSpec(kv_dtype="fp8"), 4096, "fp32") == 4 * 2 * 2 * 64
    spare = {
        dtype: memory_report(MODEL, CLUSTER, Workload(weight_dtype=dtype), np.array([8, 8]))[0]
        for dtype in ("fp32", "bf16")
    }
    for dtype, width in (("fp32", 4), ("bf16", 2)):
        report = spare[dtype]
        assert report.kv_tokens == int(report.free_bytes // (4 * 2 * 2 * 64 * width))


@pytest.mark.parametrize("context", [100, 128, 1000])
def test_a_window_is_work_of_the_pairs_that_see_each_other(context: int) -> None:
    slow, window = CPU.model_copy(update={"bf16": 1e9}), 128
    pairs = np.tril(np.triu(np.ones((context, context)), 1 - window)).sum()
    costs = AttentionCosts(ATTENTION, 512, slow, False, DenseCosts(slow, "bf16"), window=window)
    assert costs.kernel(3, context).value.item() == pytest.approx(3 * pairs * 8 * 4 * 64 / 1e9, rel=0.02)


def test_passes_serve_at_the_shape_they_were_measured_at() -> None:
    sizes = [1, 4, 16, 64, 256]
    measured = rows(
        "elementwise", op="permute", tokens=sizes, hidden=512, num_experts=16, top_k=2, dtype="fp32",
        latency_us=[10.0 + x for x in sizes],
    )  # fmt: skip
    passes = PassCosts(CPU, "fp32", 512, 16, 2, measured)
    assert passes.seconds("permute", 64).value.item() == pytest.approx(74e-6)
    assert not passes.seconds("permute", 64).extrapolated
    moved = {"unpermute": 2 * 2 * 512, "norm": 2 * 512, "embedding": 2 * 512, "router": 2 * 16}
    for op, numbers in moved.items():
        found = passes.seconds(op, 64)  # type: ignore[arg-type]
        assert found.value.item() == pytest.approx(64 * 4 * numbers / (0.8 * 20e9)), op
        assert found.extrapolated
    assert PassCosts(CPU, "fp32", 512, 16, 4, measured).seconds("permute", 64).extrapolated
    assert PassCosts(CPU, "bf16", 512, 16, 2, measured).seconds("permute", 64).extrapolated


@pytest.mark.parametrize("dtypes", [("fp32",), ("fp32", "bf16")])
def test_collectives_measured_in_fp32_serve_where_no_narrower_ones_are(dtypes: tuple[str, ...]) -> None:
    sizes = [2**10, 2**14, 2**18]
    tables = [
        rows("collectives", op="all_reduce", dtype=dtype, ranks=2, message_size_bytes=sizes,
             latency_us=[factor * x / 2**10 for x in sizes]).table("collectives")
        for dtype, factor in zip(dtypes, (1.0, 7.0), strict=False)
    ]  # fmt: skip
    links = CollectiveCosts(CLUSTER, HardwareProfile(META, {"collectives": pa.concat_tables(tables)}))
    assert links.seconds("all_reduce", 2, 2**14).total == pytest.approx(16e-6 * (7 if "bf16" in dtypes else 1))
    assert links.seconds("all_gather", 2, 2**14).extrapolated


@pytest.mark.parametrize(("backend", "kernel", "us"), [(None, "graph", 4.0), ("theirs", "NCCL", 12.0)])
def test_of_several_kernels_of_a_collective_the_fastest_serves(backend: str | None, kernel: str, us: float) -> None:
    sizes = [2**10, 2**14, 2**18]
    kinds = {"graph": ("ours", 4.0), "eager": ("ours", 40.0), "slow": ("theirs", 50.0), "NCCL": ("nccl", 12.0)}
    listed = [
        row
        for name, (owner, latency) in kinds.items()
        for row in _listed({"op": "all_reduce", "dtype": "bf16", "ranks": 2, "message_size_bytes": sizes,
                            "backend": owner, "kernel": name, "latency_us": [latency] * 3})
    ]  # fmt: skip
    listed += [row | {"message_size_bytes": 2**15} for row in listed if row["kernel"] == "eager"]  # most rows
    links = CollectiveCosts(CLUSTER, HardwareProfile(META, {"collectives": pa.Table.from_pylist(listed)}), backend)
    found = links.seconds("all_reduce", 2, 2**14)
    assert found.total == pytest.approx(1e-6 * us)
    assert f"({kernel})" in found.source


def test_absorbed_projections_are_the_products_measured_for_them() -> None:
    """DeepSeek-V3's shape: 128 heads of 128 before the kernel, as many after it, over a latent of 512."""
    spec = find_model("deepseek-v3").attention
    assert spec is not None
    sizes = [1, 64, 1024]
    halves = [
        row
        for n, k, us in ((512, 128, 10.0), (128, 512, 20.0))
        for count in (32, 128)
        for row in _listed({"m": sizes, "n": n, "k": k, "batch": count, "dtype": "bf16", "kernel": "bmm",
                            "latency_us": [us * count / 128] * 3})
    ]  # fmt: skip
    measured = HardwareProfile(META, {"gemm": pa.Table.from_pylist(halves)})
    for tp in (1, 4):
        dense = DenseCosts(CPU, "fp8", measured)
        decode, prefill = (AttentionCosts(spec, 7168, CPU, d, dense, profile=measured, tp=tp) for d in (True, False))
        bare = AttentionCosts(spec, 7168, CPU, True, DenseCosts(CPU, "fp8"), tp=tp).projections(64)
        found = decode.projections(64)
        assert found.value[..., -2:].ravel().tolist() == pytest.approx([10e-6 / tp, 20e-6 / tp])
        others = np.delete(bare.value.ravel(), 3)  # the up-projection of the latent, which the halves are
        assert found.value[..., :-2].ravel() == pytest.approx(others)
        assert prefill.projections(64).value.shape == bare.value.shape


def test_every_token_of_a_group_passes_its_ranks_part_of_the_head() -> None:
    work = Workload(phase="decode", batch_per_rank=256, context=128)
    wide = MODEL.model_copy(update={"vocab_size": 2**20})
    one, two = (fixed_costs(wide, CLUSTER, work, 256, how=Technique(tp=tp)) for tp in (1, 2))
    # Half of the columns for twice the tokens: as many operations; then logits meet.
    gathered = CollectiveCosts(CLUSTER).seconds("all_gather", 2, 512 * 2**20 * 2).total
    assert two.other.total_s == pytest.approx(one.other.total_s + gathered, rel=0.1)


def _both(experts: float = 3.0, products: float = 2.2, attention: float = 3.5) -> HardwareProfile:
    """Rows of both directions, backward so many times as slow."""
    tables: dict[str, list[dict[str, object]]] = {"experts": [], "gemm": [], "attention": []}
    ways = (("forward", 1.0, 1.0, 1.0), ("backward", experts, products, attention))
    for way, e, p, a in ways:
        for ep in (2, 4, 8):
            for tokens in (64, 256, 1024, 4096):
                pairs = tokens * 2 // ep
                tables["experts"] += _listed(
                    {
                        "hidden": 512, "inter": 1024, "num_experts": 16, "top_k": 2, "ep": ep, "tp": 1, "dtype": "bf16",
                        "distribution": "balanced", "tokens": [tokens], "rank_pairs": pairs, "direction": way,
                        "active_experts": 16 // ep, "latency_us": e * (20.0 + 16 / ep * 5 + 0.1 * pairs),
                    }
                )  # fmt: skip
        for n, k in ((768, 512), (512, 512)):
            sizes = [1, 64, 256, 1024, 4096]
            tables["gemm"] += _listed(
                {"m": sizes, "n": n, "k": k, "dtype": "bf16", "direction": way, "latency_us": [p * x for x in sizes]}
            )
        for batch in (1, 8, 64):
            sizes = [16, 128, 1024]
            tables["attention"] += _listed(
                {
                    "kind": "gqa", "phase": "prefill", "batch": batch, "query_tokens": sizes, "context_tokens": sizes,
                    "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "bf16", "kv_dtype": "bf16", "direction": way,
                    "latency_us": [a * batch * x for x in sizes],
                }
            )  # fmt: skip
    return HardwareProfile(META, {name: pa.Table.from_pylist(table) for name, table in tables.items()})


def test_backward_takes_what_was_measured_over_its_forward() -> None:
    def ratio(profile: HardwareProfile | None, weights: Dtype = "bf16") -> BackwardOverForward:
        return backward_over_forward(MODEL, CPU, weights, profile, 1024, 128, 1, 256.0, 8.0)

    assert ratio(None) == BackwardOverForward()
    assert ratio(None).source == "modelled from forward"
    both = ratio(_both())
    assert (both.products, both.attention, both.experts) == pytest.approx((2.2, 3.5, 3.0), rel=1e-3)
    assert both.source == "measured: products, attention, experts"
    assert ratio(_both(), "fp32") == BackwardOverForward()  # measured in another type
    forward_of_experts = HardwareProfile(META, {"experts": _both().select("experts", direction="forward")})
    assert ratio(forward_of_experts) == BackwardOverForward()
    costs = expert_costs(MODEL, CPU, "bf16", _both(), mean_pairs=256.0, direction="backward")
    assert costs.rank_s(np.full(8, 256.0), 256.0) == pytest.approx(3 * (20 + 40 + 0.1 * 2048) * 1e-6, rel=0.06)
