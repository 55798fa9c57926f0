"""``moeplan export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import names_of, output_options, print_json, progress_bar

__all__ = ["command"]


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--format", "format_name", required=True, shell_complete=names_of("exporters"),
              help="Target, e.g. sglang, trtllm, vllm, megatron.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File (or directory) to write.")
@click.option(
    "--variant",
    help="Form of the target where it knows several: vllm has policy, offline, rank-map, expert-map.",
)
@click.option("--model", shell_complete=names_of("models", or_file=True),
              help="Model name or config.json, where the plan's own name is not a built-in one.")
@click.option("--num-layers", type=click.IntRange(1), help="sglang: all decoder layers, dense ones too.")
@click.option("--model-class", help="vllm offline: class of the model, e.g. DeepseekV2ForCausalLM.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="megatron, deepspeed: weights to permute into --out.",
)
@click.option(
    "--num-groups", type=click.IntRange(1), help="megatron, deepspeed: groups of group-limited routing."
)
@output_options
def command(plan: Path, format_name: str, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write PLAN (plan.json) as a placement file of a serving engine, or apply it to a training checkpoint.

    \b
    Examples:
      moeplan export plan.json --format sglang --out expert_location.json
      moeplan export plan.json --format vllm --out fixed_plan.py
      moeplan export plan.json --format megatron --checkpoint model/ --out model-permuted/
    """
    from moeplan.pipeline.exports import export_plan

    with progress_bar(quiet or as_json) as progress:
        written = export_plan(plan, format_name, out, **options, progress=progress)
    if as_json:
        print_json({"format": format_name, "written": [str(path) for path in written]})
    elif not quiet:
        click.echo(f"wrote {out}" + (f" ({len(written)} files)" if len(written) > 1 else ""))
