import csv
import hashlib
import math
from dataclasses import astuple

import numpy as np
import pytest

from s4v.demo.captions import agrees, describe_scene, list_vocabulary, word_caption
from s4v.demo.renderer import paint_scene
from s4v.demo.scenes import (
    COLOURS,
    FRAME_PX,
    LANDMARKS,
    MOTIONS,
    PAIRS,
    REVERSED,
    SHAPES,
    TEXTURES,
    draw_scene,
    is_novel,
)
from s4v.demo.world import FORMATS, NUM_FRAMES, WorldConfig, encode_video, list_videos, render_video, write_world
from s4v.errors import ConfigError, DatasetError
from s4v.extract.datasets import read_dataset
from s4v.extract.decode.sampling import sample_uniform
from s4v.extract.decode.worker import decode

SMALL = dict(num_train=14, num_val=6, num_novel=4)


def scene_of(motion, seed, **options):
    rng = np.random.default_rng(seed)
    return draw_scene(rng, motion=motion, shape=SHAPES[seed % len(SHAPES)], **options), rng


def test_the_world_is_as_rich_as_it_promises():
    assert len(SHAPES) >= 5 and len(COLOURS) >= 8
    assert sorted(motion for pair in PAIRS for motion in pair) == list(MOTIONS)
    assert all(REVERSED[REVERSED[motion]] == motion != REVERSED[motion] for motion in MOTIONS)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_two_motions_of_a_pair_are_each_other_backwards(pair):
    """Pose by pose, from one seed: what a bag of frames shows is the same for both."""
    moments = np.linspace(0, 1, NUM_FRAMES)
    for seed in range(40):
        one, other = (scene_of(motion, seed)[0] for motion in pair)
        forwards = [astuple(one.subject_at(now)) for now in moments]
        backwards = [astuple(other.subject_at(1 - now)) for now in moments]
        np.testing.assert_allclose(forwards, backwards)
        assert one.subject_at(0) != one.subject_at(1)
        landmarks = [[astuple(s.landmark_at(when)) for when in m] for s, m in ((one, moments), (other, 1 - moments))]
        np.testing.assert_allclose(*landmarks)
        assert one.pebbles == other.pebbles


@pytest.mark.parametrize("wanted", [4, 8, 16])
def test_sampled_frames_lie_symmetrically_in_time(wanted):
    """Else the bag of sampled frames of growing would hold more large frames than that of shrinking."""
    frames = sample_uniform(NUM_FRAMES, wanted)
    assert frames == [NUM_FRAMES - 1 - frame for frame in reversed(frames)]


@pytest.mark.parametrize("motion", MOTIONS)
def test_things_stay_inside_and_apart_unless_one_hides(motion):
    for seed in range(60):
        scene, _ = scene_of(motion, seed)
        for now in np.linspace(0, 1, 9):
            pose = scene.subject_at(now)
            assert pose.radius <= min(pose.x, pose.y, FRAME_PX - pose.x, FRAME_PX - pose.y)
            landmark = scene.landmark_at(now)
            gap = math.hypot(pose.x - landmark.x, pose.y - landmark.y)
            if motion not in ("hiding", "emerging"):
                assert gap > pose.radius + landmark.radius


def test_relations_change_the_distance_and_nothing_else():
    def gaps(motion, seed):
        scene, _ = scene_of(motion, seed)
        return [
            math.hypot(subject.x - landmark.x, subject.y - landmark.y)
            for subject, landmark in ((scene.subject_at(now), scene.landmark_at(now)) for now in (0, 1))
        ]

    for seed in range(40):
        for motion in ("approaching", "hiding"):
            far, near = gaps(motion, seed)
            assert far > near + 5
        for motion in ("parting", "emerging"):
            near, far = gaps(motion, seed)
            assert far > near + 5


def test_known_and_novel_scenes_share_words_and_no_combination():
    drawn = {"known": set(), "novel": set()}
    for kind, found in drawn.items():
        for seed in range(400):
            scene, _ = scene_of("left", seed, kind=kind)
            found.add((scene.colour, scene.ground.texture))
    assert not drawn["known"] & drawn["novel"]
    for kind, found in drawn.items():
        assert all(is_novel(*combination) == (kind == "novel") for combination in found)
        assert {colour for colour, _ in found} == set(COLOURS)
        assert {texture for _, texture in found} == set(TEXTURES)


@pytest.mark.parametrize("seed", range(10))
def test_pixels_show_colour_place_and_occlusion(seed):
    scene, rng = scene_of("hiding", seed, num_pebbles=0, contrast=0.0)
    frames = paint_scene(scene, np.array([0.0, 1.0]), rng, shake_px=0, noise=0).astype(int)
    of_subject = (np.abs(frames - np.asarray(scene.rgb)).max(axis=-1) <= 3).sum(axis=(1, 2))
    assert of_subject[0] > 1.3 * of_subject[1] > 0, "it slips behind, and something is still to be seen"
    first = scene.subject_at(0)
    rows, columns = np.nonzero(np.abs(frames[0] - np.asarray(scene.rgb)).max(axis=-1) <= 3)
    assert abs(columns.mean() - first.x) < 3 and abs(rows.mean() - first.y) < 3


@pytest.mark.parametrize("place", range(3))
def test_knobs_do_what_they_say(place):
    def stills(**options):
        scene, rng = scene_of("turning-left", place, contrast=options.pop("contrast", 1.0))
        return paint_scene(scene, np.full(4, 0.5), rng, **options).astype(float)

    calm = stills(shake_px=0, noise=0)
    assert np.ptp(calm, axis=0).max() == 0
    assert np.ptp(stills(shake_px=1.5, noise=0), axis=0).max() > 20
    assert 4 < (stills(shake_px=0, noise=5) - calm).std() < 6
    plain = stills(shake_px=0, noise=0, contrast=0)
    assert plain.std() < calm.std()


def test_captions_say_what_is_there_in_several_wordings():
    rng = np.random.default_rng(0)
    for motion in MOTIONS:
        scene, _ = scene_of(motion, 3)
        meaning = describe_scene(scene)
        texts, said = zip(*(word_caption(meaning, rng) for _ in range(60)), strict=True)
        assert len(set(texts)) > 20
        assert all(agrees(one, meaning) and one["motion"] == motion for one in said)
        assert not agrees(said[0], {**meaning, "motion": REVERSED[motion]})
        for text, one in zip(texts, said, strict=True):
            assert scene.shape in text
            assert (scene.colour in text.split()) == ("colour" in one)
            assert any(kind in text for kind in LANDMARKS) == ("landmark" in one)


def test_the_vocabulary_holds_every_word_of_a_caption():
    rng = np.random.default_rng(1)
    words = {word for text in list_vocabulary() for word in text.split()}
    for number in range(600):
        scene, _ = scene_of(MOTIONS[number % len(MOTIONS)], number)
        assert set(word_caption(describe_scene(scene), rng)[0].split()) <= words


def digest(folder, pattern):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob(pattern)}


def read_frames(path):
    request = dict(
        path=str(path), num_frames=NUM_FRAMES, sampling="uniform", resize="224", image_size=(FRAME_PX, FRAME_PX)
    )
    return decode({**request, "start_s": None, "end_s": None, "decoder": "auto"}, lambda _: None)


@pytest.mark.parametrize(
    "codec", [codec if codec == "h264" else pytest.param(codec, marks=pytest.mark.slow) for codec in FORMATS]
)
def test_one_seed_gives_one_world(codec, tmp_path):
    config = WorldConfig(num_train=4, num_val=2, num_novel=2, codec=codec)
    for name in ("a", "b"):
        assert write_world(tmp_path / name, config) == {"train": 4, "val": 2, "novel": 2}
    assert digest(tmp_path / "a", "*.csv") == digest(tmp_path / "b", "*.csv")
    videos = list((tmp_path / "a").rglob(f"*.{FORMATS[codec].ending}"))
    assert len(videos) == 8
    for path in videos:
        (facts, one), (_, two) = (read_frames(tmp_path / n / path.relative_to(tmp_path / "a")) for n in ("a", "b"))
        assert facts["num_frames"] == NUM_FRAMES
        assert np.array_equal(one, two)
    write_world(tmp_path / "c", WorldConfig(num_train=4, num_val=2, num_novel=2, codec=codec, seed=1))
    assert digest(tmp_path / "a", "*.csv") != digest(tmp_path / "c", "*.csv")


@pytest.mark.parametrize("codec", FORMATS)
def test_files_do_not_tell_early_frames_from_late_ones(codec, tmp_path):
    """A still scene decodes to the same frame throughout: no key frame is better than what follows it."""
    scene, rng = scene_of("left", 1)
    still = paint_scene(scene, np.array([0.5]), rng)
    path = tmp_path / f"still.{FORMATS[codec].ending}"
    encode_video(path, np.repeat(still, NUM_FRAMES, axis=0), codec=codec)
    _, pixels = read_frames(path)
    assert np.ptp(pixels[0, :, 0], axis=0).max() == 0


def test_pebbles_leave_the_frame_as_often_as_they_enter():
    ends = np.array([[p.first, p.last] for s in range(800) for p in scene_of("up", s)[0].pebbles])
    outside = ((ends < 0) | (ends > FRAME_PX)).any(axis=2).mean(axis=0)
    assert outside.min() > 0.03
    assert abs(outside[0] - outside[1]) < 4 * (outside.mean() * 2 / len(ends)) ** 0.5


def test_a_world_replaces_a_world_and_nothing_else(tmp_path):
    write_world(tmp_path / "a", WorldConfig(num_train=3, num_val=1, num_novel=1, codec="mpeg4"))
    write_world(tmp_path / "a", WorldConfig(num_train=2, num_val=1, num_novel=0))
    assert len(list(tmp_path.rglob("*.mp4"))) == 3 and not list(tmp_path.rglob("*.avi"))
    (tmp_path / "mine/videos").mkdir(parents=True)
    (tmp_path / "mine/videos.csv").write_text("my own")
    with pytest.raises(DatasetError, match="not an earlier world .it has no world.json.: choose another --out"):
        write_world(tmp_path / "mine", WorldConfig(num_train=1))
    with pytest.raises(DatasetError, match="is a file: name a folder"):
        write_world(tmp_path / "mine/videos.csv", WorldConfig(num_train=1))
    assert (tmp_path / "mine/videos.csv").read_text() == "my own"


def test_decoded_frames_are_the_painted_ones(tmp_path):
    config = WorldConfig(num_train=1, num_val=0, num_novel=0, noise=0)
    write_world(tmp_path, config)
    (video,) = list_videos(config)
    painted, _ = render_video(video, config)
    _, pixels = read_frames(tmp_path / video.path)
    assert np.abs(pixels[0, :, 0].astype(int) - painted).mean() < 5, "what 4:2:0 and the quantiser leave"


def test_ordinary_readers_read_the_world(tmp_path):
    write_world(tmp_path, WorldConfig(**SMALL))
    rows = list(csv.DictReader((tmp_path / "videos.csv").open()))
    for column in ("motion", "shape_motion"):
        records = read_dataset("table", tmp_path, annotations=tmp_path / "videos.csv", columns={"label": column})
        label_of = {row["video_id"]: row[column] for row in rows}
        assert {r.video_id: r.class_name for r in records} == label_of
        assert all(len(set(record.captions)) == 3 for record in records)
        counts = {split: sum(r.split == split for r in records) for split in ("train", "val", "novel")}
        assert counts == {"train": 14, "val": 6, "novel": 4}
    in_folders = read_dataset("folder", tmp_path / "videos")
    motion_of = {row["path"].removeprefix("videos/"): row["motion"] for row in rows}
    assert {r.video_id: r.class_name for r in in_folders}.items() <= motion_of.items()
    assert {r.split for r in in_folders} == {"train", "val"}


def test_every_class_is_shown_equally_often():
    videos = list(list_videos(WorldConfig(num_train=120, num_val=0, num_novel=0)))
    assert {(v.shape, v.motion) for v in videos} == {(shape, motion) for shape in SHAPES for motion in MOTIONS}
    assert len({v.seed for v in videos}) == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "av1"}, "--codec takes h264, vp9, mpeg4; found 'av1'"),
        ({"num_train": -1}, "--train must lie in 0 to 999,999; found -1"),
        ({"noise": math.nan}, "--noise must lie in"),
        ({"num_train": 0, "num_val": 0, "num_novel": 0}, "a world needs a video"),
    ],
)
def test_a_world_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        WorldConfig(**options)
