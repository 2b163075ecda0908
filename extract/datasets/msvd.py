"""MSVD: lists of ids, and captions in a pickle or in the corpus's own text file."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ...store.records import VideoRecord
from ._clips import RETRIEVAL_CLIPS, make_retrieval_recipe
from ._files import DatasetFiles
from ._names import check_name, check_text
from ._rows import MalformedRows, read_lines, shorten
from .contract import DatasetFacts, DatasetReader, ReadOptions

_LISTS = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"}


def read_msvd(files: DatasetFiles, options: ReadOptions) -> list[VideoRecord] | None:
    """Read the lists that are there, and the captions of each video in their order.

    Returns:
        Records, or None where neither lists nor captions are there.

    Raises:
        DatasetError: If rows are malformed, all of them in one message, up to 20, or a file is missing.
    """
    caption_files = ("raw-captions.pkl", "AllVideoDescriptions.txt")
    if not files.list_annotations(*_LISTS.values(), *caption_files):
        return None
    lists = {split: file for split, name in _LISTS.items() if (file := files.find_annotation(name))}
    if not lists:
        files.require_annotation(*_LISTS.values())
    caption_file = files.require_annotation(*caption_files)
    malformed = MalformedRows()
    is_pickle = caption_file.suffix.lower() == ".pkl"
    captions = (_read_pickled if is_pickle else _read_descriptions)(caption_file, malformed)
    records = []
    for split, file in lists.items():
        for line, video_id in read_lines(file):
            if not captions.get(video_id):
                malformed.add(file, line, f"expected an id with captions in {caption_file}, found {video_id!r}")
                continue
            try:
                check_name(video_id)
            except ValueError as error:
                malformed.add(file, line, error)
                continue
            path = files.tree.find_name(video_id) or f"YouTubeClips/{video_id}.avi"
            records.append(
                VideoRecord(
                    video_id=video_id, source_id=video_id, path=path, split=split, captions=tuple(captions[video_id])
                )
            )
    malformed.refuse()
    return records


def load_plain_pickle(file: Path) -> Any:
    """Unpickle a file that may hold str, list and dict, and nothing else: no code in it can run.

    Raises:
        DatasetError: If it is no pickle, or holds anything else.
    """
    try:
        # Python 2 wrote the file at large: its byte strings are UTF-8.
        value = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="utf-8").load()
        _require_plain(value)
    # What pickle raises for bytes that are no pickle is not one kind of error.
    except (pickle.UnpicklingError, ValueError, LookupError, AttributeError, TypeError, EOFError) as error:
        raise DatasetError(f"{file} must be a pickle of str, list and dict alone: {error}") from error
    return value


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"found {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("found a persistent id")


def _require_plain(value: Any) -> None:
    """Walk without recursion: a deep nest must not exhaust the stack; a list that holds itself is walked once."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if type(item) is str:
            continue
        if type(item) not in (list, dict):
            raise ValueError(f"found {type(item).__name__}")
        if id(item) not in seen:
            seen.add(id(item))
            waiting.extend([*item, *item.values()] if isinstance(item, dict) else item)


def _read_pickled(file: Path, malformed: MalformedRows) -> dict[str, list[str]]:
    """Captions by id from `{id: [[word, word, ...], ...]}`."""
    value = load_plain_pickle(file)
    if not isinstance(value, dict):
        raise DatasetError(f"{file}: expected a dict of captions by id, found {type(value).__name__}")
    captions: dict[str, list[str]] = {}
    for video_id, texts in value.items():
        if isinstance(texts, list) and all(isinstance(words, list) and _are_texts(words) for words in texts):
            try:
                captions[video_id] = [check_text(" ".join(words)) for words in texts]
            except ValueError as error:
                malformed.add(file, f"id {video_id}", error)
        else:
            malformed.add(file, f"id {video_id}", f"expected a list of lists of words, found {shorten(texts)}")
    return captions


def _are_texts(words: list[Any]) -> bool:
    return all(isinstance(word, str) for word in words)


def _read_descriptions(file: Path, malformed: MalformedRows) -> dict[str, list[str]]:
    """Captions by id from lines `ID CAPTION`; lines that begin with `#` are comments."""
    captions: dict[str, list[str]] = {}
    for line, text in read_lines(file):
        if text.startswith("#"):
            continue
        video_id, _, caption = text.partition(" ")
        if caption.strip():
            captions.setdefault(video_id, []).append(caption.strip())
        else:
            malformed.add(file, line, f"expected ID CAPTION, found {text!r}")
    return captions


READER = DatasetReader(
    name="msvd",
    read=read_msvd,
    facts=DatasetFacts(
        name="msvd",
        title="MSVD",
        source="Microsoft Research Video Description Corpus: YouTubeClips.tar; lists in CLIP4Clip's msvd_data.zip",
        layout=(
            "train_list.txt, val_list.txt, test_list.txt",
            "raw-captions.pkl or AllVideoDescriptions.txt",
            "YouTubeClips/ID.avi, in any folder",
        ),
        annotation_folders=("msvd_data",),
        counts={"": {"train": 1200, "val": 100, "test": 670}},
        clip_settings=RETRIEVAL_CLIPS,
        recipe=make_retrieval_recipe("msvd"),
    ),
)
