import numpy as np
import pytest
import torch

from s4v.backbone.text_tower import load_text_tower
from s4v.errors import ConfigError, StoreMismatchError
from s4v.store.reader import StoreReader, open_store
from s4v.train.networks.zero_shot import classify_zero_shot, embed_classes
from s4v.vectors import normalise_rows

PROMPTS = {"run": ["someone runs", "running"], "walk": ["someone walks"]}


def test_scores_are_cosines_of_mean_prompts_and_mean_frames(int8_store):
    store = open_store(int8_store)
    result = classify_zero_shot(store, PROMPTS, split="train")
    tower = load_text_tower("tiny-clip", weights="random:0", device=torch.device("cpu"))
    run = normalise_rows(normalise_rows(tower.encode(PROMPTS["run"])).mean(axis=0))
    walk = normalise_rows(tower.encode(PROMPTS["walk"]))[0]
    embeddings = store.read_embeddings()
    assert len(result.rows) == 8, "the broken one is left out"
    for row, scores, by_frame, answer in zip(
        result.rows, result.scores, result.frame_scores, result.answers, strict=True
    ):
        frames = normalise_rows(embeddings[row, 0][~np.isnan(embeddings[row, 0, :, 0])])
        np.testing.assert_allclose(by_frame, frames @ np.stack([run, walk]).T, rtol=1e-4, atol=1e-6)
        video = normalise_rows(frames.mean(axis=0))
        np.testing.assert_allclose(scores, [video @ run, video @ walk], rtol=1e-4, atol=1e-6)
        assert answer == ("run" if video @ run >= video @ walk else "walk")


def test_embeddings_are_read_shard_by_shard(int8_store, monkeypatch):
    store, read = open_store(int8_store), []
    monkeypatch.setattr(
        StoreReader, "read_embeddings", lambda *a, f=StoreReader.read_embeddings: read.append(a[1]) or f(*a)
    )
    result = classify_zero_shot(store, PROMPTS, split="val")
    assert result.scores.shape == (2, 2) and len(result.frame_scores) == 2
    shards = [store.layout.shard_rows(shard) for shard in range(store.layout.num_shards)]
    assert read == [span for span in shards if {*span} & {*result.rows.tolist()}] and len(read) < len(shards)


def test_length_of_a_prompts_embedding_does_not_matter():
    class Tower:
        def encode(self, texts):
            return np.array([[10.0, 0.0], [0.0, 0.1]])[: len(texts)]

    np.testing.assert_allclose(embed_classes(Tower(), {"a": ["x", "y"]}), [[0.5**0.5, 0.5**0.5]])


def test_bad_requests_are_refused(int8_store):
    store = open_store(int8_store)
    with pytest.raises(ConfigError, match="every class needs a prompt; found none for walk"):
        classify_zero_shot(store, {"run": ["x"], "walk": []})
    with pytest.raises(ConfigError, match="every class needs a prompt; found none for any"):
        classify_zero_shot(store, {})
    with pytest.raises(StoreMismatchError, match="no good video in split 'test'; it has train, val"):
        classify_zero_shot(store, PROMPTS, split="test")
