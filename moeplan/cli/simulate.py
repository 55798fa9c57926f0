"""``moeplan simulate``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from moeplan.cli.common import output_options, print_json, progress_bar

__all__ = ["command"]


@click.command("simulate")
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Directory for result.json and events.parquet; a sweep"
              " goes on where it stopped there.")
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, show_default=True, metavar="N",
              help="Runs, from the scenario's seed on.")
@click.option("--fidelity", type=click.Choice(["step", "detailed"]), help="Seconds of steps from formulas, or every"
              " layer, rank and link played event by event (small cases).  [default: the scenario's, else step]")
@click.option("--workers", type=click.IntRange(1), default=None, metavar="N",
              help="Processes. [all cores for a sweep, else 1]")
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
    from moeplan.pipeline.views import brief_notes, result_view, sweep_view
    from moeplan.specs.scenario import Scenario

    console = Console(highlight=False)
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
        for message in (*brief_notes(answer.result.notes), *(f"wrote {path}" for path in written)):
            click.echo(message, err=True)
    if as_json:
        document = answer.result.model_dump(mode="json")
        print_json(document | {"sha256": answer.result.sha256, "written": [str(path) for path in written]})
    elif not quiet:
        console.print(result_view(answer.result))
