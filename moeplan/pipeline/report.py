"""``moeplan report``: plans, simulations, sweeps, comparisons and live runs as one page, Markdown or JSON.

What a path is, is recognised: a plan (``plan.json``), a simulation (``result.json`` of ``moeplan simulate``, its
``events.parquet``), a sweep (``sweep.json``), a live run (``events.parquet`` of measured events), or an event log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.event_log import EventLog
from moeplan.artifacts.plan import Plan
from moeplan.artifacts.simulation_result import SimulationResult, TrafficMatrix
from moeplan.costs.memory import memory_report
from moeplan.costs.step import StepModel
from moeplan.costs.technique import Technique
from moeplan.errors import InputError, MoeplanError, SpecError
from moeplan.files import read_json, require_other, write_text
from moeplan.pipeline.compare import compare
from moeplan.pipeline.inputs import profile_of
from moeplan.pipeline.show import Shown, show_plan
from moeplan.reports import figures, run_figures, run_report
from moeplan.reports.against import predicted_against_measured
from moeplan.reports.chrome_trace import write_chrome_trace
from moeplan.reports.document import (
    Block,
    Cards,
    Document,
    Picture,
    Section,
    Table,
    Text,
    to_html,
    to_json,
    to_markdown,
)
from moeplan.reports.run_words import case_words
from moeplan.reports.summary import key_figures, relative_loads
from moeplan.reports.wording import format_number, format_percent, format_seconds
from moeplan.simulation.detailed import simulate_step
from moeplan.specs.cluster import ClusterSpec
from moeplan.specs.clusters import cluster_for
from moeplan.specs.models import find_model

__all__ = ["Reported", "report"]

_SUFFIXES = (".html", ".md", ".json")
_LAYERS = 3  # of a plan that a picture of a step shows


@dataclass(frozen=True, slots=True)
class Reported:
    """The report, the files written, and what people should know."""

    document: Document
    written: tuple[Path, ...]
    messages: tuple[str, ...]

    def markdown(self) -> str:
        """As Markdown."""
        return to_markdown(self.document)

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return to_json(self.document) | {"written": [str(path) for path in self.written]}


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """One path, read."""

    name: str
    path: Path
    plan: Shown | None = None
    cluster: ClusterSpec | None = None
    result: SimulationResult | None = None
    log: EventLog | None = None
    cases: tuple[tuple[dict[str, Any], SimulationResult], ...] = ()


def report(
    paths: list[Path],
    out: Path | None = None,
    *,
    trace_path: Path | None = None,
    trace_domain: str | None = None,
    before_path: Path | None = None,
    cluster_name: str | None = None,
    perfetto_path: Path | None = None,
) -> Reported:
    """Report on one path, or compare two.

    For plans, ``trace_path``, ``trace_domain`` and ``before_path`` are as in ``show_plan``, and ``cluster_name`` is
    the accelerator's, for the memory of ranks and the timeline of a step.

    Raises:
        InputError: a path is nothing that can be reported on, or has no event log where one is asked for.
        SpecError: no path, more than two, or a form of output that is not known.
    """
    if not 1 <= len(paths) <= 2:
        raise SpecError(f"{len(paths)} paths: report on one, or compare two")
    if out is not None and out.suffix not in _SUFFIXES:
        raise SpecError(f"--out ({out}) must end in {', '.join(_SUFFIXES)}")
    names = ("", "plan.json", "result.json", "sweep.json", "events.parquet")
    inputs = [path / name for path in paths for name in names]
    for written_over in (out, perfetto_path):
        require_other(written_over, *inputs, trace_path, before_path)
    subjects = [_read(path, trace_path, trace_domain, before_path, cluster_name) for path in paths]
    logs = [subject.log for subject in subjects if subject.log is not None]
    if perfetto_path is not None and len(logs) != 1:
        raise InputError(f"--perfetto needs the event log of one run, but {len(logs)} of these paths hold one")
    sections: list[Section] = []
    if len(subjects) == 2:
        sections += _between(*subjects)
    for subject in subjects:
        own = _sections(subject)
        many = len(subjects) > 1
        sections += [replace(s, title=f"{subject.name}: {s.title}") if many else s for s in own]
    document = _document(subjects, sections)
    written = []
    if out is not None:
        form = {".html": to_html, ".md": to_markdown}.get(out.suffix)
        text = form(document) if form else json.dumps(to_json(document), indent=1, allow_nan=False) + "\n"
        write_text(out, text)
        written.append(out)
    if perfetto_path is not None:
        write_chrome_trace(logs[0], perfetto_path)
        written.append(perfetto_path)
    messages = [message for subject in subjects if subject.plan for message in subject.plan.messages]
    return Reported(document, tuple(written), tuple(messages))


# ---------------------------------------------------------------------- reading


def _read(
    path: Path, trace: Path | None, domain: str | None, before: Path | None, cluster: str | None
) -> _Subject:
    name = path.name or str(path)
    if not path.exists():
        raise InputError(f"{path} is not there; name a plan, a simulation's directory, a sweep's, or a live run's")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix == ".parquet":
        return _Subject(name, path, log=EventLog.read(path))
    document = None if path.is_dir() else read_json(path)
    if (path / "plan.json").is_file() or (isinstance(document, dict) and "physical_to_logical_map" in document):
        shown = show_plan(path, trace_path=trace, trace_domain=domain, before_path=before)
        ranks, per_node = shown.plan.num_ranks, shown.plan.ranks_per_node
        place = None if cluster is None else cluster_for(cluster, ranks // per_node, per_node)
        return _Subject(name, path, plan=shown, cluster=place)
    if (path / "sweep.json").is_file():
        rows = read_json(path / "sweep.json")["cases"]
        cases = tuple((row["case"], SimulationResult.load(path / row["path"])) for row in rows if row["path"])
        if not cases:
            raise InputError(f"{path} is a sweep of which no case has ended; run moeplan simulate again to go on")
        return _Subject(name, path, cases=cases)
    events = folder / "events.parquet"
    log = EventLog.read(events) if events.is_file() else None
    try:
        return _Subject(name, path, result=SimulationResult.load(path), log=log)
    except MoeplanError:
        if log is None or log.source == "simulated":
            raise
    return _Subject(name, path, log=log)


def _document(subjects: list[_Subject], sections: list[Section]) -> Document:
    first = subjects[0]
    title = " and ".join(subject.name for subject in subjects)
    facts: list[str] = []
    kind = "report"
    if first.plan is not None:
        plan = first.plan.plan
        kind, title = "plan report", plan.model
        facts = [f"{len(plan.layer_ids)} MoE layers", f"{plan.num_experts} experts", f"{plan.num_ranks} ranks",
                 f"planner {plan.planner}"]  # fmt: skip
    elif results := [result for _, result in first.cases] or ([] if first.result is None else [first.result]):
        result = results[0]
        kind = f"{result.kind} {'sweep' if first.cases else 'simulation'}"
        title = result.model if len(subjects) == 1 else f"{result.model}: {title}"
        facts = [result.cluster, _size(result.num_ranks, result.num_nodes)]
        facts += [f"{format_number(result.simulated_s)} s simulated", f"seeds {', '.join(map(str, result.seeds))}"]
        if first.cases:  # what all cases share
            shared = zip(*((r.cluster, _size(r.num_ranks, r.num_nodes)) for r in results), strict=True)
            facts = [f"{len(results)} cases", *(texts[0] for texts in shared if len(set(texts)) == 1)]
    elif first.log is not None:
        kind = f"{first.log.source} run"
        title = str(first.log.origin.get("model", title))
        facts = [_size(first.log.num_ranks, first.log.num_nodes), f"{len(first.log):,} events"]
    return Document(kind, title, tuple(facts), tuple(sections))


def _size(ranks: int, nodes: int) -> str:
    return f"{ranks} ranks in {nodes} node{'s' * (nodes != 1)}"


# ---------------------------------------------------------------------- sections


def _sections(subject: _Subject) -> list[Section]:
    found: list[Section | None] = []
    if subject.plan is not None:
        found += _plan_sections(subject.plan, subject.cluster)
    if subject.cases:
        found.append(run_report.sweep_section(subject.cases))
        found.append(run_report.latency_section(_named(subject.cases)))
        found.append(run_report.assumptions_section(subject.cases[0][1]))
    if (result := subject.result) is not None:
        found += [
            run_report.figures_section(result),
            run_report.latency_section({subject.name: result}),
            run_report.ranks_section(result),
            run_report.memory_section(result),
        ]
    found.append(run_report.traffic_section({subject.name: _traffic(subject)}))
    if subject.log is not None:
        found.append(run_report.log_section(subject.log))
        found.append(run_report.loads_section({subject.name: subject.log}))
        found.append(_losses(subject.log))
    if result is not None:
        found.append(run_report.assumptions_section(result))
    return [section for section in found if section is not None]


def _traffic(subject: _Subject) -> tuple[TrafficMatrix, ...]:
    """Traffic of a run: a simulation's result holds it, a live run's log."""
    if subject.result is not None:
        return subject.result.traffic
    found = [] if subject.log is None else subject.log.origin.get("traffic", [])
    return tuple(TrafficMatrix.model_validate(each) for each in found)


def _named(cases: tuple[tuple[dict[str, Any], SimulationResult], ...]) -> dict[str, SimulationResult]:
    """First, middle and last case by their values."""
    chosen = sorted({0, len(cases) // 2, len(cases) - 1})
    return {case_words(cases[i][0]): cases[i][1] for i in chosen}


def _losses(log: EventLog) -> Section | None:
    values = log.amount_V[log.of_kind("loss")]
    if not len(values):
        return None
    first, last = (format_number(float(value), 4) for value in (values[0], values[-1]))
    return Section("Loss", (Cards((("First step", first, ""), ("Last step", last, f"of {len(values)}"))),))


def _between(a: _Subject, b: _Subject) -> list[Section]:
    """Two runs: headlines side by side, distributions in one picture; a predicted and a measured log kind by kind."""
    sections: list[Section] = []
    if a.result is not None and b.result is not None:
        [(_, differences)] = compare(a.path, b.path)
        names = (a.name, b.name) if a.name != b.name else ("a", "b")
        sections.append(run_report.comparison_section(differences, *names))
        latency = run_report.latency_section({names[0]: a.result, names[1]: b.result})
        loads = None if a.log is None or b.log is None else run_report.loads_section({names[0]: a.log, names[1]: b.log})
        traffic = run_report.traffic_section({names[0]: a.result.traffic, names[1]: b.result.traffic})
        sections += [section for section in (latency, loads, traffic) if section is not None]
    elif a.cases and b.cases:
        for case, differences in compare(a.path, b.path):
            title = f"{a.name}, {case_words(case)}"
            sections.append(run_report.comparison_section(differences, title, b.name))
    if a.log is not None and b.log is not None and a.log.source != b.log.source:
        logs = (a.log, b.log) if a.log.source == "simulated" else (b.log, a.log)
        sections.append(run_report.against_section(predicted_against_measured(*logs)))
    if not sections:
        raise InputError(
            f"{a.name} and {b.name} are not of one sort; compare two simulations, or a simulation and a live run"
        )
    return sections


def _plan_sections(shown: Shown, cluster: ClusterSpec | None) -> list[Section | None]:
    plan, evidence = shown.plan, shown.evidence
    cards = tuple(
        (f.label, f.after if f.before is None else f"{f.before} → {f.after}", f.detail)
        for f in key_figures(plan, evidence)
    )
    verdict: list[Block] = []
    if plan.verdict is not None:
        word = "Apply it" if plan.verdict.apply else "Do not apply it"
        verdict.append(Text(f"{word}: {plan.verdict.reason}"))
    verdict.append(Cards(cards))
    load: list[Block] = []
    names = (evidence.before_name, "this plan")
    if sides := [(n, v) for n, v in zip(names, relative_loads(plan, evidence), strict=True) if v is not None]:
        limits = figures.colour_limits(*(v for _, v in sides))
        for name, relative_LR in sides:
            load.append(Picture(figures.load_heat_map(relative_LR, plan.layer_ids, plan.ranks_per_node, limits, name)))
    else:
        load.append(Text("Load of ranks: give the routing with --trace to see it before and after.", missing=True))
    traffic: list[Block] = []
    matrices = (evidence.traffic_before_RR, evidence.traffic_after_RR)
    both = [(n, m) for n, m in zip(names, matrices, strict=True) if m is not None]
    if both:
        limits = figures.colour_limits(*(m for _, m in both))
        for name, matrix_RR in both:
            picture = figures.matrix_heat_map(matrix_RR, plan.ranks_per_node, limits, name, evidence.traffic_unit)
            traffic.append(Picture(picture))
    else:
        traffic.append(Text(evidence.traffic_note or "Traffic: give token-level routing with --trace.", missing=True))
    sections: list[Section | None] = [
        Section("The plan", tuple(verdict)),
        Section("Load of every rank in every layer", tuple(load), evidence.load_note),
        Section("Traffic from rank to rank", tuple(traffic), evidence.traffic_note if both else ""),
    ]
    if cluster is not None:
        sections += [_plan_memory(plan, cluster), _plan_step(shown, cluster)]
    else:
        gone = Text("Memory and the timeline of a step: name the plan's accelerator with --cluster.", missing=True)
        sections.append(Section("Memory, and one step", (gone,)))
    rests: list[Block] = []
    if plan.bounds:
        rows = tuple(
            (b.quantity, format_number(b.value, 4), format_number(b.bound, 4), format_percent(b.gap), b.argument)
            for b in plan.bounds
        )
        rests.append(Table(("quantity", "this plan", "no plan is below", "gap", "argument"), rows, (0, 4)))
    if plan.prediction is not None:
        rests.append(Table(("prediction", "from"), tuple(plan.prediction.source.items()), (0, 1)))
    made = (("sha256", plan.sha256), ("seed", str(plan.seed)), *((k, str(v)) for k, v in plan.provenance.items()))
    rests.append(Table(("made from", ""), made, (0, 1)))
    if plan.notes:
        rests.append(Table(("note",), tuple((note,) for note in plan.notes), (0,)))
    sections.append(Section("What this rests on", tuple(rests)))
    return sections


def _plan_memory(plan: Plan, cluster: ClusterSpec) -> Section:
    found = memory_report(
        find_model(plan.model), cluster, plan.workload, np.bincount(plan.rank_of_slot, minlength=plan.num_ranks)
    )
    parts = [
        ("experts", [m.expert_bytes for m in found]),
        ("other weights", [m.other_weight_bytes for m in found]),
        ("workspace", [m.workspace_bytes for m in found]),
        ("left for the KV cache", [max(0.0, m.free_bytes) for m in found]),
    ]
    picture = run_figures.memory_stack("Memory of every rank", parts, found[0].memory_bytes, "rank")
    return Section("Memory", (Picture(picture),), "Weights and workspace at the plan's workload; the rest is KV cache.")


def _plan_step(shown: Shown, cluster: ClusterSpec) -> Section | None:
    """The first MoE layers of a step before and after, played event by event."""
    plan, evidence = shown.plan, shown.evidence
    if evidence.load_LE is None or evidence.before is None:
        return None
    model = find_model(plan.model)
    layers = min(_LAYERS, len(plan.layer_ids))
    few = model.model_copy(
        update={
            "num_layers": layers,
            "moe_layer_ids": tuple(range(layers)),
            "experts_per_layer": None if model.experts_per_layer is None else model.experts_per_layer[:layers],
        }
    )
    profile = profile_of(None, cluster.accelerator.name)
    step = StepModel(few, cluster, plan.workload, Technique(dispatch=plan.objective.dispatch), profile)
    played = []
    for name, placement in ((evidence.before_name, evidence.before), ("this plan", plan.placement)):
        part = replace(
            placement,
            physical_to_logical_LP=placement.physical_to_logical_LP[:layers],
            share_LP=None if placement.share_LP is None else placement.share_LP[:layers],
        )
        played.append((name, simulate_step(step, part, evidence.load_LE[:layers])))
    longest = max(found.total_s for _, found in played)
    blocks: list[Block] = []
    for name, found in played:
        title = f"{name}: first {layers} MoE layers, {format_seconds(found.total_s)}"
        picture = run_figures.gantt(found.log, title, 0, span_s=longest)
        blocks += [] if picture is None else [Picture(picture, wide=True)]
    lead = "Played event by event over the links of the cluster, homes spread evenly."
    return Section("One step", tuple(blocks), lead)
