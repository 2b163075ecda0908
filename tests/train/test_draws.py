"""Dropout by example: its masks follow from keys, places and counters alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from s4v.store.reader import open_store
from s4v.train.clips import find_labelled_rows
from s4v.train.config import TrainConfig
from s4v.train.loop import train_run
from s4v.train.networks.draws import drop_channels, drop_examples, key_examples
from s4v.train.networks.linear_probe import LinearProbe

MASK_32 = 2**32 - 1


def mix(x):
    """Python's own whole numbers, of 32 bits."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK_32
    x ^= x >> 15
    x = x * 0x846CA68B & MASK_32
    return x ^ x >> 16


def hash_key(key, place):
    golden = 0x9E3779B9
    return mix(mix((key & MASK_32) + place * golden & MASK_32) ^ key >> 32 & MASK_32)


def draw_half(key, place, token, channel):
    """From -32,768 up."""
    golden = 0x9E3779B9
    of_token = mix(token * golden + hash_key(key, place) & MASK_32)
    pair = mix(of_token + mix(channel // 2 * golden & MASK_32) & MASK_32)
    half = pair >> 16 * (channel % 2) & 0xFFFF
    return half - 2**16 * (half >> 15)


def keys_of(*rows, epoch=0):
    return torch.from_numpy(key_examples(3, epoch, np.array(rows)))


@pytest.mark.parametrize("probability", [0.1, 0.35, 0.5])
def test_a_mask_is_a_hash_of_counters(probability):
    keys, tokens = keys_of(4, 7, 2), torch.tensor([[0, 1], [50, 51]], dtype=torch.int32)
    found = drop_channels(torch.ones(3, 2, 2, 5), keys, 9, tokens, probability)
    num_zeros = round(probability * 2**16)
    for b, key in enumerate(keys.tolist()):
        for place in np.ndindex(2, 2):
            for channel in range(5):
                is_kept = draw_half(key, 9, tokens[place].item(), channel) >= num_zeros - 2**15
                assert found[(b, *place, channel)] == pytest.approx(is_kept * 2**16 / (2**16 - num_zeros))
    whole = drop_examples(torch.ones(3, 4), keys, 9, probability)
    for b, key in enumerate(keys.tolist()):
        half = hash_key(key, 9) & 0xFFFF
        is_kept = half - 2**16 * (half >> 15) >= num_zeros - 2**15
        assert whole[b].tolist() == pytest.approx([is_kept * 2**16 / (2**16 - num_zeros)] * 4)


def test_keys_are_what_they_were():
    """Numbers of a training that is gone on with later, perhaps elsewhere."""
    assert key_examples(0, 0, np.arange(2)).tolist() == [2558736989570252433, 4764156602392020899]
    assert key_examples(7, 3, np.array([5]), np.array([11])).tolist() == [-7563060500117391347]


def test_other_seeds_epochs_and_examples_have_other_keys():
    rows = np.arange(100)
    keys = [key_examples(seed, epoch, rows, rows + more) for seed in (0, 1) for epoch in (0, 1) for more in (0, 1)]
    assert len(set(np.concatenate(keys).tolist())) == 800


@pytest.mark.parametrize("probability", [0.1, 0.35, 0.5])
def test_as_many_are_dropped_as_was_asked_for_and_none_with_its_neighbours(probability):
    """Shares within five deviations: of all, and of pairs of channels, tokens, places, examples and epochs."""
    x, tokens = torch.ones(16, 64, 128), torch.arange(64, dtype=torch.int32)
    masks = [
        drop_channels(x, keys_of(*range(16), epoch=epoch), place, tokens, probability) > 0
        for epoch, place in ((0, 0), (0, 1), (1, 0))
    ]
    mask = masks[0]
    kept, deviation = 1 - probability, lambda share, count: 5 * (share * (1 - share) / count) ** 0.5
    assert abs(mask.float().mean().item() - kept) < deviation(kept, mask.numel())
    pairs = [(mask[:1], mask[1:2]), (mask[:, :-1], mask[:, 1:]), (mask[..., :-1], mask[..., 1:])]
    pairs += [(mask[..., :-2], mask[..., 2:]), (mask, masks[1]), (mask, masks[2])]
    for one, other in pairs:
        both = (one & other).float()
        assert abs(both.mean().item() - kept**2) < deviation(kept**2, both.numel())


def test_the_mean_stays():
    x = torch.full((8, 500, 40), 3.0)
    found = drop_channels(x, keys_of(*range(8)), 0, torch.arange(500, dtype=torch.int32), 0.35)
    assert found.mean().item() == pytest.approx(3, rel=0.01)
    assert found.unique().tolist() == pytest.approx([0, 3 / 0.65], rel=1e-4)


def test_a_part_of_the_tokens_and_examples_draws_what_the_whole_draws():
    x, keys, tokens = torch.randn(4, 6, 7), keys_of(*range(4)), torch.arange(6, dtype=torch.int32)
    whole = drop_channels(x, keys, 2, tokens, 0.5)
    part = drop_channels(x[1:3, ::2], keys[1:3], 2, tokens[::2], 0.5)
    assert torch.equal(part, whole[1:3, ::2])
    assert torch.equal(drop_examples(x[2:], keys[2:], 2, 0.5), drop_examples(x, keys, 2, 0.5)[2:])


def test_a_gradient_is_dropped_where_its_number_was():
    x = torch.randn(2, 3, 5, requires_grad=True)
    dropped = drop_channels(x, keys_of(0, 1), 0, torch.arange(3, dtype=torch.int32), 0.5)
    dropped.sum().backward()
    assert torch.equal(x.grad > 0, dropped != 0) and 0 < (x.grad > 0).sum() < x.numel()


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_no_share_is_dropped_that_leaves_nothing(probability):
    with pytest.raises(ValueError, match="from 0 to below 1"):
        drop_examples(torch.ones(2, 3), keys_of(0, 1), 0, probability)


def test_a_training_hands_over_the_keys_of_its_examples(float_store, tmp_path, monkeypatch):
    """To networks that ask for them, whatever the order; the others have none."""
    seen, inputs = [], LinearProbe.inputs

    def note(self, batch):
        seen.append(batch.draws)
        return inputs(self, batch)

    monkeypatch.setattr(LinearProbe, "inputs", note)
    config = TrainConfig(
        features=float_store, out=tmp_path / "plain", head="linear", epochs=1, batch_size=4, device="cpu"
    )
    train_run(config)
    trained = [draws for draws in seen if draws is not None]
    assert seen and not trained
    monkeypatch.setattr(LinearProbe, "draws_by_example", True)
    for rank, size in enumerate((4, 2)):
        seen.clear()
        train_run(replace(config, out=tmp_path / str(rank), epochs=2, batch_size=size, seed=5))
        data = find_labelled_rows(open_store(float_store), "train")
        every = [set(key_examples(5, epoch, data.rows, data.labels).tolist()) for epoch in (0, 1)]
        drawn = [set(draws.tolist()) for draws in seen if draws is not None]
        by_epoch = [set().union(*(one for one in drawn if one <= own)) for own in every]
        assert by_epoch == every and sum(map(len, drawn)) == sum(map(len, every))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_draws_what_a_cpu_draws():
    x, keys, tokens = torch.randn(4, 300, 770), keys_of(*range(4)), torch.arange(300, dtype=torch.int32)
    on_gpu = drop_channels(x.cuda(), keys.cuda(), 5, tokens.cuda(), 0.5)
    assert torch.equal(on_gpu.cpu() != 0, drop_channels(x, keys, 5, tokens, 0.5) != 0)
