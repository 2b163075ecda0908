import resource
import time

import pytest

from s4v.errors import DataNotFoundError, DatasetError
from s4v.extract.datasets import read_dataset
from s4v.extract.datasets._files import DatasetFiles, VideoTree, split_clip_name
from s4v.extract.datasets.contract import ReadOptions
from s4v.extract.datasets.kinetics import read_kinetics

OLD = "label,youtube_id,time_start,time_end,split\n"
NEW = "label,youtube_id,time_start,time_end,split,is_cc\n"
TRAIN = NEW + 'abseiling,-3B32lodo2M,59,69,train,0\n"air drumming",_dbcJuKJQNs,40,50,train,0\n'
VAL = OLD + '"air drumming",0wR5jVB-WPk,417,427,validate\n'
TEST = "youtube_id,time_start,time_end,split\n--6q_33gNew,132,142,test\n"


def rows(records):
    return [(r.video_id, r.path, r.split, r.class_name) for r in records]


def test_official_files_with_either_header_are_read(place):
    root = place(
        {"train.csv": TRAIN, "val.csv": VAL, "test.csv": TEST},
        "train/abseiling/-3B32lodo2M_000059_000069.mp4",
        "train/air drumming/_dbcJuKJQNs_000040_000050.mp4",
        "val/air drumming/0wR5jVB-WPk_000417_000427.mp4",
        "test/--6q_33gNew_000132_000142.mp4",
    )
    records = read_dataset("k400", root)
    assert rows(records) == [
        ("--6q_33gNew_000132_000142", "test/--6q_33gNew_000132_000142.mp4", "test", None),
        ("-3B32lodo2M_000059_000069", "train/abseiling/-3B32lodo2M_000059_000069.mp4", "train", "abseiling"),
        ("0wR5jVB-WPk_000417_000427", "val/air drumming/0wR5jVB-WPk_000417_000427.mp4", "val", "air drumming"),
        ("_dbcJuKJQNs_000040_000050", "train/air drumming/_dbcJuKJQNs_000040_000050.mp4", "train", "air drumming"),
    ]
    assert records[0].source_id == "--6q_33gNew"
    assert all(r.start_s is None for r in records), "the files are the segments already"


@pytest.mark.parametrize(
    "path",
    [
        "train/abseiling/-3B32lodo2M_000059_000069.mp4",
        "videos_train/air_drumming/-3B32lodo2M_000059_000069.mp4",
        "k400/train/-3B32lodo2M_000059_000069.mkv",
        "-3B32lodo2M.mp4",
    ],
)
@pytest.mark.parametrize("name", ["k400", "k600", "k700"])
def test_videos_are_found_in_every_layout(place, path, name):
    root = place({"annotations/train.csv": NEW + '"air drumming",-3B32lodo2M,59.0,69.0,train,0\r\n'}, path)
    (record,) = read_dataset(name, root)
    assert (record.path, record.class_name) == (path, "air drumming")


@pytest.mark.parametrize(
    ("name", "column"),
    [("val.csv", ",val"), ("val.csv", ",validate"), ("validate.csv", ",validate"), ("kinetics-400_val.csv", None)],
)
def test_validation_is_val_however_it_is_written(place, name, column):
    header = OLD if column else OLD.replace(",split", "")
    root = place({name: f"{header}abseiling,-3B32lodo2M,59,69{column or ''}\n"})
    assert [r.split for r in read_dataset("k400", root)] == ["val"]


def test_folders_of_frames_are_videos(place, make_frames):
    root = place({"train.csv": NEW + "abseiling,-3B32lodo2M,59,69,train,0\n"})
    make_frames(root / "rawframes_train/abseiling/-3B32lodo2M_000059_000069", name="img_{:05d}.jpg")
    (record,) = read_dataset("k400", root)
    assert record.path == "rawframes_train/abseiling/-3B32lodo2M_000059_000069"


def test_same_id_with_other_times_is_another_video(place, caplog):
    root = place({"train.csv": NEW + "abseiling,-3B32lodo2M,59,69,train,0\n"}, "train/-3B32lodo2M_000001_000011.mp4")
    (record,) = read_dataset("k700", root)
    assert record.path == "train/abseiling/-3B32lodo2M_000059_000069.mp4"
    assert "1 of 1 videos are not below" in caplog.text


def test_of_several_copies_the_replacement_then_the_split_s_own_is_taken(place):
    name = "-3B32lodo2M_000059_000069.mp4"
    root = place({"train.csv": NEW + "abseiling,-3B32lodo2M,59,69,train,0\n"}, f"test/{name}", f"train/{name}")
    assert read_dataset("k400", root)[0].path == f"train/{name}"
    place({}, f"replacement/replacement_for_corrupted_k400/{name}")
    assert read_dataset("k400", root)[0].path == f"replacement/replacement_for_corrupted_k400/{name}"


def test_ids_are_cut_from_the_right():
    assert split_clip_name("_a_000001_00_000001_000011") == ("_a_000001_00", "000001_000011")
    assert split_clip_name("0wR5jVB-WPk") == ("0wR5jVB-WPk", "")
    assert split_clip_name("-3B32lodo2M_00059_000069") == ("-3B32lodo2M_00059_000069", "")


def test_two_orders_of_the_same_rows_are_one_data_set(place, tmp_path):
    root = place({"train.csv": TRAIN})
    first = read_dataset("k400", root)
    header, *lines = TRAIN.splitlines(keepends=True)
    (root / "train.csv").write_text(header + "".join(reversed(lines)))
    assert read_dataset("k400", root) == first


def test_a_row_in_two_files_is_one_row_and_a_contradiction_is_refused(place):
    root = place({"train.csv": TRAIN, "k400_train.csv": TRAIN})
    assert len(read_dataset("k400", root)) == 2
    (root / "k400_train.csv").write_text(TRAIN.replace("abseiling", "zumba"))
    with pytest.raises(DatasetError, match=r"expected -3B32lodo2M_000059_000069 once, found it with train, 'zumba'"):
        read_dataset("k400", root)


def test_missing_videos_are_rows_and_are_counted_in_a_warning(place, caplog):
    root = place({"train.csv": TRAIN, "val.csv": VAL}, "train/abseiling/-3B32lodo2M_000059_000069.mp4")
    assert len(read_dataset("k400", root)) == 3
    assert "2 of 3 videos are not below" in caplog.text
    assert "(train 1, val 1): val/air drumming/0wR5jVB-WPk_000417_000427.mp4, train/air drumming/_dbc" in caplog.text
    caplog.clear()
    read_dataset("k400", root, splits=["train"])
    assert "1 of 2 videos" in caplog.text


def test_malformed_rows_are_told_with_file_line_and_both_sides(place):
    bad = (
        TRAIN
        + "abseiling,short,1,2,train,0\n"
        + "abseiling,-3B32lodo2M,x,69,train,0\n"
        + "abseiling,-3B32lodo2M,69,59,train,0\n"
        + ",-3B32lodo2M,1,11,train,0\n"
        + "abseiling,-3B32lodo2M,1,11,middle,0\n"
        + "abseiling,-3B32lodo2M,1\n"
    )
    root = place({"train.csv": bad})
    with pytest.raises(DatasetError) as caught:
        read_dataset("k400", root)
    assert str(caught.value).splitlines() == [
        f"6 rows of {root / 'train.csv'} are malformed:",
        "  line 4: expected a YouTube id of 11 characters, found 'short'",
        "  line 5: expected seconds in time_start, found 'x'",
        "  line 6: expected time_end after time_start, found 69 to 59",
        "  line 7: expected a label in the split train, found none",
        "  line 8: expected a split, one of train, training, val, valid, validate, validation, test, testing, "
        "found 'middle'",
        "  line 9: expected 6 columns (label,youtube_id,time_start,time_end,split,is_cc), "
        "found ['abseiling', '-3B32lodo2M', '1']",
    ]


def test_twenty_malformed_rows_are_shown_then_counted(place):
    root = place({"train.csv": NEW + "a,b,1,2,train,0\n" * 25, "val.csv": NEW + "a,b,1,2,val,0\n"})
    with pytest.raises(DatasetError) as caught:
        read_dataset("k400", root)
    lines = str(caught.value).splitlines()
    assert lines[0] == "26 rows are malformed:"
    assert lines[1].startswith(f"  {root / 'train.csv'}, line 2: expected a YouTube id")
    assert len(lines) == 22
    assert lines[-1] == "  and 6 more"


def test_a_named_file_is_the_only_one(place):
    root = place({"train.csv": TRAIN, "lists/mine.csv": VAL})
    assert [r.split for r in read_dataset("k400", root, annotations=root / "lists/mine.csv")] == ["val"]
    assert len(read_dataset("k400", root, annotations=root / "lists" / "mine.csv")) == 1
    with pytest.raises(DataNotFoundError, match=r"none\.csv is not there \(--annotations\)"):
        read_dataset("k400", root, annotations=root / "none.csv")


def test_without_annotations_folders_are_classes(place):
    root = place({}, "train/abseiling/a.mp4", "val/air drumming/b.mp4")
    assert [r.class_name for r in read_dataset("k400", root)] == ["abseiling", "air drumming"]


def test_renamed_folders_of_mmaction2_are_the_same_classes(place):
    root = place({}, "videos_train/abseiling/a.mp4", "videos_val/air_drumming/b.mp4")
    assert [(r.split, r.class_name) for r in read_dataset("k400", root)] == [
        ("train", "abseiling"),
        ("val", "air drumming"),
    ]


def test_flat_videos_without_annotations_are_refused_with_a_hint(place):
    root = place({}, "train/-3B32lodo2M_000059_000069.mp4")
    with pytest.raises(DatasetError, match=r"lie in no class folder.* Or add the annotations: train\.csv"):
        read_dataset("k400", root)


@pytest.mark.parametrize("name", ["k400", "k600", "k700"])
def test_from_annotations_to_store(place, extract_rows, name):
    root = place({"train.csv": TRAIN, "val.csv": VAL})
    store = extract_rows(
        name,
        root,
        "train/abseiling/-3B32lodo2M_000059_000069.mp4",
        "videos_val/air_drumming/0wR5jVB-WPk_000417_000427.mp4",
    )
    table = store.read_manifest(["video_id", "source_id", "class_name", "label", "status", "reason"]).to_pylist()
    assert [tuple(row.values()) for row in table] == [
        ("-3B32lodo2M_000059_000069", "-3B32lodo2M", "abseiling", 0, "ok", None),
        ("0wR5jVB-WPk_000417_000427", "0wR5jVB-WPk", "air drumming", 1, "ok", None),
        ("_dbcJuKJQNs_000040_000050", "_dbcJuKJQNs", "air drumming", 1, "failed", "missing-file"),
    ]
    assert store.attributes["classes"]["names"] == ["abseiling", "air drumming"]
    assert store.attributes["dataset"]["protocol"] is None


@pytest.mark.slow
def test_250000_rows_match_250000_names_in_10_seconds_and_1_gb(tmp_path):
    ids = [f"{number:011x}" for number in range(250_000)]
    with (tmp_path / "train.csv").open("w") as file:
        file.write(NEW)
        file.writelines(f'"class {n % 400}",{i},{n % 300},{n % 300 + 10},train,0\n' for n, i in enumerate(ids))
    names = [
        f"train/class {n % 400}/{i}_{n % 300:06d}_{n % 300 + 10:06d}.mp4" for n, i in reversed(list(enumerate(ids)))
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # CPU seconds: other work on the machine must not fail this.
    start = time.process_time()
    records = read_kinetics(DatasetFiles(tmp_path, tree=VideoTree(tmp_path, names)), ReadOptions())
    assert time.process_time() - start < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1e9
    assert {r.path for r in records} == set(names)
