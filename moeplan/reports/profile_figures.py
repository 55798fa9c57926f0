"""Pictures of a hardware profile: measured points with their spread, fit and roofline; rates and residuals below.

Same input, same bytes. ``n`` measured points of a curve, ``m`` points of its fit.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.reports.figures import svg_file

__all__ = ["Curve", "Picture", "page", "profile_picture"]

Floats = NDArray[np.float64]
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moeplan",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
_COLOURS = ("#0b5fa5", "#b45309", "#15803d", "#7e22ce", "#be123c", "#0e7490", "#4d7c0f", "#6b7280")
_MOST_ERROR = 50.0  # per cent, of the lowest panel
_GOOD_ERROR = 10.0
_INCH = {"width": 10.0, "left": 0.75, "right": 3.0, "top": 0.62, "bottom": 0.5, "gap": 0.14}
_LEGEND_WIDTH = 40  # letters


@dataclass(frozen=True, slots=True)
class Curve:
    """One series: sizes rising, microseconds, from the shortest sample to the 90th percentile at most (nan: not known);
    the fit from end to end; residuals are predicted over measured minus 1 with the point held out, nan where it cannot
    be; ``rate_n`` in GB/s. Fit, roofline and rate may be empty."""

    label: str
    size_n: Floats
    latency_us_n: Floats
    low_us_n: Floats
    high_us_n: Floats
    fit_size_m: Floats
    fit_us_m: Floats
    residual_n: Floats
    roofline_us_n: Floats
    rate_n: Floats


@dataclass(frozen=True, slots=True)
class Picture:
    """Some curves over one ``size``, the longest of ``series``."""

    title: str
    subtitle: str
    series: int
    size: str
    curves: Sequence[Curve]


def profile_picture(picture: Picture) -> str:
    """SVG of curves over one size axis in logs: time; share of the roofline, or bytes per second; held-out errors."""
    import matplotlib
    from matplotlib.figure import Figure

    middle = _middle(picture.curves)
    heights = [3.0, *([1.0] if middle else []), 0.9]
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(_INCH["width"], sum(heights) + _INCH["top"] + _INCH["bottom"] + _INCH["gap"] * 2))
        panels = _panels(figure, heights)
        for number, curve in enumerate(picture.curves):
            _draw(panels, middle, curve, _COLOURS[number % len(_COLOURS)])
        _axes(panels, middle, picture)
        _words(figure, panels[0], picture)
        text = svg_file(figure)
    return text[text.index("<svg") :]


def _middle(curves: Sequence[Curve]) -> str:
    """What the panel between shows: the share of the roofline, a rate, or nothing."""
    if any(len(curve.roofline_us_n) for curve in curves):
        return "of roofline, %"
    return "GB/s" if any(len(curve.rate_n) for curve in curves) else ""


def _panels(figure: Any, heights: Sequence[float]) -> list[Any]:
    """Axes below each other at fixed places: matplotlib's own layout takes as long as all the drawing."""
    width, height = figure.get_size_inches()
    panels: list[Any] = []
    top = height - _INCH["top"]
    for tall in heights:
        place = (_INCH["left"], top - tall, width - _INCH["left"] - _INCH["right"], tall)
        box = [place[0] / width, place[1] / height, place[2] / width, place[3] / height]
        panels.append(figure.add_axes(box, sharex=panels[0] if panels else None))
        top -= tall + _INCH["gap"]
    return panels


def _draw(panels: Sequence[Any], middle: str, curve: Curve, colour: str) -> None:
    upper, lower = panels[0], panels[-1]
    seconds = 1e-6 * curve.latency_us_n
    known = np.isfinite(curve.low_us_n) & np.isfinite(curve.high_us_n)
    upper.vlines(
        curve.size_n[known], 1e-6 * curve.low_us_n[known], 1e-6 * curve.high_us_n[known],
        color=colour, linewidth=0.8, alpha=0.45,
    )  # fmt: skip
    points = {"linestyle": "none", "marker": "o", "markersize": 3.2, "color": colour}
    upper.plot(curve.size_n, seconds, label=curve.label or "measured", **points)
    upper.plot(curve.fit_size_m, 1e-6 * curve.fit_us_m, color=colour, linewidth=1.0)
    if len(curve.roofline_us_n):
        upper.plot(curve.size_n, 1e-6 * curve.roofline_us_n, color=colour, **_roofline_style(curve))
    joined = "solid" if len(curve.fit_size_m) else "none"
    shown = {"linestyle": joined, "linewidth": 0.9, "marker": "o", "markersize": 2.2, "color": colour}
    if middle == "GB/s" and len(curve.rate_n):
        panels[1].plot(curve.size_n, curve.rate_n, **shown)
    elif middle and len(curve.roofline_us_n):
        panels[1].plot(curve.size_n, 100 * curve.roofline_us_n / curve.latency_us_n, **shown)
    error = 100 * curve.residual_n
    lower.plot(curve.size_n, np.clip(error, -_MOST_ERROR, _MOST_ERROR), clip_on=False, **points)


def _roofline_style(curve: Curve) -> dict[str, Any]:
    """A dotted line; dashes where points have no curve."""
    if len(curve.fit_size_m):
        return {"linewidth": 1.0, "linestyle": (0, (1, 1.6))}
    return {"linestyle": "none", "marker": "_", "markersize": 5, "alpha": 0.7}


def _axes(panels: Sequence[Any], middle: str, picture: Picture) -> None:
    upper, lower = panels[0], panels[-1]
    upper.set(xscale="log", yscale="log", ylabel="time")
    _ticks(upper.yaxis, upper.get_ylim(), "s")
    _ticks(upper.xaxis, upper.get_xlim(), "B" if picture.size.endswith("bytes") else "")
    if middle:
        panels[1].set(ylabel=middle)
        panels[1].set_ylim(bottom=0)
    errors = [float(np.abs(e).max()) for c in picture.curves if len(e := c.residual_n[np.isfinite(c.residual_n)])]
    reach = min(_MOST_ERROR, max([1.5 * _GOOD_ERROR, *(105 * e for e in errors)]))
    lower.set(xlabel=picture.size.removesuffix(" bytes"), ylabel="error, %", ylim=(-reach, reach))
    lower.axhspan(-_GOOD_ERROR, _GOOD_ERROR, color="#e8edf2", zorder=0, linewidth=0)
    lower.axhline(0, color="#333333", linewidth=0.6)
    for axes in panels:
        axes.grid(color="#d4d9de", linewidth=0.5)
        if axes is not lower:
            axes.tick_params(axis="x", which="both", labelbottom=False)


def _ticks(axis: Any, limits: tuple[float, float], unit: str) -> None:
    """Plain numbers with their unit at the decades; at 2 and 5 as well where there are few of these."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    decades = math.log10(limits[1] / limits[0])
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=20))
    axis.set_major_formatter(EngFormatter(unit, sep=" " if unit else ""))
    axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=20))
    axis.set_minor_formatter(NullFormatter())


def _words(figure: Any, upper: Any, picture: Picture) -> None:
    """Title, what all curves have in common, and the legend beside."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    count = len(picture.curves)
    more = f"{count} longest of {picture.series:,} series" if count < picture.series else ""
    left = _INCH["left"] / width
    figure.text(left, 1 - 0.2 / height, picture.title, weight="bold", size=11, va="center")
    subtitle = "; ".join(filter(None, (picture.subtitle, more)))
    figure.text(left, 1 - 0.43 / height, subtitle, size=8, color="#555555", va="center")
    handles, labels = upper.get_legend_handles_labels()
    labels = [textwrap.fill(label, _LEGEND_WIDTH) for label in labels]
    if any(len(curve.fit_size_m) for curve in picture.curves):
        handles += [Line2D([], [], color="#333333", linewidth=1.0)]
        labels += ["fit between measured sizes"]
    if any(len(curve.roofline_us_n) for curve in picture.curves):
        handles += [Line2D([], [], color="#333333", **_roofline_style(picture.curves[0]))]
        labels += ["roofline"]
    beside = 1 - (_INCH["right"] - 0.15) / width, 1 - _INCH["top"] / height
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=beside, frameon=False, fontsize=8, borderaxespad=0)


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    left_out: Sequence[str],
    sections: Sequence[tuple[str, Sequence[str]]],
) -> str:
    """An HTML page that stands alone: facts, what was left out, then pictures by section."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    gaps = "".join(f"<li>{escape(text)}</li>" for text in left_out)
    body = "".join(
        f'<h2 id="{escape(name)}">{escape(name)}</h2>' + "".join(f"<figure>{picture}</figure>" for picture in pictures)
        for name, pictures in sections
    )
    to = " ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name, _ in sections)
    style = (
        "body{font:15px system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#111;"
        "background:#fff}th{text-align:left;vertical-align:top;padding-right:1.5rem;white-space:nowrap}"
        "td{overflow-wrap:anywhere}nav a{margin-right:1rem}figure{margin:1.5rem 0;overflow-x:auto}"
        "svg{max-width:100%;min-width:40rem;height:auto}"
        "li{overflow-wrap:anywhere}"
    )
    note = (
        "Points are medians; bars reach from the shortest sample to the 90th percentile (at most: the 20th and the"
        " spread). Lines are the fit between the measured sizes, dotted lines the roofline, from what is named above."
        " Errors are those of points held out, and of skewed vectors those of the cost model that knows balanced ones"
        f" alone: predicted over measured less 1, drawn at {_MOST_ERROR:.0f} % where they are larger; within"
        f" {_GOOD_ERROR:.0f} % is shaded. GB/s: the message over the time."
    )
    omitted = f"<details><summary>{len(left_out)} left out</summary><ul>{gaps}</ul></details>" if left_out else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body>'
        f"<h1>{escape(title)}</h1><table>{rows}</table>{omitted}<p>{note}</p><nav>{to}</nav>{body}</body></html>\n"
    )
