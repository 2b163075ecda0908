"""Run by every process of a torchrun: R2-Tuning's gradients are those of one process that has all videos.

With dropout and drop path; the losses are those of the training loop, gathered.
"""

import copy

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from s4v.train.networks.draws import key_examples
from s4v.train.networks.r2_tuning import R2Network
from s4v.train.tasks.grounding_losses import Annotation, find_losses, find_terms

NUM_VIDEOS, NUM_FRAMES = 6, 5  # too short for the last level: its weights have gradients all the same


def make_batch():
    rng = torch.Generator().manual_seed(1)
    mask = torch.arange(NUM_FRAMES) < torch.tensor([5, 3, 4, 5, 2, 4])[:, None]
    tokens = torch.randn(NUM_VIDEOS, NUM_FRAMES, 3, 5, 16, generator=rng) * mask[:, :, None, None, None]
    words = torch.randn(NUM_VIDEOS, 3, 4, 12, generator=rng)
    word_mask = torch.arange(4) < torch.tensor([4, 2, 3, 4, 1, 2])[:, None]
    draws = torch.from_numpy(key_examples(0, 0, torch.arange(NUM_VIDEOS).numpy()))
    inputs = tokens[:, :, :, 1:], tokens[:, :, :, 0], words, word_mask, mask, draws
    windows = torch.tensor([[0.0, 3], [1, 3], [2, 4], [0, 5], [0, 1], [1, 4]])[:, None]
    saliency = torch.rand(NUM_VIDEOS, NUM_FRAMES, generator=rng) * mask
    return inputs, Annotation(saliency, torch.tensor([1, 2, 3, 0, 1, 2]), windows)


def main():
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(broadcast_buffers=False))
    fabric.launch()
    torch.manual_seed(0)
    whole = R2Network(num_layers=3, width=16, text_width=12, num_patches=4, side_width=16, num_heads=2).train()
    torch.nn.init.constant_(whole.recurrence.scale, 0.5)
    own = copy.deepcopy(whole)
    inputs, annotation = make_batch()
    expected = sum(find_losses(find_terms(whole(*inputs), annotation, inputs[4])).values())
    expected.backward()

    def gather(values):
        gathered = fabric.all_gather(values, sync_grads=True)
        if gathered.requires_grad:
            gathered.register_hook(torch.Tensor.contiguous)
        return gathered.flatten(0, 1)

    wrapped, _ = fabric.setup(own, torch.optim.SGD(own.parameters(), lr=0.1))
    part = slice(3 * fabric.global_rank, 3 * fabric.global_rank + 3)
    for _ in range(2):  # the second pass fails where a parameter was left out of the first
        own.zero_grad()
        mine = [values[part] for values in inputs]
        terms = find_terms(wrapped(*mine), Annotation(*(values[part] for values in annotation)), mine[4])
        loss = sum(find_losses(terms.gather(gather)).values())
        fabric.backward(loss)
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item(), (loss, expected)
    largest = max(p.grad.abs().max().item() for p in whole.parameters())
    for (name, ours), theirs in zip(own.named_parameters(), whole.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max().item() < 1e-6 * largest, name


if __name__ == "__main__":
    main()
