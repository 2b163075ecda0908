"""What a network's released files are to s4v: a table of names, and what its sizes follow from.

A new one is a file beside this, and a line in `RELEASED` of checkpoint_names.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from ...errors import WeightsError
from ...store.reader import StoreReader
from ..choices import Family
from ..networks.contract import NetworkShape
from .checkpoint_file import CheckpointFile

NamePatterns = tuple[tuple[re.Pattern[str], str], ...]
"""The reference's name -> ours, the first that fits; a group is the number of a block."""


class ReleasedNetwork(ABC):
    """A network of whose release s4v reads the files."""

    title: ClassVar[str]
    """As its paper calls it."""
    names: ClassVar[NamePatterns]

    @abstractmethod
    def is_named_in(self, names: Iterable[str]) -> bool:
        """Whether a file's names alone tell that it holds this network."""

    @abstractmethod
    def read_shape(
        self, file: CheckpointFile, ours: Mapping[str, torch.Tensor], layers: tuple[int, ...] | None
    ) -> NetworkShape:
        """Everything that the network's sizes follow from.

        Args:
            file: The checkpoint.
            ours: Its tensors under our names, as `rename` gives them.
            layers: Backbone blocks that it reads, as somebody named them; None where nobody did.

        Raises:
            WeightsError: If it cannot be told, or does not fit `layers`.
        """

    @abstractmethod
    def count_backbone_blocks(self, names: Iterable[str]) -> int | None:
        """Blocks of the backbone that a file carries; None where it carries none."""

    def describe(self, shape: Any) -> str:
        """What a file with such a network is, in words."""
        return f"checkpoint of {self.title}"

    def find_family(self, shape: Any) -> Family:
        """Beside which family of backbones it was released. By default CLIP's."""
        return "clip"

    def compare(self, shape: Any, store: StoreReader) -> dict[str, tuple[Any, Any]]:
        """What else than sizes must agree with a store, by name: here and there. By default nothing."""
        return {}

    def name_text(self, name: str, shape: Any) -> str | None:
        """The name, in a text tower that the network needs, of a tensor without a name of ours. By default none."""
        return None

    def is_state(self, new_name: str, shape: Any) -> bool:
        """Whether a tensor with a name of ours is a weight of the network, not of what it stands beside."""
        return not new_name.startswith("end.")

    def complete(self, state: Mapping[str, torch.Tensor], shape: Any) -> dict[str, torch.Tensor]:
        """The network's state, with what no file holds. By default as it is."""
        return dict(state)

    def reshape(self, name: str, new_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the reference as ours has it. By default as it is."""
        return tensor

    def translate(self, names: Iterable[str]) -> dict[str, str]:
        """Our names by the reference's, of those that have one."""
        new_names = {}
        for name in names:
            for pattern, replacement in self.names:
                new_name, count = pattern.subn(replacement, name)
                if count:
                    new_names[name] = new_name
                    break
        return new_names

    def rename(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights (or gradients) under our names and in our shapes; what has no name of ours is left out."""
        new_names = self.translate(tensors)
        return {new: self.reshape(name, new, tensors[name]) for name, new in new_names.items()}


def count_numbers(pattern: re.Pattern[str], names: Iterable[str]) -> int | None:
    """How many blocks names count, by the pattern's group; None where they name none."""
    blocks = {int(match[1]) for match in map(pattern.match, names) if match}
    return max(blocks) + 1 if blocks else None


def count_side_blocks(ours: Mapping[str, torch.Tensor]) -> int:
    """L, by our names."""
    return len({name.split(".")[1] for name in ours if name.startswith("blocks.")})


def require_names(file: CheckpointFile, title: str, ours: Mapping[str, torch.Tensor], needed: Iterable[str]) -> None:
    """Refuse a file without the tensors that sizes follow from.

    Raises:
        WeightsError: With all that are missing, by our names.
    """
    if missing := [f"no {name}" for name in needed if name not in ours]:
        raise WeightsError(f"{file.path} is not a checkpoint of {title} that s4v knows: {'; '.join(missing)}")


def resolve_layers(
    file: CheckpointFile, num_blocks: int, depth: int | None, layers: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Which backbone blocks a network of side blocks reads: all, or every second one up to the last, else `layers`.

    Raises:
        WeightsError: If `layers` do not fit, or nobody can tell.
    """
    backbone = "no backbone" if depth is None else f"a backbone of {depth} blocks"
    facts = f"{file.path} holds {num_blocks} side blocks and {backbone}"
    if layers is not None:
        chosen = tuple(sorted(set(layers)))
        if len(chosen) != num_blocks:
            raise WeightsError(f"{facts}: --layers must name {num_blocks} backbone blocks; found {len(chosen)}")
        if chosen[0] < 0 or (depth is not None and chosen[-1] >= depth):
            raise WeightsError(f"{facts}: --layers {','.join(map(str, chosen))} are not all among them")
        return chosen
    if depth == num_blocks:
        return tuple(range(num_blocks))
    if depth == 2 * num_blocks:
        return tuple(range(1, depth, 2))
    raise WeightsError(f"{facts}: which it reads is left open. Name them: --layers 1,3,5 (0-based)")
