"""Pictures of a routing trace as SVG, same input same bytes. ``L`` layers, ``W`` windows, ``E`` experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.reports.figures import svg_file

__all__ = ["coactivation_picture", "dependency_picture", "drift_picture", "skew_picture"]

_RC = {"svg.fonttype": "none", "svg.hashsalt": "moeplan", "text.parse_math": False, "font.size": 10}
_REAL, _CONTROL = "#0b5fa5", "#b45309"


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        yield Figure(figsize=(width, height), layout="constrained")


def _layer_axis(axes: Any, layer_ids: Sequence[int]) -> None:
    step = max(1, len(layer_ids) // 16)
    axes.set_xticks(range(0, len(layer_ids), step), [str(i) for i in layer_ids[::step]])
    axes.set_xlabel("layer")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # marks of alike values stand clear of the edge
    axes.grid(axis="y", alpha=0.3)


def skew_picture(
    layer_ids: Sequence[int], experts_L: NDArray[np.float64], ranks_L: NDArray[np.float64] | None
) -> str:
    """Load max/mean of experts, and of eight ranks holding contiguous blocks, per layer."""
    with _figure(8, 3.6) as figure:
        axes = figure.subplots()
        axes.bar(range(len(layer_ids)), experts_L, color=_REAL, label="experts")
        if ranks_L is not None:
            axes.plot(range(len(layer_ids)), ranks_L, color=_CONTROL, marker="o", label="8 contiguous ranks")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylabel("load, max / mean")
        axes.set_title("Skew per layer", loc="left")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderaxespad=0.2)
        _layer_axis(axes, layer_ids)
        return svg_file(figure)


def drift_picture(windows: Sequence[str], cosine_WW: NDArray[np.float64]) -> str:
    """Cosine similarity of loads between windows."""
    size = 2.5 + 0.45 * min(len(windows), 24)
    with _figure(size + 1, size) as figure:
        axes = figure.subplots()
        image = axes.imshow(cosine_WW, cmap="cividis", vmin=min(0.5, float(cosine_WW.min())), vmax=1.0)
        if len(windows) <= 24:
            axes.set_xticks(range(len(windows)), windows, rotation=45, ha="right")
            axes.set_yticks(range(len(windows)), windows)
        if len(windows) <= 8:
            for (row, column), value in np.ndenumerate(cosine_WW):
                ink = "black" if value > 0.8 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
        axes.set_title("Load similarity between windows")
        figure.colorbar(image, label="cosine")
        return svg_file(figure)


def coactivation_picture(layer_id: int, lift_EE: NDArray[np.float64]) -> str:
    """Observed over chance pairs of one layer, experts ordered so that companions stand together."""
    from matplotlib.colors import TwoSlopeNorm

    order = _companions(lift_EE)
    high = float(max(2.0, np.quantile(lift_EE, 0.995)))
    with _figure(6.4, 5.6) as figure:
        axes = figure.subplots()
        norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=high)
        image = axes.imshow(lift_EE[np.ix_(order, order)], cmap="PuOr_r", norm=norm, interpolation="nearest")
        axes.set_title(f"Co-activation in layer {layer_id} (1 = chance)")
        axes.set_xlabel("expert, ordered by companions")
        axes.set_ylabel("expert, ordered by companions")
        figure.colorbar(image, label="pairs, observed / chance")
        return svg_file(figure)


def _companions(lift_EE: NDArray[np.float64]) -> NDArray[np.int64]:
    """A greedy chain: each expert is followed by its closest one that is left."""
    left = np.ones(len(lift_EE), bool)
    order = [int(lift_EE.max(axis=1).argmax())]
    left[order[0]] = False
    while left.any():
        order.append(int(np.where(left, lift_EE[order[-1]], -1.0).argmax()))
        left[order[-1]] = False
    return np.array(order)


def dependency_picture(
    layer_ids: Sequence[int],
    bits: tuple[NDArray[np.float64], NDArray[np.float64]],
    share: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> str:
    """Mutual information and top-share from each layer to the next: measured, and with shuffled tokens."""
    with _figure(8, 5.2) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, (real, control), label in (
            (upper, bits, "mutual information, bits"),
            (lower, share, "mass on best 12.5 %"),
        ):
            axes.plot(range(len(real)), real, color=_REAL, marker="o", label="measured")
            axes.plot(range(len(real)), control, color=_CONTROL, marker="x", label="tokens shuffled")
            axes.set_ylabel(label)
            _layer_axis(axes, layer_ids[:-1])
        upper.set_title("What a layer's experts tell of the next layer's")
        upper.set_xlabel("")
        upper.legend()
        return svg_file(figure)
