from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from moeplan.cli import main
from moeplan.specs.models import find_model
from moeplan.testing.exporters import random_plan


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    random_plan(np.random.default_rng(2), find_model("mixtral-8x7b"), 4).save(tmp_path / "plan.json")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["moeplan", *words])
        with pytest.raises(SystemExit, match=r"^[0-9]+$") as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


def test_there_and_back(run, tmp_path):
    code, out, err = run("export", "plan.json", "--format", "sglang", "--out", "a/map.json", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"format": "sglang", "written": ["a/map.json"]}
    words = (
        "import",
        "a/map.json",
        "--format",
        "sglang",
        "--model",
        "mixtral-8x7b",
        "--ranks",
        "4",
        "--out",
        "b.json",
    )
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["planner"] == "imported:sglang"
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "b.json"))
    assert first["physical_to_logical_map"] == second["physical_to_logical_map"]
    assert run(*words, "--quiet") == (0, "", "")
    assert run("export", "plan.json", "--format", "vllm", "--out", "p.py")[1] == "wrote p.py\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "plan.json", "--format", "nope", "--out", "a"), "exporter 'nope' is not known"),
        (("export", "none.json", "--format", "sglang", "--out", "a"), "cannot read none.json"),
        (("export", "plan.json", "--format", "sglang", "--out", "plan.json/a"), "cannot write"),
        (("export", "plan.json", "--format", "sglang"), "Missing option '--out'"),
        (
            ("import", "plan.json", "--model", "mixtral-8x7b", "--ranks", "4", "--out", "a"),
            "cannot tell the format",
        ),
        (("import", "plan.json", "--model", "mixtral-8x7b", "--ranks", "0", "--out", "a"), "--ranks"),
        (
            ("export", "plan.json", "--format", "megatron", "--checkpoint", "none", "--out", "a"),
            "no such file or directory",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(words, message, run, tmp_path):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_help_shows_an_example(run):
    for name in ("export", "import"):
        assert f"moeplan {name} " in run(name, "--help")[1]
