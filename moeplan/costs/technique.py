"""How a step runs: degrees of parallelism, dispatch, overlap, types beside the experts', framework."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moeplan.errors import SpecError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import Dtype, ModelSpec
from moeplan.specs.workload import DispatchKind

__all__ = ["Overlap", "Technique", "expert_groups", "reduces_in_place"]

Overlap = Literal["none", "shared_expert", "two_batch", "shortcut"]


@dataclass(frozen=True, slots=True)
class Technique:
    """How a step runs. ``tp`` splits attention and dense parts, ``cp`` the sequence of a prefill, ``dcp`` (of the
    ``tp`` ranks) the KV cache by tokens (both: :mod:`moeplan.costs.context_parallel`), ``expert_tp`` each expert over
    so many consecutive ranks of a node: a placement gives them the same experts, tokens go to all of them and their
    parts are added on return. With ``per_expert`` dispatch, a plain all-to-all, a token goes to one of them, the one
    with its own rank's place; they gather what each of them got and scatter their summed results, as Megatron-Core's
    ``MoEAlltoAllTokenDispatcher`` does (its ``MoEFlexTokenDispatcher``, over DeepEP, sends to all).
    ``launches_per_layer`` times the profile's launch latency is host overhead.
    ``backend``: the framework whose kernels run, None: the fastest of all measured. ``dense_dtype``: of attention and
    dense weights, where it is not the usual one beside experts of the workload's.

    ``draft_tokens`` of every decoding sequence are checked beside its newest token, and as many drafted anew by a
    prediction layer.

    Ranks that split attention all-reduce its result, or scatter it, send tokens on from where they then are, and gather
    them again after the experts: the same bytes (but see :func:`reduces_in_place`).
    """

    dispatch: DispatchKind = "per_node"
    overlap: Overlap = "none"
    tp: int = 1
    expert_tp: int = 1
    cp: int = 1
    dcp: int = 1
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    launches_per_layer: int = 0
    backend: str | None = None
    dense_dtype: Dtype | None = None
    draft_tokens: int = 0

    @property
    def gathers(self) -> bool:
        """Whether ranks that split experts gather tokens which came to one of them."""
        return self.expert_tp > 1 and self.dispatch == "per_expert"


def expert_groups(model: ModelSpec, cluster: ClusterSpec, expert_tp: int, where: str) -> ClusterSpec:
    """``cluster`` as a placement sees it: ``expert_tp`` neighbours that split experts are one rank, none special.

    Raises:
        SpecError: they do not split a node, or an expert, evenly; ``where`` names the field.
    """
    if expert_tp == 1:
        return cluster
    for whose, number in (
        ("ranks of a node in a stage", cluster.ranks_per_node),
        (f"expert_intermediate_size of {model.name}", model.expert_intermediate_size),
    ):
        if number % expert_tp:
            raise SpecError(f"{where} ({expert_tp}) does not divide the {whose} ({number}); choose a divisor")
    per_node, nics = cluster.ranks_per_node // expert_tp, cluster.nics_per_node
    sizes = {"ranks_per_node": per_node, "nics_per_node": nics and math.gcd(nics, per_node)}
    return cluster.model_copy(update={**sizes, "ranks": {}})


def reduces_in_place(dispatch: DispatchKind, tp: int, cluster: ClusterSpec) -> bool:
    """Whether tokens are on every rank already: all split attention together, experts take every token, and their
    results are all-reduced where they are, as engines do without data-parallel attention."""
    return dispatch == "allgather" and tp == cluster.num_ranks
