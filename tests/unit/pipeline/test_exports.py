from __future__ import annotations

import json

import numpy as np
import pytest

from moeplan.artifacts.plan import Plan
from moeplan.errors import InputError, PlanError, SpecError, UnknownNameError
from moeplan.pipeline.exports import export_formats, export_plan, import_plan, load_placement
from moeplan.registry import plugin_names
from moeplan.specs.models import find_model
from moeplan.testing.exporters import random_plan, tiny_model

MODEL = find_model("deepseek-v2-lite")
SUFFIX = {"trtllm": ".yaml", "eplb": ".npz"}


@pytest.fixture
def plan_path(tmp_path):
    random_plan(np.random.default_rng(2), MODEL, 8, 16).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.mark.parametrize("name", ["sglang", "trtllm", "vllm", "vllm-ascend", "eplb", "megatron", "deepspeed"])
def test_a_built_in_model_needs_no_options_either_way(name, tmp_path):
    redundant = 0 if name in ("megatron", "deepspeed") else 16
    plan = random_plan(np.random.default_rng(2), MODEL, 8, redundant)
    plan.save(tmp_path / "plan.json")
    out = tmp_path / f"out{SUFFIX.get(name, '.json')}"
    assert export_plan(tmp_path / "plan.json", name, out) == [out]
    for format_name in (name, None):
        found = import_plan(out, model="DeepSeek-V2-Lite", num_ranks=8, num_nodes=2, format_name=format_name)
        assert found.planner == f"imported:{name}"
        assert found.physical_to_logical_map == plan.physical_to_logical_map
        assert found.rank_of_slot == plan.rank_of_slot
        assert found.replicas == plan.replicas
        assert found.layer_ids == MODEL.moe_layer_ids
        assert (found.ranks_per_node, found.prediction, found.status) == (4, None, "feasible")
        found.save(tmp_path / "again.json")
        assert Plan.load(tmp_path / "again.json") == found
    loaded = load_placement(out, model=MODEL, num_ranks=8, num_nodes=2)
    assert loaded.planner == f"imported:{name}"
    assert np.array_equal(loaded.placement.physical_to_logical_LP, plan.physical_to_logical_map)


def test_a_plan_is_loaded_as_it_is(plan_path):
    loaded = load_placement(plan_path, model=MODEL)
    assert loaded == Plan.load(plan_path)
    (directory := plan_path.parent / "out").mkdir()
    (directory / "plan.json").write_bytes(plan_path.read_bytes())
    assert load_placement(directory, model=MODEL) == loaded
    assert export_plan(directory, "sglang", directory / "a.json") == [directory / "a.json"]
    with pytest.raises(PlanError, match=r"num_ranks \(8\) is not --ranks \(4\)"):
        load_placement(plan_path, model=MODEL, num_ranks=4)
    with pytest.raises(PlanError, match=r"num_experts \(64\) is not that of DeepSeek-V3 \(256\)"):
        load_placement(plan_path, model=find_model("deepseek-v3"))


def test_a_plan_is_not_written_over_by_its_export(plan_path):
    for plan in (plan_path, plan_path.parent):
        with pytest.raises(SpecError, match=r"plan.json is read and would be written over"):
            export_plan(plan, "sglang", plan_path)
    assert Plan.load(plan_path).model == MODEL.name


def test_two_copies_on_a_rank_are_accepted_with_a_note(tmp_path):
    model = tiny_model(4, num_layers=3, moe_layer_ids=(1, 2))
    rows = [[0, 0, 1, 2, 3, 1], [0, 1, 2, 3, 0, 1]]
    (tmp_path / "map.yaml").write_text(
        f"num_slots: 6\ninitial_global_assignments:\n  1: {rows[0]}\n  2: {rows[1]}\nlayer_updates_per_iter: 0\n"
    )
    loaded = load_placement(tmp_path / "map.yaml", model=model, num_ranks=2)
    note = "1 times a rank holds two copies of one expert, of which one is wasted (first: layer 1, rank 0, expert 0)"
    assert loaded.notes == (note,)
    import_plan(tmp_path / "map.yaml", model=model, num_ranks=2).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").notes == (note,)


def test_unknown_names_and_idle_options(plan_path, tmp_path):
    with pytest.raises(UnknownNameError, match="exporter 'sglan' is not known; did you mean 'sglang'"):
        export_plan(plan_path, "sglan", tmp_path / "a")
    with pytest.raises(SpecError, match="--checkpoint says nothing to format 'trtllm'; its options: none"):
        export_plan(plan_path, "trtllm", tmp_path / "a", checkpoint=tmp_path)
    with pytest.raises(SpecError, match=r"--num-layers says nothing to format 'eplb'; its options: --model"):
        export_plan(plan_path, "eplb", tmp_path / "a", num_layers=3)
    with pytest.raises(UnknownNameError, match="model 'deepseek-v2-light'"):
        import_plan(plan_path, model="deepseek-v2-light", num_ranks=8)
    with pytest.raises(PlanError, match="it is a placement for 'DeepSeek-V2-Lite'"):
        export_plan(plan_path, "sglang", tmp_path / "a", model="mixtral-8x7b")


def test_files_that_are_no_placement(plan_path, tmp_path):
    (tmp_path / "a.json").write_text('{"hello": 1}')
    with pytest.raises(
        InputError, match=r"cannot tell the format of .*none of deepspeed, eplb.* fits; moeplan import takes its --form"
    ):
        import_plan(tmp_path / "a.json", model=MODEL, num_ranks=8)
    with pytest.raises(SpecError, match="does not say the number of ranks; give --ranks"):
        load_placement(tmp_path / "a.json", model=MODEL)
    with pytest.raises(SpecError, match=r"--ranks \(8\) is not a positive multiple of --nodes \(3\)"):
        import_plan(tmp_path / "a.json", model=MODEL, num_ranks=8, num_nodes=3)
    out = tmp_path / "b.json"
    export_plan(plan_path, "sglang", out)
    with pytest.raises(PlanError, match=r"b.json is not a plan; 'moeplan import' makes one"):
        Plan.load(out)
    with pytest.raises(PlanError, match="80 slots do not divide over 7 ranks"):
        import_plan(out, model=MODEL, num_ranks=7)
    document = json.loads(out.read_text())
    document["physical_to_logical_map"][5][0] = 64
    out.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=r"\[5\]\[0\] \(64\) is outside 0\.\.63"):
        import_plan(out, model=MODEL, num_ranks=8)


def test_a_model_from_its_config(tmp_path):
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    }
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = find_model(folder)
    random_plan(np.random.default_rng(0), model, 2).save(tmp_path / "plan.json")
    with pytest.raises(Exception, match="give --num-layers, or --model"):
        export_plan(tmp_path / "plan.json", "sglang", tmp_path / "a.json")
    export_plan(tmp_path / "plan.json", "sglang", tmp_path / "a.json", model=str(folder / "config.json"))
    assert len(json.loads((tmp_path / "a.json").read_text())["physical_to_logical_map"]) == 3


def test_every_format_has_a_description():
    formats = export_formats()
    assert sorted(formats) == plugin_names("exporters")
    assert all(formats.values())
