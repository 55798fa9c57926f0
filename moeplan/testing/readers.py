"""The contract of reader plugins: subclass :class:`TraceReaderContract`, give it ``reader`` and ``build``.

    class TestMine(TraceReaderContract):
        reader = my_package.reader

        def build(self, folder):
            path = folder / "dump.bin"
            ...  # write the documented layout by hand
            return Layout(path, load_LE=..., layer_ids=(1, 2))

``E`` experts, ``L`` layers.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import InputError
from moeplan.routing.loads import expert_load
from moeplan.routing.readers.base import ReadOptions, TraceReader, input_files

__all__ = ["Layout", "TraceReaderContract"]


@dataclass(frozen=True, slots=True)
class Layout:
    """A file (or directory) in the reader's format, and what must come out of it.

    ``experts_TLK`` is None where the format holds counts only. ``states_experts`` says whether the format
    names the number of experts.
    """

    path: Path
    load_LE: NDArray[Any]
    layer_ids: tuple[int, ...]
    experts_TLK: NDArray[Any] | None = None
    dropped_padding: int = 0
    states_experts: bool = True


class TraceReaderContract:
    """What holds for every reader."""

    reader: TraceReader

    def build(self, folder: Path) -> Layout:
        """Write a small recording in the documented layout into ``folder`` (empty), by hand."""
        raise NotImplementedError

    def _read(self, layout: Layout) -> RoutingTrace | ExpertLoad:
        return self.reader.read(layout.path, ReadOptions(num_experts=layout.load_LE.shape[1]))

    def test_is_a_reader_with_a_name_and_a_description(self) -> None:
        """The protocol."""
        assert isinstance(self.reader, TraceReader)
        assert self.reader.name
        assert self.reader.description
        assert isinstance(self.reader.has_domains, bool)

    def test_recognises_its_own_layout(self, tmp_path: Path) -> None:
        """Sniffing finds it."""
        assert self.reader.sniff(self.build(tmp_path).path)

    def test_sniffing_never_raises_and_claims_no_nonsense(self, tmp_path: Path) -> None:
        """Whatever the path and the bytes."""
        (tmp_path / "empty").mkdir()
        for name in ("x.bin", "x.txt", "x"):
            (tmp_path / name).write_bytes(b"\x00nonsense\xff" * 9)
        for name in ("x.bin", "x.txt", "x", "empty", "missing", "missing.npz", "missing/*.jsonl"):
            assert not self.reader.sniff(tmp_path / name)
        for suffix in ("npz", "npy", "pt", "jsonl", "json", "csv", "parquet", "safetensors"):
            (tmp_path / f"bad.{suffix}").write_bytes(b"\x00nonsense\xff" * 9)
            self.reader.sniff(tmp_path / f"bad.{suffix}")

    def test_reads_what_was_written(self, tmp_path: Path) -> None:
        """Loads, layer numbers, and tokens where there are any."""
        layout = self.build(tmp_path)
        result = self._read(layout)
        assert result.layer_ids == layout.layer_ids
        np.testing.assert_array_equal(expert_load(result).load_LE, layout.load_LE)
        if layout.experts_TLK is None:
            assert isinstance(result, ExpertLoad)
        else:
            assert isinstance(result, RoutingTrace)
            assert result.num_experts == layout.load_LE.shape[1]
            assert result.dropped_padding == layout.dropped_padding
            np.testing.assert_array_equal(result.experts_TLK, layout.experts_TLK)

    def test_a_trace_of_another_model_is_refused(self, tmp_path: Path) -> None:
        """The number of experts is compared with what the caller knows."""
        layout = self.build(tmp_path)
        experts = layout.load_LE.shape[1]
        wrong = experts * 2 if layout.states_experts else 1
        message = self._failure(layout.path, ReadOptions(num_experts=wrong))
        assert message is not None, f"read with num_experts {wrong}, recorded with {experts}"
        assert str(wrong) in message or "outside" in message

    def test_files_cut_off_are_refused(self, tmp_path: Path) -> None:
        """A file that ends early is never read as a smaller trace."""
        (tmp_path / "whole").mkdir()
        layout = self.build(tmp_path / "whole")
        for number, share in enumerate((0.0, 0.3, 0.6)):
            copy, last = self._copy(layout.path, tmp_path / f"cut{number}")
            content = last.read_bytes()
            last.write_bytes(content[: int(len(content) * share)])
            assert self._failure(copy) is not None, f"read with {last.name} cut to {share:.0%}"

    def test_damage_gives_a_clear_error_or_none(self, tmp_path: Path) -> None:
        """A changed byte gives a message or changes a value; it never gives a traceback."""
        (tmp_path / "whole").mkdir()
        layout = self.build(tmp_path / "whole")
        rng = np.random.default_rng(0)
        for number in range(24):
            copy, last = self._copy(layout.path, tmp_path / f"damage{number}")
            content = bytearray(last.read_bytes())
            content[int(rng.integers(len(content)))] ^= int(rng.integers(1, 256))
            last.write_bytes(bytes(content))
            self._failure(copy)  # anything but the project's own errors goes through and fails the test

    def _copy(self, path: Path, target: Path) -> tuple[Path, Path]:
        """A copy of the layout, and its last data file."""
        if path.is_dir():
            shutil.copytree(path, target)
            return target, sorted(p for p in target.iterdir() if p.suffix != ".json")[-1]
        target.mkdir()
        files = [target / file.name for file in input_files(path, path.suffix)]
        for file in files:
            shutil.copy(path.parent / file.name, file)
        return target / path.name, files[-1]

    def _failure(self, path: Path, options: ReadOptions | None = None) -> str | None:
        """The error's message (one line), or None where reading succeeds."""
        try:
            self.reader.read(path, options or ReadOptions())
        except InputError as error:
            message = str(error)
            assert message
            assert "\n" not in message
            return message
        return None
