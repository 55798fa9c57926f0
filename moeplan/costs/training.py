"""Seconds and bytes of training: chunks of layers in a pipeline, what hides what, and a whole step.

What layers take is in :mod:`moeplan.costs.training_layers`, gradients, optimizer and weights in
:mod:`moeplan.costs.training_state`, activations kept, and what is computed again instead, in
:mod:`moeplan.costs.activations`.

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
from moeplan.costs.technique import Technique, expert_groups
from moeplan.costs.training_layers import BothWays, TrainingLayers
from moeplan.costs.training_state import TrainingState
from moeplan.costs.work import Work, in_turn, link_speeds, speeds
from moeplan.errors import InputError
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside
from moeplan.specs.training import TrainingSpec
from moeplan.specs.workload import DispatchKind, Workload

__all__ = [
    "Chunk",
    "TrainingCost",
    "TrainingCosts",
    "capacity",
    "expert_group",
    "model_flops_per_token",
    "placement_groups",
    "training_step",
]

Floats = NDArray[np.float64]
_SYNCED, _TRANSFERS = "gradients and weights", "transfers between stages"


def expert_group(cluster: ClusterSpec, ep: int, expert_tp: int = 1) -> ClusterSpec:
    """``ep x expert_tp`` neighbours of a cluster: one expert-parallel group, each of them as slow as the slowest that
    has its place in any group of any stage, since all wait for each other.

    Raises:
        InputError: they do not fill nodes evenly, or a rank of the cluster has failed.
    """
    ranks = ep * expert_tp
    for rank, spec in cluster.ranks.items():
        if spec.failed:
            raise InputError(
                f"cluster.ranks.{rank}.failed (true), but a training job needs every rank; leave it out of the cluster"
                " (ranks, nodes), or failed out"
            )
    per_node = min(ranks, cluster.ranks_per_node)
    if ranks % per_node or ranks > cluster.num_ranks or cluster.topology == "explicit":
        names = "training.ep" + " x expert_tp" * (expert_tp > 1)
        raise InputError(
            f"{names} ({ranks}) does not fill nodes of cluster.ranks_per_node ({cluster.ranks_per_node}) evenly,"
            " or the cluster has explicit links; choose a divisor or a multiple, and a preset topology"
        )
    own = {}
    for place in {rank % ranks for rank in cluster.ranks}:
        peers = [cluster.rank(rank) for rank in range(place, cluster.num_ranks, ranks)]
        slowest = {name: min(getattr(peer, name) for peer in peers) for name in ("speed", "link_speed")}
        own[place] = RankSpec.model_validate(slowest)
    return cluster.model_copy(update={"num_nodes": ranks // per_node, "ranks_per_node": per_node, "ranks": own})


def placement_groups(model: ModelSpec, cluster: ClusterSpec, spec: TrainingSpec) -> ClusterSpec:
    """:func:`expert_group` as a placement sees it: neighbours that split experts are one rank.

    Raises:
        InputError, SpecError: the degrees do not fit the cluster or the experts.
    """
    group = expert_group(cluster, spec.ep, spec.expert_tp)
    return expert_groups(model, group, spec.expert_tp, "training.expert_tp")


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

    ``moe_rows``: rows of the load that its MoE layers have.
    ``exchange_s_W``: dispatch and combine of one direction. ``sync_s``: reduction of gradients, ``gather_s``:
    all-gather of weights, each of them once; ``optimizer_s``: the update; ``tied_s``: the all-reduce of ``tied_bytes``
    of gradients of an embedding that other stages hold too. ``activation_bytes_WR`` of one micro-batch on each rank of
    an expert-parallel group, which works on as many pairs as its experts get.
    """

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
    ``spec.expert_tp`` neighbours that split its experts. Seconds are those of the slowest, for which all others wait
    (:mod:`moeplan.costs.work`): of what ranks of ``tp`` and ``cp`` do together the slowest such group anywhere in the
    job, of experts and exchanges the slowest rank and link (:func:`expert_group`).

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
        self.groups = placement_groups(model, cluster, spec)
        step = self.step = StepModel(model, expert_group(cluster, spec.ep, spec.expert_tp), work, how, profile)
        self.speeds = float(step.speed_R.min()), float(step.link_R.min())
        paces_2R = np.stack([speeds(cluster), link_speeds(cluster)])
        self._paces_2G = np.unique(paces_2R.reshape(2, -1, spec.tp * spec.cp).min(2), axis=1)
        self.links = CollectiveCosts(cluster, profile)
        chip = cluster.accelerator
        self._layers = TrainingLayers(
            model, chip, profile, spec, weight_dtype, self.tokens, step.fixed, self.links
        )
        adam = stream(profile, chip, "optimizer", "forward")
        self._state = TrainingState(model, cluster.num_ranks, spec, weight_dtype, placement, self.links, adam)
        worked_WLE, self.dropped_WL = capacity(load_WLE, spec.capacity_factor, spec.overflow == "pad")
        taken_WL = worked_WLE.sum(2, keepdims=True) / load_WLE.sum(2, keepdims=True)  # of all pairs, more if padded
        split = placement.over_groups(spec.expert_tp)
        self.batches_W = [
            step.batches(split, worked_LE, taken_L)[0]
            for worked_LE, taken_L in zip(worked_WLE, taken_WL, strict=True)
        ]
        whole, measured = step.step(split, load_WLE.mean(0)), self._layers.ratio.measured
        self.relative_error = whole.high_s / whole.total_s - 1
        optimizer = adam.source if adam.measured else "modelled from bytes moved"
        self._source = {**whole.source, **self._layers.source, "optimizer": optimizer}
        guessed = {"backward": len(measured) < 3, "optimizer": not adam.measured}
        self._extrapolated = (*whole.extrapolated, *(name for name, guess in guessed.items() if guess))

    @property
    def experts_back(self) -> float:
        """Backward of routed experts over their forward, which is computed again under full recomputation."""
        return self._layers.experts_back

    def _on_groups(self, part: BothWays) -> Floats:
        """Seconds ``[2, G]``, forward and backward, on each sort of group of ranks that split sequences and layers."""
        return np.array(part.at(*self._paces_2G))

    @cached_property
    def _moe(self) -> Floats:
        """``[forward and backward, attention and shared experts]`` of a MoE layer; gradients of all its weights are
        added up in backward."""
        dense, experts = self._state.layer_parameters[1], self._state.slots * self._state.slot_parameters
        attention = self._layers.attention + self._layers.added(dense + experts)
        parts_22G = np.stack([self._on_groups(attention), self._on_groups(self._layers.shared)], 1)
        return np.stack([in_turn(parts_2G.T) for parts_2G in parts_22G])

    @property
    def attention_s(self) -> Floats:
        """Forward and backward of a MoE layer without its experts and exchanges."""
        return self._moe[:, 0]

    @property
    def shared_s(self) -> Floats:
        """What its shared experts add to them."""
        return self._moe[:, 1]

    # ------------------------------------------------------------------ layers and chunks

    def chunks(self) -> list[Chunk]:
        """``pp * virtual_stages`` chunks in order of the layers; chunk ``c pp + s`` is on stage ``s``.

        Layers are cut where the slowest chunk is fastest; embedding and head count.

        Raises:
            InputError: more chunks than layers.
        """
        count, model, spec = self.spec.pp * self.spec.virtual_stages, self.model, self.spec
        moe = set(model.moe_layer_ids)
        kinds = [layer in moe for layer in range(model.num_layers)] + [True] * spec.mtp_layers
        if count > len(kinds):
            raise InputError(
                f"training.pp x virtual_stages ({count}) exceeds the model's layers ({len(kinds)}); use fewer"
            )
        rows = np.minimum(np.cumsum(kinds) - 1, model.num_moe_layers - 1)  # a prediction layer is loaded as the last
        seconds_K3W = self._layers_s(kinds, rows)
        cuts = [range(*ends) for ends in _cut(seconds_K3W.sum(1).mean(1), count)]
        stages = {number % spec.pp for number, cut in enumerate(cuts) if self._embeds(cut)}
        tied, tied_bytes = self._state.embedding(sorted(stages))
        tied_s = tied.at(*self.speeds)
        answer = []
        for cut in cuts:
            mine, part = kinds[cut.start : cut.stop], slice(cut.start, cut.stop)
            moe_rows = tuple(rows[part][mine].tolist())
            shared = (tied_s, tied_bytes) if self._embeds(cut) else (0.0, 0.0)
            answer.append(self._chunk(cut, mine, moe_rows, seconds_K3W[part].sum(0), *shared))
        return answer

    def _layers_s(self, kinds: list[bool], rows: NDArray[np.int64]) -> Floats:
        """Seconds ``[K, 3, W]`` of layers of ``kinds`` (MoE or not) with loads of ``rows``: forward, backward, exchange
        of one direction."""
        spec, layers = self.spec, self._layers
        attention, shared = self.attention_s, self.shared_s
        expert_WL = np.stack([batch.expert_s_LR.max(1) for batch in self.batches_W])
        exchange_WL = np.stack([batch.exchange_s_L for batch in self.batches_W])
        back_WL = self.experts_back * expert_WL + (exchange_WL if spec.recompute == "full" else 0.0)
        back_WL += Work(layers.activation_again_s).at(*self.speeds)
        open_WL = np.maximum(0.0, exchange_WL - (shared[0] if spec.overlap == "shared_expert" else 0.0))
        both = attention + shared
        moe_3WL = np.stack([both[0] + expert_WL, both[1] + back_WL, open_WL])
        dense = layers.attention + layers.dense_block + layers.added(self._state.layer_parameters[0])

        def column(part: BothWays) -> Floats:
            slowest: Floats = self._on_groups(part).max(1, keepdims=True)
            return slowest

        answer = moe_3WL[:, :, rows].transpose(2, 0, 1)
        plain = ~np.array(kinds)
        answer[plain, :2], answer[plain, 2] = column(dense), 0.0
        answer[self.model.num_layers - 1 :, :2] += column(layers.head)
        answer[self.model.num_layers :, :2] += column(layers.joining)
        answer[:, :2] += spec.host_per_layer * np.array([[1 / 3], [2 / 3]])  # a third of the launches are forward's
        return answer

    def _embeds(self, layers: range) -> bool:
        """Whether a chunk holds the embedding: at the first layer, for prediction, or as the head it is tied to."""
        last = self.model.num_layers - 1
        return layers[0] == 0 or layers[-1] > last or (self.model.tie_word_embeddings and last in layers)

    def _chunk(
        self, layers: range, kinds: list[bool], moe_rows: tuple[int, ...], seconds_3W: Floats, tied_s: float,
        tied_bytes: float,
    ) -> Chunk:  # fmt: skip
        model, spec = self.model, self.spec
        predicting = sum(layer >= model.num_layers for layer in layers)
        heads = predicting + (model.num_layers - 1 in layers)
        tables = self._embeds(layers) + (heads > 0 and not model.tie_word_embeddings)
        state = self._state.chunk(kinds, tables, predicting)
        again = spec.recompute_modules
        split = spec.expert_tp
        by_kind = [activation_bytes(model, moe, spec.recompute, self._kind, again, split) for moe in (False, True)]
        kept = sum(by_kind[kind] for kind in kinds) * self.tokens
        kept += heads * self.tokens * model.vocab_size * 4  # logits and their softmax in fp32
        kept += predicting * self.tokens * 2 * model.hidden_size * DTYPE_BYTES[self._kind]
        pairs_WR = np.stack([batch.pairs_LR[list(moe_rows)].sum(0) for batch in self.batches_W])
        beyond_WR = pairs_WR - len(moe_rows) * self.tokens * model.top_k * split  # an even load
        forward_s_W, backward_s_W, exchange_s_W = seconds_3W
        return Chunk(
            layers=tuple(layers),
            moe_rows=moe_rows,
            forward_s_W=forward_s_W,
            backward_s_W=backward_s_W,
            exchange_s_W=exchange_s_W,
            sync_s=state.sync.at(*self.speeds),
            gather_s=state.gather.at(*self.speeds),
            optimizer_s=state.optimizer.at(*self.speeds),
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

    @property
    def transfer_s(self) -> float:
        """Seconds of that."""
        return float(Work.of([self._transfer]).at(*self.speeds))

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
            **self.step.part_errors,
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
    """A step in closed form, as if all stages were equal: what the simulated schedule comes to without differences."""
    spec, chunks = costs.spec, costs.chunks()
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
