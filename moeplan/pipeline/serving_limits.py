"""Scenarios that cannot be served as asked: which limit, by how much, and what would do."""

from __future__ import annotations

import math

import numpy as np

from moeplan.artifacts.profile import HardwareProfile
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.costs.coverage import coverage_gaps
from moeplan.costs.serving import Batch
from moeplan.costs.technique import Technique
from moeplan.errors import ProfileError, SpecError
from moeplan.simulation.instance import Role
from moeplan.simulation.service import Pool
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.serving import ServingSpec
from moeplan.specs.workload import Phase, Workload

__all__ = ["coverage_notes", "faults_fit", "slo_possible"]


def coverage_notes(
    scenario: Scenario,
    model: ModelSpec,
    stage: ClusterSpec,
    role: Role,
    technique: Technique,
    profile: HardwareProfile | None,
) -> list[str]:
    """What the profile lacks: notes where it came with the accelerator, an error where it was asked for by name.

    Raises:
        ProfileError: each missing region, and the command that measures it.
    """
    if profile is None:
        return []
    phases: tuple[Phase, ...] = ("prefill", "decode") if role == "both" else (role,)
    gaps: list[str] = []
    for phase in phases:
        workload: Workload = scenario.workload.model_copy(update={"phase": phase})
        gaps += coverage_gaps(model, stage, workload, scenario.objective, profile, technique)
    gaps = list(dict.fromkeys(gaps))
    if gaps and scenario.profile is not None:
        regions, commands = zip(*(gap.split("; measure it: ") for gap in gaps), strict=True)
        raise ProfileError(
            f"profile ({scenario.profile}) does not cover this scenario in {len(gaps)} regions: {'; '.join(regions)};"
            f" measure them: {'; '.join(dict.fromkeys(commands))}; or leave profile out (nearest measured, said so) or"
            " write none (roofline)"
        )
    return [f"scaled or modelled: {gap}" for gap in gaps]


def faults_fit(spec: ServingSpec, pools: list[Pool]) -> None:
    """Faults name pools, instances and ranks that there are, and befall a rank one after the other; nothing plans anew
    where ranks split experts.

    Raises:
        SpecError: which does not.
    """
    if spec.rebalance is not None and (split := [p.engine.expert_tp for p in pools if p.engine.expert_tp > 1]):
        raise SpecError(
            f"serving.rebalance moves whole experts, but engine.expert_tp ({split[0]}) splits them; leave one out"
        )
    for number, fault in enumerate(spec.faults):
        where = f"serving.faults.{number}"
        if fault.pool == "prefill" and spec.prefill is None:
            raise SpecError(f"{where}.pool (prefill): there is no prefill pool; leave it out, or add serving.prefill")
        pool = pools[0 if fault.pool == "prefill" else -1]
        if fault.kind == "rank-loss" and pool.engine.expert_tp > 1:
            raise SpecError(
                f"{where}.kind (rank-loss): with engine.expert_tp ({pool.engine.expert_tp}) above 1 a lost rank takes a"
                " part of every expert of its group, and no plan without it can be simulated yet; set expert_tp to 1"
            )
        if pool.engine.pp > 1 and spec.rebalance is not None:
            raise SpecError(
                f"{where}: with engine.pp ({pool.engine.pp}) above 1, faults and serving.rebalance cannot be simulated"
                " together yet; leave one out"
            )
        if fault.instance >= pool.instances:
            raise SpecError(
                f"{where}.instance ({fault.instance}) is outside 0..{pool.instances - 1} ({fault.pool} instances)"
            )
        ranks = pool.cluster.num_ranks * pool.engine.pp
        if fault.rank >= ranks:
            raise SpecError(f"{where}.rank ({fault.rank}) is outside 0..{ranks - 1} (ranks)")
        for other, earlier in enumerate(spec.faults[:number]):
            same = all(getattr(fault, f) == getattr(earlier, f) for f in ("kind", "pool", "instance", "rank"))
            if same and fault.at < (earlier.until or math.inf) and earlier.at < (fault.until or math.inf):
                raise SpecError(
                    f"{where} ({fault.kind} of rank {fault.rank} from {fault.at:g} s) overlaps serving.faults.{other}"
                    f" (from {earlier.at:g} s to {earlier.until or math.inf:g} s), which is the same of the same rank;"
                    " let one end before the other begins"
                )


def slo_possible(spec: ServingSpec, requests: RequestTrace, pools: list[Pool]) -> None:
    """No limit is below what the shortest request takes in an empty service.

    Raises:
        SpecError: which is, by how much, and what would do.
    """
    shortest, answer = int(requests.input_tokens_Q.min()), int(requests.output_tokens_Q.min())
    first = pools[0]
    least: dict[str, float] = {}
    if first.role != "decode":
        shared = first.engine.prefix_caching and requests.prefix_Q is not None
        least["ttft"] = _alone(first, 1 if shared else shortest, 0)  # the last token of a prompt is never in the cache
    if pools[-1].role != "prefill" and int(requests.output_tokens_Q.max()) > 1:
        least["tpot"] = _alone(pools[-1], 0, shortest)
        least["e2e"] = least.get("ttft", 0.0) + (answer - 1) * least["tpot"]
    for name, seconds in least.items():
        limit = getattr(spec.slo, name)
        if limit is not None and limit < seconds:
            raise SpecError(
                f"serving.slo.{name} ({limit * 1e3:.4g} ms) is below the service time of the shortest request in an"
                f" empty service ({seconds * 1e3:.4g} ms) by {(seconds - limit) * 1e3:.4g} ms: no load meets it; allow"
                f" {seconds * 1e3:.4g} ms or more"
            )


def _alone(pool: Pool, prompt: int, cached: int) -> float:
    """Seconds of a step with one request: its whole prompt (cut where the engine cuts), or one more token."""
    costs = pool.costs(pool.cluster)
    decodes_D, cached_D, chunks_D = np.zeros(costs.groups), np.zeros(costs.groups), np.full(costs.groups, -1.0)
    tokens_D = np.zeros(costs.groups)
    total, before = pool.engine.step_overhead, 0
    if not prompt:
        decodes_D[0] = tokens_D[0] = 1.0
        cached_D[0] = cached
        load_LE = pool.loads.at(0.0, "decode")
        batch = Batch(decodes_D, cached_D, chunks_D, tokens_D, False)
        return total + costs.step(batch, pool.placement, load_LE).total_s
    load_LE = pool.loads.at(0.0, "prefill")
    while before < prompt:
        tokens = min(prompt - before, pool.engine.max_num_batched_tokens)
        chunks_D[0], tokens_D[0] = costs.chunk_s(before, tokens), float(tokens)
        batch = Batch(decodes_D, cached_D, chunks_D, tokens_D, True)
        total += costs.step(batch, pool.placement, load_LE).total_s
        before += tokens
    return total
