"""Optimizer steps of a training job: the pipeline schedule played over the costs of each chunk and micro-batch.

One rank stands for each pipeline stage (the others of its stage do the same): its operations follow the schedule,
dispatch and combine open a part of them, gradients are reduced as the last backwards run, weights gathered as the
first forwards do; from ZeRO stage 2 on every operation is as much longer as its computation leaves of its own
(:meth:`moeplan.costs.training.TrainingCosts.sharded`). Memory is followed from operation to operation. In the detailed
mode each operation's MoE layers are played event by event on one expert-parallel group
(:mod:`moeplan.simulation.detailed`).

``p`` stages, ``v`` chunks per stage, ``m`` micro-batches, ``W`` windows of load: micro-batch ``i`` has window
``i mod W``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """What a step of training takes; shares are of the mean step.

    ``bubble_share``: idle time of stages that wait for each other; ``exposed_exchange_share``: dispatch and combine
    that nothing hides; ``exposed_sync_share``: gradients and weights that nothing hides.
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
    """One step after another. ``inside`` holds what was played, by chunk, direction and window of load."""

    def __init__(self, costs: TrainingCosts, detailed: bool, factor: Mapping[str, float]) -> None:
        self.costs, self.spec = costs, costs.spec
        self.chunks = costs.chunks()
        if factor:
            self.chunks = [scaled(costs, chunk, factor) for chunk in self.chunks]
        self.transfer_s = costs.transfer_s * factor.get("transfers between stages", 1.0)
        p = self.p = self.spec.pp
        self.times = [costs.overlapped(chunk) for chunk in self.chunks]
        self.waits = [costs.sharded(chunk) for chunk in self.chunks]  # for weights and gradients
        self.windows = len(self.times[0][0])
        self.inside: dict[tuple[int, bool, int], DetailedStep] = {}
        if detailed:
            self._play_chunks()
        self.orders = one_forward_one_backward(p, costs.micro_batches, self.spec.virtual_stages)
        self.recorder = EventRecorder()
        self.per_stage = costs.cluster.num_ranks // p

    def _play_chunks(self) -> None:
        """Seconds of every operation, and what is open of its exchange, from playing it."""
        costs, network = self.costs, Network(self.costs.step.cluster)
        ranks = costs.step.cluster.num_ranks
        overlap: Overlap = "shared_expert" if self.spec.overlap == "shared_expert" else "none"
        for number, chunk in enumerate(self.chunks):
            seconds = np.zeros((2, self.windows))
            for backward in (False, True):
                for window in range(self.windows):
                    parts, other_s = chunk_parts(costs, chunk, window, backward)
                    other_R = np.full(ranks, other_s)
                    played = play_step(costs.step, (parts,), other_R, network, overlap=overlap)
                    self.inside[number, backward, window] = played
                    seconds[int(backward), window] = played.total_s
            open_W = np.maximum(0.0, seconds - np.stack([chunk.forward_s_W, chunk.backward_s_W])).sum(0)
            self.times[number] = (seconds[0], seconds[1], open_W)

    def chunk(self, stage: int, op: Op) -> int:
        """Virtual stage of an operation."""
        return op.chunk * self.p + stage

    def step(self, number: int, start_s: float) -> tuple[float, list[Timed], dict[str, float]]:
        """Play a step; its seconds, operations, and seconds per stage spent on each kind, summed over stages."""
        costs, spec, p = self.costs, self.spec, self.p
        first = number * costs.micro_batches

        def seconds(stage: int, op: Op) -> float:
            window, way, chunk = (first + op.micro_batch) % self.windows, op.kind == "backward", self.chunk(stage, op)
            return float(self.times[chunk][way][window] + self.waits[chunk][way][window])

        timed = run_schedule(self.orders, seconds, lambda _s, _op: self.transfer_s, spec.virtual_stages)
        spent = dict.fromkeys(("work", "exchange", "sync", "optimizer"), 0.0)
        ends = []
        tokens = costs.tokens
        for t in timed:
            rank, chunk = t.stage * self.per_stage, self.chunk(t.stage, t.op)
            begin, length = start_s + t.start_s, t.end_s - t.start_s
            self.recorder.add(t.op.kind, begin, length, rank=rank, step=number, request=t.op.micro_batch, amount=tokens)
            window = (first + t.op.micro_batch) % self.windows
            backward = t.op.kind == "backward"
            if self.inside:
                rows = self.chunks[chunk].moe_rows
                inner = self.inside[chunk, backward, window].log
                layers = rows[::-1] if backward else rows
                self.recorder.extend(
                    inner.part_of_run(begin, rank=rank, step=number, request=t.op.micro_batch, layers=layers)
                )
            waits_s, sync_s = float(self.waits[chunk][backward][window]), self.chunks[chunk].sync_s
            if backward and spec.zero >= 2 and sync_s:  # its last gradients are there, and reduced, when it ends
                self.recorder.add(
                    "gradient_sync", begin + length - sync_s, sync_s, rank=rank, step=number,
                    request=t.op.micro_batch, amount=self.chunks[chunk].sync_bytes,
                )  # fmt: skip
            spent["work"] += length - waits_s
            spent["sync"] += waits_s
            spent["exchange"] += float(self.times[chunk][2][window]) / 2
            onward = chunk > 0 if backward else chunk < len(self.chunks) - 1
            if onward:
                self.recorder.add(
                    "transfer", start_s + t.end_s, self.transfer_s, rank=rank, step=number,
                    request=t.op.micro_batch, amount=costs.transfer_bytes,
                )  # fmt: skip
        for stage in range(p):
            mine = [t for t in timed if t.stage == stage]
            ends.append(self._close(number, start_s, stage, mine, spent))
        total = max(ends)
        self.recorder.add(
            "step", start_s, total, step=number, amount=float(spec.global_batch * spec.sequence)
        )
        return total, timed, spent

    def _close(self, number: int, start_s: float, stage: int, mine: list[Timed], spent: dict[str, float]) -> float:
        """Gradients, optimizer and weights of one stage, those that no micro-batch has dealt with; when it is done."""
        spec, rank = self.spec, stage * self.per_stage
        done, link_free = mine[-1].end_s, 0.0
        for place in range(spec.virtual_stages - 1, -1, -1) if spec.zero < 2 else ():
            chunk = self.chunks[place * self.p + stage]
            last = [t for t in mine if t.op.chunk == place and t.op.kind == "backward"][-1]
            # Buckets are full from the first layer of the last backward on; reduction ends after that.
            ready = last.start_s if spec.overlap_gradients else done
            begin = max(link_free, ready)
            link_free = max(begin + chunk.sync_s, last.end_s if chunk.sync_s else 0.0)
            if chunk.sync_s:
                self.recorder.add(
                    "gradient_sync", start_s + begin, chunk.sync_s, rank=rank, step=number, amount=chunk.sync_bytes
                )
        mine_chunks = self.chunks[stage :: self.p]
        reduced = max(done, link_free)
        tied = max(mine_chunks, key=lambda chunk: chunk.tied_s)
        if tied.tied_s:
            self.recorder.add(
                "gradient_sync", start_s + reduced, tied.tied_s, rank=rank, step=number, amount=tied.tied_bytes
            )
            reduced += tied.tied_s
        update = sum(chunk.optimizer_s for chunk in mine_chunks)
        self.recorder.add("optimizer", start_s + reduced, update, rank=rank, step=number)
        gather = sum(chunk.gather_s for chunk in mine_chunks) if spec.zero < 3 else 0.0
        if spec.overlap_parameters:  # beside the next step's first forwards, and the fill of the pipeline
            ahead = next(t for t in mine if t.op.kind == "forward").start_s
            gather = max(0.0, gather - ahead - sum(float(times[0].mean()) for times in self.times[stage :: self.p]))
        spent["sync"] += reduced - done + gather
        spent["optimizer"] += update
        return reduced + update + gather

    def memory(self, number: int, timed: list[Timed]) -> list[StageMemory]:
        """Activations of a step kept from each forward's start to its backward's end."""
        first, answer = number * self.costs.micro_batches, []
        for stage in range(self.p):
            changes: list[tuple[float, bool, Floats]] = []
            for t in timed:
                if t.stage == stage:
                    window = (first + t.op.micro_batch) % self.windows
                    size_R = self.chunks[self.chunk(stage, t.op)].activation_bytes_WR[window]
                    forward = t.op.kind == "forward"
                    changes.append((t.start_s, True, size_R) if forward else (t.end_s, False, -size_R))
            changes.sort(key=lambda change: change[:2])
            held_R = np.cumsum([size_R for _, _, size_R in changes], axis=0).T
            state = sum(chunk.state_bytes for chunk in self.chunks[stage :: self.p])
            most = held_R[held_R.max(1).argmax()]
            answer.append(StageMemory(stage, state, np.array([change[0] for change in changes]), most))
        return answer


def simulate_training(
    costs: TrainingCosts,
    origin: Mapping[str, Any] | None = None,
    fidelity: Fidelity = "step",
    factor: Mapping[str, float] | None = None,
) -> TrainingResult:
    """Play ``costs.spec.steps`` optimizer steps; ``factor``: parts that take so many times as long
    (:func:`moeplan.costs.training_parts.scaled`), in the step mode.

    Raises:
        SpecError: the detailed mode cannot play what is asked.
    """
    if fidelity == "detailed" and costs.spec.overlap == "1f1b":
        raise SpecError(
            "fidelity (detailed) plays one micro-batch of a stage at a time, but training.overlap is 1f1b, which hides"
            " one behind another; use fidelity: step, or overlap none or shared_expert"
        )
    play, spec, cluster = _Play(costs, fidelity == "detailed", factor or {}), costs.spec, costs.cluster
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
