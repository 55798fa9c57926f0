"""What a training simulation is asked: batch, parallelism, pipeline schedule, optimizer sharding, overlap.

The scenario's ranks are all of the job: ``ranks = pp * tp * cp * dp`` for the parts outside the experts, and
``ranks = pp * ep * expert_tp * expert-data-parallel`` for the experts, over the same ranks (Megatron-Core's parallel
folding, arXiv 2504.14960). Ranks of one tensor-parallel group are neighbours, so are those that split an expert, and
those of one expert-parallel group; pipeline stages are farthest apart.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moeplan.errors import SpecError
from moeplan.specs.base import Spec
from moeplan.units import Seconds

__all__ = ["Overflow", "Recompute", "RecomputeModule", "TrainingSpec"]

Recompute = Literal["none", "attention", "full"]
RecomputeModule = Literal["layernorm", "moe_act", "mla_up_proj", "mlp"]
Overflow = Literal["drop", "pad"]


class TrainingSpec(Spec):
    """A training simulation."""

    global_batch: int = Field(gt=0, description="sequences of one optimizer step, over all ranks")
    micro_batch: int = Field(1, gt=0, description="sequences that one data-parallel group takes at a time")
    sequence: int = Field(4096, gt=0, description="tokens of one sequence")
    tp: int = Field(1, gt=0, description="tensor-parallel ranks: split attention and dense parts")
    cp: int = Field(1, gt=0, description="context-parallel ranks: split each sequence")
    pp: int = Field(1, gt=0, description="pipeline stages")
    virtual_stages: int = Field(1, gt=0, description="chunks per stage: above 1 the interleaved schedule")
    ep: int = Field(1, gt=0, description="expert-parallel ranks: split the experts of a layer")
    expert_tp: int = Field(
        1,
        gt=0,
        description="neighbouring ranks of a node that split each expert, whatever tp is; experts of a layer lie on"
        " ep x expert_tp ranks. A placement is of ep ranks",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        1,
        description="sharded over copies: 0 nothing, gradients are all-reduced; 1 optimizer state, 2 gradients, 3"
        " weights; gradients from 2 on are reduced in every micro-batch, weights at 3 gathered for every forward and"
        " every backward",
    )
    recompute: Recompute = Field(
        "none",
        description="what backward computes again instead of keeping it: nothing; the attention kernel, whose output is"
        " not kept; whole layers",
    )
    recompute_modules: tuple[RecomputeModule, ...] = Field(
        (),
        description="parts of a layer that are computed again too, as Megatron-Core names them: norms, routed experts'"
        " activation, products from latents to queries, keys and values, the block of dense layers",
    )
    experts: Literal["trace", "balanced"] = Field(
        "trace", description="loads of the recorded windows, one per micro-batch in turn; or every expert alike"
    )
    windows: int = Field(1, gt=0, description="parts that the trace is cut into")
    capacity_factor: float | None = Field(
        None, gt=0, description="an expert takes at most this times the mean number of pairs; left out: dropless"
    )
    overflow: Overflow = Field("drop", description="beyond capacity: drop; or pad all experts to capacity as well")
    overlap: Literal["none", "shared_expert", "1f1b"] = Field(
        "none",
        description="dispatch and combine hidden behind: nothing; the shared expert; the other direction of another"
        " micro-batch",
    )
    overlap_gradients: bool = Field(
        True, description="gradients are reduced while the last backwards run; zero 2 and 3: every backward"
    )
    overlap_parameters: bool = Field(
        True, description="weights are gathered while the first forwards run; zero 3: every forward and backward"
    )
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    mtp_layers: int = Field(0, ge=0, description="multi-token prediction: further MoE layers, each with a head")
    host_per_layer: Seconds = Field(
        "0 s",  # type: ignore[assignment]
        description="device idle in a layer's forward and backward of a micro-batch while the host launches kernels;"
        " about 5 ms without CUDA graphs on x86 hosts",
    )
    steps: int = Field(1, gt=0, description="optimizer steps simulated, one after another")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ep * self.expert_tp % self.tp:
            own = f"ep x expert_tp ({self.ep} x {self.expert_tp})" if self.expert_tp > 1 else f"ep ({self.ep})"
            raise ValueError(f"{own} is not a multiple of tp ({self.tp}); experts of a stage span its groups")
        if self.sequence % (self.cp * self.tp):
            raise ValueError(
                f"sequence ({self.sequence}) does not divide over cp x tp ({self.cp * self.tp}); choose divisors"
            )
        if self.recompute == "full" and self.recompute_modules:
            raise ValueError(
                f"recompute_modules ({', '.join(self.recompute_modules)}) are parts of what recompute: full computes"
                " again; leave one of them out"
            )
        if self.virtual_stages > 1 and self.pp == 1:
            raise ValueError(f"virtual_stages ({self.virtual_stages}) needs pp above 1; leave it out")
        return self

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches that each data-parallel group runs per step.

        Raises:
            SpecError: the degrees or the batch do not divide.
        """
        experts = "pp x ep" + " x expert_tp" * (self.expert_tp > 1)
        for names, product in (
            ("pp x tp x cp", self.pp * self.tp * self.cp),
            (experts, self.pp * self.ep * self.expert_tp),
        ):
            if ranks % product:
                raise SpecError(f"training: {names} ({product}) does not divide ranks ({ranks}); change one of them")
        groups = ranks // (self.pp * self.tp * self.cp)
        at_once = groups * self.micro_batch
        if self.global_batch % at_once:
            raise SpecError(
                f"training.global_batch ({self.global_batch}) is not a multiple of micro_batch x data-parallel groups"
                f" ({self.micro_batch} x {groups}); the next one is {-(-self.global_batch // at_once) * at_once}"
            )
        count = self.global_batch // at_once
        if self.virtual_stages > 1 and count % self.pp:
            raise SpecError(
                f"training: the interleaved schedule takes micro-batches by pp ({self.pp}), but there are {count};"
                " change global_batch, or set virtual_stages: 1"
            )
        return count
