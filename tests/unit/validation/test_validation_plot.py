"""Pictures of validations: what they say, and that they stand alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from moeplan.cli.validate import command
from moeplan.errors import InputError
from moeplan.validation import plots
from moeplan.validation.plots import plot_validation


def test_rows_and_figures_are_drawn(tmp_path: Path) -> None:
    rows = [
        {"section": "serving", "measured": 1.0, "error": error, "within": abs(error) <= 0.15}
        for error in (-0.4, 0.1, 0.14, 0.9)
    ]
    rows += [{"section": "serving", "measured": 2.0, "error": None, "within": False},
             {"section": "memory", "measured": 2.0, "error": 0.0, "within": None}]  # fmt: skip
    figures = [{"figure": "share", "value": 0.5, "target": 0.7, "reached": False},
               {"figure": "wait", "value": 0.0, "target": 0.01, "reached": True},
               {"figure": "exact", "value": 0.0, "target": 0.0, "reached": True},
               {"figure": "kernels", "median": 0.01, "p90": 0.2, "target": {"median": 0.02, "p90": 0.1, "better": True},
                "reached": False}]  # fmt: skip
    plot_validation({"rows": rows, "figures": figures}, "Rows", tmp_path / "rows.svg")
    root = ET.parse(tmp_path / "rows.svg").getroot()
    assert root.attrib["aria-label"] == "Rows: 2 of 4 predicted rows within 15%."
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    plot_validation({"figures": figures}, "Figures", tmp_path / "figures.svg")
    text = (tmp_path / "figures.svg").read_text(encoding="utf-8")
    assert "Figures: 2 of 4 figures reached." in text
    assert "--after:" in text  # its own colours


def test_measured_rows_are_drawn_by_part_and_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows: two of (b), one of (c), one tuned on, one nobody measured; one without a first token."""
    rows = [SimpleNamespace(id=f"r{n}", backend="xyx"[n], tpot_ms=10.0, ttft_ms=1000.0) for n in range(3)]
    tuned = SimpleNamespace(id="t", backend="x", tpot_ms=10.0, ttft_ms=1000.0)
    monkeypatch.setattr(plots, "measured_rows", lambda: [*rows, tuned])
    lines = ["id,split,predicted_ttft_ms,predicted_tpot_ms", "r0,b,1100,12", "r1,b,,10.5", "r2,c,700,10", "t,a,1000,1",
             "gone,b,1,1"]  # fmt: skip
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    plots.plot_silicon(tmp_path / "rows.csv", tmp_path / "rows.svg")
    root = ET.parse(tmp_path / "rows.svg").getroot()
    label = root.attrib["aria-label"]
    for words in (
        "(b) TPOT: 2 rows, median error 12.5%, 50% within 15%",
        "(b) TTFT: 1 rows, median error 10.0%, 100% within 15%",
        "(c) TPOT: 1 rows, median error 0.0%, 100% within 15%",
        "(c) TTFT: 1 rows, median error 30.0%, 0% within 15%",
    ):
        assert words in label
    (tmp_path / "other.csv").write_text("id,split\nr0,a\n")
    with pytest.raises(InputError, match="holds no predictions"):
        plots.plot_silicon(tmp_path / "other.csv", tmp_path / "other.svg")


def test_another_picture_format_is_refused_before_the_work() -> None:
    result = CliRunner().invoke(command, ["queues", "--plot", "figures.png"])
    assert result.exit_code == 2
    assert "figures.png must end in .svg" in result.output
