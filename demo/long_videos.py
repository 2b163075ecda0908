"""Long videos of the small world, for temporal grounding: events one after another, and queries about them.

```
moments.jsonl                   one line for each query, as `--dataset table` reads moments
videos/{train,val}/ID.mp4       and novel/ID.mp4
world.json                      the configuration
```
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..files import write_atomic, write_json
from .captions import Meaning, agrees, describe_scene, word_caption
from .renderer import paint_scene
from .scenes import COLOURS, MOTIONS, REVERSED, SHAPES, Scene, draw_scene
from .world import CONFIG_NAME, FORMATS, MOMENTS_NAME, SPLITS, WorldConfig, clear_folder, write_videos

DURATION_S = 60
LONG_FPS = 9
"""Odd, so that `fps:1`, `fps:2` and `fps:3` take frames symmetrically in every second. Of 10 frames `fps:1` would take
the fifth, which leans to the start, and the place of a bag of frames in time would tell growing from shrinking."""
EVENT_S = (4, 10)
"""The shortest and the longest event. Events begin and end on whole seconds: `fps:1` shows each that many times."""
DISTRACTED_SHARE = 0.75
"""Of each video's queries, rounded up: they have a distractor of either kind."""
MOST_QUERIES = 8
"""Of a video."""

_STREAM = 13
"""Ends the seeds of long videos; see `world.py`."""
_NUM_OTHERS = (1, 3)
"""Events beside the four of two subjects in two motions."""
_SPARE_S = 4
"""Seconds without a subject, at least."""
_NUM_TRIES = 20
"""Captions of an event that are tried before the next event is asked about."""
_NOT_OF_SUBJECT = ("motion", "landmark", "texture")

_Windows = tuple[tuple[int, int], ...]
_Cast = tuple[str, str, str]
"""Shape, colour and motion of an event."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some seconds of a long video between two cuts: an event, or a gap, whose ground shows no subject."""

    start_s: int
    end_s: int
    scene: Scene
    is_event: bool

    @property
    def window(self) -> tuple[int, int]:
        """Where it starts and ends, seconds."""
        return self.start_s, self.end_s


@dataclass(frozen=True, slots=True)
class Query:
    """A caption and the events of one video that it is true of."""

    text: str
    said: Meaning
    windows: _Windows
    """All events that it is true of, in order."""
    motion_windows: _Windows
    """Distractors: another subject with the motion that is asked for ..."""
    subject_windows: _Windows
    """... and the subject that is asked for with another motion."""


@dataclass(frozen=True, slots=True)
class LongVideo:
    """One long video before it is drawn: its place in the world decides all else."""

    split: str
    number: int
    path: str
    seed: tuple[int, ...] = field(repr=False)

    @property
    def video_id(self) -> str:
        """As the annotations have it: `val-00017`."""
        return f"{self.split}-{self.number:05d}"


def list_long_videos(config: WorldConfig) -> Iterator[LongVideo]:
    """The long videos of a world, in the order of its annotations."""
    ending = FORMATS[config.codec].ending
    for place, (split, count) in enumerate(
        zip(SPLITS, (config.num_train, config.num_val, config.num_novel), strict=True)
    ):
        folder = "novel" if split == "novel" else f"videos/{split}"
        for number in range(count):
            path = f"{folder}/{split}-{number:05d}.{ending}"
            yield LongVideo(split, number, path, (config.seed, place, number, _STREAM))


def draw_parts(rng: np.random.Generator, video: LongVideo, config: WorldConfig) -> tuple[Part, ...]:
    """Draw what a long video shows, from its first second to its last, without a hole.

    Two subjects show two motions each, often each other's reversal. So a query about one of these four events has a
    distractor of either kind. One to three events more repeat one of them or are of anything.

    No two events of one shape and motion follow each other in a single cut: a caption could be true of both, and their
    windows would be one.
    """
    casts = _draw_casts(rng)
    while (slots := _arrange(rng, casts)) is None:
        pass
    parts: list[Part] = []
    start_s = 0
    for cast, length_s in slots:
        scene = _draw_scene_of(rng, cast, video, config)
        parts.append(Part(start_s, start_s + length_s, scene, is_event=cast is not None))
        start_s += length_s
    return tuple(parts)


def _draw_casts(rng: np.random.Generator) -> list[_Cast]:
    subjects: list[tuple[str, str]] = []
    while len(subjects) < 2:
        subject = _draw_subject(rng)
        subjects += [subject] if subject not in subjects else []
    first = MOTIONS[rng.integers(len(MOTIONS))]
    others = [motion for motion in MOTIONS if motion != first]
    second = REVERSED[first] if rng.random() < 0.5 else others[rng.integers(len(others))]
    casts = [(*subject, motion) for subject in subjects for motion in (first, second)]
    for _ in range(rng.integers(_NUM_OTHERS[0], _NUM_OTHERS[1] + 1)):
        anything = (*_draw_subject(rng), MOTIONS[rng.integers(len(MOTIONS))])
        casts.append(casts[rng.integers(4)] if rng.random() < 0.5 else anything)
    return casts


def _draw_subject(rng: np.random.Generator) -> tuple[str, str]:
    return SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]


def _arrange(rng: np.random.Generator, casts: Sequence[_Cast]) -> list[tuple[_Cast | None, int]] | None:
    """Events in some order, with their seconds, and gaps (None) between some of them; None where they do not fit."""
    lengths = rng.integers(EVENT_S[0], EVENT_S[1] + 1, len(casts))
    spare_s = DURATION_S - int(lengths.sum())
    if spare_s < _SPARE_S:
        return None
    has_gap = rng.random(len(casts) + 1) < 0.5
    has_gap[rng.integers(len(has_gap))] = True
    gaps = rng.multinomial(spare_s, has_gap / has_gap.sum())
    slots: list[tuple[_Cast | None, int]] = [(None, int(gaps[-1]))]
    for place in rng.permutation(len(casts)).tolist():
        slots += [(casts[place], int(lengths[place])), (None, int(gaps[place]))]
    slots = [(cast, length_s) for cast, length_s in slots if length_s]
    for (one, _), (two, _) in pairwise(slots):
        if one is not None and two is not None and (one[0], one[2]) == (two[0], two[2]):
            return None
    return slots


def _draw_scene_of(rng: np.random.Generator, cast: _Cast | None, video: LongVideo, config: WorldConfig) -> Scene:
    """The scene of an event, or one for a gap, which is painted without its subject."""
    shape, colour, motion = cast or (*_draw_subject(rng), MOTIONS[rng.integers(len(MOTIONS))])
    return draw_scene(
        rng,
        motion=motion,
        shape=shape,
        colours=(colour,),
        kind="novel" if video.split == "novel" else "known",
        num_pebbles=config.num_pebbles,
        contrast=config.contrast,
    )


def judge_query(text: str, said: Meaning, parts: Sequence[Part]) -> Query:
    """Find what a caption is true of in a video, and what nearly is."""
    events = [(part.window, describe_scene(part.scene)) for part in parts if part.is_event]

    def is_of_subject(meaning: Meaning) -> bool:
        return agrees(said, meaning, without=_NOT_OF_SUBJECT)

    return Query(
        text=text,
        said=said,
        windows=tuple(window for window, meaning in events if agrees(said, meaning)),
        motion_windows=tuple(
            window for window, meaning in events if meaning["motion"] == said["motion"] and not is_of_subject(meaning)
        ),
        subject_windows=tuple(
            window for window, meaning in events if meaning["motion"] != said["motion"] and is_of_subject(meaning)
        ),
    )


def draw_queries(rng: np.random.Generator, parts: Sequence[Part], num_queries: int) -> list[Query]:
    """Draw queries of a video, each in other words; the first `DISTRACTED_SHARE` have a distractor of either kind.

    None is true of all that happens in the video: each names a motion, and the video shows several.
    """
    events = [part for part in parts if part.is_event]
    places = cycle(rng.permutation(len(events)).tolist())
    queries: list[Query] = []
    while len(queries) < num_queries:
        meaning = describe_scene(events[next(places)].scene)
        must_distract = len(queries) < math.ceil(DISTRACTED_SHARE * num_queries)
        for _ in range(_NUM_TRIES):
            query = judge_query(*word_caption(meaning, rng), parts)
            is_distracted = bool(query.motion_windows and query.subject_windows)
            is_new = query.text not in [other.text for other in queries]
            if is_new and (is_distracted or not must_distract):
                queries.append(query)
                break
    return queries


def render_long_video(
    video: LongVideo, config: WorldConfig, num_queries: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Paint one long video and ask about it.

    Returns:
        (DURATION_S * LONG_FPS, H, W, 3) uint8, and its lines of the annotations, one for each query.
    """
    rng = np.random.default_rng(video.seed)
    parts = draw_parts(rng, video, config)
    queries = draw_queries(rng, parts, num_queries)
    frames = [
        paint_scene(
            part.scene,
            np.linspace(0, 1, LONG_FPS * (part.end_s - part.start_s)),
            rng,
            shake_px=config.shake_px,
            noise=config.noise,
            with_subject=part.is_event,
        )
        for part in parts
    ]
    return np.concatenate(frames), [
        {
            "qid": f"{video.video_id}-{place}",
            "query": query.text,
            "vid": video.video_id,
            "path": video.path,
            "split": video.split,
            "duration": DURATION_S,
            "relevant_windows": query.windows,
            "said": dict(query.said),
            "motion_windows": query.motion_windows,
            "subject_windows": query.subject_windows,
        }
        for place, query in enumerate(queries)
    ]


def write_long_world(
    folder: Path,
    config: WorldConfig,
    num_queries: int,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Write a world of long videos: one configuration gives the same annotations to the byte and the same frames.

    Args:
        folder: Where to; an earlier world there is replaced, anything else refused.
        config: Of the world.
        num_queries: Of each video.
        report: Told about progress.

    Returns:
        Videos by split.

    Raises:
        ConfigError: If a video cannot have that many queries.
        DatasetError: If the folder holds something that is not an earlier world.
    """
    if not 1 <= num_queries <= MOST_QUERIES:
        raise ConfigError(f"--queries must lie in 1 to {MOST_QUERIES}; found {num_queries}")
    clear_folder(folder)
    write_json(folder / CONFIG_NAME, {**asdict(config), "is_long": True, "num_queries": num_queries})
    videos = list(list_long_videos(config))
    render = partial(render_long_video, config=config, num_queries=num_queries)
    rows = write_videos(folder, videos, render, report, codec=config.codec, fps=LONG_FPS)
    write_atomic(folder / MOMENTS_NAME, partial(_write_lines, rows))
    return {split: sum(video.split == split for video in videos) for split in SPLITS}


def _write_lines(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
