"""The command line: words to one call of :mod:`moeplan.pipeline`. Commands load only when they are called."""

from __future__ import annotations

import importlib
import sys

try:
    import click

    from moeplan import __version__
    from moeplan.cli.characters import substitute_missing
    from moeplan.errors import MoeplanError
except KeyboardInterrupt:  # before main could say so
    sys.exit(130)

__all__ = ["main"]

# name -> (module in moeplan.cli, one-line help); the object in the module is called `command`.
_COMMANDS: dict[str, tuple[str, str]] = {
    "optimize": ("optimize", "Plan a placement from recorded routing and write it to a directory."),
    "evaluate": ("evaluate", "Score any plan or placement file on any trace."),
    "simulate": ("simulate", "Predict what a service does under a placement and a workload."),
    "compare": ("compare", "Set two simulations side by side, with intervals."),
    "show": ("show", "Show a plan in the terminal."),
    "export": ("export", "Write a plan as a placement file of a serving engine or training framework."),
    "import": ("import_", "Read a placement file of another engine into a plan."),
    "trace": ("trace", "Inspect, convert, validate and synthesise routing traces."),
    "profile": ("profile", "Measure, import, check and show hardware profiles."),
    "live": ("live", "Train a small MoE model on real ranks; apply a plan on the way."),
    "apply": ("live", "Apply a plan to a live run at its next step."),
    "control": ("control", "Watch a live run; plan again when its load drifts and a plan pays."),
    "report": ("report", "Report on a plan, a simulation or a live run as one page, or compare two."),
    "validate": ("validate", "Hold predictions against measurements."),
    "models": ("catalogue", "List the built-in models."),
    "clusters": ("catalogue", "List the built-in accelerators and clusters."),
    "completion": ("completion", "Print the shell completion script."),
}


class _LazyGroup(click.Group):
    """Knows its commands by name and one-line help; imports a command's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"moeplan.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name if hasattr(module, cmd_name) else "command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Measure, plan, simulate and apply expert placements for Mixture-of-Experts clusters."""


def main() -> None:
    """Run the command line; errors people can cause end in one line and exit code 2, Ctrl-C in 130."""
    for stream in (sys.stdout, sys.stderr):
        substitute_missing(stream)
    try:
        status = cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except MoeplanError as error:
        if str(error):  # one of several ranks says what happened; the others end without a word
            click.echo(f"error: {error}", err=True)
        status = error.exit_code
    except MemoryError as error:
        what = str(error).partition("\n")[0] or "no more memory"
        click.echo(f"error: {what}; ask for less: fewer tokens, requests, seeds or ranks", err=True)
        status = 2
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        status = 130
    except BrokenPipeError:
        sys.stderr.close()
        status = 1
    sys.exit(status if isinstance(status, int) else 0)
