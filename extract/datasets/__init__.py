"""Data set readers: from files and annotations, as they are found, to one list of video records.

A reader is a small file: what is known of its data set, where its files are looked for, and how an annotation row
becomes a record. It has one line in the table here. Nothing outside its file asks for its name.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DatasetError
from ...store.records import VideoRecord
from . import (
    charades_sta,
    ego4d_nlq,
    folder,
    hmdb51,
    kinetics,
    lists,
    msrvtt,
    msvd,
    qvhighlights,
    something,
    table,
    tacos,
    tvsum,
    ucf101,
    vatex,
    youtube_highlights,
)
from ._files import DatasetFiles, VideoTree, ending_of, is_video_name
from ._names import check_text, compose, fold_split, is_inside
from ._splits import settle_splits
from .contract import PLAIN_RECIPE, DatasetFacts, DatasetReader, ExtractionRecipe, ReadOptions
from .folder import read_folder
from .lists import read_lists
from .table import COLUMN_ROLES

__all__ = [
    "COLUMN_ROLES",
    "FACTS",
    "PLAIN_RECIPE",
    "READERS",
    "DatasetFacts",
    "DatasetReader",
    "ExtractionRecipe",
    "Listing",
    "ReadOptions",
    "check_dataset_name",
    "check_folder",
    "check_options",
    "default_paths",
    "find_protocol",
    "find_reader",
    "frame_rate",
    "read_dataset",
    "read_listing",
    "resolve_protocol",
]

READERS: dict[str, DatasetReader] = {
    reader.name: reader
    for reader in (
        folder.READER,
        lists.READER,
        table.READER,
        hmdb51.READER,
        *kinetics.READERS,
        msrvtt.READER,
        msvd.READER,
        something.V1_READER,
        something.V2_READER,
        ucf101.READER,
        vatex.READER,
        charades_sta.READER,
        ego4d_nlq.READER,
        qvhighlights.READER,
        tacos.READER,
        tvsum.READER,
        youtube_highlights.READER,
    )
}
"""By the name that `--dataset` takes: forms of files first, then public data sets in order of their names, those of
moments last."""


class _Facts(Mapping[str, DatasetFacts]):
    """The facts of the readers that are in the table when it is asked."""

    def __getitem__(self, name: str) -> DatasetFacts:
        facts = READERS[name].facts
        if facts is None:
            raise KeyError(name)
        return facts

    def __iter__(self) -> Iterator[str]:
        return (name for name, reader in READERS.items() if reader.facts is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


FACTS: Mapping[str, DatasetFacts] = _Facts()
"""Public data sets by the name that `--dataset` takes."""

_MAX_SHOWN = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listing:
    """A data set's videos, and what was seen of them on the disk."""

    records: list[VideoRecord]
    """Sorted by the bytes of their video_id, with unique ids and a split each."""
    missing: frozenset[str]
    """Paths of records that were surely not there when they were listed: links to nothing too, but not what the machine
    did not let us see."""


def find_reader(name: str) -> DatasetReader:
    """The reader of a data set.

    Raises:
        ConfigError: If no reader knows it, with the closest names.
    """
    if name not in READERS:
        close = difflib.get_close_matches(name, READERS, n=3)
        hint = f"Closest: {', '.join(close)}. " if close else ""
        raise ConfigError(f"unknown data set {name!r}. {hint}Known: {', '.join(READERS)}.")
    return READERS[name]


def check_dataset_name(name: str) -> None:
    """Refuse a data set that no reader knows.

    Raises:
        ConfigError: With the closest names.
    """
    find_reader(name)


def check_options(name: str, *, annotations: Path | None, columns: Mapping[str, str], with_classes: bool) -> None:
    """Refuse options that mean nothing to a data set's reader.

    Raises:
        ConfigError: With the data sets that they are for.
    """
    reader = find_reader(name)
    if columns and not reader.takes_columns:
        takers = ", ".join(other.name for other in READERS.values() if other.takes_columns)
        raise ConfigError(f"--column is for --dataset {takers}, not for {name}")
    if annotations is not None and not reader.takes_annotations:
        raise ConfigError(f"--annotations has no effect on --dataset {name}: use table or lists")
    if not with_classes and not reader.takes_archives:
        takers = ", ".join(other.name for other in READERS.values() if other.takes_archives)
        raise ConfigError(
            f"--no-classes is for --dataset {takers}, not for {name}: its classes stand in its annotations"
        )


def resolve_protocol(name: str, protocol: str | None) -> str | None:
    """The protocol that is meant: the data set's first where none is named, None where there are none.

    Raises:
        ConfigError: If the data set has no such protocol.
    """
    facts = find_reader(name).facts
    known = facts.protocols if facts is not None else ()
    if protocol is None:
        return known[0] if known else None
    if protocol not in known:
        choices = f"takes {', '.join(known)} for {name}" if known else f"has no effect on --dataset {name}"
        raise ConfigError(f"--protocol {choices}; found {protocol!r}")
    return protocol


def find_protocol(name: str, root: Path, annotations: Path | None = None) -> str | None:
    """The protocol of a new store where nobody names one: the recipe's where its files are there, else the first."""
    reader = find_reader(name)
    found = reader.find_protocol(_locate(reader, root, annotations)) if reader.find_protocol is not None else None
    return found or resolve_protocol(name, None)


def frame_rate(name: str) -> float | None:
    """Frames per second of a data set's JPEG folders; None where it is not known."""
    facts = find_reader(name).facts
    return None if facts is None else facts.frame_fps


def default_paths(name: str, root: Path | None, out: Path | None) -> tuple[Path, Path]:
    """Where a data set's videos lie and where its store goes, if the user does not say.

    Raises:
        ConfigError: If a form of files, such as `folder`, is asked for without a root.
    """
    is_public = find_reader(name).facts is not None
    if root is None:
        if not is_public:
            raise ConfigError(f"--dataset {name} needs --root, the folder below which the videos lie")
        root = Path("data") / name
    stem = name if is_public else root.resolve().name
    return root, out if out is not None else Path("store") / f"{stem}.zarr"


def read_dataset(
    name: str,
    root: Path,
    *,
    annotations: Path | None = None,
    columns: dict[str, str] | None = None,
    protocol: str | None = None,
    splits: Sequence[str] | None = None,
    seed: int = 0,
    known_splits: Mapping[str, str] | None = None,
    with_classes: bool = True,
) -> list[VideoRecord]:
    """List a data set's videos: the records of `read_listing`."""
    return read_listing(
        name,
        root,
        annotations=annotations,
        columns=columns,
        protocol=protocol,
        splits=splits,
        seed=seed,
        known_splits=known_splits,
        with_classes=with_classes,
    ).records


def read_listing(
    name: str,
    root: Path,
    *,
    annotations: Path | None = None,
    columns: dict[str, str] | None = None,
    protocol: str | None = None,
    splits: Sequence[str] | None = None,
    seed: int = 0,
    known_splits: Mapping[str, str] | None = None,
    with_classes: bool = True,
    expects_videos: bool = True,
) -> Listing:
    """List a data set's videos. Those that are not on the disk are listed too, and a warning counts them.

    A named data set is read by its official annotation files; by list files where `annotations` names some; and,
    where there are neither, as a folder for each class. What lies below the root and is no row is counted in a warning.

    Args:
        name: A data set's name, `folder`, `lists` or `table`.
        root: Folder below which the videos lie.
        annotations: The table, the list, or the folder of the annotation files; None looks below the root.
        columns: For `table`: role (`path`, `label`, ...) -> column name.
        protocol: Which of the data set's protocols; None takes its first.
        splits: Only these; None takes all.
        seed: Of the split, where the data set has none.
        known_splits: Split by video_id of a store that is gone on with: see `settle_splits`.
        with_classes: For `folder`: whether folders are classes.
        expects_videos: Whether a warning counts those that are not there.

    Raises:
        ConfigError: If there is no such data set or protocol.
        DatasetError: If annotations are missing, malformed or ambiguous.
        EnvironmentFailedError: If the machine fails over a folder.
    """
    reader = find_reader(name)
    files = _locate(reader, root, annotations)
    options = ReadOptions(protocol=resolve_protocol(name, protocol), columns=columns or {}, with_classes=with_classes)
    found = _read(reader, files, options)
    if reader.names_files:
        _tell_odd_endings(files.tree, found)
    else:
        _tell_what_is_no_video(files)
        if files.tree.is_walked and files.annotation_files:
            _tell_what_is_no_row(files.tree, found)
    records = _finish(found, root, splits, seed, known_splits)
    missing = [record for record in records if not files.tree.holds(record.path)]
    if missing and expects_videos:
        _warn_of_missing(missing, len(records), root)
    return Listing(records, frozenset(record.path for record in missing))


def check_folder(
    name: str, root: Path, *, annotations: Path | None = None, protocol: str | None = None
) -> dict[str, Any]:
    """Compare a folder with what is known of a data set.

    Args:
        name: The data set.
        root: Folder below which its videos lie.
        annotations: The list, or the folder of the annotation files; None looks below the root.
        protocol: Which of its protocols; None takes its first.

    Returns:
        `splits`: for each split how many rows are `listed`, `expected` (None where that is not known) and `missing`;
        `queries`: the same of queries that have moments;
        `missing`: the paths of the missing videos; `unlisted`: how many videos no row names; `classes` and
        `expected_classes`.

    Raises:
        ConfigError: If there is no such data set or protocol.
        DatasetError: If annotations are missing, malformed or ambiguous.
    """
    if name not in FACTS:
        raise ConfigError(f"the data sets with known files are {', '.join(FACTS)}; found {name!r}")
    protocol = resolve_protocol(name, protocol)
    reader = find_reader(name)
    files = _locate(reader, root, annotations)
    records = _finish(_read(reader, files, ReadOptions(protocol=protocol)), root, None, 0)
    listed = Counter(record.split for record in records)
    missing = [record for record in records if not files.tree.holds(record.path)]
    missing_by_split = Counter(record.split for record in missing)
    expected = FACTS[name].counts.get(protocol or "", {})
    return {
        "dataset": name,
        "root": str(root),
        "protocol": protocol,
        "splits": {
            split: {
                "listed": listed[split],
                "expected": expected.get(split),
                "missing": missing_by_split[split],
            }
            for split in sorted({*listed, *expected})
        },
        "queries": _count_queries(records, missing, FACTS[name].query_counts.get(protocol or "", {})),
        "missing": [record.path for record in missing],
        "unlisted": len(set(files.tree.paths) - {record.path for record in records}),
        "classes": len({record.class_name for record in records} - {None}),
        "expected_classes": FACTS[name].num_classes,
    }


def _count_queries(
    records: Sequence[VideoRecord], missing: Sequence[VideoRecord], expected: Mapping[str, int]
) -> dict[str, dict[str, int | None]]:
    """By split; nothing of a data set without moments."""
    listed, lost = (
        Counter(moment.split or record.split for record in part for moment in record.moments)
        for part in (records, missing)
    )
    return {
        split: {"listed": listed[split], "expected": expected.get(split), "missing": lost[split]}
        for split in (sorted({*listed, *expected}) if listed else ())
    }


def _locate(reader: DatasetReader, root: Path, annotations: Path | None) -> DatasetFiles:
    return DatasetFiles(root, annotations, folders=reader.facts.annotation_folders if reader.facts is not None else ())


def _read(reader: DatasetReader, files: DatasetFiles, options: ReadOptions) -> list[VideoRecord]:
    if reader.facts is None:
        records = reader.read(files, options)
        assert records is not None
        return records
    files.require_annotations()
    if not files.root.is_dir():
        return read_folder(files.tree, dataset=reader.name)  # says where the videos were expected
    records = reader.read(files, options)
    if records is not None:
        return records
    return read_lists(files) if files.annotations is not None else _read_public_folder(reader, reader.facts, files)


def _read_public_folder(reader: DatasetReader, facts: DatasetFacts, files: DatasetFiles) -> list[VideoRecord]:
    """A data set without annotation files: folders by class, above them folders by split or at least two classes."""
    name = reader.name
    hint = f"Or add the annotations: {facts.layout[0]}. `s4v datasets {name}` says where they come from."
    try:
        records = reader.read_folder(files) if reader.read_folder else read_folder(files.tree, dataset=name)
    except DatasetError as error:
        raise type(error)(f"{error} {hint}") from error
    if not all(r.split for r in records) and (facts.num_classes is None or len({r.class_name for r in records}) < 2):
        raise DatasetError(
            f"{files.root} holds {len(records)} videos of {name} and nothing that tells their splits"
            f"{' and classes' if facts.num_classes else ' and captions'}: expected {{train,val}}/CLASS/VIDEO. {hint}"
        )
    return records


def _finish(
    found: Sequence[VideoRecord],
    root: Path,
    splits: Sequence[str] | None,
    seed: int,
    known_splits: Mapping[str, str] | None = None,
) -> list[VideoRecord]:
    _refuse_unfit(found, root)
    _refuse_repeated(found)
    records = sorted(settle_splits(_join_classes(found), seed, known_splits), key=lambda r: r.video_id.encode())
    if splits is not None:
        known = sorted({record.split for record in records})
        wanted = {split if split in known else fold_split(split) for split in splits}
        if missing := sorted(wanted - set(known)):
            raise DatasetError(f"{root} has the splits {', '.join(known)}; wanted {', '.join(missing)} too (--split)")
        # A store from before may have two spellings of one split.
        records = [r for r in records if r.split in wanted or fold_split(r.split) in wanted]
    return records


def _refuse_unfit(records: Sequence[VideoRecord], root: Path) -> None:
    """The last of the doors: each reader judges its rows where it can name them.

    Raises:
        DatasetError: If a record's path leads out of the root, or a text of it cannot be stored.
    """
    for record in records:
        texts = (record.video_id, record.split, record.class_name or "", record.source_id or "", *record.captions)
        texts += tuple(text for moment in record.moments for text in (moment.query_id, moment.split))
        try:
            if not is_inside(record.path):
                raise ValueError(f"expected a path below {root}, found {record.path!r}")
            for text in (record.path, *texts):
                check_text(text)
        except ValueError as error:
            raise DatasetError(f"a video of {root} is malformed: {error}") from error


def _join_classes(records: Sequence[VideoRecord]) -> list[VideoRecord]:
    """Two spellings of the same accents are one class; a spelling that stands alone stays as it is."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in {record.class_name for record in records}:
        if name is not None and not name.isascii():
            spellings[compose(name)].add(name)
    joined = {name: one for one, names in spellings.items() if len(names) > 1 for name in names}
    return [
        replace(record, class_name=joined[record.class_name]) if record.class_name in joined else record
        for record in records
    ]


def _tell_what_is_no_video(files: DatasetFiles) -> None:
    """Count in one line the files below the root that were not taken, but for annotations that were read."""
    walk = files.tree.walk
    kinds = Counter(walk.endings)
    root = files.root.absolute()
    for file in files.annotation_files:
        path = file.absolute()
        if path.is_relative_to(root) and not is_video_name(path.name) and kinds[ending_of(path.name)] > 0:
            kinds[ending_of(path.name)] -= 1
    shown = [f"{count} {ending or 'without an ending'}" for ending, count in (+kinds).most_common(_MAX_SHOWN)]
    if more := (+kinds).total() - sum(count for _, count in (+kinds).most_common(_MAX_SHOWN)):
        shown.append(f"{more} with other endings")
    if walk.misnamed:
        shown.append(f"{len(walk.misnamed)} whose names are not UTF-8 ({_some(walk.misnamed)}: rename them)")
    if walk.odd:
        shown.append(f"{len(walk.odd)} that are neither files nor folders ({_some(walk.odd)})")
    total = kinds.total() + len(walk.misnamed) + len(walk.odd)
    if total:
        were = "file was" if total == 1 else "files were"
        _log.warning("%d %s not taken for videos: %s (below %s)", total, were, ", ".join(shown), files.root)
    if walk.unreadable:
        _log.warning(
            "%d folders below %s cannot be read, and their videos are no rows: %s",
            *(len(walk.unreadable), files.root, _some(walk.unreadable)),
        )


def _tell_odd_endings(tree: VideoTree, records: Sequence[VideoRecord]) -> None:
    """Count the rows of a table or list whose files are not named as videos: playlists, pictures, the wrong column."""
    odd = {r.path for r in records if ending_of(r.path.rpartition("/")[2]) and not is_video_name(r.path)}
    # Folders of frames may have any name.
    if odd := {path for path in odd if not (tree.root / path).is_dir()}:
        _log.warning(
            "%d rows name files without a video's ending (%s): what is no video becomes a failed row",
            *(len(odd), _some(sorted(odd))),
        )


def _tell_what_is_no_row(tree: VideoTree, records: Sequence[VideoRecord]) -> None:
    """Count the videos that annotations do not name."""
    if unlisted := sorted(set(tree.paths) - {record.path for record in records}):
        _log.warning(
            "%d of %d videos below %s are in no annotation that was read, and are no rows: %s",
            *(len(unlisted), len(tree.paths), tree.root, _some(unlisted)),
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")


def _warn_of_missing(missing: Sequence[VideoRecord], num_records: int, root: Path) -> None:
    counts = Counter(record.split for record in missing)
    _log.warning(
        "%d of %d videos are not below %s (%s): %s. They become rows with the status failed; --split leaves out "
        "splits you do not have.",
        len(missing),
        num_records,
        root,
        ", ".join(f"{split} {count}" for split, count in sorted(counts.items())),
        _some([record.path for record in missing[: _MAX_SHOWN + 1]]),
    )


def _refuse_repeated(records: Sequence[VideoRecord]) -> None:
    repeated = sorted(i for i, count in Counter(r.video_id for r in records).items() if count > 1)
    if repeated:
        shown = ", ".join(repeated[:5])
        raise DatasetError(
            f"{len(repeated)} video ids occur more than once: {shown}. "
            "Ids must be unique: name an id column (--column id=NAME), or remove the repeated rows."
        )
