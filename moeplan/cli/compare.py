"""``moeplan compare``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import output_options, print_json

__all__ = ["command"]

_PATH = click.Path(path_type=Path)


@click.command("compare")
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@output_options
def command(a: Path, b: Path, as_json: bool, quiet: bool) -> None:
    """What changes from simulation A to simulation B: results, their directories, or two sweeps case by case.

    \b
    Example: moeplan compare contiguous planned
    """
    from moeplan.pipeline.compare import compare

    found = compare(a, b)
    if as_json:
        cases = [
            {"case": case, "headlines": [{**_plain(d), "name": d.name} for d in differences]}
            for case, differences in found
        ]
        print_json({"a": str(a), "b": str(b), "cases": cases})
        return
    if quiet:
        return
    from rich.console import Console

    from moeplan.pipeline.views import comparison_view

    console = Console(highlight=False)
    console.print(f"a: {a}\nb: {b}", markup=False)
    console.print(comparison_view(found, console.width))


def _plain(difference: Any) -> dict[str, Any]:
    fields = asdict(difference)
    return fields | {side: fields[side].model_dump() for side in ("a", "b")}
