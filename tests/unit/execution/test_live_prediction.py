"""What benchmarks/live predicts from is what it calibrated: rows are known by what they send one copy per."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.errors import SpecError

FOLDER = Path(__file__).parents[3] / "benchmarks" / "live"
EVEN = Placement(np.tile(np.arange(8, dtype=np.int32), (1, 1)), np.repeat(np.arange(4, dtype=np.int32), 2), 8, 4, 2)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("torch", reason="live studies need torch")
    monkeypatch.syspath_prepend(FOLDER)
    import lab

    return lab


@pytest.mark.parametrize("dispatch", ["per_expert", "per_node"])
def test_exchanges_of_a_study_are_those_of_its_dispatch(lab, dispatch):
    import predict
    from routing import Shape, Skew

    shape = Shape("8 experts", hidden=32, inter=32, experts=8, top_k=2, layers=1)
    machine = predict.Machine(2, 2, (0, 1, 0, 1), 25e6)
    study = lab.Study(shape, (Skew(0.5),), (16,), ("joint",), (8, 16, 32), dispatch)
    running = type("Lab", (), {"job": type("Job", (), {"machine": machine}), "samples": {}})
    for b, (nodes, ranks), phase in product(study.calibrated, ((1, 2), (2, 4)), ("dispatch", "combine")):
        running.samples[phase, nodes, ranks, b] = [[10.0 * nodes * b]]
    for active, m in product((1, 2), (4, 8, 32, 128)):
        running.samples["experts", active, m] = [[1.0 * active * m]]
    for b in study.calibrated:
        running.samples["layer", b] = [[100.0 * b]]
    calibration = lab._calibration(running, study, lab.median)
    trace = predict.balanced(shape, 4, 16)
    (seconds,) = predict.predict(shape, machine, calibration, dispatch, [(trace, EVEN)], EVEN)
    assert seconds == pytest.approx(1600e-6)  # the balanced layer itself
    other = "per_node" if dispatch == "per_expert" else "per_expert"
    with pytest.raises(SpecError, match=rf"calibrated are not those of {other}: exchange inside a node: modelled"):
        predict.predict(shape, machine, calibration, other, [(trace, EVEN)], EVEN)
