"""Who watches a control folder, and whether it still does: real processes that end in every way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moeplan.errors import InputError, RunError
from moeplan.execution import control_folder
from moeplan.execution.control_folder import say_ended, take_folder, watcher

_TAKE = """
import sys, time
from pathlib import Path
from moeplan.execution.control_folder import take_folder
take_folder(Path(sys.argv[1]), {"model": "tiny"}, int(sys.argv[2]), forget=True)
print("there", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """A process that takes a folder, and is there when the call returns."""
    begun = []

    def run(folder: Path, restarts_left: int = 0) -> subprocess.Popen:
        words = [sys.executable, "-c", _TAKE, str(folder), str(restarts_left)]
        begun.append(process := subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert process.stdout.readline() == "there\n"
        return process

    yield run
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()


def state(folder: Path) -> str:
    return watcher(folder).state


@pytest.mark.parametrize(("restarts_left", "then"), [(0, "died"), (1, "down")])
def test_a_killed_run_is_told_from_one_that_lives(tmp_path, start, restarts_left, then):
    run = start(tmp_path, restarts_left)
    assert state(tmp_path) == "running"
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert state(tmp_path) == then
    again = start(tmp_path)
    assert state(tmp_path) == "running"
    say_ended(tmp_path)
    assert state(tmp_path) == "ended"
    assert watcher(tmp_path).about["pid"] == again.pid


def test_a_second_run_is_refused_and_the_first_stays(tmp_path, start, monkeypatch):
    monkeypatch.setattr(control_folder, "_PATIENCE_S", 0.1)
    run = start(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(RunError, match=rf"watched by another live run \(process {run.pid}\); give this one a --contr"):
        take_folder(tmp_path, {"model": "other"}, 0, forget=True)
    assert (tmp_path / "plan.json").exists()
    assert watcher(tmp_path).about["model"] == "tiny"


@pytest.mark.parametrize("change", [{"machine": ["elsewhere", "another boot"]}, {"machine": []}, {"machine": None}])
def test_where_the_lock_says_nothing_a_run_counts_as_running(tmp_path, start, change):
    run = start(tmp_path)
    about = json.loads((tmp_path / "run.json").read_text()) | change
    if change["machine"] is None:  # of an older version
        del about["machine"]
    run.kill()
    run.wait()
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert state(tmp_path) == "running"


def test_folders_without_a_run(tmp_path):
    assert watcher(tmp_path) is None
    say_ended(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run.json does not say what runs; start the run again"):
        watcher(tmp_path)


def test_a_run_that_cannot_say_that_it_ended_keeps_its_own_words(tmp_path, monkeypatch):
    take_folder(tmp_path, {"model": "tiny"}, 0, forget=True)

    def full(path, text):
        raise InputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(control_folder, "write_text", full)
    say_ended(tmp_path)
    assert state(tmp_path) == "running"
