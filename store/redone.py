"""What was done anew of a store because its videos had been replaced: runs from before tell by it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..files import read_json, write_json

REDONE_NAME = "redone.json"


def count_redone(path: Path) -> int:
    """Rows of a store that were made of another video since they were first done, each time counted."""
    return sum(int(entry["rows"]) for entry in _read(path))


def note_redone(path: Path, num_rows: int) -> None:
    """Note that so many rows of a store hold other tokens than before."""
    if num_rows:
        entry = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "rows": num_rows}
        write_json(path / REDONE_NAME, [*_read(path), entry])


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = read_json(path / REDONE_NAME)
        return [entry for entry in entries if isinstance(entry["rows"], int)]
    except (OSError, ValueError, TypeError, KeyError):
        return []
