import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import (
    EnvironmentFailedError,
    StoreBusyError,
    StoreDamagedError,
    StoreExistsError,
    StoreMismatchError,
)
from s4v.extract.extraction import extract_dataset
from s4v.retrieve import index_reader as index_module
from s4v.retrieve.export import export_vectors
from s4v.retrieve.index_reader import VideoIndex, default_index_path, open_index
from s4v.retrieve.index_writer import IndexFacts, build_index, measure_rounding
from s4v.store.reader import open_store
from s4v.vectors import normalise_rows, pool_frames, score_rows


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
    return VideoIndex(
        folder, IndexFacts(2, "", "", len(vectors), vectors.shape[1], measure_rounding(vectors, arrays["pooled16"]))
    )


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 400),
    width=st.sampled_from([3, 32, 512]),
    top=st.integers(1, 20),
    closeness=st.sampled_from([0.0, 1.0, 30.0]),
    distinct=st.sampled_from([1, 5, 400]),
    share=st.sampled_from([0.3, 1.0]),
)
def test_the_scan_finds_what_brute_force_finds(tmp_path_factory, seed, count, width, top, closeness, distinct, share):
    """Also of vectors that half precision cannot tell apart, and of equal ones, which come in row order."""
    rng = np.random.default_rng(seed)
    vectors = normalise_rows((rng.normal(size=(count, width)) + closeness).astype(np.float32))
    vectors = vectors[rng.integers(0, distinct, count) % count]
    query = normalise_rows((rng.normal(size=width) + closeness).astype(np.float32))
    allowed = rng.random(count) < share
    index = make_index(tmp_path_factory.mktemp("index") / "i", vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_SCORED_AT_ONCE", 7)
        found = index.find(query, top, allowed=allowed)
    # Row by row, so that no score can depend on what stands beside it.
    scores = np.array([score_rows(vectors[place : place + 1], query)[0] for place in range(count)])
    expected = [place for place in np.argsort(-scores, kind="stable") if allowed[place]][:top]
    assert [match.place for match in found] == expected
    assert [match.score for match in found] == scores[expected].tolist()
    np.testing.assert_allclose(scores, vectors.astype(np.float64) @ query, rtol=0, atol=1e-6)


def test_the_bound_holds_for_vectors_at_its_limit(tmp_path):
    """Steps of float16 are 2^-13 here: of half of one the scan sees nothing, of a little more a whole one."""
    query = np.full(64, 0.125, np.float32)
    steps = np.zeros((3, 64))
    steps[0] = 0.49  # 31.4 steps that the scan does not see
    steps[1, :31] = 0.51  # 15.8 of which it sees 31
    steps[2] = -100
    vectors = (0.125 + steps * 2.0**-13).astype(np.float32)
    index = make_index(tmp_path / "i", vectors)
    rough = (vectors.astype(np.float16).astype(np.float64) @ query).tolist()
    assert rough[0] < rough[1]
    assert [match.place for match in index.find(query, 1)] == [0]
    assert [match.place for match in index.find(-query, 3)] == [2, 1, 0]
    for last in (0.9, 0.0, -0.9):
        least = index._find_least(last, query, query.astype(np.float16))
        assert last - 4 * 2.0**-11 < least < last - 2 * index.facts.rounding, "not far below what has to be"


def test_a_query_without_numbers_is_told(tmp_path):
    index = make_index(tmp_path / "i", normalise_rows(np.ones((3, 4), np.float32)))
    for wrong in (np.nan, np.inf):
        with pytest.raises(EnvironmentFailedError, match="the query's embedding is not finite"):
            index.find(np.array([wrong, 0, 0, 0]), 2)


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


def test_a_store_that_grew_since_it_was_opened_makes_no_index(
    store, video_folder, make_video, make_config, monkeypatch
):
    root = shutil.copytree(video_folder, store.path.parent / "videos")
    make_video(root / "val/run/new.mp4", seed=5)
    store.read_embeddings()
    extract_dataset(make_config(root, store.path, dtype="int8", append=True))
    with pytest.raises(StoreMismatchError, match=r"s\.zarr has 12 rows, and had 11 when it was opened: open it again"):
        open_index(store)
    assert not store.path.with_name("s.index").exists()
    assert open_index(open_store(store.path)).facts.videos == 11
    with pytest.raises(StoreMismatchError, match="open it again"):
        open_index(store)


def test_frames_that_were_lost_make_no_index(store, monkeypatch):
    embeddings = store.read_embeddings()
    embeddings[0, :, 2:] = np.nan
    monkeypatch.setattr(type(store), "read_embeddings", lambda _, rows: embeddings[rows.start : rows.stop])
    with pytest.raises(StoreDamagedError, match="embedding has lost frames of rows 0 to"):
        open_index(store)
    assert [path.name for path in store.path.parent.iterdir()] == ["s.zarr"]


@pytest.mark.parametrize("version", [1, 99])
def test_an_index_of_another_version_is_built_anew(store, version):
    index = open_index(store)
    told = json.loads((index.path / "index.json").read_text())
    facts = {name: told[name] for name in ("fingerprint", "videos")} | {"format_version": version, "unheard_of": 1}
    (index.path / "index.json").write_text(json.dumps(facts))
    (index.path / "more.npy").write_text("x")
    assert open_index(store).facts == index.facts
    assert not (index.path / "more.npy").exists()


@pytest.mark.parametrize("has_locks", [True, False])
def test_the_second_of_two_first_searches_waits(has_locks, store, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
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
    while "another process builds s.index: waiting" not in caplog.text and second.is_alive():
        second.join(0.01)
    assert second.is_alive()
    may_end.set()
    for thread in (first, second):
        thread.join(30)
    assert set(built) == {"first"}
    assert open_index(store).facts.videos == 10
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["s.index", "s.zarr"]


def test_what_a_killed_builder_left_goes(store):
    command = [sys.executable, "-m", "s4v", "index", "--features", str(store.path)]
    environment = {**os.environ, "S4V_KILL_AT": "index built 1"}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert len(list(store.path.parent.iterdir())) == 3, "a scratch folder and a lease beside the store"
    assert open_index(store).facts.videos == 10
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["s.index", "s.zarr"]


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_again(store, monkeypatch):
    original = open_index(store)
    told, events = original.path / "index.json", ["gone", "replaced"]

    def open_late(path, facts):
        event = events.pop() if events else None
        if event == "gone":  # between two renames
            shutil.rmtree(path)
            raise StoreDamagedError("rows.npy is missing")
        index = VideoIndex(path, facts)
        if event == "replaced":
            told.write_text(json.dumps({**json.loads(told.read_text()), "rounding": 0.5}))
        return index

    monkeypatch.setattr(index_module, "VideoIndex", open_late)
    assert open_index(store).facts == original.facts and not events
    events += 10 * ["replaced"]
    monkeypatch.setattr(index_module, "build_index", lambda *_, **__: original.facts)
    monkeypatch.setattr(index_module, "read_facts", lambda _: None)
    with pytest.raises(StoreBusyError, match=r"others keep building .*s\.index anew"):
        open_index(store)


def test_an_index_past_the_memory_is_told(store, caplog):
    index = open_index(store)
    assert caplog.text == ""
    index.facts = replace(index.facts, videos=10**12)
    index_module._warn_of_memory(index)
    assert "each query scans 256.0 TB, and " in caplog.text and "s4v index --export" in caplog.text


def test_a_store_without_embeddings_is_told(store):
    shutil.rmtree(store.path / "embedding")
    with pytest.raises(StoreDamagedError, match="embedding"):
        open_index(open_store(store.path))


def test_damage_and_foreign_folders_are_told(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    told = r"exists and is no index.*--index of `s4v retrieve`, --out of `s4v index`"
    with pytest.raises(StoreMismatchError, match=told):
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
