"""A router that replays recorded choices: live runs of different placements on the same routing.

``T`` tokens of this rank, ``E`` logical experts, ``K`` choices per token, ``H`` hidden.
"""

from __future__ import annotations

import numpy as np
import torch

from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import TraceError
from moeplan.execution.router import Router, RouterOptions, Routing

__all__ = ["ReplayRouter"]


class ReplayRouter(Router):
    """Takes its choices, in order and again from the start, from one layer of a trace: this rank's tokens.

    A token's weights are the recorded scores over their sum, or even where none were recorded. ``row`` is the layer's
    row in the trace. Stands wherever a :class:`Router` does.

    Raises:
        TraceError: the trace has no tokens of this rank.
    """

    def __init__(self, trace: RoutingTrace, row: int, rank: int, hidden: int, device: str = "cpu") -> None:
        super().__init__(hidden, trace.num_experts, RouterOptions(top_k=trace.top_k), device)
        mine = np.arange(trace.num_tokens)
        if trace.source_rank_T is not None:
            mine = np.flatnonzero(trace.source_rank_T == rank)
        if not len(mine):
            raise TraceError(f"the trace has no tokens of rank {rank}; record with source ranks, or leave them out")
        self._experts_TK = torch.from_numpy(trace.experts_TLK[mine, row].astype(np.int64)).to(device)
        kept_TK = (self._experts_TK >= 0).float()
        if trace.scores_TLK is not None:
            kept_TK *= torch.from_numpy(trace.scores_TLK[mine, row].astype(np.float32)).to(device)
        self._weights_TK = kept_TK / kept_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        self._next = 0

    def forward(self, x_TH: torch.Tensor) -> Routing:
        """The next ``T`` recorded tokens' choices."""
        index = (torch.arange(len(x_TH), device=x_TH.device) + self._next) % len(self._experts_TK)
        self._next = (self._next + len(x_TH)) % len(self._experts_TK)
        experts_TK = self._experts_TK[index]
        load_E = torch.bincount(experts_TK[experts_TK >= 0], minlength=self.num_experts)
        return Routing(experts_TK, self._weights_TK[index], load_E, x_TH.new_zeros(()))
