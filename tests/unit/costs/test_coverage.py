"""What a profile lacks for a model is named, with the command that measures it."""

from __future__ import annotations

from moeplan.artifacts.profile import load_profile
from moeplan.costs.coverage import coverage_gaps
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model
from moeplan.specs.workload import Objective, Workload


def test_a_covered_model_has_no_gaps() -> None:
    work = Workload(weight_dtype="fp8", phase="decode")
    cluster = cluster_for("h100", 4, 8)
    objective = Objective(dispatch="per_expert")
    assert coverage_gaps(find_model("deepseek-v3"), cluster, work, objective, load_profile("h100-sxm")) == ()


def test_gaps_name_region_and_command() -> None:
    cluster = cluster_for("b200", 4, 8)
    found = coverage_gaps(find_model("olmoe-1b-7b"), cluster, Workload(), Objective(), load_profile("b200-sxm"))
    assert [text.split(" at ")[0] for text in found] == [
        "profile b200-sxm does not cover experts",
        "profile b200-sxm does not cover alltoall",
    ]
    assert "inter=1024 is not there" in found[0]
    assert "moeplan profile experts --hidden 2048 --inter 1024 --experts 64 --top-k 8 --dtype bf16" in found[0]
    assert "nodes=4 is not there (there is: 1)" in found[1]
