"""Experts move in mid-training and nothing else changes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="live runs need torch")

from dense_reference import random_placement
from tiny_run import SPEC, tiny_corpus, tiny_options

from moeplan.artifacts.load_window import LoadWindow
from moeplan.artifacts.placement import EMPTY, Placement
from moeplan.errors import PlanError
from moeplan.execution.apply import PlanCallback
from moeplan.execution.checkpoint import CheckpointReader, load_checkpoint, save_checkpoint
from moeplan.execution.closed_loop import ClosedLoop
from moeplan.execution.groups import single_mesh
from moeplan.execution.launch import Launch, Rank, run_ranks
from moeplan.execution.migrate import Migrator, torch_state
from moeplan.execution.monitor import LoadMonitor
from moeplan.execution.moves import fetches_of
from moeplan.execution.parcels import pack, send_batch, unpack
from moeplan.execution.train import Trainer

STEPS, AT = 5, 2


def _placement(ranks: int, per_node: int, extra: int, seed: int) -> Placement:
    return random_placement(np.random.default_rng(seed), 3, SPEC.num_experts, ranks, per_node, extra)


def _losses(
    options, placement: Placement | None, budget_s: float | None = None, send=None, break_prepare=False
) -> tuple[list[float], dict]:
    """Losses of a run that moves to ``placement`` after step AT, and what was seen on the way."""
    trainer = Trainer(options, tiny_corpus())
    if send is not None:
        trainer.migrator.send = send
    losses, seen = [], {"boundaries": 0, "report": None}
    for step in range(STEPS):
        losses.append(trainer.step().loss)
        if step == AT and placement is not None:
            before = _everything(trainer)
            old = trainer.migrator.placement
            sent_R = [0] * old.num_ranks
            fetches = [f for row in range(old.num_layers) for f in fetches_of(old, placement, row, sent_R)]
            seen["expected_moves"] = sum(f.rank != f.source_rank for f in fetches)
            trainer.migrator.submit(placement)
            if break_prepare and trainer.mesh.world.rank == 1:
                trainer.migrator._prepare = _no_memory
        while trainer.migrator.under_way:
            report = trainer.migrator.at_step_boundary(budget_s)
            seen["boundaries"] += 1
            if report is None and step < STEPS - 2:
                break  # the rest after the next step
            seen["report"] = report
            if step == AT and report is not None:
                seen["same"] = _same(before, _everything(trainer))
                seen["placed"] = trainer.migrator.placement is placement
    seen["copies"] = _copies_agree(trainer)
    if seen["report"] is not None:
        report = seen["report"]
        seen["report"] = {"moved": report.moved_experts, "failure": report.failure, "finished": report.finished,
                          "bytes": report.moved_bytes}  # fmt: skip
    return losses, seen


def _no_memory(*_args) -> None:
    raise MemoryError


def _everything(trainer: Trainer) -> dict:
    """(layer, expert, tensor name) -> values of every copy on any rank of this EP group."""
    found = {}
    for l, (moe, state) in enumerate(zip(trainer.moe_layers, trainer.optimizer.states, strict=True)):
        for s, expert in enumerate(moe.experts.table.local_experts_S.tolist()):
            if expert != EMPTY:
                for name, rows in {"weights": moe.experts.weights_SW, **state.tensors}.items():
                    found.setdefault((l, expert, name), []).append(rows[s].detach().float().numpy().copy())
    joined: dict = {}
    for part in trainer.mesh.ep.all_of(found):
        for key, values in part.items():
            joined.setdefault(key, []).extend(values)
    return joined


def _same(before: dict, after: dict) -> bool:
    return before.keys() == after.keys() and all(
        np.array_equal(before[key][0], value) for key, values in after.items() for value in values
    )


def _copies_agree(trainer: Trainer) -> bool:
    return all(np.array_equal(values[0], v) for values in _everything(trainer).values() for v in values)


def _flip_on_rank_two(out, into, axis) -> None:
    send_batch(out, into, axis)
    if axis.rank == 2 and into:
        into[0].data[5] ^= 1


def _lose_on_rank_three(out, into, axis) -> None:
    send_batch(out, into, axis)
    if axis.rank == 3:
        raise RuntimeError("connection reset")


def _moves(me: Rank) -> dict:
    plain = tiny_options()
    reference = _losses(plain, None)[0]
    return {
        "reference": reference,
        "all at once": _losses(plain, _placement(4, 4, 0, 1)),
        "layer by layer": _losses(plain, _placement(4, 4, 0, 2), budget_s=0.0),
        "with copies": _losses(plain, _placement(4, 4, 6, 3)),
        "bad checksum": _losses(plain, _placement(4, 4, 0, 4), send=_flip_on_rank_two),
        "lost message": _losses(plain, _placement(4, 4, 0, 5), send=_lose_on_rank_three),
        "no memory": _losses(plain, _placement(4, 4, 0, 6), break_prepare=True),
        "refused": _refusals(plain),
    }


def _refusals(options) -> list[str]:
    trainer, said = Trainer(options, tiny_corpus()), []
    rank = trainer.mesh.world.rank
    for placement in (_placement(2, 2, 0, 1), _placement(4, 4, 0, 1 if rank < 2 else 2), _placement(4, 2, 0, 1)):
        with pytest.raises(PlanError, match=r".") as error:
            trainer.migrator.submit(placement)
        said.append(str(error.value))
    return said


def test_moves_change_no_bit_and_failures_roll_back() -> None:
    for answer in run_ranks(Launch(4), _moves):
        reference = answer["reference"]
        for name in ("all at once", "layer by layer", "bad checksum", "lost message", "no memory"):
            assert answer[name][0] == reference, name  # the same floats
            assert answer[name][1]["copies"], name
        losses, seen = answer["all at once"]
        assert seen["same"]
        assert seen["placed"]
        assert seen["boundaries"] == 1
        size = seen["expected_moves"] * 3 * 3 * 32 * 32 * 4  # weights and two moments
        assert seen["report"] == {"moved": seen["expected_moves"], "failure": None, "finished": True, "bytes": size}
        seen = answer["layer by layer"][1]
        assert seen["boundaries"] == 3  # one layer at each step boundary
        assert seen["report"]["moved"] == seen["expected_moves"]
        # Copies split an expert's tokens, so sums round otherwise: within a few float32 roundings.
        losses, seen = answer["with copies"]
        assert seen["same"]
        assert seen["copies"]
        np.testing.assert_allclose(losses, reference, rtol=2e-6)
        for name, why in (
            ("bad checksum", r"rank 2 received an expert of layer \d from EP rank \d with a wrong checksum"),
            ("lost message", "rank 3 could not transfer: connection reset"),
            ("no memory", "rank 1 could not prepare: out of memory"),
        ):
            seen = answer[name][1]
            assert seen["same"], name
            assert not seen["placed"], name
            assert not seen["report"]["finished"], name
            assert re.search(why, seen["report"]["failure"]), seen
        size, differ, nodes = answer["refused"]
        assert "plan num_ranks (2) is not the run's expert-parallel size (4)" in size
        assert "rank 2 was given another plan than rank 0" in differ
        assert "plan ranks_per_node (2) is not the run's (4)" in nodes


def _meshes(me: Rank) -> list[dict]:
    """ZeRO-1 and tensor parallelism: each holds a part of an expert's state, and it moves with the expert."""
    answers = []
    for changes in ({"edp": 2, "zero": True}, {"tp": 2}, {"edp": 2, "zero": True, "dtype": "bf16"}):
        options = tiny_options(**changes)
        reference = _losses(options, None)[0]
        answers.append({"reference": reference, "moved": _losses(options, _placement(2, 2, 0, 7))})
        copies, report = 2 // options.tp, answers[-1]["moved"][1]["report"]  # of the weights; state is split
        wide = options.dtype == "fp32"
        bytes_of_expert = 3 * 32 * 32 * (copies * (4 if wide else 2) + 4 * (2 if wide else 3))
        assert report["bytes"] == report["moved"] * bytes_of_expert
    plain = _losses(tiny_options(edp=2), None)[0]
    answers.append({"reference": plain, "moved": (answers[0]["reference"], {"same": True, "copies": True})})
    return answers


def test_state_shards_move_with_their_expert() -> None:
    for answers in run_ranks(Launch(4), _meshes):
        for answer in answers:
            losses, seen = answer["moved"]
            assert losses == answer["reference"]
            assert seen["same"]
            assert seen["copies"]


def _stopped(me: Rank, folder: Path) -> dict:
    """A migration layer by layer, to more slots, that fails at its third layer; then one to another placement."""
    trainer = Trainer(tiny_options(), tiny_corpus())
    goal, later = _placement(2, 2, 4, 3), _placement(2, 2, 0, 4)
    plans = PlanCallback(trainer.migrator, SPEC, trainer.mesh, budget_s=0.0)
    loop = ClosedLoop(trainer.moe_layers, plans, LoadMonitor(trainer.mesh, 3, SPEC.num_experts, 2, 2), folder=folder)
    calls, seen, windows, failures = [0], [], [], []

    def send(out, into, axis) -> None:
        send_batch(out, into, axis)
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("connection reset")

    trainer.migrator.send = send
    trainer.migrator.submit(goal)
    failure = None
    for step in range(8):
        report = loop.after_step(trainer.step())
        failure = failure or (report and report.failure)
        seen.append([_held(trainer.migrator.placement), _in_tables(trainer)])
        if step % 2:
            window = LoadWindow.read(folder / "window.npz") if me.rank == 0 else None
            windows.append(window and _held(window.placement))
            failures.append(window and window.costs.failure)
        if step == 3:
            save_checkpoint(trainer, folder / "saved")
            trainer.migrator.submit(later)
    resumed = Trainer(tiny_options(), tiny_corpus(), CheckpointReader(folder / "saved").placement(2, 2))
    load_checkpoint(resumed, CheckpointReader(folder / "saved"))
    resumed.step()  # runs, with empty slots
    return {
        "failure": failure, "seen": seen, "windows": windows, "failures": failures, "resumed": _in_tables(resumed),
        "goal": _held(goal), "later": _held(later),
        "contiguous": _held(Placement.contiguous(3, SPEC.num_experts, 2, 2)),
    }  # fmt: skip


def _held(placement: Placement) -> list[list[list[int]]]:
    """Experts of each layer and rank, in the order of their slots."""
    ranks_P = placement.rank_of_slot_P
    return [
        [[int(e) for e in row[ranks_P == rank] if e != EMPTY] for rank in range(placement.num_ranks)]
        for row in placement.physical_to_logical_LP
    ]


def _in_tables(trainer: Trainer) -> list[list[list[int]]]:
    """The same, from the tables by which tokens are routed."""
    mine = [[int(e) for e in moe.experts.table.local_experts_S if e != EMPTY] for moe in trainer.moe_layers]
    return [list(layer) for layer in zip(*trainer.mesh.ep.all_of(mine), strict=True)]


def test_what_is_in_force_is_told_layer_by_layer(tmp_path: Path) -> None:
    first, other = run_ranks(Launch(2), _stopped, tmp_path)
    for answer in (first, other):
        assert re.search(r"connection reset; 2 of 3 layers had moved by then and stay so$", answer["failure"])
        for told, in_tables in answer["seen"]:
            assert told == in_tables
        stopped = [*answer["goal"][:2], answer["contiguous"][2]]
        assert [told for told, _ in answer["seen"][:5]] == [
            [answer["goal"][0], *answer["contiguous"][1:]], stopped, stopped, stopped,
            [answer["later"][0], *stopped[1:]],
        ]  # fmt: skip
        assert answer["seen"][-1][0] == answer["later"]
        assert answer["resumed"] == stopped
    assert first["windows"] == [told for told, _ in first["seen"][1::2]]
    assert first["failures"] == [None, first["failure"], None, None]  # of the window in which it stopped


def test_a_plan_left_by_a_run_before_is_not_taken(tmp_path: Path) -> None:
    for name in ("plan.json", "window.npz"):
        (tmp_path / name).write_text("{}")
    trainer = Trainer(tiny_options(), tiny_corpus())
    plans = PlanCallback(trainer.migrator, SPEC, trainer.mesh, tmp_path)
    assert plans.after_step() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.lock"]


def test_one_rank_and_a_torch_optimizer() -> None:
    from moeplan.execution.layer import ExpertLayer

    old = Placement(np.array([[0, 1, 2]], np.int32), np.zeros(3, np.int32), 3, 1, 1)
    new = Placement(np.array([[2, 0, -1, 1]], np.int32), np.zeros(4, np.int32), 3, 1, 1)

    def run(move: bool) -> torch.Tensor:
        layer = ExpertLayer(single_mesh(), 32, 32, old, 0)
        rows = torch.randn(3, 3 * 32 * 32, generator=torch.Generator().manual_seed(0)) * 0.1
        layer.load(lambda e: rows[e])
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        migrator = Migrator([layer], single_mesh(), old, torch_state(optimizer, [layer]))
        x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
        experts = torch.arange(20)[:, None] % 3
        for step in range(4):
            optimizer.zero_grad()
            layer(x, experts, torch.ones(20, 1)).square().sum().backward()
            optimizer.step()
            if step == 1 and move:
                migrator.submit(new)
                report = migrator.at_step_boundary()
                assert report is not None
                assert report.finished
                assert report.moved_experts == 0  # all on one rank
        return layer(x, experts, torch.ones(20, 1)).detach()

    assert torch.equal(run(False), run(True))


def test_a_parcel_comes_back_or_is_refused() -> None:
    rows = [torch.randn(7), torch.randn(3).bfloat16(), torch.arange(5)]
    message = pack(rows)
    back = unpack(message, rows)
    assert back is not None
    for a, b in zip(rows, back, strict=True):
        assert torch.equal(a, b)
    for position in range(0, len(message)):
        damaged = message.clone()
        damaged[position] ^= 4
        assert unpack(damaged, rows) is None
    swapped = message.clone()
    swapped[:4], swapped[4:8] = message[4:8], message[:4]  # two words exchanged: the plain sum is the same
    assert unpack(swapped, rows) is None
