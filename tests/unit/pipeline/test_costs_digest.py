"""Which runs are off by the same errors of their costs: those whose digest of them is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeplan.pipeline.serving import serving_costs_sha256
from moeplan.pipeline.training import training_costs_sha256
from moeplan.specs.scenario import Scenario

DEMO = str(Path(__file__).resolve().parents[3] / "moeplan" / "data" / "demo_trace.npz")
REQUESTS = {"arrivals": "poisson", "rate": "30 /s", "count": 40, "input_tokens": 200, "output_tokens": 20}
SERVED = {"model": "deepseek-v2-lite", "cluster": "h100", "ranks": 8, "serving": {"requests": REQUESTS}}
TRAINED = {
    "model": "deepseek-v2-lite", "cluster": "h100", "ranks": 8,
    "training": {"sequence": 4096, "micro_batch": 1, "global_batch": 16},
}  # fmt: skip


def served(serving: dict[str, Any] | None = None, **fields: Any) -> str:
    given = SERVED | fields | {"serving": SERVED["serving"] | (serving or {})}  # type: ignore[operator]
    return serving_costs_sha256(Scenario.parse(given, "test"))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 5},
        {"trace": DEMO},
        {"serving": {"requests": REQUESTS | {"rate": "3 /s"}}},
        {"serving": {"slo": {"ttft": "1 s"}}},
        {"serving": {"engine": {"max_num_seqs": 8}}},
    ],
)
def test_what_is_asked_of_costs_does_not_change_them(other: dict[str, Any]) -> None:
    assert served(**other) == served()


@pytest.mark.parametrize(
    "other",
    [
        {"model": "olmoe-1b-7b"},
        {"cluster": "h200"},
        {"nodes": 2},
        {"profile": "none"},
        {"fidelity": "detailed"},
        {"workload": {"weight_dtype": "fp8"}},
        {"objective": {"dispatch": "allgather"}},
        {"serving": {"engine": {"tp": 2}}},
        {"serving": {"engine": {"pp": 2}}},
        {"serving": {"engine": {"overlap": "two_batch"}}},
    ],
)
def test_other_costs_have_another_digest(other: dict[str, Any]) -> None:
    assert served(**other) != served()


def test_of_training_what_it_runs_on_counts_too() -> None:
    def digest(training: dict[str, Any] | None = None, **fields: Any) -> str:
        given = TRAINED | fields | {"training": TRAINED["training"] | (training or {})}  # type: ignore[operator]
        return training_costs_sha256(Scenario.parse(given, "test"))

    assert digest(trace=DEMO) == digest()
    others = [digest({"micro_batch": 2}), digest({"pp": 2}), digest(cluster="h200"), digest(profile="none")]
    assert len({digest(), *others}) == 1 + len(others)
