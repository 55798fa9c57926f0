"""A measured table as a function of numbers: seconds inside it, extended by the roofline outside, saying which.

``q`` queries, ``A`` axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs import roofline
from moeplan.costs.interpolation import GridInterpolator
from moeplan.costs.waves import steps_of

__all__ = ["Seconds", "TableCosts", "kernel_names"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Seconds:
    """One or more times with what nine of ten measurements miss by, and where they are from."""

    value: Floats
    relative_error: float
    source: str
    extrapolated: bool
    inside: NDArray[np.bool_] | None = None
    """Whether measured points lie around each of them; None: not told."""
    wire: Floats | None = None
    """Of a collective: the part of each that its bytes take on the links; None: computed, nothing goes over any."""

    @property
    def total(self) -> float:
        """All of them together."""
        return float(self.value.sum())


def kernel_names(rows: pa.Table) -> list[str]:
    """Source and kernel of each row."""
    return [f"{s} ({k})" for s, k in zip(rows["source"].to_pylist(), rows["kernel"].to_pylist(), strict=True)]


@lru_cache(maxsize=256)
def _fitted(
    profile: HardwareProfile, table: str, axes: tuple[str, ...], names: tuple[tuple[str, Any], ...]
) -> tuple[GridInterpolator, str] | None:
    """Interpolator and source; fitted once per profile and kernel."""
    rows = profile.select(table, **dict(names))
    if not rows.num_rows:
        return None
    kernels = np.array(kernel_names(rows))
    values, counts = np.unique(kernels, return_counts=True)
    source = str(values[counts.argmax()])
    mine = kernels == source
    coords = np.stack([rows[axis].to_numpy()[mine].astype(float) for axis in axes], 1)
    latency = rows["latency_us"].to_numpy()[mine]
    model = GridInterpolator(np.zeros(len(coords), np.int64), coords, latency, steps=steps_of(profile, table))
    return model, source


class TableCosts:
    """Rows of one table that equal ``names``, over numeric ``axes`` (the size first).

    Of several kernels the one with most rows serves. ``law`` gives roofline seconds at ``[q, A]`` coordinates:
    it stands in where there are no rows, and extends the table in proportion from near places with measured points on
    all sides (a table of batches and contexts, say, ends where both are large).
    """

    def __init__(
        self,
        profile: HardwareProfile | None,
        table: str,
        axes: tuple[str, ...],
        names: dict[str, Any],
        law: Callable[[Floats], Floats],
        device: str,
    ) -> None:
        self._law, self._sheet = law, f"roofline of {device}"
        self._model: GridInterpolator | None = None
        key = tuple(sorted((c, tuple(v) if isinstance(v, (list, tuple)) else v) for c, v in names.items()))
        fitted = _fitted(profile, table, axes, key) if profile is not None else None
        if fitted is not None:
            self._model, self._source = fitted

    @property
    def measured(self) -> bool:
        """Whether there are any rows."""
        return self._model is not None

    def seconds(self, *coords: Any) -> Seconds:
        """Seconds at coordinates (numbers or arrays of one shape), one argument per axis."""
        at = np.stack(np.broadcast_arrays(*(np.atleast_1d(np.asarray(c, float)) for c in coords)), -1)
        flat = at.reshape(-1, at.shape[-1])
        if self._model is None:
            value = self._law(flat)
            return Seconds(value.reshape(at.shape[:-1]), roofline.RELATIVE_ERROR, self._sheet, True)
        inside, near = self._model.nearest_covered(np.zeros(len(flat), np.int64), flat)
        places = np.concatenate([flat[inside], near[np.isfinite(near).all(2)]])
        answer = self._model.predict(np.zeros(len(places), np.int64), places, np.ones(len(places), bool))
        value, count = np.empty(len(flat)), int(inside.sum())
        value[inside] = answer.latency_us[:count]
        if outside := count < len(flat):
            value[~inside] = self._extended(flat[~inside], near, answer.latency_us[count:])
        source = f"{'measured' if answer.measured.all() and not outside else 'interpolated'}: {self._source}"
        error = self._model.relative_error
        if outside:
            source, error = source.replace("interpolated", "extrapolated"), max(error, roofline.RELATIVE_ERROR)
        value = np.where(np.isfinite(value), 1e-6 * value, self._law(flat))
        shape = at.shape[:-1]
        return Seconds(value.reshape(shape), error, source, outside, inside.reshape(shape))

    def _extended(self, coords_oA: Floats, near_oAA: Floats, latency_us: Floats) -> Floats:
        """Latencies at ``coords`` from those at places near them, in proportion to the law; of several places by the
        one that gives the least: from small work on, the law grows too fast, since part of the time was no work."""
        there = np.isfinite(near_oAA).all(2)
        value = np.full(there.shape, np.inf)
        asked = np.repeat(coords_oA[:, None], there.shape[1], 1)[there]
        value[there] = np.nan_to_num(latency_us, nan=np.inf) * self._law(asked) / self._law(near_oAA[there])
        least: Floats = value.min(1)
        return least
