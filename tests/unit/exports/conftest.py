from __future__ import annotations

import numpy as np
import pytest

from moeplan.artifacts.plan import Plan
from moeplan.exports.base import ImportContext
from moeplan.specs.model import ModelSpec
from moeplan.testing.exporters import plan_of, tiny_model


@pytest.fixture
def model() -> ModelSpec:
    return tiny_model(4, num_layers=3, moe_layer_ids=(1, 2))


@pytest.fixture
def plan(model: ModelSpec) -> Plan:
    """Two ranks of three slots; experts 2 and 3 have a copy in layer 1, experts 0 and 1 in layer 2."""
    return plan_of([[3, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]], model, 2)


@pytest.fixture
def permutation(model: ModelSpec) -> Plan:
    return plan_of([[3, 2, 0, 1], [0, 2, 1, 3]], model, 2)


@pytest.fixture
def reading(model: ModelSpec) -> ImportContext:
    return ImportContext(model=model, num_ranks=2, ranks_per_node=2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)
