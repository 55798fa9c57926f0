"""What every spec shares: frozen, no unknown keys, one readable error for all that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moeplan.errors import SpecError
from moeplan.files import read_json, read_yaml

__all__ = ["Spec", "read_document", "validation_message"]


def validation_message(where: str, error: ValidationError) -> str:
    """One line per wrong field: path (value): what is wrong."""
    lines = []
    for item in error.errors(include_url=False):
        path, message = ".".join(str(part) for part in item["loc"]), item["msg"].removeprefix("Value error, ")
        if not path and item["type"] == "value_error":  # between fields, which the message names
            lines.append(message)
            continue
        value = item["input"]
        shown = f" ({value!r})" if isinstance(value, (str, int, float, bool)) and item["type"] != "missing" else ""
        lines.append(f"{path or 'document'}{shown}: {message}")
    return f"{where}: " + "; ".join(lines)


def read_document(path: Path) -> Any:
    """A JSON or YAML document, by suffix."""
    return read_json(path) if path.suffix == ".json" else read_yaml(path)


class Spec(BaseModel):
    """Base of all specs. Quantities carry their unit (see :mod:`moeplan.units`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls, value: Any, where: str) -> Self:
        """Validate ``value``; ``where`` names its origin in the error.

        Raises:
            SpecError: any field is wrong.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise SpecError(validation_message(where, error)) from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a YAML or JSON file.

        Raises:
            InputError: unreadable; SpecError: any field is wrong.
        """
        return cls.parse(read_document(path), str(path))
