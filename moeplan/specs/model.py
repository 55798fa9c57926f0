"""The model: shapes that decide bytes and operations. ``B`` bytes, ``H`` hidden, ``F`` expert FFN size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from moeplan.specs.base import Spec

__all__ = ["DTYPE_BYTES", "AttentionSpec", "Dtype", "ModelSpec", "activations_beside", "cache_beside", "dense_beside"]

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4", "fp4"]
DTYPE_BYTES: dict[str, float] = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "fp8": 1,
    "int8": 1,
    "int4": 0.5,
    "fp4": 0.5,
}


def dense_beside(experts: Dtype) -> Dtype:
    """Type that weights other than the experts' are held in beside experts of this one: 8 bits or more."""
    return experts if DTYPE_BYTES[experts] >= 1 else "bf16"


def activations_beside(weights: Dtype) -> Dtype:
    """Type that activations, attention and an unquantised cache are in beside weights of this one: 16 bits or more."""
    return weights if DTYPE_BYTES[weights] >= 2 else "bf16"


def cache_beside(weights: Dtype, asked: Dtype) -> Dtype:
    """Type of the KV cache beside weights of this one: the one asked for below 16 bits, else that of activations."""
    return asked if DTYPE_BYTES[asked] < 2 else activations_beside(weights)


class AttentionSpec(Spec):
    """Attention of one layer: GQA by heads, or MLA when ``kv_lora_rank`` is set (DeepSeek-V2, sec. 2.1)."""

    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, description="per head; for MLA the value head size")
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None

    @property
    def is_mla(self) -> bool:
        """Whether keys and values are stored as one latent vector."""
        return self.kv_lora_rank is not None

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers kept per token and layer in the KV cache."""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + (self.qk_rope_head_dim or 0)
        return 2 * self.num_kv_heads * self.head_dim


class ModelSpec(Spec):
    """A Mixture-of-Experts transformer."""

    name: str
    num_layers: int = Field(gt=0, description="all decoder layers, dense and MoE")
    moe_layer_ids: tuple[int, ...] = Field(
        min_length=1, description="absolute numbers of the MoE layers, rising"
    )
    hidden_size: int = Field(gt=0)
    num_experts: int = Field(
        gt=0, description="routed experts of a MoE layer (the largest, where layers differ)"
    )
    experts_per_layer: tuple[int, ...] | None = Field(None, description="per MoE layer, where layers differ")
    top_k: int = Field(gt=0)
    expert_intermediate_size: int = Field(gt=0)
    expert_hidden_size: int | None = Field(
        None, gt=0, description="latent MoE: what an expert reads and writes, if not hidden_size"
    )
    gated_ffn: bool = True
    num_shared_experts: int = Field(0, ge=0)
    shared_intermediate_size: int = Field(0, ge=0, description="all shared experts of a layer together")
    dense_intermediate_size: int = Field(0, ge=0, description="FFN of the dense layers")
    prediction_intermediate_size: int = Field(
        0, ge=0, description="FFN of the prediction layer (MTP), where that has no experts; 0: it is a MoE layer"
    )
    attention: AttentionSpec | None = Field(
        None, description="None: not known, its time and KV cache are not predicted"
    )
    vocab_size: int = Field(gt=0)
    tie_word_embeddings: bool = False
    n_group: int | None = None
    topk_group: int | None = None
    extra_parameters: int = Field(
        0, ge=0, description="weights no other field describes: hybrid attention, residual FFN"
    )
    source: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        ids = self.moe_layer_ids
        if any(b <= a for a, b in pairwise(ids)) or ids[0] < 0 or ids[-1] >= self.num_layers:
            raise ValueError(f"moe_layer_ids must rise within 0..num_layers-1 ({self.num_layers - 1})")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")
        if self.experts_per_layer is not None and (
            len(self.experts_per_layer) != len(ids)
            or max(self.experts_per_layer) != self.num_experts
            or min(self.experts_per_layer) < self.top_k
        ):
            raise ValueError(
                f"experts_per_layer needs one entry per MoE layer ({len(ids)}), from top_k ({self.top_k}) up,"
                f" the largest equal to num_experts ({self.num_experts})"
            )
        return self

    @property
    def num_moe_layers(self) -> int:
        """``L``: layers with routed experts."""
        return len(self.moe_layer_ids)

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return (3 if self.gated_ffn else 2) * self.routed_hidden_size * self.expert_intermediate_size

    @property
    def routed_hidden_size(self) -> int:
        """Numbers of a token that travel to an expert and back."""
        return self.expert_hidden_size or self.hidden_size

    @property
    def experts_L(self) -> tuple[int, ...]:
        """Routed experts of each MoE layer."""
        return self.experts_per_layer or (self.num_experts,) * self.num_moe_layers

    @property
    def total_parameters(self) -> int:
        """All weights but norms, biases and prediction heads; no attention where it is not known."""
        return self.non_expert_parameters + sum(self.experts_L) * self.expert_parameters

    def expert_bytes(self, dtype: Dtype) -> float:
        """Bytes of one routed expert's weights."""
        return self.expert_parameters * DTYPE_BYTES[dtype]

    @property
    def non_expert_parameters(self) -> int:
        """Weights outside the routed experts (attention, shared experts, dense FFN, router, embeddings)."""
        matrices = 3 if self.gated_ffn else 2
        per_layer = 0
        if (a := self.attention) is not None:
            if a.kv_lora_rank is not None:
                nope, rope = a.qk_nope_head_dim or 0, a.qk_rope_head_dim or 0
                q_in = a.q_lora_rank or self.hidden_size
                per_layer = (
                    (self.hidden_size * a.q_lora_rank if a.q_lora_rank else 0)
                    + q_in * a.num_heads * (nope + rope)
                    + self.hidden_size * (a.kv_lora_rank + rope)
                    + a.kv_lora_rank * a.num_heads * (nope + a.head_dim)
                    + a.num_heads * a.head_dim * self.hidden_size
                )
            else:
                per_layer = 2 * self.hidden_size * a.head_dim * (a.num_heads + a.num_kv_heads)
        moe = (
            matrices * self.hidden_size * self.shared_intermediate_size + self.hidden_size * self.num_experts
        )
        dense = matrices * self.hidden_size * self.dense_intermediate_size
        if self.expert_hidden_size is not None:
            moe += 2 * self.hidden_size * self.expert_hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        num_moe = self.num_moe_layers
        dense_layers = self.num_layers - num_moe
        return (
            self.num_layers * per_layer
            + num_moe * moe
            + dense_layers * dense
            + embeddings
            + self.extra_parameters
        )

    def non_expert_parameters_on(self, tp: int) -> float:
        """Those on each of ``tp`` ranks that split attention and dense parts. Whole on all of them are routers,
        projections to the experts' latent and back, those to latents of attention, and key and value heads where there
        are fewer than ranks."""
        copied = float(self.num_moe_layers * self.hidden_size * (self.num_experts + 2 * (self.expert_hidden_size or 0)))
        extra = 0.0
        if (a := self.attention) is not None:
            if a.is_mla:
                widths = (a.q_lora_rank or 0) + (a.kv_lora_rank or 0) + (a.qk_rope_head_dim or 0)
                copied += self.num_layers * self.hidden_size * widths
            else:
                more = max(0.0, 1 - a.num_kv_heads / tp)
                extra = 2 * self.num_layers * self.hidden_size * a.head_dim * more
        return (self.non_expert_parameters - copied) / tp + copied + extra

    def with_prediction_layer(self, times: int = 1) -> ModelSpec:
        """With the weights and the cache of one more layer, or of several, behind a projection of two hidden states to
        one; embedding and head are the model's (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
        more: dict[str, Any] = {"num_layers": self.num_layers + times}
        parameters = 2 * self.hidden_size**2
        if width := self.prediction_intermediate_size:
            matrices = 3 if self.gated_ffn else 2
            parameters += matrices * self.hidden_size * (width - self.dense_intermediate_size)
        else:
            more["moe_layer_ids"] = (*self.moe_layer_ids, *range(self.num_layers, self.num_layers + times))
            further = (self.num_experts,) * times
            more["experts_per_layer"] = self.experts_per_layer and (*self.experts_per_layer, *further)
        return self.model_copy(update=more | {"extra_parameters": self.extra_parameters + times * parameters})

    def layer_parameters_on(self, tp: int) -> tuple[float, float]:
        """Those of one dense and of one MoE layer; ``extra_parameters``, whose layers are not known, spread evenly."""
        matrices, hidden = 3 if self.gated_ffn else 2, self.hidden_size
        dense = matrices * hidden * self.dense_intermediate_size / tp
        moe = matrices * hidden * self.shared_intermediate_size / tp
        moe += hidden * (self.num_experts + 2 * (self.expert_hidden_size or 0))
        tables = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2) / tp
        num_dense = self.num_layers - self.num_moe_layers
        alike = self.non_expert_parameters_on(tp) - tables - num_dense * dense - self.num_moe_layers * moe
        return alike / self.num_layers + dense, alike / self.num_layers + moe

    def kv_bytes_per_token(self, dtype: Dtype = "bf16", tp: int = 1) -> float | None:
        """KV-cache bytes per token over all layers on each of ``tp`` ranks that share attention; None where it is not
        known. Grouped-query heads are split over the ranks down to one head each, a latent is whole on every one."""
        a = self.attention
        if a is None:
            return None
        split = 1 if a.is_mla else min(tp, a.num_kv_heads)
        return self.num_layers * a.kv_elements_per_token * DTYPE_BYTES[dtype] / split
