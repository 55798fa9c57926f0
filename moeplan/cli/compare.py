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
    from rich.table import Column, Table

    console = Console(highlight=False)
    console.print(f"a: {a}\nb: {b}", markup=False)
    for case, differences in found:
        if case:
            console.print(", ".join(f"{name} {value}" for name, value in case.items()), markup=False)
        numbers = [Column(word, justify="right", no_wrap=True) for word in ("a", "b", "change", "from", "to")]
        name = Column("figure", overflow="fold")
        grid = Table(name, *numbers, "", box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
        for d in differences:
            change = "-" if d.relative is None else f"{100 * d.relative:+.1f} %"
            grid.add_row(
                d.name, f"{d.a.value:.4g}", f"{d.b.value:.4g}", change, f"{d.change_low:+.3g}", f"{d.change_high:+.3g}",
                d.verdict,
            )  # fmt: skip
        console.print(grid)


def _plain(difference: Any) -> dict[str, Any]:
    fields = asdict(difference)
    return fields | {side: fields[side].model_dump() for side in ("a", "b")}
