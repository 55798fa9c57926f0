"""Seconds of a step that no placement changes: attention, router, shared expert, norms, dense layers, head.

``H`` hidden, ``b`` tokens per rank, ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.attention import attention_by_window
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.context_parallel import PartialAttention
from moeplan.costs.dense import DenseCosts
from moeplan.costs.elementwise import PassCosts
from moeplan.costs.tables import Seconds
from moeplan.costs.technique import Technique, reduces_in_place
from moeplan.costs.work import Work
from moeplan.errors import InputError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, ModelSpec, dense_beside
from moeplan.specs.workload import Workload

__all__ = ["FixedCosts", "fixed_costs"]


@dataclass(frozen=True, slots=True)
class FixedCosts:
    """``layer``: attention, router, norms, permutation and host overhead of one MoE layer, ``routing_s`` the part of
    router, permutation and latent projections, which dense layers lack; ``shared``: its shared experts; ``other``:
    dense layers, embedding and head of the whole step. ``kernel_s`` is the attention kernel's part of ``layer``, which
    depends on the context, ``partial`` what ranks that keep a cache together (``dcp``) exchange around it; ``other``
    holds both ``other_kernels`` times. ``reduce``: an all-reduce over the ranks that split attention; ``layer`` holds
    it once, dense layers twice, ``shared`` once where its tokens are gathered. ``draft``: embedding, two norms and the
    projection of both to one hidden state, which a pass of a prediction layer takes beside one MoE layer and the
    ``head``; with the dense block of one without experts; both are nothing where no drafts are made."""

    layer: Work
    routing_s: float
    shared: Work
    other: Work
    kernel_s: float
    partial: Work
    other_kernels: int
    reduce: Work
    draft: Work
    head: Work
    relative_error: float
    source: Mapping[str, str]
    extrapolated: bool


_OF_EXPERTS = ("router and permutation", "latent projections")  # parts that dense layers lack


def _launch_s(profile: HardwareProfile | None) -> float:
    latency_us = profile.meta.system.get("launch_latency_us") if profile else None
    if latency_us is None:
        name = profile.meta.name if profile else "none"
        raise InputError(
            f"launches_per_layer times the launch latency is asked for, but profile ({name}) has no launch_latency_us;"
            " measure it (moeplan profile system --out DIR), or leave launches_per_layer out"
        )
    return float(latency_us) * 1e-6


def fixed_costs(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    batch: int,
    profile: HardwareProfile | None = None,
    how: Technique | None = None,
) -> FixedCosts:
    """Costs at ``batch`` tokens per rank.

    With tensor parallelism ``tp`` ranks work on their ``tp x batch`` tokens together, each on its share, and
    all-reduce the results of attention, of dense blocks and of the embedding; logits are gathered. Shared experts are
    split as well, so tokens that are sent to routed ones rank by rank (:class:`Technique`) are gathered for them and
    their results scattered, as Megatron-Core does. Norms and the router see a rank's own tokens; all of them where
    experts' results are all-reduced in place. Keys and values that ranks of one sequence (``cp``) gather are not among
    them: those ranks need not be of this cluster alone (:mod:`moeplan.costs.training`).

    Raises:
        InputError: ``launches_per_layer`` is given and the profile has no launch latency.
    """
    how = how or Technique()
    tp, cp, kv_dtype, backend = how.tp, how.cp, how.kv_dtype, how.backend
    device, hidden = cluster.accelerator, model.hidden_size
    dense = DenseCosts(device, how.dense_dtype or dense_beside(workload.weight_dtype), profile, backend)
    shape = model.num_experts, model.top_k, profile
    passes = PassCosts(device, dense.activations, hidden, *shape)
    routed = PassCosts(device, dense.activations, model.routed_hidden_size, *shape)
    wide = DTYPE_BYTES[dense.activations]
    links = CollectiveCosts(cluster, profile, backend)
    tokens = batch * tp
    decode = workload.phase == "decode"
    kernel_s = 0.0
    parts: dict[str, list[Seconds]] = {"attention": [], "norms": [], "router and permutation": [], "links": []}
    if model.attention is not None:
        sorts = attention_by_window(model, device, decode, dense, kv_dtype, profile, tp, backend, dcp=how.dcp)
        # Prefill: sequences of `context` tokens, cut among cp ranks.
        length = workload.context if decode else min(workload.context, tokens * cp)
        sequences = tokens if decode else max(1.0, tokens * cp / length)
        for share, attention in sorts:  # of the mean layer
            kernel = attention.kernel(sequences, length)
            value = kernel.value * share / (1 if decode else cp)
            parts["attention"].append(Seconds(value, kernel.relative_error, kernel.source, kernel.extrapolated))
        kernel_s = sum(kernel.total for kernel in parts["attention"])
        parts["attention"].append(sorts[0][1].projections(tokens))
        if how.dcp > 1:
            among = PartialAttention(model, cluster, dense.activations, profile, how)
            parts["context parallelism"] = among.merged(tokens) if decode else among.chunk(among.sent_of(0, tokens))
    own = tokens if reduces_in_place(how.dispatch, tp, cluster) else tokens / tp
    parts["norms"] += 2 * [passes.seconds("norm", own)]
    parts["router and permutation"] += [
        dense.product(own, model.num_experts, hidden),
        passes.seconds("router", own),
        *(routed.seconds(op, tokens / tp * how.expert_tp) for op in ("permute", "unpermute")),
    ]
    if (latent := model.expert_hidden_size) is not None:
        parts["latent projections"] = [dense.product(own, latent, hidden), dense.product(own, hidden, latent)]
    reduced = links.seconds("all_reduce", tp, tokens * hidden * wide)
    if tp > 1:
        parts["links"].append(reduced)
    host = how.launches_per_layer * _launch_s(profile) if how.launches_per_layer else 0.0
    layer = Work.of(s for part in parts.values() for s in part) + Work(host, host)
    routing = sum(s.total for name in _OF_EXPERTS for s in parts.get(name, ()))
    shared: list[Seconds] = []
    if model.shared_intermediate_size:
        shared.append(dense.ffn(tokens, hidden, model.shared_intermediate_size / tp, model.gated_ffn))
        if tp > 1 and how.dispatch != "allgather":
            shared.append(reduced)
    ends = tokens if decode else max(1.0, tokens / workload.context)  # the head sees each sequence's last token
    head, embedding = [dense.product(ends, model.vocab_size / tp, hidden)], [passes.seconds("embedding", batch)]
    if tp > 1:  # of a vocabulary that is split
        embedding.append(reduced)
        head.append(links.seconds("all_gather", tp, ends * model.vocab_size * wide))
    others = [head[0], *embedding, *head[1:]]
    num_dense = model.num_layers - model.num_moe_layers
    other = Work.of(others)
    draft: list[Seconds] = []
    if how.draft_tokens:  # the projection is whole on every rank, as SGLang and vLLM hold it
        draft = [*embedding, *2 * [passes.seconds("norm", own)], dense.product(own, hidden, 2 * hidden)]
        if width := model.prediction_intermediate_size:
            draft += [dense.ffn(tokens, hidden, width / tp, model.gated_ffn), reduced]
    other_kernels = num_dense if model.dense_intermediate_size else 0
    if other_kernels:
        block = dense.ffn(tokens, hidden, model.dense_intermediate_size / tp, model.gated_ffn)
        other += (Work.of((block, reduced)) + layer + Work(-routing)) * num_dense
        others.append(block)
    every = [s for part in parts.values() for s in part] + shared + others
    total = sum(s.total for s in every)
    source = {name: "; ".join(sorted({s.source for s in part})) for name, part in parts.items() if part}
    source |= {"shared experts": shared[0].source} if shared else {}
    source |= {"attention": "not predicted: the model's attention is not known"} if model.attention is None else {}
    return FixedCosts(
        layer=layer,
        routing_s=routing,
        shared=Work.of(shared),
        other=other,
        kernel_s=kernel_s,
        partial=Work.of(parts.get("context parallelism", ())),
        other_kernels=other_kernels,
        reduce=Work.of([reduced]),
        draft=Work.of(draft),
        head=Work.of(head if how.draft_tokens else ()),
        relative_error=sum(s.total * s.relative_error for s in every) / total if total else 0.0,
        source=source,
        extrapolated=any(s.extrapolated and s.total > 0.05 * total for s in every),
    )
