"""The validation against tables whose errors are known, and its figures on a shipped profile."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, Source
from moeplan.cli import validate as cli_validate
from moeplan.cli.validate import command
from moeplan.costs.heldout import hidden_rows, hold_out, pooled
from moeplan.errors import MoeplanError, ProfileError
from moeplan.specs.clusters import find_accelerator
from moeplan.validation import kernels
from moeplan.validation.own_profiles import cpu_figures
from moeplan.validation.skew import _fit, _router_logit_s, skew_rows

SOURCES = {"s": Source(kind="measured", title="a test")}
META = ProfileMeta(name="toy", accelerator="h100-sxm", date="2026-11-22", command="none", sources=SOURCES)


def gemm(noise: float) -> pa.Table:
    rng = np.random.default_rng(0)
    rows = [
        {
            "m": m,
            "n": n,
            "k": 64,
            "dtype": "bf16",
            "backend": "b",
            "kernel": "k",
            "source": "s",
            "latency_us": float(m**0.5 * n**0.7 * np.exp(rng.normal(0, noise))),
        }
        for n in (64, 128, 256, 512, 1024)
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    ]
    return HardwareProfile(META, {"gemm": pa.Table.from_pylist(rows)}).table("gemm")


def test_a_smooth_table_predicts_itself_and_a_noisy_one_does_not() -> None:
    smooth, noisy = hold_out("gemm", gemm(0)).figures(), hold_out("gemm", gemm(0.2)).figures()
    assert smooth["held_out"] == noisy["held_out"] == 12  # rows 2, 6, ... of 50
    assert smooth["median"] < 0.01
    assert 0.08 < noisy["median"] < 0.5
    assert smooth["plain_coverage"] < 1  # a series' end has no line on both sides


def test_held_out_rows_do_not_serve() -> None:
    table = gemm(0)
    spoiled = table["latency_us"].to_numpy().copy()
    spoiled[2::4] *= 1000  # exactly the rows that are held out: sorted by n, then m
    index = table.column_names.index("latency_us")
    answer = hold_out("gemm", table.set_column(index, "latency_us", pa.array(spoiled)))
    np.testing.assert_allclose(np.abs(answer.ours), 0.999, atol=1e-3)


def test_each_row_is_held_out_from_one_of_the_first_four_on() -> None:
    hidden = [hidden_rows("gemm", gemm(0), first) for first in range(4)]
    np.testing.assert_array_equal(np.sum(hidden, 0), 1)
    assert len(hold_out("gemm", gemm(0), first=0).ours) == 13  # rows 0, 4, ... of 50


def test_marked_rows_are_scored_and_rows_that_serve_beside() -> None:
    rows = gemm(0).to_pylist()
    rows[2] |= {"latency_us": 1000 * rows[2]["latency_us"], "mark": "non_monotone"}
    rows[6] |= {"mark": "copied"}
    answer = hold_out("gemm", HardwareProfile(META, {"gemm": pa.Table.from_pylist(rows)}).table("gemm"))
    assert answer.figures()["held_out"] == 12
    assert answer.figures(serving=True)["held_out"] == 11
    assert answer.figures()["p90"] == pytest.approx(answer.figures(serving=True)["p90"], abs=0.01)
    assert np.abs(answer.ours).max() > 0.99 > 0.01 > answer.figures(serving=True)["p90"]


def test_kernels_that_timed_the_host_are_left_out_and_counted() -> None:
    rows = gemm(0.01).to_pylist()
    rows += [{**row, "kernel": "host", "latency_us": 300.0, "mark": "host_bound"} for row in rows]
    answer = hold_out("gemm", HardwareProfile(META, {"gemm": pa.Table.from_pylist(rows)}).table("gemm"))
    assert len(answer.ours) + answer.mismeasured == 25
    assert answer.mismeasured > 0
    assert answer.figures()["median"] < 0.05
    both = pooled([answer, answer])
    assert (len(both.ours), both.mismeasured) == (2 * len(answer.ours), 2 * answer.mismeasured)


def moe(**fields: object) -> dict[str, object]:
    row: dict[str, object] = {
        "hidden": 7168,
        "inter": 2048,
        "num_experts": 64,
        "num_slots": 64,
        "top_k": 8,
        "tp": 1,
        "rank_pairs": -1,
        "active_experts": -1,
        "rank_tokens": -1,
        "dtype": "nvfp4",
        "distribution": "balanced",
        "scope": "experts",
        "backend": "trtllm",
        "kernel": "moe_torch_flow_cutlass",
        "source": "r1/moe",
    }
    return row | fields


def balanced(ep: int, tokens: int, source: str) -> dict[str, object]:
    pairs, local = tokens * 8 // ep, 64 // ep
    late = 1.3 if ep == 8 else 1.0  # an autotuner's bad choice
    return moe(
        ep=ep, tokens=tokens, source=source, rank_pairs=pairs, active_experts=local, latency_us=late * (50 + pairs / 9)
    )


def wide(release: str, ep: int, tokens: int, **fields: object) -> dict[str, object]:
    skewed = {"distribution": "power_law_1.2_eplb", "kernel": "wideep_compute_cutlass", "source": f"{release}/wide"}
    return moe(ep=ep, tokens=tokens, **skewed | fields)


def test_a_balanced_row_of_another_release_stands_as_measured() -> None:
    ratios = {}
    for release in ("r1", "r2"):
        rows = [balanced(ep, tokens, "r1/moe") for ep in (2, 4, 8, 16) for tokens in (1024, 2048, 4096, 8192)]
        rows += [wide(release, 8, 4096, rank_tokens=3000, latency_us=700.0)]
        profile = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows)})
        (row,) = skew_rows(profile)
        assert row["measured"] == pytest.approx(700 / (1.3 * (50 + 4096 / 9)))
        ratios[release] = row["ours"]
    fit = _fit([r for r in rows if r["distribution"] == "balanced"], find_accelerator("h100").memory_bandwidth)
    assert fit is not None
    law_s, measured_s = float(fit.rank_s(np.full(8, 512.0), 512.0)), 1.3e-6 * (50 + 4096 / 9)
    assert law_s < 0.9 * measured_s
    assert ratios["r2"] / ratios["r1"] == pytest.approx(law_s / measured_s)


def test_a_router_that_was_slower_is_charged_for_the_ranks_own_tokens() -> None:
    # The older release takes 12 us and 0.05 ns a logit longer.
    def rows(source: str, longer: float) -> list[dict[str, object]]:
        grid = [(ep, tokens) for ep in (2, 4, 8, 16) for tokens in (1024, 2048, 4096, 8192)]
        found = [balanced(ep, tokens, source) for ep, tokens in grid]
        for row, (_, tokens) in zip(found, grid, strict=True):
            row["latency_us"] = float(row["latency_us"]) + longer * (12 + 5e-5 * tokens * 64)  # type: ignore[arg-type]
        return found

    skewed = wide("x/old", 8, 4096, rank_tokens=3000, latency_us=700.0)
    older = pa.Table.from_pylist([*rows("x/old/moe", 1), skewed])
    both = pa.concat_tables([older, pa.Table.from_pylist(rows("x/new/moe", 0))])
    alone, beside = (HardwareProfile(META, {"experts": table}) for table in (older, both))
    assert _router_logit_s(alone.table("experts").to_pylist()) == {}
    assert _router_logit_s(beside.table("experts").to_pylist()) == {"old": pytest.approx(5e-11)}
    (untold,), (told,) = skew_rows(alone), skew_rows(beside)
    # Its own 512 tokens' logits in place of those of the 3,000 that arrive.
    law_us = 5e-5 * 64 * (512 - 3000) / (told["ours"] - untold["ours"])
    assert law_us == pytest.approx(50 + 4096 / 9 + 12 + 5e-5 * 64 * 4096, rel=0.3)


def test_grouped_products_of_two_shapes_are_held_out_with_their_own_experts() -> None:
    rows = [
        moe(num_experts=experts, top_k=top_k, tokens=tokens, ep=ep, tp=tp, latency_us=latency)
        for experts, top_k in ((32, 2), (256, 8))
        for ep in (1, 2, 4, 8, 16)
        for tp in (1, 2, 4)
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        for pairs in [tokens * top_k / ep]
        for latency in [20 + (10 * min(experts / ep, max(pairs, 1)) + pairs / 50) / tp]
    ]
    answer = hold_out("experts", HardwareProfile(META, {"experts": pa.Table.from_pylist(rows)}).table("experts"))
    figures = answer.figures()
    assert figures["held_out"] == 75
    assert figures["p90"] < 0.03  # with the series' experts mixed up: 0.055; not counted at all: 0.046


def deepep(mode: str, phase: str, nodes: int, latency: float) -> dict[str, object]:
    return {
        "mode": mode,
        "phase": phase,
        "nodes": nodes,
        "ranks": 8 * nodes,
        "hidden": 7168,
        "top_k": 8,
        "num_experts": 256,
        "dtype": "fp8",
        "tokens_per_rank": 128 if mode == "low_latency" else 4096,
        "backend": "sglang",
        "kernel": "deepep",
        "source": "s",
        "latency_us": latency,
    }


def figures_of(rows: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    meta = META.model_copy(update={"accelerator": "H200-SXM-141GB"})
    profile = HardwareProfile(meta, {"alltoall": pa.Table.from_pylist(rows)})
    return {figure["figure"]: figure for figure in kernels._deepep(profile)}


def test_published_exchanges_are_compared_in_their_own_unit() -> None:
    figures = figures_of(
        [
            deepep("low_latency", "dispatch", 4, 155 * 1.1),
            deepep("low_latency", "combine", 4, 273 * 1.2),
            deepep("normal", "dispatch", 4, 4096 * 4 * (1 - 0.75**8) * 7392 / 58e3),
            deepep("normal", "combine", 4, 1e4),
        ]
    )
    near = figures["DeepEP low_latency dispatch, EP32"]
    assert (near["value"], near["reached"]) == (pytest.approx(0.1), True)
    assert figures["DeepEP low_latency combine, EP32"]["reached"] is False
    exact = figures["DeepEP normal dispatch, EP32"]
    assert (exact["value"], exact["from_table"]) == (pytest.approx(0, abs=1e-9), pytest.approx(58))
    assert figures["DeepEP low_latency dispatch, EP8"]["reached"] is None
    missing = figures["DeepEP low_latency dispatch, EP64"]
    assert (missing["value"], missing["reached"]) == (None, False)


def test_more_nodes_than_measured_follow_the_copies_that_leave_a_node() -> None:
    # Eight choices in four of eight groups leave a node for 7 of 8 copies, in four of four for 3 of 4.
    figures = figures_of([deepep("normal", "dispatch", 4, 1000.0)])
    at_32, at_64 = (figures[f"DeepEP normal dispatch, EP{ranks}"]["predicted"] for ranks in (32, 64))
    assert at_64 == pytest.approx(at_32 * (3 / 4) / (7 / 8))


def test_slower_links_inside_a_node_take_over() -> None:
    # H800 links carry 200 GB/s, H200 links 450: the path inside the node is 2.25 times as slow.
    rows = [deepep("normal", "combine", 1, 1000.0), deepep("normal", "combine", 2, 500.0)]
    predicted = figures_of(rows)["DeepEP normal combine, EP16"]["predicted"]
    inside_us = 1000 * 2.25 * 16 * (1 - (15 / 16) ** 8) / (8 * (1 - (7 / 8) ** 8))
    counted = 4096 * 2 * (1 - 0.5**8) * 7168 * 2
    assert predicted == pytest.approx(counted / inside_us * 1e-3)


def test_a_cpu_profile_is_held_to_its_own_held_out_sizes(tmp_path: Path) -> None:
    sizes = [2**i for i in range(12)]
    row = {"op": "alltoall", "ranks": 2, "dtype": "fp32", "backend": "gloo", "kernel": "gloo", "source": "s"}
    rows = [{**row, "tokens_per_rank": size, "latency_us": 5.0 * size**0.5} for size in sizes]
    for entry in rows:
        entry |= {"mode": "collective", "phase": "dispatch", "nodes": 1, "hidden": 8, "top_k": 2, "num_experts": 4}
        del entry["op"]
    HardwareProfile(META, {"alltoall": pa.Table.from_pylist(rows)}).save(tmp_path / "p")
    experts, exchange = cpu_figures(tmp_path / "p", None, lambda _what, _done: None)
    assert exchange["reached"] is True
    assert exchange["held_out"] == 3
    assert experts["value"] is None
    assert experts["reached"] is False
    nothing = cpu_figures(None, None, lambda _what, _done: None)
    assert all(figure["reached"] is False and "moeplan profile" in figure["note"] for figure in nothing)


def test_the_command_answers_one_object(tmp_path: Path) -> None:
    HardwareProfile(META, {"gemm": gemm(0)}).save(tmp_path / "p")
    result = CliRunner().invoke(command, ["kernels", "--profile", str(tmp_path / "p"), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    (figure,) = answer["figures"]
    assert figure["reached"] is True
    assert (answer["reached"], len(answer["not_covered"])) == (None, 5)  # all that was asked, but not all there is
    assert figure["figure"] == "held-out grid points, GEMM, toy"
    shown = CliRunner().invoke(command, ["kernels", "--profile", str(tmp_path / "p")])
    assert "held-out grid" in shown.output


def answered(path: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, ["kernels", "--profile", str(path), *options])
    assert result.exception is None or isinstance(result.exception, (SystemExit, MoeplanError)), result.exception
    return result.exit_code, result.output or str(result.exception or "")


def test_a_table_with_nothing_to_hold_out_is_not_scored(tmp_path: Path) -> None:
    HardwareProfile(META, {"gemm": gemm(0).slice(0, 2)}).save(tmp_path / "p")
    code, text = answered(tmp_path / "p", "--json")
    assert code == 0
    (figure,) = json.loads(text)["figures"]
    assert (figure["held_out"], figure["median"], figure["coverage"], figure["reached"]) == (0, None, None, None)
    assert answered(tmp_path / "p", "--quiet") == (0, "")


def test_a_profile_without_tables_to_hold_out_is_refused(tmp_path: Path) -> None:
    row = {"op": "device_copy", "message_size_bytes": 8, "latency_us": 1.0}
    row |= {"backend": "b", "kernel": "k", "source": "s"}
    HardwareProfile(META, {"memory": pa.Table.from_pylist([row])}).save(tmp_path / "p")
    assert "has tables memory, but none of experts" in answered(tmp_path / "p")[1]


def test_a_row_that_does_not_reach_its_target_says_why(tmp_path: Path) -> None:
    row = {"op": "device_copy", "message_size_bytes": 8, "latency_us": 1.0}
    row |= {"backend": "b", "kernel": "k", "source": "s"}
    HardwareProfile(META, {"memory": pa.Table.from_pylist([row])}).save(tmp_path / "p")
    missing = cpu_figures(tmp_path / "p", None, lambda _what, _done: None)[1]
    assert cli_validate._row(missing)[1] == "-  (no table alltoall)"
    figures = {"median": 2e-4, "p90": 2e-4, "plain_median": 1e-4, "plain_p90": 1e-4}
    figures |= {"median_on_plain": 2e-4, "p90_on_plain": 2e-4}
    answer = SimpleNamespace(
        figures=lambda *_, **__: figures | {"held_out": 2}, mismeasured=0, backend=np.array([]), part=np.array([])
    )
    worse = kernels._held_out("gemm", "p", answer)
    assert worse["reached"] is False
    assert cli_validate._row(worse)[1].endswith("; worse than the plain line where that one predicts)")


def test_a_missing_cpu_profile_is_told_before_tables_are_read(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"has no profile\.json"):
        kernels.validate_kernels(["nosuch"], cpu=tmp_path)


def test_a_picture_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, text = answered(tmp_path, "--plot", str(tmp_path / "file" / "x.svg"))
    assert code == 2
    assert "is a file, not a directory" in text


def test_systems_must_name_some() -> None:
    result = CliRunner().invoke(command, ["kernels", "--systems", ","])
    assert result.exit_code == 2
    assert "names no system" in result.output


def test_systems_and_profile_exclude_each_other() -> None:
    result = CliRunner().invoke(command, ["kernels", "--profile", "x", "--systems", "h100"])
    assert result.exit_code == 2
    assert "exclude each other" in result.output
