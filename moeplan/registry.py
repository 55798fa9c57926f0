"""Plugins by name, through entry points: built-ins come in by the same door as anybody's.

A plugin group is an entry-point group ``moeplan.<kind>s``; each entry point names an object
(a class or function) that satisfies the kind's protocol and passes its contract suite in
:mod:`moeplan.testing`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from moeplan.errors import InputError, MoeplanError, UnknownNameError

__all__ = ["load_plugin", "plugin_names"]

_ELSEWHERE = {"eplb": "greedy"}  # its policy, but for second copies on a rank: docs/decisions/0008


@cache
def _group(kind: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"moeplan.{kind}"):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise InputError(
                f"{_noun(kind)} '{point.name}' is registered by {_origin(other)} and by {_origin(point)}; uninstall one"
                " of them, or rename it in its entry points"
            )
    return found


def _noun(kind: str) -> str:
    return kind.removesuffix("s").replace("_", " ")


def _origin(point: EntryPoint) -> str:
    return f"package {point.dist.name} ({point.value})" if point.dist is not None else point.value


def plugin_names(kind: str) -> list[str]:
    """Names registered for ``kind`` (``planners``, ``trace_readers``, ``exporters``, ...), sorted.

    Raises:
        InputError: two packages register one name.
    """
    return sorted(_group(kind))


def load_plugin(kind: str, name: str) -> Any:
    """Import and return the plugin ``name`` of ``kind``.

    Raises:
        UnknownNameError: no such plugin; the message lists those there are.
        InputError: it cannot be imported, or two packages register one name.
    """
    points = _group(kind)
    if name not in points:
        meant = _ELSEWHERE.get(name.lower())
        raise UnknownNameError(_noun(kind), name, points, meant if meant in points else None)
    try:
        return points[name].load()
    except MoeplanError:
        raise
    except Exception as error:
        raise InputError(
            f"{_noun(kind)} '{name}' of {_origin(points[name])} cannot be imported: {type(error).__name__}: {error};"
            " repair or uninstall that package"
        ) from error
