"""Published measurements: a whole data file, predictions that follow the configuration, an honest count."""

from __future__ import annotations

from typing import Any

import pytest

from moeplan.artifacts.profile import shipped_profiles
from moeplan.validation import published
from moeplan.validation import published_predict as module
from moeplan.validation.published import published_rows, validate_published
from moeplan.validation.published_predict import CONSTANTS

ROWS = {row["id"]: row for row in published_rows()}


def test_every_row_names_its_source_and_configuration() -> None:
    assert len(ROWS) == len(published_rows()) > 90
    for row in published_rows():
        assert row["source"]
        assert row["measured"] > 0
        assert row["section"] in ("serving", "training", "exchange", "memory")
        assert row["quality"] in ("A", "A+", "A/B", "B")
        assert row["config"] or row["why"]
    wanted = ("deepseek-prefill-ep32", "deepseek-decode-ep144", "imbalance-ep32-288", "dsv3-gb200-mxfp8-2602")
    assert set(wanted) <= set(ROWS)


def test_no_row_brings_a_constant_of_its_own() -> None:
    numbers = {"gap", "efficiency", "factor", "scale", "host_per_layer", "host_per_layer_ms", "engine_per_layer_ms"}
    assert not any(numbers & set(row["config"]) for row in published_rows())
    assert all(constant["meaning"] for constant in CONSTANTS.values())


@pytest.mark.skipif("h100-sxm" not in shipped_profiles(), reason="the h100-sxm profile is not shipped")
def test_more_work_takes_longer_and_overlap_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLAYED", 2)
    c = ROWS["deepseek-decode-ep144"]["config"]
    base = module._predict_step(c)
    assert module._predict_step({**c, "context": 4 * c["context"]}) < base
    assert module._predict_step({**c, "overlap": "none"}) < base


@pytest.mark.skipif("h100-sxm" not in shipped_profiles(), reason="the h100-sxm profile is not shipped")
def test_two_batches_are_played_and_other_layers_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    c = ROWS["deepseek-prefill-ep32"]["config"]
    bound = module.step_cost(c, c["phase"], c["batch"], c["context"]).total_s
    alone = module.step_cost(c, c["phase"], c["batch"], c["context"], "none").total_s
    played = module.step_s(c)
    assert bound < played < alone == module.step_s(c, "none")
    monkeypatch.setattr(module, "_PLAYED", 3)
    assert module.step_s(c) == pytest.approx(played, rel=1e-3)


@pytest.mark.skipif("b200-sxm" not in shipped_profiles(), reason="the b200-sxm profile is not shipped")
def test_training_rows_are_the_training_simulation() -> None:
    row = ROWS["simumax-deepseek-v3-ep8-pp1-4"]
    more = {**row, "config": {**row["config"], "global_batch": 2 * row["config"]["global_batch"]}}
    once, twice = module._predict_training(row), module._predict_training(more)
    assert 1.7 < twice / once < 2.0  # the optimizer's part does not double
    graphs = {**row, "config": {**row["config"], "graphs": True}}
    # 4 layers, 4 micro-batches of 8 sequences on 8 ranks
    gap = 4 * 4 * CONSTANTS["host_per_layer_ms"]["value"]
    assert once - module._predict_training(graphs) == pytest.approx(gap, rel=1e-6)


@pytest.mark.skipif("h100-sxm" not in shipped_profiles(), reason="the h100-sxm profile is not shipped")
def test_h20_takes_links_of_h100_and_no_kernels() -> None:
    profile = module._profile("h20")
    assert profile is not None
    assert set(profile.table_names) == {"alltoall", "collectives"}
    c = ROWS["sglang-h20-3e-deepep"]["config"]
    source = module.step_cost(c, "decode", c["batch"], c["isl"]).source
    assert "h100_sxm" in source["exchange inside a node"]
    assert source["experts"] == "roofline of H20-3e-141GB"


def test_imbalance_falls_to_the_scatter_of_draws() -> None:
    c = ROWS["imbalance-ep32-288"]["config"]
    rank_LR = module._skewed(c["without"]).reshape(58, 32, -1).sum(2)
    assert (rank_LR.max(1) / rank_LR.mean(1) - 1).mean() == pytest.approx(1.564, abs=0.02)
    # The largest of 32 Poisson counts of mean 1024 is about 2.07 standard deviations above it: 0.065.
    assert 0.03 < module._predict_imbalance(c) < 0.2


def test_rows_that_cannot_be_predicted_count_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(row: dict[str, Any]) -> tuple[float | None, str]:
        return (row["measured"] * 1.1, "") if row["section"] == "training" else (None, "not today")

    monkeypatch.setattr(published, "predict", fake)
    monkeypatch.setattr(published, "_ablations", list)
    answer = validate_published()
    shares = {figure["figure"]: figure for figure in answer["figures"]}
    assert shares["share within 15 %, training"]["value"] == 1.0
    assert shares["share within 15 %, serving"]["value"] == 0.0
    assert answer["reached"] is False
    missed = next(row for row in answer["rows"] if row["id"] == "trtllm-h200-fp8")
    assert missed["within"] is False
    assert missed["explanation"] == "not today"
    assert next(row for row in answer["rows"] if row["id"] == "dsv3-report")["within"] is None
