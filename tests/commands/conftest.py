"""Miniatures of the ten public data sets: official annotation files beside a handful of real, small videos."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LENGTHS = (41, 30, 53, 19)
"""Frames of the videos, in turns: more and fewer than the test views of a clip."""
_CODECS = {".mp4": "libx264", ".avi": "mpeg4", ".webm": "libvpx"}

Write = Callable[[Path, Callable[[str], None]], None]
"""Writes a data set's annotations below a root, and asks for the videos that they name."""


def _write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (root / name).write_bytes(content)
        else:
            (root / name).write_text(content if isinstance(content, str) else json.dumps(content))


def _rows(*splits: str) -> Iterator[tuple[int, str, int]]:
    """Number, split and class of each video: two of training and of test, one of validation."""
    numbers = iter(range(100))
    for split in splits:
        for place in range(1 if split in ("val", "validation") else 2):
            yield next(numbers), split, place % 2


def write_kinetics(root: Path, need: Callable[[str], None]) -> None:
    for split in ("train", "val", "test"):
        lines = [f"{'label,' * (split != 'test')}youtube_id,time_start,time_end,split"]
        for number, of, label in _rows("train", "val", "test"):
            if of == split:
                name, clip = ("air drumming", "zumba")[label], f"abcdefgh{number:03d}"
                lines.append(f"{f'{name},' * (split != 'test')}{clip},5,15,{split.replace('val', 'validate')}")
                need(f"{split}/{name if split != 'test' else ''}/{clip}_000005_000015.mp4")
        _write(root, {f"{split}.csv": "\n".join(lines) + "\n"})


CLASSES = ("Pushing something from left to right", "Pushing something from right to left")


def write_something_v1(root: Path, need: Callable[[str], None]) -> None:
    rows = list(_rows("train", "validation", "test"))
    for split in ("train", "validation", "test"):
        lines = [f"{n}{f';{CLASSES[label]}' * (split != 'test')}" for n, of, label in rows if of == split]
        _write(root, {f"something-something-v1-{split}.csv": "\n".join(lines) + "\n"})
    _write(root, {"something-something-v1-labels.csv": "\n".join(CLASSES) + "\n"})
    for number, *_ in rows:
        need(f"20bn-something-something-v1/{number}/")


def write_something_v2(root: Path, need: Callable[[str], None]) -> None:
    rows = list(_rows("train", "validation", "test"))
    for split in ("train", "validation", "test"):
        entries = [
            {"id": str(n), **({"template": CLASSES[label].replace("something", "[something]")} if of != "test" else {})}
            for n, of, label in rows
            if of == split
        ]
        _write(root, {f"labels/{split}.json": entries})
    _write(root, {"labels/labels.json": {name: str(number) for number, name in enumerate(CLASSES)}})
    for number, *_ in rows:
        need(f"20bn-something-something-v2/{number}.webm")


def write_ucf(root: Path, need: Callable[[str], None]) -> None:
    names = ("Archery", "YoYo")
    lists: dict[str, list[str]] = {"trainlist01.txt": [], "testlist01.txt": []}
    for number, split, label in _rows("train", "test"):
        path = f"{names[label]}/v_{names[label]}_g{number:02d}_c01.avi"
        lists[f"{split}list01.txt"].append(f"{path} {label + 1}" if split == "train" else path)
        need(f"UCF-101/{path}")
    texts = {name: "\n".join(lines) + "\n" for name, lines in lists.items()}
    _write(root / "ucfTrainTestlist", {"classInd.txt": "1 Archery\n2 YoYo\n", **texts})


def write_hmdb(root: Path, need: Callable[[str], None]) -> None:
    lists: dict[str, list[str]] = {"chew": [], "wave": []}
    for number, split, label in _rows("train", "test"):
        name = sorted(lists)[label]
        lists[name].append(f"{number}_{name}.avi {1 if split == 'train' else 2} ")
        need(f"{name}/{number}_{name}.avi")
    for name, lines in lists.items():
        _write(root, {f"testTrainMulti_7030_splits/{name}_test_split1.txt": "\n".join(lines) + "\n"})


def write_msrvtt(root: Path, need: Callable[[str], None]) -> None:
    rows = list(_rows("train", "test"))
    sentences = [
        {"caption": f"somebody folds {n + 3} paper planes", "video_id": f"video{n}", "sen_id": 2 * n + place}
        for n, *_ in rows
        for place in range(2)
    ]
    videos = [{"video_id": f"video{n}", "split": split, "id": n} for n, split, _ in rows]
    test = [n for n, split, _ in rows if split == "test"]
    _write(
        root,
        {
            "MSRVTT_data.json": {"videos": videos, "sentences": sentences},
            "MSRVTT_train.9k.csv": "video_id\n" + "".join(f"video{n}\n" for n, split, _ in rows if split == "train"),
            "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n"
            + "".join(f"ret{n},msr{n},video{n},a person drops {n} boxes\n" for n in test),
        },
    )
    for number, *_ in rows:
        need(f"videos/video{number}.mp4")


def write_msvd(root: Path, need: Callable[[str], None]) -> None:
    rows = list(_rows("train", "val", "test"))
    names = {number: f"-4wsuPCj{number:03d}_5_15" for number, *_ in rows}
    for split in ("train", "val", "test"):
        _write(root, {f"{split}_list.txt": "".join(f"{names[n]}\n" for n, of, _ in rows if of == split)})
    captions = {
        name: [["a", "cat", "eats", str(number)], ["the", "cat", str(number)]] for number, name in names.items()
    }
    _write(root, {"raw-captions.pkl": pickle.dumps(captions)})
    for name in names.values():
        need(f"YouTubeClips/{name}.avi")


def write_vatex(root: Path, need: Callable[[str], None]) -> None:
    files = {"train": "vatex_training_v1.0", "val": "vatex_validation_v1.0", "test": "vatex_public_test_english_v1.1"}
    entries: dict[str, list[dict[str, object]]] = {split: [] for split in files}
    for number, split, _ in _rows(*files):
        clip = f"abcdefgh{number:03d}_000055_000065"
        entries[split].append({"videoID": clip, "enCap": [f"a man lifts {number} bags", f"lifting, number {number}"]})
        need(f"{split}_video/{clip}.mp4")
    _write(root, {f"{name}.json": entries[split] for split, name in files.items()})


MINIATURES: dict[str, Write] = {
    "k400": write_kinetics,
    "k600": write_kinetics,
    "k700": write_kinetics,
    "ssv1": write_something_v1,
    "ssv2": write_something_v2,
    "ucf101": write_ucf,
    "hmdb51": write_hmdb,
    "msrvtt": write_msrvtt,
    "msvd": write_msvd,
    "vatex": write_vatex,
}


@pytest.fixture(scope="session")
def sample_videos(
    tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]
) -> Callable[[str, int], Path]:
    """A video of each length and ending, or a folder of frames for the ending "/", made when it is first asked for."""
    folder = tmp_path_factory.mktemp("samples")

    def sample(ending: str, number: int) -> Path:
        length = LENGTHS[number % len(LENGTHS)]
        path = folder / f"{length}{ending.strip('/')}"
        if not path.exists() and ending == "/":
            path.mkdir()
            for index in range(length):
                frame = np.full((64, 80, 3), 4 * index, np.uint8)
                Image.fromarray(frame).save(path / f"{index + 1:05d}.jpg", quality=90)
        elif not path.exists():
            make_video(path, num_frames=length, seed=length, codec=_CODECS[ending])
        return path

    return sample


@pytest.fixture(scope="session")
def write_miniature(sample_videos: Callable[[str, int], Path]) -> Callable[[str, Path], Path]:
    """Write a data set's miniature below a root."""

    def write(name: str, root: Path) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        paths: list[str] = []
        MINIATURES[name](root, paths.append)
        for number, path in enumerate(paths):
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.endswith("/"):
                shutil.copytree(sample_videos("/", number), target)
            else:
                shutil.copy(sample_videos(target.suffix, number), target)
        return root

    return write
