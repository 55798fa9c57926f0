"""Files typed out by hand from the layouts that the engines document, and what each engine cannot say."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplan.errors import ExportError, InputError, PlanError, SpecError, UnknownNameError
from moeplan.exports.base import ExportContext, ImportContext
from moeplan.exports.documents import read_placement_document
from moeplan.registry import load_plugin
from moeplan.testing.exporters import plan_of, random_plan, tiny_model


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="placements in .pt files are read with torch")


def exported(name, plan, out, **context):
    load_plugin("exporters", name).export(plan, out, ExportContext(**context))
    return out.read_text() if out.suffix in (".json", ".yaml", ".py") else out


def test_sglang_writes_the_one_key_and_every_decoder_layer(plan, tmp_path):
    text = exported("sglang", plan, tmp_path / "a.json", num_layers=4)
    assert json.loads(text) == {
        "physical_to_logical_map": [
            [0, 1, 2, 3, 0, 1],
            [3, 2, 0, 1, 2, 3],
            [0, 1, 2, 3, 0, 1],
            [0, 1, 2, 3, 0, 1],
        ]
    }


def test_sglang_takes_the_layers_from_the_model_and_needs_them(plan, model, tmp_path):
    text = exported("sglang", plan, tmp_path / "a.json", model=model)
    assert len(json.loads(text)["physical_to_logical_map"]) == 3
    with pytest.raises(ExportError, match=r"a row for every decoder layer.*--num-layers"):
        exported("sglang", plan, tmp_path / "b.json")
    with pytest.raises(ExportError, match="layer 2 of the plan is beyond the model's 2 decoder layers"):
        exported("sglang", plan, tmp_path / "b.json", num_layers=2)
    assert not (tmp_path / "b.json").exists()


def test_sglang_drops_dense_rows_and_refuses_other_layer_counts(reading):
    sglang = load_plugin("exporters", "sglang")
    rows = [[0, 0, 0, 0], [3, 2, 1, 0], [1, 0, 3, 2]]
    found = sglang.load({"physical_to_logical_map": rows}, "f", reading)
    assert found.placement.physical_to_logical_LP.tolist() == [[3, 2, 1, 0], [1, 0, 3, 2]]
    assert found.layer_ids == (1, 2)
    with pytest.raises(PlanError, match="2 rows but tiny has 3 decoder layers"):
        sglang.load({"physical_to_logical_map": rows[1:]}, "f", reading)


def test_trtllm_golden(plan, tmp_path):
    text = exported("trtllm", plan, tmp_path / "a.yaml")
    assert yaml.safe_load(text) == {
        "num_slots": 6,
        "initial_global_assignments": {1: [3, 2, 0, 1, 2, 3], 2: [0, 1, 2, 3, 0, 1]},
        "layer_updates_per_iter": 0,
    }
    assert "1: [3, 2, 0, 1, 2, 3]\n" in text


def test_trtllm_num_slots_must_agree(reading):
    document = {"num_slots": 8, "initial_global_assignments": {1: [0, 1, 2, 3]}, "layer_updates_per_iter": 0}
    with pytest.raises(PlanError, match=r"num_slots \(8\) is not the length of the assignments \(4\)"):
        load_plugin("exporters", "trtllm").load(document, "f", reading)


def test_vllm_ascend_golden(plan, tmp_path):
    assert json.loads(exported("vllm-ascend", plan, tmp_path / "a.json")) == {
        "moe_layer_count": 2,
        "layer_list": [
            {
                "layer_id": 0,
                "device_count": 2,
                "device_list": [
                    {"device_id": 0, "device_expert": [3, 2, 0]},
                    {"device_id": 1, "device_expert": [1, 2, 3]},
                ],
            },
            {
                "layer_id": 1,
                "device_count": 2,
                "device_list": [
                    {"device_id": 0, "device_expert": [0, 1, 2]},
                    {"device_id": 1, "device_expert": [3, 0, 1]},
                ],
            },
        ],
    }


def test_formats_by_position_need_every_moe_layer(model, tmp_path):
    partial = plan_of([[0, 1, 2, 3]], tiny_model(4, num_layers=3, moe_layer_ids=(1,)), 2)
    for name in ("vllm-ascend", "eplb", "vllm"):
        with pytest.raises(ExportError, match="the plan has 1 layers but tiny has 2 MoE layers"):
            exported(name, partial, tmp_path / "a.pt", model=model)


def test_eplb_triple_golden(plan, torch, tmp_path):
    log2phy = [[[2, -1], [3, -1], [1, 4], [0, 5]], [[0, 4], [1, 5], [2, -1], [3, -1]]]
    arrays = dict(np.load(exported("eplb", plan, tmp_path / "a.npz")))
    tensors = torch.load(exported("eplb", plan, tmp_path / "a.pt"), weights_only=True)
    for found in (arrays, {key: value.numpy() for key, value in tensors.items()}):
        assert found["phy2log"].tolist() == [[3, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]]
        assert found["log2phy"].tolist() == log2phy
        assert found["logcnt"].tolist() == [[1, 1, 2, 2], [2, 2, 1, 1]]
        assert all(value.dtype == np.int64 for value in found.values())
    with pytest.raises(SpecError, match=r"must end in \.npz or \.pt"):
        exported("eplb", plan, tmp_path / "a.txt")


def test_eplb_tuple_is_read_and_must_agree_with_itself(reading, torch, tmp_path):
    phy2log = torch.tensor([[3, 2, 1, 0], [0, 1, 2, 3]])
    log2phy = torch.tensor([[[3], [2], [1], [0]], [[0], [1], [2], [3]]])
    logcnt = torch.ones(2, 4, dtype=torch.int64)
    eplb = load_plugin("exporters", "eplb")
    torch.save((phy2log, log2phy, logcnt), tmp_path / "a.pt")
    found = eplb.load(read_placement_document(tmp_path / "a.pt"), "f", reading)
    assert found.placement.physical_to_logical_LP.tolist() == phy2log.tolist()
    torch.save((phy2log, log2phy.flip(1), logcnt), tmp_path / "b.pt")
    with pytest.raises(PlanError, match="log2phy is not the inverse"):
        eplb.load(read_placement_document(tmp_path / "b.pt"), "f", reading)
    torch.save((phy2log, log2phy, logcnt + 1), tmp_path / "c.pt")
    with pytest.raises(PlanError, match="logcnt does not count"):
        eplb.load(read_placement_document(tmp_path / "c.pt"), "f", reading)


def test_vllm_offline_golden_and_version_1(plan, reading, tmp_path):
    document = json.loads(exported("vllm", plan, tmp_path / "a.json", model_class="TinyMoe"))
    record = {
        "record_kind": "proposal",
        "model_name": "tiny",
        "model_class": "TinyMoe",
        "num_moe_layers": 2,
        "num_logical_experts": 4,
        "num_physical_experts": 6,
        "num_redundant_experts": 2,
        "physical_to_logical_map": [[3, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]],
    }
    assert document == {
        "version": 2,
        "format": "vllm_offline_eplb_physical_to_logical_by_model",
        "model_maps": {"TinyMoe": record},
    }
    vllm = load_plugin("exporters", "vllm")
    first = {"version": 1, "format": "vllm_offline_eplb_physical_to_logical", **record}
    assert vllm.recognises(first)
    assert (
        vllm.load(first, "f", reading).placement.physical_to_logical_LP.tolist()
        == record["physical_to_logical_map"]
    )
    with pytest.raises(PlanError, match=r"num_moe_layers \(9\) is not 2"):
        vllm.load(first | {"num_moe_layers": 9}, "f", reading)
    with pytest.raises(PlanError, match="model_maps holds 2 models"):
        vllm.load(document | {"model_maps": {"a": record, "b": record}}, "f", reading)


def test_vllm_offline_needs_the_model_class_unless_the_model_is_well_known(plan, tmp_path):
    with pytest.raises(ExportError, match="--model-class"):
        exported("vllm", plan, tmp_path / "a.json")
    known = plan.model_copy(update={"model": "DeepSeek-V3.2"})
    assert list(json.loads(exported("vllm", known, tmp_path / "a.json"))["model_maps"]) == [
        "DeepseekV32ForCausalLM"
    ]


def test_vllm_rank_map_is_one_map_without_copies(plan, permutation, model, reading, tmp_path):
    same = plan_of([[3, 1, 0, 2], [1, 3, 2, 0]], model, 2)
    text = exported("vllm", same, tmp_path / "a.json", variant="rank-map")
    assert json.loads(text) == {"expert_to_ep_rank": [1, 0, 1, 0]}
    found = load_plugin("exporters", "vllm").load(json.loads(text), "f", reading)
    assert found.placement.physical_to_logical_LP.tolist() == [[1, 3, 0, 2]] * 2
    with pytest.raises(ExportError, match="one map for all layers"):
        exported("vllm", permutation, tmp_path / "b.json", variant="rank-map")
    with pytest.raises(ExportError, match="holds every expert exactly once"):
        exported("vllm", plan, tmp_path / "b.json", variant="rank-map")
    with pytest.raises(PlanError, match=r"gives ranks 1 to 3 experts"):
        load_plugin("exporters", "vllm").load({"expert_to_ep_rank": [0, 0, 0, 1]}, "f", reading)


def test_vllm_expert_map_golden(plan, torch, tmp_path):
    found = torch.load(exported("vllm", plan, tmp_path / "a.pth"), weights_only=True)
    assert found.tolist() == [
        [[2, -1, 1, 0], [-1, 0, 1, 2]],
        [[0, 1, 2, -1], [1, 2, -1, 0]],
    ]


def test_vllm_unknown_variant(plan, tmp_path):
    with pytest.raises(
        UnknownNameError, match="vllm variant 'rankmap' is not known; did you mean 'rank-map'"
    ):
        exported("vllm", plan, tmp_path / "a.json", variant="rankmap")


@pytest.mark.parametrize("target", ["megatron", "deepspeed"])
def test_permutation_file_golden(target, permutation, tmp_path):
    document = json.loads(exported(target, permutation, tmp_path / "a.json", num_groups=1))
    assert document["new_to_old"] == [[3, 2, 0, 1], [0, 2, 1, 3]]
    assert document["layer_ids"] == [1, 2]
    assert document["target"] == target
    arrays = np.load(exported(target, permutation, tmp_path / "a.npz", num_groups=1), allow_pickle=False)
    assert arrays["new_to_old"].tolist() == document["new_to_old"]


def test_permutation_refuses_copies_and_unknown_groups(plan, permutation, tmp_path):
    with pytest.raises(ExportError, match="6 slots for 4 experts"):
        exported("megatron", plan, tmp_path / "a.json", num_groups=1)
    with pytest.raises(ExportError, match="group-limited routing cannot be ruled out"):
        exported("megatron", permutation, tmp_path / "a.json")


def test_permutation_keeps_routing_groups_whole(model, tmp_path):
    mixed = plan_of([[0, 1, 2, 3], [0, 2, 1, 3]], model, 2)
    whole = plan_of([[3, 2, 0, 1], [1, 0, 3, 2]], model, 2)
    grouped = tiny_model(4, num_layers=3, moe_layer_ids=(1, 2), n_group=2, topk_group=1)
    with pytest.raises(ExportError, match="groups of 2 experts, and layer 2 of the plan mixes"):
        exported("megatron", mixed, tmp_path / "a.json", model=grouped)
    exported("megatron", whole, tmp_path / "a.json", model=grouped)
    # all groups are allowed: no limit, so nothing to keep
    exported("megatron", mixed, tmp_path / "a.json", model=grouped.model_copy(update={"topk_group": 2}))
    with pytest.raises(ExportError, match=r"num_experts \(4\) is not a multiple of the routing groups \(3\)"):
        exported("megatron", whole, tmp_path / "a.json", num_groups=3)


def test_layers_of_different_sizes_are_refused(model, tmp_path):
    uneven = tiny_model(4, num_layers=3, moe_layer_ids=(1, 2), experts_per_layer=(4, 2))
    plan = plan_of([[0, 1, 2, 3], [0, -1, 1, -1]], uneven, 2, experts_per_layer=[4, 2])
    with pytest.raises(ExportError, match=r"different numbers of experts \(2 to 4\)"):
        exported("trtllm", plan, tmp_path / "a.yaml")


def test_two_copies_on_a_rank_are_read_and_only_written_where_they_fit(model, tmp_path):
    twice = plan_of([[0, 0, 1, 2, 3, 1], [0, 1, 2, 3, 0, 1]], model, 2, planner="imported:eplb")
    assert twice.placement.duplicates() == [(0, 0, 0)]
    exported("sglang", twice, tmp_path / "a.json", model=model)
    for name, out in (("vllm-ascend", "b.json"), ("vllm", "b.pth")):
        with pytest.raises(ExportError, match="rank 0 holds expert 0 twice"):
            exported(name, twice, tmp_path / out, model=model)
    with pytest.raises(PlanError, match="rank 0 holds expert 0 twice"):
        plan_of([[0, 0, 1, 2, 3, 1], [0, 1, 2, 3, 0, 1]], model, 2)


BAD_MAPS = [
    ([[0, 1], [0]], "rows of 1 to 2 slots"),
    ([[0, 1, 2, 3.0]], "not an expert id"),
    ([[0, 1, 2, True]], "not an expert id"),
    ([[0, 1, 2, 4]], r"\[0\]\[3\] \(4\) is outside 0\.\.3"),
    ([[0, 1, 2, -1]], r"\(-1\) is outside 0\.\.3"),
    ([[0, 1, 2, 2**70]], "beyond 64 bits"),
    ([[0, 1, 2, 2]], "expert 3 has no slot"),
    ([[0, 1, 2]], "do not divide over 2 ranks"),
    ([[0, 1]], "2 slots are fewer than num_experts"),
    ([], "list of lists"),
    ("x", "list of lists"),
]


@pytest.mark.parametrize(("rows", "match"), BAD_MAPS)
def test_bad_maps(rows, match, reading):
    rows = rows * 3 if isinstance(rows, list) and len(rows) == 1 else rows
    with pytest.raises(PlanError, match=match):
        load_plugin("exporters", "sglang").load({"physical_to_logical_map": rows}, "f", reading)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_round_trip_of_random_plans(torch, data, tmp_path):
    ranks = data.draw(st.sampled_from([1, 2, 4]), label="ranks")
    experts = ranks * data.draw(st.integers(1, 4), label="experts per rank")
    redundant = ranks * data.draw(
        st.integers(0, min(2, experts * (ranks - 1) // ranks)), label="redundant per rank"
    )
    model = tiny_model(
        experts, top_k=1, moe_layer_ids=tuple(sorted(data.draw(st.sets(st.integers(0, 4), min_size=1))))
    )
    plan = random_plan(np.random.default_rng(data.draw(st.integers(0, 2**32))), model, ranks, redundant)
    name = data.draw(
        st.sampled_from(["sglang", "trtllm", "vllm", "vllm-ascend", "eplb", "megatron", "deepspeed"])
    )
    exporter = load_plugin("exporters", name)
    context = ExportContext(model=model, model_class="Tiny" if name == "vllm" else None)
    if redundant and name in ("megatron", "deepspeed"):
        assert exporter.refusals(plan, context)
        return
    out = tmp_path / f"a{data.draw(st.sampled_from(exporter.suffixes))}"
    exporter.export(plan, out, context)
    found = exporter.load(read_placement_document(out), str(out), ImportContext(model, ranks, ranks))
    assert np.array_equal(found.placement.physical_to_logical_LP, plan.physical_to_logical_map)
    assert found.placement.rank_of_slot_P.tolist() == list(plan.rank_of_slot)
    assert found.layer_ids == plan.layer_ids


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**65),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
)


def _mutate(node, data):
    """Replace or drop one thing somewhere in a document."""
    if isinstance(node, (dict, list)) and node and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        copied = node.copy()
        if data.draw(st.integers(0, 4)) == 0:
            del copied[key]
        else:
            copied[key] = _mutate(node[key], data)
        return copied
    return data.draw(JUNK)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_documents_end_in_a_plan_error(data, permutation, model, reading, tmp_path):
    name = data.draw(st.sampled_from(["sglang", "trtllm", "vllm", "vllm-ascend", "megatron"]))
    out = tmp_path / ("a.yaml" if name == "trtllm" else "a.json")
    exporter = load_plugin("exporters", name)
    context = ExportContext(model=model, model_class="Tiny" if name == "vllm" else None)
    exporter.export(permutation, out, context)
    document = _mutate(read_placement_document(out), data)
    with contextlib.suppress(PlanError):
        exporter.load(document, "f", reading)


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_damaged_and_hostile_files(torch, tmp_path, capsys):
    torch.save({"phy2log": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(InputError, match=r"objects other than tensors.*never loaded"):
        read_placement_document(tmp_path / "bomb.pt")
    np.savez(tmp_path / "bomb.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(InputError, match="cannot read"):
        read_placement_document(tmp_path / "bomb.npz")
    assert "boom" not in capsys.readouterr().out
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500])
    for name, content in {
        "cut.pt": None,
        "junk.pt": b"junk",
        "empty.pt": b"",
        "cut.npz": b"PK\x03\x04junk",
        "bad.json": b"{",
        "bad.py": b"def",
        "alias.yaml": b"a: &x [1]\nb: *x\n",
    }.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_placement_document(tmp_path / name)
    with pytest.raises(InputError, match="No such file"):
        read_placement_document(tmp_path / "missing.json")
