"""Stores and runs that afc95f4 wrote: they open, read, verify, go on and train (tests/data/afc95f4/README.md).

Rows that are there stay to the bit. What is made here may differ in the last bit from what that processor made:
codes of new rows are held against those of afc95f4 with a tolerance of one step.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import RunExistsError, StoreBusyError
from s4v.extract.extraction import extract_dataset
from s4v.files import hash_file
from s4v.retrieve.search import search_store
from s4v.store.info import describe_store
from s4v.store.reader import open_store
from s4v.store.texts import TextReader, has_current_texts
from s4v.store.verify import verify_store
from s4v.train.config import TrainConfig
from s4v.train.evaluate import evaluate_run
from s4v.train.loop import train_run
from s4v.train.run_folder import open_run, read_metrics

OLD = Path(__file__).parent / "data" / "afc95f4"
STORES = {
    "finished": {"ok": 6, "failed": 0, "pending": 0},
    "half-done": {"ok": 3, "failed": 0, "pending": 3},
    "appended": {"ok": 8, "failed": 1, "pending": 0},
    "captioned": {"ok": 5, "failed": 0, "pending": 0},
    "segmented": {"ok": 3, "failed": 0, "pending": 0},
}
SOURCE_COLUMNS = ("source_bytes", "source_mtime_ns", "source_hash")
READS = json.loads((OLD / "reads.json").read_text())


def old_store(name):
    return OLD / "stores" / f"{name}.zarr"


def describe_rows(path):
    """What a store says of each of its rows, by video id."""
    store = open_store(path)
    arrays = ("patches", "cls", *(("pixels",) if store.layout.with_pixels else ()))
    rows = {}
    for row, facts in enumerate(store.read_manifest(["video_id", "status"]).to_pylist()):
        rows[facts["video_id"]] = told = {"status": facts["status"]}
        if facts["status"] == "ok":
            clips = store.read_clips([row], [[0, 1]], arrays=arrays)
            values = {
                **{name: getattr(clips, name) for name in arrays},
                "embedding": store.read_embeddings(range(row, row + 1)),
            }
            told["sha256"] = {name: hashlib.sha256(value.tobytes()).hexdigest()[:16] for name, value in values.items()}
            decoded = np.abs(store.decode_patches(clips.patches).astype(np.float64)).mean(axis=(0, 1, 3, 4))
            told["mean_abs"] = [float(f"{value:.6g}") for value in decoded]
    return rows


def read_codes(path):
    """Video id -> (T, L, N, K) codes of its good rows."""
    store = open_store(path)
    table = store.read_manifest(["video_id", "status"]).to_pylist()
    good = [row for row, facts in enumerate(table) if facts["status"] == "ok"]
    codes = store.read_clips(good, [[0, 1]] * len(good), arrays=("patches",)).patches
    return {table[row]["video_id"]: code.astype(int) for row, code in zip(good, codes, strict=True)}


def assert_close_codes(found, expected):
    assert found.keys() == expected.keys()
    for video_id, codes in expected.items():
        assert np.abs(found[video_id] - codes).max() <= 1, video_id


def read_shards(path):
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in path.glob("*/c.*")}


@pytest.fixture
def take_over(float_store, tmp_path):
    """Copy a store of afc95f4, as if the libraries installed here had written it: a resume asks for the same ones."""
    here = open_store(float_store).attributes

    def copy(name):
        path = shutil.copytree(old_store(name), tmp_path / f"{name}.zarr")
        for file in (path / "zarr.json", path / "_append" / "zarr.json"):
            if file.exists():
                metadata = json.loads(file.read_text())
                attributes = metadata["attributes"]["s4v"]
                if attributes["backbone"]["weights_sha256"] != here["backbone"]["weights_sha256"]:
                    pytest.skip("the seed of random weights gives other ones in this version of torch")
                attributes["libraries"] = here["libraries"]
                file.write_text(json.dumps(metadata, indent=2))
        hashes = json.loads((path / "checksums.json").read_text())
        hashes["zarr.json"] = hash_file(path / "zarr.json")
        (path / "checksums.json").write_text(json.dumps(hashes))
        return path

    return copy


@pytest.fixture
def videos(tmp_path):
    """A root with the videos of some folders of tests/data/afc95f4."""

    def copy(*folders):
        for folder in folders:
            shutil.copytree(OLD / folder, tmp_path / "root", dirs_exist_ok=True)
        return tmp_path / "root"

    return copy


@pytest.fixture
def config_of(make_config):
    """What the stores were extracted with, but for the `changes` of one."""

    def make(root, out, **changes):
        values = dict(layers="2,5", channels=8, frames={"": 2}, dtype="int8", num_decoders=1, with_pixels=False)
        return make_config(root, out, **{**values, **changes})

    return make


@pytest.mark.parametrize("name", STORES)
def test_what_was_written_is_read_the_same(name):
    found, expected = describe_rows(old_store(name)), READS[f"{name}.zarr"]
    assert list(found) == list(expected)
    for video_id, told in expected.items():
        assert found[video_id].pop("mean_abs", []) == pytest.approx(told.pop("mean_abs", []), rel=1e-4), video_id
        assert found[video_id] == told, video_id


@pytest.mark.parametrize("name", STORES)
def test_nothing_of_it_is_damage(name):
    assert verify_store(open_store(old_store(name))) == []
    verified = CliRunner().invoke(app, ["verify", str(old_store(name))], catch_exceptions=False)
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("name", STORES)
def test_info_says_what_it_holds(name):
    counts = STORES[name]
    told = CliRunner().invoke(app, ["info", str(old_store(name))], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    assert f"{counts['ok']} ok, {counts['failed']} failed, {counts['pending']} pending" in told.stdout
    assert describe_store(open_store(old_store(name)))["libraries"]["torch"]


@pytest.mark.parametrize("name", STORES)
def test_its_rows_say_that_they_know_no_source(name):
    store = open_store(old_store(name))
    whole, asked = store.read_manifest(), store.read_manifest(["video_id", *SOURCE_COLUMNS])
    assert whole["status"].value_counts().to_pylist(), "there are rows"
    for table in (whole, asked):
        assert [table[column].null_count for column in SOURCE_COLUMNS] == [len(table)] * 3


def test_a_half_done_store_goes_on(take_over, videos, config_of):
    path = take_over("half-done")
    before, old_ids = read_shards(path), list(read_codes(path))
    config = config_of(videos("videos"), path)
    assert extract_dataset(config).videos == {"ok": 6, "failed": 0, "pending": 0}
    after = read_shards(path)
    assert {name: after[name] for name in before} == before, "what was done stays"
    assert_close_codes(read_codes(path), read_codes(old_store("finished")))
    assert verify_store(open_store(path)) == []
    table = open_store(path).read_manifest()
    assert table.filter(np.isin(table["video_id"].to_pylist(), old_ids))["source_hash"].null_count == len(old_ids)
    mtimes = {file: file.stat().st_mtime_ns for file in path.rglob("c.*")}
    extract_dataset(config)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("c.*")} == mtimes, "and is finished then"


def test_a_killed_append_is_completed(take_over, videos, config_of):
    path = take_over("killed-append")
    with pytest.raises(StoreBusyError, match="rows are being added"):
        open_store(path)
    before = read_shards(path)
    config = config_of(videos("videos", "broken", "more"), path, append=True)
    assert extract_dataset(config).videos == STORES["appended"]
    after = read_shards(path)
    assert {name: after[name] for name in before} == before
    ids = [open_store(one).read_manifest(["video_id"])["video_id"].to_pylist() for one in (path, old_store("appended"))]
    assert ids[0] == ids[1], "new rows come last"
    assert open_store(path).classes.names == ("run", "swim", "walk")
    assert_close_codes(read_codes(path), read_codes(old_store("appended")))
    assert verify_store(open_store(path)) == []


def test_failed_rows_are_retried(take_over, videos, config_of):
    path, root = take_over("appended"), videos("videos", "broken", "more")
    shutil.copy(root / "train/run/0.mp4", root / "train/walk/broken.mp4")
    before = read_shards(path)
    config = config_of(root, path)
    assert extract_dataset(config).videos == STORES["appended"], "a failed row is final until someone asks"
    assert extract_dataset(replace(config, retry_failed=True)).videos == {"ok": 9, "failed": 0, "pending": 0}
    after = read_shards(path)
    assert {name: after[name] for name in before} == before
    codes = read_codes(path)
    assert np.abs(codes["train/walk/broken.mp4"] - codes["train/run/0.mp4"]).max() <= 1
    assert verify_store(open_store(path)) == []


def test_rows_are_added_to_a_store_that_was_added_to(take_over, videos, config_of):
    path, root = take_over("appended"), videos("videos", "broken", "more")
    (root / "train/aaa").mkdir()
    shutil.copy(OLD / "long/long.mp4", root / "train/aaa/0.mp4")
    before = read_shards(path)
    assert extract_dataset(config_of(root, path, append=True)).videos == {"ok": 9, "failed": 1, "pending": 0}
    after = read_shards(path)
    assert {name: after[name] for name in before} == before
    assert open_store(path).read_manifest(["video_id"])["video_id"].to_pylist()[-1] == "train/aaa/0.mp4"
    assert verify_store(open_store(path)) == []


def test_a_damaged_shard_is_repaired(take_over, videos, config_of, flip_byte):
    path = take_over("finished")
    flip_byte(path / "patches/c.2.0.0.0.0.0")
    (damage,) = verify_store(open_store(path))
    assert (damage.where, damage.shard) == ("patches/c.2.0.0.0.0.0", 2)
    extract_dataset(config_of(videos("videos"), path, with_pixels=True, repair=True))
    assert verify_store(open_store(path)) == []
    assert_close_codes(read_codes(path), read_codes(old_store("finished")))


@pytest.mark.parametrize(
    ("name", "folder", "changes"),
    [
        ("finished", "videos", dict(with_pixels=True)),
        ("captioned", "videos", dict(dataset="table", annotations=OLD / "videos.csv")),
        ("segmented", "long", dict(segment_s=1.0)),
    ],
)
def test_the_command_that_made_a_finished_store_changes_nothing(
    name, folder, changes, take_over, videos, config_of, contents
):
    path = take_over(name)
    before = contents(path)
    assert extract_dataset(config_of(videos(folder), path, **changes)).videos == STORES[name]
    assert contents(path) == before
    assert verify_store(open_store(path)) == []


def test_captions_have_their_texts():
    store = open_store(old_store("captioned"))
    texts = TextReader(store).read(range(7))
    assert has_current_texts(store.path)
    assert texts.tokens.shape[0] == len(store.read_captions()) == 7
    assert np.isfinite(texts.embedding).all() and texts.mask.any(axis=1).all()


def test_its_videos_are_found(tmp_path):
    path = shutil.copytree(old_store("captioned"), tmp_path / "captioned.zarr")
    answers = search_store(path, "a square that falls", top=9)
    assert {answer.video_id for answer in answers} == set(READS["captioned.zarr"])


@pytest.mark.parametrize("name", ["side4video", "linear"])
def test_a_run_evaluates_as_it_did(name, tmp_path):
    """On the store that it was trained on, which lies elsewhere now."""
    run = shutil.copytree(OLD / "runs" / name, tmp_path / name)
    best = json.loads((run / "best.json").read_text())
    assert evaluate_run(run, features=old_store("finished"))["top1"] == best["val_top1"]
    command = ["eval", "--run", str(run), "--features", str(old_store("finished")), "--device", "cpu", "--json"]
    told = CliRunner().invoke(app, command, catch_exceptions=False)
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout.strip().splitlines()[-1])["videos"] == 2


def test_a_killed_training_goes_on(tmp_path):
    run = shutil.copytree(OLD / "runs/linear", tmp_path / "linear")
    (before,) = read_metrics(open_run(run))
    config = TrainConfig(
        features=old_store("finished"), out=run, head="linear", layers=(5,), epochs=2, warmup_epochs=1.0, batch_size=2,
        device="cpu", resume=True,
    )  # fmt: skip
    with pytest.raises(RunExistsError, match="epochs 2 there, 3 here"):
        train_run(replace(config, epochs=3))
    summary = train_run(config)
    assert (summary["epochs"], summary["steps"]) == (2, 4)
    assert read_metrics(open_run(run))[0] == before


def test_a_run_is_what_another_begins_with(tmp_path):
    config = TrainConfig(
        features=old_store("finished"), out=tmp_path / "on", init=OLD / "runs/side4video", inputs="tokens", layers=(5,),
        side_width=64, epochs=1, batch_size=2, device="cpu",
    )  # fmt: skip
    assert train_run(config)["epochs"] == 1
