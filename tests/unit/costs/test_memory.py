from __future__ import annotations

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.costs.engine_tables import EngineSetup
from moeplan.costs.kv_cache import kv_bytes_per_token, kv_room
from moeplan.costs.memory import (
    kv_tokens_needed,
    max_redundant_experts,
    memory_report,
    non_expert_bytes,
    slot_bytes,
    workspace_bytes,
)
from moeplan.costs.served import kv_capacity_tokens
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.errors import InfeasibleError
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.serving import EngineSpec
from moeplan.specs.workload import Workload

V3 = find_model("deepseek-v3")
FP8 = Workload(phase="decode", batch_per_rank=128, context=4096, weight_dtype="fp8", activation_dtype="fp8")


def with_ranks(cluster: ClusterSpec, ranks: dict[int, RankSpec]) -> ClusterSpec:
    return cluster.model_copy(update={"ranks": ranks})


def test_weights_of_deepseek_v3_in_fp8():
    # 3 x 7168 x 2048 weights of a byte in each of 58 layers; 671.03 B less 58 x 256 experts elsewhere
    assert slot_bytes(V3, "fp8") == 58 * 3 * 7168 * 2048
    assert non_expert_bytes(V3, "fp8") == pytest.approx(671.03e9 - 58 * 256 * 44040192, rel=1e-3)
    # Routers and the down-projections to latents of queries and of keys and values are whole on each rank.
    whole = 58 * 7168 * 256 + 61 * 7168 * (1536 + 512 + 64)
    assert non_expert_bytes(V3, "fp8", shards=4) == (non_expert_bytes(V3, "fp8") - whole) / 4 + whole
    assert non_expert_bytes(V3, "fp4") == 2 * non_expert_bytes(V3, "fp8")  # 4-bit checkpoints keep these in 16 bits


def test_workspace_counts_tokens_in_results_out_and_intermediate_rows():
    # 128 tokens x 8 experts x (7168 x (1 byte in + 2 bytes out) + 2 x 2048 x 2 bytes)
    assert workspace_bytes(V3, FP8) == 128 * 8 * (7168 * 3 + 8192)


def test_kv_cache_of_the_workload():
    assert kv_tokens_needed(FP8) == 128 * 4096
    assert kv_tokens_needed(Workload(phase="prefill", batch_per_rank=4096)) == 4096


def test_the_report_adds_up_and_leaves_out_failed_ranks():
    cluster = with_ranks(cluster_for("h200", 4, 8), {3: RankSpec(failed=True), 5: RankSpec(memory="40 GB")})
    report = memory_report(V3, cluster, FP8, np.full(32, 9))
    assert [m.rank for m in report] == [r for r in range(32) if r != 3]
    first = report[0]
    assert first.memory_bytes == 139 * 2**30
    assert first.expert_bytes == 9 * slot_bytes(V3, "fp8")
    assert first.free_bytes == pytest.approx(
        139 * 2**30 - 9 * 58 * 44040192 - non_expert_bytes(V3, "fp8") - workspace_bytes(V3, FP8)
    )
    assert first.kv_tokens == int(first.free_bytes // 70272)  # 61 layers x (512 + 64) x 2 bytes
    assert report[4].rank == 5
    assert report[4].memory_bytes == 40e9
    assert first.notes == ()


@pytest.mark.parametrize(
    ("name", "tp", "kv_dtype", "by_hand"),
    [
        ("mixtral-8x7b", 1, "bf16", 32 * 2 * 8 * 128 * 2),  # layers x keys and values x heads x head_dim x bytes
        ("mixtral-8x7b", 4, "bf16", 32 * 2 * 2 * 128 * 2),
        ("mixtral-8x7b", 8, "fp8", 32 * 2 * 128),
        ("qwen3-30b-a3b", 8, "bf16", 48 * 2 * 128 * 2),  # 4 heads: no rank has less than one
        ("deepseek-v3", 8, "fp8", 61 * (512 + 64)),  # a latent is whole on every rank
    ],
)
def test_the_cache_of_ranks_that_share_attention(name, tp, kv_dtype, by_hand):
    model, cluster = find_model(name), cluster_for("h200", 1, 8)
    work = Workload(phase="decode", batch_per_rank=8, weight_dtype="fp8" if name == "deepseek-v3" else "bf16")
    assert kv_bytes_per_token(model, EngineSpec(tp=tp, kv_dtype=kv_dtype, pp=2), 4096, work.weight_dtype) == by_hand / 2
    report = memory_report(model, cluster, work, np.full(8, model.num_experts // 8), tp, kv_dtype)[0]
    assert report.kv_tokens == int(report.free_bytes // by_hand)
    experts = np.arange(model.num_experts, dtype=np.int32)
    rank_P = np.repeat(np.arange(8, dtype=np.int32), model.num_experts // 8)
    placement = Placement(np.tile(experts, (model.num_moe_layers, 1)), rank_P, model.num_experts, 8, 8)
    load_LE = np.ones((model.num_moe_layers, model.num_experts))
    step = StepModel(model, cluster, work, Technique(tp=tp, kv_dtype=kv_dtype)).step(placement, load_LE)
    assert step.memory[0] == report


def test_layers_with_a_window_keep_its_tokens_alone():
    """18 of GPT-OSS-120B's 36 layers see 128 tokens: 8 heads of 64, keys and values, 2 bytes."""
    model, cluster, engine = find_model("gpt-oss-120b"), cluster_for("h100", 1, 8), EngineSpec()
    for context, by_hand in ((100, 36 * 2048), (128, 36 * 2048), (8192, 18 * 2048 * (1 + 128 / 8192))):
        work = Workload(phase="decode", batch_per_rank=8, context=context, weight_dtype="fp4")
        report = memory_report(model, cluster, work, np.full(8, 16))[0]
        assert report.kv_tokens == int(report.free_bytes // by_hand)
        room = kv_room(model, cluster, work, engine, np.full(8, 16))
        assert room.tokens == int(room.free_bytes // by_hand)
        assert kv_bytes_per_token(model, engine, context, "fp4") == pytest.approx(by_hand)
    setup = EngineSetup(model, cluster.accelerator, "vllm", expert_dtype="fp4", dense_dtype="bf16")
    longer = kv_capacity_tokens(setup, 0.9, 8192)
    assert longer == pytest.approx(kv_capacity_tokens(setup, 0.9, 128) * 2 / (1 + 128 / 8192))


def test_what_is_not_known_is_said():
    hybrid, unknown = find_model("qwen3-next-80b-a3b"), find_model("deepseek-v4-flash")
    cluster = cluster_for("h200", 1, 8)
    assert memory_report(hybrid, cluster, FP8, np.full(8, 64))[0].kv_tokens is None
    assert "its KV cache is not counted" in memory_report(hybrid, cluster, FP8, np.full(8, 64))[0].notes[0]
    assert "its weights and KV cache are not" in memory_report(unknown, cluster, FP8, np.full(8, 32))[0].notes[0]
    with pytest.raises(InfeasibleError, match=r"attention is not known, so its KV cache .* give kv_reserve"):
        max_redundant_experts(hybrid, cluster, FP8)
    assert max_redundant_experts(hybrid, cluster, FP8, kv_reserve_bytes=30e9) > 0


@pytest.mark.parametrize(("accelerator", "tp"), [("h100", 1), ("h200", 1), ("b200", 1), ("b200", 2)])
def test_the_most_redundant_experts_fit_and_one_more_per_rank_does_not(accelerator, tp):
    cluster = cluster_for(accelerator, 4, 8)
    redundant = max_redundant_experts(V3, cluster, FP8, shards=tp)
    slots = (256 + redundant) // 32
    assert (256 + redundant) % 32 == 0
    needed = tp * kv_tokens_needed(FP8)  # of all ranks that share attention
    assert memory_report(V3, cluster, FP8, np.full(32, slots), tp)[0].kv_tokens >= needed
    assert memory_report(V3, cluster, FP8, np.full(32, slots + 1), tp)[0].kv_tokens < needed


def test_no_rank_takes_more_slots_than_experts_and_the_smallest_rank_decides():
    mixtral, cluster = find_model("mixtral-8x7b"), cluster_for("b200", 1, 2)
    assert max_redundant_experts(mixtral, cluster, Workload(batch_per_rank=64)) == 2 * 8 - 8
    small = with_ranks(cluster, {1: RankSpec(memory="64 GB")})
    redundant = max_redundant_experts(mixtral, small, Workload(batch_per_rank=64))
    assert 0 <= redundant < 8
    failed = with_ranks(cluster, {1: RankSpec(failed=True)})
    assert max_redundant_experts(mixtral, failed, Workload(batch_per_rank=64)) == 0


def test_slots_that_are_given_are_kept():
    mixtral = find_model("mixtral-8x7b")
    cluster = with_ranks(cluster_for("b200", 1, 2), {0: RankSpec(slots=6), 1: RankSpec(slots=3)})
    assert max_redundant_experts(mixtral, cluster, Workload()) == 1
    with pytest.raises(InfeasibleError, match=r"ranks.\*.slots add up to 7, less than num_experts \(8\)"):
        max_redundant_experts(mixtral, with_ranks(cluster, {0: RankSpec(slots=6), 1: RankSpec(slots=1)}), Workload())


def test_experts_that_do_not_fit_are_refused_with_the_limit():
    message = r"need 32 slots on each rank, but memory has room for \d+: rank 0 lacks [\d.]+ GiB of 79.6 GiB"
    with pytest.raises(InfeasibleError, match=message):
        max_redundant_experts(V3, cluster_for("h100", 1, 8), FP8)
