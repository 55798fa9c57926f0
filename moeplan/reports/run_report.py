"""Sections of a report on runs: simulated or live, one or two to compare, a sweep over load. ``R`` ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moeplan.artifacts.event_log import EVENT_KINDS, EventLog
from moeplan.artifacts.simulation_result import Headline, SimulationResult, TrafficMatrix
from moeplan.reports import figures, run_figures
from moeplan.reports.against import Against, seconds_per_step
from moeplan.reports.document import Block, Cards, Picture, Section, Table, Text
from moeplan.reports.run_words import case_words, change_text, interval, shown, verdicts_text
from moeplan.reports.wording import format_bytes, format_number, format_percent, format_seconds

__all__ = [
    "against_section",
    "assumptions_section",
    "comparison_section",
    "figures_section",
    "latency_section",
    "loads_section",
    "log_section",
    "memory_section",
    "ranks_section",
    "sweep_section",
    "traffic_section",
]

_NAMES = {
    "output_tokens_per_s_per_gpu": "Output per GPU", "output_tokens_per_s": "Output",
    "ttft_p50_s": "First token, median", "ttft_p99_s": "First token, 99 %", "tpot_p50_s": "Per further token, median",
    "accept_length": "Acceptance length", "e2e_p50_s": "Whole answer, median",
    "requests_per_s": "Requests", "goodput_requests_per_s": "Goodput", "slo_attainment": "Requests within objectives",
    "usd_per_million_output_tokens": "Cost of a million output tokens", "step_s": "Step",
    "tokens_per_s_per_gpu": "Tokens per GPU", "tflops_per_gpu": "Operations per GPU", "mfu": "Model FLOPs utilisation",
    "bubble_share": "Waiting for others", "exchange_share": "Exchange that nothing hides",
    "exposed_exchange_share": "Exchange that nothing hides", "peak_memory_bytes": "Memory at its peak",
}  # fmt: skip


def _count(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else format_number(value, 4)


def figures_section(result: SimulationResult) -> Section:
    """Key figures as cards, all of them as a table."""
    main = [(word, result.headlines[name]) for name, word in _NAMES.items() if name in result.headlines][:6]
    cards = tuple((word, shown(line.value, line.unit), interval(line)) for word, line in main)
    ends = {name: interval(line, name) or "same at both ends" for name, line in result.headlines.items()}
    rows = tuple(
        (name.replace("_", " "), shown(line.value, line.unit, name), ends[name], line.better)
        for name, line in result.headlines.items()
    )
    exact = [(name.replace("_", " "), line.exact) for name, line in result.headlines.items() if line.exact]
    note = "Exact, as no measured time enters: " * bool(exact) + "; ".join(f"{name}, {why}" for name, why in exact)
    blocks: list[Block] = [Cards(cards), Table(("figure", "value", "interval", "better"), rows, note=note)]
    if result.counts:
        counted = tuple((name.replace("_", " "), _count(value)) for name, value in result.counts.items())
        blocks.append(Table(("counted", "number"), counted))
    lead = "Each figure with the interval of the costs' residuals and the spread of seeds."
    return Section("Figures", tuple(blocks), lead)


def latency_section(results: Mapping[str, SimulationResult]) -> Section | None:
    """Distributions of latencies, one run or several."""
    titles = {"ttft": "Time to first token", "tpot": "Time per further token", "e2e": "Whole answer"}
    pictures = []
    for name, title in titles.items():
        found = {run: r.distributions[name] for run, r in results.items() if name in r.distributions}
        if found:
            pictures.append(Picture(run_figures.latency_curves(title, found)))
    return Section("Latency", tuple(pictures)) if pictures else None


def ranks_section(result: SimulationResult) -> Section | None:
    """Timeline of the run and where each rank's time goes."""
    blocks: list[Block] = []
    if result.timeline is not None and result.timeline.time_s:
        blocks.append(Picture(run_figures.run_timeline("The run over time", result.timeline)))
    if result.ranks is not None and result.ranks.compute:
        blocks.append(Picture(run_figures.rank_stack("Where each rank's time goes", result.ranks)))
    return Section("Over time, and by rank", tuple(blocks)) if blocks else None


def memory_section(result: SimulationResult) -> Section | None:
    """Serving: memory of every rank, stacked. Training: that of each stage, stacked and over a step."""
    if (held := result.rank_memory) is not None:
        stack = run_figures.memory_stack(
            "Memory of every rank",
            [("experts", held.experts), ("other weights", held.other_weights), ("workspace", held.workspace),
             ("KV cache", held.kv_cache)],
            min(held.limit),
            "rank",
        )  # fmt: skip
        lead = "The KV cache is all that requests may fill; what is left under the line is kept free."
        return Section("Memory", (Picture(stack),), lead)
    if not result.memory:
        return None
    tracks = result.memory
    parts = [
        ("weights, gradients, optimizer", [track.state_bytes for track in tracks]),
        ("activations at their most", [max(track.activation_bytes, default=0.0) for track in tracks]),
    ]
    limit = tracks[0].limit_bytes
    stack = run_figures.memory_stack("Memory of a rank of each stage", parts, limit, "stage")
    return Section("Memory", (Picture(stack), Picture(run_figures.memory_curves("Over one step", tracks))))


def _step_pictures(log: EventLog) -> list[Block]:
    """One step as Gantt pictures: its operations, and what ranks do inside a step or one of its operations."""
    timed = (log.step_V >= 0) & (log.duration_s_V > 0)
    inside = timed & log.of_kind(*run_figures.INSIDE)
    operations = timed & log.of_kind("forward")
    steps = np.unique(log.step_V[inside if inside.any() else timed])
    if not len(steps):
        return []
    step = int(steps[len(steps) // 2])
    few = log.origin.get("played_layers")
    title = f"Step {step}" + (f", its first {few} MoE layers, event by event" if few else "")
    if not operations.any():
        pictures = [run_figures.gantt(log, title, step)]
    else:
        pictures = [run_figures.gantt(log, title, step, run_figures.OPERATIONS)]
        forward = np.flatnonzero(operations & (log.step_V == step))
        if len(forward) and inside.any():
            v = int(forward[len(forward) // 2])
            start, stop = float(log.start_s_V[v]), float(log.start_s_V[v] + log.duration_s_V[v])
            name = "One forward" if log.request_V[v] < 0 else f"Forward of micro-batch {log.request_V[v]}"
            mine = replace(log, step_V=np.where(log.request_V == log.request_V[v], log.step_V, -1))
            pictures.append(run_figures.gantt(mine, name, step, part=(start, stop)))
    return [Picture(picture, wide=True) for picture in pictures if picture is not None]


def loads_section(logs: Mapping[str, EventLog]) -> Section | None:
    """Load of ranks by layer from what experts worked on in each run, in one scale; None where a log does not tell."""
    maps = {}
    for name, log in logs.items():
        mine = log.of_kind("experts") & (log.layer_V >= 0) & (log.amount_V > 0)
        layers, ranks = np.unique(log.layer_V[mine]), np.unique(log.rank_V[mine])
        pairs_LR = np.zeros((len(layers), len(ranks)))
        place = np.searchsorted(layers, log.layer_V[mine]), np.searchsorted(ranks, log.rank_V[mine])
        np.add.at(pairs_LR, place, log.amount_V[mine])
        if "played_layers" in log.origin or len(ranks) < log.num_ranks or not pairs_LR.all() or not len(layers):
            return None
        maps[name] = pairs_LR / pairs_LR.mean(1, keepdims=True), layers, log.num_ranks // log.num_nodes
    limits = figures.colour_limits(*(relative_LR for relative_LR, _, _ in maps.values()))
    blocks = tuple(
        Picture(figures.load_heat_map(relative_LR, tuple(layers.tolist()), per_node, limits, name))
        for name, (relative_LR, layers, per_node) in maps.items()
    )
    lead = "(Token, expert) pairs of the whole run over their mean."
    return Section("Load of every rank in every layer", blocks, lead)


def traffic_section(runs: Mapping[str, Sequence[TrafficMatrix]]) -> Section | None:
    """Bytes from rank to rank in the mean step: as it was, beside the same tokens under the first placement where it
    changed; several runs in one scale. None where no run tells."""
    sides: list[tuple[str, TrafficMatrix, np.ndarray[Any, np.dtype[np.float64]]]] = []
    for run, matrices in runs.items():
        for matrix in matrices:
            name = f"{run}: {matrix.name}" if len(runs) > 1 else matrix.name
            if matrix.unchanged is not None:
                sides.append((f"{name}, first placement kept", matrix, np.array(matrix.unchanged)))
                name += ", re-balanced"
            sides.append((name, matrix, np.array(matrix.sent)))
    if not sides:
        return None
    blocks: list[Block] = []
    rows = []
    largest: dict[str, tuple[float, float]] = {}
    for places in {matrix.places for _, matrix, _ in sides}:
        same = [sent for _, matrix, sent in sides if matrix.places == places]
        largest[places] = figures.colour_limits(*same)
    for name, matrix, sent in sides:
        words = f"from {matrix.places}", f"to {matrix.places}"
        picture = figures.matrix_heat_map(sent, matrix.per_node, largest[matrix.places], name, "bytes", words)
        blocks.append(Picture(picture))
        place = np.arange(len(sent)) // matrix.per_node
        total, across = float(sent.sum()), float(sent[place[:, None] != place[None, :]].sum())
        busiest = float(max(sent.sum(1).max(), sent.sum(0).max()))
        share = format_percent(across / total) if total else "-"
        rows.append((name, format_bytes(total), share, format_bytes(busiest), f"{matrix.steps:,}"))
    columns = ("per step", "traffic", "between nodes", f"busiest {sides[0][1].places}", "steps")
    sources = "; ".join(dict.fromkeys(matrix.source for _, matrix, _ in sides))
    note = f"{sources[:1].upper()}{sources[1:]}. Busiest: the most that one sends, or gets."
    blocks.append(Table(columns, tuple(rows), note=note))
    lead = "Bytes of tokens in the mean step: dispatch to the ranks of their experts, and combine back."
    return Section("Traffic from rank to rank", tuple(blocks), lead)


def log_section(log: EventLog) -> Section:
    """Gantt pictures of one step, and seconds by kind."""
    blocks = _step_pictures(log)
    if not blocks:
        blocks.append(Text("The log holds whole steps only: no picture of what ranks do inside one.", missing=True))
    rows = []
    for kind, meaning in EVENT_KINDS.items():
        mine = log.of_kind(kind)
        if mine.any():
            seconds = seconds_per_step(log, kind)
            middle = format_seconds(float(np.median(seconds))) if len(seconds) else "-"
            rows.append((kind, f"{int(mine.sum()):,}", middle, meaning.partition(";")[0]))
    columns = ("kind", "events", "busiest rank, per step", "what it is")
    blocks.append(Table(columns, tuple(rows), (0, 3)))
    return Section("One step", tuple(blocks), f"Event log, {log.source}: {len(log):,} events on {log.num_ranks} ranks.")


def sweep_section(cases: Sequence[tuple[dict[str, Any], SimulationResult]]) -> Section:
    """Throughput and latency of the cases of a sweep, over the first field that is a number; of training the best
    first, and drawn where one field is swept alone."""
    wanted: tuple[str, ...] = ("output_tokens_per_s_per_gpu", "ttft_p50_s", "tpot_p50_s")
    if training := all(result.kind == "training" for _, result in cases):
        shares = ("mfu", "bubble_share", "exposed_exchange_share")
        wanted = ("tokens_per_s_per_gpu", "step_s", *shares, "peak_memory_bytes")
        cases = sorted(cases, key=lambda one: -one[1].headlines["tokens_per_s_per_gpu"].value)
    names = [name for name in wanted if all(name in result.headlines for _, result in cases)]
    rows, points, axis, unit = [], [], "", ""
    for case, result in cases:
        lines = result.headlines
        rows.append((case_words(case), *(_with_interval(lines[name]) for name in names)))
        rate = lines.get("output_tokens_per_s_per_gpu") or lines.get("tokens_per_s_per_gpu")
        slow = lines.get("tpot_p99_s") or lines.get("step_s")
        for field, value in case.items():
            load = _number(value)
            if load is not None and rate is not None and slow is not None and axis in ("", field):
                axis, unit = field, str(value).partition(" ")[2]
                points.append((load, rate.value, 1e3 * slow.value))
    blocks: list[Block] = []
    if len({load for load, _, _ in points}) > 1 and not (training and len(cases[0][0]) > 1):
        word = axis.rpartition(".")[2].replace("_", " ") + (f", {unit}" if unit else "")
        latency = "ms per further token, 99 %" if "ttft_p50_s" in names else "ms per step"
        picture = run_figures.load_curve("Throughput against load", points, word, "tokens/s per GPU", latency)
        blocks.append(Picture(picture))
    blocks.append(Table(("case", *(name.replace("_", " ") for name in names)), tuple(rows)))
    return Section("Sweep", tuple(blocks))


def _with_interval(line: Headline) -> str:
    """A figure, and below it its interval where it has one."""
    ends = interval(line)
    return shown(line.value, line.unit) + (f"\n({ends})" if ends else "")


def _number(value: Any) -> float | None:
    """A number, also at the front of a quantity such as '12 /s'."""
    try:
        return float(str(value).split()[0])
    except (ValueError, IndexError):
        return None


def comparison_section(differences: Sequence[Any], a: str, b: str) -> Section:
    """Headlines of two runs (:class:`moeplan.pipeline.compare.Difference`)."""
    rows = tuple(
        (
            d.name.replace("_", " "),
            shown(d.a.value, d.unit, d.name),
            shown(d.b.value, d.unit, d.name),
            change_text(d.relative),
            d.verdict,
        )
        for d in differences
    )
    table = Table(("figure", a, b, "change", "verdict"), rows)
    return Section(f"From {a} to {b}", (table,), verdicts_text(differences))


def against_section(rows: Sequence[Against]) -> Section:
    """Predicted against measured, kind by kind."""
    lines = tuple(
        (
            row.kind,
            format_seconds(row.predicted_s),
            format_seconds(row.measured_s),
            f"{format_seconds(row.measured_low_s)} to {format_seconds(row.measured_high_s)}",
            f"{100 * row.error:+.1f} %",
        )
        for row in rows
    )
    columns = ("kind", "predicted", "measured", "middle half of steps", "error")
    lead = "Seconds of the busiest rank per step, median over steps; the first measured step is left out."
    return Section("Predicted against measured", (Table(columns, lines),), lead)


def assumptions_section(result: SimulationResult) -> Section:
    """What the prediction rests on, and where each part is from."""
    blocks: list[Block] = []
    rows = tuple((a.name, f"{a.value} ({a.source})" if a.value else a.source) for a in result.assumptions)
    if rows:
        blocks.append(Table(("assumption", "value, or from what"), rows, (0, 1)))
    if result.notes:
        blocks.append(Table(("note",), tuple((note,) for note in result.notes)))
    made = tuple((name.replace("_", " "), value) for name, value in result.provenance.items())
    if made:
        blocks.append(Table(("made from", ""), made, (0, 1)))
    return Section("What this rests on", tuple(blocks))
