"""Seconds of an engine step that mixes prefill chunks and decodes, fast enough to be asked 10,000 times a second.

:class:`StepModel` costs one operating point; here its parts are tabled over tokens (a grid of 1 and 1.5 times powers
of two), filled when first touched, and read by straight lines between the points. A step of an engine whose groups
hold different batches takes, with ``m`` the tokens of the busiest group and ``n`` the mean over live ranks,

- attention and token-wise parts of the group that takes longest: projections, router, norms at its tokens; one decode
  kernel over its sequences at their mean context; one prefill kernel over its chunks
  (:mod:`moeplan.costs.attention_tables`);
- shared experts, dense layers and head of each group at its tokens: what they add at the group that takes longest for
  all it does between two exchanges (:func:`moeplan.costs.work.in_turn`);
- experts of each layer at its busiest rank, and the exchange: the slower of what the busiest rank receives under the
  placement at ``n``, and what the fullest group sends, which is a balanced exchange at ``m``;
- combined layer by layer as the overlap mode says (:func:`moeplan.costs.step.combine`);
- with ``d`` drafts a decoding sequence brings ``1 + d`` tokens, and drafting anew takes ``d`` passes of one more layer,
  the mean of the MoE layers, or a dense one where the model's prediction layer has no experts: the first over all
  tokens of the step, as SGLang and vLLM run it, the others over one per sequence. Attention is measured for one token
  per sequence; further ones add their work by the roofline, since the cache is read once;
- between pipeline stages what the next one needs (:mod:`moeplan.costs.stage_transfers`).

``B`` grid points, ``L`` MoE layers, ``E`` experts, ``R`` ranks, ``D`` attention data-parallel groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.attention_tables import AttentionTables
from moeplan.costs.exchange import balanced_copies, engine_dispatch
from moeplan.costs.group_kernel import group_seconds, row_at
from moeplan.costs.kv_cache import SwapCosts
from moeplan.costs.nics import Nics, nics_of
from moeplan.costs.passes import Batch, Pass, StepSeconds, joined, passes_of
from moeplan.costs.roofline import is_joined
from moeplan.costs.stage_transfers import StageTransfers
from moeplan.costs.step import BatchParts, StepModel, combine
from moeplan.costs.technique import Technique
from moeplan.costs.token_grid import Curve, grid, stairs
from moeplan.costs.work import Work, in_turn, link_speeds, speeds, working
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import Phase, Workload

__all__ = ["COST_PARTS", "MoeTable", "ServingCosts"]

Floats = NDArray[np.float64]
COST_PARTS = ("experts", "exchange", "attention and dense parts")  # what may be off apart
_CHUNKS = "context parallelism of prompts"
_CHECKED = "attention of drafts that are checked"
_PREFILL_CONTEXT = 2048  # prompt length at which the head's rows of a prefill step are counted


@dataclass(slots=True, eq=False)
class MoeTable:
    """Experts and exchange of one placement under one load in one phase, filled as grid points are touched."""

    placement: Placement
    load_LE: Floats
    phase: Phase
    filled_B: list[bool]
    expert_BL: Floats
    expert_BR: Floats
    exchange_BL: Floats
    part_error_B3: Floats  # in the order of COST_PARTS
    parts_B: dict[int, BatchParts] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _FixedRows:
    """Of each group ``[D, B, 4]``: token-wise part of a layer, shared experts, other layers and head, how many kernels
    among those; ``head_DB`` alone; ``balanced_B``: a layer's exchange where choices fall evenly. The first ``filled``
    points are known."""

    rows_DB4: Floats
    head_DB: Floats
    balanced_B: Floats
    filled: int = 0


class ServingCosts:
    """One model on one cluster under one technique; see the module.

    ``technique.overlap`` concerns whole steps, ``technique.dispatch`` decode (see
    :func:`moeplan.costs.exchange.engine_dispatch`). ``cluster`` is that of one pipeline stage, ``stages`` that of all,
    where there are several.
    """

    def __init__(
        self,
        model: ModelSpec,
        cluster: ClusterSpec,
        workload: Workload,
        technique: Technique,
        profile: HardwareProfile | None,
        max_tokens: int,
        max_seqs: int,
        max_context: int,
        stages: ClusterSpec | None = None,
    ) -> None:
        self.model, self.cluster, self.profile = model, cluster, profile
        self.technique = technique
        self._workload = workload
        self._plain = replace(technique, overlap="none")
        self.live_R = working(cluster)
        self._num_live = int(self.live_R.sum())
        self._drafts_route = not model.prediction_intermediate_size  # the prediction layer has experts
        self.speed_R = speeds(cluster)
        self._group_ranks = ranks = technique.tp * technique.cp
        self.groups = cluster.num_ranks // ranks
        self._speed_D = self.speed_R.reshape(self.groups, ranks).min(1)
        link_R = link_speeds(cluster)
        self._link_of_R, self._lost = tuple(link_R.tolist()), tuple(np.flatnonzero(~self.live_R).tolist())
        self._nics_usual = not self._lost and bool((link_R == 1).all()) and cluster.ranks_per_nic == 1
        self._link_D = link_R.reshape(self.groups, ranks).min(1)
        self._mean = Curve(grid(max_tokens, 1.0 / self._num_live))
        self._busy = Curve(stairs(grid(max_tokens), technique.tp))
        self._models: dict[tuple[Phase, float], StepModel] = {}
        self._fixed: dict[tuple[Phase, int], _FixedRows] = {}
        self._tables: dict[tuple[int, int, Phase], MoeTable] = {}
        self._swaps: dict[bool, SwapCosts] = {}
        self.source: dict[str, str] = {}
        self.extrapolated: set[str] = set()
        self.part_errors: dict[str, float] = {}
        self._nothing_L = np.zeros(model.num_moe_layers)
        self._attention = AttentionTables(
            model, cluster, workload, technique, profile, max_seqs, max_context, self._speed_D, self._link_D
        )
        self._met_sent: set[int] = set()  # points of what is sent on whose sources, marks and errors are noted
        self._off_3: Floats | None = None  # see moved()
        self._onward = None
        if stages is not None:
            self._onward = StageTransfers(model, stages, cluster.num_ranks, profile, technique, self._busy)

    # ------------------------------------------------------------------ tables

    def model_at(self, phase: Phase, tokens_per_rank: float) -> StepModel:
        """The step model of this many tokens on each live rank, without overlap."""
        key = (phase, tokens_per_rank)
        if key not in self._models:
            batch = {"phase": phase, "batch_per_rank": max(1, int(tokens_per_rank)), "context": _PREFILL_CONTEXT}
            self._models[key] = StepModel(
                self.model,
                self.cluster,
                self._workload.model_copy(update=batch),
                replace(self._plain, dispatch=engine_dispatch(self._plain.dispatch, phase)),
                self.profile,
                tokens_per_rank * self._num_live,
            )
        return self._models[key]

    def _fixed_rows(self, phase: Phase, most: float, drafts_of: int = 0) -> _FixedRows:
        """Of a step with ``most`` tokens on a rank, or of a drafting pass over ``drafts_of`` of each sequence, in which
        there are no other layers and the head sees one of these."""
        found = self._fixed.get((phase, drafts_of))
        if found is None:
            D, B = self.groups, len(self._busy.points)
            found = self._fixed[phase, drafts_of] = _FixedRows(np.zeros((D, B, 4)), np.zeros((D, B)), np.zeros(B))
        while found.filled < self._busy.place(most)[0] + 2:
            self._fill_row(found, phase, drafts_of)
        return found

    def _fill_row(self, rows: _FixedRows, phase: Phase, drafts_of: int) -> None:
        points, b = self._busy.points, rows.filled
        fixed, rows.balanced_B[b] = self.model_at(phase, points[b]).fixed, self._balanced_s(phase, points[b])
        context, kernels = Work(-fixed.kernel_s) + fixed.partial * -1, 0 if drafts_of else fixed.other_kernels
        token_wise, shared = fixed.layer + context, fixed.shared
        if drafts_of and not self._drafts_route:
            token_wise, shared = token_wise + Work(-fixed.routing_s), Work()
        other = (fixed.draft if drafts_of else fixed.other) + context * kernels
        for column, work in enumerate((token_wise, shared, other)):
            rows.rows_DB4[:, b, column] = work.at(self._speed_D, self._link_D)
        rows.rows_DB4[:, b, 3] = kernels
        rows.head_DB[:, b] = fixed.head.at(self._speed_D, self._link_D)
        rows.filled = b + 1
        if drafts_of:
            seen = points[b] / drafts_of if phase == "decode" else points[b]
            known = slice(rows.filled)
            rows.rows_DB4[:, b, 2] += [np.interp(seen, points[known], head_B[known]) for head_B in rows.head_DB]

    def table(self, placement: Placement, load_LE: Floats, phase: Phase) -> MoeTable:
        """The table of a placement under a load; the same objects give the same table."""
        key = (id(placement), id(load_LE), phase)
        found = self._tables.get(key)
        if found is None or found.placement is not placement or found.load_LE is not load_LE:
            B, L, R = len(self._mean.points), len(load_LE), self.cluster.num_ranks
            found = MoeTable(
                placement, load_LE, phase, [False] * B, np.zeros((B, L)), np.zeros((B, R)), np.zeros((B, L)),
                np.zeros((B, len(COST_PARTS))),
            )  # fmt: skip
            self._tables[key] = found
        return found

    def forget(self, placement: Placement) -> None:
        """Drop the tables of a placement that is no longer in use."""
        self._tables = {key: table for key, table in self._tables.items() if table.placement is not placement}

    def moved(self, ends: Mapping[str, float]) -> ServingCosts:
        """The same costs where parts of them are off: ``{"experts": 1}`` has experts at the high end of their interval,
        -1 at the low one, and so on between. ``exchange`` takes what stages send on with it, ``attention and dense
        parts`` what ranks send for a prompt's attention. Tables are shared with these."""
        other = copy(self)
        other._off_3 = np.array([ends.get(name, 0.0) for name in COST_PARTS])
        return other

    def clear(self) -> None:
        """Drop all tables of placements, and what the answers so far rested on; what depends on neither stays."""
        for kept in (self._tables, self.source, self.extrapolated, self.part_errors, self._met_sent):
            kept.clear()

    def _fill(self, table: MoeTable, b: int) -> None:
        tokens = float(self._mean.points[b])
        model = self.model_at(table.phase, tokens)
        cost = model.step(table.placement, table.load_LE)
        table.expert_BL[b] = cost.expert_s_LR.max(1)
        table.expert_BR[b] = cost.expert_s_LR.sum(0)
        table.exchange_BL[b] = cost.exchange_s_L
        if model.technique.dispatch == "per_node" and (between := model.exchange.between) is not None:
            # What uneven links and stand-ins add depends on where tokens are at home (_sent_s): here it is left out.
            times = self._nics(table.phase).tokens(self.live_R.astype(float))
            table.exchange_BL[b] = between.fixed_s + (cost.exchange_s_L - between.fixed_s) / times
        table.part_error_B3[b] = [model.part_errors[name] for name in COST_PARTS]
        table.filled_B[b] = True
        self.source |= dict(cost.source)
        self.extrapolated |= set(cost.extrapolated)
        self._met(model.part_errors)

    def _met(self, errors: Mapping[str, float]) -> None:
        for name, error in errors.items():
            self.part_errors[name] = max(error, self.part_errors.get(name, 0.0))

    def _at(self, table: MoeTable, tokens_per_rank: float) -> tuple[int, float]:
        b, weight = self._mean.place(tokens_per_rank)
        for point in (b, b + 1):
            if not table.filled_B[point]:
                self._fill(table, point)
        return b, weight

    # ------------------------------------------------------------------ a step

    def chunk_s(self, before: int, new: int) -> Floats:
        """Prefill attention of one layer over ``new`` tokens after ``before``, without the launch, in seconds ``[4]``
        at usual speeds: what ranks compute; and of what those that keep a cache together, or cut prompts among them,
        send each other for it, what passes beside the bytes, what these take on links, and what both may be off by."""
        seconds = np.zeros(4)
        if (sent := self._attention.sent(before, new)) is not None:
            seconds, self.source[_CHUNKS], beyond = sent
            if beyond:
                self.extrapolated.add(_CHUNKS)
            self._met({_CHUNKS: seconds[3] / (seconds[1] + seconds[2])})
        seconds[0] += self._attention.chunk_s(before, new)
        return seconds

    def swap_s(self, size_bytes: float, to_host: bool) -> float:
        """A rank's part of a cache to its host, or back."""
        if to_host not in self._swaps:
            self._swaps[to_host] = SwapCosts(self.cluster, to_host, self.profile)
        swaps, name = self._swaps[to_host], "caches to the host" if to_host else "caches from the host"
        self.source[name] = swaps.source
        if size_bytes > swaps.measured_bytes:
            self.extrapolated.add(name)
        return swaps.seconds(size_bytes)

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """What a step runs, one after another."""
        return passes_of(batch, self.technique.draft_tokens)

    def step(self, batch: Batch, placement: Placement, load_LE: Floats) -> StepSeconds:
        """Seconds of one step in which at least one token is worked on."""
        passes = self.passes(batch)
        return joined(passes, [self.pass_seconds(each, placement, load_LE) for each in passes])

    def pass_seconds(self, each: Pass, placement: Placement, load_LE: Floats) -> StepSeconds:
        """Seconds of one pass, once."""
        how, L = self.technique, len(load_LE)
        if each.queries > 1 and self._attention.queries_source and each.batch.decodes_D.any():
            self.source[_CHECKED] = self._attention.queries_source
            self.extrapolated.add(_CHECKED)
        table = self.table(placement, load_LE, each.phase)
        share = 0.5 if how.overlap == "two_batch" else 1.0
        tokens_D, mean, group_D3 = self._groups(each, share)
        b, w = self._at(table, mean * share)
        expert_L, expert_R = row_at(table.expert_BL, b, w), row_at(table.expert_BR, b, w)
        exchange_L = np.maximum(row_at(table.exchange_BL, b, w), self._sent_s(table.phase, tokens_D * share))
        if each.drafting and not self._drafts_route:
            expert_L, expert_R, exchange_L = self._nothing_L, 0 * expert_R, self._nothing_L
        if self._off_3 is not None:
            expert_off, exchange_off, rest_off = (1 + row_at(table.part_error_B3, b, w)) ** self._off_3
            expert_L, expert_R = expert_L * expert_off, expert_R * expert_off
            exchange_L, group_D3 = exchange_L * exchange_off, group_D3 * rest_off
        attention, shared, other = in_turn(group_D3).tolist()
        part = 1 / L if each.drafting else 1.0  # of the layers: one as they are in the mean
        alone = float(combine(how.overlap, attention, shared, self._nothing_L, expert_L).sum()) * part
        layers = float(combine(how.overlap, attention, shared, exchange_L, expert_L).sum()) * part
        busy_D = (group_D3[:, 0] + group_D3[:, 1]) * (L * part / share) + group_D3[:, 2]
        busy_R = busy_D if self._group_ranks == 1 else np.repeat(busy_D, self._group_ranks)
        busy_R = np.minimum(busy_R + expert_R * (part / share), alone + other)
        sent, sent_error = (0.0, 0.0) if each.drafting else self._sent_on(tokens_D)  # drafts stay in the last stage
        more = 0.0
        if self._off_3 is not None:
            chunks, chunks_error = self._sent_for_chunks(each, group_D3)
            sent *= (1 + sent_error) ** self._off_3[1]
            more = chunks * ((1 + chunks_error) ** self._off_3[2] - rest_off)  # off by more than what is beside
        return StepSeconds(layers + other + sent + more, layers - alone + sent, busy_R)

    def _sent_for_chunks(self, each: Pass, group_D3: Floats) -> tuple[float, float]:
        """Seconds of the layers in which the group that takes longest sends for its prompts' attention, and their
        relative error."""
        if not each.batch.has_prefill:
            return 0.0, 0.0
        d = int(group_D3[:, 0].argmax())
        _, beside, wire, off = each.batch.chunk_s_D4[d].tolist()
        if not (usual := beside + wire):
            return 0.0, 0.0
        layers = 1 if each.drafting else self.model.num_layers
        return (beside + wire / float(self._link_D[d])) * layers, off / usual

    def _sent_s(self, phase: Phase, tokens_D: Floats) -> float:
        """A layer's exchange where choices fall evenly, by the NIC that takes longest for what ranks of groups with
        ``tokens_D`` on each send; in messages of the one that sends most."""
        most = float(tokens_D.max())
        i, v = self._busy.place(most)
        if self._nics_usual:
            return float(row_at(self._fixed_rows(phase, most).balanced_B, i, v))
        times = self._nics(phase).tokens(tokens_D.repeat(self._group_ranks)) / most
        low, high = (self._balanced_s(phase, self._busy.points[point], times) for point in (i, i + 1))
        return low + v * (high - low)

    def _nics(self, phase: Phase) -> Nics:
        """What copies between nodes go over, or those between ranks where one network joins all."""
        place = (1, 1) if is_joined(self.cluster) else (self.cluster.num_nodes, self.cluster.ranks_per_nic)
        return nics_of(engine_dispatch(self._plain.dispatch, phase), self._link_of_R, *place, self._lost)

    def _balanced_s(self, phase: Phase, tokens: float, times: float = 1.0) -> float:
        """A layer's exchange of so many tokens on each rank where choices fall evenly and copies count ``times``."""
        dispatch = engine_dispatch(self._plain.dispatch, phase)
        copies = balanced_copies(dispatch, self.model.top_k, self.cluster.num_ranks, self.cluster.num_nodes)
        return float(self.model_at(phase, tokens).exchange.time_s(tokens, *(times * each for each in copies)))

    def _sent_on(self, tokens_D: Floats) -> tuple[float, float]:
        """Seconds that the stages take to send a step on, at the group that takes longest, and their relative error."""
        if self._onward is None:
            return 0.0, 0.0
        seconds, error, points = self._onward.at(tokens_D, self._link_D)
        for point in points - self._met_sent:
            self._met_sent.add(point)
            parts = self._onward.parts_B[point]
            self.source |= {name: part.source for name, part in parts.items()}
            self.extrapolated |= {name for name, part in parts.items() if part.extrapolated}
            self._met({name: part.relative_error for name, part in parts.items()})
        return seconds, error

    def _groups(self, each: Pass, share: float) -> tuple[Floats, float, Floats]:
        """Tokens on each rank of a group ``[D]``, their mean over live ranks, and seconds of each group ``[D, 3]``
        (:func:`moeplan.costs.group_kernel.group_seconds`)."""
        batch = each.batch
        tokens_D = batch.tokens_D / self._group_ranks
        mean = float(tokens_D.sum()) * self._group_ranks / self._num_live
        fixed = self._fixed_rows(each.phase, float(tokens_D.max()), each.queries if each.drafting else 0)
        attention = self._attention
        seconds_D3 = group_seconds(
            batch.decodes_D, batch.cached_D, batch.chunk_s_D4, tokens_D, self._speed_D, self._link_D, share,
            self._busy.points, fixed.rows_DB4, attention.seqs.points, attention.context.points,
            attention.decode_s_of[each.queries], attention.merge_s_of[each.queries], attention.launch_s,
        )  # fmt: skip
        return tokens_D, mean, seconds_D3

    def batches(
        self, each: Pass, placement: Placement, load_LE: Floats
    ) -> tuple[StepModel, tuple[BatchParts, ...], Floats, Floats]:
        """A pass apart, for who plays it event by event: a step model of about its size; its batches, two under
        ``two_batch``; each rank's seconds outside MoE layers; the part of all tokens at home on each rank."""
        how = self.technique
        table = self.table(placement, load_LE, each.phase)
        share = 0.5 if how.overlap == "two_batch" else 1.0
        tokens_D, mean, group_D3 = self._groups(each, share)
        b, w = self._mean.place(mean * share)
        for point in (b, b + 1):
            if point not in table.parts_B:
                model = self.model_at(table.phase, float(self._mean.points[point]))
                table.parts_B[point] = model.batches(placement, load_LE)[0]
        low, high = table.parts_B[b], table.parts_B[b + 1]
        attention_R, shared_R, other_R = np.repeat(group_D3, self._group_ranks, axis=0).T
        parts = replace(
            low,
            tokens=mean * share * self._num_live,
            attention_s_R=attention_R,
            shared_s_R=shared_R,
            expert_s_LR=low.expert_s_LR + w * (high.expert_s_LR - low.expert_s_LR),
            exchange_s_L=low.exchange_s_L + w * (high.exchange_s_L - low.exchange_s_L),
            pairs_LR=low.pairs_LR + w * (high.pairs_LR - low.pairs_LR),
        )
        if each.drafting:
            rows = ("expert_s_LR", "exchange_s_L", "pairs_LR")
            parts = replace(parts, **{name: getattr(parts, name).mean(0, keepdims=True) for name in rows})
        if each.drafting and not self._drafts_route:  # nothing of it is a MoE layer
            parts = replace(parts, **{name: getattr(parts, name)[:0] for name in rows})
            other_R = other_R + (attention_R + shared_R) / share
        home_R = np.repeat(tokens_D, self._group_ranks)
        model = self.model_at(table.phase, float(self._mean.points[b]))
        return model, (parts,) * round(1 / share), other_R, home_R / home_R.sum()
