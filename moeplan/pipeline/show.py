"""Show a plan: in words, as a page, as a picture; with a trace also its load and traffic.

``S`` source ranks, ``L`` layers, ``E`` experts, ``P`` slots, ``R`` ranks.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.artifacts.plan import LayerEvaluation, Plan
from moeplan.artifacts.routing_trace import PHASES, RoutingTrace
from moeplan.costs.layer import LayerCosts
from moeplan.costs.transitions import transition_counts
from moeplan.errors import PlanError, TraceError
from moeplan.files import require_other, write_text
from moeplan.planning.problem import PlanningProblem
from moeplan.planning.simple import contiguous
from moeplan.reports.plan_page import plan_svg, render_plan_page
from moeplan.reports.summary import Evidence, Locality, key_figures, layer_rows

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "Shown",
    "contiguous_like",
    "evidence_of",
    "pair_traffic",
    "show_plan",
    "step_traffic",
    "view_of",
]


@dataclass(frozen=True, slots=True)
class Shown:
    """A plan with what is known about it; ``messages`` are for people, ``written`` the files made."""

    plan: Plan
    evidence: Evidence
    messages: tuple[str, ...]
    written: tuple[Path, ...]

    def summary(self) -> dict[str, Any]:
        """The plan without its maps and moves, and its figures per layer, as JSON values."""
        maps = {"physical_to_logical_map", "rank_of_slot", "share", "replicas", "evaluation", "migration"}
        migration = self.plan.migration
        moves = None if migration is None else migration.model_dump(mode="json", exclude={"moves"})
        if moves is not None and migration is not None:
            moves["num_moves"] = len(migration.moves)
        return {
            **self.plan.model_dump(mode="json", exclude=maps),
            "sha256": self.plan.sha256,
            "migration": moves,
            "compared_with": self.evidence.before_name if self.evidence.before is not None else None,
            "figures": [asdict(figure) for figure in key_figures(self.plan, self.evidence)],
            "layers": [asdict(row) for row in layer_rows(self.plan, self.evidence)],
            "messages": list(self.messages),
            "written": [str(path) for path in self.written],
        }


def show_plan(
    plan_path: Path,
    *,
    trace_path: Path | None = None,
    trace_format: str | None = None,
    trace_domain: str | None = None,
    before_path: Path | None = None,
    html_path: Path | None = None,
    svg_path: Path | None = None,
) -> Shown:
    """Read a plan (a file, or the directory that holds ``plan.json``); write its page and picture.

    With a trace, the load of every rank is compared with that of ``before_path`` (another plan), or of the
    contiguous placement on the same slots. The load is of ``trace_domain``; left out: of the domain planned on where
    the trace has it, else of all. ``load_note`` of the evidence says where it is not the load planned on.

    Raises:
        InputError: a file cannot be read or written.
        PlanError: a plan is not valid, or ``before_path`` is a plan of another model.
        TraceError: the trace is not usable, or is of another model.
    """
    for out in (html_path, svg_path):
        require_other(out, plan_path, plan_path / "plan.json", before_path, trace_path)
    plan = Plan.load(plan_path)
    before = None if before_path is None else _before(plan, Plan.load(before_path))
    evidence = Evidence(before=before, before_name="before" if before_path is None else before_path.name)
    messages: list[str] = []
    if trace_path is not None:
        load, note = _load_of(plan, trace_path, trace_format, trace_domain, messages)
        messages += [note] * bool(note)
        if before is None:
            before = contiguous_like(plan, load)
            evidence = replace(evidence, before_name="contiguous")
        evidence = replace(evidence_of(plan, load, before, evidence.before_name), load_note=note)
    written = []
    if html_path is not None:
        write_text(html_path, render_plan_page(plan, evidence))
        written.append(html_path)
    if svg_path is not None:
        write_text(svg_path, plan_svg(plan, evidence))
        written.append(svg_path)
    return Shown(plan, evidence, tuple(messages), tuple(written))


def evidence_of(
    plan: Plan,
    load: ExpertLoad,
    before: Placement,
    before_name: str,
    evaluation_before: tuple[LayerEvaluation, ...] = (),
    speed_R: NDArray[np.float64] | None = None,
) -> Evidence:
    """What a load and a placement to compare with add to a plan: loads, distinct nodes, traffic, before and after."""
    (far_before, before_LR), (far_after, after_LR) = (_counted(plan, p, load) for p in (before, plan.placement))
    return Evidence(
        load_LE=load.load_LE,
        load_before_LR=before_LR,
        load_after_LR=after_LR,
        before=before,
        before_name=before_name,
        evaluation_before=evaluation_before,
        locality_before=far_before,
        locality_after=far_after,
        speed_R=speed_R,
        **_traffic(plan, before, load),
    )


def view_of(plan: Plan, evidence: Evidence, width: int) -> RenderableType:
    """What the terminal shows, for ``width`` columns."""
    from moeplan.reports.terminal import plan_view

    return plan_view(plan, evidence, width)


def _before(plan: Plan, other: Plan) -> Placement:
    for name in ("layer_ids", "num_experts", "num_ranks", "ranks_per_node"):
        mine, theirs = getattr(plan, name), getattr(other, name)
        if mine != theirs:
            raise PlanError(
                f"{name} of the plan before ({theirs}) differs from this plan's ({mine});"
                " compare plans of one model on one cluster"
            )
    return other.placement


def _load_of(
    plan: Plan, path: Path, trace_format: str | None, domain: str | None, messages: list[str]
) -> tuple[ExpertLoad, str]:
    """The load of the plan's layers and phase, and in words where it is not the load planned on."""
    from moeplan.routing.io import read_trace
    from moeplan.routing.loads import expert_load, pick_layers, pick_tokens

    read = partial(read_trace, path, format=trace_format, num_experts=plan.num_experts)
    planned = plan.provenance.get("domain")
    trace = None
    if domain is None and planned is not None:
        with suppress(TraceError):  # no such domain; whatever else is wrong comes again below
            trace, domain = read(domain=planned), planned
    trace = trace or read(domain=domain)
    note = _note_of(plan, path, str(trace.origin["sha256"]), domain)
    if isinstance(trace, RoutingTrace) and trace.phase_T is not None and plan.workload.phase in PHASES:
        chosen_T = trace.phase_T == PHASES.index(plan.workload.phase)
        if chosen_T.any():
            trace = pick_tokens(trace, chosen_T)
        else:
            messages.append(f"{path.name} holds no {plan.workload.phase} tokens; all of its tokens are shown")
    load = expert_load(trace)
    if load.num_experts != plan.num_experts:
        raise TraceError(
            f"{path} has {load.num_experts} experts but the plan has num_experts ({plan.num_experts});"
            " give the routing of the same model"
        )
    if set(plan.layer_ids) <= set(load.layer_ids):
        rows = [load.layer_ids.index(layer_id) for layer_id in plan.layer_ids]
    elif load.layer_ids == tuple(range(len(plan.layer_ids))):
        messages.append(f"{path.name} numbers its layers from 0; they are taken as the plan's, in order")
        rows = list(range(len(plan.layer_ids)))
    else:
        missing = next(layer_id for layer_id in plan.layer_ids if layer_id not in load.layer_ids)
        raise TraceError(
            f"{path} does not hold layer {missing} of the plan (it has {load.num_layers} layers, the plan"
            f" {len(plan.layer_ids)}); give the routing of the same model"
        )
    return pick_layers(_with_homes_of(plan, load, path, messages), rows, plan.layer_ids), note


def _note_of(plan: Plan, path: Path, sha256: str, domain: str | None) -> str:
    """Where a load shown is not the one planned on; empty for plans that do not say what that was."""
    made, planned = plan.provenance.get("trace_sha256"), plan.provenance.get("domain")
    if made in (None, "directory") or (made, planned) == (sha256, domain):
        return ""
    mine, theirs = (f"domain {name}" if name else "all" for name in (domain, planned))
    return (
        f"the load shown is not the one planned on: it is {mine} of {path.name}; the plan and its own figures are of"
        f" {theirs} of {'it' if made == sha256 else 'another trace'}"
    )


def _with_homes_of(plan: Plan, load: ExpertLoad, path: Path, messages: list[str]) -> ExpertLoad:
    """The load without its home ranks where they are not live ranks of the plan."""
    if load.source_SLE is None:
        return load
    homes = np.flatnonzero(load.source_SLE.sum(axis=(1, 2)))
    foreign = np.setdiff1d(homes, plan.rank_of_slot)
    if len(foreign) == 0:
        return load
    messages.append(
        f"{path.name} was recorded with tokens at home on rank {foreign[0]}, which holds no slot of the plan;"
        " homes are spread evenly"
    )
    trace = None if load.trace is None else replace(load.trace, source_rank_T=None)
    return replace(load, source_SLE=None, trace=trace)


def _counted(plan: Plan, placement: Placement, load: ExpertLoad) -> tuple[Locality, NDArray[np.float64]]:
    """Nodes and ranks per token, in ``stay`` mode the share of steps inside a node, and tokens of each rank ``[L, R]``,
    on this load.
    """
    from moeplan.costs.counting import count_trace, hop_shares, served_slots, sum_by_rank

    split = plan.objective.replica_split
    counts = None if load.trace is None else count_trace(load, placement, split)
    load_LR = sum_by_rank(served_slots(load, placement, split, counts), placement).sum(axis=0)
    if load.trace is None or counts is None:
        return Locality(), load_LR
    same_node_L: tuple[float | None, ...] | None = None
    if plan.objective.return_mode == "stay" and placement.num_layers > 1:
        shares = hop_shares(transition_counts(load.trace), placement)[1].tolist()
        same_node_L = (*shares, None)  # the last layer has no next one
    locality = Locality(
        nodes_per_token_L=tuple(counts.nodes_per_token_WL.mean(axis=0).tolist()),
        ranks_per_token_L=tuple(counts.ranks_per_token_WL.mean(axis=0).tolist()),
        same_node_share_L=same_node_L,
    )
    return locality, load_LR


def contiguous_like(plan: Plan, load: ExpertLoad) -> Placement:
    """The contiguous placement on the plan's ranks and slots."""
    experts = plan.experts_per_layer or (plan.num_experts,) * len(plan.layer_ids)
    unused = LayerCosts(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # this planner looks at neither load nor costs
    problem = PlanningProblem(
        load=load,
        experts_L=np.asarray(experts, dtype=np.int64),
        slots_R=np.bincount(plan.rank_of_slot, minlength=plan.num_ranks).astype(np.int64),
        speed_R=np.ones(plan.num_ranks),
        ranks_per_node=plan.ranks_per_node,
        costs=unused,
        objective=plan.objective,
    )
    return contiguous(problem).placement


def _traffic(plan: Plan, before: Placement, load: ExpertLoad) -> dict[str, Any]:
    """Traffic before and after, as fields of :class:`Evidence`."""
    if plan.objective.return_mode == "stay":
        transitions_LEE = load.transitions_LEE
        if transitions_LEE is None and load.trace is not None:
            transitions_LEE = transition_counts(load.trace)
        if transitions_LEE is None:
            return {
                "traffic_note": "No traffic matrix: stay mode needs the experts of each token, not counts."
            }
        before_RR, after_RR = (step_traffic(p, transitions_LEE) for p in (before, plan.placement))
        note = "Tokens go from the rank of their expert to that of the next layer's."
        return {
            "traffic_before_RR": before_RR,
            "traffic_after_RR": after_RR,
            "traffic_unit": "tokens",
            "traffic_note": note,
        }
    if plan.objective.dispatch == "allgather":
        return {
            "traffic_note": "No traffic matrix: allgather sends every token to every rank in any placement."
        }
    source_SLE, ranks = load.source_SLE, plan.num_ranks
    if source_SLE is not None:
        source_RLE = np.zeros((ranks, *source_SLE.shape[1:]))
        source_RLE[: len(source_SLE)] = source_SLE[:ranks]  # rows beyond are empty, or homes were dropped
        note = "Home ranks are those of the trace."
    else:
        live_R = np.bincount(plan.rank_of_slot, minlength=ranks) > 0
        source_RLE = live_R[:, None, None] / live_R.sum() * load.load_LE[None]
        note = "The trace does not say where tokens are at home: they are spread evenly over the live ranks."
    if plan.objective.dispatch != "per_expert":
        what = "node" if plan.objective.dispatch == "per_node" else "rank"
        note += f" With {plan.objective.dispatch} dispatch, pairs of one token to one {what} travel once."
    before_RR, after_RR = (pair_traffic(p, source_RLE) for p in (before, plan.placement))
    return {
        "traffic_before_RR": before_RR,
        "traffic_after_RR": after_RR,
        "traffic_unit": "token-expert pairs",
        "traffic_note": note,
    }


def _rank_share(placement: Placement, layer: int) -> NDArray[np.float64]:
    """Part of each expert's tokens that each rank takes."""
    expert_P = placement.physical_to_logical_LP[layer]
    used_P = expert_P != EMPTY
    share_ER = np.zeros((placement.num_experts, placement.num_ranks))
    places = (expert_P[used_P], placement.rank_of_slot_P[used_P])
    np.add.at(share_ER, places, placement.slot_share_LP[layer, used_P])
    return share_ER


def pair_traffic(placement: Placement, source_RLE: NDArray[np.float64]) -> NDArray[np.float64]:
    """(token, expert) pairs from home rank to expert's rank, all layers together (``per_expert`` dispatch).

    ``source_RLE`` are the selections of each home rank.
    """
    traffic_RR = np.zeros((len(source_RLE), placement.num_ranks))
    for layer in range(placement.num_layers):
        traffic_RR += source_RLE[:, layer] @ _rank_share(placement, layer)
    return traffic_RR


def step_traffic(placement: Placement, transitions_LEE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens from an expert's rank to that of the next layer's expert, all steps together: ``stay`` mode."""
    traffic_RR = np.zeros((placement.num_ranks, placement.num_ranks))
    for layer, transitions_EE in enumerate(transitions_LEE):
        traffic_RR += _rank_share(placement, layer).T @ transitions_EE @ _rank_share(placement, layer + 1)
    return traffic_RR
