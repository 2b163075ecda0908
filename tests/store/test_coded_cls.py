"""Class tokens that are coded as patches are: a toy store of them, written, read, verified, merged and refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import StoreDamagedError, StoreMismatchError
from s4v.store import reader
from s4v.store.attributes import parse_layout
from s4v.store.checksums import write_checksums
from s4v.store.codecs.affine import AffineCodec
from s4v.store.facts import StoreFacts
from s4v.store.fidelity import measure_fidelity, read_fidelity, write_fidelity
from s4v.store.info import describe_poor_layers
from s4v.store.layout import CODED_CLS_VERSION, CUT_VERSION, PATCH_DTYPES, StoreLayout
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.verify import verify_store
from s4v.store.writer import RowTokens, create_store, resume_store

LAYOUT = StoreLayout(
    num_rows=4,
    num_views=1,
    num_frames=3,
    layers=(1, 3),
    num_patches=4,
    width=8,
    channels=8,
    embed_dim=6,
    image_size=(4, 4),
    patch_dtype="float16",
    coded_cls_dtype="int8",
    coded_cls_channels=3,
    rows_per_shard=2,
    frames_per_block=2,
)
RECORDS = [VideoRecord(video_id=f"{i}.mp4", path=f"{i}.mp4", split="train") for i in range(4)]
ATTRIBUTES = {"created": "now", "classes": {"names": []}, "backbone": {"name": "toy"}, "dataset": {"name": "toy"}}


def make_cls_codec(seed=0):
    rng = np.random.default_rng(seed)
    basis = np.stack([np.linalg.qr(rng.normal(size=(8, 8)))[0][:3] for _ in range(2)])
    mean, scale = rng.normal(size=(2, 8)), rng.uniform(0.01, 0.1, (2, 3))
    parts = {"mean": mean, "basis": basis, "scale": scale}
    return AffineCodec(dtype="int8", **{name: array.astype(np.float32) for name, array in parts.items()})


def make_tokens(row):
    rng = np.random.default_rng(row)
    return RowTokens(
        patches=rng.normal(size=(1, 3, 2, 4, 8)).astype(np.float16),
        cls=rng.integers(-127, 128, (1, 3, 2, 3)).astype(np.int8),
        embedding=rng.normal(size=(1, 3, 6)).astype(np.float32),
        pixels=rng.integers(0, 256, (1, 3, 1, 4, 4, 3), dtype=np.uint8),
    )


def make_spec(cls_codec):
    codec, head = AffineCodec(dtype="float16"), {"norm_eps": np.float32(1)}
    return StoreSpec(layout=LAYOUT, attributes=ATTRIBUTES, records=RECORDS, codec=codec, cls_codec=cls_codec, head=head)


def make_store(path, shards=(0, 1), seed=0):
    clip = dict(num_cached_frames=3, num_views=1, frame_indices=[0, 1, 2], timestamps_s=[0.0, 0.1, 0.2])
    with create_store(path, make_spec(make_cls_codec(seed))) as writer:
        for shard in shards:
            rows = LAYOUT.shard_rows(shard)
            results = [
                VideoResult(video_id=RECORDS[row].video_id, status="ok", eval_clips=[[0, 1, 2]], **clip) for row in rows
            ]
            writer.write_shard(shard, {row: make_tokens(row) for row in rows}, results)
        writer.consolidate()
    return path


def change_attributes(path, change):
    """Change a store's attributes, as if an s4v had written them so."""
    file = path / "zarr.json"
    node = json.loads(file.read_text())
    change(node["attributes"]["s4v"])
    file.write_text(json.dumps(node))
    write_checksums(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("coded") / "toy.zarr")


@pytest.fixture
def store_path(made, tmp_path):
    return shutil.copytree(made, tmp_path / "toy.zarr")


def test_a_frame_of_vit_e_takes_what_the_bar_allows():
    sizes = replace(
        LAYOUT,
        layers=tuple(range(1, 64, 2)),
        num_patches=256,
        width=1792,
        channels=64,
        embed_dim=1024,
        image_size=(224, 224),
        patch_dtype="int8",
        coded_cls_channels=64,
    )
    assert sizes.bytes_per_frame == {"patches": 524_288, "cls": 2_048, "embedding": 4_096, "pixels": 150_528}
    assert sum(sizes.bytes_per_frame.values()) == 680_960 <= 700_000
    assert replace(sizes, coded_cls_channels=1792).bytes_per_frame["cls"] == 32 * 1792
    plain = replace(sizes, coded_cls_dtype=None, coded_cls_channels=None)
    assert plain.bytes_per_frame["cls"] == 2 * 32 * 1792 and plain.cls_dtype == "float16"


def test_only_a_store_that_codes_them_has_the_new_format():
    assert LAYOUT.format_version == CODED_CLS_VERSION == 4
    plain = replace(LAYOUT, coded_cls_dtype=None, coded_cls_channels=None)
    assert plain.format_version == CUT_VERSION == 3 and replace(plain, frames_per_block=0).format_version == 2
    views = {"views": {"train": "augment:2", "": "centre"}}
    old = StoreSpec(layout=replace(plain, frames_per_block=0), attributes=views, records=())
    assert old.format_version == 3 and replace(old, layout=LAYOUT).format_version == 4


@given(dtype=st.sampled_from(PATCH_DTYPES), channels=st.integers(1, 8), is_coded=st.booleans())
def test_a_layout_is_read_as_it_was_recorded(dtype, channels, is_coded):
    coded = {"coded_cls_dtype": dtype, "coded_cls_channels": channels} if is_coded else {}
    layout = replace(LAYOUT, **{"coded_cls_dtype": None, "coded_cls_channels": None, **coded})
    spec = replace(make_spec(AffineCodec(dtype="float32") if is_coded else None), layout=layout)
    recorded = json.loads(json.dumps(spec.full_attributes()))
    assert parse_layout("x", recorded["layout"]) == layout
    assert {name for name in recorded["layout"] if name.startswith("coded")} == set(coded)
    assert ("cls_codec" in recorded) == is_coded and recorded["codecs"]["cls"] == ("affine" if is_coded else "identity")
    cls = next(one for one in layout.array_specs() if one.name == "cls")
    assert (cls.dtype, cls.shape[-1]) == ((dtype, channels) if is_coded else ("float16", 8))


def test_codes_are_read_as_they_were_written_and_decode_by_the_formula(made):
    store, codec = open_store(made), make_cls_codec()
    rows, frames = [3, 0], [[2, 0], [1, 1]]
    codes = store.read_clips(rows, frames).cls
    written = np.stack([make_tokens(row).cls[0, places] for row, places in zip(rows, frames, strict=True)])
    assert codes.dtype == np.int8 and np.array_equal(codes, written)
    expected = np.empty((2, 2, 2, 8))
    for layer in range(2):
        scaled = written[:, :, layer].astype(np.float64) * codec.scale[layer]
        expected[:, :, layer] = codec.mean[layer] + scaled @ codec.basis[layer].astype(np.float64)
    decoded = store.decode_cls(codes)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-5)
    only = store.read_clips(rows, frames, layers=(3,), arrays=("cls",)).cls
    np.testing.assert_array_equal(store.decode_cls(only, layers=(3,)), decoded[:, :, 1:])
    assert verify_store(store) == []


def test_golden_values_of_one_token():
    codec = AffineCodec(
        dtype="int8",
        mean=np.array([[1, 2, 3]], np.float32),
        basis=np.array([[[0, 1, 0], [0, 0, -1]]], np.float32),
        scale=np.array([[0.5, 0.25]], np.float32),
    )
    token = np.array([[5, 4, 2]], np.float32)  # one patch: the class token
    codes = codec.encode(token, 0)
    assert codes.tolist() == [[4, 4]] and codec.decode(codes, 0).tolist() == [[1, 4, 2]]


def test_what_is_not_coded_decodes_to_itself(tmp_path):
    layout = replace(LAYOUT, coded_cls_dtype=None, coded_cls_channels=None)
    spec = replace(make_spec(None), layout=layout)
    with create_store(tmp_path / "plain.zarr", spec) as writer:
        store = writer.store
    assert store.cls_codec is None and "cls" not in store.facts.codecs
    values = np.random.default_rng(0).normal(size=(2, 2, 8)).astype(np.float16)
    np.testing.assert_array_equal(store.decode_cls(values), values.astype(np.float32))
    assert store.facts.codecs_sha256 == store.codec.sha256, "markers of such stores are what they were"


def test_a_store_tells_how_each_array_is_coded(made):
    store = open_store(made)
    attributes, codec = store.attributes, make_cls_codec()
    assert attributes["format_version"] == 4
    assert attributes["codecs"] == {
        "patches": "affine",
        "cls": "affine",
        "embedding": "identity",
        "pixels": "identity",
    }
    assert attributes["cls_codec"] == {"dtype": "int8", "parts": ["basis", "mean", "scale"], "sha256": codec.sha256}
    assert (attributes["layout"]["coded_cls_dtype"], attributes["layout"]["coded_cls_channels"]) == ("int8", 3)
    assert store.cls_codec.sha256 == codec.sha256 and store.codec.parts == {}
    assert store.facts.codecs_sha256 not in (codec.sha256, store.codec.sha256), "markers belong to both codecs"
    assert store.facts.codecs_sha256 == StoreFacts(store.attributes).codecs_sha256


def test_an_older_s4v_refuses_it_by_its_number(made, monkeypatch):
    monkeypatch.setattr(reader, "FORMAT_VERSION", 3)
    with pytest.raises(StoreMismatchError, match="has format 4, this s4v reads up to 3. Update s4v"):
        open_store(made)


@pytest.mark.parametrize("part", ["mean", "basis", "scale"])
def test_a_damaged_part_is_told_and_its_tokens_are_not_decoded(store_path, flip_byte, part):
    flip_byte(next((store_path / "cls_codec" / part).glob("c.*")))
    store = open_store(store_path)
    assert [one.where.rpartition("/")[0] for one in verify_store(store)] == [f"cls_codec/{part}"]
    with pytest.raises(StoreDamagedError, match=rf"cls_codec/{part} is damaged"):
        store.decode_cls(np.zeros((1, 2, 3), np.int8))


def test_a_codec_of_another_store_is_damage(store_path, tmp_path):
    other = make_store(tmp_path / "other.zarr", shards=(), seed=1)
    shutil.rmtree(store_path / "cls_codec")
    shutil.copytree(other / "cls_codec", store_path / "cls_codec")
    with pytest.raises(StoreDamagedError, match="cls_codec is not the codec that the store was written with"):
        _ = open_store(store_path).cls_codec


def test_parts_are_joined_with_their_codecs_and_only_where_they_agree(tmp_path):
    first, second = make_store(tmp_path / "a.zarr", [0]), make_store(tmp_path / "b.zarr", [1])
    merge_stores([first, second], tmp_path / "out.zarr")
    store = open_store(tmp_path / "out.zarr")
    assert verify_store(store) == [] and store.cls_codec.sha256 == make_cls_codec().sha256
    found = store.read_clips(range(4), [[0, 1, 2]] * 4).cls
    assert np.array_equal(found, np.concatenate([make_tokens(row).cls for row in range(4)]))
    other = make_store(tmp_path / "c.zarr", [1], seed=1)
    with pytest.raises(StoreMismatchError, match="not parts of one store: the codecs differ: fit one and share it"):
        merge_stores([first, other], tmp_path / "no.zarr")


def test_a_store_goes_on_with_its_own_codecs(tmp_path):
    path = make_store(tmp_path / "half.zarr", [0])
    with resume_store(open_store(path), replace(make_spec(None), codec=None)) as writer:
        assert writer.pending_shards() == [1] and writer.cls_codec.sha256 == make_cls_codec().sha256
    plain = replace(LAYOUT, coded_cls_dtype=None, coded_cls_channels=None)
    with pytest.raises(StoreMismatchError, match="layout.coded_cls_channels 3 there, None here"):
        resume_store(open_store(path), replace(make_spec(None), codec=None, layout=plain))


WRONG = {
    "class tokens are coded and there is no cls_codec": lambda a: a.pop("cls_codec"),
    "cls_codec lacks sha256": lambda a: a["cls_codec"].pop("sha256"),
    "the cls_codec is of another dtype than the layout": lambda a: a["cls_codec"].update(dtype="float16"),
    "cls_codec must be an object, found 7": lambda a: a.update(cls_codec=7),
    r"coded_cls_channels must be from 1 to the width, found 9": lambda a: a["layout"].update(coded_cls_channels=9),
    r"coded_cls_channels must be from 1 to the width, found None": lambda a: a["layout"].pop("coded_cls_channels"),
    "class tokens are coded and there are none": lambda a: a["layout"].update(class_tokens="none"),
}


@pytest.mark.parametrize("why", WRONG)
def test_attributes_that_cannot_be_are_refused(store_path, why):
    change_attributes(store_path, WRONG[why])
    with pytest.raises(StoreDamagedError, match=why):
        open_store(store_path)


def test_a_dtype_that_is_none_is_refused(store_path):
    def change(attributes):
        attributes["layout"]["coded_cls_dtype"] = attributes["cls_codec"]["dtype"] = "int4"

    change_attributes(store_path, change)
    with pytest.raises(StoreDamagedError, match="coded_cls_dtype must be in int8, float16, float32, found 'int4'"):
        open_store(store_path)


def test_a_codec_that_is_not_known_costs_its_array_alone(store_path):
    def change(attributes):
        attributes["cls_codec"]["name"] = attributes["codecs"]["cls"] = "cube"

    change_attributes(store_path, change)
    store = open_store(store_path)
    assert store.read_clips([0], [[0]], arrays=("patches",)).patches.shape == (1, 1, 2, 4, 8)
    with pytest.raises(StoreMismatchError, match="has a codec 'cube'; this s4v knows affine. Update s4v."):
        store.decode_cls(store.read_clips([0], [[0]]).cls)


def test_what_coding_cost_is_told_of_class_tokens_too(tmp_path):
    tokens = np.random.default_rng(0).normal(size=(50, 8))
    poor, good = measure_fidelity(tokens, tokens * 0.5, 3), measure_fidelity(tokens, tokens, 1)
    write_fidelity(tmp_path, [good], videos=2, is_held_out=True)
    assert set(read_fidelity(tmp_path)) == {"videos", "is_held_out", "layers"}, "as in stores that do not code them"
    write_fidelity(tmp_path, [good], videos=2, is_held_out=True, cls_layers=[good, poor])
    facts = {"fidelity": read_fidelity(tmp_path)}
    assert [one["layer"] for one in facts["fidelity"]["cls_layers"]] == [1, 3]
    assert describe_poor_layers(facts) == (
        "class tokens of layers 3 lost more than 5% of their variance: keep more --cls-channels if accuracy suffers"
    )
    facts["fidelity"]["cls_layers"][0].pop("layer")
    (tmp_path / "fidelity.json").write_text(json.dumps(facts["fidelity"]))
    with pytest.raises(StoreDamagedError, match="does not say what a codec costs, layer by layer"):
        read_fidelity(tmp_path)
