"""Keys and values that ranks of one sequence gather in training."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.training import TrainingCosts
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.training import TrainingSpec

QWEN = find_model("qwen3-235b-a22b")  # 4 key and value heads of 128
JOB = cluster_for("h100", 8, 8)
ORDER = np.tile(np.arange(128, dtype=np.int32), (94, 1))


def _attention_s(tp: int, cp: int, ep: int = 8, up: float = 450e9, recompute: str = "none") -> tuple[float, float]:
    """Forward and backward, with links inside nodes of ``up`` bytes per second."""
    cluster = JOB.model_copy(update={"accelerator": JOB.accelerator.model_copy(update={"scale_up_bandwidth": up})})
    fields = {"global_batch": 64, "sequence": 32768, "tp": tp, "cp": cp, "ep": ep, "recompute": recompute}
    placement = Placement(ORDER, np.arange(128, dtype=np.int32) // (128 // ep), 128, ep, ep)
    spec = TrainingSpec.parse(fields, "test")
    return TrainingCosts(QWEN, cluster, None, placement, np.ones((1, 94, 128)), spec).teams[0].attention_s


@pytest.mark.parametrize(("tp", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_each_rank_gathers_its_own_heads_from_ranks_tp_apart(tp: int, heads: int) -> None:
    links = CollectiveCosts(JOB)
    for cp in (2, 4):
        reduced = links.seconds("all_reduce", tp, 32768 / cp * 4096 * 2).total
        gathered = links.seconds("all_gather", cp, 32768 * 2 * heads * 128 * 2, tp).total
        one, more = _attention_s(tp, 1), _attention_s(tp, cp)
        alone = one[0] - links.seconds("all_reduce", tp, 32768 * 4096 * 2).total
        assert more[0] - reduced - gathered == pytest.approx(alone / cp, rel=1e-3)


@pytest.mark.parametrize(("recompute", "times"), [("none", 2), ("full", 3)])
def test_backward_gathers_keys_again_and_scatters_gradients(recompute: str, times: int) -> None:
    slow, quick = (np.array(_attention_s(1, 4, up=up, recompute=recompute)) for up in (1e9, 450e9))
    forward, backward = slow - quick
    assert backward == pytest.approx(times * forward)


def test_a_sequence_may_lie_on_more_ranks_than_share_experts() -> None:
    few, many = _attention_s(1, 4, ep=2), _attention_s(1, 4, ep=8)
    assert few[0] == pytest.approx(many[0])
