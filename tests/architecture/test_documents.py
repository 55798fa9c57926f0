"""Pages that people read: links lead somewhere, every plugin is written about, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from moeplan.cli import cli
from moeplan.registry import load_plugin, plugin_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE_OF = {
    "planners": "README.md",
    "trace_readers": "docs/guides/traces.md",
    "request_readers": "docs/guides/simulate.md",
    "exporters": "docs/guides/exporters.md",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("kind", PAGE_OF)
def test_every_plugin_loads_and_is_written_about(kind: str) -> None:
    text = (ROOT / PAGE_OF[kind]).read_text(encoding="utf-8")
    assert plugin_names(kind)
    for name in plugin_names(kind):
        assert load_plugin(kind, name) is not None
        assert f"`{name}`" in text, name


def test_commands_of_the_readme_exist() -> None:
    used = set(re.findall(r"^moeplan ([a-z]+)|`moeplan ([a-z]+)", (ROOT / "README.md").read_text("utf-8"), re.M))
    names = {first or second for first, second in used}
    assert {"optimize", "export", "show"} <= names
    assert names <= set(cli.list_commands(click.Context(cli)))


def test_the_picture_of_the_readme_is_what_its_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = re.search(r'bin/moeplan" (optimize .*--out out/demo)$', (ROOT / "run.sh").read_text("utf-8"), re.M)
    draw = re.search(r"drawn by\n`moeplan (show out/demo .*)`", (ROOT / "README.md").read_text("utf-8"))
    assert plan and draw  # noqa: PT018
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("moeplan.pipeline.held_out.MIN_HELD_OUT_TOKENS", 10**9)  # the picture shows no verdict
    for command in (plan[1], draw[1]):
        words = command.replace("out/demo", str(tmp_path / "demo")).replace("docs/", f"{tmp_path}/").split()
        ran = CliRunner().invoke(cli, [*words, "--quiet"])
        assert ran.exit_code == 0, ran.output
    drawn, kept = (
        # not the paths and ids: they are the drawing library's
        re.findall(r"<(?:title|style|text)\b[^>]*>([^<]+)", (folder / "plan.svg").read_text(encoding="utf-8"))
        for folder in (tmp_path, ROOT / "docs")
    )
    assert len(drawn) > 20
    assert kept == drawn, "docs/plan.svg is stale: run make demo and the command of the README"
