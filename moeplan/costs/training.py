"""Seconds and bytes of training: layers forward and backward, gradients, optimizer, state, activations, operations.

- Backward takes longer than forward: :mod:`moeplan.costs.backward`. Exchanges cost the same both ways.
- Elementwise work beyond a forward's: see :data:`PASSES`; at the bandwidth of measured norms, forward and backward,
  where a profile has them, as Adam at that of a measured step.
- Every micro-batch adds its weights' gradients to those before: one read and one write of all of them (Megatron-LM's
  ``gradient_accumulation_fusion`` does it in the product's kernel). From ZeRO stage 2 on it copies them into the
  buffer that is reduced instead: as many bytes.
- 1F1B with ``p`` stages, ``m`` micro-batches and ``v`` chunks per stage idles ``(p - 1) / (v m)`` of the work
  (Narayanan et al. 2021, arXiv 2104.04473); the simulation plays the schedule, :func:`training_step` uses this.
- Gradients are reduced over the ranks that hold copies: ``ranks / (pp tp)`` for the dense parts, ``ranks / (pp ep)``
  for experts, times their copies inside a group where a placement has some. Without ZeRO they are all-reduced, every
  copy updates all its weights, and nothing is gathered; else gradients are reduce-scattered and weights all-gathered.
  Once a step up to ZeRO stage 1, which adds up gradients where they are. From stage 2 on a rank keeps its part of them
  alone, so those of every micro-batch are reduce-scattered (DeepSpeed's ``allreduce_gradients``:
  stage 2 and above communicate off the boundaries of accumulation as well).
  Stage 3 gathers weights for every forward, frees them, gathers them again for every backward, which serves what
  that computes again too, and gathers none after the update: what PyTorch's ``fully_shard`` and Megatron-FSDP
  (``mfsdp_design.md``, "Flow") do unless told otherwise, in one micro-batch half as much again as stage 2 moves
  (Rajbhandari et al., section 7). Weights that a framework keeps gathered in between (``reshard_after_forward=False``,
  DeepSpeed's ``stage3_max_live_parameters``) are not modelled.
- Adam reads and writes 4-byte master weights and two moments, reads gradients, writes weights (Rajbhandari et
  al. 2020, arXiv 1910.02054 count the same 16 bytes of state); ZeRO stage 1 shards that, 2 gradients too, 3
  weights too. Gradients are set to zero, checked, scaled and normed, too.
- Ranks that split a sequence (``cp``, ``tp`` apart) gather keys and values of their own heads, in backward once more,
  and scatter the gradients (Llama 3, arXiv 2407.21783, section 3.3.2).
- Activations kept, and what is computed again instead: :mod:`moeplan.costs.activations`.
- A multi-token prediction layer joins the last hidden state and the next token's embedding by a product of ``2 H x H``
  (DeepSeek-V3, arXiv 2412.19437, section 2.2); its stage holds embedding and head too, and logits of each prediction.

``W`` windows of load, ``L`` MoE layers, ``E`` experts, ``H`` hidden, ``T`` tokens of a micro-batch on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.activations import activation_bytes, pair_bytes, recomputed_s
from moeplan.costs.backward import backward_over_forward
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.dense import DenseCosts
from moeplan.costs.elementwise import stream
from moeplan.costs.step import StepModel
from moeplan.costs.tables import Seconds
from moeplan.costs.technique import Technique
from moeplan.errors import InputError
from moeplan.specs.cluster import ClusterSpec, RankSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside, dense_beside
from moeplan.specs.training import TrainingSpec
from moeplan.specs.workload import DispatchKind, Workload

__all__ = [
    "Chunk",
    "TrainingCost",
    "TrainingCosts",
    "capacity",
    "expert_group",
    "model_flops_per_token",
    "training_step",
]

Floats = NDArray[np.float64]

# Adam's master weights and two moments; those read and written, the master weights read again to write weights in bf16.
_ADAM_STATE_BYTES, _ADAM_MOVED_BYTES = 12, 2 * 12 + 4 + 2
_MASTER_BYTES, _COPY_OUT_BYTES = 4, 4 + 2  # of these, what weights in fp32 do without: they are the master weights

# Reads or writes of gradients in a step, as Megatron-LM's DistributedDataParallel and DistributedOptimizer do by
# default: of all on a rank set to zero, checked for NaN, scaled by the number of ranks (two); of those it owns for the
# norm that clips them, and by Adam.
_GRADIENT_PASSES, _OWN_GRADIENT_PASSES = 4, 2

# Reads and writes of a layer's hidden state, forward and backward together, that a forward's costs do not hold:
# residuals, norms and their backward, rotary embedding, casts and transposes of product inputs, gated activations
# and their backward, un-permutation with weights. A count of kernels in Megatron-Core's MoE layer, each once.
PASSES = 40
_HEAD_PASSES = 8  # of logits in bf16: cross entropy forward and backward in fp32, gradient


def expert_group(cluster: ClusterSpec, ranks: int) -> ClusterSpec:
    """``ranks`` neighbours of a cluster: one expert-parallel group, each of them as slow as the slowest that has its
    place in any group of any stage, since all wait for each other.

    Raises:
        InputError: they do not fill nodes evenly, or a rank of the cluster has failed.
    """
    for rank, spec in cluster.ranks.items():
        if spec.failed:
            raise InputError(
                f"cluster.ranks.{rank}.failed (true), but a training job needs every rank; leave it out of the cluster"
                " (ranks, nodes), or failed out"
            )
    per_node = min(ranks, cluster.ranks_per_node)
    if ranks % per_node or ranks > cluster.num_ranks or cluster.topology == "explicit":
        raise InputError(
            f"training.ep ({ranks}) does not fill nodes of cluster.ranks_per_node ({cluster.ranks_per_node}) evenly,"
            " or the cluster has explicit links; choose a divisor or a multiple, and a preset topology"
        )
    own = {}
    for place in {rank % ranks for rank in cluster.ranks}:
        peers = [cluster.rank(rank) for rank in range(place, cluster.num_ranks, ranks)]
        slowest = {name: min(getattr(peer, name) for peer in peers) for name in ("speed", "link_speed")}
        own[place] = RankSpec.model_validate(slowest)
    return cluster.model_copy(update={"num_nodes": ranks // per_node, "ranks_per_node": per_node, "ranks": own})


def _copied(placement: Placement) -> tuple[float, int]:
    """(slots whose expert has copies, on the rank with most of them in the mean layer; how many, in the mean)."""
    experts_LP = placement.physical_to_logical_LP
    copies_LP = np.take_along_axis(placement.replicas_LE, np.maximum(experts_LP, 0), axis=1)
    several_LP = (copies_LP > 1) & (experts_LP != EMPTY)
    if not several_LP.any():
        return 0.0, 1
    slots = float(np.bincount(placement.rank_of_slot_P, several_LP.mean(0)).max())
    return slots, min(round(copies_LP[several_LP].mean()), placement.num_ranks)


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
    all-gather of weights, each of them once; ``optimizer_s``: the update. ``activation_bytes_WR`` of one micro-batch on
    each rank of an expert-parallel group, which works on as many pairs as its experts get.
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


class TrainingCosts:
    """One model under one training specification: what each layer takes and weighs.

    ``placement`` and ``load_WLE`` are of one expert-parallel group of ``spec.ep`` ranks.

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
        self._wide = DTYPE_BYTES[activations_beside(weight_dtype)]  # of activations, and of weights as they are used
        self.micro_batches = spec.micro_batches(cluster.num_ranks)
        self.tokens = spec.micro_batch * spec.sequence // (spec.tp * spec.cp)
        group = expert_group(cluster, spec.ep)
        work = Workload(
            phase="prefill",
            batch_per_rank=self.tokens,
            context=spec.sequence,
            weight_dtype=weight_dtype,
            activation_dtype=activation_dtype,
        )
        how = Technique(dispatch=dispatch, tp=spec.tp, cp=spec.cp)
        step = self.step = StepModel(model, group, work, how, profile)
        worked_WLE, self.dropped_WL = capacity(load_WLE, spec.capacity_factor, spec.overflow == "pad")
        taken_WL = worked_WLE.sum(2, keepdims=True) / load_WLE.sum(2, keepdims=True)  # of all pairs, more if padded
        self.batches_W = batches = [
            step.batches(placement, worked_LE, taken_L)[0]
            for worked_LE, taken_L in zip(worked_WLE, taken_WL, strict=True)
        ]
        expert_s_WL = np.stack([batch.expert_s_LR.max(1) for batch in batches])
        exchange_s_WL = np.stack([batch.exchange_s_L for batch in batches])
        whole, fixed = step.step(placement, load_WLE.mean(0)), step.fixed
        self.relative_error = whole.high_s / whole.total_s - 1
        accelerator = cluster.accelerator
        pairs = self.tokens * spec.ep * model.top_k / model.num_experts
        ratio = self.backward = backward_over_forward(
            model, accelerator, weight_dtype, profile, self.tokens, spec.sequence, spec.tp, pairs,
            model.num_experts / spec.ep,
        )  # fmt: skip
        self.links, self._link_error = CollectiveCosts(cluster, profile), 0.0
        # Of a layer, by the ranks of one sequence, which lie tp apart.
        key_bytes = (model.kv_bytes_per_token(activations_beside(weight_dtype), spec.tp) or 0.0) / model.num_layers
        key_bytes *= spec.micro_batch * spec.sequence
        gathered = self.links.seconds("all_gather", spec.cp, key_bytes, spec.tp)
        onward, back_stream = (stream(profile, accelerator, "norm", way) for way in ("forward", "backward"))
        self._adam = stream(profile, accelerator, "optimizer", "forward")
        self.source = {
            **whole.source,
            "backward": ratio.source + f"; its passes {back_stream.source}" * back_stream.measured,
            "optimizer": self._adam.source if self._adam.measured else "modelled from bytes moved",
            **({"keys and values": gathered.source} if spec.cp > 1 else {}),
        }
        guessed = {"backward": len(ratio.measured) < 3, "optimizer": not self._adam.measured}
        self.extrapolated = (*whole.extrapolated, *(name for name, guess in guessed.items() if guess))

        dense = DenseCosts(accelerator, dense_beside(weight_dtype), profile)
        hidden, rows = model.hidden_size, self.tokens * spec.tp
        moved = 2 * self._wide * PASSES * self.tokens * hidden  # a third of it in forward
        forward, backward = moved / 3 / onward.bytes_per_s, 2 * moved / 3 / back_stream.bytes_per_s
        pace = self._pace = float(step.speed_R.min())  # in every layer ranks wait for the slowest; links do not
        kernel, reduce, keys = fixed.kernel_s, fixed.reduce_s, gathered.total
        plain = fixed.layer_s - kernel - reduce
        whole_s = plain + kernel + forward
        again = {"none": 0.0, "attention": kernel, "full": whole_s}[spec.recompute]
        parts_s = recomputed_s(spec.recompute_modules, model, self.tokens, spec.tp, dense, onward.bytes_per_s)
        again += parts_s.get("layernorm", 0.0) + parts_s.get("mla_up_proj", 0.0)
        attention_back = ratio.products * plain + ratio.attention * kernel + backward + again
        # Backward gathers keys and values again, and scatters their gradients.
        back_links = self.reduces_back * (reduce + keys) + keys
        attention = whole_s / pace + reduce + keys, attention_back / pace + back_links
        shared, shared_reduce = (fixed.shared_s - fixed.shared_reduce_s) / pace, fixed.shared_reduce_s
        self.shared_s = shared + shared_reduce
        self.shared_back_s = self.products_back * shared + self.reduces_back * shared_reduce
        # Gradients of weights are added to what earlier micro-batches left: read and written once per micro-batch,
        # where a forward's product reads the weights.
        self._slots, self._copied = int(np.bincount(placement.rank_of_slot_P).max()), _copied(placement)
        self._parameters = model.layer_parameters_on(spec.tp)  # outside the experts, of a dense and of a MoE layer
        bandwidth = pace * roofline.MEMORY_EFFICIENCY * accelerator.memory_bandwidth
        once_s = (2 * DTYPE_BYTES[spec.gradient_dtype] - DTYPE_BYTES[weight_dtype]) / bandwidth
        added_dense, added_moe = (once_s * parameters for parameters in self._parameters)
        added_moe += once_s * self._slots * model.expert_parameters
        self.attention_s = attention[0], attention[1] + added_moe
        hidden_s_WL = np.minimum(exchange_s_WL, self.shared_s) if spec.overlap == "shared_expert" else np.zeros((1, 1))
        self._moe_forward_WL = attention[0] + self.shared_s + expert_s_WL
        self._moe_backward_WL = self.attention_s[1] + self.shared_back_s + self.experts_back * expert_s_WL
        self._moe_backward_WL += exchange_s_WL if spec.recompute == "full" else 0.0
        self._moe_backward_WL += parts_s.get("moe_act", 0.0) / pace
        self._exchange_WL = exchange_s_WL - hidden_s_WL
        inter = model.dense_intermediate_size
        block = dense.ffn(rows, hidden, inter / spec.tp, model.gated_ffn).total if inter else 0.0
        # A dense layer permutes nothing and has no router.
        more = (block - fixed.routing_s) / pace
        dense_backward = attention[1] + added_dense + self.products_back * more + self.reduces_back * reduce
        self._dense = attention[0] + more + reduce, dense_backward + parts_s.get("mlp", 0.0) / pace
        head = dense.product(rows, model.vocab_size / spec.tp, hidden).total / pace
        loss = 2 * self._wide * _HEAD_PASSES * rows * model.vocab_size / spec.tp / bandwidth
        self._head = (head + loss / 2, ratio.products * head + loss / 2)
        joined = dense.product(rows, hidden / spec.tp, 2 * hidden).total / pace
        self._joining = joined, ratio.products * joined

    @property
    def experts_back(self) -> float:
        """Backward of routed experts over their forward, which is computed again under full recomputation."""
        return self.backward.experts + (self.spec.recompute == "full")

    @property
    def products_back(self) -> float:
        """The same of shared experts and dense blocks."""
        return self.backward.products + (self.spec.recompute == "full")

    @property
    def reduces_back(self) -> float:
        """The same of all-reduces over tensor-parallel ranks: gradients pass them the other way. What Megatron-Core
        gathers once more for the gradients of weights hides behind a product."""
        return 1.0 + (self.spec.recompute == "full")

    # ------------------------------------------------------------------ layers and chunks

    def chunks(self) -> list[Chunk]:
        """``pp * virtual_stages`` chunks in order of the layers; chunk ``c pp + s`` is on stage ``s``.

        Layers are cut where the slowest chunk is fastest; embedding and head count.

        Raises:
            InputError: more chunks than layers.
        """
        count, model, spec = self.spec.pp * self.spec.virtual_stages, self.model, self.spec
        kinds = [layer in set(model.moe_layer_ids) for layer in range(model.num_layers)] + [True] * spec.mtp_layers
        if count > len(kinds):
            raise InputError(
                f"training.pp x virtual_stages ({count}) exceeds the model's layers ({len(kinds)}); use fewer"
            )
        moe_number = np.cumsum(kinds) - 1
        L = model.num_moe_layers
        pieces = []
        for layer, moe in enumerate(kinds):
            windows = len(self._moe_forward_WL)
            if moe:
                l = min(int(moe_number[layer]), L - 1)  # a prediction layer is loaded as the last one
                part = [self._moe_forward_WL[:, l], self._moe_backward_WL[:, l], self._exchange_WL[:, l]]
            else:
                part = [np.full(windows, self._dense[0]), np.full(windows, self._dense[1]), np.zeros(windows)]
            if layer >= model.num_layers or layer == model.num_layers - 1:
                part = [part[0] + self._head[0], part[1] + self._head[1], part[2]]
            if layer >= model.num_layers:
                part = [part[0] + self._joining[0], part[1] + self._joining[1], part[2]]
            host = spec.host_per_layer
            if host:  # a third of the launches are forward's
                part = [part[0] + host / 3, part[1] + 2 * host / 3, part[2]]
            pieces.append(np.stack(part))
        whole = np.array([piece.sum(0).mean() for piece in pieces])
        answer = []
        for first, last in _cut(whole, count):
            forward, backward, exchange = np.sum(pieces[first:last], axis=0)
            answer.append(self._chunk(range(first, last), kinds, forward, backward, exchange))
        return answer

    def _chunk(
        self, layers: range, kinds: list[bool], forward_W: Floats, backward_W: Floats, exchange_W: Floats
    ) -> Chunk:
        model, spec, ranks = self.model, self.spec, self.cluster.num_ranks
        hidden, predicting = model.hidden_size, sum(layer >= model.num_layers for layer in layers)
        heads = predicting + (model.num_layers - 1 in layers)
        embeds, unembeds = layers[0] == 0 or predicting > 0, heads > 0
        tables = embeds or unembeds if model.tie_word_embeddings else embeds + unembeds
        dense = sum(self._parameters[kinds[layer]] for layer in layers)
        dense += (tables * model.vocab_size + predicting * 2 * hidden) * hidden / spec.tp
        slot = sum(kinds[layer] for layer in layers) * float(model.expert_parameters)
        alike, copied, copies = ranks // (spec.pp * spec.ep), *self._copied
        sorts = [  # parameters, ranks that hold them, and how far these lie apart
            (dense, ranks // (spec.pp * spec.tp), spec.tp),
            ((self._slots - copied) * slot, alike, spec.ep),
            (copied * slot, alike * copies, spec.ep // copies),
        ]
        groups = [group for group in sorts if group[0]]
        width, grad = self._wide, DTYPE_BYTES[spec.gradient_dtype]
        sync = gather = own = held = moved = 0.0
        reduction = "reduce_scatter" if spec.zero else "all_reduce"
        for parameters, copies, stride in groups:
            shards = copies if spec.zero else 1
            reduced = self.links.seconds(reduction, copies, parameters * grad, stride)
            gathered = self.links.seconds("all_gather", shards, parameters * width, stride)
            sync, gather = sync + reduced.total, gather + gathered.total
            self._link_error = max(self._link_error, reduced.relative_error, gathered.relative_error)
            own += parameters / shards
            held += parameters
            moved += parameters * grad * (copies > 1)
        adam = _ADAM_MOVED_BYTES - _COPY_OUT_BYTES * (width == 4) + _OWN_GRADIENT_PASSES * grad
        updated = own * adam + held * _GRADIENT_PASSES * grad
        again = spec.recompute_modules
        kind = activations_beside(self.weight_dtype)
        by_kind = [activation_bytes(model, moe, spec.recompute, kind, again) for moe in (False, True)]
        kept = sum(by_kind[kinds[layer]] for layer in layers) * self.tokens
        kept += heads * self.tokens * model.vocab_size * 4  # logits and their softmax in fp32
        kept += predicting * self.tokens * 2 * hidden * width
        rows = tuple(min(sum(kinds[:l]), model.num_moe_layers - 1) for l in layers if kinds[l])
        pairs_WR = np.stack([batch.pairs_LR[list(rows)].sum(0) for batch in self.batches_W])
        beyond_WR = pairs_WR - len(rows) * self.tokens * model.top_k  # an even load
        return Chunk(
            layers=tuple(layers),
            moe_rows=rows,
            forward_s_W=forward_W,
            backward_s_W=backward_W,
            exchange_s_W=exchange_W,
            sync_s=sync,
            gather_s=gather,
            optimizer_s=updated / self._adam.bytes_per_s / self._pace,
            sync_bytes=moved,
            state_bytes=_state_bytes(spec, [(parameters, copies) for parameters, copies, _ in groups], width),
            activation_bytes_WR=kept + pair_bytes(model, spec.recompute, kind, again) * beyond_WR,
        )

    @property
    def transfer_bytes(self) -> float:
        """Activations of a micro-batch from one rank to the same rank of the next stage."""
        return self.tokens * self.model.hidden_size * self._wide

    @property
    def transfer_s(self) -> float:
        """Seconds of that."""
        return self._transfer.total

    @property
    def _transfer(self) -> Seconds:
        return self.links.seconds("p2p", 2, self.transfer_bytes, self.cluster.num_ranks // self.spec.pp)

    @property
    def part_errors(self) -> dict[str, float]:
        """Relative error of each part of a training step whose times :meth:`moeplan.costs.training_parts.scaled` can
        take longer; gradients and weights: the largest of the chunks made so far."""
        return {
            **self.step.part_errors,
            "gradients and weights": self._link_error,
            "transfers between stages": self._transfer.relative_error if self.spec.pp > 1 else 0.0,
            "optimizer": self._adam.relative_error,
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
    optimizer = sum(chunk.optimizer_s for chunk in chunks) / spec.pp
    count = costs.micro_batches
    return TrainingCost(
        total_s=count * (forward + backward + waits) + bubble + sync + gather + optimizer,
        forward_s=count * forward,
        backward_s=count * backward,
        bubble_s=bubble,
        gradient_sync_s=count * waits + sync + gather,
        optimizer_s=optimizer,
        state_bytes=max(sum(chunk.state_bytes for chunk in chunks[stage :: spec.pp]) for stage in range(spec.pp)),
        relative_error=costs.relative_error,
        source=costs.source,
        extrapolated=costs.extrapolated,
    )


def _state_bytes(spec: TrainingSpec, groups: list[tuple[float, int]], width: float) -> float:
    """Weights of ``width`` bytes, gradients and Adam state of a rank; ``groups``: parameters on it, and ranks that hold
    copies. Weights in fp32 are their own master copy."""
    total = 0.0
    for parameters, copies in groups:
        total += parameters * width / (copies if spec.zero >= 3 else 1)
        total += parameters * DTYPE_BYTES[spec.gradient_dtype] / (copies if spec.zero >= 2 else 1)
        total += parameters * (_ADAM_STATE_BYTES - _MASTER_BYTES * (width == 4)) / (copies if spec.zero >= 1 else 1)
    return total
