"""Plans: a placement with its status, proof, prediction and provenance; written as ``plan.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeplan.artifacts.placement import Placement
from moeplan.errors import PlanError
from moeplan.files import canonical_json, read_json, sha256_bytes, write_text
from moeplan.specs.base import validation_message
from moeplan.specs.workload import Objective, Workload

__all__ = ["IMPORTED", "SCHEMA_VERSION", "Bound", "LayerEvaluation", "Migration", "Move", "Plan", "Prediction", "Status", "Verdict"]

SCHEMA_VERSION = 1
IMPORTED = "imported:"
"""Prefix of ``planner`` in plans that were read from another engine's file; the format's name follows."""

Status = Literal["optimal", "feasible", "time_limit", "interrupted"]


class _Paper(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Bound(_Paper):
    """A proven lower bound on one quantity, with the argument it rests on; ``gap = value / bound - 1``."""

    quantity: str = Field(description="what is bounded, with its unit, e.g. 'layer time, s' or 'max/mean load'")
    value: float = Field(description="of this plan, summed or averaged over layers as the quantity says")
    bound: float
    gap: float = Field(ge=0)
    argument: str
    value_L: tuple[float, ...] = ()
    bound_L: tuple[float, ...] = ()


class LayerEvaluation(_Paper):
    """What the plan does to one layer, on the trace it is evaluated on."""

    layer_id: int
    max_over_mean_load: float = Field(description="busiest rank's load over the mean, speeds accounted for")
    nodes_per_token: float | None = Field(None, description="distinct nodes a token's top-k touches")
    ranks_per_token: float | None = Field(None, description="distinct ranks a token's top-k touches")
    same_node_share: float | None = Field(None, description="stay: part of the transitions to the next layer inside a node")
    same_rank_share: float | None = Field(None, description="stay: part of the transitions to the next layer on one rank")
    time_s: float


class Prediction(_Paper):
    """Seconds of the routed-expert part of one step over all MoE layers."""

    time_s: float
    time_low_s: float
    time_high_s: float
    expert_time_s: float
    dispatch_combine_time_s: float
    baseline: str = Field(description="the placement it is compared with, e.g. 'contiguous' or 'current'")
    baseline_time_s: float
    tokens_per_step: int
    source: dict[str, str] = Field(description="per part: measured, interpolated, modelled or extrapolated, and from what")


class Move(_Paper):
    """One expert copy that has to be brought to a slot: ``expert`` of ``layer_id`` from a rank to ``slot``."""

    layer_id: int
    expert: int
    source_rank: int
    target_rank: int
    slot: int


class Migration(_Paper):
    """What it takes to get from the current placement to this one, in the order to do it."""

    moves: tuple[Move, ...]
    bytes: float
    seconds: float
    source: str


class Verdict(_Paper):
    """Will it pay?"""

    apply: bool
    reason: str
    largest_possible_gain: float = Field(description="part of the baseline's step time that no placement can exceed")
    expected_gain: float = Field(description="part of the baseline's step time, on held-out windows")
    expected_gain_low: float
    expected_gain_high: float
    held_out: str = Field(description="what the gain was measured on")
    migration_s: float | None = None
    break_even_s: float | None = Field(None, description="run time after which the migration has paid for itself")


class Plan(_Paper):
    """Everything a person or an engine needs to use a placement and to trust it."""

    schema_version: Literal[1] = 1
    model: str
    planner: str
    status: Status
    seed: int
    num_experts: int = Field(gt=0)
    experts_per_layer: tuple[int, ...] | None = None
    num_ranks: int = Field(gt=0)
    ranks_per_node: int = Field(gt=0)
    num_redundant_experts: int
    layer_ids: tuple[int, ...]
    physical_to_logical_map: tuple[tuple[int, ...], ...]
    rank_of_slot: tuple[int, ...]
    share: tuple[tuple[float, ...], ...] | None = None
    replicas: tuple[tuple[int, ...], ...]
    objective: Objective
    workload: Workload
    bounds: tuple[Bound, ...] = ()
    prediction: Prediction | None = None
    evaluation: tuple[LayerEvaluation, ...] = ()
    verdict: Verdict | None = None
    migration: Migration | None = None
    notes: tuple[str, ...] = ()
    provenance: dict[str, str] = Field(default_factory=dict, description="sha256 of each input, and tool version")

    @classmethod
    def parse(cls, value: Any, where: str) -> Self:
        """Validate a document.

        Raises:
            PlanError: any field is wrong, or the placement in it is not valid.
        """
        if isinstance(value, dict) and value.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise PlanError(
                f"{where}: schema_version ({value['schema_version']!r}) is not {SCHEMA_VERSION}; plan again with this version"
            )
        try:
            plan = cls.model_validate(value)
        except ValidationError as error:
            raise PlanError(validation_message(where, error)) from error
        widths = {len(row) for row in plan.physical_to_logical_map}
        if len(widths) != 1 or len(plan.physical_to_logical_map) != len(plan.layer_ids):
            raise PlanError(f"{where}: physical_to_logical_map must have one row of equal length per layer of layer_ids")
        plan.placement.require_valid(plan.experts_per_layer, allow_duplicates=plan.is_imported)
        return plan

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``plan.json``.

        Raises:
            InputError: unreadable; PlanError: not a valid plan.
        """
        return cls.parse(read_json(path), str(path))

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
