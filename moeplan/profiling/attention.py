"""Benches of attention alone (without projections): GQA and MLA, prefill and decode, forward and backward.

``B`` sequences, ``H`` query heads of this rank, ``G`` key-value heads, ``D`` head size, ``C`` context tokens.
MLA (DeepSeek-V2, section 2.1): prefill with keys and values of every head, decode in the absorbed form, where
all heads read one latent of ``kv_lora_rank + rope`` numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeplan.errors import SpecError
from moeplan.profiling.device import Device
from moeplan.profiling.protocol import Bench, Call, Series, shrunk
from moeplan.specs.model import AttentionSpec

__all__ = ["attention_bench"]

_DECODE_BATCHES = (1, 8, 64)


def attention_bench(
    device: Device,
    attention: AttentionSpec,
    dtype: str,
    tp: int = 1,
    directions: Sequence[str] = ("forward",),
    max_tokens: int = 16384,
) -> Bench:
    """Series over context tokens: prefill of one sequence, decode at several batch sizes.

    Raises:
        SpecError: heads do not divide over ``tp``, or the type is none for arithmetic.
    """
    if dtype not in ("fp32", "bf16", "fp16"):
        raise SpecError(f"dtype ({dtype}): attention is measured in fp32, bf16 or fp16")
    device.dtype(dtype)
    if attention.num_heads % tp:
        raise SpecError(f"heads ({attention.num_heads}) must divide by tp ({tp}); give a --tp that divides them")
    heads = attention.num_heads // tp
    kv_heads = 1 if attention.is_mla else max(1, attention.num_kv_heads // tp)
    kind = "mla" if attention.is_mla else "gqa"
    size = 4 if dtype == "fp32" else 2
    key_size, value_size = _sizes(attention)
    series, what, left_out = [], {}, list[str]()
    name = f"attention {kind} {heads}/{kv_heads} heads of {attention.head_dim} {dtype}"

    def add(phase: str, batch: int, direction: str, high: int) -> None:
        def row(context: int) -> Mapping[str, Any]:
            return {
                "backend": "moeplan",
                "kernel": "sdpa" if kind == "gqa" or phase == "prefill" else "absorbed_matmul",
                "kind": kind,
                "phase": phase,
                "scope": "kernel",
                "batch": batch,
                "query_tokens": context if phase == "prefill" else 1,
                "context_tokens": context,
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": attention.head_dim,
                "dtype": dtype,
                "kv_dtype": dtype,
                "direction": direction,
            }

        label = f"{name} {phase} B{batch} {direction}"
        what[label] = phase, batch, direction
        high = max(1, min(max_tokens, high))
        left_out.extend(shrunk(label, max_tokens, high))
        series.append(Series("attention", label, row, min(16, high), high, 6))

    for direction in directions:
        add("prefill", 1, direction, max_tokens)
    per_token = size * (
        (attention.kv_lora_rank or 0) + (attention.qk_rope_head_dim or 0)
        if attention.is_mla
        else kv_heads * (key_size + value_size)
    )
    for batch in _DECODE_BATCHES:
        add("decode", batch, "forward", int(device.free_bytes / 3 // (batch * per_token)))
    return Bench(
        name, tuple(series), lambda: _open(device, attention, dtype, heads, kv_heads, what, size), tuple(left_out)
    )


def _sizes(attention: AttentionSpec) -> tuple[int, int]:
    if attention.is_mla:
        return (attention.qk_nope_head_dim or 0) + (attention.qk_rope_head_dim or 0), attention.head_dim
    return attention.head_dim, attention.head_dim


def _open(
    device: Device,
    attention: AttentionSpec,
    dtype: str,
    heads: int,
    kv_heads: int,
    what: Mapping[str, tuple[str, int, str]],
    size: int,
) -> Callable[[Series, int], Call]:
    torch = device.torch
    kind = device.dtype(dtype)
    key_size, value_size = _sizes(attention)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def copies(elements: int) -> int:
        return device.copies(elements * size, most=16)

    def decode_mla(batch: int, context: int) -> Call:
        rank = attention.kv_lora_rank or 0
        width = rank + (attention.qk_rope_head_dim or 0)
        q_BHW = device.normal((batch, heads, width), kind, key_size**-0.5)
        caches = [device.normal((batch, context, width), kind) for _ in range(copies(batch * context * width))]

        def call(i: int) -> object:
            cache_BCW = caches[i % len(caches)]
            with torch.inference_mode():
                score_BHC = torch.bmm(q_BHW, cache_BCW.transpose(1, 2))
                return torch.bmm(score_BHC.softmax(-1), cache_BCW[..., :rank])

        return call

    def prepare(series: Series, context: int) -> Call:
        phase, batch, direction = what[series.label]
        if phase == "decode" and attention.is_mla:
            return decode_mla(batch, context)
        kv = heads if attention.is_mla else kv_heads
        queries = context if phase == "prefill" else 1
        grouped = {"enable_gqa": True} if kv != heads else {}
        cases = []
        for _ in range(copies(batch * context * kv * (key_size + value_size))):
            q, k, v = (
                device.normal((batch, h, t, d), kind)
                for h, t, d in ((heads, queries, key_size), (kv, context, key_size), (kv, context, value_size))
            )
            cases.append((q, k, v))
            if direction == "backward" and len(cases) == 2:
                break
        causal = phase == "prefill"

        def forward(i: int) -> object:
            q, k, v = cases[i % len(cases)]
            with torch.inference_mode():
                return sdpa(q, k, v, is_causal=causal, **grouped)

        if direction == "forward":
            return forward
        graphs = []
        for q, k, v in cases:
            leaves = [part.requires_grad_() for part in (q, k, v)]
            out = sdpa(*leaves, is_causal=causal, **grouped)
            graphs.append((out, leaves, device.normal(out.shape, kind)))

        def backward(i: int) -> object:
            out, leaves, gradient = graphs[i % len(graphs)]
            return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

        return backward

    return prepare
