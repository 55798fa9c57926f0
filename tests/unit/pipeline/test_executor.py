from __future__ import annotations

import os
from typing import Any

from moeplan.errors import SpecError, UnknownNameError
from moeplan.pipeline.executor import Failure, InlineExecutor, ProcessExecutor, executor_for


def _square(value: int) -> int:
    if value == 3:
        os._exit(9)
    if value == 4:
        raise SpecError("four is wrong")
    return value * value


def test_a_dead_worker_loses_its_own_case_only() -> None:
    found: dict[int, Any] = {}
    ProcessExecutor(2).run(_square, [1, 2, 3, 4, 5], found.__setitem__)
    assert [found[n] for n in (0, 1, 4)] == [1, 4, 25]
    assert isinstance(found[2], Failure)
    assert "died 2 times (exit code 9)" in found[2].reason
    assert found[3].reason == "four is wrong"
    assert isinstance(found[3].error, SpecError)


def test_processes_only_where_they_help() -> None:
    assert isinstance(executor_for(1, 10), InlineExecutor)
    assert isinstance(executor_for(8, 1), InlineExecutor)
    assert isinstance(executor_for(2, 2), ProcessExecutor)
    found: dict[int, Any] = {}
    InlineExecutor().run(_square, [2, 4], found.__setitem__)
    assert found[0] == 4
    assert found[1].reason == "four is wrong"


def _process(_value: int) -> int:
    return os.getpid()


def test_a_worker_takes_one_case_after_another() -> None:
    found: dict[int, Any] = {}
    ProcessExecutor(2).run(_process, range(6), found.__setitem__)
    assert sorted(found) == list(range(6))
    assert len(set(found.values())) == 2
    assert os.getpid() not in found.values()


def _unknown(_value: int) -> int:
    raise UnknownNameError("backend", "nosuch", ["vllm"])


def test_an_unknown_name_comes_back_from_a_worker_as_it_was_raised() -> None:
    found: dict[int, Any] = {}
    ProcessExecutor(2).run(_unknown, range(2), found.__setitem__)
    assert [type(found[n].error) for n in range(2)] == [UnknownNameError] * 2
    assert found[0].reason == "backend 'nosuch' is not known; choose one of: vllm"
