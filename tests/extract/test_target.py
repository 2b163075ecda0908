"""What stands where an extraction writes is found once, and its store is opened as seldom as can be."""

import shutil
from dataclasses import replace

import pytest

from s4v.errors import StoreBusyError, StoreDamagedError
from s4v.extract.extraction import extract_dataset
from s4v.extract.segments import list_rows
from s4v.extract.target import Target
from s4v.store import append, names
from s4v.store.markers import marker_path
from s4v.store.reader import StoreReader, open_store


@pytest.fixture
def opened(monkeypatch):
    """Paths of the stores that are opened, and of the `zarr.json` of stores that are parsed."""
    stores, parsed = [], []
    make, read = StoreReader.__init__, names.read_json

    def note_store(reader, path, *rest):
        stores.append(path)
        make(reader, path, *rest)

    def note_file(folder, name, *rest):
        if name == "zarr.json":
            parsed.append(folder)
        return read(folder, name, *rest)

    monkeypatch.setattr(StoreReader, "__init__", note_store)
    monkeypatch.setattr(names, "read_json", note_file)

    def count(path):
        """Since the last count."""
        counts = len([one for one in stores if one == path]), len([one for one in parsed if one == path])
        stores.clear()
        parsed.clear()
        return counts

    return count


@pytest.fixture
def begun(video_folder, int8_store, make_config, tmp_path):
    """An extraction whose store lacks two shards."""
    out = shutil.copytree(int8_store, tmp_path / "s.zarr")
    for shard in (1, 4):
        marker_path(out, shard).unlink()
    return make_config(video_folder, out, dtype="int8")


@pytest.fixture
def growing(video_folder, int8_store, make_config, make_video, tmp_path):
    """An extraction with one video more than its store has."""
    root = shutil.copytree(video_folder, tmp_path / "videos")
    config = make_config(root, tmp_path / "s.zarr", dtype="int8")
    extract_dataset(config)
    make_video(root / "val/walk/9.mp4", seed=30)
    return replace(config, append=True)


def test_a_plain_resume_opens_its_store_twice(begun, opened):
    """Once to see what is there, and once more when nobody else can change it."""
    assert extract_dataset(begun).videos["ok"] == 10
    stores, parsed = opened(begun.out)
    assert stores <= 2 and parsed <= 2
    assert extract_dataset(begun).videos["ok"] == 10, "a finished store too"
    assert opened(begun.out) == (2, 2)


def test_a_captioned_store_is_resumed_with_two_openings(captioned_folder, make_captioned_config, opened, tmp_path):
    """Its codec is measured, and its captions become texts, by the store that the writer holds."""
    config = make_captioned_config(captioned_folder, tmp_path / "s.zarr", dtype="int8", prepare=True)
    extract_dataset(config)
    opened(config.out)
    extract_dataset(replace(config, prepare=False))
    assert (config.out / "text").is_dir() and (config.out / "fidelity.json").is_file()
    assert opened(config.out) == (2, 2)


@pytest.mark.slow
def test_a_fresh_run_opens_its_store_once(video_folder, make_config, opened, tmp_path):
    config = make_config(video_folder, tmp_path / "s.zarr", dtype="int8")
    extract_dataset(config)
    assert opened(config.out)[0] == 1
    extract_dataset(replace(config, overwrite=True))
    assert opened(config.out)[0] == 1, "what is replaced is not opened"


def test_a_retry_opens_its_store_twice_and_an_append_three_times(growing, opened):
    opened(growing.out)
    assert extract_dataset(growing).videos["ok"] == 11
    assert opened(growing.out)[0] == 3, "it is changed under a lease of its own"
    extract_dataset(replace(growing, append=False, retry_failed=True))
    assert opened(growing.out)[0] == 2


def test_a_repair_opens_its_store_three_times(begun, opened, flip_byte):
    flip_byte(begun.out / "captions.parquet")
    extract_dataset(replace(begun, repair=True))
    assert opened(begun.out)[0] == 3, "it is looked through under a lease of its own"


def test_a_target_says_what_is_there(begun, video_folder, tmp_path):
    assert Target.find(replace(begun, out=tmp_path / "none.zarr")).state == "new"
    assert Target.find(replace(begun, overwrite=True)).state == "new"
    extract_dataset(begun)
    target = Target.find(begun)
    assert target.goes_on and target.state == "finished" and target.segment_s is None
    extract_dataset(replace(begun, out=tmp_path / "new.zarr", prepare=True))
    target = Target.find(replace(begun, out=tmp_path / "new.zarr"))
    assert target.goes_on and target.state == "begun"


def test_listing_rows_leaves_a_killed_append_as_it_is(growing, monkeypatch, contents):
    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(append, "write_checksums", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_dataset(growing)
    before = contents(growing.out)
    target = Target.find(growing)
    assert target.state == "half appended" and not target.goes_on
    assert len(list_rows(growing, target, pool=None)) == 12
    assert contents(growing.out) == before
    with pytest.raises(StoreBusyError):
        open_store(growing.out)
    finished = target.finish_append()
    assert finished.state == "begun" and finished.reader.layout.num_rows == 12


def test_a_killed_append_is_finished_by_the_command_that_goes_on(growing, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(append, "write_checksums", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_dataset(growing)
    assert extract_dataset(replace(growing, append=False)).videos["ok"] == 11


def test_a_target_whose_store_is_damaged_is_refused(begun):
    (begun.out / "zarr.json").write_text((begun.out / "zarr.json").read_text().replace("tiny-clip", "other"))
    with pytest.raises(StoreDamagedError, match="does not match its recorded hash"):
        Target.find(begun)
