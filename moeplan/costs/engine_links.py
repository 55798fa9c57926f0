"""What ranks of one worker of a serving engine send each other: sums over attention groups, tokens to experts and back.

Tokens of data-parallel attention reach their experts in one of two ways: *gathered*, every token to every rank and
partial sums back, or *sent*, each token only to the ranks of its experts by an all-to-all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.costs import roofline
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.engine_tables import EngineSetup, EngineTables
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.model import Dtype

__all__ = ["EngineLinks"]

Floats = NDArray[np.float64]

_NODE = 8
_EXCHANGE_DTYPES: dict[str, tuple[str, ...]] = {"fp4": ("nvfp4",), "bf16": ("nvfp4",)}  # low-precision combine


class EngineLinks:
    """Collectives and exchanges of one :class:`EngineSetup`, ``T`` tokens to an array of seconds of their shape."""

    def __init__(self, tables: EngineTables) -> None:
        self._tables, self._setup = tables, tables.setup

    def all_reduce(self, tokens: Floats) -> Floats:
        """Seconds of adding up ``tokens`` of an attention group over its ranks."""
        s = self._setup
        if s.tp == 1:
            return np.zeros_like(tokens)
        return self._collective("all_reduce", s.tp, tokens * s.model.hidden_size * 2)

    def _collective(self, op: str, ranks: int, size: Floats) -> Floats:
        s = self._setup
        costs = self._tables.cached(
            ("links", s.backend, s.accelerator.name, s.ranks),
            lambda: CollectiveCosts(_cluster(s), self._tables.profile, s.backend),
        )
        return costs.seconds(op, ranks, size).value.reshape(np.shape(size))

    def exchange(self, every: Floats, decode: bool) -> Floats:
        """Seconds of dispatch and combine of ``every`` token; sums are reduced without data-parallel attention."""
        s = self._setup
        if s.dp == 1:
            return self.all_reduce(every)
        if s.exchange in ("sent", "sent_normal"):
            return self._sent(every / s.ranks, decode and s.exchange == "sent")
        hidden = s.model.routed_hidden_size
        there = self._collective("all_gather", s.ranks, every * roofline.token_bytes(hidden, s.gather_dtype))
        gathered = there + self._collective("reduce_scatter", s.ranks, every * roofline.token_bytes(hidden, "bf16"))
        return gathered if s.exchange == "gathered" else np.minimum(gathered, self._sent(every / s.ranks, decode))

    def _sent(self, per_rank: Floats, decode: bool) -> Floats:
        """All-to-all of ``per_rank`` tokens: over NVLink between all ranks of a rack, else DeepEP."""
        s = self._setup
        rack = s.ranks <= s.accelerator.scale_up_domain and s.accelerator.scale_up_domain > _NODE
        dtype = s.expert_dtype
        parts: tuple[tuple[str, Dtype], ...] = (("prepare", dtype), ("dispatch", dtype), ("combine", "bf16"))
        if not rack:
            return self._message("low_latency" if decode else "normal", parts[1:], per_rank)
        two = self._message("nvlink_two_sided", parts, per_rank)
        if dtype != "fp4":
            return two
        return np.minimum(two, self._message("nvlink_one_sided", parts[1:], per_rank))

    def _message(self, mode: str, parts: tuple[tuple[str, Dtype], ...], per_rank: Floats) -> Floats:
        """Sum of the phases of one kind of all-to-all, at the nearest measured number of ranks above, else below.

        Rows of the model's width and top-k serve whatever the number of experts.
        """
        s, m, a = self._setup, self._setup.model, self._setup.accelerator
        bandwidth = a.scale_up_bandwidth if s.ranks <= a.scale_up_domain else a.nic_bandwidth
        total = np.zeros_like(per_rank)
        for phase, dtype in parts:
            names: dict[str, Any] = {"mode": mode, "phase": phase, "hidden": m.routed_hidden_size, "top_k": m.top_k}
            ranks = self._ranks(names)
            size = next((r for r in ranks if r >= s.ranks), ranks[-1] if ranks else s.ranks)
            wire = 0.0 if phase == "prepare" else roofline.token_bytes(m.routed_hidden_size, dtype)
            copies = min(s.ranks, m.top_k) * wire

            def law(coords: Floats, copies: float = copies) -> Floats:
                seconds: Floats = 1e-5 + coords[:, 0] * copies / bandwidth
                return seconds

            tries: tuple[dict[str, Any], ...] = ({"dtype": [dtype, *_EXCHANGE_DTYPES.get(dtype, ())]}, {})
            table = self._tables.table("alltoall", ("tokens_per_rank",), names | {"ranks": size}, law, tries)
            total = total + table.seconds(per_rank)
        return total

    def _ranks(self, names: dict[str, Any]) -> list[int]:
        """Numbers of ranks that an all-to-all was measured on."""
        tables = self._tables

        def make() -> list[int]:
            return sorted(set(tables.profile.select("alltoall", **names)["ranks"].to_pylist()))

        return tables.cached(("ranks", *names.values()), make)


def _cluster(setup: EngineSetup) -> ClusterSpec:
    """The worker's ranks, in boxes as the accelerator comes in; a rack is one."""
    domain = max(setup.accelerator.scale_up_domain, setup.accelerator.ranks_per_node)
    nodes = -(-setup.ranks // domain)
    return cluster_for(setup.accelerator, nodes, min(setup.ranks, domain), "two-level")
