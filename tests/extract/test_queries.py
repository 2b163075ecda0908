"""Data sets of temporal grounding: every form in which their annotations are found, as miniatures with made-up ids."""

import json
import logging
from dataclasses import asdict

import numpy as np
import pytest

from s4v.errors import DatasetError
from s4v.extract.datasets import FACTS, check_folder, read_dataset
from s4v.extract.datasets._queries import as_scores, read_moment
from s4v.extract.datasets.report import render_check, render_facts
from s4v.store.moments import Moments, moment_table
from s4v.store.records import Moment
from s4v.train.tasks.grounding_targets import make_target

CAT = {
    "qid": 4711,
    "query": "A cat jumps on a table.",
    "duration": 150,
    "vid": "aB3-x_Yz012_60.0_210.0",
    "relevant_windows": [[10, 16], [40, 42]],
    "relevant_clip_ids": [5, 6, 7, 20],
    "saliency_scores": [[4, 4, 2], [3, 4, 2], [2, 2, 3], [0, 1, 3]],
    "split_of_nobody": "x",
}


@pytest.fixture
def place(tmp_path):
    """Write values as JSON, a list as lines of it, texts as they are, and empty videos, below a root."""

    def write(files, *videos):
        root = tmp_path / "root"
        for name, value in {**files, **dict.fromkeys(videos, "")}.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(value, list):
                value = "".join(json.dumps(one) + "\n" for one in value)
            file.write_text(value if isinstance(value, str) else json.dumps(value))
        return root

    return write


def moments_of(records):
    """By query id, as a store has them."""
    return {moment.query_id: moment for moment in Moments(moment_table(records))}


def test_qvhighlights_from_lines_to_targets(place):
    other = {**CAT, "qid": "t1", "query": "it sleeps", "vid": "__-_a_bcdefg_0.0_150.0"}
    hidden = {key: value for key, value in other.items() if not key.startswith(("relevant", "saliency"))}
    root = place(
        {"highlight_train_release.jsonl": [CAT, {**CAT, "qid": 4712, "query": "it leaves", "relevant_windows": []}],
         "annotations/highlight_test_release.jsonl": [hidden]},
        "videos/aB3-x_Yz012_60.0_210.0.mp4",
    )  # fmt: skip
    records = read_dataset("qvhighlights", root)
    cat, unseen = records[1], records[0]
    assert (cat.path, cat.split, cat.source_id) == ("videos/aB3-x_Yz012_60.0_210.0.mp4", "train", "aB3-x_Yz012")
    assert (unseen.path, unseen.split, unseen.source_id) == ("__-_a_bcdefg_0.0_150.0.mp4", "test", "__-_a_bcdefg")
    assert cat.captions == ("A cat jumps on a table.", "it leaves")
    moments = moments_of(records)
    assert moments["4711"] == Moment(
        query_id="4711",
        split="train",
        duration_s=150.0,
        windows=((10.0, 16.0), (40.0, 42.0)),
        clip_s=2.0,
        clip_ids=(5, 6, 7, 20),
        scores=((4, 4, 2), (3, 4, 2), (2, 2, 3), (0, 1, 3)),
    )
    assert moments["4712"].windows == () and moments["t1"].windows is None and moments["t1"].scores is None
    target = make_target(moments["4711"], fps=0.5, num_frames=75)
    assert target.positives.tolist() == [5, 6, 7, 20] and target.saliency[5] == np.float32(10 / 12)
    assert len(make_target(moments["4711"], fps=0.5, num_frames=71).saliency) == 71, "a file that ends early"


def test_qvhighlights_takes_the_tests_truths_where_they_are_there(place):
    hidden = {**CAT, "relevant_windows": None, "relevant_clip_ids": None, "saliency_scores": None}
    root = place({"highlight_test_release.jsonl": [hidden], "highlight_test_with_gt.jsonl": [CAT]})
    assert moments_of(read_dataset("qvhighlights", root))["4711"].windows == ((10.0, 16.0), (40.0, 42.0))


def test_qvhighlights_adds_subtitles_where_they_are_asked_for(place):
    spoken = {"qid": 7, "query": "so I said", "duration": 150, "vid": CAT["vid"], "relevant_windows": [[2, 4]]}
    spoken["relevant_clip_ids"] = [1]
    root = place(
        {"highlight_train_release.jsonl": [CAT], "subs_train.jsonl": [spoken, {**spoken, "qid": 8, "vid": "x_1_2"}]}
    )
    assert set(moments_of(read_dataset("qvhighlights", root))) == {"4711"}
    records = read_dataset("qvhighlights", root, protocol="with-subtitles")
    assert [record.split for record in records] == ["train", "subs_train"]
    moments = moments_of(records)
    assert [moments[name].split for name in ("4711", "7", "8")] == ["train", "subs_train", "subs_train"]
    assert moments["7"].windows == ((2.0, 4.0),) and moments["7"].scores is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relevant_windows": [[1]]}, "expected relevant_windows such as"),
        ({"relevant_windows": [["1", 2]]}, "expected numbers of a window, found '1'"),
        ({"relevant_windows": [[1, float("nan")]]}, "expected numbers of a window, found nan"),
        ({"relevant_clip_ids": [5, 6, 7]}, "expected a score for each of 3 clips, found 4"),
        ({"relevant_clip_ids": [5, 6, 7, 7]}, "expected relevant_clip_ids"),
        ({"relevant_clip_ids": [5, 6, 7, 75]}, "clip 75 of 2 s begins at 150 s, and the video ends at 150 s"),
        ({"saliency_scores": [[5, 0, 0]] * 4}, "expected whole scores from 0 to 4, found 5"),
        ({"saliency_scores": [[1], [1, 2], [1], [1]]}, "expected as many scores of each clip"),
        ({"duration": 0}, "expected 'duration' above 0, found 0"),
        ({"duration": True}, "expected numbers of 'duration', found True"),
        ({"query": " "}, "expected 'query' with a text"),
        ({"vid": "../up"}, "expected a path below"),
        ({"qid": [1]}, "expected 'qid' with a text"),
        ({"qid": 4711}, "query id '4711' occurs a second time: it was one of aB3-x_Yz012_60.0_210.0"),
    ],
)
def test_malformed_lines_are_told_with_their_place(place, changes, message):
    root = place({"highlight_val_release.jsonl": [CAT, {**CAT, "qid": 1, **changes}]})
    with pytest.raises(DatasetError) as refusal:
        read_dataset("qvhighlights", root)
    told = str(refusal.value)
    assert told.startswith(f"1 rows of {root / 'highlight_val_release.jsonl'} are malformed:\n  line 2: ")
    assert message in told


def test_all_malformed_lines_are_told_at_once(place):
    lines = json.dumps(CAT) + '\n{"qid": 1,\n[1]\n"a"\n'
    root = place({"highlight_val_release.jsonl": lines})
    with pytest.raises(DatasetError, match="3 rows of .* are malformed:\n  line 2: expected JSON, .*\n  line 3: .*\n"):
        read_dataset("qvhighlights", root)


SENTENCES = "AB12C 24.3 30.4##person turns a light on.\nAB12C 0.0 35.5##he sits: a ## b\nZZ99Z 1.0 0.5##she runs.\r\n"
LENGTHS = 'id,subject,script,length\nAB12C,X,"a, b",30.96\n'


def test_charades_sta_from_text_to_targets(place):
    root = place(
        {"charades_sta_train.txt": SENTENCES, "charades_sta_test.txt": "QQ11Q 1 2##a\n",
         "Charades_v1_train.csv": LENGTHS},
        "Charades_v1_480/AB12C.mp4",
    )  # fmt: skip
    records = read_dataset("charades-sta", root)
    assert [(r.video_id, r.path, r.split) for r in records] == [
        ("AB12C", "Charades_v1_480/AB12C.mp4", "train"),
        ("QQ11Q", "QQ11Q.mp4", "test"),
        ("ZZ99Z", "ZZ99Z.mp4", "train"),
    ]
    assert records[0].captions == ("person turns a light on.", "he sits: a ## b")
    moments = moments_of(records)
    assert moments["train_1"] == Moment(query_id="train_1", split="train", duration_s=30.96, windows=((24.3, 30.4),))
    assert moments["train_2"].windows == ((0.0, 35.5),), "an end beyond the length is kept, and clamped in targets"
    assert moments["train_3"].duration_s is None
    target = make_target(moments["train_2"], fps=1, num_frames=31)
    assert target.windows.tolist() == [[0, 31]] and len(target.positives) == 31
    assert make_target(moments["train_3"], fps=1, num_frames=31).windows.tolist() == [[0.25, 1.25]]


def test_charades_sta_reads_lines_of_json_before_text(place):
    line = {"qid": 12, "query": "he sits", "duration": 30.96, "vid": "AB12C", "relevant_windows": [[24.3, 30.4]]}
    root = place({"charades_train.jsonl": [line], "charades_sta_train.txt": SENTENCES})
    assert set(moments_of(read_dataset("charades-sta", root))) == {"12"}


def test_charades_sta_holds_out_a_tenth_of_its_training_videos(place):
    train = "".join(f"V{number:04d} 1 2##a\n" for number in range(1000))
    root = place({"charades_sta_train.txt": train, "charades_sta_test.txt": "T0001 1 2##a\n"})
    assert {record.split for record in read_dataset("charades-sta", root)} == {"train", "test"}
    records = read_dataset("charades-sta", root, protocol="held-out")
    held_out = {record.video_id for record in records if record.split == "val"}
    assert 70 < len(held_out) < 130
    assert {moment.query_id for moment in Moments(moment_table(records)) if moment.split == "val"} == {
        f"train_{int(name[1:]) + 1}" for name in held_out
    }
    fewer = place({"charades_sta_train.txt": train[: 13 * 100]})
    again = read_dataset("charades-sta", fewer, protocol="held-out")
    assert {r.video_id for r in again if r.split == "val"} == held_out & {r.video_id for r in again}, (
        "by the name alone"
    )


@pytest.mark.parametrize(
    "line", ["AB12C 24.3 30.4 he sits", "AB12C 24.3##he sits", "AB12C a b##he sits", "AB12C 1 2## "]
)
def test_malformed_sentences_are_told(place, line):
    root = place({"charades_sta_test.txt": f"AB12C 1 2##good\n{line}\n"})
    with pytest.raises(
        DatasetError, match=r"1 rows of .* are malformed:\n  line 2: expected .*VIDEO START END##SENTENCE"
    ):
        read_dataset("charades-sta", root)


def test_tables_of_lengths_without_lengths_are_told(place):
    root = place({"charades_sta_test.txt": "AB12C 1 2##good\n", "Charades_v1_test.csv": "id,name\nAB12C,x\n"})
    with pytest.raises(DatasetError, match="line 1: expected the columns id and length, found id, name"):
        read_dataset("charades-sta", root)


TALL = {
    "s10-d20.avi": {"fps": 25.0, "num_frames": 1000, "timestamps": [[50, 100], [900, 1100]], "sentences": ["a", "b"]}
}


def test_tacos_counts_in_frames_and_leaves_the_camera_out(place):
    root = place({"TACoS/train.json": TALL, "TACoS/val.json": {}}, "s10-d20-cam-002.avi")
    records = read_dataset("tacos", root)
    assert [(r.video_id, r.path, r.split) for r in records] == [("s10-d20", "s10-d20-cam-002.avi", "train")]
    moments = moments_of(records)
    assert moments["s10-d20_0"] == Moment(query_id="s10-d20_0", split="train", duration_s=40.0, windows=((2.0, 4.0),))
    assert make_target(moments["s10-d20_1"], fps=0.5, num_frames=20).positives.tolist() == [18, 19]


def test_tacos_in_lines_has_texts_for_query_ids(place):
    line = {"qid": "s10-d20_0", "query": "he cuts", "duration": 40.0, "vid": "s10-d20", "relevant_windows": [[2, 4]]}
    root = place({"tacos_train.jsonl": [line], "tacos_val.jsonl": [{**line, "vid": "s11-d01.avi"}]}, "s10-d20.avi")
    records = read_dataset("tacos", root)
    assert [(r.video_id, r.path) for r in records] == [
        ("s10-d20", "s10-d20.avi"),
        ("s11-d01", "s11-d01-cam-002.mp4"),
    ]
    assert records[0].moments[0].query_id == "s10-d20_0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "expected 'fps' above 0"),
        ({"timestamps": [[1, 2]]}, "expected times for each sentence, found 1 of 2"),
        ({"timestamps": None}, "expected fps, num_frames, timestamps and sentences"),
        ({"sentences": ["a", 3]}, "s10-d20.avi, sentence 2: expected a sentence, found 3"),
        ({"timestamps": [[1, 2], [3]]}, "s10-d20.avi, sentence 2: expected relevant_windows"),
    ],
)
def test_malformed_videos_of_tacos_are_told(place, changes, message):
    root = place({"test.json": {"s10-d20.avi": {**TALL["s10-d20.avi"], **changes}}})
    with pytest.raises(DatasetError) as refusal:
        read_dataset("tacos", root)
    assert message in str(refusal.value) and f"1 rows of {root / 'test.json'}" in str(refusal.value)


def ego4d(*queries, **clip):
    annotations = [{"annotation_uid": "a", "language_queries": list(queries)}]
    clip = {"clip_uid": "c", "video_start_sec": 10.0, "video_end_sec": 490.0, "annotations": annotations, **clip}
    return {"version": "1", "videos": [{"video_uid": "u", "clips": [clip]}]}


ASKED = {"clip_start_sec": 43.2, "clip_end_sec": 45.0, "video_start_sec": 53.2, "query": "where is the cup?"}


def test_ego4d_counts_entries_without_a_question(place):
    point = {**ASKED, "clip_end_sec": 43.2, "query": "who came?"}
    root = place(
        {"v1/annotations/nlq_train.json": ego4d({**ASKED, "query": None}, ASKED, {"template": "x"}, point),
         "nlq_test_unannotated.json": ego4d({"query": "what?"}, clip_uid="d")},
        "clips/c.mp4",
    )  # fmt: skip
    records = read_dataset("ego4d-nlq", root)
    assert [(r.video_id, r.path, r.split, r.start_s) for r in records] == [
        ("c", "clips/c.mp4", "train", None),
        ("d", "d.mp4", "test", None),
    ]
    moments = moments_of(records)
    assert set(moments) == {"a_1", "a_3", "a_0"}
    assert moments["a_1"].windows == ((43.2, 45.0),) and moments["a_1"].duration_s == 480.0, "seconds of the clip"
    assert moments["a_0"].windows is None
    assert make_target(moments["a_3"], fps=0.5, num_frames=240).positives.tolist() == [22], "a window of no length"


def test_a_clip_of_ego4d_may_be_a_part_of_its_whole_video(place):
    root = place({"nlq_val.json": ego4d(ASKED)}, "full/u.mp4")
    (record,) = read_dataset("ego4d-nlq", root)
    assert (record.path, record.start_s, record.end_s, record.source_id) == ("full/u.mp4", 10.0, 490.0, "u")


def test_ego4d_in_lines(place):
    line = {"qid": "a_1", "query": "where?", "duration": 480, "vid": "c", "relevant_windows": [[1, 1]]}
    assert set(moments_of(read_dataset("ego4d-nlq", place({"nlq_val.jsonl": [line]})))) == {"a_1"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ego4d({**ASKED, "clip_end_sec": None}), "annotation 1, query 0: expected clip_start_sec with clip_end_sec"),
        (
            ego4d(ASKED, video_end_sec=10.0),
            "video 1, clip 1: the clip ends at 10 s of its video, before or at its start",
        ),
        (ego4d(ASKED, video_start_sec=None), "video 1, clip 1: expected 'video_start_sec' in seconds"),
        (ego4d(ASKED, annotations=None), "video 1, clip 1: expected an object with the list 'annotations'"),
        ({"videos": [{"clips": []}]}, "video 1: expected 'video_uid' with a text"),
        ({"clips": []}, 'expected an object with "videos"'),
    ],
)
def test_malformed_clips_of_ego4d_are_told(place, data, message):
    root = place({"nlq_val.json": data})
    with pytest.raises(DatasetError) as refusal:
        read_dataset("ego4d-nlq", root)
    assert message in str(refusal.value)


YOUTUBE = {"frames": 300, "fps": 25.0, "clip": [[0, 100], [50, 150], [100, 200]], "match": [-1, 0, 1]}


def test_youtube_highlights_from_json_to_targets(place, caplog):
    named = {**YOUTUBE, "info": ["a", "b", 1, 2, 3, "surfing", "c"]}
    videos = {"-vid_1": named, "vid2": {**named, "match": [1]}, "vid3": {**named, "match": [0, 0]}}
    splits = {"surfing": {"train": ["-vid_1"], "val": ["vid2", "gone"]}}
    root = place({"youtube_anno.json": videos, "youtube_splits.json": splits}, "-vid_1.mp4")
    with caplog.at_level(logging.WARNING):
        records = read_dataset("youtube-highlights", root)
    assert "1 of 2 videos are not below" in caplog.text
    assert [(r.video_id, r.path, r.split, r.class_name, r.captions) for r in records] == [
        ("-vid_1", "-vid_1.mp4", "train", "surfing", ("surfing",)),
        ("vid2", "vid2.mp4", "val", "surfing", ("surfing",)),
    ]
    moment = moments_of(records)["-vid_1"]
    assert (moment.duration_s, moment.clip_s, moment.windows) == (12.0, 4.0, None)
    assert moment.clip_ids == (0, 1, 2) and moment.scores == ((-1,), (0,), (1,))
    target = make_target(moment, fps=1 / moment.clip_s, num_frames=3)
    assert target.saliency.tolist() == [0, 0.5, 1] and target.positives.tolist() == [2]


def test_youtube_highlights_without_splits_holds_some_out(place, caplog):
    videos = {f"v{number}": {**YOUTUBE, "domain": "dog"} for number in range(10)}
    with caplog.at_level(logging.WARNING):
        records = read_dataset("youtube-highlights", place({"youtube_anno.json": videos}))
    assert [record.split for record in records].count("val") == 2 and "no split given" in caplog.text
    assert {moment.split for moment in Moments(moment_table(records))} == {"train", "val"}


def test_youtube_highlights_in_lines(place):
    line = {
        "qid": "v",
        "query": "dog",
        "vid": "v",
        "duration": 12.0,
        "label": [[0], [0], [1]],
        "domain": "dog",
        **YOUTUBE,
    }
    root = place(
        {"youtube_highlight_train_release.jsonl": [line], "youtube_highlight_val_release.jsonl": [{**line, "vid": "w"}]}
    )
    records = read_dataset("youtube-highlights", root)
    assert [(r.video_id, r.split, r.class_name) for r in records] == [("v", "train", "dog"), ("w", "val", "dog")]
    assert records[0].moments[0].scores == ((-1,), (0,), (1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": []}, "expected frames, fps and match"),
        ({"match": [2]}, "expected whole scores from -1 to 1, found 2"),
        ({"domain": "cat"}, "expected a domain, one of dog, gymnastics"),
        ({"frames": 1, "match": [0] * 9}, "expected clips of at least 0.01 s"),
    ],
)
def test_malformed_labels_are_told(place, changes, message):
    root = place({"youtube_anno.json": {"v": {**YOUTUBE, "domain": "dog", **changes}}})
    with pytest.raises(DatasetError) as refusal:
        read_dataset("youtube-highlights", root)
    assert message in str(refusal.value)


def test_splits_of_another_form_are_told(place):
    root = place({"youtube_anno.json": {}, "youtube_splits.json": ["a"]})
    with pytest.raises(DatasetError, match="expected ids by domain and split"):
        read_dataset("youtube-highlights", root)


INFO = "category\tvideo_id\ttitle\turl\tlength\nVT\tJ0nA4VgnoCo\tA tyre\tu\t0:10\nVT\tmadeUp_-001\tAnother\tu\t0:04\n"


def test_tvsum_from_its_tables_to_targets(place):
    # A score a frame, the same in each two seconds: 30 frames a second, 10 s.
    scores = [[1, 1, 2, 5, 3], [1, 3, 2, 5, 3]]
    rows = ["J0nA4VgnoCo\tVT\t" + ",".join(str(s) for s in row for _ in range(60)) for row in scores]
    rows += ["madeUp_-001\tVT\t4,4"]
    records = read_dataset(
        "tvsum", place({"ydata-tvsum50-anno.tsv": "\n".join(rows) + "\n", "ydata-tvsum50-info.tsv": INFO})
    )
    assert [(r.video_id, r.split, r.class_name, r.captions) for r in records] == [
        ("J0nA4VgnoCo", "val", "VT", ("A tyre",)),
        ("madeUp_-001", "train", "VT", ("Another",)),
    ]
    moment = moments_of(records)["J0nA4VgnoCo"]
    assert moment.scores == ((1, 1), (1, 3), (2, 2), (5, 5), (3, 3)) and moment.duration_s == 10.0
    target = make_target(moment, fps=0.5, num_frames=5)
    np.testing.assert_allclose(target.saliency, [0, 0.25, 0.25, 1, 0.5])
    assert target.positives.tolist() == [3, 4]
    assert moments_of(records)["madeUp_-001"].scores == ((4,), (4,))


def test_tvsum_from_umts_json(place):
    entry = {"title": "A tyre", "anno": [[1] * 20, [5] * 20, [3] * 20]}
    root = place({"tvsum_anno.json": {"madeUp_-001": entry, "cjibtmSLxQ4": {**entry, "frames": 180, "fps": 30}}})
    records = read_dataset("tvsum", root)
    assert [record.split for record in records] == ["val", "train"]
    moments = moments_of(records)
    assert moments["cjibtmSLxQ4"].duration_s == 6.0 and moments["madeUp_-001"].duration_s is None
    assert make_target(moments["madeUp_-001"], fps=0.5, num_frames=3).saliency.tolist() == [0, 1, 0.5]


def test_durations_of_tvsum_may_count_clips(place):
    line = {"vid": "v", "query": "A tyre", "duration": 3, "label": [[1] * 20, [5] * 20, [3] * 20], "domain": "VT"}
    root = place({"tvsum_train.jsonl": [line], "tvsum_val.jsonl": [{**line, "vid": "w", "duration": 6.1}]})
    records = read_dataset("tvsum", root)
    assert [record.moments[0].duration_s for record in records] == [6.0, 6.1]
    assert [(record.split, record.class_name) for record in records] == [("train", "VT"), ("val", "VT")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("other\tVT\t1,2", "line 1: expected a video of ydata-tvsum50-info.tsv"),
        ("madeUp_-001\tVT", "line 1: expected a video of ydata-tvsum50-info.tsv"),
        ("madeUp_-001\tVT\t1,x", "line 1: "),
        ("madeUp_-001\tVT\t0,1", "expected whole scores from 1 to 5, found 0"),
        ("madeUp_-001\tVT\t1,2\nmadeUp_-001\tVT\t1,2,3", "expected as many scores of each annotator, found 2 to 3"),
    ],
)
def test_malformed_rows_of_tvsum_are_told(place, row, message):
    root = place({"ydata-tvsum50-anno.tsv": row + "\n", "ydata-tvsum50-info.tsv": INFO})
    with pytest.raises(DatasetError) as refusal:
        read_dataset("tvsum", root)
    assert message in str(refusal.value)


def test_titles_without_lengths_are_told(place):
    root = place({"ydata-tvsum50-anno.tsv": "", "ydata-tvsum50-info.tsv": INFO.replace("0:10", "long")})
    with pytest.raises(DatasetError, match="line 2: expected a length such as 5:54, found 'long'"):
        read_dataset("tvsum", root)


def test_whole_scores_may_be_written_as_fractions():
    assert as_scores([[1.0, 2.0]], (0, 4)) == ((1, 2),)
    with pytest.raises(ValueError, match=r"expected whole scores from 0 to 4, found 1\.5"):
        as_scores([[1.5]], (0, 4))
    assert read_moment({"saliency_scores": [], "relevant_windows": [[0, 1]]}, "1").scores is None


def test_counts_of_queries_are_told_and_checked(place):
    facts = render_facts(asdict(FACTS["qvhighlights"]))
    assert "queries    official: train 7218, val 1550, test 1542" in facts
    root = place({"highlight_train_release.jsonl": [CAT, {**CAT, "qid": 1, "vid": "x_1_2"}]}, f"{CAT['vid']}.mp4")
    checked = check_folder("qvhighlights", root)
    assert checked["queries"]["train"] == {"listed": 2, "expected": 7218, "missing": 1}
    assert checked["splits"]["train"] == {"listed": 2, "expected": 7100, "missing": 1}
    assert "train    2 queries, 7218 expected, 1 of videos that are missing" in render_check(checked)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("qvhighlights", "fps:0.5"),
        ("charades-sta", "fps:1"),
        ("ego4d-nlq", "fps:0.5"),
        ("tacos", "fps:0.5"),
        ("tvsum", "fps:0.5"),
        ("youtube-highlights", "fps:labels"),
    ],
)
def test_recipes_are_at_the_rates_of_the_reference(name, sampling):
    recipe = FACTS[name].recipe
    assert (recipe.sampling, recipe.resize, recipe.frames, recipe.network) == (sampling, "224", {}, "r2-tuning")
