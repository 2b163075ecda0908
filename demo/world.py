"""Write the small world to disk: video files and their annotations, in layouts that the ordinary readers read.

```
videos.csv                         one row for each caption: video_id, path, split, labels, caption
videos/{train,val}/MOTION/ID.mp4   also as the `folder` reader takes them, with the motion as the class
novel/MOTION/ID.mp4                colours on textures that no training video and no still of tiny-clip shows
world.json                         the configuration
```
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import av
import numpy as np

from ..errors import ConfigError, DatasetError
from ..files import write_atomic, write_json
from .captions import describe_scene, word_caption
from .renderer import paint_scene
from .scenes import MOTIONS, SHAPES, draw_scene

NUM_FRAMES = 20
"""`uniform` takes 4, 8 or 16 of 20 frames symmetrically: 4 of 24 would be 3, 9, 15, 21, which leans to the end, and
the place of a bag of frames in time would tell growing from shrinking."""
FPS = 10
SPLITS = ("train", "val", "novel")
ANNOTATIONS_NAME = "videos.csv"
MOMENTS_NAME = "moments.jsonl"
"""Of long videos."""
CONFIG_NAME = "world.json"

_NUM_CAPTIONS = 3
_STREAM = 11
"""Ends the seeds of videos: numpy pads seeds with zeros, and stills and class orders have seeds of their own."""


@dataclass(frozen=True, slots=True)
class _Format:
    ending: str
    codec: str
    options: dict[str, str]


FORMATS: dict[str, _Format] = {
    "h264": _Format("mp4", "libx264", {"qp": "18", "preset": "veryfast"}),
    "vp9": _Format(
        "webm", "libvpx-vp9", {"b": "0", "crf": "16", "qmin": "16", "qmax": "16", "deadline": "good", "cpu-used": "4"}
    ),
    # The quality is a quantiser, of 31, times FFmpeg's FF_QP2LAMBDA.
    "mpeg4": _Format("avi", "mpeg4", {"flags": "+qscale", "global_quality": str(3 * 118)}),
}
"""By the name that `--codec` takes. Quantisers are constant and every frame is a key frame: else the first frame of a
video would be coded better than the last, and an unordered bag of frames would hold a trace of their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """How many videos there are, and how hard they are to tell apart."""

    num_train: int = 2400
    """Training videos."""
    num_val: int = 240
    """Held-out videos."""
    num_novel: int = 120
    """Videos of combinations that training never shows."""
    seed: int = 0
    """Of everything."""
    codec: str = "h264"
    """h264 (mp4), vp9 (webm), mpeg4 (avi)."""
    num_pebbles: int = 1
    """Distractors in each video.

    Grey ones, that drift about.
    """
    contrast: float = 0.4
    """Of the grounds' textures."""
    shake_px: float = 0.3
    """Of the camera, pixels.

    Standard deviation of its place in each frame.
    """
    noise: float = 2.0
    """Of the sensor, of 255.

    Standard deviation of each value of the picture.
    """

    def __post_init__(self) -> None:
        if self.codec not in FORMATS:
            raise ConfigError(f"--codec takes {', '.join(FORMATS)}; found {self.codec!r}")
        counts = {"--train": self.num_train, "--val": self.num_val, "--novel": self.num_novel}
        knobs = {"--contrast": self.contrast, "--shake": self.shake_px, "--noise": self.noise}
        for option, value in {**counts, "--pebbles": self.num_pebbles, "--seed": self.seed, **knobs}.items():
            if not 0 <= value < 1e6:
                raise ConfigError(f"{option} must lie in 0 to 999,999; found {value:g}")
        if not any(counts.values()):
            raise ConfigError("--train, --val and --novel are all 0: a world needs a video")


@dataclass(frozen=True, slots=True)
class WorldVideo:
    """One video before it is painted: its place in the world decides all else."""

    split: str
    number: int
    shape: str
    motion: str
    path: str
    seed: tuple[int, ...] = field(repr=False)

    @property
    def video_id(self) -> str:
        """As the annotations have it: `val-00017`."""
        return f"{self.split}-{self.number:05d}"


def list_videos(config: WorldConfig) -> Iterator[WorldVideo]:
    """The videos of a world, in the order of its annotations; each 60 of a split show all shapes in all motions."""
    classes = [(shape, motion) for shape in SHAPES for motion in MOTIONS]
    ending = FORMATS[config.codec].ending
    for place, (split, count) in enumerate(
        zip(SPLITS, (config.num_train, config.num_val, config.num_novel), strict=True)
    ):
        order = np.random.default_rng([config.seed, place]).permutation(len(classes))
        folder = "novel" if split == "novel" else f"videos/{split}"
        for number in range(count):
            shape, motion = classes[order[number % len(classes)]]
            path = f"{folder}/{motion}/{split}-{number:05d}.{ending}"
            yield WorldVideo(split, number, shape, motion, path, (config.seed, place, number, _STREAM))


def render_video(video: WorldVideo, config: WorldConfig) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Paint one video and say what it shows.

    Returns:
        (NUM_FRAMES, H, W, 3) uint8, and its rows of the annotations, one for each caption.
    """
    rng = np.random.default_rng(video.seed)
    scene = draw_scene(
        rng,
        motion=video.motion,
        shape=video.shape,
        kind="novel" if video.split == "novel" else "known",
        num_pebbles=config.num_pebbles,
        contrast=config.contrast,
    )
    meaning = describe_scene(scene)
    facts = {
        "video_id": video.video_id,
        "path": video.path,
        "split": video.split,
        "motion": video.motion,
        "shape_motion": f"{video.shape} {video.motion}",
        **{name: meaning.get(name, "") for name in ("shape", "colour", "size", "texture", "landmark")},
    }
    captions: list[str] = []
    while len(captions) < _NUM_CAPTIONS:
        caption, _ = word_caption(meaning, rng)
        if caption not in captions:
            captions.append(caption)
    moments = np.linspace(0, 1, NUM_FRAMES)
    frames = paint_scene(scene, moments, rng, shake_px=config.shake_px, noise=config.noise)
    return frames, [{**facts, "caption": caption} for caption in captions]


def write_world(
    folder: Path, config: WorldConfig, report: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Write a world: the same configuration gives the same annotations to the byte and the same frames.

    Args:
        folder: Where to; an earlier world there is replaced, anything else refused.
        config: Of the world.
        report: Told about progress.

    Returns:
        Videos by split.

    Raises:
        DatasetError: If the folder holds something that is not an earlier world.
    """
    clear_folder(folder)
    # First, so that a world which was not finished is known as one; its annotations come last.
    write_json(folder / CONFIG_NAME, asdict(config))
    videos = list(list_videos(config))
    rows = write_videos(folder, videos, partial(render_video, config=config), report, codec=config.codec)
    write_atomic(folder / ANNOTATIONS_NAME, partial(_write_table, rows))
    return {split: sum(video.split == split for video in videos) for split in SPLITS}


class _HasPath(Protocol):
    """A video before it is painted."""

    @property
    def path(self) -> str: ...


_Video = TypeVar("_Video", bound=_HasPath)
_Row = TypeVar("_Row")


def write_videos(
    folder: Path,
    videos: Sequence[_Video],
    render: Callable[[_Video], tuple[np.ndarray, list[_Row]]],
    report: Callable[[str, int, int], None],
    *,
    codec: str,
    fps: int = FPS,
) -> list[_Row]:
    """Paint videos and write their files.

    Args:
        folder: Of the world.
        videos: With paths below it.
        render: Gives the frames of one, and its rows of the annotations.
        report: Told about progress.
        codec: One of `FORMATS`.
        fps: Frames a second.

    Returns:
        The rows, in the order of the videos.
    """
    for parent in sorted({(folder / video.path).parent for video in videos}):
        parent.mkdir(parents=True, exist_ok=True)

    def write(video: _Video) -> list[_Row]:
        frames, rows = render(video)
        encode_video(folder / video.path, frames, codec=codec, fps=fps)
        return rows

    gathered: list[_Row] = []
    with ThreadPoolExecutor(os.cpu_count()) as painters:
        for done, rows in enumerate(painters.map(write, videos), start=1):
            gathered += rows
            report("generating videos", done, len(videos))
    return gathered


def clear_folder(folder: Path) -> None:
    """Make room for a world.

    Raises:
        DatasetError: If something else lies there.
    """
    if folder.exists() and not folder.is_dir():
        raise DatasetError(f"{folder} is a file: name a folder for the world (--out)")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        raise DatasetError(
            f"{folder} holds something that is not an earlier world (it has no {CONFIG_NAME}): choose another --out"
        )
    for name in (ANNOTATIONS_NAME, MOMENTS_NAME):
        (folder / name).unlink(missing_ok=True)
    for name in ("videos", "novel"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    folder.mkdir(parents=True, exist_ok=True)


def _write_table(rows: Sequence[dict[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def encode_video(path: Path, frames: np.ndarray, *, codec: str = "h264", fps: int = FPS) -> None:
    """Write (n, H, W, 3) uint8 frames as one file, in one of `FORMATS`."""
    form = FORMATS[codec]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(form.codec, rate=fps, options={**form.options, "g": "1", "threads": "1"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in [*(av.VideoFrame.from_ndarray(image, format="rgb24") for image in frames), None]:
            container.mux(stream.encode(frame))
