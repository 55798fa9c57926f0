"""Write the generated reference: ``python docs/generate.py [--check]``.

``docs/reference/cli.md`` from the commands, ``fields.md`` and the JSON schemas from the specs and artifacts.
With ``--check`` nothing is written; exit code 1 when a file is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

REFERENCE = Path(__file__).resolve().parent / "reference"
_NOTE = "<!-- Written by docs/generate.py; edit the code, then run it again. -->\n\n"


def documents() -> dict[str, str]:
    """Text of each generated file, by its name in ``docs/reference``."""
    from moeplan.artifacts.plan import Plan
    from moeplan.artifacts.profile import ProfileMeta
    from moeplan.artifacts.profile_tables import schema_document
    from moeplan.artifacts.simulation_result import SimulationResult
    from moeplan.specs.cluster import ClusterSpec
    from moeplan.specs.model import ModelSpec
    from moeplan.specs.scenario import Scenario

    roots: dict[str, type[BaseModel]] = {
        "plan.json": Plan,
        "scenario.yaml": Scenario,
        "A model": ModelSpec,
        "A cluster": ClusterSpec,
        "profile.json": ProfileMeta,
        "result.json": SimulationResult,
    }
    return {
        "cli.md": cli_text(),
        "fields.md": fields_text(roots),
        "plan.schema.json": schema_text(Plan),
        "profile.schema.json": schema_text(ProfileMeta),
        "profile-tables.json": json.dumps(schema_document(), indent=1) + "\n",
        "result.schema.json": schema_text(SimulationResult),
        "scenario.schema.json": schema_text(Scenario),
    }


def cli_text() -> str:
    """Every command with its ``--help``, as the terminal shows it."""
    from moeplan.cli import cli

    parts = [_NOTE, "# Command line\n"]
    for path, text in _commands(cli, ("moeplan",), None):
        parts.append(f"\n{'#' * min(1 + len(path), 4)} `{' '.join(path)}`\n\n```text\n{text.rstrip()}\n```\n")
    return "".join(parts)


def _commands(
    command: click.Command, path: tuple[str, ...], parent: click.Context | None
) -> list[tuple[tuple[str, ...], str]]:
    settings = {"terminal_width": 100, "max_content_width": 100, **command.context_settings}
    context = click.Context(command, info_name=path[-1], parent=parent, **settings)
    found = [(path, command.get_help(context))]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is None:
                raise SystemExit(f"{' '.join(path)} lists '{name}' but has no such command")
            found += _commands(inner, (*path, name), context)
    return found


def schema_text(model: type[BaseModel]) -> str:
    """JSON schema of the file form."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def fields_text(roots: dict[str, type[BaseModel]]) -> str:
    """A table of fields for each root and, once, for everything inside them."""
    parts = [
        _NOTE,
        "# Fields\n\nQuantities carry their unit in files that people write (`450 GB/s`, `141 GiB`).\n",
    ]
    seen: set[str] = set()
    for title, model in roots.items():
        schema = model.model_json_schema()
        inner = schema.pop("$defs", {})
        sections = {model.__name__: schema, **inner}
        for name, section in sections.items():
            if name in seen or "properties" not in section:
                continue
            seen.add(name)
            head = f"## {title}: `{name}`" if name == model.__name__ else f"### `{name}`"
            parts.append(f"\n{head}\n\n{_first_line(section)}{_table(section)}")
    return "".join(parts)


def _first_line(section: dict[str, Any]) -> str:
    text = section.get("description", "").split("\n\n")[0].replace("``", "`")
    return " ".join(text.split()) + "\n\n" if text else ""


def _table(section: dict[str, Any]) -> str:
    rows = ["| field | type | default | meaning |\n|---|---|---|---|\n"]
    required = section.get("required", [])
    for name, field in section["properties"].items():
        default = (
            "required"
            if name in required
            else f"`{json.dumps(field['default'])}`"
            if "default" in field
            else ""
        )
        meaning = field.get("description", "")
        if meaning.startswith("a quantity in "):  # said by the type already
            meaning = ""
        cells = (f"`{name}`", _type(field), default, meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(rows)


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    kind = field.get("type", "any")
    if kind == "array":
        return f"list of {_type(field['items'])}" if "items" in field else "list"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"map to {_type(field['additionalProperties'])}"
    return f"quantity, as `{field['examples'][0]}`" if field.get("examples") else str(kind)


def main() -> int:
    """Write or check the files; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    check = parser.parse_args().check
    stale = []
    for name, text in documents().items():
        path = REFERENCE / name
        if check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            REFERENCE.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(
            f"out of date in docs/reference: {', '.join(stale)}; run: python docs/generate.py",
            file=sys.stderr,
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
