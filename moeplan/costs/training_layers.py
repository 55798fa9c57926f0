"""What the layers of one micro-batch take on a rank, forward and backward, at usual speeds.

- Backward takes longer than forward: :mod:`moeplan.costs.backward`. Exchanges cost the same both ways, all-reduces too:
  gradients pass them the other way. What Megatron-Core gathers once more for the gradients of weights hides behind a
  product.
- Elementwise work beyond a forward's: see :data:`PASSES`; at the bandwidth of measured norms, forward and backward,
  where a profile has them.
- Every micro-batch adds its weights' gradients to those before: one read and one write of all of them (Megatron-LM's
  ``gradient_accumulation_fusion`` does it in the product's kernel). From ZeRO stage 2 on it copies them into the
  buffer that is reduced instead: as many bytes.
- Ranks that split a sequence (``cp``, ``tp`` apart) gather keys and values of their own heads, in backward once more,
  and scatter the gradients (Llama 3, arXiv 2407.21783, section 3.3.2).
- A multi-token prediction layer joins the last hidden state and the next token's embedding by a product of ``2 H x H``
  (DeepSeek-V3, arXiv 2412.19437, section 2.2).

``H`` hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.activations import recomputed_s
from moeplan.costs.backward import backward_over_forward
from moeplan.costs.collectives import CollectiveCosts
from moeplan.costs.dense import DenseCosts
from moeplan.costs.elementwise import stream
from moeplan.costs.fixed import FixedCosts
from moeplan.costs.work import Work
from moeplan.specs.cluster import AcceleratorSpec
from moeplan.specs.model import DTYPE_BYTES, Dtype, ModelSpec, activations_beside, dense_beside
from moeplan.specs.training import TrainingSpec

__all__ = ["PASSES", "BothWays", "TrainingLayers"]

# Reads and writes of a layer's hidden state, forward and backward together, that a forward's costs do not hold:
# residuals, norms and their backward, rotary embedding, casts and transposes of product inputs, gated activations
# and their backward, un-permutation with weights. A count of kernels in Megatron-Core's MoE layer, each once.
PASSES = 40
_HEAD_PASSES = 8  # of logits in bf16: cross entropy forward and backward in fp32, gradient


@dataclass(frozen=True, slots=True)
class BothWays:
    """Forward and backward of one part of a layer."""

    forward: Work
    backward: Work

    def __add__(self, other: BothWays) -> BothWays:
        return BothWays(self.forward + other.forward, self.backward + other.backward)

    def at(self, speed: Any, link_speed: Any) -> tuple[Any, Any]:
        """Seconds of both (:meth:`moeplan.costs.work.Work.at`)."""
        return self.forward.at(speed, link_speed), self.backward.at(speed, link_speed)


class TrainingLayers:
    """Parts of the layers of a micro-batch of ``tokens`` on a rank, whose forward without an exchange is ``fixed``;
    ``links`` join the ranks of a sequence."""

    def __init__(
        self,
        model: ModelSpec,
        accelerator: AcceleratorSpec,
        profile: HardwareProfile | None,
        spec: TrainingSpec,
        weight_dtype: Dtype,
        tokens: int,
        fixed: FixedCosts,
        links: CollectiveCosts,
    ) -> None:
        self.model, self.spec, self.tokens, self.fixed = model, spec, tokens, fixed
        self._dtype, self._full = weight_dtype, spec.recompute == "full"
        self._wide = DTYPE_BYTES[activations_beside(weight_dtype)]
        self._bandwidth = roofline.MEMORY_EFFICIENCY * accelerator.memory_bandwidth
        self._dense = DenseCosts(accelerator, dense_beside(weight_dtype), profile)
        self._onward, self._back = (stream(profile, accelerator, "norm", way) for way in ("forward", "backward"))
        pairs = tokens * spec.ep * spec.expert_tp * model.top_k / model.num_experts
        self.ratio = backward_over_forward(
            model, accelerator, weight_dtype, profile, tokens, spec.sequence, spec.tp, pairs,
            model.num_experts / spec.ep, spec.expert_tp,
        )  # fmt: skip
        self._again_s = recomputed_s(
            spec.recompute_modules, model, tokens, spec.tp, self._dense, self._onward.bytes_per_s
        )
        key_bytes = (model.kv_bytes_per_token(activations_beside(weight_dtype), spec.tp) or 0.0) / model.num_layers
        self._keys = links.seconds("all_gather", spec.cp, key_bytes * spec.micro_batch * spec.sequence, spec.tp)
        self.source = {
            "backward": self.ratio.source + f"; its passes {self._back.source}" * self._back.measured,
            **({"keys and values": self._keys.source} if spec.cp > 1 else {}),
        }

    @property
    def experts_back(self) -> float:
        """Backward of routed experts over their forward, which is computed again under full recomputation."""
        return self.ratio.experts + self._full

    def _products(self, forward: Work) -> BothWays:
        """Products and the all-reduces among them, as shared experts and dense blocks have them."""
        over = (1 + self._full) * forward.elsewhere_s
        total = (self.ratio.products + self._full) * forward.computed_s + over
        return BothWays(forward, Work(total, over, (1 + self._full) * forward.wire_s))

    @cached_property
    def attention(self) -> BothWays:
        """Attention, norms, router and permutation of a layer, without adding up gradients."""
        fixed, ratio = self.fixed, self.ratio
        moved = 2 * self._wide * PASSES * self.tokens * self.model.hidden_size  # a third of it in forward
        kernel, plain = fixed.kernel_s, fixed.layer.computed_s - fixed.kernel_s
        forward = plain + kernel + moved / 3 / self._onward.bytes_per_s
        again = {"none": 0.0, "attention": kernel, "full": forward}[self.spec.recompute]
        again += self._again_s.get("layernorm", 0.0) + self._again_s.get("mla_up_proj", 0.0)
        backward = ratio.products * plain + ratio.attention * kernel + 2 * moved / 3 / self._back.bytes_per_s + again
        keys = Work.of([self._keys])
        over = fixed.reduce + keys
        return BothWays(Work(forward) + over, Work(backward) + over * (1 + self._full) + keys)

    @cached_property
    def shared(self) -> BothWays:
        """Shared experts of a layer."""
        return self._products(self.fixed.shared)

    @cached_property
    def dense_block(self) -> BothWays:
        """What a dense layer has beside attention: its block, and neither router nor permutation."""
        model, tp = self.model, self.spec.tp
        inter = model.dense_intermediate_size
        block = self._dense.ffn(self.tokens * tp, model.hidden_size, inter / tp, model.gated_ffn).total if inter else 0
        both = self._products(Work(block - self.fixed.routing_s) + self.fixed.reduce)
        return both + BothWays(Work(), Work(self._again_s.get("mlp", 0.0)))

    @property
    def activation_again_s(self) -> float:
        """The activation of routed experts of a layer, where it is computed again."""
        return self._again_s.get("moe_act", 0.0)

    @cached_property
    def head(self) -> BothWays:
        """Logits and loss of all tokens."""
        rows, columns = self.tokens * self.spec.tp, self.model.vocab_size / self.spec.tp
        logits = self._dense.product(rows, columns, self.model.hidden_size).total
        loss = 2 * self._wide * _HEAD_PASSES * rows * columns / self._bandwidth
        return BothWays(Work(logits + loss / 2), Work(self.ratio.products * logits + loss / 2))

    @cached_property
    def joining(self) -> BothWays:
        """The product by which a prediction layer joins a hidden state and an embedding."""
        hidden, tp = self.model.hidden_size, self.spec.tp
        joined = self._dense.product(self.tokens * tp, hidden / tp, 2 * hidden).total
        return BothWays(Work(joined), Work(self.ratio.products * joined))

    def added(self, parameters: float) -> BothWays:
        """Gradients of weights, added to what earlier micro-batches left: read and written once per micro-batch, where
        a forward's product reads the weights."""
        once = 2 * DTYPE_BYTES[self.spec.gradient_dtype] - DTYPE_BYTES[self._dtype]
        return BothWays(Work(), Work(once * parameters / self._bandwidth))
