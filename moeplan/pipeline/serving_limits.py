"""Scenarios that cannot be served as asked: which limit, by how much, and what would do."""

from __future__ import annotations

import math

import numpy as np

from moeplan.artifacts.profile import HardwareProfile
from moeplan.artifacts.request_trace import RequestTrace
from moeplan.costs.coverage import coverage_gaps
from moeplan.costs.passes import Batch, no_chunks
from moeplan.costs.technique import Technique
from moeplan.errors import ProfileError, SpecError
from moeplan.simulation.pools import Pool, Role
from moeplan.specs.attention_layers import attention_layers
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.model import ModelSpec
from moeplan.specs.scenario import Scenario
from moeplan.specs.serving import EngineSpec, ServingSpec
from moeplan.specs.workload import Phase, Workload

__all__ = ["context_parallel_fits", "coverage_notes", "faults_fit", "slo_possible"]


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
        gaps += coverage_gaps(model, stage, workload, scenario.objective, profile, technique, scenario.model)
    gaps = list(dict.fromkeys(gaps))
    if gaps and scenario.profile is not None:
        regions, commands = zip(*(gap.split("; measure it: ") for gap in gaps), strict=True)
        raise ProfileError(
            f"profile ({scenario.profile}) does not cover this scenario in {len(gaps)} regions: {'; '.join(regions)};"
            f" measure them: {'; '.join(dict.fromkeys(commands))}; or leave profile out (nearest measured, said so) or"
            " write none (roofline)"
        )
    return [f"scaled or modelled: {gap}" for gap in gaps]


def context_parallel_fits(model: ModelSpec, engine: EngineSpec, role: Role) -> None:
    """Ranks that keep one KV cache together split attention together, and would all hold the same of it; vLLM's rules
    (``verify_with_parallel_config`` in ``vllm/config/model.py``; windows: ``SlidingWindowSpec``). Prompts are cut among
    ranks where nothing is decoded, as SGLang asks of disaggregated services.

    Raises:
        SpecError: they do not, or are.
    """
    if engine.dcp == engine.pcp == 1:
        return
    name = "pcp" if engine.pcp > 1 else "dcp"
    where, attention = f"engine.{name} ({getattr(engine, name)})", model.attention
    if engine.pcp > 1 and role != "prefill":
        raise SpecError(
            f"{where} cuts prompts among ranks, of which decodes would have nothing; use 1 here, or instances that only"
            " prefill (serving.prefill, or role: prefill)"
        )
    if engine.pcp > 1 and engine.dcp > 1:
        raise SpecError(
            f"{where} and engine.dcp ({engine.dcp}): SGLang refuses the two together, and vLLM has them in experiments"
            " alone; set dcp to 1 here, and use it where decodes are (serving.engine)"
        )
    if engine.tp % engine.dcp:
        raise SpecError(f"{where} does not divide engine.tp ({engine.tp}), among whose ranks it is; choose a divisor")
    if attention is None:
        raise SpecError(f"{where}: attention of {model.name} is not known, nor what ranks would share of it; use 1")
    if windows := sorted({part.window for part in attention_layers(model) if part.window}):
        raise SpecError(
            f"{where}: layers of {model.name} keep a window of {windows[0]} tokens, which engines do not split; use 1"
        )
    if attention.is_mla or engine.dcp == 1:
        return
    heads, copies = attention.num_kv_heads, max(1, engine.tp // attention.num_kv_heads)
    if copies % engine.dcp:
        raise SpecError(
            f"{where} does not divide the copies of a key head ({copies}: engine.tp, {engine.tp}, over num_kv_heads,"
            f" {heads}, of {model.name}); choose a divisor of them, or a higher tp"
        )
    if (queries := attention.num_heads // heads) % engine.dcp:
        raise SpecError(
            f"{where} does not divide the {queries} query heads of a key head ({attention.num_heads} / {heads}) of"
            f" {model.name}; choose a divisor"
        )


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
        least["tpot"] = _alone(pools[-1], 0, shortest) / pools[-1].engine.tokens_per_sequence  # every draft accepted
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
    decodes_D, cached_D, chunk_s_D4 = np.zeros(costs.groups), np.zeros(costs.groups), no_chunks(costs.groups)
    tokens_D = np.zeros(costs.groups)
    total, before = pool.engine.step_overhead, 0
    if not prompt:
        decodes_D[0], tokens_D[0] = 1.0, pool.engine.tokens_per_sequence
        cached_D[0] = cached
        load_LE = pool.loads.at(0.0, "decode")
        batch = Batch(decodes_D, cached_D, chunk_s_D4, tokens_D, False)
        return total + costs.step(batch, pool.placement, load_LE).total_s
    load_LE = pool.loads.at(0.0, "prefill")
    while before < prompt:
        tokens = min(prompt - before, pool.engine.max_num_batched_tokens)
        chunk_s_D4[0], tokens_D[0] = costs.chunk_s(before, tokens), float(tokens)
        batch = Batch(decodes_D, cached_D, chunk_s_D4, tokens_D, True)
        total += costs.step(batch, pool.placement, load_LE).total_s
        before += tokens
    return total
