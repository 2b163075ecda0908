"""The data sets with captions: MSR-VTT, MSVD and VATEX."""

import pickle

import pytest

from s4v.errors import DataNotFoundError, DatasetError
from s4v.extract.datasets import read_dataset
from s4v.extract.datasets.msvd import load_plain_pickle


def rows(records):
    return [(r.video_id, r.path, r.split, r.captions) for r in records]


def challenge(*videos):
    """The JSON of the challenge, two captions for each video."""
    return {
        "info": {"year": "2016"},
        "videos": [
            {"video_id": f"video{n}", "start time": 1.5, "end time": 9.0, "split": split, "category": 9, "id": n}
            for n, split in videos
        ],
        "sentences": [
            {"caption": f"caption {place} of {n}", "video_id": f"video{n}", "sen_id": place}
            for n, _ in videos
            for place in (0, 1)
        ],
    }


VIDEOS = ((0, "train"), (1, "validate"), (2, "test"), (9770, "test"))
FULL = [
    ("video0", "train", ("caption 0 of 0", "caption 1 of 0")),
    ("video1", "val", ("caption 0 of 1", "caption 1 of 1")),
    ("video2", "test", ("caption 0 of 2", "caption 1 of 2")),
    ("video9770", "test", ("caption 0 of 9770", "caption 1 of 9770")),
]
JSFUSION = "key,vid_key,video_id,sentence\nret0,msr9770,video9770,a person is connecting something to system\n"
CLIP4CLIP = {
    "MSRVTT_data.json": challenge(*VIDEOS),
    "MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo1\n",
    "MSRVTT_train.7k.csv": "video_id\r\nvideo0\r\n",
    "MSRVTT_JSFUSION_test.csv": JSFUSION,
}


@pytest.mark.parametrize(
    "files",
    [
        {"MSRVTT_data.json": challenge(*VIDEOS)},
        {
            "annotations/train_val_videodatainfo.json": challenge(*VIDEOS[:2]),
            "annotations/test_videodatainfo.json": challenge(*VIDEOS[2:]),
        },
    ],
)
def test_msrvtt_full_takes_splits_and_captions_from_the_json(place, files):
    root = place(files, "TrainValVideo/video0.mp4")
    records = read_dataset("msrvtt", root, protocol="full")
    assert [(r.video_id, r.split, r.captions) for r in records] == FULL
    assert [r.path for r in records] == ["TrainValVideo/video0.mp4", "video1.mp4", "video2.mp4", "video9770.mp4"]


def test_msrvtt_1k_a_trains_on_the_list_and_tests_on_one_caption_each(place):
    root = place(CLIP4CLIP, "all/video9770.mp4")
    test = ("video9770", "all/video9770.mp4", "test", ("a person is connecting something to system",))
    by_9k = rows(read_dataset("msrvtt", root))
    assert [r[0] for r in by_9k] == ["video0", "video1", "video9770"]
    assert by_9k[1] == ("video1", "video1.mp4", "train", ("caption 0 of 1", "caption 1 of 1"))
    assert by_9k[2] == test
    assert by_9k == rows(read_dataset("msrvtt", root, protocol="1k-A-9k"))
    assert [r[0] for r in rows(read_dataset("msrvtt", root, protocol="1k-A-7k"))] == ["video0", "video9770"]


@pytest.mark.parametrize(
    "text",
    [
        JSFUSION,
        JSFUSION.replace("sentence", "sentences"),
        JSFUSION.replace(",", ";"),
        JSFUSION.replace("\n", "\r\n"),
        "\ufeff" + JSFUSION,
    ],
)
def test_copies_of_the_jsfusion_list_read_alike(place, text):
    root = place({**CLIP4CLIP, "MSRVTT_JSFUSION_test.csv": text})
    (test,) = read_dataset("msrvtt", root, splits=["test"])
    assert test.captions == ("a person is connecting something to system",)


def test_msrvtt_lists_of_vindlu_are_read_too(place):
    root = place(
        {
            "msrvtt_ret_train9k.json": [
                {"video": "video0.mp4", "caption": ["one", "two"]},
                {"video": "video1.mp4", "caption": "three"},
                {"video": "video1.mp4", "caption": "four"},
            ],
            "msrvtt_ret_test1k.json": [{"video": "video9770.mp4", "caption": "five"}],
        }
    )
    assert [(r.video_id, r.split, r.captions) for r in read_dataset("msrvtt", root)] == [
        ("video0", "train", ("one", "two")),
        ("video1", "train", ("three", "four")),
        ("video9770", "test", ("five",)),
    ]


def test_msrvtt_says_which_file_a_protocol_lacks(place):
    root = place({name: value for name, value in CLIP4CLIP.items() if "7k" not in name})
    with pytest.raises(DataNotFoundError, match=r"expected MSRVTT_train\.7k\.csv or msrvtt_ret_train7k\.json in one"):
        read_dataset("msrvtt", root, protocol="1k-A-7k")


def test_msrvtt_malformed_rows_are_told_across_files(place):
    data = challenge(*VIDEOS)
    del data["sentences"][3]["caption"]
    files = {
        "MSRVTT_data.json": data,
        "MSRVTT_train.9k.csv": "video_id\nvideo77\n",
        "MSRVTT_JSFUSION_test.csv": JSFUSION + "ret1,msr1,video9770\nret2,msr9770,video9770,again\n",
    }
    root = place({**CLIP4CLIP, **files})
    with pytest.raises(DatasetError) as caught:
        read_dataset("msrvtt", root)
    message = str(caught.value)
    assert message.startswith("4 rows are malformed:")
    assert f"{root / 'MSRVTT_data.json'}, sentences, entry 4: expected 'caption' with a text, found" in message
    assert f"{root / 'MSRVTT_train.9k.csv'}, line 2: expected a video with captions, found 'video77'" in message
    assert "line 3: expected key,vid_key,video_id,sentence, found 'ret1,msr1,video9770'" in message
    assert "line 4: expected one caption for each video, found a second of video9770" in message


def test_captioned_videos_without_annotations_are_refused(place):
    root = place({}, "all/video0.mp4")
    with pytest.raises(DatasetError, match=r"nothing that tells their splits and captions.*MSRVTT_data\.json"):
        read_dataset("msrvtt", root)


def test_msrvtt_from_annotations_to_store(place, extract_rows):
    store = extract_rows("msrvtt", place(CLIP4CLIP), "video0.mp4", "video9770.mp4")
    assert [r["status"] for r in store.read_manifest(["status"]).to_pylist()] == ["ok", "failed", "ok"]
    assert store.read_captions().to_pylist()[-1] == {
        "caption_id": "video9770#0",
        "video_id": "video9770",
        "text": "a person is connecting something to system",
    }
    assert store.attributes["dataset"]["protocol"] == "1k-A-9k"


SQUIRREL = "-4wsuPCjDBc_5_15"
MSVD_LISTS = {"train_list.txt": f"{SQUIRREL}\r\n", "val_list.txt": "b_1_2\n", "test_list.txt": "c_1_2\n"}
MSVD_CAPTIONS = {
    SQUIRREL: [["a", "squirrel", "eats"], ["an", "animal"]],
    "b_1_2": [["b"]],
    "c_1_2": [["c"]],
    "unused": [["d"]],
}
DESCRIPTIONS = (
    f"# This file\n# has comments\n\n{SQUIRREL} a squirrel is eating a peanut in it's shell\nb_1_2 b\nc_1_2 c\n"
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_msvd_captions_are_read_from_a_plain_pickle(place, protocol):
    root = place(
        {**MSVD_LISTS, "raw-captions.pkl": pickle.dumps(MSVD_CAPTIONS, protocol)}, f"YouTubeClips/{SQUIRREL}.avi"
    )
    assert rows(read_dataset("msvd", root)) == [
        (SQUIRREL, f"YouTubeClips/{SQUIRREL}.avi", "train", ("a squirrel eats", "an animal")),
        ("b_1_2", "YouTubeClips/b_1_2.avi", "val", ("b",)),
        ("c_1_2", "YouTubeClips/c_1_2.avi", "test", ("c",)),
    ]


def test_msvd_pickles_of_python_2_are_plain_too(tmp_path):
    (tmp_path / "two.pkl").write_bytes(b"(dp0\nS'a_1_2'\np1\n(lp2\n(lp3\nS'caf\\xc3\\xa9'\np4\naas.")
    assert load_plain_pickle(tmp_path / "two.pkl") == {"a_1_2": [["café"]]}


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"a": Evil()}, "found .*print"),
        ({"a": [("tuple",)]}, "found tuple"),
        ({"a": [[1]]}, "found int"),
        ({"a": None}, "found NoneType"),
        ({"a": b"bytes"}, "found"),
        ({"a": {1, 2}}, "found"),
        ({3: []}, "found int"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_of_anything_else_are_refused_and_run_nothing(tmp_path, capsys, value, found, protocol):
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(DatasetError, match=f"must be a pickle of str, list and dict alone: {found}"):
        load_plain_pickle(tmp_path / "raw.pkl")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [b"", b"no pickle", b"\x80\x05", b"\x80\x63.", b"cos\nsystem\n(S'true'\ntR."])
def test_what_is_no_pickle_is_refused(tmp_path, data):
    (tmp_path / "raw.pkl").write_bytes(data)
    with pytest.raises(DatasetError, match="must be a pickle of str, list and dict alone"):
        load_plain_pickle(tmp_path / "raw.pkl")


def test_a_list_that_holds_itself_is_walked_once(tmp_path):
    circle = []
    circle.append(circle)
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(circle))
    assert len(load_plain_pickle(tmp_path / "raw.pkl")) == 1


def test_msvd_captions_are_read_from_the_corpus_text(place):
    root = place({**MSVD_LISTS, "AllVideoDescriptions.txt": DESCRIPTIONS})
    assert read_dataset("msvd", root)[0].captions == ("a squirrel is eating a peanut in it's shell",)


def test_msvd_ids_without_captions_are_refused(place):
    root = place({**MSVD_LISTS, "val_list.txt": "b_1_2\nnone_1_2\n", "raw-captions.pkl": pickle.dumps(MSVD_CAPTIONS)})
    with pytest.raises(DatasetError, match=r"val_list\.txt are malformed:\n  line 2: expected an id with captions in"):
        read_dataset("msvd", root)
    with pytest.raises(DataNotFoundError, match=r"expected raw-captions\.pkl or AllVideoDescriptions\.txt in one of"):
        read_dataset("msvd", root, annotations=place({"only/train_list.txt": "x\n"}) / "only")


def test_msvd_from_annotations_to_store(place, extract_rows):
    root = place({**MSVD_LISTS, "raw-captions.pkl": pickle.dumps(MSVD_CAPTIONS)})
    store = extract_rows("msvd", root, f"YouTubeClips/{SQUIRREL}.mp4", "YouTubeClips/c_1_2.mp4")
    assert [tuple(r.values()) for r in store.read_manifest(["split", "status"]).to_pylist()] == [
        ("train", "ok"),
        ("val", "failed"),
        ("test", "ok"),
    ]
    assert len(store.read_captions()) == 4


CLIP = "5-xGskbsBgI_000055_000065"
VATEX = {
    "vatex_training_v1.0.json": [{"videoID": CLIP, "enCap": ["one", "two"], "chCap": ["一"]}],
    "vatex_validation_v1.0.json": [{"videoID": "_a_b_c_d_e__000001_000011", "enCap": ["three"]}],
    "vatex_public_test_english_v1.1.json": [{"videoID": "cccccccccc1_000001_000011", "enCap": ["four"]}],
}


def test_vatex_english_captions_are_read(place):
    root = place(VATEX, f"train_video/{CLIP}.mp4", "val/_a_b_c_d_e_.mp4")
    assert rows(read_dataset("vatex", root)) == [
        (CLIP, f"train_video/{CLIP}.mp4", "train", ("one", "two")),
        ("_a_b_c_d_e__000001_000011", "val/_a_b_c_d_e_.mp4", "val", ("three",)),
        ("cccccccccc1_000001_000011", "test/cccccccccc1_000001_000011.mp4", "test", ("four",)),
    ]


def test_vatex_private_test_has_no_captions(place):
    root = place({"vatex_private_test_without_annotations.json": [{"videoID": CLIP}]})
    assert [(r.split, r.captions) for r in read_dataset("vatex", root)] == [("private_test", ())]


def test_vatex_lists_of_side4video_are_a_protocol(place):
    root = place(
        {
            "vatex_data/vatex_data.json": {CLIP: {"enCap": ["one"]}, "cccccccccc1_000001_000011": {"enCap": ["two"]}},
            "vatex_data/train_list.txt": f"{CLIP}\n",
            "vatex_data/test_list.txt": "cccccccccc1_000001_000011\n",
        },
        f"train_video/{CLIP}.mp4",
    )
    records = read_dataset("vatex", root, protocol="hgr", annotations=root / "vatex_data")
    assert [(r.path, r.split) for r in records] == [
        (f"train_video/{CLIP}.mp4", "train"),
        ("test/cccccccccc1_000001_000011.mp4", "test"),
    ]
    with pytest.raises(DatasetError, match=r"--protocol hgr reads vatex_data\.json"):
        read_dataset("vatex", root, annotations=root / "vatex_data")


def test_vatex_entries_that_are_malformed_are_told(place):
    root = place({**VATEX, "vatex_training_v1.0.json": [{"videoID": "x", "enCap": ["a"]}, {"videoID": CLIP}]})
    with pytest.raises(DatasetError) as caught:
        read_dataset("vatex", root)
    assert "entry 1: expected YOUTUBEID_START_END, six digits each, found 'x'" in str(caught.value)
    assert "entry 2: expected 'enCap' with texts, found" in str(caught.value)


def test_vatex_from_annotations_to_store(place, extract_rows):
    store = extract_rows("vatex", place(VATEX), f"train_video/{CLIP}.mp4")
    assert [r["status"] for r in store.read_manifest(["status"]).to_pylist()] == ["ok", "failed", "failed"]
    assert store.read_captions()["text"].to_pylist() == ["one", "two", "three", "four"]
    assert store.attributes["dataset"]["protocol"] == "official"
