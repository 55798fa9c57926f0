"""What training keeps of a layer for its backward, and what it computes again instead.

Kept per token are inputs of every product and of the attention kernel, in the type of activations (Korthikanti et al.
2022, arXiv 2205.05198, section 4, without dropout and with FlashAttention). Under ``recompute: attention`` the kernel
runs again on the queries, keys and values that are kept, and its output is not, as with PyTorch's selective
checkpointing of all but products. (Megatron-Core's ``core_attn`` keeps that too, for the projection behind it: beside
FlashAttention it frees next to nothing.) Parts that are computed again bear the
names of Megatron-Core's ``recompute_modules``: ``layernorm`` is both norms of a layer, ``moe_act`` the gated activation
of routed experts, ``mla_up_proj`` the products from latents to queries, keys and values, ``mlp`` the block of a dense
layer.
"""

from __future__ import annotations

from moeplan.costs.dense import DenseCosts
from moeplan.errors import SpecError
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec
from moeplan.specs.training import Recompute, RecomputeModule

__all__ = ["activation_bytes", "pair_bytes", "recomputed_s"]


def activation_bytes(
    model: ModelSpec,
    moe: bool,
    recompute: Recompute,
    dtype: Dtype = "bf16",
    modules: tuple[RecomputeModule, ...] = (),
    expert_tp: int = 1,
) -> float:
    """Bytes kept per token for the backward of one layer where loads are even; ``dtype`` of activations. Where
    ``expert_tp`` ranks split experts each works on the pairs of all their tokens."""
    hidden, wide = model.hidden_size, DTYPE_BYTES[dtype]
    if recompute == "full":
        return wide * hidden
    norm = 0.0 if "layernorm" in modules else wide * hidden
    kept = 2.0 * wide * hidden + norm  # residual stream and norm's input, and the product's
    if (a := model.attention) is not None:
        nope, rope = a.qk_nope_head_dim or a.head_dim, a.qk_rope_head_dim or 0
        keys = a.num_heads if a.is_mla else a.num_kv_heads
        if "mla_up_proj" not in modules:
            kept += wide * (a.num_heads * (nope + rope) + keys * (nope + rope + a.head_dim))
        kept += wide * ((a.q_lora_rank or 0) + (a.kv_lora_rank or 0))
        if recompute != "attention":
            kept += wide * a.num_heads * a.head_dim
    columns = wide * ((2 if model.gated_ffn else 1) + 1)  # of a block's first products, and activated
    if not moe:
        return kept + norm + (0.0 if "mlp" in modules else columns * model.dense_intermediate_size)
    routed = model.top_k * expert_tp * pair_bytes(model, recompute, dtype, modules, expert_tp)
    return kept + routed + columns * model.shared_intermediate_size


def pair_bytes(
    model: ModelSpec,
    recompute: Recompute,
    dtype: Dtype = "bf16",
    modules: tuple[RecomputeModule, ...] = (),
    expert_tp: int = 1,
) -> float:
    """The part of it that is kept where the experts are, for each (token, expert) pair they work on: as it arrives, on
    each of ``expert_tp`` ranks that split them, and inside and as it returns, a part on each."""
    if recompute == "full":
        return 0.0
    activated = "moe_act" not in modules
    inner = ((2 if model.gated_ffn else 1) + activated) * model.expert_intermediate_size
    return DTYPE_BYTES[dtype] * (model.routed_hidden_size + (inner + model.routed_hidden_size) / expert_tp)


def recomputed_s(
    modules: tuple[RecomputeModule, ...],
    model: ModelSpec,
    tokens: float,
    tp: int,
    dense: DenseCosts,
    bytes_per_s: float,
) -> dict[RecomputeModule, float]:
    """Seconds of each part in one layer for ``tokens`` per rank, passes over activations at ``bytes_per_s``.

    Raises:
        SpecError: a part that the model lacks.
    """
    hidden, gates, wide = model.hidden_size, 2 if model.gated_ffn else 1, DTYPE_BYTES[dense.activations]
    answer: dict[RecomputeModule, float] = {}
    for module in modules:
        if module == "layernorm":
            answer[module] = 2 * 2 * wide * tokens * hidden / bytes_per_s
        elif module == "moe_act":
            moved = (gates + 1) * wide * model.expert_intermediate_size
            answer[module] = moved * model.top_k * tokens / bytes_per_s
        elif module == "mla_up_proj":
            a = model.attention
            if a is None or not a.is_mla or a.kv_lora_rank is None:
                raise SpecError(
                    f"training.recompute_modules (mla_up_proj): {model.name} has no latent attention; leave it out"
                )
            nope, rope = a.qk_nope_head_dim or 0, a.qk_rope_head_dim or 0
            up = dense.product(tokens * tp, a.num_heads * (nope + a.head_dim) / tp, a.kv_lora_rank).total
            if a.q_lora_rank:
                up += dense.product(tokens * tp, a.num_heads * (nope + rope) / tp, a.q_lora_rank).total
            answer[module] = up
        else:
            inter = model.dense_intermediate_size
            if not inter:
                raise SpecError(f"training.recompute_modules (mlp): {model.name} has no dense layers; leave it out")
            answer[module] = dense.ffn(tokens * tp, hidden, inter / tp, model.gated_ffn).total
    return answer
