"""Committed scenarios give the figures that stand beside them, twice the same bytes. Run as a script to write them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scenarios" / "serve-lite"
_TOLERANCE = 1e-6  # of figures, across machines; logs of one machine are equal byte for byte

_RUN = """
import hashlib, json, sys
from pathlib import Path
from moeplan.pipeline.simulate import simulate
from moeplan.specs.scenario import Scenario
found = simulate(Scenario.from_file(Path(sys.argv[1])), seeds=1)
found.log.write(Path(sys.argv[2]))
print(json.dumps({"headlines": {k: v.value for k, v in found.result.headlines.items()}, "counts": found.result.counts}))
"""


def run(log: Path, hash_seed: str = "0") -> dict[str, Any]:
    answer = subprocess.run(
        [sys.executable, "-c", _RUN, str(FOLDER / "scenario.yaml"), str(log)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed}, cwd=ROOT,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def test_figures_and_bytes(tmp_path: Path) -> None:
    one, two = run(tmp_path / "a.parquet", "0"), run(tmp_path / "b.parquet", "12345")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert one == two
    expected = json.loads((FOLDER / "expected.json").read_text())
    for part in ("headlines", "counts"):
        assert one[part] == pytest.approx(expected[part], rel=_TOLERANCE), part


if __name__ == "__main__":
    place = FOLDER / "log.parquet"
    found = run(place)
    print(hashlib.sha256(place.read_bytes()).hexdigest())
    place.unlink()
    (FOLDER / "expected.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
