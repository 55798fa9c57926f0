"""What a planning job is given, read and made to fit together: model, cluster, routing, slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan import __version__
from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.profile import HardwareProfile, load_profile, shipped_profile_for
from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.checks import layers_by_position
from moeplan.costs.coverage import backend_gaps
from moeplan.costs.frameworks import require_backend
from moeplan.costs.memory import max_redundant_experts
from moeplan.errors import TraceError
from moeplan.files import canonical_json, sha256_bytes
from moeplan.routing.io import read_trace
from moeplan.routing.loads import pick_tokens
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Phase, Workload

__all__ = [
    "DECODE_BATCH",
    "backend_notes",
    "costs_sha256",
    "even_load_LE",
    "in_phase",
    "on_model_layers",
    "profile_notes",
    "profile_of",
    "read_routing",
    "slots_of_ranks",
]

DECODE_BATCH = 128


def read_routing(
    path: Path, model: ModelSpec, *, format: str | None = None, domain: str | None = None
) -> RoutingTrace | ExpertLoad:
    """Routing from any file a reader knows, its layers numbered as the model's.

    Raises:
        TraceError: unreadable, or not of this model.
    """
    routing = read_trace(path, format=format, domain=domain, num_experts=model.num_experts)
    return on_model_layers(routing, model)


def on_model_layers(routing: RoutingTrace | ExpertLoad, model: ModelSpec) -> RoutingTrace | ExpertLoad:
    """Layers counted 0, 1, 2, ... in the file are the model's MoE layers in order."""
    if not layers_by_position(routing.layer_ids, model):
        return routing
    if isinstance(routing, RoutingTrace):
        return replace(routing, layer_ids=model.moe_layer_ids)
    trace = None if routing.trace is None else replace(routing.trace, layer_ids=model.moe_layer_ids)
    return replace(routing, layer_ids=model.moe_layer_ids, trace=trace)


def in_phase(routing: RoutingTrace | ExpertLoad, asked: Phase | None) -> tuple[RoutingTrace | ExpertLoad, Phase]:
    """The tokens of the phase asked for, and the phase: by default the trace's, else prefill.

    Raises:
        TraceError: the trace holds none of that phase.
    """
    if not isinstance(routing, RoutingTrace) or routing.phase_T is None:
        return routing, asked or "prefill"
    present = [PHASES[p] for p in np.unique(routing.phase_T)]
    if asked is None:
        return routing, "mix" if len(present) > 1 else ("prefill" if present == ["prefill"] else "decode")
    if asked == "mix":
        return routing, "mix"
    if asked not in present:
        raise TraceError(f"phase ({asked}) has no tokens in the trace, which holds {present[0]} only; choose that")
    return pick_tokens(routing, routing.phase_T == PHASES.index(asked)), asked


def even_load_LE(model: ModelSpec) -> NDArray[np.float64]:
    """Every expert of a layer alike; 0 beyond the experts that a layer has."""
    return (np.arange(model.num_experts) < np.array(model.experts_L)[:, None]).astype(np.float64)


def profile_of(name: str | None, accelerator: str) -> HardwareProfile | None:
    """Measured costs: by name or directory; by default those shipped for the accelerator; ``none``: the roofline.

    Exchanges on numbers of nodes that a profile has none of are those shipped for its accelerator.

    Raises:
        ProfileError: no such profile, or it is damaged.
    """
    if name == "none":
        return None
    if name is None:
        return shipped_profile_for(accelerator)
    profile = load_profile(name)
    shipped = shipped_profile_for(profile.meta.accelerator)
    return profile if shipped is None else profile.with_exchanges_of(shipped)


def costs_sha256(scenario: Scenario, technique: Any) -> str:
    """Digest of what says which costs a run takes: this version, model, cluster, profile, dtypes, fidelity, and the
    ``technique``, as anything that JSON holds. Runs that have it in common are off by the same errors of their costs.
    """
    cluster, work = scenario.cluster_spec(), scenario.workload
    profile = profile_of(scenario.profile, cluster.accelerator.name)
    named = {
        "moeplan": __version__,
        "model": scenario.model_spec().model_dump(mode="json"),
        "cluster": cluster.model_dump(mode="json"),
        "profile": None if profile is None else profile.sha256,
        "dtypes": [work.weight_dtype, work.activation_dtype],
        "fidelity": scenario.fidelity,
        "technique": technique,
    }
    return sha256_bytes(canonical_json(named).encode())


def profile_notes(profile: HardwareProfile | None, cluster: ClusterSpec) -> list[str]:
    """Where the profile asked for is of another accelerator than the cluster's, what another one stands in for, what
    speaks against its times."""
    if profile is None:
        return []
    accelerator, several = cluster.accelerator.name, cluster.num_nodes > 1
    notes = [
        f"profile {profile.meta.name} has no {table} on {', '.join(map(str, sorted(of)))} nodes: those of {lender}"
        " stand in, measured by others on such machines"
        for table, (lender, nodes) in profile.lent.items()
        if (of := nodes if several else nodes & {1})
    ]
    if notes:  # one command measures both
        notes[-1] += f"; measure your own: {profile.measure_command('collectives', {})}"
    notes += profile.warnings
    if profile.meta.accelerator != accelerator:
        notes.append(
            f"costs are those of profile {profile.meta.name}, measured on {profile.meta.accelerator}, where the"
            f" cluster has {accelerator}: what it lacks comes from that one's roofline; choose the profile or the"
            f" cluster that fits, or in a cluster file name the accelerator {profile.meta.accelerator}"
        )
    return notes


def backend_notes(scenario: Scenario, profile: HardwareProfile | None) -> list[str]:
    """Notes of what stands in where the profile lacks rows of a backend that the scenario names.

    Raises:
        UnknownNameError: no such backend.
    """
    notes: list[str] = []
    if (serving := scenario.serving) is not None:
        engines = {"serving.engine": serving.engine}
        if serving.prefill is not None:
            engines["serving.prefill.engine"] = serving.prefill.engine
        for where, engine in engines.items():
            require_backend(f"{where}.backend", engine.backend, profile)
            if engine.backend is not None and profile is not None:
                gaps = backend_gaps(engine.backend, scenario.workload.weight_dtype, profile)
                notes += [f"{where}.backend ({engine.backend}): {gap}" for gap in gaps]
    return notes


def slots_of_ranks(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    redundant: int | str,
    kv_reserve_bytes: float | None,
) -> tuple[NDArray[np.int64], int]:
    """Slots per rank and layer, 0 for failed ranks, and the redundant slots: all slots less the model's experts.

    Slots that do not divide evenly go one more to the first ranks. Ranks with ``slots`` of their own keep them.

    Raises:
        SpecError, InfeasibleError: ``max`` cannot be worked out.
    """
    if isinstance(redundant, str):
        redundant = max_redundant_experts(model, cluster, workload, kv_reserve_bytes)
    total = model.num_experts + redundant
    live = [r for r in range(cluster.num_ranks) if not cluster.rank(r).failed]
    slots_R = np.zeros(cluster.num_ranks, dtype=np.int64)
    own = {r: slots for r in live if (slots := cluster.rank(r).slots) is not None}
    for r, slots in own.items():
        slots_R[r] = slots
    rest = [r for r in live if r not in own]
    left = max(0, total - sum(own.values()))
    for i, r in enumerate(rest):
        slots_R[r] = left // len(rest) + (i < left % len(rest))
    return slots_R, int(slots_R.sum()) - model.num_experts
