"""What changes while a service runs: placements are planned anew, ranks break, slow down, and come back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moeplan.artifacts.event_log import EventRecorder
from moeplan.errors import InfeasibleError, SpecError
from moeplan.simulation.clock import Clock, Order, nanoseconds
from moeplan.simulation.expert_loads import Phase
from moeplan.simulation.instance import Instance
from moeplan.simulation.pools import Pool, Replan, Replanned
from moeplan.simulation.request import Request
from moeplan.specs.cluster import RankSpec
from moeplan.specs.serving import FaultSpec, RebalanceSpec, ServingSpec

__all__ = ["Changes"]


class Changes:
    """Processes of a service over the instances of each pool; ``submit`` takes a request that lost its group, and the
    pool that it goes to."""

    def __init__(
        self,
        spec: ServingSpec,
        clock: Clock,
        pools: Sequence[Pool],
        stages: Sequence[Sequence[Instance]],
        recorder: EventRecorder | None,
        submit: Callable[[Request, int], None],
        never_served: Callable[[], InfeasibleError],
    ) -> None:
        self.spec, self.clock, self.pools, self.stages = spec, clock, pools, stages
        self.recorder, self._submit, self._never_served = recorder, submit, never_served

    def start(self) -> None:
        """From now on."""
        for fault in self.spec.faults:
            self.clock.process(self._fault(fault))
        if self.spec.rebalance is not None:
            for pool, stage in zip(self.pools, self.stages, strict=True):
                for instance in stage:
                    self.clock.process(self._rebalance(self.spec.rebalance, instance, pool))

    def _planned(self, pool: Pool) -> Replan:
        if pool.replan is None:
            raise SpecError("re-balancing and lost ranks need a planner, and none was given")
        return pool.replan

    def _rebalance(self, spec: RebalanceSpec, instance: Instance, pool: Pool) -> Generator[Any, Any, None]:
        clock, replan = self.clock, self._planned(pool)
        phase: Phase = "prefill" if pool.role == "prefill" else "decode"
        for turn in range(1, 10**9):
            yield clock.at(nanoseconds(spec.interval * turn), Order.REBALANCE)
            if clock.pending < sum(pool.instances for pool in self.pools):  # nothing but re-balancing is to come
                raise self._never_served()
            if instance.moves or int(clock.now) < instance.blocked_until_ns:
                continue  # the last one is not in place yet
            now, before = clock.now_s, instance.placement
            load_LE = instance.loads.over(max(0.0, now - spec.window), now, phase)
            found = replan(load_LE, instance.costs.cluster, before, spec.planner)
            if self.recorder is not None:
                self.recorder.add("plan", now, spec.delay, rank=instance.first_rank)
            if spec.delay:
                yield clock.at(int(clock.now) + nanoseconds(spec.delay), Order.REBALANCE)
            if instance.placement is before:  # else a rank was lost or came back meanwhile: the plan is of other ranks
                self._apply(instance, found, bulk=spec.apply == "bulk")

    def _apply(self, instance: Instance, found: Replanned, bulk: bool) -> None:
        if bulk:
            self._put(instance, found, range(instance.spec.pp))
            instance.stall(float(found.seconds_L.sum()))
            instance.migrated(-1, float(found.seconds_L.sum()), float(found.bytes_L.sum()))
            return
        rows = instance.placement.physical_to_logical_LP.copy()
        shares = None if found.placement.share_LP is None else instance.placement.slot_share_LP.copy()
        for layer in found.order:
            rows = rows.copy()
            rows[layer] = found.placement.physical_to_logical_LP[layer]
            if shares is not None and found.placement.share_LP is not None:
                shares = shares.copy()
                shares[layer] = found.placement.share_LP[layer]
            mixed = replace(instance.placement, physical_to_logical_LP=rows, share_LP=shares)
            instance.moves.append((layer, mixed, float(found.seconds_L[layer]), float(found.bytes_L[layer])))

    def _put(self, instance: Instance, found: Replanned, stages: Sequence[int]) -> None:
        """A new placement of some stages at once, and what it leaves for the cache."""
        instance.moves.clear()
        instance.put(found.placement, stages)
        instance.resize(found.capacity_tokens // instance.block, stages)

    def _fault(self, fault: FaultSpec) -> Generator[Any, Any, None]:
        clock = self.clock
        which = 0 if fault.pool == "prefill" else -1
        instance, pool = self.stages[which][fault.instance], self.pools[which]
        yield clock.at(nanoseconds(fault.at), Order.FAULT)
        self._break(fault, instance, pool, broken=True)
        if fault.until is not None:
            yield clock.at(nanoseconds(fault.until), Order.FAULT)
            self._break(fault, instance, pool, broken=False)

    def _break(self, fault: FaultSpec, instance: Instance, pool: Pool, broken: bool) -> None:
        place, number = divmod(fault.rank, pool.cluster.num_ranks)  # of the pipeline, and of the rank in its stage
        costs, placement = instance.stages[place]
        cluster = costs.cluster
        rank = cluster.rank(number)
        if fault.kind == "rank-loss":
            change: dict[str, Any] = {"failed": broken}
        else:
            field = "speed" if fault.kind == "slow-rank" else "link_speed"
            usual = getattr(pool.cluster.rank(number), field)
            change = {field: usual * (fault.speed or 1.0) if broken else usual}
        ranks = {**cluster.ranks, number: rank.model_copy(update=change)}
        if self.recorder is not None:
            self.recorder.add("fault", self.clock.now_s, rank=instance.first_rank + fault.rank)
        if fault.kind == "rank-loss" and all(ranks.get(r, RankSpec()).failed for r in range(cluster.num_ranks)):
            raise InfeasibleError(f"faults: the last rank is lost at {fault.at:g} s; nothing is left to serve")
        changed = cluster.model_copy(update={"ranks": ranks})
        instance.stages[place] = pool.costs(changed), placement
        if fault.kind != "rank-loss":
            return
        size = instance.spec.group_ranks
        d = number // size
        lost = instance.lose_group(d) if broken else []
        now = self.clock.now_s
        phase: Phase = "prefill" if pool.role == "prefill" else "decode"
        load_LE = instance.loads.over(max(0.0, now - 1.0), max(now, 1e-9), phase)
        found = self._planned(pool)(load_LE, changed, placement, None)
        self._put(instance, found, (place,))
        members = [costs.cluster.rank(r) for costs, _ in instance.stages for r in range(d * size, (d + 1) * size)]
        instance.alive_D[d] = not any(member.failed for member in members)
        own = np.array_split(np.arange(len(found.seconds_L)), instance.spec.pp)[place]  # layers of the stage
        moving, size_bytes = float(found.seconds_L[own].sum()), float(found.bytes_L[own].sum())
        instance.stall(moving + (fault.detect if broken else 0.0))
        instance.migrated(-1, moving, size_bytes)
        for request in lost:  # their caches are gone, but those not fetched: all of it is computed again elsewhere
            if self.spec.role == "decode":
                request.saved = request.context - 1
            self._submit(request, 0 if request.kept is None else 1)
