"""Where a training stands: all that a killed run needs to go on to the same bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import StoreDamagedError
from ..files import write_atomic

STATE_NAME = "state.safetensors"


@dataclass(slots=True)
class Position:
    """How far a training is."""

    epoch: int = 0
    """The one under way, from 0."""
    step_in_epoch: int = 0
    """Steps of that epoch that are done."""
    steps: int = 0
    """Of the whole training."""
    best: dict[str, Any] | None = None
    """Metrics of the best epoch so far."""
    improved: int = 0
    """The last epoch, from 1, that was better than all before it."""
    seconds: float = 0.0
    """Spent until the state was last saved."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Of the last epoch that was finished."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """() of each step of the epoch under way."""


def save_state(
    path: Path,
    position: Position,
    head: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Mapping[str, Any],
) -> None:
    """Write one file, atomically: position, weights, moments and the gradient scaler's numbers.

    Args:
        path: The file.
        position: How far it is.
        head: Its weights and buffers.
        optimizer: Its state; its groups' options follow from the configuration.
        precision: The state of mixed precision, plain numbers.
    """
    tensors = {f"head.{name}": value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(v).cpu().clone() for name, v in values.items()}
    if position.losses:
        tensors["losses"] = torch.stack(position.losses).cpu()
    metadata = {f.name: getattr(position, f.name) for f in fields(position) if f.name != "losses"}
    metadata["precision"] = dict(precision)
    write_atomic(path, lambda temporary: save_file(tensors, temporary, {"position": json.dumps(metadata)}))


def load_state(path: Path, head: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Position, dict[str, Any]]:
    """Put weights and moments back where they were.

    Returns:
        The position, and the state of mixed precision.

    Raises:
        StoreDamagedError: If the file is not a whole state of this head.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["position"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        head.load_state_dict({n.removeprefix("head."): t for n, t in tensors.items() if n.startswith("head.")})
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StoreDamagedError(
            f"{path} is not a whole state of this training: {reason}. Remove the run's folder and train anew."
        ) from error
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, part = name.split(".")
            moments.setdefault(int(number), {})[part] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    losses = list(tensors["losses"].unbind()) if "losses" in tensors else []
    precision = metadata.pop("precision")
    return Position(**metadata, losses=losses), precision
