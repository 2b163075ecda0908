"""Where a training stands: all that a killed run needs to go on to the same bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    """How far a head is."""

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
    bad_rows: list[int] = field(default_factory=list)
    """Rows that could not be read, for which others stand in."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """() of each step of the epoch under way."""


@dataclass(frozen=True, slots=True)
class StackState:
    """What is saved of heads that have one module and one optimiser."""

    heads: list[tuple[Position, str | None]]
    """How far each head is, and why it stopped, where it did."""
    module: torch.nn.Module
    """Its weights and buffers."""
    optimizer: torch.optim.Optimizer
    """Its moments; its groups' options follow from the configuration."""
    precision: Mapping[str, Any]
    """The state of mixed precision, plain numbers."""
    is_idle: bool = False
    """Whether no head learns any more: of several stacks, the positions are all that is saved of this one."""


def save_state(path: Path, stacks: Sequence[StackState]) -> None:
    """Write the states of all stacks of a training into one file, atomically: all stand at the same step.

    Of one head alone the names in it are those of a run.
    """
    is_alone = _is_alone(stacks)
    tensors: dict[str, torch.Tensor] = {}
    metadata: list[dict[str, Any]] = []
    for number, stack in enumerate(stacks):
        is_over = stack.is_idle and not is_alone
        own = {} if is_over else _list_tensors(stack.module, stack.optimizer)
        for place, (position, _) in enumerate(stack.heads):
            if position.losses:
                own[f"losses.{place}"] = torch.stack(position.losses).cpu()
        tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
        heads = [{**_describe(position), "stopped": stopped} for position, stopped in stack.heads]
        metadata.append({"heads": heads, "precision": dict(stack.precision), "is_idle": is_over})
    if is_alone:
        tensors = {_ALONE.get(name, name.removeprefix("0.")): tensor for name, tensor in tensors.items()}
        (stack,) = stacks
        position_json = json.dumps({**_describe(stack.heads[0][0]), "precision": dict(stack.precision)})
    else:
        position_json = json.dumps(metadata)
    write_atomic(path, lambda temporary: save_file(tensors, temporary, {"position": position_json}))


def load_state(path: Path, stacks: Sequence[StackState]) -> list[tuple[list[tuple[Position, str | None]], Any]]:
    """Put the weights and moments of all stacks back where they were.

    Returns:
        Of each stack: its heads' positions and why they stopped, and the state of mixed precision.

    Raises:
        StoreDamagedError: If the file is not a whole state of these stacks.
    """
    states = []
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["position"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if _is_alone(stacks):
            names = {ours: theirs for theirs, ours in _ALONE.items()}
            tensors = {names.get(name, f"0.{name}"): tensor for name, tensor in tensors.items()}
            precision = metadata.pop("precision")
            metadata = [{"heads": [{**metadata, "stopped": None}], "precision": precision, "is_idle": False}]
        for number, (saved, stack) in enumerate(zip(metadata, stacks, strict=True)):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
            heads: list[tuple[Position, str | None]] = []
            for place, values in enumerate(saved["heads"]):
                stopped, losses = values.pop("stopped"), own.pop(f"losses.{place}", None)
                heads.append((Position(**values, losses=[] if losses is None else list(losses.unbind())), stopped))
            if len(heads) != len(stack.heads):
                raise ValueError(f"{len(heads)} heads in it, {len(stack.heads)} here")
            if not saved["is_idle"]:
                _put_back(own, stack.module, stack.optimizer)
            states.append((heads, saved["precision"]))
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise StoreDamagedError(
            f"{path} is not a whole state of this training: {reason}. Remove the run's folder and train anew."
        ) from error
    return states


# Runs from before there were several heads in a training have these names.
_ALONE = {"0.losses.0": "losses"}


def _is_alone(stacks: Sequence[StackState]) -> bool:
    return len(stacks) == 1 and len(stacks[0].heads) == 1


def _describe(position: Position) -> dict[str, Any]:
    return {f.name: getattr(position, f.name) for f in fields(position) if f.name != "losses"}


def _list_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    # Copies: heads of a stack may share a buffer, which safetensors refuses to write twice.
    tensors = {f"head.{name}": value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(v).cpu().clone() for name, v in values.items()}
    return tensors


def _put_back(tensors: Mapping[str, torch.Tensor], module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module.load_state_dict({n.removeprefix("head."): t for n, t in tensors.items() if n.startswith("head.")})
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, part = name.split(".")
            moments.setdefault(int(number), {})[part] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
