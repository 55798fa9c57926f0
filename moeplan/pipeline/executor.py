"""The one seam through which many cases run: here, or in processes of their own.

An executor takes a function and a list of arguments and reports each answer as it comes. One process per case: a
crash loses that case only, which is tried once more and then reported as failed. A distributed engine would be a third
class with the same ``run``.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

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


def _work(function: Callable[[Any], Any], case: Any, sender: Connection) -> None:
    try:
        answer = function(case)
    except MoeplanError as error:
        answer = Failure(str(error), error)
    except KeyboardInterrupt:  # the parent ends us; it says so itself
        return
    sender.send(answer)
    sender.close()


class ProcessExecutor:
    """At most ``workers`` processes at a time, one for each case."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(
        self, function: Callable[[Any], Any], cases: Sequence[Any], done: Callable[[int, Any], None]
    ) -> None:
        """See :class:`Executor`. Workers are ended when this is interrupted."""
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        queue = [(number, 1) for number in range(len(cases))]
        queue.reverse()
        busy: dict[Connection, tuple[BaseProcess, int, int]] = {}
        try:
            while queue or busy:
                while queue and len(busy) < self._workers:
                    number, attempt = queue.pop()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(function, cases[number], sender), daemon=True)
                    process.start()
                    sender.close()
                    busy[receiver] = process, number, attempt
                for ready in wait(list(busy)):
                    if not isinstance(ready, Connection):
                        continue
                    process, number, attempt = busy.pop(ready)
                    try:
                        answer = ready.recv()
                    except EOFError:  # it died without an answer
                        process.join()
                        if attempt < _TRIES:
                            queue.append((number, attempt + 1))
                            continue
                        answer = Failure(f"the worker died {_TRIES} times (exit code {process.exitcode})")
                    ready.close()
                    process.join()
                    done(number, answer)
        finally:
            for process, _, _ in busy.values():
                process.terminate()
            for process, _, _ in busy.values():
                process.join()


def executor_for(workers: int, cases: int) -> Executor:
    """Processes where there is more than one worker and case, this process otherwise."""
    return ProcessExecutor(min(workers, cases)) if workers > 1 and cases > 1 else InlineExecutor()
