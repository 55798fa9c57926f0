"""Intervals of training figures: the parts of a chunk by hand, every single play inside, and what is exact."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.costs.training import TrainingCosts
from moeplan.costs.training_parts import scaled
from moeplan.pipeline.simulate import simulate
from moeplan.pipeline.training import TRAINING_EXACT, simulate_training
from moeplan.simulation.training import simulate_training as play
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.scenario import Scenario
from moeplan.specs.training import TrainingSpec

BASE: dict[str, Any] = {
    "model": "deepseek-v2-lite", "cluster": "h100", "ranks": 32, "nodes": 4, "profile": "none",
    "training": {"global_batch": 64, "pp": 4, "ep": 8, "experts": "balanced", "recompute": "full", "zero": 1},
}  # fmt: skip


def _scenario(**training: Any) -> Scenario:
    return Scenario.parse({**BASE, "training": {**BASE["training"], **training}}, "test")


def _costs(**training: Any) -> TrainingCosts:
    """The costs of ``_scenario``, with experts that differ in load."""
    model, cluster = find_model("deepseek-v2-lite"), cluster_for("h100", 4, 8)
    rows = np.tile(np.arange(64, dtype=np.int32), (model.num_moe_layers, 1))
    placement = Placement(rows, np.repeat(np.arange(8, dtype=np.int32), 8), 64, 8, 8)
    load_WLE = np.random.default_rng(0).gamma(2.0, size=(2, model.num_moe_layers, 64))
    spec = TrainingSpec.parse({**BASE["training"], **training}, "test")
    return TrainingCosts(model, cluster, None, placement, load_WLE, spec)


@pytest.mark.parametrize("overlap", ["none", "shared_expert"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_parts_of_a_chunk_make_the_whole(overlap: str, recompute: str) -> None:
    costs = _costs(overlap=overlap, recompute=recompute)
    names = list(costs.part_errors)
    for chunk in costs.chunks():
        same, twice = scaled(costs, chunk, dict.fromkeys(names, 1.0)), scaled(costs, chunk, dict.fromkeys(names, 2.0))
        for field in fields(chunk)[1:]:  # the first is the team
            value, seconds = getattr(chunk, field.name), "_s" in field.name
            np.testing.assert_allclose(getattr(same, field.name), value, rtol=1e-12)
            np.testing.assert_allclose(getattr(twice, field.name), 2 * np.array(value) if seconds else value)
        slow = scaled(costs, chunk, {"experts": 3.0})
        expert_W = [sum(batch.expert_s_LR[row].max() for row in chunk.moe_rows) for batch in costs.teams[0].batches_W]
        np.testing.assert_allclose(slow.forward_s_W - chunk.forward_s_W, 2 * np.array(expert_W))
        back = 3 if recompute == "full" else 2
        np.testing.assert_allclose(slow.backward_s_W - chunk.backward_s_W, 2 * back * np.array(expert_W))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_step_takes_as_many_times_as_long_as_all_its_parts(zero: int) -> None:
    costs = _costs(zero=zero)
    plain, slow = play(costs), play(costs, factor=dict.fromkeys(costs.part_errors, 1.5))
    assert slow.step_s == pytest.approx(1.5 * plain.step_s)
    assert slow.bubble_share == pytest.approx(plain.bubble_share)


@pytest.mark.parametrize("zero", [1, 3])
def test_every_play_at_an_end_lies_within_the_interval(zero: int) -> None:
    scenario = _scenario(zero=zero)
    found = simulate_training(scenario, intervals=True)
    lines = simulate(scenario, seeds=1).result.headlines
    for name in ("step_s", "bubble_share"):
        assert lines[name].low < found.headlines[name] < lines[name].high
    model, cluster = find_model("deepseek-v2-lite"), cluster_for("h100", 4, 8)
    rows = np.tile(np.arange(64, dtype=np.int32), (model.num_moe_layers, 1))
    placement = Placement(rows, np.repeat(np.arange(8, dtype=np.int32), 8), 64, 8, 8)
    assert scenario.training is not None
    costs = TrainingCosts(
        model, cluster, None, placement, np.ones((1, model.num_moe_layers, 64)), scenario.training
    )  # the same, made apart
    costs.chunks()
    assert play(costs).step_s == pytest.approx(found.headlines["step_s"])
    deviations = []
    assert found.parts == tuple(costs.part_errors)
    for number, (name, error) in enumerate(costs.part_errors.items()):
        for end, factor in enumerate((1 / (1 + error), 1 + error)):
            run = play(costs, factor={name: factor})
            assert found.ends["step_s"][1 + number][end] == pytest.approx(run.step_s)
            assert lines["bubble_share"].low <= run.bubble_share <= lines["bubble_share"].high, name
            assert lines["step_s"].low <= run.step_s <= lines["step_s"].high, name
            deviations.append(run.bubble_share - found.headlines["bubble_share"])
    pairs = np.array(deviations).reshape(-1, 2)
    above = float(np.sqrt((np.maximum(0.0, pairs.max(1)) ** 2).sum()))
    assert lines["bubble_share"].high == pytest.approx(found.headlines["bubble_share"] + above)
    worst = play(costs, factor={name: 1 + error for name, error in costs.part_errors.items()})
    assert lines["step_s"].high == pytest.approx(worst.step_s)


def test_no_bubble_without_a_pipeline_and_what_is_exact_says_so() -> None:
    result = simulate(_scenario(pp=1, ep=32, global_batch=32, zero=3), seeds=2).result
    lines = result.headlines
    assert lines["bubble_share"].value == pytest.approx(0, abs=1e-12)
    assert lines["bubble_share"].high == pytest.approx(0, abs=1e-12)
    for name, line in lines.items():
        assert (line.low == line.value == line.high) or not line.exact, name
        assert bool(line.exact) == (name in TRAINING_EXACT), name
        assert line.unit != "1" or line.high <= 1, name
    assert result.seeds == (0,)
    assert any("nothing in training is drawn" in note for note in result.notes)


def test_a_detailed_run_takes_the_step_modes_deviations() -> None:
    ends = {}
    for fidelity in ("step", "detailed"):
        scenario = _scenario(global_batch=16, pp=2).model_copy(update={"fidelity": fidelity})
        found = simulate_training(scenario, intervals=True)
        ends[fidelity] = np.array(found.ends["step_s"]) / found.headlines["step_s"]
    np.testing.assert_allclose(ends["detailed"], ends["step"])


def test_a_service_that_never_idles_has_intervals_on_its_shares() -> None:
    document = {
        "model": "deepseek-v2-lite", "cluster": "h100", "ranks": 8, "nodes": 2, "profile": "none",
        "serving": {
            "requests": {"arrivals": "closed-loop", "concurrency": 64, "count": 64, "input_tokens": 100,
                         "output_tokens": 20},
            "role": "decode", "experts": {"mode": "balanced"},
        },
    }  # fmt: skip
    lines = simulate(Scenario.parse(document, "test"), seeds=1).result.headlines
    for name in ("compute_share", "exchange_share"):
        assert lines[name].low < lines[name].value < lines[name].high, name
    assert lines["bubble_share"].low <= lines["bubble_share"].value == pytest.approx(0, abs=1e-6)
