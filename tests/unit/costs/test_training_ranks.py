"""Ranks of a training job that are slower than the others, or are not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.costs.training import TrainingCosts
from moeplan.costs.training_teams import at_paces, expert_group
from moeplan.errors import InputError
from moeplan.simulation.training import simulate_training
from moeplan.specs.cluster import RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.training import TrainingSpec

LITE = find_model("deepseek-v2-lite")  # 27 layers, the first dense; 64 experts
JOB = cluster_for("h100", 4, 8)


def _costs(ranks: dict[int, RankSpec], **fields: Any) -> TrainingCosts:
    cluster = JOB.model_copy(update={"ranks": ranks})
    spec = TrainingSpec.parse({"global_batch": 64, "ep": 8, "pp": 2, **fields}, "test")
    rows = np.tile(np.arange(64, dtype=np.int32), (26, 1))
    placement = Placement(rows, np.repeat(np.arange(8, dtype=np.int32), 8), 64, 8, 8)
    return TrainingCosts(LITE, cluster, None, placement, np.ones((1, 26, 64)), spec)


NO_OVERLAP = {"overlap_gradients": False, "overlap_parameters": False}
HALF = RankSpec(speed=0.5)


def _operations(costs: TrainingCosts, slow: int | None = None) -> list[tuple[float, float]]:
    """Seconds of one micro-batch's forward and backward on every stage, one of which computes at half the speed; its
    exchanges take no longer."""
    answer = []
    for stage, chunk in enumerate(costs.chunks()):
        longer, exchange_s = 2 if stage == slow else 1, chunk.exchange_s_W[0]
        answer.append((longer * chunk.forward_s_W[0] + exchange_s, longer * chunk.backward_s_W[0] + exchange_s))
    return answer


def test_a_slow_rank_in_the_last_of_four_stages_holds_up_that_stage_alone() -> None:
    """1F1B: the last stage, twice as slow as the others, waits for the first micro-batch to come and for nothing more;
    the last one then goes back through the others."""
    usual, slow = (_costs(ranks, pp=4, **NO_OVERLAP) for ranks in ({}, {27: HALF}))
    (*others, last), t, m = _operations(usual, 3), usual.transfer_s()[0], usual.micro_batches
    done_s = [sum(f + t for f, _ in others) + m * sum(last)]
    for _, backward_s in others[::-1]:
        done_s.append(done_s[-1] + t + backward_s)
    closed_s = [c.sync_s + c.gather_s + c.optimizer_s * (1 + (stage == 3)) for stage, c in enumerate(usual.chunks())]
    by_hand = max(np.add(done_s[::-1], closed_s))
    found = simulate_training(slow)
    assert found.step_s == pytest.approx(by_hand, rel=1e-9)
    everywhere = _costs(dict.fromkeys((3, 11, 19, 27), HALF), pp=4, **NO_OVERLAP)
    assert simulate_training(everywhere).step_s > 1.1 * found.step_s
    for stage, (one, two) in enumerate(zip(usual.chunks(), slow.chunks(), strict=True)):
        assert two.forward_s_W == pytest.approx((1 + (stage == 3)) * one.forward_s_W)


def test_layers_are_cut_as_if_slow_ranks_were_not_there() -> None:
    """With exchanges that take 50 times as long everywhere, the dense layer and the head would weigh less."""
    narrow = RankSpec(link_speed=0.02)
    usual, one, every = (
        [chunk.layers for chunk in _costs(dict.fromkeys(ranks, narrow), pp=4).chunks()]
        for ranks in ((), (27,), range(32))
    )
    assert usual == one != every


def test_a_slow_rank_in_one_of_four_replicas_holds_up_the_others_where_they_reduce_gradients() -> None:
    usual, slow = (_costs(ranks, pp=1, **NO_OVERLAP) for ranks in ({}, {19: HALF}))
    (chunk,), m = usual.chunks(), usual.micro_batches
    work_s, exchange_s = m * (chunk.forward_s_W + chunk.backward_s_W)[0], 2 * m * chunk.exchange_s_W[0]
    closed_s = chunk.sync_s + chunk.gather_s + 2 * chunk.optimizer_s
    found = simulate_training(slow)
    assert found.step_s == pytest.approx(2 * work_s + exchange_s + closed_s)
    assert found.bubble_share * found.step_s == pytest.approx(3 / 4 * work_s)  # three wait as long as they work
    assert found.exposed_exchange_share * found.step_s == pytest.approx(exchange_s)
    assert set(found.log.rank_V[found.log.of_kind("forward")].tolist()) == {16}  # where the slow one is


def test_gradients_are_reduced_beside_the_last_backward_of_the_slowest_replica() -> None:
    job = {"pp": 1, "sequence": 1024, "overlap_parameters": False}
    apart, beside = (_costs({19: HALF}, overlap_gradients=hides, **job) for hides in (False, True))
    (chunk,) = apart.chunks()  # of the slow one
    backward_s = chunk.backward_s_W[0] + chunk.exchange_s_W[0]
    assert chunk.sync_s > backward_s  # begun with the others', more of it would be hidden
    assert simulate_training(apart).step_s - simulate_training(beside).step_s == pytest.approx(backward_s)


def test_two_slow_ranks_in_two_replicas_do_not_add_up() -> None:
    """Two stages, two replicas, a slow rank in the first stage of one and in the last of the other."""
    job = {"pp": 2, "global_batch": 32, **NO_OVERLAP}
    usual, t = _costs({}, **job), _costs({}, **job).transfer_s()[0]
    m = usual.micro_batches
    (f0, b0), (f1, b1) = _operations(usual, 0)
    # The first stage waits once, for the first micro-batch to come back, and has the second forward to do meanwhile.
    first_s = m * (f0 + b0) + max(0.0, f1 + b1 + 2 * t - f0)
    (f0, b0), (f1, b1) = _operations(usual, 1)
    last_s = f0 + t + m * (f1 + b1) + t + b0
    chunk = usual.chunks()[0]
    closed_s = chunk.sync_s + chunk.gather_s + 2 * chunk.optimizer_s
    found = simulate_training(_costs({3: HALF, 27: HALF}, **job))
    assert found.step_s == pytest.approx(max(first_s, last_s) + closed_s, rel=1e-3)  # the head's weights on the other
    same = simulate_training(_costs({3: HALF, 19: HALF}, **job))  # both in one replica
    assert same.step_s > 1.1 * found.step_s


def test_sharded_gradients_keep_replicas_together_in_every_micro_batch() -> None:
    """From ZeRO stage 2 on all ranks of a stage wait for its slowest; those of the other stage do not."""
    for zero, sorts in ((1, 2), (2, 1), (3, 1)):
        costs = _costs({3: HALF}, pp=2, zero=zero)
        assert len(costs.replicas) == sorts
        first, last = costs.chunks(0)
        usual = _costs({}, pp=2, zero=zero).chunks()
        assert first.forward_s_W == pytest.approx(2 * usual[0].forward_s_W)
        assert last.forward_s_W == usual[1].forward_s_W
        assert sum(replica.share for replica in costs.replicas) == 1.0
    one, two = (_costs(dict.fromkeys(ranks, HALF), pp=1, zero=2) for ranks in ((3,), (3, 11)))
    assert simulate_training(one).step_s == simulate_training(two).step_s


def test_ranks_that_split_a_sequence_over_several_groups_of_experts_wait_for_each_other() -> None:
    """tp x cp of 16 over groups of 8: two groups are one team."""
    for cp, teams in ((1, 4), (4, 2)):
        costs = _costs({11: HALF}, pp=1, tp=4, cp=cp)
        assert [replica.share * teams for replica in costs.replicas] == pytest.approx([1, teams - 1])
        assert costs.replicas[0].first == (8 if cp == 1 else 0)


def test_a_slow_link_holds_up_what_comes_over_it_and_what_goes() -> None:
    usual, slow = (_costs(ranks, pp=4).transfer_s() for ranks in ({}, {19: RankSpec(link_speed=0.5)}))
    sent_s = 4096 * 2048 * 2 / 50e9
    assert slow - usual == pytest.approx([0, sent_s, sent_s, 0])  # 0 to 1, 1 to 2, 2 to 3, 3 to 0


def test_the_group_of_a_team_is_as_slow_as_the_slowest_at_each_place() -> None:
    group = expert_group(JOB, 8)
    assert (group.num_ranks, group.ranks) == (8, {})
    paces = np.ones((2, 16))
    paces[0, 3], paces[1, 11] = 0.5, 0.7
    assert at_paces(group, paces).ranks == {3: RankSpec(speed=0.5, link_speed=0.7)}


def test_a_failed_rank_is_refused() -> None:
    for rank in (3, 27):
        with pytest.raises(InputError, match=rf"cluster\.ranks\.{rank}\.failed \(true\), but .*; leave it out"):
            _costs({rank: RankSpec(failed=True)})


@pytest.mark.parametrize(
    "fields",
    [{}, {"tp": 4}, {"tp": 4, "recompute": "full"}, {"recompute_modules": ["layernorm", "moe_act", "mlp"]}],
)
def test_all_that_a_slow_rank_computes_takes_longer(fields: dict[str, Any]) -> None:
    """At half the speed everything takes twice as long but links: exchanges, and all-reduces over ``tp`` ranks."""
    plain, slow = _costs({}, pp=1, **fields), _costs({3: RankSpec(speed=0.5)}, pp=1, **fields)
    (one,), (two,) = plain.chunks(), slow.chunks()
    fixed, full = plain.teams[0].step.fixed, fields.get("recompute") == "full"
    # One a layer, and of the dense block and shared experts.
    links = 28 * fixed.reduce.total_s + 26 * fixed.shared.elsewhere_s
    assert two.forward_s_W == pytest.approx(2 * one.forward_s_W - links)
    assert two.backward_s_W == pytest.approx(2 * one.backward_s_W - links - full * (links + one.exchange_s_W))
    assert two.optimizer_s == pytest.approx(2 * one.optimizer_s)
    assert two.exchange_s_W == pytest.approx(one.exchange_s_W)


def test_a_slow_rank_holds_up_steps_that_are_played_as_well() -> None:
    costs = _costs({27: RankSpec(speed=0.5)}, overlap="shared_expert")
    step, detailed = (simulate_training(costs, fidelity=how).step_s for how in ("step", "detailed"))  # type: ignore[arg-type]
    assert detailed == pytest.approx(step, rel=0.02)
