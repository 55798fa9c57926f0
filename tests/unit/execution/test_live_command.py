"""``moeplan live`` and ``moeplan apply`` as a user meets them: real processes and ports, one message for bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="live runs need torch")

from dense_reference import random_placement
from tiny_run import SPEC

from moeplan.artifacts.event_log import EventLog
from moeplan.artifacts.plan import Plan
from moeplan.errors import InputError, MissingExtraError, PlanError, RunError, SpecError
from moeplan.execution.metrics import MetricsSink
from moeplan.execution.train import StepMetrics
from moeplan.files import write_text
from moeplan.pipeline.live import LiveRequest, apply_plan, run_live
from moeplan.reports.against import seconds_per_step
from moeplan.reports.chrome_trace import chrome_trace
from moeplan.routing.io import read_trace
from moeplan.specs.workload import Objective, Workload


def _plan(folder: Path, ranks: int = 2, model: str = "tiny", extra: int = 0, name: str = "plan.json") -> Path:
    placement = random_placement(np.random.default_rng(4), 3, SPEC.num_experts, ranks, ranks, extra)
    plan = Plan(
        model=model, planner="test", status="feasible", seed=0, num_experts=SPEC.num_experts, num_ranks=ranks,
        ranks_per_node=ranks, num_redundant_experts=extra, layer_ids=SPEC.moe_layer_ids,
        physical_to_logical_map=tuple(map(tuple, placement.physical_to_logical_LP.tolist())),
        rank_of_slot=tuple(placement.rank_of_slot_P.tolist()),
        replicas=tuple(map(tuple, placement.replicas_LE.tolist())), objective=Objective(), workload=Workload(),
    )  # fmt: skip
    plan.save(folder / name)
    return folder / name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(SPEC.model_dump_json())
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two domains of words."""
    rng = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for name in ("code", "docs"):
        words = [bytes(rng.integers(97, 123, size=5, dtype=np.uint8)) for _ in range(50)]
        (tmp_path / "text" / name).write_bytes(b" ".join(words[i] for i in rng.integers(50, size=8000)))
    return tmp_path / "text"


def _moeplan(
    *words: str | Path | int, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "moeplan", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}, check=False
    )


def test_a_plan_applied_in_mid_run(tmp_path: Path, model: Path, text: Path) -> None:
    out = tmp_path / "out"
    done = _moeplan(
        "live", "--model", model, "--text", text, "--ranks", "2", "--steps", "6", "--batch", "4", "--length", "32",
        "--plan", _plan(tmp_path), "--apply-at", "2", "--out", out, "--record", tmp_path / "r.npz", "--record-tokens",
        "256", "--generate", "def ", "--new-tokens", "9", "--checkpoint", tmp_path / "saved", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["losses"]) == 6
    assert answer["losses"] == answer["reference_losses"]
    assert answer["losses"][-1] < answer["losses"][0]
    assert answer["moved_experts"] > 0
    assert 0 < answer["stall_s"] < 60
    assert answer["tokens_per_s"] > 0
    assert answer["text"].startswith("def ")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == answer["losses"]
    assert len(lines[0]["expert_s"]) == 2
    log = EventLog.read(out / "events.parquet")
    assert log.source == "measured"
    assert log.num_ranks == 2
    assert log.of_kind("step").sum() == 2 * 6
    assert log.of_kind("loss").sum() == 6
    assert (np.diff(log.start_s_V) >= 0).all()
    # Each MoE layer, forward and backward, on each rank of each step; pairs of all ranks are tokens * top-k.
    for step in (1, 5):  # what is evaluated and recorded after the last step is of none
        experts = log.of_kind("experts") & (log.step_V == step)
        assert experts.sum() == 3 * 2 * 2
        assert log.amount_V[experts].sum() == 2 * 3 * 4 * 32 * SPEC.top_k
        # Forward, once on each rank: shared experts of MoE layers, the dense layer, embedding and head.
        shared, dense = (log.of_kind(kind) & (log.step_V == step) for kind in ("shared", "dense"))
        assert sorted(log.layer_V[shared]) == [1, 1, 2, 2, 3, 3]
        assert sorted(log.layer_V[dense]) == [-1, -1, -1, -1, 0, 0]
        assert (log.duration_s_V[shared | dense] > 0).all()
    assert (log.step_V[log.of_kind("experts")] == -1).any()
    assert len(seconds_per_step(log, "experts")) == 6
    slices = {event["name"] for event in chrome_trace(log)["traceEvents"] if event["ph"] == "X"}
    assert {"shared, layer 1", "shared, layer 3", "dense, layer 0"} <= slices
    assert log.amount_V[log.of_kind("migrate")].sum() > 0
    trace = read_trace(tmp_path / "r.npz")
    assert trace.layer_ids == SPEC.moe_layer_ids
    assert set(trace.domains) == {"code", "docs"}
    assert trace.origin["text_sha256"] == answer["text_source"]["sha256"]
    assert trace.num_tokens == answer["recorded"]["tokens"] == 256 + 16 * 4
    assert answer["recorded"]["overhead"] > -1
    assert answer["recorded"]["overhead_spread"] >= 0
    resumed = _moeplan(
        "live", "--model", model, "--text", text, "--ranks", "1", "--steps", "1", "--batch", "4", "--length", "32",
        "--resume", tmp_path / "saved",
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    ((step, loss),) = re.findall(r"│ (\d+) +│ (\d+\.\d+) │", resumed.stdout)
    assert int(step) == 6
    assert float(loss) == pytest.approx(answer["losses"][-1], rel=0.2)


def test_without_torch_no_rank_is_started(monkeypatch: pytest.MonkeyPatch, model: Path, text: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("moeplan.execution.launch.get_context", None)
    with pytest.raises(MissingExtraError, match="a live run needs the 'torch' extra"):
        run_live(LiveRequest(model=str(model), text=text, ranks=2, steps=2))


def test_under_torchrun_one_rank_speaks(tmp_path: Path, model: Path, text: Path) -> None:
    words = ("live", "--model", model, "--text", text, "--steps", "2", "--batch", "4", "--length", "32", "--json")
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_free_port()))
    done = _moeplan(*words, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["losses"]) == 2
    bad = _moeplan(*words, "--plan", _plan(tmp_path, model="another"), launcher=launcher)
    assert bad.returncode != 0
    assert bad.stderr.count("plan.model (another) is not the running model (tiny)") == 1
    assert bad.stderr.count("error: ") == 1
    assert "moeplan/" not in bad.stderr.replace(str(tmp_path), "")  # torchrun's own traceback follows, none of ours


def test_torchrun_starts_a_killed_rank_again(tmp_path: Path, model: Path, text: Path) -> None:
    """All ranks go on from the last checkpoint; the metrics show every step to the last."""
    saved, out = tmp_path / "saved", tmp_path / "out"
    words = ("live", "--model", model, "--text", text, "--steps", 400, "--batch", 4, "--length", 32, "--out", out)
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
         "--master-port", str(_free_port()), "-m", "moeplan", *map(str, words), "--checkpoint", str(saved),
         "--checkpoint-every", "50"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 600
        metrics = out / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count("\n") < 55:  # beyond the first checkpoint
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(_children_of(run.pid)[-1], signal.SIGKILL)
        assert run.wait(600) == 0
    finally:
        run.kill()
        run.wait()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    again = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])  # where it went on
    killed, first = steps[again - 1], steps[again]
    assert first % 50 == 0
    assert killed - 100 < first <= killed + 1  # from the last checkpoint, or the one before where it was being written
    assert steps == [*range(killed + 1), *range(first, 400)]
    assert (saved / "latest").read_text() == "step-000400\n"


def test_a_rank_that_never_joins_is_named(model: Path, text: Path) -> None:
    done = _moeplan(
        "live", "--model", model, "--text", text, "--join-timeout", "1 s",
        RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: rank 1 did not join within 1 s; 1 of 2 ranks are there")
    assert "Traceback" not in done.stderr


def test_a_plan_handed_to_a_run_and_its_metrics(tmp_path: Path, model: Path, text: Path) -> None:
    control, port = tmp_path / "control", _free_port()
    words = ("live", "--model", model, "--text", text, "--ranks", 2, "--steps", 100_000, "--batch", 4, "--length", 32)
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(
            [sys.executable, "-m", "moeplan", *map(str, words), "--control", control, "--prometheus", str(port)],
            stdout=subprocess.DEVNULL, stderr=said,
        )  # fmt: skip
    try:
        until = time.monotonic() + 600
        while not (control / "run.json").is_file():
            assert time.monotonic() < until
            time.sleep(0.05)
        with pytest.raises(PlanError, match=r"plan.num_ranks \(4\) is not the live run's \(2\)"):
            apply_plan(_plan(tmp_path, ranks=4), control)
        answer = apply_plan(_plan(tmp_path, extra=3), control)
        assert answer["moved_experts"] > 0
        again = apply_plan(_plan(tmp_path, extra=3), control)
        assert again["moved_experts"] == 0  # it is there already
        shown = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        values = dict(line.rsplit(" ", 1) for line in shown.splitlines() if not line.startswith("#"))
        assert float(values["moeplan_tokens_per_second"]) > 0
        assert float(values['moeplan_expert_seconds{rank="1"}']) > 0
        assert _moeplan("live", "--model", model, "--ranks", 1, "--prometheus", port).stderr.startswith(
            f"error: prometheus port ({port}) cannot be used"
        )
        second = _moeplan("live", "--model", model, "--text", text, "--ranks", 1, "--steps", 1, "--control", control)
        assert "control is watched by another live run (process " in second.stderr
        assert not json.loads((control / "run.json").read_text()).get("ended")
    finally:
        ranks = [rank for server in _children_of(run.pid) for rank in _children_of(server)]
        run.terminate()
        run.wait()
    until = time.monotonic() + 600
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):  # they end with the one who started them
        assert time.monotonic() < until
        time.sleep(0.05)
    assert "Traceback" not in (tmp_path / "said").read_text()
    with pytest.raises(RunError, match=r"has died; start one with .*, from its last checkpoint with --resume$"):
        apply_plan(_plan(tmp_path), control)


def test_a_run_that_has_ended_takes_no_plan_and_says_so_at_once(tmp_path: Path, model: Path, text: Path) -> None:
    control = tmp_path / "control"
    base = {"model": str(model), "ranks": 2, "batch": 4, "length": 16, "text": text, "control": control}
    ended = "has ended; start one with --control"
    for steps, lr in ((1, 1e-3), (3, 1e20)):  # the second diverges
        with nullcontext() if steps == 1 else pytest.raises(RunError, match="diverged"):
            run_live(LiveRequest(**base, steps=steps, lr=lr))
        with pytest.raises(RunError, match=ended):
            apply_plan(_plan(tmp_path), control, 20)
        about = json.loads((control / "run.json").read_text())
        assert (about["num_ranks"], about["ended"]) == (2, True)
        assert not (control / "plan.json").exists()


def test_a_run_that_ends_without_taking_a_plan_is_not_waited_for(tmp_path: Path) -> None:
    control, about = tmp_path / "control", {"model": "tiny", "num_ranks": 2, "ranks_per_node": 2}
    control.mkdir()
    write_text(control / "run.json", json.dumps(about))

    def end() -> None:
        while not (control / "plan.json").exists():
            time.sleep(0.01)
        write_text(control / "run.json", json.dumps({**about, "ended": True}))

    run = threading.Thread(target=end)
    run.start()
    with pytest.raises(RunError, match="has ended; start one with --control"):
        apply_plan(_plan(tmp_path), control, 20)
    run.join()
    assert not (control / "plan.json").exists()


def test_an_answer_is_of_the_plan_that_was_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's is not taken for it; and whether the run took the plan is told where it is late."""
    control = tmp_path / "control"
    control.mkdir()
    about = {"model": "tiny", "num_ranks": 2, "ranks_per_node": 2}
    (control / "run.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match=r"did not answer within 0.2 s; is it still running\?$"):
        apply_plan(_plan(tmp_path), control, 0.2)

    def taken_at_once(_plan: Plan, _path: Path) -> None:
        write_text(control / "answer.json", json.dumps({"plan_sha256": "0" * 64, "applied": True}))

    plan = _plan(tmp_path)
    monkeypatch.setattr(Plan, "save", taken_at_once)
    with pytest.raises(RunError, match=r"within 0.2 s: it has taken the plan and moves experts still"):
        apply_plan(plan, control, 0.2)


def _children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = status.read_text().rsplit(")", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == pid:
            found.append(int(name.split()[0]))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": 3, "tp": 2}, SpecError, r"ranks \(3\) must divide by tp \(2\)"),
        ({"apply_at": 3}, SpecError, r"apply_at \(3\) needs a plan"),
        ({"model": "deepseek-v3", "ranks": 1}, SpecError, r"vocab_size \(129280\) must be 256"),
        ({"batch": 3}, SpecError, r"batch \(3\) is not a multiple of the data-parallel ranks \(2\)"),
        ({"resume": Path("/nowhere")}, InputError, "/nowhere does not exist"),
        ({"steps": -1}, SpecError, r"steps \(-1\) must not be negative"),
        ({"record": Path("r.txt")}, SpecError, r"record \(r.txt\) must end in .npz or .parquet"),
    ],
)
def test_requests_that_cannot_be_met(
    model: Path, text: Path, change: dict, error: type[Exception], message: str
) -> None:
    request = {"model": str(model), "ranks": 2, "steps": 2, "batch": 4, "length": 16, "text": text, **change}
    with pytest.raises(error, match=message):
        run_live(LiveRequest(**request))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed \(-1\) must not be negative"),
        ({"lr": float("nan")}, r"lr \(nan\) must be positive"),
        ({"length": 3000}, r"length \(3000\) must be below the bytes of each text, held-out parts included \(2399 in"),
        ({"generate": ""}, "generate needs a prompt"),
        ({"window": 12}, r"window \(12\) must be a multiple of 8 steps, or 0 for none"),
        ({"record": Path("r.npz"), "record_tokens": 0}, r"record \(r.npz\) with record_tokens \(0\) would be empty"),
        ({"record": Path(__file__, "r.npz")}, "cannot write .*test_live_command.py: File exists"),
        ({"checkpoint": Path(__file__, "saved")}, "cannot write .*test_live_command.py/saved: Not a directory"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(
    model: Path, text: Path, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeplan.execution.launch.get_context", None)  # no rank is started
    with pytest.raises(InputError, match=message):
        run_live(LiveRequest(**{"model": str(model), "ranks": 2, "steps": 2, "batch": 4, "text": text, **change}))


def test_a_run_that_diverges_says_so(model: Path, text: Path) -> None:
    request = LiveRequest(model=str(model), ranks=2, steps=3, batch=4, length=16, text=text, lr=1e20)
    with pytest.raises(RunError, match=r"the loss of step 1 is nan: training diverged; give a lower --lr than 1e\+20"):
        run_live(request)
    with pytest.raises(RunError, match="the loss of held-out text is nan"):
        run_live(replace(request, steps=1))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_on_a_full_disk() -> None:
    sink = MetricsSink(Path("/dev/full"), None)
    with pytest.raises(InputError, match="cannot write /dev/full: No space left on device"):
        sink.add(StepMetrics(0, 1.0, 1.0, 1, [1.0], [0.0], [0.0], 1.0))
    sink.close()


def test_plans_that_do_not_fit_and_ports_in_use(tmp_path: Path, model: Path, text: Path) -> None:
    base = {"model": str(model), "ranks": 2, "steps": 2, "batch": 4, "length": 16, "text": text}
    for plan, message in (
        (_plan(tmp_path, ranks=4), r"plan num_ranks \(4\) is not the run's expert-parallel size \(2\)"),
        (_plan(tmp_path, model="other", name="other.json"), r"plan.model \(other\) is not the running model \(tiny\)"),
    ):
        with pytest.raises(PlanError, match=message):
            run_live(LiveRequest(**base, plan=plan, apply_at=1))
    with pytest.raises(SpecError, match=r"apply_at \(7\) must be a step of 0..1"):
        run_live(LiveRequest(**base, plan=_plan(tmp_path), apply_at=7))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"port \({port}\) cannot be used"):
            run_live(LiveRequest(**base, port=port))
    with pytest.raises(InputError, match="is not watched by a live run"):
        apply_plan(_plan(tmp_path), tmp_path / "nothing")
