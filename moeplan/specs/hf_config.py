"""Hugging Face ``config.json`` -> :class:`ModelSpec`, by key names.

The families write the same quantity under different keys; each table below lists the keys in the order in
which they are believed. Where MoE layers stand follows the families' own code in ``transformers`` (or the
model's repository): ``mlp_layer_types``, ``moe_layer_freq`` as a list, ``moe_layers_enum`` (Step),
``hybrid_override_pattern`` or ``layers_block_type`` (Nemotron-H), ``moe_layers`` and
``interleave_moe_layer_step`` (Llama 4), ``expert_layer_period/offset`` (Jamba), ``moe_layer_interval``
within ``moe_layer_start/end_index`` (ERNIE), ``decoder_sparse_step`` without ``mlp_only_layers`` (Qwen),
``first_k_dense_replace`` with ``moe_layer_freq`` (DeepSeek, GLM, Kimi), ``moe_layer_num_skipped``
(Hunyuan), ``num_dense_layers`` (LFM2, AFMoE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeplan.errors import SpecError
from moeplan.specs.model import ModelSpec

__all__ = ["model_from_hf_config"]

_NESTED = ("text_config", "llm_config", "language_config", "ffn_config", "attn_config")
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
_EXPERT_FFN = ("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size")
_DENSE_FFN = ("dense_intermediate_size", "intermediate_size_mlp", "intermediate_size", "ffn_hidden_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_SHARED_FFN = (
    "moe_shared_expert_intermediate_size",
    "shared_expert_intermediate_size",
    "share_expert_dim",
    "shared_intermediate_size",
)
_LATENT = ("moe_latent_size", "routed_expert_hidden_size")
_HEADS = ("num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "kv_n_heads", "num_attention_groups")
# Whose prediction layer (MTP) has a dense FFN: in vLLM mimo_v2_mtp.py, in SGLang mimo_v2_nextn.py; ernie_mtp.py.
_DENSE_PREDICTION = ("mimo_v2_flash", "ernie4_5_moe")
_MAX_LAYERS = 10_000  # before a list of them is made
# Any of these: attention that differs from layer to layer or that plain GQA/MLA arithmetic does not describe.
_SPECIAL_ATTENTION = (
    "attn_layer_period",
    "full_attention_interval",
    "global_head_dim",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_attn_config",
    "linear_num_key_heads",
    "o_lora_rank",
    "share_q_dim",
    "use_cla",
)


class _Config:
    """A flattened config that names its origin and the missing key in errors."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        values = dict(config)
        for _ in range(2):  # a text_config may itself hold an ffn_config
            for key in _NESTED:
                if isinstance(inner := values.get(key), Mapping):
                    del values[key]
                    values.update(inner)
        self.values = values

    def get(self, *keys: str) -> Any:
        return next((value for key in keys if (value := self.values.get(key)) is not None), None)

    def whole(self, *keys: str) -> int | None:
        """A whole number; a list counts where all its entries agree."""
        value = self.get(*keys)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            key = next(key for key in keys if self.values.get(key) is not None)
            raise SpecError(f"{self.where}: {key} ({value!r}) is not one whole number of 0 or more")
        return value

    def need(self, what: str, *keys: str) -> int:
        value = self.whole(*keys)
        if not value:
            raise SpecError(f"{self.where}: no {what}: none of the keys {', '.join(keys)} is there")
        return value

    def marks(self, *keys: str) -> Sequence[Any]:
        """One entry per layer (a list, or a string of letters); empty where no key is there."""
        value = self.get(*keys)
        if value is not None and not isinstance(value, (list, str)):
            key = next(key for key in keys if self.values.get(key) is not None)
            raise SpecError(f"{self.where}: {key} ({value!r}) is not a list with one entry per layer")
        return value or ()

    def layer_numbers(self, *keys: str) -> list[int]:
        """Layer numbers as a list, or as one string joined by commas."""
        marks = self.marks(*keys)
        try:
            return [int(item) for item in (marks.split(",") if isinstance(marks, str) else marks)]
        except (TypeError, ValueError, OverflowError) as error:
            raise SpecError(
                f"{self.where}: {' or '.join(keys)} ({marks!r}) is not a list of whole numbers"
            ) from error


def _moe_layers(c: _Config, num_layers: int) -> list[int]:
    every = range(num_layers)
    for key in ("mlp_layer_types", "layers_block_type", "hybrid_override_pattern"):
        if kinds := c.marks(key):
            return [i for i, kind in enumerate(kinds[:num_layers]) if kind in ("sparse", "moe", "E")]
    if isinstance(flags := c.get("moe_layer_freq"), list):
        return [i for i, flag in enumerate(flags[:num_layers]) if flag]
    if layers := c.layer_numbers("moe_layers_enum", "moe_layers"):
        return layers
    if step := c.whole("interleave_moe_layer_step"):
        return list(range(step - 1, num_layers, step))
    if period := c.whole("expert_layer_period"):
        return [i for i in every if i % period == (c.whole("expert_layer_offset") or 0)]
    if interval := c.whole("moe_layer_interval"):
        start = c.whole("moe_layer_start_index") or 0
        end = c.get("moe_layer_end_index")
        last = num_layers - 1 if end is None or end == -1 else c.whole("moe_layer_end_index") or 0
        return [i for i in every if (i + 1) % interval == 0 and start <= i <= last]
    if (step := c.whole("decoder_sparse_step")) is not None or c.get("mlp_only_layers"):
        dense = set(c.layer_numbers("mlp_only_layers"))
        return [i for i in every if i not in dense and (i + 1) % (step or 1) == 0]
    first = c.whole("first_k_dense_replace", "moe_layer_num_skipped", "num_dense_layers") or 0
    freq = c.whole("moe_layer_freq", "moe_layer_frequency") or 1
    return [i for i in every if i >= first and i % freq == 0]


def _attention(c: _Config, hidden: int) -> dict[str, int | None] | None:
    mixed = "linear_attention" in c.marks("layer_types") or 0 in list(c.marks("attn_type_list"))
    if mixed or any(c.get(key) for key in _SPECIAL_ATTENTION):
        return None
    heads = c.need("number of attention heads", *_HEADS)
    if c.whole("kv_lora_rank"):
        return {
            "num_heads": heads,
            "num_kv_heads": c.whole(*_KV_HEADS) or heads,
            "head_dim": c.need("value head size", "v_head_dim"),
            "q_lora_rank": c.whole("q_lora_rank") or None,
            "kv_lora_rank": c.whole("kv_lora_rank"),
            "qk_nope_head_dim": c.need("query-key head size", "qk_nope_head_dim"),
            "qk_rope_head_dim": c.need("rotary head size", "qk_rope_head_dim"),
        }
    head_dim = c.whole("head_dim", "attention_head_dim") or hidden // heads
    return {"num_heads": heads, "num_kv_heads": c.whole(*_KV_HEADS) or heads, "head_dim": head_dim}


def model_from_hf_config(config: Mapping[str, Any], where: str, name: str | None = None) -> ModelSpec:
    """The model that a ``config.json`` describes; ``where`` names its origin in errors.

    Raises:
        SpecError: not a decoder-only Mixture-of-Experts model; the message names the missing key.
    """
    c = _Config(config, where)
    kind = str(c.get("model_type") or "")
    if c.get("is_encoder_decoder"):
        raise SpecError(
            f"{where}: encoder-decoder configs ({kind}) are not read; write a model file with moe_layer_ids"
        )
    experts: int | list[int] | None = c.get(*_EXPERTS)
    if not experts or c.get("enable_moe_block") is False:
        raise SpecError(
            f"{where}: not a Mixture-of-Experts model{kind and f' ({kind})'}: it has none of the keys"
            f" {', '.join(_EXPERTS)}; give the config.json of one, or a built-in name (moeplan models)"
        )
    hidden = c.need("hidden size", *_HIDDEN)
    blocks = c.marks(
        "hybrid_override_pattern", "layers_block_type"
    )  # each block is one mixer: no dense FFN beside the MoE
    num_layers = c.whole(*_LAYERS) or len(blocks) or c.need("number of layers", *_LAYERS)
    if num_layers > _MAX_LAYERS:
        raise SpecError(f"{where}: {num_layers} layers are more than any model has ({_MAX_LAYERS} at most)")
    moe_layers = _moe_layers(c, num_layers)
    if not moe_layers:
        raise SpecError(f"{where}: the layer keys leave no MoE layer among {num_layers} layers")
    per_layer = None
    if isinstance(experts, list) and any(item != experts[0] for item in experts):
        per_layer = c.layer_numbers(*_EXPERTS)
        if len(per_layer) == num_layers:
            per_layer = [per_layer[i] for i in moe_layers if i < num_layers]

    expert_ffn = c.whole(*_EXPERT_FFN) or c.need("expert FFN size", "ffn_hidden_size", "intermediate_size")
    shared_count = c.whole(*_SHARED)
    shared_ffn = c.whole(*_SHARED_FFN)
    if shared_ffn is None:
        shared_ffn = (shared_count or 0) * expert_ffn
    extra = 0
    if kind.startswith("llama4"):  # one shared expert of the routed experts' size, without a key of its own
        shared_ffn = expert_ffn
    elif c.get("enable_moe_block"):  # Gemma 4: the dense FFN runs beside the experts in every layer
        shared_ffn = c.need("FFN size", "intermediate_size")
    elif kind == "arctic" and c.get("use_residual", "parallel_attn_mlp_res"):
        extra = 3 * hidden * hidden * len(moe_layers)
    all_moe = blocks or len(moe_layers) == num_layers
    dense = 0 if all_moe else c.need("FFN size of the dense layers", *_DENSE_FFN)
    tied = c.get("tie_word_embeddings")
    groups = c.whole("n_group", "num_expert_group")
    grouped = groups is not None and groups > 1
    return ModelSpec.parse(
        {
            "name": name or str(c.get("_name_or_path") or kind or "model").rpartition("/")[2],
            "num_layers": num_layers,
            "moe_layer_ids": moe_layers,
            "hidden_size": hidden,
            "num_experts": max(per_layer) if per_layer else c.need("number of experts", *_EXPERTS),
            "experts_per_layer": per_layer,
            "top_k": c.need("number of experts per token (top-k)", *_TOP_K),
            "expert_intermediate_size": expert_ffn,
            "expert_hidden_size": c.whole(*_LATENT) or None,
            "gated_ffn": c.get("mlp_hidden_act") not in ("relu2", "relu"),
            "num_shared_experts": (shared_count or 1) if shared_ffn else 0,
            "shared_intermediate_size": shared_ffn,
            "dense_intermediate_size": dense,
            "prediction_intermediate_size": dense if kind in _DENSE_PREDICTION else 0,
            "attention": _attention(c, hidden),
            "vocab_size": c.need("vocabulary size", "vocab_size"),
            # a key at its class default is left out; of these families only ERNIE 4.5 has true there
            "tie_word_embeddings": kind.startswith("ernie4_5") if tied is None else tied,
            "n_group": groups if grouped else None,
            "topk_group": c.whole("topk_group") if grouped else None,
            "extra_parameters": extra,
            "source": where,
        },
        where,
    )
