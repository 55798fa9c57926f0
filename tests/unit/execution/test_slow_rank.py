"""A rank that is slower than the others: the run learns the same, and its figures name the rank."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("torch", reason="live runs need torch")

from tiny_run import tiny_corpus, tiny_options

from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.train import Trainer

SLOW, STEPS, DELAY_S = 1, 4, 0.1


def _train(me: Rank, slow: bool) -> dict:
    trainer = Trainer(tiny_options(), tiny_corpus())
    if slow and me.rank == SLOW:
        for moe in trainer.moe_layers:
            moe.router.register_forward_hook(lambda *_: time.sleep(DELAY_S))
    steps = [trainer.step() for _ in range(STEPS)]
    return {"losses": [m.loss for m in steps], "waits": [m.alltoall_R for m in steps], "step_s": steps[-1].step_s}


def test_a_slow_rank_changes_no_loss_and_is_the_one_that_waits_least():
    reference = run_ranks(Launch(2), _train, False)[0]
    answers = run_ranks(Launch(2), _train, True)
    for answer in answers:
        assert answer["losses"] == reference["losses"]
    waits_R = np.median(answers[0]["waits"], axis=0)  # of the steps: other programs disturb one, not most
    assert answers[0]["step_s"] > 3 * DELAY_S
    assert waits_R[1 - SLOW] - waits_R[SLOW] > 2 * DELAY_S  # the other one stands in exchanges meanwhile
