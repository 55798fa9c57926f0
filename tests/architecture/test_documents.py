"""Pages that people read: links lead somewhere, every plugin is written about, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

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
