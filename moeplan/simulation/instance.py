"""One engine instance: ranks that step together, their queues and KV caches, and what their steps cost.

``D`` attention groups, ``R`` ranks, ``L`` layers, ``E`` experts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.event_log import EventRecorder
from moeplan.artifacts.placement import Placement
from moeplan.costs.passes import Batch, StepSeconds, no_chunks, passes_of
from moeplan.costs.run_traffic import RunTraffic
from moeplan.simulation.acceptance import Acceptance
from moeplan.simulation.clock import Clock, nanoseconds
from moeplan.simulation.drafting_lane import DraftingLane
from moeplan.simulation.kv_pool import KvPool
from moeplan.simulation.lane import Lane
from moeplan.simulation.pools import Pool
from moeplan.simulation.request import NEVER, Request
from moeplan.simulation.stats import InstanceStats
from moeplan.simulation.step_costs import StepCosts

__all__ = ["Hooks", "Instance", "Kept", "Sample"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One step as it was asked of the costs, to be looked into afterwards."""

    number: int
    start_s: float
    costs: StepCosts
    batch: Batch
    placement: Placement
    load_LE: Floats


@dataclass(slots=True, eq=False)
class Hooks:
    """What an instance tells its service: a request has all its tokens; its prompt is in the cache and it decodes
    elsewhere; a lane has a slot and room for its cache."""

    finished: Callable[[Request], None]
    handed_over: Callable[[Request], None]
    fetch: Callable[[Request, Lane], None]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The cache of a request that was handed over: where it is, its prefix and tokens. ``lost``: losses before it."""

    instance: Instance
    group: int
    held: tuple[int, ...]
    tokens: int
    lost: int

    @property
    def gone(self) -> bool:
        """Whether its group was lost since."""
        return bool(self.instance.lost_D[self.group] != self.lost)


class Instance:
    """See the module."""

    def __init__(
        self,
        clock: Clock,
        number: int,
        first_rank: int,
        pool: Pool,
        prefix_tokens: int,
        recorder: EventRecorder | None,
        hooks: Hooks,
        traffic: RunTraffic | None = None,
        acceptance: Acceptance | None = None,
    ) -> None:
        self.clock, self.number, self.first_rank, self.role = clock, number, first_rank, pool.role
        self.spec = spec = pool.engine
        self.loads, costs = pool.loads, pool.costs(pool.cluster)
        # Of a pipeline; they differ once a rank of one is slow or lost.
        self.stages = [(costs, pool.placement)] * spec.pp
        self.groups = D = costs.groups
        self.hooks, self.recorder, self.traffic = hooks, recorder, traffic
        self.kv_bytes, self._group_bytes, self._prefix_tokens = pool.kv_bytes, pool.group_bytes, prefix_tokens
        self.block = spec.block_tokens
        capacity = pool.capacity_tokens // self.block
        self.free_D = np.zeros(D, np.int64)
        self._prefix_blocks = prefix_tokens // self.block if spec.prefix_caching else 0
        self.pools = [KvPool(self.free_D, d, capacity, self._prefix_blocks) for d in range(D)]
        self.stage_blocks = [capacity] * spec.pp
        self.capacity = capacity  # blocks of a group, of the stage with fewest
        self.waiting: list[deque[Request]] = [deque() for _ in range(D)]
        self.num_waiting = self.num_running = 0
        self.load_D = np.zeros(D, np.int64)  # requests that have not finished
        self.alive_D, self.lost_D = np.ones(D, bool), np.zeros(D, np.int64)  # lost: how often
        self.no_chunks_D4, self.nothing_D = no_chunks(D), np.zeros(D)
        self.blocked_until_ns = self.stage_free_ns = 0
        self.moves: deque[tuple[int, Placement, float, float]] = deque()
        self._swap_s = 0.0
        self.sample: Sample | None = None
        self.stats = InstanceStats(np.zeros(costs.cluster.num_ranks * spec.pp))
        self.lanes = [Lane(self) if acceptance is None else DraftingLane(self, acceptance) for _ in range(spec.pp)]
        for lane in self.lanes:
            clock.process(lane.run())

    @property
    def costs(self) -> StepCosts:
        """Of the first stage."""
        return self.stages[0][0]

    @property
    def placement(self) -> Placement:
        """Of the first stage."""
        return self.stages[0][1]

    def put(self, placement: Placement, stages: Iterable[int]) -> None:
        """A new placement of some stages."""
        for stage in stages:
            self.stages[stage] = self.stages[stage][0], placement

    def resize(self, blocks: int, stages: Iterable[int]) -> None:
        """Some stages have room for so many blocks of a group's cache now; the one with fewest counts."""
        for stage in stages:
            self.stage_blocks[stage] = blocks
        self.capacity = min(self.stage_blocks)
        for pool in self.pools:
            pool.free += self.capacity - pool.capacity
            pool.capacity = self.capacity
        self._wake()

    # ------------------------------------------------------------------ requests in and out

    def submit(self, request: Request, d: int) -> bool:
        """Queue a request in group ``d``; False where the queue is full."""
        queue = self.waiting[d]
        if self.spec.max_waiting is not None and len(queue) >= self.spec.max_waiting:
            return False
        request.instance, request.group = self.number, d
        queue.append(request)
        self.num_waiting += 1
        self.load_D[d] += 1
        self.note_state()
        self._wake()
        return True

    def _wake(self) -> None:
        for lane in self.lanes:
            if lane.wake is not None and not lane.wake.triggered:
                lane.wake.succeed()

    def admit(self, lane: Lane, request: Request, d: int) -> bool:
        """Blocks for everything the request must have in the cache; False where there is no room."""
        pool, block = self.pools[d], self.block
        if request.saved:
            if not pool.take(self._blocks_of(lane, request)):
                return False
        else:
            chain: tuple[int, ...] = ()
            if self._prefix_blocks:
                chain = request.chain[: request.input // self._prefix_tokens]
                found = pool.matched(chain)
                if found * self._prefix_tokens >= request.context:  # the last token must be computed
                    found -= 1
                chain = chain[:found]
                pool.hold(chain)
            if not pool.take(-(-request.context // block) - len(chain) * self._prefix_blocks):
                pool.release(chain)
                return False
            hit = len(chain) * self._prefix_tokens
            request.held, request.to_prefill = chain, request.context - hit
            request.hit_tokens += hit
            self.stats.reused += hit
        self.num_waiting -= 1
        self.num_running += 1
        (lane.running if request.kept is None else lane.arriving)[d][request.number] = request
        if request.admit_ns == NEVER:
            request.admit_ns = int(self.clock.now)
        self._note("admit", request)
        return True

    def _blocks_of(self, lane: Lane, request: Request) -> int:
        """Blocks that a saved cache comes back to: where prompts are cut, a request that joins decodes at once."""
        tokens = request.context - 1 + (lane.first_tokens(request) if self.spec.chunked_prefill else 0)
        return -(-tokens // self.block)

    def prompt_done(self, request: Request) -> None:
        """The prompt's blocks serve later prompts from now on."""
        if self._prefix_blocks:
            pool = self.pools[request.group]
            chain = request.chain[: request.input // self._prefix_tokens]
            rest = chain[len(request.held) :]
            pool.give((len(rest) - pool.keep(rest)) * self._prefix_blocks)  # computed twice at one time: one copy stays
            request.held = chain

    def first_token(self, request: Request) -> None:
        """A request's first token is sent now, unless it was before."""
        if request.first_ns == NEVER:
            request.first_ns = request.last_token_ns = int(self.clock.now)
            self._note("first_token", request)

    def release(self, request: Request, cached: int) -> None:
        """The blocks of ``cached`` tokens back."""
        self._give(request.group, request.held, cached)
        request.held = ()

    def _give(self, d: int, held: tuple[int, ...], cached: int) -> None:
        pool = self.pools[d]
        pool.give(-(-cached // self.block) - len(held) * self._prefix_blocks)
        pool.release(held)

    def finished(self, request: Request) -> None:
        """A request has all its tokens."""
        self.num_running -= 1
        self.load_D[request.group] -= 1
        self._note("finish", request, request.output)
        self.hooks.finished(request)

    def hand_over(self, request: Request) -> None:
        """A request leaves for a decode instance; its blocks stay until :meth:`handed_over`."""
        self.num_running -= 1
        d, tokens = request.group, request.context - 1
        request.kept = Kept(self, d, request.held, tokens, int(self.lost_D[d]))
        request.saved, request.swap_tokens, request.held = tokens, 0, ()
        self.hooks.handed_over(request)

    def handed_over(self, request: Request) -> None:
        """The cache is in the decode instance, or of no more use."""
        if (kept := request.kept) is not None:
            self.load_D[kept.group] -= 1
            if not kept.gone:
                self._give(kept.group, kept.held, kept.tokens)
            request.kept = None
            self._wake()

    def turned_back(self, lane: Lane, request: Request) -> None:
        """A request whose cache does not come after all leaves its place."""
        d = request.group
        del lane.arriving[d][request.number]
        self._give(d, (), self._blocks_of(lane, request) * self.block)
        self.num_running -= 1
        self.load_D[d] -= 1
        self._wake()

    def arrived(self, lane: Lane, request: Request) -> None:
        """Its cache is here: it decodes from the next step on."""
        del lane.arriving[request.group][request.number]
        lane.landed[request.group].append(request)
        self._wake()

    def preempted(self, request: Request, cached: int, prefilling: bool) -> None:
        """A request lost its place and goes to the head of its queue."""
        d = request.group
        self.release(request, request.context if prefilling else cached)
        if self.spec.preemption == "swap" and not prefilling and self.alive_D[d]:
            request.saved, request.swap_tokens = cached, cached
            self._swap_s += self.swap_seconds(cached, to_host=True)
        else:  # what was in the cache, and with a decoding request the token that was about to go there
            self.stats.recomputed += request.context - (request.to_prefill if prefilling else 0)
        self.stats.preemptions += 1
        self.num_running -= 1
        self.num_waiting += 1
        self.waiting[d].appendleft(request)
        self._note("preempt", request, cached)

    def swap_seconds(self, tokens: int, to_host: bool) -> float:
        """Seconds of a cache from a rank to its host, or back."""
        if not tokens:  # it came over a link
            return 0.0
        self.stats.swapped_bytes += tokens * self._group_bytes
        return self.costs.swap_s(tokens * self.kv_bytes, to_host)

    def lose_group(self, d: int) -> list[Request]:
        """All requests of a group whose rank is lost, without their caches but those kept elsewhere."""
        self.alive_D[d] = False
        self.lost_D[d] += 1
        landed: list[Request] = []
        for lane in self.lanes:
            lane.evict(d)
            landed += lane.landed[d]
            places = len(lane.landed[d]) + len(lane.arriving[d])
            self.num_running -= places
            self.load_D[d] -= places
            lane.landed[d].clear()
            lane.arriving[d].clear()  # what travels comes to nothing, and is sent again
        self.num_waiting -= len(self.waiting[d])
        self.load_D[d] -= len(self.waiting[d])
        requests = [*self.waiting[d], *landed]
        self.waiting[d].clear()
        self.pools[d].clear()
        for request in requests:
            if request.saved and request.kept is None:
                self.lose(request)
        self.note_state()
        return requests

    def lose(self, request: Request) -> None:
        """A cache that waited or travelled is gone, and with it a first token that was not sent."""
        if request.first_ns == NEVER:
            request.generated = 0
        self.stats.recomputed += request.context
        request.held, request.saved, request.swap_tokens, request.path = (), 0, 0, None

    # ------------------------------------------------------------------ steps

    def begin_step(self, lane: Lane, batch: Batch, swapped_s: float) -> int:
        """Nanoseconds of a step that begins now."""
        now_s = self.clock.now_s
        load_LE = self.loads.at(now_s, "prefill" if batch.has_prefill else "decode")
        steps = self._stage_steps(batch, load_LE)
        total_s = sum(step.total_s for step in steps)
        host_s = self.spec.step_overhead + swapped_s + self._swap_s
        self._swap_s = 0.0
        duration_ns = max(1, nanoseconds(total_s + host_s))
        stats = self.stats
        slowest = max(step.total_s for step in steps) / total_s  # the next batch follows when that stage is free
        self.stage_free_ns = int(self.clock.now) + math.ceil(duration_ns * slowest)
        stats.busy_R += np.concatenate([step.busy_R for step in steps])
        stats.stepping_s += duration_ns * 1e-9 * slowest
        stats.exposed_s += sum(step.exposed_s for step in steps) / len(steps)
        tokens = float(batch.tokens_D.sum())
        stats.start_s.append(now_s)
        stats.length_s.append(duration_ns * 1e-9)
        stats.tokens.append(tokens)
        self.note_state()
        if self.traffic is not None:
            passes = passes_of(batch, self.spec.tokens_per_sequence - 1)
            self.traffic.add(self.placement, self.costs.cluster, load_LE, passes)
        if self.recorder is not None:
            self.recorder.add(
                "step", now_s, duration_ns * 1e-9, rank=self.first_rank, step=stats.steps, amount=tokens
            )
            if not stats.steps & (stats.steps - 1):  # a power of two: the last one lies in the run's second half
                self.sample = Sample(stats.steps, now_s, self.costs, batch, self.placement, load_LE)
            if (log := steps[0].log) is not None:
                self.recorder.extend(log.part_of_run(now_s, rank=self.first_rank, step=stats.steps))
        stats.steps += 1
        return duration_ns

    def note_state(self) -> None:
        """What holds from now on."""
        stats, room = self.stats, self.capacity * self.groups
        stats.at_s.append(self.clock.now_s)
        stats.running_at.append(self.num_running)
        stats.waiting_at.append(self.num_waiting)
        stats.cache_at.append(1.0 - float(self.free_D.sum()) / room if room else 0.0)

    def _stage_steps(self, batch: Batch, load_LE: Floats) -> list[StepSeconds]:
        """What each stage takes."""
        pp, steps = self.spec.pp, list[StepSeconds]()
        for number, (costs, placement) in enumerate(self.stages):
            before = self.stages[number - 1]
            alike = number > 0 and costs is before[0] and placement is before[1]
            steps.append(steps[-1] if alike else costs.step(batch, placement, load_LE))
        return [step.of_stage(pp, last=number == pp - 1) for number, step in enumerate(steps)]

    def stall(self, seconds: float) -> None:
        """No step begins for this long."""
        begin = max(int(self.clock.now), self.blocked_until_ns)
        self.blocked_until_ns = begin + nanoseconds(seconds)
        self.stats.stalled_s += seconds

    def migrate_one_layer(self) -> int:
        """Put the next layer of a layer-wise re-balancing in place; nanoseconds that it stalls the instance."""
        if not self.moves:
            return 0
        layer, placement, seconds, size_bytes = self.moves.popleft()
        before = self.placement
        self.put(placement, range(self.spec.pp))
        self.costs.forget(before)
        self.migrated(layer, seconds, size_bytes)
        self.stats.stalled_s += seconds
        return nanoseconds(seconds)

    def migrated(self, layer: int, seconds: float, size_bytes: float) -> None:
        """Note that experts moved."""
        self.stats.migrated_bytes += size_bytes
        if self.recorder is not None:
            self.recorder.add(
                "migrate", self.clock.now_s, seconds, rank=self.first_rank, layer=layer, amount=size_bytes
            )

    def _note(self, kind: str, request: Request, amount: float = 0.0) -> None:
        if self.recorder is not None:
            rank = self.first_rank + request.group * self.spec.group_ranks
            self.recorder.add(kind, self.clock.now_s, rank=rank, request=request.number, amount=amount)
