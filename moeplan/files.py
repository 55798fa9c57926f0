"""Files in and out: whole or not at all, hashed, and never larger than expected."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from moeplan.errors import InputError, SpecError

__all__ = [
    "SUMS",
    "atomic_directory",
    "atomic_path",
    "canonical_json",
    "hold",
    "is_held",
    "read_json",
    "read_lines",
    "read_sums",
    "read_yaml",
    "require_other",
    "require_place",
    "require_writable",
    "sha256_bytes",
    "sha256_file",
    "unlike_its_sum",
    "write_sums",
    "write_text",
]

SUMS = "SHA256SUMS"

MAX_LINE_BYTES = 64 * 2**20
MAX_DOCUMENT_BYTES = 512 * 2**20


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}; choose another place")


@contextmanager
def _written_for(path: Path, temporary: Path) -> Iterator[None]:
    """Write at ``temporary`` for ``path``: errors name that, and SIGTERM ends the block as an exception does, so that
    what was begun is taken away again."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error
    except InputError as error:
        if isinstance(error.__cause__, OSError) and str(temporary) in str(error):
            raise _unwritable(path, error.__cause__) from error
        raise
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _made_beside(path: Path, make: Callable[[Path], None]) -> Path:
    """A new sibling of ``path`` under a name of its own, with the rights that new files have here.

    ``tempfile`` gives its owner alone rights; the umask that would mend them is read by setting it, for all threads.
    """
    while True:
        place = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            make(place)
        except FileExistsError:
            continue
        return place


def require_other(out: Path | None, *inputs: Path | None) -> None:
    """That ``out`` is none of the files it is made from, so that none is lost.

    Raises:
        SpecError: it is.
    """
    for path in inputs:
        if out is not None and path is not None and out.exists() and path.exists() and out.samefile(path):
            raise SpecError(f"{out} is read and would be written over; name another file to write")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; it is renamed over ``path`` only when the block succeeds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _made_beside(path, lambda place: place.touch(exist_ok=False))
    except OSError as error:
        raise _unwritable(path, error) from error
    with _written_for(path, temporary):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def hold(path: Path) -> int | None:
    """Lock ``path`` (made where it is missing) until this process ends, however it does, or closes the answer.

    None where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it. InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def is_held(path: Path) -> bool | None:
    """Whether a process of this machine holds ``path`` by :func:`hold`; None where that cannot be told."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def require_writable(folder: Path) -> None:
    """Make ``folder`` where it is missing, and see that files can be written there.

    Raises:
        InputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def require_place(path: Path, what: str, files: Sequence[str]) -> Path:
    """Where a directory of ``what`` (a noun, as in "a plan") may be written: ``path``, links followed.

    ``files`` are patterns of the names such a directory is made of; the first is the one that tells it.

    Raises:
        SpecError: ``path`` holds something else, or is the current directory. InputError: it is a file, a
            mount point or read-only, or cannot be read.
    """
    place = path.resolve()
    if place.exists() and not place.is_dir():
        raise InputError(f"cannot write {path}: it is a file, not a directory; choose another --out")
    if place == Path.cwd():
        raise SpecError(f"--out ({path}) is the current directory, which cannot be replaced; name another")
    if place.exists() and (place.is_mount() or not os.access(place, os.W_OK)):
        why = "it is a mount point, which cannot be replaced" if place.is_mount() else "it is read-only"
        raise InputError(f"cannot write {path}: {why}; choose another --out")
    parent = next(folder for folder in place.parents if folder.exists())  # what is missing is made there
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "is read-only" if parent.is_dir() else "is a file, not a directory"
        raise InputError(f"cannot write {path}: {parent} {why}; choose another --out")
    try:
        if place.exists() and any(place.iterdir()) and not (place / files[0]).is_file():
            raise SpecError(
                f"--out ({path}) exists and does not hold {what}; choose another, so that nothing of yours is lost"
            )
    except OSError as error:
        raise _unwritable(path, error) from error
    return place


@contextmanager
def atomic_directory(path: Path, what: str, files: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary sibling directory; it takes the place of ``path`` whole when the block succeeds.

    ``what`` and ``files`` as in :func:`require_place`, which is asked first. Entries of the old directory that match
    none of ``files`` are somebody else's and move into the new one.
    """
    path = require_place(path, what, files)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _made_beside(path, Path.mkdir)
    except OSError as error:
        raise _unwritable(path, error) from error
    with _written_for(path, temporary):
        try:
            yield temporary
            _take_place(temporary, path, files)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _take_place(new: Path, path: Path, files: Sequence[str]) -> None:
    old = new.with_name(new.name + ".old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    if old.exists():
        for entry in old.iterdir():
            if not any(fnmatchcase(entry.name, pattern) for pattern in files):
                entry.rename(path / entry.name)
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no insignificant white space: the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_bytes(data: bytes) -> str:
    """Hex digest of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` of files in ``folder``, name -> hex digest, as ``sha256sum --check`` reads it."""
    write_text(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))


def read_sums(folder: Path) -> dict[str, str]:
    """Name -> hex digest from ``SHA256SUMS``; none where ``folder`` has no such file.

    Raises:
        InputError: it is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    sums = {}
    for number, line in enumerate(_read_document(path).splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if found is None:
            raise InputError(f"{path} line {number} ({line!r:.40}) is not a sha256 and a file's name; it is damaged")
        sums[found[2]] = found[1]
    if not sums:
        raise InputError(f"{path} is empty; it is damaged")
    return sums


def unlike_its_sum(folder: Path, name: str, digest: str) -> str | None:
    """What is wrong with a file of ``folder`` whose sum is ``digest``; None where nothing is."""
    try:
        found = sha256_file(folder / name)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    if found == digest:
        return None
    return f"{name} is not the file that was written: its sha256 is {found[:12]}..., {SUMS} says {digest[:12]}..."


def _read_document(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{path} has {size} bytes, more than the {MAX_DOCUMENT_BYTES} a JSON or YAML document may"
                " have; store large traces as .npz or .parquet"
            )
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: it is not UTF-8 text (byte {error.start})") from error


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise InputError(f"{path}: key '{twice}' appears twice in one object; keep one of them")
    return fields


def read_json(path: Path) -> Any:
    """Parse a JSON document.

    Raises:
        InputError: unreadable, too large or malformed; the message gives line and column.
    """
    try:
        return json.loads(_read_document(path), object_pairs_hook=lambda pairs: _once(path, pairs))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be a document of this project") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path} is not usable JSON: {_first_words(error)}") from error


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, so that a document cannot grow beyond its text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not accepted; write the value out", problem_mark=mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a plain word", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key}' appears twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Parse a YAML document safely: no tags, no aliases, no repeated keys.

    Raises:
        InputError: unreadable, too large or malformed; the message gives line and column.
    """
    text = _read_document(path)
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader subclass
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise InputError(f"{path} is not usable YAML: {error.problem}{where}") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be a document of this project") from error
    except (yaml.YAMLError, ValueError) as error:  # also a number of thousands of digits, or a date that is none
        raise InputError(f"{path} is not usable YAML: {_first_words(error)}") from error


def _first_words(error: Exception) -> str:
    """The first line of an error's text, without Python's own remedies."""
    return str(error).partition("\n")[0].partition("; use sys.")[0]


def read_lines(path: Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """Lines of a file, each at most ``max_bytes`` long.

    Raises:
        InputError: unreadable, or a line is longer than ``max_bytes``.
    """
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(max_bytes + 1):
                number += 1
                if len(line) > max_bytes:
                    raise InputError(
                        f"{path} line {number} is longer than {max_bytes} bytes; is this a line-based file?"
                    )
                yield line
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
