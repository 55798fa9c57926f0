"""Ranks that split layers: what they reduce, hold, and send."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, load_profile
from moeplan.costs.attention import AttentionCosts
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.dense import DenseCosts
from moeplan.costs.exchange import exchange_costs
from moeplan.costs.fixed import fixed_costs
from moeplan.costs.passes import Batch, no_chunks
from moeplan.costs.serving import ServingCosts
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.costs.training import TrainingCosts
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.training import TrainingSpec
from moeplan.specs.workload import DispatchKind, Workload

MIXTRAL, DEEPSEEK = find_model("mixtral-8x7b"), find_model("deepseek-v3")
BOX = cluster_for("h100", 1, 8)
WORK = Workload(phase="decode", batch_per_rank=16, context=1024)


def contiguous(ranks: int, layers: int = 32, experts: int = 8) -> Placement:
    rows = np.tile(np.arange(experts, dtype=np.int32), (layers, 1))
    return Placement(rows, (np.arange(experts) * ranks // experts).astype(np.int32), experts, ranks, ranks)


def test_a_layer_reduces_attention_once_and_its_dense_block_once() -> None:
    for model, dispatch, shared in (
        (MIXTRAL, "per_node", 0), (DEEPSEEK, "per_node", 1), (DEEPSEEK, "allgather", 0)
    ):  # fmt: skip
        how = Technique(dispatch=dispatch, tp=4)  # type: ignore[arg-type]
        found = fixed_costs(model, BOX, WORK, 16, None, how)
        reduced = CollectiveCosts(BOX).seconds("all_reduce", 4, 64 * model.hidden_size * 2).total
        assert found.reduce.total_s == pytest.approx(reduced)
        assert found.shared.elsewhere_s == pytest.approx(shared * reduced)
        quiet = fixed_costs(model, BOX, WORK, 16, None, replace(how, tp=1))
        assert (quiet.reduce.total_s, quiet.shared.elsewhere_s) == (0.0, 0.0)


def test_ranks_that_all_hold_every_token_send_none() -> None:
    in_place, gathered = (
        exchange_costs(MIXTRAL, BOX, "allgather", "decode", "bf16", profile=load_profile("h100-sxm"), tp=tp)
        for tp in (8, 4)
    )
    reduced = CollectiveCosts(BOX, load_profile("h100-sxm")).seconds("all_reduce", 8, 128 * 4096 * 2).total
    assert in_place.time_s(16, 0.0, 7.0) == pytest.approx(reduced, rel=0.05)
    assert in_place.time_s(16, 0.0, 7.0) < gathered.time_s(16, 0.0, 7.0)


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert", "allgather"])
def test_nodes_of_one_rank_have_a_cost(dispatch: DispatchKind) -> None:
    cluster = cluster_for("h100", 8, 1)
    for profile in (None, load_profile("h100-sxm")):
        cost = StepModel(MIXTRAL, cluster, WORK, Technique(dispatch=dispatch), profile).step(
            replace(contiguous(8), ranks_per_node=1), np.ones((32, 8))
        )
        assert 0 < cost.low_s < cost.total_s < cost.high_s < 1


@pytest.mark.parametrize("dispatch", ["per_node", "allgather"])
@pytest.mark.parametrize("nodes", [1, 4])
def test_the_fullest_group_pays_a_balanced_exchange_of_its_tokens(dispatch: DispatchKind, nodes: int) -> None:
    cluster = cluster_for("h100", nodes, 8)
    profile = load_profile("h100-sxm")
    costs = ServingCosts(MIXTRAL, cluster, WORK, Technique(dispatch=dispatch), profile, 512, 256, 2048)
    uneven, even = np.ones(8 * nodes), np.full(8 * nodes, 256.0)
    uneven[0] = 256.0
    none = no_chunks(8 * nodes)
    place = Placement(
        np.tile(np.arange(8, dtype=np.int32), (32, nodes)), np.arange(8 * nodes, dtype=np.int32), 8, 8 * nodes, 8
    )
    exposed = [
        costs.step(Batch(tokens, 1024 * tokens, none, tokens, False), place, np.ones((32, 8))).exposed_s
        for tokens in (uneven, even)
    ]
    assert exposed[0] == pytest.approx(exposed[1], rel=0.15)


def test_a_placement_of_groups_is_that_of_each_of_their_ranks() -> None:
    whole = contiguous(2, layers=1)
    split = whole.over_groups(4)
    assert (split.num_ranks, split.ranks_per_node, split.num_slots) == (8, 8, 32)
    for rank in range(8):
        held = split.physical_to_logical_LP[0, split.rank_of_slot_P == rank]
        assert held.tolist() == whole.physical_to_logical_LP[0, whole.rank_of_slot_P == rank // 4].tolist()
    weighted = replace(whole, share_LP=np.ones((1, 8))).over_groups(2)
    assert weighted.share_LP is not None
    assert np.bincount(weighted.physical_to_logical_LP[0], weighted.share_LP[0]).tolist() == [1.0] * 8
    assert whole.over_groups(1) is whole


def test_key_and_value_heads_are_copied_where_they_are_fewer_than_ranks() -> None:
    spec = find_model("qwen3-235b-a22b").attention
    assert spec is not None
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (64, 4, 128)
    dense = DenseCosts(BOX.accelerator, "bf16")
    for tp, columns in ((4, (16 + 2) * 128), (8, (8 + 2) * 128), (16, (4 + 2) * 128)):
        found = AttentionCosts(spec, 4096, BOX.accelerator, True, dense, tp=tp).projections(4096)
        assert found.value.ravel()[0] == dense.product(4096, columns, 4096).total
    model = find_model("qwen3-235b-a22b")
    routers = model.num_moe_layers * 4096 * 128
    heads = 2 * 94 * 4096 * 128  # of one key and one value head
    assert model.non_expert_parameters_on(4) == (model.non_expert_parameters - routers) / 4 + routers
    split = (model.non_expert_parameters - routers) / 16 + routers
    assert model.non_expert_parameters_on(16) == split + heads - heads * 4 / 16


def test_a_window_that_was_not_measured_is_plain_attention_of_as_many_tokens() -> None:
    spec = find_model("qwen3-235b-a22b").attention
    assert spec is not None
    device, shipped = BOX.accelerator, load_profile("h100-sxm")
    dense = DenseCosts(device, "bf16", shipped)

    def costs(decode: bool, window: int) -> AttentionCosts:
        return AttentionCosts(spec, 4096, device, decode, dense, profile=shipped, window=window)

    for decode in (True, False):
        windowed, plain = costs(decode, 4096), costs(decode, 0)
        assert windowed.kernel(8.0, 1024.0).value == plain.kernel(8.0, 1024.0).value
        assert windowed.kernel(8.0, 1024.0).extrapolated == plain.kernel(8.0, 1024.0).extrapolated
    assert costs(True, 4096).kernel(8.0, 32768.0).total == costs(True, 0).kernel(8.0, 4096.0).total
    long = costs(False, 4096).kernel(1.0, 16384.0)
    assert (long.extrapolated, "cut to a window of 4096" in long.source) == (True, True)
    seen = 1 - (1 - 4096 / 16384) ** 2  # of the pairs under a causal mask
    assert long.total == pytest.approx(seen * costs(False, 0).kernel(1.0, 16384.0).total, rel=0.01)


def test_latent_projections_are_whole_on_every_rank() -> None:
    model = find_model("kimi-k3")
    wide = model.model_copy(update={"expert_hidden_size": None})
    both = 2 * model.num_moe_layers * model.hidden_size * model.routed_hidden_size
    for tp in (1, 8):
        assert model.non_expert_parameters_on(tp) == pytest.approx(wide.non_expert_parameters_on(tp) + both)


def test_a_latent_is_projected_and_permuted_at_its_width() -> None:
    model = find_model("kimi-k3")
    wide = model.model_copy(update={"expert_hidden_size": None})
    dense = DenseCosts(BOX.accelerator, "bf16")
    latent, hidden = model.routed_hidden_size, model.hidden_size
    ways = sum(dense.product(512, *way).total for way in ((latent, hidden), (hidden, latent)))
    one, other = (fixed_costs(m, BOX, WORK, 512) for m in (model, wide))
    permuted = 2 * 2 * 2 * model.top_k * 512 * (hidden - latent) / (0.8 * BOX.accelerator.memory_bandwidth)
    assert one.layer.total_s == pytest.approx(other.layer.total_s + ways - permuted)
    assert one.routing_s == pytest.approx(other.routing_s + ways - permuted)  # no part of dense layers
    assert "latent projections" in one.source


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_backward_reduces_as_often_as_forward(recompute: str) -> None:
    spec = TrainingSpec.parse({"global_batch": 8, "sequence": 4096, "tp": 4, "ep": 8, "recompute": recompute}, "test")
    loads = np.ones((1, 32, 8))

    def attention(up: float) -> tuple[float, float]:
        chip = BOX.accelerator.model_copy(update={"scale_up_bandwidth": up})
        cluster = BOX.model_copy(update={"accelerator": chip})
        costs = TrainingCosts(MIXTRAL, cluster, None, contiguous(8), loads, spec)
        return costs.teams[0].attention_s

    slow, quick = np.array(attention(1e9)), np.array(attention(450e9))
    forward, backward = slow - quick
    assert backward == pytest.approx(forward * (1 + (recompute == "full")))


def test_training_in_fp32_is_in_fp32() -> None:
    spec = TrainingSpec.parse({"global_batch": 16, "sequence": 1024, "ep": 8, "pp": 2}, "test")
    cluster = cluster_for("h100", 4, 8)
    narrow, wide = (
        TrainingCosts(MIXTRAL, cluster, None, contiguous(8), np.ones((1, 32, 8)), spec, dtype, dtype)
        for dtype in ("bf16", "fp32")
    )
    assert wide.transfer_bytes == 2 * narrow.transfer_bytes
    one, two = narrow.chunks()[0], wide.chunks()[0]
    assert two.activation_bytes_WR.tolist() == (2 * one.activation_bytes_WR).tolist()
    assert two.gather_s > 1.5 * one.gather_s
    assert two.sync_s == one.sync_s  # gradients are in gradient_dtype
    # Weights, gradients, and a master copy beside weights in bf16 alone; the optimizer's state is split over copies.
    assert two.state_bytes > one.state_bytes


def test_own_rows_that_do_not_serve_do_not_keep_others_out() -> None:
    meta = ProfileMeta(name="mine", accelerator="H100-SXM-80GB", date="2026-11-30", command="none")
    shipped = load_profile("h100-sxm")
    own = shipped.select("alltoall", nodes=1).to_pylist()
    for mark, lent in (("", False), ("outlier", True)):
        rows = pa.Table.from_pylist([row | {"mark": mark} for row in own])
        both = HardwareProfile(meta, {"alltoall": rows}).with_exchanges_of(shipped)
        assert (1 in both.lent["alltoall"][1]) == lent
