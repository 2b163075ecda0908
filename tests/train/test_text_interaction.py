"""Against the reference's own numbers, and by hand."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from s4v.train.networks.text_interaction import MeanInteraction, TextBatch, WeightedTokenInteraction, contrastive_loss


@pytest.fixture
def golden(data_path):
    return load_file(data_path / "wti/io.safetensors"), json.loads((data_path / "wti/config.json").read_text())


@pytest.fixture
def interaction(golden):
    io, config = golden
    weights = dict(on_diagonal=config["cdcr_alpha1"], off_diagonal=config["cdcr_alpha2"])
    module = WeightedTokenInteraction(32, decorrelation=1.0, **weights)
    names = {"text_weight_fc": "text_weight", "video_weight_fc": "frame_weight"}
    state = {name: tensor for name, tensor in io.items() if "weight_fc" in name}
    module.load_state_dict({f"{names[n.partition('.')[0]]}.{n.partition('.')[2]}": t for n, t in state.items()})
    return module


def test_it_is_the_references(golden, interaction):
    io, config = golden
    found = interaction(TextBatch(io["text"], io["text_mask"].bool(), None), io["video"])
    for name, ours in (("eval_t2v", found.similarities), ("eval_v2t", found.similarities.T)):
        assert (ours - io[name]).abs().max() <= 1e-5 * io[name].abs().max()
    scaled = math.exp(config["logit_scale_log"]) * found.similarities
    assert (scaled - io["train_t2v"]).abs().max() <= 1e-5 * io["train_t2v"].abs().max()
    assert found.loss.item() == pytest.approx(io["train_cdcr"].item(), rel=1e-5)


def test_what_is_no_word_is_not_heard(golden, interaction):
    io, _ = golden
    mask = io["text_mask"].bool()
    noise = torch.where(mask[..., None], io["text"], torch.randn_like(io["text"]))
    expected, found = (interaction(TextBatch(words, mask, None), io["video"]) for words in (io["text"], noise))
    torch.testing.assert_close(found.similarities, expected.similarities)
    torch.testing.assert_close(found.loss, expected.loss)
    assert interaction(TextBatch(io["text"][:2], mask[:2], None), io["video"]).loss == 0


def test_means_and_loss_by_hand():
    frames = torch.tensor([[[2.0, 0.0], [0.0, 5.0]], [[0.0, 1.0], [0.0, 1.0]]])
    texts = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    half = 0.5**0.5
    found = MeanInteraction()(TextBatch(None, None, texts), frames)
    torch.testing.assert_close(found.similarities, torch.tensor([[half, 0.0], [half, 1.0]]))
    raw = MeanInteraction(normalises_frames=False)(TextBatch(None, None, texts), frames)
    longer = 29**-0.5  # the mean of (2, 0) and (0, 5) points to (2, 5)
    torch.testing.assert_close(raw.similarities, torch.tensor([[2 * longer, 0.0], [5 * longer, 1.0]]))
    similarities = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = math.log(1 + math.exp(-2))
    assert contrastive_loss(similarities, torch.tensor(math.log(2.0))).item() == pytest.approx(expected, rel=1e-6)
    assert contrastive_loss(1 - similarities, torch.tensor(math.log(2.0))).item() == pytest.approx(
        2 + expected, rel=1e-6
    )


def test_pairs_that_are_right_too_are_nobodys_negatives():
    similarities = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    is_same = torch.zeros(3, 3, dtype=torch.bool)
    is_same[0, 1] = is_same[1, 0] = is_same[0, 0] = True
    found = contrastive_loss(similarities, torch.tensor(0.0), is_same)
    own, other = math.exp(1), math.exp(0)
    expected = (2 * math.log(1 + other / own) + math.log(1 + 2 * other / own)) / 3
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_words_that_are_all_the_same_are_no_accident():
    """Captions begin alike: where every frame's best word is that beginning, channels do not vary."""
    module = WeightedTokenInteraction(8, decorrelation=1e-3)
    words = torch.ones(3, 2, 8)
    found = module(TextBatch(words, torch.ones(3, 2, dtype=torch.bool), None), torch.randn(3, 4, 8))
    (found.similarities.sum() + found.loss).backward()
    assert torch.isfinite(found.loss)
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in module.parameters())
