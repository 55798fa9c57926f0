"""A run whose routing changes on the way takes the plans made from its windows, and learns the same."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="live runs need torch")

from tiny_run import SPEC, tiny_corpus, tiny_options

import moeplan.planning.joint as joint
from moeplan.artifacts.load_window import LoadWindow
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import InputError, MoeplanError
from moeplan.execution.apply import PlanCallback
from moeplan.execution.closed_loop import ClosedLoop
from moeplan.execution.groups import Mesh, build_mesh
from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.monitor import LoadMonitor
from moeplan.execution.replay import ReplayRouter
from moeplan.execution.train import Trainer
from moeplan.pipeline.control import Controller, ControlOptions, watch
from moeplan.pipeline.live import LiveRequest, run_live
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Objective

E, STEPS, WINDOW = 16, 64, 16
MODEL = SPEC.model_copy(update={"num_experts": E})
L = MODEL.num_moe_layers
CORE = AcceleratorSpec(
    name="core", memory="4 GiB", memory_bandwidth="10 GB/s", bf16="50 GFLOPS", scale_up_bandwidth="1 GB/s",
    scale_up_domain=1, nic_bandwidth="10 MB/s",
)  # fmt: skip
SCENARIO = Scenario(
    model=MODEL,
    cluster=ClusterSpec(accelerator=CORE, num_nodes=2, ranks_per_node=1),
    objective=Objective(dispatch="per_expert", max_imbalance="30 %"),
)


def routing(seed: int) -> RoutingTrace:
    """Each node's tokens like one half of the experts, dealt out by ``seed``."""
    rng = np.random.default_rng(seed)
    half_LE = rng.permuted(np.tile(np.arange(E) % 2, (L, 1)), axis=1)
    home_T = (np.arange(4096) % 2).astype(np.int32)
    score = rng.gumbel(size=(4096, L, E)) + 2.5 * (half_LE == home_T[:, None, None])
    score += rng.normal(0, 0.5, (L, E))
    experts = np.argsort(-score, axis=2)[:, :, :2].astype(np.int32)
    return RoutingTrace(experts, E, tuple(range(L)), source_rank_T=home_T)


def _run(me: Rank, folder: str | None, control: str | None, fail: bool = False) -> dict:
    joint.HOME_PROPOSALS, joint.BALANCE_PROPOSALS = 100_000, 5_000
    mesh = build_mesh(ranks_per_node=1)
    trainer = Trainer(tiny_options(model=MODEL), tiny_corpus(), mesh=mesh)
    controller = None
    if folder is not None:
        controller = Controller(SCENARIO, Path(folder), ControlOptions(steps_left=10**6))
    advise = None if controller is None else controller.decide
    if fail:
        advise = _broken
    watched = None if control is None else Path(control)
    plans = PlanCallback(trainer.migrator, MODEL, mesh, watched)
    monitor = LoadMonitor(mesh, L, E, steps=WINDOW)
    loop = ClosedLoop(trainer.moe_layers, plans, monitor, advise, watched)
    losses, moved = [], []
    for step in range(STEPS):
        if step in (0, STEPS // 2):
            for row, moe in enumerate(trainer.moe_layers):
                moe.router = ReplayRouter(routing(step), row, mesh.ep.rank, MODEL.hidden_size)
        losses.append(trainer.step())
        report = loop.after_step(losses[-1])
        if report is not None:
            moved.append((step, report.moved_experts, report.failure))
    decisions = [] if controller is None or me.rank else [(d.apply, d.reason) for d in controller.decisions]
    return {
        "losses": [m.loss for m in losses], "moved": moved, "decisions": decisions,
        "slots": trainer.migrator.placement.physical_to_logical_LP, "norms": trainer.expert_norms().numpy(),
        "at home": _at_home(mesh, trainer),
    }  # fmt: skip


def _broken(_window: LoadWindow) -> None:
    raise InputError("the planner's trace is unreadable")


def _at_home(mesh: Mesh, trainer: Trainer) -> float:
    """Part of the latest choices that this rank's node serves."""
    table = trainer.migrator.placement
    node_LE = np.stack([table.node_of_slot_P[np.argsort(row)] for row in table.physical_to_logical_LP])
    chosen = [moe.last.experts_TK.numpy() for moe in trainer.moe_layers]
    return float(np.mean([node_LE[l][ids] == mesh.ep.rank for l, ids in enumerate(chosen)]))


@pytest.fixture(scope="module")
def reference() -> dict:
    return run_ranks(Launch(2), _run, None, None)[0]


def test_plans_from_its_own_windows_in_process(tmp_path, reference):
    answers = run_ranks(Launch(2), _run, str(tmp_path), None)
    first = answers[0]
    assert [apply for apply, _ in first["decisions"]] == [True, False, True, False], first["decisions"]
    assert "experts moved in this window" in first["decisions"][1][1]
    assert [step for step, _, failure in first["moved"] if failure is None] == [WINDOW, 3 * WINDOW]
    for answer in answers:
        np.testing.assert_array_equal(answer["slots"], first["slots"])
        assert answer["at home"] > 0.75
        assert answer["losses"] == reference["losses"]  # experts moved, and nothing else changed
    assert reference["at home"] < 0.7
    np.testing.assert_array_equal(first["norms"], reference["norms"])
    assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) == STEPS // WINDOW


def test_plans_from_another_process_through_a_folder(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(joint, "HOME_PROPOSALS", 100_000)
    control = tmp_path / "control"
    controller = Controller(SCENARIO, tmp_path / "report", ControlOptions(steps_left=10**6))
    process = threading.Thread(target=watch, args=(controller, control), kwargs={"windows": 1, "timeout_s": 400})
    process.start()
    answers = run_ranks(Launch(2), _run, None, str(control))
    process.join()
    assert controller.decisions[0].apply
    assert (control / "answer.json").exists() == bool(answers[0]["moved"])  # taken, if the run was still going
    for answer in answers:
        assert answer["losses"] == reference["losses"]


def test_an_adviser_that_fails_ends_all_ranks_with_its_reason():
    with pytest.raises(MoeplanError, match="the planner's trace is unreadable"):
        run_ranks(Launch(2), _run, None, None, True)



def test_moeplan_live_puts_its_windows_into_the_control_folder(tmp_path):
    (tmp_path / "model.json").write_text(SPEC.model_dump_json())
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 400)
    run_live(
        LiveRequest(model=str(tmp_path / "model.json"), ranks=2, nodes=2, steps=8, batch=4, length=32,
                    text=tmp_path / "text.txt", control=tmp_path / "control", window=8)
    )  # fmt: skip
    window = LoadWindow.read(tmp_path / "control/window.npz")
    assert window.load_BLE.sum() == 8 * 4 * 32 * SPEC.top_k * SPEC.num_moe_layers
    assert window.costs.tokens == 4 * 32
    assert 0 < window.costs.expert_s < window.costs.step_s
    assert window.costs.steps_left == 0
    assert set(window.trace.source_rank_T) == {0, 1}
    assert window.placement.ranks_per_node == 1
