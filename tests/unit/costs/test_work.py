"""Ranks and links at half their speed, by hand, and alike in steps, services and training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, load_profile
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.passes import Batch, no_chunks
from moeplan.costs.serving import ServingCosts
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.costs.training import TrainingCosts
from moeplan.costs.work import Work
from moeplan.simulation.detailed import simulate_step
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.training import TrainingSpec
from moeplan.specs.workload import Workload

LITE = find_model("deepseek-v2-lite")  # 27 layers of 2048, the first dense; 64 experts, shared ones
BOXES = cluster_for("h100", 2, 8)
PLACE = Placement(
    np.tile(np.arange(64, dtype=np.int32), (26, 1)), np.repeat(np.arange(16, dtype=np.int32), 4), 64, 16, 8
)
EVEN = np.ones((26, 64))
WORK = Workload(phase="decode", batch_per_rank=64, context=1024)
# 256 tokens of 2048 numbers in 16 bits, all-reduced by 4 ranks over NVLink: 2 x 3/4 of them at 450 GB/s.
REDUCED_S = 2 * 3 / 4 * 256 * 2048 * 2 / 450e9


def _slow(**change: float) -> ClusterSpec:
    return BOXES.model_copy(update={"ranks": {5: RankSpec.model_validate(change)}})


def test_of_a_collective_its_bytes_slow_with_the_link_and_nothing_with_the_rank() -> None:
    found = Work.of([CollectiveCosts(BOXES).seconds("all_reduce", 4, 256 * 2048 * 2)])
    assert found.wire_s == pytest.approx(REDUCED_S)
    assert found.total_s == found.elsewhere_s == pytest.approx(3e-6 + REDUCED_S)  # and the latency
    assert found.at(0.5, 1.0) == found.total_s
    assert found.at(1.0, 0.5) == pytest.approx(3e-6 + 2 * REDUCED_S)
    # Measured: what the smallest message takes is no matter of bytes; of a group that was not measured, its law's.
    for ranks in (8, 16):
        links = CollectiveCosts(BOXES, load_profile("h100-sxm"))
        start, large = (links.seconds("all_reduce", ranks, size) for size in (1.0, 2**28))
        assert large.wire is not None
        assert start.wire == 0
        assert 0 < large.total - float(large.wire.sum()) < 1e-4
        assert Work.of([large]).at(1.0, 0.5) / large.total == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("tp", [1, 4])
def test_a_layer_of_a_step_waits_for_its_slowest_rank_and_link(tp: int) -> None:
    how = Technique(tp=tp, dispatch="per_node")
    usual, half, thin = (StepModel(LITE, of, WORK, how) for of in (BOXES, _slow(speed=0.5), _slow(link_speed=0.5)))
    plain, slow, narrow = (model.step(PLACE, EVEN) for model in (usual, half, thin))
    links_s = 3e-6 + REDUCED_S if tp > 1 else 0.0
    assert slow.attention_s == pytest.approx(2 * plain.attention_s - links_s)
    assert slow.shared_s == pytest.approx(2 * plain.shared_s - links_s)
    assert slow.exchange_s_L == pytest.approx(plain.exchange_s_L)
    wire_s = REDUCED_S if tp > 1 else 0.0
    assert narrow.attention_s - plain.attention_s == pytest.approx(wire_s, abs=1e-12)
    assert narrow.shared_s - plain.shared_s == pytest.approx(wire_s, abs=1e-12)
    # The dense layer reduces twice, the embedding once; 102400 logits of 256 tokens are gathered.
    more_s = 3 * wire_s + (tp > 1) * 3 / 4 * 256 * 102400 * 2 / 450e9
    assert narrow.other_s - plain.other_s == pytest.approx(more_s, abs=1e-12)
    assert narrow.expert_s_LR == pytest.approx(plain.expert_s_LR)
    # Ranks that share nothing with the slow one keep their pace.
    (parts,), (before,) = thin.batches(PLACE, EVEN), usual.batches(PLACE, EVEN)
    late_R = parts.attention_s_R - before.attention_s_R
    assert np.flatnonzero(late_R > 1e-9).tolist() == ([4, 5, 6, 7] if tp > 1 else [])


def test_an_all_gather_of_tokens_slows_once() -> None:
    how = Technique(dispatch="allgather")
    models = [StepModel(LITE, of, WORK, how) for of in (BOXES, _slow(link_speed=0.5))]
    plain, narrow = (model.step(PLACE, EVEN).exchange_s_L for model in models)
    fixed_s = models[0].exchange.inside.fixed_s
    assert narrow - fixed_s == pytest.approx(2 * (plain - fixed_s))


def test_launches_do_not_slow_with_the_device() -> None:
    meta = ProfileMeta(
        name="toy", accelerator="H100", date="2026-11-30", command="none", sources={},
        system={"launch_latency_us": 5.0},
    )  # fmt: skip
    profile, how = HardwareProfile(meta, {}), Technique(launches_per_layer=20)
    plain, slow = (StepModel(LITE, of, WORK, how, profile).step(PLACE, EVEN) for of in (BOXES, _slow(speed=0.5)))
    assert slow.attention_s == pytest.approx(2 * plain.attention_s - 20 * 5e-6)


def test_groups_of_a_service_wait_for_their_slowest_rank_and_link() -> None:
    """Four groups of four ranks; the second holds the slow one. 64 tokens on each rank are a point of the grid."""
    full = np.full(4, 256.0)
    batch = Batch(full, full * 1024, no_chunks(4), full, False)
    how = Technique(tp=4, dispatch="per_node")
    groups = {}
    for name, cluster in (("plain", BOXES), ("slow", _slow(speed=0.5)), ("narrow", _slow(link_speed=0.5))):
        costs = ServingCosts(LITE, cluster, WORK, how, None, 1024, 512, 2048)
        _, (parts,), other_R, _ = costs.batches(costs.passes(batch)[0], PLACE, EVEN)
        groups[name] = np.stack([parts.attention_s_R, parts.shared_s_R, other_R])[:, ::4]
        took = costs.step(batch, PLACE, EVEN)
        inside = 26 * (parts.attention_s_R.max() + parts.shared_s_R.max() + parts.expert_s_LR.max()) + other_R.max()
        assert took.total_s - took.exposed_s == pytest.approx(inside)
    plain = groups["plain"]
    more_s = 3 * REDUCED_S + 3 / 4 * 256 * 102400 * 2 / 450e9
    wire_s = np.array([REDUCED_S, REDUCED_S, more_s])
    links_s = wire_s + 3e-6 * np.array([1, 1, 4])
    for name, want in (("slow", 2 * plain[:, 1] - links_s), ("narrow", plain[:, 1] + wire_s)):
        np.testing.assert_allclose(groups[name][:, 1], want)
        np.testing.assert_allclose(groups[name][:, [0, 2, 3]], plain[:, [0, 2, 3]])


SLOW, NARROW = {"speed": 0.5}, {"link_speed": 0.1}


def _ranks(ranks: dict[int, dict[str, float]]) -> ClusterSpec:
    return BOXES.model_copy(update={"ranks": {rank: RankSpec.model_validate(one) for rank, one in ranks.items()}})


@pytest.mark.parametrize("overlap", ["none", "shared_expert", "two_batch", "shortcut"])
def test_a_slow_rank_and_a_slow_link_of_two_groups_do_not_add_up(overlap: Any) -> None:
    """The one takes longest for attention, the other for shared experts; between them nobody waits."""
    how, work = Technique(tp=4, dispatch="per_node", overlap=overlap), WORK.model_copy(update={"batch_per_rank": 512})
    model = StepModel(LITE, _ranks({0: SLOW, 5: NARROW}), work, how)
    found = model.step(PLACE, EVEN)
    parts, *twice = model.batches(PLACE, EVEN)
    assert (parts.attention_s_R.argmax(), parts.shared_s_R.argmax()) == (0, 4)
    a, x, e = parts.attention_s_R.max(), parts.exchange_s_L[0], parts.expert_s_LR[0].max()
    both = (parts.attention_s_R + parts.shared_s_R).max()
    want = {
        "none": both + x + e, "shared_expert": max(both, a + x) + e, "two_batch": 2 * max(both + e, x),
        "shortcut": max(both, x + e),
    }  # fmt: skip
    assert found.layer_s_L == pytest.approx(want[overlap])
    assert model.layer(PLACE, EVEN, 3).layer_s == pytest.approx(found.layer_s_L[3])
    # A service says the same of so many tokens on each rank, beside the exchange.
    full = np.full(4, 2048.0)
    batch = Batch(full, full * 1023, no_chunks(4), full, False)
    served = ServingCosts(LITE, model.cluster, work, how, None, 8192, 2048, 2048).step(batch, PLACE, EVEN)
    beside = max(both, e) if overlap == "shortcut" else both + e
    alone = 26 * (1 + len(twice)) * beside + found.other_s
    assert served.total_s - served.exposed_s == pytest.approx(alone, rel=0.01 if twice else 1e-3)


@pytest.mark.parametrize("tokens", [64, 512])
def test_groups_hold_each_other_up_as_in_a_step_that_is_played(tokens: int) -> None:
    """What a link at a tenth of its speed adds to an exchange is costed by its node's mean; all else is alike."""
    how, work = Technique(tp=4, dispatch="per_node"), WORK.model_copy(update={"batch_per_rank": tokens})
    apart = []
    for ranks in ({5: NARROW}, {0: SLOW, 5: NARROW}, {0: SLOW, 1: NARROW}):
        model = StepModel(LITE, _ranks(ranks), work, how)
        apart.append(simulate_step(model, PLACE, EVEN).total_s - model.step(PLACE, EVEN).total_s)
    assert apart == pytest.approx([apart[0]] * 3, rel=1e-3)


def test_in_training_groups_of_a_sequence_take_what_the_slowest_takes_for_all_of_a_layer() -> None:
    fields = {"tp": 2, "cp": 2}
    slow, narrow, apart, same = (
        np.add(team.attention_s, team.shared_s)
        for team in (_training(_ranks(r), **fields).teams[0] for r in ({0: SLOW}, {5: NARROW}, {0: SLOW, 5: NARROW},
                                                               {0: SLOW, 1: NARROW}))
    )  # fmt: skip
    assert apart == pytest.approx(np.maximum(slow, narrow))
    assert (slow[0] < narrow[0], slow[1] < narrow[1]) == (True, False)
    assert (same > 1.1 * apart).all()


def _training(cluster: ClusterSpec, **fields: Any) -> TrainingCosts:
    spec = TrainingSpec.parse({"global_batch": 16, "sequence": 4096, "ep": 8, **fields}, "test")
    rows = np.tile(np.arange(64, dtype=np.int32), (26, 1))
    place = Placement(rows, np.repeat(np.arange(8, dtype=np.int32), 8), 64, 8, 8)
    return TrainingCosts(LITE, cluster, None, place, np.ones((1, 26, 64)), spec)


def test_training_waits_for_its_slowest_link() -> None:
    """Beside dispatch and combine: all-reduces of ``tp``, keys of ``cp``, gradients, and what stages send on."""
    fields = {"tp": 2, "cp": 2, "pp": 2}
    plain, narrow = _training(BOXES, **fields), _training(_slow(link_speed=0.5), **fields)
    # 2048 tokens of two ranks, 1 x their hidden states; half of 512 + 64 latent numbers of 4096 tokens.
    reduced_s, keys_s = 2048 * 2048 * 2 / 450e9, 4096 * 576 * 2 / 2 / 450e9
    for way, keys in ((0, 1), (1, 2)):
        late_s = narrow.teams[0].attention_s[way] - plain.teams[0].attention_s[way]
        assert late_s == pytest.approx(reduced_s + keys * keys_s)
        assert narrow.teams[0].shared_s[way] - plain.teams[0].shared_s[way] == pytest.approx(reduced_s)
    assert narrow.transfer_s() - plain.transfer_s() == pytest.approx(1024 * 2048 * 2 / 50e9)  # over a NIC
    for name, times in (("sync_s", 2), ("gather_s", 2), ("optimizer_s", 1)):  # next to nothing of it is latency
        before, after = ([getattr(chunk, name) for chunk in costs.chunks()] for costs in (plain, narrow))
        assert after[0] == pytest.approx(times * before[0], rel=2e-3), name
        assert after[1] == before[1], "ranks of another stage"


def test_at_usual_speeds_nothing_depends_on_what_is_computed() -> None:
    work = Work(3.0, 2.0, 1.0)
    assert work.at(1.0, 1.0) == 3.0
    assert work.at(np.array([1.0, 0.5]), np.array([0.5, 1.0])).tolist() == [4.0, 4.0]
    assert (work + work) == work * 2 == replace(work, total_s=6.0, elsewhere_s=4.0, wire_s=2.0)
