"""Annotation files as rows, and the one way to tell which of them are malformed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DatasetError

_MAX_SHOWN = 20

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
}
"""How splits are called in the wild, in lower case -> how they are called in a store."""


class MalformedRows:
    """Collects what is wrong with rows, so that all of it is told at once."""

    def __init__(self) -> None:
        self._found: list[tuple[Path, str, str]] = []

    def add(self, file: Path, place: int | str, problem: object) -> None:
        """Note one row: `place` is a line's number, or words such as `entry 3`."""
        self._found.append((file, f"line {place}" if isinstance(place, int) else place, str(problem)))

    def refuse(self) -> None:
        """Raise if there was any.

        Raises:
            DatasetError: With the first 20 rows, and how many more there are.
        """
        if not self._found:
            return
        files = {file for file, _, _ in self._found}
        of = f" of {next(iter(files))}" if len(files) == 1 else ""
        shown = [
            f"{place}: {problem}" if of else f"{file}, {place}: {problem}"
            for file, place, problem in self._found[:_MAX_SHOWN]
        ]
        if more := len(self._found) - len(shown):
            shown.append(f"and {more} more")
        raise DatasetError(f"{len(self._found)} rows{of} are malformed:\n  " + "\n  ".join(shown))


def read_text(file: Path) -> str:
    """A whole file as text: UTF-8 with or without a byte order mark, line ends as they are.

    Raises:
        DatasetError: If it is not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 (byte {error.start}): convert it, or name another file") from error


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1, without blanks and line ends around them."""
    # Not splitlines(): captions may hold the odd characters that it takes for line ends.
    lines = read_text(file).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, text) for number, line in enumerate(lines, start=1) if (text := line.strip())]


def read_csv(file: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file that are not empty, with the number of their last line.

    Raises:
        DatasetError: If it is not UTF-8 or no CSV.
    """
    reader = csv.reader(io.StringIO(read_text(file), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(row):
                yield reader.line_num, row
    except csv.Error as error:
        raise DatasetError(f"{file}, line {reader.line_num}: expected quoted or plain text, found {error}") from error


def read_json(file: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DatasetError: If it is not JSON.
    """
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}, line {error.lineno}: expected JSON, found {error.msg}") from error


def read_json_list(file: Path, value: Any = None) -> list[tuple[str, Any]]:
    """The entries of a JSON list, with their places for messages, from 1.

    Args:
        file: The file.
        value: What stands in it, if it has been read already.

    Raises:
        DatasetError: If it is no list.
    """
    value = read_json(file) if value is None else value
    if not isinstance(value, list):
        raise DatasetError(f"{file}: expected a list, found {type(value).__name__}")
    return [(f"entry {number}", entry) for number, entry in enumerate(value, start=1)]


def text_of(entry: Any, key: str) -> str:
    """A text that an entry must have; numbers become text.

    Raises:
        ValueError: If the entry is no object, or the text is missing or empty.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with {key!r}, found {shorten(entry)}")
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise ValueError(f"expected {key!r} with a text, found {shorten(entry)}")
    return str(value).strip()


def texts_of(entry: Any, key: str) -> tuple[str, ...]:
    """One text or a list of texts that an entry must have; blanks around them are cut.

    Raises:
        ValueError: If there is neither.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected {key!r} with texts, found {shorten(entry)}")
    return tuple(text.strip() for text in texts if text.strip())


def shorten(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def split_of_name(file: Path) -> str:
    """The split that a file's name tells: `kinetics_train.csv` -> train; "" where it tells none or several."""
    words = file.stem.lower().replace("-", "_").replace(".", "_").split("_")
    found = {
        split
        for word in words
        for name, split in SPLIT_NAMES.items()
        # trainlist01, testlist01, train9k: a split's name and what stands directly behind it.
        if word == name or word.startswith((f"{name}list", f"{name}split")) or word.rstrip("0123456789k") == name
    }
    return found.pop() if len(found) == 1 else ""
