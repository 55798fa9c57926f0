"""The event log keeps every column through a file, and refuses what is none."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moeplan.artifacts.event_log import EventLog, EventRecorder
from moeplan.errors import InputError


def _log() -> EventLog:
    recorder = EventRecorder()
    recorder.add("experts", 0.5, 0.25, rank=3, layer=7, step=2, amount=40)
    recorder.add("finish", 1.0, request=9, amount=128)
    return recorder.build("measured", 4, 2, {"seed": 1})


def test_a_log_comes_back_whole_and_the_bytes_repeat(tmp_path):
    log = _log()
    for name in ("a", "b"):
        log.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = EventLog.read(tmp_path / "a")
    assert (back.source, back.num_ranks, back.num_nodes, back.origin) == ("measured", 4, 2, {"seed": 1})
    assert back.kind_names() == ["experts", "finish"]
    assert back.start_s_V.tolist() == [0.5, 1.0]
    assert back.duration_s_V.tolist() == [0.25, 0.0]
    assert back.rank_V.tolist() == [3, -1]
    assert back.layer_V.tolist() == [7, -1]
    assert back.step_V.tolist() == [2, -1]
    assert back.request_V.tolist() == [-1, 9]
    assert back.amount_V.tolist() == [40.0, 128.0]
    assert back.of_kind("finish", "arrival").tolist() == [False, True]


def test_an_empty_log_is_a_log(tmp_path):
    EventRecorder().build("simulated", 1, 1).write(tmp_path / "log")
    assert len(EventLog.read(tmp_path / "log")) == 0


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown event kind 'lunch'; known: step"):
        EventRecorder().add("lunch", 0.0)
    with pytest.raises(InputError, match="unknown event kind"):
        _log().of_kind("lunch")
    (tmp_path / "text").write_text("no")
    with pytest.raises(InputError, match="cannot be read as an event log"):
        EventLog.read(tmp_path / "text")
    with pytest.raises(InputError, match="cannot be read as an event log"):
        EventLog.read(tmp_path / "absent")
    pq.write_table(pa.table({"a": np.arange(3)}), tmp_path / "other")
    with pytest.raises(InputError, match="is not an event log"):
        EventLog.read(tmp_path / "other")
    _log().write(tmp_path / "old")
    table = pq.read_table(tmp_path / "old")
    head = table.schema.metadata[b"moeplan.event_log"].replace(b'"schema_version": 1', b'"schema_version": 9')
    pq.write_table(table.replace_schema_metadata({b"moeplan.event_log": head}), tmp_path / "old")
    with pytest.raises(InputError, match=r"schema_version \(9\) is not 1"):
        EventLog.read(tmp_path / "old")


def test_part_of_a_longer_run() -> None:
    inner = EventRecorder()
    inner.add("experts", 0.5, 1.0, rank=1, layer=1, step=0, amount=7)
    inner.add("dense", 0.0, 0.5, rank=0, step=0)
    inner.add("step", 0.0, 1.5, step=0)
    part = inner.build("simulated", 2, 1).part_of_run(10.0, rank=4, step=3, request=2, layers=(8, 9))
    assert part.kind_names() == ["experts", "dense"]
    assert part.start_s_V.tolist() == [10.5, 10.0]
    assert part.rank_V.tolist() == [5, 4]
    assert part.layer_V.tolist() == [9, -1]
    assert part.step_V.tolist() == [3, 3]
    assert part.request_V.tolist() == [2, 2]
    outer = EventRecorder()
    outer.add("step", 10.0, 2.0, step=3)
    whole = outer.build("simulated", 8, 1)
    joined = whole.joined(part)
    outer.extend(part)
    again = outer.build("simulated", 8, 1)
    for name in ("start_s_V", "kind_V", "rank_V", "layer_V", "step_V", "amount_V"):
        assert getattr(joined, name).tolist() == getattr(again, name).tolist()
    assert joined.num_ranks == 8
