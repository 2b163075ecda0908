import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, StoreNotFoundError
from s4v.extract.pipeline import extract_dataset
from s4v.extract.text_tower import load_text_tower
from s4v.retrieve.search import Searcher, find_newest_store, search_store
from s4v.retrieve.vectors import find_moment, normalise_rows, pool_frames
from s4v.store.reader import open_store


def test_vectors_are_pooled_by_hand():
    frames = np.full((2, 1, 3, 2), np.nan, np.float32)
    frames[0, 0, :2] = normalise_rows(np.array([[2.0, 0], [0, 5]]))  # two frames, at right angles
    frames[1, 0, :3] = [[0, -1], [0, 1], [0, 1]]
    np.testing.assert_allclose(pool_frames(frames), [[0.5**0.5, 0.5**0.5], [0, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.5, 0.4, 0.1], (1, 1.0, 5.0)),
        ([0.5, 0.1, 0.1, 0.1], (0, 0.0, 1.0)),
        ([0.1, 0.1, 0.1, 0.5], (3, 5.0, 6.0)),
        ([0.3, 0.3, 0.3, 0.3], (0, 0.0, 6.0)),
        ([0.5, 0.1, 0.5, 0.1], (0, 0.0, 1.0)),
    ],
)
def test_a_moment_is_the_frames_around_the_best_one(scores, expected):
    assert find_moment(np.array(scores), np.array([0.0, 2.0, 4.0, 6.0])) == expected
    assert find_moment(np.array(scores), np.full(4, np.nan)) == (expected[0], None, None)


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


def test_videos_like_a_video_and_only_those_asked_for(int8_store):
    with Searcher(int8_store, where="split = 'train' and class_name = 'run'") as searcher:
        answers = searcher.find_like("train/run/0.mp4", top=10)
        assert [a.rank for a in answers] == [1, 2, 3]
        assert all(a.video_id.startswith("train/run/") and a.video_id != "train/run/0.mp4" for a in answers)
        assert len(searcher.find_text("anything", top=2)) == 2
        with pytest.raises(ConfigError, match="has no good video 'train/walk/broken.mp4'"):
            searcher.find_like("train/walk/broken.mp4")
    with Searcher(int8_store, where="split = 'none'") as searcher:
        assert searcher.find_text("anything") == []
    with pytest.raises(ConfigError, match="--where names colour; the columns are video_id"):
        Searcher(int8_store, where="colour = 'red'")


def test_the_command_takes_many_queries_and_makes_a_page(int8_store, tmp_path):
    (tmp_path / "queries.txt").write_text("a column\n\nein Mann läuft\na column\n", encoding="utf-8")
    arguments = ["retrieve", "--features", str(int8_store), "--queries", str(tmp_path / "queries.txt")]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, [*arguments, "--html", str(page), "--json"], catch_exceptions=False)
    told = json.loads(result.stdout.splitlines()[-1])
    assert [one["query"] for one in told["queries"]] == ["a column", "ein Mann läuft"]
    assert all(len(one["answers"]) == 10 for one in told["queries"])
    assert page.read_text().count("data:image/png;base64") == 20 and "://" not in page.read_text()
    (tmp_path / "empty.txt").write_text("\n")
    for wrong, message in (
        (["--query", "x", "--like", "y"], "wants one of --query TEXT, --queries FILE and --like VIDEO"),
        (["--queries", str(tmp_path / "empty.txt")], "holds no query: expected one a line"),
        (["--queries", str(tmp_path / "none.txt")], "No such file"),
    ):
        result = CliRunner().invoke(app, ["retrieve", "--features", str(int8_store), *wrong])
        assert result.exit_code == 1 and message in result.stderr
