from __future__ import annotations

import numpy as np  # noqa: F401 - its library's threads are those looked at
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from moeplan.pipeline.threads import single_threaded


def _threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_jobs_that_overlap_leave_the_threads_as_they_were() -> None:
    with threadpool_limits(2, "blas"):
        if _threads() != {2}:
            pytest.skip("the numeric library has one thread anyway")
        first, second = single_threaded(), single_threaded()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert _threads() == {1}
        second.__exit__(None, None, None)
        assert _threads() == {2}
