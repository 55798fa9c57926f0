"""``moeplan profile``: measure, import, check and show hardware profiles."""

from __future__ import annotations

from pathlib import Path

import click

from moeplan.cli.common import output_options, print_json, progress_bar
from moeplan.cli.profile_measure import commands

__all__ = ["command"]


@click.group("profile")
def command() -> None:
    """Measure, import, check and show hardware profiles."""


for _subcommand in commands:
    command.add_command(_subcommand)


@command.command("import-aic")
@click.option("--systems", default="", metavar="NAMES", help="Comma-separated, as in h100,h200; all when left out.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="One profile per system here.",
)
@click.option("--subset", is_flag=True, help="What the package ships: the main models, newest versions.")
@output_options
def import_aic(systems: str, out: Path, subset: bool, as_json: bool, quiet: bool) -> None:
    """Turn the measured tables of aiconfigurator-core into profiles (extra: aic).

    \b
    Example: moeplan profile import-aic --systems h100,h200 --out profiles
    """
    from moeplan.pipeline.aic import import_aic as run

    names = [name.strip() for name in systems.split(",") if name.strip()]
    with progress_bar(quiet) as report:
        answer = run(names, out, subset=subset, progress=report)
    if as_json:
        print_json(answer)
        return
    if quiet:
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table("system", "table", "rows", "set aside", title="imported")
    for system in answer["systems"]:
        for table, rows in system["rows"].items():
            aside = ", ".join(f"{n} {why}" for why, n in sorted(system["rejected"].get(table, {}).items()))
            grid.add_row(system["name"], table, f"{rows:,}", aside)
    Console().print(grid)
