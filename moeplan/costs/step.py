"""Seconds of a whole step under a placement: attention, dense parts, dispatch, experts, combine, head.

:class:`StepModel` compiles measured tables at one operating point; :meth:`StepModel.step` then costs any placement
under any load with a few array operations, and :meth:`StepModel.swap` a layer after two of its slots change places.

A layer's time by overlap mode, with ``a`` attention and dense parts, ``s`` shared expert, ``x`` exchange, ``e``
experts of the busiest rank:

- ``none``: a + s + x + e; ``shared_expert``: a + max(s, x) + e (the shared expert beside dispatch and combine);
- ``two_batch``: two half batches, one computing while the other exchanges: max(2 (a + s + e)', 2 x') with the
  halves' times; ``shortcut`` (ScMoE, arXiv 2404.05019): max(a + s, x + e).

``a`` is that of the slowest live rank, ``s`` what the shared expert adds to it on the rank that takes longest for both:
all wait for it when they exchange (:mod:`moeplan.costs.work`). Dense layers, embedding and head come before the first
MoE layer, as they do where steps are played.

``L`` MoE layers, ``P`` slots, ``E`` experts, ``R`` ranks, ``N`` nodes, ``T`` tokens over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.exchange import ExchangeCosts, exchange_costs, touched
from moeplan.costs.expert_law import ExpertCosts
from moeplan.costs.experts import expert_costs
from moeplan.costs.fixed import FixedCosts, fixed_costs
from moeplan.costs.memory import RankMemory, memory_report
from moeplan.costs.nics import nics_of
from moeplan.costs.roofline import returned_bytes, token_bytes
from moeplan.costs.tables import Seconds
from moeplan.costs.technique import Overlap, Technique
from moeplan.costs.traffic import Traffic, expected_reach
from moeplan.costs.work import in_turn, link_speeds, speeds, working
from moeplan.errors import InputError
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import Workload

__all__ = ["BatchParts", "LayerState", "StepCost", "StepModel", "combine", "step"]

Floats = NDArray[np.float64]

_BINS = 4096  # of the compiled expert curve, up to _REACH times the mean
_REACH = 64.0


@dataclass(frozen=True, slots=True, eq=False)
class StepCost:
    """What a step costs; seconds, bytes, and how sure.

    ``layer_s_L`` MoE layers at their busiest rank; ``expert_s_LR`` experts by rank; ``exchange_s_L``;
    ``node_bytes_LN`` into each node from others and ``rank_bytes_LR`` into each rank, dispatch and combine;
    ``attention_s`` and ``shared_s`` of one layer, ``other_s`` dense layers, embedding and head: what each adds at the
    slowest rank; ``low_s`` and ``high_s`` bound ``total_s`` by the residuals.
    """

    total_s: float
    low_s: float
    high_s: float
    layer_s_L: Floats
    expert_s_LR: Floats
    exchange_s_L: Floats
    attention_s: float
    shared_s: float
    other_s: float
    node_bytes_LN: Floats
    rank_bytes_LR: Floats
    memory: tuple[RankMemory, ...]
    source: Mapping[str, str]
    extrapolated: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BatchParts:
    """What one batch of a step is made of (two of them under ``two_batch``), for who plays it event by event.

    ``expert_s_LR`` and ``pairs_LR``: seconds and (token, expert) pairs of each rank; ``attention_s_R`` and
    ``shared_s_R`` of one layer; ``exchange_s_L`` dispatch and combine, of which ranks that split experts gather and
    scatter for ``gather_s_L``; ``exchange`` gives seconds per copy at ``tokens`` over all ranks.
    """

    tokens: float
    attention_s_R: Floats
    shared_s_R: Floats
    expert_s_LR: Floats
    exchange_s_L: Floats
    gather_s_L: Floats
    pairs_LR: Floats
    exchange: ExchangeCosts


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """One MoE layer under a placement (one half batch's under ``two_batch``): (token, expert) pairs of each slot and
    rank, seconds of experts by rank and of the exchange, and of the layer."""

    rank_of_slot_P: NDArray[np.int32]
    pairs_P: Floats
    pairs_R: Floats
    expert_s_R: Floats
    exchange_s: float
    layer_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Everything a layer needs at one batch size. ``attention_R`` and ``shared_R`` of a layer and ``other_R`` of the
    step: seconds of ``fixed`` on each rank; ``_s``: what they add on the slowest live one."""

    tokens: float
    experts: ExpertCosts
    exchange: ExchangeCosts
    fixed: FixedCosts
    attention_R: Floats
    shared_R: Floats
    other_R: Floats
    attention_s: float
    shared_s: float
    other_s: float
    shared_rows_s: float
    scale: float
    curve: Floats

    def slots_s(self, pairs: Floats) -> Floats:
        """``w`` by table lookup with a line between its bins."""
        at = np.minimum(pairs * self.scale, _BINS - 1.0)
        low = at.astype(np.int32)
        inner = self.curve[low] + (at - low) * (self.curve[low + 1] - self.curve[low])
        beyond: Floats = inner * np.maximum(pairs * self.scale / (_BINS - 1.0), 1.0)
        return beyond


class StepModel:
    """One model on one cluster at one operating point. See the module.

    ``tokens`` over all ranks enter a step; left out, ``workload.batch_per_rank`` on each live rank.

    Raises:
        InputError: the technique does not fit the cluster.
    """

    def __init__(
        self,
        model: ModelSpec,
        cluster: ClusterSpec,
        workload: Workload,
        technique: Technique | None = None,
        profile: HardwareProfile | None = None,
        tokens: float | None = None,
    ) -> None:
        self.model, self.cluster, self.workload = model, cluster, workload
        self.technique = technique or Technique()
        self.profile = profile
        self.live = working(cluster)
        self.speed_R = speeds(cluster)
        self.link_R = link_speeds(cluster)
        lost = tuple(np.flatnonzero(~self.live).tolist())
        self._nics = nics_of(
            self.technique.dispatch, tuple(self.link_R.tolist()), cluster.num_nodes, cluster.ranks_per_nic, lost
        )
        self._tokens = tokens
        of = {"tp": cluster.num_ranks, "expert_tp": cluster.ranks_per_node}
        for name, number in of.items():
            degree = getattr(self.technique, name)
            if degree < 1 or number % degree:
                whose = f"ranks of a node ({number})" if name == "expert_tp" else f"number of ranks ({number})"
                raise InputError(f"technique.{name} ({degree}) does not divide the {whose}; choose a divisor")
        self._links = CollectiveCosts(cluster, profile, self.technique.backend)
        self._slots_R = np.zeros(0, np.int64)
        self._memory: tuple[RankMemory, ...] = ()
        self._whole = self._part(1.0)
        self._half = self._part(0.5) if self.technique.overlap == "two_batch" else self._whole

    def _part(self, share: float) -> _Part:
        model, cluster, work, how = self.model, self.cluster, self.workload, self.technique
        ranks = int(self.live.sum())
        batch = math.ceil(work.batch_per_rank * share)  # of an odd one the larger half
        tokens = (work.batch_per_rank * ranks if self._tokens is None else self._tokens) * share
        mean = tokens * model.top_k / model.num_experts
        groups = max(1, ranks // how.expert_tp)
        arriving = 1.0 if how.dispatch == "allgather" else touched(groups, model.top_k) / groups
        experts = expert_costs(
            model,
            cluster.accelerator,
            work.weight_dtype,
            self.profile,
            tp=how.expert_tp,
            backend=how.backend,
            mean_pairs=mean,
            local_experts=model.num_experts / groups,
            arriving=arriving,
            phase=work.phase,
            sent=how.dispatch != "allgather",
        )
        apart = cluster
        if how.gathers and groups == 1:  # all others are those to gather from
            apart = cluster.resized(1, 1)
        exchange = exchange_costs(
            model, apart, how.dispatch, work.phase, work.activation_dtype,
            profile=self.profile, tp=how.tp, backend=how.backend,
        )  # fmt: skip
        fixed = fixed_costs(model, cluster, work, batch, self.profile, how)
        # Ranks that split attention keep the pace of their slowest, all layers that of the slowest group.
        pace_R, wire_R = (each_R.reshape(-1, how.tp).min(1).repeat(how.tp) for each_R in (self.speed_R, self.link_R))
        on_R = attention_R, shared_R, other_R = [
            work.at(pace_R, wire_R) for work in (fixed.layer, fixed.shared, fixed.other)
        ]
        attention_s, shared_s, other_s = in_turn(np.stack(on_R, 1)[self.live]).tolist()
        bins = np.arange(_BINS + 1) * (mean * _REACH / _BINS)
        curve = experts.expected_s(bins)
        scale = _BINS / (mean * _REACH)
        rows_s = experts.shared_s(mean * arriving)
        return _Part(
            tokens, experts, exchange, fixed, attention_R, shared_R, other_R, attention_s, shared_s, other_s, rows_s,
            scale, curve,
        )  # fmt: skip

    # ------------------------------------------------------------------ one placement

    def _pairs_LP(
        self, placement: Placement, load_LE: Floats, part: _Part, taken_LE: Floats | None = None
    ) -> Floats:
        """(token, expert) pairs per slot of one step, times ``taken_LE``."""
        share = load_LE / load_LE.sum(1, keepdims=True) * (part.tokens * self.model.top_k)
        share = share if taken_LE is None else share * taken_LE
        slots = placement.physical_to_logical_LP
        place = slots + np.arange(len(slots), dtype=np.int64)[:, None] * share.shape[1]
        used = slots != EMPTY
        share = share * self.technique.expert_tp  # every rank of a group works on all pairs of its experts
        if placement.share_LP is not None:
            return np.where(used, share.ravel()[np.maximum(place, 0)] * placement.share_LP, 0.0)
        copies = np.bincount(place.ravel() if used.all() else place[used], minlength=share.size)
        each = share.ravel() / np.maximum(copies, 1)
        return each[place] if used.all() else np.where(used, each[np.maximum(place, 0)], 0.0)

    def _arrivals(self, pairs_LR: Floats, part: _Part) -> tuple[Floats, Floats, Floats]:
        """Copies ``[L, N]`` into nodes from others and ``[L, R]`` into ranks, homes spread evenly, and those over the
        busiest NIC ``[L]``, in units of a node; choices are taken as independent."""
        how, live = self.technique, self.live.sum()
        share_LR = pairs_LR / (part.tokens * self.model.top_k)
        reach = expected_reach(share_LR, self.cluster, how.dispatch, self.model.top_k, how.expert_tp)
        rank_LR, places = part.tokens * reach.rank_LR, live
        if how.gathers:  # a copy goes to one rank of a group
            rank_LR, places = rank_LR / how.expert_tp, live / how.expert_tp
        node_LN = part.tokens * reach.node_LN
        if how.dispatch in ("per_rank", "per_expert"):
            node_LN = rank_LR.reshape(*node_LN.shape, -1).sum(2)
        busiest_L = self._nics.busiest(node_LN, rank_LR)
        return node_LN * self._nics.away_N, rank_LR * (1 - 1 / places), busiest_L

    def _layers(
        self,
        placement: Placement,
        load_LE: Floats,
        part: _Part,
        traffic: Traffic | None,
        taken_LE: Floats | None = None,
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """(expert seconds LR, exchange seconds L, node copies LN, rank copies LR)."""
        pairs_LP = self._pairs_LP(placement, load_LE, part, taken_LE)
        starts = np.searchsorted(placement.rank_of_slot_P, np.arange(self.cluster.num_ranks))
        used = np.append(np.diff(starts), placement.num_slots - starts[-1]) > 0
        sums = np.zeros((2, len(pairs_LP), self.cluster.num_ranks))
        sums[0][:, used] = np.add.reduceat(part.slots_s(pairs_LP), starts[used], axis=1)
        sums[1][:, used] = np.add.reduceat(pairs_LP, starts[used], axis=1)
        expert = (sums[0] + part.shared_rows_s * used) / self.speed_R
        if traffic is None:  # evenly spread homes send no more than the busiest end takes in
            node, rank, nic_L = self._arrivals(sums[1], part)
            most_rank = rank
        else:
            node, rank = (part.tokens * ends for ends in traffic.arrivals(self.cluster.ranks_per_node))
            nic_LX, most_rank = (part.tokens * ends for ends in traffic.busiest(self.cluster.ranks_per_nic))
            nic_L = self._nics.at(nic_LX) * self._nics.per_node
        if self.technique.gathers:
            rank = rank + sums[1] * (1 - 1 / self.technique.expert_tp)
        return expert, self._exchange_s(nic_L, most_rank, sums[1], part), node, rank

    def _exchange_s(self, nic_L: Floats, rank_LR: Floats, pairs_LR: Floats, part: _Part) -> Floats:
        """Seconds ``[L]`` of an exchange with so many copies over the busiest NIC, in units of a node, and into ranks,
        for ``pairs_LR``."""
        live = self.live.sum()
        exchange_L = part.exchange.time_s(
            part.tokens / live,
            nic_L * (live / self.cluster.ranks_per_node) / part.tokens,
            (rank_LR / self.link_R).max(1) * live / part.tokens,
        )
        return np.asarray(exchange_L, float) + self._gathered_s(pairs_LR)

    def _gathered_s(self, pairs_LR: Floats) -> Floats:
        """Seconds ``[L]`` in which the slowest ranks that split experts gather rows of their pairs and scatter results,
        there and back; none but where they do (:attr:`moeplan.costs.technique.Technique.gathers`)."""
        seconds = np.zeros(len(pairs_LR))
        if not self.technique.gathers:
            return seconds
        degree = self.technique.expert_tp
        rows_LG, link_G = pairs_LR[:, ::degree], self.link_R.reshape(-1, degree).min(1)
        for op, size in self._row_bytes.items():
            found = self._links.seconds(op, degree, np.maximum(1.0, rows_LG.ravel()) * size)
            value, wire = (np.asarray(each, float).reshape(rows_LG.shape) for each in (found.value, found.wire))
            seconds += (value - wire + wire / link_G).max(1)
        return seconds

    @property
    def _row_bytes(self) -> dict[str, float]:
        """Bytes of a pair's row on its way to an expert, and of its result, by the collective among ranks that split
        it."""
        hidden, kind = self.model.routed_hidden_size, self.workload.activation_dtype
        return {"all_gather": token_bytes(hidden, kind), "reduce_scatter": returned_bytes(hidden, kind)}

    @cached_property
    def _gathers(self) -> list[Seconds]:
        """Both collectives among ranks that split experts evenly loaded; none where nothing is gathered."""
        if not self.technique.gathers:
            return []
        degree = self.technique.expert_tp
        pairs = self._whole.tokens * self.model.top_k / self.live.sum() * degree
        return [self._links.seconds(op, degree, pairs * size) for op, size in self._row_bytes.items()]

    def _combined(self, exchange_L: Floats, expert_L: Floats, part: _Part) -> Floats:
        """Seconds ``[L]`` of layers; attention and shared experts at the pace of the slowest rank."""
        return combine(self.technique.overlap, part.attention_s, part.shared_s, exchange_L, expert_L)

    def step(self, placement: Placement, load_LE: Floats, traffic: Traffic | None = None) -> StepCost:
        """Cost ``placement`` under ``load_LE`` (any scale). ``traffic``: copies from rank to rank where they were
        counted on a trace; left out, choices are independent and homes even.

        Raises:
            InputError: placement, load and cluster do not fit each other.
        """
        L, R = load_LE.shape[0], self.cluster.num_ranks
        if placement.num_ranks != R or placement.num_layers != L or load_LE.shape[1] != placement.num_experts:
            raise InputError(
                f"placement ({placement.num_layers} layers, {placement.num_experts} experts, {placement.num_ranks}"
                f" ranks) and load {load_LE.shape} on cluster.num_ranks ({R}) are not of one model and cluster"
            )
        self._require_groups(placement)
        whole = self._whole
        expert, exchange, node, rank = self._layers(placement, load_LE, whole, traffic)
        if self.technique.overlap == "two_batch":
            half_expert, half_exchange, _, _ = self._layers(placement, load_LE, self._half, traffic)
            layer = self._combined(half_exchange, half_expert.max(1), self._half)
        else:
            layer = self._combined(exchange, expert.max(1), whole)
        total = float(layer.sum()) + whole.other_s
        wire = sum(self._row_bytes.values())
        slower = whole.exchange.inside if whole.exchange.between is None else whole.exchange.between
        errors = self.part_errors
        parts = {
            "experts": (float(expert.max(1).sum()), whole.experts.extrapolated),
            "exchange": (float(exchange.sum()), slower.told(whole.tokens / self.live.sum())[1]),
            "attention and dense parts": (
                (whole.attention_s + whole.shared_s) * L + whole.other_s,
                whole.fixed.extrapolated,
            ),
        }
        everything = sum(seconds for seconds, _ in parts.values())
        error = sum(seconds * errors[name] for name, (seconds, _) in parts.items()) / everything
        slots_R = np.bincount(placement.rank_of_slot_P, minlength=R)
        if not np.array_equal(slots_R, self._slots_R):
            whole_R = slots_R / self.technique.expert_tp
            how = self.technique
            report = memory_report(self.model, self.cluster, self.workload, whole_R, how.tp, how.kv_dtype, how.dcp)
            self._slots_R, self._memory = slots_R, tuple(report)
        source = {"experts": whole.experts.source, "exchange inside a node": whole.exchange.inside.source}
        if whole.exchange.between is not None:
            source["exchange between nodes"] = whole.exchange.between.source
        if self._gathers:
            sources = dict.fromkeys(each.source for each in self._gathers)
            source["exchange among ranks that split experts"] = "; ".join(sources)
        return StepCost(
            total_s=total,
            low_s=total / (1 + error),
            high_s=total * (1 + error),
            layer_s_L=layer,
            expert_s_LR=expert,
            exchange_s_L=exchange,
            attention_s=whole.attention_s,
            shared_s=whole.shared_s,
            other_s=whole.other_s,
            node_bytes_LN=node * wire,
            rank_bytes_LR=rank * wire,
            memory=self._memory,
            source=source | dict(whole.fixed.source),
            extrapolated=tuple(name for name, (_, beyond) in parts.items() if beyond),
        )

    def _require_groups(self, placement: Placement) -> None:
        """Ranks that share experts hold the same ones."""
        degree = self.technique.expert_tp
        if degree == 1:
            return
        slots_LP, ranks = placement.physical_to_logical_LP, range(placement.num_ranks)
        held = [np.sort(slots_LP[:, placement.rank_of_slot_P == rank]) for rank in ranks]
        for rank in ranks:
            first = rank - rank % degree
            if not np.array_equal(held[first], held[rank]):
                raise InputError(
                    f"ranks {first} and {rank} share experts (technique.expert_tp is {degree}) but hold different ones;"
                    " place the same on both, or set expert_tp to 1"
                )

    def batches(
        self, placement: Placement, load_LE: Floats, taken_LE: Floats | None = None
    ) -> tuple[BatchParts, ...]:
        """The batches of a step, apart: one, or two half ones under ``two_batch``.

        ``taken_LE``: part of an expert's pairs that it works on, below 1 where a capacity drops some.
        """

        def parts(part: _Part) -> BatchParts:
            expert, exchange_s_L, _, _ = self._layers(placement, load_LE, part, None, taken_LE)
            pairs_LP = self._pairs_LP(placement, load_LE, part, taken_LE)
            pairs_LR = np.zeros((len(pairs_LP), self.cluster.num_ranks))
            np.add.at(pairs_LR.T, placement.rank_of_slot_P, pairs_LP.T)
            return BatchParts(
                part.tokens, part.attention_R, part.shared_R, expert, exchange_s_L, self._gathered_s(pairs_LR),
                pairs_LR, part.exchange,
            )  # fmt: skip

        return (parts(self._half),) * 2 if self.technique.overlap == "two_batch" else (parts(self._whole),)

    @property
    def part_errors(self) -> dict[str, float]:
        """Relative error of each part of a step."""
        whole = self._whole
        slower = whole.exchange.inside if whole.exchange.between is None else whole.exchange.between
        return {
            "experts": whole.experts.relative_error,
            "exchange": max(
                [slower.told(whole.tokens / self.live.sum())[0], *(each.relative_error for each in self._gathers)]
            ),
            "attention and dense parts": whole.fixed.relative_error,
        }

    @property
    def fixed(self) -> FixedCosts:
        """What no placement changes, at usual speeds."""
        return self._whole.fixed

    @property
    def exchange(self) -> ExchangeCosts:
        """Dispatch and combine at this operating point."""
        return self._whole.exchange

    @property
    def other_s_R(self) -> Floats:
        """Dense layers, embedding and head of a step, on each rank."""
        return self._whole.other_R

    # ------------------------------------------------------------------ incremental

    def layer(self, placement: Placement, load_LE: Floats, layer: int) -> LayerState:
        """One MoE layer of a placement, to be changed by :meth:`swap`; choices independent, homes even."""
        rows = slice(layer, layer + 1)
        part = self._half if self.technique.overlap == "two_batch" else self._whole
        one = Placement(
            placement.physical_to_logical_LP[rows],
            placement.rank_of_slot_P,
            placement.num_experts,
            placement.num_ranks,
            placement.ranks_per_node,
            None if placement.share_LP is None else placement.share_LP[rows],
        )
        pairs_P = self._pairs_LP(one, load_LE[rows], part)[0]
        pairs_R = np.zeros(self.cluster.num_ranks)
        np.add.at(pairs_R, placement.rank_of_slot_P, pairs_P)
        expert_s_R = self._layers(one, load_LE[rows], part, None)[0][0]
        return self._state(placement.rank_of_slot_P, pairs_P, pairs_R, expert_s_R, part)

    def swap(self, state: LayerState, a: int, b: int) -> LayerState:
        """The layer after its slots ``a`` and ``b`` change places."""
        part = self._half if self.technique.overlap == "two_batch" else self._whole
        pairs_P, pairs_R, expert_s_R = state.pairs_P.copy(), state.pairs_R.copy(), state.expert_s_R.copy()
        here, there = state.rank_of_slot_P[[a, b]]
        first, second = pairs_P[[a, b]]
        before, after = part.slots_s(pairs_P[[a, b]])
        pairs_P[[a, b]] = second, first
        for rank, pairs, seconds in ((here, second - first, after - before), (there, first - second, before - after)):
            pairs_R[rank] += pairs
            expert_s_R[rank] += seconds / self.speed_R[rank]
        return self._state(state.rank_of_slot_P, pairs_P, pairs_R, expert_s_R, part)

    def _state(
        self, rank_of_slot_P: NDArray[np.int32], pairs_P: Floats, pairs_R: Floats, expert_s_R: Floats, part: _Part
    ) -> LayerState:
        _, rank_LR, nic_L = self._arrivals(pairs_R[None], part)
        exchange_L = self._exchange_s(nic_L, rank_LR, pairs_R[None], part)
        layer_L = self._combined(exchange_L, expert_s_R.max(keepdims=True), part)
        return LayerState(rank_of_slot_P, pairs_P, pairs_R, expert_s_R, float(exchange_L[0]), float(layer_L[0]))


def combine(overlap: Overlap, attention_s: float, shared_s: float, exchange_L: Floats, expert_L: Floats) -> Floats:
    """A layer's seconds from its parts; see the module for the modes. For ``two_batch`` they are one half's."""
    if overlap == "two_batch":
        return 2 * np.maximum(attention_s + shared_s + expert_L, exchange_L)
    if overlap == "shared_expert":
        return attention_s + np.maximum(shared_s, exchange_L) + expert_L
    if overlap == "shortcut":
        return np.maximum(attention_s + shared_s, exchange_L + expert_L)
    return attention_s + shared_s + exchange_L + expert_L


def step(
    model: ModelSpec,
    cluster: ClusterSpec,
    profile: HardwareProfile | None,
    placement: Placement,
    load_LE: Floats,
    workload: Workload,
    technique: Technique | None = None,
) -> StepCost:
    """One step, compiled and costed; use :class:`StepModel` for many placements at one operating point."""
    return StepModel(model, cluster, workload, technique, profile).step(placement, load_LE)
