"""``moeplan validate``: hold predictions against measurements."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import Seconds, output_options, print_json, progress_bar

__all__ = ["command"]


def _svg(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".svg":
        raise click.BadParameter(f"{path} must end in .svg")
    if path is not None and (file := next((p for p in path.absolute().parents if p.is_file()), None)):
        raise click.BadParameter(f"{path} cannot be written: {file} is a file, not a directory")
    return path


_plot_option = click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    metavar="FILE.svg",
    callback=_svg,
    help="Draw the answer.",
)


def _plot(answer: dict[str, Any], title: str, plot: Path | None) -> None:
    if plot is not None:
        from moeplan.validation.plots import plot_validation

        plot_validation(answer, title, plot)


@click.group("validate")
def command() -> None:
    """Hold predictions against measurements."""


def _verdict(figure: dict[str, Any]) -> str:
    return {True: "reached", False: "not reached", None: "beside"}[figure["reached"]]


def _row(figure: dict[str, Any]) -> tuple[str, str, str, str]:
    def percent(value: Any) -> str:
        return f"{100 * value:.1f} %" if isinstance(value, float) else "-"

    if "median" in figure:
        found = f"{percent(figure['median'])}, p90 {percent(figure['p90'])}"
        beside = f"plain line {percent(figure['plain_median'])}, {percent(figure['plain_p90'])}"
        beside += f"; {figure['note']}" if "note" in figure else ""
        target = "2.0 %, p90 10.0 %"
    else:
        found, target = percent(figure["value"]), percent(figure["target"])
        baselines = figure.get("baselines", {})
        beside = ", ".join(f"{name.replace('_', ' ')} {percent(value)}" for name, value in baselines.items())
        beside = beside or (figure.get("note", "") if figure["value"] is None else "")
    return figure["figure"], found + (f"  ({beside})" if beside else ""), target, _verdict(figure)


@command.command("kernels")
@click.option("--systems", default="", metavar="NAMES", help="Public tables to use, as in h100,h200 (extra: aic).")
@click.option("--profile", default=None, metavar="DIR|NAME", help="Use a profile instead of the public tables.")
@click.option("--cpu", type=click.Path(path_type=Path), help="CPU profile to check.  [default: profiles/cpu-*]")
@click.option("--live", type=Seconds(), help="Measure the CPU's FFN and all-to-all now for so long, as in 60s.")
@_plot_option
@output_options
def kernels(
    systems: str,
    profile: str | None,
    cpu: Path | None,
    live: float | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Held-out kernel times, skewed kernels from balanced ones, exchanges as published, and this CPU.

    \b
    Example: moeplan validate kernels --systems h200 --json
    """
    from moeplan.validation.kernels import validate_kernels

    names = [name.strip() for name in systems.split(",") if name.strip()]
    if systems and not names:
        raise click.UsageError(f"--systems ({systems}) names no system; write names, as in h100,h200")
    if names and profile:
        raise click.UsageError("--systems and --profile exclude each other; give one")
    with progress_bar(quiet) as report:
        answer = validate_kernels(names or None, Path(profile) if profile else None, cpu, live, report)
    _plot(answer, "Kernels: predicted against measured", plot)
    if as_json:
        print_json(answer)
    if as_json or quiet:
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table("figure", "error", "target", "", title="predicted against measured")
    for figure in answer["figures"]:
        grid.add_row(*_row(figure))
    Console().print(grid)


@command.command("queues")
@_plot_option
@output_options
def queues(plot: Path | None, as_json: bool, quiet: bool) -> None:
    """The simulator against queueing theory, conservation laws, and the same rules token by token.

    \b
    Example: moeplan validate queues --json
    """
    from moeplan.validation.queues import validate_queues

    with progress_bar(quiet or as_json) as report:
        answer = validate_queues(report)
    _plot(answer, "Simulated against known", plot)
    if as_json:
        print_json(answer)
    if as_json or quiet:
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table("figure", "value", "target", "", title="simulated against known")
    for figure in answer["figures"]:
        verdict = _verdict(figure)
        grid.add_row(figure["figure"], f"{figure['value']:.3g}", f"{figure['target']:.3g}", verdict)
    Console().print(grid)


@command.command("silicon")
@click.option("--rows", default=None, metavar="FILE", type=click.Path(dir_okay=False), help="Write all predictions.")
@_plot_option
@output_options
def silicon(rows: str | None, plot: Path | None, as_json: bool, quiet: bool) -> None:
    """Served latencies from kernel tables, against the measured rows of aiconfigurator-core (extra: aic).

    Groups of (b) and models of (c) are never tuned on; a nearest-row lookup over (a) and, with MOEPLAN_DATA set,
    the peer on identical rows stand beside. The picture has every row of (b) and (c), coloured by backend.

    \b
    Example: moeplan validate silicon --rows rows.csv
    """
    from moeplan.validation.plots import plot_silicon
    from moeplan.validation.silicon import validate_silicon

    with tempfile.TemporaryDirectory() as folder:
        written = Path(rows or Path(folder) / "rows.csv")
        with progress_bar(quiet or as_json) as report:
            answer = validate_silicon(written, report)
        if plot is not None:
            plot_silicon(written, plot)
    if as_json:
        print_json(answer)
    if as_json or quiet:
        return
    from rich.console import Console
    from rich.table import Table

    def shown(name: str, value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}" if "spearman" in name else f"{100 * value:.1f} %"

    grid = Table("figure", "value", "target", "", title="predicted against measured")
    for figure in answer["figures"]:
        name, verdict = figure["figure"], _verdict(figure)
        grid.add_row(name, shown(name, figure["value"]), shown(name, figure["target"]), verdict)
    Console().print(grid)
    columns = ("rows", "coverage", "tpot_median", "tpot_mape", "tpot_bias", "tpot_spearman", "ttft_median")
    beside = Table("who", *(name.replace("_", " ") for name in columns), title="beside each other")
    who = [(f"({part}) moeplan", found) for part, found in answer["parts"].items()]
    who += [(f"({part}) nearest row of (a)", found) for part, found in answer["nearest_row_of_a"].items()]
    for part, pair in answer["peer_on_identical_rows"].items():
        who += [(f"({part}) peer's rows, {name}", pair[key]) for name, key in (("moeplan", "ours"), ("peer", "peer"))]
    for name, found in who:
        beside.add_row(name, str(found["rows"]), *(shown(column, found[column]) for column in columns[1:]))
    Console().print(beside)


@command.command("peers")
@click.option("--infersim", type=click.Path(path_type=Path), metavar="DIR", help="Checkout of alibaba/InferSim.")
@click.option("--frontier", type=click.Path(path_type=Path), metavar="DIR", help="Checkout of NetX-lab/Frontier.")
@click.option("--infersim-python", default=None, metavar="FILE", help="Python that runs it.  [default: this one]")
@click.option("--frontier-python", default=None, metavar="FILE", help="Python that runs it.  [default: this one]")
@_plot_option
@output_options
def peers(
    infersim: Path | None,
    frontier: Path | None,
    infersim_python: str | None,
    frontier_python: str | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """The same scenarios in public simulators, outputs and run times side by side.

    Events are held against events (i), one operating point against one (ii); both prepared, in processes that run.
    The same point anew and whole processes stand beside.

    \b
    Example: moeplan validate peers --infersim ../InferSim --frontier ../Frontier
    """
    import sys

    from moeplan.validation.peers import validate_peers
    from moeplan.validation.plots import plot_peers

    with progress_bar(quiet or as_json) as report:
        answer = validate_peers(
            infersim, frontier, infersim_python or sys.executable, frontier_python or sys.executable, report
        )
    if plot is not None:
        plot_peers(answer, plot)
    if as_json:
        print_json(answer)
    if as_json or quiet:
        return
    from rich.console import Console
    from rich.table import Table

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g} s" if value >= 0.01 else f"{1e3 * value:.3g} ms"

    grid = Table("run time", "ours", "the peer's", "ratio", "", title="beside peers")
    for figure in answer["figures"]:
        verdict = _verdict(figure)
        shown = "-" if figure["value"] is None else f"{figure['value']:.3g}"
        grid.add_row(
            figure["figure"], seconds(figure.get("ours_s")), seconds(figure.get("peer_s")), shown, verdict
        )
    Console().print(grid)
    outputs = Table("output", "ours", "the peer's", title="what they answer")
    for peer in answer["peers"]:
        ours, theirs = peer["ours"], peer["theirs"]
        if not theirs["ran"]:
            outputs.add_row(f"{peer['peer']} did not run", "", theirs["why"])
        for name in ("ttft_p50_s", "tpot_p50_s", "e2e_p50_s", "tpot_s"):
            if name in ours and name in theirs:
                outputs.add_row(f"{peer['peer']}: {name}", seconds(ours[name]), seconds(theirs[name]))
    Console().print(outputs)


@command.command("published")
@_plot_option
@output_options
def published(plot: Path | None, as_json: bool, quiet: bool) -> None:
    """Serving and training as published, row by row, with what drives each remaining error.

    With MOEPLAN_DATA set, the replayed service too.

    \b
    Example: moeplan validate published --json
    """
    from moeplan.validation.published import validate_published

    with progress_bar(quiet or as_json) as report:
        answer = validate_published(report)
    _plot(answer, "Predicted over published", plot)
    if as_json:
        print_json(answer)
    if as_json or quiet:
        return
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    name = Column("row", overflow="fold")  # rows that differ at their ends must be told apart
    numbers = [Column(word, no_wrap=True) for word in ("measured", "predicted", "error", "unit", "")]
    rows = Table(name, *numbers, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    why: dict[str, list[str]] = {}
    for row in answer["rows"]:
        shown = ("-", "-") if row["predicted"] is None else (f"{row['predicted']:.4g}", f"{100 * row['error']:+.1f} %")
        verdict = {True: "within", False: "outside", None: "not counted"}[row["within"]]
        if row["predicted"] is None:
            verdict = "not predicted"
        rows.add_row(row["id"], f"{row['measured']:.4g}", *shown, row["unit"], verdict)
        if row["within"] is False and row["explanation"]:
            why.setdefault(row["explanation"], []).append(row["id"])
    console.print(rows)
    for explanation, ids in why.items():
        console.print(f"{', '.join(ids)}: {explanation}", markup=False)
    grid = Table(Column("figure", overflow="fold"), "value", "median error", "target", "")
    for figure in answer["figures"]:
        verdict = _verdict(figure)
        value, error = f"{100 * figure['value']:.1f} %", f"{100 * (figure['median_error'] or 0):.1f} %"
        target = "-" if figure["target"] is None else f"{100 * figure['target']:.0f} %"
        grid.add_row(f"{figure['figure']} ({figure['rows']})", value, error, target, verdict)
    console.print(grid)
