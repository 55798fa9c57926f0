"""Scenarios from file to result: intervals, sweeps, comparisons, and what cannot be served."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from moeplan.artifacts.event_log import EventLog
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Plan, placement_fields
from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.artifacts.simulation_result import SimulationResult
from moeplan.cli import cli
from moeplan.errors import (
    InfeasibleError,
    InputError,
    MoeplanError,
    PlanError,
    ProfileError,
    SpecError,
    TraceError,
    UnknownNameError,
)
from moeplan.pipeline.compare import compare
from moeplan.pipeline.executor import InlineExecutor
from moeplan.pipeline.inputs import read_routing
from moeplan.pipeline.optimize import optimize
from moeplan.pipeline.serving import build_service
from moeplan.pipeline.simulate import cases_of, simulate, sweep, write_simulation
from moeplan.specs.models import find_model
from moeplan.specs.scenario import Scenario
from moeplan.specs.workload import Objective, Workload

DEMO = Path(__file__).resolve().parents[3] / "moeplan" / "data" / "demo_trace.npz"
ALL: dict[str, Any] = {"objective": {"dispatch": "allgather"}}
EVEN = {"experts": {"mode": "balanced"}}
REQUESTS = {"arrivals": "poisson", "rate": "30 /s", "count": 40, "input_tokens": 200, "output_tokens": 20}


def scenario(serving: dict[str, Any] | None = None, **fields: Any) -> Scenario:
    base = {"model": "deepseek-v2-lite", "trace": str(DEMO), "cluster": "h100", "ranks": 8, "profile": "none"}
    return Scenario.parse(base | {"serving": {"requests": REQUESTS} | (serving or {})} | fields, "test")


def test_a_placement_of_other_ranks_names_the_fields_that_say_how_many(tmp_path: Path) -> None:
    lite = find_model("deepseek-v2-lite")
    placement = Placement.contiguous(lite.num_moe_layers, lite.num_experts, 2, 2)
    plan = Plan(
        model=lite.name, planner="test", status="feasible", seed=0, num_experts=lite.num_experts,
        num_redundant_experts=0, layer_ids=lite.moe_layer_ids, objective=Objective(), workload=Workload(),
        **placement_fields(placement),
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    ahead = {"ranks": 4, "placement": str(tmp_path / "plan.json")}
    split = ALL | {"current": str(tmp_path / "plan.json")}
    for job, told in (
        (scenario(EVEN, **split), "ranks (8)"),
        (scenario(EVEN | {"role": "prefill"}, **split), "ranks (8)"),
        (scenario(EVEN | {"engine": {"pp": 2}}, **split), "ranks / engine.pp (4)"),
        (scenario(EVEN | {"engine": {"expert_tp": 2}}, **split), "ranks / engine.expert_tp (4)"),
        (scenario(EVEN | {"prefill": ahead}), "serving.prefill.ranks (4)"),
    ):
        with pytest.raises(PlanError, match=re.escape(f"plan.json: num_ranks (2) is not {told}; set it to that, or")):
            build_service(job, 0)
    with pytest.raises(PlanError, match=re.escape("plan.json: num_ranks (2) is not ranks (8); set it")):
        optimize(scenario(**split))


def test_a_result_has_intervals_around_its_values_and_can_be_read_back(tmp_path: Path) -> None:
    found = simulate(scenario({"slo": {"ttft": "10 s"}, "price": "2 USD/h"}), seeds=2)
    result = found.result
    assert {"ttft_p99_s", "tpot_p50_s", "output_tokens_per_s_per_gpu", "usd_per_million_output_tokens"} <= set(
        result.headlines
    )
    for name, line in result.headlines.items():
        assert line.low <= line.value <= line.high, name
    # The roofline is wrong by up to half: every step at the ends of that moves the median by about as much.
    tpot = result.headlines["tpot_p50_s"]
    assert tpot.high / tpot.value > 1.3
    assert result.headlines["slo_attainment"].value == 1.0
    assert result.counts["finished"] == 40
    assert result.ranks is not None
    total = np.array([result.ranks.compute, result.ranks.exchange, result.ranks.bubble, result.ranks.idle]).sum(0)
    assert total == pytest.approx(np.ones(8), abs=1e-6)
    paths = write_simulation(found, tmp_path / "run")
    assert SimulationResult.load(tmp_path / "run") == result
    log = EventLog.read(paths[1])
    assert log.source == "simulated"
    assert log.of_kind("finish").sum() == 40
    assert log.num_ranks == 8
    with pytest.raises(SpecError, match="does not hold a simulation"):
        write_simulation(found, tmp_path)


def test_ranks_that_keep_a_cache_together_hold_more_sequences(tmp_path: Path) -> None:
    """Eight ranks that each hold latents whole have room for four of the prompts, with an eighth each for all."""
    requests = REQUESTS | {"arrivals": "constant", "rate": "1000 /s", "count": 12, "input_tokens": 8000}
    engine = {"tp": 8, "memory_fraction": "6 %"}
    asked = {"requests": requests, "role": "decode"}
    one, eight = (scenario(asked | {"engine": engine | {"dcp": dcp}}) for dcp in (1, 8))
    pools = [build_service(each, 0).pools[0] for each in (one, eight)]
    assert pools[0].kv_bytes == 8 * pools[1].kv_bytes == 27 * 576 * 2
    assert pools[1].capacity_tokens == pytest.approx(8 * pools[0].capacity_tokens, abs=8)
    assert 4 * 8020 < pools[0].capacity_tokens < 5 * 8020
    few, all_of_them = (simulate(each, seeds=1).result for each in (one, eight))
    assert few.counts["finished"] == all_of_them.counts["finished"] == 12
    assert all_of_them.headlines["queue_p99_s"].value < 0.1 * few.headlines["queue_p99_s"].value
    said = [{assumption.name for assumption in result.assumptions} for result in (few, all_of_them)]
    assert ["costs of context parallelism" in names for names in said] == [False, True]
    row = {"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [0, 1]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    blocks = {"tp": 8, "dcp": 8, "block_size": 128, "prefix_caching": True}
    with pytest.raises(SpecError, match=r"block_size \(128\) times engine.dcp \(8\) does not divide .* \(512 tokens\)"):
        simulate(scenario({"requests": {"file": str(tmp_path / "m.jsonl")}, "engine": blocks}), seeds=1)


def test_a_prompt_cut_among_ranks_is_there_sooner_and_leaves_in_parts() -> None:
    requests = REQUESTS | {"arrivals": "constant", "rate": "1 /s", "count": 3, "input_tokens": 32000}

    def run(pcp: int, **more: Any) -> SimulationResult:
        pool = {"ranks": 8, "engine": {"pcp": pcp}, "link": "1 GB/s"}
        parts = {"tp": 4, "dcp": 4}  # each rank that decodes takes a quarter of a cache in
        return simulate(scenario({"requests": requests, "prefill": pool, "engine": parts} | more), seeds=1).result

    one, four = run(1), run(4)
    assert four.counts["finished"] == 3
    assert four.counts["kv_transferred_bytes"] == one.counts["kv_transferred_bytes"] == 3 * 32000 * 27 * 576 * 2
    # Of a quarter of the attention, and a cache that leaves over four links: without either it is not a third.
    assert four.headlines["ttft_p50_s"].value < one.headlines["ttft_p50_s"].value / 3
    lost = {"kind": "rank-loss", "pool": "prefill", "at": "1500 ms", "rank": 6}
    assert run(4, faults=[lost]).counts["finished"] == 3


def test_host_time_adds_to_every_step() -> None:
    alone = {"requests": REQUESTS | {"arrivals": "constant", "rate": "1 /s", "count": 3}}
    usual = simulate(scenario(alone), seeds=1).result.headlines["tpot_p50_s"].value
    slower = simulate(scenario(alone | {"engine": {"step_overhead": "20 ms"}}), seeds=1).result
    assert slower.headlines["tpot_p50_s"].value == pytest.approx(usual + 0.02, abs=1e-8)


def test_runs_of_a_case_read_the_trace_once_and_tell_how_far_each_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    read: list[Path] = []

    def count(path: Path, *given: Any, **named: Any) -> Any:
        read.append(path)
        return read_routing(path, *given, **named)

    monkeypatch.setattr("moeplan.pipeline.simulate.read_routing", count)
    simulate(scenario(), seeds=2, progress=lambda _what, done: told.append(done))
    assert read == [DEMO]
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(set(told)) > 100  # ten runs
    simulate(scenario(), seeds=1)  # the file may be another by then
    assert len(read) == 2


def test_seeds_that_do_not_differ_are_said() -> None:
    few = {"requests": REQUESTS | {"count": 3, "arrivals": "constant"}, "experts": {"mode": "mean"}}
    drawn = few | {"requests": REQUESTS | {"count": 3}}
    said = [any("seeds do not differ" in note for note in simulate(scenario(each), seeds=2).result.notes)
            for each in (few, drawn)]  # fmt: skip
    assert said == [True, False]


def test_one_and_two_phases_and_samples() -> None:
    bubble = {}
    for mode in ("replay", "sample", "mean", "balanced"):
        found = simulate(scenario({"experts": {"mode": mode, "windows": 3, "window": "100 ms"}}), seeds=1).result
        assert found.counts["finished"] == 40
        bubble[mode] = found.headlines["bubble_share"].value
    assert bubble["balanced"] < min(bubble["replay"], bubble["sample"], bubble["mean"])


def test_disaggregation_and_stages_run() -> None:
    split = simulate(
        scenario({"prefill": {"ranks": 4, "instances": 2}, "engine": {"max_num_seqs": 16}}), seeds=1
    ).result
    assert split.num_ranks == 16
    sent = 40 * 200 * (27 * 576 * 2)  # prompts, latent and rotary part in bf16 over 27 layers
    assert split.counts["kv_transferred_bytes"] == sent
    stages = simulate(scenario({"engine": {"pp": 2, "tp": 2}}), seeds=1).result
    assert stages.num_ranks == 8
    assert stages.counts["finished"] == 40


def test_drafts_bring_more_tokens_a_step_from_longer_steps() -> None:
    def served(drafts: int, accept_length: float = 1.0, **more: Any) -> SimulationResult:
        speculative = {"num_speculative_tokens": drafts, "accept_length": accept_length} if drafts else None
        return simulate(scenario({"engine": {"speculative": speculative}} | more), seeds=1).result

    plain, refused, accepted = served(0), served(1), served(1, 2.0)
    assert "accept_length" not in plain.headlines
    tpot = [each.headlines["tpot_p50_s"].value for each in (accepted, plain, refused)]
    assert tpot == sorted(tpot)
    assert refused.headlines["accept_length"].value == 1.0
    assert 1.8 < accepted.headlines["accept_length"].value <= 2.0  # 19 tokens after the first: the last step is cut
    assert all(each.counts["output_tokens"] == 40 * 20 for each in (plain, refused, accepted))
    # Some sequence may always have its drafts accepted: half of a step per token can be kept, a tenth of it never.
    least = refused.distributions["tpot"][0]
    assert served(1, slo={"tpot": f"{0.7e3 * least:.6f} ms"}).headlines["slo_attainment"].value == 0.0
    with pytest.raises(SpecError, match=r"slo.tpot .* no load meets it"):
        served(1, slo={"tpot": f"{0.1e3 * least:.6f} ms"})


def test_both_pools_hold_the_prediction_layer() -> None:
    drafts = {"speculative": {"num_speculative_tokens": 1, "accept_length": 1.7}}
    split = {"prefill": {"ranks": 4}, "engine": {"max_num_seqs": 16} | drafts}
    found = simulate(scenario(split), seeds=1).result
    assert found.counts["kv_transferred_bytes"] == 40 * 200 * (28 * 576 * 2)  # over 27 layers and the prediction layer
    assert found.headlines["accept_length"].value > 1.5
    other = simulate(scenario(split, seed=1), seeds=1).result
    assert other.headlines["accept_length"].value != found.headlines["accept_length"].value
    plain, drafting = (build_service(scenario({**split, "engine": e}), 0) for e in ({}, drafts))
    assert all(a.capacity_tokens > b.capacity_tokens for a, b in zip(plain.pools, drafting.pools, strict=True))


def test_the_last_stage_of_a_pipeline_holds_the_prediction_layer() -> None:
    """Of prompts, which SGLang serves so, or of everything: 28 layers of cache travel, and the last stage has room for
    fewer tokens than an even part of 28 layers leaves."""
    drafts = {"speculative": {"num_speculative_tokens": 2, "accept_length": 2.0}}
    split = {"prefill": {"ranks": 4, "engine": {"pp": 2}}, "engine": {"max_num_seqs": 16} | drafts}
    found = simulate(scenario(split), seeds=1).result
    assert found.counts["kv_transferred_bytes"] == 40 * 200 * (28 * 576 * 2)
    ways = [{"engine": {"pp": 2} | more} for more in ({}, drafts)]
    whole, drafting = (simulate(scenario(way), seeds=1).result for way in ways)
    assert drafting.counts["output_tokens"] == whole.counts["output_tokens"] == 40 * 20
    assert drafting.headlines["accept_length"].value > 1.7
    assert drafting.headlines["bubble_share"].value > whole.headlines["bubble_share"].value  # of the first stage
    plain, more = (build_service(scenario(way), 0).pools[0] for way in ways)
    assert more.kv_bytes == pytest.approx(plain.kv_bytes * 14.5 / 13.5)
    assert more.group_bytes == pytest.approx(plain.group_bytes * 28 / 27)


def test_experts_split_over_all_ranks_are_always_in_balance() -> None:
    def served(tp: int, expert_tp: int, fidelity: str = "step", count: int = 40) -> SimulationResult:
        serving = {"engine": {"tp": tp, "expert_tp": expert_tp}, "requests": REQUESTS | {"count": count}}
        return simulate(scenario(serving, fidelity=fidelity, **ALL), seeds=1).result

    whole, some, split = (served(8, degree) for degree in (1, 2, 8))
    for result in (whole, some, split):
        assert result.counts["finished"] == 40
        assert result.rank_memory is not None
        assert result.rank_memory.experts == whole.rank_memory.experts  # type: ignore[union-attr]
    assert [r.ranks is not None and np.ptp(r.ranks.compute) < 1e-9 for r in (whole, some, split)] == [
        False, False, True
    ]  # fmt: skip
    played, stepped = (served(8, 8, kind, 4).headlines["tpot_p50_s"].value for kind in ("detailed", "step"))
    assert played == pytest.approx(stepped, rel=0.02)


def test_caches_are_of_the_requests_mean_length() -> None:
    """18 of GPT-OSS-120B's 36 layers keep 128 of 8000 tokens: 8 heads of 64, keys and values, 2 bytes."""
    requests = {"arrivals": "closed-loop", "concurrency": 8, "count": 8, "input_tokens": 7000, "output_tokens": 1000}
    serving = {"requests": requests, "experts": {"mode": "balanced"}}
    document = {
        "model": "gpt-oss-120b", "cluster": "h100", "ranks": 8, "profile": "none", "serving": serving,
        "workload": {"weight_dtype": "fp4"},
    }  # fmt: skip
    (pool,) = build_service(Scenario.parse(document, "test"), 0).pools
    assert pool.kv_bytes == pytest.approx(18 * 2048 * (1 + 128 / 8000))


def test_re_balancing_lowers_the_bubble() -> None:
    requests = REQUESTS | {"count": 150, "rate": "60 /s"}
    still = simulate(scenario({"requests": requests, "experts": {"mode": "mean"}}), seeds=1).result
    moved = simulate(
        scenario(
            {"requests": requests, "experts": {"mode": "mean"},
             "rebalance": {"interval": "300 ms", "window": "300 ms", "planner": "greedy", "apply": "bulk"}}
        ),
        seeds=1,
    ).result  # fmt: skip
    assert moved.counts["migrated_bytes"] > 0
    assert moved.headlines["bubble_share"].value < still.headlines["bubble_share"].value


def test_re_balancing_keeps_the_slots_of_every_rank() -> None:
    pool = build_service(scenario({"experts": {"mode": "mean"}}), 0).pools[0]
    slots_R = np.array([4, 12, 8, 8, 8, 8, 8, 8])
    rank_of_slot_P = np.repeat(np.arange(8, dtype=np.int32), slots_R)
    uneven = replace(pool.placement, rank_of_slot_P=rank_of_slot_P)
    assert pool.replan is not None
    found = pool.replan(pool.loads.at(0.0, "decode"), pool.cluster, uneven, "greedy")
    assert found.placement.rank_of_slot_P.tolist() == rank_of_slot_P.tolist()


def test_pools_of_different_size_are_re_balanced_and_slowed_apart() -> None:
    split = {"prefill": {"ranks": 4, "instances": 2}, "requests": REQUESTS | {"count": 60, "rate": "60 /s"}}
    again = {"rebalance": {"interval": "200 ms", "window": "200 ms", "apply": "bulk"}}
    moved = simulate(scenario(split | again), seeds=1).result
    assert moved.counts["finished"] == 60
    assert moved.counts["migrated_bytes"] > 0
    well = simulate(scenario(split), seeds=1).result.headlines
    fault = {"kind": "slow-rank", "pool": "prefill", "rank": 1, "speed": 0.2, "at": "0 s"}
    faults = [fault | {"instance": n} for n in (0, 1)]
    slow = simulate(scenario(split | {"faults": faults}), seeds=1).result.headlines
    assert slow["ttft_p50_s"].value > 1.5 * well["ttft_p50_s"].value  # prompts take longer, further tokens do not
    assert slow["tpot_p50_s"].value < 1.1 * well["tpot_p50_s"].value


def test_a_rank_lost_in_the_prefill_pool_is_planned_around() -> None:
    split = {"prefill": {"ranks": 4, "instances": 2}, "requests": REQUESTS | {"count": 60, "rate": "60 /s"}}
    fault = {"kind": "rank-loss", "pool": "prefill", "at": "200 ms", "rank": 1, "detect": "100 ms"}
    lost = simulate(scenario(split | {"faults": [fault]}), seeds=1).result
    well = simulate(scenario(split), seeds=1).result
    assert lost.counts["finished"] == well.counts["finished"] == 60
    assert lost.counts["stalled_s"] > 0.1
    assert lost.counts["migrated_bytes"] > 0
    assert lost.headlines["ttft_p99_s"].value > well.headlines["ttft_p99_s"].value
    assert lost.traffic[0].name == "prefill, mean of 2 instances"  # the other one took over
    assert lost.traffic[0].unchanged is None  # ranks differ from those of the first placement


def test_a_directory_names_the_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"is a directory; it holds no .yaml file"):
        Scenario.from_file(tmp_path)
    (tmp_path / "a.yaml").write_text("")
    (tmp_path / "scenario.yaml").write_text("")
    with pytest.raises(SpecError, match=r"is a directory; name the file in it: .*scenario.yaml"):
        Scenario.from_file(tmp_path)


def test_a_lost_rank_is_planned_around() -> None:
    faults = [{"kind": "rank-loss", "at": "200 ms", "rank": 3, "detect": "100 ms"}]
    found = simulate(scenario({"faults": faults}), seeds=1).result
    assert found.counts["finished"] == 40
    assert found.counts["stalled_s"] > 0.1


def test_a_pipeline_goes_on_around_a_slow_and_a_lost_rank() -> None:
    pipeline = {"engine": {"pp": 2}, "requests": REQUESTS | {"count": 60, "rate": "60 /s"}}
    well = simulate(scenario(pipeline), seeds=1).result
    slow = {"kind": "slow-rank", "at": "0 s", "rank": 6, "speed": 0.2}
    one = simulate(scenario(pipeline | {"faults": [slow]}), seeds=1).result
    both = simulate(scenario(pipeline | {"faults": [slow, slow | {"rank": 2}]}), seeds=1).result
    tpot = [each.headlines["tpot_p50_s"].value for each in (well, one, both)]
    assert tpot[0] < 0.9 * tpot[1] < 0.81 * tpot[2]
    assert one.traffic[0].name == "serving, first of 2 stages"
    speed, per_node = (well.headlines[f"output_tokens_per_s{of}"].value for of in ("", "_per_node"))
    assert per_node == speed  # both stages are in one node
    lost = {"kind": "rank-loss", "at": "200 ms", "rank": 6, "detect": "100 ms"}
    found = simulate(scenario(pipeline | {"faults": [lost]}), seeds=1).result
    assert found.counts["finished"] == 60
    assert found.counts["migrated_bytes"] > 0
    assert found.headlines["ttft_p99_s"].value > well.headlines["ttft_p99_s"].value


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("serving", "fields", "kind", "message"),
    [
        ({}, {"model": "deepseek-v3"}, TraceError, r"is a trace of another model"),
        ({"experts": {"mode": "balanced"}}, {"model": "deepseek-v3", "trace": None}, InfeasibleError,
         r"does not fit rank 0: .* exceeded by \d+ bytes .* use \d+ ranks or more"),
        ({"faults": [{"kind": "slow-rank", "pool": "prefill", "at": "1 s", "rank": 0, "speed": 0.5}]}, {}, SpecError,
         r"faults.0.pool \(prefill\): there is no prefill pool"),
        ({"faults": [{"kind": "slow-link", "at": "1 s", "rank": 0, "speed": 0.5, "instance": 3}]}, {}, SpecError,
         r"faults.0.instance \(3\) is outside 0..0 \(decode instances\)"),
        ({"engine": {"pp": 2}, "faults": [{"kind": "slow-rank", "at": "1 s", "rank": 0, "speed": 0.5}],
          "rebalance": {"interval": "1 s", "window": "1 s"}}, {}, SpecError,
         r"with engine.pp \(2\) above 1, faults and serving.rebalance cannot be simulated together yet"),
        ({"slo": {"tpot": "1 us"}}, {}, SpecError, r"slo.tpot \(0.001 ms\) is below the service time .* by"),
        ({"faults": [{"kind": "slow-rank", "at": "0 s", "until": "2 s", "rank": 1, "speed": 0.5},
                     {"kind": "slow-rank", "at": "1 s", "rank": 1, "speed": 0.1}]}, {}, SpecError,
         r"faults.1 \(slow-rank of rank 1 from 1 s\) overlaps serving.faults.0 \(from 0 s to 2 s\)"),
        ({"slo": {"ttft": "1 us"}}, {}, SpecError, r"slo.ttft .* no load meets it; allow"),
        ({"requests": REQUESTS | {"duration": "1 us"}}, {}, SpecError, r"zero arrivals within duration"),
        ({"warmup": "1 h"}, {}, SpecError, r"zero finished requests arrive after it"),
        ({}, {"profile": "h100-sxm"}, ProfileError, r"does not cover .* measure them: moeplan profile experts"),
        ({"faults": [{"kind": "rank-loss", "at": "1 s", "rank": 8}]}, {}, SpecError, r"faults.0.rank \(8\) is outside"),
        ({"engine": {"expert_tp": 3}}, {}, SpecError, r"engine.expert_tp \(3\) does not divide the ranks of a node"),
        ({"engine": {"expert_tp": 2}}, {}, SpecError, r"need every token, but objective.dispatch is per_node"),
        ({"engine": {"expert_tp": 2}, "rebalance": {"interval": "1 s", "window": "1 s"}}, ALL, SpecError,
         r"serving.rebalance moves whole experts, but engine.expert_tp \(2\) splits them"),
        ({"engine": {"expert_tp": 2}, "faults": [{"kind": "rank-loss", "at": "1 s", "rank": 0}]}, ALL, SpecError,
         r"faults.0.kind \(rank-loss\): with engine.expert_tp \(2\) above 1"),
        ({"engine": {"tp": 3}}, {}, SpecError, r"engine.tp \(3\) times engine.pp \(1\) does not divide"),
        ({"prefill": {"ranks": 8, "engine": {"tp": 2, "pcp": 3}}}, {}, SpecError,
         r"engine.tp \(2\) times engine.pcp \(3\) times engine.pp \(1\) does not divide the ranks \(8\)"),
        ({"engine": {"pcp": 2}}, {}, SpecError, r"engine.pcp \(2\) cuts prompts among ranks, .* use 1"),
        ({"role": "prefill", "engine": {"tp": 2, "dcp": 2, "pcp": 2}}, {}, SpecError,
         r"engine.pcp \(2\) and engine.dcp \(2\): SGLang refuses the two together, .* set dcp to 1 here"),
        ({"engine": {"tp": 4, "dcp": 3}}, {}, SpecError, r"engine.dcp \(3\) does not divide engine.tp \(4\)"),
        (EVEN | {"engine": {"tp": 8, "dcp": 4}}, {"model": "qwen3-30b-a3b", "trace": None}, SpecError,
         r"engine.dcp \(4\) does not divide the copies of a key head \(2: engine.tp, 8, over num_kv_heads, 4, of"),
        (EVEN | {"engine": {"tp": 4, "dcp": 2}}, {"model": "mixtral-8x7b", "trace": None}, SpecError,
         r"does not divide the copies of a key head \(1: .* choose a divisor of them, or a higher tp"),
        (EVEN | {"engine": {"tp": 8, "dcp": 2}}, {"model": "gpt-oss-120b", "trace": None}, SpecError,
         r"engine.dcp \(2\): layers of GPT-OSS-120B keep a window of 128 tokens"),
        ({"requests": REQUESTS | {"input_tokens": 9_000_000}}, {}, InfeasibleError, r"more than the KV cache"),
        ({"requests": REQUESTS | {"file": "none.csv"}}, {}, TraceError, r"none.csv does not exist"),
        ({}, {"trace": None}, SpecError, r"trace is missing"),
        ({"engine": {"backend": "vlm"}}, {}, UnknownNameError,
         r"serving.engine.backend 'vlm' is not known; did you mean 'vllm'\? choose one of: sglang, trtllm, vllm$"),
        ({"prefill": {"ranks": 4, "engine": {"backend": "torch"}}}, {"profile": None}, UnknownNameError,
         r"serving.prefill.engine.backend 'torch' is not known"),
    ],
)  # fmt: skip
def test_impossible_scenarios_say_why(serving: Any, fields: Any, kind: type[MoeplanError], message: str) -> None:
    with pytest.raises(kind, match=message):
        simulate(scenario(serving, **fields), seeds=1)


def test_an_objective_that_cached_prompts_keep_is_possible(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 20480, "output_length": 1, "hash_ids": list(range(40))}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row | {"timestamp": 1000 * n}) + "\n" for n in range(3)))
    requests = {"requests": {"file": str(tmp_path / "m.jsonl")}, "engine": {"prefix_caching": True}}
    usual = simulate(scenario(requests), seeds=1).result.distributions["ttft"]
    assert usual[50] < 0.5 * usual[-1]  # the first prompt is computed, the next two are found
    limit = {"ttft": f"{usual[-1] * 500:.6f} ms"}
    found = simulate(scenario(requests | {"slo": limit}), seeds=1).result
    assert found.headlines["slo_attainment"].value == pytest.approx(2 / 3)
    with pytest.raises(SpecError, match="no load meets it"):
        simulate(scenario({"requests": requests["requests"], "slo": limit}), seeds=1)


def test_a_framework_without_rows_is_said(tmp_path: Path) -> None:
    def notes(backend: str, dtype: str) -> list[str]:
        few = {"requests": REQUESTS | {"count": 2}, "engine": {"backend": backend}}
        found = simulate(scenario(few, profile=None, workload={"weight_dtype": dtype}), seeds=1).result
        return [note for note in found.notes if "engine.backend" in note]

    rows = load_profile("h100-sxm").select("gemm", backend="vllm", dtype="bf16", m=[1, 64])
    own = rows.set_column(rows.column_names.index("backend"), "backend", pa.array(["own"] * rows.num_rows))
    meta = load_profile("h100-sxm").meta.model_copy(update={"tables": {}})
    HardwareProfile(meta, {"gemm": own}).save(tmp_path / "own")
    with pytest.raises(ProfileError, match="does not cover"):  # the backend itself is known here
        simulate(scenario({"engine": {"backend": "own"}}, profile=str(tmp_path / "own")), seeds=1)
    assert notes("vllm", "bf16") == []
    (said,) = notes("vllm", "int4")
    assert "profile h100-sxm has no experts of it, in int4; the roofline stands in" in said


# ---------------------------------------------------------------------- sweeps


def test_a_sweep_resumes_and_lists_what_failed(tmp_path: Path) -> None:
    wanted = {"serving.requests.rate": ["10 /s", "60 /s"], "serving.engine.tp": [1, 3]}
    one = scenario(sweep=wanted)
    assert [case for case, _ in cases_of(one)][1] == {"serving.requests.rate": "10 /s", "serving.engine.tp": 3}
    first = sweep(one, tmp_path, seeds=1)
    assert [result is not None for result in first.results] == [True, False, True, False]
    assert "does not divide the ranks" in first.failures[1]
    second = sweep(one, tmp_path, seeds=1)
    assert second.resumed == 2
    assert second.results[0] == first.results[0]
    (tmp_path / "cases").joinpath(next(p.name for p in (tmp_path / "cases").iterdir()), "result.json").write_text("{")
    assert sweep(one, tmp_path, seeds=1).resumed == 1
    found = compare(tmp_path, tmp_path)
    assert len(found) == 2
    assert all(d.verdict == "equal" for _, differences in found for d in differences)


def test_a_sweep_is_simulated_again_where_what_it_is_made_from_has_changed(tmp_path: Path) -> None:
    model, plan = find_model("deepseek-v2-lite"), tmp_path / "plan"
    (tmp_path / "model.json").write_text(model.model_dump_json())
    files = {"model": str(tmp_path / "model.json"), "trace": None, "current": str(plan)}
    few = {"requests": REQUESTS | {"count": 2}, "experts": {"mode": "balanced"}}
    one = scenario(few, **files, sweep={"seed": [1]})
    plan.mkdir()
    for experts in (np.arange(64), np.arange(64)[::-1]):
        rows = [experts.tolist()] * model.num_layers
        (plan / "plan.json").write_text(json.dumps({"physical_to_logical_map": rows}))
        assert sweep(one, tmp_path / "out", seeds=1).resumed == 0
    assert sweep(one, tmp_path / "out", seeds=1).resumed == 1
    (tmp_path / "model.json").write_text(model.model_copy(update={"vocab_size": 1000}).model_dump_json())
    assert sweep(one, tmp_path / "out", seeds=1).resumed == 0


def test_an_interrupted_sweep_keeps_its_finished_cases(tmp_path: Path) -> None:
    one = scenario(sweep={"seed": [1, 2]})

    class Interrupted(InlineExecutor):
        def run(self, function: Any, cases: Any, done: Any) -> None:
            super().run(function, cases[:10], done)  # nine are the first case
            raise KeyboardInterrupt("stopped")

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        sweep(one, tmp_path, seeds=1, executor=Interrupted())
    assert sweep(one, tmp_path, seeds=1).resumed == 1


def test_wrong_sweeps_are_refused() -> None:
    with pytest.raises(SpecError, match=r"sweep serving.requests.rat=1: .*rat .* did you mean .rate"):
        cases_of(scenario(sweep={"serving.requests.rat": [1]}))
    with pytest.raises(SpecError, match=r"model is no section"):
        cases_of(scenario(sweep={"model.name": [1]}))


# ---------------------------------------------------------------------- comparison and command line


def test_faster_links_compare_better(tmp_path: Path) -> None:
    for name, overhead in (("slow", "50 ms"), ("fast", "0 ms")):
        found = simulate(scenario({"engine": {"step_overhead": overhead}}), seeds=1)
        write_simulation(found, tmp_path / name)
    ((_, differences),) = compare(tmp_path / "slow", tmp_path / "fast")
    tpot = next(d for d in differences if d.name == "tpot_p50_s")
    assert tpot.change < 0
    assert tpot.verdict == "better"
    assert tpot.change_low < tpot.change < tpot.change_high < 0
    with pytest.raises(InputError, match=r"no result.json: it is no simulation"):
        compare(tmp_path, tmp_path / "fast")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = scenario().model_dump(mode="json", exclude_unset=True)
    (tmp_path / "s.json").write_text(json.dumps(fields))
    runner = CliRunner()
    out = str(tmp_path / "run")
    answer = runner.invoke(cli, ["simulate", str(tmp_path / "s.json"), "--out", out, "--json", "--seeds", "1"])
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert document["written"] == [f"{out}/result.json", f"{out}/events.parquet"]
    again = runner.invoke(cli, ["compare", out, out, "--json"])
    assert json.loads(again.stdout)["cases"][0]["headlines"][0]["verdict"] == "equal"
    with monkeypatch.context() as patch:  # refused before anything is simulated
        patch.setattr("moeplan.pipeline.simulate.simulate", lambda *_a, **_k: pytest.fail("simulated"))
        refused = runner.invoke(cli, ["simulate", str(tmp_path / "s.json"), "--out", str(tmp_path)])
    assert "does not hold a simulation" in str(refused.exception)
    monkeypatch.setenv("COLUMNS", "160")
    assert "ttft_p50_s" in runner.invoke(cli, ["simulate", str(tmp_path / "s.json"), "--seeds", "1"]).stdout
    fields["sweep"] = {"seed": [1]}
    (tmp_path / "s.json").write_text(json.dumps(fields))
    assert "give --out" in runner.invoke(cli, ["simulate", str(tmp_path / "s.json")]).output


def test_nothing_of_this_needs_torch() -> None:
    import subprocess

    code = "import sys, moeplan.pipeline.simulate, moeplan.validation.queues; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
