"""benchmarks/scale.py at a size of seconds: it measures what it says, on stores that this version makes."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from s4v.store.reader import open_store
from s4v.store.verify import verify_store

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.setitem(sys.modules, "_report", load_script("_report"))
    return load_script("scale")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_every_figure_is_of_what_was_asked_for(scale, tmp_path):
    options = Namespace(videos=300, shards=30, retry=5, index_rows=400, patience=600.0)
    path = tmp_path / "store.zarr"
    assert scale.MEASURES["make"](path, options)["of"] == 30
    store = open_store(path)
    assert store.layout.num_rows == 300 and store.layout.num_shards == 30
    assert verify_store(store) == []
    consolidated = scale.MEASURES["consolidation"](path, options)
    assert consolidated["of"] == 30 and consolidated["s"] > 0
    table = open_store(path).read_manifest()
    assert set(table["reason"].to_pylist()) == {"made up"} and len(table["frame_indices"][0]) == scale.FRAMES
    retried = scale.MEASURES["retry"](path, options)
    assert (retried["of"], retried["measured"]) == (5, 5) and retried["s"] > 0
    assert verify_store(open_store(path)) == []
    worker = scale.MEASURES["worker"](path, options)
    assert worker["of"] == 300 and worker["s"] >= 0 and worker["mb"] >= 0
    index = scale.MEASURES["index"](path, options)
    assert (index["of"], index["measured"]) == (400, 400)


def test_what_takes_too_long_is_told_of_a_part(scale, tmp_path):
    options = Namespace(index_rows=200_000, patience=0.0)
    index = scale.MEASURES["index"](tmp_path / "store.zarr", options)
    assert index["of"] == 200_000 and 0 < index["measured"] < 200_000
    told = scale.describe({**index, "s": 61.5, "cpu_s": 60.0, "mb": 3.0})
    assert told == f"61.50 s (60.00 CPU s), 3 MB, from the first {index['measured']:,}"
