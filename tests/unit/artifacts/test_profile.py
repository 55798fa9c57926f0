"""Profiles: round trip, corrupt and older ones, and coverage that names the missing region."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from moeplan.artifacts.profile import (
    HardwareProfile,
    ProfileMeta,
    Source,
    load_profile,
    shipped_profile_for,
    shipped_profiles,
)
from moeplan.artifacts.profile_tables import TABLES, measure_command, schema_document
from moeplan.errors import ProfileError, SpecError, UnknownNameError

META = ProfileMeta(
    name="toy",
    accelerator="toy-gpu",
    date="2026-11-22",
    command="moeplan profile dense --out toy",
    sources={"here": Source(kind="measured", title="a test")},
)


def gemm(**changes: list[object]) -> pa.Table:
    rows: dict[str, list[object]] = {
        "m": [1, 2, 4],
        "n": [8, 8, 8],
        "k": [16, 16, 16],
        "dtype": ["bf16", "bf16", "fp8"],
        "backend": ["moeplan"] * 3,
        "kernel": ["matmul"] * 3,
        "latency_us": [1.0, 1.5, 2.5],
        "source": ["here"] * 3,
    }
    return pa.table({name: values for name, values in {**rows, **changes}.items() if values})


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_what_is_saved_is_read_back(tmp_path: Path, file_format: str) -> None:
    profile = HardwareProfile(META, {"gemm": gemm()})
    profile.save(tmp_path / "p", file_format)  # type: ignore[arg-type]
    again = load_profile(tmp_path / "p")
    assert again.table_names == ("gemm",)
    assert again.table("gemm")["latency_us"].to_pylist() == [1.0, 1.5, 2.5]
    assert again.table("gemm")["batch"].to_pylist() == [1, 1, 1]
    assert again.table("gemm")["dtype"].to_pylist() == ["bf16", "bf16", "fp8"]
    assert again.meta.sources == META.sources
    assert again.select("gemm", dtype="bf16", m=[1, 4]).num_rows == 1


def test_what_an_own_profile_lacks_is_measured_into_it(tmp_path: Path) -> None:
    HardwareProfile(META, {"gemm": gemm()}).save(tmp_path / "my profile")
    own = load_profile(tmp_path / "my profile")
    with pytest.raises(ProfileError, match=rf"moeplan profile memory --out '{tmp_path}/my profile'$"):
        own.table("memory")
    pinned = META.model_copy(update={"system": {"threads": 2.0}})
    own = HardwareProfile(pinned, {"gemm": gemm()}).save(tmp_path / "pinned")
    assert own.measure_command("memory", {}).endswith(f" --threads 2 --out {tmp_path}/pinned"), "or it is refused"
    assert "--threads" not in own.measure_command("collectives", {})
    imported = META.model_copy(update={"sources": {"here": Source(kind="imported", title="a table")}})
    with pytest.raises(ProfileError, match=r"--out DIR$"):
        HardwareProfile(imported, {"gemm": gemm()}).save(tmp_path / "q").table("memory")


def test_marked_rows_are_kept_and_not_used() -> None:
    profile = HardwareProfile(META, {"gemm": gemm(mark=["", "outlier", ""])})
    assert profile.table("gemm").num_rows == 3
    assert profile.select("gemm")["m"].to_pylist() == [1, 4]
    assert profile.select("gemm", usable=False).num_rows == 3


def test_a_missing_region_is_named_with_its_command() -> None:
    profile = HardwareProfile(META, {"gemm": gemm()})
    expected = r"dtype=int4 is not there \(there is: bf16, fp8\); measure it: moeplan profile dense --n 8 --k 16"
    with pytest.raises(ProfileError, match=expected):
        profile.require("gemm", n=8, k=16, dtype="int4")
    with pytest.raises(ProfileError, match="has no table experts; measure it: moeplan profile experts --hidden 64"):
        profile.require("experts", hidden=64)


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    HardwareProfile(META, {"gemm": gemm()}).save(tmp_path / "p", "csv")
    path = tmp_path / "p" / "gemm.csv"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ProfileError, match=r"sha256 differs.*measure again: moeplan profile dense"):
        load_profile(tmp_path / "p").table("gemm")


def test_a_table_that_is_gone_is_named_with_its_remedy(tmp_path: Path) -> None:
    HardwareProfile(META, {"gemm": gemm()}).save(tmp_path / "p")
    (tmp_path / "p" / "gemm.parquet").unlink()
    with pytest.raises(
        ProfileError, match=r"gemm.parquet: No such file .*; restore it or measure again: moeplan profile"
    ):
        load_profile(tmp_path / "p").table("gemm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema_version": 0},
            r"schema_version \(0\) is older than this moeplan's \(1\); measure again: moeplan profile",
        ),
        ({"schema_version": 2}, r"schema_version \(2\) is newer"),
        ({"schema_version": "1"}, r"schema_version \('1'\) must be a whole number"),
        ({"date": None}, r"profile.json: date"),
        ({"surprise": 1}, r"surprise"),
        ({"tables": {"magic": {"file": "x", "rows": 1, "sha256": ""}}}, r"tables \(magic\) are not known"),
        (
            {"system": {"multiprocessors": "132 SMs", "launch_latency_us": "about 5", "topology": "GPU0 X"}},
            r"profile.json: system.multiprocessors \('132 SMs'\): must be a valid number;"
            r" system.launch_latency_us \('about 5'\): must be a valid number; correct or restore the file",
        ),
        ({"system": {"launch_latency_us": 0}}, r"system.launch_latency_us \(0.0\): must be greater than 0"),
        ({"system": {"multiprocessors": 0}}, r"system.multiprocessors \(0.0\): must be greater than or equal to 1"),
        ({"system": {"threads": "x"}}, r"system.threads \('x'\): must be a valid number"),
        ({"system": {"realtime": "no"}}, r"system.realtime \('no'\): must be a valid number"),
        ({"system": {"foreign_cpu_share": 1.5}}, r"system.foreign_cpu_share \(1.5\): must be less than or equal to 1"),
    ],
)
def test_other_versions_and_wrong_fields(tmp_path: Path, change: dict[str, object], message: str) -> None:
    HardwareProfile(META, {"gemm": gemm()}).save(tmp_path / "p")
    path = tmp_path / "p" / "profile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ProfileError, match=message):
        load_profile(tmp_path / "p")


def test_every_row_names_a_source_of_its_profile(tmp_path: Path) -> None:
    profile = HardwareProfile(META, {"gemm": gemm(source=["here", "here", "nowhere"])})  # in memory not asked for
    unlisted = r"source of table gemm must be a key of sources in profile.json; row 3 holds 'nowhere'"
    with pytest.raises(ProfileError, match=f"^profile toy: {unlisted}"):
        profile.save(tmp_path / "p")
    assert not list(tmp_path.iterdir())
    for file_format in ("parquet", "csv"):
        both = META.sources | {"nowhere": META.sources["here"]}
        listed = HardwareProfile(META.model_copy(update={"sources": both}), {"gemm": profile.table("gemm")})
        assert listed.save(tmp_path / "p", file_format).table("gemm").num_rows == 3  # type: ignore[arg-type]
        path = tmp_path / "p" / "profile.json"
        document = json.loads(path.read_text())
        del document["sources"]["nowhere"]
        path.write_text(json.dumps(document))
        with pytest.raises(ProfileError, match=rf"gemm\.{file_format}: {unlisted}"):
            load_profile(tmp_path / "p").table("gemm")


def test_a_table_without_rows_is_read_back(tmp_path: Path) -> None:
    assert HardwareProfile(META, {"gemm": gemm().slice(0, 0)}).save(tmp_path / "p").table("gemm").num_rows == 0


def test_corrupt_json_says_so(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('{"schema_version": 1,')
    with pytest.raises(ProfileError, match="the profile is corrupt"):
        load_profile(tmp_path)


def test_a_document_that_is_no_object_says_so(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text("[]")
    with pytest.raises(ProfileError, match=r"profile.json is not a profile document"):
        load_profile(tmp_path)


def test_a_table_has_the_rows_that_its_profile_says(tmp_path: Path) -> None:
    HardwareProfile(META, {"gemm": gemm()}).save(tmp_path / "p")
    path = tmp_path / "p" / "profile.json"
    document = json.loads(path.read_text())
    document["tables"]["gemm"]["rows"] = 4
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=r"has 3 rows, profile.json says tables.gemm.rows \(4\)"):
        load_profile(tmp_path / "p").table("gemm")


def test_a_profile_is_not_written_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SpecError, match="does not hold a profile"):
        HardwareProfile(META, {"gemm": gemm()}).save(tmp_path)


EXPERTS = {"hidden": 8, "inter": 8, "num_experts": 4, "top_k": 2, "ep": 1, "tp": 1, "dtype": "bf16"}
EXPERTS |= {"distribution": "explicit", "tokens": 4, "vector": "4 4 0 0", "latency_us": 1.0}
EXPERTS |= {"backend": "moeplan", "kernel": "loop", "source": "here"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vector": "4 -4 0 0"}, r"vector of table experts must be whole numbers .*; row 2 holds '4 -4 0 0'"),
        ({"vector": "4 4.5"}, r"vector of table experts must be whole numbers"),
        ({"direction": "sideways"}, r"direction of table experts must be forward or backward; row 2 holds 'sideways'"),
        ({"rank_pairs": -2}, r"rank_pairs of table experts must be -1 or above; row 2 holds -2"),
        ({"tokens": 0}, r"tokens of table experts must be 1 or above; row 2 holds 0"),
        ({"top_k": 5}, r"top_k of table experts must be no more than num_experts; row 2 holds 5"),
        ({"spread": -0.1}, r"spread of table experts must be 0 or above, or nan; row 2 holds -0.1"),
        ({"num_slots": -1}, r"num_slots of table experts must be 0 or above"),
        ({"mark": "strange"}, r"mark of table experts must be empty, non_monotone, .*; row 2 holds 'strange'"),
        ({"distribution": "even"}, r"distribution of table experts must be balanced, .*; row 2 holds 'even'"),
        ({"distribution": "power_law_x"}, r"or explicit; row 2 holds 'power_law_x'"),
    ],
)
def test_rows_that_cannot_be_are_refused(wrong: dict[str, object], message: str) -> None:
    plain = EXPERTS | {"direction": "forward", "rank_pairs": -1, "num_slots": 0, "mark": "copied"}
    plain |= {"spread": float("nan")}
    HardwareProfile(META, {"experts": pa.Table.from_pylist([plain, plain | {"vector": "", "rank_pairs": 0}])})
    with pytest.raises(ProfileError, match=message):
        HardwareProfile(META, {"experts": pa.Table.from_pylist([plain, plain | wrong])})


@pytest.mark.parametrize(
    ("table", "known"),
    [
        ("experts", ["balanced", "explicit", "power_law_1.2", "power_law_1.01_eplb", "power_law_sampled_1.9"]),
        ("alltoall", ["balanced", "explicit", "power_law_2", "trace:0123456789ab"]),
        ("collectives", ["even", "uneven", "trace:0123456789ab"]),
    ],
)
def test_distributions_that_the_schema_names_are_known(table: str, known: list[str]) -> None:
    pattern = TABLES[table]["distribution"].pattern
    assert [word for word in (*known, "", "trace:A", "power_law_A", "explicitly") if re.search(pattern, word)] == known


def test_a_table_file_stays_inside_its_profile(tmp_path: Path) -> None:
    HardwareProfile(META, {"gemm": gemm()}).save(tmp_path / "p")
    path = tmp_path / "p" / "profile.json"
    document = json.loads(path.read_text())
    document["tables"]["gemm"]["file"] = "../other.parquet"
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match="must be a plain file name"):
        load_profile(tmp_path / "p").table("gemm")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (gemm(k=[]), "lacks column k"),
        (gemm(extra=[1, 2, 3]), "has unknown column extra"),
        (gemm(latency_us=[1.0, 0.0, 2.0]), r"latency_us of table gemm must be finite and above 0; row 2 holds 0\.0"),
        (gemm(latency_us=[1.0, float("nan"), 2.0]), "must be finite and above 0; row 2 is not a number"),
        (gemm(m=[1, 2, -5]), "m of table gemm must be 1 or above; row 3 holds -5"),
        (gemm(m=["a", "b", "c"]), "column m of table gemm is not int"),
        (gemm(m=[1, None, 2]), "has 1 empty cells"),
    ],
)
def test_wrong_tables_are_refused(table: pa.Table, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        HardwareProfile(META, {"gemm": table})


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="profile"):
        load_profile("no-such-profile")
    with pytest.raises(UnknownNameError, match="did you mean 'gemm'"):
        HardwareProfile(META, {"gem": gemm()})


def test_the_published_schema_is_the_code() -> None:
    published = Path(__file__).parents[3] / "docs" / "reference" / "profile-tables.json"
    columns = json.loads(published.read_text())
    assert columns == schema_document()
    assert re.search(columns["experts"]["distribution"]["pattern"], "power_law_1.2_eplb")
    assert not re.search(columns["experts"]["distribution"]["pattern"], "power_law")
    assert (columns["experts"]["tokens"]["minimum"], columns["experts"]["rank_pairs"]["minimum"]) == (1, -1)
    assert all(measure_command(table, {}).startswith(("moeplan profile", "torchrun")) for table in TABLES)


def test_shipped_profiles_open() -> None:
    for name in shipped_profiles():
        profile = load_profile(name)
        assert profile.meta.licence
        for table in profile.table_names:
            sources = set(profile.table(table)["source"].unique().to_pylist())
            assert sources <= set(profile.meta.sources)


def test_the_shipped_profile_of_an_accelerator_is_found_by_its_name() -> None:
    found = shipped_profile_for("H100-SXM-80GB")
    assert found is not None
    assert found.meta.name == "h100-sxm"
    assert shipped_profile_for("Abacus") is None
