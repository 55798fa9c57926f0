"""The router: which experts a token goes to, and with which weight.

``T`` tokens of this rank, ``E`` logical experts, ``K`` choices per token, ``H`` hidden. The router knows logical
experts only; where their copies are is the layer's business, so no move of an expert touches it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from moeplan.errors import SpecError
from moeplan.execution.groups import Axis
from moeplan.execution.options import RouterOptions

__all__ = ["DROPPED", "Router", "RouterOptions", "Routing"]

DROPPED = -1


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Choices of this rank's tokens: ``experts_TK`` int64 (-1: dropped), ``weights_TK`` float32, 0 where dropped.

    ``load_E`` counts the choices before any were dropped. ``aux_loss`` is a scalar to add to the loss.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    load_E: torch.Tensor
    aux_loss: torch.Tensor


class Router(nn.Module):
    """A linear map to expert scores in float32, and a rule for choosing.

    Raises:
        SpecError: options that do not fit ``num_experts``.
    """

    def __init__(self, hidden: int, num_experts: int, options: RouterOptions, device: str = "cpu") -> None:
        super().__init__()
        o = options
        if not 0 < o.top_k <= num_experts:
            raise SpecError(f"top_k ({o.top_k}) must be within 1..num_experts ({num_experts})")
        if num_experts % o.n_group or not 0 < o.topk_group <= o.n_group:
            raise SpecError(
                f"num_experts ({num_experts}) must divide by n_group ({o.n_group}), and topk_group ({o.topk_group})"
                " be within 1..n_group"
            )
        if o.topk_group * (num_experts // o.n_group) < o.top_k:
            raise SpecError(
                f"topk_group ({o.topk_group}) groups of {num_experts // o.n_group} experts hold fewer than top_k"
                f" ({o.top_k})"
            )
        if o.capacity_factor is not None and o.capacity_factor <= 0:
            raise SpecError(f"capacity_factor ({o.capacity_factor}) must be positive; leave it out for dropless")
        self.options, self.num_experts = options, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("bias_E", torch.zeros(num_experts, device=device))

    def forward(self, x_TH: torch.Tensor) -> Routing:
        """Choose; differentiable in the weights and the auxiliary loss."""
        o = self.options
        logits_TE = x_TH.float() @ self.weight.float().t()
        score_TE = logits_TE.softmax(-1) if o.score == "softmax" else logits_TE.sigmoid()
        if o.expert_choice:
            return self._expert_choice(score_TE)
        experts_TK = self._choose(score_TE.detach() + self.bias_E)
        weights_TK = score_TE.gather(1, experts_TK)
        if o.normalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * o.scale
        load_E = torch.bincount(experts_TK.flatten(), minlength=self.num_experts)
        aux_loss = self._aux_loss(score_TE, load_E)
        if o.capacity_factor is not None:
            dropped_TK = self._over_capacity(experts_TK, weights_TK.detach())
            experts_TK = experts_TK.masked_fill(dropped_TK, DROPPED)
            weights_TK = weights_TK.masked_fill(dropped_TK, 0.0)
        return Routing(experts_TK, weights_TK, load_E, aux_loss)

    def _choose(self, score_TE: torch.Tensor) -> torch.Tensor:
        o, size = self.options, self.num_experts // self.options.n_group
        if o.topk_group < o.n_group:
            score_TGe = score_TE.unflatten(1, (o.n_group, size))
            best_TG = score_TGe.topk(min(o.group_top, size), -1).values.sum(-1).topk(o.topk_group, -1).indices
            open_TG = torch.zeros(score_TGe.shape[:2], dtype=torch.bool, device=score_TE.device)
            open_TG.scatter_(1, best_TG, True)
            score_TE = score_TGe.masked_fill(~open_TG[..., None], -math.inf).flatten(1)
        return score_TE.topk(o.top_k, -1).indices

    def _capacity(self, tokens: int) -> int:
        factor = self.options.capacity_factor or 1.0
        return min(tokens, math.ceil(factor * tokens * self.options.top_k / self.num_experts))

    def _over_capacity(self, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Mask ``[T, K]`` of the choices beyond their expert's capacity."""
        flat = experts_TK.flatten()
        order = torch.arange(len(flat), device=flat.device)
        if self.options.drop == "score":
            order = weights_TK.flatten().argsort(descending=True, stable=True)
        order = order[flat[order].argsort(stable=True)]  # by expert, then as above
        counts_E = torch.bincount(flat, minlength=self.num_experts)
        first_E = counts_E.cumsum(0) - counts_E
        place = torch.empty_like(order)
        place[order] = torch.arange(len(flat), device=flat.device) - first_E[flat[order]]
        return (place >= self._capacity(len(experts_TK))).view_as(experts_TK)

    def _expert_choice(self, score_TE: torch.Tensor) -> Routing:
        chosen_CE = score_TE.detach().topk(self._capacity(len(score_TE)), 0).indices
        taken_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter_(0, chosen_CE, True)
        width = max(1, int(taken_TE.sum(1).max())) if len(taken_TE) else 1
        experts_TK = (~taken_TE).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]  # those that took it, in order
        kept_TK = taken_TE.gather(1, experts_TK)
        weights_TK = score_TE.gather(1, experts_TK) * kept_TK * self.options.scale
        experts_TK = experts_TK.masked_fill(~kept_TK, DROPPED)
        return Routing(experts_TK, weights_TK, taken_TE.sum(0), score_TE.new_zeros(()))

    def _aux_loss(self, score_TE: torch.Tensor, load_E: torch.Tensor) -> torch.Tensor:
        o = self.options
        if not o.aux_loss or not len(score_TE):
            return score_TE.new_zeros(())
        share_TE = score_TE if o.score == "softmax" else score_TE / score_TE.sum(-1, keepdim=True)
        part_E = load_E / (len(score_TE) * o.top_k)
        return o.aux_loss * self.num_experts * (part_E * share_TE.mean(0)).sum()

    @torch.no_grad()
    def update_bias(self, load_E: torch.Tensor, over: Axis) -> None:
        """Raise the bias of experts below the mean load over the ranks ``over``, lower that of those above."""
        total_E = over.sum_(load_E.clone()).float()
        self.bias_E += self.options.bias_rate * (total_E.mean() - total_E).sign()
