"""Predictions of the published measurements that ``moeplan validate published`` lists, kind of row by kind.

No row has a constant of its own; those that all rows share are :data:`CONSTANTS`.

``L`` layers, ``E`` experts, ``R`` ranks, ``P`` slots.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.costs.engine import EngineCosts, EngineSetup
from moeplan.costs.exchange import NVLINK_MODES, exchange_costs
from moeplan.costs.served import CALIBRATED, ServedPool, pass_times, served
from moeplan.costs.step import StepCost, StepModel
from moeplan.costs.technique import Technique
from moeplan.costs.training import TrainingCosts
from moeplan.costs.training_layers import PASSES
from moeplan.errors import MoeplanError
from moeplan.planning.greedy import rebalance_experts
from moeplan.routing.popularity import lognormal_profile, solve
from moeplan.simulation.detailed import simulate_step
from moeplan.simulation.training import simulate_training
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import cluster_for, find_accelerator
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model
from moeplan.specs.scenario import Scenario
from moeplan.specs.training import TrainingSpec
from moeplan.specs.workload import Workload

__all__ = ["CONSTANTS", "eplb_ratio", "predict", "step_cost", "step_s"]

Floats = NDArray[np.float64]

_HOST_MS, _ENGINE_MS, _LINKS = 6.0, 0.28, 0.8
_PLAYED = 6  # layers
_ROUNDS = 3  # of requests in a simulated closed loop, per request in flight
# Devices without tables of their own: the nearest relative's.
_PROFILE_OF = {"gb300": "gb200", "gb200": "gb200", "b300": "b200-sxm", "b200": "b200-sxm", "h100": "h100-sxm",
               "h800": "h100-sxm"}  # fmt: skip

CONSTANTS: dict[str, dict[str, Any]] = {
    "host_per_layer_ms": {
        "value": _HOST_MS,
        "meaning": "training whose recipe captures nothing in CUDA graphs: device idle per layer and micro-batch,"
        " forward and backward together",
    },
    "engine_per_layer_ms": {
        "value": _ENGINE_MS,
        "meaning": "serving measured end to end through an engine: time per layer and step that no kernel takes",
    },
    "links_reach": {
        "value": _LINKS,
        "meaning": "part of the data sheet's link bandwidth that exchanges and collectives without tables reach",
    },
    "passes": {
        "value": PASSES,
        "meaning": "training: reads and writes of a layer's hidden state beyond a forward's, both directions together",
    },
    "profile_of": {"value": _PROFILE_OF, "meaning": "whose measured kernels stand for a device without tables"},
}


@cache
def _profile(name: str) -> HardwareProfile | None:
    """A shipped profile. B200 has the NVLink of GB200, where the exchange over it was measured; H20 that of H100."""
    if name == "none":
        return None
    if name == "h20":
        like = load_profile("h100-sxm")
        links = {table: like.table(table) for table in ("alltoall", "collectives")}
        return HardwareProfile(like.meta.model_copy(update={"name": name, "tables": {}}), links)
    found = load_profile(name)
    if name == "b200-sxm":
        return found.with_rows("alltoall", load_profile("gb200").select("alltoall", mode=NVLINK_MODES))
    return found


def _even(model: ModelSpec, ranks: int, per_node: int, slots: int | None) -> tuple[Placement, Floats]:
    """Experts in order, redundant slots filled from the first on, and an even load."""
    E, L = model.num_experts, model.num_moe_layers
    count = slots or -(-E // ranks) * ranks
    rows = np.tile((np.arange(count) % E).astype(np.int32), (L, 1))
    place = (np.arange(count) * ranks // count).astype(np.int32)
    return Placement(rows, place, E, ranks, per_node), np.ones((L, E))


def _cluster(accelerator: str, nodes: int, per_node: int) -> ClusterSpec:
    """A cluster whose links reach what :data:`CONSTANTS` says."""
    cluster = cluster_for(accelerator, nodes, per_node)
    chip = cluster.accelerator
    reached = {name: _LINKS * getattr(chip, name) for name in ("scale_up_bandwidth", "nic_bandwidth")}
    return cluster.model_copy(update={"accelerator": chip.model_copy(update=reached)})


def _engine_s(model: str) -> float:
    return 1e-3 * _ENGINE_MS * find_model(model).num_layers


def _workload(c: dict[str, Any], phase: str, batch: int, context: int) -> Workload:
    return Workload.model_validate(
        {"phase": phase, "batch_per_rank": batch, "context": context, "weight_dtype": c["weight"],
         "activation_dtype": c["activation"]}
    )  # fmt: skip


def _step_model(
    c: dict[str, Any], phase: str, batch: int, context: int, overlap: str | None = None
) -> tuple[StepModel, Placement, Floats]:
    """Costs, placement and even load of a row's configuration."""
    model, cluster = find_model(c["model"]), _cluster(c["accelerator"], c["nodes"], c["ranks_per_node"])
    split = c.get("expert_tp", 1)
    placement, load_LE = _even(model, cluster.num_ranks // split, c["ranks_per_node"] // split, c["slots"])
    work = _workload(c, phase, batch, context)
    technique = Technique(
        dispatch=c["dispatch"],
        overlap=overlap or c["overlap"],  # type: ignore[arg-type]
        kv_dtype=c.get("kv", "bf16"),
        tp=c.get("tp", 1),
        expert_tp=split,
        dense_dtype=c.get("dense"),
        backend=c.get("backend"),
    )
    return StepModel(model, cluster, work, technique, _profile(c["profile"])), placement.over_groups(split), load_LE


def step_cost(c: dict[str, Any], phase: str, batch: int, context: int, overlap: str | None = None) -> StepCost:
    """A step of a row's configuration, experts loaded alike."""
    model, placement, load_LE = _step_model(c, phase, batch, context, overlap)
    return model.step(placement, load_LE)


def step_s(c: dict[str, Any], overlap: str | None = None) -> float:
    """Seconds of a row's step; two batches are played event by event, which the step mode bounds from below.

    Layers are alike: a few are played, the others take what the last of them add.
    """
    model, placement, load_LE = _step_model(c, c["phase"], c["batch"], c["context"], overlap)
    if model.technique.overlap != "two_batch":
        return float(model.step(placement, load_LE).total_s)

    def played_s(layers: int) -> float:
        few = replace(placement, physical_to_logical_LP=placement.physical_to_logical_LP[:layers])
        return simulate_step(model, few, load_LE[:layers]).total_s

    first, second = played_s(_PLAYED), played_s(2 * _PLAYED)
    return second + (len(load_LE) - 2 * _PLAYED) * (second - first) / _PLAYED


def _predict_step(c: dict[str, Any]) -> float:
    engine = _engine_s(c["model"]) if c.get("engine") else 0.0
    return float(c["batch"] / (step_s(c) + engine))


def _predict_closed_loop(c: dict[str, Any]) -> float:
    """Output tokens per second of a rank: each answer's decode steps, its share of them, and its prompt's prefill."""
    step = step_cost(c, "decode", c["batch"], c["isl"] + c["osl"] // 2).total_s
    decode = (step + _engine_s(c["model"])) / c["batch"]
    prefill = step_cost(c, "prefill", c["chunk"], c["isl"]).total_s / c["chunk"]
    return float(c["osl"] / (c["osl"] * decode + c["isl"] * prefill))


def _simulated(scenario: dict[str, Any]) -> dict[str, float]:
    """Headlines of a simulated service."""
    from moeplan.pipeline.serving import build_service
    from moeplan.simulation.outcome import outcome_of
    from moeplan.simulation.service import simulate_service

    service = build_service(Scenario.parse(scenario, "published"), 0)
    found = simulate_service(service.spec, service.requests, service.pools, keep_log=False)
    return outcome_of(found, service.spec).headlines


def _predict_served(c: dict[str, Any]) -> float:
    """Output tokens per second of a rank in a closed loop with a fixed number of requests in flight, simulated."""
    found = _simulated(
        {
            "model": c["model"],
            "cluster": c["accelerator"],
            "ranks": c["ranks"],
            "objective": {"dispatch": c["dispatch"]},
            "workload": {"weight_dtype": c["weight"], "activation_dtype": c["activation"]},
            "serving": {
                "requests": {
                    "arrivals": "closed-loop",
                    "concurrency": c["batch"] * c["ranks"],
                    "count": _ROUNDS * c["batch"] * c["ranks"],
                    "input_tokens": c["isl"],
                    "output_tokens": c["osl"],
                },
                "engine": {
                    "max_num_seqs": c["batch"],
                    "max_num_batched_tokens": c["chunk"],
                    "kv_dtype": c.get("kv", "bf16"),
                    "backend": c["backend"],
                    "step_overhead": f"{1e3 * _engine_s(c['model']):.4g} ms",
                },
                "experts": {"mode": "balanced"},
            },
        }
    )
    return found["output_tokens_per_s_per_gpu"]


def _predict_drafted(c: dict[str, Any]) -> float:
    """Output tokens per second of one request at a time with drafts; accepted drafts as elsewhere measured."""
    dense = c["dense"]
    setup = EngineSetup(
        find_model(c["model"]), find_accelerator(c["accelerator"]), "trtllm", tp=c["tp"], ep=c["ep"],
        expert_dtype=c["weight"], dense_dtype=dense, attention_dtype="bf16" if dense == "fp4" else dense,
        kv_dtype=c["kv"], draft_tokens=c["drafts"],
    )  # fmt: skip
    profile = _profile(c["profile"])
    assert profile is not None
    engine = EngineCosts(setup, profile)
    # Lengths are drawn from 0.8 to 1 of the nominal ones there: these have the published means.
    isl, osl = round(c["isl"] / 0.9), round(c["osl"] / 0.9)
    found = served(pass_times(engine, engine, isl, osl), ServedPool(setup), None, CALIBRATED, isl, osl, 1)
    return float(c["osl"] / (found.ttft_mean_s + (c["osl"] - 1) * found.tpot_mean_s))


def _predict_exchange(c: dict[str, Any]) -> float:
    model = find_model("deepseek-v3")
    nodes = max(1, c["ranks"] // 4)
    cluster = _cluster("gb200", nodes, c["ranks"] // nodes)
    found = exchange_costs(model, cluster, "per_rank", "decode", "bf16", profile=_profile("gb200"))
    return float(1e6 * found.inside.balanced_s(c["tokens"]))


def _imbalance(load_LE: Floats, slots: int, ranks: int, pairs: int, rng: np.random.Generator) -> float:
    """Mean over layers of (max - mean) / mean of rank loads under the greedy policy, on a fresh draw of tokens."""
    p2l, _, copies = rebalance_experts(load_LE, slots, 1, 1, ranks)
    worst = []
    for layer, share_E in enumerate(load_LE / load_LE.sum(1, keepdims=True)):
        drawn_E = rng.multinomial(pairs, share_E)
        slot_P = (drawn_E / copies[layer])[p2l[layer]]
        rank_R = slot_P.reshape(ranks, -1).sum(1)
        worst.append(rank_R.max() / rank_R.mean() - 1)
    return float(np.mean(worst))


@cache
def _skewed(without: float) -> Floats:
    """Loads [58, 256] of experts at random places whose contiguous placement on 32 ranks has this imbalance."""
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(256) for _ in range(58)])

    def loads(sigma: float) -> Floats:
        return lognormal_profile(256, sigma)[order]

    def imbalance(sigma: float) -> float:
        rank_LR = loads(sigma).reshape(58, 32, -1).sum(2)
        return float((rank_LR.max(1) / rank_LR.mean(1) - 1).mean())

    return loads(solve(imbalance, 0.1, 3.0, without, 0.01))


def _predict_imbalance(c: dict[str, Any]) -> float:
    pairs = c["ranks"] * c["tokens_per_rank"]
    load_LE = _skewed(c["without"])
    return _imbalance(load_LE, c["slots"], c["ranks"], pairs, np.random.default_rng(1))


def _training(c: dict[str, Any]) -> TrainingCosts:
    model = find_model(c["model"])
    if "layers" in c:
        moe = tuple(range(c["dense_layers"], c["layers"]))
        model = model.model_copy(update={"num_layers": c["layers"], "moe_layer_ids": moe})
    if c.get("layers_alone"):
        model = model.model_copy(update={"vocab_size": 1})
    per_node = 4 if c["accelerator"].startswith("gb") else 8
    cluster = _cluster(c["accelerator"], c["ranks"] // per_node, per_node)
    names = ("global_batch", "micro_batch", "tp", "pp", "virtual_stages", "ep", "overlap", "mtp_layers")
    fields = {name: c[name] for name in names} | {"host_per_layer": f"{0 if c['graphs'] else _HOST_MS} ms"}
    optional = ("capacity_factor", "gradient_dtype", "overlap_gradients", "overlap_parameters", "recompute_modules")
    more = {name: c[name] for name in optional if name in c}
    spec = TrainingSpec.parse(fields | more, "published")
    placement, load_LE = _even(model, c["ep"], min(c["ep"], per_node), None)
    profile = _profile(_PROFILE_OF[c["accelerator"]])
    return TrainingCosts(
        model, cluster, profile, placement, load_LE[None], spec, c["weight"], "bf16", c["dispatch"]
    )


def _predict_training(row: dict[str, Any]) -> float:
    costs = _training(row["config"])
    if row["unit"] == "ms/pair":  # one forward and one backward, each beside the other's exchanges
        (chunk,) = costs.chunks()
        forward_s_W, backward_s_W, _ = costs.overlapped(chunk)
        return 1e3 * float(forward_s_W[0] + backward_s_W[0])
    found = simulate_training(costs)
    if row["unit"] == "GiB":
        return max(stage.peak_bytes for stage in found.memory) / 2**30
    return found.step_s * 1e3 if row["unit"] == "ms/step" else found.tokens_per_s_per_rank


@cache
def _replayed() -> dict[str, float]:
    """The LLMServingSim scenario, in ms; empty where the request file is not at hand."""
    folder = Path(os.environ.get("MOEPLAN_DATA", "")) / "workloads"
    found = sorted(folder.glob("sharegpt*lengths.csv")) if os.environ.get("MOEPLAN_DATA") else []
    if not found:
        return {}
    lines = _simulated(
        {
            "model": "qwen3-30b-a3b",
            "cluster": "rtx-pro-6000-blackwell-server",
            "ranks": 2,
            "objective": {"dispatch": "allgather"},
            "workload": {"phase": "mix", "weight_dtype": "bf16"},
            "serving": {
                "requests": {"file": str(found[0])},
                "engine": {
                    "max_num_seqs": 128,
                    "max_num_batched_tokens": 2048,
                    "step_overhead": f"{1e3 * _engine_s('qwen3-30b-a3b'):.4g} ms",
                },
                "experts": {"mode": "balanced"},
            },
        }
    )
    names = {"ttft_mean": "ttft_mean_s", "ttft_median": "ttft_p50_s", "ttft_p99": "ttft_p99_s",
             "tpot_mean": "tpot_mean_s", "tpot_p99": "tpot_p99_s", "latency_mean": "e2e_mean_s"}  # fmt: skip
    return {name: 1e3 * lines[headline] for name, headline in names.items()}


def predict(row: dict[str, Any]) -> tuple[float | None, str]:
    """(prediction, why there is none) of one row."""
    kind, c = row["kind"], row["config"]
    if kind == "none":
        return None, row["why"]
    try:
        if kind == "replay":
            value = _replayed().get(c["figure"])
            return value, "" if value else "the request file is not at hand; set MOEPLAN_DATA"
        if kind == "training":
            return _predict_training(row), ""
        by_kind = {
            "step": _predict_step,
            "closed_loop": _predict_closed_loop,
            "served": _predict_served,
            "drafted": _predict_drafted,
            "exchange": _predict_exchange,
            "imbalance": _predict_imbalance,
        }
        return by_kind[kind](c), ""
    except MoeplanError as error:
        return None, str(error)


def eplb_ratio(c: dict[str, Any]) -> float:
    """Step time without over with the greedy policy on 32 redundant slots, two batches overlapped."""
    model, cluster = find_model(c["model"]), _cluster(c["accelerator"], c["nodes"], c["ranks_per_node"])
    R, load_LE = cluster.num_ranks, _skewed(1.564)
    work = _workload(c, c["phase"], c["batch"], c["context"])
    step = StepModel(
        model, cluster, work, Technique(dispatch=c["dispatch"], overlap=c["overlap"]), _profile(c["profile"])
    )
    slots = -(-(model.num_experts + 32) // R) * R
    p2l, _, _ = rebalance_experts(load_LE, slots, 1, 1, R)
    place = np.repeat(np.arange(R, dtype=np.int32), slots // R)
    planned = Placement(np.asarray(p2l, np.int32), place, model.num_experts, R, c["ranks_per_node"])
    plain, _ = _even(model, R, c["ranks_per_node"], None)
    return float(step.step(plain, load_LE).total_s / step.step(planned, load_LE).total_s)
