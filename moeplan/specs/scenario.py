"""Scenarios: one planning or simulation job as a file; every option of ``moeplan optimize`` has a field here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from moeplan.errors import SpecError, UnknownNameError
from moeplan.specs.base import Spec, read_document
from moeplan.specs.catalogue import names_a_file
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import DEFAULT_CLUSTER, cluster_from_mapping, sized_cluster
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model
from moeplan.specs.serving import ServingSpec
from moeplan.specs.training import TrainingSpec
from moeplan.specs.workload import Objective, Workload
from moeplan.units import Bytes, Seconds, format_quantity

__all__ = ["Fidelity", "Scenario"]

Fidelity = Literal["step", "detailed"]

_FILES = ("trace", "current", "out")
_INNER_FILES = (("serving", "requests", "file"), ("serving", "prefill", "placement"))
_NAMES_OR_FILES = ("model", "cluster")


def _named_or(parse: Callable[[Any, str], Spec], value: Any, info: ValidationInfo) -> Any:
    """A name as it is; fields as what they describe, their errors with this field before theirs."""
    if not isinstance(value, dict):
        return value
    name = info.field_name or ""
    try:
        return parse(value, name)
    except SpecError as error:
        inner = [one._replace(field=f"{name}.{one.field}" if one.field else name) for one in error.fields]
        raise SpecError(str(error), inner) from error


def _named_or_model(value: Any, info: ValidationInfo) -> Any:
    return _named_or(ModelSpec.parse, value, info)


def _named_or_cluster(value: Any, info: ValidationInfo) -> Any:
    return _named_or(cluster_from_mapping, value, info)


class Scenario(Spec):
    """One planning or simulation job. Paths in a scenario file are relative to that file."""

    schema_version: Literal[1] = 1
    model: Annotated[str | ModelSpec, BeforeValidator(_named_or_model)] = Field(
        description="a built-in name, a path, or the fields of a model"
    )
    trace: Path | None = Field(
        None, description="recorded routing or expert counts; needed but where every expert is loaded alike"
    )
    trace_format: str | None = Field(
        None, description="name of a trace reader; left out: recognised from the file"
    )
    cluster: Annotated[str | ClusterSpec, BeforeValidator(_named_or_cluster)] = Field(
        DEFAULT_CLUSTER, description="an accelerator's name, a path, or the fields of a cluster"
    )
    ranks: int | None = Field(
        None, gt=0, description="expert-parallel size; left out: all ranks of the cluster"
    )
    nodes: int | None = Field(
        None, gt=0, description="left out: those of the cluster, or as few as hold the ranks"
    )
    redundant: int | Literal["max"] = Field(
        0,
        description="extra expert slots per layer, or max: as many as memory allows; left out: as many as current has,"
        " else 0",
    )
    kv_reserve: Bytes | None = Field(
        None,
        description="per rank, kept for the KV cache by redundant: max; left out: what the workload needs",
    )
    profile: str | None = Field(
        None,
        description="measured costs: a shipped name or a directory; left out: those shipped for the accelerator;"
        " none: the roofline",
    )
    planner: str = Field("joint", description="name of a planner")
    seed: int = Field(0, ge=0, lt=2**32, description="same seed, same plan")
    time_limit: Seconds | None = Field(
        None, gt=0, description="stop searching after this time; the plan then says so"
    )
    objective: Objective = Objective()
    workload: Workload = Workload()
    current: Path | None = Field(
        None, description="the placement in use: a plan or an engine's placement file"
    )
    migration_size: Bytes | None = Field(
        None, description="of expert weights that may be moved from current, at most"
    )
    migration_time: Seconds | None = Field(None, description="that moving them may take, at most")
    target: str | None = Field(
        None, description="engine the plan is for: what it cannot express is not planned"
    )
    out: Path | None = Field(None, description="directory that is written")
    serving: ServingSpec | None = Field(None, description="what moeplan simulate serves; current is the placement")
    training: TrainingSpec | None = Field(
        None, description="what moeplan simulate trains; current is the placement of one expert-parallel group"
    )
    fidelity: Fidelity = Field(
        "step",
        description="moeplan simulate: seconds of steps from formulas; or every layer of every rank and every link"
        " played event by event, for small cases",
    )
    sweep: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description="moeplan simulate: values of fields, by dotted name; every combination is one case",
    )

    @field_validator("redundant", mode="before")
    @classmethod
    def _count_or_max(cls, value: Any) -> Any:
        if value != "max" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError("write 0 or more, or max")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ranks is not None and self.nodes is not None and self.ranks % self.nodes:
            raise ValueError(
                f"ranks ({self.ranks}) is not a multiple of nodes ({self.nodes}); every node holds as many"
            )
        for name in ("migration_size", "migration_time"):
            if getattr(self, name) is not None and self.current is None:
                raise ValueError(f"{name} limits what is moved from current, which is not given; name the file")
        if self.kv_reserve is not None and "max" not in (self.redundant, *self.sweep.get("redundant", ())):
            size = format_quantity(self.kv_reserve, "bytes")
            raise ValueError(
                f"kv_reserve ({size}) is kept free by redundant: max, but redundant is {self.redundant};"
                " leave kv_reserve out, or write redundant: max"
            )
        if self.serving is not None and self.training is not None:
            raise ValueError("serving and training are two jobs; give one of them")
        return self

    @classmethod
    def parse(cls, value: Any, where: str) -> Self:
        """Validate ``value``; ``where`` names its origin in the error.

        Raises:
            SpecError: any field is wrong.
        """
        try:
            return super().parse(value, where)
        except (SpecError, UnknownNameError) as error:
            if str(error).startswith(where):
                raise
            raise SpecError(f"{where}: {error}", error.fields) from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a YAML or JSON file; relative paths in it are taken from its directory.

        Raises:
            InputError: unreadable; SpecError: any field is wrong.
        """
        if path.is_dir():
            inside = sorted(path.glob("*.yaml"))
            named = path / "scenario.yaml" if path / "scenario.yaml" in inside else next(iter(inside), None)
            remedy = f"name the file in it: {named}" if named else "it holds no .yaml file; name a scenario"
            raise SpecError(f"{path} is a directory; {remedy}")
        document = read_document(path)
        if isinstance(document, dict):
            for key in (*_FILES, *_NAMES_OR_FILES):
                if isinstance(value := document.get(key), str):
                    place = path.parent / value
                    if key in _FILES or names_a_file(place):
                        document[key] = str(place)
            for *way, key in _INNER_FILES:
                inner: Any = document
                for name in way:
                    inner = inner.get(name) if isinstance(inner, dict) else None
                if isinstance(inner, dict) and isinstance(inner.get(key), str):
                    inner[key] = str(path.parent / inner[key])
        return cls.parse(document, str(path))

    @property
    def recording(self) -> Path:
        """The trace, which this job needs.

        Raises:
            SpecError: the scenario names none.
        """
        if self.trace is None:
            raise SpecError("trace is missing; give recorded routing or expert counts")
        return self.trace

    def model_spec(self) -> ModelSpec:
        """The model, looked up.

        Raises:
            UnknownNameError, InputError, SpecError: as :func:`find_model`.
        """
        return self.model if isinstance(self.model, ModelSpec) else find_model(self.model)

    def cluster_spec(self) -> ClusterSpec:
        """The cluster, looked up and, where it is named by its accelerator, sized by ``ranks`` and ``nodes``.

        Raises:
            UnknownNameError, InputError, SpecError: as :func:`sized_cluster`.
        """
        if isinstance(self.cluster, ClusterSpec):
            return self.cluster
        return sized_cluster(self.cluster, self.ranks, self.nodes)
