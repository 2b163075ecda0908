"""How a head is trained: optimiser, learning rate, loss, from a configuration that `resolve_preset` filled in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .config import TrainConfig


def reference_learning_rate(backbone_width: int) -> float:
    """The rate that the reference trains recognition with: 1e-3 beside B (width 768), 1e-4 beside L and E."""
    return 1e-3 if backbone_width <= 768 else 1e-4


def make_optimizer(head: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with one weight decay on all parameters, as the reference trains recognition."""
    assert config.learning_rate is not None and config.weight_decay is not None
    return torch.optim.AdamW(
        head.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
    )


def learning_rate_at(epoch: float, config: TrainConfig) -> float:
    """The learning rate at a fractional epoch: linear warm-up from 0, then a cosine to 0.

    The warm-up takes at most half of all epochs, so that a short run reaches its rate.
    """
    assert config.learning_rate is not None and config.epochs is not None and config.warmup_epochs is not None
    warmup = min(config.warmup_epochs, config.epochs / 2)
    if epoch < warmup:
        return config.learning_rate * epoch / warmup
    progress = (epoch - warmup) / (config.epochs - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Cross-entropy with label smoothing, averaged over clips: (B, classes), (B,) -> ()."""
    assert config.label_smoothing is not None
    return F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
