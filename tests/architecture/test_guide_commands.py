"""Commands and scenarios that pages show: commands, options and fields exist, and choices are among those offered."""

from __future__ import annotations

import re
import shlex
from itertools import zip_longest
from pathlib import Path

import click
import pytest
import yaml

from moeplan.cli import cli
from moeplan.specs.clusters import cluster_from_mapping
from moeplan.specs.scenario import Scenario

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "scenarios").rglob("*.md"))]


def _commands(page: Path) -> list[list[str]]:
    """Words after ``moeplan`` of every command in a block of code, an indented line or a code span."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    code = "\n".join(re.findall(r"^```(?:sh|text)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    code += "\n" + "\n".join(re.findall(r"^    \S.*$", text, re.MULTILINE))
    spans = [span.replace("\n", " ") for span in re.findall(r"`(moeplan [^`]+)`", text)]
    starts = r"(?: *Examples?:)? *(?:torchrun .*|python -m )?moeplan ([a-z].*)"
    matches = [re.match(starts, line) for line in [*code.splitlines(), *spans]]
    return [shlex.split(match[1], comments=True) for match in matches if match]


def _wrong(words: list[str]) -> str | None:
    """What the command line would not know of a command, None where all is known."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        known = command.get_command(context, words[0])
        if known is None:
            return f"no command {words[0]}" if re.fullmatch(r"[a-z-]+", words[0]) else None
        command, words = known, words[1:]
    options = {name: each for each in command.params for name in (*each.opts, *each.secondary_opts)}
    for word, value in zip_longest(words, words[1:], fillvalue=""):
        name = word.partition("=")[0]
        if not name.startswith("--") or name == "--":
            continue
        if name not in options and name != "--help":
            return f"{command.name} has no {name}"
        choice = options[name].type if name in options else None
        if isinstance(choice, click.Choice) and value not in choice.choices:
            return f"{command.name} {name} is not {value!r}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_pages_exist_with_their_options(page: Path) -> None:
    assert [(words, wrong) for words in _commands(page) if (wrong := _wrong(words))] == []


def test_commands_are_found_and_wrong_ones_told() -> None:
    assert sum(len(_commands(page)) for page in PAGES) > 80
    assert _wrong(["trace", "synth", "--domain-cosin", "1"]) == "synth has no --domain-cosin"
    assert _wrong(["optimize", "--dispatch", "per_gpu"]) == "optimize --dispatch is not 'per_gpu'"
    assert _wrong(["profile", "guess"]) == "no command guess"


def test_scenarios_and_clusters_of_guides_are_read() -> None:
    read = 0
    for page in PAGES:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            fields = yaml.safe_load(block)
            if "model" in fields:
                Scenario.model_validate(fields)
            elif "accelerator" in fields:
                cluster_from_mapping(fields, page.name)
            else:
                continue
            read += 1
    assert read >= 6
