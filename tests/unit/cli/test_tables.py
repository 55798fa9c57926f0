"""Tables on a terminal of 80 columns: names can be told apart, heads and numbers are whole."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner
from rich.console import Console

from moeplan.artifacts.simulation_result import Headline, SimulationResult
from moeplan.cli import cli
from moeplan.pipeline.compare import Difference
from moeplan.pipeline.simulate import Sweep
from moeplan.reports.sweep_terminal import sweep_view


def _printed(*words: str) -> list[str]:
    ran = CliRunner(env={"COLUMNS": "80"}).invoke(cli, list(words), catch_exceptions=False)
    assert ran.exit_code == 0
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in ran.stdout
    return lines


def test_published_rows_are_told_apart_and_explained_below(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "tables are of releases a year newer than the run; none of its age is public"
    rows = [
        {"id": f"sglang-gb200-decode-ep48-{end}", "measured": 13390.0, "predicted": 12930.0, "error": -0.034,
         "unit": "tokens/s/GPU", "within": end == "fp8", "explanation": why}
        for end in ("fp8", "nvfp4", "mxfp4")
    ]  # fmt: skip
    figures = [{"figure": "share within 15 %, all rows", "rows": 3, "value": 0.3, "median_error": 0.1, "target": 0.7,
                "reached": False}]  # fmt: skip
    answer = {"rows": rows, "figures": figures}
    monkeypatch.setattr("moeplan.validation.published.validate_published", lambda _report: answer)
    lines = _printed("validate", "published")
    names = "".join(line.partition(" ")[0] for line in lines)
    assert all(row["id"] in names for row in rows)
    assert [word for line in lines[:9] for word in line.split()[-1:] if word in ("within", "outside")] == [
        "within", "outside", "outside"
    ]  # fmt: skip
    assert f"sglang-gb200-decode-ep48-nvfp4, sglang-gb200-decode-ep48-mxfp4: {why}" in " ".join(" ".join(lines).split())


def test_compared_figures_have_whole_heads_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(value: float) -> Headline:
        return Headline(value=value, low=value, high=value, unit="tokens/s", better="higher")

    name, change = "output_tokens_per_s_per_gpu", (39254.0, 4184.0, 75590.0, 0.296)
    one = Difference(name, "tokens/s", line(132456.7), line(171711.1), *change, "not told apart", "seeds and costs", 3)
    monkeypatch.setattr("moeplan.pipeline.compare.compare", lambda _a, _b: [({"ranks": 8}, [one])])
    long = "a-directory-with-a-name-that-is-long-" * 2
    lines = _printed("compare", long, "b")
    assert lines[:2] == [f"a: {long}", "b: b"]
    assert lines[2] == "ranks 8"
    assert lines[3].split() == ["figure", "a", "b", "change"]
    assert lines[4].split() == [name, "132,457", "171,711", "+29.6", "%", "not", "told", "apart"]
    told = " ".join(" ".join(lines[5:]).split())
    assert told.startswith("Of 1 figures 0 are better, 0 worse, 1 not told apart (the change may be none). Both runs")


def test_cases_of_a_sweep_are_told_apart_with_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def line(value: float, unit: str) -> Headline:
        return Headline(value=value, low=0.9 * value, high=1.1 * value, unit=unit, better="lower")

    headlines = {
        "ttft_p50_s": line(0.0204, "s"), "tpot_p50_s": line(0.00525, "s"),
        "output_tokens_per_s_per_gpu": line(1182.3, "tokens/s"), "goodput_requests_per_s": line(9.72, "requests/s"),
    }  # fmt: skip
    result = SimpleNamespace(headlines=headlines, kind="service")
    cases = [{"serving.requests.rate": "10 /s", "current": place} for place in ("plan/plan.json", None)]
    swept = Sweep(tuple(cases), (cast(SimulationResult, result), None), {1: "out of memory"})
    monkeypatch.setattr("moeplan.pipeline.simulate.sweep", lambda *_args, **_options: swept)
    file = tmp_path / "s.yaml"
    requests = "{arrivals: poisson, rate: 1 /s, count: 1, input_tokens: 1, output_tokens: 1}"
    base = "model: moeplan-20m\ntrace: x\nranks: 8\nsweep: {seed: [0]}\n"
    file.write_text(f"{base}serving: {{requests: {requests}}}\n")
    ran = CliRunner(env={"COLUMNS": "80"}).invoke(cli, ["simulate", str(file), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 1
    lines = [" ".join(line.split()) for line in ran.stdout.splitlines()]
    assert lines == [
        "1 of 2 cases without a result, 0 of them impossible",
        "rate current why", "10 /s none out of memory",
        "1 of 2 cases, 0 of them kept from before",
        "rate current TTFT p50 TPOT p50 per GPU goodput",
        "10 /s plan/plan.json 20.4 ms 5.25 ms 1,182 tokens/s 9.72 requests/s",
    ]  # fmt: skip
    assert max(map(len, ran.stdout.splitlines())) <= 80


@pytest.mark.parametrize("steps", [0, 2])
def test_a_live_run_says_what_it_wrote_and_shows_steps_it_took(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    answer: dict[str, Any] = {
        "model": "moeplan-20m", "ranks": 2, "first_step": 0, "steps": steps, "losses": [5.5] * steps,
        "applied": None, "tokens_per_s": 1.0, "held_out_loss": 5.0, "imbalance": 1.0,
        "recorded": {"path": "r.npz", "tokens": 16384, "overhead": 0.021, "overhead_spread": 0.17},
    }  # fmt: skip

    def run_live(_request, _report, tell):
        tell("step-000002 is damaged")
        return answer

    monkeypatch.setattr("moeplan.pipeline.live.run_live", run_live)
    ran = CliRunner().invoke(cli, ["live", "--record", "r.npz", "--steps", str(steps)], catch_exceptions=False)
    assert ran.stderr.endswith("wrote r.npz: 16,384 tokens, overhead of recording +2.1% (spread 17.0%)\n")
    assert ran.stderr.startswith("step-000002 is damaged\n")
    assert ran.stdout.startswith("moeplan-20m on 2 ranks\n")
    assert ("step" in ran.stdout) == (steps > 0)


def test_a_placement_without_a_suffix_is_told_which_are_expected(tmp_path: Path) -> None:
    (tmp_path / "map").write_text("tp_size: 8\n")
    words = ["import", str(tmp_path / "map"), "--model", "mixtral-8x7b", "--ranks", "8", "--out", "x.json"]
    error = CliRunner().invoke(cli, words).exception
    assert "is not valid JSON" in str(error)
    assert "unless the name ends in .yaml, .yml," in str(error)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_training_sweep_fits_the_terminal_by_leaving_out_whole_columns(width: int) -> None:
    names = ("tokens_per_s_per_gpu", "mfu", "bubble_share", "exposed_exchange_share", "exposed_sync_share",
             "peak_memory_bytes")  # fmt: skip
    lines = {n: Headline(value=0.2, low=0.1, high=0.3, unit="", better="higher") for n in names}
    lines[names[0]] = Headline(value=1521.0, low=1268.0, high=1820.0, unit="tokens/s", better="higher")
    swept = SimpleNamespace(
        cases=[{f"training.{name}": 16 for name in ("tp", "pp", "ep", "virtual_stages", "recompute")}],
        results=[SimpleNamespace(kind="training", headlines=lines)], impossible=(), failures={}, ranked=[0], resumed=0,
    )  # fmt: skip
    console = Console(width=width, file=io.StringIO())
    console.print(sweep_view(swept, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "MFU" in text and "memory" in text  # noqa: PT018
    assert ("1,268" in text, "bubble" in text) == (width >= 80, width >= 80)
