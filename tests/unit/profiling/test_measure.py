"""Real measurements of tiny sizes on this CPU, through pipeline and command line. No absolute time is asserted."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.cli import main
from moeplan.cli.profile import command
from moeplan.cli.profile_measure import _show
from moeplan.costs.coverage import coverage_gaps
from moeplan.costs.technique import Technique
from moeplan.errors import InputError, MoeplanError, ProfileError, SpecError
from moeplan.pipeline.profile_checks import check_profile, diff_profiles
from moeplan.pipeline.profile_peaks import peaks, roofline_us
from moeplan.pipeline.profile_pictures import _skewed_vectors, _Table, show_profile
from moeplan.pipeline.profiling import (
    PRESETS,
    ProfileRequest,
    Sizes,
    _dense_benches,
    measure_profile,
    profile_request,
)
from moeplan.profiling import system
from moeplan.profiling.collectives import OPS
from moeplan.profiling.device import Device, find_device
from moeplan.reports.profile_figures import profile_picture
from moeplan.specs.clusters import cluster_for, find_accelerator
from moeplan.specs.models import find_model
from moeplan.specs.workload import Objective, Workload

torch = pytest.importorskip("torch", reason="profilers need torch")

TINY = Sizes(hidden=32, inter=32, experts=4, top_k=2, heads=2, kv_heads=1, head_dim=16)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """One small profile of everything one process can measure."""
    out = tmp_path_factory.mktemp("profiles") / "tiny"
    parts = ("system", "memory", "experts", "attention", "dense")
    request = ProfileRequest(
        parts=parts, sizes=TINY, dtypes=("fp32",), ep=(1, 2), max_tokens=64, budget_s=10.0, threads=1
    )
    answer = measure_profile(request, out)
    assert set(answer["rows"]) == {"memory", "experts", "attention", "gemm", "elementwise"}
    return out


def test_rows_say_what_was_measured(measured: Path):
    profile = HardwareProfile.open(measured)
    for name in profile.table_names:
        table = profile.table(name)
        least, p20, median = (table[c].to_numpy() for c in ("min_us", "p20_us", "latency_us"))
        assert (least > 0).all()
        assert ((least <= p20) & (p20 <= median)).all()
        assert (table["samples"].to_numpy() >= 1).all()
        assert set(table["source"].to_pylist()) == set(profile.meta.sources)
    experts = profile.table("experts").to_pylist()
    assert {row["ep"] for row in experts} == {1, 2}
    for row in experts:
        vector = [int(n) for n in row["vector"].split()]
        assert len(vector) == 4 // row["ep"]
        assert sum(vector) == row["rank_pairs"]


def test_provenance_names_machine_and_command_but_no_paths(measured: Path):
    meta = HardwareProfile.open(measured).meta
    assert meta.accelerator == "cpu"
    assert meta.libraries["torch"] == torch.__version__
    assert meta.command.startswith("moeplan profile all --hidden 32 --inter 32")
    assert meta.system["threads"] == 1
    assert meta.system["cores"] == os.cpu_count(), "the machine's, not those that this run was pinned to"
    assert meta.system["launch_latency_us"] > 0
    assert 0 <= meta.system["foreign_cpu_share"] <= 1
    text = (measured / "profile.json").read_text()
    import socket

    assert str(measured.parent) not in text
    assert socket.gethostname() not in text


def test_larger_work_takes_longer(measured: Path):
    rows = HardwareProfile.open(measured).select("gemm", n=32768).to_pylist()
    by_size = sorted(rows, key=lambda row: row["m"])
    assert by_size[-1]["m"] >= 8
    assert by_size[-1]["min_us"] > by_size[0]["min_us"]


def test_a_second_run_extends_the_profile(measured: Path, tmp_path: Path):
    out = tmp_path / "p"
    first = ProfileRequest(parts=("memory",), budget_s=0.3)
    measure_profile(first, out)
    before = HardwareProfile.open(out).table("memory").num_rows
    measure_profile(ProfileRequest(parts=("system",), budget_s=0.3), out)
    profile = HardwareProfile.open(out)
    assert profile.table("memory").num_rows == before
    assert profile.table("elementwise").to_pylist()[0]["op"] == "empty_launch"
    assert " && " in profile.meta.command
    meta = json.loads((out / "profile.json").read_text())
    meta["device"] = "another"
    (out / "profile.json").write_text(json.dumps(meta))
    with pytest.raises(ProfileError, match=r"device \(another\) of the profile there is not this run's"):
        measure_profile(first, out)


def _changed(out: Path, **changes) -> None:
    """Other words in a ``profile.json``; ``system`` is laid over what is there."""
    meta = json.loads((out / "profile.json").read_text())
    meta["system"] |= changes.pop("system", {})
    (out / "profile.json").write_text(json.dumps(meta | changes))


def test_runs_of_other_threads_do_not_mix_and_what_earlier_runs_said_is_kept(tmp_path: Path):
    out = tmp_path / "p"
    memory = ProfileRequest(parts=("memory",), budget_s=0.2)
    measure_profile(memory, out)
    _changed(out, note="mine", left_out=["one", "two"], system={"threads": 999.0, "foreign_cpu_share": 1.0})
    with pytest.raises(ProfileError, match=r"threads \(999.0\) of the profile there is not this run's"):
        measure_profile(memory, out)
    measure_profile(ProfileRequest(parts=("system", "collectives")), out)  # no threads of torch in these
    meta = HardwareProfile.open(out).meta
    assert (meta.system["threads"], meta.system["foreign_cpu_share"]) == (999.0, 1.0)
    assert meta.note == "mine"
    assert meta.left_out == ["one", "two", "collectives: not measured, they need --ranks N or torchrun"]


def test_an_unusable_place_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch):
    out = tmp_path / "p"
    request = ProfileRequest(parts=("memory",), budget_s=0.2)
    measure_profile(request, out)
    (out / "memory.parquet").write_bytes(b"no table")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("moeplan.pipeline.profiling.run_benches", lambda *_: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    for place, message in (
        (out, "sha256 differs"),
        (tmp_path / "file", "it is a file, not a directory"),
        (tmp_path.parent, "does not hold a profile"),
        (Path(), "is the current directory"),
    ):
        with pytest.raises(MoeplanError, match=message):
            measure_profile(request, place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "p"]


def test_a_run_that_measured_nothing_leaves_the_profile_as_it_was(tmp_path: Path):
    out = _law(tmp_path / "p", None)
    request = ProfileRequest(parts=("experts", "collectives"))
    with pytest.raises(ProfileError, match=r"nothing was measured; collectives: .*; experts: not measured, they need"):
        measure_profile(request, tmp_path / "new")
    device = find_device("cpu")
    _changed(out, device=system.device_name(device), libraries=system.libraries(device))
    before = (out / "profile.json").read_bytes()
    with pytest.raises(ProfileError, match=r"nothing was measured; .*; change what these name, or give a larger"):
        measure_profile(request, out)
    assert (out / "profile.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]


def test_what_a_part_cannot_is_said_and_the_rest_is_measured(tmp_path: Path):
    asked = {"models": ("kimi-k3",), "budget_s": 0.2}
    answer = measure_profile(ProfileRequest(parts=("memory", "attention"), **asked), tmp_path / "p")
    assert "attention of Kimi-K3: this form is not measured" in answer["left_out"]
    with pytest.raises(SpecError, match="attention of Kimi-K3: this form is not measured"):
        measure_profile(ProfileRequest(parts=("attention",), **asked), tmp_path / "q")
    sizes = Sizes(hidden=16, inter=16, experts=2, top_k=1)
    request = ProfileRequest(parts=("attention", "dense"), sizes=sizes, dtypes=("int8",), budget_s=0.3, max_tokens=2)
    left = measure_profile(request, tmp_path / "r")["left_out"]
    assert left[0] == "attention: not measured, it needs --heads, --kv-heads and --head-dim, or --model, or a --preset"
    assert left[1].startswith("dense products in int8: not measured, dtype (int8): dense products are measured in")
    assert left[1].endswith("add one of these to --dtype")
    assert "passes over tokens (router, norms, ...) in int8: not measured, bf16 in their place" in left


def test_parts_without_their_sizes_are_asked_for_and_left_out(tmp_path: Path):
    answer = measure_profile(profile_request("all", None, {"device": "cpu", "budget_s": 0.3}), tmp_path / "p")
    assert [line.split(" or ")[0].rstrip(",") for line in answer["left_out"][:4]] == [
        "collectives: not measured, they need --ranks N",
        "experts: not measured, they need --hidden, --inter, --experts and --top-k",
        "attention: not measured, it needs --heads, --kv-heads and --head-dim",
        "dense: not measured, it needs --n and --k, --hidden",
    ]
    assert set(answer["rows"]) == {"memory", "elementwise"}


def test_sizes_that_do_not_divide_or_fit_are_one_message_with_what_helps(tmp_path: Path, monkeypatch):
    sizes = Sizes(hidden=64, inter=64, experts=8, top_k=1)
    asked = {"parts": ("experts",), "sizes": sizes, "dtypes": ("fp32",), "max_tokens": 2}
    with pytest.raises(SpecError) as error:
        measure_profile(ProfileRequest(ep=(3,), tp=(5,), **asked), tmp_path / "p")
    said = ("num_experts (8) must divide by --ep (3); give another --ep", "inter (64) must divide by --tp (5)")
    assert all(text in str(error.value) for text in said)
    monkeypatch.setattr(Device, "free_bytes", 1000)
    with pytest.raises(SpecError, match=r"^experts of sizes in fp32: .* do not fit .*; give a larger --tp$"):
        measure_profile(ProfileRequest(**asked), tmp_path / "p")


def test_windows_are_those_of_the_layers_and_those_asked_for(tmp_path: Path):
    asked = {"parts": ("attention",), "dtypes": ("fp32",), "tp": (8,), "max_tokens": 160, "budget_s": 0.5}
    for more, windows in (({"models": ("gpt-oss-120b",)}, {0, 32, 128}), ({"sizes": Sizes(heads=8)}, {0, 32})):
        request = ProfileRequest(windows=(32,), **more, **asked)
        assert "--window 32" in request.command
        measure_profile(request, tmp_path / "p")
        rows = HardwareProfile.open(tmp_path / "p").table("attention").to_pylist()
        assert {row["window"] for row in rows} == windows
        assert {row["kernel"] for row in rows if row["window"]} == {"sdpa", "sdpa_banded"}
        shutil.rmtree(tmp_path / "p")


@pytest.mark.parametrize("part", ["experts", "dense"])
def test_types_that_the_device_cannot_are_said_and_the_others_measured(part: str, tmp_path: Path):
    asked = {"sizes": Sizes(hidden=16, inter=16, experts=2, top_k=1, n=16, k=16), "budget_s": 0.3, "max_tokens": 2}
    answer = measure_profile(ProfileRequest(parts=(part,), dtypes=("fp8", "fp32"), **asked), tmp_path / "p")
    what = {"experts": "experts", "dense": "dense products"}[part]
    assert f"{what} in fp8: not measured, dtype (fp8) needs a GPU" in answer["left_out"][0]
    profile = HardwareProfile.open(tmp_path / "p")
    assert {row["dtype"] for name in profile.table_names for row in profile.table(name).to_pylist()} == {"fp32"}
    if part == "dense":
        asked["sizes"] = Sizes(n=16, k=16)
    with pytest.raises(SpecError, match=rf"{what} in fp8: not measured, .* choose another --dtype"):
        measure_profile(ProfileRequest(parts=(part,), dtypes=("fp8",), **asked), tmp_path / "q")


def test_a_type_that_the_sizes_do_not_suit_is_found_before_the_others_are_measured(tmp_path: Path, monkeypatch):
    asked = {"parts": ("experts",), "budget_s": 0.3, "max_tokens": 2}
    sizes = Sizes(hidden=64, inter=64, experts=4, top_k=1)
    answer = measure_profile(ProfileRequest(sizes=sizes, dtypes=("fp32", "int4"), **asked), tmp_path / "p")
    why = "dtype (int4): hidden (64) and inter (64) must divide by 128; leave int4 out of --dtype, or choose sizes"
    assert f"experts of sizes in int4: not measured, {why} that do" in answer["left_out"]
    assert {row["dtype"] for row in HardwareProfile.open(tmp_path / "p").table("experts").to_pylist()} == {"fp32"}
    monkeypatch.setattr("moeplan.pipeline.profiling.run_benches", lambda *_: pytest.fail("measured"))
    with pytest.raises(SpecError, match=r"experts of sizes in int4: not measured, dtype \(int4\): hidden \(64\)"):
        measure_profile(ProfileRequest(sizes=sizes, dtypes=("int4",), **asked), tmp_path / "q")
    heads = Sizes(heads=3, head_dim=16)
    with pytest.raises(SpecError, match=r"attention of 3 heads in fp32: .* must divide by tp \(2\); give a --tp"):
        measure_profile(ProfileRequest(parts=("attention",), sizes=heads, dtypes=("fp32",), tp=(2,)), tmp_path / "q")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]


def test_a_share_of_the_cpu_needs_ticks_enough(monkeypatch):
    times = iter([(0, 0, 0.0), (1, 1, 0.0), (0, 0, 0.0), (150, 200, 50.0)])
    monkeypatch.setattr(system.CpuClock, "_now", staticmethod(lambda: next(times)))
    assert system.CpuClock().foreign_share() is None
    assert system.CpuClock().foreign_share() == 0.5


def test_times_taken_beside_other_programs_are_warned_of_wherever_they_are_used(measured, tmp_path, monkeypatch):
    from moeplan.pipeline.inputs import profile_notes
    from moeplan.specs.clusters import sized_cluster

    monkeypatch.setattr(system.CpuClock, "foreign_share", lambda _self: 0.502)
    out = tmp_path / "p"
    done = _cli("memory", "--device", "cpu", "--budget", "0.2s", "--out", str(out), "--json")
    said = (
        "profile p was measured while other programs took 50% of the CPU (foreign_cpu_share 0.502, above 0.1): its"
        " times are too long; measure it again on an idle machine, into another --out"
    )
    assert json.loads(done.stdout)["warnings"] == [said]
    assert f"warning: {said}\n" in done.stderr
    checked = _cli("check", str(out))
    assert f"warning: {said}\n" in checked.stderr
    assert "not worth keeping" in checked.stdout
    shown = _cli("show", str(out), "--out", str(tmp_path / "p.html"))
    assert f"warning: {said}\n" in shown.stderr
    assert "foreign_cpu_share 0.502, above" in (tmp_path / "p.html").read_text()
    assert said in profile_notes(load_profile(out), sized_cluster(ranks=2))
    _changed(out, system={"foreign_cpu_share": 0.1})
    assert load_profile(out).warnings == []
    assert "nothing speaks against it" in _cli("check", str(_law(tmp_path / "law", None))).stdout


def test_one_progress_over_benches_and_exchanges(tmp_path: Path, monkeypatch):
    def exchanges(_job, _world, _journal, report):
        report("exchange", 0.5)
        return []

    monkeypatch.setattr("moeplan.profiling.ranks.run_local_ranks", exchanges)
    seen: list[tuple[str, float]] = []
    request = ProfileRequest(parts=("memory", "collectives"), ranks=2, dtypes=("fp8", "fp32"), budget_s=0.3)
    answer = measure_profile(request, tmp_path / "p", progress=lambda what, done: seen.append((what, done)))
    assert seen[-2:] == [("measured", 0.75), ("exchange", 0.875)]
    assert "collectives in fp8: not measured" in answer["left_out"]


def test_check_predicts_held_out_sizes(measured: Path):
    answer = check_profile(measured, every=2)
    experts = answer["tables"]["experts"]
    assert experts["held_out"]["points"] >= 4
    assert experts["held_out"]["median"] < 5, "not a matter of precision here, but it must be a prediction"
    assert answer["vectors"]["points"] > 0
    assert answer["fresh"] is None


def test_held_out_residuals_of_a_known_law(tmp_path: Path):
    """On a power law interpolation errs nowhere; a point moved by 30 % is off by exactly that."""
    from moeplan.pipeline.profile_series import residuals

    profile = HardwareProfile.open(_law(tmp_path / "p", moved=None))
    table = profile.table("gemm")
    own, plain = residuals("gemm", table, 4)
    assert np.isfinite(own).sum() == 4  # places 2 and 6 of two series of nine
    assert np.abs(own[np.isfinite(own)]).max() < 0.02
    assert np.abs(plain[np.isfinite(plain)]).max() < 1e-9
    moved = HardwareProfile.open(_law(tmp_path / "q", moved=4)).table("gemm")
    residual = residuals("gemm", moved, 4)[1]
    size = moved["m"].to_numpy()
    assert residual[(size == 4) & np.isfinite(residual)] == pytest.approx([1 / 1.3 - 1] * 2)


def test_check_sets_two_levels_beside_flat(tmp_path: Path):
    """Held out well, half of the time at 1 MiB; sizes that one form alone has are not compared."""
    from moeplan.artifacts.profile import ProfileMeta, Source

    rows = [
        {"op": "all_reduce", "dtype": "fp32", "ranks": 4, "nodes": 2, "message_size_bytes": size, "source": "s",
         "algorithm": algorithm, "backend": "gloo", "kernel": "gloo_all_reduce", "latency_us": 20 + us * size / 2**10}
        for algorithm, us, first in (("flat", 2, 8), ("two_level", 1, 10)) for size in (2 ** np.arange(first, 21))
    ]  # fmt: skip
    meta = ProfileMeta(
        name="two", accelerator="cpu", date="2026-01-01", command="none",
        sources={"s": Source(kind="measured", title="a law")},
    )  # fmt: skip
    HardwareProfile(meta, {"collectives": pa.Table.from_pylist(rows)}).save(tmp_path / "p")
    (form,) = check_profile(tmp_path / "p")["tables"]["collectives"]["two_level"]
    assert (form["op"], form["ranks"], form["nodes"]) == ("all_reduce", 4, 2)
    assert [*form["over_flat"]] == (2 ** np.arange(10, 21)).tolist()
    assert form["over_flat"][2**20] == pytest.approx((20 + 1024) / (20 + 2048))
    assert form["held_out"]["points"] > 0
    assert form["held_out"]["median"] < 0.05
    said = " ".join(_cli("check", str(tmp_path / "p")).stdout.split())
    assert "all_reduce on two levels, 4 ranks on 2 nodes: held out " in said
    assert "0.95 of flat at 1,024 bytes, 0.50 of flat at 1,048,576 bytes" in said
    assert "two levels" not in _cli("check", str(_law(tmp_path / "law", None))).stdout


def _law(out: Path, moved: int | None) -> Path:
    from moeplan.artifacts.profile import ProfileMeta, Source

    rows = []
    for n in (8, 16):
        for m in 2 ** np.arange(9):
            latency = 3.0 * n * m**0.6 * (1.3 if m == moved else 1.0)
            rows.append({"m": int(m), "n": n, "k": 8, "latency_us": latency})
    for row in rows:
        row |= {"dtype": "fp32", "backend": "moeplan", "kernel": "linear", "source": "s"}
    meta = ProfileMeta(
        name="law", accelerator="cpu", date="2026-01-01", command="none",
        sources={"s": Source(kind="measured", title="a law")},
    )  # fmt: skip
    HardwareProfile(meta, {"gemm": pa.Table.from_pylist(rows)}).save(out)
    return out


def test_show_and_diff(measured: Path, tmp_path: Path):
    answer = show_profile(measured, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == answer["pictures"] > 0
    assert "moeplan profile all" in text
    assert "mathdefault" not in text  # numbers are written as people write them
    law = _law(tmp_path / "a", None)
    for name in ("1.html", "2.html"):
        show_profile(law, tmp_path / name)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    tables = diff_profiles(law, _law(tmp_path / "b", 4))["tables"]["gemm"]
    assert (tables["shared"], tables["only_first"], tables["median"]) == (18, 0, 1.0)
    assert diff_profiles(Path("h100-sxm"), Path("h100-sxm"))["tables"]["alltoall"]["median"] == 1.0  # shipped: by name
    assert tables["p90"] == pytest.approx(1.09)  # 2 of 18 ratios are 1.3; numpy interpolates at position 15.3


def test_pictures_draw_the_fit_and_name_what_they_show(tmp_path: Path):
    (picture,) = _Table(load_profile(_law(tmp_path / "p", moved=16)), "gemm").pictures(most=8)
    assert (picture.title, picture.subtitle) == ("gemm", "k 8, fp32, moeplan, linear")
    assert [curve.label for curve in picture.curves] == ["n 8", "n 16"], "numbers rise, words would not"
    curve = picture.curves[0]
    assert set(curve.fit_size_m) & set(curve.size_n) == {1.0, 2.0, 256.0}, "between others the fit answers by itself"
    near = int(np.abs(np.log(curve.fit_size_m / 16)).argmin())
    measured = float(curve.latency_us_n[curve.size_n == 16][0])
    assert curve.fit_us_m[near] / measured < 0.95, "one run of two that is off by 1.3 does not bend the fit all the way"
    (one,) = _Table(load_profile(tmp_path / "p"), "gemm").pictures(most=1)
    assert "1 longest of 2 series" in profile_picture(one)
    assert one.subtitle.startswith("n "), "what all that are drawn have in common, not all that there are"
    assert "longest of" not in profile_picture(picture)


def test_skewed_vectors_are_drawn_with_what_balanced_rows_miss_of_them(tmp_path: Path):
    def row(distribution: str, counts: list[int]) -> dict[str, object]:
        fields = {"hidden": 8, "inter": 8, "num_experts": 4, "top_k": 1, "ep": 1, "tp": 1, "tokens": sum(counts)}
        fields |= {"dtype": "fp32", "backend": "moeplan", "kernel": "grouped_mm", "source": "s"}
        fields |= {"distribution": distribution, "rank_pairs": sum(counts), "vector": " ".join(map(str, counts))}
        active = sum(n > 0 for n in counts)
        return fields | {"active_experts": active, "latency_us": 5.0 + 2.0 * active + 0.1 * sum(counts)}

    even = [row("balanced", [n] * 4) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    skewed = [row("explicit", [n, n // 4, n // 8, 1]) for n in (512, 64, 128, 256)]
    meta = load_profile(_law(tmp_path / "law", None)).meta.model_copy(update={"tables": {}})
    HardwareProfile(meta, {"experts": pa.Table.from_pylist([*even, *skewed])}).save(tmp_path / "p")
    picture = _skewed_vectors(load_profile(tmp_path / "p"), most=8)
    assert picture is not None
    (curve,) = picture.curves
    assert curve.size_n.tolist() == [89.0, 177.0, 353.0, 705.0]
    np.testing.assert_allclose(curve.latency_us_n, 13.0 + 0.1 * curve.size_n)
    assert np.abs(curve.residual_n).max() < 0.1, "the law's own times"
    assert not len(curve.fit_size_m)
    assert show_profile(tmp_path / "p", tmp_path / "p.html")["pictures"] == 2


def test_bars_reach_from_the_shortest_sample_and_single_points_are_not_drawn(tmp_path: Path):
    table = load_profile(_law(tmp_path / "p", None)).table("gemm").to_pylist()
    rows = [
        {**row, "min_us": 0.9 * row["latency_us"], "p20_us": 0.95 * row["latency_us"], "spread": 0.2}
        for row in table
        if row["n"] == 8 or row["m"] == 1
    ]
    meta = load_profile(tmp_path / "p").meta
    HardwareProfile(meta, {"gemm": pa.Table.from_pylist(rows)}).save(tmp_path / "p")
    (picture,) = _Table(load_profile(tmp_path / "p"), "gemm").pictures(most=8)
    (curve,) = picture.curves
    np.testing.assert_allclose(curve.low_us_n, 0.9 * curve.latency_us_n)
    np.testing.assert_allclose(curve.high_us_n, 1.15 * curve.latency_us_n)
    show_profile(tmp_path / "p", tmp_path / "p.html")
    assert "<th>not drawn</th><td>1 series of one point</td>" in (tmp_path / "p.html").read_text()


def test_rooflines_of_what_a_profile_lacks_are_the_registrys_and_said():
    shipped = load_profile("h100-sxm")
    bandwidth, _, said = peaks(shipped)
    assert bandwidth == find_accelerator("h100-sxm").memory_bandwidth
    assert re.match(r"best bf16 product \d+(\.\d)? TFLOPS, ", said)
    assert said.endswith("otherwise the accelerator registry's H100-SXM-80GB")
    assert any(len(c.roofline_us_n) for picture in _Table(shipped, "attention").pictures(2) for c in picture.curves)
    row = {"kind": "gqa", "scope": "kernel", "direction": "forward", "dtype": "bf16", "kv_dtype": "fp8", "batch": 2}
    row |= {"heads": 8, "kv_heads": 2, "head_dim": 64, "query_tokens": 1, "context_tokens": 1000, "window": 0}
    read, own = 2 * 2 * 1000 * 64 * 2 * 1.0, 2 * 8 * 64 * 2 * 2.0  # keys and values; query and answer
    assert roofline_us("attention", row, 1e9, {"bf16": 1e15}) == pytest.approx((read + own) / 1e9 * 1e6)
    row |= {"query_tokens": 1000}  # each sees half on average
    work = 4 * 2 * 8 * 64 * 1000 * 500.5
    assert roofline_us("attention", row, 1e15, {"bf16": 1e9}) == pytest.approx(work / 1e9 * 1e6)
    norm = {"op": "norm", "tokens": 10, "hidden": 8, "dtype": "fp32", "direction": "forward"}
    assert roofline_us("elementwise", norm, 1e9, {}) == pytest.approx(10 * 2 * 8 * 4 / 1e9 * 1e6)


def test_fresh_sample_and_its_refusal(measured: Path, tmp_path: Path):
    found = check_profile(measured, fresh_s=1.0)["fresh"]
    assert found["points"] > 0
    assert found["realtime"] is False
    with pytest.raises(ProfileError, match="profile law is of , this machine has"):
        check_profile(_law(tmp_path / "p", None), fresh_s=1.0)


def test_a_fresh_sample_without_the_right_to_real_time_says_so(measured: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(measured, tmp_path / "p")
    _changed(tmp_path / "p", system={"realtime": 1.0})

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    found = check_profile(tmp_path / "p", fresh_s=0.3)["fresh"]
    assert (found["realtime"], found["points"] > 0) == (False, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": {"threads": "x"}}, r"profile.json: system.threads \('x'\): must be a valid number"),
        ({"sources": {}}, r"source of table \w+ must be a key of sources in profile.json; row 1 holds 'moeplan-"),
    ],
)
def test_what_no_number_or_source_is_fails_the_check(measured: Path, tmp_path: Path, change, message):
    shutil.copytree(measured, tmp_path / "p")
    _changed(tmp_path / "p", **change)
    with pytest.raises(ProfileError, match=message):
        check_profile(tmp_path / "p")


def test_a_page_is_named_as_one(measured: Path, tmp_path: Path):
    with pytest.raises(SpecError, match=r"p.svg\) must end in .html"):
        show_profile(measured, tmp_path / "p.svg")


def test_an_older_or_corrupt_profile_is_refused(measured: Path, tmp_path: Path):
    out = _law(tmp_path / "p", None)
    (out / "gemm.parquet").write_bytes(b"no table")
    with pytest.raises(ProfileError, match="sha256 differs"):
        check_profile(out)
    meta = json.loads((out / "profile.json").read_text())
    (out / "profile.json").write_text(json.dumps({**meta, "schema_version": 0}))
    with pytest.raises(ProfileError, match=r"schema_version \(0\) is older .* measure again: none"):
        check_profile(out)


def test_backward_of_a_type_without_gradient_is_refused(tmp_path: Path):
    sizes = Sizes(hidden=128, inter=128, experts=2, top_k=1)
    request = ProfileRequest(parts=("experts",), sizes=sizes, dtypes=("int8",), directions=("backward",))
    with pytest.raises(SpecError, match=r"direction \(backward\) is not measured for dtype \(int8\)"):
        measure_profile(request, tmp_path / "p")


def test_requests_need_sizes(tmp_path: Path):
    for part, message in (("experts", "--hidden"), ("attention", "--heads"), ("dense", "--n")):
        request = ProfileRequest(parts=(part,))
        if part == "experts":
            request = ProfileRequest(parts=(part,), sizes=Sizes(hidden=8))
        with pytest.raises(SpecError, match=message):
            measure_profile(request, tmp_path / "p")
    with pytest.raises(SpecError, match=r"threads \(1000\) exceed the cores"):
        measure_profile(ProfileRequest(parts=("memory",), threads=1000), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_models_of_a_latent_width_are_permuted_at_it():
    request = ProfileRequest(parts=("dense",), models=("kimi-k3",), dtypes=("fp32",), max_tokens=4)
    benches = _dense_benches(request, find_device("cpu"), [find_model("kimi-k3")], [])
    rows = [series.row(1) for bench in benches for series in bench.series if series.table == "elementwise"]
    hidden = {row["op"]: row["hidden"] for row in rows}
    assert (hidden["permute"], hidden["unpermute"], hidden["router"], hidden["norm"]) == (3584, 3584, 7168, 7168)


def test_the_help_names_the_defaults():
    helped, plain = " ".join(_cli("all", "--help").output.split()), ProfileRequest()
    for option, default in (
        ("budget TIME", f"{plain.budget_s:g}s"),
        ("max-tokens INTEGER RANGE", plain.max_tokens),
        ("max-bytes INTEGER RANGE", plain.max_bytes),
        ("dtype NAMES", *plain.dtypes),
    ):
        assert f"[default: {default}]" in helped.partition(f"--{option} ")[2].partition(" --")[0]
    assert all(op in helped for op in OPS)


def test_the_commands_of_missing_regions_measure_them(measured: Path, tmp_path: Path, monkeypatch):
    """As they stand but for their time: into the profile, with its threads, of a model's file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(measured, tmp_path / "own")
    fields = {"name": "m", "num_layers": 1, "moe_layer_ids": [0], "hidden_size": 64, "num_experts": 4, "top_k": 2}
    fields |= {"expert_intermediate_size": 32, "vocab_size": 64}
    fields |= {"attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16}}
    (tmp_path / "my model.json").write_text(json.dumps(fields))
    asked = (find_model("my model.json"), cluster_for("h100", 1, 1), Workload(phase="decode"), Objective())

    def gaps() -> tuple[str, ...]:
        return coverage_gaps(*asked, load_profile(tmp_path / "own"), Technique(), "my model.json")

    commands = [gap.partition("; measure it: moeplan profile ")[2] for gap in gaps()]
    assert [words.split()[0] for words in commands] == ["experts", "attention", "dense"]
    for words in commands:
        done = _cli(*shlex.split(words), "--budget", "0.5s", "--max-tokens", "8")
        assert done.exit_code == 0, done.output
    assert gaps() == ()


def test_presets_and_options_make_one_request():
    request = profile_request("experts", "cpu", {"max_tokens": 8, "hidden": 64})
    assert request.parts == ("experts",)
    assert (request.sizes.hidden, request.sizes.inter, request.max_tokens) == (64, 1024, 8)
    h200 = profile_request("all", "h200", {})
    assert (h200.budget_s, h200.device, len(h200.models)) == (480.0, "cuda", 7)
    assert "collectives" not in h200.parts, "one GPU cannot measure an exchange"
    assert set(PRESETS) == {"cpu", "h200"}


def _cli(*words: str):
    return CliRunner().invoke(command, [*words], catch_exceptions=True)


def test_command_line(tmp_path: Path):
    out = str(tmp_path / "p")
    done = _cli("experts", "--hidden", "32", "--inter", "32", "--experts", "4", "--top-k", "1", "--device", "cpu",
                "--dtype", "fp32", "--max-tokens", "8", "--budget", "0.5s", "--out", out, "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"]["experts"] > 3
    checked = json.loads(_cli("check", out, "--json").stdout)
    assert checked["command"].startswith("moeplan profile experts --hidden 32")
    assert _cli("check", out).exit_code == 0
    again = shutil.copytree(out, tmp_path / "again")
    assert f"timeof{again}over{out}" in "".join(_cli("diff", out, str(again)).stdout.split())
    shown = json.loads(_cli("show", out, "--out", str(tmp_path / "p.html"), "--json").stdout)
    # a second picture, of skewed vectors, where the budget reached them
    assert shown["pictures"] == (tmp_path / "p.html").read_text().count("<svg") >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experts", "--budget", "60", "--out", "x"], "is not a quantity in seconds"),
        (["experts", "--budget", "0s", "--out", "x"], "'--budget': '0s' must be above 0"),
        (["check", "x", "--fresh", "0ms"], "'--fresh': '0ms' must be above 0"),
        (["experts", "--ep", "1,zero", "--out", "x"], "must be numbers from 1"),
        (["attention", "--window", "128,0", "--out", "x"], "'--window': '128,0' must be numbers from 1"),
        (["experts", "--seed", "-1", "--out", "x"], "'--seed': -1 is not in the range"),
        (["routing", "--seed", "-1", "--out", "x"], "'--seed': -1 is not in the range"),
        (["collectives", "--max-bytes", "255", "--out", "x"], "'--max-bytes': 255 is not in the range"),
    ],
)
def test_usage_errors(words, message):
    done = _cli(*words)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    "words",
    [
        ("attention", "--heads", "8", "--kv-heads", "3", "--head-dim", "16", "--dtype", "fp32,bf16"),
        ("all", "--preset", "cpu", "--kv-heads", "3"),
    ],
)
def test_key_value_heads_that_do_not_divide_the_heads_are_one_error(words, tmp_path, monkeypatch, capsys):
    def started(*_args):
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr("moeplan.pipeline.profiling.measure_profile", started)
    monkeypatch.setattr(sys, "argv", ["moeplan", "profile", *words, "--device", "cpu", "--out", str(tmp_path / "p")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --kv-heads (3) must divide --heads (8); give a number that does\n"


@pytest.mark.parametrize(
    ("part", "option"),
    [("memory", "--trace"), ("memory", "--op"), ("memory", "--kernel"), ("memory", "--ep"), ("memory", "--dtype"),
     ("memory", "--max-bytes"), ("system", "--budget"), ("attention", "--hidden"), ("collectives", "--threads"),
     ("experts", "--ranks"), ("dense", "--ep"), ("dense", "--window")],
)  # fmt: skip
def test_a_subcommand_offers_only_what_changes_it(part: str, option: str, tmp_path: Path):
    done = _cli(part, option, "1", "--out", str(tmp_path / "p"))
    assert done.exit_code == 2
    assert f"No such option '{option}'" in done.output.replace("No such option: --", "No such option '--")
    assert option in _cli("all", "--help").output


@pytest.mark.parametrize(
    ("part", "preset", "options", "message"),
    [
        ("all", None, {"kernels": ("loop",)}, r"--kernel \(loop\) changes nothing in .*memory.*--models or sizes"),
        ("all", "h200", {"ranks": 2}, r"--ranks \(2\) changes nothing in what is measured \(system, memory, experts"),
        ("memory", None, {"dtypes": ("fp8",)}, r"--dtype \(fp8\) changes nothing in .* \(memory\); leave"),
        ("dense", None, {"models": ("a", "b"), "hidden": 4}, r"--models \(a, b\) and --hidden \(4\) both give sizes"),
        ("all", None, {"windows": (8,)}, r"--window \(8\) changes nothing in .*memory.*--models or sizes"),
        ("attention", "cpu", {"windows": (8, 4096)}, r"window \(4096\) must .* below --max-tokens \(2048\).*larger"),
        ("attention", None, {"heads": 8}, r"--heads \(8\) needs --kv-heads and --head-dim too; give them"),
        ("dense", None, {"hidden": 8, "kv_heads": 2}, r"--kv-heads \(2\) needs --heads and --head-dim too"),
        ("experts", None, {"inter": 8, "top_k": 1}, r"--inter \(8\) needs --hidden and --experts too; give them"),
        ("dense", None, {"n": 8}, r"--n \(8\) is one side of a dense product; give --k too"),
        ("collectives", None, {"ops": ("bogus",)}, r"op 'bogus' is not known.*all_reduce"),
        ("all", "cpu", {"kernels": ("bogus",)}, r"kernel 'bogus' is not known.*grouped_mm"),
    ],
)
def test_options_that_do_nothing_are_refused_by_name(part, preset, options, message):
    with pytest.raises(MoeplanError, match=message):
        profile_request(part, preset, options)


def test_of_a_preset_only_what_changes_the_part_is_asked_and_kept():
    words = "--device cpu --budget 300s --threads 1 --out DIR"
    assert profile_request("memory", "cpu", {}).command == f"moeplan profile memory {words}"
    exchange = profile_request("collectives", "cpu", {})
    assert (exchange.threads, exchange.ep, exchange.sizes.inter, exchange.ranks) == (0, (1,), 0, 2)
    assert profile_request("dense", "cpu", {"models": ("olmoe-1b-7b",)}).sizes == Sizes()
    assert profile_request("dense", "h200", {"hidden": 64}).models == ()


def test_ctrl_c_says_that_points_are_kept(tmp_path: Path, monkeypatch):
    def stop(_benches, rig, *_):
        rig.journal.add("memory", {"op": "allocate"}, [1.0])
        raise KeyboardInterrupt

    monkeypatch.setattr("moeplan.pipeline.profiling.run_benches", stop)
    done = _cli("memory", "--device", "cpu", "--out", str(tmp_path / "p"))
    journal = tmp_path / "p.journal.jsonl"
    assert f"1 points measured until then are kept in {journal}; the same command with --resume goes on" in done.stderr
    assert len(journal.read_text().splitlines()) == 2


def test_a_profile_that_cannot_be_written_keeps_its_points_for_the_same_command(tmp_path: Path, monkeypatch):
    def full(*_):
        raise InputError("cannot write p: No space left on device; choose another --out")

    out, asked = tmp_path / "p", ProfileRequest(parts=("memory",), budget_s=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(HardwareProfile, "save", full)
        with pytest.raises(ProfileError, match=r"another --out; \d+ points measured until then are kept in .*p.jour"):
            measure_profile(asked, out)
    with pytest.raises(ProfileError, match=r"command \(moeplan profile memory .*\) is not this run's \(.*--seed 1"):
        measure_profile(replace(asked, seed=1), out, resume=True)
    again = measure_profile(replace(asked, budget_s=0.1), out, resume=True)
    assert again["resumed_points"] > 0, "the time may be another"
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_points_of_one_sample_have_no_spread_and_are_counted(tmp_path: Path, monkeypatch):
    def once(_benches, rig, *_):
        rig.journal.add("memory", {"backend": "b", "kernel": "k", "op": "allocate", "message_size_bytes": 1}, [1.0])

    monkeypatch.setattr("moeplan.pipeline.profiling.run_benches", once)
    done = _cli("memory", "--device", "cpu", "--out", str(tmp_path / "p"))
    assert "median spread not known, 1 of one sample, whose spread is not known" in " ".join(done.stdout.split())
    assert math.isnan(load_profile(tmp_path / "p").table("memory")["spread"][0].as_py())


def test_unknown_names_are_errors_of_the_tree(tmp_path: Path):
    base = ["experts", "--hidden", "32", "--inter", "32", "--experts", "4", "--top-k", "1", "--device", "cpu"]
    for more, message in (
        (["--dtype", "fp8"], "needs a GPU"),
        (["--dtype", "fp99"], "dtype 'fp99' is not known"),
        (["--direction", "sideways"], "direction 'sideways' is not known"),
        (["--kernel", "magic"], "kernel 'magic' is not known"),
    ):
        done = _cli(*base, *more, "--out", str(tmp_path / "p"))
        assert isinstance(done.exception, MoeplanError)
        assert message in str(done.exception)


def test_the_committed_cpu_profile_predicts_sizes_it_is_not_shown():
    """FFN and gloo exchanges within 10 % in the median; real measurements, so this holds wherever it is run."""
    answer = check_profile(Path(__file__).parents[3] / "profiles" / "cpu-amd-epyc")
    for table, least in (("experts", 20), ("alltoall", 40), ("collectives", 60)):
        held = answer["tables"][table]["held_out"]
        assert held["points"] >= least
        assert held["median"] <= 0.10
    assert answer["vectors"]["median"] <= 0.15


def test_a_check_is_readable_in_80_columns():
    shown = _cli("check", str(Path(__file__).parents[3] / "profiles" / "cpu-amd-epyc")).stdout
    assert all(word in shown for word in ("non_monotone", "collectives", "elementwise"))
    assert "…" not in shown


def test_omissions_are_grouped_by_their_reason(capsys):
    left_out = [f"gemm {n}: size 8 does not fit the budget" for n in (1, 2)] + ["dense: not measured"]
    answer = {"out": "p", "device": "d", "rows": {}, "system": {}, "points": 1, "resumed_points": 0}
    _show(answer | {"median_spread": 0.1, "single_samples": 0, "left_out": left_out})
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "left out: gemm 1, gemm 2: size 8 does not fit the budget", "left out: dense: not measured"
    ]  # fmt: skip
