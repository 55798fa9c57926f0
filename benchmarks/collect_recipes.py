"""Read what the public serving benchmark ran its points with into ``moeplan/data/benchmark_recipes.json``.

    python benchmarks/collect_recipes.py --benchmark INFERENCEX_GIT --recipes SRT_SLURM_GIT [--until 2026-05-01]

Both arguments are git directories: SemiAnalysisAI/InferenceX (its configuration of each day, from the history) and
NVIDIA/srt-slurm (the launch files that the configuration names). Facts alone are kept. No latency is read.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moeplan.files import write_text

OUT = Path(__file__).parents[1] / "moeplan" / "data" / "benchmark_recipes.json"
CHANGES = "perf-changelog.yaml"
CONFIGURATIONS = (".github/configs/nvidia-master.yaml", "configs/nvidia-master.yaml")
MODELS = ("dsr1", "gptoss", "qwen3.5", "kimik2.5", "minimaxm2.5", "glm5")
FRAMEWORKS = {name: name.removeprefix("dynamo-").replace("trt", "trtllm") for name in ("trt", "sglang", "vllm")}
FRAMEWORKS |= {f"dynamo-{name}": backend for name, backend in FRAMEWORKS.items()}

BRANCHES = ("main", "sa-submission-q2-2026")
MERGED = "2026-03-03"  # the branch that runners checked out before came into main on that day, in one commit

Git = Callable[..., str]


def _git(directory: Path) -> Git:
    def run(*words: str) -> str:
        return subprocess.run(["git", "-C", str(directory), *words], capture_output=True, text=True).stdout

    return run


@dataclass(frozen=True)
class _Point:
    """An entry of a search space as one commit has it; ``run`` when the commit had it measured, else empty."""

    day: str
    run: str
    config: dict[str, Any]
    lengths: dict[str, Any]
    entry: dict[str, Any]


def _measured_keys(git: Git, commit: str) -> set[str]:
    """Configurations that a commit has measured: those its part of the log of changes names (with wildcards)."""
    found: Counter[str] = Counter()
    for line in git("show", "--format=", commit, "--", CHANGES).splitlines():
        if key := re.match(r"([+-])\s+- ([\w.*-]+)\s*$", line):
            found[key[2]] += 1 if key[1] == "+" else -1
    return {key for key, count in found.items() if count > 0}


def _points(git: Git, until: str) -> Iterator[_Point]:
    """Every entry of every commit."""

    @cache
    def read(blob: str) -> dict[str, Any]:
        return yaml.load(git("cat-file", "blob", blob), Loader=yaml.CSafeLoader) or {}

    # A day alone would mean that day at the present time of day.
    until += "T00:00:00Z"
    history = ("log", "--first-parent", "--reverse", f"--until={until}", "--format=%H %cd %ct", "--date=short")
    for line in git(*history, "--", *CONFIGURATIONS, CHANGES).splitlines():
        commit, day, second = line.split()
        files = dict(reversed(row.split(None, 2)[2].split("\t")) for row in git("ls-tree", "-r", commit).splitlines())
        keys = _measured_keys(git, commit)
        moment = datetime.fromtimestamp(int(second), UTC).isoformat()
        for key, config in next((read(files[path]) for path in CONFIGURATIONS if path in files), {}).items():
            if not key.startswith(MODELS) or config.get("framework") not in FRAMEWORKS:
                continue
            run = moment if any(fnmatch(key, one) for one in keys) else ""
            spaces = config.get("seq-len-configs") or (config.get("scenarios") or {}).get("fixed-seq-len") or []
            for lengths in spaces:
                for entry in lengths.get("search-space", []):
                    yield _Point(day, run, {"key": key, **config}, lengths, entry)


def _lanes(entry: dict[str, Any]) -> list[int]:
    if "conc-list" in entry:
        return list(entry["conc-list"])
    lane, last = int(entry.get("conc-start", 1)), int(entry.get("conc-end", 0))
    answer: list[int] = []
    while lane <= last:
        answer.append(lane)
        lane *= 2
    return answer + ([last] if answer and answer[-1] != last else [])


# ---------------------------------------------------------------------- launch files of two pools


def _merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{name: _merged(base.get(name), value) for name, value in over.items()}}


def _picked(tree: Any, at: int) -> Any:
    if isinstance(tree, dict):
        return {name: _picked(value, at) for name, value in tree.items()}
    return tree[min(at, len(tree) - 1)] if isinstance(tree, list) else tree


def _reader(git: Git) -> Callable[[str, str], dict[str, Any]]:
    """Launch files as they stood at the end of a day on the branches that the benchmark's runners check out."""

    @cache
    def history(path: str) -> list[tuple[str, str]]:
        lines = git("log", *BRANCHES, "--format=%cs %H", "--", path).splitlines()
        return [(line[:10], line[11:]) for line in lines]

    @cache
    def read_at(path: str, commit: str) -> dict[str, Any]:
        return yaml.safe_load(git("show", f"{commit}:{path}")) or {}

    def read(reference: str, day: str) -> dict[str, Any]:
        """``path``, ``path:override`` or ``path:override[i]``; the first version there was if the day is before it."""
        found = re.match(r"([^:\[]+)(?::([^\[]+)(?:\[(\d+)\])?)?$", reference)
        if found is None:
            return {}
        path, name, at = found.groups()
        commits = history(path)
        until = max(day, MERGED)
        early = [commit for on, commit in commits if on <= until] + [commit for _, commit in reversed(commits)]
        document = next((document for commit in early if (document := read_at(path, commit))), {})
        base = document.get("base", document)
        if not name:
            return dict(base)
        over = document.get(name, {})
        return dict(_merged(base, over if at is None else _picked(over, int(at))))

    return read


# Libraries of expert kernels by the names that frameworks know them under.
LIBRARIES = {"flashinfer_trtllm": "trtllm", "flashinfer_cutlass": "cutlass", "flashinfer_cutedsl": "cutedsl"}
LIBRARIES |= {"deep_gemm": "deepgemm", "marlin": "marlin", "triton": "triton"}


def _pools(document: dict[str, Any]) -> tuple[int, list[Any]] | None:
    """(drafts, launch) as the launch file of two pools says; see the notes in the file written."""
    backend = document.get("backend", {})
    resources = document.get("resources", {})
    sglang, trtllm = backend.get("sglang_config", {}), backend.get("trtllm_config", {})
    if "decode" in sglang:
        decode, prefill = sglang["decode"], sglang["prefill"]
        drafts = decode.get("speculative-num-steps") or int(decode.get("speculative-num-draft-tokens", 1)) - 1
        launch = [
            decode.get("scheduler-recv-interval", 1),
            decode.get("stream-interval", 1),
            decode.get("moe-a2a-backend") == "deepep" or bool(decode.get("enable-deepep-moe")),
            decode.get("ep-num-redundant-experts") or 0,
            prefill.get("chunked-prefill-size") or -1,
            decode.get("max-running-requests") or 0,
        ]
        kernels = [LIBRARIES.get(str(pool.get("moe-runner-backend")), "") for pool in (prefill, decode)]
        sides = [
            (
                pool.get("tensor-parallel-size") or pool.get("tp-size"),
                pool.get("expert-parallel-size") or pool.get("ep-size") or 1,
                pool.get("enable-dp-attention"),
            )
            for pool in (prefill, decode)
        ]
        attention = str(decode.get("attention-backend", ""))
    elif "decode" in trtllm:
        decode, prefill = trtllm["decode"], trtllm["prefill"]
        drafts = (decode.get("speculative_config") or {}).get("num_nextn_predict_layers", 0)
        balancer = (decode.get("moe_config") or {}).get("load_balancer")
        groups = decode["tensor_parallel_size"] if decode.get("enable_attention_dp") else 1
        launch = [
            1,
            decode.get("stream_interval", 1),
            2 * (backend.get("decode_environment", {}).get("TRTLLM_FORCE_ALLTOALL_METHOD") == "DeepEP"),
            balancer.get("num_slots", 0) if isinstance(balancer, dict) else 0,
            prefill.get("max_num_tokens", -1),
            decode.get("max_batch_size", 0) * groups,
        ]
        kernels = [str((pool.get("moe_config") or {}).get("backend", "")).lower() for pool in (prefill, decode)]
        sides = [
            (
                pool["tensor_parallel_size"],
                pool.get("moe_expert_parallel_size") or 1,
                pool.get("enable_attention_dp"),
            )
            for pool in (prefill, decode)
        ]
        attention = ""
    else:
        return None
    widths: list[int] | None = []
    for name, (ranks, ep, dp) in zip(("prefill_workers", "decode_workers"), sides, strict=True):
        if not (ranks and resources.get(name)) or widths is None:
            widths = None
        else:
            widths += [int(resources[name]), int(ranks), int(ep), int(bool(dp))]
    return int(drafts), [*(int(value) for value in launch), *kernels, attention, widths]


def _settings(entry: dict[str, Any]) -> dict[str, str]:
    """What an entry of two pools says besides: name to value."""
    lines = [line for side in ("prefill", "decode") for line in entry[side].get("additional-settings", [])]
    return dict(str(line).split("=", 1) for line in lines if "=" in str(line))


def _said(decode: dict[str, Any], said: dict[str, str]) -> tuple[int, list[Any]] | None:
    """(drafts, launch) of two pools of TensorRT-LLM whose entry has the launch settings itself, as in 2025."""
    if "DECODE_MAX_BATCH_SIZE" not in said:
        return None
    groups = decode["tp"] if decode.get("dp-attn") else 1
    slots, batch = int(said.get("DECODE_EPLB_NUM_SLOTS", 0)), int(said["DECODE_MAX_BATCH_SIZE"])
    launch = [1, 1, 0, slots, int(said.get("PREFILL_MAX_NUM_TOKENS", -1)), batch * groups, "", "", "", None]
    return int(said.get("DECODE_MTP_SIZE", 0)), launch


# ---------------------------------------------------------------------- launch scripts of one server


def _server(
    config: dict[str, Any], lengths: dict[str, Any], entry: dict[str, Any], day: str, lane: int
) -> tuple[int, list[Any] | None]:
    """(drafts, launch) as the scripts of ``benchmarks`` and ``benchmarks/single_node`` have them to 2026-05-01; no
    launch where they leave all to the framework."""
    drafted = entry.get("spec-decoding", "none") != "none"
    model, hardware, precision = config["key"].split("-")[0], _hardware(config), config["precision"]
    blackwell = hardware.startswith("b")
    if config["framework"] == "trt" and model == "dsr1":
        return _dsr1_on_trt(blackwell, precision, lengths, bool(entry.get("dp-attn")), drafted, day, lane)
    if config["framework"] == "trt" and blackwell:
        return 0, [1, 20, 0, 0, 20000, 0, "trtllm", "trtllm", "", None]
    if config["framework"] != "sglang":
        return -int(drafted), None
    polls = 30 if lane >= 16 else 10
    if model == "dsr1":
        fast = (polls, 10, 16384) if precision == "fp4" else (polls, 30, 16384 if drafted else 32768)
        poll, stream, tokens = fast if blackwell else (1, 10, 32768)
    elif model == "qwen3.5":
        fast = (10, 50, 16384) if (hardware, precision) == ("b300", "fp8") else (polls, 30, 32768)
        poll, stream, tokens = fast if blackwell else (1, 50, 16384)
    elif blackwell and precision == "fp4":
        poll, stream, tokens = (10, 30, 32768) if day >= "2026-04-09" else (1, 30, 131072)
    else:
        poll, stream, tokens = (1, 30, 32768) if blackwell else (1, 1, 8192)
    drafts = (2 if model == "dsr1" else 3) if drafted else 0
    kernels = "trtllm" if blackwell and (model, precision) != ("glm5", "fp4") else ""
    ep_moe = model == "dsr1" and precision == "fp4" and day < "2025-11-10"  # --enable-ep-moe, whatever the entry says
    widths = [entry["tp"], entry["tp"], 0] if ep_moe else None
    return drafts, [poll, stream, 0, 0, tokens, 0, kernels, kernels, "", widths]


def _dsr1_on_trt(
    blackwell: bool, precision: str, lengths: dict[str, Any], dp: bool, drafted: bool, day: str, lane: int
) -> tuple[int, list[Any]]:
    """DeepSeek-R1 on one TensorRT-LLM server: ``dsr1_{fp4,fp8}_{b200,h200}_trt{,_mtp}.sh``."""
    isl, osl = lengths["isl"], lengths["osl"]
    drafts = (1 if dp else 3) if drafted else 0
    if not blackwell:
        kernels = "cutlass"
    elif precision == "fp4":
        large = lane > 32 if isl == 8192 else lane >= 256
        kernels = "cutlass" if (dp if drafted or day >= "2026-02-03" else large) else "trtllm"
    elif drafted:
        kernels = "deepgemm" if dp or day < "2026-02-05" else "trtllm"
    else:
        late = day >= "2026-01-29" and not (osl == 8192 and lane >= 256)
        kernels = "trtllm" if late else "deepgemm"
    batch = max(1, lane // (4 if precision == "fp4" else 8)) if dp else lane
    tokens = (drafts + 1) * batch + isl + 64 if drafted else max(8192, lane + isl + 64)
    return drafts, [1, 10, 0, 0, (tokens + 63) // 64 * 64, 0, kernels, kernels, "", None]


def _hardware(config: dict[str, Any]) -> str:
    return str(config["runner"]).split("-")[0]


# ---------------------------------------------------------------------- all


def _workers(pool: dict[str, Any]) -> list[int]:
    return [pool.get("num-worker", 1), pool["tp"], pool.get("ep", 1), int(bool(pool.get("dp-attn")))]


def collect(benchmark: Git, recipes: Git, until: str) -> tuple[list[str], list[list[Any]]]:
    """The runs and the rows of the file."""
    read = _reader(recipes)
    days: dict[str, list[str]] = {}
    moments: dict[str, set[str]] = {}
    for point in _points(benchmark, until):
        config, lengths, entry, day = point.config, point.lengths, point.entry, point.day
        drafted = entry.get("spec-decoding", "none") != "none"
        image = str(config.get("image")).replace("#", "/")
        head = [config["key"].split("-")[0], _hardware(config), FRAMEWORKS[config["framework"]], config["precision"]]
        head += [lengths["isl"], lengths["osl"], image]
        lanes, job = _lanes(entry), ""
        if "prefill" in entry:
            widths = _workers(entry["prefill"]) + _workers(entry["decode"])
            settings = _settings(entry)
            job = settings.get("CONFIG_FILE", "")
            document = read(job, day) if job else {}
            lanes += [int(n) for n in re.findall(r"\d+", str(document.get("benchmark", {}).get("concurrencies", "")))]
            said = _said(entry["decode"], settings)
            if said is not None and "DECODE_NODES" not in settings:  # its launcher counts requests per decode worker
                lanes = [lane * entry["decode"].get("num-worker", 1) for lane in lanes]
            drafts, launch = said or _pools(document) or (-int(drafted), None)
            job = json.dumps([config["key"], *head[4:], drafts, widths, job])
        else:
            widths = [entry["tp"], entry.get("ep", 1), int(bool(entry.get("dp-attn")))]
        for lane in sorted(set(lanes)):
            if "prefill" not in entry:
                drafts, launch = _server(config, lengths, entry, day, lane)
            key = json.dumps([[*head, drafts, widths], launch, job, lane])
            days.setdefault(key, [day, day])[1] = day
            moments.setdefault(key, set()).update([point.run] if point.run else [])
    runs = sorted(set().union(*moments.values()))
    number_of = {run: number for number, run in enumerate(runs)}
    jobs: dict[str, int] = {"": -1}
    lanes_of: dict[str, list[int]] = {}
    for key, (first, last) in days.items():
        row, launch, job, lane = json.loads(key)
        number = jobs.setdefault(job, len(jobs) - 1)
        ran = sorted(number_of[run] for run in moments[key])
        lanes_of.setdefault(json.dumps([*row, first, last, launch, number, ran]), []).append(lane)
    answer = []
    for text in sorted(lanes_of):
        *row, launch, number, ran = json.loads(text)
        answer.append([*row, lanes_of[text], launch, number, ran])
    return runs, answer


def main() -> None:
    """Read and write; the head of the file with its notes stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", type=Path, required=True)
    parser.add_argument("--recipes", type=Path, required=True)
    parser.add_argument("--until", default="2026-05-01")
    given = parser.parse_args()
    runs, rows = collect(_git(given.benchmark), _git(given.recipes), given.until)
    head = json.loads(OUT.read_text(encoding="utf-8"))
    head.pop("rows")
    head["runs"] = runs
    body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    write_text(OUT, json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + body + "\n]\n}\n")
    print(f"{len(rows)} points")


if __name__ == "__main__":
    main()
