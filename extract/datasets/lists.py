"""`lists`: one video a line, as mmaction2, TSM, Text4Vis, SlowFast, V-JEPA, UniFormer and Side4Video users hold them.

    PATH                            no label
    PATH LABEL
    PATH NUM_FRAMES LABEL           NUM_FRAMES is not used: decoders disagree about it; 0 in all rows: no label
    PATH OFFSET NUM_FRAMES LABEL    OFFSET must be 0

Columns are parted by tab, `::`, semicolon, comma or blanks, and cut from the right: paths may hold blanks. A line that
this does not explain is malformed: no label is guessed, and none becomes a part of a path.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError, DatasetError
from ...store.records import VideoRecord
from ._files import VIDEO_ENDINGS, DatasetFiles, VideoTree, is_video_name
from ._names import check_path, list_bases
from ._rows import MalformedRows, read_csv, read_lines, read_text, split_of_name
from .contract import DatasetReader, ReadOptions
from .kinetics import is_kinetics_table, name_options
from .table import COLUMN_ROLES

_DELIMITERS = ("\t", "::", ";", ",", " ")
_MAX_NUMBERS = 3
_MAX_DIGITS = 18
# Whole, as NumPy writes it too: 3, 3.0, 3.
_INTEGER = re.compile(rf"\s*-?\d{{1,{_MAX_DIGITS}}}(\.0*)?\s*", re.ASCII)
# A video's ending, and something behind it that is no part of a name.
_BEHIND_A_NAME = re.compile(
    rf"(?:{'|'.join(map(re.escape, sorted(VIDEO_ENDINGS)))})[\"']?(?:\s*[;,\t|]|::|\s)\s*\S", re.IGNORECASE
)
_SCORE = re.compile(r"[\s,;]-?\d*\.\d+(e-?\d+)?\s*$", re.IGNORECASE)
# Not the label files of Something-Something, nor UCF101's classInd.txt: public lists number in other orders.
_CLASS_FILES = ("classes.txt", "category.txt", "categories.txt", "labels.txt", "classes.csv", "kinetics*labels.csv")


@dataclass(frozen=True, slots=True)
class _Row:
    file: Path
    line: int
    path: str
    label: int | None


def read_lists(files: DatasetFiles, options: ReadOptions | None = None) -> list[VideoRecord]:
    """Read the list file that the user names, or all in a folder whose names tell a split.

    The class is the name that a class file beside the lists gives to the number; without one, the folder of the
    video where folders and numbers pair up one to one; else the number.

    Raises:
        ConfigError: If no list is named.
        DataNotFoundError: If the root is not there.
        DatasetError: If there is no list, or rows are malformed, all of them in one message, up to 20.
    """
    if files.annotations is None:
        raise ConfigError("--dataset lists needs --annotations, a list file or a folder of them")
    files.require_annotations()
    files.require_root()
    lists = [files.named_file] if files.named_file else _find_lists(files)
    for file in lists:
        _refuse_table(file, files.tree)
    malformed = MalformedRows()
    rows = [row for file in lists for row in _read_rows(file, files.tree, malformed)]
    names = _class_names(files, rows, malformed)
    malformed.refuse()
    if not rows:
        raise DatasetError(f"{', '.join(map(str, lists))}: expected a video a line, found none")
    records = []
    for row in rows:
        path = files.tree.find_path(row.path) or row.path
        class_name = None if row.label is None else names.get(row.label, str(row.label))
        records.append(VideoRecord(video_id=path, path=path, split=split_of_name(row.file), class_name=class_name))
    return records


def sniff_delimiter(lines: Sequence[str]) -> tuple[str, int]:
    """How the lines of a list are cut.

    Args:
        lines: The lines of a file.

    Returns:
        The delimiter, and how many whole numbers stand behind most of the paths; 0 for a list of paths.
    """
    for delimiter in _DELIMITERS:
        counts = Counter(_count_numbers(line, delimiter) for line in lines)
        # Of equal shares the smaller count: more numbers may belong to a path.
        num_numbers = min(counts, key=lambda count: (-counts[count], count), default=0)
        if num_numbers > 0:
            return delimiter, num_numbers
    return " ", 0


def _count_numbers(line: str, delimiter: str) -> int:
    """Whole numbers at the end of a line; the first column is a path whatever it holds."""
    fields = line.split() if delimiter == " " else line.split(delimiter)
    count = 0
    while count < len(fields) - 1 and _INTEGER.fullmatch(fields[-1 - count]):
        count += 1
    return count


def _find_lists(files: DatasetFiles) -> list[Path]:
    found = files.list_annotations("*.txt", "*.csv", "*.tsv", "*.list")
    lists = [file for file in found if split_of_name(file)]
    if not lists:
        raise DatasetError(
            f"{files.annotations} holds no list: expected names such as train.txt, kinetics_val_list.csv. "
            "Or name one file (--annotations)."
        )
    return lists


def _refuse_table(file: Path, tree: VideoTree) -> None:
    """Refuse a table with a header: as a list, its columns would be numbers and parts of paths.

    Raises:
        DatasetError: With the data set that reads it.
    """
    first_line = read_text(file).lstrip().partition("\n")[0].strip()
    if is_kinetics_table(first_line):
        raise DatasetError(
            f"{file} is an official table of Kinetics, not a list. Read it as what it is: {name_options(file)}"
        )
    known = {name for names in COLUMN_ROLES.values() for name in names}
    fields = [field.strip().strip("\"'").lower() for field in re.split(r"[,;\t|]|::|\s", first_line)]
    is_header = all(field in known for field in fields) and (len(fields) > 1 or fields[0] in COLUMN_ROLES["path"])
    if is_header and not tree.holds(first_line):
        raise DatasetError(
            f"{file} begins with a header ({first_line}): it is a table. Read it as one, --dataset table with a name "
            "ending in .csv, or cut the line off."
        )


def _read_rows(file: Path, tree: VideoTree, malformed: MalformedRows) -> list[_Row]:
    lines = read_lines(file)
    delimiter, num_numbers = sniff_delimiter([text for _, text in lines])
    if num_numbers > _MAX_NUMBERS:
        raise DatasetError(
            f"{file}: expected at most {_MAX_NUMBERS} numbers behind a path, found {num_numbers}: {lines[0][1]!r}. "
            "Several labels for a video are not read."
        )
    bases = list_bases(tree.root)
    parsed: list[tuple[int, str, list[int]]] = []
    for line, text in lines:
        try:
            parsed.append((line, *_parse_line(text, delimiter, num_numbers, tree, bases)))
        except ValueError as error:
            malformed.add(file, line, error)
    # VideoMAE's lists for pre-training: PATH 0 -1, or PATH START TOTAL with no start but 0.
    is_unlabelled = num_numbers == 2 and all(numbers[0] == 0 for _, _, numbers in parsed)
    rows = []
    for line, path, numbers in parsed:
        try:
            if num_numbers == _MAX_NUMBERS and numbers[0] != 0:
                raise ValueError(f"expected offset 0, found {numbers[0]}: parts of frame folders are not read")
            label = None if is_unlabelled or not numbers or numbers[-1] == -1 else numbers[-1]
            if label is not None and label < 0:
                raise ValueError(f"expected a label from 0 up, or -1 for none, found {label}")
            rows.append(_Row(file, line, path, label))
        except ValueError as error:
            malformed.add(file, line, error)
    return rows


def _parse_line(
    text: str, delimiter: str, num_numbers: int, tree: VideoTree, bases: Sequence[str]
) -> tuple[str, list[int]]:
    """The path of a line, relative to the root, and the numbers behind it.

    Raises:
        ValueError: If there are fewer numbers than in most lines, or something that is neither path nor number.
    """
    num_numbers_there = _count_numbers(text, delimiter)
    wanted = f"PATH and {num_numbers} whole numbers, parted by {delimiter!r}" if num_numbers else "a path alone"
    if num_numbers_there < num_numbers:
        raise ValueError(f"expected {wanted}, found {text!r}")
    path, *fields = text.rsplit(None if delimiter == " " else delimiter, num_numbers) if num_numbers else [text]
    path = path.strip()
    if len(path) > 2 and path[0] == path[-1] == '"':  # as CSV quotes a path with a comma
        path = path[1:-1].replace('""', '"')
    clean = _clean_path(path, tree, bases)
    # A number or a word more may be a part of the path: only where it is, on the disk.
    is_odd = num_numbers_there > num_numbers or (not is_video_name(path) and bool(_BEHIND_A_NAME.search(path)))
    if num_numbers == 0:
        is_odd = is_odd or (not is_video_name(path) and (";" in path or "\t" in path or bool(_SCORE.search(path))))
    if is_odd and tree.find_path(clean) is None:
        raise ValueError(
            f"expected {wanted}, found {text!r}. Several labels, scores and names behind a path are not read; "
            "where they are a part of it, part the columns by tabs"
        )
    return clean, [int(float(field)) if "." in field else int(field) for field in fields]


def _clean_path(path: str, tree: VideoTree, bases: Sequence[str]) -> str:
    """A path relative to the root; an absolute one of another machine loses its first slash."""
    base = next((base for base in bases if path.startswith(base)), "")
    return tree.find_written(check_path(path.removeprefix(base).lstrip("/"), root=tree.root))


def _class_names(files: DatasetFiles, rows: Sequence[_Row], malformed: MalformedRows) -> Mapping[int, str]:
    """Names by number; empty where neither a class file nor the folders tell them."""
    assert files.annotations is not None
    beside = files.annotations.parent if files.named_file else files.annotations
    class_file = DatasetFiles(files.root, beside).find_annotation(*_CLASS_FILES)
    if class_file is None or class_file == files.named_file:
        return _folders_by_label(rows)
    names = _read_classes(class_file, malformed)
    for row in rows:
        if row.label is not None and row.label not in names:
            malformed.add(row.file, row.line, f"expected a label of {class_file} ({len(names)}), found {row.label}")
    return names


def _read_classes(file: Path, malformed: MalformedRows) -> dict[int, str]:
    """Names by number: a CSV file `id,name`, or one name a line, counted from 0."""
    lines = read_lines(file)
    if not lines or lines[0][1].replace(" ", "").lower() != "id,name":
        # An empty line would number all names behind it in one of two ways.
        if gap := next((place for place, (line, _) in enumerate(lines, start=1) if line != place), None):
            malformed.add(file, gap, "expected a class on every line, found an empty one")
        return {number: name for number, (_, name) in enumerate(lines)}
    names: dict[int, str] = {}
    for line, row in list(read_csv(file))[1:]:
        if len(row) == 2 and _INTEGER.fullmatch(row[0]) and row[1].strip():
            names[int(float(row[0]))] = row[1].strip()
        else:
            malformed.add(file, line, f"expected NUMBER,NAME, found {','.join(row)!r}")
    return names


def _folders_by_label(rows: Sequence[_Row]) -> dict[int, str]:
    folders: dict[int, set[str]] = defaultdict(set)
    labels: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        if row.label is not None:
            folder = row.path.rpartition("/")[0].rpartition("/")[2]
            folders[row.label].add(folder)
            labels[folder].add(row.label)
    # As many pairs as there are numbers and folders, and every folder has a name.
    pairs = {(label, folder) for label, found in folders.items() for folder in found}
    is_paired = len(pairs) == len(folders) == len(labels) and "" not in labels
    return {label: next(iter(found)) for label, found in folders.items()} if is_paired else {}


READER = DatasetReader(name="lists", read=read_lists, names_files=True)
