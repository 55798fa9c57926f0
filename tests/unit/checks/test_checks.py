from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.checks import Bundle, Finding, layers_by_position, require, run_checks
from moeplan.errors import InfeasibleError, InputError, PlanError, SpecError, TraceError
from moeplan.specs.cluster import RankSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import Workload

MODEL = ModelSpec(
    name="toy",
    num_layers=4,
    moe_layer_ids=(1, 2, 3),
    hidden_size=8,
    num_experts=8,
    top_k=2,
    expert_intermediate_size=8,
    vocab_size=10,
)


def load(layer_ids=(1, 2, 3), experts=8, top_k=2, **more) -> ExpertLoad:
    counts = np.ones((1, len(layer_ids), experts))
    return ExpertLoad(load_WLE=counts, windows=("all",), layer_ids=tuple(layer_ids), top_k=top_k, **more)


def bundle(**change) -> Bundle:
    fields = {
        "model": MODEL,
        "cluster": cluster_for("h100", 2, 2),
        "workload": Workload(),
        "load": load(),
        "num_ranks": 4,
        "num_nodes": 2,
        "num_redundant": 0,
        "slots_R": np.array([2, 2, 2, 2]),
    }
    return Bundle(**{**fields, **change})


def placement(experts=8, layers=3, ranks=4, per_node=2) -> Placement:
    return Placement(
        physical_to_logical_LP=np.tile(np.arange(experts, dtype=np.int32), (layers, 1)),
        rank_of_slot_P=np.repeat(np.arange(ranks, dtype=np.int32), experts // ranks),
        num_experts=experts,
        num_ranks=ranks,
        ranks_per_node=per_node,
    )


@dataclass
class Memory:
    rank: int
    memory_bytes: float
    expert_bytes: float
    other_weight_bytes: float
    workspace_bytes: float = 0.0


def test_inputs_that_fit_have_no_findings():
    assert (
        run_checks(
            bundle(current=placement(), current_layer_ids=(1, 2, 3), target="sglang", equal_slots=True)
        )
        == []
    )
    assert require(run_checks(bundle())) == []
    bare = Bundle(model=MODEL, cluster=cluster_for("h100", 2, 2), workload=Workload())
    assert run_checks(bare) == []


ONE_DECODE = RoutingTrace(
    experts_TLK=np.tile(np.array([0, 1]), (1, 3, 1)),
    num_experts=8,
    layer_ids=(1, 2, 3),
    phase_T=np.array([1], np.uint8),
)
FAILED = cluster_for("h100", 2, 2).model_copy(update={"ranks": {1: RankSpec(failed=True)}})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"load": load(experts=64)},
            TraceError,
            r"trace num_experts \(64\) is not toy's \(8\); it is a trace of another",
        ),
        ({"load": load(top_k=6)}, TraceError, r"trace top_k \(6\) is not toy's \(2\)"),
        ({"load": load((1, 3))}, TraceError, r"trace lacks 1 of toy's 3 MoE layers, 2;"),
        (
            {"load": load((1, 2, 7))},
            TraceError,
            r"trace layers 7 are not MoE layers of toy, which are 1, 2, 3",
        ),
        ({"load": load((1, 2, 2))}, TraceError, r"trace names layer 2 twice"),
        ({"load": load((1, 3, 2))}, TraceError, r"moe_layers do not rise"),
        (
            {"load": load(range(27))},
            TraceError,
            r"trace has 27 layers, numbered from 0, but toy has 3 MoE layers, 1, 2, 3; it is",
        ),
        (
            {"load": load(trace=ONE_DECODE)},
            SpecError,
            r"workload.phase \(prefill\): the trace holds no such tokens",
        ),
        ({"num_ranks": 8}, SpecError, r"--ranks \(8\) differs from the cluster's 4 ranks \(2 nodes x 2\)"),
        ({"num_ranks": 5}, SpecError, r"--ranks \(5\) is not a multiple of --nodes \(2\)"),
        ({"num_nodes": 1}, SpecError, r"--nodes \(1\) differs from the cluster's num_nodes \(2\)"),
        ({"num_redundant": -2}, SpecError, r"--redundant \(-2\) is negative"),
        ({"slots_R": np.array([8])}, SpecError, r"slots are given for 1 ranks, but the cluster has 4"),
        ({"slots_R": np.array([-1, 3, 3, 3])}, SpecError, r"ranks.0.slots \(-1\) is negative"),
        ({"cluster": FAILED}, SpecError, r"rank 1 has failed but is given 2 slots"),
        (
            {"slots_R": np.array([1, 2, 2, 2])},
            InfeasibleError,
            r"7 slots on 4 ranks are fewer than toy's 8 experts by 1",
        ),
        (
            {"current": placement(experts=4)},
            PlanError,
            r"--current num_experts \(4\) differs from that of toy \(8\)",
        ),
        (
            {"current": placement(layers=2)},
            PlanError,
            r"--current number of layers \(2\) differs from that of toy \(3\)",
        ),
        (
            {"current": placement(ranks=2, per_node=2)},
            PlanError,
            r"--current num_ranks \(2\) .* the cluster \(4\)",
        ),
        (
            {"current": placement(per_node=4)},
            PlanError,
            r"--current ranks_per_node \(4\) .* the cluster \(2\)",
        ),
        (
            {"current": placement(), "current_layer_ids": (0, 1, 2)},
            PlanError,
            r"--current layer_ids \(0, 1, 2\) differ from toy's MoE layers \(1, 2, 3\)",
        ),
        (
            {"target": "sglang", "equal_slots": True, "slots_R": np.array([3, 2, 2, 2])},
            SpecError,
            r"gives every rank as many slots, but 9 slots do not divide over 4 ranks; add 3 to --redundant",
        ),
        (
            {"target": "megatron", "equal_slots": True, "slots_R": np.array([3, 2, 2, 2])},
            SpecError,
            r"9 slots do not divide over 4 ranks; choose --ranks that divide 9",
        ),
        (
            {"target": "sglang", "equal_slots": True, "slots_R": np.array([3, 1, 2, 2])},
            SpecError,
            r"sglang gives every rank as many slots, but they have 1 to 3; plan without a target",
        ),
        (
            {"memory": [Memory(0, 80 * 2**30, 90 * 2**30, 10 * 2**30)]},
            InfeasibleError,
            r"rank 0: memory \(80.0 GiB\) holds experts \(90.0 GiB\).*: experts alone exceed it by 20.0 GiB",
        ),
        (
            {"memory": [Memory(0, 80 * 2**30, 10 * 2**30, 10 * 2**30, 81 * 2**30)]},
            InfeasibleError,
            r"workspace \(81.0 GiB\): workspace alone exceeds it; use a smaller --batch-per-rank",
        ),
        (
            {"memory": [Memory(0, 80 * 2**30, 42 * 2**30, 60 * 2**30)]},
            InfeasibleError,
            r"exceed it by 22.0 GiB; use more --ranks or a smaller --dtype",  # no slot beside the other weights
        ),
        (
            {"memory": [Memory(r, 80 * 2**30, 79 * 2**30, 10 * 2**30) for r in range(4)]},
            InfeasibleError,
            r"experts and a split of the others exceed it by 1.5 GiB; use --ranks 8 or more, or a smaller --dtype",
        ),
        (
            {"target": "megatron", "equal_slots": True, "num_redundant": 4},
            SpecError,
            r"megatron holds every expert once, but --redundant is 4; give --redundant 0",
        ),
        (
            {"target": "deepspeed", "model": MODEL.model_copy(update={"n_group": 4, "topk_group": 2})},
            SpecError,
            r"deepspeed renumbers experts, and toy routes a token to 2 of 4 groups .* leave --target out, or plan for",
        ),
    ],
)
def test_each_way_to_be_wrong_is_one_clear_error(change, kind, message):
    findings = run_checks(bundle(**change))
    errors = [f for f in findings if f.severity == "error"]
    assert len(errors) == 1
    with pytest.raises(kind, match=message):
        require(findings)


def test_groups_that_a_token_may_all_go_to_limit_no_permutation():
    open_to_all = MODEL.model_copy(update={"n_group": 4, "topk_group": 4})
    assert not run_checks(bundle(target="megatron", model=open_to_all))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"load": load((0, 1, 2))},
            "trace numbers its layers 0..2; they are taken as toy's MoE layers 1..3 in order",
        ),
        ({"slots_R": np.array([9, 2, 2, 2])}, "rank 0 has 9 slots for 8 experts"),
        (
            {
                "cluster": cluster_for("h100", 1, 32),
                "num_ranks": 32,
                "num_nodes": 1,
                "slots_R": np.ones(32, int),
            },
            "ranks_per_node (32) is more than a node of H100-SXM-80GB holds (8)",
        ),
        ({"cluster": FAILED, "slots_R": np.array([4, 0, 2, 2])}, "rank 1 has failed and holds nothing"),
        (
            {"memory": [Memory(r, 80e9, 60e9, 40e9) for r in range(4)]},
            "whole they exceed it by 18.6 GiB; use --ranks 8 or more, or a smaller --dtype",
        ),
        (
            {"memory": [Memory(r, 80e9, 60e9, 40e9) for r in range(4)], "num_redundant": 8, "slots_R": np.full(4, 4)},
            "18.6 GiB; use fewer --redundant, --ranks 8 or more, or a smaller --dtype",
        ),
    ],
)
def test_what_a_person_should_know_is_a_warning(change, message):
    warnings = require(run_checks(bundle(**change)))
    assert len(warnings) == 1
    assert message in warnings[0]


def test_ranks_left_without_a_slot_are_told():
    found = require(run_checks(bundle(slots_R=np.array([4, 4, 0, 0]))))
    assert "2 working ranks have no slot and compute nothing; add 2 to --redundant to use them" in found


def test_experts_beyond_a_layers_own_number_must_have_no_tokens():
    model = MODEL.model_copy(update={"experts_per_layer": (4, 8, 8)})
    with pytest.raises(TraceError, match="trace sends tokens of layer 1 beyond the 4 experts it has in toy"):
        require(run_checks(bundle(model=model)))


def test_a_model_without_dense_layers_has_no_layers_by_position():
    dense_free = MODEL.model_copy(update={"moe_layer_ids": (0, 1, 2)})
    assert layers_by_position((0, 1, 2), MODEL)
    assert not layers_by_position((0, 1, 2), dense_free)
    assert not layers_by_position((0, 1), MODEL)


def test_several_errors_are_told_at_once():
    findings = run_checks(bundle(load=load(experts=64, top_k=6)))
    with pytest.raises(TraceError, match=r"num_experts \(64\).*; trace top_k \(6\)"):
        require(findings)
    mixed = [Finding("error", "one", TraceError), Finding("warning", "w"), Finding("error", "two", PlanError)]
    with pytest.raises(InputError, match=r"^one; two$"):
        require(mixed)
    assert run_checks(bundle(load=load((0, 1, 2)), num_redundant=-1))[0].severity == "error"
