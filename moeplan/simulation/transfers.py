"""Caches on their way from prefill to decode instances."""

from __future__ import annotations

from collections.abc import Sequence

from moeplan.artifacts.event_log import EventRecorder
from moeplan.costs.kv_cache import kv_transfer_s
from moeplan.simulation.clock import nanoseconds
from moeplan.simulation.instance import Instance
from moeplan.simulation.pools import Pool
from moeplan.simulation.request import Request

__all__ = ["Transfers"]


class Transfers:
    """Between a prefill and a decode pool. ``total_bytes`` so far."""

    def __init__(self, pools: Sequence[Pool], recorder: EventRecorder | None) -> None:
        self._pools, self._recorder, self.total_bytes = pools, recorder, 0.0
        self._free_ns: dict[tuple[Instance, int], int] = {}  # links of a group

    def arrives_ns(self, request: Request, target: Instance, now_ns: int) -> int:
        """When a cache that is fetched now is there: out over the one group's links, in over the other's."""
        first, second, kept = *self._pools, request.kept
        assert kept is not None  # a cache is there to be fetched
        start, sent = self._crossed_ns(first, kept.instance, kept.group, kept.tokens, now_ns)
        _, received = self._crossed_ns(second, target, request.group, kept.tokens, start)
        end = max(sent, received)
        whole = kept.tokens * first.group_bytes
        self.total_bytes += whole
        kept.instance.stats.transferred_bytes += whole
        if self._recorder is not None:
            rank, seconds = kept.instance.first_rank + kept.group * first.engine.group_ranks, (end - start) * 1e-9
            self._recorder.add("transfer", start * 1e-9, seconds, rank=rank, request=request.number, amount=whole)
        return end

    def _crossed_ns(self, pool: Pool, instance: Instance, d: int, tokens: int, ready_ns: int) -> tuple[int, int]:
        """When a cache begins to cross the links of a group's ranks, and is through: they carry one after the other, at
        the pace of the slowest. Of ranks that keep the same because a prompt was cut among them each sends its part, as
        in SGLang."""
        engine, link = pool.engine, self._pools[0]
        members, size = range(d * engine.group_ranks, (d + 1) * engine.group_ranks), tokens * pool.kv_bytes / engine.pcp
        slowest = min(costs.cluster.rank(r).link_speed for costs, _ in instance.stages for r in members)
        seconds = kv_transfer_s(size, link.link_bytes_per_s * slowest, link.link_latency_s)
        start = max(ready_ns, self._free_ns.get((instance, d), 0))
        end = self._free_ns[instance, d] = start + nanoseconds(seconds)
        return start, end
