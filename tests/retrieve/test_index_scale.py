"""An index's row tables grow with the rows, not with rows times shards."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import StoreDamagedError
from s4v.retrieve import index_writer
from s4v.retrieve.index_writer import RowFacts, build_index
from s4v.store.codecs.affine import AffineCodec
from s4v.store.layout import StoreLayout
from s4v.store.reader import open_store
from s4v.store.records import VideoRecord, VideoResult
from s4v.store.spec import StoreSpec
from s4v.store.writer import RowTokens, create_store

LAYOUT = StoreLayout(
    num_rows=40, num_views=1, num_frames=3, layers=(1,), num_patches=1, width=4, channels=4, embed_dim=6,
    image_size=(2, 2), patch_dtype="float16", rows_per_shard=2,
)  # fmt: skip
ATTRIBUTES = {"classes": {"names": []}, "dataset": {"name": "toy"}, "backbone": {"name": "toy"}}


@pytest.fixture
def make_store(tmp_path):
    """Forty rows in twenty shards, every fifth row failed; row r has 1 + r % 3 frames."""

    def make(times=True):
        records = [VideoRecord(video_id=f"{i:02d}", path=f"{i:02d}", split="train") for i in range(40)]
        path = tmp_path / "many.zarr"
        codec = AffineCodec(dtype="float16")
        spec = StoreSpec(layout=LAYOUT, attributes=ATTRIBUTES, records=records, codec=codec, head={})
        with create_store(path, spec) as writer:
            for shard in writer.pending_shards():
                tokens, results = {}, []
                for row in LAYOUT.shard_rows(shard):
                    frames = 1 + row % 3
                    if row % 5 == 4:
                        results.append(VideoResult(video_id=records[row].video_id, status="failed", reason="crashed"))
                        continue
                    rng = np.random.default_rng(row)
                    tokens[row] = RowTokens(
                        patches=np.zeros((1, frames, 1, 1, 4), np.float16),
                        cls=np.zeros((1, frames, 1, 4), np.float16),
                        embedding=rng.normal(size=(1, frames, 6)).astype(np.float32),
                        pixels=np.zeros((1, frames, 1, 2, 2, 3), np.uint8),
                    )
                    stamps = [row + frame / 10 for frame in range(frames)]
                    results.append(
                        VideoResult(
                            video_id=records[row].video_id,
                            status="ok",
                            num_cached_frames=frames,
                            num_views=1,
                            timestamps_s=stamps if times else None,
                            eval_clips=[[frames - 1], [0]],
                        )
                    )
                writer.write_shard(shard, tokens, results)
            writer.consolidate()
        return open_store(path)

    return make


def test_row_tables_are_taken_once_and_sliced_for_each_shard(make_store, tmp_path, monkeypatch):
    """D: a look-up in the whole table for each shard took 26 minutes at 2.2 million rows."""
    store = make_store()
    looked_up = []

    class Counted:
        """A manifest's table that counts what is looked up in it, row by row."""

        def __init__(self, table):
            self._table = table

        def __len__(self):
            return len(self._table)

        def __getitem__(self, name):
            column = self._table[name]
            return CountedColumn(column) if pa.types.is_list(column.type) else column

        def select(self, columns):
            return self._table.select(columns)

    class CountedColumn:
        def __init__(self, column):
            self._column = column

        def take(self, rows):
            looked_up.append(len(rows))
            return self._column.take(rows)

    read = store.read_manifest
    monkeypatch.setattr(store, "read_manifest", lambda columns: Counted(read(columns)))
    facts = build_index(store, tmp_path / "index")
    assert looked_up == [] and facts.videos == 32
    times, offsets = np.load(tmp_path / "index/times.npy"), np.load(tmp_path / "index/offsets.npy")
    for place, row in enumerate(np.load(tmp_path / "index/rows.npy").tolist()):
        expected = [row + frame / 10 for frame in range(1 + row % 3)]
        assert times[offsets[place] : offsets[place + 1]].tolist() == expected


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_row_facts_are_those_of_the_rows_however_the_table_is_chunked(chunk):
    """D."""
    lengths = [0 if row % 4 == 3 else 1 + row % 3 for row in range(100)]
    rows = [
        {
            "num_cached_frames": n or None,
            "timestamps_s": [row + i / 10 for i in range(n)] if n else None,
            "eval_clips": [[n - 1] * n, [0]] if n else None,
        }
        for row, n in enumerate(lengths)
    ]
    schema = pa.schema(
        [
            ("num_cached_frames", pa.int32()),
            ("timestamps_s", pa.list_(pa.float64())),
            ("eval_clips", pa.list_(pa.list_(pa.int32()))),
        ]
    )
    table = pa.Table.from_batches(pa.Table.from_pylist(rows, schema=schema).to_batches(max_chunksize=chunk))
    good = np.flatnonzero(lengths)
    facts = RowFacts(table, good)
    for span in (slice(0, 0), slice(0, 5), slice(31, 32), slice(0, len(good))):
        chosen = [rows[row] for row in good[span]]
        assert facts.times_of(span).tolist() == [stamp for row in chosen for stamp in row["timestamps_s"]]
        assert facts.first_clips_of(span) == [row["eval_clips"][0] for row in chosen]


def test_good_rows_without_times_are_named(make_store, tmp_path):
    """C3: a TypeError before."""
    with pytest.raises(StoreDamagedError, match=r"32 rows are ok and lacks their times"):
        build_index(make_store(times=False), tmp_path / "index")
    assert not (tmp_path / "index").exists()


@given(counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=64))
def test_a_long_row_is_read_with_few_others(counts):
    counts = np.asarray(counts)
    together = index_writer._count_together(counts, 512)
    assert 1 <= together <= len(counts)
    assert together == 1 or together * counts[:together].max() * 512 * 4 <= 2**28
    if together < len(counts):
        assert (together + 1) * counts[: together + 1].max() * 512 * 4 > 2**28
