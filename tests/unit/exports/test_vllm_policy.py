"""The policy module answers the plan to stand-ins for vLLM's interface, and to vLLM where it is installed."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import ModuleType

import pytest

torch = pytest.importorskip("torch", reason="the policy runs in torch")

from moeplan.exports.vllm_policy import policy_module

PLANNED = [[3, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]]


@pytest.fixture(params=["vLLM 0.13", "vLLM 0.19"])
def policies(request, monkeypatch):
    class AbstractEplbPolicy(ABC):
        @classmethod
        @abstractmethod
        def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks): ...

    answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor] if request.param == "vLLM 0.13" else torch.Tensor
    AbstractEplbPolicy.__dict__["rebalance_experts"].__func__.__annotations__["return"] = answer
    registry = {"default": None}
    module = ModuleType("vllm.distributed.eplb.policy")
    module.AbstractEplbPolicy, module.EPLB_POLICIES = AbstractEplbPolicy, registry
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return registry


@pytest.fixture
def policy(plan, policies):
    namespace = {}
    exec(policy_module(plan), namespace)  # our own file, run as vLLM would
    namespace["register"]()
    assert policies["default"] is namespace["FixedPlanPolicy"]
    return policies["default"]()  # can be made: nothing abstract is left


def test_it_answers_the_plan_whatever_the_load(policy, request):
    for weight in (torch.zeros(2, 4), torch.rand(2, 4)):
        answer = policy.rebalance_experts(weight, 6, 1, 1, 2)
        if "vLLM 0.13" in request.node.callspec.params.values():
            answer, log2phy, logcnt = answer
            assert log2phy.tolist() == [
                [[2, -1, -1], [3, -1, -1], [1, 4, -1], [0, 5, -1]],
                [[0, 4, -1], [1, 5, -1], [2, -1, -1], [3, -1, -1]],
            ]
            assert logcnt.tolist() == [[1, 1, 2, 2], [2, 2, 1, 1]]
            assert log2phy.dtype == logcnt.dtype == torch.int64
        assert answer.tolist() == PLANNED
        assert answer.dtype == torch.int64
    # engines since 0.14 also hand over the current map
    policy.rebalance_experts(torch.zeros(2, 4), 6, 1, 1, 2, old_global_expert_indices=None)


def test_installed_vllm_takes_the_answer(plan):
    """Its own code derives the maps it commits from the answer: copies of each expert, where they are."""
    state = pytest.importorskip("vllm.distributed.eplb.eplb_state", reason="vLLM is not installed")
    namespace = {}
    exec(policy_module(plan), namespace)
    slots = namespace["FixedPlanPolicy"].rebalance_experts(torch.rand(2, 4), 6, 1, 1, 2, torch.zeros(2, 6))
    log2phy, logcnt = state.compute_logical_maps(slots, 4)
    assert slots.tolist() == PLANNED
    assert logcnt.tolist() == [[1, 1, 2, 2], [2, 2, 1, 1]]
    assert sorted(log2phy[0, 3].tolist()) == [0, 5]


@pytest.mark.parametrize("engine", [((3, 4), 6, 2), ((2, 5), 6, 2), ((2, 4), 8, 2), ((2, 4), 6, 3)])
def test_it_refuses_another_engine(policy, engine):
    shape, slots, ranks = engine
    with pytest.raises(ValueError, match="are not the engine's"):
        policy.rebalance_experts(torch.zeros(shape), slots, 1, 1, ranks)


def test_a_hostile_model_name_stays_text(plan):
    source = policy_module(plan.model_copy(update={"model": 'x"""\nimport os\n{braces}'}))
    compile(source, "policy", "exec")
    assert "\nimport os" not in source
