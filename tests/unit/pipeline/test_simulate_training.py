"""``moeplan simulate`` with a training section: figures, files, sweeps, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from moeplan.artifacts.event_log import EventLog
from moeplan.artifacts.simulation_result import SimulationResult
from moeplan.cli import cli
from moeplan.errors import InfeasibleError, SpecError, TraceError
from moeplan.pipeline.report import report
from moeplan.pipeline.training import simulate_training
from moeplan.reports.document import Table
from moeplan.specs.scenario import Scenario

BASE = {
    "model": "mixtral-8x7b",
    "cluster": "h100",
    "ranks": 32,
    "nodes": 4,
    "training": {"global_batch": 64, "pp": 4, "ep": 8, "experts": "balanced", "recompute": "full"},
}


def _scenario(**training: object) -> Scenario:
    return Scenario.parse({**BASE, "training": {**BASE["training"], **training}}, "test")  # type: ignore[dict-item]


def test_command_writes_a_result_and_a_log(tmp_path: Path) -> None:
    place = tmp_path / "scenario.json"
    place.write_text(json.dumps(BASE))
    ran = CliRunner().invoke(cli, ["simulate", str(place), "--out", str(tmp_path / "out"), "--json", "--quiet"])
    assert ran.exit_code == 0, ran.output
    answer = json.loads(ran.stdout)
    assert answer["kind"] == "training"
    lines = answer["headlines"]
    assert lines["tokens_per_s"]["value"] * lines["step_s"]["value"] == pytest.approx(64 * 4096)
    assert lines["step_s"]["low"] < lines["step_s"]["value"] < lines["step_s"]["high"]
    result = SimulationResult.load(tmp_path / "out")
    assert len(result.memory) == 4
    assert all(track.state_bytes + max(track.activation_bytes) < track.limit_bytes for track in result.memory)
    log = EventLog.read(tmp_path / "out" / "events.parquet")
    assert log.of_kind("forward").sum() == log.of_kind("backward").sum() == 4 * 8


def test_a_sweep_over_training_fields(tmp_path: Path) -> None:
    place = tmp_path / "scenario.json"
    place.write_text(json.dumps({**BASE, "sweep": {"training.virtual_stages": [1, 2]}}))
    ran = CliRunner().invoke(
        cli, ["simulate", str(place), "--out", str(tmp_path / "out"), "--json", "--seeds", "1", "--workers", "1"]
    )
    assert ran.exit_code == 0, ran.output
    bubbles = [case["result"]["headlines"]["bubble_share"]["value"] for case in json.loads(ran.stdout)["cases"]]
    assert bubbles[1] < 0.7 * bubbles[0]


def _guide(tmp_path: Path) -> dict[str, Any]:
    """The scenario of docs/guides/training.md, on a drawn trace."""
    page = (Path(__file__).parents[3] / "docs" / "guides" / "training.md").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    trace = tmp_path / document["trace"]
    np.savez(trace, experts=np.random.default_rng(0).random((1024, 58, 256)).argsort(axis=2)[..., :8])
    return {**document, "trace": str(trace)}


def test_the_job_of_the_guide_fits(tmp_path: Path) -> None:
    found = simulate_training(Scenario.parse(_guide(tmp_path), "guide"))
    assert 0.5 < found.headlines["peak_memory_bytes"] / found.result.memory_bytes < 1


def test_changes_named_for_a_job_that_does_not_fit_make_it_fit(tmp_path: Path) -> None:
    document = _guide(tmp_path)
    training = {name: value for name, value in document["training"].items() if name != "recompute_modules"}
    with pytest.raises(InfeasibleError, match=r"needs .* of 79.6 GiB; each of these alone fits: ") as refused:
        simulate_training(Scenario.parse({**document, "training": training}, "guide"))
    assert "training.recompute: full (" in str(refused.value)
    assert "zero: 3" not in str(refused.value), "a remedy that does not help here"
    for remedy in str(refused.value).split("fits: ")[1].split("; "):
        change = yaml.safe_load(remedy.removeprefix("training.").partition(" (")[0])
        simulate_training(Scenario.parse({**document, "training": training | change}, "remedy"))


def test_impossible_jobs_say_why() -> None:
    with pytest.raises(InfeasibleError, match=r"stage 0 needs .* of 79.6 GiB; no single change is enough: training.* "
                       r"comes nearest, .* GiB too much"):  # fmt: skip
        simulate_training(_scenario(recompute="none", global_batch=256, micro_batch=8, pp=1, zero=0))
    with pytest.raises(SpecError, match=r"training.ep \(32\) does not divide num_experts \(8\)"):
        simulate_training(_scenario(pp=1, ep=32))
    with pytest.raises((TraceError, SpecError), match="trace"):
        simulate_training(_scenario(experts="trace"))
    with pytest.raises(SpecError, match="serving and training are two jobs"):
        Scenario.parse({**BASE, "serving": {"requests": {"arrivals": "poisson", "rate": "1 /s", "count": 1,
                       "input_tokens": 1, "output_tokens": 1}}}, "test")  # fmt: skip


def _sweep(place: Path, *options: str, **more: Any) -> Any:
    (place / "scenario.json").write_text(json.dumps({**BASE, **more}))
    words = ["simulate", str(place / "scenario.json"), "--out", str(place / "out"), "--workers", "1", *options]
    return CliRunner().invoke(cli, words)


def test_a_sweep_ranks_layouts_and_says_why_others_cannot_be(tmp_path: Path) -> None:
    wanted = {"training.pp": [1, 4], "training.ep": [4, 8, 16], "training.virtual_stages": [1, 2],
              "training.recompute": ["full", "none"]}  # fmt: skip
    ran = _sweep(tmp_path, "--json", sweep=wanted, training={**BASE["training"], "micro_batch": 2})  # type: ignore[dict-item]
    assert ran.exit_code == 0, ran.output
    answer = json.loads(ran.stdout)
    rates = [answer["cases"][n]["result"]["headlines"]["tokens_per_s_per_gpu"]["value"] for n in answer["ranked"]]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates) > 1
    assert answer["failed"] == 0
    assert sorted(answer["ranked"] + answer["impossible"]) == list(range(24))
    why = {tuple(row["case"].values()): row["failure"] for row in answer["cases"] if "failure" in row}
    assert why[1, 8, 2, "full"].startswith("training: virtual_stages (2) needs pp above 1")
    assert "pp x ep (64) does not divide ranks (32)" in why[4, 16, 1, "full"]
    assert why[1, 8, 1, "none"].startswith("training does not fit: stage 0 needs ")
    assert why[1, 8, 1, "none"].endswith(" of 79.6 GiB"), "no search for remedies"
    assert {tuple(row["case"].values()): row["path"] for row in json.loads(
        (tmp_path / "out" / "sweep.json").read_text())["cases"]}[1, 8, 2, "full"] is None  # fmt: skip


def test_a_report_of_a_sweep_has_the_best_layout_first(tmp_path: Path) -> None:
    ran = _sweep(tmp_path, sweep={"training.pp": [4, 1], "training.virtual_stages": [1, 2]})
    assert ran.exit_code == 0, ran.output
    (table,) = next(s for s in report([tmp_path / "out"]).document.sections if s.title == "Sweep").blocks
    assert isinstance(table, Table)
    assert table.columns == ("case", "tokens per s per gpu", "step s", "mfu", "bubble share", "exposed exchange share",
                             "peak memory bytes")  # fmt: skip
    rates = [float(row[1].split()[0].replace(",", "")) for row in table.rows]
    assert rates == sorted(rates, reverse=True)
    assert table.rows[0][0] == "pp 1, virtual_stages 1", "the last case"


def test_a_sweep_s_table_has_the_best_layout_first_below_what_cannot_be(tmp_path: Path) -> None:
    ran = _sweep(tmp_path, sweep={"training.pp": [1, 4], "training.virtual_stages": [1, 2]})
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    below = next(n for n, line in enumerate(lines) if "best first" in line)
    assert lines[below].startswith("3 of 4 cases")
    assert any(line.startswith("1  2 ") and "needs pp above 1" in line for line in lines[:below])
    table = [line.split() for line in lines[below + 3 :]]
    assert [line.split() for line in lines[below + 1 : below + 3]] == [
        ["virtual", "tokens/s", "MFU", "bubble", "exchange", "sync", "memory"],
        ["pp", "stages", "per", "GPU", "from", "to", "%", "%", "%", "%", "GiB"],
    ]
    rates = [float(row[2].replace(",", "")) for row in table]
    assert rates == sorted(rates, reverse=True)
    for rate, (pp, chunks, *figures) in zip(rates, table, strict=True):
        one = simulate_training(_scenario(pp=int(pp), virtual_stages=int(chunks))).headlines
        assert rate == pytest.approx(one["tokens_per_s_per_gpu"], rel=1e-3)
        shares = [100 * one[n] for n in ("mfu", "bubble_share", "exposed_exchange_share", "exposed_sync_share")]
        assert [float(word) for word in figures[3:7]] == pytest.approx(shares, abs=0.06)
        assert float(figures[7]) == pytest.approx(one["peak_memory_bytes"] / 2**30, abs=0.06)


def test_sweeps_without_any_result_and_wrong_inputs_are_failures(tmp_path: Path) -> None:
    ran = _sweep(tmp_path, "--json", sweep={"training.ep": [32, 64]})  # 8 experts on 32 ranks, or more than there are
    assert ran.exit_code == 1
    assert json.loads(ran.stdout)["failed"] == 2
    ran = _sweep(tmp_path, "--json", sweep={"current": [str(tmp_path / "missing"), None]})
    assert ran.exit_code == 1
    assert (json.loads(ran.stdout)["failed"], json.loads(ran.stdout)["impossible"]) == (1, [])
    ran = _sweep(tmp_path, sweep={"training.pipeline": [1, 2]})
    assert str(ran.exception).startswith("sweep training.pipeline=1: ")
