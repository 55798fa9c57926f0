"""Seconds of one pass of a serving engine: tensor, expert and data-parallel attention on the ranks of one worker.

A pass takes ``b`` new tokens per attention group through all layers. Per layer: attention with its projections,
two all-reduces over ``tp`` ranks, or with data-parallel attention an exchange there and back, the router, the
routed experts of the busiest rank, the shared expert. Then the head. Times of kernels come from measured
tables of the engine's own framework where they are, else of any, else from the roofline.

``b`` sequences per attention group, ``T`` tokens over the worker, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.attention import AttentionCosts
from moeplan.costs.dense import DenseCosts
from moeplan.costs.experts import TABLE_DTYPES
from moeplan.costs.fastest import FastestTable
from moeplan.specs.attention_layers import AttentionLayers, attention_layers
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import Dtype, ModelSpec

__all__ = ["EngineCosts", "EngineSetup"]

T = TypeVar("T")
Floats = NDArray[np.float64]

# A small message's way between nodes and through the library on both sides; all-reduces go there and back.
_CROSSING_S = 15e-6
_GEMM_TABLE = {"bf16": "bf16", "fp8": "fp8_block", "fp4": "nvfp4", "int4": "bf16"}


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """One worker. ``tp`` x ``dp`` ranks: ``dp`` attention groups of ``tp``; experts over ``ep`` x ``expert_tp``.

    ``expert_dtype`` of the routed experts, ``dense_dtype`` of other products, ``kv_dtype`` of the cache;
    ``draft_tokens`` proposed per step by multi-token prediction, 0: none.
    """

    model: ModelSpec
    accelerator: AcceleratorSpec
    backend: str
    tp: int = 1
    dp: int = 1
    ep: int = 1
    expert_dtype: Dtype = "fp8"
    dense_dtype: Dtype = "fp8"
    attention_dtype: Dtype = "fp8"
    kv_dtype: Dtype = "bf16"
    draft_tokens: int = 0

    @property
    def ranks(self) -> int:
        """All ranks of the worker."""
        return self.tp * self.dp

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return max(1, self.ranks // self.ep)


class EngineCosts:
    """Passes of one :class:`EngineSetup`; tables are built when first asked for and shared through ``shared``."""

    def __init__(
        self,
        setup: EngineSetup,
        profile: HardwareProfile,
        distribution: str = "power_law_1.01",
        shared: dict[Any, Any] | None = None,
    ) -> None:
        self.setup, self._profile, self._distribution = setup, profile, distribution
        self._shared = {} if shared is None else shared
        self._layers = attention_layers(setup.model)

    # ------------------------------------------------------------------ tables

    def _cached(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        key = (self._profile.meta.name, *key)
        if key not in self._shared:
            self._shared[key] = make()
        found: T = self._shared[key]
        return found

    def _dense(self, dtype: Dtype) -> DenseCosts:
        backend = self.setup.backend
        rows = self._cached(
            ("rows", backend, dtype),
            lambda: self._profile.select(
                "gemm", backend=backend, dtype=TABLE_DTYPES.get(dtype, (dtype,)), batch=1
            ).num_rows,
        )
        name = backend if rows else None
        return self._cached(
            ("gemm", name, dtype), lambda: DenseCosts(self.setup.accelerator, dtype, self._profile, name)
        )

    def _table(
        self,
        table: str,
        axes: tuple[str, ...],
        names: dict[str, Any],
        law: Any,
        choices: tuple[dict[str, Any], ...] | None = None,
    ) -> FastestTable:
        """The table of the own framework, else of any."""
        tries = choices or ({"backend": self.setup.backend}, {})
        key = (table, str(tries), *sorted((k, str(v)) for k, v in names.items()))
        device = self.setup.accelerator.name
        rows = self._slice(table, names)
        return self._cached(key, lambda: FastestTable(rows, table, axes, names, law, device, tries))

    def _slice(self, table: str, names: dict[str, Any]) -> HardwareProfile:
        """The part of a large table that one model's rows are in: selecting from it is quick."""
        where = {k: names[k] for k in ("hidden", "num_experts", "distribution", "kind", "phase", "op") if k in names}

        def make() -> HardwareProfile:
            return HardwareProfile(self._profile.meta, {table: self._profile.select(table, **where)})

        return self._cached(("slice", table, *sorted(where.items())), make)

    # ------------------------------------------------------------------ attention

    def _attention(self, part: AttentionLayers, decode: bool, batch: Floats, context: Floats) -> Floats:
        """Seconds of one layer's attention block for ``batch`` sequences per group."""
        if part.kind == "gated_delta":
            return self._gated_delta(part, decode, batch, context)
        if part.kind == "sparse_mla" or (part.kind == "mla" and self.setup.backend in ("trtllm", "vllm")):
            module = self._module(part, decode)
            if module.measured:
                return module.seconds(context, batch)
        return self._kernel_and_products(part, decode, batch, context)

    def _module(self, part: AttentionLayers, decode: bool) -> FastestTable:
        s = self.setup
        names = {
            "kind": part.kind,
            "phase": "decode" if decode else "prefill",
            "scope": "module",
            "heads": max(1, part.spec.num_heads // s.tp),
            "head_dim": part.spec.head_dim,
            "dtype": "bf16",
            "kv_dtype": s.kv_dtype,
            "gemm_dtype": _GEMM_TABLE[s.attention_dtype],
        }
        law = self._attention_law(part, decode)
        return self._table("attention", ("context_tokens", "batch"), names, law)

    def _kernels(self, part: AttentionLayers, decode: bool) -> AttentionCosts:
        s = self.setup
        dense = self._dense(s.attention_dtype)
        kind = "mla" if part.spec.is_mla else "gqa"
        here = self._cached(
            ("rows", "attention", s.backend, kind),
            lambda: self._profile.select("attention", backend=s.backend, kind=kind, scope="kernel").num_rows,
        )
        return self._cached(
            ("attention", s.backend, s.model.name, s.tp, decode, s.kv_dtype, s.attention_dtype, part.window),
            lambda: AttentionCosts(
                part.spec,
                s.model.hidden_size,
                s.accelerator,
                decode,
                dense,
                s.kv_dtype,
                self._profile,
                s.tp,
                s.backend if here else None,
                part.window,
            ),
        )

    def _attention_law(self, part: AttentionLayers, decode: bool) -> Any:
        bare = AttentionCosts(
            part.spec,
            self.setup.model.hidden_size,
            self.setup.accelerator,
            decode,
            DenseCosts(self.setup.accelerator, self.setup.attention_dtype),
            self.setup.kv_dtype,
            tp=self.setup.tp,
        )

        def law(coords: Floats) -> Floats:
            context, batch = coords.T
            tokens = batch if decode else batch * context
            seconds: Floats = bare.kernel(batch, context).value + bare.projections(tokens).value.sum(-1)
            return seconds

        return law

    def _kernel_and_products(self, part: AttentionLayers, decode: bool, batch: Floats, context: Floats) -> Floats:
        costs = self._kernels(part, decode)
        tokens = batch if decode else batch * context
        seconds: Floats = costs.kernel(batch, context).value + costs.projections(tokens).value.sum(-1)
        if part.gated:
            width = part.spec.num_heads * part.spec.head_dim / self.setup.tp
            seconds = seconds + self._dense(self.setup.attention_dtype).product(
                tokens, width, self.setup.model.hidden_size
            ).value
        return seconds

    def _gated_delta(self, part: AttentionLayers, decode: bool, batch: Floats, context: Floats) -> Floats:
        s, a = self.setup, part.spec
        heads, keys = max(1, a.num_heads // s.tp), max(1, a.num_kv_heads // s.tp)
        state = heads * a.head_dim * a.head_dim * 4.0
        bandwidth = roofline.MEMORY_EFFICIENCY * s.accelerator.memory_bandwidth

        def law(coords: Floats) -> Floats:
            length, sequences = coords.T
            work = sequences * length * heads * a.head_dim * a.head_dim * 6
            seconds: Floats = np.maximum(2 * state * sequences / bandwidth, work / s.accelerator.bf16)
            return seconds

        length = np.ones_like(context) if decode else context
        total = np.zeros(np.broadcast(batch, context).shape)
        recurrence = "gated_delta_rule"
        phase = "decode" if decode else "prefill"
        names: dict[str, Any] = {"kind": "gated_delta", "phase": phase, "heads": heads, "kv_heads": keys}
        table = self._profile.select("attention", **names)
        kernels = sorted(set(table["kernel"].to_pylist()))
        for part_of in ("conv1d", recurrence):
            mine = [kernel for kernel in kernels if part_of in kernel]
            costs = self._table("attention", ("context_tokens", "batch"), names | {"kernel": mine or [part_of]}, law)
            if costs.measured or part_of == recurrence:
                total = total + costs.seconds(length, batch)
        tokens = batch if decode else batch * context
        width = (2 * a.num_kv_heads + 2 * a.num_heads) * a.head_dim / s.tp
        dense = self._dense(s.attention_dtype)
        products = dense.product(
            np.asarray(tokens, float)[..., None],
            np.array([width, s.model.hidden_size]),
            np.array([s.model.hidden_size, a.num_heads * a.head_dim / s.tp]),
        )
        seconds: Floats = total + products.value.sum(-1)
        return seconds

    # ------------------------------------------------------------------ experts and links

    def _experts(self, tokens: Floats) -> Floats:
        """Seconds of one layer's routed experts on the busiest rank, ``tokens`` over the worker."""
        s, m = self.setup, self.setup.model
        local = m.num_experts / s.ep
        weight = roofline.expert_weight_s(m, s.accelerator, s.expert_dtype) / s.expert_tp
        pair = roofline.expert_pair_s(m, s.accelerator, s.expert_dtype) / s.expert_tp

        def law(coords: Floats) -> Floats:
            pairs = coords[:, 0] * m.top_k / s.ep
            active = local * -np.expm1(-pairs / local)
            seconds: Floats = np.maximum(active * weight, pairs * pair)
            return seconds

        names = {
            "hidden": m.hidden_size,
            "inter": m.expert_intermediate_size,
            "num_experts": m.num_experts,
            "top_k": m.top_k,
            "ep": s.ep,
            "tp": s.expert_tp,
            "distribution": self._distribution,
            "scope": "experts",
            "num_slots": [0, m.num_experts],
        }
        # Frameworks take these kernels from the same libraries: of all that were measured the fastest serves.
        choices = tuple({"dtype": dtype} for dtype in TABLE_DTYPES.get(s.expert_dtype, (s.expert_dtype,)))
        return self._table("experts", ("tokens",), names, law, choices).seconds(tokens)

    def _all_reduce(self, tokens: Floats) -> Floats:
        s = self.setup
        if s.tp == 1:
            return np.zeros_like(tokens)
        return self._collective("all_reduce", s.tp, tokens * s.model.hidden_size * 2)

    def _collective(self, op: str, ranks: int, size: Floats) -> Floats:
        a = self.setup.accelerator
        joined = ranks <= a.scale_up_domain
        bandwidth = a.scale_up_bandwidth if joined else a.nic_bandwidth
        part = (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks
        measured = min(ranks, 8)

        def law(coords: Floats) -> Floats:
            seconds: Floats = 5e-6 + part * coords[:, 0] / bandwidth
            return seconds

        names = {"op": op, "ranks": measured, "dtype": ["fp16", "bf16"]}
        table = self._table("collectives", ("message_size_bytes",), names, law)
        if op == "all_reduce":
            # The library's own and NCCL: a framework takes the better one for the size.
            key = ("collectives", "nccl", measured)
            nccl = self._cached(
                key,
                lambda: FastestTable(
                    self._profile, "collectives", ("message_size_bytes",), names | {"backend": "nccl"}, law, a.name
                ),
            )
            inside = np.minimum(table.seconds(size), nccl.seconds(size))
        else:
            inside = table.seconds(size)
        if ranks <= measured:
            return inside
        # Beyond the measured ranks: a second stage like the first, and the rest of the way over the links between.
        extra = (part - (2 if op == "all_reduce" else 1) * (measured - 1) / measured) * size / bandwidth
        crossing = 0.0 if joined else _CROSSING_S * (2 if op == "all_reduce" else 1)
        seconds: Floats = 2 * inside + extra + crossing
        return seconds

    def _exchange(self, every: Floats) -> Floats:
        """Dispatch and combine of ``every`` token: with data-parallel attention all go to all ranks and partial sums
        come back; without, partial sums are reduced."""
        s = self.setup
        if s.dp == 1:
            return self._all_reduce(every)
        out = every * roofline.token_bytes(s.model.hidden_size, "bf16")
        there = self._collective("all_gather", s.ranks, out)
        back = self._collective("reduce_scatter", s.ranks, out)
        return there + back

    # ------------------------------------------------------------------ a pass

    def _pass(self, decode: bool, batch: Any, context: Any, busy: Any, tokens_per_sequence: float = 1.0) -> Floats:
        s, m = self.setup, self.setup.model
        batch, context, busy = np.broadcast_arrays(*(np.asarray(x, float) for x in (batch, context, busy)))
        tokens = batch * (tokens_per_sequence if decode else context)  # per attention group
        attention = np.zeros(batch.shape)
        for part in self._layers:
            attention = attention + part.count * self._attention(part, decode, batch, context)
        dense = self._dense(s.dense_dtype)
        plain = self._dense("bf16")
        reduce = self._all_reduce(tokens)
        every = tokens * busy
        moe = self._exchange(every) + self._experts(every) + plain.product(tokens, m.num_experts, m.hidden_size).value
        if m.shared_intermediate_size:
            moe = moe + dense.ffn(tokens, m.hidden_size, m.shared_intermediate_size / s.tp, m.gated_ffn).value.sum(-1)
        num_dense = m.num_layers - m.num_moe_layers
        block = np.zeros(batch.shape)
        if num_dense and m.dense_intermediate_size:
            ffn = dense.ffn(tokens, m.hidden_size, m.dense_intermediate_size / s.tp, m.gated_ffn)
            block = num_dense * (ffn.value.sum(-1) + reduce)
        head = plain.product(tokens if decode else batch, m.vocab_size / s.tp, m.hidden_size).value
        total: Floats = attention + m.num_layers * reduce + m.num_moe_layers * moe + block + head
        return total

    def decode_s(self, batch: Any, context: Any) -> Floats:
        """Seconds of one decode step of ``batch`` sequences per attention group over ``context`` cached tokens.

        With drafts a step checks ``1 + draft_tokens`` tokens per sequence and then drafts anew, each draft with one
        more layer.
        """
        drafts = self.setup.draft_tokens
        step = self._pass(True, batch, context, self.setup.dp, 1.0 + drafts)
        if drafts:
            step = step + drafts * self._pass(True, batch, context, self.setup.dp) / self.setup.model.num_layers
        return step

    def prefill_s(self, prompts: Any, length: Any) -> Floats:
        """Seconds of a prefill of ``prompts`` of ``length`` tokens over the worker, spread over attention groups."""
        prompts = np.asarray(prompts, float)
        busy = np.minimum(prompts, self.setup.dp)
        return self._pass(False, np.ceil(prompts / self.setup.dp), length, busy)
