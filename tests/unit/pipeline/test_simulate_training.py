"""``moeplan simulate`` with a training section: figures, files, sweeps, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moeplan.artifacts.event_log import EventLog
from moeplan.artifacts.simulation_result import SimulationResult
from moeplan.cli import cli
from moeplan.errors import InfeasibleError, SpecError, TraceError
from moeplan.pipeline.training import simulate_training
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


def test_impossible_jobs_say_why() -> None:
    with pytest.raises(InfeasibleError, match=r"stage 0 needs .* GiB of 79.6 GiB"):
        simulate_training(_scenario(recompute="none", global_batch=256, micro_batch=8, pp=1, zero=0))
    with pytest.raises(SpecError, match=r"training.ep \(32\) does not divide num_experts \(8\)"):
        simulate_training(_scenario(pp=1, ep=32))
    with pytest.raises((TraceError, SpecError), match="trace"):
        simulate_training(_scenario(experts="trace"))
    with pytest.raises(SpecError, match="serving and training are two jobs"):
        Scenario.parse({**BASE, "serving": {"requests": {"arrivals": "poisson", "rate": "1 /s", "count": 1,
                       "input_tokens": 1, "output_tokens": 1}}}, "test")  # fmt: skip
