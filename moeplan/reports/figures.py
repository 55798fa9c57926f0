"""Pictures of a plan as SVG: the same input gives the same bytes, and the colours follow the page.

Text and lines are drawn in marker colours that become CSS variables (``currentColor``, ``--after``, ...), so
that one picture serves light, dark and print. Values are shown in cividis, which people with colour-vision
deficiency read in the same order. ``L`` layers, ``R`` ranks, ``E`` experts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.files import sha256_bytes

__all__ = [
    "AFTER",
    "BEFORE",
    "FILL",
    "INK",
    "MUTED",
    "colour_limits",
    "drawing",
    "layer_bars",
    "layer_plot",
    "load_heat_map",
    "matrix_heat_map",
    "plan_picture",
    "replica_map",
    "standalone",
    "svg_file",
    "to_svg",
]

INK, MUTED, BEFORE, AFTER, FILL = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    FILL: "var(--empty)",
}
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moeplan",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titleweight": "bold",
}
_WIDTH_INCH = 6.0
_MOST_NODE_LINES = 36  # of more nodes lines would cover the ranks
_NODE_LINE = {"color": "white", "linewidth": 1.1, "alpha": 0.75}


@contextmanager
def drawing(height_inch: float, width_inch: float = _WIDTH_INCH) -> Iterator[Any]:
    """An empty matplotlib figure with the page's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        yield Figure(figsize=(width_inch, height_inch), layout="constrained", facecolor="none")


def svg_file(figure: Any, **options: Any) -> str:
    """SVG of a figure as matplotlib writes it, but without a date."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), **options)
    return stream.getvalue()


def to_svg(figure: Any, label: str) -> str:
    """Inline SVG of a figure: no date, no document type, no identifiers that nothing refers to."""
    text = svg_file(figure, transparent=True)
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', text)
    body = text[text.index(">") + 1 :]
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", body)
    name = escape(label, quote=True)
    prefix = sha256_bytes((name + body).encode())[:8]  # two pictures on one page share no identifier
    body = re.sub(r'( id="|href="#|url\(#)', lambda m: m[1] + prefix, body)
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = re.sub(
        r"font-family: [^;\"]+|font: ([\d.]+px) [^;\"]+", lambda m: f"font-size: {m[1]}" if m[1] else "", body
    )
    body = re.sub(r"font: (bold|\d+) ([\d.]+px) [^;\"]+", r"font-weight: \1; font-size: \2", body)
    for marker, css in _CSS.items():
        body = body.replace(marker, css)
    view = box[1] if box else "0 0 100 100"
    return f'<svg viewBox="{view}" role="img" aria-label="{name}" class="figure">{body}'


def colour_limits(*arrays: NDArray[np.float64]) -> tuple[float, float]:
    """One scale for all arrays: from the least to the largest value.

    A few extreme cells do not wash out the rest: above 1.5 times the 99.5 % quantile the scale ends at that
    quantile, and the colour bar shows that it goes on.
    """
    values = np.concatenate([a[np.isfinite(a)].ravel() for a in arrays])
    low, high = float(values.min()), float(values.max())
    cut = float(np.quantile(values, 0.995))
    if high > 1.5 * cut > 1.5 * low:
        high = cut
    return low, max(high, low + 1e-9 * max(1.0, abs(low)))


def _node_lines(axes: Any, num_ranks: int, ranks_per_node: int, both: bool = False) -> None:
    if num_ranks // ranks_per_node > _MOST_NODE_LINES:
        return
    for edge in np.arange(ranks_per_node, num_ranks, ranks_per_node) - 0.5:
        axes.axvline(edge, **_NODE_LINE)
        if both:
            axes.axhline(edge, **_NODE_LINE)


def _rank_ticks(axis: Any, num_ranks: int, ranks_per_node: int) -> None:
    step = ranks_per_node if 2 <= num_ranks // ranks_per_node <= 12 else max(1, num_ranks // 8)
    axis.set_ticks(list(range(0, num_ranks, step if num_ranks > 16 else 1)))


def _layer_ticks(axis: Any, layer_ids: Sequence[int]) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(layer_ids) / s <= 12)
    places = [place for place, layer_id in enumerate(layer_ids) if layer_id % step == 0] or [0]
    axis.set_ticks(places, [str(layer_ids[p]) for p in places])


def _image(
    figure: Any,
    axes: Any,
    values: NDArray[Any],
    limits: tuple[float, float],
    bar_label: str,
    bar: str = "horizontal",
) -> None:
    import matplotlib

    colours = matplotlib.colormaps["cividis"].with_extremes(bad=(0.5, 0.5, 0.5, 0.25))
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        interpolation="none",
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
    )
    extend = "max" if np.nanmax(values, initial=limits[0]) > limits[1] * (1 + 1e-6) else "neither"
    size = {"aspect": 45, "pad": 0.02} if bar == "horizontal" else {"aspect": 32, "pad": 0.03}
    colour_bar = figure.colorbar(image, ax=axes, orientation=bar, extend=extend, label=bar_label, **size)
    colour_bar.outline.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _range(axes: Any, values: NDArray[Any]) -> None:
    """Least and largest value, at the right of the title."""
    text = f"{np.nanmin(values):.2f} to {np.nanmax(values):.2f}"
    axes.set_title(text, loc="right", fontsize=10, color=MUTED, fontweight="normal")


def _rank_label(word: str, num_ranks: int, ranks_per_node: int) -> str:
    lines = 1 < ranks_per_node < num_ranks and num_ranks // ranks_per_node <= _MOST_NODE_LINES
    return f"{word} (lines part nodes of {ranks_per_node})" if lines else word


def load_heat_map(
    relative_LR: NDArray[np.float64],
    layer_ids: Sequence[int],
    ranks_per_node: int,
    limits: tuple[float, float],
    title: str,
) -> str:
    """Ranks across, layers down, colour is load over the layer's mean."""
    layers, ranks = relative_LR.shape
    label = (
        f"{title}: heat map of {layers} layers by {ranks} ranks. Load over the layer's mean from"
        f" {np.nanmin(relative_LR):.3f} to {np.nanmax(relative_LR):.3f}."
    )
    with drawing(min(6.5, 1.9 + 0.075 * layers)) as figure:
        axes = figure.add_subplot()
        _image(figure, axes, relative_LR, limits, "load of a rank / mean of the layer")
        _node_lines(axes, ranks, ranks_per_node)
        _rank_ticks(axes.xaxis, ranks, ranks_per_node)
        _layer_ticks(axes.yaxis, layer_ids)
        axes.set(title=title, xlabel=_rank_label("rank", ranks, ranks_per_node), ylabel="layer")
        _range(axes, relative_LR)
        return to_svg(figure, label)


def _scale(largest: float, unit: str) -> tuple[float, str]:
    """Factor and word that keep the numbers of a colour bar short."""
    if unit == "bytes":
        steps = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    else:
        steps = [(1e9, f"10⁹ {unit}"), (1e6, f"million {unit}"), (1e4, f"thousand {unit}")]
    factor, word = next((step for step in steps if largest >= step[0]), (1.0, unit))
    return (1e3 if factor == 1e4 else factor), word


def matrix_heat_map(
    matrix_RR: NDArray[np.float64],
    ranks_per_node: int,
    limits: tuple[float, float],
    title: str,
    unit: str,
    words: tuple[str, str] = ("from rank", "to rank"),
) -> str:
    """Rank by rank, or node by node (``ranks_per_node`` 1); colour is the amount; ``words`` name rows and columns."""
    factor, unit = _scale(limits[1], unit)
    matrix_RR, limits = matrix_RR / factor, (limits[0] / factor, limits[1] / factor)
    ranks = len(matrix_RR)
    node_R = np.arange(ranks) // ranks_per_node
    total = float(np.nansum(matrix_RR))
    across = float(np.nansum(matrix_RR[node_R[:, None] != node_R[None, :]]))
    label = f"{title}: {ranks} by {ranks} {words[0].rpartition(' ')[2]}s, {total:.4g} {unit} in total"
    label += f", {across / total:.1%} of it between nodes." if total else "."
    with drawing(4.9) as figure:
        axes = figure.add_subplot()
        _image(figure, axes, matrix_RR, limits, unit, "vertical")
        axes.set_aspect("equal")
        if ranks_per_node > 1:
            _node_lines(axes, ranks, ranks_per_node, both=True)
        _rank_ticks(axes.xaxis, ranks, ranks_per_node)
        _rank_ticks(axes.yaxis, ranks, ranks_per_node)
        axes.set(title=title, ylabel=words[0], xlabel=_rank_label(words[1], ranks, ranks_per_node))
        return to_svg(figure, label)


def layer_plot(
    layer_ids: Sequence[int],
    title: str,
    after_L: Sequence[float | None],
    before_L: Sequence[float | None] | None = None,
    bound_L: Sequence[float] | None = None,
    names: tuple[str, str] = ("before", "after"),
) -> str:
    """One quantity per layer: this plan with dots, before dashed, the proven bound as a fine line."""
    place_L = np.arange(len(layer_ids))
    after = np.array([np.nan if v is None else v for v in after_L], dtype=float)
    label = f"{title}, per layer. {names[1]}: from {np.nanmin(after):.4g} to {np.nanmax(after):.4g}."
    with drawing(2.5) as figure:
        axes = figure.add_subplot()
        if before_L is not None:
            before = np.array([np.nan if v is None else v for v in before_L], dtype=float)
            label += f" {names[0]}: from {np.nanmin(before):.4g} to {np.nanmax(before):.4g}."
            axes.plot(place_L, before, "s--", color=BEFORE, markersize=2.6, linewidth=1.2, label=names[0])
        axes.plot(place_L, after, "o-", color=AFTER, markersize=3, linewidth=1.6, label=names[1])
        if bound_L is not None:
            axes.plot(place_L, list(bound_L), ":", color=INK, linewidth=1.1, label="proven bound")
        _layer_ticks(axes.xaxis, layer_ids)
        axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.tick_params(length=2)
        axes.set_title(title, pad=22)
        axes.set(xlabel="layer")
        axes.margins(x=0.02)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9.5,
                    borderaxespad=0.1, borderpad=0, handlelength=2.2)  # fmt: skip
        return to_svg(figure, label)


def layer_bars(layer_ids: Sequence[int], title: str, count_L: Sequence[int]) -> str:
    """One count per layer, as bars from zero."""
    label = f"{title}: from {min(count_L):,} to {max(count_L):,}, {sum(count_L):,} in all."
    with drawing(4.9) as figure:
        axes = figure.add_subplot()
        axes.bar(range(len(layer_ids)), list(count_L), color=AFTER, width=0.72)
        _layer_ticks(axes.xaxis, layer_ids)
        axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=2)
        axes.set(title=title, xlabel="layer")
        axes.margins(x=0.02)
        return to_svg(figure, label)


def replica_map(replicas_LE: NDArray[np.int32], layer_ids: Sequence[int]) -> str:
    """Experts across, layers down, colour is the number of copies."""
    import matplotlib
    from matplotlib.colors import BoundaryNorm, ListedColormap

    layers, experts = replicas_LE.shape
    most = int(replicas_LE.max())
    label = (
        f"Copies of each expert: {layers} layers by {experts} experts, up to {most} copies;"
        f" {int((replicas_LE > 1).sum())} experts have more than one."
    )
    with drawing(min(5.0, 1.8 + 0.055 * layers), 2 * _WIDTH_INCH) as figure:
        axes = figure.add_subplot()
        cividis = matplotlib.colormaps["cividis"]
        shades = [
            cividis(0.0),
            *cividis(np.linspace(0.45, 1.0, max(most - 1, 1))),
        ]  # a clear step from one copy to two
        colours = ListedColormap(shades).with_extremes(bad=(0.5, 0.5, 0.5, 0.25))
        norm = BoundaryNorm(np.arange(0.5, max(most, 2) + 1), max(most, 2))
        values = np.ma.masked_equal(replicas_LE, 0)
        image = axes.imshow(values, aspect="auto", interpolation="none", cmap=colours, norm=norm)
        step = max(1, -(-most // 8))
        bar = figure.colorbar(
            image, ax=axes, pad=0.012, aspect=16, label="copies", ticks=range(1, most + 1, step)
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(which="both", length=0)
        bar.ax.minorticks_off()
        for spine in axes.spines.values():
            spine.set_visible(False)
        _layer_ticks(axes.yaxis, layer_ids)
        axes.set(xlabel="logical expert", ylabel="layer")
        return to_svg(figure, label)


def plan_picture(
    title: str,
    subtitle: str,
    panels: Sequence[tuple[str, NDArray[np.float64]]],
    layer_ids: Sequence[int],
    ranks_per_node: int,
    bar_label: str,
    x_label: str,
    ranges: bool = True,
) -> str:
    """A picture that stands alone (a README, a slide), with its own colours: panels on one scale."""
    limits = colour_limits(*(values for _, values in panels))
    layers = len(layer_ids)
    label = f"{title}. {subtitle}. " + "; ".join(
        f"{n}: {np.nanmin(v):.3f} to {np.nanmax(v):.3f}" for n, v in panels
    )
    height_inch = min(6.0, 2.5 + 0.06 * layers)
    with drawing(height_inch, 4.6 * len(panels) + 0.6) as figure:
        axes_list = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, values) in zip(axes_list, panels, strict=True):
            _image(figure, axes, values, limits, bar_label)
            columns = values.shape[1]
            _rank_ticks(axes.xaxis, columns, ranks_per_node)
            _node_lines(axes, columns, ranks_per_node)
            axes.set(title=name, xlabel=x_label)
            if ranges:
                _range(axes, values)
        _layer_ticks(axes_list[0].yaxis, layer_ids)
        axes_list[0].set_ylabel("layer")
        figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=14, fontweight="bold")
        figure.text(0.012, 1 - 0.45 / height_inch, subtitle, ha="left", fontsize=10.5, color=MUTED)
        inline = to_svg(figure, label)
    return standalone(inline)


def standalone(inline: str) -> str:
    """A picture of :func:`to_svg` as a file of its own, with its colours, light and dark, and its label as title."""
    style = (
        "<style>svg{color:#1b1f24;--muted:#59636e;--empty:#e6e8eb;--before:#b35a00;--after:#0b5cad;"
        "font-family:system-ui,-apple-system,'Segoe UI',sans-serif}"
        "@media(prefers-color-scheme:dark){svg{color:#e8eaed;--muted:#9aa4af;--empty:#30363d;--before:#f0a35e;"
        "--after:#6db3f2}}image{image-rendering:pixelated}</style>"
    )
    head, _, body = inline.partition(">")
    label = re.search(r'aria-label="([^"]*)"', head)
    title = label[1] if label else ""
    return f'{head} xmlns="http://www.w3.org/2000/svg"><title>{title}</title>{style}{body}'
