"""``moeplan evaluate``: score any plan or placement file on any trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import names_of, output_options, print_json

__all__ = ["evaluate"]


@click.command()
@click.option("--plan", "plans", required=True, multiple=True, type=click.Path(path_type=Path),
              shell_complete=names_of("planners", or_file=True),
              help="plan.json or an engine's file. Repeat it to compare; then also names of planners.")
@click.option("--trace", "trace_path", required=True, type=click.Path(path_type=Path), help="Routing or expert counts.")
@click.option("--model", "model_name", metavar="NAME|PATH", shell_complete=names_of("models", or_file=True),
              help="Needed for files that do not name their model.")
@click.option("--ranks", type=int, metavar="N", help="Needed for files that do not say their ranks.")
@click.option("--nodes", type=int, metavar="M", help="Nodes the ranks are in. [the plan's, else 1]")
@click.option("--cluster", "cluster_name", metavar="NAME|FILE", shell_complete=names_of("clusters", or_file=True),
              help="What the costs are of. [the plan's accelerator, else h100-sxm]")
@click.option("--profile", metavar="NAME|DIR|none", help="Measured costs. [those shipped for the accelerator]")
@click.option("--phase", type=click.Choice(["prefill", "decode", "mix"]), help="Default: the plan's, else the trace's.")
@click.option("--batch-per-rank", type=int, metavar="N", help="Tokens entering a layer per rank.")
@click.option("--dispatch", type=click.Choice(["per_expert", "per_rank", "per_node", "allgather"]),
              help="Copies of a token that are sent. [the plan's, else per_node]")
@click.option("--return-mode", type=click.Choice(["return_home", "stay"]),
              help="Where tokens go after a layer. [the plan's, else return_home]")
@click.option("--split", type=click.Choice(["even", "nearest", "weighted"]),
              help="How tokens split over copies. [the plan's, else the engine's]")
@click.option("--trace-format", metavar="NAME", shell_complete=names_of("trace_readers"),
              help="Name of the reader; recognised when left out.")
@click.option("--domain", metavar="NAME", help="Score on one domain of the trace only.")
@click.option("--windows", default="all", show_default=True, metavar="KIND", help="all, domain, phase or time:N.")
@output_options
def evaluate(as_json: bool, quiet: bool, **options: Any) -> None:
    """Score placements on a trace: load, nodes and ranks per token, predicted time. One: layer by layer. Several: side
    by side, with differences from the first, under the conditions of the first file. A planner named, as contiguous or
    greedy, plans this very trace in the first file's slots.

    \b
    Examples:
      moeplan evaluate --plan moe_load_balancer.yaml --trace routing.npz --model deepseek-v2-lite --ranks 16
      moeplan evaluate --plan plan --plan contiguous --plan greedy --trace other.npz
    """
    from moeplan.pipeline.evaluate import differences, evaluate_plans

    scores = evaluate_plans(**options)
    plans = [str(path) for path in options["plans"]]
    if not quiet:
        for message in dict.fromkeys(message for score in scores for message in score.messages):
            click.echo(message, err=True)
    answers = [score.to_json() for score in scores]
    changes = differences(answers)
    if as_json:
        rows = zip(plans, answers, changes, strict=True)
        several = [{"plan": plan} | answer | {"change_from_first": change} for plan, answer, change in rows]
        print_json(several if len(several) > 1 else answers[0])
        return
    if quiet:
        return
    from rich.console import Console

    from moeplan.pipeline.views import score_view, scores_view

    console, trace = Console(highlight=False), options["trace_path"].name
    if len(answers) == 1:
        console.print(score_view(answers[0], f"{scores[0].model}: {plans[0]} on {trace}"))
    else:
        console.print(scores_view(plans, answers, changes, f"{scores[0].model} on {trace}"))
