"""A released checkpoint as a file: its tensors by name, mapped and not read, and what lies beside them.

Releases hold their backbone too, gigabytes of it: only what somebody asks for is ever touched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ...errors import WeightsError

_WRAPPINGS = ("model_state_dict", "model_state")
"""Under which releases keep the model: Side4Video's and TDS-CLIP's, DiST's. Else its tensors lie at the top."""


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint; the tensors are those of the mapped file."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    """Of the model, by the names that the file has."""
    others: tuple[str, ...]
    """Names of what lies beside the model."""


def open_checkpoint(path: Path) -> CheckpointFile:
    """Map a checkpoint into memory. Nothing in it is run.

    Raises:
        WeightsError: If there is no such file, or it holds anything but tensors and plain values.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise WeightsError(f"{path}: {found}. Name a checkpoint of the reference, a .pt file.")
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # older files cannot be memory-mapped
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path} is not a whole checkpoint of plain tensors: {reason}. Nothing in it was run; download it again."
        ) from error
    if not isinstance(checkpoint, dict):
        return CheckpointFile(path, {}, ())
    wrapping = next((name for name in _WRAPPINGS if isinstance(checkpoint.get(name), dict)), None)
    state: dict[Any, Any] = checkpoint if wrapping is None else checkpoint[wrapping]
    others = () if wrapping is None else tuple(str(name) for name in checkpoint if name != wrapping)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return CheckpointFile(path, tensors, others)


def group_names(names: Iterable[str], others: Iterable[str]) -> dict[str, int]:
    """Tensors by the part of their name before a block's number, else by their name; 0 for what is no tensor."""
    places = Counter(re.split(r"\.\d+\.", name)[0] if re.search(r"\.\d+\.", name) else name for name in names)
    return {**places, **dict.fromkeys(others, 0)}


def describe_unused(unused: Mapping[str, int]) -> str:
    """What was not used, in a line: `visual.transformer.resblocks (24 tensors), epoch`."""
    counts = {name: f" ({count} tensor{'s' * (count > 1)})" if count else "" for name, count in unused.items()}
    return ", ".join(name + count for name, count in counts.items()) or "nothing"
