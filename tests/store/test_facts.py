"""What a store says of itself, by name and type."""

import pickle

import pytest

from s4v.errors import StoreDamagedError
from s4v.store.attributes import Attributes
from s4v.store.facts import StoreFacts
from s4v.store.reader import open_store


def test_facts_are_those_that_the_store_records(int8_store):
    store = open_store(int8_store)
    facts, recorded = store.facts, store.attributes
    for name in ("format_version", "created", "sampling", "resize", "seed", "calibration_videos", "codec_from"):
        assert getattr(facts, name) == recorded[name]
    for name in ("name", "architecture", "weights", "weights_sha256", "width", "depth", "embed_dim"):
        assert getattr(facts.backbone, name) == recorded["backbone"][name]
    for name in ("patch_size", "grid", "image_size", "mean", "std"):
        assert getattr(facts.backbone, name) == tuple(recorded["backbone"][name])
    assert facts.backbone.has_random_weights
    assert (facts.dataset.name, facts.dataset.protocol) == ("folder", None)
    assert facts.dataset.root == recorded["dataset"]["root"]
    assert facts.codec.dtype == "int8" and set(facts.codec.parts) == {"mean", "scale"}
    assert facts.codec.sha256 == store.codec.sha256
    assert facts.class_names == store.classes.names and facts.segment_s is None


def test_a_fact_that_a_store_lacks_is_told_when_it_is_asked_for(tmp_path):
    facts = StoreFacts(Attributes({"backbone": {"name": "toy"}}, tmp_path / "old.zarr"))
    assert facts.backbone.name == "toy" and facts.segment_s is None and facts.codec_from is None
    with pytest.raises(StoreDamagedError, match=r"old\.zarr/zarr\.json lacks the attribute backbone\.depth"):
        _ = facts.backbone.depth
    with pytest.raises(StoreDamagedError, match="lacks the attribute sampling"):
        _ = facts.sampling


def test_facts_go_to_other_processes(int8_store):
    facts = open_store(int8_store).facts
    assert pickle.loads(pickle.dumps(facts)) == facts
