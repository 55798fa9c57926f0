"""A service: requests arrive, are routed to groups of instances, served, and now and then something changes.

Everything that happens is a SimPy process over :class:`moeplan.simulation.clock.Clock`: arrivals, the lanes of the
instances, transfers of KV caches, re-balancing, faults.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.event_log import EventLog, EventRecorder
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.costs.kv_cache import kv_transfer_s
from moeplan.costs.run_traffic import RunTraffic, Wire
from moeplan.errors import InfeasibleError, SpecError
from moeplan.progress import Progress, no_progress
from moeplan.simulation.acceptance import Acceptance
from moeplan.simulation.clock import Clock, Order, nanoseconds
from moeplan.simulation.expert_loads import ExpertLoads, Phase
from moeplan.simulation.instance import Hooks, Instance, Kept, Role, StepCosts
from moeplan.simulation.lane import Lane
from moeplan.simulation.request import Request
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.serving import EngineSpec, FaultSpec, RebalanceSpec, ServingSpec

__all__ = ["Pool", "Replan", "Replanned", "Served", "simulate_service"]

Floats = NDArray[np.float64]
_FULL = np.iinfo(np.int64).max
_SLACK_RATIO, _SLACK = 1.5, 8  # prefix-aware: a group may hold this times the mean load, and so many more requests


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
    """Equal instances. ``cluster`` is that of one pipeline stage; ``kv_bytes`` per token on one rank; ``link`` of a
    prefill pool: out of one of its ranks and into one of the decode pool; ``replan`` plans anew for these instances;
    ``wire``: how tokens travel, left out: not followed; ``num_nodes`` of an instance, 0: those of its stages."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What happened: every request, every instance, and the log where one was kept."""

    requests: Sequence[Request]
    rejected: int
    instances: Sequence[Instance]
    num_nodes: int
    end_s: float
    log: EventLog | None
    transferred_bytes: float


def simulate_service(
    spec: ServingSpec,
    requests: RequestTrace,
    pools: Sequence[Pool],
    *,
    keep_log: bool = True,
    errors: int = 0,
    seed: int = 0,
    origin: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Served:
    """Serve the requests to the end. ``errors``: -1, 0 or 1, the end of the costs' interval that every step takes;
    ``seed`` draws which drafts are accepted.

    Raises:
        InfeasibleError: a request cannot fit any group's cache, or every group has lost a rank.
    """
    return _Service(spec, requests, pools, keep_log, errors, seed, progress).run(origin or {})


class _Service:
    def __init__(
        self,
        spec: ServingSpec,
        requests: RequestTrace,
        pools: Sequence[Pool],
        keep_log: bool,
        errors: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self.spec, self.trace, self.pools = spec, requests, pools
        self.clock = Clock()
        self.recorder = EventRecorder() if keep_log else None
        self.progress, self._told = progress, -1
        self.requests: list[Request] = []
        self.rejected = self.done = 0
        self.transferred_bytes = 0.0
        self._link_free_ns: dict[tuple[Instance, int], int] = {}
        self.finished = self.clock.event()
        self._closed = requests.arrival_s_Q is None
        self._next = 0
        self.stages: list[list[Instance]] = []
        first_rank = number = 0
        for place, pool in enumerate(pools):
            hooks = Hooks(self._finished, self._handed_over, self._fetch)
            drafts, acceptance = pool.engine.speculative, None
            if drafts is not None:
                acceptance = Acceptance(drafts, seed, int(requests.output_tokens_Q.max()))
            stage = []
            for _ in range(pool.instances):
                costs = pool.costs(pool.cluster)
                traffic = None  # followed where everything is: counting it takes as long as many steps
                if keep_log and pool.wire is not None:
                    traffic = RunTraffic(pool.wire, pool.loads.recorded)
                stage.append(
                    Instance(
                        self.clock, number, first_rank, pool.engine, pool.role, costs, pool.placement, pool.loads,
                        pool.capacity_tokens, requests.prefix_tokens, pool.kv_bytes, self.recorder, hooks, errors,
                        traffic, acceptance,
                    )
                )  # fmt: skip
                first_rank += pool.cluster.num_ranks * pool.engine.pp
                number += 1
            self.stages.append(stage)
            self._require_room(pool, place)
        self.num_ranks = first_rank
        self._rounds = [cycle([(i, d) for i in stage for d in range(i.groups)]) for stage in self.stages]

    def _require_room(self, pool: Pool, place: int) -> None:
        """Every request fits a group's cache and, where prompts are not cut, a step.

        All of its tokens count, though nothing is kept of the last one: a sequence of vLLM's ``max_model_len`` must
        fit its cache, and SGLang's ``max_req_len`` is a token below its own.
        """
        trace, engine = self.trace, pool.engine
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
        if place == 0 and not engine.chunked_prefill and longest > engine.max_num_batched_tokens:
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

    # ------------------------------------------------------------------ run

    def run(self, origin: dict[str, Any]) -> Served:
        clock, spec = self.clock, self.spec
        clock.process(self._closed_loop() if self._closed else self._arrivals())
        for fault in spec.faults:
            clock.process(self._fault(fault))
        if spec.warmup:
            clock.process(self._warm())
        if spec.rebalance is not None:
            for pool, stage in zip(self.pools, self.stages, strict=True):
                for instance in stage:
                    clock.process(self._rebalance(spec.rebalance, instance, pool))
        try:
            clock.run(until=self.finished)
        except RuntimeError as error:  # SimPy: nothing is left to happen, or, with a cause, what a process raised
            if self.finished.triggered or error.__cause__ is not None:
                raise
            raise self._never_served() from error
        self.progress("simulate", 1.0)
        instances = [instance for stage in self.stages for instance in stage]
        nodes = sum(
            pool.instances * (pool.num_nodes or pool.cluster.num_nodes * pool.engine.pp) for pool in self.pools
        )
        log = None
        if self.recorder is not None:
            log = self.recorder.build("simulated", self.num_ranks, nodes, origin)
        return Served(
            self.requests, self.rejected, instances, nodes, clock.now_s, log, self.transferred_bytes
        )

    def _never_served(self) -> InfeasibleError:
        return InfeasibleError(
            f"{len(self.requests) - self.done} requests can never be served: at {self.clock.now_s:g} s no group has"
            " room for them in its KV cache any more; use shorter requests or more ranks"
        )

    def _warm(self) -> Generator[Any, Any, None]:
        yield self.clock.at(nanoseconds(self.spec.warmup), Order.START)
        for stage in self.stages:
            for instance in stage:
                instance.stats.warmed_up()

    def _make(self, now: int) -> Request:
        q, trace = self._next, self.trace
        self._next += 1
        chain = trace.prefix_Q[q] if trace.prefix_Q is not None else ()
        output = int(trace.output_tokens_Q[q]) if self.spec.role != "prefill" else 1
        request = Request(q, now, int(trace.input_tokens_Q[q]), output, chain)
        self.requests.append(request)
        if self.recorder is not None:
            self.recorder.add("arrival", now * 1e-9, request=q, amount=request.input)
        if self.spec.role == "decode":  # prefilled elsewhere, with its first token
            request.generated, request.saved = 1, request.input
            request.first_ns = request.last_token_ns = now
        return request

    def _arrivals(self) -> Generator[Any, Any, None]:
        for at_s in self.trace.arrival_s_Q if self.trace.arrival_s_Q is not None else ():
            yield self.clock.at(nanoseconds(float(at_s)), Order.ARRIVAL)
            self._arrive(self._make(int(self.clock.now)))

    def _closed_loop(self) -> Generator[Any, Any, None]:
        yield self.clock.at(0, Order.ARRIVAL)
        for _ in range(min(self.spec.requests.concurrency or 1, len(self.trace))):
            self._arrive(self._make(int(self.clock.now)))

    def _think(self) -> Generator[Any, Any, None]:
        think = nanoseconds(self.spec.requests.think_time)
        yield self.clock.at(int(self.clock.now) + think, Order.ARRIVAL)
        if self._more():
            self._arrive(self._make(int(self.clock.now)))
        else:
            self._maybe_end()

    def _more(self) -> bool:
        """Whether a closed loop sends another request."""
        duration = self.spec.requests.duration
        return self._next < len(self.trace) and (duration is None or self.clock.now_s <= duration)

    def _arrive(self, request: Request) -> None:
        if self.spec.role == "decode" and request.output == 1:
            request.finish_ns = request.first_ns
            self._finished(request)
        else:
            self._submit(request, 0)

    def _submit(self, request: Request, place: int) -> None:
        """To the group of pool ``place`` that the router chooses; turned away where its queue is full."""
        instance, d = self._route(request, place)
        if not instance.submit(request, d):
            if self._closed and not self.spec.requests.think_time:
                raise SpecError(
                    f"engine.max_waiting ({instance.spec.max_waiting}) turns requests of the closed loop away, and with"
                    " requests.think_time 0 the next one follows at the same instant, till none is left; give"
                    " think_time, raise max_waiting, or lower requests.concurrency"
                    f" ({self.spec.requests.concurrency})"
                )
            self.rejected += 1
            if request.kept is not None:
                request.kept.instance.handed_over(request)
            self._finished(request)

    def _finished(self, request: Request) -> None:
        """Done, or turned away."""
        self.done += 1
        if self._closed:
            if self._more():
                self.clock.process(self._think())
            else:
                self._maybe_end()
            duration = self.spec.requests.duration
            part = self.clock.now_s / duration if duration is not None else self.done / len(self.trace)
        else:
            part = self.done / len(self.trace)
            if self.done == len(self.trace):
                self.finished.succeed()
        if int(part * 100) > self._told:
            self._told = int(part * 100)
            self.progress("simulate", min(1.0, part))

    def _maybe_end(self) -> None:
        if self.done == len(self.requests) and not self._more() and not self.finished.triggered:
            self.finished.succeed()

    # ------------------------------------------------------------------ routing of requests

    def _route(self, request: Request, place: int) -> tuple[Instance, int]:
        stage = self.stages[place]
        if not any(instance.alive_D.any() for instance in stage):
            now_s = self.clock.now_s
            raise InfeasibleError(f"faults: at {now_s:g} s every group has lost a rank; none is left to serve")
        if self.spec.router == "round-robin":
            return next((instance, d) for instance, d in self._rounds[place] if instance.alive_D[d])
        if self.spec.router == "prefix-aware" and request.chain and place == 0:
            found = self._best_prefix(request, stage)
            if found is not None:
                return found
        return self._least_loaded(stage)

    def _least_loaded(self, stage: Sequence[Instance]) -> tuple[Instance, int]:
        best: tuple[int, Instance, int] | None = None
        for instance in stage:
            load_D = np.where(instance.alive_D, instance.load_D, _FULL)
            d = int(load_D.argmin())
            if instance.alive_D[d] and (best is None or int(load_D[d]) < best[0]):
                best = int(load_D[d]), instance, d
        assert best is not None  # some group is alive
        return best[1], best[2]

    def _best_prefix(self, request: Request, stage: Sequence[Instance]) -> tuple[Instance, int] | None:
        """The group that holds most of the prompt among those not much busier than the mean; None if none holds any."""
        loads = [int(i.load_D[d]) for i in stage for d in range(i.groups) if i.alive_D[d]]
        limit = _SLACK_RATIO * sum(loads) / len(loads) + _SLACK
        best: tuple[int, int, Instance, int] | None = None
        for instance in stage:
            for d, pool in enumerate(instance.pools):
                load = int(instance.load_D[d])
                if not instance.alive_D[d] or load > limit:
                    continue
                matched = pool.matched(request.chain)
                if matched and (best is None or (matched, -load) > (best[0], -best[1])):
                    best = matched, load, instance, d
        return None if best is None else (best[2], best[3])

    # ------------------------------------------------------------------ disaggregation

    def _handed_over(self, request: Request) -> None:
        """A prompt is in the cache, which stays in its group until a decode group has fetched it."""
        self._submit(request, 1)

    def _fetch(self, request: Request, lane: Lane) -> None:
        self.clock.process(self._fetching(request, lane))

    def _fetching(self, request: Request, lane: Lane) -> Generator[Any, Any, None]:
        """A decode group with a slot and room for a cache fetches it. Lost on the way where it comes from, it is
        computed again; where it goes to, it is fetched again."""
        kept, target, d = request.kept, lane.inst, request.group
        assert kept is not None  # or nobody would fetch it
        lost = int(target.lost_D[d])
        if not kept.gone:
            yield self.clock.at(self._travelled_ns(request, kept, target), Order.TRANSFER)
        here = int(target.lost_D[d]) == lost
        if kept.gone:
            if here:
                target.turned_back(lane, request)
            kept.instance.handed_over(request)
            kept.instance.lose(request)
            self._submit(request, 0)
        elif not here:
            self._submit(request, 1)
        else:
            kept.instance.handed_over(request)
            target.arrived(lane, request)

    def _travelled_ns(self, request: Request, kept: Kept, target: Instance) -> int:
        """When a cache that is fetched now is there: out over the one group's links, in over the other's."""
        first, second = self.pools
        start, sent = self._crossed_ns(first, kept.instance, kept.group, kept.tokens, int(self.clock.now))
        _, received = self._crossed_ns(second, target, request.group, kept.tokens, start)
        end = max(sent, received)
        whole = kept.tokens * first.kv_bytes * first.engine.tp * first.engine.pp
        self.transferred_bytes += whole
        kept.instance.stats.transferred_bytes += whole
        if self.recorder is not None:
            rank, seconds = kept.instance.first_rank + kept.group * first.engine.group_ranks, (end - start) * 1e-9
            self.recorder.add("transfer", start * 1e-9, seconds, rank=rank, request=request.number, amount=whole)
        return end

    def _crossed_ns(self, pool: Pool, instance: Instance, d: int, tokens: int, ready_ns: int) -> tuple[int, int]:
        """When a cache begins to cross the links of a group's ranks, and is through: they carry one after the other, at
        the pace of the slowest. Of ranks that keep the same because a prompt was cut among them each sends its part, as
        in SGLang."""
        engine, link = pool.engine, self.pools[0]
        members, size = range(d * engine.group_ranks, (d + 1) * engine.group_ranks), tokens * pool.kv_bytes / engine.pcp
        slowest = min(costs.cluster.rank(r).link_speed for costs, _ in instance.stages for r in members)
        seconds = kv_transfer_s(size, link.link_bytes_per_s * slowest, link.link_latency_s)
        start = max(ready_ns, self._link_free_ns.get((instance, d), 0))
        end = self._link_free_ns[instance, d] = start + nanoseconds(seconds)
        return start, end

    # ------------------------------------------------------------------ re-balancing and faults

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
