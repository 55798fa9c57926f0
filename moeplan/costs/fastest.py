"""The fastest of several measured kernels, at each point: what a framework that picks its kernels gets.

``q`` queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile
from moeplan.costs.tables import Seconds, TableCosts

__all__ = ["FastestTable"]

Floats = NDArray[np.float64]


class FastestTable:
    """One :class:`~moeplan.costs.tables.TableCosts` per kernel whose rows equal ``names``; the minimum answers.

    ``choices`` are further names tried in turn until one has rows, such as a framework's own and then anybody's;
    with none left the law answers. ``source`` says which kernels serve; ``smallest`` is the smallest measured size, on
    the first axis, 0 where there is none.
    """

    def __init__(
        self,
        profile: HardwareProfile | None,
        table: str,
        axes: tuple[str, ...],
        names: dict[str, Any],
        law: Callable[[Floats], Floats],
        device: str,
        choices: tuple[dict[str, Any], ...] = ({},),
    ) -> None:
        kernels: list[str] = []
        where = names
        for choice in choices:
            where = names | choice
            rows = None if profile is None else profile.select(table, **where)
            kernels = [] if rows is None else sorted(pc.unique(rows["kernel"]).to_pylist())
            if kernels:
                break
        self.measured = bool(kernels)
        self.source = ", ".join(kernels) or f"roofline of {device}"
        each = [where | {"kernel": kernel} for kernel in kernels] or [where]
        self.smallest, self._largest = 0.0, np.zeros(1)
        if rows is not None and kernels:
            of_kernel = rows.group_by("kernel").aggregate([(axes[0], "min"), (axes[0], "max")]).to_pylist()
            self.smallest = float(min(each[f"{axes[0]}_min"] for each in of_kernel))
            largest = {each["kernel"]: each[f"{axes[0]}_max"] for each in of_kernel}
            self._largest = np.array([float(largest[kernel]) for kernel in kernels])
        self._tables = [TableCosts(profile if kernels else None, table, axes, one, law, device) for one in each]

    def seconds(self, *coords: Any) -> Floats:
        """Seconds at coordinates, one argument per axis, all of one shape."""
        return self.told(*coords).value

    def told(self, *coords: Any) -> Seconds:
        """The same with the error and the source of the kernel that serves most of them. At each point those measured
        around it come before those that are extended to it, of which those serve that were measured furthest. On one
        axis those count as measured that end at half of the point, or begin after it."""
        each = [table.seconds(*coords) for table in self._tables]
        if len(each) == 1:
            return each[0]
        values, inside = np.stack([s.value for s in each]), np.stack([s.inside for s in each if s.inside is not None])
        largest = np.expand_dims(self._largest, tuple(range(1, values.ndim)))
        near = inside if len(coords) > 1 else inside | (np.broadcast_to(coords[0], values.shape[1:]) <= 2 * largest)
        far = 2 * largest < largest.max()
        values[np.where(near.any(0), ~near, np.broadcast_to(far, values.shape))] = np.inf
        serving = values.argmin(0).ravel()
        best = each[int(np.bincount(serving).argmax())]
        return replace(best, value=values.min(0), extrapolated=not inside.any(0).all())
