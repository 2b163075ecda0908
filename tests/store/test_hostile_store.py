"""Stores that somebody made to do harm: each ends in one line, with nothing written, followed or waited for."""

import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s4v.errors import S4vError, StoreDamagedError
from s4v.store import names
from s4v.store.append import finish_appending
from s4v.store.codecs.affine import AffineCodec
from s4v.store.info import describe_store
from s4v.store.layout import StoreLayout
from s4v.store.reader import open_store
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.verify import verify_store
from s4v.store.writer import RowTokens, create_store, resume_store

LAYOUT = StoreLayout(
    num_rows=3,
    num_views=1,
    num_frames=2,
    layers=(1, 3),
    num_patches=4,
    width=8,
    channels=8,
    embed_dim=6,
    image_size=(4, 4),
    patch_dtype="int8",
    rows_per_shard=2,
)
RECORDS = [
    VideoRecord(video_id=f"{i}.mp4", path=f"{i}.mp4", split="train", class_name="a", captions=("x", "y"))
    for i in range(3)
]
ATTRIBUTES = {
    "created": "now",
    "dataset": {"name": "toy", "root": "videos"},
    "classes": {"names": ["a"]},
    "backbone": {"name": "toy", "width": 8},
    "frames": {"": 2},
    "sampling": "uniform",
    "resize": "256",
    "libraries": {},
}
SPEC = StoreSpec(layout=LAYOUT, attributes=ATTRIBUTES, records=RECORDS)
MIB = 2**20


def tokens_of(row):
    rng = np.random.default_rng(row)
    return RowTokens(
        patches=rng.integers(-127, 128, (1, 2, 2, 4, 8), dtype=np.int8),
        cls=rng.normal(size=(1, 2, 2, 8)).astype(np.float16),
        embedding=rng.normal(size=(1, 2, 6)).astype(np.float32),
        pixels=rng.integers(0, 256, (1, 2, 1, 4, 4, 3), dtype=np.uint8),
    )


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "whole.zarr"
    codec = AffineCodec(dtype="int8", scale=np.ones((2, 8), np.float32))
    made = {"layout": LAYOUT, "attributes": ATTRIBUTES, "records": RECORDS, "codec": codec}
    made["head"] = {"eps": np.float32(1), "norm_weight": np.ones(8, np.float32)}
    with create_store(path, StoreSpec(**made)) as writer:
        for shard in writer.pending_shards():
            rows = LAYOUT.shard_rows(shard)
            results = [
                VideoResult(
                    video_id=RECORDS[row].video_id,
                    status="ok",
                    num_cached_frames=2,
                    num_views=1,
                    frame_indices=[0, 1],
                    timestamps_s=[0.0, 0.1],
                    eval_clips=[[0, 1]],
                )
                for row in rows
            ]
            writer.write_shard(shard, {row: tokens_of(row) for row in rows}, results)
        writer.consolidate()
    return path


@pytest.fixture
def store_path(whole_store, tmp_path):
    return shutil.copytree(whole_store, tmp_path / "copy.zarr")


def forget_hashes(path):
    """As its maker would: hashes that fit what he wrote, or none."""
    (path / "checksums.json").write_text("{}")


def use(path):
    """Everything that reads a store."""
    store = open_store(path)
    describe_store(store)
    found = [store.read_clips([row], [[1, 0]]) for row in range(3)]
    embeddings, head, captions = store.read_embeddings(), store.head, store.read_captions()
    decoded = store.decode_patches(found[0].patches)
    return found, embeddings, head, captions, decoded, store.read_manifest()


def snapshot(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and not file.is_symlink()}


HOSTILE_NAMES = [
    "../.bashrc", "/etc/passwd", "a/../../b", "..", ".", "", "a//b", "C:\\x", "..\\x", "a\0b", "a\nb", None, 7, ["x"],
    {"x": 1}, "x" * 5000, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_are_judged_as_text(tmp_path, name):
    """C2."""
    assert names.judge_name(name) is not None and not names.is_known(name)
    with pytest.raises(StoreDamagedError, match="Nothing was changed"):
        names.locate(tmp_path, name)


def test_known_names_are_those_of_a_store(whole_store):
    """C2."""
    files = [file.relative_to(whole_store).as_posix() for file in whole_store.rglob("*") if file.is_file()]
    assert len(files) > 20 and all(map(names.is_known, files))
    assert not any(
        map(names.is_known, ["notes.txt", "_parts/x.parquet", "patches/../zarr.json", "head/A/c", ".bashrc"])
    )


APPENDS = [
    {"undone_shard": None, "files": ["../.bashrc"]},
    {"undone_shard": None, "files": ["zarr.json", "../.bashrc"]},
    {"undone_shard": None, "files": ["notes.txt"]},
    {"undone_shard": None, "files": ["_parts/000000.arrows"]},
    {"undone_shard": "../../x", "files": []},
    {"undone_shard": True, "files": []},
    {"undone_shard": 2**70, "files": []},
    {"undone_shard": -1, "files": []},
    {"undone_shard": None, "files": "zarr.json"},
    {"undone_shard": None, "files": [7]},
    {"undone_shard": None},
    {"undone_shard": None, "files": [], "more": 1},
    [],
    "x",
]


@pytest.mark.parametrize("to_do", APPENDS)
def test_a_hostile_append_is_refused_with_nothing_changed(store_path, to_do):
    """C2: the file beside the store was overwritten before."""
    (store_path / "_append").mkdir()
    (store_path / "_append/append.json").write_text(json.dumps(to_do))
    (store_path / "_append/.bashrc").write_text("evil")
    (store_path / "_append/notes.txt").write_text("evil")
    (store_path.parent / ".bashrc").write_text("mine")
    before = snapshot(store_path.parent)
    with pytest.raises(StoreDamagedError, match=r"Nothing was changed|not readable as JSON"):
        finish_appending(store_path)
    assert snapshot(store_path.parent) == before


@pytest.mark.parametrize("kind", ["deep", "huge", "link", "pipe", "missing", "folder is a link"])
def test_an_append_list_that_is_none_is_refused_with_nothing_changed(store_path, tmp_path, kind):
    """C2."""
    folder, file = store_path / "_append", store_path / "_append/append.json"
    folder.mkdir()
    if kind == "deep":
        file.write_text("[" * 100_000)
    elif kind == "huge":
        file.write_text('{"files": [' + '"zarr.json",' * 100_000 + '"zarr.json"]}')
    elif kind == "link":
        (tmp_path / "list.json").write_text('{"undone_shard": null, "files": []}')
        file.symlink_to(tmp_path / "list.json")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder is a link":
        folder.rmdir()
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    with pytest.raises(StoreDamagedError):
        finish_appending(store_path)
    assert snapshot(tmp_path) == before


def write_index(path, entries, num_chunks):
    """Replace the index at the end of a shard, its checksum right."""
    data = path.read_bytes()[: -(16 * num_chunks + 4)]
    index = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    path.write_bytes(data + index + struct.pack("<I", crc32c(index)))


HOSTILE_PLACES = [(2**63 + 5, 68), (0, 2**62), (2**64 - 2, 2), (2**40, 68), (0, 0), (2**63 - 1, 2**63 - 1), (3, 68)]


@pytest.mark.parametrize("place", HOSTILE_PLACES)
def test_an_index_may_not_point_outside_of_its_file_or_over_another_chunk(store_path, place):
    """C3: OverflowError, MemoryError and worse before."""
    file = store_path / "patches/c.0.0.0.0.0.0"
    index = np.frombuffer(file.read_bytes()[-(16 * 4 + 4) : -4], dtype="<u8").reshape(4, 2)
    entries = [tuple(entry) for entry in index.tolist()]
    entries[1] = place
    write_index(file, entries, 4)
    store = open_store(store_path)
    with pytest.raises(StoreDamagedError, match=r"patches, shard 0: the index at the end of c\.0\.0\.0\.0\.0\.0 "):
        store.read_clips([0], [[1, 0]])
    assert [one.where for one in verify_store(store)] == ["patches/c.0.0.0.0.0.0"]


def change_json(path, *keys, value):
    node = tree = json.loads(path.read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(tree))


GRID = ("chunk_grid", "configuration", "chunk_shape")
ARRAY_CHANGES = [
    ("embedding", ("shape",), [3, 1, 2, 24_000_000]),
    ("embedding", ("shape",), [3, 1, 2, "6"]),
    ("embedding", GRID, [2, 1, 2, 2**40]),
    ("embedding", ("data_type",), "float64"),
    ("embedding", ("codecs",), [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}]),
    ("patches", ("shape",), [2**40, 1, 2, 2, 4, 8]),
    ("patches", ("fill_value",), 0),
    ("patches", ("codecs", 0, "configuration", "chunk_shape"), [1, 1, 1, 2, 4, 2**33]),
    ("patches", ("codecs",), {}),
    ("cls", ("chunk_key_encoding",), {"name": "default", "configuration": {"separator": "/"}}),
    ("pixels", ("shape",), None),
    ("codec/scale", ("shape",), [2, 2**40]),
    ("head/norm_weight", ("shape",), [2**40]),
    ("head/norm_weight", ("shape",), [8] * 30),
]


@pytest.mark.parametrize(("name", "keys", "value"), ARRAY_CHANGES)
def test_an_array_must_be_the_one_of_the_layout(store_path, name, keys, value):
    """C3: the process was aborted before."""
    change_json(store_path / name / "zarr.json", *keys, value=value)
    forget_hashes(store_path)
    with pytest.raises(StoreDamagedError, match=rf"{name}/zarr\.json"):
        use(store_path)
    assert f"{name}/zarr.json" in {one.where for one in verify_store(open_store(store_path))}


@pytest.mark.parametrize("name", ["embedding", "patches"])
def test_nothing_is_written_into_an_array_of_another_layout(store_path, name):
    """C3."""
    change_json(store_path / name / "zarr.json", "shape", 0, value=10**9)
    forget_hashes(store_path)
    before = snapshot(store_path)
    with pytest.raises(StoreDamagedError, match="is not the array of this store's layout"):
        open_store(store_path).require_arrays()
    assert snapshot(store_path) == before


ATTRIBUTE_CHANGES = [
    (("layout", "num_rows"), 10**9),
    (("layout", "num_rows"), -3),
    (("layout", "num_rows"), 3.0),
    (("layout", "num_rows"), True),
    (("layout", "num_frames"), 2**62),
    (("layout", "num_patches"), 2**19),
    (("layout", "width"), float("nan")),
    (("layout", "channels"), None),
    (("layout", "layers"), [3, 1]),
    (("layout", "layers"), [1, 1]),
    (("layout", "layers"), []),
    (("layout", "layers"), "13"),
    (("layout", "image_size"), [4]),
    (("layout", "patch_dtype"), "object"),
    (("layout", "pixel_offsets"), [1]),
    (("layout", "rows_per_shard"), "2"),
    (("layout",), []),
    (("codec", "parts"), "scale"),
    (("codec", "parts"), []),
    (("codec", "dtype"), "float16"),
    (("codec", "sha256"), 1),
    (("codec",), None),
    (("classes", "names"), {"a": 1}),
    (("classes", "names"), []),
    (("classes",), 1),
    (("backbone",), "toy"),
    (("frames",), [2]),
    (("created",), {"x": 1}),
    (("format_version",), "1"),
    (("format_version",), -1),
    (("format_version",), float("inf")),
]


@pytest.mark.parametrize(("keys", "value"), ATTRIBUTE_CHANGES)
def test_attributes_are_of_the_types_and_sizes_of_a_store(store_path, keys, value):
    """C3."""
    change_json(store_path / "zarr.json", "attributes", "s4v", *keys, value=value)
    forget_hashes(store_path)
    with pytest.raises(S4vError) as caught:
        use(store_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["layout", "codec", "classes", "dataset", "backbone", "frames", "created"])
def test_a_missing_attribute_is_named(store_path, key):
    """C3: KeyError before."""
    path = store_path / "zarr.json"
    tree = json.loads(path.read_text())
    del tree["attributes"]["s4v"][key]
    path.write_text(json.dumps(tree))
    forget_hashes(store_path)
    with pytest.raises(StoreDamagedError, match=key):
        use(store_path)


@pytest.mark.parametrize("name", ["zarr.json", "checksums.json", "patches/zarr.json", "fidelity.json"])
@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "null", "{", '"x"', '{"layers": 1}', "\ufeff{}"])
def test_json_that_is_none_ends_in_one_line(store_path, name, text):
    """C3: RecursionError and AttributeError before."""
    (store_path / name).write_text(text)
    if name != "checksums.json":
        forget_hashes(store_path)
    with pytest.raises(S4vError):
        use(store_path)
        assert name == "checksums.json"  # an object of other things vouches for nothing
        raise StoreDamagedError


def change_table(path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


TABLE_CHANGES = {
    "no column": lambda t: t.drop_columns("status"),
    "no frames": lambda t: t.drop_columns("num_cached_frames"),
    "status": lambda t: t.set_column(t.schema.get_field_index("status"), "status", pa.array(["ok", "ok", "evil"])),
    "type": lambda t: t.set_column(t.schema.get_field_index("status"), "status", pa.array([1, 2, 3])),
    "frames": lambda t: t.set_column(
        t.schema.get_field_index("num_cached_frames"), "num_cached_frames", pa.array([2, 2, 2**31 - 1], pa.int32())
    ),
    "views": lambda t: t.set_column(
        t.schema.get_field_index("num_views"), "num_views", pa.array([1, -1, 1], pa.int32())
    ),
    "label": lambda t: t.set_column(t.schema.get_field_index("label"), "label", pa.array([0, 0, 10**9], pa.int32())),
    "clips": lambda t: t.set_column(
        t.schema.get_field_index("eval_clips"),
        "eval_clips",
        pa.array([[[0, 10**9]]] * 3, pa.list_(pa.list_(pa.int32()))),
    ),
    "rows": lambda t: pa.concat_tables([t, t]),
    "no rows": lambda t: t.slice(0, 0),
}


@pytest.mark.parametrize("change", TABLE_CHANGES)
def test_a_manifest_of_other_columns_types_or_rows_is_refused(store_path, change):
    """C3."""
    change_table(store_path / "videos.parquet", TABLE_CHANGES[change])
    forget_hashes(store_path)
    with pytest.raises(StoreDamagedError, match=r"videos\.parquet"):
        use(store_path)


def test_captions_of_other_rows_are_refused(store_path):
    """C3."""
    change_table(
        store_path / "captions.parquet", lambda t: t.set_column(1, "video_id", pa.array(["other.mp4"] * len(t)))
    )
    forget_hashes(store_path)
    with pytest.raises(StoreDamagedError, match=r"captions\.parquet .*'other\.mp4', which is no row"):
        open_store(store_path).read_captions()


FILES = [
    "zarr.json", "checksums.json", "videos.parquet", "captions.parquet", "patches/zarr.json", "patches/c.0.0.0.0.0.0",
    "cls/c.0.0.0.0.0", "embedding/c.0.0.0.0", "pixels/c.0.0.0.0.0.0.0", "codec/scale/c.0.0", "head/eps/zarr.json",
    "_parts/000000.arrows",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", FILES)
def test_no_link_is_followed_and_no_pipe_is_waited_for(store_path, tmp_path, name, kind):
    """C2: reading, verifying, and going on."""
    elsewhere = tmp_path / "elsewhere"
    shutil.move(store_path / name, elsewhere)
    (store_path / name).symlink_to(elsewhere) if kind == "link" else os.mkfifo(store_path / name)
    if not name.startswith("_parts"):  # of which a finished store needs nothing to be read
        with pytest.raises(S4vError):
            use(store_path)
    if name != "zarr.json":
        try:
            found = verify_store(open_store(store_path))
        except S4vError:
            found = [name]
        assert found
        with pytest.raises(S4vError):
            open_store(store_path).require_arrays()


def test_a_store_that_is_a_link_opens(whole_store, tmp_path):
    """C2: only links inside are refused."""
    (tmp_path / "link.zarr").symlink_to(whole_store)
    use(tmp_path / "link.zarr")
    assert verify_store(open_store(tmp_path / "link.zarr")) == []
    resume_store(open_store(tmp_path / "link.zarr"), SPEC).close()


def test_hostile_names_in_the_recorded_hashes_are_damage(store_path, tmp_path):
    """C2."""
    (tmp_path / "secret").write_text("x")
    hashes = json.loads((store_path / "checksums.json").read_text())
    (store_path / "checksums.json").write_text(
        json.dumps({**hashes, "../secret": "0" * 64, "zarr.json": hashes["zarr.json"]})
    )
    (damage,) = verify_store(open_store(store_path))
    assert damage.where == "checksums.json" and "../secret" in damage.what


# ---- Everything at once


def json_values():
    numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, -1, 2**31, 2**62, 2**63 + 5]) | st.floats()
    leaves = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.just("../x")
    return leaves | st.lists(leaves, max_size=4) | st.dictionaries(st.text(max_size=4), leaves, max_size=3)


def places_in(node, path=()):
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places_in(value, (*path, key))


def same(a, b):
    (clips, embeddings, head, captions, decoded, table), other = a, b
    pairs = [(x, y) for one, two in zip(clips, other[0], strict=True) for x, y in
             ((one.patches, two.patches), (one.cls, two.cls), (one.pixels, two.pixels))]  # fmt: skip
    pairs += [(embeddings, other[1]), (decoded, other[4]), *((head[name], other[2][name]) for name in head)]
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs) and captions == other[3] and table == other[5]


def mutate_and_use(whole, folder, data):
    path = folder / "mutated.zarr"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    files = sorted([*path.rglob("*.json"), *(f for n in ("patches", "cls", "pixels") for f in (path / n).glob("c.*"))])
    file = data.draw(st.sampled_from(files))
    if file.suffix == ".json":
        tree = json.loads(file.read_text())
        keys = data.draw(st.sampled_from(list(places_in(tree))))
        value = data.draw(json_values())
        if keys:
            change_json(file, *keys, value=value)
        else:
            file.write_text(json.dumps(value))
        if file.name != "checksums.json":
            forget_hashes(path)
    else:
        num_chunks = {"patches": 4, "cls": 2, "pixels": 4}[file.parent.name]
        size = st.integers(0, 2**64 - 1) | st.integers(0, file.stat().st_size)
        entries = np.frombuffer(file.read_bytes()[-(16 * num_chunks + 4) : -4], dtype="<u8").reshape(-1, 2).tolist()
        entries[data.draw(st.integers(0, num_chunks - 1))] = [data.draw(size), data.draw(size)]
        write_index(file, entries, num_chunks)
    try:
        found = use(path)
        verify_store(open_store(path))
    except S4vError as error:
        assert "\n" not in str(error).strip() or len(str(error)) < 2000
        return
    assert same(use(whole), found)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_gives_the_same_data_or_one_line(whole_store, tmp_path, data):
    """C2, C3."""
    mutate_and_use(whole_store, tmp_path, data)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_changes_give_the_same_data_or_one_line(whole_store, tmp_path, data):
    """C2, C3."""
    mutate_and_use(whole_store, tmp_path, data)


_BOUNDED = """
import resource, sys
from s4v.errors import S4vError
from s4v.store.reader import open_store
from s4v.store.verify import verify_store
def size():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
open_store(sys.argv[1]).read_clips([0], [[0]])
limit = size() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[2:]:
    try:
        store = open_store(path)
        found = verify_store(store)
        store.read_clips([0], [[1, 0]]); store.read_embeddings(); store.head
        print("read", path)
    except S4vError as error:
        print("refused", path)
"""


def test_hostile_sizes_take_no_memory(whole_store, tmp_path):
    """C3: within a gibibyte of address space beyond what a whole store takes."""
    changed = []
    for number, (name, keys, value) in enumerate([c for c in ARRAY_CHANGES if c[0] in ("embedding", "patches")]):
        changed.append(shutil.copytree(whole_store, tmp_path / f"{number}.zarr"))
        change_json(changed[-1] / name / "zarr.json", *keys, value=value)
        forget_hashes(changed[-1])
    command = [sys.executable, "-c", _BOUNDED, str(whole_store), *map(str, changed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["refused"] * len(changed)
