"""``moeplan control``: watch a live run from another process, and plan for it when its load drifts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import output_options, print_json

__all__ = ["control"]

_FOLDER = click.Path(path_type=Path, file_okay=False)
# option -> where it goes in a scenario
_TOP = ("model", "cluster", "ranks", "nodes", "profile", "planner", "seed")
_OBJECTIVE = {"dispatch": "dispatch", "split": "replica_split", "max_imbalance": "max_imbalance"}


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option("--model", required=True, metavar="NAME|PATH", help="The model that runs.")
@click.option("--cluster", required=True, metavar="NAME|FILE", help="An accelerator or cluster, or a file.")
@click.option("--ranks", type=int, metavar="N", help="Expert-parallel size.")
@click.option("--nodes", type=int, metavar="M", help="Nodes the ranks are in.")
@click.option("--profile", metavar="NAME|DIR|none", help="Measured costs to start from. [those of the accelerator]")
@click.option("--planner", metavar="NAME", help="[joint]")
@click.option("--dispatch", type=click.Choice(["per_expert", "per_rank", "per_node", "allgather"]),
              default="per_expert", show_default=True, help="How the run sends tokens.")
@click.option("--split", type=click.Choice(["even", "nearest", "weighted"]), help="How its tokens find a copy. [even]")
@click.option("--max-imbalance", metavar="PERCENT", help="Load above the best balanced plan's. [5 % on several nodes]")
@click.option("--significance", type=click.FloatRange(0, 1), default=0.01, show_default=True,
              help="Chance of a false alarm that the drift test allows.")
@click.option("--least-drift", type=click.FloatRange(0, 1), default=0.02, show_default=True,
              help="Part of the tokens that must have changed their expert.")
@click.option("--steps-left", type=click.IntRange(min=1), default=10_000, show_default=True, metavar="N",
              help="Steps that a gain is counted over, where the run does not say.")
@click.option("--windows", type=click.IntRange(min=1), metavar="N", help="Stop after so many. [goes on]")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS",
              help="Stop when no window came for so long. [goes on]")
@click.option("--seed", type=int, metavar="N", help="Of the planner. [0]")
@click.option("--out", type=_FOLDER, help="Report and what was planned from. [FOLDER/controller]")
@output_options
def control(folder: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Watch the windows that a live run puts into FOLDER; put a plan there when it pays.

    Each window is tested for drift; where the load has changed, a plan is made from the window's tokens and the costs
    as the run measured them, and handed over if it saves more in the steps left than moving takes.
    Started before the run, it says so and waits for it; it ends when the run does.

    \b
    Example: moeplan live --ranks 4 --nodes 2 --steps 2000 --control run/control --window 64 &
             moeplan control run/control --model moeplan-20m --cluster cluster.yaml
    """
    from moeplan.pipeline.control import Controller, ControlOptions, Decision, await_run, watch
    from moeplan.specs.scenario import Scenario

    document: dict[str, Any] = {name: options[name] for name in _TOP if options[name] is not None}
    document["objective"] = {field: options[name] for name, field in _OBJECTIVE.items() if options[name] is not None}
    rules = ControlOptions(options["significance"], options["least_drift"], options["steps_left"])
    scenario = Scenario.parse(document, "options")
    # Unknown names are said before the wait.
    scenario = scenario.model_copy(update={"model": scenario.model_spec(), "cluster": scenario.cluster_spec()})

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    await_run(folder, options["timeout_s"], say)
    controller = Controller(scenario, options["out"] or folder / "controller", rules)

    def tell(decision: Decision) -> None:
        say(f"window from step {decision.first_step}: {decision.reason}")

    for note in controller.notes:
        say(note)
    decisions = watch(controller, folder, options["windows"], options["timeout_s"], tell, say)
    if as_json:
        print_json({"decisions": [decision.to_json() for decision in decisions], "notes": controller.notes})
