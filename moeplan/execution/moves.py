"""Which expert copy goes where when one placement follows another, and whether a plan fits a run at all."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.plan import Plan
from moeplan.errors import PlanError
from moeplan.execution.groups import Mesh
from moeplan.specs.catalogue import slug
from moeplan.specs.model import ModelSpec

__all__ = ["Fetch", "fetches_of", "require_fits", "require_ranks"]

@dataclass(frozen=True, slots=True)
class Fetch:
    """A slot of the new placement gets its expert from a slot of the old one."""

    expert: int
    rank: int
    slot: int
    source_rank: int
    source_slot: int


def fetches_of(old: Placement, new: Placement, row: int, sent_R: list[int]) -> list[Fetch]:
    """Where each slot of layer ``row`` gets its expert: own rank, else own node, else the rank that sent least."""
    per_node = new.ranks_per_node
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(old.physical_to_logical_LP[row].tolist()):
        holders.setdefault(expert, []).append(slot)
    found = []
    for slot, expert in enumerate(new.physical_to_logical_LP[row].tolist()):
        rank = int(new.rank_of_slot_P[slot])
        if expert == EMPTY:
            continue

        def cost(held: int, rank: int = rank) -> tuple[bool, bool, int, int]:
            source = int(old.rank_of_slot_P[held])
            return source != rank, source // per_node != rank // per_node, sent_R[source], held

        held = min(holders[expert], key=cost)
        source = int(old.rank_of_slot_P[held])
        sent_R[source] += source != rank
        found.append(Fetch(expert, rank, slot, source, held))
    return found


def require_fits(plan: Plan, model: ModelSpec, mesh: Mesh) -> None:
    """The plan is one for this model and these ranks.

    Raises:
        PlanError: it is not; nothing has moved.
    """
    if slug(plan.model) != slug(model.name):
        raise PlanError(
            f"plan.model ({plan.model}) is not the running model ({model.name}); plan with --model {model.name}"
        )
    if plan.layer_ids != model.moe_layer_ids or plan.num_experts != model.num_experts:
        raise PlanError(
            f"plan has {len(plan.layer_ids)} layers of {plan.num_experts} experts, {model.name} has"
            f" {model.num_moe_layers} of {model.num_experts}; plan again from this model"
        )
    require_ranks(plan.placement, mesh)


def require_ranks(placement: Placement, mesh: Mesh) -> None:
    """The placement is for this many EP ranks in such nodes.

    Raises:
        PlanError: it is not.
    """
    if placement.num_ranks != mesh.ep.size:
        raise PlanError(
            f"plan num_ranks ({placement.num_ranks}) is not the run's expert-parallel size ({mesh.ep.size}); plan for"
            f" --ranks {mesh.ep.size}, or start {placement.num_ranks} ranks"
        )
    if placement.ranks_per_node != mesh.ranks_per_node:
        raise PlanError(
            f"plan ranks_per_node ({placement.ranks_per_node}) is not the run's ({mesh.ranks_per_node}); plan for"
            f" --nodes {mesh.ep.size // mesh.ranks_per_node}, or run with that many nodes"
        )
