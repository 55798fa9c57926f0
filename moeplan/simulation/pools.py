"""Pools of equal engine instances, and what plans anew for them. ``L`` layers, ``E`` experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.costs.run_traffic import Wire
from moeplan.errors import InfeasibleError, SpecError
from moeplan.simulation.expert_loads import ExpertLoads
from moeplan.simulation.step_costs import StepCosts
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.serving import EngineSpec

__all__ = ["Pool", "Replan", "Replanned", "Role", "require_room"]

Floats = NDArray[np.float64]
Role = Literal["both", "prefill", "decode"]


@dataclass(frozen=True, slots=True, eq=False)
class Replanned:
    """A new placement: layers in the order to move them, seconds and bytes of each, and tokens of KV cache left."""

    placement: Placement
    order: tuple[int, ...]
    seconds_L: Floats
    bytes_L: Floats
    capacity_tokens: int


class Replan(Protocol):
    """Plans again, for a load ``[L, E]`` on a cluster, from the placement in use."""

    def __call__(self, load_LE: Floats, cluster: ClusterSpec, current: Placement, planner: str | None) -> Replanned:
        """Place anew; ``planner`` None: the one for faults."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Equal instances. ``cluster`` is that of one pipeline stage; ``kv_bytes`` per token on one rank, of the stage that
    keeps most, ``cache_bytes`` on all ``tp pp`` ranks, 0: as much on each; ``link`` of a prefill pool: out of one of
    its ranks and into one of the decode pool; ``replan`` plans anew for these instances; ``wire``: how tokens travel,
    left out: not followed; ``num_nodes`` of an instance, 0: those of its stages."""

    role: Role
    instances: int
    engine: EngineSpec
    cluster: ClusterSpec
    placement: Placement
    loads: ExpertLoads
    costs: Callable[[ClusterSpec], StepCosts]
    capacity_tokens: int
    kv_bytes: float
    link_bytes_per_s: float = 0.0
    link_latency_s: float = 0.0
    replan: Replan | None = None
    wire: Wire | None = None
    num_nodes: int = 0
    cache_bytes: float = 0.0

    @property
    def group_bytes(self) -> float:
        """Bytes of a token in the caches of a group's ranks together; copies that ``pcp`` makes count once."""
        return self.cache_bytes or self.kv_bytes * self.engine.tp * self.engine.pp


def require_room(pool: Pool, trace: RequestTrace, first: bool) -> None:
    """Every request fits a group's cache and, in the ``first`` pool where it does not cut prompts, a step.

    All of its tokens count, though nothing is kept of the last one: a sequence of vLLM's ``max_model_len`` must
    fit its cache, and SGLang's ``max_req_len`` is a token below its own.

    Raises:
        InfeasibleError: one does not fit the cache. SpecError: nor a step, or the recording's prefixes not the blocks.
    """
    engine = pool.engine
    answers = trace.output_tokens_Q if pool.role != "prefill" else np.ones(1, np.int64)
    tokens = trace.input_tokens_Q + answers
    block = engine.block_tokens
    blocks = pool.capacity_tokens // block
    if -(-int(tokens.max()) // block) > blocks:
        q = int(tokens.argmax())
        raise InfeasibleError(
            f"request {q} has {int(tokens[q])} tokens, prompt and answer, which is"
            f" {int(tokens[q]) - blocks * block} more than the KV cache of a group holds"
            f" ({blocks * block}); use more ranks, a smaller weight_dtype or kv_dtype, or a higher"
            " engine.memory_fraction"
        )
    longest = int(trace.input_tokens_Q.max())
    if first and not engine.chunked_prefill and longest > engine.max_num_batched_tokens:
        raise SpecError(
            f"engine.max_num_batched_tokens ({engine.max_num_batched_tokens}) is less than the longest prompt"
            f" ({longest}) and chunked_prefill is off; raise the one or turn on the other"
        )
    if engine.prefix_caching and trace.prefix_tokens % block:
        times = f" times engine.dcp ({engine.dcp})" if engine.dcp > 1 else ""
        raise SpecError(
            f"engine.block_size ({engine.block_size}){times} does not divide the recording's prefix blocks"
            f" ({trace.prefix_tokens} tokens); choose a divisor"
        )
