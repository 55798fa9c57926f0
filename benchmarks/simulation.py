"""How long simulations take, on one core, and peers beside them. Prints one JSON object.

``python benchmarks/simulation.py [--infersim DIR] [--frontier DIR [--frontier-python FILE]] [--out FILE]``

Peers are checkouts of alibaba/InferSim and NetX-lab/Frontier, run as by ``moeplan validate peers``. Every case runs in
a process of its own; seconds are of that process, imports apart.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.validation.peers import INFERSIM_SERVICE

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
    found["infersim_decode"] = 128, 16, INFERSIM_SERVICE
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
    peers = None
    if given.infersim or given.frontier:
        from moeplan.validation.peers import validate_peers

        peers = validate_peers(given.infersim, given.frontier, sys.executable, given.frontier_python)
        figures.append(peers["figures"][-1])
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
