"""The protocol on fake clocks and cases: grid, journal, budget, refinement, memory."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest

from moeplan.errors import ProfileError
from moeplan.profiling.grid import coarse_sizes, departure, interval_errors, midpoint
from moeplan.profiling.journal import Journal
from moeplan.profiling.protocol import Bench, CpuTimer, CudaTimer, Rig, Series, run_benches, statistics

torch = pytest.importorskip("torch", reason="profilers need torch")


class FakeTimer:
    """'Measures' a law of the size; remembers every timed size in order."""

    def __init__(self, law) -> None:
        self.law, self.seen = law, []

    def time(self, call, count):
        size = call(0)
        self.seen.append(size)
        return [self.law(size)] * count


POINT = {"backend": "b", "kernel": "k", "dtype": "fp32", "distribution": "balanced", "tokens": 1} | dict.fromkeys(
    ("hidden", "inter", "num_experts", "top_k", "ep", "tp"), 1
)


def _series(high=1024, label="s", refine=True, points=5):
    def row(size):
        return POINT | {"tokens": size, "kernel": label}

    return Series("experts", label, row, 1, high, points, refine)


def _run(series, timer, journal=None, budget=0.3, opened=None):
    def open_():
        if opened is not None:
            opened()
        return lambda _series, size: lambda _i: size

    rig = Rig(timer, journal or Journal(None, {}), random.Random(0))
    run_benches([Bench("b", tuple(series), open_)], rig, budget)
    return rig


def test_coarse_sizes_hold_both_ends_and_rise():
    assert coarse_sizes(1, 64, 7) == [1, 2, 4, 8, 16, 32, 64]
    assert coarse_sizes(3, 3) == [3]
    sizes = coarse_sizes(1, 1000, 4)
    assert sizes == [1, 10, 100, 1000]


def test_midpoint_is_an_inner_integer():
    assert midpoint(4, 16) == 8
    assert midpoint(2, 4) == 3
    assert midpoint(2, 3) is None


def test_no_error_is_expected_on_a_power_law_and_the_bend_is_found():
    power = {size: 3.0 * size**0.7 for size in (1, 4, 16, 64)}
    assert departure(4, 1, 16, power) == pytest.approx(0, abs=1e-12)
    assert max(interval_errors(power).values()) == pytest.approx(0, abs=1e-12)
    bend = {size: max(10.0, size) for size in (1, 4, 16, 64, 256)}
    errors = interval_errors(bend)
    assert max(errors, key=errors.get) in {(4, 16), (1, 4), (16, 64)}
    # (4, 16) holds the bend at 10: departure of 4 from the line 1..16 is log(1.6) / 2.
    assert errors[1, 4] == pytest.approx(math.log(1.6) / 2 / 4)


def test_refinement_goes_to_the_bend():
    timer = FakeTimer(lambda size: max(100.0, size))
    rig = _run([_series(high=4096)], timer)
    sizes = {row["tokens"] for _, row, _ in rig.journal.points.values()}
    added = sizes - set(coarse_sizes(1, 4096, 5))
    near = [size for size in added if 50 <= size <= 200]
    assert len(near) > len(added) / 2, "splits gather around 100, where a line errs"
    assert min(abs(size - 100) for size in near) <= 5


def test_fixed_series_are_not_refined_and_passes_are_shuffled():
    timer = FakeTimer(lambda size: max(100.0, size))
    rig = _run([_series(refine=False, high=4096)], timer)
    assert {r["tokens"] for _, r, _ in rig.journal.points.values()} == set(coarse_sizes(1, 4096, 5))
    passes = [timer.seen[i : i + 5] for i in range(5, 25, 5)]
    assert all(sorted(p) == coarse_sizes(1, 4096, 5) for p in passes)
    assert len({tuple(p) for p in passes}) > 1


def test_sizes_beyond_the_budget_are_left_out_and_named():
    rig = _run([_series(high=10**6, points=7)], FakeTimer(lambda size: 50.0 * size), budget=0.2)
    sizes = [row["tokens"] for _, row, _ in rig.journal.points.values()]
    assert 1 in sizes
    assert 10**6 not in sizes
    assert any("do not fit the budget" in line for line in rig.left_out)


def test_a_single_size_beyond_the_budget_is_no_range():
    rig = _run([_series(high=2, points=2, refine=False)], FakeTimer(lambda size: 1e5 * size), budget=0.1)
    assert rig.left_out == ["s: size 2 does not fit the budget"]


def test_out_of_memory_keeps_smaller_sizes_and_says_so():
    def law(size):
        if size > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 10.0

    rig = _run([_series(high=1024)], FakeTimer(law))
    assert rig.left_out == ["s: out of memory from size 181 on"]
    assert {row["tokens"] for _, row, _ in rig.journal.points.values()} >= {1, 6, 32}


@pytest.mark.parametrize("said", ["can't allocate memory", "CUDA error: out of memory"])
def test_memory_that_ends_in_a_later_pass_drops_the_size_and_keeps_its_points(said: str):
    """What scouting had others take: the run goes on, also refining, and says it once."""
    asked: list[int] = []

    def law(size):
        asked.append(size)
        if size == 64 and asked.count(64) > 3:
            raise RuntimeError(said)
        return 1e3 * (size > 30) + size

    rig = _run([_series(64, points=4)], FakeTimer(law))
    assert rig.left_out == ["s: out of memory at size 64 in a later pass, its times until then are kept"]
    kept = {row["tokens"] for _, row, _ in rig.journal.points.values()}
    assert {1, 4, 16, 64} <= kept
    assert asked.count(64) == 4


def test_a_size_that_fails_while_refining_is_tried_once():
    failed: list[int] = []

    def law(size):
        if size not in (1, 4, 16, 64):
            failed.append(size)
            raise RuntimeError("no code for this size")
        return 1e3 * (size > 8) + size

    _run([_series(64, points=4)], FakeTimer(law), budget=3.0)
    assert failed
    assert len(failed) == len(set(failed))


def test_a_bench_that_does_not_fit_is_left_out():
    def opened():
        raise torch.OutOfMemoryError("CUDA out of memory")

    rig = _run([_series()], FakeTimer(lambda _s: 1.0), opened=opened)
    assert rig.left_out == [
        "b: not measured, weights and buffers do not fit into the memory of the device: free some, or give a smaller"
        " --max-tokens"
    ]
    assert not rig.journal.points


class CompilationError(Exception):
    """Triton's errors are neither RuntimeError nor ValueError."""


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, CompilationError])
def test_a_kernel_that_the_device_lacks_is_named_and_the_rest_goes_on(kind):
    def law(size):
        if size > 100:
            raise kind("no kernel image is available\nfor execution")
        return 10.0

    def closed():
        raise kind

    rig = Rig(FakeTimer(law), Journal(None, {}), random.Random(0))
    benches = [Bench("ab", (_series(label="a"), _series(label="b", high=64)), _opened)]
    run_benches([*benches, Bench("c", (_series(label="c"),), closed)], rig, 3.0)
    assert rig.left_out == [
        f"a: fails here from size 181 on: {kind.__name__}: no kernel image is available",
        f"c: fails here: {kind.__name__}",
    ]
    assert {row["kernel"] for _, row, _ in rig.journal.points.values()} == {"a", "b"}


def test_an_error_of_ours_ends_the_run():
    def law(_size):
        raise ProfileError("cannot write")

    with pytest.raises(ProfileError, match="cannot write"):
        _run([_series()], FakeTimer(law))


class FakeGpu:
    """A stream on a clock, in microseconds: the host enqueues, the device runs what is enqueued in order."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.busy_until = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.run(host_us=3.0, device_us=0.0)
                self.at = gpu.busy_until

            def elapsed_time(self, end) -> float:
                return (end.at - self.at) / 1e3

        def synchronize():
            gpu.now = max(gpu.now, gpu.busy_until)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.run(5.0, cycles / 1980))
        monkeypatch.setattr("moeplan.profiling.protocol.time.perf_counter_ns", lambda: gpu.now * 1e3)

    def run(self, host_us: float, device_us: float) -> None:
        self.now += host_us
        self.busy_until = max(self.busy_until, self.now) + device_us


def test_what_the_host_takes_to_launch_is_not_timed_whatever_came_before(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    timer = CudaTimer()

    def light(_i):
        gpu.run(host_us=5.0, device_us=2.0)

    def heavy(_i):
        for _ in range(40):
            gpu.run(host_us=5.0, device_us=2.0)

    def blocking(_i):
        gpu.run(host_us=5.0, device_us=100.0)
        torch.cuda.synchronize()

    for _ in range(3):
        assert timer.time(light, 16) == pytest.approx([2.0] * 16)
        assert timer.time(heavy, 16) == pytest.approx([80.0] * 16)
        begun = gpu.now
        timer.time(blocking, 16)
        assert gpu.now - begun < 2 * 17 * 200, "the spin does not grow with what it made the host wait"


def test_a_call_without_time_comes_before_the_timed_ones():
    seen: list[int | str] = []
    CpuTimer(before=lambda: seen.append("before")).time(seen.append, 2)
    assert seen == [-1, "before", 0, "before", 1]


def test_between_ranks_an_error_ends_the_run():
    def law(_size):
        raise RuntimeError("connection closed by peer")

    rig = Rig(FakeTimer(law), Journal(None, {}), random.Random(0), strict=True)
    bench = Bench("b", (_series(),), lambda: lambda _series, size: lambda _i: size)
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        run_benches([bench], rig, 0.1)


def test_statistics_against_known_samples():
    stats = statistics([float(n) for n in range(1, 102)])
    assert stats == {"latency_us": 51.0, "spread": 80 / 51, "min_us": 1.0, "p20_us": 21.0, "samples": 101}
    assert math.isnan(statistics([7.0])["spread"]), "one sample does not tell how far others would lie"


def test_a_killed_run_goes_on_from_its_journal(tmp_path: Path):
    path, header = tmp_path / "p.journal.jsonl", {"device": "x"}

    def law(size):
        if size > 100:
            raise KeyboardInterrupt
        return 10.0

    killed = Journal(path, header)
    with pytest.raises(KeyboardInterrupt):
        _run([_series(refine=False)], FakeTimer(law), killed)
    killed.close()
    first = Journal(path, header, resume=True)
    assert first.resumed == 0, "scouting alone is no measurement"
    first.add("experts", POINT | {"kernel": "s"}, [10.0] * 40)
    first.close()
    with path.open("a") as stream:
        stream.write('{"table":"experts","row":{"tok')  # the kill came while a line was written
    timer = FakeTimer(lambda _size: 10.0)
    rig = _run([_series(refine=False)], timer, Journal(path, header, resume=True))
    assert rig.journal.resumed == 1
    assert 1 not in timer.seen, "a point of the journal is not measured again"
    assert len(rig.journal.points) == 5
    rig.journal.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["device"] == "x"


def test_journal_refuses_what_does_not_belong(tmp_path: Path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {"device": "x"})
    journal.add("experts", {"tokens": 1}, [1.0])
    journal.close()
    with pytest.raises(ProfileError, match="go on from them with --resume, or delete it"):
        Journal(path, {"device": "x"})
    with pytest.raises(ProfileError, match=r"device \(x\) is not this run's \(y\)"):
        Journal(path, {"device": "y"}, resume=True)
    text = path.read_text().splitlines()
    with pytest.raises(ProfileError, match=r"command \(None\) is not .* give that command with --resume, delete the"):
        Journal(path, {"device": "x", "command": "moeplan profile all"}, resume=True)
    for line in ("no json", '{"table":"magic","row":{},"us":[1.0]}', '{"table":"gemm","row":{},"us":[]}'):
        path.write_text("\n".join([text[0], line, text[1]]))
        with pytest.raises(ProfileError, match="line 2 is not a measured point"):
            Journal(path, {"device": "x"}, resume=True)


@pytest.mark.parametrize(
    ("row", "us"),
    [
        ({}, [math.nan]),
        ({}, [-5]),
        ({}, [0]),
        ({}, [math.inf]),
        ({}, [True]),
        ({}, ["1"]),
        ({}, "12"),
        ({"tokens": "x"}, [1]),
        ({"tokens": 0}, [1]),
        ({"tokens": None}, [1]),
        ({"distribution": "magic"}, [1]),
        ({"latency_us": 1.0}, [1]),
        ({"bogus": 1}, [1]),
    ],
)
def test_a_line_that_was_edited_is_no_measured_point(tmp_path: Path, row, us):
    """Also the last one: what a kill cuts short is no JSON."""
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {})
    journal.add("experts", POINT, [1.0])
    journal.close()
    Journal(path, {}, resume=True).close()
    with path.open("a") as stream:
        stream.write(json.dumps({"table": "experts", "row": POINT | row, "us": us}))
    with pytest.raises(ProfileError, match=r"j.jsonl line 3 is not a measured point; delete the file"):
        Journal(path, {}, resume=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path):
    journal = Journal(tmp_path / "j.jsonl", {})
    assert journal._stream is not None
    with Path("/dev/full").open("w") as full:
        os.dup2(full.fileno(), journal._stream.fileno())
    for write in (lambda: journal.add("gemm", {"m": 1}, [1.0]), journal.close):
        with pytest.raises(ProfileError, match=r"cannot write .*j.jsonl: No space left on device; choose another"):
            write()
    journal.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_keeps_the_points_before(tmp_path: Path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {})
    journal.add("experts", POINT, [1.0])
    assert journal._stream is not None
    with Path("/dev/full").open("w") as full:
        os.dup2(full.fileno(), journal._stream.fileno())
    message = r"No space left on device; 1 points measured until then are kept in .*j.jsonl; the same command with"
    with pytest.raises(ProfileError, match=message):
        journal.add("experts", POINT | {"tokens": 2}, [1.0])
    with pytest.raises(ProfileError, match=message):
        journal.close()
    again = Journal(path, {}, resume=True)
    again.close()
    assert again.resumed == 1


def test_progress_is_of_the_whole_run():
    """A bench counts by its series, as the budget does."""
    seen: list[tuple[str, float]] = []
    rig = Rig(FakeTimer(lambda _size: 10.0), Journal(None, {}), random.Random(0))
    benches = [
        Bench(name, tuple(_series(label=f"{name}{n}", refine=False) for n in range(count)), _opened)
        for name, count in (("a", 3), ("none", 0), ("b", 1))
    ]
    run_benches(benches, rig, 0.2, lambda what, done: seen.append((what, done)))
    fractions = [done for _, done in seen]
    assert fractions == sorted(fractions)
    assert next(done for what, done in seen if what == "b") == 0.75
    assert seen[-1] == ("measured", 1.0)


def _opened():
    return lambda _series, size: lambda _i: size
