"""Fixtures: small real videos made with PyAV, small stores made from them, the shared folder where it is there.

`make test` runs in several processes (pytest-xdist): what they share is built by the first of them that asks for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# One thread, here and in processes that tests start: tiny tensors gain nothing from more, and on a busy machine threads
# that wait for each other cost seconds. Where a test asks for two, they wait asleep. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

import av
import hypothesis
import numpy as np
import pytest
import torch

from s4v.extract.config import ExtractConfig
from s4v.extract.extraction import extract_dataset

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared"

torch.set_num_threads(1)

# An example is as slow as what runs beside it makes it: seconds are not what a property is about.
hypothesis.settings.register_profile("side by side", deadline=None)
hypothesis.settings.load_profile("side by side")


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Have a folder built by the first process of this run that asks for its name; all read it, none may change it."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if is_worker else root) / "shared"  # a worker's own is below that of the run
    root.mkdir(exist_ok=True)

    def build(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed in the middle
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def data_path() -> Path:
    """Files that belong to the tests."""
    return DATA


@pytest.fixture(scope="session")
def contents() -> Callable[..., dict[str, bytes]]:
    """All files of a store that a second extraction of the same videos must not change, by their path in it."""

    def read(path: Path, *without: str) -> dict[str, bytes]:
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        left_out = {"stats.json", "checksums.json", "_parts/joined.arrows", *without}
        return {name: file.read_bytes() for name, file in files.items() if name not in left_out}

    return read


@pytest.fixture(scope="session")
def flip_byte() -> Callable[..., None]:
    """Change one bit of a file."""

    def flip(path: Path, place: int = 33) -> None:
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= 1 << place % 8
        path.write_bytes(data)

    return flip


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """Short real files beside the repository, broken ones among them."""
    folder = SHARED / "videos"
    if not (folder / "real").is_dir():
        pytest.skip("../shared/videos is not here: it is not part of the repository")
    return folder


def write_video(
    path: Path,
    *,
    num_frames: int = 12,
    size: tuple[int, int] = (80, 64),
    codec: str = "libx264",
    fps: int = 10,
    seed: int = 0,
    gop: int = 4,
    options: dict[str, str] | None = None,
) -> Path:
    """A video whose frame i shows a bright column at a place that moves with i."""
    width, height = size
    base = np.random.default_rng(seed).integers(0, 90, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        for index in range(num_frames):
            frame = base.copy()
            left = (index * 5 + seed * 3) % (width - 8)
            frame[:, left : left + 8] = 220
            image = av.VideoFrame.from_ndarray(frame.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    return write_video


@pytest.fixture(scope="session")
def video_folder(build_once: Callable[..., Path]) -> Path:
    """Two classes, train and val, 10 good videos; train/walk/broken.mp4 is no video."""
    return build_once("videos", write_video_folder)


def write_video_folder(root: Path) -> None:
    for number in range(4):
        write_video(root / f"train/run/{number}.mp4", seed=number)
        write_video(root / f"train/walk/{number}.mp4", seed=10 + number, num_frames=20)
    write_video(root / "val/run/0.mp4", seed=20)
    write_video(root / "val/walk/0.mp4", seed=21)
    (root / "train/walk/broken.mp4").write_bytes(b"not a video at all" * 50)


def tiny_config(root: Path, out: Path, **changes: object) -> ExtractConfig:
    """An extraction that takes a second or two: a 64-pixel ViT with random weights."""
    values: dict[str, object] = {
        "model": "tiny-clip",
        "weights": "random",
        "dataset": "folder",
        "root": root,
        "out": out,
        "frames": {"train": 6, "": 4},
        "dtype": "float32",
        "device": "cpu",
        "num_decoders": 1,
    }
    return ExtractConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ExtractConfig]:
    return tiny_config


@pytest.fixture(scope="session")
def float_store(video_folder: Path, build_once: Callable[..., Path]) -> Path:
    """A float32 store of `video_folder`. Read it, do not change it."""
    make = lambda root: extract_dataset(tiny_config(video_folder, root / "float32.zarr"))  # noqa: E731
    return build_once("float32", make) / "float32.zarr"


@pytest.fixture(scope="session")
def int8_store(video_folder: Path, build_once: Callable[..., Path]) -> Path:
    """An int8 store of `video_folder`. Read it, do not change it."""
    make = lambda root: extract_dataset(tiny_config(video_folder, root / "int8.zarr", dtype="int8"))  # noqa: E731
    return build_once("int8", make) / "int8.zarr"


@pytest.fixture(scope="session")
def offsets_store(video_folder: Path, build_once: Callable[..., Path]) -> Path:
    """An int8 store of `video_folder` with five pixel frames each. Read it, do not change it."""
    more = dict(dtype="int8", pixel_offsets=(-2, -1, 0, 1, 2))
    make = lambda root: extract_dataset(tiny_config(video_folder, root / "offsets.zarr", **more))  # noqa: E731
    return build_once("five-offsets", make) / "offsets.zarr"


@pytest.fixture(scope="session")
def class_texts_store(video_folder: Path, build_once: Callable[..., Path]) -> Path:
    """An int8 store of `video_folder`, 8 frames of each, with its class names as texts. Read it, do not change it."""
    more = dict(dtype="int8", frames={"": 8}, sampling="reference-dist", class_template="{}")
    make = lambda root: extract_dataset(tiny_config(video_folder, root / "texts.zarr", **more))  # noqa: E731
    return build_once("class-texts", make) / "texts.zarr"


@pytest.fixture(scope="session")
def half_steps_store(video_folder: Path, build_once: Callable[..., Path]) -> Path:
    """The same with 4 frames of each, and pixels half a step behind each. Read it, do not change it."""
    more = dict(dtype="int8", frames={"": 4}, sampling="reference-dist", class_template="{}")
    more["pixel_offsets"] = (0, "0.5step")
    make = lambda root: extract_dataset(tiny_config(video_folder, root / "half-steps.zarr", **more))  # noqa: E731
    return build_once("half-steps", make) / "half-steps.zarr"


@pytest.fixture(scope="session")
def captioned_folder(build_once: Callable[..., Path]) -> Path:
    """Videos of a table with captions: 8 for training, 4 and a broken one for validation; one caption is of two."""
    return build_once("captioned", write_captioned_folder)


def write_captioned_folder(root: Path) -> None:
    lines = ["path,split,caption"]
    for number in range(12):
        name, split = f"{number:02d}.mp4", "train" if number < 8 else "val"
        write_video(root / name, seed=3 * number, num_frames=12 + number)
        lines.append(f"{name},{split},{'a ring moves left' if number in (2, 5) else f'a ring number {number} moves'}")
        if number % 2:
            lines.append(f"{name},{split},here is a red cross that rises for the time {number}")
    (root / "broken.mp4").write_bytes(b"not a video at all" * 50)
    lines.append("broken.mp4,val,a blue square")
    (root / "videos.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def captioned_store(captioned_folder: Path, build_once: Callable[..., Path]) -> Path:
    """A float32 store of `captioned_folder`. Read it, do not change it."""
    make = lambda root: extract_dataset(captioned_config(captioned_folder, root / "captioned.zarr"))  # noqa: E731
    return build_once("captioned-store", make) / "captioned.zarr"


def captioned_config(root: Path, out: Path, **changes: object) -> ExtractConfig:
    """The extraction of `captioned_folder`."""
    table: dict[str, object] = {"dataset": "table", "annotations": root / "videos.csv", "resize": "224"}
    return tiny_config(root, out, **{**table, **changes})


@pytest.fixture(scope="session")
def make_captioned_config() -> Callable[..., ExtractConfig]:
    return captioned_config
