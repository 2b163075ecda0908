"""Texts for terminals, logs, pages and plots: each a visible line, whatever characters its names hold.

Names come from files and annotations that strangers made. An escape sequence in one could rewrite what a terminal
shows, a newline could make up a message, a mark of direction could turn a name round.
"""

from __future__ import annotations

import io
import logging
import sys
import unicodedata
from typing import Any, TextIO

_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls, formats, lone halves of characters, separators of lines."""
_JOINERS = "\u200c\u200d"
"""Of those the two that scripts and emoji are written with."""
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def make_visible(text: object) -> str:
    r"""A text as one line in which every character shows: `\x1b[31m` for the start of red, `\n` for a new line.

    A byte of a file's name that is not UTF-8 shows as that byte.
    """
    line = str(text)
    if line.isascii() and line.isprintable():
        return line
    return "".join(_show(character) for character in line)


def _show(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _HIDDEN_CATEGORIES:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python hands on a byte that it cannot decode
        return f"\\x{code - 0xDC00:02x}"
    if character in _SHORT:
        return _SHORT[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def quote(text: str, most: int = 120) -> str:
    """The beginning of a text, in quotes."""
    return f"'{make_visible(text if len(text) <= most else f'{text[:most]}...')}'"


def print_lines(*lines: object, to: TextIO | None = None) -> None:
    """Print texts, each as one visible line; what the stream's encoding lacks is spelled out, too.

    Args:
        lines: Whatever has a text.
        to: A stream; None takes stdout as it is now.
    """
    stream = sys.stdout if to is None else to
    for line in lines:
        text = make_visible(line)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    stream.flush()


class VisibleFormatter(logging.Formatter):
    """A log's messages as visible lines; a traceback keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message alone."""
        return make_visible(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """The traceback alone."""
        return "\n".join(make_visible(line) for line in super().formatException(ei).splitlines())


def set_up_output() -> None:
    """Make stdout and stderr take every character, and the log write visible lines to stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(levelname)s: %(message)s"))
    # The root's level does not hold for loggers that have one of their own: Dask's do.
    handler.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
