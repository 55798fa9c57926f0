"""Costs of the routed experts of one MoE layer, linear at an operating point: what planners minimise.

A layer takes ``expert_s(busiest rank) + exchange_s(busiest node or rank)``. Coefficients are seconds per unit
at one workload; they come from measured tables where a profile covers the point and from the roofline
elsewhere, and ``source`` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.specs.workload import ReturnMode

__all__ = ["LayerCosts", "node_links"]


def node_links(link_R: NDArray[np.float64], nodes: int) -> NDArray[np.float64]:
    """Part of its usual bandwidth that each node has, that of its slowest link: every rank sends copies of its own
    tokens over its own, an equal part of the node's, and nothing is passed to a faster one."""
    slowest_N: NDArray[np.float64] = link_R.reshape(nodes, -1).min(axis=1)
    return slowest_N


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Seconds of one MoE layer (dispatch, routed experts, combine) at one operating point.

    With ``T = tokens_per_step`` tokens entering the layer over all ranks,

    - a rank of speed 1 that works on ``n`` (token, expert) pairs with ``a`` distinct experts hit takes
      ``expert_fixed_s + a * per_active_expert_s + n * per_pair_s``;
    - dispatch and combine together take ``exchange_fixed_s`` plus the slower of the two paths: the busiest
      node's ``x`` token copies from other nodes, ``x * per_node_copy_s`` (its NICs together), and the busiest
      rank's ``y`` token copies over the scale-up links, ``y * per_rank_copy_s``.

    ``relative_error_of_counts`` holds where the load is counts, which say how much each expert got, not together with
    which others: None where that changes nothing. ``link_R`` is the part of the links' usual bandwidth that each rank
    has, empty where all have all of it: copies to a rank take ``1 / link`` of the time, those to a node go by the
    slowest of its ranks' links.
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
    source: Mapping[str, str] = field(default_factory=dict)

    def links(self, ranks: int, nodes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """``link_R``, and the same for nodes."""
        link_R = np.array(self.link_R or [1.0] * ranks)
        return link_R, node_links(link_R, nodes)

    def hop_s(self, ranks: int, nodes: int) -> tuple[float, float]:
        """Seconds of a step per token copy that goes on to another rank of its node, and to another node, in ``stay``:
        spread over all links, of which the slowest decides."""
        link_R, link_N = self.links(ranks, nodes)
        inside, between = self.per_rank_copy_s / ranks / link_R.min(), self.per_node_copy_s / nodes / link_N.min()
        return float(inside), float(between)

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
