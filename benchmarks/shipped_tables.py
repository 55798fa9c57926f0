"""How far off are products at sizes that the package does not ship? Prints one JSON object. Extra: aic.

The shipped GEMM tables keep two fifths of the sizes that were measured. For each system the costs that a plan takes
from them are compared with measured rows of the same kernels at the sizes left out, at most 1,500 of each kernel, by
seed 0; kernels that timed the host (mark host_bound) are left out on both sides. The plain log-log line is beside.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moeplan.artifacts.profile import load_profile
from moeplan.artifacts.profile_tables import MISMEASURED
from moeplan.costs.heldout import AXES
from moeplan.costs.interpolation import GridInterpolator
from moeplan.costs.waves import steps_of
from moeplan.pipeline.aic import MAIN_SYSTEMS, full_profile

KERNEL = ("backend", "kernel", "dtype", "source")
SAMPLE = 1500


def _rows(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernel, coordinates and latency of each row."""
    names = np.array([" ".join(row) for row in zip(*(table[column].to_pylist() for column in KERNEL), strict=True)])
    coords = np.stack([table[axis].to_numpy().astype(float) for axis in AXES["gemm"]], 1)
    return names, coords, table["latency_us"].to_numpy()


def _errors(system: str) -> dict[str, Any]:
    full = full_profile(system)
    shipped, measured = load_profile(full.meta.name), full.table("gemm")
    mismeasured = pc.is_in(measured["mark"].cast("string"), value_set=pa.array(MISMEASURED))
    names, coords, latency = _rows(shipped.select("gemm"))
    all_names, all_coords, all_latency = _rows(measured.filter(pc.invert(mismeasured)))
    ours, plain = [], []
    for name in np.unique(names):
        own = names == name
        left_out = (all_names == name) & ~np.isin(all_coords[:, 0], coords[own, 0])
        picks = np.random.default_rng(0).permutation(np.flatnonzero(left_out))[:SAMPLE]
        if not len(picks):
            continue
        series, at = np.zeros(own.sum(), np.int64), np.zeros(len(picks), np.int64)
        model = GridInterpolator(series, coords[own], latency[own], steps=steps_of(shipped, "gemm"))
        true = all_latency[picks]
        ours.append(model.predict(at, all_coords[picks]).latency_us / true - 1)
        plain.append(model.plain(at, all_coords[picks]) / true - 1)
    return {"points": sum(map(len, ours)), "ours": _quantiles(ours), "plain": _quantiles(plain)}


def _quantiles(errors: list[np.ndarray]) -> dict[str, float]:
    off = np.abs(np.concatenate(errors))
    return {"median": float(np.nanmedian(off)), "p90": float(np.nanquantile(off, 0.9))}


def main() -> None:
    """Compare all main systems."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    systems = {system: _errors(system) for system in MAIN_SYSTEMS}
    print(json.dumps({"date": today, "command": "python benchmarks/shipped_tables.py", "systems": systems}, indent=1))


if __name__ == "__main__":
    main()
