"""Attention of a service's steps, tabled over sequences and context: kernels of decodes and of prompts' chunks, and
what ranks that keep a cache together, or cut prompts among them, send each other for it.

A chunk of ``q`` tokens after ``p`` that are in the cache attends to ``q p + q^2 / 2`` pairs: the kernel over ``p + q``
tokens less the kernel over ``p``, both read by straight lines over the square of the context, the launch paid once per
step.

``S`` grid points of sequences, ``C`` of context, ``D`` attention data-parallel groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.attention import attention_by_window
from moeplan.costs.context_parallel import GatheredKeys, PartialAttention
from moeplan.costs.dense import DenseCosts
from moeplan.costs.tables import Seconds
from moeplan.costs.technique import Technique
from moeplan.costs.token_grid import Curve, grid
from moeplan.costs.work import Work
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec, dense_beside
from moeplan.specs.workload import Workload

__all__ = ["AttentionTables"]

Floats = NDArray[np.float64]


class AttentionTables:
    """Seconds of one layer. ``decode_s_of[q]``: kernels ``[S, C]`` of decodes with ``q`` queries each;
    ``merge_s_of[q]``: what they exchange ``[D, S]``, at the speeds of each group's slowest rank and link; ``launch_s``
    of a prefill kernel. ``queries_source`` says how further queries are told, "" where nothing beside is measured.
    """

    def __init__(
        self,
        model: ModelSpec,
        cluster: ClusterSpec,
        workload: Workload,
        how: Technique,
        profile: HardwareProfile | None,
        max_seqs: int,
        max_context: int,
        speed_D: Floats,
        link_D: Floats,
    ) -> None:
        self.seqs, self.context = Curve(grid(max_seqs)), Curve(grid(max(16, max_context)))
        self._squares = Curve(self.context.points**2)  # over which prefill grows by nearly straight lines
        shape = (len(self.seqs.points), len(self.context.points))
        self.launch_s, self._chunk_s = 0.0, [0.0] * shape[1]
        self.decode_s_of = dict.fromkeys((1, 1 + how.draft_tokens), np.zeros(shape))  # by queries of a sequence
        self.merge_s_of = dict.fromkeys(self.decode_s_of, np.zeros((len(speed_D), shape[0])))
        self.queries_source = ""
        self._among: PartialAttention | GatheredKeys | None = None
        if model.attention is None:
            return
        dense = DenseCosts(cluster.accelerator, dense_beside(workload.weight_dtype), profile, how.backend)
        common = (dense, how.kv_dtype, profile, how.tp, how.backend)
        decode, prefill = (
            attention_by_window(model, cluster.accelerator, phase, *common, dcp=how.dcp) for phase in (True, False)
        )
        seqs, context = np.meshgrid(self.seqs.points, self.context.points, indexing="ij")
        self.decode_s_of[1] = one = np.sum([share * costs.kernel(seqs, context).value for share, costs in decode], 0)
        if (queries := 1 + how.draft_tokens) > 1:
            further = [s * (c.work(seqs, context, queries) - c.work(seqs, context)) for s, c in decode]
            self.decode_s_of[queries] = one + np.sum(further, 0)
            if any(costs.measured for _, costs in decode):
                self.queries_source = "measured for one token of each, further ones by the roofline"
        points = np.asarray(self.context.points, float)
        alone = np.sum([share * costs.kernel(np.ones(shape[1]), points).value for share, costs in prefill], 0)
        self.launch_s = float(alone[0])
        self._chunk_s = ((np.maximum.accumulate(alone) - self.launch_s) / how.cp).tolist()
        among = model, cluster, dense.activations, profile, how
        if how.dcp > 1:
            self._among = partial = PartialAttention(*among)
            for queries in self.merge_s_of:
                tokens_S = self.seqs.points * queries
                merges = [Work.of(partial.merged(tokens)).at(speed_D, link_D) for tokens in tokens_S]
                self.merge_s_of[queries] = np.stack(merges, 1)
        elif how.cp > 1:
            self._among = GatheredKeys(*among)
        if self._among is not None:
            exchanges = [self._among.chunk(tokens) for tokens in self.context.points]
            self._exchange_s = np.array([_split(parts) for parts in exchanges])
            self._exchange_notes = [
                ("; ".join(sorted({part.source for part in parts})), any(part.extrapolated for part in parts))
                for parts in exchanges
            ]

    def chunk_s(self, before: int, new: int) -> float:
        """Of a prompt's ``new`` tokens after ``before``, without the launch; what is sent for it not among them."""
        squares, seconds = self._squares, self._chunk_s
        i, w = squares.place(before**2)
        j, v = squares.place((before + new) ** 2)
        start = seconds[i] + w * (seconds[i + 1] - seconds[i])
        return float(seconds[j] + v * (seconds[j + 1] - seconds[j]) - start)

    def sent(self, before: int, new: int) -> tuple[Floats, str, bool] | None:
        """What ranks send each other for it: seconds ``[4]``, see :meth:`moeplan.costs.serving.ServingCosts.chunk_s`,
        where those are from, and whether they lie beyond measurements; None where nothing is sent."""
        if self._among is None or not (tokens := self._among.sent_of(before, new)):
            return None
        i, w = self.context.place(tokens)
        low, high = self._exchange_s[i : i + 2]
        return low + w * (high - low), *self._exchange_notes[i + 1]


def _split(parts: Sequence[Seconds]) -> tuple[float, float, float, float]:
    """Seconds that ranks compute, that pass in collectives beside the bytes, that bytes take on links at their usual
    speed; and what the last two may be off by."""
    work = Work.of(parts)
    off_s = sum(part.total * part.relative_error for part in parts if part.wire is not None)
    return work.computed_s, work.elsewhere_s - work.wire_s, work.wire_s, off_s
