"""Pictures of validations: what they say, and that they stand alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from click.testing import CliRunner

from moeplan.cli.validate import command
from moeplan.pipeline.validation_plot import plot_validation


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


def test_another_picture_format_is_refused_before_the_work() -> None:
    result = CliRunner().invoke(command, ["queues", "--plot", "figures.png"])
    assert result.exit_code == 2
    assert "figures.png must end in .svg" in result.output
