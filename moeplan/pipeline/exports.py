"""Plans to engines' files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeplan import __version__
from moeplan.artifacts.plan import IMPORTED, Plan, placement_fields
from moeplan.errors import InputError, PlanError, SpecError
from moeplan.exports.base import ExportContext, Exporter, ImportContext, ImportedPlacement
from moeplan.exports.documents import read_placement_document
from moeplan.files import require_other, sha256_file
from moeplan.progress import Progress, no_progress
from moeplan.registry import load_plugin, plugin_names
from moeplan.specs.catalogue import slug
from moeplan.specs.model import ModelSpec
from moeplan.specs.models import find_model, model_names
from moeplan.specs.workload import Objective, Workload

__all__ = ["export_formats", "export_plan", "import_plan", "load_placement", "own_plan"]


def export_formats() -> dict[str, str]:
    """Description of each registered format."""
    return {name: load_plugin("exporters", name).description for name in plugin_names("exporters")}


def export_plan(
    plan_path: Path,
    format_name: str,
    out: Path,
    *,
    model: str | None = None,
    num_layers: int | None = None,
    variant: str | None = None,
    model_class: str | None = None,
    checkpoint: Path | None = None,
    num_groups: int | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write a plan as a file of another engine; the files written.

    Raises:
        UnknownNameError: no such format. SpecError: an option the format has no use for.
        PlanError: not a plan, or not of ``model``. ExportError: the format cannot express it.
    """
    exporter: Exporter = load_plugin("exporters", format_name)
    plan = Plan.load(plan_path)
    given: dict[str, Any] = {
        "num_layers": num_layers,
        "variant": variant,
        "model_class": model_class,
        "checkpoint": checkpoint,
        "num_groups": num_groups,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if unused := sorted(set(given) - exporter.options):
        usable = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(exporter.options)) or "none"
        raise SpecError(
            f"--{unused[0].replace('_', '-')} says nothing to format '{format_name}'; its options: {usable}"
        )
    spec = find_model(model) if model is not None else _built_in(plan.model)
    if spec is not None:
        _require_model(plan, plan_path, spec)
    require_other(out, plan_path, plan_path / "plan.json", checkpoint)
    return exporter.export(plan, out, ExportContext(model=spec, **given, progress=progress))


def import_plan(
    path: Path, *, model: str | ModelSpec, num_ranks: int, num_nodes: int = 1, format_name: str | None = None
) -> Plan:
    """A plan (status ``feasible``, no prediction) from a foreign file; without ``format_name`` it is
    recognised.

    Raises:
        UnknownNameError: no such format or model. InputError: unreadable. PlanError: it does not fit the
            model or ranks.
    """
    if num_ranks < 1 or num_nodes < 1 or num_ranks % num_nodes:
        raise SpecError(f"--ranks ({num_ranks}) is not a positive multiple of --nodes ({num_nodes})")
    spec = model if isinstance(model, ModelSpec) else find_model(model)
    exporter: Exporter | None = None if format_name is None else load_plugin("exporters", format_name)
    document = read_placement_document(path)
    if exporter is None:
        exporter = _recognise(document, path)
    context = ImportContext(model=spec, num_ranks=num_ranks, ranks_per_node=num_ranks // num_nodes)
    found = exporter.load(document, str(path), context)
    placement = found.placement
    return Plan(
        model=spec.name,
        planner=IMPORTED + exporter.name,
        status="feasible",
        seed=0,
        num_experts=placement.num_experts,
        num_redundant_experts=placement.num_slots - placement.num_experts,
        layer_ids=found.layer_ids,
        **placement_fields(placement),
        objective=Objective(),
        workload=Workload(),
        notes=_notes(found),
        provenance={"placement_file": sha256_file(path), "moeplan": __version__},
    )


def own_plan(path: Path) -> Plan | None:
    """The plan in a file of ours; None where the file is another engine's.

    Raises:
        InputError: unreadable. PlanError: not a valid plan.
    """
    document = read_placement_document(path)
    ours = isinstance(document, dict) and {"schema_version", "planner"} <= set(document)
    return Plan.parse(document, str(path)) if ours else None


def load_placement(
    path: Path, *, model: ModelSpec, num_ranks: int | None = None, num_nodes: int = 1, whose: str = "--ranks"
) -> Plan:
    """The plan in ``plan.json``, or one made from any foreign file, recognised by its content.

    ``num_ranks`` is needed for foreign files, which do not say it; where a plan says another number, that is
    an error, which says ``whose`` it is.

    Raises:
        InputError: unreadable or of no known format. PlanError: it does not fit the model or ranks.
    """
    path = path / "plan.json" if (path / "plan.json").is_file() else path
    if (plan := own_plan(path)) is not None:
        _require_model(plan, path, model)
        if num_ranks is not None and num_ranks != plan.num_ranks:
            remedy = "leave --ranks out" if whose == "--ranks" else "set it to that, or plan for as many"
            raise PlanError(f"{path}: num_ranks ({plan.num_ranks}) is not {whose} ({num_ranks}); {remedy}")
        return plan
    if num_ranks is None:
        raise SpecError(
            f"{path} is a file of another engine, which does not say the number of ranks; give --ranks"
        )
    return import_plan(path, model=model, num_ranks=num_ranks, num_nodes=num_nodes)


def _recognise(document: Any, path: Path) -> Exporter:
    names = plugin_names("exporters")
    exporters: list[Exporter] = [load_plugin("exporters", name) for name in names]
    found = [exporter for exporter in exporters if exporter.recognises(document)]
    if len(found) != 1:
        fitting = " and ".join(exporter.name for exporter in found) or "none"
        raise InputError(
            f"cannot tell the format of {path}: {fitting} of {', '.join(names)} fits; moeplan import takes its --format"
        )
    return found[0]


def _built_in(name: str) -> ModelSpec | None:
    """The built-in model of that name; None for one from a ``config.json``: formats that need it say so."""
    return find_model(name) if slug(name) in model_names() else None


def _require_model(plan: Plan, path: Path, model: ModelSpec) -> None:
    if plan.num_experts != model.num_experts:
        raise PlanError(
            f"{path}: num_experts ({plan.num_experts}) is not that of {model.name} ({model.num_experts});"
            f" it is a placement for '{plan.model}'; give the right --model"
        )
    if foreign := sorted(set(plan.layer_ids) - set(model.moe_layer_ids)):
        raise PlanError(
            f"{path}: layer {foreign[0]} is not a MoE layer of {model.name}; it is a placement for"
            f" '{plan.model}'; give the right --model"
        )


def _notes(found: ImportedPlacement) -> tuple[str, ...]:
    if not (twice := found.placement.duplicates()):
        return ()
    row, rank, expert = twice[0]
    return (
        f"{len(twice)} times a rank holds two copies of one expert, of which one is wasted"
        f" (first: layer {found.layer_ids[row]}, rank {rank}, expert {expert})",
    )
