"""How long one prediction takes: 58 MoE layers on 144 ranks, from the shipped H100 profile. Prints one JSON object."""

from __future__ import annotations

import json
import time

import numpy as np

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.profile import load_profile
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.workload import Workload

TARGET_MS = 1.0


def main() -> None:
    model = find_model("deepseek-v3")
    cluster = cluster_for("h100", 18, 8)
    rng = np.random.default_rng(0)
    layers, experts, slots = model.num_moe_layers, model.num_experts, 288
    load = rng.gamma(1.0, 1.0, (layers, experts))
    rows = [np.concatenate([rng.permutation(experts), rng.permutation(experts)[:32]]) for _ in range(layers)]
    ranks = np.repeat(np.arange(144), slots // 144).astype(np.int32)
    placement = Placement(np.stack(rows).astype(np.int32), ranks, experts, 144, 8)
    workload = Workload(phase="decode", batch_per_rank=128, weight_dtype="fp8", activation_dtype="fp8")
    start = time.perf_counter()
    compiled = StepModel(model, cluster, workload, Technique(dispatch="per_expert"), load_profile("h100-sxm"))
    compile_s = time.perf_counter() - start
    compiled.step(placement, load)
    state = compiled.layer(placement, load, 0)
    steps, swaps = [], []
    for _ in range(200):
        start = time.perf_counter()
        compiled.step(placement, load)
        steps.append(time.perf_counter() - start)
        start = time.perf_counter()
        compiled.swap(state, 3, 200)
        swaps.append(time.perf_counter() - start)
    median_ms = float(np.median(steps)) * 1e3
    print(
        json.dumps(
            {
                "figure": "one step, 58 layers x 144 ranks",
                "median_ms": median_ms,
                "best_ms": min(steps) * 1e3,
                "swap_us": float(np.median(swaps)) * 1e6,
                "compile_s": compile_s,
                "target_ms": TARGET_MS,
                "reached": median_ms <= TARGET_MS,
            }
        )
    )


if __name__ == "__main__":
    main()
