"""What every rank of a live run does: calibrate, plan, run the cases, all in one process group.

Started by run.py through :class:`nodes.Nodes`. Protocol: one numeric thread per rank, pinned, in real time where root;
calibration and cases visited in shuffled passes, each visit one untimed call and then timed ones, a time being the
slowest rank's; CPU time that belongs to no rank is counted.

``T`` tokens of this rank, ``L`` layers, ``S`` slots of this rank, ``R`` ranks, ``E`` experts.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from predict import Calibration, Machine, balanced, cluster_of, model_of, predict
from routing import Home, Recorded, Shape, Skew, load_of, traces

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.operating_point import layer_costs
from moeplan.errors import SpecError
from moeplan.execution.dispatch import PairDispatcher, make_dispatcher
from moeplan.execution.experts import grouped_swiglu, initial_row
from moeplan.execution.groups import Mesh, build_mesh
from moeplan.execution.layer import ExpertLayer
from moeplan.execution.monitor import LoadMonitor
from moeplan.planning.problem import PlanningProblem
from moeplan.profiling.collectives import CollectiveTimer, Communicator
from moeplan.profiling.device import find_device
from moeplan.registry import load_plugin
from moeplan.specs.workload import DispatchKind, Objective, Workload

__all__ = ["Job", "Study"]

PAIRS_M = (4, 8, 16, 32, 64, 128, 256)  # per expert
VISIT_S = 0.05
MAX_CALLS = 4


@dataclass(frozen=True, slots=True)
class Study:
    """One model: which routings, tokens per rank and planners, and at which tokens per rank to calibrate (3 or more:
    fewer make no measured curve of an exchange)."""

    shape: Shape
    routings: tuple[Skew | Home | Recorded, ...]
    batches: tuple[int, ...]
    planners: tuple[str, ...]
    calibrated: tuple[int, ...]
    dispatch: DispatchKind = "per_expert"

    def __post_init__(self) -> None:
        if len(self.calibrated) < 3:
            raise SpecError(f"calibrated ({self.calibrated}) must have 3 sizes or more; fewer make no measured curve")


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks do; written for them by run.py. ``overhead``: also time the layer against a plain loop."""

    machine: Machine
    studies: tuple[Study, ...]
    passes: int = 6
    seed: int = 0
    overhead: bool = False

    def write(self, path: Path) -> None:
        """As JSON: for :meth:`read`."""
        document = asdict(self)
        for study, made in zip(self.studies, document["studies"], strict=True):
            made["routings"] = [{"kind": type(r).__name__} | asdict(r) for r in study.routings]
        path.write_text(json.dumps(document))

    @classmethod
    def read(cls, path: Path) -> Job:
        """What :meth:`write` wrote."""
        kinds = {kind.__name__: kind for kind in (Home, Recorded, Skew)}
        document = json.loads(path.read_text())
        machine = document["machine"]
        machine["core_R"] = tuple(machine["core_R"])
        studies = []
        for made in document["studies"]:
            made["routings"] = tuple(kinds[r.pop("kind")](**r) for r in made["routings"])
            made["shape"] = Shape(**made["shape"])
            studies.append(Study(**{k: tuple(v) if isinstance(v, list) else v for k, v in made.items()}))
        return cls(Machine(**machine), tuple(studies), document["passes"], document["seed"], document["overhead"])


Call = Callable[[int], object]


@dataclass(slots=True)
class _Lab:
    job: Job
    mesh: Mesh
    timer: CollectiveTimer
    samples: dict[Any, list[list[float]]]
    """Microseconds by case: one list per pass."""

    def run(self, cases: dict[Any, Call]) -> None:
        """Visit all cases in shuffled passes."""
        rng = random.Random(self.job.seed)
        calls = {}
        for key, call in cases.items():
            call(-1)
            first_us = min(self.timer.time(call, 2))
            calls[key] = max(1, min(MAX_CALLS, round(VISIT_S * 1e6 / first_us)))
        for _ in range(self.job.passes):
            order = list(cases)
            rng.shuffle(order)
            for key in order:
                cases[key](-1)
                self.samples.setdefault(key, []).append(self.timer.time(cases[key], calls[key]))


def contiguous(shape: Shape, ranks: int, per_node: int) -> Placement:
    rows = np.tile(np.arange(shape.experts, dtype=np.int32), (shape.layers, 1))
    return Placement(rows, np.repeat(np.arange(ranks, dtype=np.int32), shape.experts // ranks), shape.experts, ranks,
                     per_node)  # fmt: skip


class _Bank:
    """All experts' weights on every rank, so that any placement can be laid out without a move."""

    def __init__(self, shape: Shape) -> None:
        self.rows = {
            (l, e): initial_row(shape.hidden, shape.inter, 0, l, e)
            for l in range(shape.layers)
            for e in range(shape.experts)
        }

    def layers(self, lab: _Lab, study: Study, placement: Placement, mesh: Mesh | None = None) -> list[ExpertLayer]:
        mesh, shape, made = mesh or lab.mesh, study.shape, []
        for l in range(shape.layers):
            layer = ExpertLayer(mesh, shape.hidden, shape.inter, placement, l)
            layer.dispatcher = make_dispatcher(study.dispatch, mesh, layer.clock)
            layer.load(lambda e, l=l: self.rows[l, e])
            made.append(layer.requires_grad_(False))
        return made


def _tokens(trace: RoutingTrace, rank: int, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs ``[T, H]``, choices ``[L, T, K]`` and even weights of this rank's tokens."""
    assert trace.source_rank_T is not None
    mine = np.flatnonzero(trace.source_rank_T == rank)
    experts = torch.from_numpy(trace.experts_TLK[mine].transpose(1, 0, 2).astype(np.int64)).contiguous()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(len(mine), shape.hidden, generator=generator)
    return x, experts, torch.full(experts.shape[1:], 1 / shape.top_k)


def _step(layers: list[ExpertLayer], trace: RoutingTrace, rank: int, shape: Shape) -> Call:
    x, experts, weights = _tokens(trace, rank, shape)

    def call(_i: int) -> torch.Tensor:
        h = x
        with torch.inference_mode():
            for l, layer in enumerate(layers):
                h = h + layer(h, experts[l], weights)
        return h

    return call


def _exchange_calls(
    layer: ExpertLayer, x: torch.Tensor, experts_TK: torch.Tensor, even_TK: torch.Tensor
) -> tuple[Call, Call]:
    """Dispatch and combine of balanced tokens; of pairs the exchange alone, the rest is in what whole layers take more.

    Relayed copies are handled between two exchanges: there all of it is timed.
    """
    with torch.inference_mode():
        sent = layer.dispatcher.dispatch(x, layer.table.slots(experts_TK), even_TK, layer.table, 0)
    if isinstance(layer.dispatcher, PairDispatcher):
        way, pairs_NH = sent.way, torch.zeros(experts_TK.numel(), x.shape[1])
        return (
            lambda _i: way.wire.send(pairs_NH, way.send_R, way.recv_R, "dispatch"),
            lambda _i: way.wire.send(sent.rows_MH, way.recv_R, way.send_R, "combine"),
        )

    def out(_i: int) -> object:
        with torch.inference_mode():
            return layer.dispatcher.dispatch(x, layer.table.slots(experts_TK), even_TK, layer.table, 0)

    def back(_i: int) -> object:
        with torch.inference_mode():
            return layer.dispatcher.combine(sent.rows_MH, sent)

    return out, back


def _calibration_cases(lab: _Lab, study: Study, bank: _Bank, even: Placement) -> dict[Any, Call]:
    shape, rank = study.shape, lab.mesh.world.rank
    cases: dict[Any, Call] = {}
    slots = shape.experts // lab.mesh.world.size
    rows = torch.randn(slots * PAIRS_M[-1], shape.hidden)
    weights = [torch.stack([bank.rows[l, s] for s in range(slots)]) for l in range(shape.layers)]
    for active in sorted({max(1, slots // 4), slots}):
        for m in PAIRS_M:
            def experts(i: int, active: int = active, m: int = m) -> object:
                with torch.inference_mode():
                    return grouped_swiglu(rows[: active * m], weights[i % shape.layers][:active], [m] * active,
                                          shape.inter)  # fmt: skip

            cases["experts", active, m] = experts
    scopes: list[tuple[int, Mesh, Placement]] = [(lab.job.machine.nodes, lab.mesh, even)]
    if lab.job.machine.nodes > 1:
        inside = replace(lab.mesh, ep=lab.mesh.intra, inter=replace(lab.mesh.inter, rank=0, ranks=(rank,), group=None))
        per_node = lab.job.machine.per_node
        scopes.append((1, inside, contiguous(shape, per_node, per_node)))
    for b in study.calibrated:
        for nodes, mesh, placement in scopes:
            layer = bank.layers(lab, replace(study, shape=replace(shape, layers=1)), placement, mesh)[0]
            trace = balanced(replace(shape, layers=1), mesh.ep.size, b)
            x, experts_LTK, even_TK = _tokens(trace, mesh.ep.rank, shape)

            out, back = _exchange_calls(layer, x, experts_LTK[0], even_TK)
            cases["dispatch", nodes, mesh.ep.size, b] = out
            cases["combine", nodes, mesh.ep.size, b] = back
        cases["layer", b] = _step(bank.layers(lab, study, even), balanced(shape, lab.mesh.world.size, b), rank, shape)
    return cases


def _calibration(lab: _Lab, study: Study, statistic: Callable[[list[float]], float]) -> Calibration:
    shape, ranks = study.shape, lab.job.machine.ranks
    experts, alltoall, layer_s = [], [], {}
    for key, passes in lab.samples.items():
        us = statistic([value for samples in passes for value in samples])
        name = {"hidden": shape.hidden, "num_experts": shape.experts, "top_k": shape.top_k, "dtype": "fp32"}
        if key[0] == "experts":
            _, active, m = key
            experts.append(name | {
                "inter": shape.inter, "ep": ranks, "tp": 1, "distribution": "balanced", "kernel": "grouped_swiglu",
                "tokens": active * m * ranks // shape.top_k, "rank_pairs": active * m, "active_experts": active,
                "latency_us": us,
            })  # fmt: skip
        elif key[0] in ("dispatch", "combine"):
            phase, nodes, size, b = key
            # What the rows sent one copy per is known by their mode.
            alltoall.append(name | {
                "mode": "flat" if study.dispatch == "per_expert" else "normal", "phase": phase, "nodes": nodes,
                "ranks": size, "tokens_per_rank": b,
                "kernel": "gloo_alltoall", "latency_us": us,
            })  # fmt: skip
        elif key[0] == "layer":
            layer_s[key[1]] = us * 1e-6 / shape.layers
    return Calibration(experts, alltoall, layer_s)


def p20(samples: list[float]) -> float:
    return float(np.percentile(samples, 20))


def median(samples: list[float]) -> float:
    return float(np.median(samples))


def _plan(lab: _Lab, study: Study, calibration: Calibration) -> dict[tuple[str, str], tuple[Placement, float]]:
    """Placements by routing and planner, and the seconds each took, on rank 0."""
    shape, machine = study.shape, lab.job.machine
    found = {}
    for routing in study.routings:
        trace, _ = traces(routing, shape, machine.ranks, machine.nodes, study.batches[0])
        model, cluster = model_of(shape), cluster_of(machine)
        workload = Workload(
            phase="prefill", batch_per_rank=study.batches[-1], weight_dtype="fp32", activation_dtype="fp32"
        )
        objective = Objective(dispatch=study.dispatch)
        problem = PlanningProblem(
            load=load_of(trace),
            experts_L=np.asarray(model.experts_L),
            slots_R=np.full(machine.ranks, shape.experts // machine.ranks),
            speed_R=np.ones(machine.ranks),
            ranks_per_node=machine.per_node,
            costs=layer_costs(model, cluster, workload, objective, calibration.profile()),
            objective=objective,
        )
        for planner in study.planners:
            begun = time.perf_counter()
            placement = load_plugin("planners", planner)(problem).placement
            found[routing.name, planner] = (placement, time.perf_counter() - begun)
    return found


def _cpu_ticks() -> float:
    """Seconds that all cores have worked: user, nice and system time, and what the hypervisor took."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (fields[0] + fields[1] + fields[2] + fields[7]) / os.sysconf("SC_CLK_TCK")


def _quietly(lab: _Lab, cases: dict[Any, Call]) -> dict[str, Any]:
    """Run the cases; how long it took, and the part of all cores that worked for others meanwhile."""
    gc.collect()
    gc.freeze()
    dist.barrier()
    busy, own, begun = _cpu_ticks(), sum(os.times()[:2]), time.perf_counter()
    lab.run(cases)
    elapsed = time.perf_counter() - begun
    mine = torch.tensor([sum(os.times()[:2]) - own], dtype=torch.float64)
    dist.all_reduce(mine)
    foreign = (_cpu_ticks() - busy - float(mine)) / (elapsed * (os.cpu_count() or 1))
    return {"seconds": elapsed, "foreign_cpu_share": max(0.0, foreign)}


def _overhead(lab: _Lab, study: Study) -> dict[str, Any]:
    """The executor's layers, with and without the monitor, beside a loop written by hand over the same kernels.

    The loop knows one fixed placement: contiguous blocks, no copies.
    """
    shape, rank, ranks = study.shape, lab.mesh.world.rank, lab.job.machine.ranks
    even = contiguous(shape, ranks, lab.job.machine.per_node)
    layers = _Bank(shape).layers(lab, study, even)
    _, trace = traces(Skew(0.5), shape, ranks, lab.job.machine.nodes, study.batches[-1])
    step = _step(layers, trace, rank, shape)
    x, experts_LTK, weights_TK = _tokens(trace, rank, shape)
    monitor = LoadMonitor(lab.mesh, shape.layers, shape.experts)
    slots, top_k = shape.experts // ranks, shape.top_k

    def watch(_i: int) -> object:
        monitor.observe(list(experts_LTK))
        return monitor.end_step()

    def loop(_i: int) -> torch.Tensor:
        h = x
        with torch.inference_mode():
            for l, layer in enumerate(layers):
                flat = experts_LTK[l].flatten()
                order = flat.argsort(stable=True)
                counts_E = torch.bincount(flat, minlength=shape.experts)
                from_RS = torch.empty_like(counts_E)
                dist.all_to_all_single(from_RS, counts_E)
                out_R = counts_E.view(ranks, slots).sum(1).tolist()
                from_RS = from_RS.view(ranks, slots)
                in_R = from_RS.sum(1).tolist()
                got = h.new_empty(sum(in_R), shape.hidden)
                dist.all_to_all_single(got, h[order // top_k], in_R, out_R)
                slot_M = torch.arange(slots).repeat(ranks).repeat_interleave(from_RS.flatten())
                by_slot = slot_M.argsort(stable=True)
                done = grouped_swiglu(got[by_slot], layer.weights_SW, from_RS.sum(0).tolist(), shape.inter)
                back = torch.empty_like(done)
                back[by_slot] = done
                home = h.new_empty(len(flat), shape.hidden)
                dist.all_to_all_single(home, back, out_R, in_R)
                each = torch.empty_like(home)
                each[order] = home
                h = h + (each.view(-1, top_k, shape.hidden) * weights_TK[..., None]).sum(1)
        return h

    gap = float((loop(0) - step(0)).abs().max())  # type: ignore[operator]
    lab.job = replace(lab.job, passes=5 * lab.job.passes)
    answer = _quietly(lab, {"layer": step, "loop": loop, "monitor": watch})
    by_pass = {key: np.array([np.median(samples) for samples in passes]) for key, passes in lab.samples.items()}
    for name, ratio in (
        ("layer_over_loop", by_pass["layer"] / by_pass["loop"] - 1),
        ("monitor", by_pass["monitor"] / by_pass["layer"]),
    ):
        answer[name] = {
            "median": float(np.median(ratio)), "standard_error": float(1.25 * ratio.std(ddof=1) / len(ratio) ** 0.5),
        }  # fmt: skip
    return answer | {"tokens_per_rank": study.batches[-1], "ranks": ranks, "largest_difference": gap,
                     "median_us": {key: float(np.median(values)) for key, values in by_pass.items()}}  # fmt: skip


def _study(lab: _Lab, study: Study, bank: _Bank) -> dict[str, Any]:
    shape, machine, rank = study.shape, lab.job.machine, lab.mesh.world.rank
    even = contiguous(shape, machine.ranks, machine.per_node)
    calibration_cases = _calibration_cases(lab, study, bank, even)
    passes, lab.job = lab.job.passes, replace(lab.job, passes=2)
    lab.run(calibration_cases)
    lab.job = replace(lab.job, passes=passes)
    box = [_plan(lab, study, _calibration(lab, study, p20)) if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    plans = box[0]
    assert plans is not None
    lab.samples = {}
    cases: dict[Any, Call] = dict(calibration_cases)
    runs: dict[Any, tuple[RoutingTrace, Placement]] = {}
    worst = 0.0
    for routing in study.routings:
        layers = {planner: bank.layers(lab, study, plans[routing.name, planner][0]) for planner in study.planners}
        for b in study.batches:
            _, trace = traces(routing, shape, machine.ranks, machine.nodes, b)
            outputs = []
            for planner in study.planners:
                key = ("case", routing.name, b, planner)
                cases[key] = _step(layers[planner], trace, rank, shape)
                runs[key] = (trace, plans[routing.name, planner][0])
                outputs.append(cases[key](0))
            worst = max([worst, *(float((o - outputs[0]).abs().max()) for o in outputs)])  # type: ignore[operator]
    quiet = _quietly(lab, cases)
    gap = torch.tensor([worst], dtype=torch.float64)
    dist.all_reduce(gap, op=dist.ReduceOp.MAX)
    answer: dict[str, Any] = {
        "model": asdict(shape), "dispatch": study.dispatch, **quiet,
        "largest_difference_between_placements": float(gap), "cases": [],
    }  # fmt: skip
    if rank:
        return answer
    predicted = {
        name: predict(shape, machine, _calibration(lab, study, statistic), study.dispatch, list(runs.values()), even)
        for name, statistic in (("p20", p20), ("median", median))
    }
    for i, key in enumerate(runs):
        _, routing, b, planner = key
        by_pass = np.array([np.median(samples) for samples in lab.samples[key]]) * 1e-6
        every = np.concatenate(lab.samples[key]) * 1e-6
        answer["cases"].append({
            "routing": routing, "tokens_per_rank": b, "placement": planner,
            "tokens": runs[key][0].num_tokens,
            "p20_s": p20(every), "median_s": median(every), "p10_s": float(np.percentile(every, 10)),
            "p90_s": float(np.percentile(every, 90)), "pass_cv": float(by_pass.std(ddof=1) / by_pass.mean()),
            "samples": len(every), "passes": len(by_pass),
            "predicted_p20_s": predicted["p20"][i], "predicted_median_s": predicted["median"][i],
            "planning_s": plans[routing, planner][1],
        })  # fmt: skip
    answer["calibration_us"] = {" ".join(map(str, key)): p20([v for s in passes for v in s])
                                for key, passes in lab.samples.items() if key[0] != "case"}  # fmt: skip
    return answer


def main() -> None:
    """``python lab.py JOB OUT``: run the job as one rank."""
    job = Job.read(Path(sys.argv[1]))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    per_node = job.machine.per_node
    mesh = build_mesh(ranks_per_node=per_node)
    rank = mesh.world.rank
    comm = Communicator(find_device("cpu"), rank, tuple(r // per_node for r in range(job.machine.ranks)), dist)
    lab = _Lab(job, mesh, CollectiveTimer(comm), {})
    answers: dict[str, Any] = {"studies": []}
    for study in job.studies:
        lab.samples = {}
        answers["studies"].append(_study(lab, study, _Bank(study.shape)))
    if job.overhead:
        lab.samples = {}
        answers["overhead"] = _overhead(lab, job.studies[0])
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
