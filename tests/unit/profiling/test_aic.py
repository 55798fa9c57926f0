"""The importer against figures of the public package that were read by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.errors import MissingExtraError, UnknownNameError
from moeplan.profiling import aic

META = ProfileMeta(name="toy", accelerator="toy", date="2026-11-22", command="none")
Reader = Callable[..., HardwareProfile]


@pytest.fixture(scope="module")
def root() -> Path:
    try:
        return aic.systems_root()
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def read(root: Path) -> Reader:
    def profile(kind: str, framework: str, version: str, system: str = "h200_sxm") -> HardwareProfile:
        (file,) = [
            f for f in aic.files_of(root, system) if (f.kind, f.framework, f.version) == (kind, framework, version)
        ]
        tables: dict[str, list[pa.Table]] = {}
        for name, table in aic.convert(aic.read_rows(file), file):
            tables.setdefault(name, []).append(table)
        return HardwareProfile(META, {name: pa.concat_tables(parts) for name, parts in tables.items()})

    return profile


def test_deepep_low_latency_is_in_microseconds_with_both_phases(read: Reader) -> None:
    profile = read("wideep_deepep_ll", "sglang", "0.5.6.post2")
    for nodes, dispatch, combine in ((1, 39.829, 72.383), (4, 142.97, 263.27), (8, 166.77, 304.73)):
        for phase, dtype, expected in (("dispatch", "fp8", dispatch), ("combine", "bf16", combine)):
            found = profile.require("alltoall", nodes=nodes, phase=phase, num_experts=256, tokens_per_rank=128)
            assert found["latency_us"].to_pylist() == [pytest.approx(expected, abs=1e-3)]
            assert found["dtype"].to_pylist() == [dtype]
            assert found["ranks"].to_pylist() == [8 * nodes]


def test_nccl_sizes_are_bytes(read: Reader) -> None:
    profile = read("nccl", "nccl", "2.29.2")
    for dtype in ("fp16", "int8"):
        found = profile.require("collectives", op="alltoall", ranks=8, dtype=dtype, message_size_bytes=2**28)
        # 256 MiB leave each of 8 ranks: 7/8 over NVLink at 450 GB/s takes at least 522 us, whatever the type
        assert 522 < found["latency_us"][0].as_py() < 1000


def test_moe_rows_are_milliseconds_turned_to_microseconds(read: Reader) -> None:
    profile = read("moe", "sglang", "0.5.14")
    where = {"hidden": 2048, "inter": 768, "num_experts": 128, "top_k": 8, "dtype": "bf16", "ep": 8, "tp": 1}
    (row,) = profile.require("experts", distribution="balanced", tokens=16384, **where).to_pylist()
    assert row["latency_us"] == pytest.approx(1089, abs=1)
    assert (row["rank_pairs"], row["active_experts"]) == (16384, 16)
    (skewed,) = profile.require("experts", distribution="power_law_1.2", tokens=16384, **where).to_pylist()
    assert (skewed["rank_pairs"], skewed["active_experts"]) == (-1, -1)


def test_decode_attention_knows_its_cache(read: Reader) -> None:
    profile = read("generation_attention", "sglang", "0.5.14")
    found = profile.require("attention", phase="decode", batch=64, heads=32, kv_heads=4, head_dim=128)
    assert set(found["query_tokens"].to_pylist()) == {1}
    assert {2, 4, 8, 1024, 4096} <= set(found["context_tokens"].to_pylist())
    wide = read("wideep_generation_mla", "sglang", "0.5.10")
    assert set(wide.table("attention")["scope"].to_pylist()) == {"module"}
    assert {1, 4, 1024} <= set(wide.table("attention")["context_tokens"].to_pylist())


def test_the_copied_tables_are_recognised(root: Path) -> None:
    digests = {}
    for system in ("h100_sxm", "h200_sxm"):
        for file in aic.files_of(root, system):
            if (file.kind, file.version) in (
                ("wideep_deepep_ll", "0.5.6.post2"),
                ("wideep_deepep_ll", "0.5.12"),
            ):
                digests[system, file.version] = aic.fingerprint(aic.read_rows(file))
    assert digests["h100_sxm", "0.5.6.post2"] == digests["h200_sxm", "0.5.6.post2"]
    assert digests["h100_sxm", "0.5.12"] != digests["h200_sxm", "0.5.12"]


def test_system_names(root: Path) -> None:
    assert aic.find_system(root, "H100") == "h100_sxm"
    assert aic.find_system(root, "rtx-pro-6000-server") == "rtx_pro_6000_server"
    with pytest.raises(UnknownNameError, match="system 'h300' is not known"):
        aic.find_system(root, "h300")


def test_an_absent_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise aic.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(aic.metadata, "distribution", absent)
    with pytest.raises(MissingExtraError, match="needs the 'aic' extra"):
        aic.systems_root()
