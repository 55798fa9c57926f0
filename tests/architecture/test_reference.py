"""The generated reference is what the code says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from pydantic import BaseModel, Field

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_reference_is_current() -> None:
    # In a process of its own: click keeps a command's help option as whoever asked first wanted it.
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_every_command_is_listed_once_with_its_help(generate: ModuleType) -> None:
    @click.group()
    def root() -> None:
        """Root."""

    @root.group()
    def inner() -> None:
        """Inner group."""

    @inner.command()
    @click.option("--size", help="How large.")
    def leaf(size: str) -> None:
        """Leaf command."""

    found = dict(generate._commands(root, ("tool",), None))
    assert list(found) == [("tool",), ("tool", "inner"), ("tool", "inner", "leaf")]
    assert "Usage: tool inner leaf" in found["tool", "inner", "leaf"]
    assert "How large." in found["tool", "inner", "leaf"]


class _Part(BaseModel):
    """A part."""

    size: int = Field(description="how large | wide")


class _Whole(BaseModel):
    """A whole, of parts."""

    parts: tuple[_Part, ...] = ()
    kind: str | None = None


def test_fields_table(generate: ModuleType) -> None:
    text = generate.fields_text({"whole.json": _Whole})
    assert "| `parts` | list of [_Part](#_part) | `[]` |  |" in text
    assert "| `kind` | string or null | `null` |  |" in text
    assert "| `size` | integer | required | how large \\| wide |" in text
    assert text.count("### `_Part`") == 1


def test_plan_schema_accepts_the_fields_of_a_plan(generate: ModuleType) -> None:
    from moeplan.artifacts.plan import Plan

    schema = json.loads(generate.schema_text(Plan))
    assert set(schema["properties"]) == set(Plan.model_fields)
    assert schema["additionalProperties"] is False
