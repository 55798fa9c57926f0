"""Ranks: local processes started here, or those that torchrun started.

A rank that fails, dies, hangs or never joins ends the others, and one error names it.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from moeplan import errors
from moeplan.errors import InputError, MissingExtraError, MoeplanError, RunError

__all__ = [
    "Launch", "Rank", "join_torchrun", "most_restarts", "restarts", "run_ranks", "run_torchrun", "under_torchrun",
]  # fmt: skip

_GRACE_S = 3.0
_FAILED = 3


@dataclass(frozen=True, slots=True)
class Launch:
    """How ranks are started. ``port`` 0: any free one. Timeouts: for all to join, and for one exchange."""

    ranks: int
    device: str = "cpu"
    port: int = 0
    join_timeout_s: float = 60.0
    timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank's function is told: its number, how many there are, its device, and a line to whoever started it."""

    rank: int
    world: int
    device: str
    send: Callable[[Any], None]


def under_torchrun() -> bool:
    """Whether torchrun (or another launcher with its environment) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarts() -> int:
    """How often torchrun has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def most_restarts() -> int:
    """How often it may."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def _join(store: Any, rank: int, world: int, launch: Launch) -> None:
    """Meet all other ranks at the store, then make the process group.

    Raises:
        RunError: a rank did not come in time; it is named.
    """
    import torch
    import torch.distributed as dist

    store.set(f"moeplan/joined/{rank}", "1")
    until = time.monotonic() + launch.join_timeout_s
    missing = [other for other in range(world) if other != rank]
    while missing:
        missing = [other for other in missing if not store.check([f"moeplan/joined/{other}"])]
        if missing and time.monotonic() > until:
            names = ", ".join(map(str, missing))
            raise RunError(
                f"rank {names} did not join within {launch.join_timeout_s:g} s; {world - len(missing)} of {world} ranks"
                " are there: is it started, and can it reach the store?"
            )
        if missing:
            time.sleep(0.01)
    if launch.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group(
        "nccl" if launch.device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=launch.timeout_s),
    )


def join_torchrun(launch: Launch) -> Rank:
    """Join as the rank that torchrun made this process.

    Raises:
        RunError: a rank did not come in time, or the store cannot be reached.
    """
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        wait_for = datetime.timedelta(seconds=launch.join_timeout_s)
        store = dist.TCPStore(host, port, None, rank == 0 and not agent, timeout=wait_for, wait_for_workers=False)
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise RunError(f"rank {rank} cannot reach the store: {_first_line(error)}") from error
    # One store serves all attempts of torchrun: what the ranks before said must not be heard.
    _join(dist.PrefixStore(f"moeplan/attempt_{restarts()}", store), rank, world, launch)
    return Rank(rank, world, launch.device, lambda _message: None)


def run_torchrun(
    launch: Launch, target: Callable[..., Any], *args: Any, on_message: Callable[[int, Any], None]
) -> Any:
    """Be the rank that torchrun made this process: what ``target(rank: Rank, *args)`` answers.

    ``on_message`` gets what this rank sends, where this is rank 0.

    Raises:
        MoeplanError: as :func:`run_ranks`, with its message on one rank only; the others raise a RunError without one.
    """
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if launch.ranks not in (0, world):
        raise RunError(
            "" if rank else f"ranks ({launch.ranks}) is not the number that torchrun started ({world}); leave it out"
        )
    me = join_torchrun(launch)
    store = dist.distributed_c10d._get_default_store()
    try:
        answer = target(Rank(rank, world, me.device, lambda m: None if rank else on_message(rank, m)), *args)
        dist.barrier()
        dist.destroy_process_group()
        return answer
    except MoeplanError as error:
        if _first_to_speak(store):
            raise
        raise RunError("") from error
    except (RuntimeError, OSError) as error:
        missing = _missing(store, rank, world)
        if _first_to_speak(store):
            raise RunError(f"{missing}: {_first_line(error)} ({_where(error)})") from error
        raise RunError("") from error


def _first_to_speak(store: Any) -> bool:
    try:
        return bool(store.add("moeplan/spoken", 1) == 1)
    except (RuntimeError, OSError):
        return True  # the store is gone, nobody else can know


def _missing(store: Any, rank: int, world: int) -> str:
    """Survivors report to the store; who does not within the grace time is gone."""
    try:
        store.set(f"moeplan/alive/{rank}", "1")
        until = time.monotonic() + _GRACE_S
        gone = list(range(world))
        while gone and time.monotonic() < until:
            gone = [other for other in gone if not store.check([f"moeplan/alive/{other}"])]
            time.sleep(0.05)
        return f"rank {', '.join(map(str, gone))} died or hangs" if gone else f"rank {rank} failed"
    except (RuntimeError, OSError):
        return "the process that holds the store died"


# ---------------------------------------------------------------------- started here


def _body(launch: Launch, rank: int, port: int, target: Callable[..., Any], args: Any, link: Connection) -> None:
    """A local rank: joins, works, and says over ``link`` how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started us ends us
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        wait_for = datetime.timedelta(seconds=launch.join_timeout_s)
        store = dist.TCPStore(
            "127.0.0.1", port, None, rank == 0, timeout=wait_for, wait_for_workers=False
        )
        _join(store, rank, launch.ranks, launch)
        answer = target(Rank(rank, launch.ranks, launch.device, lambda message: link.send(("message", message))), *args)
        dist.barrier()
        dist.destroy_process_group()
        link.send(("done", answer))
        link.close()
    except Exception as error:
        text = str(error) if isinstance(error, MoeplanError) else f"{_first_line(error)} ({_where(error)})"
        with suppress(OSError):  # the one who started us may be gone, then nobody is told
            link.send(("failed", type(error).__name__, text, _of_exchange(error)))
        os._exit(_FAILED)  # other ranks may be gone: no tidy end of the process group


def _of_exchange(error: BaseException) -> bool:
    """Whether ``error`` may come from another rank's: an exchange failed."""
    return isinstance(error.__cause__ if isinstance(error, MoeplanError) else error, RuntimeError)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _where(error: BaseException) -> str:
    """File and line in this project, or the last one."""
    trace, place = error.__traceback__, "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        if "site-packages" not in code.co_filename or place == "?":
            place = f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} in {code.co_name}"  # noqa: PTH119
        trace = trace.tb_next
    return place


def _port(launch: Launch) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", launch.port))
        except (OSError, OverflowError) as error:
            raise RunError(f"port ({launch.port}) cannot be used: {error}; choose another, or 0 for any") from error
        return int(probe.getsockname()[1])


def run_ranks(
    launch: Launch,
    target: Callable[..., Any],
    *args: Any,
    on_message: Callable[[int, Any], None] = lambda _rank, _message: None,
) -> list[Any]:
    """Start ``launch.ranks`` processes and return what ``target(rank: Rank, *args)`` answered on each.

    ``target`` must be importable by name, and answer plain values or arrays (tensors cannot outlive their process).
    The default process group stands while it runs. ``on_message`` gets what a rank sends.

    Raises:
        RunError: a rank died, failed or never joined; the others are ended. An error of :mod:`moeplan.errors` that a
            rank raised is raised here, once. MissingExtraError: torch is not installed; no rank is started.
    """
    if launch.ranks < 1:
        raise InputError(f"ranks ({launch.ranks}) must be positive")
    if find_spec("torch") is None:  # found, not imported: this process needs none
        raise MissingExtraError("a live run", "torch")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context: Any = get_context("forkserver" if launch.device == "cpu" and sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["moeplan.execution.run"])  # torch is imported once, not by every rank
    port = _port(launch)
    links, processes = [], []
    try:
        for rank in range(launch.ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_body, args=(launch, rank, port, target, args, there), daemon=True)
            process.start()
            there.close()
            links.append(here)
            processes.append(process)
        return _supervise(processes, links, launch.timeout_s, on_message)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for link in links:
            link.close()


@dataclass(frozen=True, slots=True)
class _Failure:
    """How ``rank`` ended: ``kind`` is the name of an error, or "died"."""

    rank: int
    kind: str
    text: str
    of_exchange: bool = False


def _supervise(
    processes: list[Any], links: list[Connection], timeout_s: float, on_message: Callable[[int, Any], None]
) -> list[Any]:
    answers: dict[int, Any] = {}
    failures: list[_Failure] = []
    open_links: dict[Any, int] = {link: rank for rank, link in enumerate(links)}
    trouble_at: float | None = None
    while open_links and (trouble_at is None or time.monotonic() - trouble_at < _GRACE_S):
        for link in wait(list(open_links), timeout=0.1):
            rank = open_links[link]
            try:
                kind, *what = link.recv()  # type: ignore[union-attr, call-arg]
            except (EOFError, OSError):
                del open_links[link]
                processes[rank].join()
                if rank not in answers and processes[rank].exitcode != _FAILED:
                    failures.append(_Failure(rank, "died", _cause(processes[rank].exitcode)))
                    trouble_at = trouble_at or time.monotonic()
                continue
            if kind == "message":
                on_message(rank, what[0])
            elif kind == "done":
                answers[rank] = what[0]
            else:
                failures.append(_Failure(rank, *what))
                trouble_at = trouble_at or time.monotonic()
    if not failures:
        return [answers[rank] for rank in range(len(processes))]
    silent = set(range(len(processes))) - answers.keys() - {failure.rank for failure in failures}
    raise _worst(failures, sorted(silent), timeout_s)


def _cause(code: int) -> str:
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _worst(failures: list[_Failure], silent: list[int], timeout_s: float) -> MoeplanError:
    """One error for all: a death before what a rank was told, before an exchange that failed because of either.

    Where exchanges ran into their time limit, the ranks that say nothing (``silent``) are those that were waited for.
    """
    worst = min(failures, key=lambda f: (f.kind != "died", f.of_exchange, not hasattr(errors, f.kind)))
    if worst.kind == "died":
        return RunError(f"rank {worst.rank} died {worst.text}; the other ranks were ended")
    if worst.of_exchange and silent and re.search("tim(ed |e)out", worst.text, re.IGNORECASE):
        names = ", ".join(map(str, silent))
        return RunError(f"rank {names} hangs: the others waited {timeout_s:g} s for it; all ranks were ended")
    known = getattr(errors, worst.kind, None)
    if known is None:
        return RunError(f"rank {worst.rank} failed: {worst.text}; the other ranks were ended")
    odd = issubclass(known, (errors.UnknownNameError, errors.MissingExtraError))  # made of other words
    error: MoeplanError = RunError(worst.text) if odd else known(worst.text)
    return error
