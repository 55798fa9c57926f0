"""A service: requests arrive, are routed to groups of instances, served, and now and then something changes.

Everything that happens is a SimPy process over :class:`moeplan.simulation.clock.Clock`: arrivals, the lanes of the
instances, transfers of KV caches, re-balancing, faults.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from moeplan.artifacts.event_log import EventLog, EventRecorder
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.costs.run_traffic import RunTraffic
from moeplan.errors import InfeasibleError, SpecError
from moeplan.progress import Progress, no_progress
from moeplan.simulation.acceptance import Acceptance
from moeplan.simulation.changes import Changes
from moeplan.simulation.clock import Clock, Order, nanoseconds
from moeplan.simulation.instance import Hooks, Instance
from moeplan.simulation.lane import Lane
from moeplan.simulation.pools import Pool, require_room
from moeplan.simulation.request import Request
from moeplan.simulation.router import Router
from moeplan.simulation.transfers import Transfers
from moeplan.specs.serving import ServingSpec

__all__ = ["Served", "simulate_service"]


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
    seed: int = 0,
    origin: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Served:
    """Serve the requests to the end; ``seed`` draws which drafts are accepted.

    Raises:
        InfeasibleError: a request cannot fit any group's cache, or every group has lost a rank.
    """
    return _Service(spec, requests, pools, keep_log, seed, progress).run(origin or {})


class _Service:
    def __init__(
        self,
        spec: ServingSpec,
        requests: RequestTrace,
        pools: Sequence[Pool],
        keep_log: bool,
        seed: int,
        progress: Progress,
    ) -> None:
        self.spec, self.trace, self.pools = spec, requests, pools
        self.clock = Clock()
        self.recorder = EventRecorder() if keep_log else None
        self.progress, self._told = progress, -1
        self.requests: list[Request] = []
        self.rejected = self.done = 0
        self.transfers = Transfers(pools, self.recorder)
        self.finished = self.clock.event()
        self._closed = requests.arrival_s_Q is None
        self._next = 0
        self.stages: list[list[Instance]] = []
        self.num_ranks = 0
        for place, pool in enumerate(pools):
            self.stages.append(self._instances(pool, keep_log, seed))
            require_room(pool, requests, first=place == 0)
        self.router = Router(spec.router, self.clock, self.stages)

    def _instances(self, pool: Pool, keep_log: bool, seed: int) -> list[Instance]:
        """Those of a pool, numbered after the ones before."""
        hooks = Hooks(self._finished, self._handed_over, self._fetch)
        drafts, acceptance = pool.engine.speculative, None
        if drafts is not None:
            acceptance = Acceptance(drafts, seed, int(self.trace.output_tokens_Q.max()))
        found: list[Instance] = []
        number = sum(map(len, self.stages))
        for _ in range(pool.instances):
            traffic = None  # followed where everything is: counting it takes as long as many steps
            if keep_log and pool.wire is not None:
                traffic = RunTraffic(pool.wire, pool.loads.recorded)
            found.append(
                Instance(
                    self.clock, number + len(found), self.num_ranks, pool, self.trace.prefix_tokens, self.recorder,
                    hooks, traffic, acceptance,
                )
            )  # fmt: skip
            self.num_ranks += pool.cluster.num_ranks * pool.engine.pp
        return found

    # ------------------------------------------------------------------ run

    def run(self, origin: dict[str, Any]) -> Served:
        clock, spec = self.clock, self.spec
        clock.process(self._closed_loop() if self._closed else self._arrivals())
        changes = Changes(spec, clock, self.pools, self.stages, self.recorder, self._submit, self._never_served)
        changes.start()
        if spec.warmup:
            clock.process(self._warm())
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
            self.requests, self.rejected, instances, nodes, clock.now_s, log, self.transfers.total_bytes
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
        instance, d = self.router.choose(request, place)
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
            yield self.clock.at(self.transfers.arrives_ns(request, target, int(self.clock.now)), Order.TRANSFER)
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
