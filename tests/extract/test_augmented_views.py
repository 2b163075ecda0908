"""Views that are drawn: what is drawn, how it is rendered, and what a store holds of it."""

import random
import shutil
from dataclasses import replace
from math import isclose

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from s4v.backbone.vision_tower import build_backbone
from s4v.errors import ConfigError, StoreMismatchError
from s4v.extract.batching import batch_slots
from s4v.extract.datasets import READERS
from s4v.extract.datasets.report import list_cached
from s4v.extract.decode import image_operations
from s4v.extract.decode.augmented_views import STEPS, draw_box, draw_view, mirror_name, render_augmented, seed_view
from s4v.extract.decode.image_operations import OPERATIONS, apply_operations, draw_operations, find_argument
from s4v.extract.decode.views import centre_view, render_view
from s4v.extract.decode.worker import decode
from s4v.extract.extraction import extract_dataset
from s4v.extract.plan import plan_command
from s4v.retrieve.index_writer import build_index
from s4v.store.manifest import read_table, read_views
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.records import Operation, View, name_views
from s4v.store.verify import verify_store

# Of the first version: a store that is gone on with has the views that it was begun with.
GOLDEN_SEEDS = [118892305500760, 70886634761750]
GOLDEN_BOXES = [(75, 5, 238, 251), (124, 15, 166, 197), (37, 14, 183, 231)]
GOLDEN_FLIPS = [False, True, False]
GOLDEN_GREYS = [3, 4, 8, 17, 18, 19, 26, 30, 31]
GOLDEN_OPERATIONS = {
    1: [("Equalize", None), ("AutoContrast", None)],
    2: [("SolarizeAdd", 78.0), ("AutoContrast", None)],
    4: [("ShearX", 0.213217)],
    5: [("Solarize", 89.0), ("Invert", None), ("SolarizeAdd", 80.0)],
    6: [("AutoContrast", None), ("Rotate", -17.746988)],
    7: [("TranslateY", -0.311302), ("Equalize", None)],
}
CENTRE = centre_view(320, 240, "256", (224, 224))


def draw(seed, steps=STEPS, class_name=None, centre=CENTRE):
    return draw_view(centre, steps, seed=seed, class_name=class_name)


# What is drawn


def test_draws_are_what_they_were():
    assert [seed_view(0, "a.mp4", number) for number in (1, 2)] == GOLDEN_SEEDS
    views = [draw(seed) for seed in (1, 2, 3)]
    assert [(view.x, view.y, view.width, view.height) for view in views] == GOLDEN_BOXES
    assert [view.flip for view in views] == GOLDEN_FLIPS
    for seed, expected in GOLDEN_OPERATIONS.items():
        operations = draw(seed).augmentation.operations
        assert [one.name for one in operations] == [name for name, _ in expected]
        assert [one.argument for one in operations] == pytest.approx([value for _, value in expected], abs=1e-6)
    greys = [seed for seed in range(40) if draw(seed).augmentation.grey]
    assert greys == GOLDEN_GREYS


@given(seed=st.integers(0, 2**48 - 1), width=st.integers(16, 2000), height=st.integers(16, 2000))
def test_a_box_lies_in_the_frame_and_has_the_area_and_the_shape(seed, width, height):
    x, y, box_width, box_height = draw_box(width, height, random.Random(seed))
    assert 0 <= x <= x + box_width <= width and 0 <= y <= y + box_height <= height
    assert box_width >= 1 and box_height >= 1
    if 3 / 4 <= width / height <= 4 / 3:  # else a fallback may be smaller
        # A pixel is rounded away on either side.
        assert (box_width + 1) * (box_height + 1) >= 0.08 * width * height
        assert (box_width - 1) / (box_height + 1) <= 4 / 3 and (box_width + 1) / max(1, box_height - 1) >= 3 / 4


@pytest.mark.parametrize("size", [(1000, 30), (30, 1000), (1000, 1), (1, 1000)])
def test_a_box_that_fits_nowhere_is_torchvisions(size):
    from torchvision.transforms import RandomResizedCrop

    class Never(random.Random):
        """Draws the whole area, which no box of an allowed shape has."""

        def random(self):
            return 1.0 - 2**-53

    picture = Image.new("RGB", size)
    # Ten tries that cannot succeed: torchvision then takes the same box in the middle.
    y, x, height, width = RandomResizedCrop.get_params(picture, [1.0, 1.0], [3 / 4, 4 / 3])
    assert draw_box(*size, Never()) == (x, y, width, height)


def test_boxes_are_spread_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    picture = Image.new("RGB", (341, 256))
    theirs = np.array([RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = np.array([draw_box(341, 256, random.Random(seed)) for seed in range(4000)])[:, [1, 0, 3, 2]]
    # Of 4,000 draws each: means of x, y, width and height within four standard errors of their difference.
    error = np.sqrt((theirs.var(axis=0) + ours.var(axis=0)) / 4000)
    assert (np.abs(theirs.mean(axis=0) - ours.mean(axis=0)) < 4 * error).all()


@given(seed=st.integers(0, 2**48 - 1), steps=st.sets(st.sampled_from(STEPS), min_size=1))
def test_a_step_that_is_left_out_changes_no_other(seed, steps):
    view, full = draw(seed, tuple(steps)), draw(seed)
    assert view == draw(seed, tuple(steps)), "a pure function"
    if "crop" in steps:
        assert (view.x, view.y, view.width, view.height) == (full.x, full.y, full.width, full.height)
    else:
        assert (view.x, view.y, view.width, view.height) == (CENTRE.x, CENTRE.y, CENTRE.width, CENTRE.height)
    assert view.flip == (full.flip and "flip" in steps)
    assert view.augmentation.grey == (full.augmentation.grey and "grey" in steps)
    assert view.augmentation.operations == (full.augmentation.operations if "randaugment" in steps else ())


def test_shares_of_what_is_drawn():
    views = [draw(seed) for seed in range(4000)]
    counts = np.array([sum(view.flip for view in views), sum(view.augmentation.grey for view in views)])
    # Four standard deviations of 4,000 draws are at most 127.
    assert (np.abs(counts - [2000, 800]) < 127).all()
    names = [one.name for view in views for one in view.augmentation.operations]
    assert abs(len(names) - 8000) < 4 * 64, "four, each with a probability of a half"
    assert set(names) == set(OPERATIONS)
    assert max(names.count(name) for name in OPERATIONS) < 1.25 * 8000 / 15


def test_views_of_other_videos_seeds_and_numbers_are_others():
    seeds = {seed_view(seed, name, view) for seed in (0, 1) for name in ("a", "b") for view in (1, 2, 11)}
    assert len(seeds) == 12 and all(0 <= seed < 2**48 for seed in seeds)


# Classes that a mirror image changes

PAIRS = [
    ("Pulling something from left to right", "Pulling something from right to left"),
    ("Pushing something from left to right", "Pushing something from right to left"),
    ("Turning the camera left while filming something", "Turning the camera right while filming something"),
    ("turning-left", "turning-right"),
    ("ring left", "ring right"),
    ("Swipe_Left", "Swipe_Right"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_counterpart_of_a_class_is_found_by_its_name(one, other):
    assert (mirror_name(one), mirror_name(other)) == (other, one)
    flipped = next(seed for seed in range(99) if draw(seed, ("flip",)).flip)
    straight = next(seed for seed in range(99) if not draw(seed, ("flip",)).flip)
    assert draw(flipped, ("flip",), one).augmentation.class_name == other
    assert draw(straight, ("flip",), one).augmentation.class_name is None


@pytest.mark.parametrize("name", ["Putting something upright on the table", "cleft", "brighten", "Rotating something"])
def test_other_classes_are_their_own_counterpart(name):
    assert mirror_name(name) == name
    assert {draw(seed, ("flip",), name).augmentation.class_name for seed in range(9)} == {None}


# Pixels


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_timms(name, monkeypatch):
    from timm.data import auto_augment

    theirs = name + "Increasing" if name + "Increasing" in auto_augment._RAND_INCREASING_TRANSFORMS else name
    theirs = theirs + "Rel" if name.startswith("Translate") else theirs
    assert theirs in auto_augment._RAND_INCREASING_TRANSFORMS
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels[:20] //= 3  # autocontrast and equalize have something to do
    picture = Image.fromarray(pixels)
    hparams = {"interpolation": Image.Resampling.BICUBIC}
    most = 9.99 if name == "Posterize" else 11.0  # at 10 timm asks Pillow for no bits, and is refused
    for magnitude in (-1.0, 0.0, 2.5, 6.3, 7.0, 7.49, 9.9, most):
        for is_negative in (False, True):
            transform = auto_augment.AugmentOp(theirs, prob=1.0, magnitude=magnitude, hparams=dict(hparams))
            monkeypatch.setattr(auto_augment.random, "random", lambda is_negative=is_negative: 0.9 * is_negative)
            argument = find_argument(name, magnitude, is_negative=is_negative)
            ours = apply_operations(picture, [Operation(name=name, argument=argument)])
            assert np.array_equal(np.asarray(ours), np.asarray(transform(picture))), (magnitude, is_negative)


def test_there_are_timms_operations_and_no_others():
    from timm.data import auto_augment

    made = auto_augment.rand_augment_transform("rand-m7-n4-mstd0.5-inc1", {})
    names = [one.name.removesuffix("Increasing").removesuffix("Rel") for one in made.ops]
    assert names == list(OPERATIONS)
    settings = {(one.prob, one.magnitude, one.magnitude_std) for one in made.ops}
    ours = (image_operations.PROBABILITY, image_operations.MAGNITUDE, image_operations.MAGNITUDE_DEVIATION)
    assert settings == {ours} and made.num_layers == image_operations.NUM_OPERATIONS
    drawn = [
        one.argument for seed in range(3000) for one in draw_operations(random.Random(seed)) if one.name == "ShearX"
    ]
    levels = np.abs(drawn) / 0.3 * 10
    assert isclose(levels.mean(), 7, abs_tol=0.1) and isclose(levels.std(), 0.5, abs_tol=0.1)
    assert 0.4 < np.mean(np.array(drawn) < 0) < 0.6


def test_a_view_is_rendered_as_torchvision_does():
    from torchvision.transforms import functional

    frame = np.random.default_rng(1).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    for seed in range(12):
        view = draw(seed, ("crop", "flip", "grey"))
        picture = Image.fromarray(frame).resize((view.resized_width, view.resized_height), Image.Resampling.BICUBIC)
        place = (view.y, view.x, view.height, view.width)
        picture = functional.resized_crop(picture, *place, [224, 224], functional.InterpolationMode.BILINEAR)
        picture = functional.hflip(picture) if view.flip else picture
        picture = functional.rgb_to_grayscale(picture, 3) if view.augmentation.grey else picture
        assert np.array_equal(render_view(frame, view), np.asarray(picture))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**48 - 1))
def test_a_view_goes_through_its_dict_and_stays_itself(seed):
    view = draw(seed, class_name="turning-left")
    assert View.from_dict(view.as_dict()) == view
    frame = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    pixels = render_augmented(frame, view)
    assert pixels.shape == (224, 224, 3) and pixels.flags.owndata and pixels.flags.c_contiguous


def test_all_frames_of_a_view_share_one_draw(tmp_path, make_video):
    path = make_video(tmp_path / "v.mp4", num_frames=12)
    request = dict(path=str(path), num_frames=6, sampling="uniform", resize="256", image_size=(64, 64), decoder="auto")
    request |= {"start_s": None, "end_s": None, "seed": 5, "video_id": "v", "class_name": None}
    facts, pixels = decode({**request, "views": "augment:3", "augmentation": STEPS}, print)
    _, plain = decode({**request, "resize": "256", "views": "centre"}, print)
    assert pixels.shape == (4, 6, 1, 64, 64, 3) and np.array_equal(pixels[0], plain[0])
    assert [view["seed"] for view in facts["views"]] == [None, *(seed_view(5, "v", number) for number in (1, 2, 3))]
    more, _ = decode({**request, "views": "augment:4", "augmentation": STEPS}, print)
    assert more["views"][:4] == facts["views"], "fewer views are the first of more"


# What is asked for


@pytest.mark.parametrize(
    "name", ["augment", "augment:", "augment:0", "augment:-1", "augment:x", "augment:04", "augment:256"]
)
def test_a_number_that_is_none_is_refused(make_config, tmp_path, name):
    with pytest.raises(ConfigError, match=r"--views augment:N takes a number of views from 1 to 255.*found '" + name):
        make_config(tmp_path, tmp_path / "s.zarr", views={"train": name, "": "centre"})


@pytest.mark.parametrize(
    ("views", "where"), [({"": "augment:2"}, "all splits"), ({"val": "augment:2", "": "centre"}, "val")]
)
def test_a_split_that_evaluates_has_no_drawn_views(make_config, tmp_path, views, where):
    with pytest.raises(ConfigError, match=f"for the split train.*found it for {where}.*--views train=augment:2,centre"):
        make_config(tmp_path, tmp_path / "s.zarr", views=views)


@pytest.mark.parametrize("steps", [(), ("crop", "crop"), ("crops",)])
def test_unknown_steps_are_refused(make_config, tmp_path, steps):
    with pytest.raises(ConfigError, match="--augmentation takes some of randaugment,crop,flip,grey; found"):
        make_config(tmp_path, tmp_path / "s.zarr", augmentation=steps)


def test_data_sets_augment_as_the_reference_does():
    steps = {name: reader.recipe.augmentation for name, reader in READERS.items()}
    assert steps["ssv1"] == steps["ssv2"] == ("randaugment", "crop", "flip")
    assert {steps[name] for name in ("k400", "k700", "ucf101", "folder", "table")} == {("crop", "flip", "grey")}
    assert {steps[name] for name in ("msrvtt", "msvd", "vatex")} == {("crop",)}


# A store


VIEWS = {"train": "augment:2", "": "centre"}


@pytest.fixture(scope="module")
def augmented(video_folder, make_config, build_once):
    """Training rows of a centre and two drawn views, of all steps."""
    config = lambda root: make_config(video_folder, root / "s.zarr", views=VIEWS, augmentation=STEPS)  # noqa: E731
    return config(build_once("augmented", lambda root: extract_dataset(config(root))))


def test_a_store_says_what_was_drawn_and_the_pixels_come_from_that(augmented, video_folder):
    store = open_store(augmented.out)
    assert store.attributes["views"] == {"": "centre", "train": "augment:2"}
    assert store.facts.augmentation == STEPS and store.facts.format_version == 3
    assert store.layout.num_views == 3 and verify_store(store) == []
    table = store.read_manifest(["path", "split", "status", "views", "augmentations", "num_views", "frame_indices"])
    num_looked_at = 0
    for number, row in enumerate(table.to_pylist()):
        if row["status"] != "ok":
            continue
        views = read_views(row["views"], row["augmentations"])
        assert len(views) == row["num_views"] == (3 if row["split"] == "train" else 1)
        assert views[0].augmentation is None and views[0].seed is None
        places = [[0, 3]] * len(views)
        pixels = store.read_clips([number] * len(views), places, view=range(len(views)), arrays=("pixels",)).pixels
        frames = decode_whole(video_folder / row["path"])
        for view, shown in zip(views, pixels, strict=True):
            for place, frame in zip(places[0], shown, strict=True):
                again = render_view(frames[row["frame_indices"][place]], view)
                assert np.array_equal(again, frame[0])
                num_looked_at += 1
    assert num_looked_at == 2 * (8 * 3 + 2)


def decode_whole(path):
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_tokens_of_drawn_views_are_the_towers_on_their_pixels(augmented):
    store = open_store(augmented.out)
    backbone = build_backbone("tiny-clip", weights="random", device=torch.device("cpu")).load_weights()
    rows = store.layout.shard_rows(0)
    table = store.read_manifest(["status", "num_views", "num_cached_frames"]).slice(0, len(rows)).to_pylist()
    assert {row["status"] for row in table} == {"ok"}
    counts = [[row[name] for row in table] for name in ("num_cached_frames", "num_views")]
    for slots in batch_slots(*counts, augmented.batch_size):
        row, view, place = (np.array(column) for column in zip(*slots, strict=True))
        held = store.read_clips(row, place[:, None], view=view)
        live = backbone.encode_frames(torch.from_numpy(held.pixels[:, 0, 0]), store.layout.layers)
        for layer, tokens in enumerate(live.patches):
            assert np.array_equal(held.patches[:, 0, layer], tokens.numpy())  # float32, in the store's own batches


@pytest.mark.slow  # three extractions
def test_a_store_does_not_depend_on_decoders_or_interruptions(augmented, tmp_path, contents):
    config = replace(augmented, out=tmp_path / "s.zarr", num_decoders=3)
    extract_dataset(replace(config, limit=4))
    extract_dataset(replace(config, views=None, augmentation=None))  # as it was begun
    assert contents(config.out, "zarr.json") == contents(augmented.out, "zarr.json")


def test_other_steps_or_views_are_not_gone_on_with(augmented):
    with pytest.raises(StoreMismatchError, match="augmentation"):
        extract_dataset(replace(augmented, augmentation=("crop",)))
    with pytest.raises(StoreMismatchError, match="views"):
        extract_dataset(replace(augmented, views={"train": "augment:3", "": "centre"}))


def test_a_plain_store_is_what_it_was(float_store, augmented):
    store = open_store(float_store)
    assert "augmentation" not in store.attributes
    for name in ("videos.parquet",):
        assert "augmentations" not in read_table(float_store / name, ["video_id"]).column_names
        import pyarrow.parquet as pq

        assert "augmentations" not in pq.read_schema(float_store / name).names
        assert "augmentations" in pq.read_schema(augmented.out / name).names
    rows = range(store.layout.num_rows)
    plain, drawn = (open_store(path).read_embeddings(rows) for path in (float_store, augmented.out))
    np.testing.assert_allclose(drawn[:, :1], plain, rtol=1e-4, atol=1e-5)  # other frames share their batches


def test_a_search_looks_at_the_centre_alone(augmented, float_store, tmp_path):
    shown = open_store(augmented.out).read_shown_embeddings()
    splits = np.array(open_store(augmented.out).input_columns()["split"].to_pylist())
    assert np.isnan(shown[splits == "train", 1:]).all()
    for path, out in ((augmented.out, tmp_path / "a"), (float_store, tmp_path / "b")):
        build_index(open_store(path), out)
    vectors = [np.load(tmp_path / name / "pooled.npy") for name in ("a", "b")]
    np.testing.assert_allclose(*vectors, atol=1e-5)


@pytest.mark.slow
def test_parts_are_merged_and_rows_appended(augmented, video_folder, make_video, tmp_path, contents):
    parts = []
    for part in (1, 2):
        config = replace(augmented, out=tmp_path / f"{part}.zarr", part=(part, 2))
        extract_dataset(config)
        parts.append(config.out)
    merge_stores(parts, tmp_path / "whole.zarr")
    left_out = ("zarr.json", "fidelity.json")
    assert contents(tmp_path / "whole.zarr", *left_out) == contents(augmented.out, *left_out)
    root = tmp_path / "videos"
    shutil.copytree(video_folder, root)
    make_video(root / "train/run/new.mp4", seed=33)
    extract_dataset(replace(augmented, out=tmp_path / "whole.zarr", root=root, append=True))
    store = open_store(tmp_path / "whole.zarr")
    assert verify_store(store) == [] and store.facts.format_version == 3
    row = store.read_manifest(["video_id", "num_views", "views", "augmentations"]).to_pylist()[-1]
    assert (row["video_id"], row["num_views"]) == ("train/run/new.mp4", 3)
    drawn = read_views(row["views"], row["augmentations"])[1:]
    assert [view.seed for view in drawn] == [seed_view(augmented.seed, row["video_id"], number) for number in (1, 2)]


def test_a_damaged_shard_of_drawn_views_is_repaired(augmented, tmp_path, flip_byte, contents):
    config = replace(augmented, out=tmp_path / "s.zarr")
    shutil.copytree(augmented.out, config.out)
    flip_byte(next((config.out / "patches").glob("c.0.*")), 999)
    assert verify_store(open_store(config.out))
    extract_dataset(replace(config, repair=True))
    assert contents(config.out) == contents(augmented.out)


def test_they_are_planned_and_told(augmented, caplog):
    plan = plan_command(replace(augmented, out=augmented.out.with_name("none.zarr")))
    assert plan.frames == 9 * 6 * 3 + 2 * 4, "9 training videos, the broken one too"
    assert plan.splits["train"].views == 3
    recipe = {"frames": {"": 4}, "clips": {"": 1}, "validation_clip": (), "sampling": "uniform", "resize": "256"}
    told = list_cached({**recipe, "views": VIEWS, "augmentation": STEPS})
    assert told[0] == "train: 4 frames, views augment:2 (randaugment, crop, flip, grey)"
    assert name_views("augment:2") == ("centre", "augmented 1", "augmented 2")


def test_steps_without_drawn_views_are_told(video_folder, make_config, tmp_path, caplog):
    extract_dataset(make_config(video_folder, tmp_path / "s.zarr", augmentation=("crop",), limit=1))
    assert "--augmentation has no effect without --views train=augment:N,centre" in caplog.text


@pytest.mark.slow
def test_the_codec_is_fitted_on_all_views_and_clipped_codes_are_told(augmented, video_folder, make_config, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", views=VIEWS, augmentation=STEPS, dtype="int8")
    extract_dataset(config)
    import json

    clipped = json.loads((config.out / "fidelity.json").read_text())["clipped"]
    assert list(clipped) == ["centre", "augmented 1", "augmented 2"]
    assert all(0 <= share < 0.001 for share in clipped.values()), "a codec that was fitted on them reaches far enough"
    plain = make_config(video_folder, tmp_path / "plain.zarr", dtype="int8")
    extract_dataset(replace(plain, limit=1))
    assert open_store(plain.out).facts.codec != open_store(config.out).facts.codec
