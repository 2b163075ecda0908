"""A row knows the video that it was made of: a replaced one is told, never mixed in, and done anew when asked for."""

import json
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import EnvironmentFailedError, StoreDamagedError
from s4v.extract.decode.source import read_source
from s4v.extract.extraction import extract_dataset
from s4v.store import swap
from s4v.store.reader import open_store
from s4v.store.redone import count_redone
from s4v.store.verify import verify_store
from s4v.store.writer import StoreWriter

SOURCE = ["source_bytes", "source_mtime_ns", "source_hash"]


@pytest.fixture(scope="module")
def first(make_video, make_config, tmp_path_factory):
    """18 listed videos in shards of two, 02 and 07 broken, and a copy of all of it beside them."""
    folder = tmp_path_factory.mktemp("sources") / "first"
    names = [f"{number:02d}.mp4" for number in range(18)]
    for number, name in enumerate(names):
        make_video(folder / "videos" / name, seed=number)
    for broken in (names[2], names[7]):
        (folder / "videos" / broken).write_bytes(b"no video" * 50)
    (folder / "list.csv").write_text("".join(f"{name} 0\n" for name in names))
    lists = {"dataset": "lists", "annotations": folder / "list.csv", "frames": {"": 4}}
    config = make_config(folder / "videos", folder / "made.zarr", num_decoders=1, **lists)
    extract_dataset(config)
    shutil.copytree(folder, folder.with_name("kept"))
    return config


@pytest.fixture
def made(first):
    """The same at the same place, which the store knows, with the same sizes and times, whatever a test did there."""
    folder = first.root.parent
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("kept"), folder)
    return first


def read(path, row):
    return open_store(path).read_clips([row], [[0, 1, 2, 3]]).patches


def replace_videos(config, make_video, *rows):
    for row in rows:
        make_video(config.root / f"{row:02d}.mp4", seed=100 + row)


def test_every_row_knows_its_file(made):
    # B1: failed rows too, so that a mended file is another one.
    for row in open_store(made.out).read_manifest(["path", *SOURCE]).to_pylist():
        facts = read_source(made.root / row["path"])
        assert [row[name] for name in SOURCE] == [getattr(facts, name) for name in SOURCE]


@pytest.mark.parametrize(
    "changes", [{}, {"repair": True}, pytest.param({"retry_failed": True}, marks=pytest.mark.slow)]
)
def test_a_replaced_video_is_told_and_its_row_keeps_every_byte(made, make_video, contents, caplog, changes):
    # A2, B1: whatever the command.
    before = contents(made.out)
    replace_videos(made, make_video, 0, 5, 11)
    summary = extract_dataset(replace(made, **changes))
    assert summary.changed == ["00.mp4", "05.mp4", "11.mp4"]
    assert "3 rows were made of other videos than lie there now (00.mp4, 05.mp4, 11.mp4)" in caplog.text
    assert contents(made.out) == before


def test_neighbours_of_a_retried_row_are_not_taken_from_other_videos(made, make_video):
    # B1: rows 2 and 3 share a shard.
    kept = read(made.out, 3)
    replace_videos(made, make_video, 2, 3)
    summary = extract_dataset(replace(made, retry_failed=True))
    assert summary.videos == {"ok": 17, "failed": 1, "pending": 0} and summary.changed == ["03.mp4"]
    assert np.array_equal(read(made.out, 3), kept)
    assert verify_store(open_store(made.out)) == []


def test_a_video_that_was_only_touched_is_the_same_one(made):
    # B1: time alone says nothing, the bytes decide.
    for file in made.root.iterdir():
        os.utime(file, ns=(1, 1))
    assert extract_dataset(made).changed == []
    (made.root / "04.mp4").write_bytes((made.root / "04.mp4").read_bytes()[:-1] + b"x")
    assert extract_dataset(made).changed == ["04.mp4"]


def test_changed_rows_are_done_anew_when_asked_for(made, make_video, make_config, tmp_path, contents):
    replace_videos(made, make_video, 0, 11)
    summary = extract_dataset(replace(made, redo_changed=True))
    assert summary.changed == [] and summary.videos == {"ok": 16, "failed": 2, "pending": 0}
    assert verify_store(open_store(made.out)) == []
    assert count_redone(made.out) == 2
    fresh = replace(made, out=tmp_path / "fresh.zarr")
    extract_dataset(fresh)
    assert contents(made.out, "zarr.json", "redone.json") == contents(fresh.out, "zarr.json", "redone.json")


def test_a_row_whose_new_video_does_not_decode_keeps_what_it_has(made, caplog):
    # B1: redone or not, a good row is never lost.
    kept = read(made.out, 4)
    (made.root / "04.mp4").write_bytes(b"no video any more")
    summary = extract_dataset(replace(made, redo_changed=True))
    assert summary.videos["ok"] == 16 and summary.changed == ["04.mp4"]
    assert np.array_equal(read(made.out, 4), kept)
    assert "04.mp4 stays as it was" in caplog.text


def test_a_row_is_pending_while_its_arrays_are_replaced(made, make_video, monkeypatch):
    # B1, B8: its neighbour is read all the time.
    replace_videos(made, make_video, 4)
    seen = []

    def look(point):
        if point in ("swap pending", "swap moved"):
            store = open_store(made.out)
            statuses = store.read_manifest(["status"])["status"].to_pylist()
            store.read_clips([5], [[0, 1, 2, 3]])
            seen.append((point, statuses[4], statuses[5]))

    monkeypatch.setattr(swap, "kill_point", look)
    extract_dataset(replace(made, redo_changed=True))
    assert seen[0] == ("swap pending", "pending", "ok") and len(seen) > 3
    assert {one[1:] for one in seen} == {("pending", "ok")}
    assert open_store(made.out).read_manifest(["status"])["status"].to_pylist()[4] == "ok"


@pytest.mark.parametrize(
    "point",
    [
        "swap begun",
        "swap moved",
        *(pytest.param(f"swap {at}", marks=pytest.mark.slow) for at in ("prepared", "pending", "done")),
    ],
)
def test_a_redo_that_is_killed_is_completed_by_the_same_command(made, make_video, monkeypatch, point):
    replace_videos(made, make_video, 4)

    class Killed(BaseException):
        pass

    def kill(passed):
        if passed == point:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(swap, "kill_point", kill)
        with pytest.raises(Killed):
            extract_dataset(replace(made, redo_changed=True))
    assert verify_store(open_store(made.out)) == []
    assert extract_dataset(replace(made, redo_changed=True)).changed == []
    assert verify_store(open_store(made.out)) == []


def test_readers_never_see_damage_while_rows_are_retried(made, make_video):
    # B8: both shards with a failed row are replaced while another thread reads them.
    errors, rows = [], [3, 6]
    stop = threading.Event()

    def keep_reading():
        while not stop.is_set():
            try:
                open_store(made.out).read_clips(rows, [[0, 1, 2, 3]] * 2)
            except StoreDamagedError as error:
                errors.append(error)

    thread = threading.Thread(target=keep_reading)
    thread.start()
    try:
        for seed in (50, 60):
            for name in ("02.mp4", "07.mp4"):
                make_video(made.root / name, seed=seed)
            extract_dataset(replace(made, retry_failed=True))
    finally:
        stop.set()
        thread.join()
    assert errors == []


def test_the_commands_line_says_it_and_strict_exits_with_3(made, make_video):
    replace_videos(made, make_video, 5)
    command = ["verify", str(made.out), "--sources", "--json"]
    answer = CliRunner().invoke(app, command)
    facts = json.loads(answer.stdout.splitlines()[-1])["sources"]
    assert answer.exit_code == 0 and facts["changed"] == ["05.mp4"] and facts["same"] == 15
    assert CliRunner().invoke(app, [*command, "--strict"]).exit_code == 3
    text = CliRunner().invoke(app, command[:-1]).stdout
    assert "replaced: 05.mp4" in text and "`s4v extract ... --redo-changed` does replaced rows anew" in text


def test_verify_reads_bytes_and_says_what_is_gone(made):
    # B1: a file that was changed without another size or time.
    file = made.root / "06.mp4"
    data, stat = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (made.root / "08.mp4").unlink()
    assert extract_dataset(made).changed == [], "size and time are as they were"
    answer = CliRunner().invoke(app, ["verify", str(made.out), "--sources", "--json"])
    facts = json.loads(answer.stdout.splitlines()[-1])["sources"]
    assert facts["changed"] == ["06.mp4"] and facts["gone"] == 1


def test_rows_from_before_know_no_source_and_take_what_lies_there_when_told(made):
    rows = [row for row, one in enumerate(open_store(made.out).read_manifest(["status"]).to_pylist())]
    store = open_store(made.out)
    with StoreWriter(store, store.input_columns()) as writer:
        writer.set_sources(dict.fromkeys(rows, (None, None, None)))
        writer.consolidate()
    assert open_store(made.out).read_manifest(SOURCE)["source_hash"].null_count == 18
    assert extract_dataset(made).changed == []
    command = ["verify", str(made.out), "--sources", "--record", "--json"]
    facts = json.loads(CliRunner().invoke(app, command).stdout.splitlines()[-1])["sources"]
    assert facts["recorded"] == 16 and facts["unknown"] == 0
    assert verify_store(open_store(made.out)) == []
    assert open_store(made.out).read_manifest(SOURCE)["source_hash"].null_count == 2
    (made.root / "00.mp4").write_bytes(b"another")
    assert extract_dataset(made).changed == ["00.mp4"]


def test_segments_of_a_file_that_was_replaced_halfway_do_not_agree(make_video, make_config, tmp_path):
    # B1: rows of one file are of one video, or it is said.
    for number in range(9):
        make_video(tmp_path / f"videos/train/a/{number}.mp4", seed=number, num_frames=20)
    config = make_config(tmp_path / "videos", tmp_path / "s.zarr", segment_s=1.0, frames={"": 2}, num_decoders=1)
    extract_dataset(replace(config, limit=1))
    make_video(tmp_path / "videos/train/a/0.mp4", seed=70, num_frames=20)
    summary = extract_dataset(config)
    done = open_store(config.out).layout.rows_per_shard
    assert [name.partition("@")[0] for name in summary.changed] == ["train/a/0.mp4"] * min(done, 2)
    if done == 1:
        answer = CliRunner().invoke(app, ["verify", str(config.out), "--sources", "--json"])
        assert json.loads(answer.stdout.splitlines()[-1])["sources"]["split"] == ["train/a/0.mp4"]


def test_frames_that_were_replaced_are_another_source(make_frames, make_config, tmp_path):
    # B1: a folder of frames, by the bytes of a frame.
    for number in range(3):
        make_frames(tmp_path / f"videos/train/a/{number}")
    config = make_config(tmp_path / "videos", tmp_path / "s.zarr", frames={"": 2}, num_decoders=1)
    extract_dataset(config)
    assert extract_dataset(config).changed == []
    shutil.copy(tmp_path / "videos/train/a/1/00003.jpg", tmp_path / "videos/train/a/1/00002.jpg")
    assert extract_dataset(config).changed == ["train/a/1"]


def vanish(config, *rows):
    """A report that takes files away once they are listed."""

    def report(stage, *_):
        if stage == "building the backbone":
            for row in rows:
                (config.root / f"{row:02d}.mp4").unlink(missing_ok=True)

    return report


def test_a_file_that_vanishes_leaves_its_row_pending(made, make_video, tmp_path):
    # B2: and the rest goes on; the same command does it when the file is back.
    config = replace(made, out=tmp_path / "vanished.zarr")
    summary = extract_dataset(config, vanish(config, 4, 12))
    assert summary.videos == {"ok": 14, "failed": 2, "pending": 2}
    assert {row["reason"] for row in summary.pending} == {"missing-file: it was there when the videos were listed"}
    assert verify_store(open_store(config.out)) == []
    for row in (4, 12):
        make_video(config.root / f"{row:02d}.mp4", seed=row)
    assert extract_dataset(config).videos == {"ok": 16, "failed": 2, "pending": 0}
    assert verify_store(open_store(config.out)) == []


def test_a_file_that_was_never_there_is_a_failed_row(made, tmp_path):
    (made.root / "04.mp4").unlink()
    summary = extract_dataset(replace(made, out=tmp_path / "missing.zarr"))
    assert summary.videos == {"ok": 15, "failed": 3, "pending": 0}


def test_a_brake_stops_a_run_that_loses_everything(made, tmp_path):
    # B2: many in a row are not about the videos.
    config = replace(made, out=tmp_path / "braked.zarr", brake=4)
    with pytest.raises(EnvironmentFailedError, match=r"4 videos in a row are lost .* the last one 13\.mp4"):
        extract_dataset(config, vanish(config, *range(10, 18)))
    few = replace(made, out=tmp_path / "few.zarr", brake=9)
    assert extract_dataset(few, vanish(few, *range(10, 18))).videos["pending"] == 0, "gone before they were listed"
