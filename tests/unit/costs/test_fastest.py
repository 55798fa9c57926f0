"""Of several measured kernels the fastest at each point, of those measured around it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.costs.fastest import FastestTable

META = ProfileMeta(name="toy", accelerator="toy", date="2026-11-30", command="none")


def table(**kernels: tuple[float, tuple[int, ...]]) -> FastestTable:
    """Kernels that take so many us whatever the size, measured at these sizes."""
    rows = [
        {"op": "all_reduce", "dtype": "bf16", "ranks": 2, "nodes": 1, "message_size_bytes": size, "backend": "nccl",
         "kernel": kernel, "source": "s", "latency_us": us}
        for kernel, (us, sizes) in kernels.items() for size in sizes
    ]  # fmt: skip
    profile = HardwareProfile(META, {"collectives": pa.Table.from_pylist(rows)})

    def law(coords: np.ndarray) -> np.ndarray:
        return np.full(len(coords), 1e-6)

    return FastestTable(profile, "collectives", ("message_size_bytes",), {"op": "all_reduce"}, law, "toy")


def test_a_kernel_measured_around_a_point_serves_before_a_faster_one_that_is_extended_to_it() -> None:
    costs = table(short=(5.0, (256, 1024, 4096)), long=(9.0, (256, 1024, 4096, 65536)))
    found = costs.told(np.array([1024.0, 16384.0]))
    np.testing.assert_allclose(found.value, [5e-6, 9e-6], rtol=1e-6)
    assert not found.extrapolated
    beyond = costs.told(np.array([2.0**20]))
    np.testing.assert_allclose(beyond.value, [9e-6], rtol=1e-6)  # neither is; the long one less far
    assert beyond.extrapolated
    assert costs.smallest == 256


def test_the_kernel_that_serves_most_points_is_named() -> None:
    costs = table(short=(5.0, (256, 1024, 4096)), long=(9.0, (256, 1024, 4096, 65536)))
    assert "(short)" in costs.told(np.array([512.0, 2048.0, 16384.0])).source
    assert "(long)" in costs.told(np.array([512.0, 16384.0, 32768.0])).source
