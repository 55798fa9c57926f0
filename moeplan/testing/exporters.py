"""The contract of exporter plugins: subclass :class:`ExporterContract` and give it a fixture ``exporter``::

class TestMine(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return my_package.exporter
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Plan
from moeplan.errors import ExportError, PlanError
from moeplan.exports.base import (
    ExportContext,
    Exporter,
    ImportContext,
)
from moeplan.exports.documents import read_placement_document
from moeplan.specs.model import ModelSpec
from moeplan.specs.workload import Objective, Workload

__all__ = ["ExporterContract", "plan_of", "random_plan", "tiny_model"]


def tiny_model(num_experts: int = 8, **fields: Any) -> ModelSpec:
    """Five decoder layers, of which 1, 2 and 4 are MoE."""
    sizes: dict[str, Any] = {
        "name": "tiny",
        "num_layers": 5,
        "moe_layer_ids": (1, 2, 4),
        "hidden_size": 16,
        "num_experts": num_experts,
        "top_k": 2,
        "expert_intermediate_size": 8,
        "vocab_size": 32,
    }
    return ModelSpec(**(sizes | fields))


def plan_of(
    map_LP: Any, model: ModelSpec, num_ranks: int, rank_of_slot: tuple[int, ...] | None = None, **fields: Any
) -> Plan:
    """A plan around a map [L, P]; equal ranks unless ``rank_of_slot`` says otherwise."""
    rows = np.asarray(map_LP, dtype=np.int32)
    slots = rows.shape[1]
    ranks = (
        np.repeat(np.arange(num_ranks), slots // num_ranks)
        if rank_of_slot is None
        else np.asarray(rank_of_slot)
    )
    placement = Placement(rows, ranks.astype(np.int32), model.num_experts, num_ranks, num_ranks)
    document: dict[str, Any] = {
        "model": model.name,
        "planner": "by hand",
        "status": "feasible",
        "seed": 0,
        "num_experts": model.num_experts,
        "num_ranks": num_ranks,
        "ranks_per_node": num_ranks,
        "num_redundant_experts": slots - model.num_experts,
        "layer_ids": list(model.moe_layer_ids),
        "physical_to_logical_map": rows.tolist(),
        "rank_of_slot": ranks.tolist(),
        "replicas": placement.replicas_LE.tolist(),
        "objective": Objective().model_dump(),
        "workload": Workload().model_dump(),
    }
    return Plan.parse(document | fields, "plan")


def random_plan(rng: np.random.Generator, model: ModelSpec, num_ranks: int, num_redundant: int = 0) -> Plan:
    """Random experts in equal slots, no expert twice on a rank."""
    slots = model.num_experts + num_redundant
    width = slots // num_ranks
    rows = []
    for _ in model.moe_layer_ids:
        copies_E = np.ones(model.num_experts, dtype=int)
        for _ in range(num_redundant):
            copies_E[rng.choice(np.nonzero(copies_E < num_ranks)[0])] += 1
        held: list[list[int]] = [[] for _ in range(num_ranks)]
        # most copies first, onto the emptiest ranks: there is always a rank left that lacks the expert
        for expert in np.lexsort((rng.random(model.num_experts), -copies_E)):
            order = np.lexsort((rng.random(num_ranks), np.array([len(experts) for experts in held])))
            for rank in order[: copies_E[expert]]:
                held[rank].append(int(expert))
        assert all(len(experts) == width for experts in held)
        rows.append([expert for experts in held for expert in rng.permutation(experts)])
    return plan_of(rows, model, num_ranks)


class ExporterContract:
    """What every exporter must do; ``redundant`` says whether the target holds copies of experts."""

    model = tiny_model()
    context = ExportContext(model=model, num_layers=None, num_groups=None)
    ranks = 4
    reading = ImportContext(model=model, num_ranks=ranks, ranks_per_node=ranks)

    def _plans(self, exporter: Exporter) -> list[Plan]:
        rng = np.random.default_rng(7)
        plans = [random_plan(rng, self.model, self.ranks, redundant) for redundant in (0, 0, 4, 8)]
        return [plan for plan in plans if not exporter.refusals(plan, self.context)]

    def _context(self, exporter: Exporter) -> ExportContext:
        named = "model_class" in exporter.options
        return ExportContext(model=self.model, model_class="TinyForCausalLM" if named else None)

    def test_it_says_what_it_is(self, exporter: Exporter) -> None:
        """A name, a one-line description, the endings of its files."""
        assert isinstance(exporter, Exporter)
        assert exporter.name
        assert exporter.description
        assert "\n" not in exporter.description
        assert all(suffix.startswith(".") for suffix in exporter.suffixes)
        assert exporter.suffixes

    def test_what_goes_out_comes_back(self, exporter: Exporter, tmp_path: Path) -> None:
        """Export, recognise, import: the same slots on the same ranks of the same layers."""
        plans = self._plans(exporter)
        assert plans, "the exporter refuses every plan, even one without copies"
        for plan in plans:
            for suffix in exporter.suffixes:
                out = tmp_path / f"placement{suffix}"
                assert exporter.export(plan, out, self._context(exporter)) == [out]
                document = read_placement_document(out)
                assert exporter.recognises(document)
                found = exporter.load(document, str(out), self.reading)
                assert found.layer_ids == plan.layer_ids
                assert np.array_equal(
                    found.placement.physical_to_logical_LP, plan.placement.physical_to_logical_LP
                )
                assert np.array_equal(found.placement.rank_of_slot_P, plan.placement.rank_of_slot_P)

    def test_same_plan_same_bytes(self, exporter: Exporter, tmp_path: Path) -> None:
        """No timestamp and no path in the file; nothing is left beside it."""
        plan = self._plans(exporter)[0]
        for suffix in exporter.suffixes:
            outs = [tmp_path / folder / f"placement{suffix}" for folder in ("one", "two")]
            for out in outs:
                exporter.export(plan, out, self._context(exporter))
                assert sorted(path.name for path in out.parent.iterdir() if path.suffix == suffix) == [
                    out.name
                ]
                assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
            assert outs[0].read_bytes() == outs[1].read_bytes()

    def test_what_no_engine_expresses_is_refused(self, exporter: Exporter, tmp_path: Path) -> None:
        """Unequal ranks, empty slots and weighted shares: refused with a reason, and nothing is written."""
        rows = [list(range(8))] * 3
        unequal = plan_of(rows, self.model, 4, rank_of_slot=(0, 0, 0, 1, 1, 2, 2, 3))
        empty = plan_of([[*row[:7], -1, row[7], -1, -1, -1] for row in rows], self.model, 4)
        copies = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]] * 3
        weighted = plan_of(
            copies, self.model, 4, share=[[0.9, 0.5, 0.5, 0.5, 1, 1, 1, 1, 0.1, 0.5, 0.5, 0.5]] * 3
        )
        for plan in (unequal, empty, weighted):
            out = tmp_path / f"placement{exporter.suffixes[0]}"
            reasons = exporter.refusals(plan, self._context(exporter))
            assert reasons
            with pytest.raises(ExportError, match=re.escape(reasons[0])):
                exporter.export(plan, out, self._context(exporter))
            assert not out.exists()

    def test_foreign_documents_are_not_taken_for_its_own(self, exporter: Exporter) -> None:
        """Recognising never fails; loading answers with PlanError."""
        foreign: list[Any] = [
            None,
            3,
            "text",
            [],
            {},
            [[0, 1]],
            {"a": 1},
            np.zeros(3),
            {"python": {}},
            [1, 2, 3],
        ]
        for document in foreign:
            assert not exporter.recognises(document)
            self._refuses(exporter, document, self.reading)

    def test_a_file_of_another_model_or_size_is_refused(self, exporter: Exporter, tmp_path: Path) -> None:
        """More layers, fewer experts, or a number of ranks that the slots do not divide over."""
        plan = self._plans(exporter)[0]
        deeper = tiny_model(num_layers=9, moe_layer_ids=(5, 6, 7, 8))
        for suffix in exporter.suffixes:
            out = tmp_path / f"placement{suffix}"
            exporter.export(plan, out, self._context(exporter))
            document = read_placement_document(out)
            self._refuses(exporter, document, ImportContext(deeper, self.ranks, self.ranks))
            self._refuses(exporter, document, ImportContext(tiny_model(6), self.ranks, self.ranks))
            self._refuses(exporter, document, ImportContext(self.model, 3, 3))

    def _refuses(self, exporter: Exporter, document: Any, reading: ImportContext) -> None:
        with pytest.raises(PlanError, match="file"):
            exporter.load(document, "file", reading)
