"""Costs of the routed experts of one MoE layer, linear at an operating point: what planners minimise.

A layer takes ``expert_s(busiest rank) + exchange_s(busiest NIC or rank)``. Coefficients are seconds per unit
at one workload; they come from measured tables where a profile covers the point and from the roofline
elsewhere, and ``source`` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.costs.nics import Nics, nics_of
from moeplan.specs.workload import DispatchKind, ReturnMode

__all__ = ["LayerCosts"]


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Seconds of one MoE layer (dispatch, routed experts, combine) at one operating point.

    With ``T = tokens_per_step`` tokens entering the layer over all ranks,

    - a rank of speed 1 that works on ``n`` (token, expert) pairs with ``a`` distinct experts hit takes
      ``expert_fixed_s + a * per_active_expert_s + n * per_pair_s``;
    - dispatch and combine together take ``exchange_fixed_s`` plus the slower of the two paths: between nodes ``x *
      per_node_copy_s``, with ``x`` the copies over the busiest NIC times the NICs of a node, and the busiest rank's
      ``y`` token copies over the scale-up links, ``y * per_rank_copy_s``.

    ``relative_error_of_counts`` holds where the load is counts, which say how much each expert got, not together with
    which others: None where that changes nothing. ``link_R`` is the part of the links' usual bandwidth that each rank
    has, empty where all have all of it: copies over a link take ``1 / link`` of the time. ``ranks_per_nic`` neighbours
    share a NIC; ``lost`` are the ranks that have failed.
    """

    tokens_per_step: int
    expert_fixed_s: float
    per_active_expert_s: float
    per_pair_s: float
    exchange_fixed_s: float
    per_node_copy_s: float
    per_rank_copy_s: float
    relative_error: float = 0.3
    relative_error_of_counts: float | None = None
    link_R: tuple[float, ...] = ()
    ranks_per_nic: int = 1
    lost: tuple[int, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)

    def links(self, ranks: int) -> NDArray[np.float64]:
        """``link_R`` of all ranks."""
        return np.array(self.link_R or [1.0] * ranks)

    def nics(self, dispatch: DispatchKind, ranks: int, nodes: int) -> Nics:
        """What copies between nodes go over."""
        return nics_of(dispatch, self.link_R or (1.0,) * ranks, nodes, self.ranks_per_nic, self.lost)

    def slowest_rank(self, copies_R: NDArray[np.float64], nodes: int) -> NDArray[np.float64]:
        """Copies to the rank ``[...]`` that takes longest over its links in its node, at usual bandwidth, from those to
        each ``[..., R]``. It sends as many as ranks of its node take in in the mean, at the same time."""
        if self.link_R:
            by_node = copies_R.reshape(*copies_R.shape[:-1], nodes, -1)
            copies_R = np.maximum(by_node, by_node.mean(-1, keepdims=True)).reshape(copies_R.shape) / self.link_R
        slowest: NDArray[np.float64] = copies_R.max(-1)
        return slowest

    def hop_s(self, ranks: int, nodes: int) -> tuple[float, float]:
        """Seconds of a step per token copy that goes on to another rank of its node, and to another node, in ``stay``:
        spread over all links, of which the slowest decides."""
        slowest = self.links(ranks).min()
        return float(self.per_rank_copy_s / ranks / slowest), float(self.per_node_copy_s / nodes / slowest)

    def known_from(self, load: ExpertLoad, return_mode: ReturnMode) -> LayerCosts:
        """As they are for a load: :meth:`of_counts` without tokens, unless ``stay`` is given the transitions."""
        coupled = return_mode == "stay" and load.transitions_LEE is not None
        return self if load.trace is not None or coupled else self.of_counts()

    def of_counts(self) -> LayerCosts:
        """As they are for a load without tokens."""
        if self.relative_error_of_counts is None:
            return self
        return replace(
            self,
            relative_error=self.relative_error_of_counts,
            relative_error_of_counts=None,
            source={**self.source, "copies of tokens": "expected from counts, choices taken as independent"},
        )
