"""Bytes from rank to rank over a run in which placement, load and the tokens' homes change from step to step.

Dispatch takes a copy from the rank where its token is at home to the rank of its expert, in the type of activations,
and combine one back the same way in bf16. What a rank keeps to itself, as a forwarder of its own node's copies also
does, is no traffic. Tokens of a step choose as the recorded ones of its window do, wherever they are at home.

``L`` MoE layers, ``R`` ranks, ``D`` attention groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.costs.counting import count_loads
from moeplan.costs.exchange import engine_dispatch
from moeplan.costs.passes import Pass
from moeplan.costs.roofline import returned_bytes, token_bytes
from moeplan.costs.traffic import Reach, counted_reach, expected_reach, spread
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import Dtype, ModelSpec
from moeplan.specs.workload import DispatchKind

__all__ = ["RunTraffic", "Wire"]

Floats = NDArray[np.float64]


class Wire:
    """How copies of one model's tokens travel, to experts that ``expert_tp`` neighbours split."""

    def __init__(
        self, model: ModelSpec, dispatch: DispatchKind, activation_dtype: Dtype, expert_tp: int = 1
    ) -> None:
        self.dispatch, self.top_k, self.expert_tp = dispatch, model.top_k, expert_tp
        self.drafts_route = not model.prediction_intermediate_size  # the prediction layer has experts
        self.out_bytes = token_bytes(model.routed_hidden_size, activation_dtype)
        self.back_bytes = returned_bytes(model.routed_hidden_size, activation_dtype)

    @property
    def prefill(self) -> Wire:
        """The same in steps with prefill (:func:`moeplan.costs.exchange.engine_dispatch`)."""
        answer = copy(self)
        answer.dispatch = engine_dispatch(self.dispatch, "prefill")
        return answer

    def reach(
        self, placement: Placement, cluster: ClusterSpec, load_LE: Floats, trace: RoutingTrace | None
    ) -> Reach:
        """Copies per token, counted on the trace or, without one, expected from the load."""
        if trace is not None:
            return counted_reach(trace, placement, cluster, self.dispatch)
        pairs_LR = count_loads(load_LE[None], placement)[0]
        return expected_reach(pairs_LR / pairs_LR.sum(1, keepdims=True), cluster, self.dispatch, self.top_k)

    def bytes_RR(
        self, reach: Reach, cluster: ClusterSpec, tokens_R: Floats, weight_L: Floats | None = None
    ) -> Floats:
        """Bytes from rank to rank, dispatch and combine, for ``tokens_R`` at home on each rank.

        ``weight_L``: how often each layer is passed; left out: once.
        """
        weight_L = np.ones(len(reach.rank_LR)) if weight_L is None else weight_L
        passed = Reach((weight_L @ reach.rank_LR)[None], (weight_L @ reach.node_LN)[None])
        hops = spread(passed, cluster, self.dispatch, tokens_R, self.expert_tp)
        copies_RR = hops.between_LRR[0] + hops.inside_LRR[0]
        if self.dispatch == "per_expert":  # what came to one of the ranks that split experts the others gather
            group_R, place_R = np.divmod(np.arange(len(tokens_R)), self.expert_tp)
            came_R = passed.rank_LR[0] * np.bincount(place_R, tokens_R)[place_R]
            copies_RR = copies_RR + came_R[:, None] * (group_R[:, None] == group_R)
        np.fill_diagonal(copies_RR, 0.0)
        answer: Floats = copies_RR * self.out_bytes + copies_RR.T * self.back_bytes
        return answer


class RunTraffic:
    """Adds up a run's steps. ``recorded`` gives the tokens behind a load, or None where there are counts only.

    ``ranks_changed``: whether one was lost or came back.
    """

    def __init__(self, wire: Wire, recorded: Callable[[Floats], RoutingTrace | None]) -> None:
        self._wires, self._recorded = {False: wire, True: wire.prefill}, recorded
        self._traces: dict[int, RoutingTrace | None] = {}
        # By load, and whether a step has prefill.
        self._known: dict[tuple[int, bool], tuple[Placement, Reach]] = {}
        self._pending: dict[tuple[int, bool], tuple[Floats, Floats]] = {}  # load itself, tokens of each group
        self._whole: dict[tuple[int, bool], tuple[Floats, Floats]] = {}
        self._used: list[tuple[Placement, ClusterSpec]] = []  # the first ones, and those in use
        self.steps = 0
        self._sent_RR: Floats = np.zeros((1, 1))
        self._moved = self.ranks_changed = False

    def add(self, placement: Placement, cluster: ClusterSpec, load_LE: Floats, passes: Sequence[Pass]) -> None:
        """One step of these passes, tokens of each attention group spread evenly over its ranks. The prediction layer
        sends what one layer does in the mean."""
        if not self._used or placement is not self._used[-1][0] or cluster is not self._used[-1][1]:
            self._fold()
            self._used = [*self._used[:1], (placement, cluster)]
            first, usual = self._used[0]
            self._moved |= placement is not first
            self.ranks_changed |= _failed(cluster) != _failed(usual)
        self.steps += 1
        for each in passes:
            if each.drafting and not self._wires[False].drafts_route:
                continue
            layers = 1 / len(load_LE) if each.drafting else 1.0
            tokens_D = each.batch.tokens_D * (each.times * layers)
            found = self._pending.setdefault((id(load_LE), each.batch.has_prefill), (load_LE, np.zeros_like(tokens_D)))
            found[1][:] += tokens_D

    @property
    def tokens(self) -> int:
        """Recorded tokens that it counted on."""
        return sum(trace.num_tokens for trace in self._traces.values() if trace is not None)

    @property
    def expected(self) -> bool:
        """Whether loads without tokens were played."""
        return any(trace is None for trace in self._traces.values())

    @property
    def sent_RR(self) -> Floats:
        """Bytes per step from rank to rank, the mean of the run."""
        self._fold()
        return self._sent_RR / max(1, self.steps)

    @property
    def unchanged_RR(self) -> Floats | None:
        """The same had the first placement stayed; None where it did, or where ranks were lost or came back."""
        self._fold()
        if not self._moved or self.ranks_changed:
            return None
        placement, cluster = self._used[0]
        total_RR = np.zeros_like(self._sent_RR)
        for (_, has_prefill), each in self._whole.items():
            total_RR += self._bytes(placement, cluster, *each, has_prefill)
        return total_RR / max(1, self.steps)

    def _fold(self) -> None:
        """The steps since the placement or the cluster changed last."""
        for key, (load_LE, tokens_D) in self._pending.items():
            placement, cluster = self._used[-1]
            self._sent_RR = self._sent_RR + self._bytes(placement, cluster, load_LE, tokens_D, key[1])
            whole = self._whole.setdefault(key, (load_LE, np.zeros_like(tokens_D)))
            whole[1][:] += tokens_D
        self._pending.clear()

    def _bytes(
        self, placement: Placement, cluster: ClusterSpec, load_LE: Floats, tokens_D: Floats, has_prefill: bool
    ) -> Floats:
        ranks = cluster.num_ranks // len(tokens_D)
        home_R = np.repeat(tokens_D / ranks, ranks)
        return self._wires[has_prefill].bytes_RR(self._reach(placement, cluster, load_LE, has_prefill), cluster, home_R)

    def _reach(self, placement: Placement, cluster: ClusterSpec, load_LE: Floats, has_prefill: bool) -> Reach:
        """Where only some layers were moved since the load was last met, only those are counted."""
        if id(load_LE) not in self._traces:
            self._traces[id(load_LE)] = self._recorded(load_LE)
        trace, wire, key = self._traces[id(load_LE)], self._wires[has_prefill], (id(load_LE), has_prefill)
        known = self._known.get(key)
        everywhere = wire.dispatch == "allgather"
        if known is None or everywhere or not np.array_equal(known[0].rank_of_slot_P, placement.rank_of_slot_P):
            reach = wire.reach(placement, cluster, load_LE, trace)
        else:
            before, reach = known
            moved_L = (before.physical_to_logical_LP != placement.physical_to_logical_LP).any(1)
            if before.share_LP is not None or placement.share_LP is not None:
                moved_L |= (before.slot_share_LP != placement.slot_share_LP).any(1)
            rows = np.flatnonzero(moved_L)
            if len(rows):
                part = _layers(placement, rows)
                few = None if trace is None else _trace_layers(trace, rows)
                moved = wire.reach(part, cluster, load_LE[rows], few)
                reach = Reach(np.array(reach.rank_LR), np.array(reach.node_LN))
                reach.rank_LR[rows], reach.node_LN[rows] = moved.rank_LR, moved.node_LN
        self._known[key] = placement, reach
        return reach


def _failed(cluster: ClusterSpec) -> set[int]:
    return {number for number, rank in cluster.ranks.items() if rank.failed}


def _layers(placement: Placement, rows: NDArray[np.int64]) -> Placement:
    return Placement(
        placement.physical_to_logical_LP[rows],
        placement.rank_of_slot_P,
        placement.num_experts,
        placement.num_ranks,
        placement.ranks_per_node,
        None if placement.share_LP is None else placement.share_LP[rows],
    )


def _trace_layers(trace: RoutingTrace, rows: NDArray[np.int64]) -> RoutingTrace:
    layers = tuple(trace.layer_ids[row] for row in rows)
    return RoutingTrace(trace.experts_TLK[:, rows], trace.num_experts, layers)
