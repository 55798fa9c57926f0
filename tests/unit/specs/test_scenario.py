from __future__ import annotations

import pytest
from pydantic import ValidationError

from moeplan.errors import InputError, SpecError, UnknownNameError
from moeplan.specs.scenario import Scenario

FULL = """
model: deepseek-v2-lite
trace: traces/law.npz
trace_format: npz
cluster: h200
ranks: 16
nodes: 2
redundant: max
kv_reserve: 20 GiB
planner: greedy
seed: 7
time_limit: 30 s
objective: {kind: time, return_mode: stay, dispatch: per_rank, max_imbalance: 2 %}
workload: {phase: decode, batch_per_rank: 128, context: 4096, weight_dtype: fp8}
current: old/plan.json
migration_size: 40 GB
migration_time: 5 s
target: sglang
out: out
"""


def test_a_file_says_everything_and_its_paths_are_relative_to_it(tmp_path):
    path = tmp_path / "scenario.yaml"
    path.write_text(FULL)
    scenario = Scenario.from_file(path)
    assert scenario.trace == tmp_path / "traces/law.npz"
    assert scenario.current == tmp_path / "old/plan.json"
    assert scenario.out == tmp_path / "out"
    assert scenario.model_spec().name == "DeepSeek-V2-Lite"
    cluster = scenario.cluster_spec()
    assert (cluster.accelerator.name, cluster.num_nodes, cluster.ranks_per_node) == ("H200-SXM-141GB", 2, 8)
    assert (scenario.redundant, scenario.kv_reserve, scenario.time_limit) == ("max", 20 * 2**30, 30.0)
    assert scenario.objective.max_imbalance == 0.02
    assert scenario.workload.weight_dtype == "fp8"
    with pytest.raises(ValidationError, match="frozen"):
        scenario.seed = 8


def test_defaults_are_those_of_the_command():
    scenario = Scenario.parse({"model": "mixtral-8x7b", "trace": "t.npz", "ranks": 4}, "test")
    assert (scenario.planner, scenario.redundant, scenario.seed, scenario.time_limit) == ("joint", 0, 0, None)
    assert (scenario.objective.return_mode, scenario.objective.dispatch) == ("return_home", "per_node")
    assert "phase" not in scenario.workload.model_fields_set
    cluster = scenario.cluster_spec()
    assert (cluster.accelerator.name, cluster.num_nodes, cluster.ranks_per_node) == ("H100-SXM-80GB", 1, 4)


def test_a_search_is_given_some_time():
    given = {"model": "mixtral-8x7b", "trace": "t.npz", "ranks": 4, "time_limit": "0 s"}
    with pytest.raises(SpecError, match=r"time_limit .*must be greater than 0"):
        Scenario.parse(given, "test")


def test_models_and_clusters_may_be_files_beside_it_or_written_out(tmp_path):
    (tmp_path / "cluster.yaml").write_text("accelerator: a100\nnum_nodes: 1\nranks_per_node: 2\n")
    path = tmp_path / "scenario.yaml"
    path.write_text("model: mixtral-8x7b\ntrace: /data/t.npz\ncluster: cluster.yaml\n")
    scenario = Scenario.from_file(path)
    assert scenario.cluster_spec().num_ranks == 2
    assert str(scenario.trace) == "/data/t.npz"
    path.write_text(
        "trace: t.npz\ncluster: {accelerator: b200, num_nodes: 1, ranks_per_node: 8}\n"
        "model: {name: m, num_layers: 2, moe_layer_ids: [1], hidden_size: 8, num_experts: 4, top_k: 2,"
        " expert_intermediate_size: 8, vocab_size: 10}\n"
    )
    scenario = Scenario.from_file(path)
    assert scenario.model_spec().num_moe_layers == 1
    assert scenario.cluster_spec().accelerator.name == "B200-SXM"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ntrace: t\nrank: 4\n", r"rank \(4\): there is no such field; did you mean 'ranks'\?"),
        ("model: m\nworkload: {fase: mix}\n", r"workload.fase \('mix'\): .*; did you mean 'phase'\?"),
        ("model: m\ntraining: {global_batch: 8, x: 1}\n", r"training.x \(1\): .* choose one of: capacity_factor"),
        ("model: m\nranks: yes\n", r"scenario.yaml: ranks \(true\) must be a number, not yes or no"),
        ("model: m\nworkload: {context: on}\n", r"workload: context \(true\) must be a number, not yes or no"),
        ("model: m\nseed: 5000000000\n", r"seed \(5000000000\): must be less than 4294967296"),
        ("model: m\nout: 2024-01-01\n", r"out: must be a path"),
        ("model: m\nranks: 0\n", r"ranks \(0\): must be greater than 0"),
        ("model: m\ntime_limit: -30\n", r"time_limit \(-30\): -30 must not be negative; write it as in '5 s'"),
        ("model: m\ntrace: t\ntime_limit: 30\n", r"time_limit \(30\): 30 is not a quantity in seconds"),
        ("model: m\ntrace: t\nredundant: -1\n", r"redundant \(-1\): write 0 or more, or max"),
        ("model: m\ntrace: t\nredundant: maxi\n", r"redundant \('maxi'\): write 0 or more, or max"),
        ("model: m\ntrace: t\nranks: 6\nnodes: 4\n", r"scenario.yaml: ranks \(6\) is not a multiple of nodes \(4\)"),
        ("model: m\ntrace: t\nmigration_size: 1 GB\n", r"scenario.yaml: migration_size limits .* current, which"),
        ("model: m\ntrace: t\nmigration_time: 1 s\n", r"scenario.yaml: migration_time limits .* current, which"),
        ("model: {name: x}\ntrace: t\n", r"scenario.yaml: model: num_layers: is missing"),
        ("model: m\ntrace: t\ncluster: {accelerator: h1}\n", r"scenario.yaml: accelerator 'h1' is not known"),
        ("model: m\ntrace: t\nworkload: {phase: training}\n", r"workload.phase \('training'\)"),
        ("- a\n", r"scenario.yaml: document: must be a mapping of fields"),
    ],
)
def test_a_wrong_scenario_is_refused(tmp_path, text, message):
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        Scenario.from_file(path)


def test_names_are_looked_up_when_they_are_used(tmp_path):
    scenario = Scenario.parse({"model": "mixtral-8x77b", "trace": "t.npz"}, "test")
    with pytest.raises(UnknownNameError, match="did you mean 'mixtral-8x7b'"):
        scenario.model_spec()
    with pytest.raises(InputError, match="cannot read"):
        Scenario.from_file(tmp_path / "absent.yaml")


def test_a_reserve_for_the_cache_needs_redundant_max() -> None:
    fields = {"model": "deepseek-v3", "kv_reserve": "20 GiB"}
    with pytest.raises(SpecError, match=r"kv_reserve \(20 GiB\) is kept free by redundant: max, but redundant is 0"):
        Scenario.parse(fields, "s")
    assert Scenario.parse(fields | {"redundant": "max"}, "s").kv_reserve == 20 * 2**30
    assert Scenario.parse(fields | {"sweep": {"redundant": ["max"]}}, "s").sweep


def test_wrong_fields_are_told_to_programs_too():
    with pytest.raises(SpecError, match="job: ranks") as caught:
        Scenario.parse({"model": "mixtral-8x7b", "ranks": 0, "planer": "joint", "objective": {"kind": "speed"}}, "job")
    found = {problem.field: problem for problem in caught.value.fields}
    assert found.keys() == {"ranks", "planer", "objective.kind"}
    assert found["ranks"].value == 0
    assert "greater than 0" in found["ranks"].problem
    assert found["planer"].problem == "there is no such field; did you mean 'planner'?"
    assert found["objective.kind"].value == "speed"


def test_wrong_fields_of_a_cluster_within_have_its_name_before_theirs():
    cluster = {"accelerator": "h100", "num_nodes": 0, "ranks_per_node": 8}
    with pytest.raises(SpecError, match="job: cluster: num_nodes") as caught:
        Scenario.parse({"model": "mixtral-8x7b", "cluster": cluster}, "job")
    assert [(problem.field, problem.value) for problem in caught.value.fields] == [("cluster.num_nodes", 0)]
