"""Exchange: tables of known fixed part and bandwidth, and copies counted by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.exchange import PathCosts, balanced_copies, engine_dispatch, exchange_costs, mode_of
from moeplan.errors import InputError
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.model import Dtype, ModelSpec
from moeplan.specs.workload import DispatchKind, Phase

META = ProfileMeta(name="toy", accelerator="toy", date="2026-11-22", command="none")
GPU = AcceleratorSpec.model_validate(
    {
        "name": "toy",
        "memory": "80 GB",
        "memory_bandwidth": "1000 GB/s",
        "bf16": "100 TFLOPS",
        "scale_up_bandwidth": "400 GB/s",
        "scale_up_domain": 8,
        "nic_bandwidth": "50 GB/s",
    }
)
MODEL = ModelSpec(
    name="toy",
    num_layers=1,
    moe_layer_ids=(0,),
    hidden_size=1024,
    num_experts=64,
    top_k=4,
    expert_intermediate_size=32,
    vocab_size=10,
)


def cluster(nodes: int) -> ClusterSpec:
    return ClusterSpec.model_validate({"accelerator": GPU, "num_nodes": nodes, "ranks_per_node": 8})


def profile(nodes: list[int], mode: str = "normal", hidden: int = 1024) -> HardwareProfile:
    """Dispatch takes nodes x (10 us + 0.1 us a token), combine twice that."""
    rows = [
        {
            "mode": mode,
            "phase": phase,
            "nodes": n,
            "ranks": 8 * n,
            "hidden": hidden,
            "top_k": 4,
            "num_experts": 64,
            "dtype": dtype,
            "tokens_per_rank": tokens,
            "backend": "b",
            "kernel": "k",
            "source": "s",
            "latency_us": factor * n * (10 + 0.1 * tokens),
        }
        for n in nodes
        for phase, dtype, factor in (("dispatch", "fp8", 1), ("combine", "bf16", 2))
        for tokens in (1, 4, 16, 64, 256, 1024, 4096)
    ]
    return HardwareProfile(META, {"alltoall": pa.Table.from_pylist(rows)})


def test_even_choices_touch_as_many_places_as_sampling_says() -> None:
    rng = np.random.default_rng(0)
    picks = rng.integers(0, 16, (40000, 4))  # ranks; 4 to a node
    home = rng.integers(0, 16, 40000)
    pairs = (picks // 4 != home[:, None] // 4).sum(1).mean()
    distinct_nodes = np.array([len({*row}) for row in (picks // 4).tolist()])
    own = (picks // 4 == home[:, None] // 4).any(1)
    nodes, ranks = balanced_copies("per_node", 4, 16, 4)
    assert nodes == pytest.approx((distinct_nodes - own).mean(), rel=0.01)
    assert balanced_copies("per_expert", 4, 16, 4) == (pytest.approx(pairs, rel=0.01), pytest.approx(4 * 15 / 16))
    distinct_ranks = np.array([len({*row}) for row in picks.tolist()]) - (picks == home[:, None]).any(1)
    assert ranks == pytest.approx(distinct_ranks.mean(), rel=0.01)


def test_the_mode_follows_dispatch_and_phase() -> None:
    assert mode_of("per_expert", "decode") == "low_latency"
    assert mode_of("per_expert", "prefill") == "flat"
    assert engine_dispatch("per_expert", "prefill") == "per_node"
    assert engine_dispatch("per_expert", "decode") == "per_expert"
    assert engine_dispatch("per_rank", "prefill") == "per_rank"
    assert mode_of("per_node", "decode") == "normal"
    assert mode_of("per_rank", "prefill") == "nvlink"


def test_measured_times_are_answered_and_skew_scales_what_is_not_fixed() -> None:
    costs = exchange_costs(MODEL, cluster(2), "per_node", "prefill", "fp8", profile=profile([1, 2]))
    between = costs.between
    assert between is not None
    assert between.source.startswith("measured: s (k)")
    assert between.fixed_s == pytest.approx(60e-6, rel=1e-6)
    assert between.balanced_s(256) == pytest.approx((60 + 0.6 * 256) * 1e-6)
    assert between.balanced_s(8192) == pytest.approx((60 + 0.6 * 8192) * 1e-6)
    nodes, ranks = balanced_copies("per_node", 4, 16, 2)
    even = costs.time_s(4096, nodes, ranks)
    assert even == pytest.approx((60 + 0.6 * 4096) * 1e-6)
    # t0 + alpha (T - t0) with twice the copies into the busiest node
    assert costs.time_s(4096, 2 * nodes, ranks) == pytest.approx((60 + 2 * 0.6 * 4096) * 1e-6)
    # and the path inside the node rules when its ranks are the busy ones
    _, local = balanced_copies("per_node", 4, 8, 1)
    assert costs.time_s(4096, 0.0, 10 * local) == pytest.approx((30 + 10 * 0.3 * 4096) * 1e-6)


def test_a_wider_token_or_type_costs_its_bytes() -> None:
    costs = exchange_costs(MODEL, cluster(1), "per_node", "prefill", "bf16", profile=profile([1], hidden=512))
    assert costs.between is None
    assert costs.inside.extrapolated
    dispatch = 0.1 * 2 * 2 / (1 + 4 / 128)
    assert costs.inside.balanced_s(1024) == pytest.approx((30 + (dispatch + 0.4) * 1024) * 1e-6)


@pytest.mark.parametrize(("wanted", "factor"), [("bf16", 3.0), ("fp8", 1.0), ("fp4", 1.0)])
def test_types_of_one_kernel_are_not_mixed(wanted: Dtype, factor: float) -> None:
    rows = profile([1]).select("alltoall").to_pylist()
    rows = [row | {"dtype": "fp8"} for row in rows]
    slow = [row | {"dtype": "bf16", "latency_us": 3 * row["latency_us"]} for row in rows]
    for order in (rows + slow, slow + rows):
        both = HardwareProfile(META, {"alltoall": pa.Table.from_pylist(order)})
        inside = exchange_costs(MODEL, cluster(1), "per_node", "prefill", wanted, profile=both).inside
        assert inside.fixed_s == pytest.approx(factor * 30e-6)  # fp4: the nearest that was measured


def test_where_a_kernel_bends_time_follows_bytes() -> None:
    """Flat up to 256 tokens, then rising: with token copies of twice the bytes it rises from 128 on."""
    rows = [
        row | {"latency_us": max(20.0, 0.1 * row["tokens_per_rank"]), "dtype": "bf16"}
        for row in profile([1], hidden=512).select("alltoall").to_pylist()
    ]
    bent = HardwareProfile(META, {"alltoall": pa.Table.from_pylist(rows)})
    inside = exchange_costs(MODEL, cluster(1), "per_node", "prefill", "bf16", profile=bent).inside
    assert inside.balanced_s(32) == pytest.approx(2 * 20e-6)
    assert inside.balanced_s(128) == pytest.approx(2 * 25.6e-6)
    assert inside.balanced_s(1024) == pytest.approx(2 * 204.8e-6)


def test_other_node_counts_come_from_the_nearest() -> None:
    costs = exchange_costs(MODEL, cluster(3), "per_node", "prefill", "fp8", profile=profile([1, 2]))
    assert costs.between is not None
    assert costs.between.extrapolated
    assert "16 ranks" in costs.between.source
    assert costs.between.relative_error > costs.inside.relative_error


def between(profile: HardwareProfile, nodes: int, model: ModelSpec = MODEL) -> PathCosts:
    found = exchange_costs(model, cluster(nodes), "per_node", "prefill", "fp8", profile=profile).between
    assert found is not None
    return found


def test_errors_are_what_curves_of_the_kernel_miss() -> None:
    """Straight lines are told exactly; where points scatter by 20 %, so is the error. Of other machine sizes, what
    these miss of each other: times here go with the nodes, more than copies do."""
    alike = 0.135
    assert between(profile([2, 4]), 2).relative_error == pytest.approx(alike)
    rng = np.random.default_rng(0)
    noisy = [
        row | {"latency_us": row["latency_us"] * float(np.exp(0.2 * rng.standard_normal()))}
        for row in profile([2, 4]).select("alltoall").to_pylist()
    ]
    scattered = between(HardwareProfile(META, {"alltoall": pa.Table.from_pylist(noisy)}), 2).relative_error
    assert 0.2 < scattered < 0.6
    farther = between(profile([2, 4]), 8).relative_error
    copies = {n: balanced_copies("per_node", 4, 8 * n, n)[0] for n in (2, 4)}
    tokens = np.array([1, 4, 16, 64, 256, 1024, 4096])
    missed = [
        np.abs(known * (10 + 0.1 * tokens * copies[asked] / copies[known]) / (asked * (10 + 0.1 * tokens)) - 1)
        for known, asked in ((2, 4), (4, 2))
    ]
    assert farther == pytest.approx(np.hypot(np.quantile(np.concatenate(missed), 0.9), alike))
    # One other size alone tells nothing of how far off another is.
    assert between(profile([2]), 4).relative_error == pytest.approx(np.hypot(0.3, alike))


def test_errors_of_another_shape_are_what_shapes_miss_of_each_other() -> None:
    narrow, wide = (profile([2], hidden=hidden).select("alltoall").to_pylist() for hidden in (1024, 2048))
    slow = [row | {"latency_us": 1.5 * row["latency_us"]} for row in wide]
    both = HardwareProfile(META, {"alltoall": pa.Table.from_pylist(narrow + slow)})
    widest = MODEL.model_copy(update={"hidden_size": 4096})
    assert between(both, 2).relative_error == pytest.approx(0.135)
    assert 0.2 < between(both, 2, widest).relative_error < 0.7
    assert between(both, 2, widest).extrapolated


def test_kinds_that_a_kernel_does_not_send_are_scaled_by_their_copies() -> None:
    per_node = exchange_costs(MODEL, cluster(2), "per_node", "prefill", "fp8", profile=profile([1, 2]))
    per_expert = exchange_costs(MODEL, cluster(2), "per_expert", "prefill", "fp8", profile=profile([1, 2]))
    merged, every = (balanced_copies(kind, 4, 16, 2) for kind in ("per_node", "per_expert"))  # type: ignore[arg-type]
    assert every[0] > 2 * merged[0]
    fixed = 60e-6
    expected = fixed + (per_node.time_s(4096, *merged) - fixed) * every[0] / merged[0]
    assert per_expert.time_s(4096, *every) == pytest.approx(expected)
    assert per_expert.between is not None
    assert per_expert.between.extrapolated
    assert per_expert.between.source.endswith("sent per node")
    # Inside a node copies per node go to each of its ranks once.
    per_rank = exchange_costs(MODEL, cluster(1), "per_rank", "prefill", "fp8", profile=profile([1]))
    assert per_rank.inside.source.startswith("measured")


def test_sizes_and_machines_beyond_the_measured_ones_say_so() -> None:
    path = between(profile([1, 2]), 2)
    assert path.told(4096.0) == (path.relative_error, False)
    assert path.told(4097.0) == (0.5, True)
    small = ClusterSpec.model_validate({"accelerator": GPU, "num_nodes": 1, "ranks_per_node": 4})
    inside = exchange_costs(MODEL, small, "per_node", "prefill", "fp8", profile=profile([1])).inside
    assert (inside.extrapolated, "8 ranks" in inside.source) == (True, True)


def test_copied_numbers_are_called_so() -> None:
    rows = [row | {"mark": "copied"} for row in profile([2]).select("alltoall").to_pylist()]
    path = between(HardwareProfile(META, {"alltoall": pa.Table.from_pylist(rows)}), 2)
    assert "copied from another system" in path.source
    assert path.relative_error > between(profile([2]), 2).relative_error


@pytest.mark.parametrize("dispatch", ["per_node", "per_rank", "per_expert", "allgather"])
def test_one_rank_sends_nothing(dispatch: DispatchKind) -> None:
    alone = ClusterSpec.model_validate({"accelerator": GPU, "num_nodes": 1, "ranks_per_node": 1})
    for measured in (None, profile([1])):
        costs = exchange_costs(MODEL, alone, dispatch, "decode", "fp8", profile=measured)
        assert costs.time_s(64, 0.0, 0.0) == costs.time_s(10**6, 3.0, 3.0) == 0.0


def test_an_all_gather_takes_what_the_collectives_were_measured_to_take() -> None:
    rows = [
        {"op": op, "dtype": "bf16", "ranks": 8, "nodes": 1, "message_size_bytes": size, "backend": "nccl",
         "kernel": "NCCL", "source": "s", "latency_us": 10 + factor * size / 2**20}
        for op, factor in (("all_gather", 1), ("reduce_scatter", 2)) for size in (2**12, 2**16, 2**20, 2**24, 2**28)
    ]  # fmt: skip
    nccl = HardwareProfile(META, {"collectives": pa.Table.from_pylist(rows)})
    costs = exchange_costs(MODEL, cluster(1), "allgather", "prefill", "bf16", profile=nccl)
    megabytes = 8 * 1000 * 2 * 1024 / 2**20
    assert costs.time_s(1000, 0.0, 7.0) == pytest.approx((20 + 3 * megabytes) * 1e-6, rel=0.05)
    assert not costs.inside.extrapolated
    # More ranks than were measured together: the links.
    assert exchange_costs(MODEL, cluster(2), "allgather", "prefill", "bf16", profile=nccl).between.extrapolated  # type: ignore[union-attr]


def test_ranks_of_a_node_without_a_common_network_meet_through_its_host() -> None:
    pairs = GPU.model_copy(update={"scale_up_domain": 2, "pcie_bandwidth": 32e9})
    box = ClusterSpec.model_validate({"accelerator": pairs, "num_nodes": 1, "ranks_per_node": 8})
    _, copies = balanced_copies("per_rank", 4, 8, 1)
    slow, quick = (
        exchange_costs(MODEL, of, "per_rank", "prefill", "bf16").time_s(10**5, 0.0, copies) for of in (box, cluster(1))
    )
    assert slow == pytest.approx(quick * 400 / 32, rel=0.01)
    sums = [CollectiveCosts(of).seconds("all_reduce", 8, 2**28).total for of in (box, cluster(1))]
    assert sums[0] == pytest.approx(sums[1] * 400 / 32, rel=0.01)
    assert CollectiveCosts(box).seconds("all_reduce", 2, 2**28).total < sums[1]


def test_several_racks_are_not_one_network() -> None:
    rack = GPU.model_copy(update={"scale_up_domain": 8})
    shape = {"accelerator": rack, "ranks_per_node": 4, "topology": "nvl72"}
    one, two = (ClusterSpec.model_validate({**shape, "num_nodes": nodes}) for nodes in (2, 4))
    assert exchange_costs(MODEL, one, "per_rank", "decode", "bf16").between is None
    with pytest.raises(InputError, match=r"nvl72\) joins scale_up_domain \(8\) ranks, but .* 16, several racks"):
        exchange_costs(MODEL, two, "per_rank", "decode", "bf16")


def test_of_kernels_in_several_types_the_wanted_width_is_compared() -> None:
    """In bf16 one kernel takes 1.5 times as long as the other in fp4: per byte it is the quicker one."""
    rows = profile([1]).select("alltoall").to_pylist()
    narrow = [row | {"dtype": "nvfp4", "kernel": "narrow"} for row in rows]
    wide = [row | {"dtype": "bf16", "kernel": "wide", "latency_us": 1.5 * row["latency_us"]} for row in rows]
    for wanted, serves in (("bf16", "wide"), ("fp4", "wide")):
        table = HardwareProfile(META, {"alltoall": pa.Table.from_pylist(narrow + wide)})
        inside = exchange_costs(MODEL, cluster(1), "per_node", "prefill", wanted, profile=table).inside  # type: ignore[arg-type]
        assert f"({serves})" in inside.source


@pytest.mark.parametrize(
    ("dispatch", "phase"), [("per_node", "prefill"), ("per_expert", "decode"), ("per_rank", "decode")]
)
def test_an_own_measured_exchange_serves_every_dispatch(dispatch: DispatchKind, phase: Phase) -> None:
    """Its copies go per (token, expert), in one type both ways: here bf16 out and back."""
    rows = [row | {"dtype": "bf16", "ranks": 8} for row in profile([1], "flat").select("alltoall").to_pylist()]
    skewed = [row | {"distribution": "explicit", "latency_us": 9e9} for row in rows]
    fewer = [row | {"ranks": 2, "latency_us": 1.0} for row in rows]
    own = HardwareProfile(META, {"alltoall": pa.Table.from_pylist([*rows, *skewed, *fewer])})
    costs = exchange_costs(MODEL, cluster(1), dispatch, phase, "bf16", profile=own)
    own_kind = dispatch == "per_expert"
    assert costs.inside.source.startswith("measured: s (k)" if own_kind else "modelled from the nearest: s (k)")
    assert costs.inside.source.endswith(", sent per expert") is not own_kind
    assert costs.inside.extrapolated is not own_kind
    assert costs.inside.balanced_s(256) == pytest.approx((30 + 0.3 * 256) * 1e-6)
    assert costs.inside.copies_per_token == balanced_copies("per_expert", 4, 8, 1)[1]


def own_profile(*modes: str, nodes: int = 2) -> HardwareProfile:
    """As the profiler measures: bf16 both ways; two levels take a third of what flat does."""
    rows = [
        row | {"dtype": "bf16", "latency_us": row["latency_us"] / (3 if mode == "two_level" else 1)}
        for mode in modes
        for row in profile([nodes], mode).select("alltoall").to_pylist()
    ]
    return HardwareProfile(META, {"alltoall": pa.Table.from_pylist(rows)})


def costs_of(dispatch: DispatchKind, measured: HardwareProfile, nodes: int = 2) -> PathCosts:
    found = exchange_costs(MODEL, cluster(nodes), dispatch, "prefill", "bf16", profile=measured).between
    assert found is not None
    return found


def test_an_exchange_measured_on_two_levels_is_what_copies_per_node_take() -> None:
    flat, both = own_profile("flat"), own_profile("flat", "two_level", "normal")
    before, now = costs_of("per_node", flat), costs_of("per_node", both)
    assert "two-level" not in before.source
    assert before.extrapolated
    assert now.source == "measured: s (k, two-level) dispatch, s (k, two-level) combine, 16 ranks"
    assert not now.extrapolated
    assert now.copies_per_token == balanced_copies("per_node", 4, 16, 2)[0]
    assert now.balanced_s(256) == pytest.approx((60 + 0.6 * 256) / 3 * 1e-6)
    # Copies per expert go as they did.
    for dispatch in ("per_expert", "per_rank"):
        was, still = (costs_of(dispatch, measured) for measured in (own_profile("flat", "normal"), both))
        assert (still.source, still.balanced_s(256)) == (was.source, was.balanced_s(256))


def test_two_levels_of_other_groups_tell_nothing() -> None:
    measured = own_profile("flat", "two_level", nodes=4)
    assert costs_of("per_node", measured, 2).source == costs_of("per_node", own_profile("flat", nodes=4), 2).source
    assert "two-level" in costs_of("per_node", measured, 4).source


@pytest.mark.parametrize("mode", ["two_level", "normal"])
def test_of_another_top_k_bytes_go_with_the_copies_that_are_sent(mode: str) -> None:
    """Of 8 choices instead of 4 hardly more fall on the other of two nodes: 0.996 copies a token, not 0.9375."""
    wider = MODEL.model_copy(update={"top_k": 8})
    found = exchange_costs(wider, cluster(2), "per_node", "prefill", "bf16", profile=own_profile(mode)).between
    assert found is not None
    copies, known = (balanced_copies("per_node", top_k, 16, 2)[0] for top_k in (8, 4))
    assert found.copies_per_token == copies
    part = 3 if mode == "two_level" else 1
    assert found.balanced_s(256) == pytest.approx((60 + 0.6 * 256 * copies / known) / part * 1e-6)
    assert found.source.startswith("modelled from the nearest")


def test_without_a_table_bytes_go_over_the_links() -> None:
    costs = exchange_costs(MODEL, cluster(2), "per_node", "prefill", "bf16", profile=profile([1, 2], "low_latency"))
    assert costs.between is not None
    assert costs.between.source == "roofline of toy"
    nodes, _ = balanced_copies("per_node", 4, 16, 2)
    assert costs.between.balanced_s(1000) == pytest.approx(16e-6 + 1000 * nodes * 4096 / 50e9)
