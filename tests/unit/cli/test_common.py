"""What commands share: one bar or several."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from rich.progress import Progress

from moeplan.cli import cli, main
from moeplan.cli.common import progress_bar


@pytest.mark.parametrize(("single", "bars"), [(False, ["a", "b"]), (True, ["a"])])
def test_bars(monkeypatch: pytest.MonkeyPatch, single: bool, bars: list[str]) -> None:
    added: list[str] = []
    add = Progress.add_task

    def counted(self: Progress, what: str, **more: float) -> object:
        added.append(what)
        return add(self, what, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Progress, "add_task", counted)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then draws as on a terminal
    with progress_bar(False, single) as report:
        for what, done in (("a", 0.2), ("a", 0.5), ("b", 0.7)):
            report(what, done)
    assert added == bars


def test_ctrl_c_while_the_command_line_is_imported_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import moeplan.cli"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (130, "")


@pytest.mark.parametrize(
    ("words", "begun", "offered"),
    [
        (["optimize", "--planner"], "gre", [("greedy", "plain")]),
        (["optimize", "--target"], "vllm", [("vllm", "plain"), ("vllm-ascend", "plain")]),
        (["evaluate", "--cluster"], "h800", [("h800-sxm-80gb", "plain")]),
        (["export", "--format"], "sg", [("sglang", "plain")]),
        (["trace", "inspect", "--format"], "par", [("parquet", "plain")]),
        (["models"], "deepseek-v2-", [("deepseek-v2-lite", "plain")]),
        (["optimize", "--model"], "./own", [("./own", "file")]),  # then the shell offers files
    ],
)
def test_the_shell_completes_names(words: list[str], begun: str, offered: list[tuple[str, str]]) -> None:
    found = ShellComplete(cli, {}, "moeplan", "_MOEPLAN_COMPLETE").get_completions(words, begun)
    assert [(item.value, item.type) for item in found] == offered


@pytest.mark.parametrize(("encoding", "written"), [("ascii", "1 -> -2 us ?"), ("cp1252", "1 -> -2 µs ?")])
def test_what_an_encoding_lacks_is_written_plainly(
    monkeypatch: pytest.MonkeyPatch, encoding: str, written: str
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("moeplan.cli.cli", lambda **_: stream.write("1 → −2 µs ⁹") and None)
    with pytest.raises(SystemExit, match="0"):
        main()
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == written  # type: ignore[attr-defined]
