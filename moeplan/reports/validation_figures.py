"""Pictures of validations as SVG files: predicted over measured row by row, and figures over their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moeplan.reports.figures import AFTER, BEFORE, FILL, INK, MUTED, drawing, standalone, to_svg

__all__ = ["errors_picture", "targets_picture"]


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
