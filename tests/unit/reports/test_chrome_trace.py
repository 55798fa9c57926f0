"""The Perfetto export: the structure that the format asks for, nothing lost, slices of a track nested or apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from moeplan.artifacts.event_log import EventLog, EventRecorder
from moeplan.errors import InputError
from moeplan.reports.against import predicted_against_measured
from moeplan.reports.chrome_trace import chrome_trace, write_chrome_trace


def _log() -> EventLog:
    r = EventRecorder()
    r.add("step", 0.0, 1.0, step=0, amount=64)
    for rank in (0, 1, 2, 3):
        r.add("forward", 0.0, 0.6, rank=rank, step=0)
        r.add("attention", 0.0, 0.2, rank=rank, layer=0, step=0)
        r.add("dispatch", 0.2, 0.1, rank=rank, layer=0, step=0, amount=1e6)
        r.add("shared", 0.1, 0.25, rank=rank, layer=0, step=0)  # crosses attention: needs a track of its own
        r.add("combine", 0.25, 0.2, rank=rank, layer=0, step=0)  # crosses dispatch
    r.add("arrival", 0.05, request=7, amount=100)
    r.add("admit", 0.1, rank=0, request=7)
    r.add("first_token", 0.5, rank=0, request=7)
    r.add("finish", 0.9, rank=0, request=7, amount=20)
    r.add("fault", 0.7, rank=3)
    r.add("loss", 1.0, step=0, amount=2.5)
    return r.build("simulated", 4, 2, {"seed": 3})


def test_what_viewers_need(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(_log(), path)
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    assert document["otherData"] == {"source": "simulated", "seed": "3"}
    count = Counter(event["ph"] for event in events)
    assert count["X"] == 1 + 4 * 5
    assert (count["b"], count["n"], count["e"], count["i"], count["C"]) == (1, 2, 1, 1, 1)
    for event in events:
        assert {"ph", "pid", "tid", "name"} <= set(event)
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] > 0
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == set(named)
    assert len(set(named.values())) == len(named)
    spans = [event for event in events if event.get("cat") == "request"]
    assert {event["id"] for event in spans} == {7}
    assert [event["ts"] for event in spans] == [5e4, 1e5, 5e5, 9e5]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "node 0", 1: "node 1", 2: "all"}


def test_slices_of_one_track_nest_or_follow() -> None:
    rng = np.random.default_rng(0)
    r = EventRecorder()
    for _ in range(400):
        r.add("experts", float(rng.uniform(0, 10)), float(rng.exponential(0.5)), rank=int(rng.integers(3)))
    tracks = defaultdict(list)
    for event in chrome_trace(r.build("measured", 3, 1))["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(len(slices) for slices in tracks.values()) == 400
    for slices in tracks.values():
        for i, (a, b) in enumerate(slices):
            for c, d in slices[i + 1 :]:
                assert b <= c + 1e-3 or d <= a + 1e-3 or (a <= c and d <= b + 1e-3) or (c <= a and b <= d + 1e-3)


def _run(source: str, scale: float, steps: int, ranks: int = 2) -> EventLog:
    r = EventRecorder()
    for step in range(steps):
        for rank in range(ranks):
            for layer in (0, 1):
                slow = 10.0 if source == "measured" and step == 0 else 1.0
                r.add("experts", step, scale * slow * (1 + rank), rank=rank, layer=layer, step=step)
        r.add("step", step, 5 * scale, step=step)
    return r.build("measured" if source == "measured" else "simulated", ranks, 1)


def test_predicted_against_measured_takes_the_busiest_rank_and_the_median_step() -> None:
    found = {a.kind: a for a in predicted_against_measured(_run("simulated", 0.9, 1), _run("measured", 1.0, 5))}
    assert set(found) == {"step", "experts"}
    assert found["experts"].measured_s == pytest.approx(4.0)  # two layers of two seconds on rank 1
    assert found["experts"].predicted_s == pytest.approx(3.6)
    assert found["experts"].error == pytest.approx(-0.1)


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="3 ranks and the measured one 2"):
        predicted_against_measured(_run("simulated", 1, 1, ranks=3), _run("measured", 1, 1))
    other = EventRecorder()
    other.add("migrate", 0.0, 1.0, rank=1, step=0)
    with pytest.raises(InputError, match="no kind of event in common"):
        predicted_against_measured(other.build("simulated", 2, 1), _run("measured", 1, 1))
