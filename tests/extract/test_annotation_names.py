"""Names out of annotations are judged as text, by one check for every reader, before the disk is asked for them.

All of it is for the fault A13.
"""

import contextlib
import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s4v.errors import DatasetError, S4vError
from s4v.extract.datasets import _files, read_dataset

SECRET = "../../secret/private"


def k400(name, label="run"):
    head = "label,youtube_id,time_start,time_end,split"
    return "k400", {"train.csv": f'{head}\nrun,-3B32lodo2M,59,69,train\n"{label}","{name}",1,2,train\n'}, {}


def msrvtt(name, protocol="full"):
    videos = [{"video_id": video_id, "split": "train"} for video_id in ("video0", name)]
    sentences = [{"video_id": video_id, "caption": "x"} for video_id in ("video0", name)]
    files = {
        "MSRVTT_data.json": {"videos": videos, "sentences": sentences},
        "MSRVTT_train.9k.csv": f'video_id\nvideo0\n"{name}"\n',
        "MSRVTT_JSFUSION_test.csv": f'key,vid_key,video_id,sentence\nret0,msr1,video1,x\nret1,msr2,"{name}",x\n',
    }
    return "msrvtt", files, {"protocol": protocol}


# What to write where, so that one row names a video in the given way, and the data set and options that read it.
READERS = {
    "table": lambda name: ("table", {"t.jsonl": '{"path": "a.mp4"}\n' + json.dumps({"path": name})}, {}),
    "table csv": lambda name: ("table", {"t.csv": f'path,label\na.mp4,x\n"{name}",x\n'}, {}),
    "lists": lambda name: ("lists", {"train.txt": f"a.mp4 0\n{name} 1\n"}, {}),
    "lists tab": lambda name: ("lists", {"train.txt": f"a.mp4\t0\n{name}\t1\n"}, {}),
    "lists of paths": lambda name: ("lists", {"train.txt": f"a.mp4\n{name}\n"}, {}),
    "k400 id": k400,
    "k400 label": lambda name: k400("0wR5jVB-WPk", name),
    "msrvtt full": msrvtt,
    "msrvtt 1k-A": lambda name: msrvtt(name, "1k-A-9k"),
    "msrvtt pairs": lambda name: (
        "msrvtt",
        {
            "msrvtt_ret_train9k.json": [{"video": "video0.mp4", "caption": "x"}, {"video": name, "caption": "x"}],
            "msrvtt_ret_test1k.json": [{"video": "video1.mp4", "caption": "x"}],
        },
        {},
    ),
    "msvd": lambda name: (
        "msvd",
        {"train_list.txt": f"a_1_2\n{name}\n", "raw-captions.pkl": pickle.dumps({"a_1_2": [["x"]], name: [["x"]]})},
        {},
    ),
    "vatex": lambda name: (
        "vatex",
        {"vatex_training_v1.0.json": [{"videoID": f"{name}_000001_000002", "enCap": ["x"]}]},
        {},
    ),
    "vatex hgr": lambda name: (
        "vatex",
        {"vatex_data.json": {f"{name}_000001_000002": {"enCap": ["x"]}}, "train_list.txt": f"{name}_000001_000002\n"},
        {"protocol": "hgr"},
    ),
    "ucf101": lambda name: (
        "ucf101",
        {
            "classInd.txt": "1 Run\n",
            "trainlist01.txt": f"Run/a.avi 1\n{name}/Run/b.avi 1\n",
            "testlist01.txt": "Run/c.avi\n",
        },
        {},
    ),
    "hmdb51": lambda name: ("hmdb51", {"run_test_split1.txt": f"a.avi 1\n{name}.avi 1\n"}, {}),
    "ssv1": lambda name: ("ssv1", {"x-train.csv": f"1;Run\n{name};Run\n"}, {}),
    "ssv2": lambda name: (
        "ssv2",
        {"x-train.json": [{"id": "1", "template": "Run"}, {"id": name, "template": "Run"}]},
        {},
    ),
}


def listing(root, reader, name):
    """Records, or the message of the error."""
    dataset, files, options = READERS[reader](name)
    for file, content in files.items():
        if isinstance(content, bytes):
            (root / file).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (root / file).write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    if dataset in ("table", "lists"):
        options = {**options, "annotations": root / next(iter(files))}
    try:
        return read_dataset(dataset, root, **options)
    except S4vError as error:
        return str(error)


def names_outside(reader):
    longer = reader.startswith("k400 id")  # an id of Kinetics has 11 characters
    return ["../../../ab", "..\\..\\..\\ab", "/etc/passwd"] if longer else [SECRET, "..\\..\\secret\\private", "../x"]


@pytest.mark.parametrize(("reader", "name"), [(reader, name) for reader in READERS for name in names_outside(reader)])
def test_names_that_lead_out_of_the_root_are_malformed_rows(place, reader, name):
    """A13"""
    root = place({}, "a.mp4")
    outside = root.parent.parent / "secret"
    found = listing(root, reader, name)
    assert isinstance(found, str), [record.path for record in found]
    assert "malformed" in found or "rows" in found
    assert "without `..`" in found or "without folders" in found or "expected a number as id" in found
    assert not outside.exists()


def test_nothing_outside_the_root_is_looked_for(place, monkeypatch):
    """A13"""
    root = place({}, "a.mp4")
    asked = []
    stat = os.stat

    def note(path, *args, **kwargs):
        if isinstance(path, str):
            asked.append(path)
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(_files.os, "stat", note)
    for reader in READERS:
        for name in names_outside(reader):
            listing(root, reader, name)
    assert not [path for path in asked if "secret" in path or ".." in path or "passwd" in path]


@pytest.mark.parametrize("reader", ["table", "lists tab", "ucf101"])
@pytest.mark.parametrize("name", ["C:\\videos\\a.mp4", "d:/videos/a.mp4", "\\\\server\\share\\a.mp4"])
def test_paths_of_other_systems_are_malformed_rows(place, reader, name):
    """A13"""
    assert "which names a drive of another machine" in str(listing(place({}, "a.mp4"), reader, name))


@pytest.mark.parametrize("reader", ["table", "msrvtt full", "vatex", "ssv2", "msrvtt pairs", "lists of paths"])
def test_names_with_a_nul_byte_are_malformed_rows(place, reader):
    """A13"""
    found = listing(place({}, "a.mp4"), reader, "a\0b")
    assert "NUL byte" in str(found) or "expected a number as id" in str(found)


@pytest.mark.parametrize("reader", ["msrvtt full", "vatex", "ssv2", "msrvtt pairs", "msvd"])
def test_halves_of_surrogate_pairs_are_malformed_rows(place, reader):
    """A13"""
    dataset, files, options = READERS[reader]("ok")
    root = place({}, "a.mp4")
    caption = json.dumps("half \ud800")
    for file, content in files.items():
        if isinstance(content, bytes):
            (root / file).write_bytes(pickle.dumps({"a_1_2": [["x"]], "ok": [["half \ud800"]]}))
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (root / file).write_text(text.replace('"x"', caption).replace('"Run"', caption))
    with pytest.raises(DatasetError, match="which is not valid Unicode"):
        read_dataset(dataset, root, **options)


def test_all_such_rows_are_told_at_once(place):
    """A13"""
    paths = ["a.mp4", "../b.mp4", "/c.mp4", "C:\\d.mp4", "v/../e.mp4", ".", "https://x/f.mp4", "ok.mp4"]
    root = place({"t.csv": "path\n" + "\n".join(paths) + "\n"}, "a.mp4")
    with pytest.raises(DatasetError) as caught:
        read_dataset("table", root, annotations=root / "t.csv")
    message = str(caught.value)
    assert message.startswith(f"6 rows of {root / 't.csv'} are malformed:")
    assert [line.strip().partition(":")[0] for line in message.splitlines()[1:]] == [f"line {n}" for n in range(3, 9)]


def test_a_class_list_cannot_name_a_folder_above(place):
    """A13"""
    root = place({".._test_split1.txt": "a.avi 1\n"})
    with pytest.raises(DatasetError, match="without `..`"):
        read_dataset("hmdb51", root, annotations=root / ".._test_split1.txt")


def test_absolute_paths_below_the_root_are_taken_where_they_were(place):
    """A13"""
    root = place({}, "v/a.mp4")
    (root / "t.csv").write_text(f"path\n{root}/v/a.mp4\n{root}//v/./b.mp4\n")
    assert [r.path for r in read_dataset("table", root, annotations=root / "t.csv")] == ["v/a.mp4", "v/b.mp4"]
    (root / "t.csv").write_text(f"path\n{root}/v/../../a.mp4\n{root}x/a.mp4\n")
    with pytest.raises(DatasetError, match="2 rows of"):
        read_dataset("table", root, annotations=root / "t.csv")


def test_links_below_the_root_are_followed(place, tmp_path):
    """A13: labs keep their videos elsewhere; what lies on the disk is not judged."""
    root = place({"train.txt": "link/x.mp4 0\nfile.mp4 1\n", "t.csv": "path\nlink/x.mp4\nfile.mp4\n"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.mp4").touch()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "file.mp4").symlink_to("../elsewhere/x.mp4")
    for name, file in (("lists", "train.txt"), ("table", "t.csv")):
        assert [r.path for r in read_dataset(name, root, annotations=root / file)] == ["file.mp4", "link/x.mp4"]
        assert all((root / r.path).exists() for r in read_dataset(name, root, annotations=root / file))


# The properties.

PARTS = st.sampled_from(
    ["..", ".", "", "a", "b c", "...", "..a", "a..", "C:", "~", "$HOME", "\0", "é", "-x", "\\", "/"]
)
NAMES = st.lists(PARTS, max_size=6).flatmap(
    lambda parts: st.sampled_from(["/", "\\", ""]).map(lambda separator: separator.join(parts))
) | st.text(max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reader=st.sampled_from(sorted(READERS)), name=NAMES)
def test_no_reader_returns_a_path_that_leads_out_of_the_root(tmp_path, reader, name):
    """A13"""
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    for file in root.iterdir():
        file.unlink()
    with contextlib.suppress(UnicodeEncodeError):  # a pickle of such a text cannot be written at all
        found = listing(root, reader, name)
        for record in [] if isinstance(found, str) else found:
            assert not Path(record.path).is_absolute()
            assert ".." not in Path(record.path).parts
            assert ".." not in record.path.replace("\\", "/").split("/")
            assert os.path.normpath(root / record.path).startswith(f"{root}{os.sep}")


@given(text=NAMES)
def test_what_the_check_lets_through_stays_inside(text):
    """A13"""
    from s4v.extract.datasets._names import check_path, is_inside

    try:
        path = check_path(text)
    except ValueError:
        return
    assert is_inside(path)
    assert is_inside(path.replace("\\", "/"))
    assert check_path(path) == path
    assert os.path.normpath(path) == path


@given(text=NAMES)
def test_a_name_is_one_part(text):
    """A13"""
    from s4v.extract.datasets._names import check_name

    try:
        name = check_name(text)
    except ValueError:
        return
    assert "/" not in name
    assert name not in ("", ".", "..")


@given(splits=st.lists(st.sampled_from(["Train", "train", "dev", "Dev", "DEV", "x", ""]), max_size=5))
def test_folding_is_the_same_in_any_order(splits):
    """A9"""
    from s4v.extract.datasets._names import fold_spellings

    folded = fold_spellings(splits)
    assert folded == fold_spellings(splits[::-1])
    assert len({name.lower() for name in splits}) == len(set(folded.values()))
