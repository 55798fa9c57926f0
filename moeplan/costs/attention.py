"""Seconds of attention on one rank: grouped-query (GQA) or multi-head latent (MLA), prefill or decode.

The kernel moves the KV cache once and does ``4 B h d q c`` operations (half of them under the causal mask in
prefill). Latent attention in decode works on the latent itself: ``2 B h c (2 r + p)`` operations over ``c (r + p)``
stored numbers, with ``r`` the latent's rank and ``p`` its rotary part (DeepSeek-V2, section 2.1).

``B`` sequences, ``q`` new tokens, ``c`` tokens of context, ``h`` heads, ``d`` head size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.dense import DenseCosts, Direction
from moeplan.costs.frameworks import framework_that_serves
from moeplan.costs.number_formats import table_dtypes
from moeplan.costs.tables import Seconds, TableCosts
from moeplan.specs.attention_layers import attention_layers
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import DTYPE_BYTES, AttentionSpec, Dtype, ModelSpec

__all__ = ["AttentionCosts", "attention_by_window"]

Floats = NDArray[np.float64]

# Kernels of two frameworks differ by up to 1.5 (median over long contexts). SGLang's of latent attention in prefill
# were timed on Hopper as the absorbed product, 3.4 times the operations and 2.7 times TensorRT-LLM's time; its server
# runs that after a cached prefix alone (deepseek_v2.py, dispatch of attention).
_SLOWER = 2.0
_LONG = (4096, 8192, 16384)
_POINT = ("context_tokens", "batch", "heads", "kv_heads", "head_dim", "window", "kv_dtype")


class AttentionCosts:
    """Attention of one layer with ``1 / tp`` of its heads on a rank, in one phase, or its backward; in the type of
    ``dense``'s activations, as the cache unless ``kv_dtype`` is narrower than 16 bits. In decode ``dcp`` of the ranks
    each take the heads of all of them and ``1 / dcp`` of the context (:mod:`moeplan.costs.context_parallel`).

    Rows are those of ``backend``; of the framework with the fastest kernels of long contexts where none is named, or
    where the named one has none of the shape, or takes over ``_SLOWER`` times as long: it has timed another product.
    """

    def __init__(
        self,
        attention: AttentionSpec,
        hidden: int,
        accelerator: AcceleratorSpec,
        decode: bool,
        dense: DenseCosts,
        kv_dtype: Dtype = "bf16",
        profile: HardwareProfile | None = None,
        tp: int = 1,
        backend: str | None = None,
        window: int = 0,
        direction: Direction = "forward",
        dcp: int = 1,
    ) -> None:
        self._spec, self._hidden, self._dense = attention, hidden, dense
        self._decode, self._tp, self._dcp = decode, tp, dcp if decode else 1
        split = tp // self._dcp
        heads, kv_heads = attention.num_heads / split, max(1.0, attention.num_kv_heads / split)
        rank, rotary = attention.kv_lora_rank or 0, attention.qk_rope_head_dim or 0
        query_dim = (attention.qk_nope_head_dim or attention.head_dim) + rotary
        bandwidth = roofline.MEMORY_EFFICIENCY * accelerator.memory_bandwidth
        stored = (rank + rotary) if attention.is_mla else 2 * kv_heads * attention.head_dim
        arithmetic = dense.activations
        wide, flops = DTYPE_BYTES[arithmetic], roofline.matmul_flops(accelerator, arithmetic)
        cache = DTYPE_BYTES[kv_dtype] if DTYPE_BYTES[kv_dtype] < 2 else wide

        def law(coords: Floats, queries: float = 1.0, window: int = window) -> Floats:
            context, batch = coords.T
            query = np.full_like(context, queries) if decode else context
            seen = np.minimum(context, window) if window else context
            pairs = query * seen - (0 if decode else seen**2 / 2)  # of a query and a key that it sees
            if attention.is_mla and decode:
                work = 2 * batch * heads * pairs * (2 * rank + rotary)
            else:
                work = 2 * batch * heads * pairs * (query_dim + attention.head_dim)
            moved = batch * (seen if decode else context) * stored * cache
            moved += 2 * wide * batch * query * heads * query_dim
            seconds: Floats = np.maximum(moved / bandwidth, work / flops)
            return seconds

        names: dict[str, Any] = {
            "kind": "mla" if attention.is_mla else "gqa",
            "phase": "decode" if decode else "prefill",
            "scope": "kernel",
            "heads": int(heads),
            "kv_heads": 1 if attention.is_mla else int(kv_heads),
            "head_dim": attention.head_dim,
            "window": window,
            "direction": direction,
        }
        # Of the kinds of 16 bits the first that is measured, with this window or else without one.
        kinds: list[dict[str, Any]] = [
            names | {"window": seen, "dtype": of, "kv_dtype": of if cache == wide else kv_dtype}
            for seen in dict.fromkeys((window, 0))
            for of in table_dtypes(arithmetic)
        ]
        there = (kind for kind in kinds if profile is not None and _measured(profile, tuple(kind.items())))
        names = next(there, kinds[0])
        framework = _framework(profile, tuple(names.items()), backend) if profile is not None else None
        names |= {"backend": framework} if framework else {}
        self._law, own = law, names["window"]
        self._cut = 0 if own == window else window  # of a table without one

        def table_law(coords: Floats) -> Floats:
            return law(coords, window=own)

        self._kernel = TableCosts(profile, "attention", ("context_tokens", "batch"), names, table_law, accelerator.name)
        self.measured = self._kernel.measured

    def kernel(self, batch: Any, context: Any) -> Seconds:
        """Attention alone over ``batch`` sequences, numbers or arrays of one shape; in prefill all ``context`` tokens
        are new. Where no kernel is measured with the window, one without it that sees as many tokens serves: in prefill
        its time at the context in proportion to the law."""
        window = self._cut
        if self._dcp > 1:
            context = np.maximum(1.0, np.asarray(context) / self._dcp)
        if not window:
            return self._kernel.seconds(context, batch)
        if self._decode:
            return self._kernel.seconds(np.minimum(context, window), batch)
        found = self._kernel.seconds(context, batch)
        coords = np.stack([x.ravel() for x in np.broadcast_arrays(*map(np.atleast_1d, (context, batch)))], -1) * 1.0
        part = (self._law(coords) / self._law(coords, window=0)).reshape(found.value.shape)
        beyond = bool((np.asarray(context) > window).any())
        error = max(found.relative_error, roofline.RELATIVE_ERROR) if beyond else found.relative_error
        source = found.source + f", cut to a window of {window}" * beyond
        return Seconds(found.value * part, error, source, found.extrapolated or beyond)

    def work(self, batch: Floats, context: Floats, queries: float = 1.0) -> Floats:
        """Roofline seconds of the kernel with ``queries`` new tokens per sequence in decode, arrays of one shape."""
        context = np.maximum(1.0, context / self._dcp)
        return self._law(np.stack([context.ravel(), batch.ravel()], -1), queries).reshape(batch.shape)

    def projections(self, tokens: Any) -> Seconds:
        """Products before and after the kernel for ``tokens`` new tokens, each on the last axis."""
        a, tp, hidden = self._spec, self._tp, self._hidden
        halves: list[Seconds] | None = None
        if a.kv_lora_rank is None:
            heads = a.num_heads / tp + 2 * max(1.0, a.num_kv_heads / tp)
            shapes: list[tuple[float, float]] = [(heads * a.head_dim, hidden)]
        else:
            nope, rope = a.qk_nope_head_dim or 0, a.qk_rope_head_dim or 0
            query = a.num_heads * (nope + rope) / tp
            shapes = [(a.q_lora_rank, hidden), (query, a.q_lora_rank)] if a.q_lora_rank else [(query, hidden)]
            shapes += [(a.kv_lora_rank + rope, hidden)]
            halves = self._absorbed(tokens) if self._decode else None
            # Up-projection of the latent in prefill; in decode of its halves' size, where these are not measured.
            shapes += [] if halves else [(a.num_heads * (nope + a.head_dim) / tp, a.kv_lora_rank)]
        shapes += [(hidden, a.num_heads * a.head_dim / tp)]
        widths, inner = np.array(shapes, float).T
        found = self._dense.product(np.asarray(tokens, float)[..., None], widths, inner)
        return _beside(found, *halves) if halves else found

    def _absorbed(self, tokens: Any) -> list[Seconds] | None:
        """The halves of the up-projection around the kernel of latent attention, one product for each head
        (DeepSeek-V2, section 2.1); None where they are not measured."""
        a, heads = self._spec, self._spec.num_heads / self._tp
        rank, nope = a.kv_lora_rank or 0, a.qk_nope_head_dim or 0
        halves = [self._dense.batched(tokens, heads, *size) for size in ((rank, nope), (a.head_dim, rank))]
        return [half for half in halves if half is not None] if None not in halves else None


def _beside(*parts: Seconds) -> Seconds:
    """Parts on the last axis of the first."""
    first, *others = parts
    value = np.concatenate([first.value, *(part.value.reshape(*first.value.shape[:-1], 1) for part in others)], -1)
    source = "; ".join(dict.fromkeys(part.source for part in parts))
    error = sum(part.total * part.relative_error for part in parts) / sum(part.total for part in parts)
    return Seconds(value, error, source, any(part.extrapolated for part in parts))


@lru_cache(maxsize=256)
def _measured(profile: HardwareProfile, names: tuple[tuple[str, Any], ...]) -> bool:
    return bool(profile.select("attention", **dict(names)).num_rows)


@lru_cache(maxsize=256)
def _framework(profile: HardwareProfile, names: tuple[tuple[str, Any], ...], backend: str | None) -> str | None:
    """Whose rows of ``names`` serve, of those that have any, judged by all shapes of that kind; None without rows."""
    has = sorted(set(profile.select("attention", **dict(names))["backend"].to_pylist()))
    alike = {name: value for name, value in names if name in ("kind", "phase", "scope", "direction")}
    rows = profile.select("attention", **alike, backend=has)
    judged = rows.filter(pc.is_in(rows["context_tokens"], value_set=pa.array(_LONG))) or rows
    return framework_that_serves(judged, _POINT, backend, _SLOWER)


def attention_by_window(
    model: ModelSpec,
    accelerator: AcceleratorSpec,
    decode: bool,
    dense: DenseCosts,
    kv_dtype: Dtype = "bf16",
    profile: HardwareProfile | None = None,
    tp: int = 1,
    backend: str | None = None,
    direction: Direction = "forward",
    dcp: int = 1,
) -> tuple[tuple[float, AttentionCosts], ...]:
    """(share of the layers, their costs): layers alike but for how many of the last tokens they see.

    Empty where the model's attention is not known; layers of another sort than ``model.attention`` count as it.
    """
    spec = model.attention
    if spec is None:
        return ()
    alike = [(part.window, part.count) for part in attention_layers(model) if part.spec == spec] or [(0, 1)]
    layers = sum(count for _, count in alike)
    hidden = model.hidden_size
    common = (spec, hidden, accelerator, decode, dense, kv_dtype, profile, tp, backend)
    return tuple((count / layers, AttentionCosts(*common, window, direction, dcp)) for window, count in alike)
