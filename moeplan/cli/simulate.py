"""``moeplan simulate``."""

from __future__ import annotations

import os
import sys
from math import prod
from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import output_options, print_json, progress_bar

__all__ = ["command"]

_MAIN = (
    "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "accept_length", "e2e_p50_s", "output_tokens_per_s",
    "output_tokens_per_s_per_gpu", "requests_per_s", "goodput_requests_per_s", "slo_attainment",
    "usd_per_million_output_tokens", "compute_share", "exchange_share", "bubble_share", "mean_queue_length",
)  # fmt: skip
_WIDE = 160  # characters of a line that goes into a file
_SERVED = ("ttft_p50_s", "tpot_p50_s", "output_tokens_per_s_per_gpu", "goodput_requests_per_s")
# Columns of a training sweep: headline, what stands above it, units in one of its own.
_TRAINED = (
    ("mfu", "MFU\n%", 100), ("bubble_share", "bubble\n%", 100), ("exposed_exchange_share", "exchange\n%", 100),
    ("exposed_sync_share", "sync\n%", 100), ("peak_memory_bytes", "memory\nGiB", 2**-30),
)  # fmt: skip


@click.command("simulate")
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Directory for result.json and events.parquet; a sweep"
              " goes on where it stopped there.")
@click.option("--seeds", type=int, default=3, show_default=True, metavar="N", help="Runs, from the scenario's seed on.")
@click.option("--fidelity", type=click.Choice(["step", "detailed"]), help="Seconds of steps from formulas, or every"
              " layer, rank and link played event by event (small cases).  [default: the scenario's, else step]")
@click.option("--workers", type=int, default=None, metavar="N", help="Processes. [all cores for a sweep, else 1]")
@output_options
def command(
    scenario: Path, out: Path | None, seeds: int, fidelity: str | None, workers: int | None, as_json: bool, quiet: bool
) -> None:
    """Predict what a service or a training job does: latency, throughput, goodput, where ranks spend their time.

    A SCENARIO has a serving or a training section; one with a sweep is simulated case by case into --out.

    \b
    Examples:
      moeplan simulate scenario.yaml --out run
      moeplan simulate scenario.yaml --json --seeds 1
    """
    from moeplan.files import require_place
    from moeplan.pipeline.simulate import SIMULATION_PLACE, simulate, sweep, write_simulation
    from moeplan.specs.scenario import Scenario

    found = Scenario.from_file(scenario)
    found = found if fidelity is None else found.model_copy(update={"fidelity": fidelity})
    place = out or found.out
    if found.sweep:
        if place is None:
            raise click.UsageError("the scenario has a sweep: give --out, where its cases are kept")
        with progress_bar(quiet or as_json) as progress:
            swept = sweep(found, place, seeds=seeds, workers=workers or os.cpu_count() or 1, progress=progress)
        if as_json:
            print_json(swept.to_json())
        elif not quiet:
            _print_sweep(swept)
        if swept.failed:
            raise click.exceptions.Exit(1)
        return
    if place is not None:
        require_place(place, *SIMULATION_PLACE)  # before the work, not after it
    with progress_bar(quiet or as_json) as progress:
        answer = simulate(found, seeds=seeds, workers=workers or 1, keep_log=place is not None, progress=progress)
    written = write_simulation(answer, place) if place is not None else []
    if not quiet:
        for message in (*answer.result.notes, *(f"wrote {path}" for path in written)):
            click.echo(message, err=True)
    if as_json:
        document = answer.result.model_dump(mode="json")
        print_json(document | {"sha256": answer.result.sha256, "written": [str(path) for path in written]})
    elif not quiet:
        _print_result(answer.result)


def _print_result(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    counts, training = result.counts, result.kind == "training"
    what = f"{counts['steps']:.0f} steps" if training else f"{counts['finished']:.0f} requests"
    grid = Table(
        "figure", "value", "from", "to", "unit",
        title=f"{result.model} on {result.num_ranks} ranks of {result.cluster}: {what} in {result.simulated_s:.1f} s",
    )  # fmt: skip
    for name in result.headlines if training else _MAIN:
        if (line := result.headlines.get(name)) is not None:
            unit = "" if line.unit == "1" else line.unit
            ends = ("exact", "") if line.exact else (f"{line.low:.4g}", f"{line.high:.4g}")
            grid.add_row(name, f"{line.value:.4g}", *ends, unit)
    Console().print(grid)


def _print_sweep(swept: Any) -> None:
    """Cases that have no result, and why; then those that have one, of training the best first."""
    from rich.console import Console
    from rich.table import Column, Table

    short = [name.rpartition(".")[2] for name in swept.cases[0]]
    fields = [word if short.count(word) == 1 else name for name, word in zip(swept.cases[0], short, strict=True)]
    fields = [name.replace("_", "\n") for name in fields]
    cases = [tuple(map(_words, case.values())) for case in swept.cases]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)

    folds = [any(", " in cell for cell in column) for column in zip(*cases, strict=True)]

    def table(title: str, *columns: Any) -> Any:
        first = (Column(name, no_wrap=not fold, min_width=11 * fold) for name, fold in zip(fields, folds, strict=True))
        return Table(*first, *columns, title=title, title_justify="left", box=None, pad_edge=False,
                     padding=(0, 1, 0, 0), header_style="dim")  # fmt: skip

    if missing := [number for number, result in enumerate(swept.results) if result is None]:
        title = f"{len(missing)} cases without a result, {len(swept.impossible)} of them impossible"
        grid = table(title, Column("why", overflow="fold"))
        reasons = [swept.failures.get(number, "not run") for number in missing]
        for reason in dict.fromkeys(reasons):
            for row in _rows([cases[number] for number, own in zip(missing, reasons, strict=True) if own == reason]):
                grid.add_row(*row, reason)
        console.print(grid)
    if not (ranked := swept.ranked):
        return
    training = swept.results[ranked[0]].kind == "training"
    title = f"{len(ranked)} of {len(cases)} cases, {swept.resumed} of them kept from before" + ", best first" * training
    heads = ("tokens/s\nper GPU", "from", "to", *(head for _, head, _ in _TRAINED)) if training else _SERVED
    grid = table(title, *(Column(head, justify="right", no_wrap=training) for head in heads))
    for number in ranked:
        lines = swept.results[number].headlines
        grid.add_row(*cases[number], *(_trained(lines) if training else _served(lines)))
    console.print(grid)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _rows(cases: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Cases as one row, where they are all combinations of its values."""
    values = [list(dict.fromkeys(column)) for column in zip(*cases, strict=True)]
    return [tuple("/".join(each) for each in values)] if len(cases) == prod(map(len, values)) else cases


def _trained(lines: Any) -> list[str]:
    rate = lines["tokens_per_s_per_gpu"]
    shares = [f"{factor * lines[name].value:.1f}" for name, _, factor in _TRAINED]
    return [f"{value:.4g}" for value in (rate.value, rate.low, rate.high)] + shares


def _served(lines: Any) -> list[str]:
    found = [lines.get(name) for name in _SERVED]
    return ["-" if line is None else f"{line.value:.4g} ({line.low:.4g} to {line.high:.4g})" for line in found]
