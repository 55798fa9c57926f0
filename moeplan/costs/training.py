"""Seconds and bytes of training: chunks of layers in a pipeline, what hides what, and a whole step.

What layers take is in :mod:`moeplan.costs.training_layers`, which ranks wait for each other in
:mod:`moeplan.costs.training_teams`, gradients, optimizer and weights in :mod:`moeplan.costs.training_state`,
activations kept, and what is computed again instead, in :mod:`moeplan.costs.activations`.

- 1F1B with ``p`` stages, ``m`` micro-batches and ``v`` chunks per stage idles ``(p - 1) / (v m)`` of the work
  (Narayanan et al. 2021, arXiv 2104.04473); the simulation plays the schedule, :func:`training_step` uses this.
- The stage of a multi-token prediction layer holds embedding and head too, and logits of each prediction.

``W`` windows of load, ``L`` MoE layers, ``K`` layers, ``E`` experts, ``R`` ranks of an expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.activations import activation_bytes, pair_bytes
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.elementwise import stream
from moeplan.costs.step import StepModel
from moeplan.costs.tables import Seconds
from moeplan.costs.technique import Technique
from moeplan.costs.training_layers import TrainingLayers
from moeplan.costs.training_state import TrainingState
from moeplan.costs.training_teams import Team, at_paces, expert_group, placement_groups, replicas_of
from moeplan.costs.work import Work, link_speeds, speeds
from moeplan.errors import SpecError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside
from moeplan.specs.training import TrainingSpec
from moeplan.specs.workload import DispatchKind, Workload

__all__ = [
    "Chunk",
    "TrainingCost",
    "TrainingCosts",
    "capacity",
    "model_flops_per_token",
    "training_step",
]

Floats = NDArray[np.float64]
_SYNCED, _TRANSFERS = "gradients and weights", "transfers between stages"


def capacity(load_WLE: Floats, factor: float | None, pad: bool) -> tuple[Floats, Floats]:
    """(load that each expert works on [W, L, E], dropped share of all pairs [W, L]).

    An expert takes at most ``factor`` times the mean number of pairs; with ``pad`` each works on exactly so many.
    """
    if factor is None:
        return load_WLE, np.zeros(load_WLE.shape[:2])
    most = factor * load_WLE.mean(2, keepdims=True)
    kept = np.minimum(load_WLE, most)
    dropped = 1 - kept.sum(2) / load_WLE.sum(2)
    return np.broadcast_to(most, load_WLE.shape) if pad else kept, dropped


def model_flops_per_token(model: ModelSpec, sequence: int, mtp_layers: int = 0) -> float:
    """Operations that one token of training needs, forward and backward, recomputation and padding not counted.

    Six per active weight of a product, and three times the causal attention kernel's ``T (q + v)`` per head and layer
    (as Megatron-LM counts them).
    """
    embedding = model.vocab_size * model.hidden_size
    heads = embedding * (0 if model.tie_word_embeddings else 1)
    active = float(model.non_expert_parameters - heads)  # one of the two tables is looked up, not multiplied
    active += model.num_moe_layers * model.top_k * model.expert_parameters
    attention = 0.0
    if (a := model.attention) is not None:
        query = (a.qk_nope_head_dim or a.head_dim) + (a.qk_rope_head_dim or 0)
        attention = 3 * sequence * a.num_heads * (query + a.head_dim)
    layers = model.num_layers
    if mtp_layers:
        per_layer = (active - embedding) / layers
        active += mtp_layers * (per_layer + embedding + 2 * model.hidden_size**2)
    return 6 * active + attention * (layers + mtp_layers)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Consecutive layers of one pipeline chunk. Seconds of one micro-batch, by window of load; bytes on a rank.

    ``team``: the ranks that it is on. ``moe_rows``: rows of the load that its MoE layers have.
    ``exchange_s_W``: dispatch and combine of one direction. ``sync_s``: reduction of gradients, ``gather_s``:
    all-gather of weights, each of them once; ``optimizer_s``: the update; ``tied_s``: the all-reduce of ``tied_bytes``
    of gradients of an embedding that other stages hold too. ``activation_bytes_WR`` of one micro-batch on each rank of
    an expert-parallel group, which works on as many pairs as its experts get.
    """

    team: Team
    layers: tuple[int, ...]
    moe_rows: tuple[int, ...]
    forward_s_W: Floats
    backward_s_W: Floats
    exchange_s_W: Floats
    sync_s: float
    gather_s: float
    optimizer_s: float
    sync_bytes: float
    state_bytes: float
    activation_bytes_WR: Floats
    tied_s: float
    tied_bytes: float


class TrainingCosts:
    """One model under one training specification: what each layer takes and weighs.

    ``placement`` and ``load_WLE`` are of one expert-parallel group of ``spec.ep`` ranks, each of which stands for the
    ``spec.expert_tp`` neighbours that split its experts. ``teams`` are those that do layers together, at the pace of
    their slowest (:mod:`moeplan.costs.work`), ``replicas`` how stages are made of them.

    Raises:
        InputError, SpecError: degrees, cluster, placement and load do not fit each other.
    """

    def __init__(
        self,
        model: ModelSpec,
        cluster: ClusterSpec,
        profile: HardwareProfile | None,
        placement: Placement,
        load_WLE: Floats,
        spec: TrainingSpec,
        weight_dtype: Dtype = "bf16",
        activation_dtype: Dtype = "bf16",
        dispatch: DispatchKind = "per_node",
    ) -> None:
        self.model, self.cluster, self.spec, self.weight_dtype = model, cluster, spec, weight_dtype
        self._kind = activations_beside(weight_dtype)
        self.micro_batches = spec.micro_batches(cluster.num_ranks)
        self.tokens = spec.micro_batch * spec.sequence // (spec.tp * spec.cp)
        work = Workload(
            phase="prefill",
            batch_per_rank=self.tokens,
            context=spec.sequence,
            weight_dtype=weight_dtype,
            activation_dtype=activation_dtype,
        )
        how = Technique(dispatch=dispatch, tp=spec.tp, cp=spec.cp, expert_tp=spec.expert_tp)
        self.groups, self.group = placement_groups(model, cluster, spec), expert_group(cluster, spec.ep, spec.expert_tp)
        sorts, self.replicas = replicas_of(cluster, spec)
        steps = [StepModel(model, at_paces(self.group, paces_2B), work, how, profile) for paces_2B in sorts]
        self._stages_2p = np.stack([speeds(cluster), link_speeds(cluster)]).reshape(2, spec.pp, -1).min(2)
        self.links = CollectiveCosts(cluster, profile)
        chip, whole = cluster.accelerator, steps[0]
        layers = self._layers = TrainingLayers(
            model, chip, profile, spec, weight_dtype, self.tokens, whole.fixed, self.links
        )
        adam = stream(profile, chip, "optimizer", "forward")
        state = self._state = TrainingState(
            model, cluster.num_ranks, spec, weight_dtype, placement, self.links, adam
        )
        worked_WLE, self.dropped_WL = capacity(load_WLE, spec.capacity_factor, spec.overflow == "pad")
        taken_WL = worked_WLE.sum(2, keepdims=True) / load_WLE.sum(2, keepdims=True)  # of all pairs, more if padded
        split = placement.over_groups(spec.expert_tp)
        loads = list(zip(worked_WLE, taken_WL, strict=True))
        dense, sparse = state.layer_parameters
        parameters = dense, sparse + state.slots * state.slot_parameters
        self.teams = [
            Team(model, spec, step, [step.batches(split, *load)[0] for load in loads], layers, parameters, paces_2B)
            for step, paces_2B in zip(steps, sorts, strict=True)
        ]
        found, measured = whole.step(split, load_WLE.mean(0)), layers.ratio.measured
        self.relative_error = found.high_s / found.total_s - 1
        optimizer = adam.source if adam.measured else "modelled from bytes moved"
        self._source = {**found.source, **layers.source, "optimizer": optimizer}
        guessed = {"backward": len(measured) < 3, "optimizer": not adam.measured}
        self._extrapolated = (*found.extrapolated, *(name for name, guess in guessed.items() if guess))
        self._part_errors = whole.part_errors
        self._chunks: dict[tuple[int, int], Chunk] = {}

    @property
    def experts_back(self) -> float:
        """Backward of routed experts over their forward, which is computed again under full recomputation."""
        return self._layers.experts_back

    # ------------------------------------------------------------------ layers and chunks

    def chunks(self, replica: int = 0) -> list[Chunk]:
        """``pp * virtual_stages`` chunks of one of :attr:`replicas` in order of the layers; chunk ``c pp + s`` is on
        stage ``s``.

        Raises:
            SpecError: more chunks than layers.
        """
        cuts, teams, p = self._cuts, self.replicas[replica].teams, self.spec.pp
        return [self._chunk(number, teams[number % p]) for number in range(len(cuts))]

    @cached_property
    def _kinds(self) -> list[bool]:
        """Whether layers are MoE, those that predict after the others."""
        moe = set(self.model.moe_layer_ids)
        return [layer in moe for layer in range(self.model.num_layers)] + [True] * self.spec.mtp_layers

    @cached_property
    def _rows_K(self) -> NDArray[np.int64]:
        """Row of the load of each layer; a prediction layer is loaded as the last."""
        rows: NDArray[np.int64] = np.minimum(np.cumsum(self._kinds) - 1, self.model.num_moe_layers - 1)
        return rows

    @cached_property
    def _layers_s(self) -> list[Floats]:
        """Of every sort of team (:meth:`moeplan.costs.training_teams.Team.layers_s`)."""
        return [team.layers_s(self._kinds, self._rows_K) for team in self.teams]

    @cached_property
    def _cuts(self) -> list[range]:
        """Layers of every chunk, cut where the slowest is fastest, were all teams as the fastest; embedding and head
        count."""
        count = self.spec.pp * self.spec.virtual_stages
        if count > len(self._kinds):
            raise SpecError(
                f"training.pp x virtual_stages ({count}) exceeds the model's layers ({len(self._kinds)}); use fewer"
            )
        usual_K3W = min(self._layers_s, key=np.sum)
        return [range(*ends) for ends in _cut(usual_K3W.sum(1).mean(1), count)]

    @cached_property
    def _tied(self) -> tuple[float, float]:
        """Seconds and bytes of the all-reduce among stages that hold the embedding."""
        stages = sorted({number % self.spec.pp for number, cut in enumerate(self._cuts) if self._embeds(cut)})
        tied, size = self._state.embedding(stages)
        return tied.at(*self._stages_2p[:, stages].min(1).tolist()), size

    def _embeds(self, layers: range) -> bool:
        """Whether a chunk holds the embedding: at the first layer, for prediction, or as the head it is tied to."""
        last = self.model.num_layers - 1
        return layers[0] == 0 or layers[-1] > last or (self.model.tie_word_embeddings and last in layers)

    def _chunk(self, number: int, sort: int) -> Chunk:
        """Chunk ``number`` on the ``sort`` of team."""
        if (number, sort) not in self._chunks:
            self._chunks[number, sort] = self._made(self._cuts[number], number % self.spec.pp, sort)
        return self._chunks[number, sort]

    def _made(self, layers: range, stage: int, sort: int) -> Chunk:
        model, spec, team = self.model, self.spec, self.teams[sort]
        part = slice(layers.start, layers.stop)
        kinds = self._kinds[part]
        moe_rows = tuple(self._rows_K[part][kinds].tolist())
        predicting = sum(layer >= model.num_layers for layer in layers)
        heads = predicting + (model.num_layers - 1 in layers)
        tables = self._embeds(layers) + (heads > 0 and not model.tie_word_embeddings)
        tied_s, tied_bytes = self._tied if self._embeds(layers) else (0.0, 0.0)
        state = self._state.chunk(kinds, tables, predicting)
        again = spec.recompute_modules
        split = spec.expert_tp
        by_kind = [activation_bytes(model, moe, spec.recompute, self._kind, again, split) for moe in (False, True)]
        kept = sum(by_kind[kind] for kind in kinds) * self.tokens
        kept += heads * self.tokens * model.vocab_size * 4  # logits and their softmax in fp32
        kept += predicting * self.tokens * 2 * model.hidden_size * DTYPE_BYTES[self._kind]
        pairs_WR = np.stack([batch.pairs_LR[list(moe_rows)].sum(0) for batch in team.batches_W])
        beyond_WR = pairs_WR - len(moe_rows) * self.tokens * model.top_k * split  # an even load
        forward_s_W, backward_s_W, exchange_s_W = self._layers_s[sort][part].sum(0)
        paces = self._stages_2p[:, stage].tolist()  # of all that reduce and gather together
        return Chunk(
            team=team,
            layers=tuple(layers),
            moe_rows=moe_rows,
            forward_s_W=forward_s_W,
            backward_s_W=backward_s_W,
            exchange_s_W=exchange_s_W,
            sync_s=state.sync.at(*paces),
            gather_s=state.gather.at(*paces),
            optimizer_s=state.optimizer.at(*paces),
            sync_bytes=state.sync_bytes,
            state_bytes=state.state_bytes,
            activation_bytes_WR=kept + pair_bytes(model, spec.recompute, self._kind, again, split) * beyond_WR,
            tied_s=tied_s,
            tied_bytes=tied_bytes,
        )

    @property
    def transfer_bytes(self) -> float:
        """Activations of a micro-batch from one rank to the same rank of the next stage."""
        return self.tokens * self.model.hidden_size * DTYPE_BYTES[self._kind]

    def transfer_s(self, replica: int = 0) -> Floats:
        """Seconds ``[p]`` of that from each stage of one of :attr:`replicas` to the next, from the last to the first,
        or back."""
        links_p = self.replicas[replica].links_p
        seconds: Floats = Work.of([self._transfer]).at(1.0, np.minimum(links_p, np.roll(links_p, -1)))
        return seconds

    @property
    def _transfer(self) -> Seconds:
        return self.links.seconds("p2p", 2, self.transfer_bytes, self.cluster.num_ranks // self.spec.pp)

    @property
    def _sent(self) -> dict[str, list[Seconds]]:
        """What ranks of different stages or groups send each other, by part; gradients and weights of the chunks made
        so far."""
        between = [self._transfer] if self.spec.pp > 1 else []
        parts = {_SYNCED: self._state.collectives, _TRANSFERS: between}
        return {name: found for name, found in parts.items() if found}

    @property
    def source(self) -> dict[str, str]:
        """Where seconds of each part come from."""
        sent = {name: "; ".join(dict.fromkeys(part.source for part in found)) for name, found in self._sent.items()}
        return self._source | sent

    @property
    def extrapolated(self) -> tuple[str, ...]:
        """Parts beyond what is measured."""
        sent = (name for name, found in self._sent.items() if any(part.extrapolated for part in found))
        return (*self._extrapolated, *sent)

    @property
    def part_errors(self) -> dict[str, float]:
        """Relative error of each part of a training step whose times :meth:`moeplan.costs.training_parts.scaled` can
        take longer; gradients and weights: the largest of the chunks made so far."""
        return {
            **self._part_errors,
            _SYNCED: self._state.relative_error,
            _TRANSFERS: self._transfer.relative_error if self.spec.pp > 1 else 0.0,
            "optimizer": self._state.adam.relative_error,
        }

    def overlapped(self, chunk: Chunk) -> tuple[Floats, Floats, Floats]:
        """(forward, backward, exchange left open) seconds of a chunk with its exchanges, by window.

        Under ``1f1b`` the exchange of one direction runs beside the other direction's work of another micro-batch.
        """
        forward, backward, exchange = chunk.forward_s_W, chunk.backward_s_W, chunk.exchange_s_W
        if self.spec.overlap != "1f1b":
            return forward + exchange, backward + exchange, 2 * exchange
        first, second = np.maximum(0.0, exchange - backward), np.maximum(0.0, exchange - forward)
        return forward + first, backward + second, first + second

    def sharded(self, chunk: Chunk) -> tuple[Floats, Floats]:
        """(forward, backward) seconds by window that every micro-batch waits for weights and gradients of a chunk; none
        below ZeRO stage 2.

        What overlaps hides behind the computation of the same micro-batch, no longer than dispatch and combine leave
        the links free meanwhile; gathering and reducing take turns.
        """
        spec = self.spec
        forward, backward, _ = self.overlapped(chunk)
        gather, sync = chunk.gather_s * (spec.zero >= 3), chunk.sync_s * (spec.zero >= 2)

        def left(operation_s_W: Floats, exchanges: int, sync_s: float) -> Floats:
            room_W = np.maximum(0.0, operation_s_W - exchanges * chunk.exchange_s_W)
            beside = gather * spec.overlap_parameters + sync_s * spec.overlap_gradients
            return gather + sync_s - beside + np.maximum(0.0, beside - room_W)

        return left(forward, 1, 0.0), left(backward, 2 if spec.recompute == "full" else 1, sync)


def _cut(seconds: Floats, count: int) -> list[tuple[int, int]]:
    """Cut layers into ``count`` consecutive runs, none empty, so that the longest takes least."""
    n = len(seconds)
    ends = np.concatenate([[0.0], np.cumsum(seconds)])
    best = np.full((count + 1, n + 1), np.inf)
    at = np.zeros((count + 1, n + 1), int)
    best[0, 0] = 0.0
    for k in range(1, count + 1):
        for j in range(k, n + 1):
            choices = np.maximum(best[k - 1, k - 1 : j], ends[j] - ends[k - 1 : j])
            i = int(choices.argmin())
            best[k, j], at[k, j] = choices[i], k - 1 + i
    cuts, j = [], n
    for k in range(count, 0, -1):
        cuts.append((int(at[k, j]), j))
        j = int(at[k, j])
    return cuts[::-1]


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """Seconds of a step and where they go; ``gradient_sync_s`` that nothing hides, of weights too; ``state_bytes`` of
    weights, gradients and optimizer on a rank."""

    total_s: float
    forward_s: float
    backward_s: float
    bubble_s: float
    gradient_sync_s: float
    optimizer_s: float
    state_bytes: float
    relative_error: float
    source: Mapping[str, str]
    extrapolated: tuple[str, ...]


def training_step(costs: TrainingCosts) -> TrainingCost:
    """A step in closed form, as if all stages were equal and all replicas as slow as the slowest: what the simulated
    schedule comes to without differences."""
    spec, replicas = costs.spec, map(costs.chunks, range(len(costs.replicas)))
    chunks = max(replicas, key=lambda chunks: sum(float(np.sum(costs.overlapped(chunk)[:2])) for chunk in chunks))
    forward = sum(float(costs.overlapped(chunk)[0].mean()) for chunk in chunks) / spec.pp
    backward = sum(float(costs.overlapped(chunk)[1].mean()) for chunk in chunks) / spec.pp
    waits = sum(float(np.sum(costs.sharded(chunk), 0).mean()) for chunk in chunks) / spec.pp
    bubble = (spec.pp - 1) / spec.virtual_stages * (forward + backward + waits)
    sync = sum(chunk.sync_s for chunk in chunks) / spec.pp if spec.zero < 2 else 0.0
    if spec.overlap_gradients:
        sync = max(0.0, sync - backward)
    gather = sum(chunk.gather_s for chunk in chunks) / spec.pp if spec.zero < 3 else 0.0
    if spec.overlap_parameters:
        gather = max(0.0, gather - forward)
    tied = max(chunk.tied_s for chunk in chunks)
    optimizer = sum(chunk.optimizer_s for chunk in chunks) / spec.pp
    count = costs.micro_batches
    return TrainingCost(
        total_s=count * (forward + backward + waits) + bubble + sync + tied + gather + optimizer,
        forward_s=count * forward,
        backward_s=count * backward,
        bubble_s=bubble,
        gradient_sync_s=count * waits + sync + tied + gather,
        optimizer_s=optimizer,
        state_bytes=max(sum(chunk.state_bytes for chunk in chunks[stage :: spec.pp]) for stage in range(spec.pp)),
        relative_error=costs.relative_error,
        source=costs.source,
        extrapolated=costs.extrapolated,
    )
