"""A table of one's own with queries and windows, in every form that it may have."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s4v.errors import ConfigError, DatasetError
from s4v.extract.datasets import read_dataset
from s4v.store.moments import Moments, moment_table

ROW = {"query": "a cat jumps", "vid": "a", "relevant_windows": [[1, 2.5], [4, 5]]}


@pytest.fixture
def read(tmp_path):
    """Read rows as lines of JSON, or a text as it is, beside two empty videos."""
    root = tmp_path / "videos"
    for name in ("a.mp4", "sub/b.webm"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()

    def read(rows, name="m.jsonl", **options):
        table = tmp_path / name
        table.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return read_dataset("table", root, annotations=table, **options)

    return read


def moments_of(records):
    return {moment.query_id: moment for moment in Moments(moment_table(records))}


def test_lines_of_json_with_everything(read):
    scored = {
        **ROW,
        "qid": "x",
        "vid": "b",
        "split": "Training",
        "duration": 12,
        "relevant_clip_ids": [0, 3],
        "saliency_scores": [[1], [4]],
        "clip_s": 3,
        "note": [{"of": "nobody"}],
    }
    records = read([{**ROW, "qid": 7, "split": "val"}, scored])
    assert [(r.video_id, r.path, r.split, r.captions) for r in records] == [
        ("a", "a.mp4", "val", ("a cat jumps",)),
        ("b", "sub/b.webm", "train", ("a cat jumps",)),
    ]
    moments = moments_of(records)
    assert moments["7"].windows == ((1.0, 2.5), (4.0, 5.0)) and moments["7"].duration_s is None
    assert (moments["x"].clip_s, moments["x"].clip_ids, moments["x"].scores) == (3.0, (0, 3), ((1,), (4,)))
    assert (moments["x"].duration_s, moments["x"].split) == (12.0, "train")


def test_paths_are_below_the_root_and_rows_have_numbers_for_ids(read):
    records = read([{"query": "one", "path": "sub/b.webm", "start": 1, "end": 2}, {**ROW, "vid": "gone"}])
    assert [(r.video_id, r.path) for r in records] == [("gone", "gone.mp4"), ("sub/b.webm", "sub/b.webm")]
    assert {name: moment.windows for name, moment in moments_of(records).items()} == {
        "1": ((1.0, 2.0),),
        "2": ((1.0, 2.5), (4.0, 5.0)),
    }


def test_splits_are_held_out_where_nobody_says_any(read):
    records = read([{**ROW, "vid": f"v{number}"} for number in range(10)])
    moments = Moments(moment_table(records))
    assert moments.splits == [record.split for record in records] and set(moments.splits) == {"train", "val"}


def test_a_query_may_be_of_another_split_than_its_video(read):
    records = read([{**ROW, "split": "train"}, {**ROW, "query": "it sleeps", "split": "val"}])
    assert [record.split for record in records] == ["train"]
    assert Moments(moment_table(records)).splits == ["train", "val"]


def test_rows_of_one_query_are_joined_in_csv(read):
    table = 'query,start,end,vid\na cat jumps,1,2.5,a\n"it sleeps, long",0,9,a\na cat jumps,4,5,a\nnobody comes,,,b\n'
    moments = moments_of(read(table, "m.csv"))
    assert {name: moment.windows for name, moment in moments.items()} == {
        "1": ((1.0, 2.5), (4.0, 5.0)),
        "2": ((0.0, 9.0),),
        "4": None,
    }


def test_decimal_commas_and_query_ids_in_csv(read):
    table = "qid;query;start;end;vid;split\nq1;a, b;1,5;2;a;val\nq1;a, b;3;4,25;a;val\n"
    records = read(table, "m.csv")
    assert records[0].captions == ("a, b",)
    assert moments_of(records)["q1"].windows == ((1.5, 2.0), (3.0, 4.25))


def test_columns_may_have_other_names(read):
    table = "film\tfrom\tto\tquery\na.mp4\t1\t2\ta cat\n"
    columns = {"path": "film", "start": "from", "end": "to"}
    records = read(table, "m.tsv", columns=columns)
    assert records[0].path == "a.mp4" and records[0].moments[0].windows == ((1.0, 2.0),)
    with pytest.raises(ConfigError, match="--column knows the roles path, .*; found speed"):
        read(table, "m.tsv", columns={**columns, "speed": "from"})


def test_parquet(read, tmp_path):
    read([ROW])
    pq.write_table(pa.Table.from_pylist([{**ROW, "qid": 3}]), tmp_path / "m.parquet")
    records = read_dataset("table", tmp_path / "videos", annotations=tmp_path / "m.parquet")
    assert moments_of(records)["3"].windows == ((1.0, 2.5), (4.0, 5.0))


def test_a_column_of_queries_that_is_said_to_be_captions_makes_segments(read):
    table = "path,start,end,query\na.mp4,1,2,a cat\n"
    (record,) = read(table, "m.csv", columns={"caption": "query"})
    assert (record.start_s, record.captions, record.moments) == (1.0, ("a cat",), ())
    assert read("path,caption\na.mp4,a cat\n", "m.csv")[0].moments == ()


def test_a_table_with_classes_is_no_table_of_moments(read):
    """Whoever had one with a column `query` has the same store from it as before."""
    for table in ("path,label,query\na.mp4,cats,a cat\n", "path,action,query\na.mp4,cats,a cat\n"):
        (record,) = read(table, "m.csv")
        assert (record.class_name, record.captions, record.moments) == ("cats", (), ())
    (record,) = read("path,kind,query\na.mp4,cats,a cat\n", "m.csv", columns={"label": "kind"})
    assert (record.class_name, record.captions, record.moments) == ("cats", (), ())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {"query": "x"}], "line 2: expected vid or path"),
        ([ROW, {"query": 5, "vid": "a"}], "line 2: expected 'query' with a text"),
        ([ROW, ["query"]], "line 2: expected an object with 'query'"),
        ([ROW, {"query": "x", "vid": "a", "start": 1}], "line 2: expected a window's start with its end"),
        ([ROW, {**ROW, "start": 1, "end": 2}], "line 2: expected relevant_windows, or start and end: found both"),
        ([ROW, {**ROW, "vid": "a/b"}], "line 2: expected a name without folders, found 'a/b'"),
        ([ROW, {"query": "x", "path": "/etc/passwd"}], "line 2: expected a path below"),
        ([{**ROW, "qid": 1}, {**ROW, "qid": 1}], "line 2: query id '1' occurs a second time: it was in line 1"),
        ([{**ROW, "qid": 1}, {**ROW, "qid": 1, "vid": "b"}], "line 2: query id '1' is another query here than in line"),
        ([ROW, {**ROW, "qid": "1"}], "line 2: query id '1' occurs a second time"),
        ([ROW, {**ROW, "saliency_scores": [[1]]}], "line 2: expected relevant_clip_ids, whole numbers from 0"),
        ([{**ROW, "relevant_windows": None, "saliency_scores": [[1]], "relevant_clip_ids": [0]}], "windows beside"),
        ([ROW, {**ROW, "duration": "long"}], "line 2: expected seconds in duration, found 'long'"),
        ([ROW, {**ROW, "clip_s": 0.001}], "line 2: expected clips of at least 0.01 s"),
        ([{**ROW, "path": "a.mp4"}, {**ROW, "path": "sub/b.webm", "query": "x"}], "line 2: a is another file here"),
        ([{**ROW, "qid": True}], "line 1: expected 'qid' with a text, found True"),
    ],
)  # fmt: skip
def test_malformed_rows_are_told(read, rows, message):
    with pytest.raises(DatasetError) as refusal:
        read(rows)
    assert message in str(refusal.value) and "1 rows of " in str(refusal.value)


def test_short_rows_of_csv_are_told(read):
    with pytest.raises(DatasetError, match="line 2: expected 4 columns, found 2"):
        read("query,start,end,vid\na,1\n", "m.csv")
    with pytest.raises(DatasetError, match="has a header and no rows: expected one row for each query"):
        read("query,start,end,vid\n", "m.csv")
