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
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moeplan.files import write_text

OUT = Path(__file__).parents[1] / "moeplan" / "data" / "benchmark_recipes.json"
CONFIGURATIONS = (".github/configs/nvidia-master.yaml", "configs/nvidia-master.yaml")
MODELS = ("dsr1", "gptoss", "qwen3.5", "kimik2.5", "minimaxm2.5", "glm5")
FRAMEWORKS = {name: name.removeprefix("dynamo-").replace("trt", "trtllm") for name in ("trt", "sglang", "vllm")}
FRAMEWORKS |= {f"dynamo-{name}": backend for name, backend in FRAMEWORKS.items()}

Git = Callable[..., str]


def _git(directory: Path) -> Git:
    def run(*words: str) -> str:
        return subprocess.run(["git", "-C", str(directory), *words], capture_output=True, text=True).stdout

    return run


def _points(git: Git, until: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(day, configuration of a model and machine, lengths, one entry of its search space) of every commit."""
    for path in CONFIGURATIONS:
        history = ("log", "--first-parent", "--reverse", "--format=%H %cd", "--date=short")
        for line in git(*history, f"--until={until}", "--", path).splitlines():
            commit, day = line.split()
            document = yaml.safe_load(git("show", f"{commit}:{path}") or "{}")
            for key, config in document.items():
                if not key.startswith(MODELS) or config.get("framework") not in FRAMEWORKS:
                    continue
                spaces = config.get("seq-len-configs") or (config.get("scenarios") or {}).get("fixed-seq-len") or []
                for lengths in spaces:
                    for entry in lengths.get("search-space", []):
                        yield day, {"key": key, **config}, lengths, entry


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


def _reader(git: Git) -> Callable[[str], dict[str, Any]]:
    @cache
    def read(reference: str) -> dict[str, Any]:
        """``path``, ``path:override`` or ``path:override[i]``."""
        found = re.match(r"([^:\[]+)(?::([^\[]+)(?:\[(\d+)\])?)?$", reference)
        if found is None:
            return {}
        path, name, at = found.groups()
        commits = ("HEAD", *git("log", "--all", "--format=%H", "--", path).split())
        text = next((text for commit in commits if (text := git("show", f"{commit}:{path}"))), "{}")
        document = yaml.safe_load(text)
        base = document.get("base", document)
        if not name:
            return dict(base)
        over = document[name]
        return dict(_merged(base, over if at is None else _picked(over, int(at))))

    return read


def _pools(document: dict[str, Any]) -> tuple[int, list[int]] | None:
    """(drafts, launch) as the launch file of two pools says; see the notes in the file written."""
    backend = document.get("backend", {})
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
    elif "decode" in trtllm:
        decode, prefill = trtllm["decode"], trtllm["prefill"]
        drafts = (decode.get("speculative_config") or {}).get("num_nextn_predict_layers", 0)
        balancer = (decode.get("moe_config") or {}).get("load_balancer")
        groups = decode["tensor_parallel_size"] if decode.get("enable_attention_dp") else 1
        launch = [
            1,
            decode.get("stream_interval", 1),
            0,
            balancer.get("num_slots", 0) if isinstance(balancer, dict) else 0,
            prefill.get("max_num_tokens", -1),
            decode.get("max_batch_size", 0) * groups,
        ]
    else:
        return None
    return int(drafts), [int(value) for value in launch]


# ---------------------------------------------------------------------- launch scripts of one server


def _server(config: dict[str, Any], day: str, drafted: bool, lane: int) -> tuple[int, list[int] | None]:
    """(drafts, launch) as SGLang's scripts in ``benchmarks/single_node`` have them to 2026-05-01; others: no launch."""
    if config["framework"] != "sglang":
        return -int(drafted), None
    model, hardware, precision = config["key"].split("-")[0], _hardware(config), config["precision"]
    blackwell = hardware.startswith("b")
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
    return drafts, [poll, stream, 0, 0, tokens, 0]


def _hardware(config: dict[str, Any]) -> str:
    return str(config["runner"]).split("-")[0]


# ---------------------------------------------------------------------- all


def _workers(pool: dict[str, Any]) -> list[int]:
    return [pool.get("num-worker", 1), pool["tp"], pool.get("ep", 1), int(bool(pool.get("dp-attn")))]


def collect(benchmark: Git, recipes: Git, until: str) -> list[list[Any]]:
    """The rows of the file."""
    read = _reader(recipes)
    days: dict[str, list[str]] = {}
    for day, config, lengths, entry in _points(benchmark, until):
        drafted = entry.get("spec-decoding", "none") != "none"
        image = str(config.get("image")).replace("#", "/")
        head = [config["key"].split("-")[0], _hardware(config), FRAMEWORKS[config["framework"]], config["precision"]]
        head += [lengths["isl"], lengths["osl"], image]
        lanes, job = _lanes(entry), ""
        if "prefill" in entry:
            widths = _workers(entry["prefill"]) + _workers(entry["decode"])
            settings = " ".join(str(one) for one in entry["prefill"].get("additional-settings", []))
            job = (re.findall(r"CONFIG_FILE=(\S+)", settings) or [""])[0]
            document = read(job) if job else {}
            lanes += [int(n) for n in re.findall(r"\d+", str(document.get("benchmark", {}).get("concurrencies", "")))]
            drafts, launch = _pools(document) or (-int(drafted), None)
            job = json.dumps([config["key"], *head[4:], drafts, widths, job])
        else:
            widths = [entry["tp"], entry.get("ep", 1), int(bool(entry.get("dp-attn")))]
        for lane in sorted(set(lanes)):
            if "prefill" not in entry:
                drafts, launch = _server(config, day, drafted, lane)
            key = json.dumps([[*head, drafts, widths], launch, job, lane])
            days.setdefault(key, [day, day])[1] = day
    jobs: dict[str, int] = {"": -1}
    rows: dict[str, list[int]] = defaultdict(list)
    for key, (first, last) in days.items():
        row, launch, job, lane = json.loads(key)
        number = jobs.setdefault(job, len(jobs) - 1)
        rows[json.dumps([*row, first, last, launch, number])].append(lane)
    answer = []
    for key in sorted(rows):
        *row, launch, number = json.loads(key)
        answer.append([*row, rows[key], launch, number])
    return answer


def main() -> None:
    """Read and write; the head of the file with its notes stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", type=Path, required=True)
    parser.add_argument("--recipes", type=Path, required=True)
    parser.add_argument("--until", default="2026-05-01")
    given = parser.parse_args()
    rows = collect(_git(given.benchmark), _git(given.recipes), given.until)
    head = json.loads(OUT.read_text(encoding="utf-8"))
    head.pop("rows")
    body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    write_text(OUT, json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + body + "\n]\n}\n")
    print(f"{len(rows)} points")


if __name__ == "__main__":
    main()
