"""How a head is trained: optimiser, learning rate, loss, from a configuration that `resolve_preset` filled in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .config import TrainConfig

_BACKBONE_RATE_SHARE = 1e-3


def reference_learning_rate(backbone_width: int) -> float:
    """The rate that the reference trains recognition with: 1e-3 beside B (width 768), 1e-4 beside L and E."""
    return 1e-3 if backbone_width <= 768 else 1e-4


def make_optimizer(head: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW as the reference has it.

    For recognition with one weight decay on all parameters; for retrieval with none on biases and norms, and with a
    thousandth of the rate for what is trained of the backbone. A group's share of the rate is its `rate_share`.
    """
    assert config.learning_rate is not None and config.weight_decay is not None
    if config.task == "recognition":
        return torch.optim.AdamW(
            head.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            share = _BACKBONE_RATE_SHARE if name.startswith("end.") else 1.0
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((share, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": chosen, "rate_share": share, "weight_decay": decay}
            for (share, decay), chosen in sorted(groups.items(), key=lambda group: group[0])
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of parameters its share of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_share", 1.0)


def learning_rate_at(epoch: float, config: TrainConfig) -> float:
    """The learning rate at a fractional epoch: linear warm-up from 0, then a cosine to 0.

    The warm-up takes at most half of all epochs, so that a short run reaches its rate. The cosine begins where the
    warm-up ends; in the reference's retrieval it begins with the first step, and the warm-up cuts off its start.
    """
    assert config.learning_rate is not None and config.epochs is not None and config.warmup_epochs is not None
    warmup = min(config.warmup_epochs, config.epochs / 2)
    if epoch < warmup:
        return config.learning_rate * epoch / warmup
    begin = 0.0 if config.task == "retrieval" else warmup
    progress = (epoch - begin) / (config.epochs - begin)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Cross-entropy with label smoothing, averaged over clips: (B, classes), (B,) -> ()."""
    assert config.label_smoothing is not None
    return F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
