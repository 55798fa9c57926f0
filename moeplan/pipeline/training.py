"""From a scenario with a training section to a simulated step: everything looked up, checked, costed, played."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.simulation_result import MemoryTrack, TrafficMatrix
from moeplan.checks import Bundle, require, run_checks
from moeplan.costs.run_traffic import Wire
from moeplan.costs.traffic import counted_reach, expected_reach
from moeplan.costs.training import TrainingCosts
from moeplan.costs.training_teams import placement_groups
from moeplan.errors import InfeasibleError, MoeplanError, SpecError
from moeplan.pipeline.exports import load_placement
from moeplan.pipeline.inputs import costs_sha256, even_load_LE, profile_notes, profile_of, read_routing
from moeplan.routing.loads import expert_load
from moeplan.simulation.training import TrainingResult
from moeplan.simulation.training import simulate_training as play
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.training import RecomputeModule, TrainingSpec

__all__ = ["TRAINING_DIRECTIONS", "TRAINING_EXACT", "Trained", "simulate_training", "training_costs_sha256"]

Floats = NDArray[np.float64]

# headline -> (unit, which way is good)
TRAINING_DIRECTIONS: dict[str, tuple[str, str]] = {
    "step_s": ("s", "lower"),
    "tokens_per_s": ("tokens/s", "higher"),
    "tokens_per_s_per_gpu": ("tokens/s", "higher"),
    "tflops_per_gpu": ("TFLOP/s", "higher"),
    "mfu": ("1", "higher"),
    "bubble_share": ("1", "lower"),
    "exposed_exchange_share": ("1", "lower"),
    "exposed_sync_share": ("1", "lower"),
    "optimizer_share": ("1", "lower"),
    "dropped_share": ("1", "lower"),
    "peak_memory_bytes": ("bytes", "lower"),
}


# headlines without an interval -> what they are counted from
TRAINING_EXACT: dict[str, str] = {
    "dropped_share": "counted from the loads of the trace and the capacity",
    "peak_memory_bytes": "counted: weights, gradients, optimizer state, and activations in the order of the schedule,"
    " of the rank with most of them",
}


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A simulated training run with what it rests on; ``headlines`` by the names of TRAINING_DIRECTIONS.

    ``ends``: each headline that is not of TRAINING_EXACT at both ends of its costs, all ``parts`` together and then
    each alone, where they were asked for.
    """

    result: TrainingResult
    model: ModelSpec
    cluster: ClusterSpec
    headlines: dict[str, float]
    parts: tuple[str, ...]
    ends: dict[str, tuple[tuple[float, float], ...]]
    memory: tuple[MemoryTrack, ...]
    traffic: TrafficMatrix
    assumptions: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


def simulate_training(
    scenario: Scenario, origin: Mapping[str, Any] | None = None, intervals: bool = False, remedies: bool = True
) -> Trained:
    """Play the training section of a scenario; with ``intervals`` also at both ends of its costs' (:func:`_ends`).
    ``remedies``: where it does not fit into memory, changes are tried that might be enough.

    Raises:
        InputError: an input is wrong. InfeasibleError: it does not fit into memory.
    """
    spec = scenario.training
    if spec is None:
        raise SpecError("the scenario has no training section; add one, see docs/guides/training.md")
    model, cluster = scenario.model_spec(), scenario.cluster_spec()
    spec.micro_batches(cluster.num_ranks)  # degrees that do not divide are said before anything is read
    groups = placement_groups(model, cluster, spec)
    profile = profile_of(scenario.profile, cluster.accelerator.name)
    notes = profile_notes(profile, cluster)
    load = None
    if spec.experts == "balanced":
        load_WLE = even_load_LE(model)[None]
    else:
        routing = read_routing(scenario.recording, model, format=scenario.trace_format)
        load = expert_load(routing, f"time:{spec.windows}" if spec.windows > 1 else "all")
        notes += require(run_checks(Bundle(model=model, cluster=groups, workload=scenario.workload, load=load)))
        load_WLE = load.load_WLE
    placement = _placement(scenario, model, groups)

    def costs_of(spec: TrainingSpec, placement: Placement) -> TrainingCosts:
        work = scenario.workload
        return TrainingCosts(
            model, cluster, profile, placement, load_WLE, spec, work.weight_dtype, work.activation_dtype,
            scenario.objective.dispatch,
        )  # fmt: skip

    def peak_bytes(spec: TrainingSpec) -> float:
        costs = costs_of(spec, _placement(scenario, model, placement_groups(model, cluster, spec)))
        return play(costs, logged=False).peak.peak_bytes

    costs = costs_of(spec, placement)
    result = play(costs, origin, scenario.fidelity)
    if result.peak.peak_bytes > result.memory_bytes:
        raise InfeasibleError(_too_large(spec, result, peak_bytes) if remedies else _need(result))
    headlines = _headlines(result)
    parts = {name: error for name, error in costs.part_errors.items() if error}
    ends = _ends(costs, parts, headlines) if intervals else {}
    memory = tuple(
        MemoryTrack(
            stage=track.stage,
            limit_bytes=result.memory_bytes,
            state_bytes=track.state_bytes,
            time_s=tuple(track.time_s.tolist()),
            activation_bytes=tuple(track.activation_bytes.tolist()),
        )
        for track in result.memory
    )
    assumptions = (
        ("placement", str(scenario.current or "contiguous"), "given"),
        ("expert load", f"{spec.experts}: {scenario.trace or 'every expert alike'}", "given"),
        ("dispatch", scenario.objective.dispatch, "given"),
        *((f"costs of {name}", "", source) for name, source in sorted(costs.source.items())),
    )
    notes += [f"extrapolated beyond measurements: {name}" for name in sorted(set(costs.extrapolated))]
    traffic = _traffic(costs, placement, load, scenario)
    return Trained(
        result, model, cluster, headlines, tuple(parts), ends, memory, traffic, assumptions, tuple(notes)
    )


def _need(result: TrainingResult) -> str:
    """What is missing."""
    needed, there = _gib(result.peak.peak_bytes), _gib(result.memory_bytes)
    return f"training does not fit: stage {result.peak.stage} needs {needed} of {there}"


def _too_large(spec: TrainingSpec, result: TrainingResult, peak_bytes: Callable[[TrainingSpec], float]) -> str:
    """What is missing, and which single changes of the specification are enough: each is tried."""
    changes: list[dict[str, Any]] = [
        *([{"recompute_modules": get_args(RecomputeModule)}] if spec.recompute == "none" else []),
        {"recompute": "attention"},
        {"recompute": "full", "recompute_modules": ()},
        {"zero": 2},
        {"zero": 3},
        *({name: 2 * getattr(spec, name)} for name in ("tp", "cp", "pp", "ep", "expert_tp")),
        {"micro_batch": spec.micro_batch // 2},
    ]
    tried = []
    for change in changes:
        differs = {name: value for name, value in change.items() if value != getattr(spec, name)}
        with suppress(MoeplanError):  # degrees that do not divide, or do not fit the model or the cluster
            other = TrainingSpec.parse(spec.model_dump(mode="json") | differs | {"steps": 1}, "training")
            tried.append((peak_bytes(other), ", ".join(f"training.{n}: {_yaml(v)}" for n, v in differs.items())))
    limit, peak, need = result.memory_bytes, result.peak, _need(result)
    if fitting := [f"{words} ({_gib(size)})" for size, words in tried if size <= limit]:
        return f"{need}; each of these alone fits: {'; '.join(fitting)}"
    size, words = min(tried, default=(peak.peak_bytes, ""))
    if size >= peak.peak_bytes:
        return f"{need}; no single change of training lowers that: use accelerators with more memory"
    return f"{need}; no single change is enough: {words} comes nearest, {_gib(size)}, {_gib(size - limit)} too much"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _yaml(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)


def _headlines(result: TrainingResult) -> dict[str, float]:
    return {
        "step_s": result.step_s,
        "tokens_per_s": result.tokens_per_s,
        "tokens_per_s_per_gpu": result.tokens_per_s_per_rank,
        "tflops_per_gpu": result.tflops_per_rank,
        "mfu": result.mfu,
        "bubble_share": result.bubble_share,
        "exposed_exchange_share": result.exposed_exchange_share,
        "exposed_sync_share": result.exposed_sync_share,
        "optimizer_share": result.optimizer_share,
        "dropped_share": result.dropped_share,
        "peak_memory_bytes": max(track.peak_bytes for track in result.memory),
    }


def training_costs_sha256(scenario: Scenario) -> str:
    """Digest of all that says which costs a job takes; which experts are where and how loaded is not in it."""
    assert scenario.training is not None
    loads = {"global_batch", "experts", "windows", "steps", "capacity_factor", "overflow"}
    spec = scenario.training.model_dump(mode="json", exclude=loads)
    return costs_sha256(scenario, {"dispatch": scenario.objective.dispatch, **spec})


def _ends(
    costs: TrainingCosts, parts: Mapping[str, float], found: Mapping[str, float]
) -> dict[str, tuple[tuple[float, float], ...]]:
    """Each headline with every part of the costs at the low and at the high end of its interval: all of them together,
    and each alone. A detailed run takes the step mode's deviations, relative to its own."""
    plain = _headlines(play(costs, logged=False))
    ways = [list(parts), *([name] for name in parts)]  # together, and each alone
    runs = [
        [
            _headlines(play(costs, factor={name: (1 + parts[name]) ** sign for name in way}, logged=False))
            for sign in (-1, 1)
        ]
        for way in ways
    ]
    answer = {}
    for name in (name for name in found if name not in TRAINING_EXACT):
        scale = found[name] / plain[name] if plain[name] else 1.0
        answer[name] = tuple(
            (found[name] + scale * (low[name] - plain[name]), found[name] + scale * (high[name] - plain[name]))
            for low, high in runs
        )
    return answer


def _traffic(
    costs: TrainingCosts, placement: Placement, load: ExpertLoad | None, scenario: Scenario
) -> TrafficMatrix:
    """Dispatch and combine of one expert-parallel group in the mean step, forward and backward, all stages together.

    Counted on the trace's tokens, or expected from the pairs that a capacity leaves.
    """
    spec, group, batches_W = costs.spec, costs.group, costs.teams[0].batches_W
    wire = Wire(costs.model, scenario.objective.dispatch, scenario.workload.activation_dtype, spec.expert_tp)
    trace = None if load is None or spec.capacity_factor is not None else load.trace
    window_T = np.zeros(0, np.int64) if load is None or load.window_T is None else load.window_T
    rows = [row for chunk in costs.chunks() for row in chunk.moe_rows]
    weight_L = np.bincount(rows, minlength=costs.model.num_moe_layers).astype(float)
    tokens_R = np.full(group.num_ranks, float(costs.tokens))
    played = np.arange(spec.steps * costs.micro_batches) % len(batches_W)
    bytes_RR = np.zeros((group.num_ranks, group.num_ranks))
    for window, times in enumerate(np.bincount(played, minlength=len(batches_W)).tolist()):
        if trace is not None:
            part = trace.tokens(np.flatnonzero(window_T == window)) if len(window_T) else trace
            reach = counted_reach(part, placement, costs.groups, wire.dispatch).over_groups(spec.expert_tp)
        else:
            batch = batches_W[window]
            share_LR = batch.pairs_LR / (batch.tokens * wire.top_k)
            reach = expected_reach(share_LR, group, wire.dispatch, wire.top_k, spec.expert_tp)
        bytes_RR += times * wire.bytes_RR(reach, group, tokens_R, weight_L)
    passes = 3 if spec.recompute == "full" else 2  # a whole forward again before its backward
    source = "expected from loads, a token's choices taken as independent"
    if trace is not None:
        source = f"counted on {trace.num_tokens:,} recorded tokens"
    name = f"an expert-parallel group of {group.num_ranks}" + ", all stages" * (spec.pp > 1)
    return TrafficMatrix.of(name, bytes_RR * passes / spec.steps, None, spec.steps, group.ranks_per_node, source)


def _placement(scenario: Scenario, model: ModelSpec, group: ClusterSpec) -> Placement:
    """The placement in use on one expert-parallel group, or experts in order."""
    if scenario.current is not None:
        found = load_placement(
            scenario.current, model=model, num_ranks=group.num_ranks, num_nodes=group.num_nodes, whose="training.ep"
        )
        return found.placement
    ranks = group.num_ranks
    if model.num_experts % ranks:
        raise SpecError(
            f"training.ep ({ranks}) does not divide num_experts ({model.num_experts}); choose a divisor, or give"
            " a placement with current"
        )
    return Placement.contiguous(model.num_moe_layers, model.num_experts, ranks, group.ranks_per_node)
