"""What a tower is to the rest of s4v: a library in the table, and the backbones and text towers that it builds.

A new library of towers is one file here: a `TowerLibrary`, the `Backbone` that it builds and, where its models read
texts, a `TextTower`. `weights.py` has what their weights need.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..errors import BackboneError, EnvironmentFailedError
from ..store.texts import Texts
from .facts import BackboneInfo, Precision, TextTowerInfo, describe_size

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Of weights and arithmetic, by precision."""

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
"""CLIP starts training from it. Random weights keep it, and towers without texts have no other."""


@dataclass(frozen=True, slots=True)
class FrameTokens:
    """One forward pass over B frames; tensors on the backbone's device, in its precision."""

    patches: list[torch.Tensor]
    """One (B, N, D) for each tapped layer, ascending."""
    cls: torch.Tensor | None
    """(B, L, D); None of a tower without a class token."""
    embedding: torch.Tensor
    """(B, E) float32, not normalised."""


class Backbone(ABC):
    """A frozen vision tower that gives the tokens of chosen blocks; `build_backbone` makes one.

    Until `load_weights` is called, and after `free_weights`, it has no weights and takes no memory for them.

    Args:
        tower: Its module, built without memory for parameters (`weights.parameters_on_meta`).
        info: What is known of it.
        device: Where it runs.
        forward: What takes pictures through the tower. `run_tower` calls it as `self.forward`, which `torch.compile`
            may have replaced.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    """Installed packages that compute it, beside torch: a store notes their versions."""

    def __init__(self, tower: Any, info: BackboneInfo, device: torch.device, forward: Callable[..., Any]) -> None:
        self.tower = tower
        self.info = info
        self.device = device
        self.forward = forward
        self._least_frames = 0
        self._mean = torch.tensor(info.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(info.std, device=device).view(1, 3, 1, 1)

    @property
    @abstractmethod
    def blocks(self) -> nn.Module:
        """The transformer blocks, whose matrix products are the work of a frame."""

    @abstractmethod
    def load_weights(self) -> Self:
        """Give the tower its memory and weights; returns itself.

        Weights are filled in within `at_own_size`, where the tower can be resized.

        Raises:
            WeightsError: If the file is unreadable or belongs to another model.
        """

    @abstractmethod
    def run_tower(self, images: torch.Tensor, layers: Sequence[int]) -> FrameTokens:
        """One pass through `self.forward`.

        Args:
            images: (B, 3, H, W), normalised, in the backbone's precision.
            layers: 0-based blocks to tap, ascending; their outputs are taken before the final norm.

        Returns:
            Tokens of the tapped blocks, registers left out, and the tower's own embedding in any precision.
        """

    @abstractmethod
    def read_head(self) -> dict[str, np.ndarray]:
        """The tower's end as stage two needs it: embedding = proj(norm(class token of the last block)).

        Returns:
            norm_weight, norm_bias (D,), norm_eps (), proj_weight (E, D), logit_scale () as its logarithm and, where
            there is one, proj_bias (E,); float32. A tower without projection gives the identity. Nothing at all where
            the embedding is made otherwise: of patches, by attention, or by two norms.
        """

    def resize_tower(self, image_size: tuple[int, int]) -> None:
        """Have the tower as it is take frames of another size: its grid changes, and its positions are interpolated.

        It may be called before there are weights. A library whose towers cannot be resized leaves it out.

        Args:
            image_size: H, W, multiples of the patch.

        Raises:
            BackboneError: If this tower takes one size alone.
        """
        raise BackboneError(
            f"{self.info.name} takes frames of {describe_size(self.info.image_size)} pixels alone; leave out --input"
        )

    def resize_input(self, image_size: tuple[int, int]) -> None:
        """Take frames of another size than the weights were made for, from now on; a size that it has changes nothing.

        Args:
            image_size: H, W.

        Raises:
            ConfigError: If a side is no multiple of the patch's.
            BackboneError: If this tower takes one size alone.
        """
        if image_size != self.info.image_size:
            info = self.info.at_size(image_size)
            self.resize_tower(image_size)
            self.info = info

    @contextlib.contextmanager
    def at_own_size(self) -> Iterator[None]:
        """While its weights are filled in: the tower has the size that they were made for, and its frames' again after.

        A file's tensors have that size, and random ones are drawn in it.
        """
        own = self.info.own_image_size
        if own is None:
            yield
            return
        self.resize_tower(own)
        try:
            yield
        finally:
            self.resize_tower(self.info.image_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens beside the patches: the class token, and registers."""
        return int(self.info.has_class_token)

    @property
    def has_weights(self) -> bool:
        """Whether the tower has its weights, and the memory for them."""
        return not any(parameter.is_meta for parameter in self.tower.parameters())

    def free_weights(self) -> None:
        """Give the memory of the weights back; `load_weights` fills the tower again."""
        for module in self.tower.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def compile(self, batch_size: int) -> None:
        """Have `torch.compile` make the tower's kernels, at the first pass.

        They are made once, for one shape: smaller batches are padded to it with zeros. Kernels for several sizes would
        take their minutes each, and might depend on which size came first, so on where a run was resumed.

        Args:
            batch_size: Of the largest batch that will come.
        """
        self.forward = torch.compile(self.forward, dynamic=False)
        self._least_frames = batch_size

    @property
    def flops_per_frame(self) -> int:
        """Multiplications and additions of one frame's forward pass, in the matrix products of its blocks."""
        num_tokens = self.info.num_patches + self.num_prefix_tokens
        weights = sum(parameter.numel() for parameter in self.blocks.parameters() if parameter.ndim == 2)
        attention = 2 * self.info.depth * num_tokens**2 * self.info.width
        return 2 * (weights * num_tokens + attention)

    @torch.inference_mode()
    def encode_frames(self, pixels: torch.Tensor, layers: Iterable[int]) -> FrameTokens:
        """Run frames through the tower.

        Args:
            pixels: (B, H, W, 3) uint8.
            layers: 0-based blocks to tap; their outputs are taken before the final norm.

        Returns:
            Tokens of the tapped blocks and the tower's own embedding, from one pass.

        Raises:
            EnvironmentFailedError: If `compile` was asked for and is not possible here.
        """
        tapped, count = sorted(set(layers)), len(pixels)
        pixels = pixels.to(self.device)
        if count < self._least_frames:
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, self._least_frames - count))
        images = normalise_pixels(pixels, self._mean, self._std)
        try:
            tokens = self.run_tower(images.to(DTYPES[self.info.precision]), tapped)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise EnvironmentFailedError(f"torch.compile does not work here: {reason}. Leave out --compile.") from error
        return FrameTokens(
            patches=[values[:count] for values in tokens.patches],
            cls=None if tokens.cls is None else tokens.cls[:count],
            embedding=tokens.embedding[:count].float(),
        )


class TextTower(ABC):
    """The frozen text tower of a backbone; `load_text_tower` makes one."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """The most words that a text can have, start and end among them."""

    @abstractmethod
    def encode(self, texts: list[str]) -> np.ndarray:
        """Embed texts; each is cut at the tower's context length, with a warning of what is cut off.

        Returns:
            (len(texts), E) float32, not normalised.
        """

    @abstractmethod
    def encode_words(
        self, texts: list[str], num_words: int, *, is_cut_known: bool = False, blocks: Sequence[int] = ()
    ) -> Texts:
        """Embed texts word by word; each is cut at `num_words`, start and end among them.

        Args:
            texts: Any number.
            num_words: M.
            is_cut_known: Whether the caller has said what is cut off (`find_cut`); else a warning does.
            blocks: 0-based, ascending, whose raw outputs are wanted too.

        Returns:
            Tokens (n, num_words, E), the final norm's output times the projection, zero where there is no word;
            mask; embeddings (n, E), those of the end token; layers (n, len(blocks), num_words, Dt), after each block
            and before the final norm, zero where there is no word, or None without blocks.

        Raises:
            BackboneError: If s4v cannot tell where the tower's words end, or the tower has no such block.
        """

    def count_words(self, texts: Sequence[str], num_words: int) -> np.ndarray:
        """How many words `encode_words` finds in each text, start and end among them: (n,) integers.

        Raises:
            BackboneError: As `encode_words` does.
        """
        raise BackboneError("this text tower does not tell how many words a text has")

    @abstractmethod
    def find_cut(self, texts: Sequence[str], num_words: int | None = None) -> dict[str, str]:
        """What is left out of texts that are longer than a number of words, start and end among them.

        Args:
            texts: Any.
            num_words: None takes the tower's context length.

        Returns:
            The end that is not read, of each text that has one. A tokenizer may split a word, and write in small
            letters.
        """


class TowerLibrary(ABC):
    """Towers that one library builds, by their names."""

    title: ClassVar[str]
    """For messages: whose architectures they are."""
    short_names: ClassVar[Sequence[str]] = ()
    """Of s4v's own, for messages: those that users will want first."""

    @abstractmethod
    def list_models(self) -> Sequence[str]:
        """All names that it builds a vision tower of, beside the short ones; no two libraries have one in common."""

    def has_model(self, name: str) -> bool:
        """Whether a name means a model of this library: one of its lists, or written in another way that it takes."""
        return name in self.short_names or name in self.list_models()

    def find_architecture(self, name: str) -> str | None:
        """The architecture that a name means now, as a store records it; None where a name cannot change its meaning.

        Raises:
            BackboneError: If it means none.
        """
        return None

    @abstractmethod
    def build_backbone(
        self, name: str, *, weights: str | None, device: torch.device, precision: Precision, seed: int
    ) -> Backbone:
        """A model's vision tower, without its weights as yet: see `vision_tower.build_backbone`.

        Raises:
            BackboneError: If its tokens cannot be had: it has no blocks, say.
            WeightsError: If the weights cannot be had.
        """

    def load_text_tower(
        self, name: str, *, weights: str | None, device: torch.device, seed: int, expected_sha256: str | None
    ) -> TextTower:
        """A model's text tower with its weights: see `text_tower.load_text_tower`. By default there is none.

        Raises:
            WeightsError: If the weights cannot be had, do not fit, or have another hash.
            BackboneError: If there is none, or its tokenizer cannot be had.
        """
        raise _lack_text_tower(name)

    def describe_text_tower(self, name: str) -> TextTowerInfo:
        """The sizes of a model's text tower, for which no weights are needed. By default there is none.

        Raises:
            BackboneError: If there is none, or it is not one whose words and blocks s4v can tell.
        """
        raise _lack_text_tower(name)

    def count_words(self, name: str, texts: Sequence[str], num_words: int) -> np.ndarray:
        """How many words a model's text tower finds in each text, for which no weights are needed.

        Weights may know fewer words than the tokenizer: those leave the others out. By default there is no tower.

        Args:
            name: Of the model.
            texts: Any number.
            num_words: At which each is cut, start and end among them.

        Returns:
            (len(texts),) integers.

        Raises:
            BackboneError: As `describe_text_tower` does, or if its tokenizer cannot be had.
        """
        raise _lack_text_tower(name)


def _lack_text_tower(name: str) -> BackboneError:
    return BackboneError(f"{name} has no text tower: it cannot be asked by text")


def normalise_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 to the backbone's input, (B, 3, H, W) float32; mean and std (1, 3, 1, 1) in [0, 1]."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
