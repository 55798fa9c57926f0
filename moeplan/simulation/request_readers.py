"""Recorded requests into the house: Azure, Mooncake, and tables of lengths with or without times.

Readers are plugins by entry point (``moeplan.request_readers``); each has ``name``, ``description``, ``sniff`` and
``read``, see :class:`RequestReader`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moeplan.artifacts.request_trace import RequestTrace
from moeplan.errors import InputError, TraceError
from moeplan.files import read_lines, sha256_file
from moeplan.registry import load_plugin, plugin_names

_MOST_TOKENS = 10**12

__all__ = ["RequestReader", "azure", "mooncake", "read_requests", "table"]


@runtime_checkable
class RequestReader(Protocol):
    """A reader of recorded requests."""

    name: str
    description: str

    def sniff(self, path: Path) -> bool:
        """Whether the file looks like this reader's format."""
        ...

    def read(self, path: Path) -> RequestTrace:
        """The requests in order of arrival.

        Raises:
            TraceError: damaged; the message gives the line.
        """
        ...


def read_requests(path: Path, format: str | None = None) -> RequestTrace:
    """Recorded requests from any file a reader knows; ``origin`` names format, file and sha256.

    Raises:
        TraceError: no such file, damaged, or no reader claims it. UnknownNameError: no reader is called ``format``.
    """
    if not path.is_file():
        raise TraceError(f"requests file {path} does not exist")
    names = [format] if format else plugin_names("request_readers")
    readers: list[RequestReader] = [load_plugin("request_readers", name) for name in names]
    claims = readers if format else [reader for reader in readers if reader.sniff(path)]
    if len(claims) != 1:
        said = f"could be {' or '.join(r.name for r in claims)}" if claims else "is in no format known here"
        raise TraceError(f"{path} {said}; name its format: {', '.join(names)}")
    try:
        found = claims[0].read(path)
    except TraceError as error:
        if str(error).startswith(str(path)):
            raise
        raise TraceError(f"{path}: {error}") from error
    origin = {"format": claims[0].name, "file": path.name, "sha256": sha256_file(path)}
    return replace(found, origin=origin)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a CSV file with a header, or of JSON lines."""
    lines = read_lines(path)
    if path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise TraceError(f"{path} line {number} is not a JSON object: {error}") from error
            if not isinstance(row, dict):
                raise TraceError(f"{path} line {number} is not a JSON object")
            yield f"{path} line {number}", row
        return
    try:
        reader = csv.DictReader(line.decode("utf-8-sig") for line in lines)
        for number, row in enumerate(reader, 2):
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise TraceError(f"{path} line {number} does not have the header's {columns} columns")
            yield f"{path} line {number}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise TraceError(f"{path} is not a table of comma-separated values: {error}") from error


def _number(place: str, row: dict[str, Any], column: str) -> float:
    value = row.get(column)
    try:
        if isinstance(value, bool) or value is None or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise TraceError(f"{place}: {column} ({value!r}) is not a number") from None


def _time(place: str, row: dict[str, Any], column: str) -> float:
    """Seconds since 1970 of a date and time, of UTC where it does not say."""
    text = str(row.get(column))
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise TraceError(f"{place}: {column} ({text!r}) is not a time") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _whole(place: str, row: dict[str, Any], column: str) -> int:
    value = _number(place, row, column)
    if not value.is_integer() or abs(value) > _MOST_TOKENS:
        raise TraceError(f"{place}: {column} ({value:g}) is not a whole number of tokens")
    return int(value)


def _first(path: Path) -> set[str]:
    """Names of the columns: a table's header, or the keys of the first JSON line."""
    try:
        if path.suffix in (".jsonl", ".json"):
            return set(next(iter(_rows(path)), ("", {}))[1])
        line = next(iter(read_lines(path)), b"").decode("utf-8-sig")
        return {name.strip() for name in next(csv.reader([line]), [])}
    except (InputError, UnicodeDecodeError, csv.Error):
        return set()


def _tokens(values: list[int]) -> Any:
    return np.array(values, np.int64)


class _Azure:
    """AzurePublicDataset: ``TIMESTAMP, ContextTokens, GeneratedTokens``; times with a zone or without."""

    name = "azure"
    description = "Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens)"

    def sniff(self, path: Path) -> bool:
        return {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= _first(path)

    def read(self, path: Path) -> RequestTrace:
        times, inputs, outputs = [], [], []
        for place, row in _rows(path):
            times.append(_time(place, row, "TIMESTAMP"))
            inputs.append(_whole(place, row, "ContextTokens"))
            outputs.append(_whole(place, row, "GeneratedTokens"))
        at = np.array(times)
        return RequestTrace(_tokens(inputs), _tokens(outputs), at - at[0] if len(at) else at)


class _Mooncake:
    """kvcache-ai/Mooncake: milliseconds, lengths, and one hash per 512 tokens of the prompt."""

    name = "mooncake"
    description = "Mooncake trace (JSON lines: timestamp, input_length, output_length, hash_ids)"
    BLOCK = 512

    def sniff(self, path: Path) -> bool:
        return {"timestamp", "input_length", "output_length", "hash_ids"} <= _first(path)

    def read(self, path: Path) -> RequestTrace:
        times, inputs, outputs, prefixes = [], [], [], []
        for place, row in _rows(path):
            times.append(_number(place, row, "timestamp") / 1e3)
            inputs.append(_whole(place, row, "input_length"))
            outputs.append(_whole(place, row, "output_length"))
            ids = row.get("hash_ids")
            if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
                raise TraceError(f"{place}: hash_ids must be a list of whole numbers")
            if len(ids) > -(-inputs[-1] // self.BLOCK):
                raise TraceError(
                    f"{place}: {len(ids)} hash_ids are more than the {inputs[-1]} tokens fill at {self.BLOCK} each"
                )
            prefixes.append(tuple(ids))
        at = np.array(times)
        start = at[0] if len(at) else 0.0
        return RequestTrace(_tokens(inputs), _tokens(outputs), at - start, tuple(prefixes), self.BLOCK)


_INPUT = ("input_tokens", "input_toks", "num_prefill_tokens", "input_length", "prompt_tokens")
_OUTPUT = ("output_tokens", "output_toks", "num_decode_tokens", "output_length", "completion_tokens")
_ARRIVAL = {
    "arrival_s": 1.0, "arrived_at": 1.0, "arrival_time_ns": 1e-9, "arrival_ms": 1e-3,
    "timestamp": 1e-3,  # as in Mooncake's traces, and where AIPerf and Dynamo replay some; or a date and time
}  # fmt: skip


class _Table:
    """Any table of lengths, with or without arrival times; ShareGPT lengths and Vidur's files among them."""

    name = "table"
    description = (
        f"CSV or JSON lines with one of {', '.join(_INPUT)}; one of {', '.join(_OUTPUT)};"
        f" and, where times are known, one of {', '.join(_ARRIVAL)} (milliseconds, or dates and times)"
    )

    def sniff(self, path: Path) -> bool:
        names = _first(path)
        return bool(set(_INPUT) & names and set(_OUTPUT) & names) and "hash_ids" not in names

    def read(self, path: Path) -> RequestTrace:
        inputs, outputs, times = [], [], []
        names: tuple[str, str, str | None] | None = None
        for place, row in _rows(path):
            if names is None:
                found = [next((c for c in wanted if c in row), None) for wanted in (_INPUT, _OUTPUT, tuple(_ARRIVAL))]
                if found[0] is None or found[1] is None:
                    raise TraceError(f"{place}: needs one of {', '.join(_INPUT)} and one of {', '.join(_OUTPUT)}")
                names = (found[0], found[1], found[2])
            inputs.append(_whole(place, row, names[0]))
            outputs.append(_whole(place, row, names[1]))
            if names[2] == "timestamp" and ":" in str(row.get("timestamp")):
                times.append(_time(place, row, names[2]))
            elif names[2] is not None:
                times.append(_number(place, row, names[2]) * _ARRIVAL[names[2]])
        at = np.array(times) - times[0] if times else None
        return RequestTrace(_tokens(inputs), _tokens(outputs), at)


azure, mooncake, table = _Azure(), _Mooncake(), _Table()
