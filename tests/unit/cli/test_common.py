"""What commands share: one bar or several."""

from __future__ import annotations

import pytest
from click.shell_completion import ShellComplete
from rich.progress import Progress

from moeplan.cli import cli
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
