import json
import random
import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest

from s4v.errors import StoreDamagedError
from s4v.extract.extraction import extract_dataset
from s4v.store import manifest
from s4v.store.reader import open_store
from s4v.store.verify import verify_store


@pytest.fixture
def store_path(int8_store, tmp_path):
    """A copy to damage: eleven shards of one row, row 10 failed."""
    return shutil.copytree(int8_store, tmp_path / "copy.zarr")


def test_an_undamaged_store_has_no_damage(store_path, data_path):
    told = []
    assert verify_store(open_store(store_path), lambda *facts: told.append(facts)) == []
    assert told[-1] == ("verifying", 11, 11)
    assert verify_store(open_store(data_path / "format1.zarr")) == []


def test_every_flipped_byte_is_found_where_it_is(store_path, flip_byte):
    """One in each shard file: tokens, checksums, indices. The reader refuses each."""
    rng = np.random.default_rng(0)
    files = sorted(path for name in ("patches", "cls", "pixels") for path in (store_path / name).glob("c.*"))
    assert len(files) == 30
    for file in files:
        flip_byte(file, int(rng.integers(0, file.stat().st_size)))
    store = open_store(store_path)
    found = verify_store(store)
    assert {one.where for one in found} == {str(file.relative_to(store_path)) for file in files}
    ids = store.read_manifest(["video_id"])["video_id"].to_pylist()
    for one in found:
        assert one.video_id == ids[one.shard]
        name = one.where.split("/")[0]
        frames = range(store.read_manifest(["num_cached_frames"])["num_cached_frames"][one.shard].as_py())
        with pytest.raises(StoreDamagedError, match=f"{name}, shard {one.shard}"):
            store.read_clips([one.shard], [list(frames)], arrays=[name])


@pytest.mark.parametrize(
    "name",
    ["codec/scale/c.0.0", "head/norm_weight/c.0", "embedding/c.3.0.0.0", "videos.parquet", "captions.parquet",
     "_parts/000002.arrows", "patches/zarr.json"],
)  # fmt: skip
def test_flips_outside_of_the_shards_are_found(store_path, name, flip_byte):
    flip_byte(store_path / name, 33)
    assert name in {one.where for one in verify_store(open_store(store_path))}


def test_missing_files_and_truncations_are_found(store_path):
    (store_path / "cls/c.1.0.0.0.0").unlink()
    (store_path / "_parts/000004.arrows").unlink()
    whole = store_path / "pixels/c.2.0.0.0.0.0.0"
    whole.write_bytes(whole.read_bytes()[:-1000])
    found = {(one.where, one.shard) for one in verify_store(open_store(store_path))}
    assert found == {("cls/c.1.0.0.0.0", 1), ("_parts/000004.arrows", 4), ("pixels/c.2.0.0.0.0.0.0", 2)}


def test_a_manifest_that_says_something_else_is_found(store_path):
    path = store_path / manifest.MANIFEST_NAME
    table = manifest.read_table(path)
    frames = table["num_cached_frames"].to_pylist()
    frames[3] += 1
    place = table.schema.get_field_index("num_cached_frames")
    field = table.schema.field(place)
    manifest.write_table(path, table.set_column(place, field, pa.array(frames, field.type)))
    said = [one.what for one in verify_store(open_store(store_path))]
    assert any("rows 3 to 3 are not what the done-marker of shard 3 says" in what for what in said)


def test_chunks_that_the_manifest_does_not_know_of_are_found(store_path):
    """A shard of another row in the place of a failed one, or of a shorter one."""
    store = open_store(store_path)
    statuses = store.read_manifest(["status"])["status"].to_pylist()
    val = store.read_manifest(["split"])["split"].to_pylist().index("val")
    assert statuses[0] == "ok"
    shutil.copy(store_path / "pixels/c.0.0.0.0.0.0.0", store_path / f"pixels/c.{val}.0.0.0.0.0.0")
    said = [(one.shard, one.what) for one in verify_store(open_store(store_path))]
    assert all(shard == val and "does not know of" in what for shard, what in said) and len(said) == 2


def test_missing_checksums_are_damage_that_repair_mends(store_path, int8_store, video_folder, make_config, contents):
    (store_path / "checksums.json").unlink()
    (damage,) = verify_store(open_store(store_path))
    assert damage.where == "checksums.json" and damage.what.startswith("the file is missing")
    # What nothing vouches for any more is put back too.
    metadata = store_path / "cls/zarr.json"
    metadata.write_text(metadata.read_text().replace('"channel"', '"chanel"'))
    extract_dataset(make_config(video_folder, store_path, dtype="int8", repair=True))
    assert verify_store(open_store(store_path)) == []
    assert contents(store_path, "zarr.json") == contents(int8_store, "zarr.json")


def test_a_flip_in_the_recorded_hashes_is_found_and_mended(store_path, int8_store, video_folder, make_config, contents):
    hashes = store_path / "checksums.json"
    known = json.loads(hashes.read_text())
    for name in ("cls/zarr.json", "videos.parquet"):
        known[name] = known[name][::-1]
    hashes.write_text(json.dumps({**known, "_parts/00x.parquet": "0"}))
    found = {(one.where, one.shard) for one in verify_store(open_store(store_path))}
    assert found == {("cls/zarr.json", None), ("videos.parquet", None), ("_parts/00x.parquet", None)}
    hashes.write_text(json.dumps(known))
    extract_dataset(make_config(video_folder, store_path, dtype="int8", repair=True))
    assert verify_store(open_store(store_path)) == []
    assert contents(store_path, "zarr.json") == contents(int8_store, "zarr.json")


@pytest.mark.parametrize("name", ["_parts/000003.arrows", "patches/c.1.0.0.0.0.0", "cls/zarr.json", "videos.parquet"])
def test_a_folder_in_the_place_of_a_file_is_damage_and_the_rest_is_verified(
    name, store_path, int8_store, video_folder, make_config, contents, flip_byte
):
    (store_path / name).unlink()
    (store_path / name).mkdir()
    flip_byte(store_path / "pixels/c.9.0.0.0.0.0.0")
    found = {one.where for one in verify_store(open_store(store_path))}
    assert {name, "pixels/c.9.0.0.0.0.0.0"} <= found
    extract_dataset(make_config(video_folder, store_path, dtype="int8", repair=True))
    assert contents(store_path, "zarr.json") == contents(int8_store, "zarr.json")


@pytest.mark.skipif(sys.platform != "linux", reason="reading /proc/self/mem from its start is an input/output error")
@pytest.mark.parametrize("name", ["_parts/000003.arrows", "patches/c.1.0.0.0.0.0", "embedding/c.4.0.0.0"])
def test_a_disk_that_does_not_read_a_file_is_damage_and_the_rest_is_verified(name, store_path, flip_byte):
    (store_path / name).unlink()
    (store_path / name).symlink_to("/proc/self/mem")
    flip_byte(store_path / "pixels/c.9.0.0.0.0.0.0")
    assert {one.where for one in verify_store(open_store(store_path))} == {name, "pixels/c.9.0.0.0.0.0.0"}


@pytest.mark.slow
def test_one_byte_in_each_of_50_shards_is_named_refused_and_mended(
    make_video, make_config, flip_byte, tmp_path, monkeypatch, contents
):
    monkeypatch.setattr("s4v.store.layout._MIN_SHARDS", 56)  # small stores have 16 shards at most
    for number in range(56):
        make_video(tmp_path / f"videos/a/{number:02d}.mp4", num_frames=3, size=(64, 64), seed=number)
    config = make_config(tmp_path / "videos", tmp_path / "56.zarr", frames={"": 2}, dtype="int8")
    extract_dataset(config)
    store = open_store(config.out)
    assert store.layout.num_shards == 56 and verify_store(store) == []
    whole = shutil.copytree(config.out, tmp_path / "whole.zarr")
    draw = random.Random(7)
    shards = sorted(draw.sample(range(56), 50))
    arrays = {spec.name: spec for spec in store.layout.array_specs()}
    flipped = {}
    for shard in shards:
        name = draw.choice([*arrays, "_parts"])
        key = f"{shard:06d}.arrows" if name == "_parts" else arrays[name].shard_keys(shard)[0]
        flip_byte(config.out / name / key, draw.randrange((config.out / name / key).stat().st_size))
        flipped[shard] = name, f"{name}/{key}"
    assert {one.shard: one.where for one in verify_store(open_store(config.out))} == {
        shard: where for shard, (_, where) in flipped.items()
    }
    damaged = open_store(config.out)
    for shard, (name, _) in flipped.items():
        if name == "_parts":  # the reader needs none of a finished store
            continue
        with pytest.raises(StoreDamagedError, match=f"{name}, shard {shard}:"):
            if name == "embedding":
                damaged.read_embeddings(range(shard, shard + 1))
            else:
                damaged.read_clips([shard], [[0, 1]], arrays=[name])
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.is_file()}
    assert extract_dataset(make_config(config.root, config.out, frames={"": 2}, dtype="int8", repair=True)).videos == {
        "ok": 56,
        "failed": 0,
        "pending": 0,
    }
    assert contents(config.out) == contents(whole)
    kept = set(range(56)) - set(shards)
    files = [config.out / name / key for name, spec in arrays.items() for s in kept for key in spec.shard_keys(s)]
    files += [config.out / f"_parts/{shard:06d}.arrows" for shard in kept]
    assert all(file.stat().st_mtime_ns == before[file] for file in files) and len(files) == 6 * (len(arrays) + 1)
