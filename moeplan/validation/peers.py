"""``moeplan validate peers``: the same scenarios in public simulators, outputs and run times side by side.

Like is held against like:

(i) events against events: Frontier's online example and the same requests here, each a whole process;
(ii) one operating point against one, both prepared in processes that run already: the decode step of a model that is
    there by InferSim's closed form, and of a service that is there by the step costs that our simulator asks;

and beside these, where a peer is faster too: one operating point anew (InferSim's ``main``, which reads its files
again; our step model of all layers and ranks from names on), and whole processes from a cold start. Repeats are at
another batch each, so that no answer can be a remembered one.

Peers are checkouts, used where they are and never copied. ``D`` attention groups.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import shipped_profile_for
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.costs.passes import Batch, no_chunks
from moeplan.costs.serving import ServingCosts
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.errors import InputError
from moeplan.progress import Progress, no_progress
from moeplan.simulation.expert_loads import ExpertLoads
from moeplan.simulation.oracles import PlainCosts
from moeplan.simulation.outcome import outcome_of
from moeplan.simulation.pools import Pool
from moeplan.simulation.service import simulate_service
from moeplan.specs.clusters import cluster_for, sized_cluster
from moeplan.specs.models import find_model
from moeplan.specs.scenario import Scenario
from moeplan.specs.serving import ServingSpec
from moeplan.specs.workload import Workload

__all__ = ["INFERSIM_SERVICE", "operating_points", "service_scenario", "validate_peers"]

_TIMEOUT_S = 600
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
_BATCHES = tuple(range(32, 97))  # of a micro-batch on a rank; the middle one is the peer's example
_EXAMPLE = 64
_RANKS, _NODES, _CONTEXT = 128, 16, 4989  # the peer's mean context of a decode step, 4096 + 1786 / 2
_COLD = 5  # repeats of whole processes

# A service at that operating point: every sequence decodes from 4543 tokens on, 4989 in the middle.
INFERSIM_SERVICE: dict[str, Any] = {
    "requests": {"arrivals": "closed-loop", "concurrency": 128 * _RANKS, "count": 128 * _RANKS, "input_tokens": 4543,
                 "output_tokens": 893},
    "engine": {"max_num_seqs": 128, "overlap": "two_batch", "memory_fraction": "95 %"},
    "role": "decode",
    "experts": {"mode": "balanced"},
}  # fmt: skip


# ---------------------------------------------------------------------- ours


def service_scenario() -> Scenario:
    """The service whose steps are the operating point."""
    return Scenario.parse(
        {
            "model": "deepseek-v3", "cluster": "h100", "ranks": _RANKS, "nodes": _NODES, "seed": 0,
            "workload": {"weight_dtype": "fp8", "activation_dtype": "fp8"},
            "objective": {"dispatch": "per_expert"}, "serving": INFERSIM_SERVICE,
        },
        "peers",
    )  # fmt: skip


def _even() -> tuple[Placement, Any]:
    """Contiguous experts, every one alike."""
    model = find_model("deepseek-v3")
    L, E = model.num_moe_layers, model.num_experts
    return Placement.contiguous(L, E, _RANKS, _RANKS // _NODES), np.ones((L, E))


def _technique() -> Technique:
    return Technique(dispatch="per_expert", overlap="two_batch")


def _anew(batch: int) -> float:
    """Seconds of a decode step with two micro-batches of ``batch`` on each rank, from names on."""
    cluster = sized_cluster("h100", _RANKS, _NODES)
    work = Workload(
        phase="decode", batch_per_rank=2 * batch, context=_CONTEXT, weight_dtype="fp8", activation_dtype="fp8"
    )
    profile = shipped_profile_for(cluster.accelerator.name)
    return StepModel(find_model("deepseek-v3"), cluster, work, _technique(), profile).step(*_even()).total_s


def _prepared() -> Callable[[int], float]:
    """The same from step costs that are there, as the simulator asks them in every step."""
    cluster = sized_cluster("h100", _RANKS, _NODES)
    work = Workload(phase="decode", weight_dtype="fp8", activation_dtype="fp8")
    most = 2 * max(_BATCHES)
    costs = ServingCosts(
        find_model("deepseek-v3"), cluster, work, _technique(), shipped_profile_for(cluster.accelerator.name), most,
        most, 2 * _CONTEXT,
    )  # fmt: skip
    placement, load_LE = _even()
    nothing_D4 = no_chunks(_RANKS)

    def step(batch: int) -> float:
        tokens_D = np.full(_RANKS, 2.0 * batch)
        batch_D = Batch(tokens_D, tokens_D * _CONTEXT, nothing_D4, tokens_D, False)
        return costs.step(batch_D, placement, load_LE).total_s

    return step


def operating_points(batches: Sequence[int]) -> dict[str, Any]:
    """Our closed form in this process: seconds of each evaluation, and the step's at the peer's example."""
    start = time.perf_counter()
    prepared = _prepared()
    for batch in (min(batches), max(batches)):
        prepared(batch)
    ready_s = time.perf_counter() - start
    _anew(_EXAMPLE)  # reads the tables that every later one finds
    found: dict[str, Any] = {"prepare_s": ready_s}
    for name, evaluate in (("anew_s", _anew), ("prepared_s", prepared)):
        seconds = []
        for batch in batches:
            start = time.perf_counter()
            evaluate(batch)
            seconds.append(time.perf_counter() - start)
        found[name] = seconds
    return found | {"tpot_s": _anew(_EXAMPLE), "tpot_prepared_s": prepared(_EXAMPLE)}


def _played() -> dict[str, Any]:
    """Every step of that service, in this process."""
    from moeplan.pipeline.serving import build_service

    start, cpu = time.perf_counter(), time.process_time()
    service = build_service(service_scenario(), 0)
    served = simulate_service(service.spec, service.requests, service.pools, keep_log=False)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    found = outcome_of(served, service.spec)
    return {
        "wall_s": wall, "cpu_s": cpu, "steps": int(found.counts["steps"]), "tpot_s": found.headlines["tpot_p50_s"],
        "output_tokens_per_s_per_gpu": found.headlines["output_tokens_per_s_per_gpu"],
    }  # fmt: skip


def _like_frontier(given: dict[str, Any]) -> dict[str, Any]:
    """The same requests at the same times through our engine, every step as long as the peer's."""
    arrival_s = np.array(given["arrival_s"])
    engine = {"max_num_seqs": 128, "max_num_batched_tokens": 1024}
    requests = {"arrivals": "poisson", "rate": "2 /s", "count": 200, "input_tokens": 256, "output_tokens": 64}
    spec = ServingSpec.parse({"requests": requests, "engine": engine}, "peers")
    pool = Pool(
        "both", 1, spec.engine, cluster_for("h100", 1, 1), Placement.contiguous(1, 1, 1, 1),
        ExpertLoads({"decode": [np.ones((1, 1))]}, 1.0), lambda c: PlainCosts(c, given["step_s"], 0.0), 10**6, 1.0,
    )  # fmt: skip
    start, cpu = time.perf_counter(), time.process_time()
    count = len(arrival_s)
    served = simulate_service(spec, RequestTrace(np.full(count, 256), np.full(count, 64), arrival_s), [pool])
    found = outcome_of(served, spec).headlines
    return {
        "simulation_s": time.perf_counter() - start, "simulation_cpu_s": time.process_time() - cpu,
        **{name: found[name] for name in ("ttft_p50_s", "tpot_p50_s", "e2e_p50_s")},
    }  # fmt: skip


_OURS: dict[str, Callable[[Any], Any]] = {
    "point": lambda batch: {"tpot_s": _anew(batch)},
    "played": lambda _none: _played(),
    "like frontier": _like_frontier,
}


def _cold(what: str, given: Any, repeats: int = 1) -> dict[str, Any]:
    """One of ours in a process of its own, its whole time as ``process_s``, the median of several."""
    code = f"import sys, json; from moeplan.validation import peers; given = json.load(sys.stdin);\
print(json.dumps(peers._OURS[{what!r}](given)))"
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = _run([sys.executable, "-c", code], None, json.dumps(given))
        walls.append(time.perf_counter() - start)
        if answer.returncode:
            raise InputError(f"our own process failed: {answer.stderr[-300:]}")
    found: dict[str, Any] = json.loads(answer.stdout)
    return found | {"process_s": float(np.median(walls)), "process_s_all": walls}


# ---------------------------------------------------------------------- peers


def _run(
    command: list[str], folder: Path | None, given: str = "", more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, cwd=folder, check=False, timeout=_TIMEOUT_S,
            env={**os.environ, **_THREADS, **(more or {})},
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot run {command[0]}: {error.strerror or error}; name another python") from error
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"took longer than {_TIMEOUT_S} s")


_INFERSIM_COMMAND = (
    "main.py", "--config-path", "hf_configs/deepseek_v3_config.json", "--device-type", "H800", "--world-size", "128",
    "--num-nodes", "16", "--use-fp8-gemm", "--enable-deepep", "--enable-tbo", "--target-isl", "4096", "--target-osl",
    "1786", "--decode-bs", str(_EXAMPLE), "--decode-only",
)  # fmt: skip

# In the peer's own python: its command line once, for its arguments, then its main and its decoding many times.
_INFERSIM_RUNNER = """
import argparse, contextlib, io, json, re, runpy, sys, time
given = json.load(sys.stdin)
sys.argv, kept, parse = given["command"], [], argparse.ArgumentParser.parse_args
def keep(self, *words, **names):
    kept.append(parse(self, *words, **names))
    return kept[-1]
argparse.ArgumentParser.parse_args = keep
sys.path.insert(0, "")
with contextlib.redirect_stdout(io.StringIO()) as said:
    runpy.run_path("main.py", run_name="__main__")
text, args = said.getvalue(), kept[-1]
import main
model = main.Model(args, main.ModelConfig(args.config_path))
with contextlib.redirect_stdout(io.StringIO()):
    model.print_weights_info(), model.print_kvcache_info(), model.print_flops_info()
ways = {"anew_s": lambda: main.main(args), "prepared_s": model.decoding}
answer = {"tpot_s": float(re.search(r"TPOT \\(ms\\):\\s*([\\d.]+)", text)[1]) / 1e3,
          "output_tokens_per_s_per_gpu": float(re.search(r"TGS:tok/GPU/s\\):\\s*([\\d.]+)", text)[1])}
for name, way in ways.items():
    answer[name] = []
    for batch in given["batches"]:
        args.decode_bs = model.target_bs = batch
        with contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            way()
            answer[name].append(time.perf_counter() - start)
print(json.dumps(answer))
"""


def _infersim(folder: Path, python: str) -> dict[str, Any]:
    """DeepSeek-V3 decode on 128 ranks, two micro-batches of 64 a rank, as InferSim's own example has it."""
    given = {"command": list(_INFERSIM_COMMAND), "batches": list(_BATCHES)}
    answer = _run([python, "-c", _INFERSIM_RUNNER], folder, json.dumps(given))
    if answer.returncode:
        return {"ran": False, "why": (answer.stderr or answer.stdout)[-300:]}
    found: dict[str, Any] = json.loads(answer.stdout)
    walls = []
    for _ in range(_COLD):
        start = time.perf_counter()
        _run([python, *_INFERSIM_COMMAND], folder)
        walls.append(time.perf_counter() - start)
    return {"ran": True, **found, "process_s": float(np.median(walls)), "process_s_all": walls}


_FRONTIER_SCRIPT = "examples/architecture/co-location/online/moe_model_basic_online.sh"
_FRONTIER_COLUMNS = ("ttft", "tpot", "request_e2e_time", "request_inter_arrival_delay")  # ms, the gaps in s


def _frontier(folder: Path, python: str) -> dict[str, Any]:
    """Frontier's online MoE example with fixed operator times: 200 requests of 256 + 64 tokens, 2 a second."""
    with tempfile.TemporaryDirectory() as out:
        given = {
            "PYTHON_BIN": python, "ATTN_TP": "1", "DP": "1", "MOE_TP": "1", "MOE_EP": "1", "TOTAL_EXPERTS": "16",
            "NUM_REQUESTS": "200", "QPS": "2", "METRICS_OUTPUT_DIR": out, "LONG_PREFILL_TOKEN_THRESHOLD": "0",
        }  # fmt: skip
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        answer = _run(["bash", _FRONTIER_SCRIPT], folder, more=given)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        tables = list(Path(out).rglob("request_metrics.csv"))
        if answer.returncode or not tables:
            return {"ran": False, "why": (answer.stderr or answer.stdout)[-300:]}
        with tables[0].open() as stream:
            rows = list(csv.DictReader(stream))
    column = {name: np.array([float(row[name] or 0.0) for row in rows]) for name in _FRONTIER_COLUMNS}
    ttft, tpot, e2e, gap = (column[name] for name in _FRONTIER_COLUMNS)
    return {
        "ran": True, "process_s": wall, "requests": len(rows),
        "process_cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "ttft_p50_s": float(np.median(ttft)) / 1e3, "tpot_p50_s": float(np.median(tpot)) / 1e3,
        "e2e_p50_s": float(np.median(e2e)) / 1e3, "arrival_s": np.cumsum(gap).tolist(),
    }  # fmt: skip


def _commit(folder: Path) -> str:
    answer = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "not a git checkout"


# ---------------------------------------------------------------------- side by side


def _spread(found: dict[str, Any]) -> dict[str, Any]:
    """Lists of seconds as median, least and most."""
    short = {k: v for k, v in found.items() if not isinstance(v, list)}
    for name, values in found.items():
        if isinstance(values, list):
            low, middle, high = (float(value) for value in np.quantile(values, (0.0, 0.5, 1.0)))
            short[name] = {"median": middle, "least": low, "most": high, "repeats": len(values)}
    return short


def _figure(name: str, ours: float | None, theirs: float | None) -> dict[str, Any]:
    """Our time over the peer's; None where it did not run."""
    value = None if ours is None or theirs is None else ours / theirs
    return {"figure": name, "value": value, "target": 1.0, "reached": value is not None and value < 1.0,
            "ours_s": ours, "peer_s": theirs}  # fmt: skip


def _median(found: dict[str, Any], name: str) -> float | None:
    return float(np.median(found[name])) if name in found else None


def validate_peers(
    infersim: Path | None,
    frontier: Path | None,
    infersim_python: str = sys.executable,
    frontier_python: str = sys.executable,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Outputs and run times of each peer and ours; a peer without a checkout is listed as not run.

    Raises:
        InputError: no checkout at all, one that is not there, or a python that cannot be started.
    """
    if infersim is None and frontier is None:
        raise InputError(
            "no peer to run; give --infersim (a checkout of github.com/alibaba/InferSim), --frontier (of"
            " github.com/NetX-lab/Frontier), or both"
        )
    for name, folder, mark in (("infersim", infersim, "main.py"), ("frontier", frontier, _FRONTIER_SCRIPT)):
        if folder is not None and not (folder / mark).is_file():
            raise InputError(f"--{name} ({folder}) has no {mark}: it is no checkout of that simulator")
    progress("Frontier", 0.0)
    none: dict[str, Any] = {"ran": False, "why": "no checkout given"}
    events = none if frontier is None else _frontier(frontier, frontier_python)
    beside: dict[str, Any] = {}
    if events["ran"]:
        beside = _cold("like frontier", {"step_s": events["tpot_p50_s"], "arrival_s": events.pop("arrival_s")}, _COLD)
    progress("InferSim", 0.4)
    point = none if infersim is None else _infersim(infersim, infersim_python)
    progress("the same here", 0.6)
    ours = operating_points(_BATCHES) if point["ran"] else {}
    if point["ran"]:
        alone = _cold("point", _EXAMPLE, _COLD)
        ours |= {"process_s": alone["process_s"], "process_s_all": alone["process_s_all"]}
    played = _cold("played", None) if point["ran"] else {}
    progress("done", 1.0)
    figures = [
        _figure("(i) Frontier, events, whole processes", beside.get("process_s"), events.get("process_s")),
        _figure("(ii) InferSim, one prepared operating point", _median(ours, "prepared_s"),
                _median(point, "prepared_s")),
        _figure("beside: InferSim, one operating point anew", _median(ours, "anew_s"), _median(point, "anew_s")),
        _figure("beside: InferSim, one operating point, whole processes", ours.get("process_s"),
                point.get("process_s")),
    ]  # fmt: skip
    counted = figures[:2]
    ratios = [figure["value"] for figure in counted]
    every = {
        "figure": "faster than every peer run here, by (i) and (ii): the larger of the two",
        "value": None if None in ratios else max(ratios), "target": 1.0,
        "reached": all(figure["reached"] for figure in counted),
    }  # fmt: skip
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "moeplan validate peers --infersim DIR --frontier DIR --json",
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "figures": [*figures, every],
        "peers": [
            {
                "peer": "Frontier", "kind": "discrete events", "version": frontier and _commit(frontier),
                "scenario": "200 requests of 256 + 64 tokens, 2 /s, one rank, every step as long as the peer's",
                "theirs": _spread(events), "ours": _spread(beside),
            },
            {
                "peer": "InferSim", "kind": "closed form, one operating point",
                "version": infersim and _commit(infersim),
                "scenario": "DeepSeek-V3 decode, 128 ranks, 128 requests each, mean context 4989, two-batch overlap",
                "command": " ".join(_INFERSIM_COMMAND), "theirs": _spread(point), "ours": _spread(ours),
                "ours_every_step_simulated": _spread(played),
                "note": "H100 tables for the peer's H800; balanced experts; repeats at 32 to 96 requests of a"
                " micro-batch; its main and its decoding read their tables each time, ours stay in memory",
                "published": {"output_tokens_per_s_per_gpu": 2324,
                              "of": "deepseek-ai/profile-data, 128 requests a rank"},
            },
        ],
        "reached": every["reached"],
    }  # fmt: skip
