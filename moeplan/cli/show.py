"""``moeplan show``: a plan in the terminal, as a page, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import names_of, output_options, print_json

__all__ = ["show"]


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(path_type=Path),
    help="Routing or expert counts, for the load of every rank.",
)
@click.option(
    "--trace-format", metavar="NAME", shell_complete=names_of("trace_readers"),
    help="Name of a trace reader; recognised from the file when left out.",
)
@click.option("--domain", "trace_domain", metavar="NAME", help="Load of one domain of the trace. [the one planned on]")
@click.option(
    "--before",
    "before_path",
    type=click.Path(path_type=Path),
    help="A plan to compare with; the contiguous placement when left out.",
)
@click.option(
    "--html", "html_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page here."
)
@click.option(
    "--svg", "svg_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a picture that stands alone here."
)
@output_options
def show(plan: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Show PLAN, a plan.json or the directory that holds it: verdict, figures, layers, load.

    \b
    Example: moeplan show out/plan.json --trace routing.npz --html plan.html
    """
    from moeplan.pipeline.show import show_plan, view_of

    shown = show_plan(plan, **options)
    if not quiet:
        for message in (*shown.messages, *(f"wrote {path}" for path in shown.written)):
            click.echo(message, err=True)
    if as_json:
        print_json(shown.summary())
    elif not quiet:
        from rich.console import Console

        console = Console(highlight=False)
        console.print(view_of(shown.plan, shown.evidence, console.width))
