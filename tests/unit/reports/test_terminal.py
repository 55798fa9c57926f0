from __future__ import annotations

import io

import numpy as np
import pytest
from report_plans import bare_plan, contiguous, evaluations, full_plan, load_LE
from rich.console import Console

from moeplan.artifacts.plan import Plan
from moeplan.reports.summary import Evidence
from moeplan.reports.terminal import LoadMap, plan_view


def evidence() -> Evidence:
    return Evidence(
        load_LE=load_LE(),
        before=contiguous(),
        before_name="contiguous",
        evaluation_before=evaluations(1.5, 1.9),
    )


def printed(plan: Plan, known: Evidence, width: int, **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, **options)  # type: ignore[arg-type]
    console.print(plan_view(plan, known, console.width))
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 120])
@pytest.mark.parametrize("full", [True, False])
def test_fits_the_width(width: int, full: bool) -> None:
    text = printed(full_plan(), evidence(), width) if full else printed(bare_plan(), Evidence(), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text


@pytest.mark.parametrize("width", [60, 120])
def test_says_the_verdict_the_figures_and_the_layers(width: int) -> None:
    text = " ".join(printed(full_plan(), evidence(), width).replace("\N{NO-BREAK SPACE}", " ").split())
    for words in (
        "Apply this plan",
        "It pays.",
        "expected gain 20.0 % (18.0 % to 22.0 %)",
        "gain more than 25.0 %",
        "1.90 → 1.40",
        "1.0 %",
        "worst",
        "median",
        "best",
    ):
        assert words in text
    assert ("busiest rank over the mean" in text) == (width == 120)


def test_worst_layers_come_first() -> None:
    lines = printed(full_plan(), Evidence(), 120).splitlines()
    worst = [line.split()[1] for line in lines if line.startswith("worst")]
    assert worst == ["14", "13", "12", "11", "10"]
    assert [line.split()[1] for line in lines if line.startswith("best")] == ["3"]


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[38" in printed(full_plan(), evidence(), 100, force_terminal=True, color_system="truecolor")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = printed(full_plan(), evidence(), 100, force_terminal=True, color_system="truecolor")
    assert "\x1b[38" not in plain
    assert "█" in plain


def test_marks_follow_the_load_and_keep_the_largest() -> None:
    values = np.full((40, 100), 1.0)
    values[21, 63] = 3.0
    values[:, 99] = np.nan
    stream = io.StringIO()
    Console(file=stream, width=60, highlight=False).print(LoadMap([("x", values)], range(40)))
    lines = stream.getvalue().splitlines()
    assert "each mark is the largest of 2 layers by 2 ranks" in lines[-1]
    hot = [line for line in lines[2:-1] if "█" in line]
    assert len(hot) == 1
    assert hot[0].split()[0] == "20"  # layers 20 and 21 share a row
    assert hot[0].split()[1].index("█") == 31  # ranks 62 and 63 share a mark


def test_ascii_terminals_get_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    Console(file=stream, width=80).print(LoadMap([("x", np.array([[0.5, 2.0]]))], [3]))
    stream.flush()
    assert b"@" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_markup_in_a_plan_is_text() -> None:
    text = printed(full_plan(model="[red]x[/red] [bold", notes=("[/] [link=x]",)), Evidence(), 100)
    assert "[red]x[/red] [bold" in text
    assert "[/] [link=x]" in text


def test_a_scale_that_ends_below_the_largest_load_says_so() -> None:
    values = np.tile(np.linspace(0.5, 1.5, 100), (40, 1))
    even, hot = values.copy(), values.copy()
    hot[0, 0] = 4.2
    heads = []
    for each in (even, hot):
        stream = io.StringIO()
        Console(file=stream, width=120, highlight=False).print(LoadMap([("x", each)], range(40)))
        heads.append(stream.getvalue().splitlines()[0])
    assert heads[0].endswith("▁ 0.50 to █ 1.50")
    assert heads[1].endswith("▁ 0.50 to █ 1.50 and more (largest 4.20)")
