"""The traffic matrix of a live run: every routed pair counted by hand, and what the log says that ranks sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="live runs need torch")

from tiny_run import SPEC, tiny_corpus, tiny_options

from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.train import Trainer, gather_events
from moeplan.specs.workload import DispatchKind

STEPS = 2


def _train(me: Rank, dispatch: DispatchKind) -> dict[str, Any]:
    trainer = Trainer(tiny_options(dispatch=dispatch, ranks_per_node=2), tiny_corpus())
    pairs_R = np.zeros(4)

    def note(_layer: int, routing: Any) -> None:
        rank_TK = routing.experts_TK.numpy() // (SPEC.num_experts // 4)  # contiguous experts
        np.add.at(pairs_R, rank_TK.ravel(), 1)

    for moe in trainer.moe_layers:
        moe.on_routing = note
    for _ in range(STEPS):
        trainer.step()
    for moe in trainer.moe_layers:
        moe.on_routing = None
    trainer.evaluate(1)  # sends, but is no step
    log = gather_events(trainer, {"seed": 0})
    answer: dict[str, Any] = {"pairs_R": pairs_R}
    if log is not None:
        (start_V, end_V), sent = _bounds(log), log.of_kind("dispatch", "combine")
        inside = sent & (log.start_s_V >= start_V[log.rank_V]) & (log.start_s_V <= end_V[log.rank_V])
        answer |= {"origin": dict(log.origin), "sent_R": np.bincount(log.rank_V[inside], log.amount_V[inside], 4)}
    return answer


def _bounds(log: Any) -> tuple[np.ndarray, np.ndarray]:
    """When each rank's first step began and its last one ended."""
    step = log.of_kind("step")
    bounds = np.array(
        [[log.start_s_V[mine].min(), (log.start_s_V + log.duration_s_V)[mine].max()]
         for mine in (step & (log.rank_V == rank) for rank in range(4))]
    )  # fmt: skip
    return bounds[:, 0], bounds[:, 1]


def test_every_pair_and_every_row() -> None:
    answers = run_ranks(Launch(4), _train, "per_expert")
    pairs_RR = np.stack([answer["pairs_R"] for answer in answers])
    np.fill_diagonal(pairs_RR, 0)
    (traffic,) = answers[0]["origin"]["traffic"]
    sent_RR = np.array(traffic["sent"])
    # float32 rows: forward there and back, and the gradients of both.
    by_hand_RR = 2 * (pairs_RR + pairs_RR.T) * SPEC.hidden_size * 4 / STEPS
    np.testing.assert_array_equal(sent_RR, by_hand_RR)
    np.testing.assert_allclose(sent_RR.sum(1) * STEPS, answers[0]["sent_R"], rtol=1e-12)
    assert (traffic["steps"], traffic["per_node"], answers[0]["origin"]["seed"]) == (STEPS, 2, 0)


def test_copies_over_nodes_go_to_the_rank_of_the_same_number() -> None:
    answers = run_ranks(Launch(4), _train, "per_node")
    sent_RR = np.array(answers[0]["origin"]["traffic"][0]["sent"])
    assert sent_RR[0, 3] == sent_RR[1, 2] == 0
    assert (sent_RR[[0, 1, 0], [2, 3, 1]] > 0).all()
    assert sent_RR.sum(1) * STEPS == pytest.approx(answers[0]["sent_R"])


def _placed_anew(me: Rank) -> Any:
    """A step with experts in order, then two with all of rank 0's at home on rank 1 and the other way round."""
    trainer = Trainer(tiny_options(), tiny_corpus())
    trainer.step()
    first = trainer.migrator.placement
    half = SPEC.num_experts // 2
    rows = np.roll(first.physical_to_logical_LP, half, axis=1)
    trainer.migrator.submit(replace(first, physical_to_logical_LP=rows))
    assert trainer.migrator.at_step_boundary() is not None
    trainer.clock.placed_anew()
    for _ in range(2):
        trainer.step()
    log = gather_events(trainer, {})
    return None if log is None else log.origin["traffic"]


def test_before_and_after_a_plan() -> None:
    before, after = run_ranks(Launch(2), _placed_anew)[0]
    assert [matrix["name"] for matrix in (before, after)] == ["before the plan", "after the plan"]
    assert (before["steps"], after["steps"]) == (1, 2)
    # What stayed at home travels now: all pairs of a step, there and back, forward and backward.
    pairs = 8 * 16 * SPEC.top_k * SPEC.num_moe_layers
    whole = pairs * SPEC.hidden_size * 4 * 4
    assert np.array(before["sent"]).sum() + np.array(after["sent"]).sum() == pytest.approx(whole, rel=0.05)
