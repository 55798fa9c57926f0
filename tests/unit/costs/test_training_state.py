"""Weights, gradients and optimizer state of a stage, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, shipped_profile_for
from moeplan.costs.training import TrainingCosts, training_step
from moeplan.costs.training_teams import expert_group
from moeplan.simulation.training import simulate_training
from moeplan.specs.clusters import cluster_for
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model
from moeplan.specs.training import TrainingSpec

DEEPSEEK = find_model("deepseek-v3")
ATTENTION = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
DENSE, MOE = 3 * 7168 * 18432, 3 * 7168 * 2048 + 7168 * 256  # block; shared expert and router
TABLE = 129280 * 7168


def _costs(model: ModelSpec, nodes: int, profile: HardwareProfile | None = None, **fields: Any) -> TrainingCosts:
    cluster, spec = cluster_for("h100", nodes, 8), TrainingSpec.parse({"global_batch": 1024, **fields}, "test")
    layers, experts = model.num_moe_layers, model.num_experts
    rows = np.tile(np.arange(experts, dtype=np.int32), (layers, 1))
    ranks = np.repeat(np.arange(spec.ep, dtype=np.int32), experts // spec.ep)
    group = expert_group(cluster, spec.ep)
    placement = Placement(rows, ranks, experts, spec.ep, group.ranks_per_node)
    return TrainingCosts(model, cluster, profile, placement, np.ones((1, layers, experts)), spec)


def test_dense_layers_weigh_where_they_are() -> None:
    costs = _costs(DEEPSEEK, 64, pp=16, ep=32, zero=0)
    for chunk in costs.chunks():
        dense = sum(layer < 3 for layer in chunk.layers)
        moe = len(chunk.layers) - dense
        parameters = len(chunk.layers) * ATTENTION + dense * DENSE + moe * MOE
        parameters += TABLE * ((chunk.layers[0] == 0) + (chunk.layers[-1] == 60))
        experts = moe * 8 * DEEPSEEK.expert_parameters  # which have no copies
        assert chunk.sync_bytes == pytest.approx(4 * parameters)
        assert chunk.state_bytes == pytest.approx(18 * (parameters + experts))  # bf16, fp32 gradients, 12 of Adam


def test_what_is_sent_between_stages_and_groups_says_where_it_is_from() -> None:
    mixtral, profile = find_model("mixtral-8x7b"), shipped_profile_for(cluster_for("h100", 1, 8).accelerator.name)
    for pp, nodes, read in ((1, 1, profile), (2, 2, profile), (1, 1, None)):
        costs = _costs(mixtral, nodes, profile=read, pp=pp, ep=8, zero=1)
        found = training_step(costs)
        synced, sent = (found.source.get(name, "") for name in ("gradients and weights", "transfers between stages"))
        assert synced.endswith("(NCCL)" if read else "H100-SXM-80GB")
        assert "gradients and weights" in found.extrapolated  # of more bytes than were measured
        assert bool(sent) == ("transfers between stages" in found.extrapolated) == (pp > 1)
        told = costs.part_errors
        assert told["gradients and weights"] > 0
        assert (told["transfers between stages"] > 0) == (pp > 1)
    alone = training_step(_costs(mixtral.model_copy(update={"num_experts": 8}), 1, ep=8, tp=8, zero=1))
    assert "gradients and weights" not in alone.source


@pytest.mark.parametrize("tp", [1, 8])
def test_layers_and_tables_are_all_there_is(tp: int) -> None:
    for name in ("deepseek-v3", "kimi-k3", "mixtral-8x7b", "hunyuan-a13b"):
        model = find_model(name)
        dense, moe = model.layer_parameters_on(tp)
        tables = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size / tp
        count = model.num_moe_layers
        whole = (model.num_layers - count) * dense + count * moe + tables
        assert whole == pytest.approx(model.non_expert_parameters_on(tp))


@pytest.mark.parametrize(("pp", "tables"), [(1, 1), (2, 2)])
def test_a_table_that_embedding_and_head_share_is_held_once_a_stage(pp: int, tables: int) -> None:
    model = find_model("hunyuan-a13b")
    assert model.tie_word_embeddings
    state = sum(chunk.state_bytes for chunk in _costs(model, 2, pp=pp, ep=8, zero=0).chunks())
    experts = model.num_moe_layers * model.num_experts // 8 * model.expert_parameters
    more = (tables - 1) * model.vocab_size * model.hidden_size
    assert state == pytest.approx(18 * (model.non_expert_parameters + more + experts))


HUNYUAN_TABLE = 128167 * 4096


@pytest.mark.parametrize(
    ("fields", "by_hand"),
    [
        ({"pp": 1}, 0.0),
        ({"pp": 2}, 8e-6 + HUNYUAN_TABLE * 4 / 50e9),  # 42 ms over a NIC to the other node: 1 x the bytes of two ranks
        ({"pp": 4, "ep": 4}, 8e-6 + HUNYUAN_TABLE * 4 / 50e9),
        ({"pp": 2, "virtual_stages": 2, "tp": 4}, 8e-6 + HUNYUAN_TABLE / 50e9),
        ({"pp": 2, "gradient_dtype": "bf16", "zero": 0}, 8e-6 + HUNYUAN_TABLE * 2 / 50e9),
        ({"pp": 2, "zero": 2}, 8e-6 + HUNYUAN_TABLE * 4 / 8 / 50e9),  # the part that one of 8 copies keeps
    ],
)
def test_stages_that_hold_an_embedding_reduce_its_gradients(fields: dict[str, Any], by_hand: float) -> None:
    costs = _costs(find_model("hunyuan-a13b"), 2, **{"ep": 8, **fields})
    chunks = costs.chunks()
    assert [chunk.tied_s > 0 for chunk in chunks] == [by_hand > 0 and c in (chunks[0], chunks[-1]) for c in chunks]
    assert chunks[0].tied_s == pytest.approx(by_hand)
    assert chunks[-1].tied_s == chunks[0].tied_s


def test_stages_of_one_node_reduce_an_embedding_over_its_own_links() -> None:
    chunks = _costs(find_model("hunyuan-a13b"), 1, pp=4, ep=2).chunks()
    assert chunks[0].tied_s == pytest.approx(3e-6 + HUNYUAN_TABLE * 4 / 450e9)  # 4.7 ms


def test_a_prediction_layer_shares_the_embedding_of_the_first_stage() -> None:
    for mtp, by_hand in ((0, 0.0), (1, 8e-6 + TABLE * 4 / 50e9)):
        chunks = _costs(DEEPSEEK, 32, pp=4, ep=32, mtp_layers=mtp).chunks()
        assert [chunk.tied_s for chunk in chunks] == pytest.approx([by_hand, 0.0, 0.0, by_hand])


def test_nothing_hides_the_reduction_of_an_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = _costs(find_model("hunyuan-a13b"), 2, pp=2, ep=8)
    chunks, played, closed = costs.chunks(), simulate_training(costs), training_step(costs)
    log = played.log
    tied = log.of_kind("gradient_sync") & (log.amount_V == HUNYUAN_TABLE * 4)
    assert np.flatnonzero(tied).size == 2  # one on each stage
    monkeypatch.setattr(costs, "chunks", lambda _replica=0: [replace(chunk, tied_s=0.0) for chunk in chunks])
    assert played.step_s - simulate_training(costs).step_s == pytest.approx(chunks[0].tied_s)
    without = training_step(costs)
    for name in ("total_s", "gradient_sync_s"):
        assert getattr(closed, name) - getattr(without, name) == pytest.approx(chunks[0].tied_s), name


@pytest.mark.parametrize("pp", [1, 2])
def test_a_prediction_layer_has_its_join_and_logits(pp: int) -> None:
    plain, more = (_costs(DEEPSEEK, 32, pp=pp, ep=32, zero=0, mtp_layers=mtp).chunks() for mtp in (0, 1))
    layer = ATTENTION + MOE + 8 * DEEPSEEK.expert_parameters + 2 * 7168**2
    layer += TABLE if pp == 2 else 0  # its stage has no embedding otherwise
    assert sum(c.state_bytes for c in more) - sum(c.state_bytes for c in plain) == pytest.approx(18 * layer)
    kept = sum(c.activation_bytes_WR[0, 0] for c in more) - sum(c.activation_bytes_WR[0, 0] for c in plain)
    attention = 2 * (3 * 7168 + 128 * (192 + 192 + 128 + 128) + 1536 + 512)
    moe = 2 * (8 * (2 * 7168 + 3 * 2048) + 3 * 2048)
    assert kept == pytest.approx(4096 * (attention + moe + 2 * 2 * 7168 + 4 * 129280))


def test_without_sharding_gradients_are_all_reduced_and_nothing_is_gathered() -> None:
    plain, sharded = (_costs(find_model("mixtral-8x7b"), 4, ep=8, zero=zero) for zero in (0, 1))
    (one,), (two,) = plain.chunks(), sharded.chunks()
    model = plain.model
    sizes = (model.non_expert_parameters, 32, 1), (32 * model.expert_parameters, 4, 8)
    reduced = sum(plain.links.seconds("all_reduce", n, 4 * size, stride).total for size, n, stride in sizes)
    assert (one.sync_s, one.gather_s) == (pytest.approx(reduced), 0.0)
    assert one.sync_s == pytest.approx(2 * two.sync_s, rel=1e-3)
    assert two.gather_s > 0


@pytest.mark.parametrize("zero", [0, 1])
def test_copies_of_an_expert_reduce_their_gradients(zero: int) -> None:
    """128 experts in order on 8 ranks, each with a 17th slot: a copy of an expert that is four ranks away."""
    model, cluster = find_model("qwen3-30b-a3b"), cluster_for("h100", 2, 8)
    spec = TrainingSpec.parse({"global_batch": 16, "ep": 8, "zero": zero}, "test")
    ranks = [[*range(16 * rank, 16 * rank + 16), (16 * rank + 64) % 128] for rank in range(8)]
    rows = np.tile(np.array(ranks, np.int32).ravel(), (48, 1))
    placement = Placement(rows, np.repeat(np.arange(8, dtype=np.int32), 17), 128, 8, 8)
    costs = TrainingCosts(model, cluster, None, placement, np.ones((1, 48, 128)), spec)
    (plain,), (chunk,) = _costs(model, 2, ep=8, zero=zero).chunks(), costs.chunks()
    slot = 48 * model.expert_parameters
    way = "reduce_scatter" if zero else "all_reduce"

    def reduced(slots: int, ranks: int, stride: int) -> float:
        return costs.links.seconds(way, ranks, 4 * slots * slot, stride).total

    # 15 slots are alike on 2 ranks, 2 on 4; before 16 on 2.
    more = reduced(15, 2, 8) + reduced(2, 4, 4) - reduced(16, 2, 8)
    assert chunk.sync_s - plain.sync_s == pytest.approx(more)
    assert more > 0
    adam = 12 * slot * ((15 / 2 + 2 / 4 - 16 / 2) if zero else 1)
    assert chunk.state_bytes - plain.state_bytes == pytest.approx(6 * slot + adam)
