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

A message reads: path (value), relation, other path (value); what to do. What programs ask of an error stands in its
attributes too. Errors go from process to process as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple

__all__ = [
    "ExportError",
    "FieldProblem",
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


class FieldProblem(NamedTuple):
    """What is wrong with one field of a document."""

    field: str
    """Dotted path; empty where the problem lies between fields, which ``problem`` names."""
    value: str | int | float | bool | None
    """As it was given; None where it is missing or no scalar."""
    problem: str
    """What is wrong, and what to do."""


class MoeplanError(Exception):
    """Root of the tree; ``exit_code`` is what the command line returns, ``fields`` are the wrong ones of a document."""

    exit_code = 2

    def __init__(self, message: str = "", fields: Iterable[FieldProblem] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


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
    """A name of a ``kind`` is not in the list it is looked up in, ``known``; the list is in the message, and what is
    ``meant`` by the name elsewhere."""

    def __init__(self, kind: str, name: str, known: Iterable[str], meant: str | None = None) -> None:
        self.kind, self.name, self.known, self.meant = kind, name, tuple(sorted(known)), meant
        close = [meant] if meant else get_close_matches(name.lower(), self.known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        super().__init__(f"{kind} '{name}' is not known; {hint}choose one of: {', '.join(self.known)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, self.name, self.known, self.meant)


class InfeasibleError(MoeplanError):
    """No placement satisfies the limits; the message says which limit binds and by how much."""


class ExportError(MoeplanError):
    """The target format cannot express this plan; the message gives the reason."""


class RunError(MoeplanError):
    """A run on real ranks failed; the message names the rank and what it was doing."""


class MissingExtraError(MoeplanError):
    """An optional package is needed for this input: that of the project's ``extra``."""

    def __init__(self, what: str, extra: str) -> None:
        self.what, self.extra = what, extra
        remedy = f"in the project's directory: pip install -e '.[{extra}]'"
        super().__init__(f"{what} needs the '{extra}' extra, which is not installed; {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.extra)
