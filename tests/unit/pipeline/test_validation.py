"""The validation against tables whose errors are known, and its figures on a shipped profile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.cli.validate import command
from moeplan.costs.heldout import hold_out
from moeplan.pipeline import validation

META = ProfileMeta(name="toy", accelerator="toy", date="2026-11-22", command="none")


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


def test_published_exchanges_are_compared_in_their_own_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "mode": mode,
            "phase": phase,
            "nodes": 4,
            "ranks": 32,
            "hidden": 7168,
            "top_k": 8,
            "num_experts": 256,
            "dtype": "fp8",
            "tokens_per_rank": tokens,
            "backend": "sglang",
            "kernel": "deepep",
            "source": "s",
            "latency_us": latency,
        }
        for mode, phase, tokens, latency in (
            ("low_latency", "dispatch", 128, 155 * 1.1),
            ("low_latency", "combine", 128, 273 * 1.2),
            ("normal", "dispatch", 4096, 4096 * 4 * (1 - 0.75**8) * 7392 / 58e3),
            ("normal", "combine", 4096, 1e4),
        )
    ]
    profile = HardwareProfile(META, {"alltoall": pa.Table.from_pylist(rows)})
    figures = {figure["figure"]: figure for figure in validation._deepep(profile)}
    near = figures["DeepEP low_latency dispatch, EP32"]
    assert (near["value"], near["reached"]) == (pytest.approx(0.1), True)
    assert figures["DeepEP low_latency combine, EP32"]["reached"] is False
    exact = figures["DeepEP normal dispatch, EP32"]
    assert (exact["value"], exact["from_table"]) == (pytest.approx(0, abs=1e-9), pytest.approx(58))
    assert figures["DeepEP low_latency dispatch, EP8"]["reached"] is None
    missing = figures["DeepEP low_latency dispatch, EP64"]
    assert (missing["value"], missing["reached"]) == (None, False)


def test_the_command_answers_one_object(tmp_path: Path) -> None:
    HardwareProfile(META, {"gemm": gemm(0)}).save(tmp_path / "p")
    result = CliRunner().invoke(command, ["kernels", "--profile", str(tmp_path / "p"), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["reached"] is all(f["reached"] for f in answer["figures"] if f["reached"] is not None)
    (figure,) = answer["figures"]
    assert figure["figure"] == "held-out grid points, GEMM, toy"
    shown = CliRunner().invoke(command, ["kernels", "--profile", str(tmp_path / "p")])
    assert "held-out grid" in shown.output


def test_systems_and_profile_exclude_each_other() -> None:
    result = CliRunner().invoke(command, ["kernels", "--profile", "x", "--systems", "h100"])
    assert result.exit_code == 2
    assert "exclude each other" in result.output
