from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeplan.exports.base import Exporter
from moeplan.exports.documents import read_placement_document
from moeplan.registry import load_plugin, plugin_names
from moeplan.testing.exporters import ExporterContract, random_plan

NAMES = plugin_names("exporters")


class TestRegistered(ExporterContract):
    @pytest.fixture(params=NAMES)
    def exporter(self, request: pytest.FixtureRequest) -> Exporter:
        exporter: Exporter = load_plugin("exporters", request.param)
        assert exporter.name == request.param
        if {".pt", ".pth"} & set(exporter.suffixes):
            pytest.importorskip("torch", reason="placements in .pt files need torch")
        return exporter

    def test_no_other_format_recognises_its_files(self, exporter, tmp_path):
        plan = random_plan(np.random.default_rng(1), self.model, self.ranks)
        for suffix in exporter.suffixes:
            out = tmp_path / f"placement{suffix}"
            exporter.export(plan, out, self._context(exporter))
            document = read_placement_document(out)
            assert [name for name in NAMES if load_plugin("exporters", name).recognises(document)] == [
                exporter.name
            ]


def test_the_built_in_formats_are_registered():
    assert {"sglang", "trtllm", "vllm", "vllm-ascend", "eplb", "megatron", "deepspeed"} <= set(NAMES)


def test_every_format_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "exporters.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in page] == []
