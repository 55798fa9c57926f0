from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.errors import InputError, SpecError, UnknownNameError
from moeplan.specs.hf_config import model_from_hf_config
from moeplan.specs.models import find_model, model_aliases, model_names

# Billions of parameters, as the vendors publish them.
PUBLISHED = {
    "deepseek-moe-16b": 16.4,
    "deepseek-v2-lite": 15.7,
    "deepseek-v2": 236,
    "deepseek-v3": 671,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "qwen3-coder-480b-a35b": 480,
    "qwen3-next-80b-a3b": 80,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141,
    "olmoe-1b-7b": 6.9,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "llama-4-maverick": 400,
    "llama-4-scout": 109,
    "glm-4.5": 355,
    "glm-4.5-air": 106,
    "kimi-k2": 1040,
    "dbrx": 132,
    "phi-3.5-moe": 41.9,
    "jamba-v0.1": 51.6,
    "snowflake-arctic": 480,
    "hunyuan-a13b": 80,
    "minimax-m2": 230,
    "nllb-moe-54b": 54.5,
}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_weights_add_up_to_the_published_total(name, billions):
    model = find_model(name)
    computed = model.non_expert_parameters + sum(model.experts_L) * model.expert_parameters
    assert computed == model.total_parameters
    assert computed / 1e9 == pytest.approx(billions, rel=0.02)


def test_facts_agree_with_the_public_list(data_dir: Path):
    rows = json.loads((data_dir / "models.json").read_text())["models"]
    known, checked = set(model_names()), 0
    for row in rows:
        if row["slug"] not in known and row["slug"] != "hunyuan-large-a52b":
            assert row["slug"] in {"openmoe-8b", "openmoe-34b"}, row["slug"]
            continue
        model = find_model(row["hf_id"])
        assert (model.num_experts, model.top_k, model.num_moe_layers, model.hidden_size) == (
            row["num_experts"], row["top_k"], row["num_moe_layers"], row["hidden_size"]
        )  # fmt: skip
        assert model.kv_bytes_per_token() == row["kv_bytes_per_token_bf16"]
        if row["total_check_pct"] is not None and abs(row["total_check_pct"]) < 2:
            assert model.total_parameters / 1e9 == pytest.approx(row["nominal_total_b"], rel=0.02)
            checked += 1
    assert checked > 40


def test_moe_layers_stand_where_each_family_puts_them():
    assert find_model("deepseek-v3").moe_layer_ids == tuple(range(3, 61))
    assert find_model("mixtral-8x7b").moe_layer_ids == tuple(range(32))
    assert find_model("llama-4-maverick").moe_layer_ids == tuple(range(1, 48, 2))
    assert find_model("jamba-v0.1").moe_layer_ids == tuple(range(1, 32, 2))
    assert find_model("step-3").moe_layer_ids == tuple(range(4, 60))
    assert find_model("nllb-moe-54b").moe_layer_ids == tuple(range(3, 48, 4))


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("DeepSeek-V3", "deepseek-v3"),
        ("deepseek-r1", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("DEEPSEEK_V2_LITE", "deepseek-v2-lite"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("Qwen3-235B-A22B", "qwen3-235b-a22b"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("OLMoE-1B-7B-0924", "olmoe-1b-7b"),
    ],
)
def test_models_are_found_by_any_of_their_names(name, slug):
    assert find_model(name) == find_model(slug)


def test_names_are_unique_slugs_and_every_entry_is_valid():
    names = model_names()
    assert len(set(names)) == len(names) >= 40
    owners: dict[str, str] = {}
    for name in names:
        assert name == name.lower()
        assert find_model(name).source
        for alias in model_aliases(name):
            assert owners.setdefault(alias.lower(), name) == name
            assert find_model(alias) == find_model(name)


def test_an_unknown_model_gets_a_hint():
    with pytest.raises(
        UnknownNameError, match=r"model 'mixtral-8x8b' is not known; did you mean 'mixtral-8x7b'\?"
    ):
        find_model("mixtral-8x8b")
    with pytest.raises(InputError, match=r"cannot read absent/config.json: No such file"):
        find_model("absent/config.json")


BASE = {
    "model_type": "test",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "intermediate_size": 128,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"moe_layer_freq": [0, 1, 0, 1, 1, 0]}, (1, 3, 4)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, (0, 1, 2, 3, 4, 5)),
        ({"interleave_moe_layer_step": 3}, (2, 5)),
        ({"moe_layers": [0, 4]}, (0, 4)),
        ({"moe_layers_enum": "1,2,5"}, (1, 2, 5)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),
        ({"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 4}, (1, 2, 3, 4)),
        ({"moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_layer_end_index": -1}, (1, 3, 5)),
        ({"moe_layer_num_skipped": 1}, (1, 2, 3, 4, 5)),
        ({"num_dense_layers": 2}, (2, 3, 4, 5)),
        ({"mlp_layer_types": ["dense"] * 4 + ["sparse"] * 2}, (4, 5)),
        ({"hybrid_override_pattern": "ME*EM-"}, (1, 3)),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe", "moe", "mamba"]}, (1, 3, 4)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_layer_keys_of_hugging_face_configs(keys, layers):
    model = model_from_hf_config({**BASE, "num_experts": 8, **keys}, "config.json")
    assert model.moe_layer_ids == layers
    assert model.num_layers == 6


@pytest.mark.parametrize(
    "keys",
    [
        {"num_local_experts": 8},
        {"n_routed_experts": 8},
        {"moe_num_experts": 8, "moe_k": 2, "num_experts_per_tok": None},
        {"num_experts": 8, "moe_topk": [2] * 6, "num_experts_per_tok": None},
        {"num_experts": [8] * 6},
        {"text_config": {"num_experts": 8}, "vision_config": {"hidden_size": 1}},
        {"ffn_config": {"moe_num_experts": 8, "moe_top_k": 2}, "num_experts_per_tok": None},
    ],
    ids=["mixtral", "deepseek", "ernie", "hunyuan", "list", "nested", "dbrx"],
)
def test_experts_under_each_familys_keys(keys):
    model = model_from_hf_config({**BASE, **keys}, "config.json")
    assert (model.num_experts, model.top_k, model.hidden_size) == (8, 2, 64)


def test_shared_experts_sizes_and_latent_widths():
    deepseek = {"n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 32}
    model = model_from_hf_config({**BASE, **deepseek}, "c")
    assert (model.num_shared_experts, model.shared_intermediate_size, model.expert_intermediate_size) == (
        2,
        64,
        32,
    )
    qwen = {"num_experts": 8, "shared_expert_intermediate_size": 96, "moe_intermediate_size": 32}
    model = model_from_hf_config({**BASE, **qwen}, "c")
    assert (model.num_shared_experts, model.shared_intermediate_size) == (1, 96)
    assert (
        model_from_hf_config(
            {**BASE, "num_experts": 8, "shared_intermediate_size": 0}, "c"
        ).num_shared_experts
        == 0
    )
    latent = model_from_hf_config({**BASE, **deepseek, "moe_latent_size": 16, "mlp_hidden_act": "relu2"}, "c")
    assert latent.expert_parameters == 2 * 16 * 32


@pytest.mark.parametrize(("kind", "width"), [("mimo_v2_flash", 128), ("ernie4_5_moe", 128), ("deepseek_v3", 0)])
def test_some_prediction_layers_have_no_experts(kind, width):
    keys = {"model_type": kind, "num_experts": 8, "first_k_dense_replace": 1, "intermediate_size": 128}
    model = model_from_hf_config({**BASE, **keys}, "c")
    assert model.prediction_intermediate_size == width


def test_experts_may_differ_from_layer_to_layer():
    model = model_from_hf_config({**BASE, "num_experts": [0, 4, 8, 8, 4, 8], "first_k_dense_replace": 1}, "c")
    assert model.experts_per_layer == (4, 8, 8, 4, 8)
    assert model.num_experts == 8


def test_attention_by_heads_or_latent_or_not_known():
    plain = model_from_hf_config({**BASE, "num_experts": 8, "num_key_value_heads": 2}, "c").attention
    assert (plain.num_heads, plain.num_kv_heads, plain.head_dim) == (4, 2, 16)
    keys = {
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    latent = model_from_hf_config({**BASE, "num_experts": 8, **keys}, "c").attention
    assert latent.is_mla
    assert latent.kv_elements_per_token == 36
    assert (
        model_from_hf_config({**BASE, "num_experts": 8, "full_attention_interval": 4}, "c").attention is None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {},
            r"cfg: not a Mixture-of-Experts model \(test\): it has none of the keys n_routed.*; give the config",
        ),
        ({"model_type": None}, r"cfg: not a Mixture-of-Experts model: it has none of the keys"),
        (
            {"num_experts": 8, "vocab_size": None},
            r"cfg: no vocabulary size: none of the keys vocab_size is there",
        ),
        (
            {"num_experts": 8, "num_experts_per_tok": None},
            r"cfg: no number of experts per token \(top-k\): none of",
        ),
        ({"num_experts": 8, "hidden_size": "big"}, r"cfg: hidden_size \('big'\) is not one whole number"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, r"cfg: .*top_k \(9\) exceeds num_experts \(8\)"),
        (
            {"num_experts": 8, "mlp_layer_types": 3},
            r"cfg: mlp_layer_types \(3\) is not a list with one entry per layer",
        ),
        ({"num_experts": 8, "moe_layers_enum": "1,x"}, r"is not a list of whole numbers"),
        ({"num_experts": 8, "first_k_dense_replace": 6}, r"leave no MoE layer among 6 layers"),
        ({"num_experts": 8, "is_encoder_decoder": True}, r"encoder-decoder configs \(test\) are not read"),
        ({"num_experts": [8, "x"]}, r"num_experts .* is not a list of whole numbers"),
        ({"num_experts": 8, "num_hidden_layers": 10**9}, r"1000000000 layers are more than any model has"),
        ({"num_experts": 8, "moe_layers": [2, 9]}, r"moe_layer_ids must rise within"),
    ],
)
def test_what_is_missing_or_wrong_is_named(change, message):
    with pytest.raises(SpecError, match=message):
        model_from_hf_config({**BASE, **change}, "cfg")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted(
    set(BASE)
    | {"num_experts", "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_latent_size"}
    | {"moe_layer_freq", "mlp_layer_types", "hybrid_override_pattern", "moe_layers", "mlp_only_layers"}
    | {"expert_layer_period", "expert_layer_offset", "moe_layer_interval", "moe_layer_end_index"}
    | {"decoder_sparse_step", "first_k_dense_replace", "kv_lora_rank", "layer_types", "attn_type_list"}
    | {"head_dim", "num_key_value_heads", "text_config", "tie_word_embeddings", "n_group", "topk_group"}
    | {"mlp_hidden_act", "is_encoder_decoder"}
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=4))
def test_any_config_is_read_or_refused_in_one_message(change):
    try:
        model = model_from_hf_config({**BASE, "num_experts": 8, **change}, "cfg")
    except SpecError as error:
        assert str(error).startswith("cfg")  # noqa: PT017
    else:
        assert model.num_experts >= model.top_k >= 1


def test_names_that_cannot_be_paths_are_unknown():
    for name in ("x" * 5000, "a\0b", ""):
        with pytest.raises(UnknownNameError, match="is not known"):
            find_model(name)


def test_a_directory_a_config_and_a_spec_file_are_read(tmp_path):
    folder = tmp_path / "My-MoE"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**BASE, "num_experts": 8}))
    model = find_model(folder)
    assert model.name == "My-MoE"
    assert find_model(str(folder / "config.json")) == model
    (tmp_path / "spec.json").write_text(model.model_dump_json())
    assert find_model(tmp_path / "spec.json") == model
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SpecError, match="holds a list; a model is a mapping of fields"):
        find_model(tmp_path / "list.json")


def test_published_configs_give_the_registered_models():
    package = importlib.util.find_spec("aiconfigurator_core")
    if package is None or package.origin is None:
        pytest.skip("aiconfigurator-core, which carries copies of published configs, is not installed")
    same = 0
    for path in sorted((Path(package.origin).parent / "model_configs").glob("*_config.json")):
        name = path.name.removesuffix("_config.json").replace("--", "/")
        if path.name.endswith("_hf_quant_config.json"):
            continue
        try:
            read = find_model(path)
        except SpecError as error:
            assert "not a Mixture-of-Experts model" in str(error)  # noqa: PT017
            continue
        try:
            known = find_model(name)
        except UnknownNameError:
            continue
        hand_summed = {"name", "source", "extra_parameters"}
        assert read.model_dump(exclude=hand_summed) == known.model_dump(exclude=hand_summed), name
        same += 1
    assert same >= 20


def test_weights_outside_the_experts_by_hand():
    v3 = find_model("deepseek-v3")
    query = 7168 * 1536 + 1536 * 128 * (128 + 64)
    latent = 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    attention = query + latent + 128 * 128 * 7168
    moe = 58 * (3 * 7168 * 2048 + 7168 * 256)  # shared expert and router
    assert v3.non_expert_parameters == 61 * attention + moe + 3 * 3 * 7168 * 18432 + 2 * 129280 * 7168
    mixtral = find_model("mixtral-8x7b")
    attention = 2 * 4096 * 128 * (32 + 8)
    assert mixtral.non_expert_parameters == 32 * (attention + 4096 * 8) + 2 * 32000 * 4096
    assert mixtral.expert_bytes("bf16") == 2 * 3 * 4096 * 14336
