"""Rows of the measured file: which count, to which part they belong, what they ran on; scores against scipy's."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
from scipy.stats import spearmanr

from moeplan.specs.models import find_model
from moeplan.validation.scoring import Features, mean_error, median_error, nearest, scores, spearman
from moeplan.validation.silicon import pools_of, told_apart
from moeplan.validation.silicon_recipes import Launch
from moeplan.validation.silicon_rows import Measured, Workers, distinct, impossible, part_of, read_measured

ROW = {
    "id": "one",
    "silicon_data_source": "source_file=x; silicon_concurrency=32; measured=2026-02-03T00:00:00.000Z",
    "backend": "trtllm",
    "model_path": "deepseek-ai/DeepSeek-R1",
    "system": "b200_sxm",
    "precision": "fp4",
    "mode": "agg",
    "isl": "1024",
    "osl": "1024",
    "batch_size": "32.0",
    "tp_size": "8.0",
    "attention_dp_size": "1.0",
    "moe_tp_size": "8.0",
    "moe_ep_size": "1.0",
    "silicon_ttft_ms": "100.0",
    "silicon_tpot_ms": "10.0",
}


def test_the_last_bit_of_the_digest_decides_and_three_models_are_never_tuned() -> None:
    for group in ("DeepSeek-V3|h200_sxm|trtllm", "gpt-oss-120b|b200_sxm|vllm", "Qwen3.5-397B-A17B|b300_sxm|sglang"):
        even = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 2 == 0
        assert part_of(group.split("|")[0], group) == ("a" if even else "b")
    assert part_of("GLM-5", "GLM-5|b200_sxm|sglang") == "c"
    assert part_of("Kimi-K2.5", "Kimi-K2.5|h200_sxm|vllm") == part_of("MiniMax-M2.5", "any") == "c"


def test_rows_that_differ_in_id_and_source_alone_are_one() -> None:
    again = {**ROW, "id": "two", "silicon_data_source": "elsewhere"}
    other = {**ROW, "id": "three", "silicon_tpot_ms": "10.1"}
    assert [(row["id"], ids) for row, ids in distinct([ROW, again, other])] == [("one", ("two",)), ("three", ())]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"attention_dp_size": ""}, ""),  # made up for by the product
        ({"moe_tp_size": "0.0"}, "missing or zero"),
        ({"moe_ep_size": "8.0"}, "is not moe_tp x moe_ep"),
        ({"tp_size": "64.0", "moe_ep_size": "8.0"}, "64 ranks in a server of 8"),
        ({"tp_size": "6.0", "moe_tp_size": "6.0"}, "do not divide"),
        ({"tp_size": "1.0", "moe_tp_size": "1.0"}, "exceed the memory of 1 ranks"),
    ],
)
def test_impossible_widths(changes: dict[str, str], why: str) -> None:
    found = impossible({**ROW, **changes}, find_model("deepseek-v3"))
    assert why in found if why else found == ""


def test_a_server_of_a_rack_may_have_more_ranks_than_a_box() -> None:
    wide = {**ROW, "tp_size": "16.0", "moe_tp_size": "16.0"}
    assert impossible(wide, find_model("deepseek-v3"))
    assert not impossible({**wide, "system": "gb200"}, find_model("deepseek-v3"))


def test_scores_agree_with_scipy_and_count_what_is_missing() -> None:
    rng = np.random.default_rng(0)
    measured = rng.uniform(1, 100, 50).round()  # with ties
    predicted = measured * rng.uniform(0.7, 1.4, 50)
    assert spearman(predicted, measured) == pytest.approx(spearmanr(predicted, measured).statistic)
    errors = abs(predicted - measured) / measured
    assert median_error(predicted, measured) == pytest.approx(np.quantile(errors, 0.5))
    assert mean_error(predicted, measured) == pytest.approx(sum(errors) / 50)
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
    found = scores([1.1, None, 2.0], [1.0, 5.0, 2.0], [10.0, None, 30.0], [10.0, 7.0, 20.0])
    assert found["coverage"] == pytest.approx(2 / 3)
    assert found["tpot_median"] == pytest.approx(0.05)
    assert found["ttft_median"] == pytest.approx(0.25)
    assert scores([None], [1.0], [None], [1.0])["tpot_median"] is None


PLAIN = Measured(
    id="", repeats=(), group="g", part="b", registry_name="deepseek-v3", system="h200_sxm", backend="sglang",
    mode="agg", precision="fp8", isl=1024, osl=1024, concurrency=4, ttft_ms=1.0, tpot_ms=1.0,
    decode=Workers(1, 8, 1, 1), prefill=None, draft_tokens=0, recipe=True, launch=None, late=False, why_not="",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "backend", "attention", "drafts"),
    [
        ("deepseek-v3", "sglang", "flashinfer", 0),
        ("deepseek-v3", "sglang", "trtllm_mla", 2),
        ("deepseek-v3", "sglang", "", 2),
        ("qwen3.5-397b-a17b", "sglang", "flashinfer", 2),  # no latent attention
    ],
)
def test_drafts_bring_nothing_where_their_planning_waits_for_the_device(
    model: str, backend: str, attention: str, drafts: int
) -> None:
    launch = Launch(1, 0, 0, 2048, 64, decode_attention=attention)
    row = replace(PLAIN, registry_name=model, backend=backend, draft_tokens=2, launch=launch)
    assert pools_of(row, find_model(model))[0].setup.draft_tokens == drafts
    assert pools_of(replace(row, launch=None), find_model(model))[0].setup.draft_tokens == 2


def test_of_equal_undecided_rows_the_slower_ones_are_undrafted() -> None:
    def row(name: str, tpot_ms: float, concurrency: int = 4, decided: bool = False) -> Measured:
        other = None if decided else replace(PLAIN, id=name)
        return replace(PLAIN, id=name, tpot_ms=tpot_ms, concurrency=concurrency, draft_tokens=2, undrafted=other)

    rows = [row("fast", 5.0), row("slow", 9.0), row("as fast", 5.2), row("decided", 9.0, decided=True)]
    rows += [row("alone", 9.0, 8), row("one", 9.0, 16), row("the same", 9.5, 16)]
    found = told_apart(rows)
    assert set(found) == {"slow"}
    assert found["slow"].draft_tokens == 0


def test_the_nearest_row_by_names_and_ratios() -> None:
    known = [Features(("a", "x"), (8.0,)), Features(("b", "x"), (4.0,)), Features(("a", "x"), (3.0,))]
    assert nearest(Features(("a", "x"), (4.0,)), known) == 2
    assert nearest(Features(("b", "x"), (7.0,)), known) == 1


def test_the_published_file_splits_as_stated() -> None:
    try:
        package = metadata.distribution("aiconfigurator-core")
    except metadata.PackageNotFoundError:
        pytest.skip("the extra aic is not installed")
    if package.version != "0.12.0":
        pytest.skip(f"aiconfigurator-core {package.version} is not 0.12.0")
    rows = read_measured(package.locate_file("aiconfigurator_core/systems/silicon_sample.csv"))  # type: ignore[arg-type]
    assert len(rows) == 3454
    assert len({row.id for row in rows}) == len(rows)
    parts = {part: {row.group for row in rows if row.part == part} for part in "abc"}
    assert not parts["a"] & parts["b"]
    assert {group.split("|")[0] for group in parts["c"]} == {"GLM-5", "Kimi-K2.5", "MiniMax-M2.5"}
    row = next(row for row in rows if row.id == "dsr1_b200_trtllm_fp4_agg_8192x1024_c32_cfg82")
    assert (row.part, row.decode, row.prefill, row.draft_tokens) == ("a", Workers(1, 4, 1, 1), None, 0)
    assert row.concurrency == 32
