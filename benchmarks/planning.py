"""Planning figures, beside the peers in the same run: ``python benchmarks/planning.py [--section NAME] [--out FILE]``.

Sections: ``routing`` (recorded DeepSeek-V2-Lite routing: plan on the first half of a task, score on the second),
``replan`` (one task's plan on another task, within a migration budget), ``shapes`` (58 layers x 256 experts, 288
slots), ``small`` (Mixtral, proven optimum beside MoETuner), ``unequal`` (8 of 32 ranks at 0.7x).
``routing`` and ``replan`` read the public data named by MOEPLAN_DATA and are skipped without it. Peers: the EPLB policy
(planner ``greedy``: the public code's answers up to ties), MoETuner, ExFlow, and the hypergraph partitioner
Mt-KaHyPar where it is installed (``pip install moeplan[bench]``). All seeds are 0.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.evaluation import Evaluation, evaluate
from moeplan.costs.operating_point import layer_costs
from moeplan.files import write_text
from moeplan.pipeline.inputs import profile_of
from moeplan.planning.bounds import bounds_of, most_kept
from moeplan.planning.joint import joint
from moeplan.planning.migration import moves_needed
from moeplan.planning.prepare import objective_value
from moeplan.planning.problem import PlanningProblem, PlanningResult
from moeplan.registry import load_plugin
from moeplan.routing.loads import expert_load
from moeplan.routing.popularity import block_transitions
from moeplan.specs.clusters import sized_cluster
from moeplan.specs.models import find_model
from moeplan.specs.workload import Objective, Workload

Row = dict[str, Any]
TASKS = ("intent", "law", "summary")


def problem_of(
    model_name: str, load: ExpertLoad, ranks: int, nodes: int, redundant: int = 0, **fields: Any
) -> PlanningProblem:
    model, cluster = find_model(model_name), sized_cluster("h100-sxm", ranks, nodes)
    objective = fields.pop("objective", Objective())
    slots = np.full(ranks, (model.num_experts + redundant) // ranks, dtype=np.int64)
    return PlanningProblem(
        load=load,
        experts_L=np.full(load.num_layers, model.num_experts, dtype=np.int64),
        slots_R=slots,
        speed_R=fields.pop("speed_R", np.ones(ranks)),
        ranks_per_node=ranks // nodes,
        costs=layer_costs(
            model, cluster, Workload(), objective, profile_of(fields.pop("profile", None), cluster.accelerator.name)
        ),
        objective=objective,
        **fields,
    )


def timed(
    planner: Callable[[PlanningProblem], PlanningResult], problem: PlanningProblem
) -> tuple[PlanningResult, float]:
    start = time.perf_counter()
    with threadpool_limits(1):
        result = planner(problem)
    return result, time.perf_counter() - start


def score(load: ExpertLoad, placement: Placement, problem: PlanningProblem) -> Evaluation:
    return evaluate(load, placement, problem.costs, problem.objective, problem.speed_R)


def task_halves(data: Path, task: str) -> tuple[ExpertLoad, ExpertLoad]:
    with np.load(data / "routing" / "deepseek_v2_lite_esft.npz") as file:
        experts, layer_ids = file[f"{task}_experts"], tuple(int(x) for x in file["moe_layers"])
    half = len(experts) // 2
    first, second = (
        expert_load(RoutingTrace(part.astype(np.int16), 64, layer_ids)) for part in (experts[:half], experts[half:])
    )
    return first, second


def kahypar_nodes(load: ExpertLoad, nodes: int) -> np.ndarray | None:
    """Node of each expert ``[L, E]`` by Mt-KaHyPar: connectivity, equal numbers of experts; None if not installed."""
    try:
        import mtkahypar
    except ImportError:
        return None
    kahypar = mtkahypar.initialize(1)
    context = kahypar.context_from_preset(mtkahypar.PresetType.QUALITY)
    context.set_partitioning_parameters(nodes, 0.0, mtkahypar.Objective.KM1)
    context.logging = False
    mtkahypar.set_seed(0)
    assert load.trace is not None
    rows = []
    for layer in range(load.num_layers):
        tokens, weights = np.unique(np.sort(load.trace.experts_TLK[:, layer], axis=1), axis=0, return_counts=True)
        graph = kahypar.create_hypergraph(
            context, load.num_experts, len(tokens), tokens.tolist(), [1] * load.num_experts, weights.tolist()
        )
        rows.append(graph.partition(context).get_partition())
    return np.asarray(rows)


def by_nodes(problem: PlanningProblem, node_LE: np.ndarray) -> Placement:
    return problem.placement(np.argsort(node_LE, axis=1, kind="stable"))


def routing(data: Path) -> Iterator[Row]:
    for task in TASKS:
        first, second = task_halves(data, task)
        for ranks, nodes, redundant in [
            (r, n, extra) for r, n in ((4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (16, 4)) for extra in (0, 16)
        ]:
            problem = problem_of("deepseek-v2-lite", first, ranks, nodes, redundant)
            ours, seconds = timed(joint, problem)
            eplb, _ = timed(load_plugin("planners", "greedy"), problem)
            plain = problem_of("deepseek-v2-lite", first, ranks, nodes)
            contiguous, _ = timed(load_plugin("planners", "contiguous"), plain)
            mine, theirs = score(second, ours.placement, problem), score(second, eplb.placement, problem)
            before = score(second, contiguous.placement, plain)
            row: Row = {
                "task": task,
                "ranks": ranks,
                "nodes": nodes,
                "redundant": redundant,
                "seconds": seconds,
                "max_over_mean": float(mine.max_over_mean_WL.mean()),
                "max_over_mean_eplb": float(theirs.max_over_mean_WL.mean()),
                "load_ratio": float(mine.max_over_mean_WL.mean() / theirs.max_over_mean_WL.mean()),
                "step_time_ratio_to_eplb": float(mine.time_WL.sum() / theirs.time_WL.sum()),
            }
            if nodes > 1 and mine.counts and before.counts and theirs.counts:
                touched = [x.counts.nodes_per_token_WL.mean() for x in (mine, before, theirs)]  # type: ignore[union-attr]
                row |= {"nodes_per_token": float(touched[0]), "below_contiguous": float(1 - touched[0] / touched[1])}
                row["eplb_below_contiguous"] = float(1 - touched[2] / touched[1])
                nearest = problem_of(
                    "deepseek-v2-lite", first, ranks, nodes, redundant, objective=Objective(replica_split="nearest")
                )
                if redundant == 0:
                    for name, placement in _traffic_peers(plain, first, nodes):
                        other = score(second, placement, plain)
                        if other.counts is not None:
                            share = 1 - other.counts.nodes_per_token_WL.mean() / touched[1]
                            row |= {f"{name}_below_contiguous": float(share)}
                            row |= {f"{name}_max_over_mean": float(other.max_over_mean_WL.mean())}
                else:
                    close, _ = timed(joint, nearest)
                    found = score(second, close.placement, nearest)
                    row["arrivals_nearest"] = float(found.counts.node_arrivals_WLN.sum(axis=2).mean())  # type: ignore[union-attr]
                    row["arrivals_even"] = float(mine.counts.node_arrivals_WLN.sum(axis=2).mean())
            yield row


def _traffic_peers(problem: PlanningProblem, load: ExpertLoad, nodes: int) -> Iterator[tuple[str, Placement]]:
    partition = kahypar_nodes(load, nodes)
    if partition is not None:
        yield "kahypar", by_nodes(problem, partition)
    yield "exflow", timed(load_plugin("planners", "exflow"), problem)[0].placement


def replan(data: Path) -> Iterator[Row]:
    for old, new in (("law", "intent"), ("intent", "summary"), ("summary", "law")):
        was, now = task_halves(data, old)[0], task_halves(data, new)[0]
        for ranks, nodes in ((8, 1), (16, 2)):
            current = timed(joint, problem_of("deepseek-v2-lite", was, ranks, nodes))[0].placement
            problem = problem_of("deepseek-v2-lite", now, ranks, nodes)
            full = timed(joint, problem)[0].placement
            start, best = objective_value(problem, current), objective_value(problem, full)
            moves = int(moves_needed(current, full).sum())
            row: Row = {"from": old, "to": new, "ranks": ranks, "nodes": nodes, "full_moves": moves}
            for percent in (5, 25):
                budget = now.num_layers * 64 * percent // 100
                limited = problem_of("deepseek-v2-lite", now, ranks, nodes, current=current, max_moves=budget)
                found, seconds = timed(joint, limited)
                gain = (start - objective_value(limited, found.placement)) / (start - best)
                moved = int(moves_needed(current, found.placement).sum())
                row |= {f"gain_at_{percent}": gain, f"moves_at_{percent}": moved, f"seconds_at_{percent}": seconds}
            yield row


def shapes(_data: Path) -> Iterator[Row]:
    for kind, skew in (("lognormal", 0.3), ("lognormal", 0.6), ("zipf", 0.8), ("zipf", 1.2)):
        load_LE, flow = block_transitions(58, 256, skew, 0.5, np.random.default_rng(0), kind=kind)
        load = ExpertLoad(load_LE[None], ("all",), tuple(range(3, 61)), 8, transitions_LEE=np.asarray(flow))
        for ranks in (32, 36, 72, 144):
            row: Row = {"kind": kind, "skew": skew, "ranks": ranks, "slots": 288}
            alone = problem_of("deepseek-v3", load, ranks, 4, 32, objective=Objective(kind="load"))
            ours, row["load_seconds"] = timed(joint, alone)
            eplb, _ = timed(load_plugin("planners", "greedy"), alone)
            mine, theirs = score(load, ours.placement, alone), score(load, eplb.placement, alone)
            bound = next(b for b in bounds_of(alone, ours) if b.quantity == "max/mean load")
            row |= {
                "max_over_mean": float(mine.max_over_mean_WL.mean()),
                "eplb": float(theirs.max_over_mean_WL.mean()),
                "worse_layers": int((mine.max_over_mean_WL > theirs.max_over_mean_WL + 1e-9).sum()),
                "load_gap": bound.gap,
                "load_only_same_node": float(mine.same_node_L[:-1].mean()),  # type: ignore[index]
            }
            tight = (("_tight", "0.5 %"),) if (kind, skew) == ("lognormal", 0.6) else ()
            for name, slack in (("", "5 %"), *tight):
                together = problem_of(
                    "deepseek-v3", load, ranks, 4, 32, objective=Objective(return_mode="stay", max_imbalance=slack)  # type: ignore[arg-type]
                )
                stay, row[f"stay_seconds{name}"] = timed(joint, together)
                found = score(load, stay.placement, together)
                start = time.perf_counter()
                proof = bounds_of(together, stay, found)
                row |= {
                    f"bound_seconds{name}": time.perf_counter() - start,
                    f"same_node{name}": float(found.same_node_L[:-1].mean()),  # type: ignore[index]
                    f"stay_max_over_mean{name}": float(found.max_over_mean_WL.mean()),
                    f"joint_gap{name}": proof[0].gap,
                }
            flow_L = np.asarray(flow) / np.asarray(flow).sum(axis=(1, 2), keepdims=True)
            cap = 1.05 * row["max_over_mean"]  # no node is above its busiest rank
            row["same_node_bound"] = float(np.mean([most_kept(part, 4, 72, cap) for part in flow_L]))
            yield row


def small(_data: Path) -> Iterator[Row]:
    load_LE, flow = block_transitions(32, 8, 0.25, 0.5, np.random.default_rng(0))
    load = ExpertLoad(load_LE[None], ("all",), tuple(range(32)), 2, transitions_LEE=np.asarray(flow))
    for ranks, nodes in ((4, 1), (8, 2)):
        problem = problem_of("mixtral-8x7b", load, ranks, nodes, objective=Objective(return_mode="stay"))
        ours, seconds = timed(joint, problem)
        theirs, moetuner_seconds = timed(load_plugin("planners", "moetuner"), problem)
        yield {
            "ranks": ranks,
            "nodes": nodes,
            "status": ours.status,
            "argument": ours.optimal_for,
            "seconds": seconds,
            "step_s": objective_value(problem, ours.placement),
            "moetuner_step_s": objective_value(problem, theirs.placement),
            "moetuner_seconds": moetuner_seconds,
        }


def unequal(_data: Path) -> Iterator[Row]:
    load_LE, _ = block_transitions(58, 256, 0.6, 0.5, np.random.default_rng(0))
    load = ExpertLoad(load_LE[None], ("all",), tuple(range(3, 61)), 8)
    speed = np.where(np.arange(32) < 8, 0.7, 1.0)
    problem = problem_of("deepseek-v3", load, 32, 4, 32, objective=Objective(kind="load"), speed_R=speed)
    ours, seconds = timed(joint, problem)
    eplb, _ = timed(load_plugin("planners", "greedy"), problem_of("deepseek-v3", load, 32, 4, 32))
    bound = next(b for b in bounds_of(problem, ours) if b.quantity == "max/mean load")
    theirs = score(load, eplb.placement, problem)
    yield {
        "seconds": seconds,
        "over_bound": bound.gap,
        "eplb_over_bound": float(theirs.max_over_mean_WL.mean() / bound.bound - 1),
    }


SECTIONS = {"routing": routing, "replan": replan, "shapes": shapes, "small": small, "unequal": unequal}


def verdicts(rows: dict[str, list[Row]]) -> list[Row]:
    """Every target with the figure reached."""
    out: list[Row] = []

    def add(name: str, value: float, target: str, reached: bool) -> None:
        out.append({"figure": name, "value": value, "target": target, "reached": bool(reached)})

    if found := rows.get("routing"):
        one = [r["load_ratio"] for r in found if r["nodes"] == 1]
        many = [r["load_ratio"] for r in found if r["nodes"] > 1]
        add("one node: worst max/mean load over EPLB's, held out", max(one), "<= 1.005", max(one) <= 1.005)
        add("several nodes: worst max/mean load over EPLB's, held out", max(many), "<= 1.05", max(many) <= 1.05)
        for nodes, target in ((2, 0.15), (4, 0.24)):
            for ranks in sorted({r["ranks"] for r in found if r["nodes"] == nodes}):
                least = target
                for extra in (0, 16):
                    part = [
                        r["below_contiguous"]
                        for r in found
                        if (r["nodes"], r["ranks"], r["redundant"]) == (nodes, ranks, extra)
                    ]
                    mean = float(np.mean(part))
                    name = f"nodes per token below contiguous, {ranks} ranks on {nodes} nodes, {extra} redundant"
                    add(name, mean, f">= {least:.4f}", mean >= least)
                    least = max(least, mean)  # with replicas further than without
    if found := rows.get("replan"):
        for percent, target in ((5, 0.55), (25, 0.80)):
            least = min(r[f"gain_at_{percent}"] for r in found)
            figure = f"least part of the full re-plan's gain at {percent} % of bytes"
            add(figure, least, f">= {target}", least >= target)
    if found := rows.get("shapes"):
        worst = max(r["max_over_mean"] / r["eplb"] for r in found)
        add("load-only: worst max/mean load over EPLB's", worst, "<= 1", worst <= 1 + 1e-9)
        gap = max(r["load_gap"] for r in found)
        add("load-only: largest proven gap", gap, "<= 0.01 where the bound allows", gap <= 0.01)
        add("rows with a gap above 0.01", sum(r["load_gap"] > 0.01 for r in found), "0", gap <= 0.01)
        for kind in ("lognormal", "zipf"):
            share = min(r["same_node"] for r in found if r["kind"] == kind)
            add(f"stay: least same-node share, {kind}", share, ">= 0.55", share >= 0.55)
        bound = min(r["same_node_bound"] for r in found)
        add("stay: least upper bound on that share", bound, "(below 0.55: out of reach)", True)
        slowest = max(r["stay_seconds"] + r["bound_seconds"] for r in found)
        add("stay: slowest plan with its proof, s", slowest, "<= 30 on two idle cores", slowest <= 30)
        slowest = max(r["load_seconds"] for r in found)
        add("load-only: slowest plan, s", slowest, "<= 2 on two idle cores", slowest <= 2)
        gap = max(r["joint_gap"] for r in found)
        add("stay: largest joint gap", gap, "below 0.20 is the aim", gap < 0.2)
    if found := rows.get("small"):
        proven = sum(r["status"] == "optimal" for r in found)
        add("Mixtral: both proven optimal", float(proven), "2", proven == len(found))
        add("Mixtral: slowest, s", max(r["seconds"] for r in found), "< 20", max(r["seconds"] for r in found) < 20)
        least = min(r["moetuner_step_s"] / r["step_s"] for r in found)
        add("Mixtral: MoETuner's step over ours", least, ">= 1", least >= 1 - 1e-12)
    if found := rows.get("unequal"):
        add("unequal ranks: over the bound", found[0]["over_bound"], "<= 0.001", found[0]["over_bound"] <= 0.001)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="write all rows as JSON")
    arguments = parser.parse_args()
    data = Path(os.environ.get("MOEPLAN_DATA", "")) if os.environ.get("MOEPLAN_DATA") else None
    rows: dict[str, list[Row]] = {}
    # Compile first: figures are of planning, not of the compiler.
    warm_load, warm_flow = block_transitions(3, 16, 0.6, 0.5, np.random.default_rng(0))
    for mode in ("load", "stay"):
        objective = Objective(kind="load") if mode == "load" else Objective(return_mode="stay")
        warm = ExpertLoad(warm_load[None], ("all",), (0, 1, 2), 2, transitions_LEE=np.asarray(warm_flow))
        for slots in (5, 2):
            ranks = 4 if slots == 5 else 8
            joint(
                PlanningProblem(
                    load=warm, experts_L=np.full(3, 16), slots_R=np.full(ranks, max(slots, 16 // ranks + (slots == 5))),
                    speed_R=np.ones(ranks), ranks_per_node=ranks // 2, objective=objective,
                    costs=layer_costs(
                        find_model("mixtral-8x7b"), sized_cluster("h100-sxm", ranks, 2), Workload(), objective
                    ),
                )
            )  # fmt: skip
    for name in arguments.section or SECTIONS:
        if name in ("routing", "replan") and data is None:
            print(f"{name}: skipped, MOEPLAN_DATA is not set")
            continue
        rows[name] = []
        for row in SECTIONS[name](data or Path()):
            rows[name].append(row)
            if arguments.out:  # a long run that is stopped keeps what it has
                write_text(arguments.out, json.dumps({"rows": rows}, indent=1) + "\n")
            print(name, json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    judged = verdicts(rows)
    if arguments.out:
        about = {"date": time.strftime("%Y-%m-%d"), "command": "python benchmarks/planning.py", "cores": os.cpu_count()}
        write_text(arguments.out, json.dumps({"about": about, "figures": judged, "rows": rows}, indent=1) + "\n")
    print()
    for line in judged:
        reached = "reached" if line["reached"] else "NOT"
        print(f"{reached:8} {line['value']:10.4f}  {line['target']:32} {line['figure']}")


if __name__ == "__main__":
    main()
