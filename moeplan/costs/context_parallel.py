"""What context parallelism sends.

In decode (DCP) ``dcp`` of the ranks that split attention keep one KV cache together, token by token in turn, and each
attends with the heads of all of them to its own part. As vLLM does (``vllm/v1/attention/backends/flash_attn.py``,
``_forward_with_dcp``; MLA in ``vllm/model_executor/layers/attention/mla_attention.py``; ``dcp_comm_backend: ag_rs``,
its default), for every query

- queries of the ranks' heads are gathered, for latent attention after the product into the latent;
- log-sum-exps of the partial outputs are gathered in fp32, outputs rescaled by them and reduce-scattered over heads.

SGLang exchanges partial outputs and log-sum-exps in one all-to-all instead (``--dcp-comm-backend a2a``).

A prompt's queries go the same way under grouped-query attention, whose chunks attend to the cache as decodes do. Under
latent attention its own tokens need nothing from others: their keys are computed on every rank; what of the context is
in the cache already is gathered before each chunk (vLLM, ``_context_parallel_compute_prefill_context``; SGLang,
``all_gather_kv_cache_for_mla_extend``).

In prefill ``cp`` times as many ranks take a prompt's tokens in pieces that are alike in work, and gather its keys and
values, of which each keeps the whole cache (SGLang's prefill CP, ``--attn-cp-size``; vLLM,
``docs/serving/context_parallel_deployment.md``: partial query, full key and value).
"""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.elementwise import PassCosts
from moeplan.costs.tables import Seconds
from moeplan.costs.technique import Technique
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, cache_beside

__all__ = ["GatheredKeys", "PartialAttention"]

_LSE_BYTES = 4  # fp32


@dataclass(eq=False)
class _AmongRanks:
    """What ranks send each other for one layer's attention, which is known; ``how`` many says the technique."""

    model: ModelSpec
    cluster: ClusterSpec
    activations: Dtype
    profile: HardwareProfile | None
    how: Technique

    def __post_init__(self) -> None:
        self._links = CollectiveCosts(self.cluster, self.profile, self.how.backend)

    def sent_of(self, before: int, new: int) -> int:
        """Tokens that :meth:`chunk` takes of a chunk of ``new`` tokens after ``before`` in the cache."""
        return new

    def chunk(self, tokens: float) -> list[Seconds]:
        """Exchanges of a prompt's chunk."""
        raise NotImplementedError


class PartialAttention(_AmongRanks):
    """Exchanges among ``dcp`` ranks; nothing where that is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        attention, how = self.model.attention, self.how
        assert attention is not None
        self._ranks, self._latent = how.dcp, attention.is_mla
        self._heads = attention.num_heads * how.dcp / how.tp  # of the ranks that share a cache
        query_dim, value_dim = attention.head_dim, attention.kv_lora_rank or attention.head_dim
        if attention.is_mla:
            query_dim = attention.kv_elements_per_token
        wide, cache = DTYPE_BYTES[self.activations], DTYPE_BYTES[cache_beside(self.activations, how.kv_dtype)]
        self._query_bytes, self._output_bytes = self._heads * query_dim * wide, self._heads * value_dim * wide
        self._cached_bytes = attention.kv_elements_per_token * cache
        shape = int(self._heads * value_dim), self.model.num_experts, self.model.top_k
        self._rescale = PassCosts(self.cluster.accelerator, self.activations, *shape, self.profile)

    def merged(self, tokens: float) -> list[Seconds]:
        """Queries of ``tokens`` to all ranks that hold a part of their context, and the outputs back."""
        if self._ranks == 1:
            return []
        links, ranks = self._links, self._ranks
        return [
            links.seconds("all_gather", ranks, tokens * self._query_bytes),
            links.seconds("all_gather", ranks, tokens * self._heads * _LSE_BYTES * ranks),
            self._rescale.seconds("norm", tokens),  # reads and writes every number once, as a norm does
            links.seconds("reduce_scatter", ranks, tokens * self._output_bytes),
        ]

    def sent_of(self, before: int, new: int) -> int:
        """As of all, but of a latent the tokens ``before``."""
        return before if self._latent else new

    def chunk(self, tokens: float) -> list[Seconds]:
        """Keys of ``tokens`` before a chunk, or its own ``tokens``: see the module."""
        if not self._latent:
            return self.merged(tokens)
        if self._ranks == 1 or not tokens:
            return []
        return [self._links.seconds("all_gather", self._ranks, tokens * self._cached_bytes)]


class GatheredKeys(_AmongRanks):
    """Keys and values to all ``cp`` ranks of a prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._key_bytes = (self.model.kv_bytes_per_token(self.activations, self.how.tp) or 0.0) / self.model.num_layers

    def chunk(self, tokens: float) -> list[Seconds]:
        """Those of a chunk's own ``tokens``."""
        return [self._links.seconds("all_gather", self.how.cp, tokens * self._key_bytes, self.how.tp)]
