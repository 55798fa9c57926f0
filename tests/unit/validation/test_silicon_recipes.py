"""Recipes of the measured rows: what the columns do not say, and jobs against all splits tried one by one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from moeplan.validation.silicon_recipes import Recipe, choose_recipes, late, measured_on, split_run

NAMES = {"deepseek-ai/DeepSeek-R1": "dsr1"}
ONE = {
    "id": "one",
    "silicon_data_source": "source_file=2026-03-25.csv; silicon_concurrency=32; measured=2026-02-06T00:00:00Z",
    "backend": "trtllm",
    "model_path": "deepseek-ai/DeepSeek-R1",
    "system": "b200_sxm",
    "precision": "fp4",
    "mode": "agg",
    "isl": "8192",
    "osl": "1024",
    "tp_size": "4.0",
    "attention_dp_size": "1.0",
    "moe_tp_size": "1.0",
    "moe_ep_size": "4.0",
    "silicon_ttft_ms": "100.0",
    "silicon_tpot_ms": "10.0",
}
# dsr1-fp4-gb300-dynamo-trt: a prefill worker of 2 ranks, decode workers of 8.
TWO = {name: value for name, value in ONE.items() if "size" not in name} | {
    "mode": "disagg",
    "system": "gb300",
    "isl": "1024",
    "prefill_num_workers": "",
    "prefill_tp_size": "2.0",
    "prefill_attention_dp_size": "1.0",
    "prefill_moe_tp_size": "1.0",
    "prefill_moe_ep_size": "2.0",
    "decode_num_workers": "",
    "decode_tp_size": "8.0",
    "decode_attention_dp_size": "1.0",
    "decode_moe_tp_size": "4.0",
    "decode_moe_ep_size": "2.0",
}


def run(*lanes: int, **changes: str) -> list[Recipe | None]:
    """Recipes of consecutive rows of two pools."""
    source = "source_file=2026-03-25.csv; silicon_concurrency={}; measured=2026-02-03T17:15:06Z; image=x"
    rows = [
        {**TWO, **changes, "id": str(at), "silicon_ttft_ms": f"{at}", "silicon_data_source": source.format(lane)}
        for at, lane in enumerate(lanes)
    ]
    found = choose_recipes(rows, NAMES, {row["id"]: measured_on(row) for row in rows})
    return [found[row["id"]][0] for row in rows]


def drafts(*lanes: int) -> list[int]:
    """Drafts of consecutive rows."""
    found = run(*lanes)
    assert None not in found
    return [recipe.draft_tokens for recipe in found if recipe is not None]


def test_the_recipe_says_what_the_columns_do_not() -> None:
    (recipe,) = run(192)
    assert recipe is not None
    assert (recipe.draft_tokens, recipe.widths) == (0, (1, 2, 2, 1, 4, 8, 8, 0))
    assert recipe.launch is not None
    assert (recipe.launch.poll_steps, recipe.launch.prompt_tokens) == (1, 16384)
    assert run(191) == [None]


def test_rows_that_stand_together_tell_drafted_jobs_from_others() -> None:
    # One recipe was run at 8, 12, 24 and 48 with drafts, one at 12, 48, 96 and 192 without.
    assert drafts(24, 8, 48, 12) == [3, 3, 3, 3]
    assert drafts(48, 96, 192, 12) == [0, 0, 0, 0]
    assert drafts(12) == [3]  # alone it may be either: the faster one


def test_of_an_undecided_row_the_undrafted_recipe_is_kept_beside() -> None:
    def both(lane: int) -> tuple[Recipe | None, Recipe | None]:
        source = f"source_file=2026-03-25.csv; silicon_concurrency={lane}; measured=2026-02-03T17:15:06Z; image=x"
        row = {**TWO, "silicon_data_source": source}
        return choose_recipes([row], NAMES, {"one": measured_on(row)})["one"]

    drafted, plain = both(12)
    assert drafted is not None
    assert plain is not None
    assert (drafted.draft_tokens, plain.draft_tokens) == (3, 0)
    assert drafted.widths == plain.widths
    assert both(192)[1] is None  # run without drafts alone
    assert both(24)[1] is None  # and with drafts alone


def test_records_of_one_measurement_share_what_each_of_them_says() -> None:
    # The database's export has undrafted runs alone; its latencies differ from the other file's in the last digit.
    source = "source_file=2026-03-25.csv; silicon_concurrency=12; measured=2026-02-03T17:15:06Z; image=x"
    row = {**TWO, "silicon_ttft_ms": "199.4286597095197", "silicon_data_source": source}
    export = {**row, "id": "export", "silicon_ttft_ms": "199.42865970951973", "decode_num_workers": "4"}
    export |= {"silicon_data_source": "db-dump; config_id=7; silicon_concurrency=12; measured=2026-02-03"}
    other = {**row, "id": "other", "silicon_ttft_ms": "150.0"}
    rows = [row, export, other]
    found = choose_recipes(rows, NAMES, {one["id"]: measured_on(one) for one in rows})
    told = {name: None if pair[0] is None else (pair[0].draft_tokens, pair[1] is None) for name, pair in found.items()}
    assert told == {"one": (0, True), "export": (0, True), "other": (3, False)}


def test_of_one_point_the_image_tells_drafted_runs_from_others() -> None:
    # dsr1-fp4-b200-trt and -mtp, 8k/1k, 32 in flight on 4 ranks: two images, one with drafts.
    found = {}
    for image in ("1.2.0rc6.post2", "1.2.0rc6.post3"):
        source = f"silicon_concurrency=32; image=nvcr.io/nvidia/tensorrt-llm/release:{image}"
        row = {**ONE, "silicon_data_source": source}
        recipe = choose_recipes([row], NAMES, {"one": datetime(2026, 2, 6, tzinfo=UTC)})["one"][0]
        assert recipe is not None
        found[image] = recipe.draft_tokens
    assert found["1.2.0rc6.post2"] == 0
    assert found["1.2.0rc6.post3"] != 0


def test_the_oldest_rows_say_tensor_parallelism_alone() -> None:
    row = {**ONE, "tp_size": "8.0", "moe_tp_size": "8.0", "moe_ep_size": "1.0"}
    row |= {"isl": "1024", "silicon_data_source": "silicon_concurrency=64; measured=2025-11-02T00:00:00Z"}
    for day, ep in ((2, 8), (20, None)):
        on = datetime(2025, 11, day, tzinfo=UTC)
        recipe = choose_recipes([row], NAMES, {"one": on})["one"][0]
        assert (recipe and recipe.widths[1]) == ep


# dsr1-fp8-h100-dynamo-sglang: the commit of 03:10:02 had the drafted half of its points measured alone.
H100 = {**TWO, "system": "h100_sxm", "backend": "sglang", "precision": "fp8"} | {
    f"{side}_{name}": value
    for side in ("prefill", "decode")
    for name, value in (("tp_size", "16.0"), ("moe_tp_size", "16.0"), ("moe_ep_size", "1.0"))
}


@pytest.mark.parametrize(
    ("began", "drafted"),
    [("2026-02-13T03:10:06Z", True), ("2026-02-13T03:20:06Z", None), ("2026-02-13T00:00:00.000Z", True)],
)
def test_the_run_tells_which_half_of_a_configuration_was_measured(began: str, drafted: bool | None) -> None:
    source = "source_file=2026-03-25.csv; silicon_concurrency=16; measured={}; image=lmsysorg/sglang:v0.5.8-cu130"
    row = {**H100, "id": "one", "silicon_data_source": source.format(began)}
    recipe = choose_recipes([row], NAMES, {"one": measured_on(row)})["one"][0]
    assert recipe is not None
    assert drafted is None or (recipe.draft_tokens > 0) == drafted
    told = any(run.isoformat().startswith("2026-02-13T03:10:02") for run in recipe.runs)
    assert told


@pytest.mark.parametrize(("day", "drafts", "open"), [("2026-04-03", 0, False), ("2026-04-20", 3, True)])
def test_before_all_recipes_the_nearest_in_time_counts(day: str, drafts: int, open: bool) -> None:
    # glm5-fp8-b300-sglang came on 17 April, with drafts a day later; both stood on the 20th.
    names = {"zai-org/GLM-5": "glm5"}
    source = f"source_file=2026-03-25.csv; silicon_concurrency=32; measured={day}T16:51:00Z"
    row = {**ONE, "silicon_data_source": source, "model_path": "zai-org/GLM-5", "system": "b300_sxm"}
    row |= {"backend": "sglang", "precision": "fp8", "tp_size": "8.0", "moe_tp_size": "8.0", "moe_ep_size": "1.0"}
    chosen, plain = choose_recipes([row], names, {"one": measured_on(row)})["one"]
    assert chosen is not None
    assert chosen.draft_tokens == drafts
    assert (plain is not None) == open


def test_a_launch_says_the_attention_backend_of_sglang() -> None:
    source = "source_file=2026-03-25.csv; silicon_concurrency=16; measured=2026-02-13T03:10:06Z"
    row = {**H100, "id": "one", "silicon_data_source": source}
    recipe = choose_recipes([row], NAMES, {"one": measured_on(row)})["one"][0]
    assert recipe is not None
    assert recipe.launch is not None
    assert recipe.launch.decode_attention == "flashinfer"


def test_a_launch_says_kernels_and_its_own_widths() -> None:
    # ctx1_gen2_tp8_batch32_eplb0_mtp3_8.yaml: prefill's experts are split eight ways, the configuration of the day
    # said eight-way expert parallelism.
    row = {**TWO, "id": "one", "system": "b200_sxm", "precision": "fp8", "isl": "8192"} | {
        f"{side}_{name}": value
        for side, dp in (("prefill", "8.0"), ("decode", "1.0"))
        for name, value in (("tp_size", "1.0" if dp == "8.0" else "8.0"), ("attention_dp_size", dp))
    }
    row["silicon_data_source"] = "source_file=2026-03-25.csv; silicon_concurrency=8; measured=2026-02-12T17:33:21Z"
    row["decode_num_workers"] = "2"
    recipe = choose_recipes([row], NAMES, {"one": measured_on(row)})["one"][0]
    assert recipe is not None
    assert recipe.launch is not None
    assert (recipe.launch.prefill_kernels, recipe.launch.decode_kernels) == ("trtllm", "trtllm")
    assert recipe.widths[2] == 8
    assert recipe.launch.widths == (1, 8, 1, 1, 2, 8, 1, 0)
    assert recipe.launch.max_running == 4


@pytest.mark.parametrize(
    ("backend", "image", "newer"),
    [
        ("sglang", "lmsysorgsglangv0.5.9cu130", False),
        ("sglang", "lmsysorgsglangv0.5.10.post1cu130", True),
        ("sglang", "lmsysorgsglangv0.6.0", True),
        ("sglang", "lmsysorgsglangnightlydev20260216d3bae71e", False),
        ("sglang", "lmsysorgsglangnightlydev20260402d7256eb6", True),
        ("trtllm", "nvcr.ionvidiatensorrtllmrelease1.1.0rc2.post2", False),
        ("trtllm", "nvcr.ionvidiatensorrtllmrelease1.2.0rc6.post2", True),
        ("trtllm", "nvcr.ionvidiaaidynamotensorrtllmruntime0.8.1.post1", True),
        ("trtllm", "", True),
        ("sglang", "", False),
        ("vllm", "vllmvllmopenaiv0.15.1", False),
    ],
)
def test_late_releases(backend: str, image: str, newer: bool) -> None:
    assert late(backend, image) == newer


def splits(
    lanes: list[int], jobs: dict[int, frozenset[int]], may: list[frozenset[int]]
) -> Iterator[tuple[int, list[int]]]:
    """(cost, job of each row) of every split."""
    n = len(lanes)
    for ends in itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n)):
        edges = [0, *ends, n]
        parts = [lanes[low:high] for low, high in itertools.pairwise(edges)]
        for names in itertools.product(jobs, repeat=len(parts)):
            if all(len(set(p)) == len(p) and set(p) <= jobs[j] for p, j in zip(parts, names, strict=True)):
                cost = sum(1 + len(jobs[j]) - len(p) for p, j in zip(parts, names, strict=True))
                each = [j for p, j in zip(parts, names, strict=True) for _ in p]
                if all(job in able for job, able in zip(each, may, strict=True)):
                    yield cost, each


@pytest.mark.parametrize("seed", range(40))
def test_splits_are_those_of_least_cost_of_all(seed: int) -> None:
    rng = random.Random(seed)
    jobs = {j: frozenset(rng.sample(range(5), rng.randint(1, 4))) for j in range(3)}
    lanes = [rng.randrange(5) for _ in range(rng.randint(1, 5))]
    some = [frozenset(rng.sample(range(3), rng.randint(2, 3))) for _ in lanes]
    for may in (some, [frozenset(jobs)] * len(lanes)):
        tried = list(splits(lanes, jobs, may))
        best = min((cost for cost, _ in tried), default=None)
        every = [{names[at] for cost, names in tried if cost == best} for at in range(len(lanes))]
        assert split_run(lanes, jobs, may) == every
