import json

import pytest
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, DataNotFoundError, DatasetError
from s4v.extract.datasets import read_dataset

UCF = {
    "classInd.txt": "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n",
    "trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n"
    "HandstandPushups/v_HandStandPushups_g08_c01.avi 2\r\n",
    "testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n",
    "trainlist02.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 1\n",
    "testlist02.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi\n",
    "trainlist03.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 1\n",
    "testlist03.txt": "HandstandPushups/v_HandStandPushups_g08_c01.avi\n",
}
ODD = "#122_Cold-Steel(R)_Sword & Shield;_chew_h_nm_np1_fr_goo_0.avi"
HMDB = {
    "brush_hair_test_split1.txt": "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \n"
    "Atheletic_brush_hair_0.avi 2 \nx.avi 0\n",
    "chew_test_split1.txt": f"{ODD} 2 \r\n",
    "brush_hair_test_split2.txt": "x.avi 1\n",
    "brush_hair_test_split3.txt": "x.avi 2\n",
}


def rows(records):
    return [(r.path, r.split, r.class_name) for r in records]


@pytest.mark.parametrize("folder", ["", "ucfTrainTestlist/", "annotations/"])
def test_ucf_classes_are_names_and_case_does_not_matter(place, folder):
    lists = {f"{folder}{name}": text for name, text in UCF.items()}
    root = place(
        lists,
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "UCF-101/HandStandPushups/v_HandstandPushups_g08_c01.avi",
    )
    assert rows(read_dataset("ucf101", root)) == [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "val", "ApplyEyeMakeup"),
        ("UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "train", "ApplyEyeMakeup"),
        ("UCF-101/HandStandPushups/v_HandstandPushups_g08_c01.avi", "train", "HandstandPushups"),
    ]


def test_ucf_has_three_protocols(place):
    root = place(UCF)
    splits = {p: [r.split for r in read_dataset("ucf101", root, protocol=f"split{p}")] for p in (1, 2, 3)}
    assert splits == {1: ["val", "train", "train"], 2: ["train", "val"], 3: ["train", "val"]}
    with pytest.raises(ConfigError, match="--protocol takes split1, split2, split3 for ucf101; found 'split4'"):
        read_dataset("ucf101", root, protocol="split4")


def test_ucf_numbers_that_contradict_the_folder_are_refused(place):
    bad = "ApplyEyeMakeup/v_a.avi 2\nApplyEyeMakeup/v_b.avi 0\nJuggling/v_c.avi 1\n"
    root = place({**UCF, "trainlist01.txt": bad})
    with pytest.raises(DatasetError) as caught:
        read_dataset("ucf101", root)
    assert "line 1: expected the number of ApplyEyeMakeup, found 2, which is HandstandPushups" in str(caught.value)
    assert "line 2: expected the number of ApplyEyeMakeup, found 0, which is no class" in str(caught.value)
    assert "line 3: expected CLASS/VIDEO with a class of" in str(caught.value)


def test_ucf_without_its_class_list_says_where_it_belongs(place):
    root = place({name: text for name, text in UCF.items() if name != "classInd.txt"})
    with pytest.raises(DataNotFoundError, match=r"expected classInd\.txt in one of .*ucfTrainTestlist: not there"):
        read_dataset("ucf101", root)
    with pytest.raises(DataNotFoundError, match=r"trainlist01\.txt needs classInd\.txt too: name the folder"):
        read_dataset("ucf101", root, annotations=root / "trainlist01.txt")


@pytest.mark.parametrize("folder", ["", "testTrainMulti_7030_splits/", "splits/"])
def test_hmdb_codes_choose_and_odd_names_are_only_compared(place, folder):
    root = place({f"{folder}{name}": text for name, text in HMDB.items()}, f"hmdb51_org/chew/{ODD}")
    assert rows(read_dataset("hmdb51", root)) == [
        ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "train", "brush_hair"),
        ("brush_hair/Atheletic_brush_hair_0.avi", "val", "brush_hair"),
        (f"hmdb51_org/chew/{ODD}", "val", "chew"),
    ]
    assert rows(read_dataset("hmdb51", root, protocol="split2")) == [("brush_hair/x.avi", "train", "brush_hair")]
    assert rows(read_dataset("hmdb51", root, protocol="split3")) == [("brush_hair/x.avi", "val", "brush_hair")]


def test_hmdb_codes_beyond_2_are_refused(place):
    root = place({"chew_test_split1.txt": "a.avi 3\nb.avi\n"})
    with pytest.raises(DatasetError) as caught:
        read_dataset("hmdb51", root)
    assert "line 1: expected NAME and a code of 0, 1, 2, found 'a.avi 3'" in str(caught.value)
    assert "line 2: expected NAME and a code of 0, 1, 2, found 'b.avi'" in str(caught.value)
    with pytest.raises(DatasetError, match="there are other splits only"):
        read_dataset("hmdb51", root, protocol="split2")


def test_ucf_from_annotations_to_store(place, extract_rows):
    videos = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"]
    store = extract_rows("ucf101", place(UCF), *videos, protocol="split2")
    table = store.read_manifest(["video_id", "split", "class_name", "status"]).to_pylist()
    assert [tuple(row.values()) for row in table] == [
        ("v_ApplyEyeMakeup_g01_c01", "train", "ApplyEyeMakeup", "ok"),
        ("v_ApplyEyeMakeup_g08_c01", "val", "ApplyEyeMakeup", "ok"),
    ]
    assert store.attributes["dataset"]["protocol"] == "split2"


def test_command_takes_a_protocol_and_goes_on_only_with_the_same(place, tmp_path, one_video):
    root = place({f"lists/{name}": text for name, text in UCF.items()})
    (root / "v_ApplyEyeMakeup_g08_c01.mp4").write_bytes(one_video.read_bytes())

    def run(protocol):
        command = [
            "extract",
            "--model",
            "tiny-clip",
            "--weights",
            "random",
            "--device",
            "cpu",
            "--frames",
            "2",
            "--json",
        ]
        command += [
            "--dataset",
            "ucf101",
            "--root",
            root,
            "--annotations",
            root / "lists",
            "--out",
            tmp_path / "s.zarr",
        ]
        return CliRunner().invoke(app, [str(a) for a in [*command, "--protocol", protocol]], catch_exceptions=False)

    first = run("split2")
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout.strip().splitlines()[-1])
    assert answer["videos"] == {"ok": 1, "failed": 1, "pending": 0}
    assert answer["failed"][0]["reason"] == "missing-file"
    other = run("split1")
    assert other.exit_code == 1
    assert "dataset.protocol split2 there, split1 here" in other.stderr


def test_hmdb_from_annotations_to_store(place, extract_rows):
    store = extract_rows("hmdb51", place(HMDB), f"chew/{ODD}")
    rows = {row["path"]: row["status"] for row in store.read_manifest(["path", "status"]).to_pylist()}
    assert rows[f"chew/{ODD}"] == "ok"
    assert sorted(rows.values()) == ["failed", "failed", "ok"]
    assert store.attributes["classes"]["names"] == ["brush_hair", "chew"]
    assert store.attributes["dataset"]["protocol"] == "split1"
