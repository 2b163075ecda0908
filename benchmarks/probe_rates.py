"""Which rate and decay a linear probe wants, over its width, its videos and its epochs: class tokens of one store.

    python benchmarks/probe_rates.py --store runs/demo/world.zarr [--rounds 1]

Three quarters of the training videos are learnt from, or fewer; all others are asked. Tokens of a clip are averaged
over its frames, as the probe reads them, or laid side by side: a probe four times as wide. Each cell has the top-1 that
a rate and a decay came to, beside the highest of the row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import describe_machine, format_table, keep

from s4v.store.reader import open_store
from s4v.train.clips import ClipLoader, find_labelled_rows, hold_out_rows, plan_evaluation
from s4v.train.config import TrainConfig
from s4v.train.networks.linear_probe import Linear, LinearProbe, LinearProbes
from s4v.train.recipe import (
    Optimisation,
    find_biases,
    learning_rate_at,
    make_optimizer,
    set_learning_rate,
)

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DECAYS = (0.0, 0.15)
BATCH = 32
CASES = ((0.25, 30), (1.0, 30), (1.0, 10))
"""Share of the videos that are learnt from, epochs."""

Clips = tuple[torch.Tensor, torch.Tensor]
"""Class tokens (n, T, 1, D), labels (n,)."""


def read_clips(store_path: Path) -> tuple[Clips, Clips]:
    """Of the last layer: training videos, and those that are asked."""
    store = open_store(store_path)
    parts = hold_out_rows(find_labelled_rows(store, "train"), store, 0.25, seed=0, by_class=True)
    loader = ClipLoader(store, arrays=("cls",), layers=store.layout.layers[-1:], device=torch.device("cpu"))
    read = []
    for part in parts:
        plans, _ = plan_evaluation(part, num_frames=store.layout.num_frames, batch_size=64)
        batches = list(loader.load(plans))
        read.append((torch.cat([one.cls for one in batches]), torch.cat([one.labels for one in batches])))
    return read[0], read[1]


def train(train: Clips, val: Clips, num_classes: int, epochs: int, seed: int) -> list[float]:
    """Top-1 of a probe of each rate and decay, in the order of both; all see the same batches."""
    tokens, labels = train
    recipe = Linear().find_recipe("recognition", tokens.shape[-1]).describe(epochs)
    grid = [(rate, decay) for rate in RATES for decay in DECAYS]
    options = {name: recipe[name] for name in ("warmup_epochs", "label_smoothing", "optimizer", "undecayed")}
    configs, probes, optimizers = [], [], []
    for rate, decay in grid:
        torch.manual_seed(seed)
        probe = LinearProbe(tokens.shape[-1], num_classes, counts_all_clips=True)
        own = {**options, "epochs": epochs, "learning_rate": rate, "weight_decay": decay}
        config = TrainConfig(features=Path(), out=Path(), head="linear", **own)
        optimizer = make_optimizer(probe.parameter_groups(), config, Optimisation(), find_biases(probe), is_fused=True)
        configs.append(config)
        probes.append(probe)
        optimizers.append(optimizer)
    stack, generator = LinearProbes(probes), torch.Generator().manual_seed(seed)
    steps = len(tokens) // BATCH
    for epoch in range(epochs):
        order = torch.randperm(len(tokens), generator=generator)
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            outputs = stack(None, None, tokens[chosen])
            losses = [
                F.cross_entropy(one, labels[chosen], label_smoothing=options["label_smoothing"]) for one in outputs
            ]
            for config, optimizer in zip(configs, optimizers, strict=True):
                optimizer.zero_grad()
                set_learning_rate(optimizer.param_groups, learning_rate_at(epoch + (step + 0.5) / steps, config))
            sum(losses[1:], losses[0]).backward()
            for optimizer in optimizers:
                optimizer.step()
    stack.eval()
    with torch.no_grad():
        outputs = stack(None, None, val[0])
    return [float((one.argmax(1) == val[1]).float().mean()) for one in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1, help="Seeds, whose figures are averaged.")
    options = parser.parse_args()
    learnt, asked = read_clips(options.store)
    num_classes = len(open_store(options.store).classes.names)
    rows, figures = [], {}
    for name, shape in (("averaged", lambda x: x), ("side by side", lambda x: x.flatten(1)[:, None, None])):
        for share, epochs in CASES:
            count = int(share * len(learnt[1]))
            order = torch.randperm(len(learnt[1]), generator=torch.Generator().manual_seed(0))[:count]
            clips, others = (shape(learnt[0][order]), learnt[1][order]), (shape(asked[0]), asked[1])
            rounds = [train(clips, others, num_classes, epochs, seed) for seed in range(options.rounds)]
            tops = torch.tensor(rounds).mean(0).view(len(RATES), len(DECAYS))
            width = clips[0].shape[-1]
            for place, decay in enumerate(DECAYS):
                cells = [f"{top:.1%}" for top in tops[:, place]]
                rows.append([f"{width}, {name}", str(count), str(epochs), f"{decay:g}", *cells, f"{tops.max():.1%}"])
            figures[f"{width} {count} {epochs}"] = tops.tolist()
    header = ["width", "videos", "epochs", "decay", *(f"rate {rate:g}" for rate in RATES), "highest of both"]
    keep("probe_rates", {"machine": describe_machine("torch", "s4v"), "top1": figures}, format_table(header, rows), [])


if __name__ == "__main__":
    main()
