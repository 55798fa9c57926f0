"""Training with experts split over neighbouring ranks: by hand, in limits, conserved, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, Source
from moeplan.costs.exchange import touched
from moeplan.costs.training import TrainingCosts
from moeplan.errors import MoeplanError
from moeplan.pipeline.exports import import_plan
from moeplan.pipeline.training import simulate_training
from moeplan.simulation.training import simulate_training as play
from moeplan.specs.cluster import RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.scenario import Scenario
from moeplan.specs.training import TrainingSpec
from moeplan.specs.workload import DispatchKind

MIXTRAL = find_model("mixtral-8x7b")  # 32 MoE layers of 8 experts, 2 for each token; 4096 wide, experts 14336
EXPERT = 3 * 4096 * 14336
DISPATCH = get_args(DispatchKind)


def _costs(
    nodes: int = 1,
    dispatch: DispatchKind = "per_expert",
    load: Any = None,
    profile: Any = None,
    ranks: dict[int, RankSpec] | None = None,
    **fields: Any,
) -> TrainingCosts:
    cluster = cluster_for("h100", nodes, 8).model_copy(update={"ranks": ranks or {}})
    spec = TrainingSpec.parse({"global_batch": 64, **fields}, "training")
    place = np.repeat(np.arange(spec.ep, dtype=np.int32), 8 // spec.ep)
    per_node = max(1, min(spec.ep, 8 // spec.expert_tp))
    placement = Placement(np.tile(np.arange(8, dtype=np.int32), (32, 1)), place, 8, spec.ep, per_node)
    load = np.ones((1, 32, 8)) if load is None else load
    return TrainingCosts(MIXTRAL, cluster, profile, placement, load, spec, dispatch=dispatch)


def test_a_layer_by_hand_where_the_same_ranks_split_attention_and_experts() -> None:
    """8 ranks, tp 2, experts on 4 pairs of ranks: 2048 tokens on a rank, 2 experts split in two with 4096 rows each."""
    costs = _costs(tp=2, expert_tp=2, ep=4, zero=0)
    batch = costs.teams[0].batches_W[0]
    weights = EXPERT / 2 * 2 / (0.8 * 3.35e12)
    products = (4096 + 64 / 2) * 2 * EXPERT / 2 / 989e12  # half a tile of 64 rows too much
    stream = 4096 * 2 * (2 * 4096 + 3 * 14336 / 2) / (0.8 * 3.35e12)
    assert batch.expert_s_LR == pytest.approx(2 * (np.hypot(weights, products) + stream), rel=2e-3)
    assert batch.pairs_LR == pytest.approx(8192.0)
    # Each token goes to 2 experts, 3 of 4 of them elsewhere, and back; then the 8192 rows of both ranks are gathered.
    sent = 2 * 3e-6 + 2048 * 2 * 3 / 4 * 2 * 8192 / 450e9
    gathered = 2 * (3e-6 + 8192 * 8192 / 2 / 450e9)
    assert batch.exchange_s_L == pytest.approx(sent + gathered)
    assert batch.gather_s_L == pytest.approx(gathered)
    (chunk,) = costs.chunks()
    assert chunk.state_bytes == pytest.approx(18 * (MIXTRAL.non_expert_parameters_on(2) + 32 * 2 * EXPERT / 2))
    # Of 8192 rows what arrives, and half of what is inside and returns; the same of the rest as without.
    alone = _costs(tp=2, ep=8, zero=0).chunks()[0]
    rows, single = 8192 * (4096 + (3 * 14336 + 4096) / 2), 4096 * (4096 + 3 * 14336 + 4096)
    assert (chunk.activation_bytes_WR - alone.activation_bytes_WR) / 32 == pytest.approx(2 * (rows - single))


def test_one_group_that_splits_all_experts_gathers_and_sends_nothing_else() -> None:
    batch = _costs(ep=1, expert_tp=8).teams[0].batches_W[0]
    assert batch.exchange_s_L == pytest.approx(2 * (3e-6 + 8 * 4096 * 2 * 8192 * 7 / 8 / 450e9))
    assert batch.gather_s_L == pytest.approx(batch.exchange_s_L)


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_what_is_sent_by_dispatch_kind(dispatch: DispatchKind) -> None:
    """16 ranks on 2 nodes, 4 pairs of them on each: bytes of a whole step into ranks, balanced loads."""
    document = {
        "model": "mixtral-8x7b", "cluster": "h100", "ranks": 16, "nodes": 2, "profile": "none",
        "objective": {"dispatch": dispatch},
        "training": {"global_batch": 16, "ep": 8, "expert_tp": 2, "experts": "balanced", "recompute": "full"},
    }  # fmt: skip
    found = simulate_training(Scenario.parse(document, "test"))
    # Copies of a token from its rank to others, of which those to its own rank are none.
    inside = touched(8, 2) * 2 * (1 - 1 / 16)
    copies = {
        "per_expert": 2 * (7 / 8) + 2,  # to a rank of another group, and to the other of the group
        "per_rank": inside,
        "per_node": inside - touched(8, 2) / 8 + 1 - (1 / 2) ** 2,  # to a forwarder, which keeps its own
        "allgather": 7 + 1 + 7,  # to its node, and over one rank of the other to its ranks
    }
    sent = 3 * 32 * 16 * 4096 * copies[dispatch] * 2 * 8192  # three passes of 32 layers, there and back
    assert np.sum(found.traffic.sent) == pytest.approx(sent, rel=1e-6)


@pytest.mark.parametrize(("dispatch", "copies"), [("per_expert", 2 * (7 / 8) + 2), ("per_rank", 2 * 2 * (1 - 1 / 16))])
def test_recorded_tokens_go_to_all_ranks_of_their_experts(dispatch: str, copies: float, tmp_path: Path) -> None:
    """Two experts of each token are on two of 8 groups."""
    np.savez(tmp_path / "t.npz", experts=np.random.default_rng(0).random((512, 32, 8)).argsort(axis=2)[..., :2])
    document = {
        "model": "mixtral-8x7b", "cluster": "h100", "ranks": 16, "nodes": 2, "profile": "none",
        "objective": {"dispatch": dispatch}, "trace": str(tmp_path / "t.npz"),
        "training": {"global_batch": 16, "ep": 8, "expert_tp": 2, "recompute": "full"},
    }  # fmt: skip
    found = simulate_training(Scenario.parse(document, "test"))
    assert np.sum(found.traffic.sent) == pytest.approx(3 * 32 * 16 * 4096 * copies * 2 * 8192, rel=1e-6)


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("split", [{"ep": 4, "expert_tp": 2}, {"ep": 1, "expert_tp": 8}, {"ep": 8, "expert_tp": 2}])
def test_a_played_step_is_the_step_mode_s(dispatch: DispatchKind, split: dict[str, int]) -> None:
    load = np.random.default_rng(0).uniform(1, 2, (1, 32, 8))
    if dispatch in ("per_rank", "per_expert"):  # of these a node's links are not shared evenly
        load[:] = 1
    costs = _costs(2, dispatch, load, **split)
    step, detailed = play(costs).step_s, play(costs, fidelity="detailed").step_s
    assert detailed == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_all_ranks_together_hold_the_model_and_its_copies(zero: int) -> None:
    """Weights, gradients and optimizer state over 32 ranks; sharded, each is there once."""
    splits: tuple[dict[str, int], ...] = ({}, {"expert_tp": 2}, {"ep": 8, "expert_tp": 4}, {"pp": 2, "expert_tp": 8})
    for split in splits:
        fields = {"pp": 1, "ep": 2, "expert_tp": 1, **split}
        costs = _costs(4, zero=zero, **fields)
        held = sum(chunk.state_bytes for chunk in costs.chunks()) * 32 / costs.spec.pp
        copies = 32 // (fields["pp"] * fields["ep"] * fields["expert_tp"]), 32 // fields["pp"]
        parameters = 32 * 8 * EXPERT, MIXTRAL.non_expert_parameters
        by_hand = sum(
            size * sum(width * (1 if zero >= stage else count) for width, stage in ((2, 3), (4, 2), (12, 1)))
            for size, count in zip(parameters, copies, strict=True)
        )
        assert held == pytest.approx(by_hand), fields


def test_gradients_of_experts_are_reduced_over_the_ranks_that_hold_the_same_part() -> None:
    costs = _costs(4, ep=4, expert_tp=2, zero=1)
    (chunk,) = costs.chunks()
    parts = (MIXTRAL.non_expert_parameters, 32, 1), (32 * 2 * EXPERT / 2, 4, 8)
    for way, width, seconds in (("reduce_scatter", 4, chunk.sync_s), ("all_gather", 2, chunk.gather_s)):
        by_hand = sum(costs.links.seconds(way, n, width * size, stride).total for size, n, stride in parts)
        assert seconds == pytest.approx(by_hand)


def test_copies_of_an_expert_lie_as_far_apart_as_their_groups() -> None:
    """Expert 0 on both of two groups of 4 ranks, which two of their like hold on 16 ranks."""
    spec = TrainingSpec.parse({"global_batch": 64, "ep": 2, "expert_tp": 4, "zero": 0}, "training")
    rows = np.tile(np.array([0, 1, 2, 3, 0, 4, 5, 6, 7, 0], np.int32), (32, 1))
    rows[:, 4] = 5  # groups of 5 slots: 0 to 3 and 5, and 4 to 7 and 0
    rows[:, 5:] = 4, 5, 6, 7, 0
    placement = Placement(rows, np.repeat(np.arange(2, dtype=np.int32), 5), 8, 2, 2)
    costs = TrainingCosts(MIXTRAL, cluster_for("h100", 2, 8), None, placement, np.ones((1, 32, 8)), spec)
    slot = 32 * EXPERT / 4

    def reduced(size: float, ranks: int, stride: int) -> float:
        return costs.links.seconds("all_reduce", ranks, 4 * size, stride).total

    dense = reduced(MIXTRAL.non_expert_parameters, 16, 1)
    assert costs.chunks()[0].sync_s == pytest.approx(dense + reduced(3 * slot, 2, 8) + reduced(2 * slot, 4, 4))


def test_a_gathered_token_costs_the_same_however_experts_are_split() -> None:
    """All tokens are on all ranks anyway; weights of a rank are as many."""
    first, *others = (_costs(2, "allgather", ep=ep, expert_tp=16 // ep) for ep in (8, 4, 2))
    for other in others:
        assert other.teams[0].batches_W[0].exchange_s_L == pytest.approx(first.teams[0].batches_W[0].exchange_s_L)
        assert other.chunks()[0].state_bytes == pytest.approx(first.chunks()[0].state_bytes)


def test_the_fullest_and_the_slowest_ranks_hold_up_a_gathering() -> None:
    even = _costs(ep=4, expert_tp=2).teams[0].batches_W[0]
    load = np.ones((1, 32, 8))
    load[..., :2] = 3  # 6 of 12 pairs, twice the mean, for the first of four groups
    full = _costs(ep=4, expert_tp=2, load=load).teams[0].batches_W[0]
    latency = 2 * 3e-6
    assert full.gather_s_L - latency == pytest.approx(2 * (even.gather_s_L - latency))
    kept = [_costs(ep=4, expert_tp=2, load=each).chunks()[0].activation_bytes_WR[0, 1] for each in (load, None)]
    assert kept[0] - kept[1] == pytest.approx(32 * 16384 * 2 * (4096 + (4096 + 3 * 14336) / 2))
    slow = _costs(ep=4, expert_tp=2, ranks={5: RankSpec(link_speed=0.5)}).teams[0].batches_W[0]
    assert slow.gather_s_L - latency == pytest.approx(2 * (even.gather_s_L - latency))
    assert slow.exchange_s_L - 2 * latency == pytest.approx(2 * (even.exchange_s_L - 2 * latency))


def test_kernels_measured_at_a_split_width_serve_forward_and_backward() -> None:
    """4 experts of a rank, split in 4, with 8192 rows each; a backward of whole experts is shorter."""

    def latency_us(tp: int, direction: str, pairs: float) -> float:
        return (1000 + 0.1 * pairs) * 2 / tp * {"forward": 1, "backward": 3 if tp == 4 else 2}[direction]

    rows = [
        {
            "hidden": 4096, "inter": 14336, "num_experts": 8, "top_k": 2, "ep": ep, "tp": tp, "dtype": "bf16",
            "distribution": "balanced", "direction": direction, "scope": "experts", "tokens": tokens,
            "rank_pairs": tokens * 2 // ep, "active_experts": 8 // ep, "backend": "moeplan", "kernel": "k",
            "source": "mine", "latency_us": latency_us(tp, direction, tokens * 2 / ep),
        }
        for ep in (1, 2, 4) for tp in (1, 4) for direction in ("forward", "backward")
        for tokens in (256, 1024, 4096, 16384, 65536)
    ]  # fmt: skip
    meta = ProfileMeta(
        name="toy", accelerator="toy", date="2026-11-22", command="none",
        sources={"mine": Source(kind="measured", title="by hand", version="1")},
    )  # fmt: skip
    costs = _costs(ep=2, expert_tp=4, profile=HardwareProfile(meta, {"experts": pa.Table.from_pylist(rows)}))
    assert costs.teams[0].batches_W[0].expert_s_LR == pytest.approx(1e-6 * latency_us(4, "forward", 32768), rel=0.05)
    assert costs.experts_back == pytest.approx(3, rel=0.05)
    assert costs.source["experts"].startswith("measured")


def test_gradients_are_added_to_those_of_the_own_part() -> None:
    backward = [_costs(2, ep=4, expert_tp=4, gradient_dtype=d).chunks()[0].backward_s_W[0] for d in ("fp32", "bf16")]
    parameters = MIXTRAL.non_expert_parameters - 2 * 32000 * 4096 + 32 * 2 * EXPERT / 4
    assert backward[0] - backward[1] == pytest.approx(2 * 2 * parameters / (0.8 * 3.35e12), rel=2e-3)


def test_permuted_rows_are_those_of_all_ranks_that_split_an_expert() -> None:
    alone, split = (_costs(ep=8 // d, expert_tp=d).teams[0].step.fixed.routing_s for d in (1, 4))
    rows = 2 * 2 * 2 * 4096 * 4096 / (0.8 * 3.35e12)  # of a rank's own tokens, 2 each, read and written
    assert split - alone == pytest.approx(3 * 2 * rows)


BASE = {"model": "mixtral-8x7b", "cluster": "h100", "ranks": 32, "nodes": 4, "profile": "none"}


@pytest.mark.parametrize(
    ("training", "more", "message"),
    [
        ({"expert_tp": 3}, {}, "training: pp x ep x expert_tp (24) does not divide ranks (32)"),
        ({"ep": 1, "expert_tp": 16}, {}, "training.expert_tp (16) does not divide the ranks of a node in a stage (8)"),
        ({"ep": 3, "expert_tp": 4}, {"ranks": 24, "nodes": 3}, "training.ep x expert_tp (12) does not fill nodes"),
        ({"ep": 3, "tp": 2}, {}, "ep (3) is not a multiple of tp (2)"),
        ({"ep": 2, "expert_tp": 2, "tp": 8}, {}, "ep x expert_tp (2 x 2) is not a multiple of tp (8)"),
        ({"ep": 4, "expert_tp": 4}, {"model": "narrow.json"}, "expert_intermediate_size of narrow (14338)"),
        ({"ep": 16, "expert_tp": 2}, {}, "training.ep (16) does not divide num_experts (8)"),
        ({"ep": 4, "expert_tp": 2}, {"current": "plan.json"}, "num_ranks (8) is not training.ep (4); set it to that"),
    ],
)
def test_what_cannot_be_split_is_refused(
    training: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    narrow = MIXTRAL.model_copy(update={"name": "narrow", "expert_intermediate_size": 14338})
    Path("narrow.json").write_text(narrow.model_dump_json())
    if "current" in more:
        Path("map.json").write_text(json.dumps({"physical_to_logical_map": 32 * [list(range(8))]}))
        import_plan(Path("map.json"), model=MIXTRAL, num_ranks=8).save(Path("plan.json"))
    document = {**BASE, "training": {"global_batch": 96, "ep": 8, "experts": "balanced", **training}, **more}
    with pytest.raises(MoeplanError, match=re.escape(message)):
        simulate_training(Scenario.parse(document, "test"))
