import shutil

import numpy as np
import pyarrow as pa
import pytest

from s4v.errors import StoreDamagedError
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
     "_parts/000002.parquet", "patches/zarr.json"],
)  # fmt: skip
def test_flips_outside_of_the_shards_are_found(store_path, name, flip_byte):
    flip_byte(store_path / name, 33)
    assert name in {one.where for one in verify_store(open_store(store_path))}


def test_missing_files_and_truncations_are_found(store_path):
    (store_path / "cls/c.1.0.0.0.0").unlink()
    (store_path / "_parts/000004.parquet").unlink()
    whole = store_path / "pixels/c.2.0.0.0.0.0.0"
    whole.write_bytes(whole.read_bytes()[:-1000])
    found = {(one.where, one.shard) for one in verify_store(open_store(store_path))}
    assert found == {("cls/c.1.0.0.0.0", 1), ("_parts/000004.parquet", 4), ("pixels/c.2.0.0.0.0.0.0", 2)}


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
