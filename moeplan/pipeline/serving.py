"""From a scenario to a service that can be simulated: everything looked up, checked and costed.

``L`` layers, ``E`` experts, ``R`` ranks of one pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.artifacts.simulation_result import RankBytes
from moeplan.checks import Bundle, require, run_checks
from moeplan.costs.kv_cache import KvRoom, kv_bytes_per_token, kv_room, kv_rooms
from moeplan.costs.operating_point import layer_costs
from moeplan.costs.run_traffic import Wire
from moeplan.costs.serving import ServingCosts
from moeplan.costs.technique import Technique, expert_groups
from moeplan.costs.work import speeds, working
from moeplan.errors import SpecError
from moeplan.pipeline.exports import load_placement
from moeplan.pipeline.inputs import (
    backend_notes,
    costs_sha256,
    even_load_LE,
    profile_notes,
    profile_of,
    read_routing,
    slots_of_ranks,
)
from moeplan.pipeline.serving_limits import context_parallel_fits, coverage_notes, faults_fit, slo_possible
from moeplan.planning.migration import align, migration_of
from moeplan.planning.problem import PlanningProblem, answer_of
from moeplan.planning.simple import contiguous
from moeplan.registry import load_plugin
from moeplan.routing.loads import expert_load, pick_tokens
from moeplan.simulation.arrivals import make_requests
from moeplan.simulation.detailed_costs import DetailedCosts
from moeplan.simulation.expert_loads import ExpertLoads, Phase
from moeplan.simulation.pools import Pool, Replan, Replanned, Role
from moeplan.simulation.request_readers import read_requests
from moeplan.specs.cluster import AcceleratorSpec, ClusterSpec
from moeplan.specs.clusters import sized_cluster
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.serving import EngineSpec, ServingSpec
from moeplan.specs.workload import Workload

__all__ = ["Service", "build_service", "serving_costs_sha256"]

Floats = NDArray[np.float64]
_Tokens = tuple[RoutingTrace, NDArray[np.int64]]  # a trace and which of its tokens
_COUNTED_TOKENS = 8192  # of one load, on which its traffic is counted
_SAMPLED_WINDOWS = 1024  # windows after which the sequence of draws begins again


@dataclass(frozen=True, slots=True, eq=False)
class Service:
    """What :func:`moeplan.simulation.service.simulate_service` takes, and what it rests on."""

    scenario: Scenario
    spec: ServingSpec
    model: ModelSpec
    cluster: ClusterSpec
    requests: RequestTrace
    pools: tuple[Pool, ...]
    memory: RankBytes
    assumptions: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


class ReadRouting(Protocol):
    """Reads a scenario's routing, as :func:`moeplan.pipeline.inputs.read_routing` does."""

    def __call__(self, path: Path, model: ModelSpec, *, format: str | None) -> RoutingTrace | ExpertLoad: ...


def build_service(
    scenario: Scenario, seed: int, ends: Mapping[str, float] | None = None, read: ReadRouting = read_routing
) -> Service:
    """Everything a serving simulation needs; ``seed`` draws requests and sampled routing. ``ends``: parts of the costs
    that are off (:meth:`moeplan.costs.serving.ServingCosts.moved`).

    Raises:
        InputError: an input is wrong. InfeasibleError: the model does not fit.
    """
    spec = scenario.serving
    if spec is None:
        raise SpecError("the scenario has no serving section; add one with requests, see docs/guides/simulate.md")
    model, cluster = scenario.model_spec(), scenario.cluster_spec()
    rng = np.random.default_rng([seed, 11])
    recorded = read_requests(spec.requests.file, spec.requests.format) if spec.requests.file is not None else None
    requests = make_requests(spec.requests, recorded, rng)
    profile = profile_of(scenario.profile, cluster.accelerator.name)
    backends = backend_notes(scenario, profile)
    loads, load, notes = _loads(scenario, spec, model, np.random.default_rng([seed, 12]), read)
    notes += profile_notes(profile, cluster) + backends
    tokens_Q = requests.input_tokens_Q + requests.output_tokens_Q
    longest, work = int(tokens_Q.max()), scenario.workload.model_copy(update={"context": round(tokens_Q.mean())})
    assumptions: list[tuple[str, str, str]] = []
    pools: list[Pool] = []
    factories = []
    rooms: list[tuple[KvRoom, float]] = []
    for role, engine, whole, instances, placed, link in _stages(scenario, spec, cluster):
        stage = _stage_cluster(whole, engine)
        context_parallel_fits(model, engine, role)
        groups, whose = _expert_groups(scenario, model, stage, engine), _ranks_field(spec, role, engine)
        place, said = _placement(scenario, model, groups, placed, whose, load)
        place = place.over_groups(engine.expert_tp)
        notes += said
        used_P = (place.physical_to_logical_LP >= 0).any(0)
        slots_R = np.bincount(place.rank_of_slot_P[used_P], minlength=stage.num_ranks)
        notes += require(run_checks(Bundle(model=model, cluster=stage, workload=work, load=load, current=place)))
        notes += coverage_notes(scenario, model, stage, role, _technique(scenario, engine), profile)
        held = _held(model, engine)
        room = kv_room(held, stage, work, engine, slots_R)
        capacity = room.tokens if room.tokens is not None else 2**40
        if room.tokens is None:
            notes.append(f"{model.name}: attention is not known; its time and KV cache are not counted")
        factory = _costs(scenario, model, engine, profile, longest, whole)
        factories.append(factory)
        per_token, of_all = (
            kv_bytes_per_token(each, engine, work.context, work.weight_dtype) or 0.0
            for each in (held, held if engine.speculative is None else model.with_prediction_layer())
        )
        pools.append(
            Pool(
                role, instances, engine, stage, place, loads, factory, capacity, per_token,
                link or stage.accelerator.nic_bandwidth, stage.nic_latency,
                wire=Wire(model, scenario.objective.dispatch, work.activation_dtype), num_nodes=whole.num_nodes,
                cache_bytes=of_all * engine.tp * engine.pp,
            )
        )  # fmt: skip
        rooms += [(each, capacity * per_token) for each in kv_rooms(held, stage, work, engine, slots_R)]
        pools[-1] = replace(pools[-1], replan=_replanner(scenario, model, pools[-1], profile, work))
        size = f"{capacity:,} tokens, {capacity * per_token / 2**30:.1f} GiB on each of its ranks"
        assumptions.append((f"KV cache of a group ({role})", size, "modelled: what memory leaves"))
    faults_fit(spec, pools)
    slo_possible(spec, requests, pools)
    if ends:  # whatever was decided before rests on the usual ones
        pools = [replace(pool, costs=_moved(made, ends)) for pool, made in zip(pools, factories, strict=True)]
    assumptions += [
        ("placement", str(scenario.current or "contiguous"), "given"),
        ("expert load", f"{spec.experts.mode}: {scenario.trace or 'every expert alike'}", "given"),
        ("dispatch", scenario.objective.dispatch, "given"),
    ]
    return Service(
        scenario, spec, model, cluster, requests, tuple(pools), _memory(rooms), tuple(assumptions),
        tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def _held(model: ModelSpec, engine: EngineSpec) -> ModelSpec:
    """What memory and cache hold layers of: the model, and with drafts its prediction layer. Of a pipeline the last
    stage holds that, and has least room: as much as if every stage held one."""
    return model if engine.speculative is None else model.with_prediction_layer(engine.pp)


def _memory(rooms: list[tuple[KvRoom, float]]) -> RankBytes:
    return RankBytes(
        limit=tuple(room.memory_bytes for room, _ in rooms),
        experts=tuple(room.expert_bytes for room, _ in rooms),
        other_weights=tuple(room.other_weight_bytes for room, _ in rooms),
        workspace=tuple(room.workspace_bytes for room, _ in rooms),
        kv_cache=tuple(cache for _, cache in rooms),
    )


# ---------------------------------------------------------------------- expert loads


def _loads(
    scenario: Scenario, spec: ServingSpec, model: ModelSpec, rng: np.random.Generator, read: ReadRouting
) -> tuple[ExpertLoads, ExpertLoad | None, list[str]]:
    experts = spec.experts
    if experts.mode == "balanced":
        return ExpertLoads({"decode": [even_load_LE(model)]}, experts.window), None, []
    routing = read(scenario.recording, model, format=scenario.trace_format)
    whole = expert_load(routing)
    if whole.num_layers != model.num_moe_layers or whole.num_experts != model.num_experts:
        cluster = scenario.cluster_spec()
        require(run_checks(Bundle(model=model, cluster=cluster, workload=scenario.workload, load=whole)))
    if experts.mode == "mean":
        tokens = [_few(routing, np.arange(routing.num_tokens))] if isinstance(routing, RoutingTrace) else [None]
        return ExpertLoads({"decode": [whole.load_LE]}, experts.window, None, _lookup({"decode": tokens})), whole, []
    notes: list[str] = []
    by_phase: dict[Phase, list[Floats]] = {}
    behind: dict[Phase, list[_Tokens | None]] = {}
    for phase, part in _phases(routing):
        found = (
            _windows(part, experts.windows) if experts.mode == "replay"
            else [_draw(part, experts.sample_tokens, rng) for _ in range(experts.windows)]
        )  # fmt: skip
        by_phase[phase] = [load_LE for load_LE, _ in found]
        behind[phase] = [tokens for _, tokens in found]
    if len(by_phase) == 1:
        notes.append("the trace holds one phase, or does not tell prefill from decode: it serves both")
    order = rng.integers(experts.windows, size=_SAMPLED_WINDOWS).tolist() if experts.mode == "sample" else None
    return ExpertLoads(by_phase, experts.window, order, _lookup(behind)), whole, notes


def _few(part: RoutingTrace, chosen_T: NDArray[np.int64]) -> _Tokens:
    """Tokens of a load, evenly thinned where they are very many; taken from the trace when they are wanted."""
    even = np.linspace(0, len(chosen_T) - 1, min(len(chosen_T), _COUNTED_TOKENS)).astype(int)
    return part, chosen_T[even]


def _lookup(behind: Mapping[Phase, Sequence[_Tokens | None]]) -> Callable[[Phase, int], RoutingTrace | None]:
    def tokens(phase: Phase, number: int) -> RoutingTrace | None:
        found = behind[phase][number]
        return None if found is None else found[0].tokens(found[1])

    return tokens


def _phases(routing: RoutingTrace | ExpertLoad) -> list[tuple[Phase, RoutingTrace | ExpertLoad]]:
    """The parts of a trace that have phases; all of it as decode where it has none."""
    if not isinstance(routing, RoutingTrace) or routing.phase_T is None:
        return [("decode", routing)]
    present = np.unique(routing.phase_T)
    names: list[Phase] = ["prefill", "decode"]
    return [(names[p], pick_tokens(routing, routing.phase_T == p)) for p in present if PHASES[p] in names]


def _windows(part: RoutingTrace | ExpertLoad, windows: int) -> list[tuple[Floats, _Tokens | None]]:
    """Loads of a trace cut in time, with their tokens; counts keep the windows they were recorded in."""
    if not isinstance(part, RoutingTrace):
        return [(each, None) for each in part.load_WLE if (each.sum(1) > 0).all()]
    load = expert_load(part, f"time:{min(windows, part.num_tokens)}")
    window_T = np.zeros(part.num_tokens, np.int64) if load.window_T is None else load.window_T
    found = [(each, _few(part, np.flatnonzero(window_T == w))) for w, each in enumerate(load.load_WLE)]
    return [(each, tokens) for each, tokens in found if (each.sum(1) > 0).all()]


def _draw(
    part: RoutingTrace | ExpertLoad, tokens: int, rng: np.random.Generator
) -> tuple[Floats, _Tokens | None]:
    """Counts of tokens drawn at random, whole tokens where the trace has them."""
    if isinstance(part, RoutingTrace):
        drawn_T = rng.integers(part.num_tokens, size=tokens)
        chosen = part.experts_TLK[drawn_T]
        counts = [np.bincount(layer[layer >= 0], minlength=part.num_experts) for layer in chosen.transpose(1, 0, 2)]
        return np.array(counts, np.float64), _few(part, drawn_T)
    share_LE = part.load_LE / part.load_LE.sum(1, keepdims=True)
    return rng.multinomial(tokens * (part.top_k or 1), share_LE).astype(np.float64), None


# ---------------------------------------------------------------------- pools


def _stages(
    scenario: Scenario, spec: ServingSpec, cluster: ClusterSpec
) -> list[tuple[Role, EngineSpec, ClusterSpec, int, Path | None, float | None]]:
    """(role, engine, cluster, instances, placement file, link) of each pool, in the order a request passes them."""
    if spec.prefill is None:
        return [(spec.role, spec.engine, cluster, spec.instances, scenario.current, None)]
    first = spec.prefill
    engine = first.engine.model_copy(update={"speculative": spec.engine.speculative})  # prompts pass its layer too
    if isinstance(scenario.cluster, ClusterSpec):
        nodes = first.nodes or -(-first.ranks // cluster.ranks_per_node)
        if first.ranks % nodes:
            raise SpecError(f"serving.prefill.ranks ({first.ranks}) do not divide over {nodes} nodes; change one")
        ahead = cluster.resized(nodes, first.ranks // nodes)
    else:
        ahead = sized_cluster(scenario.cluster, first.ranks, first.nodes)
    return [
        ("prefill", engine, ahead, first.instances, first.placement, first.link),
        ("decode", spec.engine, cluster, spec.instances, scenario.current, None),
    ]


def _stage_cluster(cluster: ClusterSpec, engine: EngineSpec) -> ClusterSpec:
    """The ranks of one pipeline stage."""
    ranks, pp = cluster.num_ranks, engine.pp
    if ranks % (engine.group_ranks * pp):
        times = f" times engine.pcp ({engine.pcp})" if engine.pcp > 1 else ""
        raise SpecError(
            f"engine.tp ({engine.tp}){times} times engine.pp ({pp}) does not divide the ranks ({ranks}); choose"
            " divisors"
        )
    if pp == 1:
        return cluster
    if cluster.ranks:
        raise SpecError("engine.pp above 1 and ranks that differ (cluster.ranks) cannot be simulated together yet")
    if cluster.num_nodes % pp == 0:
        return cluster.resized(cluster.num_nodes // pp, cluster.ranks_per_node)
    if cluster.num_nodes == 1:
        return cluster.resized(1, cluster.ranks_per_node // pp)
    raise SpecError(f"engine.pp ({pp}) does not divide the nodes ({cluster.num_nodes}); choose a divisor")


def _expert_groups(scenario: Scenario, model: ModelSpec, stage: ClusterSpec, engine: EngineSpec) -> ClusterSpec:
    """A stage as a placement sees it: ranks that split experts are one."""
    degree = engine.expert_tp
    groups = expert_groups(model, stage, degree, "engine.expert_tp")
    if degree == 1:
        return groups
    where = f"engine.expert_tp ({degree})"
    if scenario.objective.dispatch != "allgather":
        raise SpecError(
            f"{where}: ranks that split experts need every token, but objective.dispatch is"
            f" {scenario.objective.dispatch}; set it to allgather, or expert_tp to 1"
        )
    if any(rank.slots is not None for rank in stage.ranks.values()):
        raise SpecError(f"{where} and ranks with slots of their own cannot be simulated together; leave slots out")
    return groups


def _ranks_field(spec: ServingSpec, role: Role, engine: EngineSpec) -> str:
    """The fields that say how many ranks a pool's placement has."""
    degrees = {"engine.pp": engine.pp, "engine.expert_tp": engine.expert_tp}
    ranks = "serving.prefill.ranks" if spec.prefill is not None and role == "prefill" else "ranks"
    return " / ".join([ranks, *(name for name, degree in degrees.items() if degree > 1)])


def _placement(
    scenario: Scenario, model: ModelSpec, stage: ClusterSpec, file: Path | None, whose: str, load: ExpertLoad | None
) -> tuple[Placement, list[str]]:
    if file is not None:
        place = {"num_ranks": stage.num_ranks, "num_nodes": stage.num_nodes}
        loaded = load_placement(file, model=model, **place, whose=whose)
        return loaded.placement, list(loaded.notes)
    slots_R, _ = slots_of_ranks(model, stage, scenario.workload, scenario.redundant, scenario.kv_reserve)
    problem = _problem(scenario, model, stage, slots_R, load, None)
    return contiguous(problem).placement, ["no placement is given (current): experts stand in order, contiguous"]


def _problem(
    scenario: Scenario,
    model: ModelSpec,
    stage: ClusterSpec,
    slots_R: NDArray[np.int64],
    load: ExpertLoad | None,
    profile: HardwareProfile | None,
) -> PlanningProblem:
    if load is None:
        load = ExpertLoad(even_load_LE(model)[None], ("all",), model.moe_layer_ids, model.top_k)
    if load.top_k is None:
        load = replace(load, top_k=model.top_k)
    return PlanningProblem(
        load=load,
        experts_L=np.asarray(model.experts_L, dtype=np.int64),
        slots_R=slots_R,
        speed_R=speeds(stage),
        ranks_per_node=stage.ranks_per_node,
        costs=layer_costs(model, stage, scenario.workload, scenario.objective, profile),
        objective=scenario.objective,
        seed=scenario.seed,
        num_groups=model.n_group or 1,
    )


def _technique(scenario: Scenario, engine: EngineSpec) -> Technique:
    return Technique(
        dispatch=scenario.objective.dispatch,
        overlap=engine.overlap,
        tp=engine.tp,
        cp=engine.pcp,
        dcp=engine.dcp,
        expert_tp=engine.expert_tp,
        kv_dtype=engine.kv_dtype,
        launches_per_layer=engine.launches_per_layer,
        backend=engine.backend,
        draft_tokens=engine.tokens_per_sequence - 1,
    )


def _costs(
    scenario: Scenario, model: ModelSpec, engine: EngineSpec, profile: HardwareProfile | None, longest: int,
    whole: ClusterSpec,
) -> Callable[[ClusterSpec], ServingCosts | DetailedCosts]:  # fmt: skip
    if scenario.fidelity == "detailed" and engine.pp > 1:
        raise SpecError(
            f"fidelity (detailed) plays the ranks of one pipeline stage, but engine.pp is {engine.pp}; use fidelity:"
            " step, or pp 1"
        )
    technique = _technique(scenario, engine)
    context = 1 << (longest - 1).bit_length()  # runs with other lengths share the tables
    stages = whole.model_dump_json() if engine.pp > 1 else None
    made: dict[str, ServingCosts | DetailedCosts] = {}

    def costs(cluster: ClusterSpec) -> ServingCosts | DetailedCosts:
        key = cluster.model_dump_json()
        if key not in made:
            compiled = _compiled(
                model, key, scenario.workload, technique, profile, engine.max_num_batched_tokens, engine.max_num_seqs,
                context, stages,
            )  # fmt: skip
            compiled.clear()
            made[key] = DetailedCosts(compiled) if scenario.fidelity == "detailed" else compiled
        return made[key]

    return costs


def _moved(
    made: Callable[[ClusterSpec], ServingCosts | DetailedCosts], ends: Mapping[str, float]
) -> Callable[[ClusterSpec], ServingCosts | DetailedCosts]:
    return lambda cluster: made(cluster).moved(ends)


def serving_costs_sha256(scenario: Scenario) -> str:
    """Digest of all that says which costs a service takes: model, cluster, profile, dtypes, and of each pool how its
    engine runs. Placement, routing, requests and limits of batches are not in it: costs are off by the same under each.

    Raises:
        InputError: as :func:`build_service`, which is to be called before.
    """
    spec = scenario.serving
    assert spec is not None
    cluster = scenario.cluster_spec()
    pools = [
        {"role": role, "cluster": whole.model_dump(mode="json"), "link": link, "pp": engine.pp,
         "technique": asdict(_technique(scenario, engine))}
        for role, engine, whole, _, _, link in _stages(scenario, spec, cluster)
    ]  # fmt: skip
    return costs_sha256(scenario, pools)


@lru_cache(maxsize=8)
def _compiled(
    model: ModelSpec, cluster: str, workload: Workload, technique: Technique, profile: HardwareProfile | None,
    tokens: int, seqs: int, context: int, stages: str | None,
) -> ServingCosts:  # fmt: skip
    """Costs that the runs of a scenario share; ``cluster`` and ``stages`` are documents, which can be compared."""
    spec, whole = ClusterSpec.model_validate_json(cluster), stages and ClusterSpec.model_validate_json(stages)
    return ServingCosts(model, spec, workload, technique, profile, tokens, seqs, context, whole or None)


# ---------------------------------------------------------------------- planning again


def _replanner(
    scenario: Scenario, model: ModelSpec, pool: Pool, profile: HardwareProfile | None, work: Workload
) -> Replan:
    own_R = np.bincount(pool.placement.rank_of_slot_P, minlength=pool.cluster.num_ranks)
    usual = scenario.planner if "planner" in scenario.model_fields_set else "greedy"
    expert_bytes = model.expert_bytes(scenario.workload.weight_dtype)
    device = pool.cluster.accelerator

    def replan(load_LE: Floats, cluster: ClusterSpec, current: Placement, planner: str | None) -> Replanned:
        live_R = working(cluster)
        slots_R = np.bincount(current.rank_of_slot_P, minlength=cluster.num_ranks)
        if (current.live_R != live_R).any():  # a rank was lost or came back
            redundant = max(0, int(own_R[live_R].sum()) - model.num_experts)
            slots_R, _ = slots_of_ranks(model, cluster, scenario.workload, redundant, None)
        room = kv_room(_held(model, pool.engine), cluster, work, pool.engine, slots_R)
        load = ExpertLoad(load_LE[None], ("recent",), model.moe_layer_ids, model.top_k)
        problem = _problem(scenario, model, cluster, slots_R, load, profile)
        found = answer_of(planner or usual, load_plugin("planners", planner or usual), problem).placement
        found = align(current, found, problem)
        moves = [_layer_moves(current, found, layer, expert_bytes, device) for layer in range(len(load_LE))]
        seconds_L, bytes_L = np.array(moves, float).T
        order = tuple(np.flatnonzero(bytes_L).tolist())
        return Replanned(found, order, seconds_L, bytes_L, room.tokens if room.tokens is not None else 2**40)

    return replan


def _layer_moves(
    before: Placement, after: Placement, layer: int, expert_bytes: float, device: AcceleratorSpec
) -> tuple[float, float]:
    """(seconds, bytes) to bring one layer's experts to their new ranks."""

    def row(placement: Placement) -> Placement:
        rows = placement.physical_to_logical_LP[layer : layer + 1]
        return replace(placement, physical_to_logical_LP=rows, share_LP=None)

    up, nic = device.scale_up_bandwidth or device.nic_bandwidth, device.nic_bandwidth
    found = migration_of(row(before), row(after), (layer,), np.zeros(1), expert_bytes, up, nic)
    return found.seconds, found.bytes
