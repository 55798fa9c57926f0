"""Every error a person can cause, as one tree.

::

    MoeplanError
    ├── InputError            what was given cannot be used            exit code 2
    │   ├── SpecError         a field of a spec or scenario
    │   ├── TraceError        a routing trace or load file
    │   ├── PlanError         a plan or placement file
    │   ├── ProfileError      a hardware profile
    │   └── UnknownNameError  a plugin, model or accelerator name
    ├── InfeasibleError       no placement satisfies the limits        exit code 2
    ├── ExportError           the target format cannot express a plan  exit code 2
    ├── RunError              a live run failed: a rank, a link        exit code 2
    └── MissingExtraError     an optional package is not installed     exit code 2

A message reads: path (value), relation, other path (value); what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ExportError",
    "InfeasibleError",
    "InputError",
    "MissingExtraError",
    "MoeplanError",
    "PlanError",
    "ProfileError",
    "RunError",
    "SpecError",
    "TraceError",
    "UnknownNameError",
]


class MoeplanError(Exception):
    """Root of the tree; ``exit_code`` is what the command line returns."""

    exit_code = 2


class InputError(MoeplanError):
    """An input cannot be used; the message names it and the remedy."""


class SpecError(InputError):
    """A field of a spec, scenario or command-line option is wrong."""


class TraceError(InputError):
    """A routing trace or an expert-load file is wrong."""


class PlanError(InputError):
    """A plan or placement file is wrong, or does not fit its other side."""


class ProfileError(InputError):
    """A hardware profile is wrong or does not cover what was asked."""


class UnknownNameError(InputError):
    """A name is not in the list it is looked up in; the list is in the message, and what is ``meant`` by the name
    elsewhere."""

    def __init__(self, kind: str, name: str, known: Iterable[str], meant: str | None = None) -> None:
        names = sorted(known)
        close = [meant] if meant else get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        super().__init__(f"{kind} '{name}' is not known; {hint}choose one of: {', '.join(names)}")


class InfeasibleError(MoeplanError):
    """No placement satisfies the limits; the message says which limit binds and by how much."""


class ExportError(MoeplanError):
    """The target format cannot express this plan; the message gives the reason."""


class RunError(MoeplanError):
    """A run on real ranks failed; the message names the rank and what it was doing."""


class MissingExtraError(MoeplanError):
    """An optional package is needed for this input."""

    def __init__(self, what: str, extra: str) -> None:
        remedy = f"in the project's directory: pip install -e '.[{extra}]'"
        super().__init__(f"{what} needs the '{extra}' extra, which is not installed; {remedy}")
