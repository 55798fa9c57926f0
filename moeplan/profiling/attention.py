"""Benches of attention alone (without projections): GQA and MLA, prefill and decode, forward and backward, full and
with a sliding window.

``B`` sequences, ``H`` query heads of this rank, ``G`` key-value heads, ``J`` query heads of one of these, ``D`` head
size, ``C`` context tokens, ``T`` tokens of a prefill.
MLA (DeepSeek-V2, section 2.1): prefill with keys and values of every head, decode in the absorbed form, where
all heads read one latent of ``kv_lora_rank + rope`` numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeplan.errors import SpecError
from moeplan.profiling.device import Device
from moeplan.profiling.grid import coarse_sizes
from moeplan.profiling.protocol import Bench, Call, Series, shrunk
from moeplan.specs.model import AttentionSpec

__all__ = ["attention_bench", "banded_attention"]

_PREFILL_BATCHES = (1, 8)
_DECODE_BATCHES = (1, 8, 64)
_POINTS = 6
_BLOCK = 128  # most queries that share their keys: with more, a wide window would do up to twice the work


def attention_bench(
    device: Device,
    attention: AttentionSpec,
    dtype: str,
    tp: int = 1,
    directions: Sequence[str] = ("forward",),
    max_tokens: int = 16384,
    windows: Sequence[int] = (0,),
) -> Bench:
    """Series over context tokens at several batch sizes, a prefill's of at most ``max_tokens`` together.

    ``windows`` in tokens, 0: none. Decode with a window reads what engines keep or address, the last tokens of it.

    Raises:
        SpecError: heads do not divide over ``tp`` or over key-value heads, or the type is none for arithmetic.
    """
    if dtype not in ("fp32", "bf16", "fp16"):
        raise SpecError(f"dtype ({dtype}): attention is measured in fp32, bf16 or fp16")
    device.dtype(dtype)
    if attention.num_heads % tp:
        raise SpecError(f"heads ({attention.num_heads}) must divide by tp ({tp}); give a --tp that divides them")
    heads = attention.num_heads // tp
    kv_heads = 1 if attention.is_mla else max(1, attention.num_kv_heads // tp)
    if heads % kv_heads:
        raise SpecError(
            f"kv_heads ({attention.num_kv_heads}) must divide heads ({attention.num_heads}), also on each of tp ({tp})"
            f" ranks, where {kv_heads} do not divide {heads}; give other --kv-heads or --tp"
        )
    kind = "mla" if attention.is_mla else "gqa"
    size = 4 if dtype == "fp32" else 2
    key_size, value_size = _sizes(attention)
    series, what, left_out = [], {}, list[str]()
    name = f"attention {kind} {heads}/{kv_heads} heads of {attention.head_dim} {dtype}"

    def add(phase: str, window: int, batch: int, direction: str, asked: int, high: int) -> None:
        banded = "_banded" if window and phase == "prefill" else ""

        def row(context: int) -> Mapping[str, Any]:
            return {
                "backend": "moeplan",
                "kernel": f"sdpa{banded}" if kind == "gqa" or phase == "prefill" else "absorbed_matmul",
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
            } | ({"window": window} if window else {})  # points of older journals have no such column

        label = f"{name} {phase}{f' window {window}' if window else ''} B{batch} {direction}"
        what[label] = phase, window, batch, direction
        high = max(1, min(asked, high))
        left_out.extend(shrunk(label, asked, high))
        low = min(16, high)
        # Time bends at the window: that size is measured.
        sizes = {*coarse_sizes(low, high, _POINTS), window} if low < window < high else ()
        series.append(Series("attention", label, row, low, high, _POINTS, sizes=tuple(sizes)))

    per_token = size * (
        (attention.kv_lora_rank or 0) + (attention.qk_rope_head_dim or 0)
        if attention.is_mla
        else kv_heads * (key_size + value_size)
    )
    for window in windows:
        for direction in directions:
            for batch in _PREFILL_BATCHES:
                if tokens := max_tokens // batch:
                    add("prefill", window, batch, direction, tokens, tokens)
        for batch in _DECODE_BATCHES:
            fitting = int(device.free_bytes / 3 // (batch * per_token))
            add("decode", window, batch, "forward", max_tokens, max_tokens if 0 < window <= fitting else fitting)
    return Bench(
        name, tuple(series), lambda: _open(device, attention, dtype, heads, kv_heads, what, size), tuple(left_out)
    )


def _sizes(attention: AttentionSpec) -> tuple[int, int]:
    if attention.is_mla:
        return (attention.qk_nope_head_dim or 0) + (attention.qk_rope_head_dim or 0), attention.head_dim
    return attention.head_dim, attention.head_dim


def banded_attention(device: Device, window: int, group: int, dtype: Any) -> Callable[[Any, Any, Any], list[Any]]:
    """Causal attention to the last ``window`` tokens, a query's own included, of more tokens than that.

    ``q_BGTJD, k_BGTD, v_BGTD -> outs_BGTJD``, parts of consecutive tokens, with ``J = group``. The first ``window``
    tokens see all before them. Of the others a block sees its own keys and ``window`` before, under one mask for all.
    """
    torch = device.torch
    sdpa = torch.nn.functional.scaled_dot_product_attention
    block = min(window, _BLOCK)
    # 0 where query i sees key j, 0 < j - i <= window, and -inf elsewhere. A group's heads are further rows of queries:
    # not every fused kernel of a GPU that takes a mask takes grouped heads.
    seen = torch.ones(block, window + block, dtype=dtype, device=device.kind).tril(window).triu(1).log()
    mask_QK = seen.repeat_interleave(group, 0)

    def attend(q_BGTJD: Any, k_BGTD: Any, v_BGTD: Any) -> list[Any]:
        batch, kv_heads, tokens = k_BGTD.shape[:3]
        q_BHTD = q_BGTJD[:, :, :window].transpose(2, 3).flatten(1, 2)
        first = sdpa(q_BHTD, k_BGTD[:, :, :window], v_BGTD[:, :, :window], is_causal=True, enable_gqa=group > 1)
        outs = [first.unflatten(1, (kv_heads, group)).transpose(2, 3)]
        whole = tokens - (tokens - window) % block
        for start, end, size in ((window, whole, block), (whole, tokens, tokens - whole)):
            if start == end:
                continue
            # Sequences stand beside groups (N), blocks in their place (S): views of the inputs, nothing is copied.
            q_SNQD = q_BGTJD[:, :, start:end].flatten(0, 1).unflatten(1, (-1, size)).flatten(2, 3).transpose(0, 1)
            k_SNKD, v_SNKD = (
                part[:, :, start - window : end].flatten(0, 1).unfold(1, window + size, size).permute(1, 0, 3, 2)
                for part in (k_BGTD, v_BGTD)
            )
            out_SNQD = sdpa(q_SNQD, k_SNKD, v_SNKD, attn_mask=mask_QK[: size * group, : window + size])
            outs.append(out_SNQD.transpose(0, 1).reshape(batch, kv_heads, end - start, group, -1))
        return outs

    return attend


def _open(
    device: Device,
    attention: AttentionSpec,
    dtype: str,
    heads: int,
    kv_heads: int,
    what: Mapping[str, tuple[str, int, int, str]],
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
        phase, window, batch, direction = what[series.label]
        if phase == "decode":
            context = min(context, window or context)
            if attention.is_mla:
                return decode_mla(batch, context)
        kv = heads if attention.is_mla else kv_heads
        causal = phase == "prefill"
        banded = causal and 0 < window < context
        queries = (heads, context if causal else 1) if not banded else (kv, context, heads // kv)
        grouped = {"enable_gqa": True} if kv != heads else {}
        cases = []
        for _ in range(copies(batch * context * kv * (key_size + value_size))):
            q, k, v = (
                device.normal((batch, *shape), kind)
                for shape in ((*queries, key_size), (kv, context, key_size), (kv, context, value_size))
            )
            cases.append((q, k, v))
            if direction == "backward" and len(cases) == 2:
                break

        def plain(q_BHTD: Any, k_BGTD: Any, v_BGTD: Any) -> list[Any]:
            return [sdpa(q_BHTD, k_BGTD, v_BGTD, is_causal=causal, **grouped)]

        attend = banded_attention(device, window, heads // kv, kind) if banded else plain

        def forward(i: int) -> object:
            with torch.inference_mode():
                return attend(*cases[i % len(cases)])

        if direction == "forward":
            return forward
        graphs = []
        for q, k, v in cases:
            leaves = [part.requires_grad_() for part in (q, k, v)]
            outs = attend(*leaves)
            graphs.append((outs, leaves, [device.normal(out.shape, kind) for out in outs]))

        def backward(i: int) -> object:
            outs, leaves, gradients = graphs[i % len(graphs)]
            return torch.autograd.grad(outs, leaves, gradients, retain_graph=True)

        return backward

    return prepare
