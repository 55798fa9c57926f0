"""Any trace or load file into the house: the reader is named or found by sniffing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moeplan.artifacts.expert_load import ExpertLoad
from moeplan.artifacts.routing_trace import RoutingTrace
from moeplan.errors import InputError, TraceError
from moeplan.files import sha256_file
from moeplan.progress import Progress, no_progress
from moeplan.registry import load_plugin, plugin_names
from moeplan.routing.loads import expert_load, stream_load
from moeplan.routing.readers.base import ReadOptions, TraceReader, is_glob

__all__ = ["convert_trace", "find_reader", "read_load", "read_trace", "save_trace"]


@runtime_checkable
class _BatchReader(Protocol):
    def batches(self, path: Path, options: ReadOptions) -> Iterator[RoutingTrace]: ...


def find_reader(path: Path, format: str | None = None) -> TraceReader:
    """The reader called ``format``, or the one whose sniffing claims ``path``.

    Raises:
        UnknownNameError: no reader is called ``format``.
        TraceError: ``path`` does not exist, no reader claims it, or more than one does.
    """
    if not path.exists() and not is_glob(path):
        raise TraceError(f"trace {path} does not exist; give a file, a directory or a pattern ('dir/*.jsonl')")
    if format is not None:
        named: TraceReader = load_plugin("trace_readers", format)
        return named
    names = plugin_names("trace_readers")
    readers: list[TraceReader] = [load_plugin("trace_readers", name) for name in names]
    claims = [reader for reader in readers if reader.sniff(path)]
    if len(claims) != 1:
        said = f"could be {' or '.join(r.name for r in claims)}" if claims else "is in no format known here"
        raise TraceError(f"{path} {said}; name its format: {', '.join(names)}")
    return claims[0]


def _reader_for(path: Path, format: str | None, domain: str | None) -> TraceReader:
    reader = find_reader(path, format)
    if domain is not None and not reader.has_domains:
        raise TraceError(f"{path} ({reader.name}) has no domains to choose '{domain}' from; leave the domain out")
    return reader


def _fingerprint(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    files = path.iterdir() if path.is_dir() else path.parent.glob(path.name)
    digest = hashlib.sha256()
    for file in sorted(p for p in files if p.is_file()):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _origin(path: Path, reader: TraceReader, inner: Any) -> dict[str, Any]:
    return {**inner, "format": reader.name, "file": path.name, "sha256": _fingerprint(path)}


def read_trace(
    path: Path, *, format: str | None = None, domain: str | None = None, num_experts: int | None = None
) -> RoutingTrace | ExpertLoad:
    """Read a trace (token level) or a load (counts), whichever the file holds.

    ``domain`` picks one of several domains; ``num_experts`` is the model's, used where the file is silent
    and compared where it is not. ``origin`` of the result names the format, the file and its sha256.

    Raises:
        TraceError: the file cannot be used; one message with the place and the remedy.
        UnknownNameError: no reader is called ``format``.
    """
    path = Path(path)
    reader = _reader_for(path, format, domain)
    try:
        result = reader.read(path, ReadOptions(domain=domain, num_experts=num_experts))
    except TraceError as error:
        raise error if path.name in str(error) else TraceError(f"{path}: {error}") from error
    except InputError as error:  # a file-level message is about the trace here
        raise TraceError(str(error)) from error
    return replace(result, origin=_origin(path, reader, result.origin))


def read_load(
    path: Path,
    *,
    format: str | None = None,
    domain: str | None = None,
    num_experts: int | None = None,
    windows: str = "all",
    keep_tokens: bool = True,
) -> ExpertLoad:
    """Read a file as a load. ``keep_tokens=False`` streams formats that come in batches and holds counts.

    Raises:
        TraceError, UnknownNameError: as :func:`read_trace` and :func:`moeplan.routing.loads.expert_load`.
    """
    path = Path(path)
    reader = _reader_for(path, format, domain)
    if not keep_tokens and isinstance(reader, _BatchReader):
        load = stream_load(reader.batches(path, ReadOptions(domain=domain, num_experts=num_experts)))
        return replace(load, origin=_origin(path, reader, load.origin))
    return expert_load(read_trace(path, format=format, domain=domain, num_experts=num_experts), windows)


def save_trace(trace: RoutingTrace, path: Path) -> None:
    """Write ``trace`` as ``.npz`` or ``.parquet``, by suffix.

    Raises:
        TraceError: another suffix.
        InputError: ``path`` cannot be written.
    """
    if path.suffix == ".npz":
        from moeplan.routing.readers.npz import save_npz

        save_npz(trace, path)
    elif path.suffix == ".parquet":
        from moeplan.routing.readers.parquet import save_parquet

        save_parquet(trace, path)
    else:
        raise TraceError(f"cannot write {path}: suffix '{path.suffix}' must be .npz or .parquet")


def convert_trace(
    path: Path,
    out: Path,
    *,
    format: str | None = None,
    domain: str | None = None,
    num_experts: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Read any trace and write it as ``.npz`` or ``.parquet``; what was written, as JSON values.

    Raises:
        TraceError: unreadable, counts only (they have no tokens to write), or another suffix.
        InputError: ``out`` cannot be written.
    """
    if out.suffix not in (".npz", ".parquet"):
        raise TraceError(f"cannot write {out}: suffix '{out.suffix}' must be .npz or .parquet")
    progress("reading", 0.0)
    trace = read_trace(path, format=format, domain=domain, num_experts=num_experts)
    if not isinstance(trace, RoutingTrace):
        raise TraceError(f"{path} holds counts only; a trace file needs the choice of each token")
    progress("reading", 1.0)
    save_trace(trace, out)
    progress("writing", 1.0)
    return {
        "out": str(out),
        "tokens": trace.num_tokens,
        "layers": trace.num_layers,
        "top_k": trace.top_k,
        "num_experts": trace.num_experts,
        "dropped_padding": trace.dropped_padding,
        "origin": dict(trace.origin),
    }
