"""Which split a video is in: as its data set says, or else a held-out share of every class."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...store.records import VideoRecord
from ._names import fold_spellings, fold_split

UNDIVIDED = "all"
"""The one split of videos that nothing could be learned from: without class and captions."""

_HELD_OUT_SHARE = 0.2
_MAX_SHOWN_CLASSES = 5

_log = logging.getLogger(__name__)


def settle_splits(
    records: Sequence[VideoRecord], seed: int, known_splits: Mapping[str, str] | None = None
) -> list[VideoRecord]:
    """Give every record its split.

    Args:
        records: With the split that the data set says, "" where it says none.
        seed: Of the held-out share.
        known_splits: Split by video_id as a store has it. Rows of the store keep it where the data set says none, or
            the same one in another spelling.

    Returns:
        The records in their order. Where no split is given and there is a class or a caption, a fifth of every class is
        `val`, at least one where it has two files, the rest `train`; a file's rows stay together. The choice is a pure
        function of ids, classes, seed and known splits. Videos without class and captions are `all`, or in a store
        that has divided such ones, divided like them.
    """
    known = known_splits or {}
    split_of = fold_spellings({record.split for record in records}, known.values())
    settled = []
    for record in records:
        split, old = split_of[record.split], known.get(record.video_id)
        if old is not None and (not split or fold_split(old).lower() == split.lower()):
            split = old
        settled.append(record if split == record.split else replace(record, split=split))
    if all(record.split for record in settled):
        return settled
    is_divided = any(
        old.split != UNDIVIDED
        for record, old in zip(records, settled, strict=True)
        if old.split and not record.split and not _is_labelled(old)
    )
    divided = [r for r in settled if not r.split and (is_divided or _is_labelled(r))]
    held_out = _hold_out(divided, [r for r in settled if r.split], seed)
    split_of_id = {r.video_id: "val" if r.path in held_out else "train" for r in divided}
    if divided:
        _tell(divided, held_out)
    return [r if r.split else replace(r, split=split_of_id.get(r.video_id, UNDIVIDED)) for r in settled]


def _is_labelled(record: VideoRecord) -> bool:
    return record.class_name is not None or bool(record.captions)


def _hold_out(records: Sequence[VideoRecord], others: Sequence[VideoRecord], seed: int) -> set[str]:
    """The paths of the files that are held out of `records`; `others` have their splits and count in the shares."""
    files: dict[str | None, set[str]] = defaultdict(set)
    first_id: dict[str, str] = {}
    for record in records:
        files[record.class_name].add(record.path)
        first_id[record.path] = min(record.video_id, first_id.get(record.path, record.video_id))
    split_of_path = {record.path: fold_split(record.split) for record in others}
    known: dict[str | None, set[str]] = defaultdict(set)
    for record in others:
        if record.class_name in files and split_of_path[record.path] in ("train", "val", UNDIVIDED):
            known[record.class_name].add(record.path)
    # A file that has rows with a split already goes with them.
    held_out = {path for found in files.values() for path in found if split_of_path.get(path) == "val"}
    for class_name in sorted(files, key=lambda name: name or ""):
        everything = files[class_name] | known[class_name]
        target = max(1, math.floor(len(everything) * _HELD_OUT_SHARE + 0.5)) if len(everything) > 1 else 0
        there = sum(path in held_out or split_of_path.get(path) == "val" for path in everything)
        free = [path for path in files[class_name] - held_out if path not in split_of_path]
        free.sort(key=lambda path: hashlib.sha256(f"{seed}:{first_id[path]}".encode()).digest())
        held_out.update(free[: max(0, target - there)])
    return held_out


def _tell(records: Sequence[VideoRecord], held_out: set[str]) -> None:
    """Say what was held out, where nobody asked for it by a split."""
    by_class = Counter(record.class_name for record in records)
    val = Counter(record.class_name for record in records if record.path in held_out)
    without = [str(name) for name in sorted(by_class, key=lambda name: name or "") if not val[name]]
    counts = sorted({val[name] for name in by_class})
    each = f"{counts[0]} of each class" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} of each class"
    shown = ", ".join(without[:_MAX_SHOWN_CLASSES]) + (", ..." if len(without) > _MAX_SHOWN_CLASSES else "")
    none = f"; none of {len(without)} classes with one video left to choose ({shown})" if without else ""
    _log.warning(
        "no split given: %d of %d videos held out as val%s%s. A column or folders of splits would say otherwise.",
        *(sum(val.values()), len(records), "" if set(by_class) == {None} else f", {each}", none),
    )
