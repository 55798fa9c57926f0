"""Ranks of a collectives run: those that torchrun started, or local processes started here.

A rank that dies ends the others with one error that names it; points measured until then are kept.
"""

from __future__ import annotations

import datetime
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from moeplan.errors import MoeplanError, ProfileError, SpecError
from moeplan.profiling.collectives import CollectiveTimer, Communicator, Exchange, collective_benches
from moeplan.profiling.device import Device, find_device, torch_module
from moeplan.profiling.journal import Journal
from moeplan.profiling.protocol import Progress, Rig, run_benches

__all__ = ["Job", "require_whole_nodes", "run_local_ranks", "run_torchrun_rank", "under_torchrun"]


class _ExchangeError(ProfileError):
    """An exchange failed, most often because a peer is gone."""


Points = dict[str, tuple[str, dict[str, Any], list[float]]]
_GRACE_S = 3.0


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank needs to know."""

    what: Exchange
    device: str
    budget_s: float
    seed: int = 0
    ranks_per_node: int = 0  # 0: as discovered
    timeout_s: float = 120.0


def under_torchrun() -> bool:
    """Whether torchrun (or another launcher with its environment) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class _Relay(Journal):
    """A journal in memory that also hands every point on."""

    def __init__(self, points: Points, send: Callable[[Any], None]) -> None:
        super().__init__(None, {})
        self.points = dict(points)
        self._send = send

    def add(self, table: str, row: Any, samples: list[float]) -> None:
        """See :class:`Journal`."""
        super().add(table, row, samples)
        self._send(("point", table, dict(row), samples))


def _kept(journal: Journal) -> str:
    """What to say of the points of a run that failed; nothing where there is none, and so nothing to go on from."""
    return f"; {journal.kept}" if journal.kept else ""


def _node_of_ranks(job: Job, dist: Any, world: int) -> tuple[int, ...]:
    """Ranks of one box share its name; ``ranks_per_node`` overrides it, as for network namespaces."""
    if job.ranks_per_node:
        return tuple(rank // job.ranks_per_node for rank in range(world))
    mine = f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '0')}"
    names: list[Any] = [None] * world
    dist.all_gather_object(names, mine)
    order = list(dict.fromkeys(names))
    return tuple(order.index(name) for name in names)


def require_whole_nodes(world: int, ranks_per_node: int) -> None:
    """Raises SpecError where the ranks do not fill their nodes; 0 per node: as discovered."""
    if ranks_per_node and world % ranks_per_node:
        raise SpecError(
            f"ranks ({world}) must divide by --ranks-per-node ({ranks_per_node}); give one that divides them, or leave"
            " it out"
        )


def _measure(job: Job, rank: int, world: int, journal: Journal, report: Progress) -> list[str]:
    """Take part in a run as ``rank``; the process group stands. Returns what was left out."""
    torch_module()
    import torch.distributed as dist

    device = find_device(job.device)
    comm = Communicator(device, rank, _node_of_ranks(job, dist, world), dist)
    journal.points = comm.agree(journal.points if rank == 0 else None)
    rig = Rig(CollectiveTimer(comm), journal, random.Random(job.seed), agree=comm.agree, strict=True)
    rig.anywhere = lambda so: comm.most(so) > 0
    try:
        run_benches(collective_benches(comm, job.what), rig, job.budget_s, report)
    except (RuntimeError, OSError) as error:
        raise _ExchangeError(f"while measuring {rig.doing}: {str(error).splitlines()[0]}") from error
    return rig.left_out


def _start_group(device: Device | None, job: Job, store: Any, rank: int, world: int) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if job.device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=job.timeout_s),
    )


# ---------------------------------------------------------------------- started by torchrun


def run_torchrun_rank(job: Job, journal: Journal, report: Progress) -> list[str]:
    """Measure as one of the ranks that torchrun started; rank 0's ``journal`` keeps the points.

    torchrun ends the survivors of a dead rank with SIGTERM, often before an exchange fails: that too ends the run
    with the message here.

    Raises:
        ProfileError: a rank died; the message names it and what was being measured.
    """
    torch = torch_module()
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    require_whole_nodes(world, job.ranks_per_node)
    if job.device == "cuda":
        find_device("cuda")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "nccl" if job.device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=job.timeout_s)
    )
    store = dist.distributed_c10d._get_default_store()
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        left_out = _measure(job, rank, world, journal, report)
        dist.barrier()
    except (_ExchangeError, RuntimeError, InterruptedError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # there is something to say first
        reason = str(error).splitlines()[0]
        raise ProfileError(f"{_missing_rank(store, rank, world)} {reason}{_kept(journal)}") from error
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()
    return left_out


def _told_to_end(_number: int, _frame: Any) -> None:
    raise InterruptedError(f"rank {os.environ['RANK']} was told to end (SIGTERM)")


def _missing_rank(store: Any, rank: int, world: int) -> str:
    """Survivors report themselves to the store; who does not within the grace time is gone."""
    try:
        store.set(f"moeplan/alive/{rank}", "1")
        missing = []
        until = time.monotonic() + _GRACE_S
        for other in range(world):
            while not store.check([f"moeplan/alive/{other}"]) and time.monotonic() < until:
                time.sleep(0.05)
            if not store.check([f"moeplan/alive/{other}"]):
                missing.append(str(other))
        return f"rank {', '.join(missing)} died" if missing else f"no rank died, but rank {rank} stopped"
    except RuntimeError:
        return "the rank that holds the store (rank 0) died"


# ---------------------------------------------------------------------- started here


def _local_rank(rank: int, world: int, port: int, job: Job, points: Points, link: Connection) -> None:
    """Body of a local process; rank 0 sends points and progress, every rank how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent has the word, and ends the ranks
    torch = torch_module()
    import torch.distributed as dist

    torch.set_num_threads(1)
    if job.device == "cuda":
        find_device("cuda")
        torch.cuda.set_device(rank)
    elif hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    send: Callable[[Any], None] = link.send if rank == 0 else lambda _message: None
    try:
        timeout = datetime.timedelta(seconds=job.timeout_s)
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=timeout)
        _start_group(None, job, store, rank, world)
        left_out = _measure(job, rank, world, _Relay(points, send), lambda what, done: send(("progress", what, done)))
        send(("left_out", left_out))
        dist.barrier()
        dist.destroy_process_group()
    except (MoeplanError, RuntimeError, OSError) as error:
        with suppress(OSError):  # the parent was killed: nobody listens
            link.send(("failed", rank, type(error).__name__, str(error)))
        os._exit(3)
    link.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_local_ranks(
    job: Job,
    world: int,
    journal: Journal,
    report: Progress,
    started: Callable[[list[int]], None] = lambda _pids: None,
) -> list[str]:
    """Start ``world`` processes on this machine, pinned to its cores in turn, and measure with them.

    ``started`` is told their process ids. Returns what was left out.

    Raises:
        ProfileError: a rank died or failed; the message names it, the others are ended, and the points
            measured until then stand in ``journal``.
    """
    require_whole_nodes(world, job.ranks_per_node)
    context = get_context("spawn")
    port = _free_port()
    links, processes = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=_local_rank, args=(rank, world, port, job, journal.points if rank == 0 else {}, there), daemon=True
        )
        process.start()
        there.close()
        links.append(here)
        processes.append(process)
    started([process.pid or 0 for process in processes])
    try:
        return _supervise(processes, links, journal, report)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _supervise(processes: list[Any], links: list[Connection], journal: Journal, report: Progress) -> list[str]:
    left_out: list[str] = []
    open_links = {link: rank for rank, link in enumerate(links)}
    failures: list[tuple[int, str, str]] = []
    doing = "start"
    first_failure = None
    while open_links:
        for link in wait(list(open_links), timeout=0.2):
            assert isinstance(link, Connection)
            try:
                message = link.recv()
            except (EOFError, OSError):
                rank = open_links.pop(link)
                processes[rank].join()
                continue
            if message[0] == "point":
                journal.add(*message[1:])
            elif message[0] == "progress":
                doing = message[1]
                report(message[1], message[2])
            elif message[0] == "left_out":
                left_out = message[1]
            else:
                failures.append(message[1:])
        dead = [r for r, p in enumerate(processes) if p.exitcode is not None and p.exitcode not in (0, 3)]
        if dead:
            how = processes[dead[0]].exitcode
            cause = f"by signal {-how}" if how < 0 else f"with exit code {how}"
            raise ProfileError(
                f"rank {dead[0]} died {cause} during {doing}; the other ranks were ended{_kept(journal)}"
            )
        if failures and first_failure is None:
            first_failure = time.monotonic()
        # A failing exchange is what survivors see first: wait for the rank that caused it.
        if first_failure is not None and (time.monotonic() - first_failure > _GRACE_S):
            break
    if failures:
        rank, kind, text = failures[0]
        if kind in ("SpecError", "UnknownNameError"):
            raise SpecError(text)
        raise ProfileError(f"rank {rank} failed {text}{_kept(journal)}")
    return left_out
