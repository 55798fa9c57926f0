"""Optimizer steps of a training job: the pipeline schedule played over the costs of each chunk and micro-batch.

Every sort of replica (:mod:`moeplan.costs.training_teams`) plays the schedule by itself, one rank for each of its
stages: dispatch and combine open a part of its operations, gradients are reduced as the last backwards of the slowest
run, weights gathered as the first forwards do; from ZeRO stage 2 on every operation is as much longer as its
computation leaves of its own (:meth:`moeplan.costs.training.TrainingCosts.sharded`). The log and the memory, which is
followed from operation to operation, are of the replica that all others wait for; shares are of all. In the detailed
mode each operation's MoE layers are played event by event on one expert-parallel group
(:mod:`moeplan.simulation.detailed`).

``p`` stages, ``v`` chunks per stage, ``m`` micro-batches, ``W`` windows of load: micro-batch ``i`` has window
``i mod W``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.event_log import EventLog, EventRecorder
from moeplan.costs.roofline import matmul_flops
from moeplan.costs.technique import Overlap
from moeplan.costs.training import TrainingCosts, model_flops_per_token
from moeplan.costs.training_parts import chunk_parts, scaled
from moeplan.errors import SpecError
from moeplan.simulation.detailed import DetailedStep, play_step
from moeplan.simulation.network import Network
from moeplan.simulation.schedule import Op, Timed, one_forward_one_backward, run_schedule
from moeplan.specs.scenario import Fidelity

__all__ = ["StageMemory", "TrainingResult", "simulate_training"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class StageMemory:
    """Bytes on the rank of a stage that needs most: ``state_bytes`` always, and activations from each ``time_s`` on."""

    stage: int
    state_bytes: float
    time_s: Floats
    activation_bytes: Floats

    @property
    def peak_bytes(self) -> float:
        """Most at any time."""
        return self.state_bytes + float(self.activation_bytes.max(initial=0.0))


@dataclass(frozen=True, slots=True, eq=False)
class TrainingResult:
    """What a step of training takes; shares are of the mean step and of all ranks.

    ``bubble_share``: idle time of stages and replicas that wait for each other; ``exposed_exchange_share``: dispatch
    and combine that nothing hides; ``exposed_sync_share``: gradients and weights that nothing hides.
    """

    step_s: float
    steps_s: tuple[float, ...]
    micro_batches: int
    tokens_per_s: float
    tokens_per_s_per_rank: float
    tflops_per_rank: float
    mfu: float
    bubble_share: float
    exposed_exchange_share: float
    exposed_sync_share: float
    optimizer_share: float
    dropped_share: float
    memory: tuple[StageMemory, ...]
    memory_bytes: float
    log: EventLog
    source: Mapping[str, str]
    extrapolated: tuple[str, ...]

    @property
    def peak(self) -> StageMemory:
        """The stage that needs most memory."""
        return max(self.memory, key=lambda stage: stage.peak_bytes)


class _Play:
    """One step after another. ``inside`` holds what was played, by chunk, sort of team, direction and window of load;
    ``chunks`` and times of them are of each replica."""

    def __init__(self, costs: TrainingCosts, detailed: bool, factor: Mapping[str, float], logged: bool) -> None:
        self.logged = logged
        self.costs, self.spec, self.replicas = costs, costs.spec, costs.replicas
        each = range(len(self.replicas))
        self.chunks = [costs.chunks(replica) for replica in each]
        if factor:
            self.chunks = [[scaled(costs, chunk, factor) for chunk in chunks] for chunks in self.chunks]
        longer = factor.get("transfers between stages", 1.0)
        self.transfer_s = [(costs.transfer_s(replica) * longer).tolist() for replica in each]
        p = self.p = self.spec.pp
        self.times = [[costs.overlapped(chunk) for chunk in chunks] for chunks in self.chunks]
        self.waits = [[costs.sharded(chunk) for chunk in chunks] for chunks in self.chunks]  # for weights and gradients
        self.windows = len(self.times[0][0][0])
        self.inside: dict[tuple[int, int, bool, int], DetailedStep] = {}
        if detailed:
            self._play_chunks()
        self.orders = one_forward_one_backward(p, costs.micro_batches, self.spec.virtual_stages)
        self.recorder = EventRecorder()
        self.per_stage = costs.cluster.num_ranks // p
        self.slowest: int | None = None  # replica, of the first step

    def _play_chunks(self) -> None:
        """Seconds of every operation, and what is open of its exchange, from playing it."""
        costs = self.costs
        overlap: Overlap = "shared_expert" if self.spec.overlap == "shared_expert" else "none"
        for replica, number in product(range(len(self.replicas)), range(len(self.chunks[0]))):
            chunk, sort = self.chunks[replica][number], self.replicas[replica].teams[number % self.p]
            model, seconds = chunk.team.step, np.zeros((2, self.windows))
            for backward, window in product((False, True), range(self.windows)):
                if (number, sort, backward, window) not in self.inside:
                    parts, other_s = chunk_parts(costs, chunk, window, backward)
                    other_R = np.full(model.cluster.num_ranks, other_s)
                    network = Network(model.cluster)
                    played = play_step(model, (parts,), other_R, network, overlap=overlap)
                    self.inside[number, sort, backward, window] = played
                seconds[int(backward), window] = self.inside[number, sort, backward, window].total_s
            open_W = np.maximum(0.0, seconds - np.stack([chunk.forward_s_W, chunk.backward_s_W])).sum(0)
            self.times[replica][number] = (seconds[0], seconds[1], open_W)

    def chunk(self, stage: int, op: Op) -> int:
        """Virtual stage of an operation."""
        return op.chunk * self.p + stage

    def step(self, number: int, start_s: float) -> tuple[float, list[Timed], dict[str, float]]:
        """Play a step; its seconds, operations of the slowest replica, and seconds that a mean replica spends on each
        kind, summed over its stages."""
        first = number * self.costs.micro_batches
        spent = dict.fromkeys(("work", "exchange", "sync", "optimizer"), 0.0)
        played = [self._play(replica, first, spent) for replica in range(len(self.replicas))]
        if self.slowest is None:
            self.slowest = max(range(len(played)), key=lambda replica: max(t.end_s for t in played[replica]))
        if self.logged:
            self._record(number, start_s, played[self.slowest])
        ends = [
            self._close(number, start_s, stage, [[t for t in timed if t.stage == stage] for timed in played], spent)
            for stage in range(self.p)
        ]
        total = max(ends)
        tokens = float(self.spec.global_batch * self.spec.sequence)
        self.recorder.add("step", start_s, total, step=number, amount=tokens)
        return total, played[self.slowest], spent

    def _play(self, replica: int, first: int, spent: dict[str, float]) -> list[Timed]:
        """The schedule of a replica, whose micro-batches count from ``first``; adds up what it spends."""
        times, waits, p = self.times[replica], self.waits[replica], self.p

        def seconds(stage: int, op: Op) -> float:
            window, way, chunk = (first + op.micro_batch) % self.windows, op.kind == "backward", self.chunk(stage, op)
            return float(times[chunk][way][window] + waits[chunk][way][window])

        def transfer_s(stage: int, op: Op) -> float:
            onward: float = self.transfer_s[replica][stage if op.kind == "forward" else (stage - 1) % p]
            return onward

        timed = run_schedule(self.orders, seconds, transfer_s, self.spec.virtual_stages)
        share = self.replicas[replica].share
        for t in timed:
            chunk, window = self.chunk(t.stage, t.op), (first + t.op.micro_batch) % self.windows
            waits_s = float(waits[chunk][t.op.kind == "backward"][window])
            spent["work"] += share * (t.end_s - t.start_s - waits_s)
            spent["sync"] += share * waits_s
            spent["exchange"] += share * float(times[chunk][2][window]) / 2
        return timed

    def _rank(self, stage: int) -> int:
        """The first rank of the slowest replica in a stage."""
        return stage * self.per_stage + self.replicas[self.slowest or 0].first

    def _record(self, number: int, start_s: float, timed: list[Timed]) -> None:
        """Log operations of the slowest replica."""
        costs, replica = self.costs, self.slowest or 0
        chunks, first, p = self.chunks[replica], number * costs.micro_batches, self.p
        for t in timed:
            rank, chunk = self._rank(t.stage), self.chunk(t.stage, t.op)
            begin, length, backward = start_s + t.start_s, t.end_s - t.start_s, t.op.kind == "backward"
            of: dict[str, int] = {"rank": rank, "step": number, "request": t.op.micro_batch}
            self.recorder.add(t.op.kind, begin, length, **of, amount=costs.tokens)
            if self.inside:
                window, rows = (first + t.op.micro_batch) % self.windows, chunks[chunk].moe_rows
                inner = self.inside[chunk, self.replicas[replica].teams[t.stage], backward, window].log
                layers = rows[::-1] if backward else rows
                self.recorder.extend(inner.part_of_run(begin, **of, layers=layers))
            sync_s = chunks[chunk].sync_s
            if backward and self.spec.zero >= 2 and sync_s:  # its last gradients are there, and reduced, when it ends
                end = begin + length
                self.recorder.add("gradient_sync", end - sync_s, sync_s, **of, amount=chunks[chunk].sync_bytes)
            onward = chunk > 0 if backward else chunk < len(chunks) - 1
            if onward:
                seconds = self.transfer_s[replica][(t.stage - 1) % p if backward else t.stage]
                self.recorder.add("transfer", start_s + t.end_s, seconds, **of, amount=costs.transfer_bytes)

    def _close(
        self, number: int, start_s: float, stage: int, mine: list[list[Timed]], spent: dict[str, float]
    ) -> float:
        """Gradients, optimizer and weights of one stage, those that no micro-batch has dealt with; when it is done.
        ``mine``: what its ranks did, by replica, for all of which a reduction waits."""
        spec, rank = self.spec, self._rank(stage)
        late = max(range(len(mine)), key=lambda replica: mine[replica][-1].end_s)
        done, link_free = mine[late][-1].end_s, 0.0
        chunks, times = self.chunks[late][stage :: self.p], self.times[late][stage :: self.p]
        for place in range(spec.virtual_stages - 1, -1, -1) if spec.zero < 2 else ():
            chunk = chunks[place]
            last = [[t for t in each if t.op.chunk == place and t.op.kind == "backward"][-1] for each in mine]
            # Buckets are full from the first layer of the last backward on; reduction ends after that.
            ready = max(t.start_s for t in last) if spec.overlap_gradients else done
            begin = max(link_free, ready)
            link_free = max(begin + chunk.sync_s, max(t.end_s for t in last) if chunk.sync_s else 0.0)
            if chunk.sync_s:
                self.recorder.add(
                    "gradient_sync", start_s + begin, chunk.sync_s, rank=rank, step=number, amount=chunk.sync_bytes
                )
        reduced = max(done, link_free)
        tied = max(chunks, key=lambda chunk: chunk.tied_s)
        if tied.tied_s:
            self.recorder.add(
                "gradient_sync", start_s + reduced, tied.tied_s, rank=rank, step=number, amount=tied.tied_bytes
            )
            reduced += tied.tied_s
        update = sum(chunk.optimizer_s for chunk in chunks)
        self.recorder.add("optimizer", start_s + reduced, update, rank=rank, step=number)
        gather = sum(chunk.gather_s for chunk in chunks) if spec.zero < 3 else 0.0
        if spec.overlap_parameters:  # beside the next step's first forwards, and the fill of the pipeline
            ahead = next(t for t in mine[late] if t.op.kind == "forward").start_s
            gather = max(0.0, gather - ahead - sum(float(forward_s_W.mean()) for forward_s_W, _, _ in times))
        spent["sync"] += reduced - done + gather
        spent["optimizer"] += update
        return reduced + update + gather

    def memory(self, number: int, timed: list[Timed]) -> list[StageMemory]:
        """Activations of a step kept from each forward's start to its backward's end."""
        first, answer, chunks = number * self.costs.micro_batches, [], self.chunks[self.slowest or 0]
        for stage in range(self.p):
            changes: list[tuple[float, bool, Floats]] = []
            for t in timed:
                if t.stage == stage:
                    window = (first + t.op.micro_batch) % self.windows
                    size_R = chunks[self.chunk(stage, t.op)].activation_bytes_WR[window]
                    forward = t.op.kind == "forward"
                    changes.append((t.start_s, True, size_R) if forward else (t.end_s, False, -size_R))
            changes.sort(key=lambda change: change[:2])
            held_R = np.cumsum([size_R for _, _, size_R in changes], axis=0).T
            state = sum(chunk.state_bytes for chunk in chunks[stage :: self.p])
            most = held_R[held_R.max(1).argmax()]
            answer.append(StageMemory(stage, state, np.array([change[0] for change in changes]), most))
        return answer


def simulate_training(
    costs: TrainingCosts,
    origin: Mapping[str, Any] | None = None,
    fidelity: Fidelity = "step",
    factor: Mapping[str, float] | None = None,
    logged: bool = True,
) -> TrainingResult:
    """Play ``costs.spec.steps`` optimizer steps; ``factor``: parts that take so many times as long
    (:func:`moeplan.costs.training_parts.scaled`), in the step mode. Not ``logged``, the log lacks micro-batches.

    Raises:
        SpecError: the detailed mode cannot play what is asked.
    """
    if fidelity == "detailed" and costs.spec.overlap == "1f1b":
        raise SpecError(
            "fidelity (detailed) plays one micro-batch of a stage at a time, but training.overlap is 1f1b, which hides"
            " one behind another; use fidelity: step, or overlap none or shared_expert"
        )
    play, spec, cluster = _Play(costs, fidelity == "detailed", factor or {}, logged), costs.spec, costs.cluster
    now, steps, totals = 0.0, [], dict.fromkeys(("work", "exchange", "sync", "optimizer"), 0.0)
    memory: list[list[StageMemory]] = []
    for number in range(spec.steps):
        seconds, timed, spent = play.step(number, now)
        memory.append(play.memory(number, timed))
        steps.append(seconds)
        now += seconds
        for name, value in spent.items():
            totals[name] += value
    step_s = now / spec.steps
    tokens_per_s = spec.global_batch * spec.sequence / step_s
    per_rank = tokens_per_s / cluster.num_ranks
    flops = per_rank * model_flops_per_token(costs.model, spec.sequence, spec.mtp_layers)
    whole = now * spec.pp
    idle = whole - totals["work"] - totals["sync"] - totals["optimizer"]
    limit = min(cluster.rank_memory_bytes(r) for r in range(cluster.num_ranks))
    ranks = {"ranks": "one for each pipeline stage", "fidelity": "schedule"}
    if fidelity == "detailed":
        ranks = {"ranks": "one expert-parallel group for each pipeline stage", "fidelity": "detailed"}
    return TrainingResult(
        step_s=step_s,
        steps_s=tuple(steps),
        micro_batches=costs.micro_batches,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_rank=per_rank,
        tflops_per_rank=flops / 1e12,
        mfu=flops / matmul_flops(cluster.accelerator, costs.weight_dtype),
        bubble_share=idle / whole,
        exposed_exchange_share=totals["exchange"] / whole,
        exposed_sync_share=totals["sync"] / whole,
        optimizer_share=totals["optimizer"] / whole,
        dropped_share=float(costs.dropped_WL.mean()),
        memory=tuple(max(stages, key=lambda stage: stage.peak_bytes) for stages in zip(*memory, strict=True)),
        memory_bytes=limit,
        log=play.recorder.build("simulated", cluster.num_ranks, cluster.num_nodes, {**ranks, **(origin or {})}),
        source=costs.source,
        extrapolated=costs.extrapolated,
    )
