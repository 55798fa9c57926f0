"""What every command shares: ``--json``, ``--quiet`` and a progress bar on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

__all__ = ["Seconds", "names_of", "output_options", "print_json", "progress_bar"]

F = TypeVar("F", bound=Callable[..., Any])


def names_of(kind: str, or_file: bool = False) -> Callable[..., list[CompletionItem]]:
    """``shell_complete`` of an option that takes a name: of a plugin ``kind``, of ``models`` or ``clusters``."""

    def complete(_ctx: click.Context, _param: click.Parameter, begun: str) -> list[CompletionItem]:
        from moeplan.registry import plugin_names
        from moeplan.specs.clusters import accelerator_names
        from moeplan.specs.models import model_names

        known = {"models": model_names, "clusters": accelerator_names}
        names = known[kind]() if kind in known else plugin_names(kind)
        found = [CompletionItem(name) for name in names if name.startswith(begun)]
        return found or [CompletionItem(begun, type="file")] * or_file

    return complete


class Seconds(click.ParamType[float]):
    """An option's time with its unit, as in 60s."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Seconds above 0; fails where the text has no unit of time."""
        from moeplan.units import parse_quantity

        if isinstance(value, float):
            return value
        try:
            seconds = parse_quantity(value, "seconds")
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not seconds > 0:
            self.fail(f"{value!r} must be above 0", param, ctx)
        return seconds


def output_options(function: F) -> F:
    """Add ``--json`` (parameter ``as_json``) and ``--quiet`` to a command."""
    function = click.option("--quiet", is_flag=True, help="No progress and no messages; errors still show.")(function)
    help_json = "One JSON object on standard output, nothing else there."
    return click.option("--json", "as_json", is_flag=True, help=help_json)(function)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    click.echo(json.dumps(value, allow_nan=False))


@contextmanager
def progress_bar(quiet: bool, single: bool = False) -> Iterator[Callable[[str, float], None]]:
    """Yield ``report(what, fraction)``; draws on standard error when that is a terminal and ``quiet`` is false.

    Every ``what`` has a bar of its own; with ``single`` all share one, whose fractions are of the whole run.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _what, _done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: float) -> None:
            bar = "" if single else what
            if bar not in tasks:
                tasks[bar] = progress.add_task(what, total=1.0)
            progress.update(tasks[bar], description=what, completed=done)

        yield report
