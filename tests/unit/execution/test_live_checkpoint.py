"""Checkpoints of real runs: resumed on other ranks and placements, relabelled by the exporter, refused when damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live runs need torch")

from dense_reference import random_placement
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import SPEC, tiny_corpus, tiny_options

from moeplan.artifacts.placement import Placement
from moeplan.artifacts.plan import Plan
from moeplan.errors import InputError, RunError, SpecError
from moeplan.execution.checkpoint import CheckpointReader, load_checkpoint, save_checkpoint
from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.options import LiveJob, RouterOptions
from moeplan.execution.parcels import send_batch
from moeplan.execution.run import live_rank
from moeplan.execution.shard import write_shard
from moeplan.execution.train import Trainer
from moeplan.files import read_sums, sha256_file
from moeplan.pipeline.exports import export_plan
from moeplan.pipeline.live import LiveRequest, run_live
from moeplan.specs.workload import Objective, Workload

FIRST, MORE = 3, 3
# Without a balance loss, which is of each rank's own tokens, the number of ranks does not matter.
OPTIONS = tiny_options(router=RouterOptions())


def _placement(ranks: int, extra: int, seed: int) -> Placement:
    return random_placement(np.random.default_rng(seed), 3, SPEC.num_experts, ranks, ranks, extra)


def _save(me: Rank, folder: Path, changes: dict, placement: Placement | None) -> list[float]:
    """Train, save, train on: the losses after the save are what a resumed run must show."""
    trainer = Trainer(replace(OPTIONS, **changes), tiny_corpus(), placement)
    for _ in range(FIRST):
        trainer.step()
    save_checkpoint(trainer, folder)
    return [trainer.step().loss for _ in range(MORE)]


def _resume(me: Rank, folder: Path, changes: dict, placement: Placement | None) -> list[float]:
    reader = CheckpointReader(folder)
    trainer = Trainer(replace(OPTIONS, **changes), tiny_corpus(), placement)
    load_checkpoint(trainer, reader)
    assert trainer.steps_done == FIRST
    return [trainer.step().loss for _ in range(MORE)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("run") / "step-3"
    return folder, run_ranks(Launch(4), _save, folder, {}, _placement(4, 3, 1))[0]


def test_every_expert_stands_once_with_its_state(saved: tuple[Path, list[float]]) -> None:
    folder, _ = saved
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for prefix in ("", "optimizer.first.", "optimizer.second."):
        experts = {n for n in names if n.startswith(f"{prefix}model.layers.") and ".experts." in n}
        assert len(experts) == 3 * SPEC.num_experts * 3
    held = [set(safe_open(shard, framework="np").keys()) for shard in folder.glob("*.safetensors")]
    assert sum(map(len, held)) == len(set().union(*held)) == len(names)


def test_resumes_on_the_same_ranks_to_the_bit(saved: tuple[Path, list[float]]) -> None:
    folder, losses = saved
    answers = run_ranks(Launch(4), _resume, folder, {}, _placement(4, 3, 1))
    assert all(answer == losses for answer in answers)


@pytest.mark.parametrize(
    ("ranks", "changes", "extra"), [(2, {}, 2), (1, {}, 0), (4, {"edp": 2, "zero": True}, 1), (4, {"tp": 2}, 0)]
)
def test_resumes_on_other_ranks(saved: tuple[Path, list[float]], ranks: int, changes: dict, extra: int) -> None:
    folder, losses = saved
    ep = ranks // changes.get("edp", 1) // changes.get("tp", 1)
    for answer in run_ranks(Launch(ranks), _resume, folder, changes, _placement(ep, extra, 9)):
        np.testing.assert_allclose(answer, losses, rtol=2e-5)  # sums over ranks round in another order


def test_relabelled_by_the_exporter(saved: tuple[Path, list[float]], tmp_path: Path) -> None:
    """A plan without copies, applied to the checkpoint: contiguous ranks then hold what the plan says, same losses."""
    folder, losses = saved
    placement = random_placement(np.random.default_rng(5), 3, SPEC.num_experts, 1, 1, 0)
    rows = placement.physical_to_logical_LP
    plan = Plan(
        model=SPEC.name, planner="test", status="feasible", seed=0, num_experts=SPEC.num_experts, num_ranks=4,
        ranks_per_node=4, num_redundant_experts=0, layer_ids=SPEC.moe_layer_ids,
        physical_to_logical_map=tuple(map(tuple, rows.tolist())), rank_of_slot=(0, 0, 1, 1, 2, 2, 3, 3),
        replicas=((1,) * SPEC.num_experts,) * 3, objective=Objective(), workload=Workload(),
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    export_plan(tmp_path / "plan.json", "megatron", tmp_path / "relabelled", checkpoint=folder)
    before, after = CheckpointReader(folder), CheckpointReader(tmp_path / "relabelled")
    assert read_sums(folder).keys() == read_sums(after.path).keys()
    for layer, row in zip(SPEC.moe_layer_ids, rows, strict=True):
        for new, old in enumerate(row.tolist()):
            for prefix in ("", "optimizer.first.", "optimizer.second."):
                mine, theirs = after.row(prefix, layer, new, 32, 32), before.row(prefix, layer, old, 32, 32)
                assert mine.equal(theirs)
    contiguous = Placement(np.tile(np.arange(8, dtype=np.int32), (3, 1)), plan.placement.rank_of_slot_P, 8, 4, 4)
    answer = run_ranks(Launch(4), _resume, tmp_path / "relabelled", {}, contiguous)[0]
    # New expert s is old expert rows[s], on the rank where the plan wants it. Routers sum over experts in new order.
    np.testing.assert_allclose(answer, losses, rtol=2e-5)
    shutil.copytree(folder, tmp_path / "damaged")
    _flip(tmp_path / "damaged" / "model-00002-of-00004.safetensors")
    with pytest.raises(InputError, match=r"damaged: model-00002-of-00004.safetensors is not the file that was written"):
        export_plan(tmp_path / "plan.json", "megatron", tmp_path / "again", checkpoint=tmp_path / "damaged")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: next(f.glob("model-00002*")).unlink(), r"model-00002-of-00004.safetensors is missing"),
        (lambda f: _forget(f, "layers.2.mlp.experts.5."), r"layer 2 has no expert 5 of 0..7 \(1 missing\).*without a"),
        (lambda f: _forget(f, "optimizer.first.model.norm"), r"optimizer.first.model.norm.weight is missing"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), r"has no weight_map of names to shards"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": 1}}'), r"has no weight_map"),
        (lambda f: _cut(next(f.glob("model-00001*"))), r"model-00001-of-00004.safetensors is not the file that"),
        (lambda f: _flip(next(f.glob("model-00003*"))), r"model-00003-of-00004.safetensors is not the file that"),
        (lambda f: _flip(f / "config.json"), r"config.json is not the file that was written"),
        (lambda f: (f / "SHA256SUMS").write_text("x  y"), r"SHA256SUMS line 1 \('x  y'\) is not a sha256"),
        (lambda f: (f / "SHA256SUMS").write_text(""), r"SHA256SUMS is empty; it is damaged"),
        (lambda f: _cut_lines(f / "SHA256SUMS", 3), r"SHA256SUMS has no sum of model-00003-of-00004.safetensors"),
        (lambda f: (f / "moeplan_checkpoint.json").unlink(), r"is not a checkpoint of a live run"),
    ],
)
def test_damaged_checkpoints_are_refused_by_one_message(
    saved: tuple[Path, list[float]], tmp_path: Path, damage, message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved[0], folder)
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_checkpoint(Trainer(OPTIONS, tiny_corpus()), CheckpointReader(folder))


def _forget(folder: Path, part: str) -> None:
    (folder / "SHA256SUMS").unlink()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {n: s for n, s in index["weight_map"].items() if part not in n}
    path.write_text(json.dumps(index))


def _cut_lines(path: Path, kept: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))


def _cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def _flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)


def test_a_shard_is_read_by_safetensors_and_its_sum_is_the_files(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(5).bfloat16(), "a": torch.randn(3, 4), "none": torch.empty(0, 7), "c": torch.randn(2, 1, 3)
    }  # fmt: skip
    assert write_shard(tensors, tmp_path / "shard") == sha256_file(tmp_path / "shard")
    read = load_file(tmp_path / "shard")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == tensor.dtype and read[name].equal(tensor) for name, tensor in tensors.items())
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    os.umask(umask := os.umask(0))
    return umask


def _readers_fail(me: Rank, folder: Path) -> str:
    mesh = Trainer(OPTIONS, tiny_corpus()).mesh
    with pytest.raises(InputError) as error:
        CheckpointReader(folder, mesh.world)
    return str(error.value)


def test_ranks_share_the_work_of_checking_and_all_say_the_same(saved: tuple[Path, list[float]], tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "damaged")
    _flip(tmp_path / "damaged" / "model-00004-of-00004.safetensors")
    first, second = run_ranks(Launch(2), _readers_fail, tmp_path / "damaged")
    assert first == second
    assert "model-00004-of-00004.safetensors is not the file" in first


def test_an_older_checkpoint_without_sums_is_read(saved: tuple[Path, list[float]], tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "old")
    (tmp_path / "old" / "SHA256SUMS").unlink()
    assert CheckpointReader(tmp_path / "old").step == FIRST


@pytest.mark.parametrize("state", ["weights", "second"])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, state: str) -> None:
    trainer = Trainer(OPTIONS, tiny_corpus())
    save_checkpoint(trainer, tmp_path / "saved")
    if state == "weights":
        trainer.moe_layers[1].experts.weights_SW.data[2, 5] = torch.nan
    else:
        trainer.optimizer.states[1].tensors["second"][2, 5] = torch.inf
    name = r"(optimizer.second.)?model.layers.2.mlp.experts.2.gate_proj.weight"
    with pytest.raises(RunError, match=rf"^{name} is not finite after 0 steps: training diverged; give a lower --lr"):
        save_checkpoint(trainer, tmp_path / "saved")
    load_checkpoint(trainer, CheckpointReader(tmp_path / "saved"))
    assert trainer.moe_layers[1].experts.weights_SW.isfinite().all()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.fixture
def request_of_a_run(tmp_path: Path) -> Callable[..., LiveRequest]:
    (tmp_path / "model.json").write_text(SPEC.model_dump_json())
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 400)

    def request(**options) -> LiveRequest:
        small = {"model": str(tmp_path / "model.json"), "text": tmp_path / "text.txt", "batch": 4, "length": 16}
        return LiveRequest(**(small | {"ranks": 1, "checkpoint": tmp_path / "saved", "checkpoint_every": 1} | options))

    return request


def test_the_last_checkpoint_of_a_run_that_diverges_is_finite(request_of_a_run, tmp_path: Path) -> None:
    """After two steps the loss is finite still, and the weights are not."""
    with pytest.raises(RunError, match=r"is not finite after 2 steps.*step-000002 was not written.*saved/step-000001$"):
        run_live(request_of_a_run(steps=4, lr=1e36))
    assert (tmp_path / "saved/latest").read_text() == "step-000001\n"
    with pytest.raises(RunError, match=r"the loss of step 2 is nan: .*; the last checkpoint: --resume .*/step-000001$"):
        run_live(request_of_a_run(steps=2, lr=1e36, checkpoint_every=9, resume=tmp_path / "saved"))


def test_a_checkpoint_of_another_model_is_refused_by_name(request_of_a_run, tmp_path: Path) -> None:
    run_live(request_of_a_run(steps=1))
    other = {"name": "small", "num_layers": 5, "moe_layer_ids": (1, 2, 3, 4)}
    (tmp_path / "model.json").write_text(SPEC.model_copy(update=other).model_dump_json())
    with pytest.raises(InputError, match=r"step-000001 is of model tiny, the run is of small$"):
        run_live(request_of_a_run(steps=1, resume=tmp_path / "saved"))


def test_a_run_may_save_where_it_resumes_from(request_of_a_run, tmp_path: Path) -> None:
    """The same run without the move begins where it began, not at what it saved since."""
    run_live(request_of_a_run(steps=2))
    plan = Plan(
        model=SPEC.name, planner="test", status="feasible", seed=0, num_experts=8, num_ranks=1, ranks_per_node=1,
        num_redundant_experts=0, layer_ids=SPEC.moe_layer_ids, physical_to_logical_map=(tuple(range(7, -1, -1)),) * 3,
        rank_of_slot=(0,) * 8, replicas=((1,) * 8,) * 3, objective=Objective(), workload=Workload(),
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    found = run_live(request_of_a_run(steps=3, resume=tmp_path / "saved", plan=tmp_path / "plan.json", apply_at=1))
    assert found["first_step"] == 2
    assert found["largest_difference"] < 1e-5


def test_where_ranks_may_start_again_the_checkpoint_to_begin_from_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latest").write_text("step-000002\n")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    job = LiveJob(OPTIONS, tiny_corpus(), steps=1, checkpoint=tmp_path, resume=tmp_path)
    with pytest.raises(SpecError, match=r"starts again .* --resume .*/step-000002$"):
        live_rank(Rank(0, 1, "cpu", print), job, print)


def test_the_newest_whole_checkpoint_is_offered(request_of_a_run, tmp_path: Path) -> None:
    run_live(request_of_a_run(steps=3))
    saved = tmp_path / "saved"
    _flip(next((saved / "step-000003").glob("*.safetensors")))
    (saved / "step-000002" / "moeplan_checkpoint.json").unlink()
    offer = rf"step-000003: model-00001-of-00001.safetensors is not the file .*: --resume {saved}/step-000001, or"
    with pytest.raises(InputError, match=offer):
        run_live(request_of_a_run(steps=1, resume=saved))
    assert run_live(request_of_a_run(steps=1, resume=saved / "step-000001"))["first_step"] == 1
    (saved / "latest").unlink()
    with pytest.raises(InputError, match=rf"has no moeplan_checkpoint.json; .* --resume {saved}/step-000002, or"):
        run_live(request_of_a_run(steps=1, resume=saved))
    (saved / "latest").write_text("step-000002\n")
    run_live(request_of_a_run(steps=0, resume=saved / "step-000002"))
    assert (saved / "latest").exists()
    run_live(request_of_a_run(steps=0))  # a new run, whose restarts are not to go on from there
    assert not (saved / "latest").exists()


def test_damaged_checkpoints_are_skipped_where_that_is_asked_for(request_of_a_run, tmp_path: Path) -> None:
    """For the newest whole one of the same run: there are some of an older run with more steps, and with fewer."""
    saved, said = tmp_path / "saved", []
    run_live(request_of_a_run(steps=6))
    for left in (2, 4, 6):
        os.utime(saved / f"step-{left:06d}" / "moeplan_checkpoint.json", (0, 0))
    run_live(request_of_a_run(steps=5, checkpoint_every=2, seed=1))  # saves at 2, 4 and 5
    os.utime(saved / "step-000003" / "moeplan_checkpoint.json", (0, 0))
    _flip(next((saved / "step-000005").glob("*.safetensors")))
    answer = run_live(request_of_a_run(steps=1, resume=saved, skip_damaged=True, checkpoint=None), tell=said.append)
    assert answer["first_step"] == 4
    assert answer["notes"] == said
    assert re.fullmatch(r".*step-000005: model-0.*; goes on from .*, .*saved/step-000004 \(4 steps\)", *said)
    shutil.rmtree(saved / "step-000004")
    shutil.rmtree(saved / "step-000002")
    answer = run_live(request_of_a_run(steps=1, resume=saved, skip_damaged=True, checkpoint=None), tell=said.append)
    assert answer["first_step"] == 1  # written last of what is left


def test_restarts_of_a_run_that_begins_at_an_older_checkpoint_do_not_go_on_from_a_later_one(
    request_of_a_run, tmp_path: Path
) -> None:
    run_live(request_of_a_run(steps=2))
    run_live(request_of_a_run(steps=0, resume=tmp_path / "saved", checkpoint=tmp_path / "new"))
    run_live(request_of_a_run(steps=0, resume=tmp_path / "saved" / "step-000001"))
    assert not (tmp_path / "saved" / "latest").exists()


def test_resumes_in_another_number_format(tmp_path: Path) -> None:
    """From bfloat16 with its master copies, from float32 with the weights as master copies."""
    narrow, wide = Trainer(replace(OPTIONS, dtype="bf16"), tiny_corpus()), Trainer(OPTIONS, tiny_corpus())
    narrow.step()
    save_checkpoint(narrow, tmp_path / "narrow")
    load_checkpoint(wide, CheckpointReader(tmp_path / "narrow"))
    masters = [state.tensors["master"] for state in (*narrow.optimizer.states, narrow.optimizer.dense_state)]
    taken = [moe.experts.weights_SW for moe in wide.moe_layers]
    taken.append(wide.optimizer._flat(list(wide.optimizer.dense)))
    assert all(map(torch.equal, taken, masters))
    save_checkpoint(wide, tmp_path / "wide")
    load_checkpoint(narrow, CheckpointReader(tmp_path / "wide"))
    again = [state.tensors["master"] for state in (*narrow.optimizer.states, narrow.optimizer.dense_state)]
    assert all(map(torch.equal, again, taken))
    assert narrow.step().loss == pytest.approx(wide.step().loss, rel=1e-2)


def test_saved_on_the_way_to_a_plan_it_resumes_under_the_plan(tmp_path: Path) -> None:
    trainer, goal = Trainer(OPTIONS, tiny_corpus()), _placement(1, 0, 2)
    trainer.migrator.submit(goal)
    assert trainer.migrator.at_step_boundary(0.0) is None  # one layer of three
    save_checkpoint(trainer, tmp_path / "saved")
    found = CheckpointReader(tmp_path / "saved").placement(1, 1)
    np.testing.assert_array_equal(found.physical_to_logical_LP, goal.physical_to_logical_LP)


def _write_fails(me: Rank, folder: Path) -> str:
    trainer = Trainer(OPTIONS, tiny_corpus())
    save_checkpoint(trainer, folder)
    before = sorted(p.name for p in folder.iterdir())
    if me.rank == 1:
        trainer.mesh.world.all_of(None)  # where the others wait for the directory
        assert trainer.mesh.world.all_of(("disk full", "", "", [], 0))
        trainer.mesh.world.all_of(None)
        return ""
    with pytest.raises(RunError, match="disk full; saved was not written"):
        save_checkpoint(trainer, folder)
    assert sorted(p.name for p in folder.iterdir()) == before
    return str(sorted(p.name for p in folder.parent.iterdir()))


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    assert run_ranks(Launch(2), _write_fails, tmp_path / "saved")[0] == "['saved']"


def _killed_while_moving(me: Rank, folder: Path) -> None:
    trainer = Trainer(OPTIONS, tiny_corpus(), _placement(4, 0, 1))
    for _ in range(FIRST):
        trainer.step()
    save_checkpoint(trainer, folder)

    def die(out, into, axis) -> None:
        if axis.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        send_batch(out, into, axis)

    trainer.migrator.send = die
    trainer.migrator.submit(_placement(4, 0, 2))
    trainer.migrator.at_step_boundary()


def test_a_rank_killed_while_experts_move(tmp_path: Path) -> None:
    """One error names it; the checkpoint before stands, and a new run goes on from it with every expert."""
    folder = tmp_path / "step-3"
    with pytest.raises(RunError, match=r"rank 2 died by signal SIGKILL; the other ranks were ended"):
        run_ranks(Launch(4), _killed_while_moving, folder)
    whole = run_ranks(Launch(4), _save, tmp_path / "other", {}, _placement(4, 0, 1))[0]
    resumed = run_ranks(Launch(4), _resume, folder, {}, _placement(4, 0, 1))[0]
    assert resumed == whole
    assert not [p for p in tmp_path.iterdir() if re.search(r"writing|old", p.name)]
