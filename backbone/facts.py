"""What is known of a tower without its weights; no library of towers and no torch, stage two asks here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, Self, get_args

from ..errors import ConfigError, StoreMismatchError

Precision = Literal["fp32", "fp16", "bf16"]

Activation = Literal["gelu", "quick_gelu"]
"""Of a CLIP tower's MLPs: no file of plain tensors tells which it was trained with."""

Family = Literal["clip", "eva"]
"""Kinds of blocks, and so of the side blocks that the reference puts beside them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTowerInfo:
    """What is known of a text tower; no weights."""

    depth: int
    """Blocks."""
    width: int
    """Dt, of what they hand on."""
    embed_dim: int
    """E."""
    context_length: int
    """The most words that a text can have, start and end among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneInfo:
    """What stage two and a store need to know of a backbone; no weights."""

    name: str
    """As the user wrote it."""
    architecture: str
    """Its library's name."""
    weights: str
    """`random:SEED`, a tag of its library, or the file's path."""
    weights_sha256: str
    """Of the weights' file; for random weights, of what they are drawn from."""
    width: int
    depth: int
    grid: tuple[int, int]
    """Patches down and across."""
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    embed_dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: Precision
    device_type: str
    side_family: Family
    """Whose side blocks fit beside it."""
    activation: Activation | None = None
    """Of its MLPs, where its library has a choice; None where the architecture has but one."""
    own_image_size: tuple[int, int] | None = None
    """What its weights were made for, where it takes frames of another size; None where `image_size` is that."""
    has_class_token: bool = True
    has_text_tower: bool = True
    """Whether it was built with one: its embeddings can be asked by text then."""

    @property
    def num_patches(self) -> int:
        """N, the class token not counted."""
        return self.grid[0] * self.grid[1]

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """The 8-bit colour that normalising brings nearest to zero."""
        red, green, blue = (min(255, max(0, round(255 * value))) for value in self.mean)
        return red, green, blue

    def at_size(self, image_size: tuple[int, int]) -> Self:
        """The same tower for frames of another size.

        Args:
            image_size: H, W.

        Raises:
            ConfigError: If a side is no multiple of the patch's, with the nearest sizes that are.
        """
        if any(side < 1 or side % patch for side, patch in zip(image_size, self.patch_size, strict=True)):
            below = [max(1, side // patch) * patch for side, patch in zip(image_size, self.patch_size, strict=True)]
            above = [-(-side // patch) * patch for side, patch in zip(image_size, self.patch_size, strict=True)]
            heights, widths = (dict.fromkeys(pair) for pair in zip(below, above, strict=True))
            nearest = ", ".join(describe_size(size) for size in product(heights, widths))
            raise ConfigError(
                f"--input takes multiples of the patch, which is {describe_size(self.patch_size)} pixels in "
                f"{self.name}; found {describe_size(image_size)}. The nearest are {nearest}."
            )
        own = self.own_image_size or self.image_size
        return replace(
            self,
            image_size=image_size,
            grid=(image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1]),
            own_image_size=None if image_size == own else own,
        )

    def describe(self) -> dict[str, Any]:
        """As JSON, for a store.

        The family is told only where `guess_side_family` would take another one, the own size only where it is another
        than the frames', and a class token or a text tower only where there is none. So stores are the same as those
        that were begun before backbones told it, and a command can go on with such a store.
        """
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if self.side_family == guess_side_family(self.architecture):
            del values["side_family"]
        for name in ("has_class_token", "has_text_tower"):
            if values[name]:
                del values[name]
        for name in ("activation", "own_image_size"):
            if values[name] is None:
                del values[name]
        return values


def describe_size(size: tuple[int, int]) -> str:
    """Height and width, as `--input` takes them: `480x864`."""
    return f"{size[0]}x{size[1]}"


def guess_side_family(architecture: str) -> Family:
    """The family of a tower whose store does not tell it, by open_clip's name of the architecture.

    This is the one place where a name decides.
    """
    return "eva" if architecture.startswith("EVA") else "clip"


def read_side_family(backbone: Mapping[str, Any]) -> Family:
    """Which side blocks the reference puts beside a store's backbone.

    Args:
        backbone: The store's attributes of it, as `BackboneInfo.describe` gave them.

    Raises:
        StoreMismatchError: If the store tells a family that s4v does not know.
    """
    family = backbone.get("side_family", guess_side_family(backbone["architecture"]))
    if family not in get_args(Family):
        raise StoreMismatchError(
            f"s4v knows the side blocks of {', '.join(get_args(Family))}; the store's backbone, "
            f"{backbone['architecture']}, has {family!r}. Use the s4v that made the store, or a later one."
        )
    return family
