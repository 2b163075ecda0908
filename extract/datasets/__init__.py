"""Data set readers: from files and annotations, as they are found, to one list of video records.

A reader is a small file: where its files are looked for and how an annotation row becomes a record.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import ConfigError, DatasetError
from ...store.records import VideoRecord
from .folder import read_folder
from .table import COLUMN_ROLES, read_table_file

__all__ = ["COLUMN_ROLES", "NAMED_DATASETS", "check_dataset_name", "default_paths", "read_dataset"]

NAMED_DATASETS = ("hmdb51", "k400", "msrvtt", "msvd", "ssv1", "ssv2", "ucf101", "vatex")
"""Public data sets by name. Until each has its own reader they are read as folders: data/NAME/{train,val}/CLASS/."""

_VALIDATION_SHARE = 0.2


def check_dataset_name(name: str) -> None:
    """Refuse a data set that no reader knows.

    Raises:
        ConfigError: With the closest names.
    """
    known = ("folder", "table", *NAMED_DATASETS)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"Closest: {', '.join(close)}. " if close else ""
        raise ConfigError(f"unknown data set {name!r}. {hint}Known: {', '.join(known)}.")


def default_paths(name: str, root: Path | None, out: Path | None) -> tuple[Path, Path]:
    """Where a data set's videos lie and where its store goes, if the user does not say.

    Raises:
        ConfigError: If `folder` or `table` is asked for without a root.
    """
    check_dataset_name(name)
    if root is None:
        if name in ("folder", "table"):
            raise ConfigError(f"--dataset {name} needs --root, the folder below which the videos lie")
        root = Path("data") / name
    stem = root.resolve().name if name in ("folder", "table") else name
    return root, out if out is not None else Path("store") / f"{stem}.zarr"


def read_dataset(
    name: str,
    root: Path,
    *,
    annotations: Path | None = None,
    columns: dict[str, str] | None = None,
    splits: Sequence[str] | None = None,
    seed: int = 0,
) -> list[VideoRecord]:
    """List a data set's videos.

    Args:
        name: A data set's name, `folder` or `table`.
        root: Folder below which the videos lie.
        annotations: The table, for `table`.
        columns: For `table`: role (`path`, `label`, ...) -> column name.
        splits: Only these; None takes all.
        seed: Of the split, where the data set has none.

    Returns:
        Records sorted by the bytes of their video_id, with unique ids and a split each.

    Raises:
        DatasetError: If something is missing, malformed or ambiguous.
    """
    check_dataset_name(name)
    is_table = name == "table"
    found = read_table_file(annotations, root, columns or {}) if is_table else read_folder(root, dataset=name)
    records = sorted((_with_split(record, seed) for record in found), key=lambda r: r.video_id.encode())
    _refuse_repeated(records)
    if splits is not None:
        known = sorted({record.split for record in records})
        if missing := sorted(set(splits) - set(known)):
            raise DatasetError(f"{root} has the splits {', '.join(known)}; wanted {', '.join(missing)} too (--split)")
        records = [record for record in records if record.split in splits]
    return records


def _with_split(record: VideoRecord, seed: int) -> VideoRecord:
    """Give a record without a split one: 20 % validation by hash of the id, whatever other videos there are."""
    if record.split:
        return record
    digest = hashlib.sha256(f"{seed}:{record.video_id}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return replace(record, split="val" if share < _VALIDATION_SHARE else "train")


def _refuse_repeated(records: Sequence[VideoRecord]) -> None:
    repeated = sorted(i for i, count in Counter(r.video_id for r in records).items() if count > 1)
    if repeated:
        shown = ", ".join(repeated[:5])
        raise DatasetError(
            f"{len(repeated)} video ids occur more than once: {shown}. "
            "Ids must be unique: name an id column (--column id=NAME), or remove the repeated rows."
        )
