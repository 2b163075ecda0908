"""Frames as YCbCr 4:2:0: their formulas, and a toy store of them, written, read, verified, merged and refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from s4v.errors import StoreDamagedError, StoreMismatchError
from s4v.store import reader
from s4v.store._shards import ShardedArray
from s4v.store.attributes import parse_layout
from s4v.store.checksums import write_checksums
from s4v.store.codecs.affine import AffineCodec
from s4v.store.fidelity import compare_pixels, measure_pixels, read_fidelity, write_fidelity
from s4v.store.layout import CODED_CLS_VERSION, CUT_VERSION, FORMAT_VERSION, PIXEL_ARRAYS, StoreLayout
from s4v.store.merge import merge_stores
from s4v.store.names import is_known
from s4v.store.needs import StoreNeeds, find_lacks
from s4v.store.pixel_formats import decode_pixels, encode_pixels
from s4v.store.reader import open_store
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.verify import verify_store
from s4v.store.writer import RowTokens, create_store, resume_store

FORMAT = "ycbcr420"
LAYOUT = StoreLayout(
    num_rows=4,
    num_views=1,
    num_frames=3,
    layers=(1,),
    num_patches=4,
    width=8,
    channels=8,
    embed_dim=6,
    image_size=(4, 6),
    patch_dtype="float16",
    pixel_offsets=(-1, 0, "0.5step"),
    pixel_format=FORMAT,
    rows_per_shard=2,
    frames_per_block=2,
)
RECORDS = [VideoRecord(video_id=f"{i}.mp4", path=f"{i}.mp4", split="train") for i in range(4)]
ATTRIBUTES = {
    "created": "now", "classes": {"names": []}, "backbone": {"name": "toy"}, "dataset": {"name": "toy", "root": None},
}  # fmt: skip
COLOURS = {
    (0, 0, 0): (0, 128, 128),
    (255, 255, 255): (255, 128, 128),
    (77, 77, 77): (77, 128, 128),
    (255, 0, 0): (76, 85, 255),
    (0, 255, 0): (150, 44, 21),
    (0, 0, 255): (29, 255, 107),
    (200, 100, 50): (124, 86, 182),
}
"""RGB, and Y, Cb and Cr of it."""


def draw_pixels(row, frames=3, offsets=3, size=(4, 6)):
    return np.random.default_rng(row).integers(0, 256, (1, frames, offsets, *size, 3), dtype=np.uint8)


def make_spec(layout=LAYOUT):
    return StoreSpec(
        layout=layout, attributes=ATTRIBUTES, records=RECORDS, codec=AffineCodec(dtype="float16"),
        head={"norm_eps": np.float32(1)},
    )  # fmt: skip


def make_tokens(row, layout=LAYOUT):
    rng = np.random.default_rng(row)
    return RowTokens(
        patches=rng.normal(size=(1, 3, 1, 4, 8)).astype(np.float16),
        cls=rng.normal(size=(1, 3, 1, 8)).astype(np.float16),
        embedding=rng.normal(size=(1, 3, 6)).astype(np.float32),
        **{layout.pixel_array: encode_pixels(draw_pixels(row), layout.pixel_format)},
    )


def make_store(path, shards=(0, 1), layout=LAYOUT):
    clip = dict(num_cached_frames=3, num_views=1, frame_indices=[0, 1, 2], timestamps_s=[0.0, 0.1, 0.2])
    with create_store(path, make_spec(layout)) as writer:
        for shard in shards:
            rows = LAYOUT.shard_rows(shard)
            results = [
                VideoResult(video_id=RECORDS[row].video_id, status="ok", eval_clips=[[0, 1, 2]], **clip) for row in rows
            ]
            writer.write_shard(shard, {row: make_tokens(row, layout) for row in rows}, results)
        writer.consolidate()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("formats") / "toy.zarr")


@pytest.fixture
def store_path(made, tmp_path):
    return shutil.copytree(made, tmp_path / "toy.zarr")


def change_layout(path, **changes):
    """Change a store's layout, as if an s4v had written it so."""
    file = path / "zarr.json"
    node = json.loads(file.read_text())
    node["attributes"]["s4v"]["layout"].update(changes)
    file.write_text(json.dumps(node))
    write_checksums(path)


def weigh(pixels):
    """Y, Cb and Cr of floats, by the document's formulas."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return (
        0.299 * red + 0.587 * green + 0.114 * blue,
        -0.168736 * red - 0.331264 * green + 0.5 * blue + 128,
        0.5 * red - 0.418688 * green - 0.081312 * blue + 128,
    )


def interpolate(plane):
    """Twice as many values down and across: at the middles of the four pixels of each, the edge's beyond."""
    height, width = plane.shape
    rows, columns = ((np.arange(2 * size) + 0.5) / 2 - 0.5 for size in (height, width))
    across = np.stack([np.interp(columns, np.arange(width), line) for line in plane])
    return np.stack([np.interp(rows, np.arange(height), line) for line in across.T], axis=1)


@pytest.mark.parametrize("colour", COLOURS)
def test_golden_values_of_one_colour(colour):
    frame = np.full((2, 4, 3), colour, np.uint8)
    luma, blue, red = COLOURS[colour]
    planes = encode_pixels(frame, FORMAT)
    assert planes.tolist() == [luma] * 8 + [blue] * 2 + [red] * 2
    assert np.abs(decode_pixels(planes, FORMAT, (2, 4)).astype(int) - frame).max() <= 1
    of_jpeg = Image.fromarray(frame).convert("YCbCr").getpixel((0, 0))  # which cuts off where we round
    assert np.abs(np.subtract(of_jpeg, (luma, blue, red))).max() <= 1


def test_golden_values_of_a_decoded_frame():
    planes = np.array([[100] * 8 + [128, 128] + [128, 168]], np.uint8)  # Cr steps by 40 from left to right
    red = [100 + 1.402 * step for step in (0, 10, 30, 40)]
    green = [100 - 0.714136 * step for step in (0, 10, 30, 40)]
    found = decode_pixels(planes, FORMAT, (2, 4))
    assert found.shape == (1, 2, 4, 3)
    for line in found[0]:
        assert line[:, 0].tolist() == np.rint(red).tolist() == [100, 114, 142, 156]
        assert line[:, 1].tolist() == np.rint(green).tolist() == [100, 93, 79, 71]
        assert line[:, 2].tolist() == [100] * 4


@given(height=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 999))
def test_planes_are_the_formulas_rounded_to_the_nearest(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 2 * height, 2 * width, 3), dtype=np.uint8)
    planes = encode_pixels(pixels, FORMAT).astype(np.float64)
    assert planes.shape == (2, 6 * height * width)
    for frame, own in zip(pixels.astype(np.float64), planes, strict=True):
        luma = own[: 4 * height * width].reshape(2 * height, 2 * width)
        chroma = own[4 * height * width :].reshape(2, height, width)
        assert np.abs(luma - weigh(frame)[0]).max() < 0.502
        means = frame.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
        for plane, exact in zip(chroma, weigh(means)[1:], strict=True):
            assert np.abs(plane - np.minimum(exact, 255)).max() < 0.502


@given(height=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 999))
def test_frames_are_decoded_by_the_formulas(height, width, seed):
    planes = np.random.default_rng(seed).integers(0, 256, 6 * height * width, dtype=np.uint8)
    luma = planes[: 4 * height * width].reshape(2 * height, 2 * width).astype(np.float64)
    blue, red = (
        interpolate(plane.reshape(height, width).astype(np.float64) - 128)
        for plane in np.split(planes[4 * height * width :], 2)
    )
    exact = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1)
    found = decode_pixels(planes, FORMAT, (2 * height, 2 * width)).astype(np.float64)
    assert np.abs(found - np.clip(exact, 0, 255)).max() < 0.501


def test_rgb_is_what_it_is():
    pixels = draw_pixels(0)
    assert encode_pixels(pixels, "rgb") is pixels and decode_pixels(pixels, "rgb", (4, 6)) is pixels


def test_a_frame_takes_half_the_bytes_in_an_array_of_its_own():
    sizes = replace(LAYOUT, image_size=(224, 224), pixel_offsets=(0,))
    assert (
        sizes.bytes_per_frame["ycbcr420"] == 75_264 == replace(sizes, pixel_format="rgb").bytes_per_frame["pixels"] / 2
    )
    spec = next(one for one in LAYOUT.array_specs() if one.name == FORMAT)
    assert (spec.shape, spec.chunk_shape, spec.dtype) == ((4, 1, 3, 3, 36), (1, 1, 1, 1, 36), "uint8")
    assert not spec.is_compressed and "pixels" not in {one.name for one in LAYOUT.array_specs()}
    for name in PIXEL_ARRAYS.values():
        assert is_known(f"{name}/zarr.json") and is_known(f"{name}/c.0.0.0.0.0")


def test_only_a_store_of_another_format_than_rgb_has_the_new_number():
    assert LAYOUT.format_version == FORMAT_VERSION == 5
    rgb = replace(LAYOUT, pixel_format="rgb")
    coded = dict(coded_cls_dtype="int8", coded_cls_channels=3)
    assert rgb.format_version == CUT_VERSION == 3 and replace(rgb, **coded).format_version == CODED_CLS_VERSION == 4
    assert replace(LAYOUT, **coded).format_version == 5


@pytest.mark.parametrize("pixel_format", PIXEL_ARRAYS)
def test_a_layout_is_read_as_it_was_recorded(pixel_format):
    spec = make_spec(replace(LAYOUT, pixel_format=pixel_format))
    recorded = json.loads(json.dumps(spec.full_attributes()))
    assert parse_layout("x", recorded["layout"]) == spec.layout
    assert recorded["layout"].get("pixel_format") == (None if pixel_format == "rgb" else FORMAT)
    assert recorded["codecs"][PIXEL_ARRAYS[pixel_format]] == "identity" and len(recorded["codecs"]) == 4


@pytest.mark.parametrize("reads", ["natively", "with Python", "with tensorstore"])
def test_planes_are_read_as_they_were_written_and_decode_to_pixels(made, monkeypatch, reads):
    if reads == "with Python":
        monkeypatch.setenv("S4V_NATIVE", "0")
    if reads == "with tensorstore":
        monkeypatch.setattr(ShardedArray, "open", lambda *_: None)
    store, rows, frames = open_store(made), [3, 0, 1], [[2, 0], [1, 1], [0, 2]]
    clips = store.read_clips(rows, frames)
    pixels = np.stack([draw_pixels(row)[0, places] for row, places in zip(rows, frames, strict=True)])
    assert clips.pixels.dtype == np.uint8 and np.array_equal(clips.pixels, encode_pixels(pixels, FORMAT))
    decoded = store.decode_pixels(clips.pixels)
    assert decoded.shape == pixels.shape == (3, 2, 3, 4, 6, 3)
    assert np.array_equal(decoded, decode_pixels(encode_pixels(pixels, FORMAT), FORMAT, (4, 6)))
    one = store.read_clips(rows, frames, arrays=("pixels",), offsets=("0.5step", 0))
    assert one.patches is None and np.array_equal(one.pixels, clips.pixels[:, :, [2, 1]])
    with pytest.raises(StoreMismatchError, match="read_clips reads patches, cls, pixels; found ycbcr420"):
        store.read_clips(rows, frames, arrays=(FORMAT,))


def test_plain_zarr_finds_no_pixels_that_are_none(made):
    group = zarr.open_group(made, mode="r")
    assert "pixels" not in group and group[FORMAT].shape == (4, 1, 3, 3, 36)
    assert np.array_equal(group[FORMAT][2], encode_pixels(draw_pixels(2), FORMAT))


def test_an_older_s4v_refuses_it_by_its_number(made, monkeypatch):
    monkeypatch.setattr(reader, "FORMAT_VERSION", 4)
    with pytest.raises(StoreMismatchError, match="has format 5, this s4v reads up to 4. Update s4v"):
        open_store(made)


def test_nothing_is_lacking_of_it(made):
    assert find_lacks(open_store(made), StoreNeeds(arrays=("pixels",))) == []


def test_damage_is_found_and_named(store_path, flip_byte):
    assert verify_store(open_store(store_path)) == []
    flip_byte(store_path / FORMAT / "c.1.0.0.0.0")
    store = open_store(store_path)
    assert {one.where for one in verify_store(store)} == {f"{FORMAT}/c.1.0.0.0.0"}
    with pytest.raises(StoreDamagedError, match=r"ycbcr420, shard 1: .*Read for video 2.mp4"):
        store.read_clips([2], [[0, 1]])
    assert store.read_clips([2], [[0, 1]], arrays=("patches",)).patches is not None


def test_parts_are_joined_and_a_part_of_another_format_is_not(tmp_path):
    first, second = make_store(tmp_path / "a.zarr", [0]), make_store(tmp_path / "b.zarr", [1])
    merge_stores([first, second], tmp_path / "out.zarr")
    store = open_store(tmp_path / "out.zarr")
    assert verify_store(store) == [] and store.facts.format_version == 5
    found = store.read_clips(range(4), [[0, 1, 2]] * 4, arrays=("pixels",)).pixels
    assert np.array_equal(found, np.concatenate([make_tokens(row).ycbcr420 for row in range(4)]))
    other = make_store(tmp_path / "c.zarr", [1], layout=replace(LAYOUT, pixel_format="rgb"))
    with pytest.raises(StoreMismatchError, match="not parts of one store: layout.pixel_format ycbcr420 there, None"):
        merge_stores([first, other], tmp_path / "no.zarr")


def test_a_store_goes_on_in_its_own_format_alone(tmp_path):
    path = make_store(tmp_path / "half.zarr", [0])
    with resume_store(open_store(path), make_spec()) as writer:
        assert writer.pending_shards() == [1] and writer.layout.pixel_format == FORMAT
    with pytest.raises(StoreMismatchError, match="layout.pixel_format ycbcr420 there, None here"):
        resume_store(open_store(path), make_spec(replace(LAYOUT, pixel_format="rgb")))


WRONG = {
    "pixel_format must be in rgb, ycbcr420, found 'xyz'": {"pixel_format": "xyz"},
    r"pixel_format must be in rgb, ycbcr420, found \('rgb',\)": {"pixel_format": ["rgb"]},
    "pixel_format is ycbcr420 and there are no pixels": {"with_pixels": False},
    "with_pixels must be true or false, found 7": {"with_pixels": 7},
    r"pixel_format ycbcr420 wants an even height and width, found \(4, 5\)": {"image_size": [4, 5]},
}


@pytest.mark.parametrize("why", WRONG)
def test_layouts_that_cannot_be_are_refused(store_path, why):
    change_layout(store_path, **WRONG[why])
    with pytest.raises(StoreDamagedError, match=why):
        open_store(store_path)


def test_losses_of_known_errors():
    frame = np.zeros((1, 2, 2, 3), np.uint8)
    other = frame.copy()
    other[0, 0, 0] = (3, 0, 6)
    found = compare_pixels(frame, other)
    assert (found.error_mean, found.error_worst) == (9 / 12, 6)
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / (45 / 12)))
    grey = measure_pixels(np.full((2, 4, 4, 3), 90, np.uint8), FORMAT)
    assert (grey.psnr, grey.error_mean, grey.error_worst) == (None, 0, 0)


def test_what_the_format_costs_is_kept_and_told(store_path):
    loss = measure_pixels(draw_pixels(0)[0, :, 1], FORMAT)
    write_fidelity(store_path, [], videos=2, is_held_out=True)
    assert set(read_fidelity(store_path)) == {"videos", "is_held_out", "layers"}, "as in stores of RGB"
    write_fidelity(store_path, [], videos=2, is_held_out=True, pixels=loss)
    told = read_fidelity(store_path)["pixels"]
    assert told == {"psnr": loss.psnr, "error_mean": loss.error_mean, "error_worst": loss.error_worst}
    assert 5 < told["psnr"] < 20, "noise has colours of its own in every pixel"
    kept, file = read_fidelity(store_path), store_path / "fidelity.json"
    for wrong in ({"psnr": 1.0}, {**told, "error_mean": "x"}, {**told, "error_worst": None}, 7):
        file.write_text(json.dumps({**kept, "pixels": wrong}))
        with pytest.raises(StoreDamagedError, match="does not say what a codec costs"):
            read_fidelity(store_path)
