"""What training keeps in memory between micro-batches, and what a step does with it: gradients, optimizer, weights.

- Gradients are reduced over the ranks that hold copies: ``ranks / (pp tp)`` for the dense parts, ``ranks / (pp ep
  expert_tp)`` for experts, times their copies inside a group where a placement has some. Without ZeRO they are
  all-reduced, every copy updates all its weights, and nothing is gathered; else gradients are reduce-scattered and
  weights all-gathered.
  Once a step up to ZeRO stage 1, which adds up gradients where they are. From stage 2 on a rank keeps its part of them
  alone, so those of every micro-batch are reduce-scattered (DeepSpeed's ``allreduce_gradients``:
  stage 2 and above communicate off the boundaries of accumulation as well).
  Stage 3 gathers weights for every forward, frees them, gathers them again for every backward, which serves what
  that computes again too, and gathers none after the update: what PyTorch's ``fully_shard`` and Megatron-FSDP
  (``mfsdp_design.md``, "Flow") do unless told otherwise, in one micro-batch half as much again as stage 2 moves
  (Rajbhandari et al., section 7). Weights that a framework keeps gathered in between (``reshard_after_forward=False``,
  DeepSpeed's ``stage3_max_live_parameters``) are not modelled.
- Stages that hold copies of the embedding, the first and the one with a head tied to it or with prediction layers,
  all-reduce what they hold of its gradients, once a step, after all are reduced and before any update: nothing hides it
  (Megatron-LM, ``finalize_model_grads.py``, ``_allreduce_word_embedding_grads`` over the embedding group).
- Adam reads and writes 4-byte master weights and two moments, reads gradients, writes weights (Rajbhandari et
  al. 2020, arXiv 1910.02054 count the same 16 bytes of state); ZeRO stage 1 shards that, 2 gradients too, 3
  weights too. Gradients are set to zero, checked, scaled and normed, too. At the bandwidth of a measured step, where a
  profile has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.elementwise import Stream
from moeplan.costs.tables import Seconds
from moeplan.costs.work import Work
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside
from moeplan.specs.training import TrainingSpec

__all__ = ["ChunkState", "TrainingState"]

# Adam's master weights and two moments; those read and written, the master weights read again to write weights in bf16.
_ADAM_STATE_BYTES, _ADAM_MOVED_BYTES = 12, 2 * 12 + 4 + 2
_MASTER_BYTES, _COPY_OUT_BYTES = 4, 4 + 2  # of these, what weights in fp32 do without: they are the master weights

# Reads or writes of gradients in a step, as Megatron-LM's DistributedDataParallel and DistributedOptimizer do by
# default: of all on a rank set to zero, checked for NaN, scaled by the number of ranks (two); of those it owns for the
# norm that clips them, and by Adam.
_GRADIENT_PASSES, _OWN_GRADIENT_PASSES = 4, 2


@dataclass(frozen=True, slots=True)
class _Shared:
    """Parameters on a rank, how many ranks hold them, and how far these lie apart."""

    parameters: float
    copies: int
    stride: int


@dataclass(frozen=True, slots=True)
class ChunkState:
    """One chunk on a rank, at usual speeds: ``sync`` one reduction of its ``sync_bytes`` of gradients, ``gather`` one
    all-gather of its weights, ``optimizer`` the update; ``state_bytes`` of weights, gradients and Adam."""

    sync: Work
    gather: Work
    optimizer: Work
    sync_bytes: float
    state_bytes: float


def _copied(placement: Placement) -> tuple[float, int]:
    """(slots whose expert has copies, on the rank with most of them in the mean layer; how many, in the mean)."""
    experts_LP = placement.physical_to_logical_LP
    copies_LP = np.take_along_axis(placement.replicas_LE, np.maximum(experts_LP, 0), axis=1)
    several_LP = (copies_LP > 1) & (experts_LP != EMPTY)
    if not several_LP.any():
        return 0.0, 1
    slots = float(np.bincount(placement.rank_of_slot_P, several_LP.mean(0)).max())
    return slots, min(round(copies_LP[several_LP].mean()), placement.num_ranks)


class TrainingState:
    """``ranks`` of a job over ``links``; ``adam``: the bandwidth of an update; ``slots`` of the rank with most in a
    layer, ``slot_parameters`` of one of them on a rank."""

    def __init__(
        self,
        model: ModelSpec,
        ranks: int,
        spec: TrainingSpec,
        weight_dtype: Dtype,
        placement: Placement,
        links: CollectiveCosts,
        adam: Stream,
    ) -> None:
        self.model, self.spec, self.links, self.adam = model, spec, links, adam
        self._ranks, self._asked = ranks, dict[tuple[str, int, float, int], Seconds]()
        self._width = DTYPE_BYTES[activations_beside(weight_dtype)]  # of weights as they are used
        self._grad = DTYPE_BYTES[spec.gradient_dtype]
        self._copied = _copied(placement)
        self.slots = int(np.bincount(placement.rank_of_slot_P).max())
        self.slot_parameters = model.expert_parameters / spec.expert_tp
        self.layer_parameters = model.layer_parameters_on(spec.tp)  # outside the experts, of a dense and of a MoE layer

    @property
    def collectives(self) -> list[Seconds]:
        """All that were asked for so far."""
        return list(self._asked.values())

    @property
    def relative_error(self) -> float:
        """The largest of theirs."""
        return max((found.relative_error for found in self.collectives), default=0.0)

    def chunk(self, kinds: Sequence[bool], tables: int, predicting: int) -> ChunkState:
        """Layers of ``kinds`` (MoE or not), ``predicting`` of them with a join, and ``tables`` of embedding or head."""
        parts = self._parts(kinds, tables, predicting)
        sync, gather = Work(), Work()
        for part in parts:
            shards = part.copies if self.spec.zero else 1
            way = "reduce_scatter" if self.spec.zero else "all_reduce"
            sync += self._collective(way, part.copies, part.parameters * self._grad, part.stride)
            gather += self._collective("all_gather", shards, part.parameters * self._width, part.stride)
        return ChunkState(
            sync,
            gather,
            Work(self._updated_bytes(parts) / self.adam.bytes_per_s),
            sum(part.parameters * self._grad * (part.copies > 1) for part in parts),
            self._state_bytes(parts),
        )

    def embedding(self, stages: Sequence[int]) -> tuple[Work, float]:
        """The all-reduce of the embedding's gradients over ``stages`` that hold it, in order, and its bytes."""
        if len(stages) < 2:
            return Work(), 0.0
        copies = self._ranks // (self.spec.pp * self.spec.tp)
        table = self.model.vocab_size * self.model.hidden_size / self.spec.tp
        size = table * self._grad / (copies if self.spec.zero >= 2 else 1)
        apart = (stages[-1] - stages[0]) // (len(stages) - 1) * (self._ranks // self.spec.pp)
        return self._collective("all_reduce", len(stages), size, apart), size

    def _collective(self, op: str, ranks: int, size: float, stride: int) -> Work:
        if ranks <= 1:
            return Work()
        key = op, ranks, size, stride
        if key not in self._asked:
            self._asked[key] = self.links.seconds(*key)
        return Work.of([self._asked[key]])

    def _parts(self, kinds: Sequence[bool], tables: int, predicting: int) -> list[_Shared]:
        model, spec = self.model, self.spec
        dense = sum(self.layer_parameters[kind] for kind in kinds)
        dense += (tables * model.vocab_size + predicting * 2 * model.hidden_size) * model.hidden_size / spec.tp
        slot = sum(kinds) * self.slot_parameters
        alike, several, copies = self._ranks // (spec.pp * spec.ep * spec.expert_tp), *self._copied
        parts = (
            _Shared(dense, self._ranks // (spec.pp * spec.tp), spec.tp),
            _Shared((self.slots - several) * slot, alike, spec.ep * spec.expert_tp),
            _Shared(several * slot, alike * copies, spec.ep // copies * spec.expert_tp),
        )
        return [part for part in parts if part.parameters]

    def _updated_bytes(self, parts: list[_Shared]) -> float:
        """What an update reads and writes."""
        own = sum(part.parameters / (part.copies if self.spec.zero else 1) for part in parts)
        held = sum(part.parameters for part in parts)
        adam = _ADAM_MOVED_BYTES - _COPY_OUT_BYTES * (self._width == 4) + _OWN_GRADIENT_PASSES * self._grad
        return own * adam + held * _GRADIENT_PASSES * self._grad

    def _state_bytes(self, parts: list[_Shared]) -> float:
        """Weights, gradients and Adam state. Weights in fp32 are their own master copy."""
        adam = _ADAM_STATE_BYTES - _MASTER_BYTES * (self._width == 4)
        sharded = ((self._width, 3), (self._grad, 2), (adam, 1))  # bytes of a parameter, and from which ZeRO stage on
        return sum(
            part.parameters * width / (part.copies if self.spec.zero >= stage else 1)
            for part in parts
            for width, stage in sharded
        )
