"""Seconds of one pass of a serving engine: tensor, expert and data-parallel attention on the ranks of one worker.

A pass takes ``b`` new tokens per attention group through all layers. Per layer: attention with its projections,
two all-reduces over ``tp`` ranks, or with data-parallel attention an exchange there and back, the router, the
routed experts of the busiest rank, the shared expert. Then the head. Times of kernels come from measured
tables of the engine's own framework where they are, else of any, else from the roofline; of routed experts, whose
kernels frameworks take from the same libraries, the library's that was asked for, else the fastest of all.

``b`` sequences per attention group, ``T`` tokens over the worker, ``H`` hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.attention import AttentionCosts
from moeplan.costs.dense import DenseCosts
from moeplan.costs.engine_links import EngineLinks
from moeplan.costs.engine_tables import EngineSetup, EngineTables, Exchange
from moeplan.costs.experts import of_phase
from moeplan.costs.fastest import FastestTable
from moeplan.costs.number_formats import table_dtypes
from moeplan.specs.attention_layers import AttentionLayers, attention_layers
from moeplan.specs.model import DTYPE_BYTES, Dtype
from moeplan.specs.workload import Phase

__all__ = ["EngineCosts", "EngineSetup", "Exchange"]

Floats = NDArray[np.float64]
# Parts of the names of tables' kernels, by the library they are from.
_LIBRARIES = {
    "trtllm": ("flashinfer_trtllm", "min_latency"),
    "deepgemm": ("deepgemm",),
    "cutlass": ("cutlass",),
    "wideep": ("wideep_compute",),
}
# Scaling activations to 8 or 4 bits before a product: a pass of its own that tables of products leave out but
# TensorRT-LLM's in 4 bits. At few tokens it takes 1.3 to 2.6 us (aiconfigurator-core, ``quantize``, two frameworks).
_SCALING_S = 2.0e-6
_FEW_TOKENS = 256.0
# Measured blocks of latent attention take 0.8 to 1.4 times as long as their kernel and products, but vLLM's on B300,
# GB200 and H200 1.6 to 2.5 times (on B200, a B300's twin, 0.8 to 1.0) and SGLang's in prefill 3.9 to 10 times.
_BLOCK = 1.5
_GEMM_TABLE = {"bf16": "bf16", "fp8": "fp8_block", "fp4": "nvfp4", "int4": "bf16"}


class EngineCosts:
    """Passes of one :class:`EngineSetup`; tables are built when first asked for and shared through ``shared``."""

    def __init__(
        self,
        setup: EngineSetup,
        profile: HardwareProfile,
        shared: dict[Any, Any] | None = None,
    ) -> None:
        self.setup = setup
        self._tables = EngineTables(setup, profile, shared)
        self._links = EngineLinks(self._tables)
        self._layers = attention_layers(setup.model)
        self._serves: dict[tuple[AttentionLayers, bool], bool] = {}

    # ------------------------------------------------------------------ attention

    def _attention(
        self, part: AttentionLayers, decode: bool, batch: Floats, context: Floats, queries: float = 1.0
    ) -> Floats:
        """Seconds of one layer's attention block for ``batch`` sequences per group, of ``queries`` tokens in decode."""
        if part.kind == "gated_delta":
            return self._gated_delta(part, decode, batch, context, queries)
        if part.kind in ("mla", "sparse_mla") and self._module_serves(part, decode):
            seconds = self._module(part, decode).seconds(context, batch)
        else:
            seconds = self._kernel_and_products(part, decode, batch, context)
        return seconds + self._more_queries(part, batch, context, queries)

    def _module_serves(self, part: AttentionLayers, decode: bool) -> bool:
        """Whether the whole block is measured, and its kernels were: where few tokens take it over ``_BLOCK`` times as
        long as its kernel and products its host was timed."""
        module = self._module(part, decode)
        if not module.measured or part.kind != "mla":
            return module.measured
        if (part, decode) not in self._serves:
            one, few = np.array(1.0), np.array(_FEW_TOKENS)
            limit = _BLOCK * self._kernel_and_products(part, decode, one, few)
            self._serves[part, decode] = bool(module.seconds(few, one) <= limit)
        return self._serves[part, decode]

    def _more_queries(self, part: AttentionLayers, batch: Floats, context: Floats, queries: float) -> Floats:
        """What ``queries`` tokens per sequence take in decode more than one, which is what tables time: products of
        more tokens, and the kernel's work by the roofline, since the cache is read once."""
        if queries == 1.0:
            return np.zeros_like(batch)
        costs, bare = self._kernels(part, True), self._bare(part, True)
        products = costs.projections(batch * queries).value.sum(-1) - costs.projections(batch).value.sum(-1)
        extra = bare.work(batch, context, queries) - bare.work(batch, context)
        seconds: Floats = np.maximum(0.0, products) + extra
        return seconds

    def _module(self, part: AttentionLayers, decode: bool) -> FastestTable:
        s = self.setup
        names = {
            "kind": part.kind,
            "phase": "decode" if decode else "prefill",
            "scope": "module",
            "heads": max(1, part.spec.num_heads // s.tp),
            "head_dim": part.spec.head_dim,
            "dtype": ["bf16", "fp8_block"],
            "kv_dtype": s.kv_dtype,
            "gemm_dtype": _GEMM_TABLE[s.attention_dtype],
        }
        law = self._attention_law(part, decode)
        own = ({"backend": s.backend},) if part.kind == "mla" else None  # else kernel and products are the framework's
        return self._tables.table("attention", ("context_tokens", "batch"), names, law, own)

    def _kernels(self, part: AttentionLayers, decode: bool) -> AttentionCosts:
        s = self.setup
        dense = self._tables.dense(s.attention_dtype)
        return self._tables.cached(
            ("attention", s.backend, s.model.name, s.tp, decode, s.kv_dtype, s.attention_dtype, part.window),
            lambda: AttentionCosts(
                part.spec,
                s.model.hidden_size,
                s.accelerator,
                decode,
                dense,
                s.kv_dtype,
                self._tables.profile,
                s.tp,
                s.backend,
                part.window,
            ),
        )

    def _bare(self, part: AttentionLayers, decode: bool) -> AttentionCosts:
        """Attention by the roofline alone."""
        return AttentionCosts(
            part.spec,
            self.setup.model.hidden_size,
            self.setup.accelerator,
            decode,
            DenseCosts(self.setup.accelerator, self.setup.attention_dtype),
            self.setup.kv_dtype,
            tp=self.setup.tp,
        )

    def _attention_law(self, part: AttentionLayers, decode: bool) -> Any:
        bare = self._bare(part, decode)

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
            seconds = seconds + self._tables.dense(self.setup.attention_dtype).product(
                tokens, width, self.setup.model.hidden_size
            ).value
        inputs = 2 + (part.spec.q_lora_rank is not None)  # of the first products, of the second query one, of the last
        return seconds + inputs * self._scaling(self.setup.attention_dtype, tokens, self.setup.model.hidden_size)

    def _gated_delta(
        self, part: AttentionLayers, decode: bool, batch: Floats, context: Floats, queries: float
    ) -> Floats:
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
        kernels = self._tables.kernels("attention", **names)
        for part_of in ("conv1d", recurrence):
            mine = {"kernel": [kernel for kernel in kernels if part_of in kernel] or [part_of]}
            costs = self._tables.table("attention", ("context_tokens", "batch"), names | mine, law)
            if costs.measured or part_of == recurrence:
                # The state after every drafted token is kept, so that it can be taken back.
                total = total + (queries if decode else 1.0) * costs.seconds(length, batch)
        tokens = batch * queries if decode else batch * context
        width = (2 * a.num_kv_heads + 2 * a.num_heads) * a.head_dim / s.tp
        dense = self._tables.dense(s.attention_dtype)
        products = dense.product(
            np.asarray(tokens, float)[..., None],
            np.array([width, s.model.hidden_size]),
            np.array([s.model.hidden_size, a.num_heads * a.head_dim / s.tp]),
        )
        scaling = 2 * self._scaling(s.attention_dtype, np.asarray(tokens, float), s.model.hidden_size)
        seconds: Floats = total + products.value.sum(-1) + scaling
        return seconds

    def _scaling(self, dtype: Dtype, tokens: Floats, width: float) -> Floats:
        """Seconds of bringing ``tokens`` of ``width`` from 16 bits to ``dtype`` before a product."""
        if DTYPE_BYTES[dtype] > 1 or (dtype == "fp4" and self.setup.backend == "trtllm"):
            return np.zeros_like(tokens)
        bandwidth = roofline.MEMORY_EFFICIENCY * self.setup.accelerator.memory_bandwidth
        seconds: Floats = np.maximum(_SCALING_S, tokens * width * (2 + DTYPE_BYTES[dtype]) / bandwidth)
        return seconds

    def _ffn(self, tokens: Floats, inter: float) -> Floats:
        """Seconds of a feed-forward block of width ``inter`` that every token takes."""
        s, m = self.setup, self.setup.model
        products = self._tables.dense(s.dense_dtype).ffn(tokens, m.hidden_size, inter / s.tp, m.gated_ffn)
        seconds: Floats = products.value.sum(-1)
        for width in (m.hidden_size, inter / s.tp):
            seconds = seconds + self._scaling(s.dense_dtype, tokens, width)
        return seconds

    # ------------------------------------------------------------------ experts

    def _experts(self, tokens: Floats, phase: Phase) -> Floats:
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
            "hidden": m.routed_hidden_size,
            "inter": m.expert_intermediate_size,
            "num_experts": m.num_experts,
            "top_k": m.top_k,
            "ep": s.ep,
            "tp": s.expert_tp,
            "distribution": s.distribution,
            "scope": "experts",
            "num_slots": [0, m.num_experts],
        }
        # Frameworks take these kernels from the same libraries: the one asked for, else the fastest of all measured.
        choices: tuple[dict[str, Any], ...] = tuple({"dtype": dtype} for dtype in table_dtypes(s.expert_dtype))
        # CUTLASS' 4-bit rows are left out: B200's take twice GB200's at the same points.
        parts = _LIBRARIES.get(s.expert_kernels)
        kernels = self._tables.kernels("experts", hidden=m.routed_hidden_size, num_experts=m.num_experts)
        names["kernel"] = kernels = of_phase(kernels, phase, sent=s.dp > 1 and s.exchange != "gathered")
        if parts and (s.expert_kernels, s.expert_dtype) != ("cutlass", "fp4"):
            asked = [kernel for kernel in kernels if any(part in kernel for part in parts)]
            choices = tuple(choice | {"kernel": asked} for choice in choices) + choices
        return self._tables.table("experts", ("tokens",), names, law, choices).seconds(tokens)

    # ------------------------------------------------------------------ a pass

    def _pass(
        self, decode: bool, batch: Any, context: Any, busy: Any, tokens_per_sequence: float = 1.0
    ) -> tuple[Floats, Floats]:
        """Seconds of all layers, and of the head."""
        s, m = self.setup, self.setup.model
        batch, context, busy = np.broadcast_arrays(*(np.asarray(x, float) for x in (batch, context, busy)))
        tokens = batch * (tokens_per_sequence if decode else context)  # per attention group
        attention = np.zeros(batch.shape)
        for part in self._layers:
            attention = attention + part.count * self._attention(part, decode, batch, context, tokens_per_sequence)
        plain = self._tables.dense("bf16")
        reduce = self._links.all_reduce(tokens)
        every = tokens * busy
        router = plain.product(tokens, m.num_experts, m.hidden_size).value
        moe = self._links.exchange(every, decode) + self._experts(every, "decode" if decode else "prefill") + router
        if (latent := m.expert_hidden_size) is not None:
            ways = ((latent, m.hidden_size), (m.hidden_size, latent))
            moe = moe + sum(self._tables.dense(s.dense_dtype).product(tokens, *way).value for way in ways)
        if m.shared_intermediate_size:
            moe = moe + self._ffn(tokens, m.shared_intermediate_size)
        num_dense = m.num_layers - m.num_moe_layers
        block = np.zeros(batch.shape)
        if num_dense and m.dense_intermediate_size:
            block = num_dense * (self._ffn(tokens, m.dense_intermediate_size) + reduce)
        head = plain.product(tokens if decode else batch, m.vocab_size / s.tp, m.hidden_size).value
        layers: Floats = attention + m.num_layers * reduce + m.num_moe_layers * moe + block
        return layers, head

    def decode_s(self, batch: Any, context: Any) -> Floats:
        """Seconds of one decode step of ``batch`` sequences per attention group over ``context`` cached tokens.

        With drafts a step checks ``1 + draft_tokens`` tokens per sequence and then drafts anew, each draft with one
        more layer and the head (DeepSeek-V3, arXiv 2412.19437, section 2.2).
        """
        drafts = self.setup.draft_tokens
        layers, head = self._pass(True, batch, context, self.setup.dp, 1.0 + drafts)
        step = layers + head
        if drafts:
            layers, head = self._pass(True, batch, context, self.setup.dp)
            step = step + drafts * (layers / self.setup.model.num_layers + head)
        return step

    def prefill_s(self, prompts: Any, length: Any) -> Floats:
        """Seconds of a prefill of ``prompts`` of ``length`` tokens over the worker, spread over attention groups."""
        prompts = np.asarray(prompts, float)
        busy = np.minimum(prompts, self.setup.dp)
        layers, head = self._pass(False, np.ceil(prompts / self.setup.dp), length, busy)
        return layers + head
