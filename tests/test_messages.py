"""What commands say of rows and files, of what is pending, of stores without a good video, of too long texts."""

import json
import logging
import os
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.backbone.text_tower import TextTower, load_text_tower
from s4v.cli import app
from s4v.errors import NoGoodVideoError, StoreNotFoundError
from s4v.extract.decode.pool import DecodedVideo, DecoderPool
from s4v.extract.extraction import extract_dataset
from s4v.retrieve.search import Searcher, find_newest_store
from s4v.store.reader import open_store

EXTRACT = ["extract", "--model", "tiny-clip", "--weights", "random", "--device", "cpu", "--decoders", "1"]
EXTRACT += ["--frames", "2", "--dtype", "float32"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def as_json(*arguments):
    result = run(*arguments, "--json")
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


# F9: rows and files by their names.


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory, make_video):
    """Two files of 4 and 6 seconds, and one that is none."""
    root = tmp_path_factory.mktemp("long")
    make_video(root / "a.mp4", num_frames=40)
    make_video(root / "b.mp4", num_frames=60)
    (root / "c.mp4").write_bytes(b"not a video" * 30)
    return root


@pytest.fixture(scope="module")
def segmented_store(long_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "segments.zarr"
    made = run(*EXTRACT, "--dataset", "folder", "--root", long_folder, "--segment", "2", "--out", out)
    assert f"{out}: 5 rows of 2 files ok, 1 failed, 0 pending" in made.stdout, made.output  # F9
    return out


@pytest.fixture(scope="module")
def begun_store(long_folder, tmp_path_factory):
    """The same after one row."""
    out = tmp_path_factory.mktemp("stores") / "begun.zarr"
    command = [*EXTRACT, "--dataset", "folder", "--root", long_folder, "--segment", "2", "--out", out, "--limit", "1"]
    assert "1 videos ok, 0 failed, 5 pending" in run(*command).stdout
    return out


def test_info_and_verify_and_merge_name_rows_and_files(segmented_store, tmp_path):
    """F9."""
    info = run("info", segmented_store).stdout
    assert "5 ok, 1 failed, 0 pending rows; files with such rows: 2 ok, 1 failed, 0 pending" in info
    verified = run("verify", segmented_store)
    assert "no damage; 5 rows of 2 files ok, 1 failed, 0 pending" in verified.stdout
    merged = run("merge", segmented_store, "--out", tmp_path / "m.zarr")
    assert "5 rows of 2 files ok, 1 failed, 0 pending" in merged.stdout
    indexed = run("index", "--features", segmented_store, "--out", tmp_path / "index")
    assert "5 rows of 2 files" in indexed.stdout
    for command in (["info", segmented_store], ["verify", segmented_store]):
        assert as_json(*command)["files"] == {"ok": 2, "failed": 1, "pending": 0}


def test_videos_that_are_rows_of_their_own_are_called_videos(float_store):
    """F9."""
    assert "no damage; 10 videos ok, 1 failed, 0 pending" in run("verify", float_store).stdout
    from s4v.store.info import count_rows

    assert count_rows(open_store(float_store)).files == {"ok": 10, "failed": 1, "pending": 0}


def test_a_file_counts_once_for_each_status_of_its_rows(begun_store):
    """F9: its first segment is done, its second is not."""
    from s4v.store.info import count_rows

    counts = count_rows(open_store(begun_store))
    assert counts.rows == {"ok": 1, "failed": 0, "pending": 5}
    assert counts.files == {"ok": 1, "failed": 0, "pending": 3}


def test_search_index_and_verify_say_that_rows_are_pending(begun_store, tmp_path):
    """F9."""
    told = f"{begun_store}: 5 of 6 rows are pending: the same extract command finishes them"
    index = tmp_path / "index"
    for command in (
        ["verify", begun_store],
        ["index", "--features", begun_store, "--out", index],
        ["retrieve", "--features", begun_store, "--query", "anything", "--index", index],
        ["merge", begun_store, "--out", tmp_path / "m.zarr"],
    ):
        result = run(*command)
        assert told.removeprefix(str(begun_store)) in result.stderr, command
        assert [line for line in result.stderr.splitlines() if "pending" in line].__len__() == 1
    found = as_json("retrieve", "--features", begun_store, "--query", "anything", "--index", index)
    assert found["rows"] == {"ok": 1, "failed": 0, "pending": 5}


def test_failed_rows_are_told_and_nothing_that_is_not_so(segmented_store):
    """F9."""
    assert f"1 of 6 rows failed: see s4v info {segmented_store}" in run("verify", segmented_store).stderr
    assert "pending" not in run("verify", segmented_store).stderr


@pytest.mark.parametrize("reason", ["io-error: Input/output error", "out-of-memory: 5.0 GB", "gone: it was listed"])
def test_rows_that_the_machine_left_pending_are_listed_apart(video_folder, tmp_path, monkeypatch, reason):
    """F9, B3: with their reasons; the command ends with 5 and does them the next time."""
    decode = DecoderPool._decode

    def fail_one(self, request):
        if request.path.endswith("run/2.mp4"):
            return DecodedVideo(None, {"reason": reason}, is_pending=True)
        return decode(self, request)

    command = [*EXTRACT, "--dataset", "folder", "--root", video_folder, "--out", tmp_path / "s.zarr"]
    with monkeypatch.context() as patched:
        patched.setattr(DecoderPool, "_decode", fail_one)
        made = run(*command)
        assert made.exit_code == 5, made.output
        lines = made.stdout.splitlines()
        assert lines[0].endswith("9 videos ok, 1 failed, 1 pending")
        place = lines.index("pending, for the machine failed and not the video:")
        assert lines[1].startswith("  train/walk/broken.mp4: ") and place == 2
        assert lines[3] == f"  train/run/2.mp4: {reason}"
        assert "1 rows are pending with a reason: the same command tries them again" in made.stderr
    info = run("info", tmp_path / "s.zarr").stdout
    code = reason.partition(":")[0]
    assert re.search(rf"^pending +1 {code}$", info, re.MULTILINE)
    assert as_json("info", tmp_path / "s.zarr")["pending_reasons"] == {code: 1}


# F6: not one good video.


@pytest.fixture
def bad_store(tmp_path, make_config):
    """A store whose only video is none, newer than all others."""
    (tmp_path / "bad/train/a").mkdir(parents=True)
    for name in ("x", "y"):
        (tmp_path / f"bad/train/a/{name}.mp4").write_text("no")
    out = tmp_path / "store/bad.zarr"
    with pytest.raises(NoGoodVideoError) as error:
        extract_dataset(make_config(tmp_path / "bad", out))
    assert str(out) in str(error.value) and "--retry-failed" in str(error.value)  # F6
    return out


def test_the_newest_store_is_one_with_a_good_video(bad_store, float_store, tmp_path, monkeypatch):
    """F6."""
    good = bad_store.with_name("good.zarr")
    good.symlink_to(float_store)
    os.utime(bad_store / "videos.parquet", (2e9, 2e9))
    assert find_newest_store(tmp_path / "store") == good
    monkeypatch.chdir(tmp_path)
    found = run("retrieve", "--query", "anything", "--index", tmp_path / "index")
    assert found.exit_code == 0 and "store/good.zarr, the frozen backbone alone" in found.stderr


def test_stores_without_a_good_video_are_named(bad_store, tmp_path, video_folder, make_config):
    """F6: one that failed, and one that has only been prepared."""
    extract_dataset(make_config(video_folder, tmp_path / "store/prepared.zarr", prepare=True))
    with pytest.raises(StoreNotFoundError, match=r"no store with a good video \(prepared.zarr, bad.zarr: none has one"):
        find_newest_store(tmp_path / "store")


def test_a_store_that_cannot_be_read_is_not_passed_over(float_store, tmp_path):
    """F6: whoever opens it is told what is wrong with it."""
    (tmp_path / "store/broken.zarr").mkdir(parents=True)
    (tmp_path / "store/broken.zarr/videos.parquet").write_text("nonsense")
    assert find_newest_store(tmp_path / "store").name == "broken.zarr"


# A11: texts longer than the tower's context.

LONG = "a ring moves left " * 25


@pytest.fixture(scope="module")
def tower():
    import torch

    return load_text_tower("tiny-clip", weights="random", device=torch.device("cpu"))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_query_that_is_too_long_says_what_is_left_out(tower, caplog):
    """A11."""
    num_read = tower.context_length - 2
    words = [f"dog{'' if place % 2 else ' cat'}" for place in range(100)]
    text = " ".join(words)
    tower.encode([text])
    told = warnings_of(caplog)
    left_out = " ".join(text.split()[num_read:])
    assert len(told) == 1 and left_out[:100] in told[0] and f"reads {num_read} words" in told[0]
    assert tower.find_cut([text]) == {text: left_out}


@pytest.mark.parametrize("excess", [0, 1, 2])
def test_the_last_word_that_fits_is_not_told(tower, caplog, excess):
    """A11: the limit itself."""
    text = " ".join(["dog"] * (tower.context_length - 2 + excess))
    tower.encode([text])
    assert len(warnings_of(caplog)) == (excess > 0)
    assert tower.find_cut([text]) == ({text: " ".join(["dog"] * excess)} if excess else {})


def test_words_of_a_run_are_fewer_and_told_too(tower, caplog):
    """A11: encode_words."""
    tower.encode_words(["dog " * 40], 20)
    assert len(warnings_of(caplog)) == 1 and "reads 18 words" in warnings_of(caplog)[0]
    caplog.clear()
    tower.encode_words(["dog " * 40], 20, is_cut_known=True)
    assert warnings_of(caplog) == []


def test_letters_of_other_scripts_count_as_what_they_are_read_as(tower):
    """A11: three bytes a letter, so that a short sentence is long."""
    text = "猫が好きです" * 20
    assert 0 < len(tower.find_cut([text])[text]) < len(text)


def test_many_long_texts_are_three_lines_and_a_number(tower, caplog):
    """A11."""
    tower.encode([f"{place} {LONG}" for place in range(9)])
    told = warnings_of(caplog)
    assert len(told) == 4 and "6 more texts" in told[-1]


def test_two_queries_that_differ_beyond_the_context_are_told(captioned_store, caplog, tmp_path):
    """A11: equal scores for different queries."""
    with Searcher(captioned_store, index=tmp_path / "index") as searcher:
        first, second = (searcher.find_text(LONG + end) for end in ("and then stops", "and comes back"))
        assert [a.score for a in first] == [a.score for a in second]
        assert set(searcher.left_out) == {LONG + "and then stops", LONG + "and comes back"}
        told = warnings_of(caplog)
        assert [line for line in told if "both have the same answers" in line].__len__() == 1
        caplog.clear()
        searcher.find_text("A ring")
        searcher.find_text("a  ring")
    assert not [line for line in warnings_of(caplog) if "same answers" in line], "the same but for case and spaces"


def test_queries_in_a_file_and_their_page_and_json_say_what_is_left_out(captioned_store, tmp_path, caplog):
    """A11."""
    (tmp_path / "queries.txt").write_text(f"a short one\n{LONG}to the very end\n")
    command = ["retrieve", "--features", captioned_store, "--queries", tmp_path / "queries.txt"]
    command += ["--index", tmp_path / "index", "--html", tmp_path / "p.html"]
    found = as_json(*command)
    (left_out,) = found["left_out"].values()
    assert left_out.endswith("to the very end") and list(found["left_out"]) == [f"{LONG}to the very end"]
    assert f"Not read, for it is too long: {left_out}" in (tmp_path / "p.html").read_text()
    assert [line for line in warnings_of(caplog) if "leaves out" in line]


@pytest.mark.parametrize("num_long", [0, 1, 3])
def test_an_extraction_says_once_how_many_captions_are_cut(make_video, make_config, tmp_path, caplog, num_long):
    """A11."""
    lines = ["path,split,caption"]
    for number in range(4):
        make_video(tmp_path / f"v/{number}.mp4", num_frames=4)
        lines.append(f"{number}.mp4,train,a short caption")
        if number < num_long:
            lines.append(f"{number}.mp4,train,{number} {'dog ' * 40}and the end")
    (tmp_path / "v/t.csv").write_text("\n".join(lines) + "\n")
    table = {"dataset": "table", "annotations": tmp_path / "v/t.csv", "frames": {"": 1}, "resize": "224"}
    extract_dataset(make_config(tmp_path / "v", tmp_path / "s.zarr", num_decoders=1, **table))
    told = [line for line in warnings_of(caplog) if "caption" in line]
    if not num_long:
        assert told == []
        return
    assert len(told) == 1
    assert f"{num_long} of {4 + num_long} captions are longer than the 26 words" in told[0]  # the tower reads 28
    assert "'0 dog dog" in told[0] and "and the end' is left out" in told[0]


def test_what_is_read_is_what_it_was(tower):
    """A11: the warning changes no number."""
    long = tower.encode(["dog " * 200])
    assert np.array_equal(long, tower.encode(["dog " * (tower.context_length - 2)]))
    assert isinstance(tower, TextTower)
