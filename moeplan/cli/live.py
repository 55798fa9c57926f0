"""``moeplan live`` and ``moeplan apply``: run a plan on real ranks, and hand a plan to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import output_options, print_json, progress_bar

__all__ = ["apply", "live"]

_PATH = click.Path(path_type=Path)
_FOLDER = click.Path(path_type=Path, file_okay=False)


def _seconds(_context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    from moeplan.units import parse_quantity

    if value is None:
        return None
    try:
        return parse_quantity(value, "seconds")
    except ValueError as error:
        raise click.BadParameter(str(error), param=option) from error


@click.command()
@click.option("--model", default="moeplan-20m", show_default=True, metavar="NAME|PATH",
              help="Shape of the model; vocabulary 256.")
@click.option("--ranks", type=int, metavar="N", help="Processes to start here. [4; under torchrun its own]")
@click.option("--nodes", type=int, default=1, show_default=True, metavar="M", help="Nodes the expert ranks are in.")
@click.option("--tp", type=int, default=1, show_default=True, metavar="N", help="Ranks that split each expert.")
@click.option("--edp", type=int, default=1, show_default=True, metavar="N", help="Copies of the whole placement.")
@click.option("--steps", type=int, default=40, show_default=True, metavar="N", help="Training steps.")
@click.option("--plan", type=_PATH, metavar="FILE", help="Placement from the start, or from --apply-at on.")
@click.option("--apply-at", type=int, metavar="STEP", help="Move to --plan after this step.")
@click.option("--no-reference", is_flag=True, help="Leave out the same run without the move.")
@click.option("--stall-budget", "budget_s", callback=_seconds, metavar="TIME",
              help="As in '50 ms': layer by layer, so long per step. [all at once]")
@click.option("--batch", type=int, default=16, show_default=True, metavar="N", help="Sequences per step, all ranks.")
@click.option("--length", type=int, default=128, show_default=True, metavar="N", help="Bytes per sequence.")
@click.option("--lr", type=float, default=3e-3, show_default=True, help="Learning rate of AdamW.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and batches.")
@click.option("--text", type=_PATH, help="File or folder to train on. [Python's standard library]")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of weights.")
@click.option("--zero", is_flag=True, help="ZeRO-1: split optimizer state over ranks with the same weights.")
@click.option("--dispatch", type=click.Choice(["per_expert", "per_rank", "per_node", "allgather"]),
              default="per_expert", show_default=True, help="One copy of a token per what.")
@click.option("--split", type=click.Choice(["even", "nearest", "weighted"]),
              help="How tokens find a copy of their expert. [the plan's, else even]")
@click.option("--aux-loss", type=float, default=0.01, show_default=True, help="Weight of the balance loss.")
@click.option("--bias-rate", type=float, default=0.0, show_default=True, help="Step of loss-free balancing.")
@click.option("--capacity-factor", type=float, help="Drop tokens beyond it. [dropless]")
@click.option("--out", type=_FOLDER, help="metrics.jsonl, events.parquet and result.json go here.")
@click.option("--checkpoint", type=_FOLDER, help="Checkpoints go here; the last after the last step.")
@click.option("--checkpoint-every", type=int, default=0, metavar="N", help="Steps between checkpoints. [at the end]")
@click.option("--resume", type=_FOLDER, help="Go on from a checkpoint, of any number of ranks.")
@click.option("--skip-damaged", is_flag=True,
              help="Where the checkpoint to go on from is damaged, take the newest whole one before it, and say so.")
@click.option("--control", type=_FOLDER, help="Talk to 'moeplan apply' and 'moeplan control' through this folder.")
@click.option("--window", type=int, default=64, show_default=True, metavar="N",
              help="Steps of each window put into --control, a multiple of 8; 0: none.")
@click.option("--prometheus", type=int, metavar="PORT", help="Metrics at http://127.0.0.1:PORT/metrics.")
@click.option("--generate", metavar="TEXT", help="Continue TEXT after training.")
@click.option("--new-tokens", type=int, default=200, show_default=True, metavar="N", help="Bytes to generate.")
@click.option("--record", type=_PATH, metavar="FILE", help="Record the routing of held-out text (.npz or .parquet).")
@click.option("--record-tokens", type=int, default=16_384, show_default=True, metavar="N", help="How much of it.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="gloo or NCCL.")
@click.option("--port", type=int, default=0, metavar="PORT", help="Where local ranks meet. [any free one]")
@click.option("--join-timeout", "join_timeout_s", callback=_seconds, default="60 s", show_default=True, metavar="TIME",
              help="How long to wait for all ranks.")
@output_options
def live(as_json: bool, quiet: bool, no_reference: bool, **options: Any) -> None:
    """Train a small MoE model on real ranks; apply a plan on the way.

    With --apply-at the same run without the move is done
    too, and both loss curves are shown.

    \b
    Examples: moeplan live --ranks 4 --steps 40 --plan plan --apply-at 20
              torchrun --nproc-per-node 4 -m moeplan live --steps 40 --out run
    """
    from moeplan.pipeline.live import LiveRequest, run_live

    with progress_bar(quiet) as report:
        tell = (lambda _note: None) if quiet else (lambda note: click.echo(note, err=True))
        answer = run_live(LiveRequest(reference=not no_reference, **options), report, tell)
    if answer is None:  # a rank of torchrun that does not speak
        return
    if as_json:
        print_json(answer)
        return
    if quiet:
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{answer['model']} on {answer['ranks']} ranks")
    grid = Table("step", "loss")
    reference = answer.get("reference_losses")
    if reference is not None:
        grid.add_column("without the move")
    begun = answer["first_step"] + answer["steps"] - len(answer["losses"])
    for step, loss in enumerate(answer["losses"]):
        if step % max(1, len(answer["losses"]) // 10) == 0 or step == len(answer["losses"]) - 1:
            row = [str(begun + step), f"{loss:.4f}"]
            grid.add_row(*row, *([] if reference is None else [f"{reference[step]:.4f}"]))
    if answer["losses"]:
        console.print(grid)
        console.print(f"{answer['tokens_per_s']:.0f} tokens/s; held-out loss {answer['held_out_loss']:.4f} nats per"
                      f" byte; busiest rank {answer['imbalance']:.2f}x the mean")
    if answer["applied"] is not None:
        console.print(f"moved {answer['moved_experts']} experts, {answer['moved_bytes'] / 1e6:.1f} MB with their"
                      f" optimizer state, in {answer['stall_s'] * 1e3:.0f} ms"
                      + (f"; not finished: {answer['failure']}" if answer["failure"] else ""))
    if reference is not None:
        console.print(f"largest difference from the run without the move: {answer['largest_difference']:.2e}")
    if "text" in answer:
        console.print(answer["text"], markup=False)
    if (recorded := answer.get("recorded")) is not None:
        click.echo(f"wrote {recorded['path']}: {recorded['tokens']:,} tokens, overhead of recording"
                   f" {recorded['overhead']:+.1%} (spread {recorded['overhead_spread']:.1%})", err=True)
    if "out" in answer:
        click.echo(f"wrote {answer['out']}", err=True)


@click.command()
@click.argument("plan", type=_PATH)
@click.option("--to", "control", type=_FOLDER, required=True, help="The folder a live run watches (--control).")
@click.option("--wait", "wait_s", callback=_seconds, default="60 s", show_default=True, metavar="TIME",
              help="How long to wait for its answer.")
@output_options
def apply(plan: Path, control: Path, wait_s: float, as_json: bool, quiet: bool) -> None:
    """Apply a plan to a live run at its next step.

    \b
    Example: moeplan apply plan/plan.json --to run/control
    """
    from moeplan.pipeline.live import apply_plan

    answer = apply_plan(plan, control, wait_s)
    if as_json:
        print_json(answer)
    elif not quiet:
        click.echo(f"applied: {answer['moved_experts']} experts moved in {answer['stall_s'] * 1e3:.0f} ms")
