"""What every spec shares: frozen, no unknown keys, one readable error for all that is wrong."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moeplan.errors import FieldProblem, MoeplanError, SpecError
from moeplan.files import read_json, read_yaml

__all__ = ["Spec", "read_document", "refused"]


def refused(
    kind: type[MoeplanError], where: str, error: ValidationError, model: type[BaseModel] | None = None, *remedy: str
) -> MoeplanError:
    """The error of a document with wrong fields, in one line: path (value): what is wrong; of ``model`` an unknown
    field's nearest name."""
    problems = _field_problems(error, model)
    lines = [
        f"{one.field}{'' if one.value is None else f' ({one.value!r})'}: {one.problem}" if one.field else one.problem
        for one in problems
    ]
    return kind(f"{where}: {'; '.join((*lines, *remedy))}", problems)


def _field_problems(error: ValidationError, model: type[BaseModel] | None) -> list[FieldProblem]:
    problems = []
    for item in error.errors(include_url=False):
        path, message = ".".join(str(part) for part in item["loc"]), item["msg"].removeprefix("Value error, ")
        if not path and item["type"] == "value_error":  # between fields, which the message names
            problems.append(FieldProblem("", None, message))
            continue
        value = item["input"]
        given = value if isinstance(value, (str, int, float, bool)) and item["type"] != "missing" else None
        if item["type"] == "extra_forbidden":
            message = "there is no such field" + _hint(model, item["loc"])
        message = _WORDS.get(item["type"], message.replace("Input should be", "must be"))
        problems.append(FieldProblem(path or "document", given, message))
    return problems


# Of pydantic's messages, those that speak of Python.
_WORDS = {"missing": "is missing", "model_type": "must be a mapping of fields", "dict_type": "must be a mapping",
          "path_type": "must be a path"}  # fmt: skip


def _hint(model: type[BaseModel] | None, path: tuple[int | str, ...]) -> str:
    """The field that an unknown one at ``path`` may be meant for, else those there are."""
    models = [] if model is None else [model]
    for part in path[:-1]:
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [found for each in fields for found in _models(each)] or models  # else an index or a member of a union
    names = sorted({name for m in models for name in m.model_fields})
    close = get_close_matches(str(path[-1]), names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; choose one of: {', '.join(names)}" if names else ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _models(inner)]


def _kinds(annotation: Any) -> set[Any]:
    """What an annotation is made of."""
    return {annotation}.union(*map(_kinds, get_args(annotation)))


def read_document(path: Path) -> Any:
    """A JSON or YAML document, by suffix."""
    return read_json(path) if path.suffix == ".json" else read_yaml(path)


class Spec(BaseModel):
    """Base of all specs. Quantities carry their unit (see :mod:`moeplan.units`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any) -> Any:
        """YAML reads yes, no, on and off as truth values, which would count as 1 and 0."""
        for name in [n for n, v in value.items() if isinstance(v, bool)] if isinstance(value, dict) else ():
            kinds = _kinds(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{name} ({str(value[name]).lower()}) must be a number, not yes or no")
        return value

    @classmethod
    def parse(cls, value: Any, where: str) -> Self:
        """Validate ``value``; ``where`` names its origin in the error.

        Raises:
            SpecError: any field is wrong.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise refused(SpecError, where, error, cls) from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a YAML or JSON file.

        Raises:
            InputError: unreadable; SpecError: any field is wrong.
        """
        return cls.parse(read_document(path), str(path))
