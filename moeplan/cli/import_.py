"""``moeplan import``."""

from __future__ import annotations

from pathlib import Path

import click

from moeplan.cli.common import names_of, output_options, print_json

__all__ = ["command"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "format_name", shell_complete=names_of("exporters"),
              help="Format of FILE; recognised by its content when left out.")
@click.option("--model", required=True, shell_complete=names_of("models", or_file=True),
              help="Model name or config.json.")
@click.option(
    "--ranks", type=click.IntRange(1), required=True, help="Expert-parallel size the file was made for."
)
@click.option(
    "--nodes", type=click.IntRange(1), default=1, show_default=True, help="Nodes the ranks stand in."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="plan.json to write.")
@output_options
def command(
    file: Path,
    format_name: str | None,
    model: str,
    ranks: int,
    nodes: int,
    out: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read FILE, a placement of another engine, into a plan (without prediction).

    \b
    Example:
      moeplan import expert_location.json --model deepseek-v2-lite --ranks 8 --out plan.json
    """
    from moeplan.files import require_other
    from moeplan.pipeline.exports import import_plan

    require_other(out, file)
    plan = import_plan(file, model=model, num_ranks=ranks, num_nodes=nodes, format_name=format_name)
    plan.save(out)
    if as_json:
        print_json(
            {
                "written": str(out),
                "planner": plan.planner,
                "model": plan.model,
                "num_layers": len(plan.layer_ids),
                "num_experts": plan.num_experts,
                "num_slots": len(plan.rank_of_slot),
                "num_ranks": plan.num_ranks,
                "notes": list(plan.notes),
            }
        )
    elif not quiet:
        click.echo(
            f"wrote {out}: {plan.planner}, {plan.model}, {len(plan.layer_ids)} layers, {plan.num_experts} experts in"
            f" {len(plan.rank_of_slot)} slots on {plan.num_ranks} ranks"
        )
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
