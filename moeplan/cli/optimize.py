"""``moeplan optimize``: from recorded routing to a placement file, with a proof and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import names_of, output_options, print_json, progress_bar

__all__ = ["optimize"]

_FILE = click.Path(path_type=Path)
_CHOICES = {
    "phase": ["prefill", "decode", "mix"],
    "dispatch": ["per_expert", "per_rank", "per_node", "allgather"],
    "return_mode": ["return_home", "stay"],
    "split": ["even", "nearest", "weighted"],
    "objective": ["time", "load", "traffic"],
    "aggregate": ["mean", "worst", "cvar"],
    "dtype": ["fp32", "bf16", "fp16", "fp8", "int8", "int4", "fp4"],
}
# option -> where it goes in a scenario
_TOP = (
    "model", "trace", "trace_format", "cluster", "ranks", "nodes", "redundant", "kv_reserve", "profile",
    "planner", "seed",
    "time_limit", "current", "migration_size", "migration_time", "target",
)  # fmt: skip
_OBJECTIVE = {
    "objective": "kind", "return_mode": "return_mode", "dispatch": "dispatch", "split": "replica_split",
    "aggregate": "aggregate", "max_imbalance": "max_imbalance",
}  # fmt: skip
_WORKLOAD = {"phase": "phase", "batch_per_rank": "batch_per_rank", "context": "context", "dtype": "weight_dtype"}


def _redundant(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "max":
        return value
    if not value.isdigit():
        raise click.BadParameter(f"{value!r} is neither a number of slots per layer nor 'max'")
    return int(value)


@click.command()
@click.argument("scenario", required=False, type=_FILE)
@click.option("--model", metavar="NAME|PATH", shell_complete=names_of("models", or_file=True),
              help="A built-in model (moeplan models) or a Hugging Face config.json.")
@click.option("--trace", type=_FILE, help="Recorded routing or expert counts, in any format of 'moeplan trace'.")
@click.option("--trace-format", metavar="NAME", shell_complete=names_of("trace_readers"),
              help="Name of the reader; recognised from the file when left out.")
@click.option("--domain", metavar="NAME", help="Plan on one domain of the trace only.")
@click.option("--windows", default="all", show_default=True, metavar="KIND",
              help="What to plan for at once: all, domain, phase, or time:N stretches.")
@click.option("--ranks", type=int, metavar="N", help="Expert-parallel size.")
@click.option("--nodes", type=int, metavar="M", help="Nodes the ranks are in; as few as can hold them when left out.")
@click.option("--cluster", metavar="NAME|FILE", shell_complete=names_of("clusters", or_file=True),
              help="An accelerator or cluster (moeplan clusters), or a file. [h100-sxm]")
@click.option("--profile", metavar="NAME|DIR|none",
              help="Measured costs. [those shipped for the accelerator; else roofline]")
@click.option("--redundant", metavar="N|max", callback=_redundant,
              help="Extra expert slots per layer, or what memory allows. [as --current has, else 0]")
@click.option("--kv-reserve", metavar="SIZE",
              help="Memory per rank kept for the KV cache by --redundant max, as in '20 GiB'.")
@click.option("--planner", metavar="NAME", shell_complete=names_of("planners"),
              help="joint (default), greedy, moetuner, exflow, contiguous, round-robin, random.")
@click.option("--phase", type=click.Choice(_CHOICES["phase"]), help="Default: the trace's, else prefill.")
@click.option("--current", type=_FILE, help="Placement in use: a plan, or an engine's file. Asks for fewest moves.")
@click.option("--migration-size", metavar="SIZE", help="Expert weights that may be moved, as in '40 GiB'.")
@click.option("--migration-time", metavar="TIME", help="Time that moving them may take, as in '500 ms'.")
@click.option("--target", metavar="ENGINE", shell_complete=names_of("exporters"),
              help="Engine the plan is for; plans it cannot express are not to apply.")
@click.option("--objective", type=click.Choice(_CHOICES["objective"]), help="What to minimise. [time]")
@click.option("--dispatch", type=click.Choice(_CHOICES["dispatch"]), help="Copies of a token that are sent. [per_node]")
@click.option("--return-mode", type=click.Choice(_CHOICES["return_mode"]),
              help="Where tokens go after a layer. [return_home]")
@click.option("--split", type=click.Choice(_CHOICES["split"]),
              help="How tokens split over copies. [the target's, else even]")
@click.option("--aggregate", type=click.Choice(_CHOICES["aggregate"]), help="Over windows. [mean]")
@click.option("--max-imbalance", metavar="PERCENT", help="Load above the best balanced plan's. [5 % on several nodes]")
@click.option("--batch-per-rank", type=int, metavar="N", help="Tokens entering a layer per rank. [4096; decode 128]")
@click.option("--context", type=int, metavar="N", help="Tokens of KV cache per sequence in decode. [2048]")
@click.option("--dtype", type=click.Choice(_CHOICES["dtype"]), help="Of the expert weights. [bf16]")
@click.option("--seed", type=int, metavar="N", help="Same seed, same plan. [0]")
@click.option("--time-limit", metavar="SECONDS",
              help="Stop searching after this time, as in '30 s' or 30; scoring comes on top.")
@click.option("--out", type=_FILE, help="Directory for plan.json and plan.html; an older plan there is replaced.")
@output_options
def optimize(scenario: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Plan expert placement from recorded routing, from options or a SCENARIO file (options win).

    Writes plan.json and a page, and says what the plan gains, how far it can be from the best, and whether it pays.

    \b
    Examples:
      moeplan optimize --model deepseek-v2-lite --trace routing.npz --ranks 16 --nodes 2 --out plan
      moeplan optimize scenario.yaml --out plan
    """
    from moeplan.files import require_place
    from moeplan.pipeline.optimize import PLAN_PLACE, write_plan
    from moeplan.pipeline.optimize import optimize as run
    from moeplan.pipeline.views import brief_notes

    found_scenario = _scenario(scenario, options)
    out: Path | None = options["out"] or found_scenario.out
    if out is None:
        raise click.UsageError("give --out, the directory to write plan.json to")
    require_place(out, *PLAN_PLACE)  # before the work, not after it
    with progress_bar(quiet or as_json) as progress:
        found = run(found_scenario, windows=options["windows"], domain=options["domain"], progress=progress)
    written = write_plan(found, out)
    plan = found.plan
    if not quiet:
        for message in (*brief_notes(found.messages), *(f"wrote {path}" for path in written)):
            click.echo(message, err=True)
    if as_json:
        print_json(plan.model_dump(mode="json") | {"sha256": plan.sha256, "written": [str(path) for path in written]})
    elif not quiet:
        from rich.console import Console

        from moeplan.pipeline.show import view_of

        console = Console(highlight=False)
        console.print(view_of(plan, found.evidence, console.width))
        if plan.verdict is not None and plan.verdict.apply:
            target = found_scenario.target or "ENGINE"
            click.echo(f"next: moeplan export {written[0]} --format {target} --out FILE", err=True)
    if found.interrupted:
        click.echo("interrupted: the best plan so far was kept", err=True)
        raise click.exceptions.Exit(130)


def _scenario(path: Path | None, options: dict[str, Any]) -> Any:
    """The scenario file with the options laid over it."""
    from moeplan.specs.scenario import Scenario

    fields: dict[str, Any] = {}
    if path is not None:
        fields = Scenario.from_file(path).model_dump(mode="json", exclude_unset=True)
    if (limit := options["time_limit"]) is not None and limit.replace(".", "", 1).isdigit():
        options["time_limit"] = f"{limit} s"
    for name in _TOP:
        if options[name] is not None:
            fields[name] = str(options[name]) if isinstance(options[name], Path) else options[name]
    for part, names in (("objective", _OBJECTIVE), ("workload", _WORKLOAD)):
        given = {field: options[name] for name, field in names.items() if options[name] is not None}
        if given:
            fields[part] = {**fields.get(part, {}), **given}
    for name in ("model", "trace"):
        if name not in fields:
            raise click.UsageError(f"give --{name}, or a scenario file that names it")
    if path is None and "ranks" not in fields and "cluster" not in fields:
        raise click.UsageError("give --ranks, the expert-parallel size")
    return Scenario.parse(fields, str(path) if path else "options")
