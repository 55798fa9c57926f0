"""Plugins by name, through entry points: built-ins come in by the same door as anybody's.

A plugin group is an entry-point group ``moeplan.<kind>s``; each entry point names an object
(a class or function) that satisfies the kind's protocol and passes its contract suite in
:mod:`moeplan.testing`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from moeplan.errors import UnknownNameError

__all__ = ["load_plugin", "plugin_names"]

_ELSEWHERE = {"eplb": "greedy"}  # its policy, but for second copies on a rank: docs/decisions/0008


@cache
def _group(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"moeplan.{kind}")}


def plugin_names(kind: str) -> list[str]:
    """Names registered for ``kind`` (``planners``, ``trace_readers``, ``exporters``, ...), sorted."""
    return sorted(_group(kind))


def load_plugin(kind: str, name: str) -> Any:
    """Import and return the plugin ``name`` of ``kind``.

    Raises:
        UnknownNameError: no such plugin; the message lists those there are.
    """
    points = _group(kind)
    if name not in points:
        meant = _ELSEWHERE.get(name.lower())
        raise UnknownNameError(
            kind.removesuffix("s").replace("_", " "), name, points, meant if meant in points else None
        )
    return points[name].load()
