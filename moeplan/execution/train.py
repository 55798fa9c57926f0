"""Training a MoE language model under expert parallelism, step by step, with plans applied between steps.

``B`` sequences of this rank, ``T`` positions, ``R`` ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moeplan.artifacts.event_log import NONE, EventLog
from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.simulation_result import TrafficMatrix
from moeplan.errors import SpecError
from moeplan.execution.clock import Clock
from moeplan.execution.groups import Mesh, build_mesh
from moeplan.execution.layer import MoELayer
from moeplan.execution.migrate import Migrator
from moeplan.execution.model import LanguageModel, ModelOptions
from moeplan.execution.optimizer import AdamOptions, MoEAdamW
from moeplan.execution.options import TrainOptions
from moeplan.execution.text import Corpus

__all__ = ["StepMetrics", "Trainer", "gather_events"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step, all ranks: the mean loss in nats per byte, and each rank's seconds.

    ``expert_R``: experts, forward and backward. ``alltoall_R``: in exchanges, waiting for slower ranks included.
    ``exposed_R``: the part of that in which the rank computes nothing. ``imbalance``: most (token, expert) pairs of a
    rank over the mean.
    """

    step: int
    loss: float
    step_s: float
    tokens: int
    expert_R: list[float]
    alltoall_R: list[float]
    exposed_R: list[float]
    imbalance: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all ranks over the slowest rank's time."""
        return self.tokens / self.step_s

    def to_json(self) -> dict[str, Any]:
        """One line of a metrics file."""
        return {
            "step": self.step,
            "loss": self.loss,
            "step_s": self.step_s,
            "tokens_per_s": self.tokens_per_s,
            "expert_s": self.expert_R,
            "alltoall_s": self.alltoall_R,
            "exposed_s": self.exposed_R,
            "imbalance": self.imbalance,
        }


class Trainer:
    """A model, its optimizer and its migrator on this rank; every rank makes one, with the same options.

    Raises:
        SpecError: options that do not fit each other or the ranks. PlanError: the placement does not fit.
    """

    def __init__(
        self,
        options: TrainOptions,
        corpus: Corpus,
        placement: Placement | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        o = self.options = options
        if o.model.vocab_size != 256:
            raise SpecError(f"{o.model.name}: vocab_size ({o.model.vocab_size}) must be 256; live runs train on bytes")
        if o.dtype not in DTYPES:
            raise SpecError(f"dtype ({o.dtype}) must be one of {', '.join(DTYPES)}")
        self.corpus = corpus
        self.mesh = mesh or build_mesh(o.tp, o.edp, o.ranks_per_node)
        if o.batch % self.mesh.dp.size:
            raise SpecError(f"batch ({o.batch}) is not a multiple of the data-parallel ranks ({self.mesh.dp.size})")
        self.clock = Clock(self.mesh.world.rank, enabled=True, cuda=self.mesh.device.type == "cuda")
        if placement is None:
            spec = o.model
            placement = Placement.contiguous(
                spec.num_moe_layers, spec.num_experts, self.mesh.ep.size, self.mesh.ranks_per_node
            )
        left_open = ModelOptions(o.dispatch, o.split, o.router, DTYPES[o.dtype], o.seed)
        self.model = LanguageModel(o.model, self.mesh, placement, left_open, self.clock)
        experts = [moe.experts for moe in self.moe_layers]
        routed = {id(layer.weights_SW) for layer in experts}
        dense = [(name, p) for name, p in self.model.named_parameters() if id(p) not in routed]
        self.optimizer = MoEAdamW(dense, experts, self.mesh, AdamOptions(lr=o.lr, zero=o.zero), self.clock)
        self.migrator = Migrator(experts, self.mesh, placement, self.optimizer, self.clock)
        self.steps_done = 0

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The model's MoE layers."""
        return self.model.moe_layers

    def rows(self, step: int, *, held_out: bool = False, sequences: int | None = None) -> tuple[torch.Tensor, Any]:
        """This rank's sequences ``[B, T + 1]`` of a step and their domains: the same batch on any number of ranks."""
        count = self.options.batch if sequences is None else sequences
        rng = np.random.default_rng([self.options.seed, step, int(held_out)])
        rows, domain_B = self.corpus.batch(rng, count, self.options.length, held_out=held_out)
        mine = slice(*(count * (self.mesh.dp.rank + i) // self.mesh.dp.size for i in (0, 1)))
        return torch.from_numpy(rows[mine]).to(self.mesh.device), domain_B[mine]

    def step(self) -> StepMetrics:
        """One training step; the metrics of all ranks, on all of them."""
        o, clock = self.options, self.clock
        clock.step = number = self.steps_done
        rows_BT, _ = self.rows(number)
        clock.take_totals()
        begin = time.perf_counter()
        with clock.span("step", amount=rows_BT[:, 1:].numel()):
            self.optimizer.zero_grad()
            with clock.span("forward"):
                loss, total = self.model.loss(rows_BT)
            with clock.span("backward"):
                total.backward()
            self.optimizer.step(o.lr * min(1.0, (number + 1) / max(1, o.warmup)))
            if o.router.bias_rate:
                for moe in self.moe_layers:
                    if moe.last is not None:
                        moe.router.update_bias(moe.last.load_E, self.mesh.dp)
        seconds = time.perf_counter() - begin
        self.steps_done += 1
        return self._metrics(number, loss, seconds)

    def _metrics(self, number: int, loss: torch.Tensor, seconds: float) -> StepMetrics:
        totals = self.clock.take_totals()
        none = [0.0, 0.0]
        exchange = totals.get("dispatch", none)[0] + totals.get("combine", none)[0]
        expert_s, pairs = totals.get("experts", none)
        mine = torch.tensor(
            [float(loss), seconds, expert_s, exchange, pairs], dtype=torch.float64, device=loss.device
        )
        all_R = [mine]
        if self.mesh.world.group is not None:
            all_R = [torch.empty_like(mine) for _ in range(self.mesh.world.size)]
            dist.all_gather(all_R, mine, group=self.mesh.world.group)
        loss_R, step_R, expert_R, exchange_R, pairs_R = torch.stack(all_R).t().tolist()
        mean = sum(loss_R) / len(loss_R)
        if self.mesh.world.rank == 0:
            self.clock.events.add("loss", time.perf_counter() - self.clock.origin_s, step=number, amount=mean)
        tokens = self.options.batch * self.options.length
        busiest = max(pairs_R) * len(pairs_R) / max(1.0, sum(pairs_R))
        # Nothing is computed while tokens travel: all of the exchange is exposed.
        return StepMetrics(number, mean, max(step_R), tokens, expert_R, exchange_R, exchange_R, busiest)

    @torch.no_grad()
    def evaluate(self, batches: int = 4) -> float:
        """Mean loss on held-out text, nats per byte; its events are of no step, as are all until the next step."""
        self.clock.step = NONE
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for number in range(batches):
            total += self.model.loss(self.rows(number, held_out=True)[0])[0].double()
        return float(self.mesh.dp.sum_(total)) / batches / self.mesh.dp.size

    def expert_norms(self) -> torch.Tensor:
        """Norm of each expert's weights ``[L, E]``, the mean over its copies; 0 would be a lost expert."""
        shape = (len(self.moe_layers), self.options.model.num_experts)
        total, copies = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for l, moe in enumerate(self.moe_layers):
            for s, expert in enumerate(moe.experts.table.local_experts_S.tolist()):
                if expert != EMPTY:
                    total[l, expert] += float(torch.linalg.vector_norm(moe.experts.weights_SW[s].detach().float()))
                    copies[l, expert] += 1
        return (self.mesh.ep.sum_(total.to(self.mesh.device)) / self.mesh.ep.sum_(copies.to(self.mesh.device))).cpu()


def gather_events(trainer: Trainer, origin: dict[str, Any]) -> EventLog | None:
    """The events of all ranks in the order of their start, on world rank 0; None on the others.

    ``origin`` of the log gains the ``traffic`` of the mean step: :class:`TrafficMatrix` of world ranks, before and
    after a plan where one was applied.
    """
    mesh = trainer.mesh
    nodes = mesh.ep.size // mesh.ranks_per_node * mesh.edp.size
    own = trainer.clock.events.build("measured", mesh.world.size, nodes, origin)
    if mesh.world.group is None:
        return own
    columns: dict[str, Any] = {f.name: getattr(own, f.name) for f in fields(own) if f.name.endswith("_V")}
    parts: list[Any] | None = [None] * mesh.world.size if mesh.world.rank == 0 else None
    dist.gather_object((columns, trainer.clock.sent_R), parts, group=mesh.world.group)
    if parts is None:
        return None
    joined = {name: np.concatenate([part[name] for part, _ in parts]) for name in columns}
    order_V = np.lexsort((joined["rank_V"], joined["start_s_V"]))
    ordered: dict[str, Any] = {name: column[order_V] for name, column in joined.items()}
    traffic = _traffic([sent_R for _, sent_R in parts], trainer.clock.steps, mesh.world.size // nodes)
    return replace(own, origin={**origin, "traffic": traffic}, **ordered)


def _traffic(sent: list[tuple[dict[int, float], ...]], steps: list[int], per_node: int) -> list[dict[str, Any]]:
    """Bytes per step between world ranks: one matrix, or where a plan was applied one before and one after it."""
    names = ("before the plan", "after the plan") if all(steps) else ("live run",) * 2
    found = []
    for period, (name, count) in enumerate(zip(names, steps, strict=True)):
        sent_RR = np.zeros((len(sent), len(sent)))
        for rank, sent_R in enumerate(sent):
            sent_RR[rank, list(sent_R[period])] = list(sent_R[period].values())
        if count:
            source = "every row of tokens that was sent"
            found.append(TrafficMatrix.of(name, sent_RR / count, None, count, per_node, source))
    return [matrix.model_dump(mode="json") for matrix in found]
