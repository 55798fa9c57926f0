"""Routing traces: which experts each token chose. ``T`` tokens, ``L`` MoE layers, ``K`` top-k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import TraceError

__all__ = ["PHASES", "RoutingTrace"]

PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class RoutingTrace:
    """Recorded router choices, token by token.

    ``experts_TLK`` holds logical expert ids, ``-1`` where a recorder left padding inside a token.
    ``phase_T`` indexes :data:`PHASES`; ``domain_T`` indexes ``domains``. ``seq_lens_S`` sums to ``T``:
    tokens of a sequence stand together and in order. Optional arrays are None where unknown.
    """

    experts_TLK: NDArray[np.integer[Any]]
    num_experts: int
    layer_ids: tuple[int, ...]
    scores_TLK: NDArray[np.floating[Any]] | None = None
    seq_lens_S: NDArray[np.int64] | None = None
    phase_T: NDArray[np.uint8] | None = None
    source_rank_T: NDArray[np.int32] | None = None
    domain_T: NDArray[np.int32] | None = None
    domains: tuple[str, ...] = ()
    dropped_padding: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.experts_TLK.shape
        if len(shape) != 3 or 0 in shape:
            raise TraceError(f"experts has shape {shape}; it must be [tokens, layers, k] and not empty")
        tokens, layers, top_k = shape
        if not np.issubdtype(self.experts_TLK.dtype, np.integer):
            raise TraceError(f"experts holds {self.experts_TLK.dtype}; it must hold integer expert ids")
        if len(self.layer_ids) != layers:
            raise TraceError(f"moe_layers has {len(self.layer_ids)} entries but experts has {layers} layers (axis 1)")
        if top_k > self.num_experts:
            raise TraceError(f"experts has top-k {top_k} (axis 2), more than num_experts ({self.num_experts})")
        low, high = int(self.experts_TLK.min()), int(self.experts_TLK.max())
        if low < -1 or high >= self.num_experts:
            bad = low if low < -1 else high
            t, l, _ = (int(i[0]) for i in np.nonzero(self.experts_TLK == bad))
            raise TraceError(
                f"expert id {bad} (token {t}, layer {l}) is outside 0..{self.num_experts - 1}; check num_experts"
            )
        for name, array in (("phase", self.phase_T), ("source_rank", self.source_rank_T), ("domain", self.domain_T)):
            if array is not None and array.shape != (tokens,):
                raise TraceError(f"{name} has shape {array.shape}; it must be [{tokens}], one entry per token")
        if self.scores_TLK is not None:
            if self.scores_TLK.shape != shape:
                raise TraceError(f"scores has shape {self.scores_TLK.shape}; experts has {shape}; they must agree")
            if not np.isfinite(self.scores_TLK).all():
                raise TraceError("scores holds NaN or infinite values; record them again or leave scores out")
        if self.seq_lens_S is not None and (
            self.seq_lens_S.ndim != 1 or (self.seq_lens_S <= 0).any() or int(self.seq_lens_S.sum()) != tokens
        ):
            raise TraceError(
                f"seq_lens sums to {int(self.seq_lens_S.sum())} but experts has {tokens} tokens; lengths must be"
                " positive and add up to the tokens"
            )

    @property
    def num_tokens(self) -> int:
        """``T``."""
        return int(self.experts_TLK.shape[0])

    @property
    def num_layers(self) -> int:
        """``L``."""
        return int(self.experts_TLK.shape[1])

    @property
    def top_k(self) -> int:
        """``K``."""
        return int(self.experts_TLK.shape[2])

    def tokens(self, index: slice | NDArray[Any]) -> RoutingTrace:
        """The trace of some tokens, in the order given; sequence lengths are kept for slices only."""
        chosen = np.arange(self.num_tokens)[index]
        seq_lens = None
        if self.seq_lens_S is not None and isinstance(index, slice) and index.step in (None, 1):
            sequence_T = np.repeat(np.arange(len(self.seq_lens_S)), self.seq_lens_S)[index]
            seq_lens = np.unique(sequence_T, return_counts=True)[1].astype(np.int64)

        def take(array: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if array is None else array[chosen]

        return RoutingTrace(
            experts_TLK=self.experts_TLK[chosen],
            num_experts=self.num_experts,
            layer_ids=self.layer_ids,
            scores_TLK=take(self.scores_TLK),
            seq_lens_S=seq_lens,
            phase_T=take(self.phase_T),
            source_rank_T=take(self.source_rank_T),
            domain_T=take(self.domain_T),
            domains=self.domains,
            dropped_padding=self.dropped_padding,
            origin=self.origin,
        )
