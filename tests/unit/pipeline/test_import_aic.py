"""From the public package to profile directories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, load_profile
from moeplan.errors import InputError, MissingExtraError
from moeplan.pipeline.aic import _merge_repeats, _version_key, import_aic
from moeplan.profiling import aic
from moeplan.profiling.sanity import mark_host_bound, mark_rows, too_fast

META = ProfileMeta(name="toy", accelerator="toy", date="2026-11-22", command="none")


def test_repeated_points_become_their_median() -> None:
    rows = [(1, 10.0), (1, 12.0), (1, 11.0), (2, 20.0)]
    table = pa.table(
        {
            "m": [m for m, _ in rows],
            **{name: [8] * 4 for name in "nk"},
            "dtype": ["bf16"] * 4,
            "backend": ["b"] * 4,
            "kernel": ["k"] * 4,
            "source": ["s"] * 4,
            "latency_us": [t for _, t in rows],
        }
    )
    merged, repeats = _merge_repeats(table)
    assert repeats == 2
    result = HardwareProfile(META, {"gemm": merged}).table("gemm")
    assert result["latency_us"].to_pylist() == [11.0, 20.0]
    spread = result["spread"].to_numpy()
    assert spread[0] == pytest.approx(2 / 11)
    assert np.isnan(spread[1])


def test_versions_are_ordered_as_numbers() -> None:
    assert _version_key("1.3.0rc20") > _version_key("1.3.0rc9")
    assert _version_key("0.5.14") > _version_key("0.5.6.post2")


def test_a_system_becomes_a_profile_with_sources(tmp_path: Path) -> None:
    try:
        aic.systems_root()
    except MissingExtraError as error:
        pytest.skip(str(error))
    answer = import_aic(["a100"], tmp_path, subset=True)
    profile = load_profile(tmp_path / "a100-sxm")
    assert answer["systems"][0]["rows"]["experts"] == profile.table("experts").num_rows > 1000
    assert profile.meta.accelerator == "A100-SXM-80GB"
    assert profile.meta.licence.startswith("Apache-2.0")
    assert profile.meta.command == "moeplan profile import-aic --systems a100_sxm --out DIR --subset"
    assert set(profile.table("experts")["source"].to_pylist()) <= set(profile.meta.sources)
    assert profile.meta.rejected["experts"]["skew_faster"] > 0
    shipped = load_profile("a100-sxm")
    for name in profile.table_names:  # the shipped subset is what the command makes
        for column in ("kernel", "source", "mark", "latency_us"):
            assert shipped.table(name)[column].to_pylist() == profile.table(name)[column].to_pylist()


def test_a_place_of_something_else_is_refused_before_any_table_is_read(tmp_path: Path, monkeypatch) -> None:
    for name in ("a100_sxm", "h100_sxm"):
        (tmp_path / "systems" / "data" / name).mkdir(parents=True)
        (tmp_path / "systems" / "data" / name / "gemm_perf.parquet").touch()
    monkeypatch.setattr(aic, "systems_root", lambda: tmp_path / "systems")
    monkeypatch.setattr(aic, "read_rows", lambda _file: pytest.fail("a table was read"))
    mine = tmp_path / "out" / "h100-sxm" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(InputError, match="h100-sxm"):
        import_aic([], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["h100-sxm", "mine.txt"]


@pytest.mark.parametrize("system", ["gb200", "h100-sxm"])
def test_shipped_exchanges_carry_the_marks_of_the_present_sanity_pass(system: str) -> None:
    table = load_profile(system).table("alltoall")
    sources = np.array(table["source"].to_pylist())
    for source in np.unique(sources):
        part = table.filter(pa.array(sources == source))
        assert mark_rows("alltoall", part).tolist() == part["mark"].to_pylist()


@pytest.mark.parametrize("system", ["a100-sxm", "h100-sxm", "h200-sxm"])
def test_shipped_grouped_products_that_were_not_cut_do_not_serve(system: str) -> None:
    profile = load_profile(system)
    rows = profile.select("experts", usable=False, mark="not_sharded")
    assert {source.split("/")[2] for source in set(rows["source"].to_pylist())} == {"sglang-0.5.10"}
    served = profile.select("experts", backend="sglang", ep=list(range(2, 257)))
    assert not any("sglang-0.5.10/moe" in source for source in set(served["source"].to_pylist()))


@pytest.mark.parametrize("system", ["b200-sxm", "gb200", "h100-sxm", "h200-sxm"])
def test_shipped_products_of_kernels_that_timed_the_host_do_not_serve(system: str) -> None:
    profile = load_profile(system)
    table = profile.table("gemm")
    assert mark_host_bound(table)["mark"].to_pylist() == table["mark"].to_pylist()
    assert set(profile.select("gemm", dtype="fp8_block")["backend"].to_pylist()) == {"sglang", "trtllm"}


def test_rows_that_memory_cannot_have_given_their_weights() -> None:
    # Two matrices of 1,024 x 512 bytes for each of 4 experts at 1 TB/s: 4.2 us.
    shape = {"hidden": 1024, "inter": 1024, "tp": 2, "num_experts": 8, "top_k": 2, "ep": 2, "distribution": "balanced"}
    rows = [
        shape | {"dtype": dtype, "active_experts": active, "tokens": 8, "rank_pairs": 8, "backend": "b", "kernel": "k",
                 "source": "s", "latency_us": us}
        for dtype, active, us in (
            ("fp8_block", 4, 4.1), ("fp8_block", 4, 4.3), ("bf16", 4, 8.3), ("nvfp4", 4, 2.2), ("fp8", -1, 0.1)
        )
    ]  # fmt: skip
    table = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows)}).table("experts")
    assert too_fast("experts", table, 1e12).tolist() == [True, False, True, False, False]


def test_kernels_that_memory_cannot_have_given_their_cache() -> None:
    # Keys and values of 8 heads of 128 in bf16: 4 KiB a token; 64 sequences of 4,096: 1.07 GB, 0.54 ms at 2 TB/s.
    shape = {"kind": "gqa", "phase": "decode", "scope": "kernel", "heads": 32, "kv_heads": 8, "head_dim": 128,
             "dtype": "bf16", "kv_dtype": "bf16", "context_tokens": 4096, "query_tokens": 1, "backend": "b",
             "source": "s"}  # fmt: skip
    rows = [
        shape | {"kernel": kernel, "batch": batch, "window": window, "latency_us": us}
        for kernel, batch, window, us in (
            ("fast", 64, 0, 400.0), ("fast", 64, 0, 700.0), ("fast", 1, 0, 20.0),
            ("sound", 64, 0, 600.0), ("sound", 64, 128, 40.0), ("sound", 1, 0, 5.0),
        )
    ]  # fmt: skip
    table = HardwareProfile(META, {"attention": pa.Table.from_pylist(rows)}).table("attention")
    assert too_fast("attention", table, 2e12).tolist() == [True] * 3 + [False] * 3


def test_attention_of_a_shipped_profile_reads_its_cache_no_faster_than_memory() -> None:
    usable = load_profile("a100-sxm").select("attention", kind="gqa", phase="decode")
    assert set(usable["backend"].to_pylist()) == {"sglang", "vllm"}  # TensorRT-LLM 1.0.0: half of the time it takes


def test_choices_that_a_router_of_groups_takes_elsewhere_are_set_aside() -> None:
    def marked(framework: str, version: str, kernel: str = "k", hidden: int = 7168) -> list[bool]:
        file = aic.AicFile("h100_sxm", "moe", framework, version, Path("moe_perf.parquet"))
        shape = {"hidden": hidden, "inter": 2048, "num_experts": 256, "top_k": 8, "tp": 1, "dtype": "fp8_block"}
        rows = [
            shape | {"ep": ep, "distribution": distribution, "tokens": tokens, "rank_pairs": -1, "active_experts": -1,
                     "backend": framework, "kernel": kernel, "source": "s", "latency_us": 1.0}
            for distribution, ep, tokens in (
                ("balanced", 1, 1), ("balanced", 8, 256), ("balanced", 8, 257), ("power_law_1.2", 1, 4096),
                ("power_law_1.2", 8, 257)
            )
        ]  # fmt: skip
        table = HardwareProfile(META, {"experts": pa.Table.from_pylist(rows)}).table("experts")
        return [bool(each) for each in aic.regrouped(table, file)]

    known = [True, False, True, False, True]
    assert marked("sglang", "0.5.14") == marked("vllm", "0.24.0") == known
    assert not any(marked("sglang", "0.5.10") + marked("vllm", "0.22.0") + marked("sglang", "0.5.14", hidden=4096))
    assert not any(marked("trtllm", "1.3.0rc20"))
    assert marked("trtllm", "1.3.0rc20", "moe_torch_flow_min_latency", 4096) == known


@pytest.mark.parametrize("system", ["b200-sxm", "gb200", "h100-sxm", "h200-sxm"])
def test_shipped_experts_of_a_group_do_not_take_what_all_experts_take(system: str) -> None:
    """Of what serves: even loads at EP 2 beside EP 1 of DeepSeek-V3, where tokens are many."""
    found = load_profile(system).select("experts", hidden=7168, inter=2048, num_experts=256, distribution="balanced")
    took: dict[tuple[object, ...], dict[int, float]] = {}
    for row in found.to_pylist():
        if row["tokens"] >= 4096:
            key = tuple(row[c] for c in ("backend", "kernel", "dtype", "source", "tp", "tokens"))
            took.setdefault(key, {})[row["ep"]] = row["latency_us"]
    pairs = [each[2] / each[1] for each in took.values() if {1, 2} <= set(each)]
    assert pairs
    assert max(pairs) < 0.95
