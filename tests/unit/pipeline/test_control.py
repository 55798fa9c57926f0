"""The controller of a live run on made-up windows: plans when it must, declines when it should, checks itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeplan.artifacts.load_window import LoadWindow, WindowCosts
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.evaluation import evaluate
from moeplan.costs.operating_point import layer_costs
from moeplan.errors import InputError, RunError
from moeplan.execution.control_folder import say_ended, take_folder
from moeplan.files import hold
from moeplan.pipeline.control import Calibration, Controller, _scaled_sheet, watch
from moeplan.routing.loads import expert_load
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Objective, Workload

L, E, K, R = 2, 16, 2, 4
MODEL = ModelSpec(
    name="tiny", num_layers=3, moe_layer_ids=(1, 2), hidden_size=64, num_experts=E, top_k=K,
    expert_intermediate_size=64, vocab_size=256,
)  # fmt: skip
CORE = AcceleratorSpec(
    name="core", memory="4 GiB", memory_bandwidth="10 GB/s", bf16="50 GFLOPS", scale_up_bandwidth="1 GB/s",
    scale_up_domain=2, nic_bandwidth="10 MB/s",
)  # fmt: skip
CLUSTER = ClusterSpec(accelerator=CORE, num_nodes=2, ranks_per_node=2)
SCENARIO = Scenario(
    model=MODEL, cluster=CLUSTER, objective=Objective(dispatch="per_expert", max_imbalance="30 %"),
    workload=Workload(weight_dtype="fp32"),
)  # fmt: skip
CONTIGUOUS = Placement(
    np.tile(np.arange(E, dtype=np.int32), (L, 1)), np.repeat(np.arange(R, dtype=np.int32), E // R), E, R, 2
)


@pytest.fixture(autouse=True)
def small_budgets(monkeypatch):
    monkeypatch.setattr("moeplan.planning.joint.HOME_PROPOSALS", 100_000)
    monkeypatch.setattr("moeplan.planning.joint.BALANCE_PROPOSALS", 5_000)


def window(number, liking_seed=0, placement=CONTIGUOUS, step_s=0.05, steps_left=1000, **costs):
    """Tokens of each node prefer experts of their own, half of them, which ``liking_seed`` deals out."""
    half_LE = np.random.default_rng(liking_seed).permuted(np.tile(np.arange(E) % 2, (L, 1)), axis=1)
    rng = np.random.default_rng(100 + number)
    home_T = (np.arange(2048) % R).astype(np.int32)
    score = rng.gumbel(size=(2048, L, E)) + 2.0 * (half_LE == (home_T // 2)[:, None, None])
    score += np.random.default_rng(liking_seed + 50).normal(0, 0.3, (L, E))
    experts = np.argsort(-score, axis=2)[:, :, :K].astype(np.int32)
    blocks = experts.reshape(8, -1, L, K)
    load = np.array([[np.bincount(b[:, l].ravel(), minlength=E) for l in range(L)] for b in blocks])
    trace = RoutingTrace(experts, E, tuple(range(L)), source_rank_T=home_T)
    spent = WindowCosts(step_s, 0.2 * step_s, 0.6 * step_s, 512, steps_left=steps_left, **costs)
    return LoadWindow(number * 64, 64, load, trace, placement, spent)


def test_it_plans_checks_waits_and_plans_again(tmp_path):
    controller = Controller(SCENARIO, tmp_path)
    plan = controller.decide(window(0))
    assert plan is not None
    assert "pays" in controller.decisions[0].reason
    # the run has not taken the plan yet: nothing to check
    assert controller.decide(window(1)) is None
    assert controller.decisions[1].checked is None
    assert controller.decide(window(2, placement=plan.placement, moving=True, moved_experts=20, stall_s=0.1)) is None
    assert controller.calibration.move_s == pytest.approx(0.005)
    assert controller.decide(window(3, placement=plan.placement, step_s=0.03)) is None
    checked = controller.decisions[3].checked
    assert checked["gain"] == pytest.approx(0.4)
    assert checked["error"] == pytest.approx(controller.decisions[0].predicted_step_s / 0.03 - 1)
    assert controller.decisions[3].reason == "the load has not drifted"
    again = controller.decide(window(4, liking_seed=1, placement=plan.placement))
    assert controller.decisions[4].drift.found()
    assert again is not None
    assert not np.array_equal(again.placement.physical_to_logical_LP, plan.placement.physical_to_logical_LP)
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [line["apply"] for line in lines] == [True, False, False, False, True]
    assert lines[0]["plan_sha256"] == plan.sha256


def test_homes_that_change_sides_are_drift_though_loads_stay(tmp_path):
    controller = Controller(SCENARIO, tmp_path)
    controller.decide(window(0, steps_left=0))
    turned = window(1, steps_left=0)
    turned = replace(turned, trace=replace(turned.trace, source_rank_T=(turned.trace.source_rank_T + 2) % R))
    controller.decide(turned)
    assert controller.decisions[1].drift.found()
    controller.decide(replace(window(2, steps_left=0), trace=turned.trace))
    assert not controller.decisions[2].drift.found()


def test_the_gain_is_that_of_held_out_tokens_times_what_the_run_measured(tmp_path):
    controller = Controller(SCENARIO, tmp_path)
    plan = controller.decide(window(0))
    expected = 0.05 - plan.verdict.expected_gain * (0.2 + 0.6) * 0.05
    assert controller.decisions[0].predicted_step_s == pytest.approx(expected)
    assert plan.verdict.expected_gain > 0.2  # the tokens of a node find their experts there


def test_what_does_not_pay_is_declined(tmp_path):
    controller = Controller(SCENARIO, tmp_path)
    assert controller.decide(window(0, steps_left=0)) is None
    assert controller.decisions[0].reason.startswith("does not pay: ")
    slow = Controller(SCENARIO, tmp_path / "slow")
    slow.calibration = Calibration(move_s=1000.0)  # an earlier migration crawled
    assert slow.decide(window(0)) is None
    assert slow.decisions[0].reason.startswith("does not pay: ")


def test_the_stall_is_that_of_an_expert_with_its_state_times_the_moves(tmp_path):
    """Not of bytes: the run moves optimizer state too, which a plan's bytes leave out."""
    controller = Controller(SCENARIO, tmp_path)
    seen = window(0, moving=True, moved_experts=8, stall_s=0.004)
    assert controller.decide(seen) is None
    plan = controller.decide(window(1))
    assert f"{len(plan.migration.moves) * 0.5:.3g} ms to move" in controller.decisions[1].reason


@pytest.mark.parametrize("lost", ["load", "ranks", "head", "costs", "placement", "steps"])
def test_windows_that_lack_a_part_are_refused(tmp_path, lost):
    path = tmp_path / "window.npz"
    window(0).write(path)
    with np.load(path) as file:
        arrays = dict(file)
    head = json.loads(str(arrays["head"]))
    if lost in head:
        head[lost] = {} if isinstance(head[lost], dict) else None
        if lost == "steps":
            del head[lost]
        arrays["head"] = np.array(json.dumps(head))
    else:
        del arrays[lost]
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="cannot be read as a window of a live run"):
        LoadWindow.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster": "h100-sxm-80gb"}, r"ranks of the run \(4\) are not those of .* \(8\); give --ranks 4$"),
        ({"cluster": CLUSTER.model_copy(update={"num_nodes": 1, "ranks_per_node": 4})}, r"nodes of .* \(2\).*\(1\)"),
        ({"model": MODEL.model_copy(update={"num_experts": 32})}, r"experts of the run \(16\) .* \(32\)"),
    ],
)
def test_a_run_of_another_model_or_cluster_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        Controller(SCENARIO.model_copy(update=change), tmp_path).decide(window(0))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file: File exists"):
        Controller(SCENARIO, tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_report_that_finds_no_room_is_named(tmp_path):
    controller = Controller(SCENARIO, tmp_path)
    controller.report = Path("/dev/full")
    with pytest.raises(InputError, match="cannot write /dev/full: No space left on device; make room there"):
        controller.decide(window(0, steps_left=0))


def test_recalibrated_costs_predict_what_the_window_measured(tmp_path):
    controller = Controller(SCENARIO, tmp_path)
    seen = window(0, steps_left=0)
    controller.decide(seen)
    workload = SCENARIO.workload.model_copy(update={"batch_per_rank": 512 // R})
    costs = layer_costs(MODEL, _scaled_sheet(CLUSTER, controller.calibration), workload, SCENARIO.objective)
    load = replace(expert_load(replace(seen.trace, layer_ids=(1, 2))), top_k=K)
    found = evaluate(load, CONTIGUOUS, costs, SCENARIO.objective)
    assert found.expert_WL.sum() == pytest.approx(seen.costs.expert_s, rel=1e-6)
    assert found.exchange_WL.sum() == pytest.approx(seen.costs.exchange_s, rel=1e-6)


def test_a_folder_joins_run_and_controller(tmp_path):
    seen = window(0)
    path = tmp_path / "control" / "window.npz"
    path.parent.mkdir()
    seen.write(path)
    back = LoadWindow.read(path)
    np.testing.assert_array_equal(back.load_BLE, seen.load_BLE)
    np.testing.assert_array_equal(back.trace.source_rank_T, seen.trace.source_rank_T)
    np.testing.assert_array_equal(back.placement.physical_to_logical_LP, CONTIGUOUS.physical_to_logical_LP)
    assert back.costs == seen.costs

    controller = Controller(SCENARIO, tmp_path / "report")
    decisions = watch(controller, path.parent, windows=2, timeout_s=600, on_decision=lambda _: window(1).write(path))
    assert [d.apply for d in decisions] == [True, False]
    assert json.loads((path.parent / "plan.json").read_text())["model"] == "tiny"
    with pytest.raises(InputError, match="no window came into"):
        watch(Controller(SCENARIO, tmp_path / "none"), tmp_path / "none", timeout_s=0.1)


def test_a_damaged_window_is_refused(tmp_path):
    (tmp_path / "window.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="cannot be read as a window"):
        LoadWindow.read(tmp_path / "window.npz")


def test_where_experts_stopped_on_the_way_it_plans_again_at_once(tmp_path):
    controller = Controller(SCENARIO, tmp_path)
    plan = controller.decide(window(0))
    half = Placement.by_layer([plan.placement, CONTIGUOUS])  # one of two layers had moved
    for number in (1, 3):
        failed = {"moving": True, "moved_experts": 8, "stall_s": 0.1, "failure": "rank 1 could not transfer"}
        assert controller.decide(window(number, placement=half, **failed)) is None
        assert controller.decisions[-1].reason.endswith("plans again from the next window: rank 1 could not transfer")
        again = controller.decide(window(number + 1, placement=half))
        assert again is not None, controller.decisions[-1].reason
    controller.decide(window(5, placement=half, **failed))
    assert controller.decisions[-1].reason.startswith("experts stopped moving 3 times in a row, plans again on drift")
    controller.decide(window(6, placement=half))
    assert controller.decisions[-1].reason == "the load has not drifted"


@pytest.fixture
def control(tmp_path):
    """A folder with a window of a run that is this process."""
    take_folder(tmp_path / "control", {"model": "tiny"}, 0, forget=True)
    window(0).write(tmp_path / "control" / "window.npz")
    return tmp_path / "control"


def test_it_ends_when_the_run_does(tmp_path, control):
    said = []
    controller = Controller(SCENARIO, tmp_path / "report")
    decisions = watch(controller, control, None, 600, lambda _: say_ended(control), said.append)
    assert [d.apply for d in decisions] == [True]
    assert said == [f"the live run at {control} has ended"]
    assert not (control / "plan.json").exists()  # nobody takes it any more


def test_a_run_that_dies_is_not_waited_for(tmp_path, control):
    def die(_decision):
        """The lock of a process that was killed; the one here is this process's."""
        take = "import sys, os, signal\nfrom pathlib import Path\nfrom moeplan.execution.control_folder import *\n"
        take += "take_folder(Path(sys.argv[1]), {}, 0, True)\nos.kill(os.getpid(), signal.SIGKILL)"
        (control / "run.lock").unlink()
        subprocess.run([sys.executable, "-c", take, str(control)], check=False)

    with pytest.raises(RunError, match=r"control has died; what was decided is in .*report/decisions.jsonl$"):
        watch(Controller(SCENARIO, tmp_path / "report"), control, timeout_s=600, on_decision=die)


def test_a_run_that_starts_again_counts_its_windows_anew(tmp_path, control):
    """It may have gone on from before the plan, so a window like the last one is planned from."""
    def again(decision):
        if len(controller.decisions) == 1:
            about = json.loads((control / "run.json").read_text())
            (control / "run.json").write_text(json.dumps(about | {"pid": about["pid"] + 1}))
            window(0).write(control / "window.npz")

    controller = Controller(SCENARIO, tmp_path / "report")
    decisions = watch(controller, control, windows=2, timeout_s=600, on_decision=again)
    assert [(d.first_step, d.apply) for d in decisions] == [(0, True), (0, True)]


def test_one_controller_watches_a_run_and_it_is_of_its_model(tmp_path, control):
    held = hold(control / "control.lock")
    with pytest.raises(InputError, match=r"another 'moeplan control' watches .*control; end that one first"):
        watch(Controller(SCENARIO, tmp_path / "report"), control)
    os.close(held)
    other = SCENARIO.model_copy(update={"model": MODEL.model_copy(update={"name": "large"})})
    with pytest.raises(InputError, match=r"the run is of model tiny, --model is large; give --model tiny"):
        watch(Controller(other, tmp_path / "report"), control)
