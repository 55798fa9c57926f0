"""``moeplan report``: whole pages without network, the same figures in all three forms, and what cannot be reported."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moeplan.artifacts.event_log import EventLog, EventRecorder
from moeplan.artifacts.simulation_result import (
    Assumption,
    Headline,
    MemoryTrack,
    RankTimes,
    SimulationResult,
    Timeline,
)
from moeplan.cli import cli
from moeplan.errors import InputError, SpecError
from moeplan.pipeline.report import report

GIB = 2.0**30


def _result(scale: float = 1.0, **more: object) -> SimulationResult:
    grid = tuple((scale * 0.01 * np.linspace(1, 3, 101)).tolist())
    fields: dict[str, object] = {
        "model": "DeepSeek-V2-Lite <b>",
        "cluster": "h100 x 8 x 1",
        "num_ranks": 4,
        "num_nodes": 1,
        "seeds": (0, 1),
        "simulated_s": 10.0,
        "headlines": {
            "ttft_p50_s": Headline(value=0.02 * scale, low=0.015 * scale, high=0.03 * scale, unit="s", better="lower"),
            "tpot_p99_s": Headline(value=0.01 * scale, low=0.01 * scale, high=0.01 * scale, unit="s", better="lower"),
            "tpot_p50_s": Headline(value=0.01 * scale, low=0.01 * scale, high=0.01 * scale, unit="s", better="lower"),
            "output_tokens_per_s_per_gpu": Headline(
                value=1234.0 / scale, low=1200.0 / scale, high=1300.0 / scale, unit="tokens/s", better="higher"
            ),
        },
        "counts": {"requests": 100.0},
        "distributions": {"ttft": grid, "tpot": grid},
        "ranks": RankTimes(compute=(0.5,) * 4, exchange=(0.2,) * 4, bubble=(0.2,) * 4, idle=(0.1,) * 4),
        "timeline": Timeline(
            time_s=(1.0, 2.0), tokens_per_s=(10.0, 20.0), running=(1.0, 2.0), waiting=(0.0, 1.0), cache=(0.1, 0.2)
        ),
        "assumptions": (Assumption(name="costs of experts", value="", source="measured: table"),),
        "notes": ("a note",),
        "provenance": {"moeplan": "1"},
    }
    return SimulationResult.model_validate(fields | more)


def _log(source: str = "simulated", scale: float = 1.0) -> EventLog:
    r = EventRecorder()
    for step in range(3):
        r.add("step", step, scale, step=step)
        for rank in range(4):
            r.add("attention", step, 0.2 * scale, rank=rank, layer=0, step=step)
            r.add("dispatch", step + 0.2 * scale, 0.1 * scale, rank=rank, layer=0, step=step)
            r.add("experts", step + 0.3 * scale, 0.4 * scale, rank=rank, layer=0, step=step)
    if source == "measured":
        r.add("loss", 1.0, step=0, amount=3.5)
        r.add("loss", 2.0, step=1, amount=3.0)
    return r.build("measured" if source == "measured" else "simulated", 4, 1, {"model": "moeplan-20m"})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, scale in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        _result(scale).save(tmp_path / name / "result.json")
        _log().write(tmp_path / name / "events.parquet")
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "result.json").write_text('{"losses": []}')
    _log("measured", 1.25).write(tmp_path / "live" / "events.parquet")
    return tmp_path


class _Page(HTMLParser):
    """Open and closed tags match, and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_simulation_as_one_page_that_needs_nothing_else(runs: Path) -> None:
    report([runs / "a"], runs / "r.html", perfetto_path=runs / "trace.json")
    html = (runs / "r.html").read_text()
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "@import" not in html
    assert "url(http" not in html
    text = " ".join(page.texts)
    assert "DeepSeek-V2-Lite <b>" in text  # escaped, not markup
    for word in ("20.0 ms", "15.0 to 30.0 ms", "costs of experts", "measured: table", "a note"):
        assert word in text.replace("\N{NO-BREAK SPACE}", " ")
    assert html.count("<svg") == 5  # two latencies, timeline, ranks, one step
    assert "mathdefault" not in html
    assert json.loads((runs / "trace.json").read_text())["traceEvents"]
    report([runs / "a"], runs / "again.html")
    assert (runs / "again.html").read_text() == html


def test_markdown_and_json_say_the_same(runs: Path) -> None:
    report([runs / "a"], runs / "r.md")
    report([runs / "a"], runs / "r.json")
    markdown = (runs / "r.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    document = json.loads((runs / "r.json").read_text())
    assert document["kind"] == "serving simulation"
    titles = [section["title"] for section in document["sections"]]
    assert titles == ["Figures", "Latency", "Over time, and by rank", "One step", "What this rests on"]
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == titles
    assert "| ttft p50 s | 20.0 ms | 15.0 to 30.0 ms | lower |" in markdown
    assert "busiest kinds: experts" in markdown


def test_two_simulations_are_compared(runs: Path) -> None:
    document = report([runs / "a", runs / "b"], runs / "c.html").document
    first = document.sections[0]
    assert first.title == "From a to b"
    rows = {row[0]: row for row in first.blocks[0].rows}  # type: ignore[union-attr]
    assert rows["tpot p50 s"][3:] == ("+100.0\N{NO-BREAK SPACE}%", "worse")
    assert (runs / "c.html").read_text().count('aria-label="Time to first token') == 3  # both together, and each


def test_a_simulation_and_a_live_run_are_predicted_against_measured(runs: Path) -> None:
    document = report([runs / "a", runs / "live"]).document
    section = next(s for s in document.sections if s.title == "Predicted against measured")
    errors = {row[0]: row[4] for row in section.blocks[0].rows}  # type: ignore[union-attr]
    assert errors == {"step": "-20.0 %", "attention": "-20.0 %", "dispatch": "-20.0 %", "experts": "-20.0 %"}
    assert any(s.title.endswith("Loss") for s in document.sections)


def test_a_training_result_shows_its_memory(runs: Path) -> None:
    track = MemoryTrack(
        stage=0, limit_bytes=80 * GIB, state_bytes=30 * GIB, time_s=(0.0, 1.0), activation_bytes=(5 * GIB, 0.0)
    )
    result = _result(kind="training", memory=(track, track.model_copy(update={"stage": 1})), ranks=None, timeline=None)
    (runs / "t").mkdir()
    result.save(runs / "t" / "result.json")
    section = next(s for s in report([runs / "t"]).document.sections if s.title == "Memory")
    assert "at most 35.0 GiB of 80.0 GiB" in section.blocks[0].label  # type: ignore[union-attr]


def test_a_sweep_draws_throughput_against_load(runs: Path) -> None:
    places = ((1, "a"), (2, "b"))
    index = [{"case": {"serving.requests.rate": f"{n} /s"}, "path": f"{place}/result.json"} for n, place in places]
    (runs / "sweep.json").write_text(json.dumps({"schema_version": 1, "cases": index}))
    document = report([runs]).document
    assert "2 loads from 1 to 2" in document.sections[0].blocks[0].label  # type: ignore[union-attr]
    assert document.facts[0] == "2 cases"
    assert not any("simulated" in fact for fact in document.facts)  # that is of one case
    cells = document.sections[0].blocks[1].rows[0]  # type: ignore[union-attr]
    assert cells[2].replace("\N{NO-BREAK SPACE}", " ") == "20.0 ms\n(15.0 to 30.0 ms)"
    assert "(" not in cells[3]  # both ends are the value


def test_the_demo_trace_as_a_plan_report(tmp_path: Path) -> None:
    import moeplan

    demo = Path(moeplan.__file__).parent / "data" / "demo_trace.npz"
    runner = CliRunner()
    made = ["optimize", "--model", "deepseek-v2-lite", "--trace", str(demo), "--ranks", "8", "--planner", "greedy",
            "--out", str(tmp_path / "plan"), "--quiet"]  # fmt: skip
    assert runner.invoke(cli, made).exit_code == 0
    ran = runner.invoke(
        cli, ["report", str(tmp_path / "plan"), "--trace", str(demo), "--cluster", "h100", "--out",
              str(tmp_path / "r.html"), "--json"]
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    titles = [section["title"] for section in json.loads(ran.stdout)["sections"]]
    wanted = ["The plan", "Load of every rank in every layer", "Traffic from rank to rank", "Memory", "One step"]
    assert titles == [*wanted, "What this rests on"]
    assert (tmp_path / "r.html").read_text().count("<svg") == 7


def test_what_cannot_be_reported_says_why(runs: Path) -> None:
    with pytest.raises(InputError, match="is not there; name a plan"):
        report([runs / "nothing"])
    with pytest.raises(SpecError, match=r"must end in .html, .md, .json"):
        report([runs / "a"], runs / "r.pdf")
    with pytest.raises(SpecError, match="3 paths: report on one, or compare two"):
        report([runs / "a", runs / "b", runs / "live"])
    with pytest.raises(InputError, match="2 of these paths hold one"):
        report([runs / "a", runs / "b"], perfetto_path=runs / "t.json")
    (runs / "other").mkdir()
    with pytest.raises(InputError, match=r"has no result.json"):
        report([runs / "other"])
