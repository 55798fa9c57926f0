"""Each mark on a small table made to deserve it."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.profiling.sanity import mark_host_bound, mark_rows

META = ProfileMeta(name="toy", accelerator="toy", date="2026-11-22", command="none")


def marks(name: str, rows: list[dict[str, Any]]) -> list[str]:
    common = {"backend": "b", "kernel": "k", "source": "s"}
    table = pa.Table.from_pylist([{**common, **row} for row in rows])
    return [str(mark) for mark in mark_rows(name, HardwareProfile(META, {name: table}).table(name))]


def gemm(times: dict[int, float], n: int = 8) -> list[dict[str, Any]]:
    return [{"m": m, "n": n, "k": 8, "dtype": "bf16", "latency_us": t} for m, t in times.items()]


def test_a_spike_is_an_outlier_and_a_lasting_fall_is_not_monotone() -> None:
    assert marks("gemm", gemm({1: 10, 2: 11, 4: 50, 8: 13, 16: 14})) == ["", "", "outlier", "", ""]
    assert marks("gemm", gemm({1: 10, 2: 10, 4: 7, 8: 7})) == ["non_monotone", "non_monotone", "", ""]
    assert marks("gemm", gemm({1: 10, 2: 10, 4: 9, 8: 9})) == [""] * 4


def test_a_kernel_that_timed_the_host_is_marked_as_a_whole() -> None:
    times = {"fast": {1: 5, 64: 9, 4096: 900}, "slow": {1: 16, 64: 30, 4096: 1000}, "host": {1: 90, 64: 91, 4096: 950}}
    rows = [{**row, "backend": name, "kernel": "k", "source": "s"} for name, t in times.items() for row in gemm(t)]
    rows += [{**row, "backend": "host", "kernel": "k", "source": "s", "dtype": "fp8"} for row in gemm(times["host"])]
    rows += [{**row, "backend": "large", "kernel": "k", "source": "s"} for row in gemm({4096: 1000, 8192: 2000})]
    table = mark_host_bound(HardwareProfile(META, {"gemm": pa.Table.from_pylist(rows)}).table("gemm"))
    # Alone in its type a kernel cannot be told from a slow device; large products take long on any kernel.
    assert table["mark"].to_pylist() == [""] * 6 + ["host_bound"] * 3 + [""] * 5


def test_series_do_not_mix() -> None:
    rows = gemm({1: 100, 2: 200}, n=8) + gemm({1: 1, 2: 2}, n=16)
    assert marks("gemm", rows) == [""] * 4


def experts(distribution: str, tokens: int, latency: float) -> dict[str, Any]:
    shape = {"hidden": 8, "inter": 8, "num_experts": 8, "top_k": 2, "ep": 4, "tp": 1, "dtype": "bf16"}
    return {**shape, "distribution": distribution, "tokens": tokens, "latency_us": latency}


def test_skewed_rows_faster_than_balanced_are_marked_at_large_batch_only() -> None:
    rows = [
        experts("balanced", 64, 10),
        experts("power_law_1.2", 64, 5),
        experts("balanced", 4096, 100),
        experts("power_law_1.2", 4096, 90),
        experts("power_law_1.01", 4096, 120),
    ]
    assert marks("experts", rows) == ["", "", "", "skew_faster", ""]


def test_a_kernel_that_computed_other_ranks_choices_is_marked_beyond_one_rank() -> None:
    def rows(kernel: str, part: float, sizes: int = 6) -> list[dict[str, Any]]:
        tokens = [1024 * 2**i for i in range(sizes)]
        spread = [{**experts("balanced", t, t / 10), "ep": 1} for t in tokens]
        spread += [{**experts("balanced", t, 5 + part * t / 10), "ep": 8} for t in tokens]
        skewed = [{**experts("power_law_1.2", 4096, 500), "ep": ep} for ep in (1, 4)]
        return [{**row, "kernel": kernel} for row in spread + skewed]

    # A rank of eight with an eighth of the choices and some time besides; one with nearly all of them.
    assert marks("experts", rows("cut", 0.3)) == [""] * 14
    assert marks("experts", rows("whole", 0.9)) == [""] * 6 + ["not_sharded"] * 6 + ["", "not_sharded"]
    assert marks("experts", rows("seldom", 0.9, 3)) == [""] * 8  # too few rows to tell


def exchange(nodes: int, latency: float) -> dict[str, Any]:
    shape = {
        "mode": "normal",
        "phase": "dispatch",
        "hidden": 8,
        "top_k": 8,
        "num_experts": 64,
        "dtype": "fp8",
    }
    return {**shape, "nodes": nodes, "ranks": 8 * nodes, "tokens_per_rank": 4096, "latency_us": latency}


def test_a_collapse_of_bandwidth_between_node_counts_is_an_outlier() -> None:
    # copies to other nodes per token: 1.0, 2.7, 4.6; twice their growth is allowed
    assert marks("alltoall", [exchange(2, 805), exchange(4, 1853), exchange(8, 6680)]) == ["", "", "outlier"]
    assert marks("alltoall", [exchange(2, 805), exchange(4, 1853), exchange(8, 3300)]) == ["", "", ""]
