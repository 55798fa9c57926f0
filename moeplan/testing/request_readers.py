"""What every reader of recorded requests must do: inherit the class and say how a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeplan.errors import TraceError
from moeplan.simulation.request_readers import RequestReader, read_requests

__all__ = ["RequestReaderContract"]


class RequestReaderContract:
    """Set ``reader`` and write ``write(path, rows)`` for rows ``(arrival_s, input_tokens, output_tokens)``."""

    reader: RequestReader
    suffix = ".csv"
    has_times = True

    def write(self, path: Path, rows: list[tuple[float, int, int]]) -> None:
        """Write the rows as this format has them."""
        raise NotImplementedError

    def _file(self, folder: Path, rows: list[tuple[float, int, int]]) -> Path:
        path = folder / f"requests{self.suffix}"
        self.write(path, rows)
        return path

    def test_reads_what_was_written(self, tmp_path: Path) -> None:
        """Lengths and, where there are, times from the first request on."""
        rows = [(3.0, 100, 7), (3.25, 1, 1), (63.5, 2048, 512)]
        path = self._file(tmp_path, rows)
        found = self.reader.read(path)
        assert found.input_tokens_Q.tolist() == [100, 1, 2048]
        assert found.output_tokens_Q.tolist() == [7, 1, 512]
        if self.has_times:
            assert found.arrival_s_Q is not None
            np.testing.assert_allclose(found.arrival_s_Q, [0.0, 0.25, 60.5], atol=1e-6)

    def test_is_recognised_and_says_where_from(self, tmp_path: Path) -> None:
        """Exactly this reader claims its file."""
        path = self._file(tmp_path, [(0.0, 5, 5)])
        origin: Any = read_requests(path).origin
        assert (origin["format"], origin["file"]) == (self.reader.name, path.name)
        assert len(origin["sha256"]) == 64

    def test_refuses_what_is_damaged(self, tmp_path: Path) -> None:
        """A request without tokens, and an empty recording, end in one message."""
        for rows in ([(0.0, 5, 5), (1.0, 0, 5)], []):
            path = self._file(tmp_path, rows)
            try:
                self.reader.read(path)
            except TraceError as error:
                assert "must be 1 or more" in str(error) or "zero arrivals" in str(error)  # noqa: PT017
            else:
                raise AssertionError(f"{self.reader.name} reads {rows} without an error")
