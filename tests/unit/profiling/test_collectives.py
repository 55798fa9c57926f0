"""Exchanges between real local ranks: what arrives is right, every op is measured, a dead rank is named."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moeplan.artifacts.profile import HardwareProfile
from moeplan.errors import MoeplanError, ProfileError, SpecError

torch = pytest.importorskip("torch", reason="profilers need torch")

from moeplan.cli.profile_measure import _show
from moeplan.pipeline.profiling import ProfileRequest, Sizes, _exchange, measure_profile
from moeplan.profiling.collectives import (
    CollectiveTimer,
    Communicator,
    Exchange,
    collective_benches,
    most_elements,
    uneven_splits,
)
from moeplan.profiling.device import Device
from moeplan.profiling.journal import Journal
from moeplan.profiling.protocol import Bench, Rig, Series, run_benches
from moeplan.profiling.ranks import Job, _supervise, run_local_ranks
from moeplan.specs.models import find_model


def test_uneven_splits_follow_the_matrix():
    weight_RR = np.array([[1.0, 3.0], [0.0, 4.0]])
    assert uneven_splits(weight_RR, 100).tolist() == [[25, 75], [0, 100]]
    assert uneven_splits(np.ones((4, 4)), 8).tolist() == [[2] * 4] * 4
    none_RR = np.array([[0.0, 0.0], [1.0, 2.0]])
    assert uneven_splits(none_RR, 3).tolist() == [[0, 0], [2, 4]], "a rank may send nothing"


@pytest.mark.parametrize("ranks", [2, 3, 8, 16, 64])
@pytest.mark.parametrize("pairs", [1, 2, 8, 1000, 2**24])
def test_as_many_elements_are_sent_as_are_said_and_columns_stay_even(ranks, pairs):
    """A token of 8 ranks and 2 experts is 2 pairs, not 0; of 16 ranks and 8 experts 8, not 16."""
    even = uneven_splits(np.ones((ranks, ranks)), pairs)
    assert even.sum(0).tolist() == even.sum(1).tolist() == [pairs] * ranks
    assert np.ptp(even) <= 1
    weight_R = np.random.default_rng(0).dirichlet(np.full(ranks, 2.0))
    skewed = uneven_splits(np.tile(weight_R, (ranks, 1)), pairs)
    assert skewed.sum(1).tolist() == [pairs] * ranks
    assert np.abs(skewed.sum(0) - weight_R * pairs * ranks).max() < 1 + 1e-6
    weight_RR = np.random.default_rng(1).gamma(0.5, size=(ranks, ranks))
    any_RR = uneven_splits(weight_RR, pairs)
    share_RR = weight_RR / weight_RR.sum() * pairs * ranks
    assert any_RR.sum() == pairs * ranks
    assert np.abs(any_RR.sum(1) - share_RR.sum(1)).max() < 1 + 1e-6
    assert np.abs(any_RR - share_RR).max() < 2
    assert any_RR.min() >= 0


@pytest.mark.parametrize(("ranks", "top_k"), [(8, 2), (16, 8)])
def test_dispatch_and_combine_of_one_token_move_its_pairs(ranks, top_k):
    def exchange(into, out, receives, sends, group):
        moved.append((sum(receives), sum(sends)))

    dist = _alone(all_to_all_single=exchange, get_rank=lambda _group: rank)
    for rank in range(ranks):
        moved: list[tuple[int, int]] = []
        comm = Communicator(Device("cpu", torch, 1 << 12), rank, (0,) * ranks, dist)
        bench = collective_benches(comm, Exchange(ops=("alltoall",), tokens=((4, top_k, 64),)))[1]
        prepare = bench.open()
        for series in bench.series:
            if series.row(1)["distribution"] == "balanced":
                prepare(series, 1)(0)
        assert moved == [(top_k, top_k)] * 2


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_on_two_levels_tokens_go_once_to_a_node_and_once_to_each_rank_of_it(top_k):
    """Three nodes of four: choices fall evenly, so a node is one of K's with chance 1 - (2/3)^K, a rank 1 - (11/12)^K.
    Dispatch goes between nodes first, combine inside."""

    def exchange(into, out, receives, sends, group):
        assert (len(into), len(out)) == (sum(receives), sum(sends))
        sent.append((len(group), sum(receives)))

    def in_group(group):
        return group.index(rank) if group else rank

    dist = _alone(all_to_all_single=exchange, new_group=list, get_rank=in_group)
    tokens = 96
    per_node, per_rank = (tokens * n * (1 - (1 - 1 / n) ** top_k) for n in (3, 12))
    whole = {"dispatch": [], "combine": []}
    for rank in range(12):
        comm = Communicator(Device("cpu", torch, 1 << 12), rank, tuple(np.arange(12) // 4), dist)
        bench = collective_benches(comm, Exchange(ops=("alltoall",), tokens=((4, top_k, 24),)))[1]
        prepare = bench.open()
        for series in bench.series:
            if series.row(1)["mode"] == "two_level":
                sent: list[tuple[int, int]] = []
                prepare(series, tokens)(0)
                whole[series.row(1)["phase"]].append(sent)
    for phase, order in (("dispatch", [3, 4]), ("combine", [4, 3])):
        assert {tuple(members for members, _ in hops) for hops in whole[phase]} == {tuple(order)}
        rows = {members: [dict(hops)[members] for hops in whole[phase]] for members in order}
        assert np.mean(rows[3]) == pytest.approx(per_node, abs=1)
        assert np.mean(rows[4]) == pytest.approx(per_rank, abs=1)
        assert all(np.ptp(each) <= 1 for each in rows.values())


def _run_short_of_memory(rank: int, port: int) -> None:
    """Body of a rank: rank 1 has no memory for the first bench, and none for large sizes of the second; 100 kB for its
    buffers."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port, 2, rank == 0), rank=rank, world_size=2)
    comm = Communicator(Device("cpu", torch, 1 << 12), rank, (0, 0), dist)
    rig = Rig(CollectiveTimer(comm), Journal(None, {}), random.Random(0), agree=comm.agree, strict=True)
    rig.anywhere = lambda so: comm.most(so) > 0

    def prepare(series, size):
        if rank == 1 and size > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda _i: dist.barrier()

    def opened(name):
        if rank == 1 and name == "a":
            raise MemoryError
        return prepare

    def series(name):
        return Series("experts", name, lambda size: {"tokens": size, "label": name}, 1, 1024, 5)

    run_benches([Bench(name, (series(name),), partial(opened, name)) for name in "ab"], rig, 0.5)
    assert len(rig.left_out) == 2
    assert rig.left_out[0].startswith("a: not measured, weights and buffers do not fit")
    assert rig.left_out[1].startswith("b: out of memory from size ")
    assert {row["label"] for _, row, _ in rig.journal.points.values()} == {"b"}

    class Small(Device):
        @property
        def free_bytes(self):
            return 200_000 if rank == 1 else 10**9

    comm.device = Small("cpu", torch, 1 << 12)
    even = ((1.0, 1.0),) * 2
    large, tokens = collective_benches(comm, Exchange(max_bytes=2**20, weight_RR=even, tokens=((256, 2, 4),)))
    assert {s.high for s in large.series} == {2**15}  # two buffers of 32 KiB in 100 kB
    assert large.left_out[0].endswith("bytes from 32,769 to 1,048,576 do not fit into the memory, measured to 32,768")
    assert {s.high for s in tokens.series} == {16}  # 33 rows of 1 KiB, twice
    assert "tokens from 17 to 1,024 do not fit" in tokens.left_out[0]
    dist.barrier()
    dist.destroy_process_group()


def test_memory_that_one_rank_lacks_ends_a_size_on_all():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_run_short_of_memory, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    assert [process.exitcode for process in ranks] == [0] * 2


@pytest.mark.parametrize("world", range(2, 65))
def test_every_rank_has_room_for_what_it_sends_and_receives(world: int):
    for weight_R in (np.random.default_rng(world).dirichlet(np.full(world, 2.0)), np.eye(world)[0]):
        weight_RR = np.tile(weight_R, (world, 1))
        room = most_elements(weight_RR, 1024)
        for total in range(1, 1025, 31):
            split_RR = uneven_splits(weight_RR, total)
            assert max(split_RR.sum(0).max(), split_RR.sum(1).max()) <= room


def _alone(**calls) -> SimpleNamespace:
    """What stands for torch.distributed where one rank answers for all."""
    return SimpleNamespace(all_reduce=lambda _box, op: None, ReduceOp=SimpleNamespace(MAX="max"), **calls)


@pytest.mark.parametrize("traffic", [None, ((1.0, *[0.0] * 7),) * 8])
def test_buffers_of_eight_ranks_hold_the_uneven_exchange(traffic):
    def exchange(into, out, receives, sends):
        assert (len(into), len(out)) == (sum(receives), sum(sends))
        done.append(len(into))

    done: list[int] = []
    gathers = {"all_gather_single": None, "all_gather_into_tensor": None, "reduce_scatter_tensor": None}
    dist = _alone(all_to_all_single=exchange, **gathers)
    for rank in range(8):
        comm = Communicator(Device("cpu", torch, 1 << 12), rank, (0,) * 8, dist)
        bench = collective_benches(comm, Exchange(ops=("alltoall",), max_bytes=16384, weight_RR=traffic))[0]
        series = next(s for s in bench.series if "uneven" in s.label)
        prepare = bench.open()
        for size in (256, 16384):
            prepare(series, size)(0)
    assert max(done) > 16384 / 4, "the busiest receives more than the mean"


def test_rows_of_different_traffic_do_not_mix():
    """The tables name the matrix: a trace's rows are neither the built-in one's nor another trace's."""
    dist = _alone()

    def forms(traffic) -> list[set[str]]:
        comm = Communicator(Device("cpu", torch, 1 << 12), 0, (0, 0), dist)
        what = Exchange(ops=("alltoall",), weight_RR=traffic, tokens=((8, 2, 4),))
        return [{s.row(256)["distribution"] for s in bench.series} for bench in collective_benches(comm, what)]

    assert forms(None) == [{"even", "uneven"}, {"balanced", "explicit"}]
    one, same, other = forms(((1.0, 3.0), (0.0, 4.0))), forms(((1.0, 3.0), (0.0, 4.0))), forms(((1.0, 3.0), (4.0, 0.0)))
    assert one == same
    for own, others, even in zip(one, other, ("even", "balanced"), strict=True):
        assert own & others == {even}
        (name,) = own - {even}
        assert name.startswith("trace:")


def test_every_scope_and_form_on_two_nodes_of_two(tmp_path: Path):
    """Four ranks, told to be two nodes: scopes apart, two-level forms, uneven splits, tokens."""
    request = ProfileRequest(
        parts=("collectives",),
        sizes=Sizes(hidden=16, inter=16, experts=8, top_k=2),
        dtypes=("fp32",),
        ranks=4,
        ranks_per_node=2,
        max_bytes=1024,
        max_tokens=4,
        budget_s=1.0,
    )
    answer = measure_profile(request, tmp_path / "p")
    table = HardwareProfile.open(tmp_path / "p").table("collectives").to_pylist()
    forms = {(r["op"], r["algorithm"], r["distribution"], r["ranks"], r["nodes"]) for r in table}
    for op in ("all_reduce", "all_gather", "reduce_scatter", "alltoall"):
        assert {(op, "flat", "even", 4, 2), (op, "flat", "even", 2, 1), (op, "flat", "even", 2, 2)} <= forms
    assert {("p2p", "flat", "even", 2, 1), ("p2p", "flat", "even", 2, 2)} <= forms
    assert ("alltoall", "two_level", "even", 4, 2) in forms
    assert ("all_reduce", "two_level", "even", 4, 2) in forms
    assert ("alltoall", "flat", "uneven", 4, 2) in forms
    assert all(r["backend"] == "gloo" and r["latency_us"] > 0 and r["samples"] >= 1 for r in table)
    tokens = HardwareProfile.open(tmp_path / "p").table("alltoall").to_pylist()
    ways = {(r["mode"], r["phase"], r["distribution"], r["ranks"], r["nodes"]) for r in tokens}
    for phase in ("dispatch", "combine"):
        assert {("two_level", phase, "balanced", 4, 2), ("flat", phase, "balanced", 4, 2)} <= ways
    assert answer["rows"]["alltoall"] >= 4
    assert "--ranks 4 --ranks-per-node 2" in HardwareProfile.open(tmp_path / "p").meta.command
    assert not (tmp_path / "p.journal.jsonl").exists()


def _check_contents(rank: int, port: int) -> None:
    """Body of a rank: every operation's result against what the ranks' inputs say."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port, 4, rank == 0), rank=rank, world_size=4)
    comm = Communicator(Device("cpu", torch, 1 << 12), rank, (0, 0, 1, 1), dist)
    made: list = []

    class Known(Device):
        def normal(self, shape, dtype, scale=1.0):
            # Element i of rank r's first buffer is 1000 r + i; what is received lands in the second.
            made.append(1000.0 * rank + torch.arange(shape[0]).float())
            return made[-1]

        def copies(self, bytes_each, most=64):
            return 1

    comm.device = Known("cpu", torch, 1 << 12)
    weight = ((1.0, 2.0, 0.0, 1.0),) * 4
    bench = collective_benches(comm, Exchange(max_bytes=256, weight_RR=weight))[0]
    prepare = bench.open()
    source, target = made[0].clone(), made[1]

    def run(word: str):
        made[0].copy_(source)
        target.fill_(-1)
        series = next(s for s in bench.series if s.label.startswith(word))
        prepare(series, 64)(0)
        return made[0][:16].tolist(), target[:16].tolist()

    flat = run("alltoall flat even all")[1]
    want = [1000.0 * peer + 4 * rank + i for peer in range(4) for i in range(4)]
    assert flat == want
    # Two levels must deliver what one does, in the order of the sender's node and place.
    assert run("alltoall two_level")[1] == want
    total = [6000.0 + 4 * i for i in range(16)]
    assert run("all_reduce flat even all")[0] == total
    assert run("all_reduce two_level")[0] == total
    uneven = run("alltoall flat uneven")[1]
    each = [4, 8, 0, 4][rank]
    start = [0, 4, 12, 12][rank]
    want = [1000.0 * peer + start + i for peer in range(4) for i in range(each)]
    assert uneven[: len(want[:16])] == want[:16]
    assert run("all_gather flat even all")[1] == [1000.0 * peer + i for peer in range(4) for i in range(4)]
    dist.barrier()
    dist.destroy_process_group()


def test_contents_of_every_exchange():

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_check_contents, args=(rank, port)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    assert [process.exitcode for process in ranks] == [0] * 4


def test_a_dying_rank_ends_the_others_and_is_named(tmp_path: Path):
    journal = Journal(tmp_path / "j.jsonl", {})
    pids: list[int] = []

    def kill_one() -> None:
        until = time.monotonic() + 600
        while len(journal.points) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(pids[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)

    def started(found: list[int]) -> None:
        pids.extend(found)
        killer.start()

    job = Job(Exchange(ops=("all_reduce", "alltoall"), max_bytes=1 << 12), "cpu", budget_s=60.0, timeout_s=30.0)
    with pytest.raises(ProfileError, match=r"rank 1 died by signal 9 during .* until then are kept in .*j.jsonl; the"):
        run_local_ranks(job, 3, journal, lambda _w, _d: None, started)
    killer.join()
    assert len(journal.points) >= 3
    for pid in pids:
        with pytest.raises(ProcessLookupError, match="No such process"):
            os.kill(pid, 0)
    journal.close()
    again = Journal(tmp_path / "j.jsonl", {}, resume=True)
    again.close()
    assert again.points.keys() == journal.points.keys()


def _wait_until(done: Callable[[], bool], parent: subprocess.Popen[str]) -> None:
    """However long a loaded machine takes, as long as the parent lives."""
    until = time.monotonic() + 600
    while not done():
        assert parent.poll() is None, parent.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ranks_whose_parent_is_killed_end_without_a_word(tmp_path: Path):
    command = [sys.executable, "-m", "moeplan", "profile", "collectives", "--op", "all_reduce", "--dtype", "fp32"]
    command += ["--ranks", "2", "--budget", "60s", "--out", str(tmp_path / "p")]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    journal = tmp_path / "p.journal.jsonl"
    _wait_until(lambda: journal.exists() and journal.read_text().count("\n") > 3, parent)
    parent.kill()
    assert "Traceback" not in parent.communicate(timeout=600)[1]  # read until the last rank has ended


def test_ctrl_c_ends_all_ranks_with_one_word(tmp_path: Path):
    command = [sys.executable, "-m", "moeplan", "profile", "collectives", "--op", "all_reduce", "--dtype", "fp32"]
    command += ["--device", "cpu", "--ranks", "2", "--budget", "60s", "--out", str(tmp_path / "p")]
    parent = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    journal = tmp_path / "p.journal.jsonl"
    _wait_until(lambda: journal.exists() and journal.read_text().count("\n") > 3, parent)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the whole group
    said = parent.communicate(timeout=600)[1]
    assert parent.returncode == 130
    assert "points measured until then are kept in" in said
    assert "Traceback" not in said


def test_one_rank_cannot_exchange(tmp_path: Path):
    with pytest.raises(SpecError, match="collectives need --ranks N of at least 2"):
        measure_profile(ProfileRequest(parts=("collectives",)), tmp_path / "p")
    job = Job(Exchange(), "cpu", 1.0, ranks_per_node=2)
    with pytest.raises(SpecError, match=r"ranks \(3\) must divide by --ranks-per-node \(2\); give one"):
        run_local_ranks(job, 3, Journal(None, {}), lambda _w, _d: None)


def test_a_rank_that_fails_before_the_first_point_leaves_nothing_to_go_on_from():
    for exitcode, sent, message in (
        (3, ("failed", 0, "ProfileError", "while measuring alltoall: gone"), "rank 0 failed while measuring .*: gone"),
        (1, ("progress", "a thing", 0.0), "rank 0 died with exit code 1 during a thing; the other ranks were ended"),
    ):
        here, there = torch.multiprocessing.Pipe(duplex=False)
        there.send(sent)
        there.close()
        process = SimpleNamespace(exitcode=exitcode, join=lambda: None)
        with pytest.raises(ProfileError, match=f"^{message}$"):
            _supervise([process], [here], Journal(None, {}), lambda _w, _d: None)


def test_under_torchrun(tmp_path: Path, capsys):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "moeplan"]
    command += ["profile", "collectives", "--op", "alltoall", "--max-bytes", "1024", "--dtype", "fp32"]
    command += ["--budget", "1s", "--out", str(tmp_path / "p"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('"points"') == 1, "only rank 0 answers"
    profile = HardwareProfile.open(tmp_path / "p")
    assert {r["ranks"] for r in profile.table("collectives").to_pylist()} == {2}
    assert "foreign_cpu_share" not in profile.meta.system, "the other ranks would count as other programs"
    answer = json.loads(done.stdout)
    _show(answer)
    assert "other programs" not in capsys.readouterr().out


def test_every_model_and_what_is_cut_off_is_said(tmp_path: Path):
    models = ("olmoe-1b-7b", "mixtral-8x7b")
    asked = {"models": models, "dtypes": ("fp32",), "max_tokens": 4096}
    notes: list[str] = []
    what = _exchange(ProfileRequest(**asked), [find_model(name) for name in models], 2, notes)
    assert what.tokens == ((2048, 8, 64), (4096, 2, 8))
    assert notes == ["dispatch and combine of tokens: tokens per rank from 1,025 to 4,096 are not measured"]
    comm = Communicator(Device("cpu", torch, 1 << 12), 0, (0, 0), _alone())
    rows = [series.row(1) for bench in collective_benches(comm, what)[1:] for series in bench.series]
    assert {(row["hidden"], row["top_k"], row["num_experts"]) for row in rows} == set(what.tokens)
    notes.clear()
    _exchange(ProfileRequest(ops=("p2p",), **asked), [find_model(name) for name in models], 2, notes)
    assert notes == ["dispatch and combine of tokens: not measured, they need alltoall in --op"]
    with pytest.raises(SpecError, match=r"trace \(t.npz\) shapes alltoall, which --op \(p2p\) leaves out; add it"):
        _exchange(ProfileRequest(ops=("p2p",), trace="t.npz"), [], 2, [])
    request = ProfileRequest(parts=("collectives",), ranks=2, trace=str(tmp_path / "none.npz"))
    with pytest.raises(MoeplanError, match=r"none\.npz"):
        measure_profile(request, tmp_path / "p")


def test_ranks_that_do_not_fill_their_nodes_are_refused_before_anything_is_measured(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("moeplan.pipeline.profiling.run_benches", lambda *_: pytest.fail("measured"))
    request = ProfileRequest(parts=("memory", "collectives"), ranks=2, ranks_per_node=5)
    with pytest.raises(SpecError, match=r"ranks \(2\) must divide by --ranks-per-node \(5\); give one that divides"):
        measure_profile(request, tmp_path / "p")


def test_another_number_of_ranks_than_the_launcher_started(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    request = ProfileRequest(parts=("collectives",), ranks=2)
    with pytest.raises(SpecError, match=r"ranks \(2\) is not what torchrun started \(4\)"):
        measure_profile(request, tmp_path / "p")


@pytest.mark.parametrize("terminated", [False, True])
def test_a_dying_rank_of_a_launcher_is_named_by_the_survivor(tmp_path: Path, terminated: bool):
    """Ranks with a launcher's environment: the survivor, even when told to end, finds out by the store who is gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moeplan", "profile", "collectives", "--op", "all_reduce", "--dtype", "fp32"]
    command += ["--budget", "60s", "--out", str(tmp_path / "p")]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, second = (
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    )
    journal = tmp_path / "p.journal.jsonl"
    _wait_until(lambda: journal.exists() and journal.read_text().count("\n") > 3, first)
    second.kill()
    if terminated:  # as torchrun does
        first.terminate()
    second.communicate()
    errors = first.communicate(timeout=600)[1]
    assert first.returncode == 2
    assert "error: rank 1 died while measuring all_reduce" in errors
    assert errors.count("error:") == 1
    if terminated and "SIGTERM" in errors:
        assert ": rank 0 was told to end (SIGTERM); " in errors, "of rank 1 it is not known what ended it"
    assert f"points measured until then are kept in {journal}; the same command with --resume goes on" in errors
    assert len(journal.read_text().splitlines()) > 3
