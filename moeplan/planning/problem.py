"""What a planner is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Status
from moeplan.costs.layer import LayerCosts
from moeplan.errors import PlanError
from moeplan.progress import Progress, no_progress
from moeplan.specs.workload import Objective

__all__ = ["STEP_TIME", "Planner", "PlanningProblem", "PlanningResult", "answer_of"]

STEP_TIME = "step time"
"""``optimal_for`` of a plan whose predicted seconds, aggregated as the objective says, are proven least."""


@dataclass(frozen=True, slots=True, eq=False)
class PlanningProblem:
    """One planning task; everything is checked before it gets here.

    ``slots_R`` is the number of expert slots of each rank (0 for a failed rank), the same in every layer, and
    ``speed_R`` their relative speed. ``experts_L`` is the number of experts of each layer. Budgets of searches
    count proposals, never seconds, so that one seed gives one answer; ``time_limit_s`` is the exception a person
    asks for, and a planner that it stops answers with status ``time_limit``. From ``current`` a plan may make
    ``max_moves`` moves and must be ``affordable``; to move nothing always is. Without slots for copies a ``nearest``
    objective is ``even``, which is the same there.
    """

    load: ExpertLoad
    experts_L: NDArray[np.int64]
    slots_R: NDArray[np.int64]
    speed_R: NDArray[np.float64]
    ranks_per_node: int
    costs: LayerCosts
    objective: Objective
    seed: int = 0
    num_groups: int = 1
    time_limit_s: float | None = None
    current: Placement | None = None
    max_moves: int | None = None
    affordable: Callable[[Placement], bool] = lambda _placement: True
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", self.costs.known_from(self.load, self.objective.return_mode))
        if self.objective.replica_split == "nearest" and not self.spare_L.any():
            object.__setattr__(self, "objective", self.objective.model_copy(update={"replica_split": "even"}))

    @property
    def num_ranks(self) -> int:
        """``R``."""
        return len(self.slots_R)

    @property
    def num_nodes(self) -> int:
        """``N``."""
        return self.num_ranks // self.ranks_per_node

    @property
    def num_slots(self) -> int:
        """``P``."""
        return int(self.slots_R.sum())

    @property
    def spare_L(self) -> NDArray[np.int64]:
        """Slots of each layer beyond one per expert."""
        return self.num_slots - self.experts_L

    @property
    def rank_of_slot_P(self) -> NDArray[np.int32]:
        """Rank of each slot: a rank's slots stand together, in rank order."""
        return np.repeat(np.arange(self.num_ranks, dtype=np.int32), self.slots_R)

    @property
    def ranks_alike(self) -> bool:
        """Whether every rank has the same slots, speed and links."""
        link_R = self.costs.links(self.num_ranks)
        return all(bool((each_R == each_R[0]).all()) for each_R in (self.slots_R, self.speed_R, link_R))

    @property
    def ranks_change_places(self) -> bool:
        """Whether a plan is as good when ranks of a node change places: alike, and as near to a NIC of their own."""
        shared = self.costs.ranks_per_nic not in (1, self.ranks_per_node)
        return self.ranks_alike and not (shared and self.objective.dispatch in ("per_rank", "per_expert"))

    @property
    def live_R(self) -> NDArray[np.bool_]:
        """Ranks that have slots."""
        return self.slots_R > 0

    @property
    def live_speed(self) -> float:
        """Summed speed of those."""
        return float(self.speed_R[self.live_R].sum())

    @property
    def knows_homes(self) -> bool:
        """Whether the rank that each token comes from is recorded."""
        return self.load.trace is not None and self.load.trace.source_rank_T is not None

    @property
    def counts_homes(self) -> bool:
        """Whether it counts from which node a token comes: where that is recorded, or finds it the nearest copy."""
        dispatch = self.objective.dispatch
        nearest = self.objective.replica_split == "nearest" and dispatch == "per_node" and self.load.trace is not None
        return (self.knows_homes or nearest) and self.num_nodes > 1 and dispatch != "allgather"

    def placement(self, physical_to_logical_LP: NDArray[np.integer]) -> Placement:
        """The placement over this problem's slots."""
        return Placement(
            physical_to_logical_LP=physical_to_logical_LP.astype(np.int32),
            rank_of_slot_P=self.rank_of_slot_P,
            num_experts=self.load.num_experts,
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node,
        )


@dataclass(frozen=True, slots=True)
class PlanningResult:
    """A planner's answer. ``optimal_for`` names the quantity that ``status='optimal'`` is proven for, by ``argument``.

    Only :data:`STEP_TIME` makes the plan's predicted time its own lower bound.
    """

    placement: Placement
    status: Status = "feasible"
    optimal_for: str | None = None
    notes: tuple[str, ...] = ()
    argument: str | None = None


@runtime_checkable
class Planner(Protocol):
    """A planner plugin (entry-point group ``moeplan.planners``): a callable from problem to result."""

    def __call__(self, problem: PlanningProblem) -> PlanningResult:
        """Place every expert of every layer.

        Raises:
            InfeasibleError: no placement satisfies the limits; the message says which binds and by how much.
        """
        ...


def answer_of(name: str, planner: Planner, problem: PlanningProblem) -> PlanningResult:
    """What a planner called ``name`` answers.

    Raises:
        InfeasibleError: the planner's own. PlanError: its answer is no placement of this problem, which is its mistake.
    """
    found = planner(problem)
    try:
        if not isinstance(found, PlanningResult):
            raise PlanError(f"a {type(found).__name__} is no PlanningResult")
        placement, layers = found.placement, problem.load.num_layers
        if placement.num_layers != layers:
            raise PlanError(f"{placement.num_layers} layers are placed, the load has {layers}")
        if not np.array_equal(placement.rank_of_slot_P, problem.rank_of_slot_P):
            raise PlanError("its slots are not those asked for: rank_of_slot differs")
        placement.require_valid(tuple(problem.experts_L.tolist()), allow_duplicates=True)
    except PlanError as error:
        raise PlanError(f"planner {name} answers wrongly: {error}; mend it: PlannerContract tests it") from error
    return found
