"""How a step runs: degrees of parallelism, dispatch, overlap, types beside the experts', framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import Dtype
from moeplan.specs.workload import DispatchKind

__all__ = ["Overlap", "Technique", "reduces_in_place"]

Overlap = Literal["none", "shared_expert", "two_batch", "shortcut"]


@dataclass(frozen=True, slots=True)
class Technique:
    """How a step runs. ``tp`` splits attention and dense parts, ``cp`` the sequence of a prefill, ``expert_tp`` each
    expert over so many consecutive ranks of a node: a placement gives them the same experts, tokens go to all of them
    and their parts are added on return. ``launches_per_layer`` times the profile's launch latency is host overhead.
    ``backend``: the framework whose kernels run, None: the fastest of all measured. ``dense_dtype``: of attention and
    dense weights, where it is not the usual one beside experts of the workload's.

    Ranks that split attention all-reduce its result, or scatter it, send tokens on from where they then are, and gather
    them again after the experts: the same bytes (but see :func:`reduces_in_place`).
    """

    dispatch: DispatchKind = "per_node"
    overlap: Overlap = "none"
    tp: int = 1
    expert_tp: int = 1
    cp: int = 1
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    launches_per_layer: int = 0
    backend: str | None = None
    dense_dtype: Dtype | None = None


def reduces_in_place(dispatch: DispatchKind, tp: int, cluster: ClusterSpec) -> bool:
    """Whether tokens are on every rank already: all split attention together, experts take every token, and their
    results are all-reduced where they are, as engines do without data-parallel attention."""
    return dispatch == "allgather" and tp == cluster.num_ranks
