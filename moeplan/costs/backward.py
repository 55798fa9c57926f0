"""How much longer a backward takes than its forward: measured where a profile has both, else counted products.

A product's backward is two of its size, for gradients of inputs and of weights; FlashAttention's kernel does five
products for two (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.attention import attention_by_window
from moeplan.costs.dense import DenseCosts, Direction
from moeplan.costs.experts import expert_costs
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import Dtype, ModelSpec, dense_beside

__all__ = ["BackwardOverForward", "backward_over_forward"]


@dataclass(frozen=True, slots=True)
class BackwardOverForward:
    """Seconds of backward over those of forward, by part; ``measured`` names the parts that are."""

    products: float = 2.0
    attention: float = 2.5
    experts: float = 2.0
    measured: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where the figures are from, in words."""
        if not self.measured:
            return "modelled from forward"
        return f"measured: {', '.join(self.measured)}" + "; others modelled from forward" * (len(self.measured) < 3)


def backward_over_forward(
    model: ModelSpec,
    accelerator: AcceleratorSpec,
    weights: Dtype,
    profile: HardwareProfile | None,
    tokens: int,
    sequence: int,
    tp: int,
    mean_pairs: float,
    local_experts: float,
    expert_tp: int = 1,
) -> BackwardOverForward:
    """At ``tokens`` on a rank in sequences of ``sequence``, ``tp`` ranks sharing attention; ``local_experts`` on a rank
    with ``mean_pairs`` tokens each, split over ``expert_tp`` ranks."""

    def parts(direction: Direction) -> dict[str, float]:
        """Seconds of the parts that are measured in this direction."""
        dense = DenseCosts(accelerator, dense_beside(weights), profile, direction=direction)
        sorts = attention_by_window(model, accelerator, False, dense, profile=profile, tp=tp, direction=direction)
        answer = {}
        if dense.measured and sorts:
            answer["products"] = sorts[0][1].projections(tokens * tp).total
        if sorts and all(kernel.measured for _, kernel in sorts):
            length = min(sequence, tokens * tp)
            each = (share * kernel.kernel(tokens * tp / length, length).total for share, kernel in sorts)
            answer["attention"] = sum(each)
        experts = expert_costs(
            model, accelerator, weights, profile, expert_tp, None, mean_pairs, local_experts, direction=direction
        )
        if not experts.extrapolated:
            answer["experts"] = float(experts.rank_s(np.full(round(local_experts), mean_pairs), mean_pairs))
        return answer

    forward, backward = parts("forward"), parts("backward")
    ratios = {name: backward[name] / forward[name] for name in backward if name in forward}
    return BackwardOverForward(**ratios, measured=tuple(ratios))
