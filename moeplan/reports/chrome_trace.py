"""An event log as Chrome trace events in JSON, which ui.perfetto.dev and chrome://tracing open as they are.

Format: "Trace Event Format" (Google, 2016): complete events ``X`` with ``ts`` and ``dur`` in microseconds,
instants ``i``, asynchronous spans ``b``/``e`` for requests, counters ``C``, names as metadata ``M``. A node is a
process, a rank has one track per kind of resource, and further ones where slices would cross without nesting: viewers
draw a track as a stack.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.artifacts.event_log import EventLog
from moeplan.files import atomic_path

__all__ = ["chrome_trace", "write_chrome_trace"]

_EXCHANGE = frozenset(("dispatch", "combine", "transfer", "gradient_sync", "migrate"))
_REQUEST = frozenset(("arrival", "admit", "first_token", "finish", "preempt"))
_TRACKS = ("steps", "compute", "exchange")
_SLACK_US = 1e-6


class _Tracks:
    """Tracks of one rank: each slice goes where it nests or follows."""

    def __init__(self) -> None:
        self._open: list[list[float]] = []

    def place(self, start_us: float, end_us: float) -> int:
        """Number of the first track that takes the slice."""
        for number, ends in enumerate(self._open):
            while ends and ends[-1] <= start_us + _SLACK_US:
                ends.pop()
            if not ends or end_us <= ends[-1] + _SLACK_US:
                ends.append(end_us)
                return number
        self._open.append([end_us])
        return len(self._open) - 1


def _track(kind: str) -> int:
    if kind == "step":
        return 0
    return 2 if kind in _EXCHANGE else 1


def chrome_trace(log: EventLog) -> dict[str, Any]:
    """The trace as one JSON object: ``traceEvents`` and what the log was made from."""
    per_node = max(1, log.num_ranks // max(1, log.num_nodes))
    events: list[dict[str, Any]] = []
    tracks: dict[tuple[int, int], _Tracks] = {}
    named: dict[tuple[int, int], str] = {}
    names = log.kind_names()
    # Of slices that begin together the longer is the outer one.
    order = np.lexsort((-log.duration_s_V, log.start_s_V))
    for v in order:
        kind, rank = names[v], int(log.rank_V[v])
        start, length = float(log.start_s_V[v]) * 1e6, float(log.duration_s_V[v]) * 1e6
        node = rank // per_node if rank >= 0 else log.num_nodes
        fields: dict[str, Any] = {"layer": log.layer_V, "step": log.step_V, "request": log.request_V}
        details: dict[str, Any] = {name: int(column[v]) for name, column in fields.items() if column[v] >= 0}
        if log.amount_V[v]:
            details["amount"] = float(log.amount_V[v])
        common: dict[str, Any] = {"name": kind, "cat": kind, "pid": node, "ts": start, "args": details}
        if kind in _REQUEST and "request" in details:
            phase = {"arrival": "b", "finish": "e"}.get(kind, "n")
            who = {"name": "request", "cat": "request", "pid": log.num_nodes, "tid": 0, "id": details["request"]}
            events.append({**common, **who, "ph": phase, "args": details | {"event": kind}})
        elif kind == "loss":
            events.append({**common, "ph": "C", "tid": 0, "args": {"loss": float(log.amount_V[v])}})
        elif length == 0:
            events.append({**common, "ph": "i", "tid": _tid(rank, _track(kind), 0), "s": "p"})
        else:
            track = _track(kind)
            number = tracks.setdefault((rank, track), _Tracks()).place(start, start + length)
            tid = _tid(rank, track, number)
            owner = f"rank {rank}" if rank >= 0 else "all ranks"
            named[node, tid] = f"{owner} {_TRACKS[track]}" + (f" {number + 1}" if number else "")
            label = f"{kind}, layer {details['layer']}" if "layer" in details else kind
            events.append({**common, "name": label, "ph": "X", "dur": length, "tid": tid})
    return {
        "traceEvents": _metadata(log, named) + events,
        "displayTimeUnit": "ms",
        "otherData": {"source": log.source, **{name: str(value) for name, value in log.origin.items()}},
    }


def _tid(rank: int, track: int, number: int) -> int:
    """Track numbers sort by rank, then resource."""
    return (rank + 1) * 100 + track * 30 + min(number, 29)


def _metadata(log: EventLog, named: dict[tuple[int, int], str]) -> list[dict[str, Any]]:
    nodes = sorted({node for node, _ in named} | ({log.num_nodes} if log.of_kind(*sorted(_REQUEST)).any() else set()))
    answer = []
    for node in nodes:
        name = f"node {node}" if node < log.num_nodes else "all"
        answer.append({"ph": "M", "name": "process_name", "pid": node, "tid": 0, "args": {"name": name}})
        answer.append({"ph": "M", "name": "process_sort_index", "pid": node, "tid": 0, "args": {"sort_index": node}})
    for (node, tid), name in sorted(named.items()):
        answer.append({"ph": "M", "name": "thread_name", "pid": node, "tid": tid, "args": {"name": name}})
        answer.append({"ph": "M", "name": "thread_sort_index", "pid": node, "tid": tid, "args": {"sort_index": tid}})
    return answer


def write_chrome_trace(log: EventLog, path: Path) -> None:
    """Write the trace, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(chrome_trace(log), allow_nan=False), encoding="utf-8")

