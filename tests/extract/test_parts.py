import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from s4v.errors import (
    ConfigError,
    EnvironmentFailedError,
    StoreDamagedError,
    StoreExistsError,
    StoreMismatchError,
)
from s4v.extract.extraction import extract_dataset
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.verify import verify_store


@pytest.fixture(scope="module")
def machines(video_folder, tmp_path_factory, make_config):
    """A skeleton, copied to three machines, each of which took its part. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("machines")
    config = make_config(video_folder, folder / "skeleton.zarr", dtype="int8", prepare=True)
    assert extract_dataset(config).videos == {"ok": 0, "failed": 0, "pending": 11}
    for number in (1, 2, 3):
        path = shutil.copytree(config.out, folder / f"machine-{number}" / "x.zarr")
        summary = extract_dataset(replace(config, out=path, prepare=False, part=(number, 3)))
        assert 0 < summary.videos["pending"] < 11
    return folder


@pytest.fixture
def parts(machines, tmp_path):
    """Copies of what the three machines have."""
    shutil.copytree(machines, tmp_path, dirs_exist_ok=True)
    return [tmp_path / f"machine-{number}" / "x.zarr" for number in (1, 2, 3)]


def test_parts_merge_to_the_store_that_one_machine_makes(parts, int8_store, tmp_path, contents):
    out = tmp_path / "new" / "merged.zarr"
    assert merge_stores(parts[:2], out)["pending"] > 0
    assert merge_stores(parts, out) == {"ok": 10, "failed": 1, "pending": 0}
    assert contents(out, "zarr.json", "fidelity.json") == contents(int8_store, "zarr.json", "fidelity.json")
    assert verify_store(open_store(out)) == []


def test_an_interrupted_merge_goes_on(parts, int8_store, tmp_path, monkeypatch, contents):
    out = tmp_path / "merged.zarr"
    copy, calls = shutil.copyfile, []

    def stop_half_way(*paths, **options):
        calls.append(paths)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return copy(*paths, **options)

    monkeypatch.setattr(shutil, "copyfile", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        merge_stores(parts, out)
    merge_stores(parts, out)
    assert contents(out, "zarr.json", "fidelity.json") == contents(int8_store, "zarr.json", "fidelity.json")


def test_what_is_not_part_of_one_store_is_refused(parts, float_store, video_folder, tmp_path, make_config):
    with pytest.raises(StoreMismatchError, match="not parts of one store: .*layout.patch_dtype.*the codecs differ"):
        merge_stores([parts[0], float_store], tmp_path / "out.zarr")
    config = make_config(video_folder, tmp_path / "train.zarr", dtype="int8", splits=("train",), limit=1)
    extract_dataset(config)
    with pytest.raises(StoreMismatchError, match="the videos differ"):
        merge_stores([parts[0], config.out], tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(StoreExistsError, match="exists and is not a store"):
        merge_stores(parts, tmp_path / "mine")


@pytest.mark.parametrize("part", [(0, 3), (4, 3)])
def test_impossible_parts_are_refused(video_folder, tmp_path, make_config, part):
    with pytest.raises(ConfigError, match=r"--part takes I/N with I from 1 to N; found \d/3"):
        make_config(video_folder, tmp_path / "x.zarr", part=part)


@pytest.mark.slow  # three extractions
def test_parts_with_one_codec_from_several_places_merge(video_folder, int8_store, tmp_path, make_config):
    stores = []
    for number in (1, 2):
        source = shutil.copytree(int8_store, tmp_path / f"codec-{number}.zarr")
        config = make_config(video_folder, tmp_path / f"{number}.zarr", dtype="int8", codec_from=source)
        extract_dataset(replace(config, part=(number, 3)))
        stores.append(config.out)
    fitted = make_config(video_folder, tmp_path / "3.zarr", dtype="int8", part=(3, 3))
    extract_dataset(fitted)
    assert merge_stores([*stores, fitted.out], tmp_path / "out.zarr") == {"ok": 10, "failed": 1, "pending": 0}


@pytest.mark.slow  # four extractions
def test_a_codecs_source_may_move_and_not_change(video_folder, int8_store, tmp_path, make_config):
    config = make_config(video_folder, tmp_path / "x.zarr", dtype="int8", codec_from=int8_store, limit=1)
    extract_dataset(config)
    moved = replace(config, codec_from=shutil.copytree(int8_store, tmp_path / "moved.zarr"))
    assert extract_dataset(moved).videos["pending"] == 9
    other = make_config(video_folder, tmp_path / "other.zarr", dtype="int8", calibration_videos=2, limit=1)
    extract_dataset(other)
    for changed in (replace(config, codec_from=other.out), replace(config, codec_from=other.out, append=True)):
        with pytest.raises(StoreMismatchError, match=r"the codec of .*other\.zarr is not the one there"):
            extract_dataset(changed)
    with pytest.raises(StoreMismatchError, match=r"codec_from .* there, None here"):
        extract_dataset(replace(config, codec_from=None))


def test_an_unfinished_merge_has_checksums(parts):
    out = parts[0].parent / "merged.zarr"
    merge_stores(parts[:1], out)
    assert (out / "checksums.json").is_file() and verify_store(open_store(out)) == []


def test_a_damaged_part_does_not_pass_its_metadata_on(parts, tmp_path):
    metadata = parts[0] / "cls/zarr.json"
    metadata.write_text(metadata.read_text().replace('"channel"', '"chanel"'))
    with pytest.raises(StoreDamagedError, match=r"cls/zarr\.json does not match its recorded hash.*--repair"):
        merge_stores(parts, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


def test_a_merge_that_cannot_fit_does_not_start(parts, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ConfigError, match=r"needs \d\.\d MB more and its disk has 100\.0 kB free"):
        merge_stores(parts, tmp_path / "out.zarr")
    assert not list((tmp_path / "out.zarr/_parts").iterdir())


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "the disk quota is used")])
def test_a_merge_on_a_disk_that_fills_up_names_the_shard_and_goes_on(
    code, said, parts, int8_store, tmp_path, monkeypatch, contents
):
    copy = shutil.copyfile

    def refuse(source, target, **options):
        if Path(source).name == "000004.arrows":
            raise OSError(code, os.strerror(code), str(target))
        return copy(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", refuse)
        with pytest.raises(EnvironmentFailedError, match=rf"shard 4 could not be written: {said}.*; it needs \d"):
            merge_stores(parts, tmp_path / "out.zarr")
    merge_stores(parts, tmp_path / "out.zarr")
    assert contents(tmp_path / "out.zarr", "zarr.json", "fidelity.json") == contents(
        int8_store, "zarr.json", "fidelity.json"
    )
