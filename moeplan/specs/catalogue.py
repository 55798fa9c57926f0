"""Built-in lists of named specs, one JSON file each: ``name``, ``aliases`` and the spec's fields."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, TypeVar

from moeplan.errors import UnknownNameError
from moeplan.specs.base import Spec

__all__ = ["Catalogue", "names_a_file", "slug"]

S = TypeVar("S", bound=Spec)


def slug(name: str) -> str:
    """The form in which names are compared: lower case, words joined by hyphens."""
    return "-".join(name.lower().replace("_", " ").split())


def names_a_file(name: str | Path) -> bool:
    """Whether ``name`` is a path rather than a name: it is there, or ends as documents do."""
    path = Path(name)
    try:
        return bool(str(name)) and (path.suffix.lower() in {".json", ".yaml", ".yml"} or path.exists())
    except (OSError, ValueError):  # too long, or not a path at all
        return False


@cache
def _entries(file: str) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(files("moeplan.specs").joinpath("data", file).read_text(encoding="utf-8")))


class Catalogue(Generic[S]):
    """Specs of one kind by name; an entry is validated when it is asked for."""

    def __init__(self, kind: str, file: str, spec: type[S]) -> None:
        self._kind, self._file, self._spec = kind, file, spec

    def names(self) -> list[str]:
        """Slugs, in the order of the file."""
        return [slug(entry["name"]) for entry in _entries(self._file)]

    def aliases(self, name: str) -> list[str]:
        """Other names of the entry ``name``, as they are written by their owners."""
        return list(self._entry(name)["aliases"])

    def knows(self, name: str) -> bool:
        """Whether ``name`` is a slug, an alias, or an alias without its owner (``owner/model``)."""
        return slug(name) in self._index()

    def find(self, name: str) -> S:
        """The spec called ``name``.

        Raises:
            UnknownNameError: the message lists the names there are.
        """
        entry = self._entry(name)
        return self._spec.parse(
            {key: value for key, value in entry.items() if key != "aliases"}, f"built-in {entry['name']}"
        )

    def _entry(self, name: str) -> dict[str, Any]:
        number = self._index().get(slug(name))
        if number is None:
            raise UnknownNameError(self._kind, name, self.names())
        return _entries(self._file)[number]

    def _index(self) -> dict[str, int]:
        return _index(self._file)


@cache
def _index(file: str) -> dict[str, int]:
    index: dict[str, int] = {}
    for number, entry in enumerate(_entries(file)):
        for name in (entry["name"], *entry["aliases"]):
            index[slug(name)] = number
            index.setdefault(slug(name.rpartition("/")[2]), number)
    return index
