"""``moeplan trace``: inspect, convert, validate and synthesise routing traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import names_of, output_options, print_json, progress_bar

__all__ = ["trace"]

_PATH = click.Path(path_type=Path)
_MATRIX = 8  # windows whose similarities a terminal shows as a matrix


@click.group()
def trace() -> None:
    """Inspect, convert, validate and synthesise routing traces."""


_format = click.option(
    "--format",
    "format_name",
    metavar="NAME",
    shell_complete=names_of("trace_readers"),
    help="Name of the reader; recognised from the file when left out.",
)
_domain = click.option("--domain", metavar="NAME", help="One of the file's domains; all of them when left out.")

_num_experts = click.option(
    "--num-experts", type=click.IntRange(min=1), help="The model's experts per layer, where FILE does not say."
)


@trace.command()
@click.argument("file", type=_PATH)
@_format
@_domain
@_num_experts
@click.option("--windows", metavar="W", help="all, domain, phase or time:N; domains, else quarters of time.")
@click.option("--out", type=_PATH, help="Write pictures (SVG) to this directory; older ones there are replaced.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Draws the shuffled control.")
@output_options
def inspect(file: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure FILE: skew, drift, co-activation, dependency between layers.

    \b
    Example: moeplan trace inspect routing.npz --out pictures
    """
    from moeplan.pipeline.traces import inspect_trace

    with progress_bar(quiet) as progress:
        found = inspect_trace(file, **options, progress=progress)
    if as_json:
        print_json(found.to_json())
    elif not quiet:
        _show(found.to_json())


def _by_distance(count: int, cosine_WW: list[list[float]]) -> Any:
    """Similarity of windows by how far apart they stand: neighbours tell noise and fast drift, far ones slow drift."""
    from statistics import quantiles

    from rich.table import Table

    table = Table("load cosine", "pairs", "10 %", "median", "90 %", box=None, header_style="bold")
    apart = [2**n for n in range(count.bit_length()) if 2**n < count - 1]
    for distance in (*apart, count - 1):
        values = [cosine_WW[w][w + distance] for w in range(count - distance)]
        tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        name = {1: "neighbours", count - 1: "first and last"}.get(distance, f"{distance} windows apart")
        table.add_row(name, str(len(values)), *(f"{tenths[place]:.2f}" for place in (0, 4, 8)))
    return table


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    tokens = "counts only" if found["tokens"] is None else f"{found['tokens']:,} tokens"
    console.print(
        f"{found['origin'].get('file', 'trace')} ({found['origin'].get('format', '?')}): {tokens},"
        f" {len(found['layer_ids'])} MoE layers x {found['num_experts']} experts, top-{found['top_k'] or '?'}"
    )
    columns = (
        ("load\nmax/m.", "max_over_mean", None),
        ("EP8\nmax/m.", "contiguous_ep8_max_over_mean", None),
        ("gini", "gini", None),
        ("entropy\nbits", "entropy_bits", None),
        ("co-act.\nbits (lift)", "coactivation_bits", "coactivation_mean_lift"),
        ("to next, MI\n(shuffled)", "mutual_information_bits", "mutual_information_bits_shuffled"),
        ("best 12.5 %\n(shuffled)", "top_share", "top_share_shuffled"),
    )
    shown = [column for column in columns if found[column[1]] is not None]
    table = Table("layer", *(name for name, _, _ in shown), box=None, header_style="bold", padding=(0, 1, 0, 0))
    for row, layer in enumerate(found["layer_ids"]):
        cells = []
        for _, key, beside in shown:
            values = [found[k][row] for k in (key, beside) if k and row < len(found[k])]
            cells.append("".join((f"{values[0]:.2f}", *(f" ({v:.2f})" for v in values[1:])) if values else ""))
        table.add_row(str(layer), *cells)
    console.print(table)
    names, cosine_WW = found["windows"], found["cosine_between_windows"]
    if 1 < len(names) <= _MATRIX:
        drift = Table("load cosine", *names, box=None, header_style="bold")
        for name, row in zip(names, cosine_WW, strict=True):
            drift.add_row(name, *(f"{value:.2f}" for value in row))
        console.print(drift)
    elif len(names) > _MATRIX:
        console.print(_by_distance(len(names), cosine_WW))
        least, a, b = min((cosine_WW[a][b], a, b) for b in range(len(names)) for a in range(b))
        console.print(f"least alike: {names[a]} and {names[b]}, {least:.2f}; all pairs are in --json")
    if found["dropped_padding"]:
        console.print(f"{found['dropped_padding']:,} padding ids (-1) were dropped")
    for path in found["pictures"]:
        console.print(f"wrote {path}")


@trace.command()
@click.argument("file", type=_PATH)
@click.argument("out", type=_PATH)
@_format
@_domain
@_num_experts
@output_options
def convert(file: Path, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write FILE as OUT, a .npz or .parquet trace of this project's own form.

    \b
    Example: moeplan trace convert recorder_dump/ routing.parquet
    """
    from moeplan.pipeline.traces import convert as run

    with progress_bar(quiet) as progress:
        done = run(file, out, **options, progress=progress)
    if as_json:
        print_json(done)
    elif not quiet:
        click.echo(f"wrote {done['out']}: {done['tokens']:,} tokens")


@trace.command()
@click.argument("file", type=_PATH)
@_format
@_domain
@_num_experts
@output_options
@click.pass_context
def validate(ctx: click.Context, /, file: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Look for what is wrong with FILE: duplicates, repeated or misaligned layers, interleaved sequences.

    Exit code 2 if there are errors, 0 with warnings only.

    \b
    Example: moeplan trace validate routing.npz
    """
    from moeplan.pipeline.traces import validate_trace

    with progress_bar(quiet) as progress:
        findings = validate_trace(file, **options, progress=progress)
    errors = [finding for finding in findings if finding.severity == "error"]
    if as_json:
        fields = ("code", "severity", "message", "evidence")
        print_json({"valid": not errors, "findings": [{f: getattr(x, f) for f in fields} for x in findings]})
    elif not quiet:
        for finding in findings:
            click.echo(f"{finding.severity}: {finding.code}: {finding.message}")
        click.echo(f"{len(errors)} errors, {len(findings) - len(errors)} warnings")
    ctx.exit(2 if errors else 0)


@trace.command()
@click.option("--out", type=_PATH, required=True, help="The trace to write (.npz or .parquet).")
@click.option("--model", metavar="NAME", help="Take layers, experts, top-k and groups from a model.")
@click.option("--like", type=_PATH, help="Fit loads, co-activation and dependency to this trace.")
@click.option("--tokens", type=int, help="Tokens in all.")
@click.option("--layers", type=int, help="MoE layers.")
@click.option("--experts", type=int, help="Experts per layer.")
@click.option("--top-k", type=int, help="Experts per token.")
@click.option("--profile", type=click.Choice(["lognormal", "zipf"]), help="Shape of the skew.")
@click.option("--skew", type=float, help="Sigma of the lognormal, or exponent of Zipf's law.")
@click.option("--max-over-mean", type=float, help="Load of the busiest expert over the mean.")
@click.option("--hot", type=float, help="One expert of one layer with this load over the mean (20).")
@click.option("--hot-layer", type=int, help="Index of that layer.")
@click.option("--coactivation", type=float, help="Co-activation, bits.")
@click.option("--dependency", type=float, help="Mutual information from layer to layer, bits.")
@click.option("--topics", type=int, help="Topics behind co-activation and dependency.")
@click.option("--domains", metavar="A,B,...", help="Names of domains.")
@click.option("--domain-cosine", type=float, help="Cosine similarity of the domains' loads.")
@click.option("--windows", type=int, help="Stretches of time between which loads drift.")
@click.option("--drift-cosine", type=float, help="Cosine similarity of the first and last window.")
@click.option("--n-group", type=int, help="Groups of experts (group-limited routing).")
@click.option("--topk-group", type=int, help="Groups a token may use.")
@click.option("--source-ranks", type=int, help="Ranks that the sequences come from.")
@click.option("--source-affinity", type=float, help="How far a rank keeps to topics of its own, 0 to 1.")
@click.option("--sequence-length", type=int, help="Mean tokens per sequence.")
@click.option("--persistence", type=float, help="How often the next token keeps the topic, 0 to 1.")
@click.option("--phase", type=click.Choice(["prefill", "decode", "mix"]),
              help="Prompts, generated tokens step by step, or both. [prefill, or that of --like]")
@click.option("--seed", type=int, help="Same seed, same bytes.")
@output_options
def synth(
    out: Path,
    model: str | None,
    like: Path | None,
    domains: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Make a trace with given statistics.

    \b
    Examples:
      moeplan trace synth --model deepseek-v2-lite --max-over-mean 3 --dependency 0.6 \\
          --coactivation 0.6 --domains chat,code --domain-cosine 0.8 --out synthetic.npz
      moeplan trace synth --like routing.npz --tokens 100000 --seed 1 --out more.parquet
    """
    from moeplan.pipeline.traces import synthesise_trace

    options = {name: value for name, value in given.items() if value is not None}
    if domains is not None:
        options["domains"] = tuple(domains.split(","))
    with progress_bar(quiet) as progress:
        made = synthesise_trace(out, model=model, like=like, options=options, progress=progress)
    if as_json:
        print_json(made)
    elif not quiet:
        skew = made["max_over_mean"]
        click.echo(f"wrote {out}: {made['tokens']:,} tokens, load max/mean {min(skew):.2f}-{max(skew):.2f}")


command = trace
