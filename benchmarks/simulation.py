"""How long simulations take, on one core, and peers beside them. Prints one JSON object.

``python benchmarks/simulation.py [--infersim DIR] [--frontier DIR [--frontier-python FILE]] [--out FILE]``

Peers are checkouts of alibaba/InferSim and NetX-lab/Frontier, used where they are and never copied; without one its
rows say so. Every case runs in a process of its own; seconds are of that process, imports apart.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
LAYERS, EXPERTS = 58, 256
TARGETS = {"requests_10k_s": 5.0, "decode_hour_s": 60.0, "memory_gib": 2.0, "per_step_spread": 1.5}
COUNTS = (1_000, 10_000, 100_000)
# Requests come faster than they can be served, or a few at a time: then each further one adds steps in proportion.
RATES = {"requests": "20 /s", "few": "2 /s"}
MIXED = {"input_tokens": {"mean": 1000, "cv": 1.0}, "output_tokens": {"mean": 250, "cv": 1.0}}


def scenario(trace: Path, ranks: int, nodes: int, serving: dict[str, Any]) -> Any:
    from moeplan.specs.scenario import Scenario

    return Scenario.parse(
        {
            "model": "deepseek-v3", "trace": str(trace), "cluster": "h100", "ranks": ranks, "nodes": nodes,
            "redundant": 288 - 256 if ranks == 144 else 0, "seed": SEED,
            "workload": {"weight_dtype": "fp8", "activation_dtype": "fp8"},
            "objective": {"dispatch": "per_expert"}, "serving": serving,
        },
        "benchmark",
    )  # fmt: skip


def write_counts(folder: Path) -> Path:
    """Eight windows of skewed counts: gamma with shape 1 per expert, drifting by a tenth from one to the next."""
    rng = np.random.default_rng(SEED)
    counts = [rng.gamma(1.0, 1.0, (LAYERS, EXPERTS))]
    for _ in range(7):
        counts.append(0.9 * counts[-1] + 0.1 * rng.gamma(1.0, 1.0, (LAYERS, EXPERTS)))
    path = folder / "counts.npy"
    np.save(path, np.array(counts) * 1000)
    return path


def cases() -> dict[str, tuple[int, int, dict[str, Any]]]:
    """name -> (ranks, nodes, serving section)."""
    found: dict[str, tuple[int, int, dict[str, Any]]] = {}
    for name, rate in RATES.items():
        for count in COUNTS:
            requests = {"arrivals": "poisson", "rate": rate, "count": count, **MIXED}
            found[f"{name}_{count}"] = 64, 8, {"requests": requests, "engine": {"max_num_seqs": 128}}
    hour = {"arrivals": "poisson", "rate": "120 /s", "duration": "1 h", "input_tokens": {"mean": 3000, "cv": 0.5},
            "output_tokens": {"mean": 1500, "cv": 0.5}}  # fmt: skip
    engine = {"max_num_seqs": 192, "overlap": "two_batch", "kv_dtype": "fp8"}
    found["decode_hour"] = 144, 18, {"requests": hour, "engine": engine, "role": "decode"}
    # The peer's mean context of 4096 + 1786 / 2 tokens; two micro-batches of 64.
    fixed = {"arrivals": "closed-loop", "concurrency": 128 * 128, "count": 128 * 128, "input_tokens": 4543,
             "output_tokens": 893}  # fmt: skip
    engine = {"max_num_seqs": 128, "overlap": "two_batch", "memory_fraction": "95 %"}
    found["infersim_decode"] = 128, 16, {
        "requests": fixed, "engine": engine, "role": "decode", "experts": {"mode": "balanced"}
    }  # fmt: skip
    return found


def run_case(name: str) -> dict[str, Any]:
    """One simulation in this process: reading, costs and engine."""
    from moeplan.pipeline.serving import build_service
    from moeplan.simulation.outcome import outcome_of
    from moeplan.simulation.service import simulate_service

    ranks, nodes, serving = cases()[name]
    with tempfile.TemporaryDirectory() as folder:
        asked = scenario(write_counts(Path(folder)), ranks, nodes, serving)
        wall, cpu = time.perf_counter(), time.process_time()
        service = build_service(asked, SEED)
        served = simulate_service(service.spec, service.requests, service.pools)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = outcome_of(served, service.spec)
    steps = int(found.counts["steps"])
    keep = ("ttft_p50_s", "tpot_p50_s", "output_tokens_per_s_per_gpu", "requests_per_s")
    return {
        "case": name, "ranks": ranks, "layers": LAYERS, "cpu_s": cpu, "wall_s": wall, "steps": steps,
        "requests": int(found.counts["requests"]), "simulated_s": found.end_s, "cpu_us_per_step": cpu / steps * 1e6,
        "output_tokens": found.counts["output_tokens"], "events": len(served.log) if served.log else 0,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "headlines": {k: found.headlines[k] for k in keep if k in found.headlines},
    }  # fmt: skip


def in_process(name: str, repeats: int) -> dict[str, Any]:
    """The fastest of several runs, each in a new process pinned to one thread, and the spread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    runs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--case", name]
        answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads}, check=True)
        runs.append(json.loads(answer.stdout))
    best = min(runs, key=lambda run: run["cpu_s"])
    return best | {"cpu_s_all": [run["cpu_s"] for run in runs]}


def figure(name: str, value: float, target: float, **more: Any) -> dict[str, Any]:
    return {"figure": name, "value": value, "target": target, "reached": value <= target, **more}


def infersim(folder: Path | None) -> dict[str, Any]:
    """DeepSeek-V3 decode on 128 ranks, two micro-batches of 64 a rank, as InferSim's own example has it."""
    if folder is None:
        return {"peer": "InferSim", "ran": False, "why": "no checkout given (--infersim)"}
    command = [
        sys.executable, "main.py", "--config-path", "hf_configs/deepseek_v3_config.json", "--device-type", "H800",
        "--world-size", "128", "--num-nodes", "16", "--use-fp8-gemm", "--enable-deepep", "--enable-tbo",
        "--target-isl", "4096", "--target-osl", "1786", "--decode-bs", "64", "--decode-only",
    ]  # fmt: skip
    start = time.perf_counter()
    answer = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    wall = time.perf_counter() - start
    tpot = re.search(r"TPOT \(ms\):\s*([\d.]+)", answer.stdout)
    tgs = re.search(r"TGS:tok/GPU/s\):\s*([\d.]+)", answer.stdout)
    if tpot is None or tgs is None:
        return {"peer": "InferSim", "ran": False, "why": (answer.stderr or answer.stdout)[-300:]}
    return {
        "peer": "InferSim", "ran": True, "version": _commit(folder), "kind": "closed form, one operating point",
        "wall_s": wall, "tpot_s": float(tpot[1]) / 1e3, "output_tokens_per_s_per_gpu": float(tgs[1]),
        "command": " ".join(command[1:]),
    }  # fmt: skip


def frontier(folder: Path | None, python: str) -> dict[str, Any]:
    """Frontier's online MoE example with fixed operator times: 200 requests of 256 + 64 tokens, 2 a second."""
    if folder is None:
        return {"peer": "Frontier", "ran": False, "why": "no checkout given (--frontier)"}
    with tempfile.TemporaryDirectory() as out:
        given = {
            "PYTHON_BIN": python, "ATTN_TP": "1", "DP": "1", "MOE_TP": "1", "MOE_EP": "1", "TOTAL_EXPERTS": "16",
            "NUM_REQUESTS": "200", "QPS": "2", "METRICS_OUTPUT_DIR": out, "OMP_NUM_THREADS": "1",
            "LONG_PREFILL_TOKEN_THRESHOLD": "0",
        }  # fmt: skip
        script = "examples/architecture/co-location/online/moe_model_basic_online.sh"
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        answer = subprocess.run(
            ["bash", script], capture_output=True, text=True, cwd=folder, env={**os.environ, **given}, check=False
        )
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        tables = list(Path(out).rglob("request_metrics.csv"))
        if answer.returncode or not tables:
            return {"peer": "Frontier", "ran": False, "why": (answer.stderr or answer.stdout)[-300:]}
        with tables[0].open() as stream:
            rows = list(csv.DictReader(stream))
    column = {name: np.array([float(row[name] or 0.0) for row in rows]) for name in _FRONTIER_COLUMNS}
    ttft, tpot, e2e, gap = (column[name] for name in _FRONTIER_COLUMNS)
    return {
        "peer": "Frontier", "ran": True, "version": _commit(folder), "kind": "discrete events", "wall_s": wall,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "requests": len(rows),
        "ttft_p50_s": float(np.median(ttft)) / 1e3, "tpot_p50_s": float(np.median(tpot)) / 1e3,
        "e2e_p50_s": float(np.median(e2e)) / 1e3, "arrival_s": np.cumsum(gap).tolist(),
    }  # fmt: skip


_FRONTIER_COLUMNS = ("ttft", "tpot", "request_e2e_time", "request_inter_arrival_delay")  # ms, the gaps in s


def like_frontier(step_s: float, arrival_s: list[float]) -> dict[str, Any]:
    """The same requests at the same times through our engine, every step as long as the peer's."""
    from moeplan.artifacts.placement import Placement
    from moeplan.artifacts.request_trace import RequestTrace
    from moeplan.simulation.expert_loads import ExpertLoads
    from moeplan.simulation.oracles import PlainCosts
    from moeplan.simulation.outcome import outcome_of
    from moeplan.simulation.service import Pool, simulate_service
    from moeplan.specs.clusters import cluster_for
    from moeplan.specs.serving import ServingSpec

    engine = {"max_num_seqs": 128, "max_num_batched_tokens": 1024}
    requests = {"arrivals": "poisson", "rate": "2 /s", "count": 200, "input_tokens": 256, "output_tokens": 64}
    spec = ServingSpec.parse({"requests": requests, "engine": engine}, "benchmark")
    rank = np.zeros(1, np.int32)
    pool = Pool(
        "both", 1, spec.engine, cluster_for("h100", 1, 1), Placement(rank[None], rank, 1, 1, 1),
        ExpertLoads({"decode": [np.ones((1, 1))]}, 1.0), lambda c: PlainCosts(c, step_s, 0.0), 10**6, 1.0,
    )  # fmt: skip
    start, cpu = time.perf_counter(), time.process_time()
    count = len(arrival_s)
    trace = RequestTrace(np.full(count, 256), np.full(count, 64), np.array(arrival_s))
    served = simulate_service(spec, trace, [pool])
    found = outcome_of(served, spec).headlines
    return {
        "wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "step_s": step_s,
        **{name: found[name] for name in ("ttft_p50_s", "tpot_p50_s", "e2e_p50_s")},
    }  # fmt: skip


def _commit(folder: Path) -> str:
    answer = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=list(cases()))
    parser.add_argument("--infersim", type=Path)
    parser.add_argument("--frontier", type=Path)
    parser.add_argument("--frontier-python", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run_case(given.case)))
        return
    runs = {name: in_process(name, given.repeats if name == "requests_10000" else 1) for name in cases()}
    linear = []
    for name, rate in RATES.items():
        own = {count: runs[f"{name}_{count}"] for count in COUNTS}
        per_step = {count: run["cpu_us_per_step"] for count, run in own.items()}
        linear.append(
            figure(f"cost per step at {rate}, 100,000 over 10,000 requests", per_step[100_000] / per_step[10_000],
                   TARGETS["per_step_spread"], cpu_us_per_step=per_step, cpu_s={c: r["cpu_s"] for c, r in own.items()},
                   steps={c: r["steps"] for c, r in own.items()})
        )  # fmt: skip
    memory = max(run["memory_gib"] for run in runs.values())
    first = runs["requests_10000"]
    figures = [
        figure("10,000 requests on 64 ranks x 58 MoE layers, s of one core", first["cpu_s"], TARGETS["requests_10k_s"]),
        figure("1 hour of a 144-rank decode service, s of one core", runs["decode_hour"]["cpu_s"],
               TARGETS["decode_hour_s"]),
        figure("largest memory of a process, GiB", memory, TARGETS["memory_gib"]),
        *linear,
    ]  # fmt: skip
    peers: list[dict[str, Any]] = []
    one = infersim(given.infersim)
    ours = runs["infersim_decode"]
    peers.append(
        one | {
            "scenario": "DeepSeek-V3 decode, 128 ranks, 128 requests each, mean context 4989, two-batch overlap",
            "ours": {k: ours[k] for k in ("cpu_s", "wall_s", "steps")} | ours["headlines"]
            | {"note": "H100 tables for the peer's H800; balanced experts; every step simulated"},
            "published": {"output_tokens_per_s_per_gpu": 2324, "of": "deepseek-ai/profile-data, 128 requests a rank"},
        }
    )  # fmt: skip
    two = frontier(given.frontier, given.frontier_python)
    beside = like_frontier(two["tpot_p50_s"], two.pop("arrival_s")) if two["ran"] else None
    peers.append(two | {"scenario": "200 requests, 256 + 64 tokens, 2 /s, one rank, fixed step time", "ours": beside})
    answer = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/simulation.py --infersim DIR --frontier DIR",
        "seed": SEED, "python": platform.python_version(), "cores": os.cpu_count(),
        "figures": figures, "runs": runs, "peers": peers, "reached": all(f["reached"] for f in figures),
    }  # fmt: skip
    text = json.dumps(answer, indent=1)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
