"""Parts of one store, joined: what is damaged is not passed on, and the better row wins."""

import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from s4v.errors import StoreDamagedError
from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.verify import verify_store
from s4v.store.writer import RowTokens, create_store, resume_store

LAYOUT = StoreLayout(
    num_rows=6,
    num_views=2,
    num_frames=3,
    layers=(1, 3),
    num_patches=4,
    width=8,
    channels=8,
    embed_dim=6,
    image_size=(4, 4),
    patch_dtype="float16",
    rows_per_shard=2,
)
RECORDS = [VideoRecord(video_id=f"{i}.mp4", path=f"{i}.mp4", split="train", captions=("x",)) for i in range(6)]
ATTRIBUTES = {"created": "now", "classes": {"names": []}, "backbone": {"name": "toy"}, "dataset": {"name": "toy"}}


def tokens_of(row):
    rng = np.random.default_rng(row)
    return RowTokens(
        patches=rng.normal(size=(2, 3, 2, 4, 8)).astype(np.float16),
        cls=rng.normal(size=(2, 3, 2, 8)).astype(np.float16),
        embedding=rng.normal(size=(2, 3, 6)).astype(np.float32),
        pixels=rng.integers(0, 256, (2, 3, 1, 4, 4, 3), dtype=np.uint8),
    )


def result_of(row, failed=(), source_hash=None):
    video_id = RECORDS[row].video_id
    if row in failed:
        return VideoResult(video_id=video_id, status="failed", reason="truncated: 1 of 9", source_hash=source_hash)
    return VideoResult(
        video_id=video_id,
        status="ok",
        num_cached_frames=3,
        num_views=2,
        frame_indices=[0, 1, 2],
        timestamps_s=[0.0, 0.1, 0.2],
        eval_clips=[[0, 1, 2]],
        source_hash=source_hash,
    )


@pytest.fixture
def make_part(tmp_path):
    """A store of some shards, some of whose rows failed."""

    def make(name, shards, failed=(), source_hash=None):
        path = tmp_path / name
        codec, head = AffineCodec(dtype="float16"), {"eps": np.float32(1)}
        spec = StoreSpec(layout=LAYOUT, attributes=ATTRIBUTES, records=RECORDS, codec=codec, head=head)
        with create_store(path, spec) as writer:
            for shard in shards:
                rows = LAYOUT.shard_rows(shard)
                good = {row: tokens_of(row) for row in rows if row not in failed}
                writer.write_shard(shard, good, [result_of(row, failed, source_hash) for row in rows])
            writer.consolidate()
        return path

    return make


def require_rows(path, good):
    store = open_store(path)
    statuses = store.read_manifest(["status"])["status"].to_pylist()
    assert [row for row, status in enumerate(statuses) if status == "ok"] == list(good)
    for row in good:
        found = store.read_clips([row], [[2, 0]], view=1)
        assert np.array_equal(found.patches[0], tokens_of(row).patches[1, [2, 0]])
        assert np.array_equal(found.pixels[0], tokens_of(row).pixels[1, [2, 0]])
        assert np.array_equal(store.read_embeddings(range(row, row + 1))[0], tokens_of(row).embedding)
    assert verify_store(store) == []


DAMAGED = ["patches/c.1.0.0.0.0.0", "cls/c.1.0.0.0.0", "embedding/c.1.0.0.0", "_parts/000001.arrows"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_flipped_byte_is_not_passed_on(make_part, tmp_path, flip_byte, name):
    """B7: the shard stays pending, and that is told with exit code 4; the rest is merged."""
    first, second = make_part("a", [0, 1]), make_part("b", [2])
    flip_byte(first / name, 40)
    with pytest.raises(StoreDamagedError, match=rf"No whole copy of 1 shards: shard 1 of .*{name}") as caught:
        merge_stores([first, second], tmp_path / "out")
    assert caught.value.exit_code == 4
    require_rows(tmp_path / "out", [0, 1, 4, 5])


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("turned", [False, True])
def test_a_damaged_shard_is_taken_where_it_is_whole(make_part, tmp_path, flip_byte, name, turned):
    """B7."""
    parts = [make_part("a", [0, 1]), make_part("b", [1, 2])]
    flip_byte(parts[0] / name, 40)
    assert merge_stores(parts[::-1] if turned else parts, tmp_path / "out")["ok"] == 6
    require_rows(tmp_path / "out", range(6))


@pytest.mark.parametrize("turned", [False, True])
def test_the_copy_with_more_good_rows_wins_whatever_the_order(make_part, tmp_path, turned):
    """B7."""
    parts = [make_part("a", [0, 1, 2], failed=(2, 3)), make_part("b", [1])]
    assert merge_stores(parts[::-1] if turned else parts, tmp_path / "out") == {"ok": 6, "failed": 0, "pending": 0}
    require_rows(tmp_path / "out", range(6))


@pytest.mark.parametrize("turned", [False, True])
def test_copies_that_complement_each_other_are_joined_row_by_row(make_part, tmp_path, turned):
    """B7."""
    parts = [make_part("a", [0, 1, 2], failed=(2, 5)), make_part("b", [1, 2], failed=(3, 4, 5))]
    assert merge_stores(parts[::-1] if turned else parts, tmp_path / "out") == {"ok": 5, "failed": 1, "pending": 0}
    require_rows(tmp_path / "out", range(5))


def test_a_later_merge_betters_what_an_earlier_one_took(make_part, tmp_path):
    """B7: the good copy comes with the second command."""
    parts = [make_part("a", [0, 1], failed=(2,)), make_part("b", [1, 2], failed=(3,))]
    assert merge_stores(parts[:1], tmp_path / "out")["ok"] == 3
    assert merge_stores(parts[1:], tmp_path / "out") == {"ok": 6, "failed": 0, "pending": 0}
    require_rows(tmp_path / "out", range(6))
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    merge_stores(parts, tmp_path / "out")
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["patches/c.1.0.0.0.0.0", "captions.parquet", "head/eps/c", "_parts/000001.arrows"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_refused_and_not_copied(make_part, tmp_path, name, kind):
    """B7: a link's target came along before; a pipe was waited for."""
    part, other = make_part("a", [0, 1]), make_part("b", [2])
    secret = tmp_path / "secret"
    shutil.move(part / name, secret)
    if kind == "link":
        (part / name).symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(part / name)
    else:
        (part / name).mkdir()
    with pytest.raises(StoreDamagedError):
        merge_stores([part, other], tmp_path / "out")
    if kind == "folder" and name.startswith(("patches", "_parts")):
        require_rows(tmp_path / "out", [0, 1, 4, 5])
    else:
        assert not (tmp_path / "out").exists()


def test_only_known_files_are_copied(make_part, tmp_path):
    """B7: whatever else lies in a part stays there."""
    part = make_part("a", [0, 1, 2])
    for name in ("notes.txt", "head/.hidden", "patches/extra", "_parts/x.parquet", "more/deep/file"):
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_text("x")
    merge_stores([part], tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file() and file.read_bytes() == b"x"]
    require_rows(tmp_path / "out", range(6))


def test_files_that_differ_between_machines_are_told(make_part, tmp_path, caplog):
    """B7: rows of one file, decoded from other bytes here and there."""
    parts = [make_part("a", [0, 1], source_hash="one"), make_part("b", [1, 2], source_hash="other")]
    with caplog.at_level(logging.WARNING):
        merge_stores(parts, tmp_path / "out")
    assert "2 files were others on one machine than on another" in caplog.text and "2.mp4, 3.mp4" in caplog.text


def test_a_merged_store_goes_on(make_part, tmp_path):
    merge_stores([make_part("a", [0]), make_part("b", [2])], tmp_path / "out")
    records = [replace(record) for record in RECORDS]
    with resume_store(
        open_store(tmp_path / "out"), StoreSpec(layout=LAYOUT, attributes=ATTRIBUTES, records=records)
    ) as writer:
        assert writer.pending_shards() == [1]
