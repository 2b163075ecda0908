import json
import re
from collections import Counter

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from s4v.errors import ConfigError, DataNotFoundError, DatasetError
from s4v.extract.datasets import default_paths, read_dataset


@pytest.fixture
def root(tmp_path):
    def touch(*paths):
        for path in paths:
            file = tmp_path / "data" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return tmp_path / "data"

    return touch


def test_splits_stand_above_classes(root):
    records = read_dataset("folder", root("train/run/a.mp4", "train/jump/b.MKV", "val/run/c.webm", "val/run/notes.txt"))
    assert [(r.video_id, r.split, r.class_name) for r in records] == [
        ("train/jump/b.MKV", "train", "jump"),
        ("train/run/a.mp4", "train", "run"),
        ("val/run/c.webm", "val", "run"),
    ]


def test_without_split_folders_a_seeded_fifth_is_validation(root):
    folder = root(*[f"{name}/{i}.mp4" for name in ("run", "jump") for i in range(200)])
    records = read_dataset("folder", folder)
    assert Counter((r.class_name, r.split) for r in records if r.split == "val") == {
        ("jump", "val"): 40,
        ("run", "val"): 40,
    }
    assert records == read_dataset("folder", folder)
    assert records != read_dataset("folder", folder, seed=1)
    split_of = {r.video_id: r.split for r in records}
    (folder / "run" / "0.mp4").unlink()
    others = [r for r in read_dataset("folder", folder) if r.class_name == "jump"]
    assert all(split_of[r.video_id] == r.split for r in others), "other classes do not matter"


def test_a_class_called_test_beside_others_is_a_class(root):
    records = read_dataset("folder", root("test/a.mp4", "run/b.mp4"))
    assert {r.class_name for r in records} == {"test", "run"}


def test_rows_are_sorted_by_the_bytes_of_their_id(root):
    records = read_dataset("folder", root("b/é.mp4", "b/z.mp4", "B/a.mp4", "b/a b.mp4", "b/-x.mp4", "b/_y.mp4"))
    ids = [r.video_id for r in records]
    assert ids == sorted(ids, key=str.encode)
    assert ids[0] == "B/a.mp4"


def test_missing_empty_and_classless_folders_are_refused(root, tmp_path):
    with pytest.raises(DataNotFoundError, match=r"nowhere: no such folder\. Put them there as"):
        read_dataset("folder", tmp_path / "nowhere")
    empty = root("notes.txt")
    with pytest.raises(DatasetError, match="holds no video: expected"):
        read_dataset("folder", empty)
    mixed = root("train/a.mp4", "train/run/b.mp4", "val/run/c.mp4")
    with pytest.raises(DatasetError, match=r"1 videos below .* lie in no class folder: train/a\.mp4.*--no-classes"):
        read_dataset("folder", mixed)


def test_videos_alone_are_an_archive_without_classes(root):
    records = read_dataset("folder", root("a.mp4", "b.mp4"))
    assert [(r.video_id, r.class_name) for r in records] == [("a.mp4", None), ("b.mp4", None)]


def test_unknown_data_set_names_the_closest():
    with pytest.raises(ConfigError, match="unknown data set 'k40'. Closest: k400"):
        read_dataset("k40", None)


def test_unknown_split_is_refused(root):
    with pytest.raises(DatasetError, match="has the splits train, val; wanted dev too"):
        read_dataset("folder", root("train/a/1.mp4", "val/a/2.mp4"), splits=["dev"])


def test_named_data_set_is_looked_for_below_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = default_paths("k400", None, None)
    assert [str(path) for path in paths] == ["data/k400", "store/k400.zarr"]
    with pytest.raises(ConfigError, match="--dataset folder needs --root"):
        default_paths("folder", None, None)


ROWS = [
    {"file": "a.mp4", "action": "run fast", "cap": "a dog runs", "part": "train"},
    {"file": "b c.mp4", "action": "jump", "cap": "it, she said, jumps", "part": "val"},
]
COLUMNS = {"path": "file", "label": "action", "caption": "cap", "split": "part"}


def write_table(path, rows):
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        pa.csv.write_csv(table, path, pa.csv.WriteOptions(delimiter=delimiter))
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_table_reads_alike_in_every_format(tmp_path, ending):
    table = write_table(tmp_path / f"list.{ending}", ROWS)
    records = read_dataset("table", tmp_path, annotations=table, columns=COLUMNS)
    assert [(r.video_id, r.path, r.split, r.class_name, r.captions) for r in records] == [
        ("a.mp4", "a.mp4", "train", "run fast", ("a dog runs",)),
        ("b c.mp4", "b c.mp4", "val", "jump", ("it, she said, jumps",)),
    ]


def test_usual_column_names_are_found(tmp_path):
    table = write_table(tmp_path / "list.csv", [{"video_id": "007", "video_path": "x.mp4", "class": "1", "start": 2.5}])
    (record,) = read_dataset("table", tmp_path, annotations=table)
    assert (record.video_id, record.path, record.class_name, record.start_s) == ("007", "x.mp4", "1", 2.5)


def test_segments_of_one_file_are_rows_of_their_own(tmp_path):
    rows = [{"path": "long.mp4", "start": 0, "end": 10}, {"path": "long.mp4", "start": 10, "end": 20.5}]
    records = read_dataset("table", tmp_path, annotations=write_table(tmp_path / "list.csv", rows))
    assert [(r.video_id, r.start_s, r.end_s) for r in records] == [
        ("long.mp4#t=0,10", 0.0, 10.0),
        ("long.mp4#t=10,20.5", 10.0, 20.5),
    ]


def test_several_captions_of_a_video_are_one_row(tmp_path):
    rows = [{"path": "a.mp4", "caption": c} for c in ("one", "two", "three")]
    (record,) = read_dataset("table", tmp_path, annotations=write_table(tmp_path / "list.csv", rows))
    assert record.captions == ("one", "two", "three")


def test_missing_column_is_named_with_those_that_are_there(tmp_path):
    table = write_table(tmp_path / "list.csv", ROWS)
    with pytest.raises(DatasetError, match=r"has the columns file, action, cap, part: no clip\. Name one"):
        read_dataset("table", tmp_path, annotations=table, columns={"path": "clip"})
    table = write_table(tmp_path / "other.csv", [{"where": "a.mp4"}])
    with pytest.raises(DatasetError, match=r"has the columns where: none of path, .*--column path=NAME"):
        read_dataset("table", tmp_path, annotations=table)
    with pytest.raises(ConfigError, match="--column knows the roles path, label"):
        read_dataset("table", tmp_path, annotations=table, columns={"colour": "where"})


def test_malformed_rows_are_told_all_at_once(tmp_path):
    rows = [
        {"path": "a.mp4", "start": "0", "end": "5"},
        {"path": "", "start": "0", "end": "5"},
        {"path": "b.mp4", "start": "x", "end": "5"},
        {"path": "c.mp4", "start": "7", "end": "5"},
        {"path": "../d.mp4", "start": "0", "end": "5"},
    ]
    table = write_table(tmp_path / "list.csv", rows)
    with pytest.raises(DatasetError) as caught:
        read_dataset("table", tmp_path, annotations=table)
    message = str(caught.value)
    assert message.startswith(f"4 rows of {table} are malformed:")
    assert "line 3: the path is empty" in message
    assert "line 4: expected seconds for the segment's start, found 'x'" in message
    assert "line 5: the segment ends at 5 s, before or at its start 7 s" in message
    assert "line 6: expected a path below" in message


def test_absent_table_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--dataset table needs --annotations"):
        read_dataset("table", tmp_path)
    with pytest.raises(DataNotFoundError, match=r"none\.csv is not there \(--annotations\)"):
        read_dataset("table", tmp_path, annotations=tmp_path / "none.csv")
    with pytest.raises(DataNotFoundError, match=r"expected a table, found the folder .*: name a file in it$"):
        read_dataset("table", tmp_path, annotations=tmp_path)


@pytest.mark.parametrize("name", ["table", "lists"])
def test_of_a_path_that_is_not_there_a_message_says_what_is(tmp_path, name):
    """The last folder of it that is there, names in it that are most alike, and what to do."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.csv").write_text("path,label\na.mp4,0\n" if name == "table" else "a.mp4 0\n")
    (lists / "zz.link").symlink_to(tmp_path / "away.csv")
    for given, told in (
        (lists / "trian.csv", f"{lists} holds train.csv, and no trian.csv: correct the path, or put"),
        (tmp_path / "lost/train.csv", f"{tmp_path} holds lists, and no lost: correct the path"),
        (tmp_path / "zzz/train.csv", f"{tmp_path} holds no zzz: correct the path"),
        (lists / "zz.link", f"{lists / 'zz.link'} is a link to nothing: correct the path"),
    ):
        with pytest.raises(DataNotFoundError, match=re.escape(f"{given} is not there (--annotations). {told}")):
            read_dataset(name, tmp_path, annotations=given)
    table = lists / "train.csv"
    for root, told in (
        (tmp_path / "videos", f"{tmp_path} holds no videos"),
        (tmp_path / "list/a", f"{tmp_path} holds lists, and no list"),
        (table, f"{table} is a file"),
    ):
        expected = (
            f"the folder {root} is not there (--root): paths in {table} are relative to it. {told}: name the folder "
            "that holds the videos"
        )
        with pytest.raises(DataNotFoundError, match=f"^{re.escape(expected)}$"):
            read_dataset(name, root, annotations=table)


def test_same_id_for_two_videos_is_refused(tmp_path):
    rows = [{"id": "1", "path": "a.mp4", "caption": "x"}, {"id": "1", "path": "b.mp4", "caption": "y"}]
    with pytest.raises(DatasetError, match="line 3: id '1' occurs a second time, with another path"):
        read_dataset("table", tmp_path, annotations=write_table(tmp_path / "list.csv", rows))


def test_videos_beside_train_and_val_are_refused(root):
    with pytest.raises(DatasetError, match="training and validation folders, and videos beside them in replacement"):
        read_dataset("folder", root("train/a/1.mp4", "val/a/2.mp4", "replacement/a/3.mp4"))


def test_circles_of_links_are_walked_once(root):
    folder = root("train/a/1.mp4", "val/a/2.mp4")
    (folder / "train/a/up").symlink_to(folder / "train")
    (folder / "train/b").symlink_to(folder / "val/a")
    assert [r.video_id for r in read_dataset("folder", folder)] == ["train/a/1.mp4", "train/b/2.mp4", "val/a/2.mp4"]


def test_repeated_columns_are_refused(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,label\na.mp4,x,y\n")
    with pytest.raises(DatasetError, match="more than one column label"):
        read_dataset("table", tmp_path, annotations=tmp_path / "list.csv")


def test_blanks_around_column_names_do_not_matter(tmp_path):
    (tmp_path / "list.csv").write_text("path, label\na.mp4,x\n")
    (record,) = read_dataset("table", tmp_path, annotations=tmp_path / "list.csv")
    assert record.class_name == "x"


def test_lists_of_captions_are_captions_and_other_nests_are_refused(tmp_path):
    table = write_table(tmp_path / "list.jsonl", [{"path": "a.mp4", "caption": ["one", "two"]}])
    (record,) = read_dataset("table", tmp_path, annotations=table)
    assert record.captions == ("one", "two")
    table = write_table(tmp_path / "list.jsonl", [{"path": {"x": 1}}])
    with pytest.raises(DatasetError, match="line 1: expected text or a number, found"):
        read_dataset("table", tmp_path, annotations=table)


def test_absolute_paths_lie_below_the_root_by_either_of_its_names(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rows = [{"path": str(tmp_path / "link" / "a.mp4")}, {"path": str(tmp_path / "real" / "b.mp4")}]
    records = read_dataset("table", tmp_path / "link", annotations=write_table(tmp_path / "list.csv", rows))
    assert [r.path for r in records] == ["a.mp4", "b.mp4"]
    table = write_table(tmp_path / "out.csv", [{"path": str(tmp_path / "link" / ".." / ".." / "x.mp4")}])
    with pytest.raises(DatasetError, match="expected a path below"):
        read_dataset("table", tmp_path / "link", annotations=table)


def test_segments_that_differ_by_a_hair_are_two(tmp_path):
    rows = [
        {"path": "a.mp4", "start": 0.1234567, "end": 1.00000001},
        {"path": "a.mp4", "start": 0.1234567, "end": 1.00000002},
    ]
    assert len(read_dataset("table", tmp_path, annotations=write_table(tmp_path / "list.csv", rows))) == 2


def test_float_labels_of_whole_numbers_are_whole_numbers(tmp_path):
    table = write_table(tmp_path / "list.parquet", [{"path": "a.mp4", "label": 3.0}])
    assert read_dataset("table", tmp_path, annotations=table)[0].class_name == "3"
