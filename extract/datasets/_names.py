"""Names out of annotations, judged as text before anything is looked for on the disk; names of splits, folded."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""How splits are called in the wild, in lower case -> how they are called in a store."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_SEPARATOR = re.compile(r"[\\/]")


def fold_split(name: str) -> str:
    """A split's name as a store has it: `Train`, ` training ` -> train, `VALIDATION` -> val; others as they are."""
    name = name.strip()
    return SPLIT_NAMES.get(name.lower(), name)


def fold_spellings(splits: Iterable[str], known: Iterable[str] = ()) -> dict[str, str]:
    """Which split each spelling means: two of one name are one split, also where the name is nobody's.

    Args:
        splits: As annotations spell them.
        known: As a store spells them: those win.

    Returns:
        Split by spelling. Of an unknown name that is spelled in several ways the lower-case one is taken.
    """
    known_spelling = {name.lower(): name for name in sorted(known, reverse=True) if fold_split(name) == name}
    spellings: dict[str, set[str]] = {}
    folded = {name: fold_split(name) for name in splits}
    for name in folded.values():
        spellings.setdefault(name.lower(), set()).add(name)
    shared = {
        lower: known_spelling.get(lower, lower if len(names) > 1 else next(iter(names)))
        for lower, names in spellings.items()
    }
    return {name: shared[one.lower()] for name, one in folded.items()}


def check_path(text: str, *, root: object = "--root") -> str:
    r"""A path relative to the videos' folder, out of an annotation file.

    Args:
        text: As it stands there. `\` and `/` part its folders.
        root: For messages.

    Returns:
        The path without what means nothing: `./a//b.mp4` -> `a/b.mp4`. `\` stays: it may be part of a name.

    Raises:
        ValueError: If it is empty, absolute or an address, has a part `..`, or is no text that a file's name can be.
    """
    check_text(text)
    if _ADDRESS.match(text):
        raise ValueError(f"found the address {text!r}: download the video, and name its file below {root}")
    given = text
    if "//" in text or text.startswith("./") or "/./" in text or text.endswith(("/", "/.")) or text in ("", "."):
        text = "/".join(part for part in text.split("/") if part not in ("", "."))
    if _DRIVE.match(text):
        raise ValueError(
            f"expected a path below {root}, found {given!r}, which names a drive of another machine: cut it"
        )
    if given.startswith("/") or text.startswith("\\") or ".." in _SEPARATOR.split(text):
        raise ValueError(f"expected a path below {root}, without `..`, found {given!r}")
    if not text.strip():
        raise ValueError(f"the path is empty: expected one below {root}")
    return text


def check_name(text: str) -> str:
    """An id or a class out of an annotation file that is to become a part of a path: a path of one part.

    Raises:
        ValueError: If it is empty or more than one part, or anything that `check_path` refuses.
    """
    check_path(text)
    if _SEPARATOR.search(text):
        raise ValueError(f"expected a name without folders, found {text!r}")
    return text


def check_text(text: str) -> str:
    """A text that UTF-8 can write and that no file system cuts.

    Raises:
        ValueError: If it holds a NUL byte, or one half of a pair of surrogates, as JSON and pickles can.
    """
    if "\0" in text:
        raise ValueError(f"expected text, found {text!r}, which holds a NUL byte")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"expected text, found {text!r}, which is not valid Unicode")
    return text


def list_bases(root: Path) -> list[str]:
    """What an absolute path below a folder begins with, links in the folder's own name resolved or not."""
    return list(dict.fromkeys(f"{str(base).rstrip('/')}/" for base in (root.absolute(), root.resolve())))


def relative_path(path: str, root: Path, bases: Iterable[str]) -> str:
    """A path relative to the root; an absolute one must lie below it, links in the root's own name resolved or not.

    Args:
        path: As a table writes it.
        root: For messages.
        bases: Of the root: see `list_bases`.

    Raises:
        ValueError: As `check_path` does.
    """
    base = next((base for base in bases if path.startswith(base)), "")
    return check_path(path.removeprefix(base).lstrip("/") if base else path, root=root)


def is_inside(path: str) -> bool:
    """Whether a path is relative and stays below the folder that it is relative to."""
    return bool(path) and path[0] != "/" and (".." not in path or ".." not in path.split("/")) and "\0" not in path


def compose(name: str) -> str:
    """A name by which two spellings of the same accents are one: macOS writes an accent behind its letter."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def show_name(name: str) -> str:
    r"""A file's name for a message; bytes that are not UTF-8 as `\xNN`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
