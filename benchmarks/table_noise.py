"""How well can rows of the public GEMM tables be known at all? Prints one JSON object. Extra: aic.

Two tables of one kernel on one chip, at the same points: each shape's common factor is taken out (the median of
the log ratios along it), what is left is the scatter of both. A perfect predictor of one table misses its rows by
the scatter of that table alone: about the difference over the square root of two where both scatter alike, the
whole of it where the other table is quiet. Pairs: B200 and GB200 carry one chip; H100 and H200 differ in memory
only; on one system the bf16 products of two frameworks are the same library calls.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moeplan.pipeline.aic import MAIN_SYSTEMS, full_profile

POINT = ("m", "n", "k")
FRAMEWORKS = ("sglang", "trtllm", "vllm")


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
    off = np.abs(np.expm1(apart))
    return {"points": len(both), "median": float(np.median(off)), "p90": float(np.quantile(off, 0.9))}


def main() -> None:
    """Read the tables of the main systems once and compare them pairwise."""
    tables = {system: full_profile(system).table("gemm") for system in MAIN_SYSTEMS}
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
    answer = [{"pair": name, **found} for name, pair in pairs if (found := _scatter(*pair)) is not None]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(json.dumps({"date": today, "command": "python benchmarks/table_noise.py", "scatter": answer}, indent=1))


if __name__ == "__main__":
    main()
