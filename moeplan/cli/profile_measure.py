"""``moeplan profile experts | attention | dense | memory | collectives | system | all``: measure this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moeplan.cli.common import Seconds, output_options, print_json, progress_bar
from moeplan.errors import SpecError
from moeplan.pipeline.profile_request import changes

__all__ = ["commands", "routing"]

_PATH = click.Path(path_type=Path)
_PARTS = {
    "experts": "the grouped expert FFN by shape, type and vector of tokens",
    "attention": "attention: GQA and MLA, prefill and decode, sliding windows",
    "dense": "dense products, router, permutation, norms and embedding",
    "memory": "copies inside the device, to and from it, and allocations",
    "collectives": "all-to-all, all-gather, reduce-scatter, all-reduce and p2p between ranks",
    "system": "driver, clocks, power, links, and what a launch costs",
    "all": "everything that one process can, and collectives with --ranks",
}
_NUMBERS = click.IntRange(min=1)
_SEED = click.IntRange(min=0)


class _Words(click.ParamType[tuple[Any, ...]]):
    """Comma-separated words, or numbers from 1."""

    def __init__(self, kind: type = str, name: str = "NAMES") -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",") if word.strip()]
        if self.kind is not int:
            return tuple(words)
        if not words or not all(word.isdigit() and int(word) > 0 for word in words):
            self.fail(f"{value!r} must be numbers from 1, as in 1,8", param, ctx)
        return tuple(map(int, words))


def _options(function: Any) -> Any:
    """Options of the measuring commands, in the order of --help."""
    given: list[Any] = [
        click.option("--models", "--model", type=_Words(), metavar="NAMES", help="Built-in models or config files."),
        *(
            click.option(f"--{name}", type=_NUMBERS, help=text)
            for name, text in (
                ("hidden", "Sizes in place of a model: hidden H."),
                ("inter", "FFN size F of one expert."),
                ("experts", "Experts E of a layer."),
                ("top-k", "Experts K per token."),
                ("heads", "Query heads."),
                ("kv-heads", "Key-value heads."),
                ("head-dim", "Size of a head."),
                ("n", "Columns of a dense product's weights."),
                ("k", "Inner size of a dense product."),
            )
        ),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="A GPU where torch sees one."),
        click.option(
            "--dtype",
            "dtypes",
            type=_Words(),
            metavar="NAMES",
            help="fp32, bf16, fp16, fp8, int8, int4.  [default: bf16]",
        ),
        click.option("--kernel", "kernels", type=_Words(), help="grouped_mm, bmm, loop, triton.  [default: by type]"),
        click.option("--ep", type=_Words(int, "NUMBERS"), help="Ranks the experts are spread over.  [default: 1]"),
        click.option("--tp", type=_Words(int, "NUMBERS"), help="Ranks that share experts and heads.  [default: 1]"),
        click.option("--window", "windows", type=_Words(int, "TOKENS"), help="Sliding windows, besides the models'."),
        click.option("--direction", "directions", type=_Words(), help="forward, backward or both.  [default: forward]"),
        click.option("--max-tokens", type=_NUMBERS, help="Largest number of tokens.  [default: 16384]"),
        click.option("--budget", "budget_s", type=Seconds(), help="Time to spend, as in 60s or 20min.  [default: 60s]"),
        click.option("--threads", type=_NUMBERS, help="CPU threads, each pinned to a core.  [default: torch's]"),
        click.option("--realtime", is_flag=True, default=None, help="Real-time priority, where that is allowed."),
        click.option(
            "--op",
            "ops",
            type=_Words(),
            help="Collectives: all_reduce, all_gather, reduce_scatter, alltoall, p2p.  [default: all]",
        ),
        click.option(
            "--max-bytes",
            type=click.IntRange(min=256),
            help="Collectives: largest message in bytes.  [default: 16777216]",
        ),
        click.option("--ranks", type=_NUMBERS, help="Collectives: local processes to start."),
        click.option("--ranks-per-node", type=_NUMBERS, help="Collectives: where nodes cannot be told by name."),
        click.option("--trace", help="Collectives: routing whose traffic shapes uneven all-to-alls."),
        click.option("--seed", type=_SEED, help="Of shuffles and skewed vectors.  [default: 0]"),
        click.option("--preset", type=click.Choice(["cpu", "h200"]), help="What to measure there; options win."),
        click.option("--resume", is_flag=True, help="Go on from the journal of a run that was interrupted."),
        click.option("--out", type=_PATH, required=True, help="Profile directory; extended where it is there."),
    ]
    for option in reversed(given):
        function = option(function)
    return output_options(function)


def _measure(part: str) -> click.Command:
    def run(as_json: bool, quiet: bool, out: Path, resume: bool, preset: str | None, **options: Any) -> None:
        from moeplan.pipeline.profiling import measure_profile, profile_request

        request = profile_request(part, preset, {k: v for k, v in options.items() if v is not None})
        heads, kv_heads = request.sizes.heads, request.sizes.kv_heads
        if kv_heads and heads % kv_heads:
            raise SpecError(f"--kv-heads ({kv_heads}) must divide --heads ({heads}); give a number that does")
        try:
            with progress_bar(quiet, single=True) as report:
                answer = measure_profile(request, out, resume, report)
        except KeyboardInterrupt as stop:
            if str(stop):
                click.echo(str(stop), err=True)
            raise
        if not answer:
            return  # a rank other than the first
        _warn(answer, quiet)
        if as_json:
            print_json(answer)
        elif not quiet:
            _show(answer)

    run.__doc__ = (
        f"Measure {_PARTS[part]}.\n\n\b\nExample: moeplan profile {part} "
        + {
            "experts": "--model mixtral-8x7b --dtype bf16",
            "attention": "--model deepseek-v3 --tp 8",
            "dense": "--n 4096 --k 4096",
            "memory": "--device cuda",
            "collectives": "--ranks 4 --hidden 512 --top-k 2 --experts 16",
            "system": "--device cuda",
            "all": "--preset h200",
        }[part]
        + " --out profiles/mine"
    )
    made = click.command(part)(_options(run))
    made.params = [o for o in made.params if part == "all" or changes(o.name or "", part)]
    return made


def _warn(answer: dict[str, Any], quiet: bool) -> None:
    for line in answer["warnings"] if not quiet else ():
        click.echo(f"warning: {line}", err=True)


def _show(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{answer['out']}: {answer['device']}")
    grid = Table("table", "rows")
    for table, rows in answer["rows"].items():
        grid.add_row(table, f"{rows:,}")
    console.print(grid)
    foreign = answer["system"].get("foreign_cpu_share")
    console.print(
        f"{answer['points']} points ({answer['resumed_points']} from the journal), median spread "
        + ("not known" if answer["median_spread"] is None else f"{answer['median_spread']:.1%}")
        + (f", {single} of one sample, whose spread is not known" if (single := answer["single_samples"]) else "")
        + ("" if foreign is None else f", other programs took {foreign:.0%} of the CPU")
    )
    reasons: dict[str, list[str]] = {}
    for line in answer["left_out"]:
        label, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(label)
    for reason, labels in reasons.items():
        console.print(f"left out: {', '.join(labels)}: {reason}")


@click.command()
@click.option("--hf", type=_PATH, help="A Hugging Face model directory, or its config.json with --random-init.")
@click.option("--random-init", is_flag=True, help="Random weights from the config: tests the way, not the routing.")
@click.option("--sglang", metavar="URL", help="A running SGLang server, as in http://127.0.0.1:30000.")
@click.option("--dump-dir", type=_PATH, help="The server's SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.")
@click.option("--prompts", type=_PATH, help="A text file, one prompt a line.")
@click.option("--max-new-tokens", default=16, show_default=True, type=_NUMBERS, help="Decode tokens per prompt.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="A GPU where torch sees one.")
@click.option("--seed", default=0, show_default=True, type=_SEED, help="Of random weights and prompts.")
@click.option("--out", type=_PATH, required=True, help="Trace to write: .npz or .parquet.")
@output_options
def routing(as_json: bool, quiet: bool, **options: Any) -> None:
    """Record which experts tokens choose, from a live model.

    \b
    Examples:
      moeplan profile routing --hf DIR --prompts prompts.txt --out routing.npz
      moeplan profile routing --sglang http://127.0.0.1:30000 --dump-dir DIR --prompts prompts.txt \\
          --out routing.npz
    """
    from moeplan.pipeline.record import record_routing

    try:
        with progress_bar(quiet) as report:
            answer = record_routing(**options, progress=report)
    except KeyboardInterrupt as stop:
        if str(stop):  # what is kept
            click.echo(str(stop), err=True)
        raise
    if as_json:
        print_json(answer)
    elif not quiet:
        phases = ", ".join(f"{n:,} {phase}" for phase, n in answer["phases"].items())
        spread = "of one prompt" if answer["overhead_spread"] is None else f"spread {answer['overhead_spread']:.1%}"
        if abs(answer["overhead"]) <= (answer["overhead_spread"] or 0.0):
            spread += ": no more than noise"
        ranks = ""
        if files := answer.get("rank_files"):
            of = "the server does not say of how many" if answer["ranks"] is None else f"of {answer['ranks']}"
            ranks = f", dumps of {files} rank{'s'[: files > 1]} ({of})"
        click.echo(
            f"{answer['out']}: {answer['tokens']:,} tokens ({phases}){ranks}, overhead of recording"
            f" {answer['overhead']:+.1%} ({spread})"
        )


@click.command()
@click.argument("profile", type=_PATH)
@click.option("--hold-out", default=4, show_default=True, type=click.IntRange(min=2), help="Every n-th size.")
@click.option("--fresh", "fresh_s", type=Seconds(), help="Also measure new sizes for this long and compare.")
@output_options
def check(profile: Path, hold_out: int, fresh_s: float | None, as_json: bool, quiet: bool) -> None:
    """Check a profile: files, sense, and how well it predicts sizes it is not shown.

    \b
    Example: moeplan profile check profiles/mine --fresh 30s
    """
    from moeplan.pipeline.profile_checks import check_profile

    with progress_bar(quiet, single=True) as report:
        answer = check_profile(profile, hold_out, fresh_s, report)
    _warn(answer, quiet)
    if as_json:
        print_json(answer)
        return
    if quiet:
        return
    from rich.console import Console
    from rich.table import Table

    names = ("table", "rows", "doubtful", "held out", "median", "90th", "plain\nlog-log", "spread")
    grid = Table(*names, title=answer["name"], box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, entry in answer["tables"].items():
        held = entry["held_out"]
        cells = ["" if held[k] is None else f"{held[k]:.1%}" for k in ("median", "p90", "plain_median")]
        spread = "" if entry["median_spread"] is None else f"{entry['median_spread']:.1%}"
        doubtful = "\n".join(f"{n} {why}" for why, n in entry["doubtful"].items())
        grid.add_row(name, f"{entry['rows']:,}", doubtful, str(held["points"]), *cells, spread)
    console = Console(highlight=False)
    console.print(grid)
    for name, entry in answer["tables"].items():
        for form in entry["two_level"]:
            unit, median = "bytes" if name == "collectives" else "tokens", form["held_out"]["median"]
            over = [f"{ratio:.2f} of flat at {size:,} {unit}" for size, ratio in form["over_flat"].items()]
            said = [*([] if median is None else [f"held out {median:.1%}"]), *over[:1], *over[1:][-1:]]
            what = form.get("op") or form["phase"]
            console.print(f"{what} on two levels, {form['ranks']} ranks on {form['nodes']} nodes: {', '.join(said)}")
    for name, what in (("vectors", "skewed vectors from balanced rows"), ("fresh", "fresh sizes")):
        found = answer[name]
        if found and found["points"]:
            console.print(f"{what}: {found['points']} points, median {found['median']:.1%}, 90th {found['p90']:.1%}")
    if found := answer["fresh"]:
        priority = "real-time" if found["realtime"] else "normal"
        console.print(
            f"the machine takes {found['drift']:.2f} times as long now at sizes of the profile ({priority} priority)"
        )
    console.print("not worth keeping: see the warnings" if answer["warnings"] else "nothing speaks against it")


@click.command()
@click.argument("profile", type=_PATH)
@click.option("--out", type=_PATH, required=True, help="Page to write: .html.")
@output_options
def show(profile: Path, out: Path, as_json: bool, quiet: bool) -> None:
    """Draw a profile: measured points, fit, residuals, roofline.

    \b
    Example: moeplan profile show profiles/mine --out mine.html
    """
    from moeplan.pipeline.profile_pictures import show_profile

    with progress_bar(quiet, single=True) as report:
        answer = show_profile(profile, out, progress=report)
    _warn(answer, quiet)
    if as_json:
        print_json(answer)
    elif not quiet:
        click.echo(f"{answer['out']}: {answer['pictures']} pictures")


@click.command()
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@output_options
def diff(first: Path, second: Path, as_json: bool, quiet: bool) -> None:
    """Compare two profiles point by point: time of SECOND over FIRST.

    \b
    Example: moeplan profile diff profiles/mine profiles/again
    """
    from moeplan.pipeline.profile_checks import diff_profiles

    answer = diff_profiles(first, second)
    if as_json:
        print_json(answer)
        return
    if quiet:
        return
    from rich.console import Console
    from rich.table import Table

    title = f"time of {second} over {first}"
    grid = Table("table", "shared", "only first", "only second", "median", "10th", "90th", title=title)
    for name, entry in answer["tables"].items():
        ratios = ["" if entry[k] is None else f"{entry[k]:.3f}" for k in ("median", "p10", "p90")]
        grid.add_row(name, *(str(entry[k]) for k in ("shared", "only_first", "only_second")), *ratios)
    Console().print(grid)


commands: tuple[click.Command, ...] = (*(_measure(part) for part in _PARTS), routing, check, show, diff)
