"""The monitor's counts against a recount of everything the ranks chose; replayed choices against the trace;
what a recorder of known slowness costs.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live runs need torch")

from tiny_run import SPEC, tiny_corpus, tiny_options

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import SpecError, TraceError
from moeplan.execution import run
from moeplan.execution.groups import build_mesh, single_mesh
from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.monitor import LoadMonitor
from moeplan.execution.replay import ReplayRouter
from moeplan.execution.train import Trainer

E, L, K, STEPS = 6, 2, 2, 8


def chosen(rank: int, step: int) -> list[torch.Tensor]:
    rng = np.random.default_rng((rank, step))
    return [torch.from_numpy(rng.permuted(np.tile(np.arange(E), (5 + rank, 1)), axis=1)[:, :K]) for _ in range(L)]


def _watch(me: Rank) -> list:
    monitor = LoadMonitor(build_mesh(), L, E, steps=STEPS, blocks=4, tokens=24)
    windows = []
    for step in range(2 * STEPS):
        monitor.observe(chosen(me.rank, step))
        window = monitor.end_step()
        if window is not None:
            trace = window.trace
            windows.append((window.first_step, window.load_BLE, None if trace is None else
                            (trace.experts_TLK, trace.source_rank_T)))  # fmt: skip
    return windows


def test_windows_count_every_choice_of_every_rank():
    answers = run_ranks(Launch(2), _watch)
    for number in range(2):
        expected = np.zeros((4, L, E), np.int64)
        for step in range(STEPS):
            for rank in range(2):
                for row, ids in enumerate(chosen(rank, number * STEPS + step)):
                    expected[step // 2, row] += np.bincount(ids.numpy().ravel(), minlength=E)
        for answer in answers:
            assert answer[number][0] == number * STEPS
            np.testing.assert_array_equal(answer[number][1], expected)
        assert answers[1][number][2] is None
        experts_TLK, home_T = answers[0][number][2]
        assert experts_TLK.shape == (24, L, K)
        for rank in range(2):
            # of each block of two steps the first three tokens
            first = [torch.stack(chosen(rank, number * STEPS + 2 * block), 1)[:3] for block in range(4)]
            np.testing.assert_array_equal(experts_TLK[home_T == rank], np.concatenate(first))
        # in the order of time, so that halves of it are halves of the window
        assert home_T.tolist() == ([0] * 3 + [1] * 3) * 4


def test_a_window_must_divide_into_its_blocks():
    with pytest.raises(SpecError, match=r"steps \(10\) of a window must be a multiple of its blocks \(4\)"):
        LoadMonitor(single_mesh(), L, E, steps=10, blocks=4)


def test_replay_gives_the_recorded_choices_of_this_rank_again_and_again():
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(E), (10, L, 1)), axis=2)[:, :, :K]
    scores = rng.random((10, L, K))
    home = np.array([0, 1] * 5, np.int32)
    trace = RoutingTrace(experts, E, tuple(range(L)), scores, source_rank_T=home)
    router = ReplayRouter(trace, 1, 1, hidden=4)
    seen = [router(torch.zeros(3, 4)) for _ in range(3)]
    ids = np.concatenate([routing.experts_TK.numpy() for routing in seen])
    weights = np.concatenate([routing.weights_TK.numpy() for routing in seen])
    mine = np.flatnonzero(home)[np.arange(9) % 5]
    np.testing.assert_array_equal(ids, experts[mine, 1])
    np.testing.assert_allclose(weights, scores[mine, 1] / scores[mine, 1].sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(seen[0].load_E, np.bincount(experts[mine[:3], 1].ravel(), minlength=E))
    with pytest.raises(TraceError, match="no tokens of rank 2"):
        ReplayRouter(trace, 0, 2, hidden=4)


class _Slow:
    """A recorder on a clock of its own: a plain pass takes 1 s, with the n-th recorded (from 0) n/10 s more."""

    def __init__(self) -> None:
        self.now_s, self.steps, self.calls = 0.0, [], 0

    def perf_counter(self) -> float:
        return self.now_s

    @contextmanager
    def step(self, phase, seq_lens=None):
        self.now_s += len(self.steps) / 10
        self.steps.append((phase, list(seq_lens)))
        self.calls = 0
        yield
        assert self.calls == SPEC.num_moe_layers

    def record(self, layer_id, experts_TK, scores_TK=None):
        self.calls += 1


def test_the_overhead_of_recording_is_that_of_the_recorder(monkeypatch):
    trainer = Trainer(tiny_options(), tiny_corpus(), mesh=single_mesh())
    slow = _Slow()
    monkeypatch.setattr(run, "time", slow)
    passes = []
    trainer.model.register_forward_hook(lambda *_: passes.append(trainer.moe_layers[0].on_routing is not None))
    trainer.model.register_forward_hook(lambda *_: setattr(slow, "now_s", slow.now_s + 1))
    median, spread = run.recording_overhead(trainer, slow)
    assert median == pytest.approx(0.45)
    assert spread == pytest.approx(0.56)
    assert passes == [True, *([False, True, True, False] * 4)], "one to warm up, then pairs that swap who goes first"
    assert slow.steps == [("prefill", [16] * 8)] * 9
    assert all(moe.on_routing is None for moe in trainer.moe_layers)
    assert trainer.clock.enabled
    assert not trainer.clock.take_totals(), "these passes are not of the run"
