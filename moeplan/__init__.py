"""Measure, plan and apply expert placements for Mixture-of-Experts models on several accelerators.

The front door. What stands in ``__all__`` is the library's public face, imported when first used::

    import moeplan

    scenario = moeplan.load_scenario("scenario.yaml")
    found = moeplan.optimize(scenario)
    moeplan.write_plan(found, "out")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from moeplan.artifacts.expert_load import ExpertLoad
    from moeplan.artifacts.placement import Placement
    from moeplan.artifacts.plan import Plan
    from moeplan.artifacts.profile import HardwareProfile, load_profile
    from moeplan.artifacts.routing_trace import RoutingTrace
    from moeplan.artifacts.simulation_result import SimulationResult
    from moeplan.errors import (
        ExportError,
        FieldProblem,
        InfeasibleError,
        InputError,
        MissingExtraError,
        MoeplanError,
        PlanError,
        ProfileError,
        RunError,
        SpecError,
        TraceError,
        UnknownNameError,
    )
    from moeplan.pipeline.evaluate import Score, evaluate_plan
    from moeplan.pipeline.exports import export_plan, import_plan
    from moeplan.pipeline.optimize import Optimized, optimize, write_plan
    from moeplan.pipeline.simulate import Simulated, Sweep, simulate, sweep, write_simulation
    from moeplan.routing.io import read_load, read_trace
    from moeplan.specs.cluster import ClusterSpec
    from moeplan.specs.clusters import find_cluster
    from moeplan.specs.model import ModelSpec
    from moeplan.specs.models import find_model
    from moeplan.specs.scenario import Scenario
    from moeplan.specs.workload import Objective, Workload

__version__ = "0.1.0"

_ROOM_OF = {
    "ClusterSpec": "specs.cluster",
    "ExpertLoad": "artifacts.expert_load",
    "ExportError": "errors",
    "FieldProblem": "errors",
    "HardwareProfile": "artifacts.profile",
    "InfeasibleError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "ModelSpec": "specs.model",
    "MoeplanError": "errors",
    "Objective": "specs.workload",
    "Optimized": "pipeline.optimize",
    "Placement": "artifacts.placement",
    "Plan": "artifacts.plan",
    "PlanError": "errors",
    "ProfileError": "errors",
    "RunError": "errors",
    "RoutingTrace": "artifacts.routing_trace",
    "Scenario": "specs.scenario",
    "Score": "pipeline.evaluate",
    "Simulated": "pipeline.simulate",
    "SimulationResult": "artifacts.simulation_result",
    "SpecError": "errors",
    "Sweep": "pipeline.simulate",
    "TraceError": "errors",
    "UnknownNameError": "errors",
    "Workload": "specs.workload",
    "evaluate_plan": "pipeline.evaluate",
    "export_plan": "pipeline.exports",
    "find_cluster": "specs.clusters",
    "find_model": "specs.models",
    "import_plan": "pipeline.exports",
    "load_profile": "artifacts.profile",
    "optimize": "pipeline.optimize",
    "read_load": "routing.io",
    "read_trace": "routing.io",
    "simulate": "pipeline.simulate",
    "sweep": "pipeline.simulate",
    "write_plan": "pipeline.optimize",
    "write_simulation": "pipeline.simulate",
}

__all__ = [
    "ClusterSpec",
    "ExpertLoad",
    "ExportError",
    "FieldProblem",
    "HardwareProfile",
    "InfeasibleError",
    "InputError",
    "MissingExtraError",
    "ModelSpec",
    "MoeplanError",
    "Objective",
    "Optimized",
    "Placement",
    "Plan",
    "PlanError",
    "ProfileError",
    "RoutingTrace",
    "RunError",
    "Scenario",
    "Score",
    "Simulated",
    "SimulationResult",
    "SpecError",
    "Sweep",
    "TraceError",
    "UnknownNameError",
    "Workload",
    "__version__",
    "evaluate_plan",
    "export_plan",
    "find_cluster",
    "find_model",
    "import_plan",
    "load_profile",
    "load_scenario",
    "optimize",
    "read_load",
    "read_trace",
    "simulate",
    "sweep",
    "write_plan",
    "write_simulation",
]


def load_scenario(path: str | Path) -> Scenario:
    """Read a scenario file, YAML or JSON; relative paths in it are taken from its directory.

    Raises:
        InputError: unreadable. SpecError: any field is wrong.
    """
    from pathlib import Path

    from moeplan.specs.scenario import Scenario

    return Scenario.from_file(Path(path))


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'moeplan' has no attribute '{name}'")
    value = getattr(import_module(f"moeplan.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
