"""Long videos: what happens in them, what is asked of them, and what ordinary readers read."""

import json
import math
from dataclasses import astuple, replace
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.demo.captions import agrees, describe_scene
from s4v.demo.long_videos import (
    DISTRACTED_SHARE,
    DURATION_S,
    EVENT_S,
    LONG_FPS,
    MOST_QUERIES,
    draw_parts,
    draw_queries,
    list_long_videos,
    render_long_video,
    write_long_world,
)
from s4v.demo.scenes import FRAME_PX, REVERSED, is_novel
from s4v.demo.world import WorldConfig, encode_video, write_world
from s4v.errors import ConfigError, DatasetError
from s4v.extract.datasets import read_dataset
from s4v.extract.decode.sampling import sample_open_ended
from s4v.extract.decode.worker import decode

NUM_QUERIES = 4
MANY = WorldConfig(num_train=150, num_val=40, num_novel=10)
FEW = WorldConfig(num_train=2, num_val=1, num_novel=0)


def draw(video, config=MANY, num_queries=NUM_QUERIES):
    rng = np.random.default_rng(video.seed)
    parts = draw_parts(rng, video, config)
    return parts, draw_queries(rng, parts, num_queries)


@pytest.fixture(scope="module")
def drawn():
    return [(video, *draw(video)) for video in list_long_videos(MANY)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "w"
    assert write_long_world(folder, FEW, NUM_QUERIES) == {"train": 2, "val": 1, "novel": 0}
    return folder


def read_lines(folder):
    return [json.loads(line) for line in (folder / "moments.jsonl").read_text().splitlines()]


def read_frames(path, sampling):
    request = dict(path=str(path), num_frames=1, sampling=sampling, resize="224", image_size=(FRAME_PX, FRAME_PX))
    facts, pixels = decode({**request, "start_s": None, "end_s": None, "decoder": "auto"}, lambda _: None)
    return facts, pixels[0, :, 0]


def test_events_and_gaps_fill_a_video_without_a_hole(drawn):
    for _, parts, _ in drawn:
        assert parts[0].start_s == 0 and parts[-1].end_s == DURATION_S
        assert all(one.end_s == two.start_s for one, two in pairwise(parts))
        events = [part for part in parts if part.is_event]
        assert 5 <= len(events) <= 7 and len(parts) > len(events)
        assert all(EVENT_S[0] <= event.end_s - event.start_s <= EVENT_S[1] for event in events)
        assert all(part.end_s > part.start_s for part in parts)
    assert any(one.is_event and two.is_event for _, parts, _ in drawn for one, two in pairwise(parts)), "cuts"


def test_windows_are_all_events_that_a_query_is_true_of(drawn):
    """Again, word by word of what is said, over all events."""
    counts = []
    for _, parts, queries in drawn:
        assert len({query.text for query in queries}) == len(queries) == NUM_QUERIES
        for query in queries:
            true = []
            for part in parts:
                meaning = describe_scene(part.scene)
                if part.is_event and all(meaning.get(name) == value for name, value in query.said.items()):
                    true.append((part.start_s, part.end_s))
            assert list(query.windows) == true
            assert 0 < len(true) < sum(part.is_event for part in parts), "not everything"
            assert all(end < start for (_, end), (start, _) in pairwise(true)), "two windows never are one"
            counts.append(len(true))
    assert max(counts) >= 3 and np.mean(np.array(counts) > 1) > 0.1


def test_distractors_are_where_they_are_promised(drawn):
    reversals = 0
    for _, parts, queries in drawn:
        num_distracted = 0
        meaning_at = {part.window: describe_scene(part.scene) for part in parts if part.is_event}
        for query in queries:
            assert not {*query.motion_windows, *query.subject_windows} & set(query.windows)
            subject = {name: query.said[name] for name in ("shape", "colour", "size") if name in query.said}
            motion = query.said["motion"]
            for window, meaning in meaning_at.items():
                is_same = agrees(subject, meaning)
                assert (window in query.motion_windows) == (meaning["motion"] == motion and not is_same)
                assert (window in query.subject_windows) == (meaning["motion"] != motion and is_same)
            num_distracted += bool(query.motion_windows) and bool(query.subject_windows)
            reversals += any(meaning_at[window]["motion"] == REVERSED[motion] for window in query.subject_windows)
        assert num_distracted >= math.ceil(DISTRACTED_SHARE * NUM_QUERIES)
    assert reversals / (len(drawn) * NUM_QUERIES) > 0.35, "the subject does the reverse, too"


@pytest.mark.parametrize("num_queries", [1, 3, MOST_QUERIES])
def test_any_number_of_queries_is_found(num_queries):
    for video in list_long_videos(replace(MANY, num_train=30)):
        queries = draw(video, num_queries=num_queries)[1]
        assert len(queries) == num_queries
        distracted = [query for query in queries if query.motion_windows and query.subject_windows]
        assert len(distracted) >= math.ceil(DISTRACTED_SHARE * num_queries)


def test_training_shows_no_novel_combination(drawn):
    for video, parts, _ in drawn:
        for part in parts:
            assert is_novel(part.scene.colour, part.scene.ground.texture) == (video.split == "novel")


def test_splits_have_videos_of_their_own(drawn):
    assert len({video.seed for video, _, _ in drawn}) == len(drawn) == 200
    assert len({video.path for video, _, _ in drawn}) == 200
    poses = {split: {astuple(p.scene.first) for v, parts, _ in drawn if v.split == split for p in parts} for split in
             ("train", "val", "novel")}  # fmt: skip
    assert not poses["train"] & poses["val"] and not poses["train"] & poses["novel"]


@pytest.mark.parametrize(("sampling", "a_second"), [("fps:1", 1), ("fps:2", 2), ("fps:3", 3)])
def test_sampled_frames_lie_symmetrically_in_every_event(sampling, a_second):
    """Each second gives the same number of frames, at places that are the same from either end: a growing subject is
    not larger on average than a shrinking one."""
    times_s = np.arange(DURATION_S * LONG_FPS) / LONG_FPS
    frames = np.array(sample_open_ended(sampling, times_s, DURATION_S)).reshape(DURATION_S, a_second)
    places = frames - LONG_FPS * np.arange(DURATION_S)[:, None]
    assert (places == places[0]).all() and (places >= 0).all() and (places < LONG_FPS).all()
    assert places[0].tolist() == [LONG_FPS - 1 - place for place in reversed(places[0].tolist())]


def test_a_motion_goes_far_between_sampled_frames(drawn):
    """In the longest event at one frame a second: a still step would be no motion to see."""
    moments = np.linspace(0, 1, EVENT_S[1] * LONG_FPS)[LONG_FPS // 2 :: LONG_FPS]
    assert len(moments) == EVENT_S[1]
    for _, parts, _ in drawn:
        for part in parts:
            poses = np.array([astuple(part.scene.subject_at(now)) for now in moments])
            steps = np.abs(np.diff(poses, axis=0)).max(axis=0)
            assert max(steps[:3]) > 0.4 or steps[3] > 0.1  # pixels, or radians


def test_one_seed_gives_one_world(world, tmp_path):
    write_long_world(tmp_path / "b", FEW, NUM_QUERIES)
    assert (tmp_path / "b/moments.jsonl").read_bytes() == (world / "moments.jsonl").read_bytes()
    (path,) = {line["path"] for line in read_lines(world) if line["split"] == "val"}
    assert np.array_equal(*(read_frames(folder / path, "all")[1] for folder in (world, tmp_path / "b")))
    first = next(list_long_videos(FEW))
    other = next(list_long_videos(replace(FEW, seed=1)))
    assert draw(first)[1] == draw(first)[1] != draw(other)[1]
    more = {video.video_id: video for video in list_long_videos(MANY)}
    assert all(more[video.video_id] == video for video in list_long_videos(FEW)), "a larger world begins alike"


def test_the_table_reader_reads_queries_and_windows(world):
    records = read_dataset("table", world, annotations=world / "moments.jsonl")
    lines = read_lines(world)
    assert [(record.video_id, record.split) for record in records] == [
        ("train-00000", "train"),
        ("train-00001", "train"),
        ("val-00000", "val"),
    ]
    moments = {m.query_id: (text, m) for r in records for text, m in zip(r.captions, r.moments, strict=True)}
    assert len(moments) == len(lines) == 3 * NUM_QUERIES
    for line in lines:
        text, moment = moments[line["qid"]]
        assert text == line["query"] and moment.duration_s == line["duration"] == DURATION_S
        assert moment.windows == tuple(map(tuple, line["relevant_windows"]))
        assert all(0 <= start < end <= DURATION_S for start, end in moment.windows)
        assert (world / line["path"]).is_file()
    drawn = [query for video in list_long_videos(FEW) for query in draw(video, FEW)[1]]
    assert [line["relevant_windows"] for line in lines] == [list(map(list, query.windows)) for query in drawn]
    assert [line["said"] for line in lines] == [dict(query.said) for query in drawn]


def test_files_show_a_subject_within_windows_and_none_in_gaps(tmp_path):
    """At the first and the last frame of each part, in calm pictures: the subject's colour is there, or it is not."""
    config = replace(FEW, num_pebbles=0, contrast=0, noise=0, shake_px=0)
    for video in list_long_videos(config):
        path = tmp_path / "long.mp4"
        painted, _ = render_long_video(video, config, NUM_QUERIES)
        encode_video(path, painted, fps=LONG_FPS)
        facts, frames = read_frames(path, "all")
        assert facts["num_frames"] == len(frames) == DURATION_S * LONG_FPS
        assert np.abs(frames.astype(int) - painted).mean() < 5
        for part in draw(video, config)[0]:
            for place in (LONG_FPS * part.start_s, LONG_FPS * part.end_s - 1):
                distance = np.abs(frames[place].astype(int) - np.asarray(part.scene.rgb)).max(axis=-1)
                assert ((distance < 40).sum() > 20) == part.is_event, (video, place)


def test_a_long_world_replaces_a_world_and_nothing_else(tmp_path):
    write_world(tmp_path / "w", WorldConfig(num_train=1, num_val=1, num_novel=1))
    write_long_world(tmp_path / "w", WorldConfig(num_train=1, num_val=0, num_novel=0, codec="mpeg4"), 1)
    assert not (tmp_path / "w/videos.csv").exists() and not list(tmp_path.rglob("*.mp4"))
    assert len(read_lines(tmp_path / "w")) == len(list(tmp_path.rglob("*.avi"))) == 1
    write_world(tmp_path / "w", WorldConfig(num_train=1, num_val=0, num_novel=0))
    assert not (tmp_path / "w/moments.jsonl").exists() and not list(tmp_path.rglob("*.avi"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/moments.jsonl").write_text("my own")
    with pytest.raises(DatasetError, match="not an earlier world"):
        write_long_world(tmp_path / "mine", FEW, 1)
    assert (tmp_path / "mine/moments.jsonl").read_text() == "my own"


@pytest.mark.parametrize("num_queries", [0, MOST_QUERIES + 1])
def test_queries_that_cannot_be_are_refused_before_a_world_goes(num_queries, world):
    before = (world / "moments.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=f"--queries must lie in 1 to 8; found {num_queries}"):
        write_long_world(world, FEW, num_queries)
    assert (world / "moments.jsonl").read_bytes() == before


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_command_writes_what_it_says(world, tmp_path):
    answer = run("world", "--out", tmp_path / "w", "--long", "--train", 2, "--val", 1, "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["videos"] == {"train": 2, "val": 1, "novel": 0}
    assert (tmp_path / "w/moments.jsonl").read_bytes() == (world / "moments.jsonl").read_bytes()
    assert json.loads((tmp_path / "w/world.json").read_text())["num_queries"] == NUM_QUERIES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queries", 3], "--queries is for long videos: add --long, or leave it out"),
        (["--long", "--queries", 9], "--queries must lie in 1 to 8; found 9"),
        (["--long", "--train", 0, "--val", 0], "a world needs a video"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path):
    answer = run("world", "--out", tmp_path / "w", *options)
    assert answer.exit_code != 0 and message in answer.stderr
    assert len([line for line in answer.stderr.splitlines() if message in line]) == 1
    assert "Traceback" not in answer.output and not (tmp_path / "w").exists()
