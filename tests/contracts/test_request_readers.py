from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from moeplan.errors import TraceError, UnknownNameError
from moeplan.registry import plugin_names
from moeplan.simulation.request_readers import azure, mooncake, read_requests, table
from moeplan.testing.request_readers import RequestReaderContract

MOONCAKE = '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}'


class TestAzure(RequestReaderContract):
    reader = azure

    def write(self, path: Path, rows: list[tuple[float, int, int]]) -> None:
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        for at, inputs, outputs in rows:
            stamp = datetime.fromtimestamp(1.7e9 + at, UTC)
            lines.append(f"{stamp:%Y-%m-%d %H:%M:%S}.{stamp.microsecond:06d}0,{inputs},{outputs}")
        path.write_text("\n".join(lines) + "\n")


class TestMooncake(RequestReaderContract):
    reader = mooncake
    suffix = ".jsonl"

    def write(self, path: Path, rows: list[tuple[float, int, int]]) -> None:
        path.write_text(
            "".join(
                json.dumps({"timestamp": at * 1000, "input_length": i, "output_length": o, "hash_ids": [1][:i]}) + "\n"
                for at, i, o in rows
            )
        )


class TestTable(RequestReaderContract):
    reader = table

    def write(self, path: Path, rows: list[tuple[float, int, int]]) -> None:
        lines = ["input_toks,output_toks,arrival_time_ns", *(f"{i},{o},{round(at * 1e9)}" for at, i, o in rows)]
        path.write_text("\n".join(lines) + "\n")


class TestTableWithoutTimes(RequestReaderContract):
    reader, suffix, has_times = table, ".jsonl", False

    def write(self, path: Path, rows: list[tuple[float, int, int]]) -> None:
        path.write_text("".join(json.dumps({"input_tokens": i, "output_tokens": o}) + "\n" for _, i, o in rows))


def test_every_reader_has_a_contract_class() -> None:
    tested = {cls.reader.name for cls in RequestReaderContract.__subclasses__()}
    assert set(plugin_names("request_readers")) == tested


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "input_tokens,output_tokens\n5,five\n", r"a.csv line 2: output_tokens \('five'\) is not a number"),
        ("a.csv", "input_tokens,output_tokens\n5\n", "line 2 does not have the header's 2 columns"),
        ("a.csv", "input_tokens,output_tokens\n5.5,1\n", r"input_tokens \(5.5\) is not a whole number"),
        ("a.csv", "timestamp,input_tokens,output_tokens\nten,5,2\n", r"line 2: timestamp \('ten'\) is not a number"),
        ("a.csv", "timestamp,input_tokens,output_tokens\n10:99,5,2\n", r"line 2: timestamp \('10:99'\) is not a time"),
        ("a.csv", "x,y\n1,2\n", "is in no format known here; name its format: azure, mooncake, table"),
        ("a.jsonl", f"{MOONCAKE}\n", "2 hash_ids are more"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\n2,1,1\n1,1,1\n", "a.csv: request 1 arrives before the one"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\n0,1,0\n", r"a.csv: request 0: output_tokens \(0\) must be 1"),
        ("a.csv", "input_tokens,output_tokens\nnan,1\n", r"line 2: input_tokens \('nan'\) is not a number"),
        ("a.csv", "input_tokens,output_tokens\n1,1e30\n", r"line 2: output_tokens \(1e\+30\) is not a whole number"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\ninf,1,1\n", r"line 2: arrival_s \('inf'\) is not a number"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", r"TIMESTAMP \('yesterday'\)"),
    ],
)  # fmt: skip
def test_damaged_files_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_requests(path)


def test_times_with_a_zone(tmp_path: Path) -> None:
    rows = ("2024-05-10 00:00:00.009930+00:00,5,1", "2024-05-10 00:00:01+00:00,5,1")
    (tmp_path / "a.csv").write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *rows)))
    found = read_requests(tmp_path / "a.csv")
    assert found.arrival_s_Q is not None
    assert found.arrival_s_Q.tolist() == pytest.approx([0.0, 0.99007])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "timestamp,input_tokens,output_tokens\n100,5,2\n1600,6,3\n"),
        ("a.csv", "timestamp,input_tokens,output_tokens\n2026-11-30 10:00:00.5,5,2\n2026-11-30T10:00:02+00:00,6,3\n"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 5, "output_length": 2}\n'
                    '{"timestamp": 1500.0, "input_length": 6, "output_length": 3}\n'),
    ],
)  # fmt: skip
def test_timestamps_of_a_table_are_milliseconds_or_dates(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = read_requests(tmp_path / name)
    assert found.arrival_s_Q == pytest.approx([0.0, 1.5])
    assert found.input_tokens_Q.tolist() == [5, 6]


def test_unknown_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist"):
        read_requests(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("input_tokens,output_tokens\n1,1\n")
    with pytest.raises(UnknownNameError, match="did you mean 'azure'"):
        read_requests(tmp_path / "a.csv", "azur")


def test_public_recordings(data_dir: Path) -> None:
    found = {path.name: read_requests(path) for path in sorted((data_dir / "workloads").iterdir())}
    assert sorted(len(trace) for trace in found.values()) == [300, 8819, 12031, 28257]
    conversation = found["conversation_trace.jsonl"]
    assert conversation.prefix_Q is not None
    assert conversation.arrival_s_Q is not None
    assert conversation.arrival_s_Q[-1] == pytest.approx(3536.999)
    code = found["AzureLLMInferenceTrace_code.csv"]
    assert code.input_tokens_Q.mean() == pytest.approx(2047.848282118154)
