"""Text that every machine has: the standard library of the running Python, as bytes.

Two domains: ``code``, the library's source, and ``docs``, the docstrings in it. One file in twenty is held out of
training, docstrings and source alike. Versions of Python differ in their library, so the text carries its sha256.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeplan.errors import InputError

__all__ = ["Corpus", "library_text", "text_of"]

_LEFT_OUT = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings",
    "config", "__pycache__", "ensurepip",
}  # fmt: skip
_HELD_OUT_PART = 20


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Bytes of each domain, for training and held out; ``source`` says what they are, with version and sha256."""

    train: Mapping[str, NDArray[np.uint8]]
    held_out: Mapping[str, NDArray[np.uint8]]
    source: str
    sha256: str

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in the order their numbers follow."""
        return tuple(self.train)

    def batch(
        self, rng: np.random.Generator, sequences: int, length: int, *, held_out: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequences ``[B, length + 1]`` from random places, domains in turn, and the domain ``[B]`` of each."""
        parts = self.held_out if held_out else self.train
        names = self.domains
        domain_B = (np.arange(sequences) + rng.integers(len(names))) % len(names)
        rows = []
        for domain in domain_B:
            text = parts[names[domain]]
            start = int(rng.integers(len(text) - length))
            rows.append(text[start : start + length + 1])
        return np.stack(rows).astype(np.int64), domain_B


def library_text(max_bytes: int = 4 * 2**20) -> Corpus:
    """Read the standard library's files, chosen by the hash of their names, until there are ``max_bytes`` of source.

    Raises:
        InputError: the library's source is not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in root.rglob("*.py") if not _LEFT_OUT.intersection(p.relative_to(root).parts[:-1])]
    keyed = sorted((hashlib.sha256(p.relative_to(root).as_posix().encode()).digest(), p) for p in files)
    parts: dict[str, tuple[list[bytes], list[bytes]]] = {"code": ([], []), "docs": ([], [])}
    total = 0
    for key, path in keyed:
        if total >= max_bytes:
            break
        try:
            text = path.read_text(encoding="utf-8")
            docs = _docstrings(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue  # not text of this Python
        held = key[0] * _HELD_OUT_PART // 256 == 0
        parts["code"][held].append(text.encode())
        parts["docs"][held].append(docs.encode())
        total += len(text)
    joined = {name: tuple(b"\n".join(side) for side in sides) for name, sides in parts.items()}
    if min(len(text) for sides in joined.values() for text in sides) < 2**14:
        raise InputError(f"{root} holds too little Python source to train on; is the standard library installed?")
    digest = hashlib.sha256(b"".join(text for sides in joined.values() for text in sides)).hexdigest()
    return Corpus(
        {name: np.frombuffer(sides[0], np.uint8) for name, sides in joined.items()},
        {name: np.frombuffer(sides[1], np.uint8) for name, sides in joined.items()},
        f"standard library of {platform.python_implementation()} {platform.python_version()}: source and docstrings",
        digest,
    )


def text_of(path: Path) -> Corpus:
    """A file, or a folder of files, as text: one domain per file, the last twentieth of each held out.

    Raises:
        InputError: unreadable, or too short to hold anything out.
    """
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    train, held_out, digest = {}, {}, hashlib.sha256()
    for file in files:
        try:
            text = np.frombuffer(file.read_bytes(), np.uint8)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}") from error
        if len(text) < 2**14:
            raise InputError(f"text {file} has {len(text)} bytes; training needs at least {2**14} of each file")
        cut = len(text) - len(text) // _HELD_OUT_PART
        train[file.stem], held_out[file.stem] = text[:cut], text[cut:]
        digest.update(text.tobytes())
    if not files:
        raise InputError(f"text {path} holds no file")
    return Corpus(train, held_out, path.name, digest.hexdigest())


def _docstrings(source: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)
