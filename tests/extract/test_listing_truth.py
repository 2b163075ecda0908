"""Listing tells the truth: what is a row, in which split and class, and what is none and why.

Each test names the fault that it is for. `outcome` makes errors values, so that a test fails by its assertion.
"""

import errno
import json
import os
import shutil
import unicodedata
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from s4v.cli import app
from s4v.errors import ConfigError, EnvironmentFailedError, S4vError
from s4v.extract.datasets import _files, read_dataset
from s4v.extract.decode.frame_folder import list_frames
from s4v.extract.decode.video_file import DecodeFailure
from s4v.extract.decode.worker import decode
from s4v.extract.extraction import extract_dataset
from s4v.extract.scan import scan_dataset
from s4v.extract.segments import list_rows
from s4v.extract.target import Target
from s4v.store.reader import open_store

E_NFC, E_NFD = (unicodedata.normalize(form, "café.mp4") for form in ("NFC", "NFD"))


def outcome(name, root, *fields, **options):
    """The records' fields, or what the listing raises."""
    try:
        records = read_dataset(name, root, **options)
    except (S4vError, OSError, UnicodeError) as error:
        return str(error)
    return [tuple(getattr(record, field) for field in fields) for record in records]


def read_table(root, text, *fields, name="t.csv", **options):
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return outcome("table", root, *fields, annotations=root / name, **options)


def read_list(root, text, *fields, name="train.txt"):
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return outcome("lists", root, *fields, annotations=root / name)


# A9: names of splits.


def test_spellings_of_a_split_in_a_table_are_one_split(place):
    """A9"""
    rows = ["train", "Train", " Training ", "val", "VALIDATION", "valid", "Test", "testing", "dev", "Dev", "novel"]
    text = "path,label,split\n" + "".join(f"{i:02d}.mp4,x,{split}\n" for i, split in enumerate(rows))
    assert read_table(place({}, "x"), text, "split") == [
        *[("train",)] * 3,
        *[("val",)] * 3,
        *[("test",)] * 2,
        *[("dev",)] * 2,
        ("novel",),
    ]


def test_spellings_of_a_split_are_folded_in_folders_json_and_lists_too(place):
    """A9"""
    folders = place({}, "Training/run/a.mp4", "VALIDATION/run/b.mp4", "testing/run/c.mp4")
    assert outcome("folder", folders, "split", "class_name") == [
        ("train", "run"),
        ("val", "run"),
        ("test", "run"),
    ]
    lines = '{"path": "a.mp4", "split": "TRAIN"}\n{"path": "b.mp4", "split": "train "}\n'
    assert read_table(folders, lines, "split", name="t.jsonl") == [("train",)] * 2
    videos = [{"video_id": f"video{i}", "split": split} for i, split in enumerate(("Train", "validation ", "TEST"))]
    sentences = [{"video_id": f"video{i}", "caption": "x"} for i in range(3)]
    (folders / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    assert outcome("msrvtt", folders, "split", protocol="full") == [("train",), ("val",), ("test",)]


def test_a_wanted_split_may_be_spelled_as_annotations_do(place):
    """A9"""
    root = place({}, "train/run/a.mp4", "val/run/b.mp4")
    assert outcome("folder", root, "split", splits=["Validation"]) == [("val",)]


# A10: endings, and what is not taken.

ENDINGS = ".mxf .vob .asf .f4v .gif .m2v .nut .divx .dv .rm .rmvb .m1v .mpv .mjpeg .y4m .ogm .qt .3g2 .amv .MXF .m2t"


def test_videos_of_rarer_kinds_are_listed(place):
    """A10"""
    paths = sorted((f"run/{i:02d}{ending}" for i, ending in enumerate(ENDINGS.split())), key=str.encode)
    assert outcome("folder", place({}, *paths), "path") == [(path,) for path in paths]


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("vob", "mpeg2video"), ("asf", "mpeg4"), ("nut", "mpeg4"), ("gif", "gif"), ("m2v", "mpeg2video"), ("qt", "mpeg4")],
)
def test_videos_of_rarer_kinds_decode(tmp_path, make_config, ending, codec):
    """A10"""
    import av

    formats = {"qt": "mov", "m2v": "mpeg2video"}
    path = tmp_path / "videos/run" / f"v.{ending}"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w", format=formats.get(ending)) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if codec == "gif" else "yuv420p"
        for grey in range(0, 240, 30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    summary = scan_dataset(make_config(tmp_path / "videos", tmp_path / "x", num_decoders=1), tmp_path / "scan.parquet")
    assert summary["videos"] == {"ok": 1, "failed": 0, "pending": 0}


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tiff"])
def test_folders_of_numbered_pictures_are_videos_whatever_their_format(place, make_frames, ending):
    """A10"""
    root = place({})
    make_frames(root / "run/jpeg")
    make_frames(root / "run/other", name="img_{:05d}." + ending)
    assert outcome("folder", root, "path") == [("run/jpeg",), ("run/other",)]
    request = dict(path=str(root / "run/other"), num_frames=3, sampling="uniform", resize="224", image_size=(64, 64))
    request.update(start_s=None, end_s=None, decoder="auto", frame_fps=None)
    facts, pixels = decode(request, lambda _: None)
    assert facts["num_frames"] == 6
    assert np.abs(pixels[0, :, 0, 32, 32, 0].astype(int) - [30, 70, 110]).max() <= 3


def test_masks_beside_jpeg_frames_are_no_frames(make_frames, tmp_path):
    """A10"""
    folder = make_frames(tmp_path / "v", num_frames=3)
    for number in range(1, 4):
        Image.new("P", (80, 64)).save(folder / f"{number:05d}.png")
    assert [file.suffix for file in list_frames(folder)] == [".jpg"] * 3


def test_pictures_of_more_than_eight_bits_are_no_film(tmp_path):
    """A10"""
    (tmp_path / "v").mkdir()
    Image.fromarray(np.full((48, 64), 4000, np.uint16)).save(tmp_path / "v/1.png")
    request = dict(path=str(tmp_path / "v"), num_frames=1, sampling="uniform", resize="224", image_size=(64, 64))
    with pytest.raises(DecodeFailure, match=r"1\.png: expected 8-bit colours, found I"):
        decode({**request, "start_s": None, "end_s": None, "decoder": "auto", "frame_fps": None}, lambda _: None)


def test_files_that_are_not_taken_are_counted_in_one_line(place, caplog):
    """A10"""
    stray = ["run/a.xyz", "b.txt", "run/c.txt", "d.TXT", "README", "run/none", "jump/e f"]
    root = place({}, "run/a.mp4", "jump/b.mp4", ".hidden", "run/.DS_Store", *stray)
    read_dataset("folder", root)
    assert f"7 files were not taken for videos: 3 .txt, 3 without an ending, 1 .xyz (below {root})" in caplog.messages


def test_what_is_read_or_belongs_to_a_video_is_not_counted(place, make_frames, caplog):
    """A10"""
    table = "label,youtube_id,time_start,time_end,split\nrun,-3B32lodo2M,59,69,train\nrun,-3B32lodo2N,59,69,train\n"
    root = place({"train.csv": table, "notes.md": "x"}, "train/run/-3B32lodo2M_000059_000069.mp4")
    make_frames(root / "train/run/-3B32lodo2N_000059_000069")
    (root / "train/run/-3B32lodo2N_000059_000069/flow_x_00001.jpg").touch()
    shutil.copytree(root / "train/run/-3B32lodo2N_000059_000069", root / "old.zarr/c")
    (root / "old.zarr/zarr.json").touch()
    assert len(read_dataset("k400", root)) == 2
    assert [m for m in caplog.messages if "not taken" in m] == [
        f"1 file was not taken for videos: 1 .md (below {root})"
    ]


def test_videos_that_no_annotation_names_are_counted(place, caplog):
    """A10"""
    table = "label,youtube_id,time_start,time_end,split\nrun,-3B32lodo2M,59,69,train\n"
    root = place({"train.csv": table}, "train/run/-3B32lodo2M_000059_000069.mp4", "train/run/other.mp4")
    read_dataset("k400", root)
    assert "1 of 2 videos below" in caplog.text
    assert "are in no annotation that was read, and are no rows: train/run/other.mp4" in caplog.text


def test_scan_tells_what_is_not_taken(place, one_video, make_config, tmp_path, caplog):
    """A10"""
    root = place({"run/a.mp4": one_video.read_bytes()}, "run/a.srt", "run/b.srt")
    scan_dataset(make_config(root, tmp_path / "x", num_decoders=1), tmp_path / "scan.parquet")
    assert "2 files were not taken for videos: 2 .srt" in caplog.text


def test_rows_of_files_that_are_not_named_as_videos_are_counted(place, make_frames, caplog):
    """A7, A10: playlists, pictures, a column of something else."""
    root = place({}, "a.mp4", "x.m3u8", "b.txt", "blob")
    make_frames(root / "frames.v2")
    assert len(read_table(root, "path\na.mp4\nx.m3u8\nb.txt\nblob\nframes.v2\n", "path")) == 5
    assert "2 rows name files without a video's ending (b.txt, x.m3u8)" in caplog.text
    caplog.clear()
    assert len(read_list(root, "a.mp4\nx.m3u8\n", "path")) == 2
    assert "1 rows name files without a video's ending (x.m3u8)" in caplog.text


# A12: tables.


@pytest.mark.parametrize("address", ["https://x.org/a.mp4", "s3://bucket/a.mp4", "file:///tmp/a.mp4", "RTSP://h/a"])
def test_addresses_are_refused_with_the_remedy(place, address):
    """A12"""
    root = place({}, "b.mp4")
    message = f"found the address '{address}': download the video, and name its file below {root}"
    assert f"line 2: {message}" in read_table(root, f"path\n{address}\nb.mp4\n", "path")
    assert f"line 1: {message}" in read_list(root, f"{address} 0\nb.mp4 1\n", "path")


def test_backslashes_part_folders_unless_they_are_in_a_name(place):
    """A12"""
    root = place({}, "v/a.mp4", "odd\\name.mp4")
    text = "path\nv\\a.mp4\nodd\\name.mp4\ngone\\c.mp4\n"
    assert read_table(root, text, "video_id", "path") == [
        ("gone/c.mp4", "gone/c.mp4"),
        ("odd\\name.mp4", "odd\\name.mp4"),
        ("v/a.mp4", "v/a.mp4"),
    ]
    assert read_list(root, "v\\a.mp4 0\nodd\\name.mp4 0\n", "path") == [("odd\\name.mp4",), ("v/a.mp4",)]


@pytest.mark.parametrize(("there", "written"), [(E_NFD, E_NFC), (E_NFC, E_NFD)])
def test_accents_are_one_however_they_are_spelled(place, there, written):
    """A12"""
    root = place({}, f"v/{there}")
    assert read_table(root, f"path,split\nv/{written},train\n", "video_id", "path") == [(f"v/{written}", f"v/{there}")]
    assert read_list(root, f"v/{written} 0\n", "path") == [(f"v/{there}",)]
    assert read_list(root, f"/data/of/them/v/{written} 0\n", "path") == [(f"v/{there}",)]


def test_accents_do_not_make_two_classes(place):
    """A12"""
    labels = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    text = "path,label\n" + "".join(f"{i}.mp4,{label}\n" for i, label in enumerate(labels))
    assert read_table(place({}, "x"), text, "class_name") == [(labels[0],)] * 2


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("hint", [False, True])
def test_tables_of_excel_are_read(place, delimiter, encoding, hint):
    """F3, A12"""
    lines = [["path", "label", "start", "end"], ["v/é.mp4", "eins, zwei", "0,5" if delimiter == ";" else "0.5", "2"]]
    quoted = [[f'"{field}"' if "," in field or delimiter in field else field for field in line] for line in lines]
    text = "\r\n".join(delimiter.join(line) for line in quoted) + "\r\n"
    text = (f"sep={delimiter}\r\n" if hint else "") + text
    assert read_table(place({}, "x"), text.encode(encoding), "path", "class_name", "start_s", "end_s") == [
        ("v/é.mp4", "eins, zwei", 0.5, 2.0)
    ]


def test_columns_of_ones_own_tell_the_delimiter_too(place):
    """F3"""
    columns = {"path": "Datei, Name", "label": "Klasse"}
    text = '"Datei, Name";Klasse;Rest\na.mp4;run;"x, y"\n'
    assert read_table(place({}, "x"), text, "path", "class_name", columns=columns) == [("a.mp4", "run")]


def test_other_encodings_are_refused_with_the_remedy(place):
    """A12"""
    root = place({}, "x")
    for text in ("path\ncafé.mp4\n".encode("cp1252"), "path,label\na.mp4,naïve\n".encode("latin-1")):
        assert "Save it as UTF-8 (Excel: `CSV UTF-8`), or convert it: iconv" in read_table(root, text, "path")
        assert "is not UTF-8 (byte" in read_list(root, text, "path")
    assert "UTF-16 without a byte order mark" in read_table(root, "path\na.mp4\n".encode("utf-16-le"), "path")


def test_spreadsheets_and_kinetics_tables_are_refused_with_the_remedy(place):
    """A12"""
    root = place({}, "x")
    kinetics = "label,youtube_id,time_start,time_end,split,is_cc\nrun,-3B32lodo2M,59,69,train,0\n"
    assert "--dataset k400 (k600, k700) --annotations" in read_table(root, kinetics, "path")
    assert "--dataset k400 (k600, k700) --annotations" in read_list(root, kinetics, "class_name")
    without = "label,youtube_id,time_start,time_end,split\nrun,-3B32lodo2M,59,69,train\n"
    assert "--dataset k400 (k600, k700) --annotations" in read_list(root, without, "class_name")
    assert "found t.xlsx: save it as CSV" in read_table(root, b"PK", "path", name="t.xlsx")


def test_kinetics_tables_of_excel_are_read(place):
    """F3"""
    table = "\r\n".join(
        ["sep=;", "label;youtube_id;time_start;time_end;split", '"jump; run";-3B32lodo2M;59;69;Train', ""]
    )
    root = place({"train.csv": table.encode("utf-16")})
    assert outcome("k400", root, "class_name", "split") == [("jump; run", "train")]


def test_names_that_no_disk_can_have_are_missing_files(place, caplog):
    """A12"""
    root = place({}, "a.mp4")
    long = "x" * 300 + ".mp4"
    os.mkfifo(root / "pipe.mp4")
    text = f"path\na.mp4\n{long}\na.mp4/b.mp4\npipe.mp4\n"
    assert read_table(root, text, "path") == [("a.mp4",), ("a.mp4/b.mp4",), ("pipe.mp4",), (long,)]
    assert "3 of 4 videos are not below" in caplog.text


# A12: lists.


@pytest.mark.parametrize("label", ["1.0", "1.", "1.000", "1"])
@pytest.mark.parametrize("delimiter", [" ", "\t", ",", ";", "::"])
def test_whole_numbers_are_labels_however_they_are_written(place, label, delimiter):
    """A12"""
    text = f"x.mp4{delimiter}{label}\ny.mp4{delimiter}0.0\n"
    classes = place({"classes.txt": "jump\nrun\n"}, "x.mp4")
    assert read_list(classes, text, "path", "class_name") == [("x.mp4", "run"), ("y.mp4", "jump")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "x.mp4 0\ny.mp4 1 2\nz.mp4 0\n",
            "line 2: expected PATH and 1 whole numbers, parted by ' ', found 'y.mp4 1 2'",
        ),
        (
            "x.mp4,0\ny.mp4,1,2\nz.mp4,0\n",
            "line 2: expected PATH and 1 whole numbers, parted by ',', found 'y.mp4,1,2'",
        ),
        ("a/x 0\na/y 1 2\na/z 0\n", "line 2: expected PATH and 1 whole numbers, parted by ' ', found 'a/y 1 2'"),
        ("x.mp4 0.7\ny.mp4 0.1\n", "line 1: expected a path alone, found 'x.mp4 0.7'"),
        ("x.mp4 run\ny.mp4 jump\n", "line 2: expected a path alone, found 'y.mp4 jump'"),
        ("x.mp4;run fast\n", "line 1: expected a path alone, found 'x.mp4;run fast'"),
        ("100218;Something falling\n", "line 1: expected a path alone, found '100218;Something falling'"),
        (
            "x.mp4 1\ny.mp4 1.5\nz.mp4 0\n",
            "line 2: expected PATH and 1 whole numbers, parted by ' ', found 'y.mp4 1.5'",
        ),
    ],
)
def test_lines_that_a_list_cannot_mean_are_refused(place, text, line):
    """A12"""
    assert line in str(read_list(place({}, "x.mp4"), text, "path", "class_name"))


def test_numbers_and_words_that_are_in_a_path_stay_there(place, make_frames):
    """A12"""
    root = place({}, "my.mp4 copies/x", "a take 2.mp4")
    make_frames(root / "clip 3")
    assert read_list(root, "clip 3 0\nb.mp4 1\na take 2.mp4 1\n", "path", "class_name") == [
        ("a take 2.mp4", "1"),
        ("b.mp4", "1"),
        ("clip 3", "0"),
    ]


@pytest.mark.parametrize("text", ["path,label\na.mp4,0\n", "Video Label\na.mp4 0\nb.mp4 1\n", "path\na.mp4\n"])
def test_tables_given_as_lists_are_refused_with_the_remedy(place, text):
    """A12"""
    assert "it is a table. Read it as one, --dataset table" in str(read_list(place({}, "a.mp4"), text, "path"))


@pytest.mark.parametrize("classes", ["run\n\njump\n", "\nrun\njump\n"])
def test_an_empty_line_among_class_names_is_refused(place, classes):
    """A12: the names behind it would be other classes."""
    root = place({"classes.txt": classes}, "x.mp4")
    found = read_list(root, "x.mp4 0\ny.mp4 1\n", "class_name")
    assert "expected a class on every line, found an empty one" in str(found)


def test_numbers_that_are_none_are_no_class(place):
    """A12: pandas writes NaN where it means nothing."""
    root = place({}, "a.mp4")
    table = pa.table({"path": ["a.mp4", "b.mp4"], "label": [3.0, float("nan")], "start": [float("nan"), 1.5]})
    pq.write_table(table, root / "t.parquet")
    found = outcome("table", root, "class_name", "start_s", annotations=root / "t.parquet")
    assert found == [("3", None), (None, 1.5)]


def test_quoted_paths_of_a_list_are_read(place):
    """A12"""
    assert read_list(place({}, "a, b.mp4"), '"a, b.mp4",1\nc.mp4,0\n', "path") == [("a, b.mp4",), ("c.mp4",)]


# B5: links, names and folders that cannot be.


def make_odd_tree(place, one_video):
    root = place({"run/a.mp4": one_video.read_bytes(), "run/target/b.mp4": one_video.read_bytes()})
    (root / "run/loop.mp4").symlink_to("loop.mp4")
    (root / "run/one.mp4").symlink_to("two.mp4")
    (root / "run/two.mp4").symlink_to("one.mp4")
    (root / "run/dangling.mp4").symlink_to("../.git/annex/objects/gone")
    (root / "run/link.mp4").symlink_to("a.mp4")
    (root / "run/ring").symlink_to("ring")
    (root / "run/linked").symlink_to("target")
    (root / os.fsdecode(b"run/caf\xe9.mp4")).write_bytes(b"x")
    (root / os.fsdecode(b"run/\xff")).mkdir()
    (root / os.fsdecode(b"run/\xff/c.mp4")).write_bytes(b"x")
    os.mkfifo(root / "run/pipe.mp4")
    return root


def test_odd_files_are_rows_with_a_reason_or_counted(place, one_video, make_config, tmp_path, caplog):
    """B5"""
    root = make_odd_tree(place, one_video)
    config = make_config(root, tmp_path / "out.zarr", frames={"": 2}, num_decoders=1)
    try:
        scanned = scan_dataset(config, tmp_path / "scan.parquet")
        extract_dataset(config)
        rows = open_store(config.out).read_manifest(["path", "status", "reason"]).to_pylist()
    except (S4vError, OSError) as error:
        scanned, rows = {}, str(error)
    assert rows == [
        {"path": f"run/{name}", "status": status, "reason": reason}
        for name, status, reason in [
            ("a.mp4", "ok", None),
            ("dangling.mp4", "failed", "missing-file"),
            ("link.mp4", "ok", None),
            ("linked/b.mp4", "ok", None),
            ("loop.mp4", "failed", "missing-file: its links lead round in a circle"),
            ("one.mp4", "failed", "missing-file: its links lead round in a circle"),
            ("target/b.mp4", "ok", None),
            ("two.mp4", "failed", "missing-file: its links lead round in a circle"),
        ]
    ]
    assert scanned["videos"] == {"ok": 4, "failed": 4, "pending": 0}
    assert (
        "2 whose names are not UTF-8 (run/caf\\xe9.mp4, run/\\xff/c.mp4: rename them), 1 that are neither files nor "
        "folders (run/pipe.mp4)"
    ) in caplog.text
    assert config.read_listing().missing == {f"run/{n}.mp4" for n in ("dangling", "loop", "one", "two")}


def fail_over(monkeypatch, folder, code):
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path) == os.fspath(folder):
            raise OSError(code, os.strerror(code), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(_files.os, "scandir", refuse)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENOENT])
def test_a_folder_of_others_is_told_and_the_rest_goes_on(place, monkeypatch, caplog, code):
    """B5"""
    root = place({}, "run/a.mp4", "run/theirs/b.mp4", "jump/c.mp4")
    fail_over(monkeypatch, root / "run/theirs", code)
    assert outcome("folder", root, "path") == [("jump/c.mp4",), ("run/a.mp4",)]
    assert f"1 folders below {root} cannot be read, and their videos are no rows: run/theirs (" in caplog.text


def test_a_failing_disk_stops_the_listing(place, monkeypatch):
    """B5: what is there is not known, and a store must not be made without it."""
    root = place({}, "run/a.mp4", "jump/c.mp4")
    fail_over(monkeypatch, root / "run", errno.EIO)
    with pytest.raises(EnvironmentFailedError, match="Run the same command again when the disk answers"):
        read_dataset("folder", root)


def test_a_file_that_we_may_not_look_at_is_not_missing(place, monkeypatch):
    """B5: the decoder says why."""
    root = place({"t.csv": "path\na.mp4\nb.mp4\ngone.mp4\n"}, "a.mp4", "b.mp4")
    stat = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).endswith("b.mp4"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    assert _files.VideoTree(root).holds("b.mp4") is True
    assert [_files.VideoTree(root).holds(name) for name in ("a.mp4", "gone.mp4")] == [True, False]


# B6: archives of mixed depth.


def test_an_archive_of_mixed_depth_is_read_without_classes_and_says_so(place, caplog):
    """B6"""
    root = place({}, "top.mp4", "2023/a.mp4", "2023/05/b.mp4")
    assert outcome("folder", root, "video_id", "class_name", "split") == [
        ("2023/05/b.mp4", None, "all"),
        ("2023/a.mp4", None, "all"),
        ("top.mp4", None, "all"),
    ]
    assert "1 of 3 videos below" in caplog.text
    assert "lie in no folder (top.mp4): taken for an archive, whose videos have no classes" in caplog.text


def test_frame_folders_and_videos_may_be_mixed_too(place, make_frames):
    """B6"""
    root = place({}, "2023/a.mp4", "b.mkv")
    make_frames(root / "frames")
    assert outcome("folder", root, "path", "class_name") == [("2023/a.mp4", None), ("b.mkv", None), ("frames", None)]


def test_no_classes_takes_paths_as_ids_and_nothing_else(place):
    """B6"""
    root = place({}, "2023/a.mp4", "2024/b.mp4", "banner.gif")
    assert outcome("folder", root, "video_id", "class_name", "split", with_classes=False) == [
        ("2023/a.mp4", None, "all"),
        ("2024/b.mp4", None, "all"),
        ("banner.gif", None, "all"),
    ]
    beside = place({}, "train/x.mp4", "val/y.mp4")
    assert len(outcome("folder", beside, "path", with_classes=False)) == 5


def test_a_banner_beside_class_folders_is_told_and_takes_no_class_away(place, make_frames, caplog):
    """B6"""
    root = place({}, "run/a.mp4", "jump/b.mp4", "banner.gif")
    make_frames(root / "figures", num_frames=1, name="fig{}.png")
    assert outcome("folder", root, "path", "class_name") == [("jump/b.mp4", "jump"), ("run/a.mp4", "run")]
    assert "in no class folder were not taken for videos: banner.gif, figures (--no-classes takes them)" in caplog.text


def test_no_classes_is_for_folders(make_config, tmp_path):
    """B6"""
    with pytest.raises(ConfigError, match="--no-classes is for --dataset folder, not for k400"):
        make_config(tmp_path, tmp_path / "x", dataset="k400", with_classes=False)


def test_no_classes_is_an_option_of_commands(place, one_video, tmp_path):
    """B6"""
    root = place({"run/a.mp4": one_video.read_bytes()})
    table = tmp_path / "scan.parquet"
    command = ["scan", "--dataset", "folder", "--root", str(root), "--out", str(table), "--decoders", "1"]
    assert CliRunner().invoke(app, [*command, "--no-classes"]).exit_code == 0
    assert pq.read_table(table).select(["video_id", "class_name", "split"]).to_pylist() == [
        {"video_id": "run/a.mp4", "class_name": None, "split": "all"}
    ]
    command = ["extract", "--model", "tiny-clip", "--dataset", "table", "--root", str(root), "--no-classes"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert "--no-classes is for --dataset folder, not for table" in refused.output


# F7: splits that nobody gave.


def splits_by_class(records):
    found = Counter((record.class_name, record.split) for record in records)
    return {name: (found[name, "train"], found[name, "val"]) for name in {record.class_name for record in records}}


def test_every_class_with_two_videos_has_one_held_out(place, caplog):
    """F7"""
    sizes = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 10, "f": 11, "g": 7}
    root = place({}, *[f"{name}/{i}.mp4" for name, size in sizes.items() for i in range(size)])
    records = read_dataset("folder", root)
    expected = {"a": (1, 0), "b": (1, 1), "c": (2, 1), "d": (4, 1), "e": (8, 2), "f": (9, 2), "g": (6, 1)}
    assert splits_by_class(records) == expected
    assert splits_by_class(read_dataset("folder", root, seed=5)) == expected
    assert "no split given: 8 of 39 videos held out as val, 0 to 2 of each class; none of 1 classes" in caplog.text


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_the_held_out_share_is_a_fifth_of_each_class(sizes, seed):
    """F7"""
    from s4v.extract.datasets._splits import settle_splits
    from s4v.store.records import VideoRecord

    records = [
        VideoRecord(video_id=f"{c}/{i}", path=f"{c}/{i}", split="", class_name=str(c))
        for c, size in enumerate(sizes)
        for i in range(size)
    ]
    found = splits_by_class(settle_splits(records, seed))
    for c, size in enumerate(sizes):
        train, val = found[str(c)]
        assert train + val == size and abs(val - size / 5) <= 0.5 + (size == 2) * 0.6 and (val > 0) == (size > 1)
    assert settle_splits(records[::-1], seed)[::-1] == settle_splits(records, seed), "the order does not matter"


def test_rows_of_one_file_are_not_on_both_sides(place):
    """F7"""
    lines = "".join(f"{i % 4}.mp4,run,{i},{i + 1}\n" for i in range(40))
    rows = read_table(place({}, "x"), f"path,label,start,end\n{lines}", "path", "split")
    assert Counter(Counter(path for path, _ in set(rows)).values()) == {1: 4}
    assert {split for _, split in rows} == {"train", "val"}


def test_an_archive_without_labels_has_one_split(place, caplog):
    """F7"""
    root = place({}, *[f"{i}.mp4" for i in range(20)])
    assert {split for (split,) in outcome("folder", root, "split")} == {"all"}
    assert {split for (split,) in read_table(root, "path\n0.mp4\n1.mp4\n2.mp4\n", "split")} == {"all"}
    assert {split for (split,) in read_list(root, "0.mp4\n1.mp4\n2.mp4\n", "split", name="mine.txt")} == {"all"}
    assert "no split given" not in caplog.text


def test_captions_without_classes_are_divided(place):
    """F7"""
    lines = "".join(f"{i}.mp4,text {i}\n" for i in range(10))
    found = Counter(read_table(place({}, "x"), f"path,caption\n{lines}", "split"))
    assert found == {("train",): 8, ("val",): 2}


@pytest.fixture(scope="module")
def small_store(tmp_path_factory, make_config, one_video):
    """Two classes of three videos, without a split, and their store. Copy it."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("run", "walk"):
        add_videos(folder / "videos" / name, range(3), one_video)
    config = make_config(folder / "videos", folder / "s.zarr", frames={"": 2}, num_decoders=1)
    extract_dataset(config)
    return config


@pytest.fixture
def copied(small_store, tmp_path):
    root = shutil.copytree(small_store.root, tmp_path / "videos")
    return replace(small_store, root=root, out=shutil.copytree(small_store.out, tmp_path / "s.zarr"))


def add_videos(folder, numbers, video):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        shutil.copy(video, folder / f"{number}.mp4")


def list_splits(config):
    nobody = SimpleNamespace(decode_ahead=lambda _: iter(()))  # no video's length is asked for
    return {record.video_id: record.split for record in list_rows(config, Target.find(config), nobody)}


def read_splits(path):
    rows = open_store(path).read_manifest(["video_id", "split"]).to_pylist()
    return {row["video_id"]: row["split"] for row in rows}


def rewrite_split(path, change):
    """Give a store other splits, as one from before has them."""
    from s4v.store.checksums import write_checksums

    table = pq.read_table(path / "videos.parquet")
    splits = [change(row["video_id"], row["split"]) for row in table.to_pylist()]
    place = table.column_names.index("split")
    pq.write_table(
        table.set_column(place, "split", pa.array(splits)), path / "videos.parquet", write_page_checksum=True
    )
    write_checksums(path)


def test_a_store_keeps_its_splits_and_new_rows_fill_up_the_share(copied, one_video):
    """F7"""
    # As the hash of each id had it: none of one class in val, two of the other.
    rewrite_split(copied.out, lambda i, _: "val" if i in ("run/0.mp4", "run/1.mp4") else "train")
    before = read_splits(copied.out)
    assert list_splits(copied) == before, "the same command goes on"
    add_videos(copied.root / "run", range(3, 6), one_video)
    add_videos(copied.root / "walk", range(3, 7), one_video)
    extract_dataset(replace(copied, append=True))
    after = read_splits(copied.out)
    assert {i: after[i] for i in before} == before
    assert Counter((i.partition("/")[0], s) for i, s in after.items() if s == "val") == {
        ("run", "val"): 2,
        ("walk", "val"): 1,
    }
    assert list_splits(copied) == after


def test_a_store_keeps_the_spelling_of_its_splits(copied):
    """F7, A9"""
    splits = ["train", "Train", "TRAIN", "val", "Novel", "novel"]
    rows = [(f"{name}/{i}.mp4", name) for name in ("run", "walk") for i in range(3)]
    spelled = {path: split for (path, _), split in zip(rows, splits, strict=True)}
    lines = "".join(f"{path},{name},{spelled[path]}\n" for path, name in rows)
    (copied.root / "t.csv").write_text(f"path,label,split\n{lines}")
    table = replace(copied, dataset="table", annotations=copied.root / "t.csv")
    rewrite_split(copied.out, lambda i, _: spelled[i])
    assert list_splits(table) == spelled
    rewrite_split(copied.out, lambda *_: "test")
    assert list_splits(table) != spelled, "another split in the table is another split"
    assert list_splits(table)["run/1.mp4"] == "train"


def test_a_divided_archive_stays_divided(copied, one_video):
    """F7"""
    archive = replace(copied, with_classes=False)
    divided = {i: "val" if i == "run/0.mp4" else "train" for i in read_splits(copied.out)}
    rewrite_split(copied.out, lambda i, _: divided[i])
    assert list_splits(archive) == divided
    add_videos(copied.root / "run", [7, 8], one_video)
    found = list_splits(archive)
    assert {i: found[i] for i in divided} == divided
    assert Counter(found.values()) == {"train": 6, "val": 2}
    rewrite_split(copied.out, lambda *_: "all")
    assert set(list_splits(archive).values()) == {"all"}


def test_segments_keep_their_splits(tmp_path, make_config, make_video):
    """F7: ids of segments end in their time, and a file's name may hold the same sign."""
    root = tmp_path / "videos"
    for number in range(3):
        make_video(root / f"run/a@{number}.mp4", num_frames=24, seed=number)
    config = make_config(root, tmp_path / "s.zarr", frames={"": 2}, num_decoders=1, segment_s=1.0)
    extract_dataset(config)
    rewrite_split(config.out, lambda i, _: "val" if i.startswith(("run/a@0", "run/a@1")) else "train")
    before = read_splits(config.out)
    assert list_splits(config) == before
    assert len(before) == 6


# F8: files that moved.


def run_again(config):
    try:
        return str(extract_dataset(config).videos)
    except S4vError as error:
        return str(error)


def test_videos_that_moved_are_told_as_moved(copied):
    """F8"""
    (copied.root / "data").mkdir()
    (copied.root / "run").rename(copied.root / "data/run")
    (copied.root / "walk").rename(copied.root / "data/walk")
    message = run_again(copied)
    assert "6 videos have moved (run/0.mp4 is data/run/0.mp4 now, run/1.mp4 is data/run/1.mp4 now" in message
    assert "(--append adds them)" not in message
    assert "are gone" not in message


def test_what_only_shares_a_name_has_not_moved(copied, one_video):
    """F8"""
    (copied.root / "run/0.mp4").unlink()
    add_videos(copied.root / "hop", [0], one_video)
    add_videos(copied.root / "jump", [0], one_video)
    message = run_again(copied)
    assert "2 (hop/0.mp4, jump/0.mp4) videos are new" in message
    assert "1 (run/0.mp4) videos are gone" in message
    assert "moved" not in message


def test_a_file_of_another_size_has_not_moved(copied, one_video):
    """F8"""
    from s4v.store._row_differences import _without_other_sizes

    (copied.root / "run/0.mp4").rename(copied.root / "a.mp4")
    (copied.root / "run/1.mp4").rename(copied.root / "b.mp4")
    moved, here = (
        {"run/0.mp4": "a.mp4", "run/1.mp4": "b.mp4", "x": "b.mp4"},
        {n: {"path": n} for n in ("a.mp4", "b.mp4")},
    )
    sizes = {"run/0.mp4": one_video.stat().st_size, "run/1.mp4": 5}
    assert _without_other_sizes(moved, here, sizes, copied.root) == {"run/0.mp4": "a.mp4", "x": "b.mp4"}


def test_changed_rows_say_what_changed(copied):
    """F8"""
    splits = read_splits(copied.out)
    rows = "".join(f"{i},{i.replace('run', 'jump')},{i.partition('/')[0]},{split}\n" for i, split in splits.items())
    (copied.root / "run").rename(copied.root / "jump")
    (copied.root / "t.csv").write_text(f"id,path,label,split\n{rows}")
    table = replace(copied, dataset="table", annotations=copied.root / "t.csv")
    message = run_again(table)
    assert "3 (run/0.mp4, run/1.mp4, run/2.mp4) videos have another source_id, path (run/0.mp4: " in message
    assert "path run/0.mp4 there, jump/0.mp4 here" in message


def test_pairs_of_moved_videos_are_the_ones_with_most_in_common():
    """F8"""
    from s4v.store._row_differences import pair_moved

    def rows(*paths):
        return {path: {"path": path, "start_s": None, "end_s": None} for path in paths}

    assert pair_moved(rows("a/0.mp4", "b/0.mp4", "c.mp4"), rows("x/a/0.mp4", "x/b/0.mp4", "y/c.mp4")) == {
        "a/0.mp4": "x/a/0.mp4",
        "b/0.mp4": "x/b/0.mp4",
        "c.mp4": "y/c.mp4",
    }
    assert pair_moved(rows("a/0.mp4"), rows("x/0.mp4", "y/0.mp4")) == {}
    assert pair_moved(rows(), rows("x/0.mp4")) == {}
    many = [f"{i}/0.mp4" for i in range(3000)]
    assert len(pair_moved(rows(*many), rows(*[f"new/{path}" for path in many]))) == 3000


# The cost of a listing: call counters, not seconds.


def test_a_listing_asks_the_disk_once_for_what_it_walked(place, monkeypatch):
    root = place({}, *[f"c{i % 5}/{i}.mp4" for i in range(50)])
    calls = Counter()
    stat, scandir = os.stat, os.scandir
    monkeypatch.setattr(_files.os, "stat", lambda *a, **k: calls.update(["stat"]) or stat(*a, **k))
    monkeypatch.setattr(_files.os, "scandir", lambda *a: calls.update(["scandir"]) or scandir(*a))
    listing = read_dataset("folder", root)
    assert len(listing) == 50
    assert calls["scandir"] == 6
    assert calls["stat"] < 20
