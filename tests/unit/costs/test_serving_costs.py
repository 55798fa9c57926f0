"""Step costs of a serving engine: tables against the step model asked directly, and the parts against each other."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, Source, load_profile
from moeplan.costs.attention import AttentionCosts
from moeplan.costs.dense import DenseCosts
from moeplan.costs.elementwise import PassCosts
from moeplan.costs.fixed import fixed_costs
from moeplan.costs.kv_cache import kv_bytes_per_token, kv_room, kv_transfer_s, ranks_that_hold
from moeplan.costs.passes import Batch, no_chunks
from moeplan.costs.serving import COST_PARTS, ServingCosts
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.costs.token_grid import grid, stairs
from moeplan.errors import InfeasibleError
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.serving import EngineSpec
from moeplan.specs.workload import Workload

MODEL, CLUSTER, PROFILE = find_model("deepseek-v3"), cluster_for("h100", 4, 8), load_profile("h100-sxm")
LAYERS, EXPERTS, RANKS = MODEL.num_moe_layers, MODEL.num_experts, 32
WORK = Workload(weight_dtype="fp8", activation_dtype="fp8")
LOAD = np.random.default_rng(0).gamma(1.0, 1.0, (LAYERS, EXPERTS))
PLACE = Placement(
    np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, 1)), np.repeat(np.arange(RANKS), 8).astype(np.int32),
    EXPERTS, RANKS, 8,
)  # fmt: skip


def costs(cluster: ClusterSpec = CLUSTER, **technique: object) -> ServingCosts:
    how = Technique(**{"dispatch": "per_expert", **technique})  # type: ignore[arg-type]
    return ServingCosts(MODEL, cluster, WORK, how, PROFILE, 8192, 256, 8192)


def decode(groups: int, tokens: float, context: float) -> Batch:
    every = np.full(groups, tokens)
    return Batch(every, every * (context - 1), no_chunks(groups), every, False)


def error(found: ServingCosts, batch: Batch, load: np.ndarray, place: Placement = PLACE) -> float:
    """Relative error of a step all of whose parts are at the high end."""
    high = found.moved(dict.fromkeys(COST_PARTS, 1))
    return high.step(batch, place, load).total_s / found.step(batch, place, load).total_s - 1


@pytest.mark.parametrize("overlap", ["none", "shared_expert", "two_batch", "shortcut"])
@pytest.mark.parametrize("tp", [1, 4])
def test_equal_decode_batches_equal_the_step_model(overlap: str, tp: int) -> None:
    found, rng = costs(overlap=overlap, tp=tp), np.random.default_rng(1)
    how = Technique(dispatch="per_expert", overlap=overlap, tp=tp)  # type: ignore[arg-type]
    for _ in range(4):
        batch, context = 2 * int(2 ** rng.uniform(1, 5)), int(2 ** rng.uniform(5, 13))
        work = WORK.model_copy(update={"phase": "decode", "batch_per_rank": batch, "context": context})
        want = StepModel(MODEL, CLUSTER, work, how, PROFILE).step(PLACE, LOAD)
        batch_D = decode(RANKS // tp, float(batch * tp), context)
        assert found.step(batch_D, PLACE, LOAD).total_s == pytest.approx(want.total_s, rel=0.02)
        off, known = error(found, batch_D, LOAD), want.high_s / want.total_s - 1
        assert off == pytest.approx(known, rel=0.25) if overlap == "none" else 0 < off < 1.25 * known  # some is hidden


def test_every_other_layer_of_gpt_oss_sees_its_window() -> None:
    """Reading keys and values bounds the kernel: of 128 tokens in half of the layers, of all in the others."""
    model, batch, context = find_model("gpt-oss-120b"), 64, 8192
    work = Workload.model_validate({"phase": "decode", "batch_per_rank": batch, "context": context})
    bandwidth = 0.8 * CLUSTER.accelerator.memory_bandwidth
    queries = 4 * batch * 64 * 64
    by_hand = sum(batch * seen * 2 * 8 * 64 * 2 + queries for seen in (128, context)) / 2 / bandwidth
    assert fixed_costs(model, CLUSTER, work, batch).kernel_s == pytest.approx(by_hand)

    def total_s(context: int) -> float:
        how = Technique(dispatch="per_expert")
        serving = ServingCosts(model, CLUSTER, work, how, None, 4096, 256, 16384)
        ranks = np.repeat(np.arange(RANKS), 4).astype(np.int32)
        place = Placement(np.tile(np.arange(128, dtype=np.int32), (36, 1)), ranks, 128, RANKS, 8)
        return serving.step(decode(RANKS, float(batch), context), place, np.ones((36, 128))).total_s

    longer = 18 * batch * (16384 - 8192) * 2 * 8 * 64 * 2 / bandwidth  # the other 18 layers see no more
    assert total_s(16384) - total_s(8192) == pytest.approx(longer, rel=0.02)


def test_equal_prompts_equal_the_step_model() -> None:
    found = costs()
    # Between 256 and 384 tokens, points of the grid, another kernel takes over: one more shared, and less by expert.
    for prompts, length, off in ((1, 200, 0.02), (1, 300, 0.08), (1, 2000, 0.02), (3, 2048, 0.02)):
        tokens = prompts * length
        work = WORK.model_copy(update={"phase": "prefill", "batch_per_rank": tokens, "context": length})
        how = Technique(dispatch="per_node")  # whose decode sends per expert prefills in the normal mode
        want = StepModel(MODEL, CLUSTER, work, how, PROFILE).step(PLACE, LOAD)
        chunks = np.tile(prompts * found.chunk_s(0, length), (RANKS, 1))
        batch = Batch(np.zeros(RANKS), np.zeros(RANKS), chunks, np.full(RANKS, float(tokens)), True)
        assert found.step(batch, PLACE, LOAD).total_s == pytest.approx(want.total_s, rel=off)


@pytest.mark.parametrize("new", [4096, 8192])
def test_a_prompt_of_one_group_leaves_over_its_own_nic(new: int) -> None:
    """Eight choices touch 4 (1 - (3/4)^8) nodes of four, three quarters of them others: that many copies of 7,168 bytes
    with 56 scales go out, and in 16 bits come back, at 50 GB/s. Kernels as measured reach 0.8 of that and more."""
    found, every, chunks = costs(), np.full(RANKS, 16.0), no_chunks(RANKS)
    chunks[3] = found.chunk_s(0, new)
    tokens = every + new * (np.arange(RANKS) == 3)
    step = found.step(Batch(every, every * 1000.0, chunks, tokens, True), PLACE, LOAD)
    copies = 4 * (1 - 0.75**8) * 0.75
    wire_s = new * copies * (7168 + 4 * 56 + 2 * 7168) / 50e9
    assert 1.0 < step.exposed_s / LAYERS / wire_s < 1.25


def test_stages_send_on_hidden_states_and_residuals() -> None:
    """Three stages of a node each: two hops of two tensors in 16 bits over a NIC, 256 tokens on each rank."""
    nodes = CLUSTER.model_copy(update={"num_nodes": 3 * CLUSTER.num_nodes})
    batch = decode(RANKS, 256.0, 1024.0)
    plain = costs().step(batch, PLACE, LOAD)
    how = Technique(dispatch="per_expert")
    piped = ServingCosts(MODEL, CLUSTER, WORK, how, PROFILE, 8192, 256, 8192, nodes)
    found = piped.step(batch, PLACE, LOAD)
    hop_s = nodes.nic_latency + 256 * 2 * MODEL.hidden_size * 2 / nodes.accelerator.nic_bandwidth
    assert found.total_s - plain.total_s == pytest.approx(2 * hop_s)
    assert found.exposed_s - plain.exposed_s == pytest.approx(2 * hop_s)
    assert "transfers between stages" in piped.source


LITE = find_model("deepseek-v2-lite")  # 4 KiB of a hidden state and 4 KiB of residual a token
BOX = cluster_for("h100", 1, 8)
LITE_PLACE = Placement(
    np.tile(np.arange(64, dtype=np.int32), (26, 1)), np.repeat(np.arange(8, dtype=np.int32), 8), 64, 8, 8
)


def _lite(stages: int, slow: float = 1.0) -> ServingCosts:
    """Stages of a box each, in groups of two ranks; transfers are measured to 1 MiB, gathers to 64 MiB, both with a
    start of 100 us and then 10 GB/s. ``slow``: speed of the links of rank 3."""
    ops = {("p2p", 2): 2**20, ("all_gather", 1): 2**26}
    rows = [
        {"op": op, "dtype": "bf16", "ranks": 2, "nodes": nodes, "message_size_bytes": size, "backend": "nccl",
         "kernel": "NCCL", "source": op, "latency_us": 100 + size / 1e4}
        for (op, nodes), most in ops.items()
        for size in 2 ** np.arange(8, 27) if size <= most
    ]  # fmt: skip
    meta = ProfileMeta(name="toy", accelerator="toy", date="2026-11-30", command="none", sources={})
    profile = HardwareProfile(meta, {"collectives": pa.Table.from_pylist(rows)})
    one = BOX.model_copy(update={"ranks": {3: RankSpec(link_speed=slow)}})
    whole = BOX.model_copy(update={"num_nodes": stages}) if stages > 1 else None
    how = Technique(dispatch="per_node", tp=2)
    return ServingCosts(LITE, one, Workload(), how, profile, 2048, 256, 2048, whole)


@pytest.mark.parametrize(("tokens", "beyond"), [(64, False), (256, True)])
def test_what_stages_send_on_says_where_it_is_from_and_how_sure(tokens: int, beyond: bool) -> None:
    even, batch = np.ones((26, 64)), decode(4, 2.0 * tokens, 1024.0)
    found = _lite(3)
    found.step(decode(4, 2.0 * (320 - tokens), 1024.0), LITE_PLACE, even)
    found.clear()  # another run rests on what it asks for itself
    single = _lite(1)
    step, alone = found.step(batch, LITE_PLACE, even), single.step(batch, LITE_PLACE, even)
    names = ("transfers between stages", "gathers between stages")
    told = [found.source[name].partition(":")[0] for name in names]
    assert told == ["extrapolated" if beyond else "measured", "measured"]
    assert [name in found.extrapolated for name in names] == [beyond, False]
    # Two hops, and a gather of twice as much after each, whose seconds weigh what they miss by.
    by_hand = 2 * np.array([1e-4 + tokens * 8192 / 1e10, 1e-4 + tokens * 16384 / 1e10])
    assert step.total_s - alone.total_s == pytest.approx(by_hand.sum(), rel=0.15 if beyond else 0.02)
    by_hand[0] += step.total_s - alone.total_s - by_hand.sum()
    off, off_alone = error(found, batch, even, LITE_PLACE), error(single, batch, even, LITE_PLACE)
    misses = alone.total_s * off_alone + float(by_hand @ [found.part_errors[name] for name in names])
    assert off == pytest.approx(misses / step.total_s)
    assert off != pytest.approx(off_alone, rel=0.01)


def test_what_stages_send_on_waits_for_a_slow_link() -> None:
    """It comes in over it and goes on over it, and is gathered over it once: of each the bytes take twice as long."""
    even, batch = np.ones((26, 64)), decode(4, 128.0, 1024.0)
    sent = [
        np.subtract(*(_lite(stages, slow).step(batch, LITE_PLACE, even).total_s for stages in (3, 1)))
        for slow in (1.0, 0.5)
    ]
    assert sent[1] - sent[0] == pytest.approx(2 * (2 * 64 * 8192 + 64 * 16384) / 1e10, rel=0.01)


def test_few_tokens_hit_few_experts() -> None:
    found = costs()
    one = decode(RANKS, 0.0, 100.0)
    one.decodes_D[0] = one.tokens_D[0] = 1.0
    one.cached_D[0] = 99.0
    assert found.step(one, PLACE, LOAD).total_s < found.step(decode(RANKS, 1.0, 100.0), PLACE, LOAD).total_s
    want = StepModel(
        MODEL, CLUSTER, WORK.model_copy(update={"phase": "decode", "batch_per_rank": 1}),
        Technique(dispatch="per_expert"), PROFILE, tokens=1.0,
    ).step(PLACE, LOAD)  # fmt: skip
    table = found.table(PLACE, LOAD, "decode")
    b, weight = found._at(table, 1 / RANKS)
    line = table.expert_BL[b] + weight * (table.expert_BL[b + 1] - table.expert_BL[b])
    assert line == pytest.approx(want.expert_s_LR.max(1), rel=1e-6)


def test_chunks_of_a_prompt_add_up_to_it() -> None:
    found = costs()
    parts = sum(found.chunk_s(before, 512)[0] for before in range(0, 4096, 512))
    assert parts == pytest.approx(found.chunk_s(0, 4096)[0], rel=1e-9)
    assert found.chunk_s(3584, 512)[0] > 3 * found.chunk_s(0, 512)[0]
    dense = DenseCosts(CLUSTER.accelerator, "fp8", PROFILE)
    assert MODEL.attention is not None
    direct = AttentionCosts(MODEL.attention, MODEL.hidden_size, CLUSTER.accelerator, False, dense, "bf16", PROFILE)
    whole = direct.kernel(1, 4096).total - direct.kernel(1, float(grid(8192)[0])).total
    assert found.chunk_s(0, 4096)[0] == pytest.approx(whole, rel=0.01)


def test_a_chunk_after_a_long_context_takes_what_the_kernel_takes_longer() -> None:
    found = ServingCosts(MODEL, CLUSTER, WORK, Technique(dispatch="per_expert"), PROFILE, 8192, 16, 131072)
    dense = DenseCosts(CLUSTER.accelerator, "fp8", PROFILE)
    assert MODEL.attention is not None
    direct = AttentionCosts(MODEL.attention, MODEL.hidden_size, CLUSTER.accelerator, False, dense, "bf16", PROFILE)
    before = np.arange(16384, 129024, 2048)
    shorter, longer = (direct.kernel(np.ones(len(before)), before + more).value for more in (0, 2048))
    np.testing.assert_allclose([found.chunk_s(int(tokens), 2048)[0] for tokens in before], longer - shorter, rtol=0.03)


def test_the_fullest_group_sets_the_pace_and_the_others_wait() -> None:
    found = costs()
    even, uneven = decode(RANKS, 100.0, 4000.0), decode(RANKS, 97.0, 4000.0)
    uneven.decodes_D[5] = uneven.tokens_D[5] = 193.0  # as many in all
    uneven.cached_D[5] = 193 * 3999.0
    slow, fast = found.step(uneven, PLACE, LOAD), found.step(even, PLACE, LOAD)
    assert slow.total_s > fast.total_s
    more_R = slow.busy_R - fast.busy_R
    assert more_R[5] > 0
    assert more_R[5] > 5 * np.delete(more_R, 5).max()
    assert (slow.busy_R + slow.exposed_s <= slow.total_s + 1e-12).all()


def test_slow_ranks_and_slow_links_take_longer() -> None:
    batch, base = decode(RANKS, 64.0, 1000.0), costs()
    usual = base.step(batch, PLACE, LOAD)
    for change in ({"speed": 0.5}, {"link_speed": 0.5}):
        slow = costs(CLUSTER.model_copy(update={"ranks": {3: RankSpec.model_validate(change)}}))
        found = slow.step(batch, PLACE, LOAD)
        assert 1.02 < found.total_s / usual.total_s < 2.0
    assert found.exposed_s > usual.exposed_s


@pytest.mark.parametrize(("highest", "lowest"), [(1, 1.0), (1.5, 1.0), (2, 1.0), (1, 0.125), (3000, 1.0)])
def test_a_line_always_has_two_ends(highest: float, lowest: float) -> None:
    points = grid(highest, lowest)  # kernels read the point after the one at or below without a look at its number
    assert len(points) >= 2
    assert points[0] <= lowest
    assert points[-1] >= highest


def test_grid_has_one_and_a_half_steps() -> None:
    assert grid(100).tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert grid(2, 1 / 3).tolist() == [0.25, 0.375, 0.5, 0.75, 1, 2]


def test_one_token_more_than_tiles_hold_is_a_point_of_its_own() -> None:
    assert stairs(grid(200)).tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 65, 96, 97, 128, 129, 192, 193, 256]
    assert stairs(grid(32), tp=4).tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 25, 32]


# ---------------------------------------------------------------------- KV cache


def test_kv_bytes_by_hand() -> None:
    # MLA: (512 + 64) numbers of 2 bytes in 61 layers, whole on every rank; GQA heads are split.
    assert kv_bytes_per_token(MODEL, EngineSpec(tp=4), 4096) == 61 * 576 * 2
    assert kv_bytes_per_token(MODEL, EngineSpec(pp=2, kv_dtype="fp8"), 4096) == 61 * 576 / 2
    mixtral = find_model("mixtral-8x7b")  # 32 layers, 8 KV heads of 128, keys and values
    assert kv_bytes_per_token(mixtral, EngineSpec(), 4096) == 32 * 2 * 8 * 128 * 2
    assert kv_bytes_per_token(mixtral, EngineSpec(tp=4), 4096) == 32 * 2 * 2 * 128 * 2
    assert kv_bytes_per_token(mixtral, EngineSpec(tp=16), 4096) == 32 * 2 * 1 * 128 * 2


def test_what_does_not_fit_says_how_much_and_what_would() -> None:
    engine = EngineSpec()
    cluster = cluster_for("h100", 1, 8)
    with pytest.raises(InfeasibleError, match=r"exceeded by (\d+) bytes .* use (\d+) ranks or more") as caught:
        kv_room(MODEL, cluster, WORK, engine, np.full(8, 32))
    enough = ranks_that_hold(MODEL, cluster, WORK, engine)
    assert f"use {enough} ranks" in str(caught.value)
    assert enough is not None
    slots = -(-EXPERTS // enough)
    assert kv_room(MODEL, cluster_for("h100", 1, enough), WORK, engine, np.full(enough, slots)).free_bytes > 0
    fewer = enough - 1
    with pytest.raises(InfeasibleError, match="does not fit"):
        kv_room(MODEL, cluster_for("h100", 1, fewer), WORK, engine, np.full(fewer, -(-EXPERTS // fewer)))


def test_transfers_take_latency_and_bandwidth() -> None:
    assert kv_transfer_s(5e9, 50e9, 1e-5) == pytest.approx(0.10001)


def _copies() -> HardwareProfile:
    """A profile of copies alone: 10 us and 40 GB/s from pinned memory out, 20 back; others are not for swaps."""
    rates = {
        ("device_to_host", "pinned", 0): 40e9, ("host_to_device", "pinned", 0): 20e9,
        ("device_to_host", "pageable", 0): 1e9, ("host_to_device", "pinned", 1): 2e9,
    }  # fmt: skip
    rows = [
        {
            "op": op, "host_memory": host, "overlapped": overlapped, "message_size_bytes": size,
            "backend": "moeplan", "kernel": "copy_", "source": "mine", "latency_us": 10 + size / rate * 1e6,
        }
        for (op, host, overlapped), rate in rates.items()
        for size in 4096 * 4 ** np.arange(8)
    ]  # fmt: skip
    sources = {"mine": Source(kind="measured", title="by hand", version="1")}
    meta = ProfileMeta(name="toy", accelerator="toy", date="2026-11-30", command="none", sources=sources)
    return HardwareProfile(meta, {"memory": pa.Table.from_pylist(rows)})


def test_caches_go_to_the_host_and_back_as_copies_were_measured() -> None:
    def of(profile: HardwareProfile | None) -> ServingCosts:
        return ServingCosts(MODEL, CLUSTER, WORK, Technique(dispatch="per_expert"), profile, 64, 16, 1024)

    found = of(_copies())
    for size in (4096, 16384, 3e6, 4096 * 4**7):
        for to_host, rate in ((True, 40e9), (False, 20e9)):
            assert found.swap_s(size, to_host) == pytest.approx(1e-5 + size / rate, rel=0.05), (size, to_host)
    assert {found.source[f"caches {way} the host"] for way in ("to", "from")} == {"interpolated: mine (copy_)"}
    assert not found.extrapolated
    # Beyond the largest in proportion, and said.
    assert found.swap_s(4096 * 4**8, True) == pytest.approx(4 * found.swap_s(4096 * 4**7, True))
    assert found.extrapolated == {"caches to the host"}
    found.clear()  # another run rests on what it asks for itself
    assert not found.source
    assert not found.extrapolated
    plain, bus = of(None), CLUSTER.accelerator.pcie_bandwidth
    assert bus is not None
    assert plain.swap_s(3e9, True) == plain.swap_s(3e9, False) == pytest.approx(3e9 / bus)
    assert plain.extrapolated == {"caches to the host", "caches from the host"}


# ---------------------------------------------------------------------- drafts


@pytest.mark.parametrize("drafts", [1, 3])
def test_a_step_with_drafts_by_hand(drafts: int) -> None:
    """Of more tokens through all layers, then one layer over them all, then over one token of each sequence."""
    batch, context, queries = 256.0, 4096, 1 + drafts  # so many that the head does not only read its weights
    how = Technique(dispatch="per_expert", draft_tokens=drafts)
    found = ServingCosts(MODEL, CLUSTER, WORK, how, None, 8192, 256, 8192)
    every = np.full(RANKS, batch)
    step = Batch(every, every * (context - 1), no_chunks(RANKS), every * queries, False)

    def pass_s(tokens: int, kernel_s: float, layers: int) -> float:
        work = WORK.model_copy(update={"phase": "decode", "batch_per_rank": tokens, "context": context})
        model = StepModel(MODEL, CLUSTER, work, how, None)
        cost, fixed = model.step(PLACE, LOAD), model.fixed
        more = kernel_s - fixed.kernel_s  # the step model has as many sequences as tokens
        if layers == 1:
            head = StepModel(MODEL, CLUSTER, work.model_copy(update={"batch_per_rank": 256}), how).fixed.head
            return float(cost.layer_s_L.mean()) + more + fixed.draft.total_s + head.total_s
        return cost.total_s + more * MODEL.num_layers

    device, dense = CLUSTER.accelerator, DenseCosts(CLUSTER.accelerator, "fp8")
    assert MODEL.attention is not None
    kernel = AttentionCosts(MODEL.attention, MODEL.hidden_size, device, True, dense)
    one_s, checked_s = (float(kernel.work(np.array([batch]), np.array([4096.0]), q)[0]) for q in (1, queries))
    tokens = int(batch) * queries
    wanted = pass_s(tokens, checked_s, 61) + pass_s(tokens, checked_s, 1)
    wanted += (drafts - 1) * pass_s(int(batch), one_s, 1)
    assert found.step(step, PLACE, LOAD).total_s == pytest.approx(wanted, rel=1e-3)


def test_a_draft_takes_embedding_projection_and_the_whole_head() -> None:
    work = WORK.model_copy(update={"phase": "decode", "batch_per_rank": 64})
    passes, dense = PassCosts(CLUSTER.accelerator, "bf16", 7168, 256, 8), DenseCosts(CLUSTER.accelerator, "fp8")
    parts = (dense.product(64, 7168, 14336), passes.seconds("embedding", 64))
    by_hand = sum(part.total for part in parts) + 2 * passes.seconds("norm", 64).total
    found = fixed_costs(MODEL, CLUSTER, work, 64, None, Technique(draft_tokens=1))
    assert found.draft.total_s == pytest.approx(by_hand)
    assert found.head.total_s == pytest.approx(dense.product(64, 129280, 7168).total)


def test_in_a_pipeline_only_the_last_stage_drafts() -> None:
    """And drafts are sent on to no other stage."""
    plain = ServingCosts(MODEL, CLUSTER, WORK, Technique(dispatch="per_expert", draft_tokens=3), None, 8192, 64, 8192)
    wide = cluster_for("h100", 2 * CLUSTER.num_nodes, CLUSTER.ranks_per_node)
    piped = ServingCosts(MODEL, CLUSTER, WORK, plain.technique, None, 8192, 64, 8192, wide)
    every = np.full(RANKS, 16.0)
    batch = Batch(every, every * 4095, no_chunks(RANKS), 4 * every, False)
    alone, step = (costs.step(batch, PLACE, LOAD) for costs in (plain, piped))
    passes = plain.passes(batch)
    drafts_s = sum(each.times * plain.pass_seconds(each, PLACE, LOAD).total_s for each in passes[1:])
    assert step.total_s > alone.total_s
    for found in (alone, step):
        assert found.drafts is not None
        assert found.drafts.total_s == pytest.approx(drafts_s)
    first, last = (step.of_stage(2, last) for last in (False, True))
    assert first.total_s == pytest.approx((step.total_s - drafts_s) / 2)
    assert last.total_s - first.total_s == pytest.approx(drafts_s)
    np.testing.assert_allclose(first.busy_R + last.busy_R, step.busy_R)
    assert first.exposed_s + last.exposed_s == pytest.approx(step.exposed_s)


def test_the_last_stage_has_room_for_least() -> None:
    """61 layers in two stages and the prediction layer in the second: as many weights and as much cache as 31.5."""
    slots = np.full(RANKS, 8)
    engine = EngineSpec(pp=2)
    rooms = [kv_room(MODEL.with_prediction_layer(times), CLUSTER, WORK, engine, slots) for times in (0, 2)]
    layer = kv_room(MODEL.with_prediction_layer(), CLUSTER, WORK, EngineSpec(), slots).expert_bytes - kv_room(
        MODEL, CLUSTER, WORK, EngineSpec(), slots
    ).expert_bytes
    assert rooms[1].expert_bytes - rooms[0].expert_bytes == layer
    assert kv_bytes_per_token(MODEL.with_prediction_layer(2), engine, 4096) == 31.5 * 576 * 2


def test_a_dense_prediction_layer_routes_nothing() -> None:
    """Attention, norms and a dense block of its own, beside what every draft takes; no router, experts or exchange."""
    tokens, context = 64, 4096
    dense = MODEL.model_copy(update={"prediction_intermediate_size": 18432})
    how = Technique(dispatch="per_expert", draft_tokens=1)
    work = WORK.model_copy(update={"phase": "decode", "batch_per_rank": tokens, "context": context})
    drafting = {}
    for model in (MODEL, dense):
        found = ServingCosts(model, CLUSTER, WORK, how, None, 8192, 64, 8192)
        every = np.full(RANKS, tokens / 2)
        _, draft = found.passes(Batch(every, every * (context - 1), no_chunks(RANKS), 2 * every, False))
        drafting[model.prediction_intermediate_size] = found.pass_seconds(draft, PLACE, LOAD)
    fixed = fixed_costs(MODEL, CLUSTER, work, tokens, None, how)
    block = DenseCosts(CLUSTER.accelerator, "fp8").ffn(tokens, 7168, 18432, True).total
    routed = StepModel(MODEL, CLUSTER, work, how).step(PLACE, LOAD)
    more = float(routed.layer_s_L.mean()) - fixed.layer.total_s + fixed.routing_s  # experts, shared ones, exchange
    apart = drafting[0].total_s - drafting[18432].total_s
    assert apart == pytest.approx(more - block, rel=1e-3)
    assert drafting[18432].exposed_s == 0.0 < drafting[0].exposed_s
    assert drafting[18432].busy_R == pytest.approx(drafting[18432].total_s)  # all alike


def test_a_dense_prediction_layer_has_the_weights_that_are_published() -> None:
    """0.33 G parameters of MiMo-V2-Flash's (its model card), of which 94 M are of attention that the spec lacks."""
    mimo = find_model("mimo-v2-flash")
    more = mimo.with_prediction_layer()
    assert more.total_parameters - mimo.total_parameters == pytest.approx(0.33e9 - 94e6, rel=0.01)
    assert more.num_moe_layers == mimo.num_moe_layers


def test_checking_drafts_is_said_to_go_beyond_measurements() -> None:
    for profile in (PROFILE, None):
        how = Technique(dispatch="per_expert", draft_tokens=1)
        found = ServingCosts(MODEL, CLUSTER, WORK, how, profile, 64, 32, 4096)
        found.step(decode(RANKS, 16.0, 2048), PLACE, LOAD)
        assert ("attention of drafts that are checked" in found.extrapolated) == (profile is not None)


def test_a_prediction_layer_has_its_weights_and_cache() -> None:
    """DeepSeek-V3's has 11.5 G parameters of its own (README_WEIGHTS.md), without embedding and head."""
    more = MODEL.with_prediction_layer()
    assert more.total_parameters - MODEL.total_parameters == pytest.approx(11.5e9, rel=0.01)
    assert kv_bytes_per_token(more, EngineSpec(), 4096) == 62 * 576 * 2
    slots = np.full(RANKS, 8)
    plain, drafting = (kv_room(model, CLUSTER, WORK, EngineSpec(), slots) for model in (MODEL, more))
    assert drafting.expert_bytes - plain.expert_bytes == 8 * 3 * 7168 * 2048
    assert plain.tokens is not None
    assert drafting.tokens is not None
    assert drafting.tokens < plain.tokens


def test_parts_that_are_off_move_what_they_are_of() -> None:
    """At a grid point, where parts of the step model are known: each part's seconds by its own error, up and down."""
    found = costs()
    batch = decode(RANKS, 64.0, 1024.0)
    model = found.model_at("decode", 64.0)
    base, whole = found.step(batch, PLACE, LOAD), model.step(PLACE, LOAD)
    seconds = {"experts": whole.expert_s_LR.max(1).sum(), "exchange": whole.exchange_s_L.sum()}
    seconds["attention and dense parts"] = base.total_s - sum(seconds.values())
    assert set(seconds) == set(COST_PARTS)
    for name, part_s in seconds.items():
        for end in (-1, 1):
            step = found.moved({name: end}).step(batch, PLACE, LOAD)
            factor = (1 + model.part_errors[name]) ** end
            assert step.total_s - base.total_s == pytest.approx(part_s * (factor - 1), rel=1e-6), (name, end)
            assert (step.exposed_s == pytest.approx(base.exposed_s)) == (name != "exchange")
    assert found.step(batch, PLACE, LOAD).total_s == base.total_s  # they are as they were
