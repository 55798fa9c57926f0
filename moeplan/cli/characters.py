"""Output to terminals and files whose encoding lacks some of our characters, as on Windows or in the C locale."""

from __future__ import annotations

import codecs
import io
from typing import TextIO

__all__ = ["substitute_missing"]

_PLAIN = {"−": "-", "→": "->", "–": "-", "·": ",", "µ": "u", "\N{NO-BREAK SPACE}": " "}


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("moeplan.plain", _plain)


def substitute_missing(stream: TextIO) -> None:
    """Write what the stream's encoding has no character for in plain ones, instead of failing on it."""
    if isinstance(stream, io.TextIOWrapper) and not codecs.lookup(stream.encoding).name.startswith("utf"):
        stream.reconfigure(errors="moeplan.plain")
