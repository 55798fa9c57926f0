"""Notes in the terminal: short, grouped, none lost."""

from __future__ import annotations

from moeplan.artifacts.profile import load_profile
from moeplan.costs.coverage import coverage_gaps
from moeplan.reports.run_words import brief_notes
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.workload import Objective, Workload


def test_what_a_profile_lacks_is_one_short_line_per_table() -> None:
    model, cluster, profile = find_model("deepseek-v2-lite"), cluster_for("a100-sxm", 2, 4), load_profile("a100-sxm")
    gaps = [
        gap
        for phase in ("prefill", "decode")
        for gap in coverage_gaps(model, cluster, Workload(phase=phase), Objective(), profile)
    ]
    notes = [f"scaled or modelled: {gap}" for gap in dict.fromkeys(gaps)]
    assert len(notes) == 2
    assert max(map(len, notes)) > 250
    assert brief_notes(["first", *notes, "last"]) == [
        "first",
        "last",
        "scaled or modelled: experts (profile a100-sxm has no inter=1408)",
        "scaled or modelled: alltoall (profile a100-sxm has no such table)",
        "commands that measure these are in the notes of --json and of the page",
    ]


def test_what_is_extrapolated_is_one_line_and_other_notes_stay() -> None:
    beyond = "extrapolated beyond measurements: "
    notes = [f"{beyond}exchange", "scaled or modelled: by hand", f"{beyond}experts"]
    assert brief_notes(notes) == ["scaled or modelled: by hand", f"{beyond}exchange, experts"]
