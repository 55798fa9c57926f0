"""Ranks of a training job that are slower than the others, or are not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.costs.training import TrainingCosts, expert_group
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


def test_a_slow_rank_counts_wherever_it_is() -> None:
    plain = _costs({}).chunks()
    for slow in ({"speed": 0.5}, {"link_speed": 0.5}):
        first, other = (_costs({rank: RankSpec.model_validate(slow)}).chunks() for rank in (3, 27))
        for one, two, usual in zip(first, other, plain, strict=True):
            taken = [c.forward_s_W[0] + c.backward_s_W[0] + c.exchange_s_W[0] for c in (one, two, usual)]
            assert taken[0] == taken[1] > taken[2]
    group = expert_group(JOB.model_copy(update={"ranks": {3: RankSpec(speed=0.5), 27: RankSpec(link_speed=0.7)}}), 8)
    assert group.ranks == {3: RankSpec(speed=0.5, link_speed=0.7)}


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
    fixed, full = plain.step.fixed, fields.get("recompute") == "full"
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
