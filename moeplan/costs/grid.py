"""Points of a measured table on incomplete grids, and those near a place between or on their values.

Points of one series lie on a grid over ``A`` numeric axes, the first being the size; not every place of it is taken.
Shapes: ``n`` points, ``q`` queries, ``b`` neighbours of a query, ``S`` series, ``V`` grid values. Coordinates are logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAME", "Grid"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SAME = 1e-9
"""Log coordinates that differ by no more are one value."""
_CHUNK = 4096  # queries looked up together
_FEW = 256  # queries tried at every value of an axis together


@cache
def _offsets(on_grid: tuple[bool, ...], wide: bool) -> Ints:
    """(b, A) grid steps to neighbours, nearest first, from the value at or below the query on each axis."""
    choices = []
    for axis, on in enumerate(on_grid):
        reach = 4 if axis == 0 else 2 + wide
        if on:
            choices.append([(step, abs(step)) for step in range(-reach, reach + 1)])
        else:
            choices.append([(step, max(-step, step - 1)) for step in range(1 - reach, reach + 1)])
    off = sum(not on for on in on_grid[1:])
    found = sorted(
        (sum(cost for _, cost in steps), [step for step, _ in steps])
        for steps in product(*choices)
        if sum(cost for _, cost in steps[1:]) <= max(0, 2 + wide - off)
    )
    return np.array([steps for cost, steps in found if cost <= 4 + wide], np.int64)


class Grid:
    """Where points lie. ``names`` [S] are the series, sorted; ``series`` [n] each point's place among them.

    ``lowest`` and ``highest`` [S, A] bound the values of a series.
    """

    def __init__(self, series_n: Ints, x_nA: Floats) -> None:
        self.names, self.series = np.unique(series_n, return_inverse=True)
        self._values, index = self._index(x_nA)
        self.lowest = self._values[:, :, 0]
        self.highest = np.where(np.isfinite(self._values), self._values, -np.inf).max(2)
        self._row = np.full((len(self.names), *(index.max(0) + 1)), -1, np.int64)
        self._row[(self.series, *index.T)] = np.arange(len(x_nA))

    def _index(self, x_nA: Floats) -> tuple[Floats, Ints]:
        """Sorted values of each series and axis [S, A, V], padded with infinity; each point's place there."""
        index = np.empty(x_nA.shape, np.int64)
        columns = []
        for axis in range(x_nA.shape[1]):
            values, codes = np.unique(x_nA[:, axis], return_inverse=True)
            pairs, place = np.unique(self.series * len(values) + codes, return_inverse=True)
            owner = pairs // len(values)
            first = np.searchsorted(owner, np.arange(len(self.names)))
            index[:, axis] = place - first[self.series]
            column = np.full((len(self.names), np.bincount(owner).max()), np.inf)
            column[owner, np.arange(len(pairs)) - first[owner]] = values[pairs % len(values)]
            columns.append(column)
        widest = max(column.shape[1] for column in columns)
        padded = [np.pad(c, ((0, 0), (0, widest - c.shape[1])), constant_values=np.inf) for c in columns]
        return np.stack(padded, 1), index

    def place(self, names: Ints, x: Floats) -> tuple[Ints, Bools]:
        """Grid places of the values at or below a query [q, A] on each axis, and whether they are its values."""
        values = self._values[names]
        left = (values <= x[:, :, None] + SAME).sum(2) - 1
        at = np.take_along_axis(values, np.maximum(left, 0)[:, :, None], 2)[:, :, 0]
        return left, np.abs(at - x) <= SAME

    def at(self, names: Ints, index: Ints) -> Ints:
        """Rows of points at grid places ``index`` [..., A]; -1 where there is none."""
        shape = np.array(self._row.shape[1:])
        there = ((index >= 0) & (index < shape)).all(-1)
        safe = np.clip(index, 0, shape - 1)
        rows: Ints = self._row[(names.reshape(-1, *[1] * (index.ndim - 2)), *np.moveaxis(safe, -1, 0))]
        return np.where(there, rows, -1)

    @cached_property
    def _directions(self) -> Ints:
        """(2^A, A) up (1) or down (0) on each axis."""
        return np.array(list(product((0, 1), repeat=self._row.ndim - 1)))

    @cached_property
    def _sides(self) -> Ints:
        """One bit per direction at each place: whether a point lies there or further in this direction, on all axes."""
        bits = np.zeros(self._row.shape, np.int64)
        for number, upward in enumerate(self._directions):
            there = self._row >= 0
            for axis, up in enumerate(upward, 1):
                turned = np.flip(there, axis) if up else there
                there = np.logical_or.accumulate(turned, axis)
                there = np.flip(there, axis) if up else there
            bits += there.astype(np.int64) << number
        return bits

    def covered(self, names: Ints, x: Floats) -> Bools:
        """Whether points lie on all sides of a query: one at or beyond it on all axes, in each direction."""
        low, on = self.place(names, x)
        high, shape = low + ~on, np.array(self._sides.shape[1:])
        answer = np.asarray(((low >= 0) & (high < shape)).all(1))
        steps = np.append(np.cumprod(shape[:0:-1])[::-1], 1)
        low, high = low[answer], high[answer]
        place = (low[:, None] + (high - low)[:, None] * self._directions) @ steps + names[answer, None] * shape.prod()
        answer[answer] = (self._sides.ravel()[place] >> np.arange(len(self._directions)) & 1).all(1)
        return answer

    def nearest_covered(self, names: Ints, x: Floats) -> Floats:
        """[q, A, A] the nearest places to a query that are :meth:`covered`: its own, moved into the values of its
        series, where that is; else one along each axis, infinity where there is none; else the nearest point, A times.
        """
        x = np.clip(x, self.lowest[names], self.highest[names])
        near = np.repeat(x[:, None], x.shape[1], 1)
        beyond = np.flatnonzero(~self.covered(names, x))
        for start in range(0, len(beyond), _FEW):
            part = beyond[start : start + _FEW]
            for axis in range(x.shape[1]):
                near[part, axis] = self._along(axis, names[part], x[part])
        for query in np.flatnonzero(np.isinf(near).all((1, 2))):
            places = np.argwhere(self._row[names[query]] >= 0)
            points = np.stack([self._values[names[query], axis][place] for axis, place in enumerate(places.T)], 1)
            near[query] = points[np.abs(points - x[query]).sum(1).argmin()]
        return near

    def _along(self, axis: int, names: Ints, x: Floats) -> Floats:
        values = self._values[names, axis]
        tried = np.repeat(x[:, None], values.shape[1], 1)
        tried[:, :, axis] = np.where(np.isfinite(values), values, x[:, axis, None])
        covered = self.covered(np.repeat(names, values.shape[1]), tried.reshape(-1, x.shape[1])).reshape(values.shape)
        apart = np.where(covered, np.abs(values - x[:, axis, None]), np.inf)
        nearest = tried[np.arange(len(x)), apart.argmin(1)]
        return np.where(np.isfinite(apart.min(1))[:, None], nearest, np.inf)

    def ends(self, names: Ints, x: Floats) -> tuple[Ints, Ints]:
        """Rows of the nearest points below and above in size, all else equal, the very place left out; -1 for none."""
        left, on = self.place(names, x)
        found = []
        for direction in (-1, 1):
            row = np.full(len(x), -1, np.int64)
            for distance in range(1, 4):
                steps = np.zeros_like(left)
                steps[:, 0] = np.where(on[:, 0], direction * distance, distance if direction > 0 else 1 - distance)
                row = np.where(row < 0, self.at(names, left + steps), row)
            found.append(np.where(on[:, 1:].all(1), row, -1))
        return found[0], found[1]

    def near(self, names: Ints, x: Floats, wide: bool) -> Iterator[tuple[Ints, Ints, Bools]]:
        """Some queries, the rows of their neighbours [q, b], nearest first, the very place left out, and which of the b
        have the query's size; -1 where there is none. ``wide``: more and farther ones."""
        left, on = self.place(names, x)
        code = on @ (1 << np.arange(on.shape[1]))
        for pattern in np.unique(code):
            members = np.flatnonzero(code == pattern)
            on_grid = tuple(on[members[0]].tolist())
            offsets = _offsets(on_grid, wide)
            if all(on_grid):
                offsets = offsets[offsets.any(1)]
            for start in range(0, len(members), _CHUNK):
                part = members[start : start + _CHUNK]
                rows = self.at(names[part], left[part][:, None, :] + offsets)
                yield part, rows, on_grid[0] & (offsets[:, 0] == 0)
