import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4v.errors import ConfigError, DatasetError
from s4v.extract.datasets import read_dataset
from s4v.extract.datasets.lists import sniff_delimiter


def read(place, text, *videos, name="train.txt", **files):
    root = place(
        {f"lists/{name}": text, **{f"lists/{file.replace('__', '.')}": t for file, t in files.items()}}, *videos
    )
    return [(r.path, r.split, r.class_name) for r in read_dataset("lists", root, annotations=root / "lists" / name)]


A, B = "abseiling/-7kbO0v4hag_000107_000117", "air drumming/x.mp4"


@pytest.mark.parametrize("name", ["train.txt", "kinetics_train_list.csv", "train.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [" ", "\t", ",", "::", ", "])
def test_paths_are_cut_from_the_right_whatever_the_delimiter(place, delimiter, end, name):
    text = f"{A}.mp4{delimiter}0{end}{B}{delimiter}1{end}"
    assert read(place, text, f"{A}.mp4", B, name=name) == [
        (f"{A}.mp4", "train", "abseiling"),
        (B, "train", "air drumming"),
    ]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("x/v.mp4\n", None),
        ("x/v.mp4 3\n", "x"),
        ("x/v.mp4 300 3\n", "x"),
        ("x/v.mp4 0 300 3\n", "x"),
        ("x/v.mp4 -1\n", None),
        ("x/v.mp4 0 -1\n", None),
        ("x/v.mp4 0 300\n", None),
    ],
)
def test_one_to_four_columns_are_read(place, text, label):
    assert read(place, text, "x/v.mp4") == [("x/v.mp4", "train", label)]


def test_delimiter_and_number_of_columns_are_sniffed():
    assert sniff_delimiter(["a b.mp4 1", "c 2 3"]) == (" ", 1)
    assert sniff_delimiter(["a, b.mp4,1", "c.mp4,2"]) == (",", 1)
    assert sniff_delimiter(["a b::1"]) == ("::", 1)
    assert sniff_delimiter(["dir/x 12 163 3"]) == (" ", 3)
    assert sniff_delimiter(["a b.mp4", "c.mp4"]) == (" ", 0)
    assert sniff_delimiter([]) == (" ", 0)


@given(
    paths=st.lists(st.from_regex(r"[a-z ]{1,8}/[a-z,0-9 ]{0,8}[a-z]\.mp4", fullmatch=True), min_size=1, max_size=6),
    delimiter=st.sampled_from([" ", "\t", ",", "::"]),
    columns=st.integers(1, 3),
)
def test_what_is_sniffed_is_how_the_list_was_written(paths, delimiter, columns):
    lines = [delimiter.join([path, *["7"] * columns]) for path in paths]
    assert sniff_delimiter(lines) == (delimiter, columns)


def test_names_come_from_a_class_file_beside_the_list(place):
    classes = "id,name\n0,abseiling\n1,air drumming\n"
    text = "one.mp4 1\ntwo.mp4 0\n"
    expected = [("one.mp4", "train", "air drumming"), ("two.mp4", "train", "abseiling")]
    assert read(place, text, kinetics_400_labels__csv=classes) == expected
    assert read(place, text, classes__txt="abseiling\nair drumming\n") == expected


def test_two_numberings_of_the_same_names_give_the_same_records(place):
    first = read(place, "one.mp4 1\ntwo.mp4 0\n", classes__txt="a\nb\n")
    assert read(place, "one.mp4 0\ntwo.mp4 1\n", classes__txt="b\na\n") == first


def test_labels_outside_the_class_file_are_refused(place):
    with pytest.raises(DatasetError, match=r"line 2: expected a label of .*classes\.txt \(2\), found 2"):
        read(place, "one.mp4 1\ntwo.mp4 2\n", classes__txt="a\nb\n")


def test_without_names_the_number_is_the_class(place):
    assert read(place, "100218 42 134\n24413 30 7\n", "20bn/100218.webm") == [
        ("20bn/100218.webm", "train", "134"),
        ("24413", "train", "7"),
    ]


def test_frame_lists_fit_video_files_and_the_other_way_round(place, make_frames):
    root = place({"train.txt": f"{A} 300 0\n"}, f"{A}.mp4")
    assert read_dataset("lists", root, annotations=root / "train.txt")[0].path == f"{A}.mp4"
    make_frames(root / "abseiling/y")
    (root / "val.txt").write_text("abseiling/y.mp4 0\n")
    assert read_dataset("lists", root, annotations=root / "val.txt")[0].path == "abseiling/y"


def test_paths_of_another_machine_are_found_by_their_end(place):
    text = f"/data/them/k400/train/{A}.mp4 0\n"
    assert read(place, text, f"train/{A}.mp4") == [(f"train/{A}.mp4", "train", "abseiling")]


def test_a_video_of_the_same_name_in_another_folder_is_not_taken(place, caplog):
    assert read(place, "run/000.mp4 0\n", "jump/000.mp4")[0][0] == "run/000.mp4"
    assert "1 of 1 videos are not below" in caplog.text


def test_absolute_paths_below_the_root_are_relative(place):
    root = place({}, B)
    (root / "val.txt").write_text(f"{root / B} 1\n")
    (record,) = read_dataset("lists", root, annotations=root / "val.txt")
    assert (record.path, record.split) == (B, "val")


def test_a_folder_of_lists_gives_the_splits(place):
    root = place({"l/train_list.txt": "a/1.mp4 0\n", "l/val_list.txt": "a/2.mp4 0\n", "l/readme.txt": "no list"})
    assert [r.split for r in read_dataset("lists", root, annotations=root / "l")] == ["train", "val"]
    with pytest.raises(DatasetError, match="holds no list: expected names such as"):
        read_dataset("lists", root, annotations=place({"other/readme.txt": "x"}) / "other")


def test_named_data_sets_read_lists_too(place):
    root = place({"train.txt": f"{A} 300 0\n"}, f"{A}.mp4")
    for name in ("k400", "ucf101", "ssv2"):
        (record,) = read_dataset(name, root, annotations=root / "train.txt")
        assert (record.path, record.class_name) == (f"{A}.mp4", "abseiling")


def test_malformed_lines_are_told_with_both_sides(place):
    text = "a/1.mp4 0\nno label.mp4\n../out.mp4 1\na/2.mp4 -5\na/3.mp4 0\n"
    with pytest.raises(DatasetError) as caught:
        read(place, text)
    message = str(caught.value)
    assert "line 2: expected PATH and 1 whole numbers, parted by ' ', found 'no label.mp4'" in message
    assert "line 3: expected a path below" in message
    assert "line 4: expected a label from 0 up, or -1 for none, found -5" in message
    with pytest.raises(DatasetError, match="line 1: expected offset 0, found 12: parts of frame folders are not read"):
        read(place, "dir 12 163 3\n")
    with pytest.raises(DatasetError, match="Several labels for a video are not read"):
        read(place, "dir 1 2 3 4\n")


def test_lists_need_a_list(place):
    with pytest.raises(ConfigError, match="--dataset lists needs --annotations"):
        read_dataset("lists", place({}, "a.mp4"))


def test_from_list_to_store(place, make_frames, extract_rows):
    root = place({"train.txt": "run fast/1.mp4 0\njump/frames 1\ngone/x.mp4 2\n"})
    make_frames(root / "jump/frames", name="img_{:05d}.jpg")
    store = extract_rows("lists", root, "run fast/1.mp4", annotations=root / "train.txt")
    table = store.read_manifest(["path", "class_name", "status", "decoder", "fps"]).to_pylist()
    assert [(r["path"], r["class_name"], r["status"]) for r in table] == [
        ("gone/x.mp4", "gone", "failed"),
        ("jump/frames", "jump", "ok"),
        ("run fast/1.mp4", "run fast", "ok"),
    ]
    assert (table[1]["decoder"], table[1]["fps"]) == ("pillow", None)
