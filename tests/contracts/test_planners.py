"""Every registered planner keeps the contract."""

from __future__ import annotations

from typing import Any

import pytest

from moeplan.registry import load_plugin, plugin_names
from moeplan.testing.planners import PlannerContract


class TestRegisteredPlanners(PlannerContract):
    @pytest.fixture(autouse=True, params=plugin_names("planners"))
    def _planner(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        planner: Any = load_plugin("planners", request.param)
        monkeypatch.setattr(type(self), "planner", staticmethod(planner), raising=False)


def test_the_baselines_are_registered() -> None:
    assert {"contiguous", "round-robin", "random", "greedy", "moetuner", "exflow"} <= set(
        plugin_names("planners")
    )
