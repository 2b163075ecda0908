"""`moments.parquet`: beside the captions from the first moment or added later, kept by all that changes a store."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, StoreDamagedError, StoreMismatchError
from s4v.extract.datasets import read_dataset
from s4v.extract.extraction import extract_dataset
from s4v.store.checksums import read_recorded_hashes
from s4v.store.info import describe_store, render_info
from s4v.store.manifest import MOMENTS_NAME, write_table
from s4v.store.merge import merge_stores
from s4v.store.moments import MOMENT_SCHEMA, list_moment_files, moment_table, write_moments
from s4v.store.reader import open_store
from s4v.store.records import Moment, VideoRecord
from s4v.store.verify import verify_store

WINDOWS = {"qid": 1, "query": "a ring moves", "vid": "00", "split": "train", "relevant_windows": [[0, 0.5], [1, 1.2]]}
ROWS = [
    WINDOWS,
    {**WINDOWS, "qid": 2, "query": "a cross", "vid": "01", "relevant_windows": []},
    {**WINDOWS, "qid": "t", "query": "who", "vid": "09", "split": "val", "relevant_windows": None},
    {**WINDOWS, "qid": 3, "query": "it stops", "relevant_clip_ids": [1, 0], "saliency_scores": [[4, 3], [0, 0]]},
]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config_of(make_captioned_config, root, tmp_path, rows=ROWS, **changes):
    table = write_rows(tmp_path / "moments.jsonl", rows)
    return make_captioned_config(root, tmp_path / "m.zarr", annotations=table, frames={"": 2}, **changes)


@pytest.fixture
def config(make_captioned_config, captioned_folder, tmp_path):
    return config_of(make_captioned_config, captioned_folder, tmp_path)


def test_a_store_has_a_row_for_each_caption(config):
    extract_dataset(config)
    store = open_store(config.out)
    moments, captions = store.read_moments(), store.read_captions()
    assert moments.caption_ids == captions["caption_id"].to_pylist() == ["00#0", "00#1", "01#0", "09#0"]
    assert captions["text"].to_pylist() == ["a ring moves", "it stops", "a cross", "who"]
    assert moments.query_ids == ["1", "3", "2", "t"] and moments.splits == ["train", "train", "train", "val"]
    assert moments.has_windows.tolist() == [True, True, True, False]
    assert moments.has_scores.tolist() == [False, True, False, False]
    assert moments[0].windows == ((0.0, 0.5), (1.0, 1.2)) and moments[2].windows == () and moments[3].windows is None
    scored = moments[1]
    assert (scored.clip_s, scored.clip_ids, scored.scores) == (2.0, (1, 0), ((4, 3), (0, 0)))
    assert list(moments) == [moments[place] for place in range(len(moments))]
    table = pq.read_table(config.out / MOMENTS_NAME)
    assert table.schema.equals(MOMENT_SCHEMA)
    assert read_recorded_hashes(config.out).keys() >= {MOMENTS_NAME}
    assert verify_store(store) == []
    facts = describe_store(store)
    assert facts["moments"] == {"windows": 3, "scores": 1}
    assert "moments   3 captions with windows, 1 with scored clips" in render_info(facts)


def test_captions_without_moments_have_rows_too():
    records = [
        VideoRecord(video_id="a", path="a", split="train", captions=("x",), moments=(Moment(query_id="1"),)),
        VideoRecord(video_id="b", path="b", split="val", captions=("y", "z")),
    ]
    table = moment_table(records)
    assert table["query_id"].to_pylist() == ["1", "b#0", "b#1"] and table["split"].to_pylist() == [
        "train",
        "val",
        "val",
    ]
    assert moment_table(records[1:]) is None


def test_a_store_without_moments_says_how_it_gets_them(captioned_store):
    store = open_store(captioned_store)
    with pytest.raises(StoreMismatchError, match=r"it has no moments\.parquet\. .*run the command that began"):
        store.read_moments()
    assert list_moment_files(store) == [] and describe_store(store)["moments"] is None
    assert not any(line.startswith("moments") for line in render_info(describe_store(store)))


def test_a_finished_store_gets_them_from_the_command_that_began_it(config, contents):
    """As one from before there were any; and again where the annotations say more by now."""
    extract_dataset(config)
    (config.out / MOMENTS_NAME).unlink()
    (config.out / "checksums.json").write_text(
        json.dumps({n: v for n, v in read_recorded_hashes(config.out).items() if n != MOMENTS_NAME})
    )
    before = contents(config.out, "stats.json")
    extract_dataset(config)
    after = contents(config.out, "stats.json")
    assert set(after) - set(before) == {MOMENTS_NAME}
    assert {name for name in before if after[name] != before[name]} <= {"checksums.json"}
    assert MOMENTS_NAME in read_recorded_hashes(config.out)
    assert open_store(config.out).read_moments()[3].windows is None
    write_rows(config.annotations, [*ROWS[:2], {**ROWS[2], "relevant_windows": [[0, 1]]}, ROWS[3]])
    extract_dataset(config)
    store = open_store(config.out)
    assert store.read_moments()[3].windows == ((0.0, 1.0),) and verify_store(store) == []
    assert not write_moments(store, config.read_records()), "they are there"


def test_appended_rows_bring_theirs(config):
    extract_dataset(config)
    write_rows(config.annotations, [*ROWS, {**WINDOWS, "qid": 9, "vid": "05"}, {**WINDOWS, "qid": 10, "vid": "02"}])
    extract_dataset(replace(config, append=True))
    store = open_store(config.out)
    assert store.read_moments().query_ids == ["1", "3", "2", "t", "10", "9"]
    assert store.read_captions()["video_id"].to_pylist()[-2:] == ["02", "05"]
    assert verify_store(store) == []


def test_a_store_from_before_is_appended_to(config):
    extract_dataset(config)
    (config.out / MOMENTS_NAME).unlink()
    hashes = {n: v for n, v in read_recorded_hashes(config.out).items() if n != MOMENTS_NAME}
    (config.out / "checksums.json").write_text(json.dumps(hashes))
    write_rows(config.annotations, [*ROWS, {**WINDOWS, "qid": 9, "vid": "05"}])
    extract_dataset(replace(config, append=True))
    assert open_store(config.out).read_moments().query_ids == ["1", "3", "2", "t", "9"]


def test_merged_stores_have_them(config, tmp_path):
    parts = []
    extract_dataset(replace(config, prepare=True))
    for part in (1, 2):
        out = shutil.copytree(config.out, tmp_path / f"part{part}.zarr")
        extract_dataset(replace(config, out=out, part=(part, 2)))
        parts.append(out)
    merge_stores(parts, tmp_path / "whole.zarr")
    whole = open_store(tmp_path / "whole.zarr")
    assert list(whole.read_moments()) == list(open_store(parts[0]).read_moments())
    assert verify_store(whole) == []


def test_damage_is_found_and_repaired(config, flip_byte):
    extract_dataset(config)
    good = (config.out / MOMENTS_NAME).read_bytes()
    for damage in (lambda: flip_byte(config.out / MOMENTS_NAME), (config.out / MOMENTS_NAME).unlink):
        damage()
        store = open_store(config.out)
        assert {one.where for one in verify_store(store)} == {MOMENTS_NAME}
        with pytest.raises(StoreDamagedError, match=r"moments\.parquet .*--repair"):
            store.read_moments()
        extract_dataset(replace(config, repair=True))
        assert (config.out / MOMENTS_NAME).read_bytes() == good
        assert verify_store(open_store(config.out)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns("clip_s"), "has the columns caption_id, query_id, split, .*expected"),
        (lambda t: t.set_column(3, "duration_s", pa.array(["x"] * len(t))), "holds string in its column duration_s"),
        (lambda t: t.set_column(2, "split", pa.nulls(len(t), pa.string())), "lacks entries in its column split"),
        (lambda t: t.set_column(6, MOMENT_SCHEMA.field(6), pa.nulls(len(t), MOMENT_SCHEMA.field(6).type)), "or fewer"),
    ],
)  # fmt: skip
def test_a_table_that_s4v_does_not_write_is_refused(config, change, message):
    extract_dataset(config)
    table = change(pq.read_table(config.out / MOMENTS_NAME))
    (config.out / "checksums.json").unlink()
    write_table(config.out / MOMENTS_NAME, table)
    with pytest.raises(StoreDamagedError, match=message):
        open_store(config.out).read_moments()


def test_moments_of_other_captions_are_void(config):
    """As where a version that does not know them has added rows."""
    extract_dataset(config)
    store = open_store(config.out)
    records = config.read_records()
    write_table(config.out / MOMENTS_NAME, moment_table(records).slice(1))
    hashes = {n: v for n, v in read_recorded_hashes(config.out).items() if n != MOMENTS_NAME}
    (config.out / "checksums.json").write_text(json.dumps(hashes))
    with pytest.raises(StoreMismatchError, match=r"is of other captions than captions\.parquet has: run the command"):
        open_store(config.out).read_moments()
    assert verify_store(open_store(config.out)) == [] and list_moment_files(open_store(config.out)) == []
    assert write_moments(store, records)
    assert open_store(config.out).read_moments().query_ids == ["1", "3", "2", "t"]


def label(config, tmp_path, matches):
    videos = {
        name: {"frames": frames, "fps": 10, "domain": "dog", "match": one} for name, (frames, one) in matches.items()
    }
    file = tmp_path / "youtube_anno.json"
    file.write_text(json.dumps(videos))
    splits = {"dog": {"train": [*matches]}}
    (tmp_path / "youtube_splits.json").write_text(json.dumps(splits))
    return replace(config, dataset="youtube-highlights", annotations=tmp_path, resize=None, frames=None)


def test_a_video_may_have_a_frame_for_each_label(config, tmp_path):
    """12 and 15 frames at 10 a second, as the videos are."""
    config = label(config, tmp_path, {"00": (12, [1, -1, 0]), "03": (15, [1, 0, 0, -1, 1])})
    assert config.recipe.sampling == "fps:labels" and config.is_open_ended
    extract_dataset(config)
    store = open_store(config.out)
    table = store.read_manifest(["num_cached_frames", "duration_s", "frame_indices"]).to_pylist()
    assert [row["num_cached_frames"] for row in table] == [3, 5]
    moments = store.read_moments()
    assert [round(moment.clip_s, 6) for moment in moments] == [0.4, 0.3]
    np.testing.assert_allclose([row["duration_s"] for row in table], [1.2, 1.5])
    assert store.facts.sampling == "fps:labels" and store.facts.recipe == "youtube-highlights"
    extract_dataset(config)


def test_labels_that_are_not_there_are_missed(config):
    with pytest.raises(
        ConfigError, match="--sampling fps:labels takes a frame for each labelled clip of a video, and 01"
    ):
        extract_dataset(replace(config, sampling="fps:labels", frames=None))
    assert not config.out.exists()


def test_a_data_set_of_grounding_takes_what_its_network_needs(tmp_path, captioned_folder):
    """`--dataset` alone: the recipe's rate, and blocks and words as `--for` sets them."""
    root = tmp_path / "set"
    root.mkdir()
    for name in ("00", "01"):
        shutil.copy(captioned_folder / f"{name}.mp4", root)
    line = {"qid": 1, "query": "a ring", "vid": "00", "duration": 1, "relevant_windows": [[0, 1]]}
    write_rows(root / "charades_train.jsonl", [line])

    def plan(*options):
        arguments = ["plan", "--model", "tiny-clip", "--dataset", "charades-sta", "--root", root, *options]
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        return result.exit_code, result.stdout, result.stderr

    code, out, said = plan("--text-layers", "last3")
    assert code == 0 and "for r2-tuning: --layers last4 --no-pixels --text-words 77" in said
    assert "pixels " not in out.split("a frame")[1] and "  text/layers" in out
    assert "1 x 1 frames" in out or "1, 1 cached frames" in out
    assert "for linear: --no-pixels" in plan("--for", "linear")[2]
    assert "fps:1 " not in plan("--for", "linear", "--sampling", "uniform")[2]
    assert [record.captions for record in read_dataset("charades-sta", root)] == [("a ring",)]
