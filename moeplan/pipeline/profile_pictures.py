"""A profile as a page of pictures: measured points, the fit between them, what held-out points miss, and the roofline.

``n`` measured points of a curve, ``m`` points of its fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moeplan.artifacts.profile import HardwareProfile, load_profile
from moeplan.artifacts.profile_tables import columns_of
from moeplan.costs.interpolation import GridInterpolator
from moeplan.errors import SpecError
from moeplan.files import write_text
from moeplan.pipeline.profile_checks import vector_errors
from moeplan.pipeline.profile_peaks import peaks, roofline_us
from moeplan.pipeline.profile_series import FOLLOWS, NOT_KEY, residuals, series_of, usable_rows
from moeplan.profiling.sanity import SIZE_AXIS
from moeplan.progress import Progress, no_progress
from moeplan.reports.profile_figures import Curve, Picture, page, profile_picture

__all__ = ["show_profile"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_SPLIT = ("hidden", "op", "kind", "phase", "dtype", "direction")  # columns that tell pictures apart
_FIT_POINTS = 60


def show_profile(directory: Path, out: Path, most: int = 8, progress: Progress = no_progress) -> dict[str, Any]:
    """Write an HTML page with pictures of every table; at most ``most`` curves in one, longest series first.

    Raises:
        SpecError: ``out`` is not named as a page; ProfileError: the profile cannot be read; InputError: ``out`` cannot
        be written.
    """
    if out.suffix != ".html":
        raise SpecError(f"out ({out}) must end in .html: it becomes a page")
    profile = load_profile(directory)
    sections: list[tuple[str, list[str]]] = []
    names, single = profile.table_names, 0
    for number, name in enumerate(names):
        table = _Table(profile, name)
        pictures, single = table.pictures(most), single + table.single
        if name == "experts" and (vectors := _skewed_vectors(profile, most)):
            pictures.append(vectors)
        drawn = []
        for at, picture in enumerate(pictures):
            progress(name, (number + at / len(pictures)) / len(names))
            drawn.append(profile_picture(picture))
        if drawn:
            sections.append((name, drawn))
    facts = _facts(profile) + ([("not drawn", f"{single:,} series of one point")] if single else [])
    write_text(out, page(f"Profile {profile.meta.name}", facts, profile.meta.left_out, sections))
    count = sum(len(pictures) for _, pictures in sections)
    return {"out": str(out), "pictures": count, "warnings": profile.warnings}


def _skewed_vectors(profile: HardwareProfile, most: int) -> Picture | None:
    """Times of skewed vectors, and what the cost model misses of them, which here knows balanced rows alone."""
    found = sorted(vector_errors(profile), key=lambda each: -len(each[0]))
    if not found:
        return None
    table = _Table(profile, "experts", profile.select("experts", direction="forward"), ("ep", "distribution"))
    errors = {int(rows[0]): error for rows, error in found}
    drawn = [rows for rows, _ in found[:most]]
    curves = [table.curve(label, rows, "rank_pairs", errors[int(rows[0])]) for label, rows in table.labelled(drawn)]
    return Picture("experts, skewed vectors", table.alike(drawn, ()), len(found), "pairs on the rank", curves)


def _facts(profile: HardwareProfile) -> list[tuple[str, str]]:
    """What the page says ahead of the pictures; nothing that is not known."""
    meta = profile.meta
    facts = [("device", meta.device), ("driver", meta.driver), ("date", meta.date), ("command", meta.command)]
    facts += [(f"version of {k}", v) for k, v in meta.libraries.items()]
    for key, value in meta.system.items():
        facts.append((key.replace("_", " "), value if isinstance(value, str) else f"{value:,.12g}"))
    facts += [("roofline", peaks(profile)[2]), ("note", meta.note)]
    facts += [("warning", warning) for warning in profile.warnings]
    return [fact for fact in facts if fact[1]]


@dataclass(frozen=True, slots=True)
class _Fit:
    """The cost model's interpolation over all series of a table."""

    model: GridInterpolator

    def between(self, series: int, size_n: Floats) -> tuple[Floats, Floats]:
        """Sizes and microseconds there: whole sizes between those measured, which the fit answers by itself; of those
        measured the ends, and those that leave none between, which are answered by their measurement."""
        even = np.rint(np.geomspace(size_n[0], size_n[-1], _FIT_POINTS))
        close = np.diff(size_n) <= 1
        measured = size_n[np.r_[True, close] | np.r_[close, True]]
        size_m = np.union1d(np.setdiff1d(even, size_n), np.r_[size_n[[0, -1]], measured])
        return size_m, self.model.predict(np.full(len(size_m), series), size_m[:, None]).latency_us


class _Table:
    """Rows of one table, those that serve as series over its size or others, which ``untold`` columns do not label."""

    def __init__(
        self, profile: HardwareProfile, name: str, rows: pa.Table | None = None, untold: tuple[str, ...] = ()
    ) -> None:
        self._name, self._table = name, usable_rows(profile, name) if rows is None else rows
        self._rows: list[dict[str, Any]] = self._table.to_pylist()
        self._series = series_of(name, self._table)
        self._bandwidth, self._peak, _ = peaks(profile)
        skip = NOT_KEY | {SIZE_AXIS[name]} | FOLLOWS.get(name, set()) | set(untold)
        self._columns = [column for column in columns_of(name) if column not in skip]

    @property
    def single(self) -> int:
        """Series of one point."""
        return int((np.bincount(self._series) == 1).sum())

    def pictures(self, most: int) -> list[Picture]:
        """Curves gathered by the first columns that tell them apart, at most ``most`` in one; the others label them.
        Series of a single point are not drawn."""
        table = self._table
        if table.num_rows < 2:
            return []
        series, size = self._series, _column(table, SIZE_AXIS[self._name])
        fit = _Fit(GridInterpolator(series, size[:, None], _column(table, "latency_us")))
        residual = residuals(self._name, table, 2)[0]
        split = [column for column in self._told(range(len(series))) if column in _SPLIT]
        found: dict[str, list[Ints]] = {}
        for group in np.unique(series):
            index = np.flatnonzero(series == group)
            if len(index) > 1:
                row = self._rows[index[0]]
                title = ", ".join([self._name, *(_word(c, row[c]) for c in split)])
                found.setdefault(title, []).append(index[np.argsort(size[index])])

        pictures = []
        for title, groups in sorted(found.items()):
            longest = sorted(groups, key=lambda index: -len(index))[:most]
            axis = SIZE_AXIS[self._name]
            curves = [
                self.curve(label, index, axis, residual[index], fit.between(int(series[index[0]]), size[index]))
                for label, index in self.labelled(longest)
            ]
            same = self.alike(longest, split)
            pictures.append(Picture(title, same, len(groups), axis.replace("_", " "), curves))
        return pictures

    def _told(self, rows: Any) -> list[str]:
        return [c for c in self._columns if len({self._rows[i][c] for i in rows}) > 1]

    def alike(self, groups: list[Ints], split: Sequence[str]) -> str:
        """What the curves of a picture have in common, but for its title and what is so by default."""
        rows = [index[0] for index in groups]
        told, row, specs = self._told(rows), self._rows[rows[0]], columns_of(self._name)
        same = [c for c in self._columns if c not in (*told, *split) and row[c] != specs[c].default]
        return ", ".join(_word(c, row[c]) for c in same)

    def labelled(self, groups: list[Ints]) -> Iterator[tuple[str, Ints]]:
        """Groups in rising order of what tells them apart, which labels them."""
        told = self._told([index[0] for index in groups])
        for index in sorted(groups, key=lambda index: tuple(self._rows[index[0]][c] for c in told)):
            yield ", ".join(_word(c, self._rows[index[0]][c]) for c in told), index

    def curve(
        self, label: str, index: Ints, axis: str, error_n: Floats, fit: tuple[Floats, Floats] | None = None
    ) -> Curve:
        """Of the rows ``index`` over the column ``axis``, in its order."""
        order = np.argsort(_column(self._table, axis)[index], kind="stable")
        rows = [self._rows[i] for i in index[order]]
        size_n = np.array([row[axis] for row in rows], float)
        line = np.array([roofline_us(self._name, row, self._bandwidth, self._peak) for row in rows])
        us, spread, least, low = (
            np.array([row[c] for row in rows], float) for c in ("latency_us", "spread", "min_us", "p20_us")
        )
        moved = self._name in ("memory", "collectives")
        return Curve(
            label=label,
            size_n=size_n,
            latency_us_n=us,
            low_us_n=least,
            high_us_n=np.maximum(us, low + spread * us),
            fit_size_m=fit[0] if fit else np.array([]),
            fit_us_m=fit[1] if fit else np.array([]),
            residual_n=error_n[order],
            roofline_us_n=line if np.isfinite(line).all() else np.array([]),
            rate_n=size_n / us / 1e3 if moved else np.array([]),
        )


def _column(table: pa.Table, name: str) -> Floats:
    values: Floats = table[name].to_numpy().astype(float)
    return values


def _word(column: str, value: Any) -> str:
    """A column's value as a label says it: words stand for themselves."""
    if isinstance(value, str) and column not in ("kv_dtype", "gemm_dtype"):
        return value or f"no {column.replace('_', ' ')}"
    return f"{column.replace('_', ' ')} {value if isinstance(value, str) else f'{value:,}'}"
