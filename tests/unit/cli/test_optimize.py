"""What scripts rely on: one JSON object, whole directories, one line and exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeplan.artifacts.plan import Plan
from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.cli import main

CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "torch_dtype": "bfloat16",
}  # fmt: skip


def experts(tokens=1200, layers=3, count=8, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    block = (np.arange(count) % 2 == rng.integers(2, size=tokens)[:, None])[:, None]
    score = rng.normal(0, 0.6, (layers, count)) + rng.gumbel(size=(tokens, layers, count)) + 3 * block
    return np.argsort(-score, axis=2)[:, :, :2].astype(np.int16)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with a model, a trace and nothing else."""
    monkeypatch.chdir(tmp_path)
    Path("model.json").write_text(json.dumps(CONFIG))
    np.savez("trace.npz", experts=experts(), num_experts=8)
    return tmp_path


@pytest.fixture
def run(place, capsys, monkeypatch):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["moeplan", *map(str, words)])
        with pytest.raises(SystemExit, match=r"^\d+$") as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


BASE = ("optimize", "--model", "model.json", "--trace", "trace.npz", "--ranks", 4, "--nodes", 2)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_scenario_without_a_trace_is_refused(run, place):
    Path("scenario.yaml").write_text("model: model.json\nranks: 4\n")
    code, out, err = run("optimize", "scenario.yaml", "--out", "plan")
    assert (code, out) == (2, "")
    assert "give --trace, or a scenario file that names it" in err
    assert not Path("plan").exists()


def test_json_is_one_object_and_the_directory_is_the_plan(run, place):
    code, out, err = run(*BASE, "--out", "plan", "--json", "--quiet")
    assert (code, err) == (0, "")
    found = json.loads(out)
    plan = Plan.load(place / "plan" / "plan.json")
    assert found["sha256"] == plan.sha256
    assert {k: v for k, v in found.items() if k not in ("sha256", "written")} == plan.model_dump(mode="json")
    assert found["written"] == ["plan/plan.json", "plan/plan.html"]
    assert sorted(files(place / "plan")) == ["plan.html", "plan.json"]
    assert (plan.num_ranks, plan.ranks_per_node, plan.layer_ids, plan.num_redundant_experts) == (4, 2, (0, 1, 2), 0)
    assert plan.rank_of_slot == (0, 0, 1, 1, 2, 2, 3, 3)
    assert (plan.objective.return_mode, plan.objective.dispatch, plan.workload.phase) == (
        "return_home", "per_node", "prefill",
    )  # fmt: skip
    assert plan.status == "optimal"
    assert plan.bounds[0].gap == 0
    assert plan.prediction is not None
    assert plan.prediction.baseline == "contiguous"
    assert plan.prediction.time_s <= plan.prediction.baseline_time_s
    assert plan.verdict is not None
    assert "second half" in plan.verdict.held_out


def test_messages_go_to_standard_error_and_quiet_silences_them(run):
    code, out, err = run(*BASE, "--out", "plan", "--json")
    assert code == 0
    json.loads(out)
    assert "wrote plan/plan.json" in err
    assert run(*BASE, "--out", "plan", "--quiet") == (0, "", "")
    code, out, err = run(*BASE, "--out", "plan")
    assert code == 0
    assert "rank" in out


def test_a_scenario_file_does_what_options_do(run, place):
    run(*BASE, "--out", "a", "--redundant", 4, "--seed", 3, "--planner", "greedy", "--batch-per-rank", 64, "--quiet")
    Path("scenario.yaml").write_text(
        "model: model.json\ntrace: trace.npz\nranks: 4\nnodes: 2\nredundant: 4\nseed: 3\nplanner: greedy\n"
        "workload:\n  batch_per_rank: 64\nout: b\n"
    )
    assert run("optimize", "scenario.yaml", "--quiet")[0] == 0
    assert files(place / "a") == files(place / "b")
    # options win
    run("optimize", "scenario.yaml", "--seed", 4, "--out", "c", "--quiet")
    assert Plan.load(place / "c" / "plan.json").seed == 4


def test_an_older_plan_is_replaced_and_other_files_never(run, place, monkeypatch):
    run(*BASE, "--out", "plan", "--quiet", "--planner", "contiguous")
    (place / "plan" / "notes.txt").write_text("mine")
    assert run(*BASE, "--out", "plan", "--quiet", "--planner", "greedy")[0] == 0
    assert sorted(files(place / "plan")) == ["notes.txt", "plan.html", "plan.json"]
    assert Plan.load(place / "plan" / "plan.json").planner == "greedy"
    foreign = place / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with monkeypatch.context() as patch:  # refused before anything is planned
        patch.setattr("moeplan.pipeline.optimize.optimize", lambda *_a, **_k: pytest.fail("planned"))
        code, _, err = run(*BASE, "--out", "foreign", "--quiet")
    assert code == 2
    assert "does not hold a plan" in err
    assert files(foreign) == {"thesis.txt": b"mine"}
    (place / "file").write_text("x")
    assert run(*BASE, "--out", "file", "--quiet")[0] == 2
    (place / "empty").mkdir()
    assert run(*BASE, "--out", "empty", "--quiet", "--planner", "greedy")[0] == 0


def save_counts(layers_experts: object) -> None:
    Path("counts.json").write_text(json.dumps(layers_experts))


def bombs() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(8)]
    Path("bomb.yaml").write_text("\n".join(lines) + "\n")

    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path("exploded"),)

    Path("bomb.pt").write_bytes(pickle.dumps(Bomb()))
    np.savez("bomb.npz", experts=np.array([Bomb()], dtype=object), num_experts=8)


COUNTS = ("--trace", "counts.json", "--out", "o")


def good_counts() -> list[list[float]]:
    return [[5.0, 4, 3, 2, 1, 2, 3, 4] for _ in range(3)]


def with_entry(value: float) -> list[list[float]]:
    counts = good_counts()
    counts[1][2] = value
    return counts


BAD = {
    "unknown planner": (lambda: None, (*BASE, "--planner", "greddy", "--out", "o"), "did you mean 'greedy'"),
    "unknown model": (
        lambda: None,
        ("optimize", "--model", "deepsek-v2-lite", "--trace", "trace.npz", "--ranks", 4, "--out", "o"),
        "did you mean 'deepseek-v2-lite'",
    ),
    "unknown cluster": (lambda: None, (*BASE, "--cluster", "h100-sxn", "--out", "o"), "did you mean 'h100-sxm"),
    "unknown target": (lambda: None, (*BASE, "--target", "sglng", "--out", "o"), "did you mean 'sglang'"),
    "no such trace": (lambda: None, (*BASE, "--trace", "nothing.npz", "--out", "o"), "nothing.npz"),
    "another model's trace": (
        lambda: np.savez("t.npz", experts=experts(count=16), num_experts=16),
        (*BASE, "--trace", "t.npz", "--out", "o"), "16",
    ),
    "layers missing": (
        lambda: np.savez("t.npz", experts=experts(layers=2), num_experts=8),
        (*BASE, "--trace", "t.npz", "--out", "o"), "2",
    ),
    "id out of range": (
        lambda: np.savez("t.npz", experts=np.where(experts() == 7, 8, experts()), num_experts=8),
        (*BASE, "--trace", "t.npz", "--out", "o"), "outside 0..7",
    ),
    "no tokens": (
        lambda: np.savez("t.npz", experts=experts()[:0], num_experts=8), (*BASE, "--trace", "t.npz", "--out", "o"),
        "empty",
    ),
    "NaN": (lambda: save_counts(with_entry(float("nan"))), (*BASE, *COUNTS), "not finite|NaN|number"),
    "negative": (lambda: save_counts(with_entry(-1.0)), (*BASE, *COUNTS), "negative"),
    "ragged": (lambda: save_counts([*good_counts()[:2], [1.0]]), (*BASE, *COUNTS), "counts"),
    "no counts": (lambda: save_counts([]), (*BASE, *COUNTS), "empty|shape|counts"),
    "truncated": (
        lambda: Path("t.npz").write_bytes(Path("trace.npz").read_bytes()[:900]),
        (*BASE, "--trace", "t.npz", "--out", "o"), "t.npz",
    ),
    "pickle in npz": (bombs, (*BASE, "--trace", "bomb.npz", "--out", "o"), "bomb.npz"),
    "pickle in pt": (bombs, (*BASE, "--trace", "bomb.pt", "--out", "o"), "bomb.pt"),
    "alias bomb": (bombs, ("optimize", "bomb.yaml", "--out", "o"), "aliases"),
    "fewer slots than experts": (
        lambda: Path("cluster.yaml").write_text(
            "name: few\naccelerator: h100-sxm\nnum_nodes: 1\nranks_per_node: 4\nranks:\n"
            + "".join(f"  {r}:\n    slots: 1\n" for r in range(4))
        ),
        ("optimize", "--model", "model.json", "--trace", "trace.npz", "--cluster", "cluster.yaml", "--out", "o"),
        r"4.*8|8.*4",
    ),
    "ranks not of the nodes": (
        lambda: None, (*BASE[:-1], 3, "--out", "o"), "multiple",
    ),
    "unwritable": (
        lambda: Path("wall").write_text("x"), (*BASE, "--planner", "contiguous", "--out", "wall/o"), "cannot write",
    ),
    "windows of nothing": (lambda: None, (*BASE, "--windows", "domain", "--out", "o"), "need a trace with domains"),
    "bad unit": (lambda: None, (*BASE, "--max-imbalance", "lots", "--out", "o"), "max_imbalance"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(run, place, case):
    make, words, message = BAD[case]
    make()
    before = sorted(str(p) for p in place.rglob("*"))
    code, out, err = run(*words, "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert sorted(str(p) for p in place.rglob("*")) == before


def test_missing_options_are_a_matter_of_usage(run):
    for words, hint in (
        (("optimize",), "--model"),
        (("optimize", "--model", "model.json"), "--trace"),
        (("optimize", "--model", "model.json", "--trace", "trace.npz"), "--ranks"),
        (BASE, "--out"),
        ((*BASE, "--redundant", "many", "--out", "o"), "many"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert hint in err


def test_a_model_larger_than_memory_says_by_how_much(run, place):
    big = {**CONFIG, "hidden_size": 16384, "intermediate_size": 524288}
    Path("model.json").write_text(json.dumps(big))
    code, out, err = run(*BASE, "--out", "o")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "GiB" in err
    assert not (place / "o").exists()


@pytest.mark.parametrize("target", ["sglang", "trtllm"])
def test_a_plan_and_its_exported_file_score_alike(run, place, target):
    run(*BASE, "--redundant", 4, "--planner", "greedy", "--target", target, "--out", "plan", "--quiet")
    name = "map.json" if target == "sglang" else "map.yaml"
    assert (
        run("export", "plan/plan.json", "--format", target, "--out", name, "--model", "model.json", "--quiet")[0] == 0
    )
    own = run(
        "evaluate", "--plan", "plan/plan.json", "--trace", "trace.npz", "--model", "model.json", "--json", "--quiet"
    )
    foreign = run(
        "evaluate", "--plan", name, "--trace", "trace.npz", "--model", "model.json", "--ranks", 4, "--nodes", 2,
        "--json", "--quiet",
    )  # fmt: skip
    assert (own[0], own[2]) == (foreign[0], foreign[2]) == (0, "")
    ours, theirs = json.loads(own[1]), json.loads(foreign[1])
    assert (ours.pop("format"), theirs.pop("format")) == ("plan", target)
    assert [ours.pop("model"), theirs.pop("model")]
    ours.pop("messages"), theirs.pop("messages")
    assert ours == theirs
    plan = Plan.load(place / "plan" / "plan.json")
    assert plan.prediction is not None
    assert ours["time_s"] == pytest.approx(plan.prediction.time_s)
    assert ours["layers"] == [row.model_dump(mode="json") for row in plan.evaluation]


def test_evaluate_prints_a_table_and_names_what_it_lacks(run):
    run(*BASE, "--planner", "greedy", "--out", "plan", "--quiet")
    code, out, _ = run("evaluate", "--plan", "plan", "--trace", "trace.npz", "--model", "model.json")
    assert code == 0
    assert "max/mean load" in out
    assert "stays in node" not in out  # tokens go home: where their next experts are does not count
    assert out.splitlines()[-1].strip()
    stay = run("evaluate", "--plan", "plan", "--trace", "trace.npz", "--model", "model.json", "--return-mode", "stay")
    assert "stays in node" in stay[1]
    for plan in ("model.json", "plan"):  # no plan at all; a plan of a model that is not built in
        code, out, err = run("evaluate", "--plan", plan, "--trace", "trace.npz")
        assert (code, out) == (2, "")
        assert "give --model" in err
    for batch in (0, -3):
        words = ("--plan", "plan", "--trace", "trace.npz", "--model", "model.json", "--batch-per-rank", batch)
        assert run("evaluate", *words) == (2, "", f"error: options: batch_per_rank ({batch}): must be greater than 0\n")


def test_evaluate_sets_placements_side_by_side(run, place):
    run(*BASE, "--redundant", 4, "--planner", "greedy", "--out", "plan", "--quiet")
    run(*BASE, "--redundant", 4, "--planner", "contiguous", "--target", "sglang", "--out", "plain", "--quiet")
    words = ("--trace", "trace.npz", "--model", "model.json")
    several = ("evaluate", "--plan", "plan", "--plan", "plain", "--plan", "contiguous", "--plan", "greedy", *words)
    code, out, _ = run(*several, "--json")
    assert code == 0
    greedy, plain, contiguous, again = json.loads(out)
    assert [row["plan"] for row in (greedy, plain, contiguous, again)] == ["plan", "plain", "contiguous", "greedy"]
    alone = json.loads(run("evaluate", "--plan", "plan", *words, "--json")[1])
    assert {name: greedy[name] for name in alone} == alone
    assert greedy["layers"] == again["layers"]  # planned anew, in the same slots
    assert plain["layers"] == contiguous["layers"]  # under the first's conditions, not those of its own target
    assert contiguous["time_s"] != greedy["time_s"]
    part = contiguous["time_s"] / greedy["time_s"] - 1
    assert contiguous["change_from_first"]["time_s"] == pytest.approx(part)
    table = run(*several)[1]
    assert f"{100 * part:+.1f} %" in table
    assert all(f"\n{name} " in table for name in ("plan", "plain", "contiguous", "greedy"))


def test_evaluate_says_what_cannot_stand_side_by_side(run, place):
    words = ("--trace", "trace.npz", "--model", "model.json")
    run(*BASE, "--planner", "contiguous", "--out", "plan", "--quiet")
    run(*BASE, "--planner", "contiguous", "--nodes", 1, "--out", "one", "--quiet")
    code, _, err = run("evaluate", "--plan", "plan", "--plan", "one", *words)
    assert (code, "one/plan.json is of 4 ranks, 4 a node, plan/plan.json of 4, 2 a node" in err) == (2, True)
    code, _, err = run("evaluate", "--plan", "greedy", *words)
    assert (code, err) == (
        2, "error: --plan (greedy) names planners alone; give a plan or a file too, whose slots they fill\n"
    )  # fmt: skip
    for name, meant in (("greddy", "greedy"), ("eplb", "greedy")):
        code, _, err = run("evaluate", "--plan", "plan", "--plan", name, *words)
        assert code == 2
        assert f"--plan ({name}) is no file or directory, and planner '{name}' is not known" in err
        assert f"did you mean '{meant}'? choose one of: contiguous, " in err
    code, _, err = run("evaluate", "--plan", "plan", "--plan", "missing.json", *words)
    assert (code, "missing.json" in err, "planner" in err) == (2, True, False)


def test_evaluate_takes_the_plans_cluster_and_says_where_it_cannot(run, place):
    slow = "{accelerator: a100-sxm, num_nodes: 2, ranks_per_node: 2, ranks: {3: {speed: 0.7}}}"
    (place / "own.yaml").write_text(slow)
    words = ("--trace", "trace.npz", "--model", "model.json", "--json")
    for cluster, told in (("a100-sxm", ""), ("own.yaml", "not of the cluster that the plan was made for")):
        run(*BASE, "--planner", "greedy", "--cluster", cluster, "--out", "plan", "--quiet")
        code, out, err = run("evaluate", "--plan", "plan", *words)
        assert (code, told in err, "costs are" in err) == (0, True, bool(told))
        score, plan = json.loads(out), Plan.load(place / "plan" / "plan.json")
        assert (score["time_s"] == pytest.approx(plan.prediction.time_s)) == (not told)
    assert "costs are" not in run("evaluate", "--plan", "plan", *words, "--cluster", "own.yaml")[2]


def test_evaluate_is_told_how_tokens_are_sent(run, place):
    run(*BASE, "--planner", "greedy", "--redundant", 4, "--out", "plan", "--quiet")
    words = ("--trace", "trace.npz", "--model", "model.json", "--json")
    run("export", "plan/plan.json", "--format", "sglang", "--out", "map.json", "--model", "model.json", "--quiet")
    engine = run("evaluate", "--plan", "map.json", "--ranks", 4, "--nodes", 2, *words)
    assert "the file names no cluster" in engine[2]
    assert json.loads(engine[1])["objective"]["replica_split"] == "nearest"
    asked = ("--split", "nearest", "--dispatch", "per_rank", "--return-mode", "stay")
    objective = json.loads(run("evaluate", "--plan", "plan", *words, *asked)[1])["objective"]
    assert [objective[name] for name in ("replica_split", "dispatch", "return_mode")] == ["nearest", "per_rank", "stay"]


def test_a_plan_starts_from_the_one_in_use(run, place):
    run(*BASE, "--planner", "contiguous", "--out", "now", "--quiet")
    assert run(*BASE, "--planner", "greedy", "--current", "now/plan.json", "--out", "next", "--quiet")[0] == 0
    plan = Plan.load(place / "next" / "plan.json")
    assert plan.migration is not None
    assert plan.verdict is not None
    assert plan.prediction is not None
    assert plan.prediction.baseline == "current"
    assert plan.verdict.migration_s == plan.migration.seconds
    budget = ("--current", "now/plan.json", "--migration-size", "1 B", "--quiet")
    code, _, err = run(*BASE, "--planner", "greedy", *budget, "--out", "over")
    assert (code, Path("over").exists()) == (2, False)
    assert re.search(r"planner greedy moves \d+ experts, but the migration budget allows 0; .*joint", err)
    again = run(*BASE, "--planner", "greedy", "--current", "next/plan.json", "--out", "same", "--json", "--quiet")
    same = json.loads(again[1])
    assert same["migration"]["moves"] == []
    assert same["verdict"]["apply"] is False


def test_copies_stay_as_many_as_are_in_use(run, place):
    run(*BASE, "--planner", "greedy", "--redundant", 8, "--out", "now", "--quiet")
    cluster = "accelerator: h100-sxm\nnum_nodes: 2\nranks_per_node: 2\nranks: {3: {failed: true}}\n"
    Path("lost.yaml").write_text(cluster)
    for more, slots in (
        ((), [4, 4, 4, 4]),
        (("--migration-size", "1 MB", "--planner", "joint"), [4, 4, 4, 4]),
        (("--cluster", "lost.yaml"), [4, 4, 4]),  # ranks that are left do not hold more than they did
        (("--redundant", 0), [2, 2, 2, 2]),
    ):
        code, _, err = run(*BASE, "--planner", "greedy", "--current", "now", "--out", "next", *more)
        assert code == 0, err
        plan = Plan.load(place / "next" / "plan.json")
        assert np.bincount(plan.rank_of_slot).tolist() == slots
        assert plan.num_redundant_experts == sum(slots) - 8
        told = f"the plan has {sum(slots) - 8} redundant slots as current has; --redundant 0 plans without"
        assert (told in err) == (sum(slots) > 8)
    code, _, err = run(*BASE, "--current", "now", "--target", "megatron", "--out", "next")
    assert (code, "megatron holds every expert once, but --redundant is 8; give --redundant 0" in err) == (2, True)


def test_one_seed_gives_the_same_bytes_in_any_process_with_any_threads(place):
    np.savez("wide.npz", experts=experts(tokens=1500, count=16), num_experts=16)
    Path("model.json").write_text(json.dumps({**CONFIG, "num_local_experts": 16}))
    words = ("optimize", "--model", "model.json", "--trace", "wide.npz", "--ranks", 4, "--nodes", 2, "--redundant", 4)
    # each process sees another number of processors
    code = "import os; os.cpu_count = lambda: {}; from moeplan.cli import main; main()"
    for threads, out in ((1, "a"), (2, "b")):
        subprocess.run(
            [sys.executable, "-c", code.format(threads), *map(str, words), "--out", out, "--quiet"], check=True,
            env=os.environ | {"PYTHONHASHSEED": str(threads), "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    assert files(place / "a") == files(place / "b")
    assert Plan.load(place / "a" / "plan.json").status == "feasible"


def test_times_of_a_busy_machine_are_warned_of_wherever_they_are_used(run, place):
    public = load_profile("h100-sxm")
    system = {"foreign_cpu_share": 0.5}
    meta = public.meta.model_copy(update={"name": "own", "accelerator": "cpu", "system": system, "tables": {}})
    HardwareProfile(meta, {name: public.table(name) for name in ("experts", "alltoall")}).save(place / "own")
    said = "profile own was measured while other programs took 50% of the CPU"
    busy = ("--profile", "own")
    assert run(*BASE, *busy, "--planner", "greedy", "--out", "plan", "--quiet")[0] == 0
    assert any(said in note for note in Plan.load(place / "plan").notes)
    assert said in run("report", "plan")[1]
    assert run(*BASE, "--planner", "greedy", "--out", "other", "--quiet")[0] == 0
    score = ("evaluate", "--trace", "trace.npz", "--model", "model.json", "--json", "--plan")
    for plan in ("plan", "other"):
        _, out, err = run(*score, plan, *busy)
        assert sum(said in message for message in json.loads(out)["messages"]) == err.count(said) == 1
    assert said not in run(*score, "other")[2]
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    control = ("control", "run", "--model", "model.json", "--cluster", "h100", "--ranks", 4, "--timeout", 0.1)
    assert said in run(*control, *busy)[2]
    assert said not in run(*control)[2]


SIGNALLED = """
import signal
from dataclasses import replace
import moeplan.planning.joint as joint
from moeplan.cli import main
from moeplan.planning.clock import Clock

def soon(search):
    def run(*words):
        clock = next(word for word in words if isinstance(word, Clock))
        clock.problem = replace(clock.problem, progress=lambda *_: signal.raise_signal(signal.SIGINT))
        return search(*words)
    return run

for name in ("_home", "_stay", "within_budget"):
    setattr(joint, name, soon(getattr(joint, name)))
main()
"""
"""Ctrl-C as soon as a first layer has been searched, however long that takes."""


@pytest.mark.parametrize("mode", ["return_home", "stay", "budget"])
def test_ctrl_c_in_the_search_keeps_the_best_plan_so_far(place, run, mode):
    np.savez("wide.npz", experts=experts(tokens=600, layers=6, count=64), num_experts=64)
    Path("model.json").write_text(json.dumps({**CONFIG, "num_local_experts": 64, "num_hidden_layers": 6}))
    words = ["optimize", "--model", "model.json", "--trace", "wide.npz", "--ranks", "8", "--nodes", "2"]
    more = ["--return-mode", mode]
    if mode == "budget":
        assert run(*words, "--planner", "contiguous", "--out", "now", "--quiet")[0] == 0
        more = ["--current", "now", "--migration-size", "1 MB"]
    found = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *words, *more, "--out", "plan", "--json"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert found.returncode == 130, found.stderr
    assert "Traceback" not in found.stderr
    assert "interrupted: the best plan so far was kept" in found.stderr
    plan = Plan.load(place / "plan" / "plan.json")
    assert plan.status == json.loads(found.stdout)["status"] == "interrupted"
    assert mode != "budget" or 0 < plan.migration.bytes <= 1e6
