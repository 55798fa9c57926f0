"""How a time is taken. The protocol, in order:

1. Cases that share buffers form a :class:`Bench`; it is opened once, filled with random data, never zeros.
2. Scouting, small sizes first, warms each case up and estimates it; a series ends early, and says so, where
   its next size would not fit the time or the memory.
3. Passes visit all cases in shuffled order, so that drift of the machine spreads over all of them; a visit
   makes one untimed call, then several timed ones over rotating buffers, so that caches do not help more
   than they would in a model.
4. While time is left, the interval in which interpolation is expected to err most is split; its ends are
   timed again in the same passes. Then the noisiest points get more passes.
5. No sample is dropped: the median stands, ``spread`` tells (90th - 10th percentile) / median, and the
   minimum and 20th percentile are kept beside it.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from moeplan.errors import MoeplanError
from moeplan.profiling.grid import coarse_sizes, interval_errors, midpoint
from moeplan.profiling.journal import Journal

__all__ = ["Bench", "CpuTimer", "CudaTimer", "Rig", "Series", "Timer", "run_benches", "shrunk", "statistics"]

Call = Callable[[int], object]
Progress = Callable[[str, float], None]

VISIT_S = 0.004  # timed calls of one visit take about this long: well above the clock's resolution
MAX_CALLS = 16
PASSES = 6
LEAST_PASSES = 2
TOLERANCE = 0.01
NOISY = 0.25
MAX_SAMPLES = 400
_EVENTS_US = 20.0  # more than the host takes to record the two events of a call
_MOST_SPIN_US = 50_000.0


@dataclass(frozen=True, slots=True)
class Series:
    """Cases that differ in one size. ``row`` gives the table's columns at a size, all but the measured ones."""

    table: str
    label: str
    row: Callable[[int], Mapping[str, Any]]
    low: int
    high: int
    points: int = 7
    refine: bool = True
    sizes: tuple[int, ...] = ()

    @property
    def start(self) -> list[int]:
        """The sizes given, or a coarse grid."""
        return sorted(self.sizes) or coarse_sizes(self.low, self.high, self.points)


@dataclass(frozen=True, slots=True)
class Bench:
    """Series over shared buffers. ``open()`` allocates and returns ``prepare(series, size) -> call(i)``,
    where ``i`` picks the rotating buffer; dropping that function frees everything. ``left_out`` says what of the
    sizes asked for is not among the series, and ``smaller`` which options make the buffers smaller."""

    name: str
    series: tuple[Series, ...]
    open: Callable[[], Callable[[Series, int], Call]]
    left_out: tuple[str, ...] = ()
    smaller: str = "give a smaller --max-tokens"


def shrunk(what: str, asked: int, high: int, unit: str = "tokens") -> tuple[str, ...]:
    """What to say where memory holds only ``high`` of the ``asked`` units; nothing where it holds all."""
    if high >= asked:
        return ()
    return (f"{what}: {unit} from {high + 1:,} to {asked:,} do not fit into the memory, measured to {high:,}",)


T = TypeVar("T")


class Timer(Protocol):
    """Times calls, in microseconds each."""

    def time(self, call: Call, count: int) -> list[float]:
        """``call(-1)`` untimed, then ``count`` timed calls ``call(0) .. call(count - 1)``."""


class CpuTimer:
    """The monotonic clock around each call; ``before`` runs ahead of each timed one."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self._before = before

    def time(self, call: Call, count: int) -> list[float]:
        """See :class:`Timer`."""
        call(-1)
        samples = []
        for i in range(count):
            self._before()
            start = time.perf_counter_ns()
            call(i)
            samples.append((time.perf_counter_ns() - start) / 1e3)
        return samples


class CudaTimer:
    """Device events around each call on the current stream.

    A spin kernel ahead of the calls keeps the device busy while the host enqueues them: without it the gaps
    between small kernels would be timed as if they were the kernels. The untimed call tells how long that takes.
    """

    def __init__(self) -> None:
        import torch

        self._torch = torch
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The first launch loads the module, and the clock of an idle device takes a while to rise: time the second.
        torch.cuda._sleep(200_000_000)
        start.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        torch.cuda.synchronize()
        self._cycles_per_us = 10_000_000 / (start.elapsed_time(end) * 1e3)

    def time(self, call: Call, count: int) -> list[float]:
        """See :class:`Timer`."""
        torch = self._torch
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        torch.cuda.synchronize()
        begun = time.perf_counter_ns()
        call(-1)
        host_us = (time.perf_counter_ns() - begun) / 1e3
        torch.cuda.synchronize()
        spin_us = min(count * (2 * host_us + _EVENTS_US), _MOST_SPIN_US)
        torch.cuda._sleep(int(spin_us * self._cycles_per_us))
        for i in range(count):
            starts[i].record()
            call(i)
            ends[i].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e3 for a, b in zip(starts, ends, strict=True)]


@dataclass(slots=True)
class Rig:
    """What runs a bench. ``agree`` turns a value of the clock into one that all ranks share, ``anywhere`` tells whether
    something is so on any of them; samples of a timer must already be the same on all, so that all take the same
    decisions."""

    timer: Timer
    journal: Journal
    rng: random.Random
    agree: Callable[[Any], Any] = lambda value: value
    anywhere: Callable[[bool], bool] = lambda so: so
    left_out: list[str] = field(default_factory=list)
    strict: bool = False  # where a failing call means a dead peer, not a kernel that this device lacks
    doing: str = ""


def statistics(samples: Sequence[float]) -> dict[str, float]:
    """Measured columns of a point: median, spread (of one sample nan: not known), minimum, 20th percentile, number of
    samples."""
    values = np.asarray(samples)
    low, high = np.percentile(values, [10, 90])
    median = float(np.median(values))
    return {
        "latency_us": median,
        "spread": float(high - low) / median if len(values) > 1 else math.nan,
        "min_us": float(values.min()),
        "p20_us": float(np.percentile(values, 20)),
        "samples": len(values),
    }


def _out_of_memory(error: BaseException) -> bool:
    import torch

    said = str(error).lower()  # of a RuntimeError: the CPU's allocator, and CUDA outside torch's own
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)
    )


def _reason(error: Exception) -> str:
    """Kind and first line: what a device lacks ends in a RuntimeError, a ValueError, or one of Triton's."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def run_benches(benches: Sequence[Bench], rig: Rig, budget_s: float, report: Progress = lambda _w, _d: None) -> None:
    """Measure all benches within about ``budget_s``; samples go to the journal, omissions to ``left_out``.

    A bench's share is in proportion to its series; what it leaves goes to those after it.
    """
    begun = time.monotonic()
    benches = [bench for bench in benches if bench.series]
    total = sum(len(bench.series) for bench in benches)
    before = 0
    for bench in benches:
        rig.left_out += bench.left_out
        report(bench.name, before / total)
        now = time.monotonic()
        own = len(bench.series)
        share_s = max(begun + budget_s - now, 0.02 * budget_s) * own / (total - before)

        def tell(done: float, before: int = before, own: int = own, name: str = bench.name) -> None:
            report(name, (before + own * min(done, 1.0)) / total)

        _run_bench(bench, rig, rig.agree(share_s), tell)
        before += own
    report("measured", 1.0)


def _run_bench(bench: Bench, rig: Rig, share_s: float, tell: Callable[[float], None]) -> None:
    begun = time.monotonic()

    def left() -> float:
        value = rig.agree(share_s - (time.monotonic() - begun))
        tell(1 - value / share_s)
        return float(value)

    try:
        prepare = _together(bench.open, rig)
    except Exception as error:
        if _out_of_memory(error):
            rig.left_out.append(
                f"{bench.name}: not measured, weights and buffers do not fit into the memory of the device: free some,"
                f" or {bench.smaller}"
            )
        elif rig.strict or isinstance(error, MoeplanError):
            raise
        else:
            rig.left_out.append(f"{bench.name}: fails here: {_reason(error)}")
        return
    try:
        _Run(bench, prepare, rig, left).run(share_s)
    finally:
        del prepare
        gc.collect()


def _together(make: Callable[[], T], rig: Rig) -> T:
    """What ``make`` makes, unless the memory of any rank does not hold it: then all are out of memory, none waits."""
    made: T | None = None
    short: Exception | None = None
    try:
        made = make()
    except Exception as error:
        if not _out_of_memory(error):
            raise
        short = error
    if rig.anywhere(short is not None):
        raise short or MemoryError("another rank is out of memory")
    assert made is not None
    return made


class _Run:
    """One open bench: estimates and sizes by series."""

    def __init__(
        self, bench: Bench, prepare: Callable[[Series, int], Call], rig: Rig, left: Callable[[], float]
    ) -> None:
        self.bench, self.prepare, self.rig, self.left = bench, prepare, rig, left
        self.estimate_us: dict[tuple[int, int], float] = {}
        self.failed: set[tuple[int, int]] = set()

    def run(self, share_s: float) -> None:
        todo: list[tuple[int, int]] = []
        scout_until = 0.75 * share_s
        for index, series in enumerate(self.bench.series):
            allowance = max(self.left() - (share_s - scout_until), 0.0) / (len(self.bench.series) - index)
            todo += self.scout_series(index, series.start, allowance)
        new = [case for case in todo if len(self.samples(case)) < LEAST_PASSES * self.calls(case)]
        per_pass_s = sum(self.calls(case) * self.estimate_us[case] for case in new) / 1e6
        passes = max(LEAST_PASSES, min(PASSES, int(self.left() / max(per_pass_s, 1e-9) / 2)))
        self.passes(new, passes)
        self.refine()

    def samples(self, case: tuple[int, int]) -> list[float]:
        series = self.bench.series[case[0]]
        return self.rig.journal.samples(series.table, series.row(case[1]))

    def calls(self, case: tuple[int, int]) -> int:
        return max(1, min(MAX_CALLS, math.ceil(VISIT_S * 1e6 / max(self.estimate_us[case], 1e-3))))

    def timed(self, case: tuple[int, int], count: int) -> list[float]:
        series, size = self.bench.series[case[0]], case[1]
        self.rig.doing = f"{series.label} at {size}"
        return self.rig.timer.time(_together(lambda: self.prepare(series, size), self.rig), count)

    def scout(self, case: tuple[int, int]) -> bool:
        """Warm a case up and estimate it; False, and said, where the memory does not hold it."""
        known = self.samples(case)
        if known:
            self.estimate_us[case] = float(np.median(known))
            return True
        try:
            self.estimate_us[case] = min(self.timed(case, 2))
        except Exception as error:
            self.drop(case, error, f"from size {case[1]} on")
            return False
        return True

    def drop(self, case: tuple[int, int], error: Exception, where: str) -> None:
        """Time a failing case no more, and say so; its samples are kept. Ends the run where a peer may be dead."""
        if not _out_of_memory(error) and (self.rig.strict or isinstance(error, MoeplanError)):
            raise error
        label = self.bench.series[case[0]].label
        if _out_of_memory(error):
            self.rig.left_out.append(f"{label}: out of memory {where}")
        else:
            self.rig.left_out.append(f"{label}: fails here {where}: {_reason(error)}")
        self.failed.add(case)
        self.estimate_us.pop(case, None)
        gc.collect()

    def scout_series(self, index: int, sizes: list[int], allowance_s: float) -> list[tuple[int, int]]:
        kept: list[tuple[int, int]] = []
        spent_s = 0.0
        for size in sizes:
            case = (index, size)
            if kept and not self.samples(case):
                predicted_s = self.estimate_us[kept[-1]] / 1e6 * size / kept[-1][1]
                if spent_s + (3 + 2 * LEAST_PASSES) * predicted_s > allowance_s:
                    several = f"sizes from {size} to {sizes[-1]} do" if size < sizes[-1] else f"size {size} does"
                    self.rig.left_out.append(f"{self.bench.series[index].label}: {several} not fit the budget")
                    break
            if not self.scout(case):
                break
            spent_s += (3 + 2 * LEAST_PASSES) * self.estimate_us[case] / 1e6
            kept.append(case)
        return kept

    def passes(self, cases: list[tuple[int, int]], passes: int) -> None:
        """Time ``cases`` in ``passes`` shuffled passes, but one where the time is up."""
        for number in range(passes):
            order = list(cases)
            self.rig.rng.shuffle(order)
            if number and self.left() <= 0:
                break
            for case in order:
                if case in self.failed:
                    continue
                series, size = self.bench.series[case[0]], case[1]
                try:
                    samples = self.timed(case, self.calls(case))
                except Exception as error:  # other programs took what the scouting had
                    self.drop(case, error, f"at size {size} in a later pass, its times until then are kept")
                    continue
                self.rig.journal.add(series.table, series.row(size), samples)
                self.left()  # moves the progress bar

    def refine(self) -> None:
        while self.left() > 0:
            batch = [case for case in self.worst() if case in self.estimate_us or self.scout(case)]
            if not batch:
                return
            cost_s = sum(self.calls(c) * self.estimate_us[c] for c in batch) / 1e6 * LEAST_PASSES
            if cost_s > self.left():
                return
            self.passes(batch, PASSES)

    def worst(self, most: int = 4) -> list[tuple[int, int]]:
        """Midpoints of the worst intervals with their ends; the noisiest points where no interval is bad."""
        found: list[tuple[float, list[tuple[int, int]]]] = []
        noisy: list[tuple[float, list[tuple[int, int]]]] = []
        for index, series in enumerate(self.bench.series):
            us = {}
            for case in self.estimate_us:
                if case[0] == index and (samples := self.samples(case)):
                    stats = statistics(samples)
                    us[case[1]] = stats["latency_us"]
                    spread = stats["spread"] if len(samples) > 1 else math.inf
                    if spread > NOISY and len(samples) < MAX_SAMPLES:
                        noisy.append((spread, [case]))
            if series.refine:
                for (a, b), error in interval_errors(us).items():
                    middle = midpoint(a, b)
                    case = index, middle or 0
                    if error > TOLERANCE and middle and case not in self.estimate_us and case not in self.failed:
                        found.append((error, [(index, a), (index, middle), (index, b)]))
        chosen = sorted(found or noisy, reverse=True)[:most]
        return list(dict.fromkeys(case for _, cases in chosen for case in cases))
