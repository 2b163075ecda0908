import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, StoreNotFoundError
from s4v.extract.backbone import load_text_tower
from s4v.extract.pipeline import extract_dataset
from s4v.retrieve.search import find_newest_store, normalise_rows, score_videos, search_store
from s4v.store.reader import open_store


def test_scores_by_hand():
    embeddings = np.full((2, 1, 3, 2), np.nan, np.float32)
    embeddings[0, 0, :2] = [[2, 0], [0, 5]]  # two frames, at right angles, of different length
    embeddings[1, 0, :3] = [[0, -1], [0, 1], [0, 3]]
    videos, best, frames = score_videos(embeddings, np.array([0.0, 1.0]))
    np.testing.assert_allclose(videos, [0.5**0.5, 1.0], rtol=1e-6)
    assert best.tolist() == [1, 1], "of equal frames the first"
    np.testing.assert_allclose(frames, [1.0, 1.0], rtol=1e-6)


@given(seed=st.integers(0, 1000))
def test_length_of_embeddings_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(5, 2, 3, 8)).astype(np.float32)
    text = normalise_rows(rng.normal(size=8))
    lengths = rng.uniform(0.1, 10, (5, 2, 3, 1)).astype(np.float32)
    for a, b in zip(score_videos(embeddings, text), score_videos(embeddings * lengths, text), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_answers_are_ranked_by_the_stored_embeddings(int8_store):
    store = open_store(int8_store)
    answers = search_store(store, "a bright column moves", top=4)
    assert [a.rank for a in answers] == [1, 2, 3, 4]
    assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
    tower = load_text_tower("tiny-clip", weights="random:0", device=torch.device("cpu"))
    text = normalise_rows(tower.encode(["a bright column moves"]))[0]
    rows = store.read_manifest(["video_id", "status", "timestamps_s"]).to_pylist()
    by_hand = {}
    for row, embedding in zip(rows, store.read_embeddings(), strict=True):
        if row["status"] == "ok":
            frames = normalise_rows(embedding[0][~np.isnan(embedding[0, :, 0])])
            times = row["timestamps_s"]
            by_hand[row["video_id"]] = (normalise_rows(frames.mean(0)) @ text, times[int((frames @ text).argmax())])
    best = max(by_hand, key=lambda video_id: by_hand[video_id][0])
    assert answers[0].video_id == best
    assert answers[0].score == pytest.approx(by_hand[best][0], rel=1e-5)
    assert answers[0].time_s == pytest.approx(by_hand[best][1])


def test_failed_rows_are_never_found(int8_store):
    answers = search_store(int8_store, "anything", top=1000)
    assert len(answers) == 10
    assert "train/walk/broken.mp4" not in {a.video_id for a in answers}


@pytest.mark.parametrize("query", ["ein Mann läuft", "🏃‍♀️💨", "很长 " * 500])
def test_any_text_is_a_query(int8_store, query):
    assert np.isfinite(search_store(int8_store, query, top=1)[0].score)


def test_empty_query_and_missing_store_are_refused(int8_store, tmp_path):
    with pytest.raises(ConfigError, match="--query is empty"):
        search_store(int8_store, "  ")
    with pytest.raises(ConfigError, match="--top must be at least 1; found 0"):
        search_store(int8_store, "x", top=0)
    with pytest.raises(StoreNotFoundError, match="no store in"):
        find_newest_store(tmp_path)


def test_frames_of_an_unknown_rate_have_no_time(tmp_path, make_config):
    for number in range(3):
        folder = tmp_path / "videos" / "run" / "clip"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 64), (60 * number, 90, 30)).save(folder / f"{number + 1:05d}.jpg")
    config = make_config(tmp_path / "videos", tmp_path / "frames.zarr", frames={"": 2})
    extract_dataset(config)
    (answer,) = search_store(config.out, "anything")
    assert answer.time_s is None
    result = CliRunner().invoke(app, ["retrieve", "--query", "anything", "--features", str(config.out)])
    assert result.exit_code == 0 and "not known" in result.stdout
