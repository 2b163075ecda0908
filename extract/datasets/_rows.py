"""Annotation files as rows, and the one way to tell which of them are malformed."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ._names import SPLIT_NAMES, check_text

_MAX_SHOWN = 20

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DELIMITERS = (",", ";", "\t", "|")
_EXCEL_HINT = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)


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
    """A whole file as text, line ends as they are: UTF-8, or what its byte order mark says.

    Raises:
        DatasetError: If it is neither.
    """
    data = file.read_bytes()
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        # Not guessed: of the encodings of one byte a letter, any reads, and all but one give other names.
        raise DatasetError(
            f"{file} is not {encoding.removesuffix('-sig').upper()} (byte {error.start}: "
            f"{data[error.start : error.start + 1]!r}). Save it as UTF-8 (Excel: `CSV UTF-8`), or convert it: "
            "iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    if text.count("\0") * 4 > len(text):
        raise DatasetError(f"{file} is no text, or UTF-16 without a byte order mark: save it as UTF-8")
    return text


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1, without blanks and line ends around them."""
    # Not splitlines(): captions may hold the odd characters that it takes for line ends.
    lines = read_text(file).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, text) for number, line in enumerate(lines, start=1) if (text := line.strip())]


def read_csv(file: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file that are not empty, with the number of their last line.

    Raises:
        DatasetError: If it is no text or no CSV.
    """
    # A list of labels that Excel wrote may begin with a line that only Excel knows.
    text, skipped = cut_excel_hint(read_text(file))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(row):
                yield reader.line_num + skipped, row
    except csv.Error as error:
        line = reader.line_num + skipped
        raise DatasetError(f"{file}, line {line}: expected quoted or plain text, found {error}") from error


def cut_excel_hint(text: str) -> tuple[str, int]:
    """A CSV file's text without the line `sep=;` that Excel may put first, and how many lines that is."""
    hint = _EXCEL_HINT.match(text)
    return (text[hint.end() :], 1) if hint else (text, 0)


def sniff_csv(text: str, names: Collection[str], default: str = ",") -> str:
    """What parts the columns of a file with a header: comma, semicolon (as Excel writes in Europe), tab or bar.

    Args:
        text: Of the file.
        names: Columns that may be there, in lower case.
        default: Taken where nothing speaks for another.

    Returns:
        What gives the most of these columns, and of several the most columns.
    """
    header = cut_excel_hint(text)[0].lstrip("\r\n").partition("\n")[0].rstrip("\r")

    def rank(delimiter: str) -> tuple[int, int, bool]:
        fields = [field.strip().strip('"').strip().lower() for field in header.split(delimiter)]
        return sum(field in names for field in fields), len(fields), delimiter == default

    return max(_DELIMITERS, key=rank)


def read_json(file: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DatasetError: If it is not JSON.
    """
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}, line {error.lineno}: expected JSON, found {error.msg}") from error
    except RecursionError as error:
        raise DatasetError(f"{file}: expected rows in JSON, found lists in lists without end") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise DatasetError(f"{file}: expected JSON, found {error}") from error


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
        ValueError: If the entry is no object, or the text is missing, empty or not valid Unicode.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with {key!r}, found {shorten(entry)}")
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        raise ValueError(f"expected {key!r} with a text, found {shorten(entry)}")
    return check_text(str(value).strip())


def texts_of(entry: Any, key: str) -> tuple[str, ...]:
    """One text or a list of texts that an entry must have; blanks around them are cut.

    Raises:
        ValueError: If there is neither, or a text is not valid Unicode.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected {key!r} with texts, found {shorten(entry)}")
    return tuple(check_text(text.strip()) for text in texts if text.strip())


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
