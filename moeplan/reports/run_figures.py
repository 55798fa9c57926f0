"""Pictures of a run as SVG: latencies, throughput, timelines, Gantt charts, where ranks and memory go.

Drawn and coloured as :mod:`moeplan.reports.figures`. ``R`` ranks, ``V`` events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeplan.artifacts.event_log import EventLog
from moeplan.artifacts.simulation_result import MemoryTrack, RankTimes, Timeline
from moeplan.reports.figures import AFTER, BEFORE, FILL, INK, MUTED, drawing, to_svg

__all__ = [
    "INSIDE",
    "OPERATIONS",
    "gantt",
    "latency_curves",
    "load_curve",
    "memory_curves",
    "memory_stack",
    "rank_stack",
    "run_timeline",
]

_TAB = ("#3b6fb6", "#d08a27", "#4f9d69", "#a65a9e", "#b5483a", "#6b8e9c", "#8a7b4f", "#5b5fa8")
_KIND_COLOUR = {
    "attention": _TAB[0], "dense": _TAB[5], "router": _TAB[6], "shared": _TAB[7], "experts": _TAB[2],
    "dispatch": _TAB[1], "combine": _TAB[4], "transfer": _TAB[6], "forward": _TAB[0], "backward": _TAB[2],
    "gradient_sync": _TAB[1], "optimizer": _TAB[3], "migrate": _TAB[7], "step": _TAB[5],
}  # fmt: skip
_MAX_BARS, _MAX_RANKS = 6000, 16
OPERATIONS = ("forward", "backward", "gradient_sync", "optimizer", "transfer", "migrate")
INSIDE = tuple(kind for kind in _KIND_COLOUR if kind not in ("step", *OPERATIONS))


def _clean(axes: Any, grid: str = "both") -> None:
    axes.grid(axis=grid, color=MUTED, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=2)


def _legend(axes: Any, columns: int = 4) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, fontsize=9.5,
                borderaxespad=0.1, borderpad=0, handlelength=1.4, columnspacing=1.2)  # fmt: skip


def _unit(largest_s: float) -> tuple[float, str]:
    return next((u for u in ((1.0, "s"), (1e-3, "ms")) if largest_s >= 2 * u[0]), (1e-6, "µs"))


def _log_seconds(axes: Any) -> None:
    """A logarithmic time axis with at most about six ticks, at 1, 2 and 5 of a decade, or closer; a plain one where
    times hardly differ."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    low, high = axes.dataLim.intervalx
    if high < 4 * low:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high] or [low]
        axes.set_xticks(ticks, [f"{tick / factor:.4g} {unit}" for tick in ticks for factor, unit in [_unit(2 * tick)]])
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= 3:
            break
    axes.set_xticks(ticks, [f"{tick / factor:.3g} {unit}" for tick in ticks for factor, unit in [_unit(2 * tick)]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _whole_ticks(axes: Any, count: int) -> None:
    axes.set_xticks(range(0, count, max(1, -(-count // 12))))


def latency_curves(title: str, quantiles: Mapping[str, Sequence[float]]) -> str:
    """Cumulative distributions: name of a run -> its 101 quantiles in seconds. One axes, time in logs."""
    with drawing(3.0) as figure:
        axes = figure.add_subplot()
        styles = (("-", AFTER), ("--", BEFORE), (":", INK))
        label = f"{title}: cumulative distribution."
        for number, (name, values) in enumerate(quantiles.items()):
            line, colour = styles[number % len(styles)]
            seconds = np.maximum(np.asarray(values, float), 1e-6)
            axes.plot(seconds, np.linspace(0, 100, len(seconds)), line, color=colour, linewidth=1.6, label=name)
            label += f" {name}: median {seconds[len(seconds) // 2]:.4g} s, 99 % {seconds[-2]:.4g} s."
        _log_seconds(axes)
        axes.set(ylabel="% of requests", ylim=(0, 100))
        axes.set_title(title, pad=22 if len(quantiles) > 1 else 9)
        _clean(axes)
        if len(quantiles) > 1:
            _legend(axes)
        return to_svg(figure, label)


def load_curve(
    title: str, points: Sequence[tuple[float, float, float]], x_label: str, y_label: str, z_label: str
) -> str:
    """Throughput (left) and latency (right) over load: ``points`` are (load, throughput, latency), any order."""
    ordered = sorted(points)
    load, rate, latency = np.array(ordered, float).T
    label = f"{title}: {len(points)} loads from {load[0]:.4g} to {load[-1]:.4g}; {y_label} up to {rate.max():.4g}."
    with drawing(3.0) as figure:
        axes = figure.add_subplot()
        other = axes.twinx()
        lines = axes.plot(load, rate, "o-", color=AFTER, markersize=3.5, linewidth=1.6, label=f"{y_label} (left)")
        right = f"{z_label} (right)"
        lines += other.plot(load, latency, "s--", color=BEFORE, markersize=3.2, linewidth=1.3, label=right)
        other.spines["right"].set_visible(True)
        axes.set(xlabel=x_label, ylim=(0, None))
        axes.set_title(title, pad=22)
        other.set(ylim=(0, None))
        _clean(axes)
        axes.legend(handles=lines, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=9.5,
                    borderaxespad=0.1, borderpad=0, handlelength=2.2, columnspacing=1.2)  # fmt: skip
        return to_svg(figure, label)


def run_timeline(title: str, timeline: Timeline) -> str:
    """Tokens per second, requests in batches and queues, and the KV cache, over the run."""
    time = np.array(timeline.time_s)
    panels = (
        ("tokens/s", ((timeline.tokens_per_s, AFTER, "-", "tokens/s"),)),
        ("requests", ((timeline.running, AFTER, "-", "running"), (timeline.waiting, BEFORE, "--", "waiting"))),
        ("KV cache, %", ((tuple(100 * c for c in timeline.cache), AFTER, "-", "in use"),)),
    )
    label = f"{title}: {len(time)} stretches of time, up to {max(timeline.tokens_per_s):.4g} tokens/s."
    with drawing(4.6) as figure:
        for axes, (name, lines) in zip(figure.subplots(3, 1, sharex=True), panels, strict=True):
            for values, colour, style, word in lines:
                axes.plot(time, values, style, color=colour, linewidth=1.4, label=word)
            axes.set(ylabel=name, ylim=(0, None))
            _clean(axes)
            if len(lines) > 1:
                _legend(axes)
        axes.set(xlabel="seconds")
        figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, fontweight="bold")
        return to_svg(figure, label)


def gantt(
    log: EventLog,
    title: str,
    step: int,
    kinds: Sequence[str] = INSIDE,
    part: tuple[float, float] | None = None,
    span_s: float | None = None,
) -> str | None:
    """Who did what when in one step: a row per rank, thinner bars for exchanges; None where nothing has a length.

    ``part``: only what begins between these seconds; ``span_s``: length of the time axis, so that two pictures compare.
    """
    mine = log.of_kind(*kinds) & (log.step_V == step) & (log.duration_s_V > 0) & (log.rank_V >= 0)
    if part is not None:
        mine &= (log.start_s_V >= part[0]) & (log.start_s_V < part[1])
    if not mine.any():
        return None
    ranks = np.unique(log.rank_V[mine])
    shown = ranks[np.unique(np.linspace(0, len(ranks) - 1, min(len(ranks), _MAX_RANKS)).astype(int))]
    mine &= np.isin(log.rank_V, shown)
    start = float(log.start_s_V[mine].min())
    end = float((log.start_s_V + log.duration_s_V)[mine].max())
    cut = ""
    if mine.sum() > _MAX_BARS:  # the first part of a long step
        stop = float(np.sort(log.start_s_V[mine])[_MAX_BARS])
        mine &= log.start_s_V < stop
        end, cut = stop, " (its beginning)"
    factor, unit = _unit(end - start)
    row_of = {int(rank): row for row, rank in enumerate(shown)}
    present = [kind for kind in kinds if (mine & log.of_kind(kind)).any()]
    busy = {kind: float(log.duration_s_V[mine & log.of_kind(kind)].sum()) for kind in present}
    label = f"{title}{cut}: {len(shown)} ranks, {(end - start) / factor:.4g} {unit}; busiest kinds: " + ", ".join(
        sorted(busy, key=lambda kind: -busy[kind])[:3]
    )
    with drawing(1.6 + 0.28 * len(shown), 12.0) as figure:
        axes = figure.add_subplot()
        for kind in present:
            of_kind = mine & log.of_kind(kind)
            thin = kind in ("dispatch", "combine", "gradient_sync", "transfer", "migrate")
            for rank in shown:
                own = of_kind & (log.rank_V == rank)
                if not own.any():
                    continue
                bars = np.stack([log.start_s_V[own] - start, log.duration_s_V[own]], 1) / factor
                low = row_of[int(rank)] + (0.12 if thin else -0.38)
                axes.broken_barh(bars, (low, 0.26 if thin else 0.48), facecolors=_KIND_COLOUR[kind],
                                 edgecolor="none", label=kind)  # fmt: skip
        axes.set(xlim=(0, (span_s or end - start) / factor), ylim=(len(shown) - 0.5, -0.6))
        axes.set(xlabel=f"{unit} since {'the step' if part is None else 'it'} began")
        axes.set_yticks(range(len(shown)), [f"rank {rank}" for rank in shown])
        axes.set_title(title + cut, pad=22)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), loc="lower left", bbox_to_anchor=(-0.005, 1.0), ncols=8,
                    frameon=False, fontsize=9.5, borderaxespad=0.1, borderpad=0, handlelength=1.0)  # fmt: skip
        _clean(axes, "x")
        return to_svg(figure, label)


def rank_stack(title: str, ranks: RankTimes) -> str:
    """Where each rank's time goes, as stacked parts of the run."""
    parts = (("compute", ranks.compute, _TAB[2]), ("exchange", ranks.exchange, _TAB[1]),
             ("bubble", ranks.bubble, _TAB[5]), ("idle", ranks.idle, FILL))  # fmt: skip
    count = len(ranks.compute)
    label = f"{title}: {count} ranks; compute from {min(ranks.compute):.1%} to {max(ranks.compute):.1%}."
    with drawing(2.9) as figure:
        axes = figure.add_subplot()
        low = np.zeros(count)
        for name, values, colour in parts:
            height = 100 * np.array(values)
            axes.bar(range(count), height, bottom=low, width=1.0 if count > 64 else 0.85, color=colour, label=name)
            low += height
        axes.set(xlabel="rank", ylabel="% of the run", ylim=(0, 100))
        _whole_ticks(axes, count)
        axes.set_title(title, pad=22)
        axes.margins(x=0.01)
        _clean(axes, "y")
        _legend(axes)
        return to_svg(figure, label)


def memory_stack(title: str, parts: Sequence[tuple[str, Sequence[float]]], limit_bytes: float, row: str) -> str:
    """Bytes on each rank or stage, stacked, under the memory there is."""
    count = len(parts[0][1])
    total = np.sum([values for _, values in parts], axis=0) / 2**30
    label = f"{title}: {count} {row}s, at most {total.max():.1f} GiB of {limit_bytes / 2**30:.1f} GiB."
    with drawing(2.9) as figure:
        axes = figure.add_subplot()
        low = np.zeros(count)
        for number, (name, values) in enumerate(parts):
            height = np.array(values, float) / 2**30
            axes.bar(range(count), height, bottom=low, width=1.0 if count > 64 else 0.85,
                     color=_TAB[number % len(_TAB)], label=name)  # fmt: skip
            low += height
        axes.axhline(limit_bytes / 2**30, color=INK, linewidth=1.2, linestyle=":")
        axes.annotate("memory", (0.995, limit_bytes / 2**30), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize=9.5, color=MUTED)  # fmt: skip
        _whole_ticks(axes, count)
        axes.set(xlabel=row, ylabel="GiB", ylim=(0, 1.12 * max(total.max(), limit_bytes / 2**30)))
        axes.set_title(title, pad=22)
        axes.margins(x=0.01)
        _clean(axes, "y")
        _legend(axes)
        return to_svg(figure, label)


def memory_curves(title: str, tracks: Sequence[MemoryTrack]) -> str:
    """Memory of one rank of each stage over a training step."""
    peak = max(t.state_bytes + max(t.activation_bytes, default=0.0) for t in tracks) / 2**30
    limit = tracks[0].limit_bytes / 2**30
    factor, unit = _unit(max((t.time_s[-1] for t in tracks if t.time_s), default=1.0))
    label = f"{title}: {len(tracks)} stages, at most {peak:.1f} GiB of {limit:.1f} GiB."
    with drawing(3.0) as figure:
        import matplotlib

        axes = figure.add_subplot()
        shades = matplotlib.colormaps["cividis"](np.linspace(0.05, 0.9, len(tracks)))
        for track, shade in zip(tracks, shades, strict=True):
            held = (track.state_bytes + np.array(track.activation_bytes)) / 2**30
            axes.step(np.array(track.time_s) / factor, held, where="post", color=shade, linewidth=1.4,
                      label=f"stage {track.stage}")  # fmt: skip
        axes.axhline(limit, color=INK, linewidth=1.2, linestyle=":")
        axes.set(xlabel=f"{unit} since the step began", ylabel="GiB", ylim=(0, 1.08 * max(limit, peak)))
        axes.set_title(title, pad=22 if len(tracks) <= 4 else 38 if len(tracks) <= 8 else 9)  # rows of the legend
        _clean(axes)
        if 1 < len(tracks) <= 8:
            _legend(axes, 4)
        return to_svg(figure, label)
