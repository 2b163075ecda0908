import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from s4v.backbone.text_tower import load_text_tower
from s4v.cli import app
from s4v.errors import ConfigError, StoreNotFoundError, WeightsError
from s4v.extract.extraction import extract_dataset
from s4v.retrieve import search
from s4v.retrieve.search import Searcher, find_newest_store, search_store
from s4v.store.reader import open_store
from s4v.vectors import find_moment, normalise_rows, pool_frames, score_rows


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


@given(score=st.floats(-1, 1, width=32), count=st.integers(1, 40))
def test_frames_that_score_the_same_are_all_of_the_moment(score, count):
    """In float32 the mean of equal numbers can be above them all."""
    times = np.arange(count, dtype=float)
    assert find_moment(np.full(count, score, np.float32), times) == (0, 0.0, count - 1.0)


@given(seed=st.integers(0, 10**6), count=st.integers(2, 40))
def test_the_moment_of_a_still_video_is_all_of_it(seed, count):
    rng = np.random.default_rng(seed)
    frame, query = (normalise_rows(rng.normal(size=64).astype(np.float32)) for _ in range(2))
    scores = score_rows(np.tile(frame, (count, 1)), query)
    assert find_moment(scores, np.arange(count, dtype=float)) == (0, 0.0, count - 1.0)


def test_a_single_frame_stands_for_the_whole_row():
    assert find_moment(np.array([0.3]), np.array([2.5]), (2.0, 4.0)) == (0, 2.0, 4.0)
    assert find_moment(np.array([0.3]), np.array([2.5])) == (0, 2.5, 2.5)
    assert find_moment(np.array([0.3]), np.array([np.nan]), (2.0, 4.0)) == (0, None, None)
    assert find_moment(np.array([0.3, 0.3]), np.array([2.5, 3.0]), (2.0, 4.0)) == (0, 2.5, 3.0)


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


def test_what_is_wrong_with_a_question_is_told_before_an_index_is_built(int8_store, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "open_index", lambda *_, **__: pytest.fail("opened"))
    for where in ("colour = 'red'", "split = ", "width = 'wide'", "split = ('val', 'train')"):
        with pytest.raises(ConfigError, match="--where"):
            Searcher(int8_store, where=where)
    searcher = Searcher(int8_store, index=tmp_path / "none.index")
    with pytest.raises(ConfigError, match="--query is empty"):
        searcher.find_text(" ")
    with pytest.raises(ConfigError, match="--top must be at least 1"):
        searcher.find_text("x", top=0)
    with pytest.raises(ConfigError, match="--top must be at least 1"):
        searcher.find_like("train/run/0.mp4", top=0)
    for video_id in ("train/walk/broken.mp4", "train/run/none.mp4"):
        with pytest.raises(ConfigError, match=f"--like: .* has no good video '{video_id}'"):
            searcher.find_like(video_id)
    with pytest.raises(WeightsError):
        Searcher(int8_store, weights=str(tmp_path / "none.pt")).find_text("x")


def test_an_index_is_built_with_a_report_and_once(int8_store, tmp_path):
    told = []
    with Searcher(int8_store, index=tmp_path / "i", report=lambda *one: told.append(one)) as searcher:
        assert told == []
        searcher.find_text("anything")
        searcher.find_like("train/run/0.mp4")
    assert told[-1] == ("indexing", 10, 10) and len({done for _, done, _ in told}) == len(told)
    with Searcher(int8_store, index=tmp_path / "i", report=lambda *_: pytest.fail("built again")) as searcher:
        searcher.find_text("anything")


def test_the_manifest_is_read_once_however_much_is_asked(int8_store, monkeypatch):
    with Searcher(int8_store, where="split = 'train'") as searcher:
        first = searcher.find_text("anything")
        monkeypatch.setattr(type(searcher.store), "read_manifest", lambda *_: pytest.fail("read again"))
        assert searcher.find_text("anything") == first
        assert searcher.find_like("train/run/0.mp4", top=3)[0].video_id != "train/run/0.mp4"


def test_a_frame_alone_has_the_rows_span(tmp_path, make_video, make_config):
    make_video(tmp_path / "videos/a.mp4", num_frames=30)  # 3 s
    config = make_config(tmp_path / "videos", tmp_path / "one.zarr", frames={"": 1})
    extract_dataset(config)
    (answer,) = search_store(config.out, "anything")
    assert (answer.start_s, answer.end_s) == (0.0, pytest.approx(3.0))
    config = make_config(tmp_path / "videos", tmp_path / "two.zarr", frames={"": 1}, segment_s=1.0)
    extract_dataset(config)
    answers = search_store(config.out, "anything")
    spans = sorted((a.start_s, a.end_s) for a in answers)
    assert spans == [(0.0, 1.0), (1.0, 2.0), (2.0, pytest.approx(3.0))]
    assert all(a.start_s <= a.time_s < a.end_s for a in answers)


def test_moments_of_segments_are_in_the_files_time(tmp_path, make_video, make_config):
    make_video(tmp_path / "videos/talk.mp4", num_frames=60, seed=1)  # 6 s
    config = make_config(tmp_path / "videos", tmp_path / "s.zarr", frames={"": 4}, segment_s=2.0)
    extract_dataset(config)
    stamps = {
        row["video_id"]: row["timestamps_s"]
        for row in open_store(config.out).read_manifest(["video_id", "timestamps_s"]).to_pylist()
    }
    answers = {a.video_id: a for a in search_store(config.out, "a bright column")}
    assert sorted(answers) == ["talk.mp4@00:00:00", "talk.mp4@00:00:02", "talk.mp4@00:00:04"]
    for start, (video_id, answer) in zip((0, 2, 4), sorted(answers.items()), strict=True):
        assert start <= answer.start_s <= answer.time_s <= answer.end_s < start + 2
        assert answer.time_s in stamps[video_id] and answer.path == "talk.mp4"


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


def test_the_command_says_which_device_and_checkpoint(int8_store):
    command = ["retrieve", "--features", str(int8_store), "--query", "x"]
    for wrong, message in (
        (["--device", "nonsense"], "--device nonsense is not available here"),
        (["--checkpoint", "last"], "--checkpoint has no effect without a run"),
    ):
        result = CliRunner().invoke(app, [*command, *wrong])
        assert result.exit_code == 1 and message in result.stderr
    assert CliRunner().invoke(app, [*command, "--device", "cpu"]).exit_code == 0


def test_bytes_that_are_no_text_are_a_query_all_the_same(int8_store, tmp_path):
    """A terminal that speaks Latin-1; a file of queries from Windows."""
    page, latin = tmp_path / "page.html", os.fsdecode("caf\xe9".encode("latin-1"))
    command = ["retrieve", "--features", str(int8_store), "--top", "1"]
    result = CliRunner().invoke(app, [*command, "--query", latin, "--html", str(page)], catch_exceptions=False)
    assert result.exit_code == 0 and "caf?" in page.read_text(encoding="utf-8")
    result = CliRunner().invoke(app, [*command, "--like", latin])
    assert result.exit_code == 1 and "no good video 'caf?'" in result.stderr
    (tmp_path / "queries.txt").write_text("a column\n", encoding="utf-8-sig")
    result = CliRunner().invoke(app, [*command, "--queries", str(tmp_path / "queries.txt"), "--json"])
    assert [one["query"] for one in json.loads(result.stdout)["queries"]] == ["a column"]


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
