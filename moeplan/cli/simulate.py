"""``moeplan simulate``."""

from __future__ import annotations

import os
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
    from rich.console import Console

    from moeplan.files import require_place
    from moeplan.pipeline.simulate import SIMULATION_PLACE, simulate, sweep, write_simulation
    from moeplan.pipeline.views import sweep_view
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
            console = Console(highlight=False)
            console.print(sweep_view(swept, console.width))
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
