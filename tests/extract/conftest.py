"""Miniatures of data sets: annotation files as texts, videos as empty files where nobody decodes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset
from s4v.extract.pipeline.dask_worker import HandedOut, WorkerJob
from s4v.files import hash_file
from s4v.store.append import order_records
from s4v.store.reader import open_store
from s4v.store.writer import MarkerState


def write_frames(folder: Path, *, num_frames: int = 6, name: str = "{:05d}.jpg", first: int = 1) -> Path:
    """Frame i is a grey of 10 + 20 i, beyond white from black again."""
    folder.mkdir(parents=True)
    for index in range(num_frames):
        frame = np.full((64, 80, 3), (10 + 20 * index) % 256, np.uint8)
        Image.fromarray(frame).save(folder / name.format(first + index), quality=95)
    return folder


@pytest.fixture
def make_frames() -> Callable[..., Path]:
    return write_frames


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Path]:
    """Write files below a root: text or bytes as they are, None for an empty file, all else as JSON."""

    def write(files: dict[str, object] | None = None, *empty: str) -> Path:
        root = tmp_path / "root"
        for name, content in {**(files or {}), **dict.fromkeys(empty)}.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                file.touch()
            elif isinstance(content, bytes):
                file.write_bytes(content)
            else:
                file.write_text(content if isinstance(content, str) else json.dumps(content), newline="")
        return root

    return write


@pytest.fixture(scope="session")
def one_video(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Path:
    return make_video(tmp_path_factory.mktemp("one") / "video.mp4", num_frames=8)


@pytest.fixture
def extract_rows(tmp_path: Path, make_config: Callable[..., object], one_video: Path) -> Callable[..., object]:
    """Put a real video in the place of each named empty file, extract, and return the store."""

    def run(dataset: str, root: Path, *videos: str, **changes: object) -> object:
        for video in videos:
            (root / video).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(one_video, root / video)
        config = make_config(root, tmp_path / "out.zarr", dataset=dataset, frames={"": 2}, num_decoders=1, **changes)
        extract_dataset(config)
        return open_store(config.out)

    return run


@pytest.fixture(scope="session")
def hand_out() -> Callable[..., dict[int, HandedOut]]:
    """Shards of a store as a command hands them out, from the done-markers that they had then."""

    def run(config: ExtractConfig, markers: dict[int, MarkerState | None]) -> dict[int, HandedOut]:
        store = open_store(config.out)
        records, layout = order_records(store, config.read_records()), store.layout
        return {
            shard: HandedOut(
                marker=marker,
                records=[records[row] for row in layout.shard_rows(shard)],
                num_frames=[config.frames_of(records[row].split) for row in layout.shard_rows(shard)],
            )
            for shard, marker in markers.items()
        }

    return run


@pytest.fixture(scope="session")
def worker_job() -> Callable[..., WorkerJob]:
    """A worker's job as that command's workers open it."""
    return lambda config: WorkerJob(config, hash_file(config.out / "zarr.json"))
