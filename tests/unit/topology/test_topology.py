from __future__ import annotations

import time

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.errors import SpecError
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.clusters import cluster_for, cluster_from_mapping
from moeplan.topology import build


def explicit(
    num_ranks: int, links: list[tuple[str, str, str, str]], duplex: bool = True, **more: object
) -> ClusterSpec:
    fields = [
        {"source": a, "target": b, "bandwidth": bandwidth, "latency": latency, "duplex": duplex}
        for a, b, bandwidth, latency in links
    ]
    return cluster_from_mapping(
        {
            "accelerator": "h100",
            "num_nodes": 1,
            "ranks_per_node": num_ranks,
            "topology": "explicit",
            "links": fields,
            **more,
        },
        "test",
    )


def names(route) -> list[str]:
    return [link.source for link in route.links] + [link.target for link in route.links[-1:]]


def test_two_level_keeps_a_node_on_its_switch_and_crosses_nodes_by_nic():
    topology = build(cluster_for("h100", 2, 4))
    assert names(topology.route(0, 3)) == ["rank0", "domain0", "rank3"]
    assert names(topology.route(1, 6)) == ["rank1", "nic1", "spine", "nic6", "rank6"]
    assert topology.bandwidth_RR[0, 3] == 450e9
    assert topology.bandwidth_RR[1, 6] == 50e9  # 400 Gbit/s
    assert topology.latency_RR[0, 3] == pytest.approx(3e-6)
    assert topology.latency_RR[1, 6] == pytest.approx(8e-6)
    assert topology.domain_of_rank == (0, 0, 0, 0, 1, 1, 1, 1)


def test_neighbours_share_a_nic_that_is_as_wide_as_all_of_theirs():
    shared = cluster_for("h100", 2, 4).model_copy(update={"nics_per_node": 2})
    topology = build(shared)
    assert names(topology.route(1, 6)) == ["rank1", "nic0", "spine", "nic3", "rank6"]
    assert names(topology.route(0, 1)) == ["rank0", "domain0", "rank1"]
    assert (topology.bandwidth_RR[1, 6], topology.latency_RR[1, 6]) == (2 * 50e9, pytest.approx(8e-6))
    rails = build(shared.model_copy(update={"topology": "rail-optimised"}))
    assert names(rails.route(1, 4)) == ["rank1", "nic0", "rail0", "nic2", "rank4"]
    one_lost, both_lost = (
        build(shared.model_copy(update={"ranks": {r: RankSpec(failed=True) for r in lost}})) for lost in ([0], [0, 1])
    )
    assert names(one_lost.route(1, 4)) == ["rank1", "nic0", "spine", "nic2", "rank4"]
    assert "nic0" not in {link.source for link in both_lost.links}


def test_flat_has_one_switch():
    topology = build(cluster_for("h100", 2, 4, "flat"))
    assert set(topology.domain_of_rank) == {0}
    assert names(topology.route(0, 7)) == ["rank0", "domain0", "rank7"]


def test_rails_join_equal_local_ranks_and_the_spine_joins_rails():
    topology = build(cluster_for("h100", 2, 4, "rail-optimised"))
    assert names(topology.route(2, 6)) == ["rank2", "nic2", "rail2", "nic6", "rank6"]
    assert names(topology.route(2, 7)) == ["rank2", "nic2", "rail2", "spine", "rail3", "nic7", "rank7"]
    assert topology.latency_RR[2, 7] == pytest.approx(2 * topology.latency_RR[2, 6])
    assert topology.graph.edges["rail2", "spine"]["bandwidth_bytes_per_s"] == 2 * 50e9


def test_nvl72_domains_span_trays_and_meet_by_nic():
    topology = build(cluster_for("gb200", 36, 4, "nvl72"))
    assert topology.domain_of_rank == (0,) * 72 + (1,) * 72
    assert names(topology.route(0, 71)) == ["rank0", "domain0", "rank71"]
    assert names(topology.route(0, 72)) == ["rank0", "nic0", "spine", "nic72", "rank72"]
    one_box = build(cluster_for("gb200", 1, 144, "nvl72"))
    assert names(one_box.route(0, 72)) == ["rank0", "nic0", "spine", "nic72", "rank72"]


def test_a_node_with_several_domains_joins_them_through_its_host():
    topology = build(cluster_for("h100-pcie", 2, 4))
    assert topology.domain_of_rank == (0, 0, 1, 1, 2, 2, 3, 3)
    assert names(topology.route(0, 1)) == ["rank0", "domain0", "rank1"]
    assert names(topology.route(0, 2)) == ["rank0", "host0", "rank2"]
    assert topology.bandwidth_RR[0, 2] == 64e9
    assert names(topology.route(0, 5)) == ["rank0", "nic0", "spine", "nic5", "rank5"]


def test_explicit_links_are_directed_and_ranks_pass_on():
    topology = build(
        explicit(
            3,
            [
                ("rank0", "rank1", "10 GB/s", "1 us"),
                ("rank1", "rank2", "4 GB/s", "1 us"),
                ("rank2", "rank0", "9 GB/s", "1 us"),
            ],
            duplex=False,
        )
    )  # fmt: skip
    assert names(topology.route(0, 2)) == ["rank0", "rank1", "rank2"]
    assert names(topology.route(2, 1)) == ["rank2", "rank0", "rank1"]
    assert topology.bandwidth_RR[0, 2] == 4e9


def test_equal_routes_go_by_the_first_name_in_natural_order():
    links = [(rank, switch, "1 GB/s", "1 us") for switch in ("s10", "s9") for rank in ("rank0", "rank1")]
    assert names(build(explicit(2, links)).route(0, 1)) == ["rank0", "s9", "rank1"]
    assert names(build(explicit(2, links[::-1])).route(0, 1)) == ["rank0", "s9", "rank1"]


def test_fewer_links_win_at_equal_latency():
    links = [
        ("rank0", "a", "1 GB/s", "1 us"),
        ("a", "rank1", "1 GB/s", "1 us"),
        ("rank0", "rank1", "1 GB/s", "2 us"),
    ]
    assert names(build(explicit(2, links)).route(0, 1)) == ["rank0", "rank1"]


def test_failed_ranks_have_no_links():
    topology = build(cluster_for("h100", 2, 2).model_copy(update={"ranks": {1: RankSpec(failed=True)}}))
    assert topology.graph.degree("rank1") == 0
    assert topology.bandwidth_RR[1].tolist() == [0.0] * 4
    assert np.isinf(topology.latency_RR[:, 1]).all()
    with pytest.raises(SpecError, match="rank 1 has failed"):
        topology.route(0, 1)


def test_ranks_that_are_not_connected_are_named():
    with pytest.raises(SpecError, match=r"no route from rank 0 to rank 1 \(4 pairs"):
        build(explicit(3, [("rank1", "rank2", "1 GB/s", "1 us")]))
    with pytest.raises(SpecError, match=r"links.0 names rank7, but the cluster has ranks 0..1"):
        build(explicit(2, [("rank0", "rank7", "1 GB/s", "1 us")]))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_routes_are_shortest_paths_and_loads_follow_them(data):
    num_ranks = data.draw(st.integers(2, 5))
    vertices = [f"rank{r}" for r in range(num_ranks)] + ["s1", "s2"]
    extra = data.draw(st.lists(st.tuples(st.sampled_from(vertices), st.sampled_from(vertices)), max_size=6))
    pairs = {(f"rank{r}", f"rank{r + 1}") for r in range(num_ranks - 1)} | {
        tuple(sorted(p)) for p in extra if p[0] != p[1]
    }
    links = [
        (a, b, f"{data.draw(st.integers(1, 9))} GB/s", f"{data.draw(st.integers(0, 4))} us")
        for a, b in sorted(pairs)
    ]
    topology = build(explicit(num_ranks, links))
    rng = np.random.default_rng(0)
    traffic = rng.integers(0, 100, (num_ranks, num_ranks)).astype(float)
    loads = dict.fromkeys(((link.source, link.target) for link in topology.links), 0.0)
    lengths = dict(nx.all_pairs_dijkstra_path_length(topology.graph, weight="latency_s"))
    for a in range(num_ranks):
        for b in range(num_ranks):
            route = topology.route(a, b)
            assert topology.latency_RR[a, b] == pytest.approx(lengths[f"rank{a}"][f"rank{b}"])
            assert route.latency_s == pytest.approx(sum(link.latency_s for link in route.links))
            if a != b:
                assert names(route)[0] == f"rank{a}"
                assert names(route)[-1] == f"rank{b}"
                assert all(x.target == y.source for x, y in zip(route.links, route.links[1:], strict=False))
                assert route.bandwidth_bytes_per_s == min(link.bandwidth_bytes_per_s for link in route.links)
            for link in route.links:
                loads[link.source, link.target] += traffic[a, b]
    assert (topology.incidence @ traffic.ravel()).tolist() == pytest.approx(list(loads.values()))


@pytest.mark.parametrize(
    "cluster",
    [cluster_for("h100", 32, 8, "rail-optimised"), cluster_for("gb200", 36, 4, "nvl72")],
    ids=["rails", "nvl72"],
)
def test_large_clusters_are_built_sooner_than_asked_for_every_route(cluster):
    begun = time.perf_counter()
    topology = build(cluster)
    built = time.perf_counter()
    for a, b in np.ndindex(topology.num_ranks, topology.num_ranks):
        topology.route(a, b)
    assert built - begun < time.perf_counter() - built
