"""What runs, and what is asked of the plan."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moeplan.specs.base import Spec
from moeplan.specs.model import Dtype
from moeplan.units import Fraction

__all__ = ["Aggregate", "DispatchKind", "Objective", "ObjectiveKind", "Phase", "ReplicaSplit", "ReturnMode", "Workload"]

Phase = Literal["prefill", "decode", "mix"]
ReturnMode = Literal["return_home", "stay"]
DispatchKind = Literal["per_expert", "per_rank", "per_node", "allgather"]
ReplicaSplit = Literal["even", "nearest", "weighted"]
ObjectiveKind = Literal["time", "load", "traffic"]
Aggregate = Literal["mean", "worst", "cvar"]


class Workload(Spec):
    """The operating point a step is costed at."""

    phase: Phase = Field("prefill", description="which tables and batch the step is costed with")
    batch_per_rank: int = Field(4096, gt=0, description="tokens entering one MoE layer on one rank in one step")
    context: int = Field(2048, gt=0, description="tokens of KV cache read per sequence in decode")
    weight_dtype: Dtype = Field("bf16", description="of the expert weights")
    activation_dtype: Dtype = Field("bf16", description="of tokens on the wire at dispatch; combine is bf16")


class Objective(Spec):
    """What a planner minimises, and within which limits."""

    kind: ObjectiveKind = Field(
        "time", description="predicted step time; tokens on the busiest rank; or traffic within max_imbalance"
    )
    return_mode: ReturnMode = Field(
        "return_home", description="where a token goes after a layer: to its own rank, or on from its expert's"
    )
    dispatch: DispatchKind = Field("per_node", description="what one copy of a token is sent per")
    replica_split: ReplicaSplit = Field("even", description="how tokens split over the copies of an expert")
    aggregate: Aggregate = Field("mean", description="over windows or domains")
    cvar_tail: Fraction = Field("20 %", description="worst share of windows that cvar averages")  # type: ignore[assignment]
    max_imbalance: Fraction | None = Field(
        None, description="load above the best balanced plan's; by default 5 % on several nodes, none on one"
    )
