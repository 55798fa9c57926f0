"""What commands share: one bar or several."""

from __future__ import annotations

import pytest
from rich.progress import Progress

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
