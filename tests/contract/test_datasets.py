"""What every data set in the table keeps to, and a data set of a test's own that is added by one line."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import s4v
from s4v.cli import app
from s4v.errors import ConfigError, DatasetError
from s4v.extract import datasets
from s4v.extract.config import ExtractConfig
from s4v.extract.datasets import FACTS, READERS, DatasetFacts, DatasetReader, default_paths, read_dataset, read_listing
from s4v.extract.extraction import extract_dataset
from s4v.store.reader import open_store
from s4v.store.records import VideoRecord

ROOT = Path(s4v.__file__).parent
PUBLIC = [name for name, reader in READERS.items() if reader.facts is not None]
FORMS = [name for name, reader in READERS.items() if reader.facts is None]


def read_toy(files, options):
    """`toy.txt`: a line `NAME SPLIT CLASS`; the protocol `swapped` takes the splits the other way round."""
    file = files.find_annotation("toy.txt")
    if file is None:
        return None
    swapped = {"train": "val", "val": "train"} if options.protocol == "swapped" else {}
    rows = [line.split() for line in file.read_text().splitlines()]
    return [
        VideoRecord(
            video_id=name,
            path=files.tree.find_name(name) or f"{name}.mp4",
            split=swapped.get(split, split),
            class_name=class_name,
        )
        for name, split, class_name in rows
    ]


TOY = DatasetReader(
    name="toy",
    read=read_toy,
    may_be_mirrored=False,
    facts=DatasetFacts(
        name="toy",
        title="Toy",
        source="this test",
        layout=("toy.txt", "NAME.mp4, in any folder"),
        counts={"plain": {"train": 2, "val": 1}},
        num_classes=2,
        protocols=("plain", "swapped"),
        clip_settings="none",
        frame_fps=5.0,
    ),
)


@pytest.fixture
def toy(monkeypatch):
    """The table with one line more."""
    monkeypatch.setitem(READERS, TOY.name, TOY)


@pytest.fixture
def toy_root(make_video, tmp_path):
    root = tmp_path / "toys"
    for seed, name in enumerate("abc"):
        make_video(root / f"videos/{name}.mp4", num_frames=8, seed=seed)
    (root / "toy.txt").write_text("a train left\nb train right\nc val left\n")
    return root


@pytest.fixture
def place(tmp_path):
    """Write texts, and empty files in the place of videos, below a root."""

    def write(texts, *videos):
        for name, text in {**texts, **dict.fromkeys(videos, "")}.items():
            file = tmp_path / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path / "root"

    return write


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_has_the_name_of_its_line(name):
    reader = READERS[name]
    assert isinstance(reader, DatasetReader)
    assert reader.name == name
    if reader.facts is not None:
        assert reader.facts.name == name


@pytest.mark.parametrize("name", PUBLIC)
def test_facts_are_whole(name):
    facts = READERS[name].facts
    assert facts.title and facts.source and facts.layout and facts.clip_settings
    assert set(facts.counts) <= set(facts.protocols or ("",))
    assert all(count > 0 for splits in facts.counts.values() for count in splits.values())
    assert json.loads(run("datasets", name, "--json").stdout)["title"] == facts.title


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_set_has_default_places(name):
    assert default_paths(name, None, None) == (Path("data") / name, Path("store") / f"{name}.zarr")


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_files_needs_a_root(name, tmp_path):
    with pytest.raises(ConfigError, match=f"--dataset {name} needs --root"):
        default_paths(name, None, None)
    assert default_paths(name, tmp_path, None)[1] == Path("store") / f"{tmp_path.name}.zarr"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_root_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(DatasetError, match=f"the videos of '{name}' were expected in .*: no such folder"):
        read_dataset(name, tmp_path / "none")


@pytest.mark.parametrize("name", PUBLIC)
def test_annotations_that_are_not_there_are_named(name, tmp_path):
    with pytest.raises(DatasetError, match=r"none is not there \(--annotations\)"):
        read_dataset(name, tmp_path, annotations=tmp_path / "none")


@pytest.mark.parametrize("name", PUBLIC)
def test_without_annotations_folders_of_splits_and_classes_are_read(name, place):
    videos = [f"{split}/{label}/{number}.mp4" for split in ("train", "val") for label in "ab" for number in range(2)]
    root = place({}, *videos)
    records = read_dataset(name, root)
    assert [(r.path, r.split, r.class_name) for r in records] == [(path, *path.split("/")[:2]) for path in videos]
    assert records == read_dataset(name, root), "the same each time"


@pytest.mark.parametrize("name", PUBLIC)
def test_videos_without_annotations_splits_and_classes_are_refused(name, place):
    with pytest.raises(DatasetError, match=rf"Or add the annotations: .*`s4v datasets {name}` says where"):
        read_dataset(name, place({}, "a.mp4", "b.mp4"))


@pytest.mark.parametrize("name", PUBLIC)
def test_lists_are_read_where_the_user_names_some(name, place):
    root = place({"lists/my_train.txt": "a.mp4 0\n", "lists/my_val.txt": "b.mp4 1\n"}, "a.mp4", "b.mp4")
    records = read_dataset(name, root, annotations=root / "lists")
    assert [(r.path, r.split) for r in records] == [("a.mp4", "train"), ("b.mp4", "val")]


@pytest.mark.parametrize("name", READERS)
def test_options_that_mean_nothing_to_a_reader_are_refused(name, tmp_path):
    reader = READERS[name]

    def make(**options):
        return ExtractConfig(model="tiny-clip", dataset=name, root=tmp_path, out=tmp_path / "s.zarr", **options)

    options = [
        ("--column", {"columns": {"path": "x"}}, reader.takes_columns),
        ("--annotations", {"annotations": tmp_path}, reader.takes_annotations),
        ("--no-classes", {"with_classes": False}, reader.takes_archives),
        ("--views flip", {"views": {"": "flip"}}, reader.may_be_mirrored),
        ("--protocol", {"protocol": "none-such"}, False),
    ]
    for option, values, is_taken in options:
        if is_taken:
            make(**values)
        else:
            with pytest.raises(ConfigError, match=option):
                make(**values)


def test_listing_data_sets_and_checking_options_imports_nothing_heavy():
    code = "import sys, s4v.extract.config; print(sorted({'torch', 'pyarrow', 'zarr', 'av'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_code_but_its_own_file_asks_for_a_data_sets_name():
    """A comparison, a `match`, a key or a prefix; the paper's recipes are by data set and stand in train/paper."""
    home = {"something.py", "kinetics.py", *(f"{name.replace('-', '_')}.py" for name in READERS)}
    names = set(READERS) - {"folder", "lists", "table"}
    files = [file for folder in ("commands", "extract", "retrieve", "store") for file in (ROOT / folder).rglob("*.py")]
    found = []
    for file in [*ROOT.glob("*.py"), *files]:
        if file.parent.name == "datasets" and file.name in home:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                found.append((file.name, node.lineno, node.value))
            if isinstance(node, ast.Compare) and any(
                isinstance(inner, ast.Constant) and inner.value in READERS for inner in ast.walk(node)
            ):
                found.append((file.name, node.lineno, ast.unparse(node)))
    assert found == []


def test_a_data_set_of_ones_own_is_listed_described_and_checked(toy, toy_root):
    assert list(FACTS)[-1] == "toy" and "toy" in FACTS and len(FACTS) == len(PUBLIC) + 1
    assert "toy      Toy" in run("datasets").stdout
    assert "protocols  plain, swapped" in run("datasets", "toy").stdout
    checked = json.loads(run("datasets", "toy", "--root", toy_root, "--json").stdout)
    assert checked["splits"] == {
        "train": {"listed": 2, "expected": 2, "missing": 0},
        "val": {"listed": 1, "expected": 1, "missing": 0},
    }
    with pytest.raises(ConfigError, match="unknown data set 'toi'. Closest: toy"):
        datasets.find_reader("toi")


def test_a_data_set_of_ones_own_is_extracted(toy, toy_root, make_config, tmp_path):
    listing = read_listing("toy", toy_root)
    assert [(r.path, r.split) for r in listing.records] == [
        ("videos/a.mp4", "train"),
        ("videos/b.mp4", "train"),
        ("videos/c.mp4", "val"),
    ]
    assert {r.split for r in read_dataset("toy", toy_root, protocol="swapped") if r.video_id == "c"} == {"train"}
    config = make_config(toy_root, tmp_path / "toy.zarr", dataset="toy", frames={"": 2}, num_decoders=1)
    with pytest.raises(ConfigError, match="--views flip would turn left into right"):
        make_config(toy_root, tmp_path / "toy.zarr", dataset="toy", views={"": "flip"})
    assert extract_dataset(config).videos["ok"] == 3
    store = open_store(config.out)
    assert store.attributes["dataset"]["name"] == "toy" and store.attributes["dataset"]["protocol"] == "plain"
    assert list(store.classes.names) == ["left", "right"]


def test_the_toy_is_gone_with_its_line():
    assert "toy" not in READERS and "toy" not in FACTS
