"""Charades-STA: a window of a video for each sentence, in lines of text or of JSON."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

from ...store.records import Moment, VideoRecord
from ._files import DatasetFiles
from ._names import check_name, check_text
from ._queries import (
    GROUNDING_CLIPS,
    QueryList,
    find_by_split,
    make_grounding_recipe,
    place_by_name,
    read_query_lines,
)
from ._rows import MalformedRows, read_csv, read_lines, shorten
from .contract import DatasetFacts, DatasetReader, ReadOptions

_TEXTS = {"train": ("charades_sta_train.txt",), "test": ("charades_sta_test.txt",)}
_JSON_LINES = {
    "train": ("charades*train*.jsonl",),
    "val": ("charades*val*.jsonl",),
    "test": ("charades*test*.jsonl",),
}
_LENGTHS = "Charades_v1_*.csv"
_LINE = re.compile(r"(\S+)\s+(\S+)\s+(\S+?)\s*##(.*)")
_HELD_OUT_OF = 10


def read_charades_sta(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read sentences with their windows: lines of JSON where there are such, else the published text files.

    The protocol `held-out` makes a tenth of the training videos, by the hash of their names, the split `val`.

    Returns:
        Records, or None where no annotation file is there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20.
    """
    queries, malformed = QueryList(), MalformedRows()
    if found := find_by_split(files, _JSON_LINES):
        for split, file in found.items():
            read_query_lines(file, split, queries, malformed)
    elif texts := find_by_split(files, _TEXTS):
        lengths = _read_lengths(files, malformed)
        for split, file in texts.items():
            for line, text in read_lines(file):
                try:
                    video_id, sentence, window = _parse_line(text)
                    moment = Moment(query_id=f"{split}_{line}", duration_s=lengths.get(video_id), windows=(window,))
                    queries.add(video_id, sentence, moment, split=split)
                except ValueError as error:
                    malformed.add(file, line, error)
    else:
        return None
    malformed.refuse()
    records = queries.as_records(place_by_name(files.tree))
    return [_hold_out(record) for record in records] if options.protocol == "held-out" else records


def _parse_line(text: str) -> tuple[str, str, tuple[float, float]]:
    """Read `AB12C 24.3 30.4##person turns a light on.`: video, sentence and window."""
    parts = _LINE.fullmatch(text)
    if parts is None or not parts[4].strip():
        raise ValueError(f"expected VIDEO START END##SENTENCE, found {shorten(text)}")
    try:
        window = float(parts[2]), float(parts[3])
    except ValueError:
        raise ValueError(f"expected seconds in VIDEO START END##SENTENCE, found {shorten(text)}") from None
    if not all(abs(second) < float("inf") for second in window):
        raise ValueError(f"expected seconds in VIDEO START END##SENTENCE, found {shorten(text)}")
    return check_name(parts[1]), check_text(parts[4].strip()), window


def _read_lengths(files: DatasetFiles, malformed: MalformedRows) -> dict[str, float]:
    """Seconds of each video, as Charades has them; none where its tables are not there."""
    lengths: dict[str, float] = {}
    for file in files.list_annotations(_LENGTHS):
        rows = list(read_csv(file))
        header = [name.strip() for name in rows[0][1]] if rows else []
        if not {"id", "length"} <= set(header):
            malformed.add(file, 1, f"expected the columns id and length, found {', '.join(header)[:120]}")
            continue
        for line, values in rows[1:]:
            row = dict(zip(header, values, strict=False))
            try:
                lengths[row["id"]] = float(row["length"])
            except (KeyError, ValueError):
                malformed.add(file, line, f"expected an id and a length in seconds, found {shorten(values)}")
    return lengths


def _hold_out(record: VideoRecord) -> VideoRecord:
    """With the split `val` where a training video is one of the tenth that is held out."""
    number = int(hashlib.sha256(record.video_id.encode()).hexdigest()[:8], 16)
    is_held_out = record.split == "train" and number % _HELD_OUT_OF == 0
    return replace(record, split="val") if is_held_out else record


READER = DatasetReader(
    name="charades-sta",
    read=read_charades_sta,
    facts=DatasetFacts(
        name="charades-sta",
        title="Charades-STA",
        source="Charades-STA (Gao, Sun, Yang, Nevatia, 2017); videos and lengths: Charades (Allen Institute for AI)",
        layout=(
            "charades_sta_train.txt, charades_sta_test.txt, with Charades_v1_train.csv, Charades_v1_test.csv",
            "or charades_train.jsonl, charades_test.jsonl",
            "AB12C.mp4, in any folder",
        ),
        annotation_folders=("Charades",),
        counts={"official": {"train": 5336, "test": 1334}},
        query_counts={"official": {"train": 12_404, "test": 3720}},
        protocols=("official", "held-out"),
        clip_settings=GROUNDING_CLIPS,
        recipe=make_grounding_recipe("charades-sta", "fps:1"),
    ),
)
