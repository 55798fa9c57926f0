"""What a check finds, and how findings stop a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moeplan.errors import InputError, MoeplanError, SpecError

__all__ = ["Finding", "error", "require", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One way in which inputs do not fit; ``kind`` is what is raised for an error."""

    severity: Literal["error", "warning"]
    message: str
    kind: type[MoeplanError] = SpecError


def error(message: str, kind: type[MoeplanError] = SpecError) -> Finding:
    """A finding that stops the run."""
    return Finding("error", message, kind)


def warning(message: str) -> Finding:
    """A finding that a person should know of."""
    return Finding("warning", message)


def require(findings: Iterable[Finding]) -> list[str]:
    """Stop where anything is wrong; the messages of the warnings otherwise.

    Raises:
        MoeplanError: of the kind the errors share, or InputError where they differ; all messages in one.
    """
    found = list(findings)
    wrong = [finding for finding in found if finding.severity == "error"]
    if wrong:
        kinds = {finding.kind for finding in wrong}
        raise (kinds.pop() if len(kinds) == 1 else InputError)(
            "; ".join(finding.message for finding in wrong)
        )
    return [finding.message for finding in found]
