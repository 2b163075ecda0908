import shutil
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import StoreDamagedError, StoreExistsError, StoreMismatchError
from s4v.extract.pipeline import extract_dataset
from s4v.retrieve import index as index_module
from s4v.retrieve.export import export_vectors
from s4v.retrieve.index import IndexFacts, VideoIndex, build_index, default_index_path, open_index
from s4v.retrieve.vectors import normalise_rows, pool_frames
from s4v.store.reader import open_store


@pytest.fixture
def store(int8_store, tmp_path):
    return open_store(shutil.copytree(int8_store, tmp_path / "s.zarr"))


def make_index(folder, vectors):
    """An index of made-up pooled vectors."""
    folder.mkdir()
    arrays = {"pooled": vectors, "pooled16": vectors.astype(np.float16), "rows": np.arange(len(vectors))}
    arrays |= {"offsets": np.arange(len(vectors) + 1), "frames": vectors.astype(np.float16)}
    for name, values in {**arrays, "times": np.zeros(len(vectors))}.items():
        np.save(folder / f"{name}.npy", values)
    return VideoIndex(folder, IndexFacts(1, "", "", len(vectors), vectors.shape[1]))


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 400),
    width=st.sampled_from([3, 32, 512]),
    top=st.integers(1, 20),
    closeness=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_the_scan_finds_what_brute_force_finds(tmp_path_factory, seed, count, width, top, closeness):
    """Also of vectors so close to each other that half precision cannot tell them apart, and of equal ones."""
    rng = np.random.default_rng(seed)
    vectors = normalise_rows((rng.normal(size=(count, width)) + closeness).astype(np.float32)).astype(np.float32)
    vectors[count // 2] = vectors[0]
    query = normalise_rows((rng.normal(size=width) + closeness).astype(np.float32)).astype(np.float32)
    found = make_index(tmp_path_factory.mktemp("index") / "i", vectors).find(query, top)
    scores = vectors.astype(np.float64) @ query
    assert len(found) == min(top, count) == len({match.place for match in found})
    best = np.sort(scores)[::-1][: len(found)]
    np.testing.assert_allclose([match.score for match in found], best, rtol=0, atol=2e-6)
    np.testing.assert_allclose(scores[[match.place for match in found]], best, rtol=0, atol=2e-6)


def test_an_index_holds_the_stores_vectors(store):
    index = open_index(store)
    assert index.path == default_index_path(store.path) == store.path.with_name("s.index")
    frames = normalise_rows(store.read_embeddings())
    good = [v for v, status in enumerate(store.read_manifest(["status"])["status"].to_pylist()) if status == "ok"]
    assert index.rows.tolist() == good and index.facts.videos == 10
    times = store.read_manifest(["timestamps_s"])["timestamps_s"].to_pylist()
    for place, row in enumerate(good):
        np.testing.assert_allclose(index.vector_of(place), pool_frames(frames[[row]])[0], rtol=1e-6)
        vectors, stamps = index.frames_of(place)
        np.testing.assert_allclose(vectors, frames[row, 0][~np.isnan(frames[row, 0, :, 0])], atol=1e-3)
        assert stamps.tolist() == times[row]
    allowed = np.zeros(10, dtype=bool)
    allowed[3] = True
    assert [match.place for match in index.find(index.vector_of(0), 5, allowed=allowed)] == [3]
    assert index.find(index.vector_of(0), 5, allowed=np.zeros(10, dtype=bool)) == []


def test_an_index_is_built_once_and_anew_when_its_store_changed(
    store, video_folder, make_video, make_config, monkeypatch
):
    open_index(store)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "build_index", lambda *_: pytest.fail("built again"))
        open_index(store)
    root = shutil.copytree(video_folder, store.path.parent / "videos")
    make_video(root / "val/run/new.mp4", seed=5)
    extract_dataset(make_config(root, store.path, dtype="int8", append=True))
    assert open_index(open_store(store.path)).facts.videos == 11


def test_the_second_of_two_first_searches_waits(store, caplog):
    has_begun, may_end, built = threading.Event(), threading.Event(), []

    def build(name, wait):
        def report(*_):
            built.append(name)
            has_begun.set()
            assert not wait or may_end.wait(30)

        open_index(open_store(store.path), report=report)

    first = threading.Thread(target=build, args=("first", True))
    first.start()
    assert has_begun.wait(30)
    second = threading.Thread(target=build, args=("second", False))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    may_end.set()
    for thread in (first, second):
        thread.join(30)
    assert set(built) == {"first"}
    assert "another process builds s.index: waiting" in caplog.text
    assert open_index(store).facts.videos == 10
    assert [p.name for p in store.path.parent.iterdir() if "partial" in p.name] == []


def test_a_store_without_embeddings_is_told(store):
    shutil.rmtree(store.path / "embedding")
    with pytest.raises(StoreDamagedError, match="embedding"):
        open_index(open_store(store.path))


def test_damage_and_foreign_folders_are_told(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(StoreMismatchError, match="exists and is no index. Nothing was written"):
        build_index(store, tmp_path / "mine")
    index = open_index(store)
    (index.path / "offsets.npy").unlink()
    with pytest.raises(StoreDamagedError, match="offsets.npy is missing or damaged: remove "):
        open_index(store)


def test_vectors_are_exported_as_clip_retrieval_reads_them(store, tmp_path):
    index = open_index(store)
    assert export_vectors(store, index, tmp_path / "out") == 10
    vectors = np.load(tmp_path / "out/img_emb/img_emb_0.npy")
    assert vectors.dtype == np.float16 and vectors.shape == (10, index.facts.width)
    table = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet")
    assert table.column_names[:2] == ["image_path", "caption"] and len(table) == 10
    with pytest.raises(StoreExistsError, match="choose another --export"):
        export_vectors(store, index, tmp_path / "out")
    result = CliRunner().invoke(app, ["index", "--features", str(store.path), "--export", str(tmp_path / "two")])
    assert result.exit_code == 0 and "s.index: 10 videos" in result.stdout
    assert (tmp_path / "two/img_emb/img_emb_0.npy").is_file()
