from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeplan.errors import InputError, SpecError, UnknownNameError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import (
    accelerator_aliases,
    accelerator_names,
    cluster_for,
    find_accelerator,
    find_cluster,
    sized_cluster,
)


@pytest.mark.parametrize(
    ("name", "memory_gb", "bandwidth_gb_s", "domain", "nic_gbit_s"),
    [
        ("h100", 80, 3350, 8, 400),
        ("H100-SXM", 80, 3350, 8, 400),
        ("h200", 141, 4800, 8, 400),
        ("b200", 192, 7700, 8, 400),
        ("gb200", 192, 8000, 72, 800),
        ("a100", 80, 2039, 8, 200),
        ("mi300x", 192, 5300, 8, 400),
    ],
)
def test_accelerators_carry_their_data_sheet(name, memory_gb, bandwidth_gb_s, domain, nic_gbit_s):
    device = find_accelerator(name)
    assert device.memory / 1e9 == pytest.approx(memory_gb, rel=0.08)  # sheets say GB where the device has GiB
    assert device.memory_bandwidth == pytest.approx(bandwidth_gb_s * 1e9)
    assert device.scale_up_domain == domain
    assert device.nic_bandwidth == pytest.approx(nic_gbit_s / 8 * 1e9)


def test_names_are_unique_and_every_entry_is_valid():
    names = accelerator_names()
    assert len(set(names)) == len(names) >= 25
    for name in names:
        assert find_accelerator(name).source
        assert all(find_accelerator(alias) == find_accelerator(name) for alias in accelerator_aliases(name))
        assert find_cluster(name).num_ranks >= 1
    with pytest.raises(UnknownNameError, match=r"accelerator 'h1000' is not known; .*h100-sxm-80gb"):
        find_accelerator("h1000")
    for find in (lambda: find_cluster("h1000"), lambda: sized_cluster("h1000", 8)):
        with pytest.raises(UnknownNameError, match=r"cluster \(neither an accelerator nor a file\) 'h1000' is not"):
            find()


def test_facts_agree_with_the_public_list(data_dir: Path):
    rows = {
        row["name"].lower(): row for row in json.loads((data_dir / "hardware.json").read_text())["devices"]
    }
    checked = 0
    for name in accelerator_names():
        if (row := rows.get(name)) is None:
            assert name in ("ascend-910c", "h20-3e-141gb")  # the list has the latter as a note of H20
            continue
        device = find_accelerator(name)
        assert device.memory_bandwidth == pytest.approx(row["mem_bw_gbps"] * 1e9)
        assert device.bf16 == pytest.approx(row["bf16_dense_tflops"] * 1e12)
        assert (device.fp8 or 0) == pytest.approx((row["fp8_dense_tflops"] or 0) * 1e12)
        assert device.nic_bandwidth == pytest.approx(row["nic_gbit_per_gpu"] * 1e9 / 8)
        assert device.scale_up_domain == row["scaleup"]["domain_size"]
        checked += 1
    assert checked >= 30


def test_a_cluster_named_by_its_accelerator():
    default = find_cluster()
    assert (default.accelerator.name, default.num_nodes, default.ranks_per_node) == ("H100-SXM-80GB", 1, 8)
    rack = find_cluster("gb200-nvl72")
    assert (rack.num_nodes, rack.ranks_per_node, rack.topology) == (18, 4, "nvl72")
    sized = find_cluster("h200", 4, 2)
    assert (sized.num_nodes, sized.ranks_per_node, sized.topology) == (4, 2, "two-level")
    assert cluster_for("h100", 2, 8, "rail-optimised").topology == "rail-optimised"


@pytest.mark.parametrize(
    ("name", "ranks", "nodes", "shape"),
    [
        ("h100", 4, None, (1, 4)),
        ("h100", 32, None, (4, 8)),
        ("h100", 8, 2, (2, 4)),
        ("gb200", 32, None, (1, 32)),
        ("gb200", 144, None, (2, 72)),
        ("l40s", 16, None, (2, 8)),
        ("h100", None, 3, (3, 8)),
    ],
)
def test_ranks_go_into_as_few_nodes_as_hold_them(name, ranks, nodes, shape):
    cluster = sized_cluster(name, ranks, nodes)
    assert (cluster.num_nodes, cluster.ranks_per_node) == shape


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(
        SpecError, match=r"ranks \(9\) do not divide over 2 nodes of up to 8 H100-SXM-80GB; say how many"
    ):
        sized_cluster("h100", 9)
    with pytest.raises(SpecError, match=r"ranks \(9\) do not divide over 2 nodes$"):
        sized_cluster("h100", 9, 2)


def test_a_cluster_file_names_or_spells_out_its_accelerator(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "accelerator: h100\nnum_nodes: 2\nranks_per_node: 4\nranks: {3: {failed: true}, 1: {memory: 40 GB}}\n"
    )
    cluster = find_cluster(path)
    assert cluster.accelerator == find_accelerator("h100")
    assert cluster.rank(3).failed
    assert cluster.rank_memory_bytes(1) == 40e9
    (tmp_path / "full.json").write_text(cluster.model_dump_json())
    assert find_cluster(tmp_path / "full.json") == cluster


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "accelerator: h1o0\nnum_nodes: 2\nranks_per_node: 4\n",
            UnknownNameError,
            "accelerator 'h1o0' is not known",
        ),
        ("accelerator: h100\nnodes: 2\n", SpecError, r"nodes \(2\): .* no such field; did you mean 'num_nodes'\?"),
        (
            "accelerator: h100\nnum_nodes: 1\nranks_per_node: 2\nnic_latency: 8\n",
            SpecError,
            "write it with its unit",
        ),
        ("[1]\n", SpecError, "holds a list; a cluster is a mapping of fields"),
        (
            "accelerator: h100\nnum_nodes: 1\nranks_per_node: 2\nranks: {2: {speed: 0.5}}\n",
            SpecError,
            r"ranks.2 is outside",
        ),
    ],
)
def test_a_wrong_cluster_file_says_what_is_wrong(tmp_path, text, error, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        find_cluster(path)


def test_a_missing_cluster_file_is_named():
    with pytest.raises(InputError, match=r"cannot read nowhere/cluster.yaml"):
        find_cluster("nowhere/cluster.yaml")


def test_specs_read_back_what_they_write():
    for name in accelerator_names():
        cluster = find_cluster(name)
        assert ClusterSpec.parse(json.loads(cluster.model_dump_json()), "test") == cluster


def test_nics_that_ranks_share():
    plain = cluster_for("a100", 2, 8)
    fields = plain.model_dump() | {"nics_per_node": 4}
    shared = ClusterSpec.model_validate(fields)
    assert (plain.ranks_per_nic, shared.ranks_per_nic) == (1, 2)
    assert [shared.resized(4, n).ranks_per_nic for n in (2, 3, 4)] == [2, 1, 2]
    assert ClusterSpec.model_validate_json(shared.resized(4, 3).model_dump_json()).ranks_per_nic == 1
    with pytest.raises(ValueError, match=r"nics_per_node \(3\) does not divide ranks_per_node \(8\); choose a divisor"):
        ClusterSpec.model_validate(fields | {"nics_per_node": 3})
    link = {"source": "node0", "target": "node1", "bandwidth": "1 GB/s", "latency": "1 us"}
    explicit = fields | {"topology": "explicit", "links": [link]}
    with pytest.raises(ValueError, match=r"nics_per_node \(4\) has no place beside explicit links; leave it out"):
        ClusterSpec.model_validate(explicit)
    assert ClusterSpec.model_validate(explicit | {"nics_per_node": None}).ranks_per_nic == 8
