"""Plans: a placement with its status, proof, prediction and provenance; written as ``plan.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeplan.artifacts.placement import Placement
from moeplan.errors import PlanError
from moeplan.files import canonical_json, read_json, sha256_bytes, write_text
from moeplan.specs.base import refused
from moeplan.specs.workload import Objective, Workload

__all__ = [
    "IMPORTED",
    "SCHEMA_VERSION",
    "Bound",
    "LayerEvaluation",
    "Migration",
    "Move",
    "Plan",
    "Prediction",
    "Status",
    "Verdict",
    "placement_fields",
    "plan_file",
]

SCHEMA_VERSION = 1
IMPORTED = "imported:"
"""Prefix of ``planner`` in plans that were read from another engine's file; the format's name follows."""

Status = Literal["optimal", "feasible", "time_limit", "interrupted"]


def plan_file(path: Path) -> Path:
    """The plan's file where ``path`` is the directory that holds it."""
    return path / "plan.json" if path.is_dir() else path


def placement_fields(placement: Placement) -> dict[str, Any]:
    """The fields of a :class:`Plan` that hold a placement's slots."""

    def rows(array: NDArray[Any]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(row) for row in array.tolist())

    return {
        "num_ranks": placement.num_ranks,
        "ranks_per_node": placement.ranks_per_node,
        "physical_to_logical_map": rows(placement.physical_to_logical_LP),
        "rank_of_slot": tuple(placement.rank_of_slot_P.tolist()),
        "share": None if placement.share_LP is None else rows(placement.share_LP),
        "replicas": rows(placement.replicas_LE),
    }


class _Paper(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Bound(_Paper):
    """A proven lower bound on one quantity, with the argument it rests on; ``gap = value / bound - 1``."""

    quantity: str = Field(description="what is bounded, with its unit, e.g. 'layer time, s' or 'max/mean load'")
    value: float = Field(description="of this plan, summed or averaged over layers as the quantity says")
    bound: float = Field(description="what no placement can be below, in the same unit")
    gap: float = Field(ge=0, description="value / bound - 1; 0 is proven optimal")
    argument: str = Field(description="why the bound holds")
    value_L: tuple[float, ...] = Field((), description="the value of each layer, where layers separate")
    bound_L: tuple[float, ...] = Field((), description="the bound of each layer, where layers separate")


class LayerEvaluation(_Paper):
    """What the plan does to one layer, on the trace it is evaluated on."""

    layer_id: int = Field(description="number of the layer in the model, dense layers counted")
    max_over_mean_load: float = Field(description="busiest rank's load over the mean, speeds accounted for")
    nodes_per_token: float | None = Field(None, description="distinct nodes a token's top-k touches")
    ranks_per_token: float | None = Field(None, description="distinct ranks a token's top-k touches")
    same_node_share: float | None = Field(
        None, description="part of the expert pairs of consecutive layers that lie inside a node; counts in stay"
    )
    same_rank_share: float | None = Field(
        None, description="part of the expert pairs of consecutive layers that lie on one rank; counts in stay"
    )
    time_s: float = Field(description="predicted seconds of the layer's routed experts, dispatch and combine")


class Prediction(_Paper):
    """Seconds of the routed-expert part of one step over all MoE layers."""

    time_s: float = Field(description="predicted seconds under this plan")
    time_low_s: float = Field(description="time_s less the relative error of the costs")
    time_high_s: float = Field(description="time_s plus the relative error of the costs")
    expert_time_s: float = Field(description="part of time_s in which the busiest rank computes experts")
    dispatch_combine_time_s: float = Field(description="part of time_s in which tokens travel")
    baseline: str = Field(description="the placement it is compared with, e.g. 'contiguous' or 'current'")
    baseline_time_s: float = Field(description="predicted seconds under the baseline")
    tokens_per_step: int = Field(description="tokens entering a layer in one step, all ranks together")
    source: dict[str, str] = Field(
        description="per part: measured, interpolated, modelled or extrapolated, and from what"
    )


class Move(_Paper):
    """One expert copy that has to be brought to a slot: ``expert`` of ``layer_id`` from a rank to ``slot``."""

    layer_id: int = Field(description="number of the layer in the model")
    expert: int = Field(description="logical expert to bring")
    source_rank: int = Field(description="rank that holds it now")
    target_rank: int = Field(description="rank it is brought to")
    slot: int = Field(description="slot it takes there")


class Migration(_Paper):
    """What it takes to get from the current placement to this one, in the order to do it."""

    moves: tuple[Move, ...] = Field(description="what to bring where, layers that gain most per move first")
    bytes: float = Field(description="expert weights that travel between ranks")
    seconds: float = Field(description="predicted seconds of all moves")
    source: str = Field(description="what the seconds rest on")


class Verdict(_Paper):
    """Will it pay?"""

    apply: bool = Field(description="whether the plan is worth applying")
    reason: str = Field(description="why, in one sentence")
    largest_possible_gain: float = Field(description="part of the baseline's step time that no placement can exceed")
    expected_gain: float = Field(
        description="part of the baseline's step time, on what was held out, of a plan made on the rest alone"
    )
    expected_gain_low: float = Field(description="lower end of the gain's 95 % interval")
    expected_gain_high: float = Field(description="upper end of the gain's 95 % interval")
    held_out: str = Field(description="what the gain was measured on")
    migration_s: float | None = Field(None, description="predicted seconds to move the experts; null without --current")
    break_even_s: float | None = Field(None, description="seconds of MoE work until the migration has paid for itself")
    break_even_steps: int | None = Field(None, description="steps until the migration has paid for itself")


class Plan(_Paper):
    """Everything a person or an engine needs to use a placement and to trust it."""

    schema_version: Literal[1] = Field(1, description="raised when the meaning of a field changes")
    model: str = Field(description="name of the model")
    planner: str = Field(description="name of the planner, or 'imported:' and the format read")
    status: Status = Field(description="how the search ended; optimal is proven")
    seed: int = Field(description="of the search: same seed, same plan")
    num_experts: int = Field(gt=0, description="logical experts of a layer, the most of any layer where they differ")
    experts_per_layer: tuple[int, ...] | None = Field(None, description="per MoE layer, where they differ")
    num_ranks: int = Field(gt=0, description="expert-parallel size")
    ranks_per_node: int = Field(gt=0, description="ranks 0 to ranks_per_node - 1 are node 0, and so on")
    num_redundant_experts: int = Field(description="slots of a layer beyond one per logical expert")
    layer_ids: tuple[int, ...] = Field(description="number in the model of each MoE layer, dense layers counted")
    physical_to_logical_map: tuple[tuple[int, ...], ...] = Field(
        description="[layers, slots]: the logical expert in each slot; -1 where the slot is empty"
    )
    rank_of_slot: tuple[int, ...] = Field(description="[slots]: the rank of each slot, rising")
    share: tuple[tuple[float, ...], ...] | None = Field(
        None, description="[layers, slots]: part of its expert's tokens that a slot serves; null: even over copies"
    )
    replicas: tuple[tuple[int, ...], ...] = Field(description="[layers, experts]: copies of each logical expert")
    objective: Objective = Field(description="what was minimised, within which limits")
    workload: Workload = Field(description="the operating point the costs are of")
    bounds: tuple[Bound, ...] = Field((), description="proofs: the objective first")
    prediction: Prediction | None = Field(None, description="seconds of a step; null in imported plans")
    evaluation: tuple[LayerEvaluation, ...] = Field((), description="per layer, on the trace planned on")
    verdict: Verdict | None = Field(None, description="whether to apply it; null in imported plans")
    migration: Migration | None = Field(None, description="how to get there from --current")
    notes: tuple[str, ...] = Field((), description="what a reader of the plan should know")
    provenance: dict[str, str] = Field(
        default_factory=dict,
        description="sha256 of each input, windows and domain of the trace planned on, and tool version",
    )

    @classmethod
    def parse(cls, value: Any, where: str) -> Self:
        """Validate a document.

        Raises:
            PlanError: any field is wrong, or the placement in it is not valid.
        """
        if isinstance(value, dict) and value.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise PlanError(
                f"{where}: schema_version ({value['schema_version']!r}) is not {SCHEMA_VERSION};"
                " plan again with this version"
            )
        if isinstance(value, dict) and not {"planner", "model"} & value.keys():
            raise PlanError(f"{where} is not a plan; 'moeplan import' makes one of another engine's file")
        try:
            plan = cls.model_validate(value)
        except ValidationError as error:
            raise refused(PlanError, where, error, cls) from error
        widths = {len(row) for row in plan.physical_to_logical_map}
        if len(widths) != 1 or len(plan.physical_to_logical_map) != len(plan.layer_ids):
            raise PlanError(
                f"{where}: physical_to_logical_map must have one row of equal length per layer of layer_ids"
            )
        plan.placement.require_valid(plan.experts_per_layer, allow_duplicates=plan.is_imported)
        return plan

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``plan.json``, or the one in a directory.

        Raises:
            InputError: unreadable; PlanError: not a valid plan.
        """
        place = plan_file(path)
        return cls.parse(read_json(place), str(place))

    def save(self, path: Path) -> None:
        """Write ``plan.json`` atomically: one line per field and per layer, so that two plans can be compared."""
        rows = []
        for key, value in self.model_dump(mode="json").items():
            if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
                body = "[\n    " + ",\n    ".join(json.dumps(item) for item in value) + "\n  ]"
            else:
                body = json.dumps(value)
            rows.append(f"  {json.dumps(key)}: {body}")
        write_text(path, "{\n" + ",\n".join(rows) + "\n}\n")

    @property
    def is_imported(self) -> bool:
        """Whether another engine's file was read: such a placement may hold two copies of one expert on a rank."""
        return self.planner.startswith(IMPORTED)

    @property
    def sha256(self) -> str:
        """Digest of the whole content."""
        return sha256_bytes(canonical_json(self.model_dump(mode="json")).encode())

    @property
    def placement(self) -> Placement:
        """The placement as arrays."""
        return Placement(
            physical_to_logical_LP=np.asarray(self.physical_to_logical_map, dtype=np.int32),
            rank_of_slot_P=np.asarray(self.rank_of_slot, dtype=np.int32),
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node,
            share_LP=None if self.share is None else np.asarray(self.share, dtype=np.float64),
        )
