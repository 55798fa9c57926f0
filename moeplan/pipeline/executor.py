"""The one seam through which many cases run: here, or in processes of their own.

An executor takes a function and a list of arguments and reports each answer as it comes. A process has one case at a
time: a crash loses that case only, which is tried once more in a new one and then reported as failed. A distributed
engine would be a third class with the same ``run``.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, cast

from moeplan.errors import MoeplanError

__all__ = ["Executor", "Failure", "InlineExecutor", "ProcessExecutor", "executor_for"]

_TRIES = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """A case without an answer, and why. ``error`` is set where the input was wrong, None where the worker died."""

    reason: str
    error: MoeplanError | None = None


class Executor(Protocol):
    """Runs cases."""

    def run(
        self, function: Callable[[Any], Any], cases: Sequence[Any], done: Callable[[int, Any], None]
    ) -> None:
        """Call ``function`` on every case; ``done(number, answer or Failure)`` in the order they end."""
        ...


class InlineExecutor:
    """One after the other, in this process."""

    def run(
        self, function: Callable[[Any], Any], cases: Sequence[Any], done: Callable[[int, Any], None]
    ) -> None:
        """See :class:`Executor`."""
        for number, case in enumerate(cases):
            try:
                answer = function(case)
            except MoeplanError as error:
                answer = Failure(str(error), error)
            done(number, answer)


def _work(function: Callable[[Any], Any], parent: Connection) -> None:
    """Answer one case after another, as long as there are some."""
    with suppress(KeyboardInterrupt):  # the parent ends us; it says so itself
        while True:
            try:
                case = parent.recv()
            except EOFError:
                return
            try:
                answer = function(case)
            except MoeplanError as error:
                answer = Failure(str(error), error)
            parent.send(answer)


@dataclass(frozen=True, slots=True)
class _Job:
    """Which case, for which time."""

    number: int
    attempt: int = 1


class ProcessExecutor:
    """``workers`` processes, each of which takes one case after another: tables are read and fitted once in each."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(
        self, function: Callable[[Any], Any], cases: Sequence[Any], done: Callable[[int, Any], None]
    ) -> None:
        """See :class:`Executor`. Workers are ended when this is interrupted."""
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        queue = [_Job(number) for number in reversed(range(len(cases)))]
        workers: dict[Connection, BaseProcess] = {}
        busy: dict[Connection, _Job] = {}

        def start() -> Connection:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(function, there), daemon=True)
            process.start()
            there.close()  # so that its end is seen here
            workers[here] = process
            return cast("Connection", here)

        def give(worker: Connection) -> None:
            busy[worker] = queue.pop()
            with suppress(ConnectionError):  # it died meanwhile, as is found when its answer is waited for
                worker.send(cases[busy[worker].number])

        try:
            while queue or busy:
                while queue and len(workers) < self._workers:
                    give(start())
                for worker in wait(list(busy)):
                    if not isinstance(worker, Connection):
                        continue
                    job = busy.pop(worker)
                    try:
                        answer = worker.recv()
                    except (EOFError, ConnectionError):  # it died without an answer
                        process = workers.pop(worker)
                        process.join()
                        worker.close()
                        if job.attempt < _TRIES:
                            queue.append(_Job(job.number, job.attempt + 1))
                            continue
                        answer = Failure(f"the worker died {_TRIES} times (exit code {process.exitcode})")
                    if queue and worker in workers:
                        give(worker)
                    done(job.number, answer)
        finally:
            for process in workers.values():
                process.terminate()
            for process in workers.values():
                process.join()


def executor_for(workers: int, cases: int) -> Executor:
    """Processes where there is more than one worker and case, this process otherwise."""
    return ProcessExecutor(min(workers, cases)) if workers > 1 and cases > 1 else InlineExecutor()
