"""Points kept as they are measured, so that a killed run goes on where it stopped.

One JSON object a line: first what was measured on and how, then one point each with its samples. A line is
written whole and flushed at once; a last line cut short by a kill is dropped on reading.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplan.artifacts.profile_tables import MEASURED, columns_of
from moeplan.errors import ProfileError
from moeplan.files import canonical_json, read_lines

__all__ = ["Journal", "point_key"]

VERSION = 1


def _same_setup(path: Path, found: Any, expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        there = found.get(key) if isinstance(found, dict) else None
        if there != value:
            raise ProfileError(
                f"{path}: {key} ({there}) is not this run's ({value}); points of two setups do not mix:"
                f" {'give that command with --resume, ' * (key == 'command')}delete the file, or choose another --out"
            )


def _point(entry: Any) -> tuple[str, dict[str, Any], list[float]]:
    """Table, row and samples of a line. Raises ValueError, KeyError or TypeError where it is no measured point."""
    row, samples = entry["row"], entry["us"]
    own = {c: spec for c, spec in columns_of(entry["table"]).items() if c not in (*MEASURED, "source", "mark")}
    if not (
        isinstance(row, dict)
        and row.keys() <= own.keys()
        and all(spec.holds(row.get(name, spec.default)) for name, spec in own.items())
        and isinstance(samples, list)
        and samples
        and all(type(value) in (int, float) and 0 < value < math.inf for value in samples)
    ):
        raise ValueError
    return entry["table"], row, [float(value) for value in samples]


def point_key(table: str, row: Mapping[str, Any]) -> str:
    """What identifies a point: its table and all columns that are not measured."""
    return canonical_json([table, dict(row)])


class Journal:
    """Samples in microseconds by point. ``path`` None keeps them in memory only.

    Raises:
        ProfileError: another run's journal is there and ``resume`` is false; or it was written on another
            device, by other versions or by another command; or it is corrupt before its last line.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], resume: bool = False) -> None:
        self.path = path
        self.points: dict[str, tuple[str, dict[str, Any], list[float]]] = {}
        self.resumed = 0
        self._stream = None
        if path is None:
            return
        known = {"journal": VERSION, **header}
        if path.exists() and path.stat().st_size:
            if not resume:
                raise ProfileError(
                    f"{path} holds the points of an interrupted run; go on from them with --resume, or delete it"
                )
            self._read(path, known)
        self.resumed = len(self.points)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Rewritten rather than appended to: the last line may have been cut short.
            temporary = path.with_name(path.name + ".new")
            self._stream = temporary.open("w", encoding="utf-8")
            self._line(known)
            for table, row, samples in self.points.values():
                self._line({"table": table, "row": row, "us": samples})
            temporary.replace(path)
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def kept(self) -> str:
        """What to say of the points of a run that ends early; empty where there are none."""
        if not self.points:
            return ""
        where = f" in {self.path}" if self.path else ""
        return (
            f"{len(self.points)} points measured until then are kept{where}; the same command with --resume goes on"
        )

    def _unwritable(self, error: OSError) -> ProfileError:
        remedy = self.kept or "choose another --out"
        return ProfileError(f"cannot write {self.path}: {error.strerror or error}; {remedy}")

    def _read(self, path: Path, header: Mapping[str, Any]) -> None:
        lines = list(read_lines(path))
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                if number == len(lines) - 1 and number > 0:
                    return  # cut short by a kill
                entry = None
            try:
                if number == 0 and entry is not None:
                    _same_setup(path, entry, header)
                    continue
                table, row, samples = _point(entry)
                self.points[point_key(table, row)] = table, row, samples
            except (ValueError, KeyError, TypeError) as error:
                raise ProfileError(f"{path} line {number + 1} is not a measured point; delete the file") from error

    def _line(self, value: Mapping[str, Any]) -> None:
        if self._stream is not None:
            try:
                self._stream.write(json.dumps(value, separators=(",", ":")) + "\n")
                self._stream.flush()
            except OSError as error:  # a full disk
                raise self._unwritable(error) from error

    def samples(self, table: str, row: Mapping[str, Any]) -> list[float]:
        """Samples of a point so far; empty where it was not measured."""
        return self.points.get(point_key(table, row), ("", {}, []))[2]

    def add(self, table: str, row: Mapping[str, Any], samples: list[float]) -> None:
        """Add samples to a point and write all of them: the last line about a point holds.

        Raises:
            ProfileError: the file cannot be written.
        """
        merged = self.samples(table, row) + [round(value, 3) for value in samples]
        self._line({"table": table, "row": row, "us": merged})
        self.points[point_key(table, row)] = table, dict(row), merged

    def close(self, remove: bool = False) -> None:
        """Close the file; ``remove`` it once its points stand in a profile. A file without points is removed.

        Raises:
            ProfileError: the last points cannot be written.
        """
        if self._stream is not None:
            stream, self._stream = self._stream, None
            try:
                with stream:
                    os.fsync(stream.fileno())
            except OSError as error:
                raise self._unwritable(error) from error
        if (remove or not self.points) and self.path is not None:
            self.path.unlink(missing_ok=True)
