"""Pictures of a hardware profile: measured points with their spread, fit, roofline, and residuals below.

Same input, same bytes. ``n`` measured points of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.reports.figures import svg_file

__all__ = ["Curve", "page", "profile_picture"]

Floats = NDArray[np.float64]
_RC = {"svg.fonttype": "none", "svg.hashsalt": "moeplan", "text.parse_math": False, "font.size": 9}
_COLOURS = ("#0b5fa5", "#b45309", "#15803d", "#7e22ce", "#be123c", "#0e7490", "#4d7c0f", "#6b7280")


@dataclass(frozen=True, slots=True)
class Curve:
    """One series: sizes rising, microseconds, spread (a share of the time; nan unknown); residuals are
    predicted over measured minus 1 with the point held out, nan where it cannot be; roofline may be empty."""

    label: str
    size_n: Floats
    latency_us_n: Floats
    spread_n: Floats
    residual_n: Floats
    roofline_us_n: Floats


def profile_picture(title: str, axis: str, curves: Sequence[Curve]) -> str:
    """SVG of some curves over one size axis, both axes in logs."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    with matplotlib.rc_context(_RC):
        # Names of curves are long: they stand below, a line each, and do not narrow the picture.
        figure = Figure(figsize=(7.5, 5 + 0.17 * len(curves)), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for number, curve in enumerate(curves):
            _draw(upper, lower, curve, _COLOURS[number % len(_COLOURS)])
        upper.set(xscale="log", yscale="log", ylabel="latency, us", title=title)
        lower.axhline(0, color="black", linewidth=0.6)
        lower.set(xlabel=axis, ylabel="error, %")
        figure.legend(fontsize=7, loc="outside lower left", frameon=False)
        for ticks in (upper.xaxis, upper.yaxis):  # plain numbers: mathematical text is off
            ticks.set_major_formatter(EngFormatter(sep=""))
            ticks.set_minor_formatter(NullFormatter())
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
        text = svg_file(figure)
    return text[text.index("<svg") :]


def _draw(upper: Any, lower: Any, curve: Curve, colour: str) -> None:
    half = np.nan_to_num(curve.spread_n) * curve.latency_us_n / 2
    below = np.minimum(half, 0.95 * curve.latency_us_n)
    bars = {"fmt": "o", "markersize": 3, "elinewidth": 0.7, "color": colour}
    upper.errorbar(curve.size_n, curve.latency_us_n, yerr=[below, half], label=curve.label, **bars)
    upper.plot(curve.size_n, curve.latency_us_n, color=colour, linewidth=0.9)
    if len(curve.roofline_us_n):
        upper.plot(curve.size_n, curve.roofline_us_n, color=colour, linewidth=0.9, linestyle="dotted")
    lower.plot(curve.size_n, 100 * curve.residual_n, marker=".", linestyle="none", color=colour)


def page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """An HTML page that stands alone: facts, then pictures by section."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    body = "".join(
        f"<h2>{escape(name)}</h2>" + "".join(f"<figure>{picture}</figure>" for picture in pictures)
        for name, pictures in sections
    )
    style = (
        "body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111;"
        "background:#fff}th{text-align:left;vertical-align:top;padding-right:1rem}td{overflow-wrap:anywhere}"
        "figure{margin:1rem 0}svg{max-width:100%;height:auto}"
    )
    note = (
        "Points are medians, bars the 10th to 90th percentile, lines the interpolation, dotted lines the roofline"
        " where there is one, from what is named above. Errors are those of points held out, predicted over measured"
        " less 1."
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body>'
        f"<h1>{escape(title)}</h1><table>{rows}</table><p>{note}</p>{body}</body></html>\n"
    )
