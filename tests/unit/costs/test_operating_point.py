"""The roofline's figures against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeplan.costs.operating_point import INDEPENDENT, layer_costs
from moeplan.costs.roofline import expected_active, internode_bandwidth, token_bytes
from moeplan.errors import SpecError
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import DispatchKind, Objective, Workload
from moeplan.testing.problems import make_problem

GPU = AcceleratorSpec.model_validate(
    {
        "name": "test-gpu",
        "memory": "80 GB",
        "memory_bandwidth": "1000 GB/s",
        "bf16": "100 TFLOPS",
        "fp8": "200 TFLOPS",
        "scale_up_bandwidth": "400 GB/s",
        "scale_up_domain": 8,
        "nic_bandwidth": "50 GB/s",
    }
)
MODEL = ModelSpec(
    name="small",
    num_layers=4,
    moe_layer_ids=(1, 2, 3),
    hidden_size=1000,
    num_experts=16,
    top_k=2,
    expert_intermediate_size=500,
    vocab_size=100,
)


def cluster(**changes: object) -> ClusterSpec:
    return ClusterSpec.model_validate({"accelerator": GPU, "num_nodes": 2, "ranks_per_node": 4, **changes})


def test_prefill_is_arithmetic_bound_and_decode_is_weight_bound() -> None:
    prefill = layer_costs(MODEL, cluster(), Workload(batch_per_rank=65536), Objective())
    # 2 operations x 1.5e6 weights / 100 TFLOPS = 30 ns; activations 2 B x (2000 + 1500) / 800 GB/s = 8.75 ns
    assert prefill.per_pair_s == pytest.approx(38.75e-9, rel=0.01)
    assert prefill.tokens_per_step == 8 * 65536
    decode = layer_costs(MODEL, cluster(), Workload(phase="decode", batch_per_rank=4), Objective())
    assert decode.per_active_expert_s == pytest.approx(3e6 / 800e9, rel=0.01)


def test_copies_cost_bytes_over_bandwidth() -> None:
    costs = layer_costs(MODEL, cluster(), Workload(activation_dtype="fp8"), Objective())
    copy_bytes = 1000 * (1 + 4 / 128) + 2000
    assert costs.per_node_copy_s == pytest.approx(copy_bytes / (4 * 50e9))
    assert costs.per_rank_copy_s == pytest.approx(copy_bytes / 400e9)
    assert costs.exchange_fixed_s == pytest.approx(16e-6)
    stay = layer_costs(MODEL, cluster(), Workload(activation_dtype="bf16"), Objective(return_mode="stay"))
    assert stay.per_rank_copy_s == pytest.approx(2000 / 400e9)


def test_allgather_does_not_depend_on_the_placement() -> None:
    costs = layer_costs(MODEL, cluster(), Workload(batch_per_rank=100), Objective(dispatch="allgather"))
    assert costs.per_node_copy_s == costs.per_rank_copy_s == 0
    # Rings carry all but a rank's own tokens through each node's NICs.
    assert costs.exchange_fixed_s == pytest.approx(16e-6 + 700 * 4000 / 200e9)


def test_failed_ranks_send_nothing() -> None:
    costs = layer_costs(MODEL, cluster(ranks={3: {"failed": True}}), Workload(batch_per_rank=10), Objective())
    assert costs.tokens_per_step == 70


def test_nodes_are_joined_by_what_the_topology_says() -> None:
    assert internode_bandwidth(cluster()) == 200e9
    assert internode_bandwidth(cluster(topology="nvl72")) == 1600e9
    links = [
        {"source": "node0", "target": "switch", "bandwidth": "7 GB/s", "latency": "5 us"},
        {"source": "switch", "target": "node1", "bandwidth": "5 GB/s", "latency": "5 us", "duplex": True},
    ]
    assert internode_bandwidth(cluster(topology="explicit", links=links)) == pytest.approx(5e9)
    # Switches inside the nodes: what enters a node is what passes between the switches, not what leaves the ranks.
    figures = {"bandwidth": "400 GB/s", "latency": "3 us"}
    ranks = [{"source": f"rank{r}", "target": f"sw{r // 4}"} | figures for r in range(8)]
    joined = {"source": "sw0", "target": "sw1", "bandwidth": "10 GB/s", "latency": "8 us"}
    assert internode_bandwidth(cluster(topology="explicit", links=[*ranks, joined])) == pytest.approx(10e9)
    assert internode_bandwidth(cluster(topology="explicit", links=[*ranks, joined, joined])) == pytest.approx(20e9)
    with pytest.raises(SpecError, match=r"links: they do not lead from node 0 to node 1 and back"):
        internode_bandwidth(cluster(topology="explicit", links=ranks))
    with pytest.raises(SpecError, match=r"links: they do not lead from node 0 to node 1 and back"):
        internode_bandwidth(cluster(topology="explicit", links=[*ranks, joined | {"duplex": False}]))


def of_links(nodes: int, ends: list[tuple[str, str, str]]) -> float:
    links = [{"source": a, "target": b, "bandwidth": bandwidth, "latency": "1 us"} for a, b, bandwidth in ends]
    return internode_bandwidth(cluster(num_nodes=nodes, topology="explicit", links=links))


def test_nodes_divide_the_links_they_share() -> None:
    def joined(spine: str, leaves: int = 2, nodes: int = 4) -> float:
        ends = [(f"node{n}", f"leaf{n % leaves}", "400 GB/s") for n in range(nodes)]
        return of_links(nodes, ends + [(f"leaf{n}", "spine", spine) for n in range(leaves)])

    assert joined("4000 GB/s") == pytest.approx(400e9)  # the nodes' own links decide
    # Two of four nodes behind a spine link: two thirds of what each of them takes in crosses it.
    assert joined("40 GB/s") == pytest.approx(40e9 / 2 * 3 / 2)
    assert joined("1 MB/s") == pytest.approx(1e6 / 2 * 3 / 2)
    assert joined("100 GB/s", leaves=4, nodes=16) == pytest.approx(100e9 / 4 * 15 / 12)


def test_a_ring_carries_what_passes_through() -> None:
    # Each way round: to the next node directly, to the opposite one over two links, half by either way.
    found = of_links(4, [(f"node{n}", f"node{(n + 1) % 4}", "30 GB/s") for n in range(4)])
    assert found == pytest.approx(3 * 30e9 / 2)


def test_expected_active_counts_distinct_experts() -> None:
    assert expected_active(2, 2) == pytest.approx(1.5)
    assert expected_active(1, 3) == 1
    assert expected_active(16, 1) == pytest.approx(1)
    assert token_bytes(128, "fp4") == 72


def test_counts_without_tokens_widen_the_interval_where_tokens_decide_what_is_sent() -> None:
    costs = layer_costs(MODEL, cluster(), Workload(), Objective())
    of_counts = costs.of_counts()
    assert costs.relative_error < of_counts.relative_error < costs.relative_error + INDEPENDENT
    assert "choices taken as independent" in of_counts.source["copies of tokens"]
    assert of_counts.of_counts() is of_counts
    known = layer_costs(MODEL, cluster(), Workload(), Objective(dispatch="per_expert"))
    assert known.of_counts() is known
    problem = make_problem(costs=costs)
    assert problem.costs is costs
    assert replace(problem, load=replace(problem.load, trace=None)).costs == of_counts


@pytest.mark.parametrize("dispatch", ["per_node", "allgather"])
def test_a_slow_link_is_in_the_costs_and_said_to_be(dispatch: DispatchKind) -> None:
    objective = Objective(dispatch=dispatch)
    usual = layer_costs(MODEL, cluster(), Workload(), objective)
    slow = layer_costs(MODEL, cluster(ranks={1: {"link_speed": 0.1}}), Workload(), objective)
    assert usual.link_R == ()
    assert slow.link_R == (1.0, 0.1, *[1.0] * 6)
    assert slow.source["links"].startswith("rank 1: 0.1 of the usual")
    if dispatch == "allgather":  # every rank gets every token: the slow link decides
        assert slow.exchange_fixed_s > 1.2 * usual.exchange_fixed_s
    # a failed rank's link is not used
    failed = layer_costs(MODEL, cluster(ranks={1: {"link_speed": 0.1, "failed": True}}), Workload(), objective)
    assert failed.link_R == ()
