"""Plans to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Bound, LayerEvaluation, Migration, Move, Plan, Prediction, Verdict
from moeplan.specs.workload import Objective, Workload

LAYERS, EXPERTS, RANKS, PER_NODE = 12, 8, 4, 2


def bare_plan(**changes: Any) -> Plan:
    """Two slots more than experts: expert 0 has copies on ranks 0 and 3, expert 1 on 0 and 2."""
    row = (0, 1, 2, 3, 4, 1, 5, 6, 7, 0)
    ranks = (0, 0, 0, 1, 1, 2, 2, 3, 3, 3)
    fields: dict[str, Any] = {
        "model": "tiny",
        "planner": "joint",
        "status": "feasible",
        "seed": 0,
        "num_experts": EXPERTS,
        "num_ranks": RANKS,
        "ranks_per_node": PER_NODE,
        "num_redundant_experts": 2,
        "layer_ids": tuple(range(3, 3 + LAYERS)),
        "physical_to_logical_map": (row,) * LAYERS,
        "rank_of_slot": ranks,
        "replicas": ((2, 2, 1, 1, 1, 1, 1, 1),) * LAYERS,
        "objective": Objective(),
        "workload": Workload(),
    }
    return Plan.model_validate(fields | changes)


def full_plan(**changes: Any) -> Plan:
    evaluation = evaluations(1.02, 1.4)
    time_s = sum(item.time_s for item in evaluation)
    fields: dict[str, Any] = {
        "bounds": (
            Bound(
                quantity="layer time, s",
                value=time_s,
                bound=time_s / 1.01,
                gap=0.01,
                argument="averages",
                value_L=tuple(item.time_s for item in evaluation),
                bound_L=tuple(item.time_s / 1.01 for item in evaluation),
            ),
        ),
        "prediction": Prediction(
            time_s=time_s,
            time_low_s=time_s * 0.9,
            time_high_s=time_s * 1.1,
            expert_time_s=time_s / 2,
            dispatch_combine_time_s=time_s / 2,
            baseline="contiguous",
            baseline_time_s=time_s * 1.25,
            tokens_per_step=16384,
            source={"experts": "measured on a GPU", "exchange": "modelled by the roofline"},
        ),
        "evaluation": evaluation,
        "verdict": Verdict(
            apply=True,
            reason="It pays.",
            largest_possible_gain=0.25,
            expected_gain=0.2,
            expected_gain_low=0.18,
            expected_gain_high=0.22,
            held_out="the second half",
            migration_s=1.5,
            break_even_s=90.0,
            break_even_steps=4500,
        ),
        "migration": Migration(
            moves=(Move(layer_id=3, expert=1, source_rank=0, target_rank=2, slot=5),),
            bytes=44e6,
            seconds=1.5,
            source="modelled",
        ),
        "provenance": {"trace": "ab" * 32},
    }
    return bare_plan(**(fields | changes))


def evaluations(peak: float, nodes: float) -> tuple[LayerEvaluation, ...]:
    return tuple(
        LayerEvaluation(
            layer_id=3 + layer,
            max_over_mean_load=peak + layer / 500,
            nodes_per_token=nodes,
            ranks_per_token=nodes * 1.5,
            time_s=peak * 1e-4,
        )
        for layer in range(LAYERS)
    )


def load_LE(seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).integers(1, 100, (LAYERS, EXPERTS)).astype(np.float64)


def contiguous() -> Placement:
    experts = np.arange(EXPERTS, dtype=np.int32)
    return Placement(np.tile(experts, (LAYERS, 1)), experts // 2, EXPERTS, RANKS, PER_NODE)
