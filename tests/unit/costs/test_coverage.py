"""What a profile lacks for a model is named, with the command that measures it."""

from __future__ import annotations

import re
import shlex

import click
import pytest

from moeplan.artifacts.profile import HardwareProfile, ProfileMeta, load_profile
from moeplan.artifacts.profile_tables import TABLES, measure_command
from moeplan.cli.profile import command as profile_command
from moeplan.costs.coverage import backend_gaps, coverage_gaps
from moeplan.costs.technique import Technique
from moeplan.pipeline.profile_request import ProfileRequest, profile_request
from moeplan.profiling.device import Device
from moeplan.specs.clusters import cluster_for
from moeplan.specs.model import Dtype
from moeplan.specs.models import find_model
from moeplan.specs.workload import Objective, Workload


def test_a_covered_model_has_no_gaps() -> None:
    work = Workload(weight_dtype="fp8", phase="decode")
    cluster = cluster_for("h100", 4, 8)
    asked = work, Objective(dispatch="per_expert"), load_profile("h100-sxm"), Technique()
    assert coverage_gaps(find_model("deepseek-v3"), cluster, *asked) == ()


def test_gaps_name_region_and_command() -> None:
    cluster = cluster_for("b200", 4, 8)
    wanted = Workload(), Objective(), load_profile("b200-sxm"), Technique()
    found = coverage_gaps(find_model("olmoe-1b-7b"), cluster, *wanted)
    assert [text.split(" at ")[0] for text in found] == [
        "profile b200-sxm does not cover experts",
        "profile b200-sxm does not cover alltoall",
    ]
    assert "inter=1024 is not there" in found[0]
    assert "moeplan profile experts --hidden 2048 --inter 1024 --experts 64 --top-k 8 --dtype bf16" in found[0]
    assert "nodes=4 is not there (there is: 1)" in found[1]


def asked(remedy: str) -> ProfileRequest | None:
    """What the command in ``remedy`` asks for, by the real command line; None: it imports."""
    torch = pytest.importorskip("torch", reason="profilers need torch")
    words = shlex.split(re.sub(r"^.*?: (?=moeplan|torchrun)", "", remedy))
    if words[0] == "torchrun":
        at = words.index("-m")
        launch = dict(zip(words[1:at:2], words[2:at:2], strict=True))
        assert "--nproc-per-node" in launch
        assert ("--rdzv-endpoint" in launch) == (int(launch.get("--nnodes", 1)) > 1)
        assert words[at + 1] == "moeplan"
        words = ["moeplan", *words[at + 2 :]]
    assert words[:2] == ["moeplan", "profile"]
    command = profile_command.commands[words[2]]
    options = command.make_context(words[2], words[3:], parent=click.Context(profile_command)).params
    if words[2] == "import-aic":
        return None
    given = {k: v for k, v in options.items() if v is not None and k not in ("as_json", "quiet", "out", "resume")}
    request = profile_request(words[2], None, given)
    for dtype in request.dtypes:
        Device("cuda", torch, 0, (9, 0)).dtype(dtype)
    return request


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp4", "int8", "int4"])
@pytest.mark.parametrize("name", ["kimi-k2", "glm-5", "olmoe-1b-7b", "gpt-oss-120b", "qwen3-next-80b-a3b"])
def test_every_remedy_is_a_command_that_is_accepted(name: str, dtype: Dtype, nodes: int) -> None:
    model, cluster = find_model(name), cluster_for("h100", nodes, 8)
    for dispatch in ("per_expert", "per_node", "per_rank"):
        for work in (Workload(weight_dtype=dtype, phase="decode"), Workload(weight_dtype=dtype)):
            objective = Objective(dispatch=dispatch)  # type: ignore[arg-type]
            found = coverage_gaps(model, cluster, work, objective, load_profile("a100-sxm"), Technique())
            assert found
            for gap in found:
                region, _, remedy = gap.partition("; measure it: ")
                request = asked(remedy)
                assert f"--nnodes {nodes} " in remedy if "alltoall at" in region and nodes > 1 else True
                if dtype == "fp4" and "experts at" in region:
                    assert request is None
                    assert "no kernel of moeplan profile has nvfp4" in remedy
                elif "experts at" in region:
                    assert request is not None
                    assert request.dtypes == (dtype,)
                elif "kind=mla" in region:
                    assert request is not None
                    assert request.models == (name,)


def test_commands_of_bare_tables_and_formats_are_accepted() -> None:
    for table in TABLES:
        asked(measure_command(table, {}))
    for dtype in ("fp8_block", "nvfp4", "int8_wo", "w4a16_mxfp4"):
        assert asked(measure_command("gemm", {"n": 8, "k": 8, "dtype": dtype})) is None
    # An own latent-attention model has no name; its ranks cannot be given as sizes.
    own = find_model("glm-5").model_copy(update={"name": "mine"})
    wanted = Workload(), Objective(), load_profile("a100-sxm"), Technique()
    attention = coverage_gaps(own, cluster_for("b200", 1, 8), *wanted)[-1]
    assert "moeplan profile attention --model CONFIG.json --dtype bf16 --out DIR" in attention
    empty = HardwareProfile(ProfileMeta(name="p", accelerator="x", date="2026-11-30", command="none"), {})
    found = coverage_gaps(own, cluster_for("b200", 1, 8), *wanted[:2], empty, Technique(), "a b/c.json")
    for remedy in found[-2:]:
        assert "--model 'a b/c.json' --dtype bf16" in remedy
        assert asked(remedy.partition("; measure it: ")[2]).models == ("a b/c.json",)


def test_a_framework_without_rows_is_named() -> None:
    (experts,) = backend_gaps("vllm", "fp4", load_profile("a100-sxm"))
    assert "a100-sxm has no experts of it, in fp4; the roofline stands in" in experts
    assert backend_gaps("vllm", "bf16", load_profile("h100-sxm")) == ()
    assert [gap.split(" of it")[0].split()[-1] for gap in backend_gaps("own", "bf16", load_profile("h100-sxm"))] == [
        "experts", "gemm", "attention"
    ]  # fmt: skip


def test_gaps_of_a_step_are_those_of_its_types_and_its_ranks() -> None:
    own = load_profile("h100-sxm")
    model, cluster = find_model("qwen3-235b-a22b"), cluster_for("h100", 1, 8)
    wanted = Workload(weight_dtype="fp32", phase="decode"), Objective(), own
    attention, products = coverage_gaps(model, cluster, *wanted, Technique(tp=16))[-2:]
    assert "attention at kind=gqa, phase=decode, heads=4, kv_heads=1, head_dim=128, dtype=fp32" in attention
    assert "moeplan profile attention --heads 4 --kv-heads 1 --head-dim 128 --dtype fp32" in attention
    assert "moeplan profile dense --model qwen3-235b-a22b --tp 16 --dtype fp32 --out DIR" in products
    assert not any(" attention at " in gap for gap in coverage_gaps(model, cluster, *wanted))  # of a plan
