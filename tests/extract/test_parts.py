import shutil
from dataclasses import replace

import pytest

from s4v.errors import ConfigError, StoreExistsError, StoreMismatchError
from s4v.extract.pipeline import extract_dataset
from s4v.store.merge import merge_stores
from s4v.store.reader import open_store
from s4v.store.verify import verify_store


@pytest.fixture
def parts(video_folder, tmp_path, make_config):
    """A skeleton, copied to three machines, each of which took its part."""
    config = make_config(video_folder, tmp_path / "skeleton.zarr", dtype="int8", prepare=True)
    assert extract_dataset(config).videos == {"ok": 0, "failed": 0, "pending": 11}
    paths = []
    for number in (1, 2, 3):
        paths.append(shutil.copytree(config.out, tmp_path / f"machine-{number}" / "x.zarr"))
        summary = extract_dataset(replace(config, out=paths[-1], prepare=False, part=(number, 3)))
        assert 0 < summary.videos["pending"] < 11
    return paths


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
