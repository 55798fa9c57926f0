"""Collectives: measured groups serve, larger ones follow from them and never take less."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, load_profile
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.engine_links import EngineLinks
from moeplan.costs.engine_tables import EngineSetup, EngineTables
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import cluster_for, find_accelerator
from moeplan.specs.models import find_model

META = ProfileMeta(name="toy", accelerator="H100-SXM-80GB", date="2026-11-30", command="none")


def profile(op: str, ranks: int, nodes: int, us: float = 100.0) -> HardwareProfile:
    """A start of ``us`` and 1 us more for every MiB."""
    rows = [
        {"op": op, "dtype": "bf16", "ranks": ranks, "nodes": nodes, "message_size_bytes": size, "backend": "nccl",
         "kernel": "NCCL", "source": "s", "latency_us": us + size / 2**20}
        for size in (2**8, 2**12, 2**16, 2**20, 2**24, 2**28)
    ]  # fmt: skip
    return HardwareProfile(META, {"collectives": pa.Table.from_pylist(rows)})


def flat(nodes: int, per_node: int) -> ClusterSpec:
    return cluster_for("h100", nodes, per_node)


@pytest.mark.parametrize(
    ("op", "stride", "nodes", "asked"),
    [("p2p", 8, 2, 2), ("p2p", 32, 2, 2), ("all_gather", 32, 2, 2), ("all_reduce", 16, 4, 4), ("all_reduce", 1, 2, 16)],
)
def test_a_measured_group_serves_wherever_its_ranks_lie(op: str, stride: int, nodes: int, asked: int) -> None:
    costs = CollectiveCosts(flat(8, 8), profile(op, asked, nodes))
    found = costs.seconds(op, asked, 2**20, stride)
    assert (found.total, found.extrapolated) == (pytest.approx(101e-6, rel=0.02), False)


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("system", ["h100", "gb200"])
def test_more_ranks_take_no_less(system: str, op: str) -> None:
    name = {"h100": "h100-sxm"}.get(system, system)
    shapes = [(1, 4), (1, 8), (2, 8), (8, 8)] if system == "h100" else [(1, 4), (2, 4), (4, 4), (18, 4)]
    for size in (2**12, 2**16, 2**20, 2**26):
        took = [
            CollectiveCosts(cluster_for(system, nodes, each), load_profile(name)).seconds(op, nodes * each, size)
            for nodes, each in shapes
        ]
        assert all(a.total <= b.total * 1.02 for a, b in pairwise(took)), (size, took)
        assert [each.extrapolated for each in took] == [False, system != "h100", True, True]
        assert "modelled from" in took[-1].source


def test_a_slow_kernel_with_one_size_more_does_not_set_the_start() -> None:
    costs = CollectiveCosts(cluster_for("h100", 2, 8), load_profile("h100-sxm"), "sglang")
    inside = CollectiveCosts(cluster_for("h100", 1, 8), load_profile("h100-sxm"), "sglang")
    took = [inside.seconds("all_reduce", 8, size).total for size in (128, 256, 300, 510, 512, 8192)]
    assert max(took) < 2 * min(took)
    assert costs.seconds("all_reduce", 16, 8192).total < 60e-6


def test_two_racks_take_no_less_than_one() -> None:
    one, two = (cluster_for("gb200", nodes, 72, "two-level") for nodes in (1, 2))
    for op in ("all_reduce", "all_gather", "alltoall"):
        racks = [CollectiveCosts(c, load_profile("gb200")).seconds(op, c.num_ranks, 2**30).total for c in (one, two)]
        assert racks[0] <= racks[1]


def test_between_nodes_a_small_message_starts_and_ends_inside_and_a_large_one_takes_its_bytes() -> None:
    costs = CollectiveCosts(flat(2, 8), profile("all_reduce", 8, 1, us=5.0))
    chip = find_accelerator("h100")
    small, large = (costs.seconds("all_reduce", 16, size).total for size in (256, 2**30))
    assert small == pytest.approx(2 * 5e-6 + 2 * 18e-6, rel=0.01)
    assert large - small == pytest.approx(2 * 15 / 16 * 2**30 / (8 * chip.nic_bandwidth), rel=0.01)


def test_all_to_all_leaves_a_node_over_every_ranks_own_nic() -> None:
    size, nic = 2**33, find_accelerator("h100").nic_bandwidth
    found = CollectiveCosts(flat(8, 8), load_profile("h100-sxm")).seconds("alltoall", 64, size)
    assert found.total == pytest.approx(56 / 64 * size / nic, rel=0.01)


def test_an_engine_and_a_step_pay_the_same() -> None:
    setup = EngineSetup(find_model("mixtral-8x7b"), find_accelerator("h100"), "trtllm", tp=8)
    shipped = load_profile("h100-sxm")
    links = EngineLinks(EngineTables(setup, shipped, None))
    tokens = np.array([1.0, 64, 4096])
    step = CollectiveCosts(flat(1, 8), shipped, "trtllm").seconds("all_reduce", 8, tokens * 4096 * 2)
    np.testing.assert_allclose(links.all_reduce(tokens), step.value)


def test_links_given_one_by_one_are_not_the_network_that_was_measured() -> None:
    links = [{"source": "node0", "target": "node1", "bandwidth": "1 GB/s", "latency": "9 us", "duplex": True}]
    own = flat(2, 8).model_dump() | {"topology": "explicit", "links": links}
    cluster = ClusterSpec.model_validate(own)
    found = CollectiveCosts(cluster, profile("all_reduce", 16, 2)).seconds("all_reduce", 16, 2**30)
    assert found.extrapolated
    assert found.total == pytest.approx(2 * 15 / 16 * 2**30 / 1e9, rel=0.01)
