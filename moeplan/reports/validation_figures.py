"""Pictures of validations as SVG files: predicted over measured row by row, and figures over their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moeplan.reports.figures import AFTER, BEFORE, FILL, INK, MUTED, drawing, standalone, to_svg

__all__ = ["errors_picture", "rows_picture", "targets_picture", "times_picture"]

_GROUPS = (("o", AFTER), ("s", BEFORE), ("^", "#4f9d69"), ("D", "#a65a9e"))


def errors_picture(title: str, ratios: Mapping[str, Sequence[float]], within: float) -> str:
    """Predicted over measured of every row, in rising order by group; the band is ``within``."""
    count = sum(len(values) for values in ratios.values())
    inside = sum(abs(value - 1) <= within for values in ratios.values() for value in values)
    label = f"{title}: {inside} of {count} predicted rows within {within:.0%}."
    with drawing(3.6, 12.0) as figure:
        axes = figure.add_subplot()
        axes.axhspan(1 - within, 1 + within, color=FILL, zorder=0)
        axes.axhline(1.0, color=INK, linewidth=0.9)
        start, ticks = 0, []
        for name, values in ratios.items():
            ordered = np.sort(np.asarray(values, float))
            good = np.abs(ordered - 1) <= within
            place = np.arange(start, start + len(ordered))
            axes.plot(place[good], ordered[good], "o", color=AFTER, markersize=4)
            axes.plot(place[~good], ordered[~good], "s", color=BEFORE, markersize=4)
            ticks.append((start + len(ordered) / 2, name))
            start += len(ordered) + 4
        axes.set_yscale("log")
        axes.set_yticks([0.5, 0.7, 1.0, 1.4, 2.0], ["0.5", "0.7", "1", "1.4", "2"])
        axes.yaxis.minorticks_off()
        axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
        axes.tick_params(length=0)
        axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.set(ylabel="predicted / measured")
        axes.set_title(title)
        axes.set_title(f"{inside} of {count} within {within:.0%}, shaded", loc="right", fontsize=10, color=MUTED,
                       fontweight="normal")  # fmt: skip
        return standalone(to_svg(figure, label))


def rows_picture(
    title: str,
    panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]],
    within: float,
) -> str:
    """Predicted over measured of every row in logs: a panel for each (name, group -> (measured, predicted) in seconds).

    The line is where both are equal, the band ``within`` of it; colour and mark tell the group, alike in all panels.
    """
    names = sorted({name for _, groups in panels for name in groups})
    label = f"{title}, predicted against measured."
    rows = -(-len(panels) // 2)
    with drawing(1.0 + 4.2 * rows, 12.0) as figure:
        grid = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes, (name, groups) in zip(grid, panels, strict=False):
            both = np.array([pair for pairs in groups.values() for pair in pairs]).reshape(-1, 2)
            axes.set_title(name)
            if not len(both):
                axes.set_axis_off()
                continue
            low, high = both.min() / 1.3, both.max() * 1.3
            ends = np.array([low, high])
            axes.fill_between(ends, (1 - within) * ends, (1 + within) * ends, color=FILL, linewidth=0, zorder=0)
            axes.plot(ends, ends, color=INK, linewidth=0.9, zorder=1)
            for number, group in enumerate(names):
                if pairs := groups.get(group):
                    mark, colour = _GROUPS[number % len(_GROUPS)]
                    measured, predicted = np.array(pairs).T
                    axes.plot(measured, predicted, mark, color=colour, alpha=0.55, markersize=3.2,
                              markeredgewidth=0, label=group)  # fmt: skip
            axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
            axes.set(xlabel="measured", ylabel="predicted")
            steps = (1, 3) if high / low < 300 else (1,)
            ticks = [step * 10.0**power for power in range(-6, 6) for step in steps]
            ticks = [tick for tick in ticks if low <= tick <= high]
            words = [f"{tick:g} s" if tick >= 0.5 else f"{1e3 * tick:g} ms" for tick in ticks]
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks(ticks, words)
            axes.minorticks_off()
            axes.set_aspect("equal")
            axes.grid(color=MUTED, alpha=0.25, linewidth=0.6)
            errors = np.abs(both[:, 1] / both[:, 0] - 1)
            said = f"{len(both)} rows, median error {np.median(errors):.1%}"
            axes.set_title(said, loc="right", fontsize=10, color=MUTED, fontweight="normal")
            label += f" {name}: {said}, {(errors <= within).mean():.0%} within {within:.0%}."
        handles = dict(pair for axes in grid for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        place = {"loc": "outside upper right", "ncols": 4, "frameon": False, "markerscale": 2}
        figure.legend(handles.values(), handles.keys(), **place)
        figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, fontweight="bold")
        return standalone(to_svg(figure, label))


def times_picture(title: str, rows: Sequence[tuple[str, float, float]]) -> str:
    """Seconds of ours and of a peer's, in logs: (what, ours, theirs)."""
    label = f"{title}: " + "; ".join(f"{name}: ours {ours:.3g} s, its {theirs:.3g} s" for name, ours, theirs in rows)
    with drawing(1.4 + 0.55 * len(rows), 12.0) as figure:
        axes = figure.add_subplot()
        for place, (_, *seconds) in enumerate(rows):
            axes.plot(seconds, [place, place], color=MUTED, linewidth=0.9, zorder=0)
            for value, mark, colour, name in zip(seconds, "os", (AFTER, BEFORE), ("ours", "the peer's"), strict=True):
                axes.plot([value], [place], mark, color=colour, label=name if place == 0 else None)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [10.0**power for power in range(-7, 5) if low <= 10.0**power <= high]
        words = [f"{t:g} s" if t >= 1 else f"{1e3 * t:g} ms" if t > 5e-4 else f"{1e6 * t:g} µs" for t in ticks]
        axes.set_xticks(ticks, words)
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.grid(axis="x", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.set_title(title, pad=22)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=9.5)
        return standalone(to_svg(figure, label))


def targets_picture(title: str, figures: Sequence[tuple[str, float, float, bool]]) -> str:
    """Each figure's value over its target as a bar; (name, value, target, reached)."""
    label = f"{title}: {sum(reached for *_, reached in figures)} of {len(figures)} figures reached."
    with drawing(1.2 + 0.32 * len(figures), 12.0) as figure:
        axes = figure.add_subplot()
        for row, (_, value, target, reached) in enumerate(figures):
            axes.barh(row, abs(value) / target, color=AFTER if reached else BEFORE, height=0.6)
        axes.axvline(1.0, color=INK, linewidth=1.2, linestyle=":")
        axes.set_yticks(range(len(figures)), [name for name, *_ in figures])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.grid(axis="x", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="value / target (blue: reached)", xlim=(0, None))
        axes.set_title(title)
        return standalone(to_svg(figure, label))
