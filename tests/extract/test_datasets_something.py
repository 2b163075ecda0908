import pytest

from s4v.errors import DatasetError
from s4v.extract.datasets import read_dataset

V1 = "something-something-v1"
V1_FILES = {
    f"{V1}-train.csv": "100218;Something falling like a feather or paper\r\n24413;Holding something\r\n",
    f"{V1}-validation.csv": "999;Holding something\n",
    f"{V1}-test.csv": "1420\n",
    f"{V1}-labels.csv": "Holding something\nTurning something upside down\nSomething falling like a feather or paper\n",
}
FEATHER = "Something falling like a feather or paper"

V2 = "something-something-v2"
V2_TRAIN = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    }
]
V2_LABELS = {"Approaching something with your camera": "0", "Holding something next to something": "1"}
V2_VAL = [{**V2_TRAIN[0], "id": 42, "template": "Approaching [something] with your camera"}]
V2_FILES = {
    f"{V2}-train.json": V2_TRAIN,
    f"{V2}-validation.json": V2_VAL,
    f"{V2}-test.json": [{"id": "1420"}],
    f"{V2}-labels.json": V2_LABELS,
}


def rows(records):
    return [(r.video_id, r.path, r.split, r.class_name) for r in records]


@pytest.mark.parametrize("below", ["", "20bn-something-something-v1/"])
def test_v1_lists_name_folders_of_frames(place, make_frames, below):
    root = place(V1_FILES)
    for video_id in ("100218", "24413", "999"):
        make_frames(root / f"{below}{video_id}", num_frames=2)
    assert rows(read_dataset("ssv1", root)) == [
        ("100218", f"{below}100218", "train", FEATHER),
        ("1420", "1420", "test", None),
        ("24413", f"{below}24413", "train", "Holding something"),
        ("999", f"{below}999", "val", "Holding something"),
    ]


def test_both_orders_of_the_v1_classes_give_the_same_records(place):
    root = place(V1_FILES)
    in_file_order = read_dataset("ssv1", root)
    labels = root / f"{V1}-labels.csv"
    labels.write_text("\n".join(sorted(labels.read_text().splitlines())))
    assert read_dataset("ssv1", root) == in_file_order


def test_v1_rows_with_unknown_classes_or_none_are_refused(place):
    root = place({**V1_FILES, f"{V1}-train.csv": "1;Juggling\n2\nx;Holding something\n"})
    with pytest.raises(DatasetError) as caught:
        read_dataset("ssv1", root)
    assert f"line 1: expected a class of {root / f'{V1}-labels.csv'}, found 'Juggling'" in str(caught.value)
    assert "line 2: expected a label for 2, found none" in str(caught.value)
    assert "line 3: expected a number as id, found 'x'" in str(caught.value)


@pytest.mark.parametrize("ending", [".webm", ".mp4"])
def test_v2_templates_are_classes_without_their_brackets(place, ending):
    root = place(V2_FILES, f"20bn-something-something-v2/78687{ending}")
    assert rows(read_dataset("ssv2", root)) == [
        ("1420", "1420.webm", "test", None),
        ("42", "42.webm", "val", "Approaching something with your camera"),
        ("78687", f"20bn-something-something-v2/78687{ending}", "train", "Holding something next to something"),
    ]


def test_the_newer_archive_of_v2_reads_alike(place):
    names = {"labels/labels.json": V2_LABELS, "labels/train.json": V2_TRAIN, "labels/test.json": [{"id": "1420"}]}
    root = place({**names, "labels/validation.json": V2_VAL})
    assert [r.split for r in read_dataset("ssv2", root)] == ["test", "val", "train"]


def test_v2_classes_do_not_depend_on_the_numbers_in_the_labels_file(place):
    root = place(V2_FILES)
    first = read_dataset("ssv2", root)
    assert read_dataset("ssv2", place({f"{V2}-labels.json": dict.fromkeys(V2_LABELS, "7")})) == first


def test_v2_entries_that_are_malformed_are_told_with_their_place(place):
    root = place({**V2_FILES, f"{V2}-train.json": [{"id": "1"}, "text", {"id": "2", "template": "Juggling [fire]"}]})
    with pytest.raises(DatasetError) as caught:
        read_dataset("ssv2", root)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"3 rows of {root / f'{V2}-train.json'} are malformed:"
    assert lines[1] == "  entry 1: expected 'template' with a text, found {'id': '1'}"
    assert lines[2] == "  entry 2: expected an object with 'id', found 'text'"
    assert lines[3].endswith("found 'Juggling fire'")


def test_broken_json_is_told_with_its_line(place):
    root = place({f"{V2}-train.json": '[{"id": "1"},\n'})
    with pytest.raises(DatasetError, match=r"train\.json, line 2: expected JSON, found Expecting value"):
        read_dataset("ssv2", root)


def test_v1_from_annotations_to_store(place, make_frames, extract_rows):
    root = place({name: text for name, text in V1_FILES.items() if "test" not in name})
    make_frames(root / "100218", num_frames=24)
    store = extract_rows("ssv1", root)
    rows = {row["video_id"]: row for row in store.read_manifest().to_pylist()}
    assert rows["24413"]["reason"] == rows["999"]["reason"] == "missing-file"
    good = rows["100218"]
    assert (good["status"], good["class_name"], good["decoder"]) == ("ok", FEATHER, "pillow")
    assert (good["num_frames"], good["fps"], good["duration_s"]) == (24, 12.0, 2.0)
    assert good["frame_indices"] == [6, 18]
    assert good["timestamps_s"] == [0.5, 1.5]


def test_v2_from_annotations_to_store(place, extract_rows):
    root = place(V2_FILES)
    store = extract_rows("ssv2", root, "videos/78687.mp4", "videos/42.mp4", splits=("train", "val"))
    table = store.read_manifest(["video_id", "class_name", "label", "status"]).to_pylist()
    assert [tuple(row.values()) for row in table] == [
        ("42", "Approaching something with your camera", 0, "ok"),
        ("78687", "Holding something next to something", 1, "ok"),
    ]
