"""One step, event by event: every layer on every rank, every copy of a token over the links it takes.

The same costs as the step mode, played out. Attention, dense parts and experts take the seconds of
:class:`~moeplan.costs.step.StepModel`; dispatch and combine are transfers of the true rank-to-rank traffic over the
links of the topology, which share them max-min fairly (:mod:`moeplan.simulation.links`). A link's capacity is what
the cost model's exchange reaches on it: the bytes of a copy over its seconds. Half of an exchange's fixed part
comes before dispatch, half before combine.

As the step mode assumes, nobody goes on before an exchange has ended for everybody. What ranks that split experts
gather and scatter among them takes its seconds from there too, and is not on the links.

Both modes agree where the step mode's formulas hold: under ``two_batch`` with even load and one of computing and
exchanging always busy. Else the step mode's two-batch time is a bound from below (neither is always busy) or above
(stragglers of one layer are made up for while the other batch computes).

``L`` MoE layers, ``R`` ranks, ``X`` links.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moeplan.artifacts.event_log import EventLog, EventRecorder
from moeplan.artifacts.placement import Placement
from moeplan.costs.roofline import returned_bytes, token_bytes
from moeplan.costs.step import BatchParts, StepModel
from moeplan.costs.technique import Overlap
from moeplan.costs.traffic import Traffic, expected_traffic
from moeplan.errors import InputError
from moeplan.simulation.links import Links
from moeplan.simulation.network import Network

__all__ = ["DetailedStep", "play_step", "simulate_step"]

Floats = NDArray[np.float64]
_Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True, eq=False)
class DetailedStep:
    """What a step did. ``link_bytes_X`` over the links ``links_X`` (source, target); ``busy_s_R`` each rank's
    seconds of computing."""

    total_s: float
    log: EventLog
    links_X: tuple[tuple[str, str], ...]
    link_bytes_X: Floats
    busy_s_R: Floats


def simulate_step(
    model: StepModel,
    placement: Placement,
    load_LE: Floats,
    traffic: Traffic | None = None,
    *,
    link_speed: Mapping[tuple[str, str], float] | None = None,
) -> DetailedStep:
    """Play one step of ``model`` under ``placement`` and ``load_LE`` (any scale).

    ``traffic`` per token of the step; left out: expected from the load, homes spread evenly. ``link_speed``: links
    (source, target, as ``Topology.links`` names them) that run at another speed than built.

    Raises:
        InputError: placement, load, traffic and cluster do not fit each other; an unknown link.
    """
    R, L = model.cluster.num_ranks, load_LE.shape[0]
    if placement.num_ranks != R or placement.num_layers != L or load_LE.shape[1] != placement.num_experts:
        raise InputError(
            f"placement ({placement.num_layers} layers, {placement.num_experts} experts, {placement.num_ranks}"
            f" ranks) and load {load_LE.shape} on cluster.num_ranks ({R}) are not of one model and cluster"
        )
    if traffic is not None and traffic.inside_LRR.shape != (L, R, R):
        raise InputError(f"traffic {traffic.inside_LRR.shape} is not [{L} layers, {R} ranks, {R} ranks]")
    batches, network = model.batches(placement, load_LE), Network(model.cluster, link_speed)
    return play_step(model, batches, model.other_s_R, network, traffic)


def play_step(
    model: StepModel,
    batches: Sequence[BatchParts],
    other_s_R: Floats,
    network: Network,
    traffic: Traffic | None = None,
    *,
    home_R: Floats | None = None,
    overlap: Overlap | None = None,
) -> DetailedStep:
    """Play ``batches`` on the cluster of ``model`` after ``other_s_R`` seconds of everything that is no MoE layer.

    ``traffic`` left out: expected from the batches' pairs, with the part ``home_R`` of the tokens on each rank.
    ``overlap`` left out: the model's.
    """
    if traffic is None:
        top_k, parts = model.model.top_k, batches[0]
        share_LR = parts.pairs_LR / (parts.tokens * top_k)
        how = model.technique
        traffic = expected_traffic(share_LR, model.cluster, how.dispatch, top_k, home_R, how.expert_tp)
    fullest = 1 / model.live.sum() if home_R is None else float(home_R.max())
    return _Step(model, batches, other_s_R, network, traffic, overlap or model.technique.overlap, fullest).run()


class _Exchange:
    """One dispatch or combine of one batch: how many have come in, and how much is still on its way."""

    def __init__(self, step: _Step, kind: str, layer: int, batch: int) -> None:
        self.step, self.kind, self.layer, self.batch = step, kind, layer, batch
        env, R = step.env, step.num_ranks
        self.ready_R = [env.event() for _ in range(R)]
        self.entered = self.missing = 0
        self.start_s = 0.0
        parts = step.batches[batch]
        self.gather_s = float(parts.gather_s_L[layer]) / 2
        share = step.wire[kind] * parts.tokens
        between_RR, inside_RR = step.traffic.between_LRR[layer] * share, step.traffic.inside_LRR[layer] * share
        if kind == "combine":
            between_RR, inside_RR = between_RR.T, inside_RR.T
        self.hops = []
        for matrix_RR, latency_s in ((inside_RR, step.latency_s[0]), (between_RR, step.latency_s[1])):
            source_F, target_F = np.nonzero(matrix_RR)
            self.hops.append((source_F, target_F, matrix_RR[source_F, target_F], latency_s))
            self.missing += len(target_F)
        self.sent_R = inside_RR.sum(1) + between_RR.sum(1)

    def enter(self, rank: int) -> simpy.Event:
        """Rank comes in; the event is its leave to go on."""
        self.entered += 1
        if self.entered == self.step.num_live:
            self.step.env.process(self._together())
        return self.ready_R[rank]

    def _together(self) -> _Process:
        with self.step.wire_in_use.request() as turn:
            yield turn
            self.start_s = self.step.env.now
            if self.gather_s:
                yield self.step.env.timeout(self.gather_s)
            yield self.step.env.process(self._send())
            yield self.step.env.all_of(self.ready_R)

    def _send(self) -> _Process:
        """Start the transfers of all ranks, each path's after its own fixed part."""
        env, was = self.step.env, 0.0
        for source_F, target_F, size_F, latency_s in sorted(self.hops, key=lambda hop: hop[3]):
            yield env.timeout(latency_s - was)
            was = latency_s
            if len(size_F):
                self.step.send(self.kind, source_F, target_F, size_F, self._arrived)
        self._let_go()

    def _arrived(self, _target: int) -> None:
        self.missing -= 1
        self._let_go()

    def _let_go(self) -> None:
        """Nobody goes before all are through."""
        if not self.missing:
            for ready in self.ready_R:
                if not ready.triggered:
                    ready.succeed()


class _Step:
    """State of one run."""

    def __init__(
        self,
        model: StepModel,
        batches: Sequence[BatchParts],
        other_s_R: Floats,
        network: Network,
        traffic: Traffic,
        overlap: Overlap,
        fullest: float,
    ) -> None:
        self.model, self.batches, self.other_s_R = model, batches, other_s_R
        self.network, self.traffic, self.overlap = network, traffic, overlap
        self.cluster, self.num_ranks = model.cluster, model.cluster.num_ranks
        self.live = [int(r) for r in np.flatnonzero(model.live)]
        self.num_live = len(self.live)
        self.env = simpy.Environment()
        self.recorder = EventRecorder()
        self.busy_s_R = np.zeros(self.num_ranks)
        hidden, parts = model.model.routed_hidden_size, batches[0]
        out = token_bytes(hidden, model.workload.activation_dtype)
        self.wire = {"dispatch": out, "combine": returned_bytes(hidden, model.workload.activation_dtype)}
        exchange = parts.exchange
        between = exchange.between
        self.latency_s = (exchange.inside.fixed_s / 2, 0.0 if between is None else between.fixed_s / 2)
        # What links reach depends on the size of messages: those of the rank that sends most.
        capacity_X = network.capacity_X(exchange, parts.tokens * fullest, sum(self.wire.values()))
        self.links = Links(self.env, capacity_X)
        self.wire_in_use = simpy.Resource(self.env)
        self.exchanges: dict[tuple[int, int, str], _Exchange] = {}
        self.compute_R = [simpy.Resource(self.env) for _ in range(self.num_ranks)]

    def send(self, kind: str, source_F: Any, target_F: Any, size_F: Floats, arrived: Any) -> None:
        """Hand transfers to the links."""
        count_F, links = self.network.routes(kind, source_F, target_F)
        self.links.send(count_F, links, size_F, [int(t) for t in target_F], arrived)

    # ------------------------------------------------------------------ what a rank does

    def _exchange(self, rank: int, kind: str, layer: int, batch: int) -> _Process:
        key = (layer, batch, kind)
        if key not in self.exchanges:
            self.exchanges[key] = _Exchange(self, kind, layer, batch)
        exchange = self.exchanges[key]
        yield exchange.enter(rank)
        start = exchange.start_s
        self.recorder.add(
            kind, start, self.env.now - start, rank=rank, layer=layer, step=0, amount=float(exchange.sent_R[rank])
        )

    def _work(self, rank: int, layer: int, *parts: tuple[str, float, float]) -> _Process:
        """Compute (kind, seconds, amount) one after another, without another batch in between."""
        with self.compute_R[rank].request() as turn:
            yield turn
            for kind, seconds, amount in parts:
                if seconds <= 0:
                    continue
                start = self.env.now
                yield self.env.timeout(seconds)
                self.busy_s_R[rank] += seconds
                self.recorder.add(kind, start, seconds, rank=rank, layer=layer, step=0, amount=amount)

    def _moe(self, rank: int, layer: int, batch: int, beside_s: float = 0.0) -> _Process:
        """Dispatch, experts, combine; ``beside_s`` of the shared expert fill the exchanges."""
        parts, left_s = self.batches[batch], beside_s
        for kind in ("dispatch", "combine"):
            start = self.env.now
            yield from self._exchange(rank, kind, layer, batch)
            waited = self.env.now - start
            last = kind == "combine"
            now = left_s if last else min(left_s, waited)
            if now > 0:
                self.recorder.add("shared", start, now, rank=rank, layer=layer, step=0)
                self.busy_s_R[rank] += now
                yield self.env.timeout(max(0.0, now - waited))
            left_s -= now
            if not last:
                seconds, pairs = float(parts.expert_s_LR[layer, rank]), float(parts.pairs_LR[layer, rank])
                yield from self._work(rank, layer, ("experts", seconds, pairs))

    def _layers(self, rank: int, batch: int) -> _Process:
        parts, overlap = self.batches[batch], self.overlap
        attention_s, shared_s = float(parts.attention_s_R[rank]), float(parts.shared_s_R[rank])
        attention, shared = ("attention", attention_s, 0.0), ("shared", shared_s, 0.0)
        for layer in range(len(parts.expert_s_LR)):
            if overlap == "shortcut":
                moe = self.env.process(self._moe(rank, layer, batch))
                start = self.env.now
                yield self.env.timeout(attention_s + shared_s)
                self.busy_s_R[rank] += attention_s + shared_s
                self.recorder.add("attention", start, attention_s, rank=rank, layer=layer, step=0)
                self.recorder.add("shared", start + attention_s, shared_s, rank=rank, layer=layer, step=0)
                yield moe
            elif overlap == "shared_expert":
                yield from self._work(rank, layer, attention)
                yield from self._moe(rank, layer, batch, shared_s)
            else:
                yield from self._work(rank, layer, attention, shared)
                yield from self._moe(rank, layer, batch)

    def _rank(self, rank: int) -> _Process:
        seconds = float(self.other_s_R[rank])
        yield self.env.timeout(seconds)
        if seconds > 0:
            self.recorder.add("dense", 0.0, seconds, rank=rank, step=0)
        self.busy_s_R[rank] += seconds
        yield self.env.all_of([self.env.process(self._layers(rank, b)) for b in range(len(self.batches))])

    def run(self) -> DetailedStep:
        """Play it to its end."""
        done = self.env.all_of([self.env.process(self._rank(r)) for r in self.live])
        self.env.run(until=done)
        total = self.env.now
        tokens = sum(parts.tokens for parts in self.batches)
        self.recorder.add("step", 0.0, total, step=0, amount=float(tokens))
        log = self.recorder.build("simulated", self.num_ranks, self.cluster.num_nodes, {"fidelity": "detailed"})
        return DetailedStep(total, log, self.network.links_X, self.links.moved_X, self.busy_s_R)
