"""Choose the constants of ``moeplan.costs.served`` on the calibration rows (a) of the measured served latencies.

    python benchmarks/fit_silicon.py [--rounds N]

Coordinate search from the constants in the code: each is tried at a few steps up and down, and kept where the mean of
min(|log(predicted / measured)|, 0.7) falls, per token and, with weight 0.3, to the first token. Rows of (b) and (c)
are not read beyond their split. Prints what it finds; nothing is written.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from moeplan.costs.served import CALIBRATED, Constants
from moeplan.validation.silicon import SiliconModel, measured_rows
from moeplan.validation.silicon_rows import Measured

_MAPS = (
    "prefill_factor",
    "late_prefill_factor",
    "launch_s",
    "fp8_prompt_s",
    "layer_gap_s",
    "early_latent_gap_s",
    "first_steps",
    "first_tokens",
    "rank_s",
    "draft_host_s",
)
_SCALARS = ("linear_gap_s", "late_linear_gap_s", "prompt_latency", "handover_s")
_STEPS = (0.7, 0.85, 1.2, 1.4)


def _loss(model: SiliconModel, rows: list[Measured], constants: Constants, known: dict[str, float]) -> dict[str, float]:
    """Loss of each row in ``rows``; the others keep that of ``known``."""
    model.constants = constants
    losses = dict(known)
    for row in rows:
        found = model.predict(row)
        if found.tpot_ms is None or found.ttft_ms is None:
            continue
        token = min(abs(np.log(found.tpot_ms / row.tpot_ms)), 0.7)
        first = min(abs(np.log(found.ttft_ms / row.ttft_ms)), 0.7)
        losses[row.id] = token + 0.3 * first
    return losses


def _changes(constants: Constants) -> list[tuple[str, str | None, Constants]]:
    """(what, which framework's rows it touches, constants with it changed)."""
    answer: list[tuple[str, str | None, Constants]] = []
    for name in _MAPS:
        now = getattr(constants, name)
        for backend in now:
            for step in _STEPS:
                changed = replace(constants, **{name: {**now, backend: now[backend] * step}})
                answer.append((f"{name}[{backend}] x {step}", backend, changed))
    for name in _SCALARS:
        for step in _STEPS:
            answer.append((f"{name} x {step}", None, replace(constants, **{name: getattr(constants, name) * step})))
    for step in (0.97, 1.03):
        answer.append((f"acceptance x {step}", None, replace(constants, acceptance=constants.acceptance * step)))
    return answer


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    rows, seen = [], set()
    for row in sorted(measured_rows(), key=lambda one: one.system):
        same = (row.group, row.mode, row.isl, row.osl, row.concurrency, row.decode, row.tpot_ms)
        if row.part == "a" and not row.why_not and same not in seen:
            seen.add(same)
            rows.append(row)
    model = SiliconModel(CALIBRATED)
    best = CALIBRATED
    losses = _loss(model, rows, best, {})
    print(f"{len(rows)} rows, loss {np.mean(list(losses.values())):.4f}", flush=True)
    for _ in range(rounds):
        for number in range(len(_changes(best))):
            what, backend, changed = _changes(best)[number]
            touched = [row for row in rows if backend in (None, row.backend)]
            if what.startswith(("acceptance", "draft")):
                touched = [row for row in touched if row.draft_tokens]
            if what.startswith(("linear", "late_linear")):
                touched = [row for row in touched if row.group.startswith("Qwen3.5")]
            if what.startswith("handover"):
                touched = [row for row in touched if row.prefill is not None]
            tried = _loss(model, touched, changed, losses)
            if np.mean(list(tried.values())) < np.mean(list(losses.values())) - 1e-5:
                best, losses = changed, tried
                print(f"{what}: loss {np.mean(list(losses.values())):.4f}", flush=True)
    print(best)


if __name__ == "__main__":
    main()
