"""``moeplan report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import output_options, print_json

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command("report")
@click.argument("paths", type=_PATH, nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="report.html, .md or .json.")
@click.option("--trace", "trace_path", type=_PATH,
              help="A plan: routing or expert counts, for load and traffic before and after.")
@click.option("--domain", "trace_domain", metavar="NAME",
              help="A plan: load of one domain of the trace. [the one planned on]")
@click.option("--before", "before_path", type=_PATH,
              help="A plan: another to compare with; left out: the contiguous placement.")
@click.option("--cluster", "cluster_name", metavar="NAME",
              help="A plan: its accelerator, for memory and the timeline of a step.")
@click.option("--perfetto", "perfetto_path", type=click.Path(path_type=Path, dir_okay=False),
              help="A run's events for ui.perfetto.dev.")
@output_options
def command(paths: tuple[Path, ...], out: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Report on a plan, a simulation, a sweep or a live run as one page that needs nothing else; or compare two.

    A simulation and a live run side by side are predicted against measured.

    \b
    Examples:
      moeplan report run --out report.html --perfetto trace.json
      moeplan report contiguous planned --out compare.html
      moeplan report plan --trace routing.npz --out plan.html
    """
    from moeplan.pipeline.report import report

    found = report(list(paths), out, **options)
    if not quiet:
        for message in (*found.messages, *(f"wrote {path}" for path in found.written)):
            click.echo(message, err=True)
    if as_json:
        print_json(found.json())
    elif out is None and not quiet:
        click.echo(found.markdown())
