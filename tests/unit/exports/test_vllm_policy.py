"""The policy module runs against a stand-in for vLLM's interface and answers the plan."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import ModuleType

import pytest
import torch

from moeplan.exports.vllm_policy import policy_module


@pytest.fixture
def policies(monkeypatch):
    class AbstractEplbPolicy(ABC):
        @classmethod
        @abstractmethod
        def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks): ...

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


def test_it_answers_the_plan_whatever_the_load(policy):
    for weight in (torch.zeros(2, 4), torch.rand(2, 4)):
        phy2log, log2phy, logcnt = policy.rebalance_experts(weight, 6, 1, 1, 2)
        assert phy2log.tolist() == [[3, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]]
        assert log2phy.tolist() == [
            [[2, -1, -1], [3, -1, -1], [1, 4, -1], [0, 5, -1]],
            [[0, 4, -1], [1, 5, -1], [2, -1, -1], [3, -1, -1]],
        ]
        assert logcnt.tolist() == [[1, 1, 2, 2], [2, 2, 1, 1]]
        assert phy2log.dtype == log2phy.dtype == logcnt.dtype == torch.int64
    # newer engines also hand over the current map
    assert policy.rebalance_experts(torch.zeros(2, 4), 6, 1, 1, 2, old_global_expert_indices=None)[
        0
    ].shape == (2, 6)


@pytest.mark.parametrize("engine", [((3, 4), 6, 2), ((2, 5), 6, 2), ((2, 4), 8, 2), ((2, 4), 6, 3)])
def test_it_refuses_another_engine(policy, engine):
    shape, slots, ranks = engine
    with pytest.raises(ValueError, match="are not the engine's"):
        policy.rebalance_experts(torch.zeros(shape), slots, 1, 1, ranks)


def test_a_hostile_model_name_stays_text(plan):
    source = policy_module(plan.model_copy(update={"model": 'x"""\nimport os\n{braces}'}))
    compile(source, "policy", "exec")
    assert "\nimport os" not in source
