"""Attention layer by layer, for models whose layers differ: full, windowed, sparse, or linear.

:class:`~moeplan.specs.model.AttentionSpec` describes one layer and weights are counted from it; what a layer of each
sort costs in time and what a cache keeps of it need the number of such layers. Facts from the models' published
``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moeplan.specs.model import AttentionSpec, Dtype, ModelSpec

__all__ = ["AttentionLayers", "attention_layers", "kept_kv_bytes_per_token"]

LayerKind = Literal["gqa", "mla", "sparse_mla", "gated_delta"]


@dataclass(frozen=True, slots=True)
class AttentionLayers:
    """``count`` layers of one sort. ``window`` in tokens, 0: none; ``gated``: a gate as wide as the queries."""

    kind: LayerKind
    count: int
    spec: AttentionSpec
    window: int = 0
    gated: bool = False


# openai/gpt-oss-120b: layer_types alternate, sliding_window 128. Qwen/Qwen3.5-397B-A17B: full_attention_interval 4,
# 32 query and 2 key-value heads of 256, attn_output_gate; linear layers with 16 key and 64 value heads of 128.
_WINDOWS = {"GPT-OSS-120B": 128, "GPT-OSS-20B": 128}
_QWEN35_FULL = AttentionSpec(num_heads=32, num_kv_heads=2, head_dim=256)
_QWEN35_LINEAR = AttentionSpec(num_heads=64, num_kv_heads=16, head_dim=128)
_SPARSE = frozenset(["GLM-5", "DeepSeek-V3.2"])


def attention_layers(model: ModelSpec) -> tuple[AttentionLayers, ...]:
    """The sorts of attention of ``model`` with their numbers of layers; empty where its attention is not known."""
    if model.name == "Qwen3.5-397B-A17B":
        full = model.num_layers // 4
        return (
            AttentionLayers("gqa", full, _QWEN35_FULL, gated=True),
            AttentionLayers("gated_delta", model.num_layers - full, _QWEN35_LINEAR, gated=True),
        )
    if model.attention is None:
        return ()
    kind: LayerKind = "gqa" if not model.attention.is_mla else "sparse_mla" if model.name in _SPARSE else "mla"
    whole = AttentionLayers(kind, model.num_layers, model.attention)
    if model.name in _WINDOWS:
        half = model.num_layers // 2
        windowed = replace(whole, count=half, window=_WINDOWS[model.name])
        return (windowed, replace(whole, count=model.num_layers - half))
    return (whole,)


def kept_kv_bytes_per_token(
    model: ModelSpec, context: float, dtype: Dtype = "bf16", tp: int = 1, dcp: int = 1
) -> float | None:
    """Those of :meth:`~moeplan.specs.model.ModelSpec.kv_bytes_per_token` that are kept of sequences of ``context``
    tokens, in the mean: layers with a window keep its tokens alone, as in vLLM's hybrid KV cache manager. Of ``dcp``
    ranks, which would keep the same, each keeps its part."""
    whole = model.kv_bytes_per_token(dtype, tp)
    if whole is None:
        return None
    context = max(1.0, context)
    kept = sum(part.count * min(1.0, (part.window or context) / context) for part in attention_layers(model))
    return whole * kept / model.num_layers / dcp
