"""Ranks that keep one KV cache together: what they keep, how long they read it, and what they send each other."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import load_profile
from moeplan.costs.attention import AttentionCosts
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.context_parallel import PartialAttention
from moeplan.costs.coverage import coverage_gaps
from moeplan.costs.dense import DenseCosts
from moeplan.costs.kv_cache import kv_bytes_per_token, kv_room
from moeplan.costs.memory import memory_report
from moeplan.costs.passes import Batch, no_chunks
from moeplan.costs.serving import COST_PARTS, ServingCosts
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model
from moeplan.specs.serving import EngineSpec
from moeplan.specs.workload import Objective, Workload

V3, QWEN = find_model("deepseek-v3"), find_model("qwen3-235b-a22b")  # a latent; 64 query and 4 key heads of 128
LITE, SMALL = find_model("deepseek-v2-lite"), find_model("qwen3-30b-a3b")  # 16 heads of a latent; 32 and 4 heads
NODE, PROFILE = cluster_for("h100", 1, 8), load_profile("h100-sxm")
WORK = Workload(weight_dtype="fp8", activation_dtype="fp8")


def serving(model: ModelSpec, dcp: int, cluster: ClusterSpec = NODE) -> ServingCosts:
    how = Technique(dispatch="allgather", tp=8, dcp=dcp)
    return ServingCosts(model, cluster, WORK, how, None, 8192, 64, 65536)


def even(model: ModelSpec, ranks: int = 8) -> tuple[Placement, np.ndarray]:
    layers, experts = model.num_moe_layers, model.num_experts
    slots = np.repeat(np.arange(ranks), experts // ranks).astype(np.int32)
    rows = np.tile(np.arange(experts, dtype=np.int32), (layers, 1))
    return Placement(rows, slots, experts, ranks, ranks), np.ones((layers, experts))


def decodes(sequences: float, context: float) -> Batch:
    every = np.array([sequences])
    return Batch(every, every * (context - 1), no_chunks(1), every, False)


def took_s(costs: ServingCosts, before: int, new: int) -> float:
    """A chunk at usual speeds."""
    return float(costs.chunk_s(before, new)[:3].sum())


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(("model", "tp", "dcps"), [(V3, 8, (1, 2, 4, 8)), (QWEN, 8, (1, 2)), (QWEN, 16, (1, 2, 4))])
def test_all_ranks_together_keep_one_copy_where_there_were_as_many_as_dcp(
    model: ModelSpec, tp: int, dcps: tuple[int, ...]
) -> None:
    whole = model.kv_bytes_per_token("bf16")
    assert whole is not None
    kept = [tp * (kv_bytes_per_token(model, EngineSpec(tp=tp, dcp=dcp), 4096) or 0.0) for dcp in dcps]
    assert kept == pytest.approx([whole * dcps[-1] / dcp for dcp in dcps])  # the last leaves one copy
    reports = [memory_report(model, NODE, WORK, np.full(8, 1), tp, "bf16", dcp)[0].kv_tokens or 0 for dcp in dcps]
    assert reports == pytest.approx([reports[0] * dcp for dcp in dcps], rel=1e-4)


def test_a_group_has_room_for_dcp_times_the_tokens_in_blocks_as_much_longer() -> None:
    one, eight = (EngineSpec(tp=8, dcp=dcp) for dcp in (1, 8))
    cluster = cluster_for("h200", 1, 8)
    rooms = [kv_room(V3, cluster, WORK, engine, np.full(8, 32)) for engine in (one, eight)]
    assert rooms[0].free_bytes == rooms[1].free_bytes
    assert rooms[0].tokens is not None
    assert rooms[1].tokens == pytest.approx(8 * rooms[0].tokens, abs=8)
    assert (one.block_tokens, eight.block_tokens) == (16, 128)


# ---------------------------------------------------------------------- the kernel


def kernel_s(model: ModelSpec, tp: int, dcp: int, batch: float, context: float, measured: bool) -> float:
    assert model.attention is not None
    profile = PROFILE if measured else None
    dense = DenseCosts(NODE.accelerator, "fp8", profile)
    common = (model.attention, model.hidden_size, NODE.accelerator, True, dense, "bf16", profile)
    found = AttentionCosts(*common, tp, dcp=dcp).kernel(batch, context)
    assert not (measured and found.extrapolated)
    return found.total


@pytest.mark.parametrize(("model", "tp", "dcp"), [(V3, 8, 2), (V3, 8, 4), (V3, 8, 8), (QWEN, 8, 2), (QWEN, 16, 4)])
def test_a_long_context_is_read_in_a_dcp_th_of_the_time(model: ModelSpec, tp: int, dcp: int) -> None:
    """By the roofline, where keys are all that is moved, exactly. Measured kernels also have dcp times the heads for
    each key, which costs them up to two thirds of what less reading saves at eight ranks, and much less at two."""
    one, split = (kernel_s(model, tp, each, 8, 131072, False) for each in (1, dcp))
    assert split / one == pytest.approx(1 / dcp, rel=0.01)
    one, split = (kernel_s(model, tp, each, 8, 131072, True) for each in (1, dcp))
    assert 1 / dcp < split / one < 1 / dcp + 0.1
    # Of a short one there is little to save.
    short = kernel_s(model, tp, dcp, 8, 1024, True) / kernel_s(model, tp, 1, 8, 1024, True)
    assert short > split / one


def test_a_kernel_is_that_of_the_heads_of_all_over_a_part_of_the_context() -> None:
    assert kernel_s(V3, 8, 4, 16, 32768, True) == kernel_s(V3, 2, 1, 16, 8192, True)
    assert kernel_s(QWEN, 16, 4, 16, 32768, True) == kernel_s(QWEN, 4, 1, 16, 8192, True)


# ---------------------------------------------------------------------- what is sent


def test_exchanges_are_those_measured_on_as_many_ranks() -> None:
    among = PartialAttention(V3, NODE, "bf16", PROFILE, Technique(tp=8, dcp=8))
    for part in (*among.merged(64), *among.chunk(4096)):
        assert not part.extrapolated or part.wire is None  # the pass between is modelled
    assert all("nccl" in part.source for part in (*among.merged(64), *among.chunk(4096)) if part.wire is not None)


def test_queries_and_partial_outputs_by_hand() -> None:
    """128 heads of 512 + 64 numbers to all eight ranks, 512 back, log-sum-exps in fp32 from each, one pass between."""
    how = Technique(dispatch="allgather", tp=8, dcp=8)
    among = PartialAttention(V3, NODE, "bf16", None, how)
    chip, tokens = NODE.accelerator, 64
    gathered = tokens * 128 * (576 * 2 + 8 * 4)
    scattered = tokens * 128 * 512 * 2
    links = CollectiveCosts(NODE)._group("all_gather", 8, 1)
    rescaled = 2 * scattered / (0.8 * chip.memory_bandwidth)
    by_hand = 3 * links.latency_s + 7 / 8 * (gathered + scattered) / links.bandwidth + rescaled
    assert sum(part.total for part in among.merged(tokens)) == pytest.approx(by_hand)
    (prefix,) = among.chunk(4096)
    assert prefix.total == pytest.approx(links.latency_s + 7 / 8 * 4096 * 576 * 2 / links.bandwidth)
    assert PartialAttention(V3, NODE, "bf16", None, Technique(tp=8)).merged(tokens) == []
    qwen = PartialAttention(QWEN, NODE, "bf16", None, Technique(tp=8, dcp=2))  # 16 heads of 128 in each pair of ranks
    bytes_ = tokens * 16 * (128 * 2 + 2 * 4 + 128 * 2)
    pair = CollectiveCosts(NODE)._group("all_gather", 2, 1)
    by_hand = 3 * pair.latency_s + bytes_ / 2 / pair.bandwidth
    by_hand += 2 * tokens * 16 * 128 * 2 / (0.8 * chip.memory_bandwidth)
    assert sum(part.total for part in qwen.merged(tokens)) == pytest.approx(by_hand)
    assert qwen.chunk(tokens) == qwen.merged(tokens)


@pytest.mark.parametrize(("model", "dcp"), [(LITE, 8), (SMALL, 2)])
def test_a_step_gains_what_is_read_less_and_pays_what_is_sent(model: ModelSpec, dcp: int) -> None:
    place, load = even(model)
    batch, context = 64, 49152
    plain, split = (serving(model, each).step(decodes(batch, context), place, load).total_s for each in (1, dcp))
    among = PartialAttention(model, NODE, "bf16", None, Technique(tp=8, dcp=dcp))
    sent = sum(part.total for part in among.merged(batch))
    kernels = [kernel_s(model, 8, each, batch, context, False) for each in (1, dcp)]
    assert split - plain == pytest.approx(model.num_layers * (kernels[1] + sent - kernels[0]), rel=1e-6)
    assert split < plain  # of long contexts; short ones are read faster than queries are sent
    short = [serving(model, each).step(decodes(batch, 64), place, load).total_s for each in (1, dcp)]
    assert short[1] > short[0]


@pytest.mark.parametrize(("model", "dcp"), [(LITE, 4), (SMALL, 2)])
def test_tables_of_a_service_hold_what_the_step_model_says(model: ModelSpec, dcp: int) -> None:
    place, load = even(model)
    how = Technique(dispatch="allgather", tp=8, dcp=dcp)
    costs = serving(model, dcp)
    for phase, tokens, context in (("decode", 64, 16384), ("prefill", 4096, 4096)):
        work = WORK.model_copy(update={"phase": phase, "batch_per_rank": tokens // 8, "context": context})
        want = StepModel(model, NODE, work, how).step(place, load)
        batch = decodes(tokens, context)
        if phase == "prefill":
            chunk = costs.chunk_s(0, tokens)[None]
            batch = Batch(np.zeros(1), np.zeros(1), chunk, np.full(1, float(tokens)), True)
        assert costs.step(batch, place, load).total_s == pytest.approx(want.total_s, rel=0.02), phase
        assert "context parallelism" in want.source or (phase == "prefill" and model is LITE)


def test_a_prompt_gathers_what_is_in_the_cache_or_sends_its_queries() -> None:
    def more(model: ModelSpec, dcp: int, *chunks: tuple[int, int]) -> list[float]:
        split, plain = serving(model, dcp), serving(model, 1)
        return [took_s(split, *chunk) - took_s(plain, *chunk) for chunk in chunks]

    among = PartialAttention(LITE, NODE, "bf16", None, Technique(tp=8, dcp=8))
    (prefix,) = among.chunk(16384)
    # Its own keys are computed on every rank.
    assert more(LITE, 8, (0, 4096), (16384, 512)) == pytest.approx([0.0, prefix.total])
    pair = PartialAttention(SMALL, NODE, "bf16", None, Technique(tp=8, dcp=2))
    sent = sum(part.total for part in pair.merged(512))
    assert more(SMALL, 2, (0, 512), (16384, 512)) == pytest.approx([sent, sent])
    costs = serving(LITE, 8)
    costs.chunk_s(0, 4096)
    assert "context parallelism of prompts" not in costs.source
    costs.chunk_s(4096, 4096)
    assert "context parallelism of prompts" in costs.source


def test_of_slower_links_only_the_bytes_take_longer() -> None:
    place, load = even(LITE)
    slow = NODE.model_copy(update={"ranks": {5: RankSpec.model_validate({"link_speed": 0.5})}})

    def step_s(dcp: int, cluster: ClusterSpec) -> float:
        return serving(LITE, dcp, cluster).step(decodes(64, 4096), place, load).total_s

    more = [step_s(dcp, slow) - step_s(dcp, NODE) for dcp in (1, 8)]
    among = PartialAttention(LITE, NODE, "bf16", None, Technique(tp=8, dcp=8))
    wire = sum(float(part.wire.sum()) for part in among.merged(64) if part.wire is not None)
    assert more[1] - more[0] == pytest.approx(LITE.num_layers * wire, rel=1e-6)


@pytest.mark.parametrize("how", [{"tp": 8, "dcp": 8}, {"tp": 2, "cp": 4}])
def test_of_what_a_prompt_sends_bytes_wait_for_a_slow_link_and_nothing_for_a_slow_rank(how: dict[str, int]) -> None:
    place, load = even(LITE)
    took = {}
    technique = Technique(dispatch="allgather", **how)
    for name, rank in (("plain", {}), ("slow", {"speed": 0.5}), ("narrow", {"link_speed": 0.5})):
        cluster = NODE.model_copy(update={"ranks": {5: RankSpec.model_validate(rank)}})
        costs = ServingCosts(LITE, cluster, WORK, technique, None, 8192, 64, 65536)
        for sent in (True, False):
            chunk = costs.chunk_s(16384, 4096)
            chunk[1:] *= sent
            batch = Batch(np.zeros(1), np.zeros(1), chunk[None], np.full(1, 4096.0), True)
            took[name, sent] = costs.step(batch, place, load).total_s
    _, beside, wire, _ = LITE.num_layers * costs.chunk_s(16384, 4096)
    found = {name: took[name, True] - took[name, False] for name in ("plain", "slow", "narrow")}
    assert found == pytest.approx({"plain": beside + wire, "slow": beside + wire, "narrow": beside + 2 * wire})


def test_what_a_prompt_sends_is_known_to_intervals() -> None:
    """Four ranks of a node are measured, 16 of two nodes are modelled from fewer: much less sure than all the rest."""
    place, load = even(LITE, 16)
    wide = cluster_for("h100", 2, 8)
    costs = ServingCosts(LITE, wide, WORK, Technique(dispatch="per_node", cp=16), PROFILE, 8192, 64, 65536)

    def error(sent: float) -> float:
        chunk = costs.chunk_s(0, 4096) * [1, sent, sent, sent]
        batch = Batch(np.zeros(1), np.zeros(1), chunk[None], np.full(1, 4096.0), True)
        high = costs.moved(dict.fromkeys(COST_PARTS, 1))
        return high.step(batch, place, load).total_s / costs.step(batch, place, load).total_s - 1

    _, beside, wire, off = costs.chunk_s(0, 4096)
    own = costs.part_errors["context parallelism of prompts"]
    assert own == pytest.approx(off / (beside + wire))
    nothing, as_told, alone = (error(sent) for sent in (0.0, 1.0, 1e6))
    assert nothing < as_told < alone == pytest.approx(own, rel=1e-3)


def test_kernels_of_more_heads_are_asked_of_a_profile() -> None:
    wanted = WORK.model_copy(update={"weight_dtype": "fp32", "phase": "decode"}), Objective(), PROFILE
    (attention,) = [gap for gap in coverage_gaps(V3, NODE, *wanted, Technique(tp=8, dcp=4)) if " attention at " in gap]
    assert "phase=decode, heads=64" in attention
    assert "--tp 2" in attention
    prefill = wanted[0].model_copy(update={"phase": "prefill"}), *wanted[1:]
    (attention,) = [gap for gap in coverage_gaps(V3, NODE, *prefill, Technique(tp=8, dcp=4)) if " attention at " in gap]
    assert "phase=prefill, heads=16" in attention


# ---------------------------------------------------------------------- prompts cut among ranks


def cut(model: ModelSpec, tp: int, cp: int) -> ServingCosts:
    how = Technique(dispatch="per_expert", tp=tp, cp=cp)
    return ServingCosts(model, NODE, WORK, how, None, 8192, 64, 65536)


@pytest.mark.parametrize(("model", "numbers"), [(LITE, 576), (SMALL, 2 * 2 * 128)])
def test_each_rank_attends_from_a_part_of_a_prompt_to_all_keys(model: ModelSpec, numbers: int) -> None:
    """Two ranks split heads, four such pairs the tokens: a quarter of the kernel, and keys from three others."""
    four, one = cut(model, 2, 4), cut(model, 2, 1)
    links = CollectiveCosts(NODE)._group("all_gather", 4, 2)
    for before, new in ((0, 4096), (16384, 512)):
        gathered = links.latency_s + 3 / 4 * new * numbers * 2 / links.bandwidth
        assert took_s(four, before, new) == pytest.approx(took_s(one, before, new) / 4 + gathered)
    assert "roofline" in four.source["context parallelism of prompts"]
    assert (four.groups, one.groups) == (1, 4)


def test_beside_attention_a_cut_prompt_is_as_many_short_ones() -> None:
    """4,096 tokens among eight ranks, or 512 on each: the same products, experts and exchange."""
    place, load = even(LITE)

    def step_s(costs: ServingCosts, tokens: float) -> float:
        groups = costs.groups
        batch = Batch(np.zeros(groups), np.zeros(groups), np.zeros((groups, 4)), np.full(groups, tokens), True)
        step = costs.step(batch, place, load)
        assert step.busy_R.shape == (8,)
        return step.total_s

    assert step_s(cut(LITE, 1, 8), 4096.0) == pytest.approx(step_s(cut(LITE, 1, 1), 512.0), rel=1e-12)
