"""Measured points to any point between them: robust kriging in log space on incomplete grids, with an honest error.

Points of one *series* (all names and types equal) lie on a grid over ``A`` numeric axes, the first being the
size (tokens, bytes). A latency is the sum, in logs, of a smooth part, of steps that all points with the same
coordinate on an axis share (one token count shows its tiles and waves at every width), of a step that sizes of
the same alignment share (the largest power of two in a size decides about padding), and of scatter:

    cov(p, q) = e^{-|p - q|} (1 + sum_a share_a [p_a = q_a] + share [align p = align q]) + noise [p = q]

with distances in logs over a length, the size counted also in tiles where that helps (in whole ones where the known
sizes tell steps from growth: powers of two alone do not), coordinates added that
say where the kernel's time jumps (``steps``: products have the idle part of the last wave), a share of its own for
equal alignment where that helps, and a linear trend along the axes and these counts of tiles (universal kriging:
Cressie, Statistics for Spatial Data, 1993, section 3.4; the exponential covariance interpolates linearly along one
axis). Scatter follows Student's t with 2 degrees of freedom, since a run that met a slow clock or a neighbour's
traffic is off by far more than the others: points that their neighbours contradict lose weight (iteratively
reweighted: Lange, Little and Taylor, JASA 84, 1989), slow ones more where slow runs are what scatters.

Each query is solved on its nearest neighbours only, few or many. Which of a few settings, or the plain log-log
line along the size, serves a table best is chosen by leaving out known points, once alone and once with all points
of their size: a query whose size stands nearby at another width is another task than one whose size stands nowhere.
What left-out points miss by is the error of every answer.

Shapes: ``n`` points, ``q`` queries, ``A`` axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.costs.grid import Grid
from moeplan.costs.kriging import krige

__all__ = ["TILES", "Estimates", "GridInterpolator", "Steps", "line"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_Near = tuple[Ints, Ints, NDArray[np.bool_]]  # some queries and their neighbours, as Grid.near gives them
Steps = Callable[[Ints, Floats], Floats]
"""Series [q] and coordinates [q, A] to further coordinates [q, D] that say where a kernel's time jumps."""

TILES = (64, 128, 256)
"""Rows of common tiles of a product."""

_TRIALS = (320, 1280)  # known points left out: one of twenty, within these bounds
_ROUNDS = ((4, 3), (1, 1))  # tried on a quarter of them, the three best settings on all
_TILE_TREND = 0.66  # weight of the counts of tiles in the trend, for one of 1 in the distance
_MAX_ALIGNMENT = 16
_NEIGHBOURS = (48, 80)  # few, many
_CHANGES: tuple[dict[str, Any], ...] = ({"late": 1.5}, {"align": 0.1}, {"wide": True})  # tried on the best setting


@dataclass(frozen=True, slots=True)
class _Setting:
    length: float  # in e-foldings of a coordinate
    share_size: float
    share_other: float
    noise: float
    scatter: float  # scale of the scatter, in e-foldings of latency
    tiles: float = 0.0  # weight of the size counted in tiles
    wide: bool = False  # more and farther neighbours: what scatters much needs many
    late: float = 1.0  # how much farther off a slow point counts than a fast one
    align: float | None = None  # share of an equal alignment, where it is not that of another coordinate

    @property
    def numbers(self) -> tuple[float, float, float, float, float, float, float]:
        """As :func:`krige` takes them."""
        align = self.share_other if self.align is None else self.align
        return self.length, self.share_size, self.share_other, align, self.noise, self.scatter, self.late


@dataclass(frozen=True, slots=True)
class _Choice:
    setting: _Setting
    use_line: bool  # the plain line serves better


# From smooth and quiet to stepped and noisy; shares and noise are ratios to the smooth part's variance.
_SETTINGS = (
    _Setting(30, 0.0003, 0.0003, 0.0003, 0.01),
    _Setting(30, 0.0003, 0.0003, 0.0003, 0.01, 0.5),
    _Setting(30, 0.001, 0.001, 0.001, 0.005),
    _Setting(30, 0.003, 0.003, 0.003, 0.02, 0.5),
    _Setting(30, 0.1, 0.003, 0.003, 0.02),
    _Setting(30, 0.03, 0.003, 0.003, 0.03),
    _Setting(5, 0.01, 0.01, 0.003, 0.01),
    _Setting(5, 0.01, 0.01, 0.01, 0.02),
    _Setting(2, 0.03, 0.03, 0.02, 0.02),
)


@dataclass(frozen=True, slots=True)
class Estimates:
    """Answers: microseconds, and whether measured points lie on all sides of the query."""

    latency_us: Floats
    inside: NDArray[np.bool_]
    measured: NDArray[np.bool_]
    relative_error: float


def line(x: Floats, y: Floats, at: Floats) -> Floats:
    """Log-log line through points sorted by ``x``; beyond the ends the last value."""
    return np.exp(np.interp(np.log(at), np.log(x), np.log(y)))


class GridInterpolator:
    """One table family (one kernel and type) as a function of its numeric axes. See the module.

    ``steps``: further coordinates, as far apart as the times across them are unlike.
    """

    def __init__(
        self,
        series_n: Ints,
        coords_nA: Floats,
        latency_us_n: Floats,
        seed: int = 0,
        steps: Steps | None = None,
    ) -> None:
        self._steps = steps
        self._x, self._y = np.log(coords_nA), np.log(latency_us_n)
        self._grid = Grid(series_n, self._x)
        sizes = np.unique(_sizes(self._x))
        classes, counts = np.unique(_alignment(sizes), return_counts=True)
        self._classes = classes[counts > 1]  # what one size alone shows may be the size's
        self._whole_tiles = np.array([_tells_tiles(sizes[sizes > tile], tile) for tile in TILES])
        self._own_places: dict[float, tuple[Floats, Floats, Ints]] = {}
        self._seed = seed

    # ------------------------------------------------------------------ answers

    def predict(self, series_q: Ints, coords_qA: Floats, inside: NDArray[np.bool_] | None = None) -> Estimates:
        """Latency at points of known series (``series_q`` as given when built).

        Measured points are answered by their measurement. Where not all sides have measured points ``inside`` is
        False and the answer is the trend's: the caller must extend the table from :meth:`nearest_covered` by a law it
        trusts, or refuse. ``inside`` where that is known.
        """
        names = np.searchsorted(self._grid.names, series_q)
        x = np.log(coords_qA)
        left, on = self._grid.place(names, x)
        rows = self._grid.at(names, left)
        measured = on.all(1) & (rows >= 0)
        answer = np.empty(len(x))
        answer[measured] = self._y[rows[measured]]
        rest = np.flatnonzero(~measured)
        if len(rest):
            answer[rest] = self._best(names[rest], x[rest])
        inside = (self._grid.covered(names, x) if inside is None else inside) & np.isfinite(answer)
        return Estimates(np.exp(answer), inside, measured, self.relative_error)

    def nearest_covered(self, series_q: Ints, coords_qA: Floats) -> tuple[NDArray[np.bool_], Floats]:
        """Whether measured points lie on all sides of each query, and for those where they do not [o, A, A] near places
        where they do, one moved along each axis; infinity where there is none."""
        names, x = np.searchsorted(self._grid.names, series_q), np.log(coords_qA)
        inside = self._grid.covered(names, x)
        return inside, np.exp(self._grid.nearest_covered(names[~inside], x[~inside]))

    def plain(self, series_q: Ints, coords_qA: Floats) -> Floats:
        """The log-log line along the size alone; nan where it has no two ends."""
        return np.exp(self._line(np.searchsorted(self._grid.names, series_q), np.log(coords_qA)))

    @property
    def relative_error(self) -> float:
        """What nine of ten left-out points miss by, at most: once left out alone, once with all of their size."""
        return self._chosen[1]

    # ------------------------------------------------------------------ choice of a setting

    @property
    def _trials(self) -> int:
        return int(np.clip(len(self._y) // 20, *_TRIALS))

    @cached_property
    def _chosen(self) -> tuple[list[_Choice], float]:
        """A choice for queries whose size stands nearby, one for those whose size stands nowhere near; their error."""
        picks = np.random.default_rng(self._seed).permutation(len(self._y))[: self._trials]
        names, x, y = self._grid.series[picks], self._x[picks], self._y[picks]
        straight = np.abs(self._line(names, x) - y)
        choices, misses = [], []
        for alone in (False, True):
            setting, own = self._tried(names, x, y, alone)
            both = np.isfinite(own) & np.isfinite(straight)
            use_line = bool(_cost(straight[both]) < _cost(own[both])) or not np.isfinite(own).any()
            choices.append(_Choice(setting, use_line))
            misses.append(np.where(np.isfinite(straight) & use_line, straight, own))
        kept = {choice.setting.tiles for choice in choices}
        self._own_places = {tiles: places for tiles, places in self._own_places.items() if tiles in kept}
        miss = np.concatenate(misses)
        miss = miss[np.isfinite(miss)]
        return choices, float(np.expm1(np.quantile(miss, 0.9))) if len(miss) else 1.0

    def _tried(self, names: Ints, x: Floats, y: Floats, alone: bool) -> tuple[_Setting, Floats]:
        """The setting that best predicts left-out points (``alone``: with all of their size), and its misses."""

        known: dict[bool, list[_Near]] = {}  # few and many

        def missed(setting: _Setting, trials: slice = slice(None)) -> Floats:
            if setting.wide not in known:
                known[setting.wide] = list(self._grid.near(names, x, setting.wide))
            first, last, _ = trials.indices(len(y))
            near = known[setting.wide]
            if last - first < len(y):
                near = [_between(part, first, last) for part in near]
            return np.abs(self._krige(names[trials], x[trials], setting, alone, near) - y[trials])

        settings, misses = list(_SETTINGS), [np.empty(0)] * len(_SETTINGS)
        done = 0
        for part, keep in _ROUNDS:
            trials = self._trials // part
            further = [missed(setting, slice(done, trials)) for setting in settings]
            misses = [np.append(*each) for each in zip(misses, further, strict=True)]
            order = np.argsort([_cost(miss) for miss in misses], kind="stable")[:keep]
            settings, misses, done = [settings[i] for i in order], [misses[i] for i in order], trials
        best, own = settings[0], misses[0]
        for change in _CHANGES:
            changed = replace(best, **change)
            miss = missed(changed)
            if _cost(miss) < _cost(own):
                best, own = changed, miss
        return best, own

    def _best(self, names: Ints, x: Floats) -> Floats:
        answer = np.empty(len(x))
        alone = self._alone(names, x)
        for number, choice in enumerate(self._chosen[0]):
            part = np.flatnonzero(alone == number)
            if len(part):
                own = self._krige(names[part], x[part], choice.setting)
                if choice.use_line or not np.isfinite(own).all():
                    straight = self._line(names[part], x[part])
                    own = np.where(np.isfinite(straight) & (choice.use_line | ~np.isfinite(own)), straight, own)
                answer[part] = own
        return answer

    def _line(self, names: Ints, x: Floats) -> Floats:
        """Log-log line through the nearest points below and above in size, the point itself left out."""
        low, high = self._grid.ends(names, x)
        ok = (low >= 0) & (high >= 0)
        low, high = low[ok], high[ok]
        x0, x1 = self._x[low, 0], self._x[high, 0]
        weight = (x[ok, 0] - x0) / (x1 - x0)
        answer = np.full(len(x), np.nan)
        answer[ok] = (1 - weight) * self._y[low] + weight * self._y[high]
        return answer

    def _alone(self, names: Ints, x: Floats) -> NDArray[np.bool_]:
        """Whether none of a query's neighbours has its size."""
        answer = np.empty(len(x), bool)
        for part, rows, equal in self._grid.near(names, x, False):
            answer[part] = (rows[:, equal] < 0).all(1)
        return answer

    def _krige(
        self, names: Ints, x: Floats, setting: _Setting, alone: bool = False, near: Iterable[_Near] | None = None
    ) -> Floats:
        """Kriging from the neighbours (``near``, where they are known), the point itself left out (``alone``: and all
        of its size); nan where it has fewer than two."""
        answer = np.full(len(x), np.nan)
        if setting.tiles not in self._own_places:
            self._own_places[setting.tiles] = self._places(self._grid.series, self._x, setting.tiles)
        points, queries = self._own_places[setting.tiles], self._places(names, x, setting.tiles, True)
        most = _NEIGHBOURS[setting.wide]
        for part, rows, equal in self._grid.near(names, x, setting.wide) if near is None else near:
            rows = rows[:, ~equal] if alone else rows
            asked = (array[part] for array in queries)
            answer[part] = krige(x.shape[1], *points, self._y, *asked, rows, most, setting.numbers)
        return answer

    def _places(self, names: Ints, x_nA: Floats, tiles: float, asked: bool = False) -> tuple[Floats, Floats, Ints]:
        """What the trend runs along: coordinates, and the size counted in tiles where these have a weight. What tells
        points apart: coordinates, with the counts added to the size, and further ones. The alignment of each size; one
        that a single size shows is no query's (``asked``)."""
        size = _sizes(x_nA)
        trend, place = x_nA, x_nA.copy()
        if tiles:
            parts = size[:, None] / np.array(TILES)
            counts = tiles * np.log(np.maximum(np.where(self._whole_tiles, np.ceil(parts), parts), 1))
            trend = np.hstack([x_nA, _TILE_TREND * counts])
            place[:, 0] += counts.sum(1)
        if self._steps is not None:
            place = np.hstack([place, self._steps(self._grid.names[names], np.exp(x_nA))])
        align = _alignment(size)
        if len(self._classes) < 2:
            return trend, place, np.zeros_like(align)
        return trend, place, np.where(np.isin(align, self._classes), align, 0 if asked else -align)


def _sizes(x_nA: Floats) -> Ints:
    sizes: Ints = np.clip(np.rint(np.exp(x_nA[:, 0])), 1, 2.0**60).astype(np.int64)
    return sizes


def _tells_tiles(sizes: Ints, tile: int) -> bool:
    """Whether ``sizes``, all beyond one tile, tell its steps from their own growth: two of them fill as many."""
    return len(np.unique(-(-sizes // tile))) < len(sizes)


def _alignment(size: Ints) -> Ints:
    return np.asarray(np.minimum(size & -size, _MAX_ALIGNMENT), np.int64)


def _between(near: _Near, first: int, last: int) -> _Near:
    """Those of the queries from ``first`` to before ``last``, numbered from there."""
    part, rows, equal = near
    mine = (part >= first) & (part < last)
    return part[mine] - first, rows[mine], equal


def _cost(miss: Floats) -> float:
    """One number for misses: the mean of their roots, which few large ones do not decide; infinite without any."""
    known = miss[np.isfinite(miss)]
    return float(np.sqrt(known).mean()) if len(known) else np.inf
