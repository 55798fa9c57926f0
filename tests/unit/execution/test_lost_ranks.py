"""A rank that hangs or breaks ends the run with one error, and it is that rank's."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("torch", reason="live runs need torch")

from dense_reference import random_placement
from tiny_run import SPEC, tiny_corpus, tiny_options

from moeplan.errors import RunError
from moeplan.execution.dispatch import Wire
from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.train import Trainer

BAD = 1
PLACEMENT = random_placement(np.random.default_rng(1), 3, SPEC.num_experts, 2, 2, 2)


def _wrong(how: str) -> None:
    if how == "hangs":
        time.sleep(600)
    raise AttributeError("no such thing")


def _train(me: Rank, where: str, how: str) -> None:
    trainer = Trainer(tiny_options(), tiny_corpus())
    if me.rank == BAD and where == "dispatch":
        Wire.send = lambda *_: _wrong(how)
    if me.rank == BAD and where == "migration":
        trainer.migrator.send = lambda *_: _wrong(how)
    trainer.step()
    trainer.migrator.submit(PLACEMENT)
    trainer.migrator.at_step_boundary()


@pytest.mark.parametrize("where", ["dispatch", "migration"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("hangs", "rank 1 hangs: the others waited 3 s for it"),
        ("breaks", r"rank 1 failed: AttributeError: no such thing \(test_lost_ranks.py:\d+ in _wrong\)"),
    ],
)
def test_the_rank_is_named(where: str, how: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        run_ranks(Launch(2, timeout_s=3 if how == "hangs" else 300), _train, where, how)
