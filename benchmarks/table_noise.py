"""How well can rows of the public GEMM tables be known at all? Prints one JSON object. Extra: aic.

Plateaus, inside one table: products of 9, 11, 13 and 15 rows fill one tile of 16, none of them aligned to anything,
so that the device does the same work for each; what sets one row's time apart from the median of the three others is
scatter of the measurement. A perfect predictor misses such rows by about that much (a little less: three have scatter
too). Shares of rows more than 10 % slower, and faster, than the others' median show on which side it lies.

Hidden sizes: of the rows of a held-out row's family that have its size, the share that is known (every 4th row is held
out, and where all shapes have the same sizes, the rows of one size fall together).

Other rows hidden: the error of GEMM with every 4th row held out from each of the first four on, the validation's being
one of these.

Best of all settings: known rows left out, with all rows of their size on Blackwell and alone elsewhere, like the
held-out ones; how far the best of the nine settings misses, taken row by row with an eye on the answer: no choice among
them does better.

Runs: SGLang's rows stand in the order they were done in, products shuffled, on four or eight devices at once. How much
likelier a row is over 10 % slower than its neighbours tell it to be (known rows, each left out) right after another
such row, and 64 rows after one; and the share of such rows among products under 50 us within eight rows after one of
1 ms or more, and among the others. Where these differ, slowness was the device's at that moment (its clock falls under
heavy work and takes a while to rise), and no function of the product tells it.

Kernels that timed the host (mark host_bound) are left out throughout.

Timer: where times of 3 to 9 us of a kernel lie near multiples of some period, the period and how closely (length of
the mean of unit vectors: 1 on the multiples, 0 anywhere). Beside it, held-out rows as predicted, and with a correction
that knows the predicted time only, not the product: the median miss of the 101 known rows of the kernel, each left out,
whose predictions are nearest. What such a correction gains is how the timer counts, not what a product costs.

Twins, two tables of one kernel at the same points: each shape's common factor is taken out (the median of the log
ratios along it), what is left is the scatter of both, and what the machines do differently. Pairs: B200 and GB200 carry
one chip, with 148 and 152 multiprocessors; H100 and H200 differ in memory only; on one system the bf16 products of
two frameworks are the same library calls.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.heldout import families, hidden_rows, hold_out
from moeplan.costs.interpolation import _SETTINGS, GridInterpolator
from moeplan.costs.waves import steps_of
from moeplan.pipeline.aic import MAIN_SYSTEMS, full_profile
from moeplan.profiling.sanity import group_ids

POINT = ("m", "n", "k")
FRAMEWORKS = ("sglang", "trtllm", "vllm")
PLATEAU = (9, 11, 13, 15)  # rows of one tile
PERIODS = np.arange(0.1, 1.2, 0.0005)  # us
NEAREST = 101


def _products(profile: HardwareProfile) -> pa.Table:
    """Products whose kernels were timed, with a column that says which the validation holds out."""
    table = profile.table("gemm")
    table = table.append_column("hidden", pa.array(hidden_rows("gemm", table)))
    return table.filter(pc.not_equal(table["mark"].cast("string"), "host_bound"))


def _logs(table: pa.Table, **where: Any) -> dict[tuple[Any, ...], float]:
    """Point -> log latency of the kernel with most rows among those that match; release and kernel stay out."""
    for column, value in where.items():
        table = table.filter(pc.equal(table[column], value))
    names = [f"{s} {k}" for s, k in zip(table["source"].to_pylist(), table["kernel"].to_pylist(), strict=True)]
    if not names:
        return {}
    values, counts = np.unique(names, return_counts=True)
    table = table.filter(pa.array(np.array(names) == values[counts.argmax()]))
    keys = zip(*(table[column].to_pylist() for column in POINT), strict=True)
    return dict(zip(keys, np.log(table["latency_us"].to_numpy()), strict=True))


def _scatter(a: dict[tuple[Any, ...], float], b: dict[tuple[Any, ...], float]) -> dict[str, Any] | None:
    both = sorted(set(a) & set(b))
    if len(both) < 500:
        return None
    apart = np.array([a[key] - b[key] for key in both])
    shapes = np.unique([key[1:] for key in both], axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(shapes, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(shapes[order])) + 1):
        apart[rows] -= np.median(apart[rows])
    return _quantiles(apart)


def _plateaus(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Framework, and all of them -> how far rows of a plateau lie from the median of the others."""
    table = table.filter(pc.is_in(table["m"], value_set=pa.array(PLATEAU, table["m"].type)))
    groups = group_ids(table, ["n", "k", "batch", "backend", "kernel", "dtype", "source"])
    order = np.argsort(groups, kind="stable")
    logs = np.log(table["latency_us"].to_numpy())
    apart = np.full(len(logs), np.nan)
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        for row in rows if len(rows) == len(PLATEAU) else ():
            apart[row] = logs[row] - np.median(logs[rows[rows != row]])
    backend = np.array(table["backend"].to_pylist())
    known = np.isfinite(apart)
    parts = {"all": known} | {str(b): known & (backend == b) for b in np.unique(backend[known])}
    return {name: _quantiles(apart[part]) for name, part in parts.items()}


def _quantiles(apart: np.ndarray) -> dict[str, Any]:
    off = np.abs(np.expm1(apart))
    tails = {"slower": float((np.expm1(apart) > 0.1).mean()), "faster": float((np.expm1(apart) < -0.1).mean())}
    return {"points": len(off), "median": float(np.median(off)), "p90": float(np.quantile(off, 0.9)), **tails}


def _known_share(table: pa.Table) -> float:
    """Median over held-out rows: of their family's rows of the same size, the part that is not held out."""
    hidden = table["hidden"].to_numpy()
    size = np.unique(table["m"].to_numpy(), return_inverse=True)[1]
    cell = families("gemm", table) * (size.max() + 1) + size
    share = np.bincount(cell[~hidden], minlength=cell.max() + 1) / np.maximum(np.bincount(cell), 1)
    return float(np.median(share[cell[hidden]]))


def _by_first_hidden(profile: HardwareProfile) -> dict[str, dict[str, float | int | None]]:
    """Number of the first row that is held out -> errors of GEMM."""
    table, steps = profile.table("gemm"), steps_of(profile, "gemm")
    answers = {str(first): hold_out("gemm", table, steps, first).figures() for first in range(4)}
    return {first: {key: found[key] for key in ("held_out", "median", "p90")} for first, found in answers.items()}


def _best_of_settings(table: pa.Table, profile: HardwareProfile, alone: bool) -> dict[str, dict[str, Any]]:
    """Framework, and all of them -> errors of the best setting of each of at most 500 known rows a kernel."""
    known = table.filter(pc.invert(table["hidden"]))
    family, steps = families("gemm", known), steps_of(profile, "gemm")
    coords = np.stack([known[axis].to_numpy().astype(float) for axis in POINT], 1)
    logs, backends = np.log(known["latency_us"].to_numpy()), np.array(known["backend"].to_pylist())
    least, names = [], []
    for number in range(family.max() + 1):
        rows = np.flatnonzero(family == number)
        if len(rows) < 1000:  # products of attention, by head as well
            continue
        model = GridInterpolator(np.zeros(len(rows), np.int64), coords[rows], np.exp(logs[rows]), steps=steps)
        picks = np.random.default_rng(0).permutation(rows)[:500]
        zeros, x = np.zeros(len(picks), np.int64), np.log(coords[picks])
        apart = np.stack([model._krige(zeros, x, setting, alone) - logs[picks] for setting in _SETTINGS])
        least.append(apart[np.abs(apart).argmin(0), np.arange(len(picks))])
        names.append(backends[picks])
    off, backend = np.concatenate(least), np.concatenate(names)
    return {"all": _quantiles(off)} | {str(b): _quantiles(off[backend == b]) for b in np.unique(backend)}


def _runs(table: pa.Table, profile: HardwareProfile) -> dict[str, float]:
    """Share of slow rows among SGLang's known ones; how much likelier one is the next row, and the 64th, after one;
    shares of slow rows among short products soon after a long one, and among the others."""
    mine = pc.ends_with(table["source"].cast("string"), "/gemm")
    table = table.filter(pc.and_(pc.equal(table["backend"], "sglang"), mine))
    known, family, steps = ~table["hidden"].to_numpy(), families("gemm", table), steps_of(profile, "gemm")
    coords = np.stack([table[axis].to_numpy().astype(float) for axis in POINT], 1)
    logs, slow = np.log(table["latency_us"].to_numpy()), np.full(table.num_rows, np.nan)
    for number in range(family.max() + 1):
        rows = np.flatnonzero(known & (family == number))
        model = GridInterpolator(np.zeros(len(rows), np.int64), coords[rows], np.exp(logs[rows]), steps=steps)
        slow[rows] = logs[rows] - model._best(np.zeros(len(rows), np.int64), np.log(coords[rows])) > np.log(1.1)

    def after(lag: int) -> float:
        pairs = np.isfinite(slow[:-lag]) & np.isfinite(slow[lag:])
        then = slow[lag:][pairs]
        return float(then[slow[:-lag][pairs] == 1].mean() / then.mean())

    us = table["latency_us"].to_numpy()
    heavy = np.cumsum(np.concatenate([[0], us >= 1000]))
    soon = heavy[np.arange(len(us))] > heavy[np.maximum(np.arange(len(us)) - 8, 0)]
    short = np.isfinite(slow) & (us < 50)
    return {
        "slow": float(np.nanmean(slow)),
        "next_after_slow": after(1),
        "64th_after_slow": after(64),
        "slow_of_short_soon_after_heavy": float(slow[short & soon].mean()),
        "slow_of_short_otherwise": float(slow[short & ~soon].mean()),
    }


def _timer(table: pa.Table, profile: HardwareProfile) -> dict[str, Any]:
    """Kernels whose times stand on multiples of a period; errors of held-out rows before and after a correction by the
    predicted time alone."""
    family, steps = families("gemm", table), steps_of(profile, "gemm")
    columns = (table[column].to_pylist() for column in ("backend", "kernel", "dtype"))
    names = [" ".join(row) for row in zip(*columns, strict=True)]
    coords = np.stack([table[axis].to_numpy().astype(float) for axis in POINT], 1)
    hidden, us = table["hidden"].to_numpy(), table["latency_us"].to_numpy()
    logs, periods = np.log(us), {}
    before, after = [], []
    for number in range(family.max() + 1):
        known, asked = (np.flatnonzero((family == number) & part) for part in (~hidden, hidden))
        if len(known) < 1000:  # products of attention, by head as well
            continue
        short = us[known][(us[known] > 3) & (us[known] < 9)]
        if len(short) > 300:
            strength = np.abs(np.exp(2j * np.pi * short[:, None] / PERIODS).mean(0))
            if strength.max() >= 0.5:
                best = strength.argmax()
                periods[names[known[0]]] = {"us": round(float(PERIODS[best]), 4), "strength": float(strength[best])}
        model = GridInterpolator(np.zeros(len(known), np.int64), coords[known], us[known], steps=steps)
        told = model._best(np.zeros(len(known), np.int64), np.log(coords[known]))
        order = np.argsort(told)
        windows = np.lib.stride_tricks.sliding_window_view((logs[known] - told)[order], NEAREST)
        at = told[order][NEAREST // 2 : -(NEAREST // 2)]
        answer = np.log(model.predict(np.zeros(len(asked), np.int64), coords[asked]).latency_us)
        before.append(answer - logs[asked])
        after.append(before[-1] + np.interp(answer, at, np.median(windows, 1)))
    errors = {"held_out": before, "corrected": after}
    return {"periods": periods} | {name: _quantiles(np.concatenate(parts)) for name, parts in errors.items()}


def main() -> None:
    """Read the tables of the main systems once and compare them pairwise."""
    profiles = {system: full_profile(system) for system in MAIN_SYSTEMS}
    tables = {system: _products(profile) for system, profile in profiles.items()}
    pairs = [
        (f"{backend} {dtype}, {one}, {other}", [_logs(tables[t], backend=backend, dtype=dtype) for t in (one, other)])
        for one, other in (("b200_sxm", "gb200"), ("h100_sxm", "h200_sxm"))
        for backend in FRAMEWORKS
        for dtype in ("bf16", "fp8", "fp8_block", "nvfp4")
    ] + [
        (f"{one} and {other}, bf16 on {system}", [_logs(tables[system], backend=b, dtype="bf16") for b in (one, other)])
        for system in MAIN_SYSTEMS
        for one, other in (("trtllm", "vllm"), ("sglang", "vllm"), ("sglang", "trtllm"))
    ]
    plateaus = {system: _plateaus(table) for system, table in tables.items()}
    twins = [{"pair": name, **found} for name, pair in pairs if (found := _scatter(*pair)) is not None]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = {"date": today, "command": "python benchmarks/table_noise.py"}
    known = {system: _known_share(table) for system, table in tables.items()}
    best = {s: _best_of_settings(table, profiles[s], known[s] < 0.5) for s, table in tables.items()}
    runs = {s: _runs(table, profiles[s]) for s, table in tables.items()}
    answer: dict[str, Any] = {**about, "plateaus": plateaus, "known_share_of_a_held_out_size": known}
    answer["by_first_hidden_row"] = {s: _by_first_hidden(profile) for s, profile in profiles.items()}
    answer["timer"] = {s: _timer(table, profiles[s]) for s, table in tables.items()}
    answer |= {"best_of_nine_settings_row_by_row": best, "twins": twins, "slow_rows_of_sglang": runs}
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
