"""Which tensor of a checkpoint belongs to which expert, by its name.

Names of Hugging Face families (``mlp.experts.N.gate_proj``, ``block_sparse_moe.experts.N.w1``, fused
``experts.gate_up_proj``, ``mlp.gate.weight``, ``e_score_correction_bias`` in the router or beside it), Megatron-Core
(``experts.local_experts.N``, grouped ``experts.linear_fc1.weightN``, ``router.weight``,
``router.expert_bias``) and DeepSpeed (``deepspeed_moe.experts.deepspeed_experts.N``, ``gate.wg.weight``; AutoEP:
``experts.w1.N``, ``router.gate.weight``, ``expert_bias``);
optimizer state carries the same names with a prefix or suffix. A tensor among a planned layer's experts or in
its router that fits none of the rules is refused: left alone, it would change the model without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import ExportError

__all__ = ["Part", "Permutations", "expert_part", "is_stacked", "source_name"]

Permutations = Mapping[int, NDArray[np.int32]]
"""Absolute layer id -> the old expert at each new place [E]."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.")
_NUMBERED = re.compile(r"\.experts\.(?:local_experts\.|deepspeed_experts\.|w[123]\.)?(\d+)(?=\.|$)")
_GROUPED = re.compile(r"\.experts\.linear_fc[12]\.(?:weight|bias|_extra_state)(\d+)(?=\.|$)")
_STACKED = re.compile(r"\.experts\.|\.block_sparse_moe\.(?:input|output)_linear\.")
_ROUTER = re.compile(
    r"\.(?:gate|router|moe_statics)\.|\.(?:e_score_correction_bias|expert_bias|router_bias)(?=\.|$)"
)
_ELSEWHERE = re.compile(r"(?:^|\.)mtp\.|attn|attention|\.shared_expert")
# Viewed as [E, ...] before use: older Megatron-Core ([H, E * F], [E * F, H]), DBRX ([E * F, H]).
_EXPERT_MAJOR = re.compile(r"\.experts\.(?:weight[12]|mlp\.[wv][12])(?=\.|$)")


class Part(NamedTuple):
    """What a tensor holds: one expert (``expert``, at ``span`` of the name) or all of them, stacked."""

    layer: int
    router: bool
    expert: int | None
    span: tuple[int, int]


def expert_part(name: str) -> Part | None:
    """The part of the experts or router that a name stands for; None for everything else."""
    layer = _LAYER.search(name)
    if layer is None or _ELSEWHERE.search(name):
        return None
    if numbered := _NUMBERED.search(name) or _GROUPED.search(name):
        return Part(int(layer[1]), False, int(numbered[1]), numbered.span(1))
    if _STACKED.search(name):
        return Part(int(layer[1]), False, None, (0, 0))
    if _ROUTER.search(name):
        return Part(int(layer[1]), True, None, (0, 0))
    return None


def source_name(name: str, part: Part, permutations: Permutations) -> str:
    """The name whose content goes under ``name`` once the experts are permuted.

    Raises:
        ExportError: the expert's number is not one of the plan's.
    """
    order_E = permutations[part.layer]
    if part.expert is None:
        return name
    if part.expert >= len(order_E):
        raise ExportError(
            f"checkpoint: {name} is expert {part.expert} but the plan has {len(order_E)} experts; is it"
            " another model's plan?"
        )
    return f"{name[: part.span[0]]}{order_E[part.expert]}{name[part.span[1] :]}"


def is_stacked(name: str, shape: Sequence[int], num_experts: int) -> bool:
    """Whether a tensor holds one equal block per expert, in order (else it is a scalar, the same for all).

    Raises:
        ExportError: it is neither, so that permuting the experts would not be exact.
    """
    if math.prod(shape) <= 1:
        return False
    leading = next(size for size in shape if size != 1)
    if leading == num_experts and not name.endswith("_col"):
        return True
    if _EXPERT_MAJOR.search(name) and math.prod(shape) % num_experts == 0:
        return True
    raise ExportError(
        f"checkpoint: {name} {list(shape)} belongs to routed experts but its first axis is not num_experts"
        f" ({num_experts}); it cannot be permuted (a plan of another model, a part of a sharded checkpoint, or a form"
        " that is not known)"
    )
