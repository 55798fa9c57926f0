"""The command of the controller, on windows that lie in a folder."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from moeplan.artifacts.load_window import LoadWindow, WindowCosts
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.cli import main
from moeplan.execution.control_folder import take_folder
from moeplan.files import write_text

MODEL = """
{name: tiny, num_layers: 1, moe_layer_ids: [0], hidden_size: 64, num_experts: 8, top_k: 2,
 expert_intermediate_size: 64, vocab_size: 256}
"""
CLUSTER = """
accelerator: {name: core, memory: 4 GiB, memory_bandwidth: 10 GB/s, bf16: 50 GFLOPS, scale_up_bandwidth: 1 GB/s,
  scale_up_domain: 1, nic_bandwidth: 10 MB/s}
num_nodes: 2
ranks_per_node: 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tokens of rank 0 like odd experts, those of rank 1 even ones."""
    (tmp_path / "model.yaml").write_text(MODEL)
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    rng = np.random.default_rng(0)
    home_T = (np.arange(2048) % 2).astype(np.int32)
    score = rng.gumbel(size=(2048, 1, 8)) + 3.0 * ((np.arange(8) % 2) != home_T[:, None])[:, None]
    experts = np.argsort(-score, axis=2)[:, :, :2].astype(np.int32)
    load = np.array([[np.bincount(block.ravel(), minlength=8)] for block in np.split(experts, 8)])
    here = Placement(np.arange(8, dtype=np.int32)[None], np.repeat(np.arange(2, dtype=np.int32), 4), 8, 2, 1)
    trace = RoutingTrace(experts, 8, (0,), source_rank_T=home_T)
    (tmp_path / "control").mkdir()
    LoadWindow(0, 64, load, trace, here, WindowCosts(0.02, 0.002, 0.01, 256)).write(tmp_path / "control/window.npz")
    (tmp_path / "control/run.json").write_text("{}")
    return tmp_path


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moeplan", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_a_window_becomes_a_plan(folder, capsys, monkeypatch):
    code, out, err = run(
        capsys, monkeypatch, "control", str(folder / "control"), "--model", str(folder / "model.yaml"),
        "--cluster", str(folder / "cluster.yaml"), "--windows", "1", "--max-imbalance", "30 %", "--json",
    )  # fmt: skip
    assert code == 0, err
    (decision,) = json.loads(out)["decisions"]
    assert decision["apply"]
    assert "pays: " in err
    plan = json.loads((folder / "control/plan.json").read_text())
    assert set(plan["physical_to_logical_map"][0][:4]) == {1, 3, 5, 7}
    assert (folder / "control/controller/decisions.jsonl").is_file()


def test_no_window_is_an_error(folder, capsys, monkeypatch):
    (folder / "control/window.npz").unlink()
    code, _, err = run(
        capsys, monkeypatch, "control", str(folder / "control"), "--model", str(folder / "model.yaml"),
        "--cluster", str(folder / "cluster.yaml"), "--timeout", "0.1",
    )  # fmt: skip
    assert code == 2
    assert "no window came into" in err


def test_a_run_that_died_is_not_the_one_that_is_waited_for(folder, capsys, monkeypatch):
    control = folder / "control"
    os.close(take_folder(control, {}, 0, forget=True))  # its lock is gone
    words = ("control", str(control), "--cluster", str(folder / "cluster.yaml"), "--timeout", "0.1", "--model")
    code, _, err = run(capsys, monkeypatch, *words, str(folder / "model.yaml"))
    assert code == 2
    assert f"no live run watches {control}; the one before has died; waiting for one" in err


def test_it_ends_with_the_run_and_says_so(folder, capsys, monkeypatch):
    control = folder / "control"

    def end() -> None:
        while not (control / "controller/decisions.jsonl").is_file():
            time.sleep(0.01)
        write_text(control / "run.json", '{"ended": true}')

    ended = threading.Thread(target=end)
    ended.start()
    code, out, err = run(
        capsys, monkeypatch, "control", str(control), "--model", str(folder / "model.yaml"),
        "--cluster", str(folder / "cluster.yaml"), "--max-imbalance", "30 %", "--json",
    )  # fmt: skip
    ended.join()
    assert code == 0, err
    assert err.endswith(f"the live run at {control} has ended\n")
    assert len(json.loads(out)["decisions"]) == 1


@pytest.mark.parametrize("ended", [False, True])
def test_where_no_run_is_under_way_it_says_that_it_waits_and_leaves_nothing(folder, capsys, monkeypatch, ended):
    elsewhere = folder / ("control" if ended else "elsewhere")
    if ended:
        (elsewhere / "run.json").write_text('{"ended": true}')
    before = sorted(folder.rglob("*"))
    words = ("control", str(elsewhere), "--cluster", str(folder / "cluster.yaml"), "--timeout", "0.1", "--model")
    code, _, err = run(capsys, monkeypatch, *words, str(folder / "model.yaml"))
    assert code == 2
    waits, error = err.splitlines()
    assert waits == f"no live run watches {elsewhere}; waiting for one with --control {elsewhere}"
    assert error == f"error: no live run watched {elsewhere} within 0.1 s; is its --control folder another?"
    code, _, err = run(capsys, monkeypatch, *words, "nonesuch")
    assert (code, "waiting" in err) == (2, False)
    assert sorted(folder.rglob("*")) == before
