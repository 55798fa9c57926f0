"""What a measured row of ``silicon_sample.csv`` ran on: the benchmark's own recipes and how a row finds its own.

The file's widths are partly an adapter's products, worker counts are mostly missing, and speculative decoding is not
tagged. ``benchmark_recipes.json`` holds what the public benchmark's configuration and launch scripts of the day say.
A row's candidates are the recipes with its model, hardware, framework, precision, lengths and concurrency whose widths
agree with the row's; then those of its image, of its date (else the nearest) and of its run, where there are any: the
benchmark measures what a commit names in its log of changes, and rows say when their run began, seconds after it. Rows
of the database export (``config_id``) are never drafted.

Of two pools one job runs a recipe's list of concurrencies, and the file keeps a job's rows together: of the
candidates of a run of rows those count that split it into the fewest jobs with the fewest concurrencies missing
(:func:`split_run`). Records of one measurement share what their columns say. Where drafted and undrafted ones are still
left, the drafted one is taken: of two equally likely answers the faster has the smaller expected relative error. Of the
rest the one added last, of these the one with most ranks. Of measured latencies only whether two are the same is used.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = [
    "Launch",
    "Recipe",
    "choose_recipes",
    "image_of",
    "lane_of",
    "late",
    "measured_on",
    "number",
    "split_run",
    "widths_of",
]

Row = Mapping[str, str]

_SLACK = 10  # days
_START = timedelta(seconds=60)  # a run begins seconds after the commit that asks for it
_WIDTHS_SAID = datetime(2025, 11, 5, tzinfo=UTC)  # rows measured before say tp alone: 1 stands for ep and dp


@dataclass(frozen=True, slots=True)
class Launch:
    """How a recipe starts its engine: decode steps between polls for requests, whether tokens go through DeepEP (1; 2:
    by its normal kernels in decode too), redundant experts or balanced slots, prompt tokens per pass of a rank,
    sequences that a decode worker takes (0: unlimited), the library of expert kernels of prefill and decode ("":
    unsaid), SGLang's attention backend of decode ("": unsaid), the widths that the launch file has, which are the true
    ones where they differ from the recipe's (None: unsaid)."""

    poll_steps: int
    deepep: int
    redundant_experts: int
    prompt_tokens: int
    max_running: int
    prefill_kernels: str = ""
    decode_kernels: str = ""
    decode_attention: str = ""
    widths: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """One point of the benchmark. ``widths``: [ranks, ep, dp attention] of one server, or [workers, ranks, ep, dp
    attention] of prefill and again of decode; ``job`` with which others it ran, -1: alone; ``runs`` when commits had it
    measured."""

    image: str
    draft_tokens: int
    widths: tuple[int, ...]
    first: datetime
    last: datetime
    lanes: frozenset[int]
    launch: Launch | None
    job: int
    runs: tuple[datetime, ...] = ()


def number(row: Row, name: str) -> int | None:
    """A whole number of the row, None where it is missing."""
    text = row.get(name) or ""
    return int(float(text)) if text not in ("", "nan") else None


def widths_of(row: Row, side: str) -> tuple[int | None, int | None, int | None, int | None]:
    """(tp, dp, moe_tp, moe_ep) as in the columns, a missing dp made up for."""
    tp, dp, moe_tp, ep = (
        number(row, f"{side}{name}") for name in ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    )
    if dp is None and tp and moe_tp and ep and moe_tp * ep % tp == 0:
        dp = moe_tp * ep // tp
    return tp, dp, moe_tp, ep


def lane_of(row: Row) -> int:
    """Requests in flight."""
    found = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
    if found:
        return int(found[1])
    return (number(row, "batch_size") or 1) * (widths_of(row, "")[1] or 1)


def measured_on(row: Row) -> datetime | None:
    """When the run of the measurement began, midnight where only the day is said, None where nothing is."""
    found = re.search(r"measured=(\d{4}-\d\d-\d\d)(T\d\d:\d\d:\d\d)?", row["silicon_data_source"])
    return datetime.fromisoformat(found[1] + (found[2] or "")).replace(tzinfo=UTC) if found else None


def image_of(row: Row) -> str | None:
    """The container image, without its punctuation, None where the source does not say."""
    found = re.search(r"(?:image=|workflow_run_id=\d+; )(\S+)$", row["silicon_data_source"])
    return _plain(found[1]) if found else None


def late(backend: str, image: str) -> bool:
    """Whether an image is of a release of about the tables' age: SGLang since 0.5.10 (April 2026), TensorRT-LLM since
    1.2 and all of Dynamo's, the first of which is newer than TensorRT-LLM's 1.1.0rc2. Of an unknown release
    TensorRT-LLM's earlier ones are not assumed."""
    night = re.search(r"dev(?:cu\d\d)?(20\d{6})", image)
    if night:
        return night[1] >= "20260401"
    release = re.search(r"(sglangv|release|tensorrtllmruntime)(\d+)\.(\d+)(?:\.(\d+))?", image)
    if release is None:
        return backend == "trtllm"
    since = {"sglangv": (0, 5, 10), "release": (1, 2, 0), "tensorrtllmruntime": (0, 0, 0)}[release[1]]
    return tuple(int(part or 0) for part in release.groups()[1:]) >= since


# ---------------------------------------------------------------------- candidates


@cache
def _recipes() -> dict[tuple[Any, ...], list[Recipe]]:
    text = files("moeplan").joinpath("data", "benchmark_recipes.json").read_text(encoding="utf-8")
    index: dict[tuple[Any, ...], list[Recipe]] = defaultdict(list)
    document = json.loads(text)
    moments = [datetime.fromisoformat(run) for run in document["runs"]]
    for row in document["rows"]:
        *key, image, drafts, widths, first, last, lanes, launch, job, runs = row
        index[(*key, len(widths) == 8)].append(
            Recipe(
                image=_plain(image),
                draft_tokens=drafts,
                widths=tuple(widths),
                first=datetime.fromisoformat(first).replace(tzinfo=UTC),
                last=datetime.fromisoformat(last).replace(tzinfo=UTC),
                lanes=frozenset(lanes),
                launch=_launch(key[2], widths, launch) if launch else None,
                job=job,
                runs=tuple(moments[number] for number in runs),
            )
        )
    return dict(index)


def _launch(backend: str, widths: Sequence[int], values: Sequence[Any]) -> Launch:
    poll, _, deepep, redundant, tokens, running, prefill, decode, attention, true_widths = values
    widths = true_widths or widths
    ranks, dp = (widths[1], widths[3]) if len(widths) == 8 else (widths[0], widths[2])
    if backend == "sglang" and dp:
        tokens //= ranks  # a worker's chunk, shared by its attention groups
    true_widths = tuple(true_widths) if true_widths else None
    kernels = prefill, decode, attention
    return Launch(poll, deepep, redundant, max(0, tokens), running, *kernels, true_widths)


def _plain(image: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", image.lower())


def _agrees(row: Row, recipe: Recipe, on: datetime | None) -> bool:
    """Whether a recipe's widths can have become the row's columns."""
    if row["mode"] == "agg":
        ranks, ep, dp = recipe.widths
        tp, columns_dp, moe_tp, columns_ep = widths_of(row, "")
        shared = number(row, "attention_dp_size") or 1
        if on is not None and on < _WIDTHS_SAID:
            return tp == ranks and shared == 1 and columns_ep == 1
        return columns_ep == ep and moe_tp in (ranks, ranks // ep) and (shared > 1) == bool(dp) and columns_dp != 0
    sides = (("prefill_", recipe.widths[:4]), ("decode_", recipe.widths[4:]))
    for side, (workers, ranks, _, dp) in sides:
        tp, columns_dp, _, _ = widths_of(row, side)
        if not tp or tp * (columns_dp or 1) != ranks:
            return False
        counted = number(row, f"{side}num_workers")
        if counted is not None and (counted != workers or (dp != 0) != ((columns_dp or 1) > 1)):
            return False
    return True


def _candidates(row: Row, name: str, on: datetime | None) -> list[Recipe]:
    """Recipes of any concurrency that the row may have run on; ``name`` of the model in the recipes."""
    hardware = row["system"].removesuffix("_sxm")
    pools = row["mode"] != "agg"
    key = (name, hardware, row["backend"], row["precision"], int(row["isl"]), int(row["osl"]), pools)
    fits = [recipe for recipe in _recipes().get(key, []) if _agrees(row, recipe, on)]
    source = row["silicon_data_source"]
    if "config_id=" in source:
        fits = [recipe for recipe in fits if recipe.draft_tokens == 0]
    lane = lane_of(row)
    image = image_of(row)

    def prefer(good: list[Recipe]) -> list[Recipe]:
        return good if any(lane in recipe.lanes for recipe in good) else fits

    if image is not None:
        fits = prefer([recipe for recipe in fits if recipe.image == image])
    if on is not None:
        nearest = min((_away(recipe, on) for recipe in fits if lane in recipe.lanes), default=0)
        fits = prefer([recipe for recipe in fits if _away(recipe, on) <= max(nearest, _SLACK)])
        fits = prefer([recipe for recipe in fits if any(_began(run, on) for run in recipe.runs)])
    return fits


def _began(run: datetime, on: datetime) -> bool:
    """Whether a measurement of ``on`` can be of a run that was asked for at ``run``."""
    return run.date() == on.date() if on.time() == time() else timedelta() <= on - run <= _START


# ---------------------------------------------------------------------- jobs


def split_run(
    lanes: Sequence[int], jobs: Mapping[int, frozenset[int]], may: Sequence[frozenset[int]]
) -> list[set[int]]:
    """For each of consecutive rows the jobs that may have run it: those of the splits into jobs with the least count
    of jobs and missing concurrencies. ``jobs``: number to concurrencies; ``may``: the jobs that each row can be of. A
    job's rows stand together in any order. Empty sets where no split exists."""
    n = len(lanes)
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for low in range(n):
        for high in range(low + 1, n + 1):
            part = set(lanes[low:high])
            if len(part) < high - low:
                break
            able = frozenset.intersection(*may[low:high])
            parts[low, high] = [(1 + len(jobs[job]) - len(part), job) for job in able if part <= jobs[job]]
    best = {cell: min(cost for cost, _ in found) for cell, found in parts.items() if found}
    ahead, behind = [0.0] + [float("inf")] * n, [float("inf")] * n + [0.0]
    for low, high in sorted(best, key=lambda cell: cell[1]):
        ahead[high] = min(ahead[high], ahead[low] + best[low, high])
    for low, high in sorted(best, reverse=True):
        behind[low] = min(behind[low], behind[high] + best[low, high])
    answer: list[set[int]] = [set() for _ in lanes]
    for (low, high), found in parts.items():
        for cost, job in found:
            if ahead[low] + cost + behind[high] == ahead[n] < float("inf"):
                for at in range(low, high):
                    answer[at].add(job)
    return answer


def _same_run(row: Row) -> tuple[str, ...] | None:
    """What consecutive rows of one job have in common, None where the file does not keep jobs together."""
    source = row["silicon_data_source"]
    if row["mode"] == "agg" or not source.startswith("source_file=2026"):
        return None
    names = ("model_path", "system", "backend", "precision", "isl", "osl")
    sides = [f"{side}_{name}" for side in ("prefill", "decode") for name in ("num_workers", "tp_size", "moe_ep_size")]
    return (re.sub(r"silicon_concurrency=\d+", "", source), *(row[name] for name in (*names, *sides)))


def _jobs(rows: Sequence[Row], fits: Mapping[str, Sequence[Recipe]]) -> dict[str, set[int]]:
    """Jobs that each row of two pools may be of, by row id; rows in the file's order."""
    runs: list[list[Row]] = []
    before: tuple[str, ...] | None = None
    for row in rows:
        same = _same_run(row)
        if same is not None and same == before:
            runs[-1].append(row)
        elif same is not None:
            runs.append([row])
        before = same
    answer: dict[str, set[int]] = {}
    for run in runs:
        has: dict[int, frozenset[int]] = defaultdict(frozenset)
        for row in run:
            for recipe in fits[row["id"]]:
                has[recipe.job] |= recipe.lanes
        may = [frozenset(recipe.job for recipe in fits[row["id"]]) for row in run]
        for row, found in zip(run, split_run([lane_of(row) for row in run], has, may), strict=True):
            answer[row["id"]] = found
    return answer


def _measurement(row: Row, names: Mapping[str, str]) -> tuple[Any, ...]:
    """Equal for records of one measurement: the file has many twice or thrice, with other columns filled in, and with
    latencies that differ in the last digits of a double."""
    took = (f"{float(row[column]):.9g}" for column in ("silicon_ttft_ms", "silicon_tpot_ms"))
    columns = ("system", "backend", "precision", "isl", "osl")
    return (names[row["model_path"]], lane_of(row), *(row[column] for column in columns), *took)


def choose_recipes(
    rows: Sequence[Row], names: Mapping[str, str], on: Mapping[str, datetime | None]
) -> dict[str, tuple[Recipe | None, Recipe | None]]:
    """Row id -> its recipe, None where there is none, and the undrafted one that it may be as well as a drafted one.

    ``rows`` all of them in the file's order; ``names`` model_path -> model in the recipes; ``on`` id -> day.
    """
    records: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        records[_measurement(row, names)].append(row)
    fits: dict[str, list[Recipe]] = {}
    for same in records.values():
        found = [_candidates(row, names[row["model_path"]], on[row["id"]]) for row in same]
        for row, mine in zip(same, found, strict=True):
            for other in found:
                mine = [recipe for recipe in mine if recipe in other] or mine
            fits[row["id"]] = mine
    jobs = _jobs(rows, fits)
    answer: dict[str, tuple[Recipe | None, Recipe | None]] = {}
    for same in records.values():
        for row in same:
            name = row["id"]
            left = [recipe for recipe in fits[name] if lane_of(row) in recipe.lanes]
            for record in same:
                left = [recipe for recipe in left if recipe.job in jobs.get(record["id"], ())] or left
            drafted = _likeliest([recipe for recipe in left if recipe.draft_tokens], on[name])
            plain = _likeliest([recipe for recipe in left if not recipe.draft_tokens], on[name])
            answer[name] = (drafted, plain) if drafted else (plain, None)
    return answer


def _likeliest(fits: Sequence[Recipe], on: datetime | None) -> Recipe | None:
    """The one nearest in time, of these the one added last, of these the one with most ranks to decode on, which is
    the faster."""
    return max(fits, key=lambda recipe: (-_away(recipe, on), recipe.first, _decode_ranks(recipe)), default=None)


def _decode_ranks(recipe: Recipe) -> int:
    return recipe.widths[0] if len(recipe.widths) == 3 else recipe.widths[4] * recipe.widths[5]


def _away(recipe: Recipe, on: datetime | None) -> int:
    """Days between a day and the time of a recipe."""
    return 0 if on is None else max(0, (recipe.first - on).days, (on - recipe.last).days)
