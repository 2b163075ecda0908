"""open_clip's towers: any of its ViTs with a class token, behind one small adapter.

Only the tower that is needed is built, without memory for its weights at first, so that peak memory stays near the
weights' size in the precision they run in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn

from ..errors import BackboneError
from .contract import DEFAULT_LOGIT_SCALE, DTYPES, Backbone, FrameTokens, TextTower, TowerLibrary
from .facts import BackboneInfo, Precision, TextTowerInfo, guess_side_family
from .open_clip_models import (
    ACTIVATIONS,
    ALIASES,
    build_tower,
    find_other_activation,
    is_file_name,
    list_models,
    read_activation,
    read_architecture,
    resolve_model,
    resolve_weights,
)
from .resizing import resize_open_clip, resize_timm
from .weights import WeightsSource, fill_tower, open_tensors

_log = logging.getLogger(__name__)


class OpenClipBackbone(Backbone):
    """A vision tower of open_clip, its own or one of timm's that it wraps."""

    packages = ("open_clip_torch", "timm")

    def __init__(self, tower: Any, info: BackboneInfo, source: WeightsSource, device: torch.device) -> None:
        super().__init__(tower, info, device, tower.forward_intermediates)
        self._source = source
        self._logit_scale = DEFAULT_LOGIT_SCALE

    @property
    def blocks(self) -> nn.Module:
        """The transformer blocks."""
        return _find_blocks(self.tower)

    def load_weights(self) -> Self:
        """Give the tower its memory and weights; returns itself.

        Raises:
            WeightsError: If the file is unreadable or belongs to another model.
        """
        tensors = open_tensors(self._source)
        with self.at_own_size():
            fill_tower(self.tower, tensors, self._source, ("visual.",), self.device, DTYPES[self.info.precision])
        if tensors is not None and "logit_scale" in tensors:
            self._logit_scale = float(tensors["logit_scale"])
        return self

    def resize_tower(self, image_size: tuple[int, int]) -> None:
        """Have the tower as it is take frames of another size: open_clip's own, or one of timm's.

        Raises:
            BackboneError: If it is one of timm's that takes one size alone.
        """
        trunk = getattr(self.tower, "trunk", None)
        if trunk is None:
            resize_open_clip(self.tower, image_size)
        elif hasattr(trunk, "set_input_size"):
            resize_timm(trunk, image_size)
        else:
            super().resize_tower(image_size)

    def run_tower(self, images: torch.Tensor, layers: Sequence[int]) -> FrameTokens:
        """One pass over (B, 3, H, W); see the contract."""
        output = self.forward(images, indices=layers, output_fmt="NLC", output_extra_tokens=True)
        cls = [prefix[:, 0] for prefix in output["image_intermediates_prefix"]]
        return FrameTokens(output["image_intermediates"], torch.stack(cls, dim=1), output["image_features"])

    def read_head(self) -> dict[str, np.ndarray]:
        """The tower's end as stage two needs it: embedding = proj(norm(class token of the last block)).

        Returns:
            norm_weight, norm_bias (D,), norm_eps (), proj_weight (E, D), logit_scale () as its logarithm and, for
            EVA, proj_bias (E,); float32.
        """
        norm, weight, bias = _find_head(self.tower)
        head = {"norm_weight": norm.weight, "norm_bias": norm.bias, "proj_weight": weight, "proj_bias": bias}
        arrays = {k: v.detach().float().cpu().numpy() for k, v in head.items() if v is not None}
        return {**arrays, "norm_eps": np.float32(norm.eps), "logit_scale": np.float32(self._logit_scale)}


class OpenClip(TowerLibrary):
    """What open_clip builds."""

    title = "open_clip"
    short_names = tuple(ALIASES)

    def list_models(self) -> Sequence[str]:
        """open_clip's names, and those of configurations that come with s4v."""
        return list_models()

    def has_model(self, name: str) -> bool:
        """Whether it is one of open_clip's names, or the file of a configuration."""
        return is_file_name(name) or super().has_model(name)

    def find_architecture(self, name: str) -> str:
        """open_clip's name of it; of a file's configuration one that follows from what the file says."""
        return resolve_model(name)[0]

    def build_backbone(
        self, name: str, *, weights: str | None, device: torch.device, precision: Precision, seed: int
    ) -> Backbone:
        """A model's vision tower, without its weights as yet.

        Args:
            name: An alias, an open_clip architecture, or the path of a configuration's file.
            weights: An open_clip tag, a local file, or `random`; None takes the alias's own tag.
            device: Where it runs.
            precision: Of weights and arithmetic.
            seed: Of random weights.

        Raises:
            BackboneError: If its tower has no class token or no blocks.
            WeightsError: If the weights cannot be had.
        """
        architecture, _ = resolve_model(name)
        config = read_architecture(architecture)
        tower = build_tower(name, _build_vision_tower, config["embed_dim"], config["vision_cfg"], config)
        _require_class_token(name, tower)
        source = resolve_weights(name, weights, seed)
        grid, patch_size, image_size = _read_geometry(tower)
        mean, std = _read_normalisation(source, config)
        info = BackboneInfo(
            name=str(Path(name).resolve()) if is_file_name(name) else name,
            architecture=architecture,
            weights=source.label,
            weights_sha256=source.sha256,
            width=_find_head(tower)[0].weight.shape[0],
            depth=len(_find_blocks(tower)),
            grid=grid,
            patch_size=patch_size,
            image_size=image_size,
            embed_dim=config["embed_dim"],
            mean=mean,
            std=std,
            precision=precision,
            device_type=device.type,
            side_family=guess_side_family(architecture),
            activation=read_activation(architecture),
            has_text_tower="text_cfg" in config,
        )
        _tell_activation(info, source)
        return OpenClipBackbone(tower, info, source, device)

    def load_text_tower(
        self, name: str, *, weights: str | None, device: torch.device, seed: int, expected_sha256: str | None
    ) -> TextTower:
        """A model's text tower with its weights.

        Raises:
            WeightsError: If the weights cannot be had, do not fit, or have another hash.
            BackboneError: If its tokenizer cannot be had.
        """
        from .open_clip_texts import load_text_tower

        return load_text_tower(name, weights=weights, device=device, seed=seed, expected_sha256=expected_sha256)

    def describe_text_tower(self, name: str) -> TextTowerInfo:
        """The sizes of a model's text tower, for which no weights are needed.

        Raises:
            BackboneError: If its words and blocks are not CLIP's kind, or its library is not there.
        """
        from .open_clip_texts import describe_text_tower

        return describe_text_tower(name)

    def count_words(self, name: str, texts: Sequence[str], num_words: int) -> np.ndarray:
        """How many words a model's text tower finds in each text, for which no weights are needed.

        Raises:
            BackboneError: As `describe_text_tower` does, or if its tokenizer cannot be had.
        """
        from .open_clip_texts import count_words

        return count_words(name, texts, num_words)


LIBRARY = OpenClip()


def _tell_activation(info: BackboneInfo, source: WeightsSource) -> None:
    """Say what a local file's weights are computed with, where another model would compute something else of them."""
    other = find_other_activation(info.architecture)
    if source.file is None or source.label != str(source.file) or source.activation is not None or other is None:
        return
    _log.warning(
        "%s does not tell its activation: --model %s computes %s. If it was trained with the other, take --model %s.",
        *(source.file.name, info.name, ACTIVATIONS[info.activation], other),
    )


def _require_class_token(name: str, tower: Any) -> None:
    """Refuse towers that the side network has no use for.

    Raises:
        BackboneError: With what is lacking.
    """
    trunk = getattr(tower, "trunk", tower)
    lacking = None
    if not hasattr(tower, "forward_intermediates") or _find_blocks(tower) is None:
        lacking = "has no transformer blocks (a convolutional tower)"
    elif getattr(trunk, "class_embedding", None) is None and getattr(trunk, "cls_token", None) is None:
        lacking = "has no class token"
    elif getattr(trunk, "num_prefix_tokens", 1) != 1:
        lacking = f"has {trunk.num_prefix_tokens} prefix tokens, not one class token"
    elif getattr(trunk, "pool_type", getattr(trunk, "global_pool", "tok")) not in ("tok", "token"):
        lacking = "does not pool its class token"
    elif getattr(trunk, "attn_pool", None) is not None:
        lacking = "pools by attention"
    if lacking is not None:
        raise BackboneError(
            f"{name} {lacking}; s4v needs a ViT that pools one class token, such as {', '.join(ALIASES)}"
        )


def _find_blocks(tower: Any) -> Any:
    if hasattr(tower, "trunk"):
        return getattr(tower.trunk, "blocks", None) if hasattr(tower.trunk, "forward_intermediates") else None
    return getattr(getattr(tower, "transformer", None), "resblocks", None)


def _find_head(tower: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """Final norm, projection (E, D) and its bias."""
    if not hasattr(tower, "trunk"):
        return tower.ln_post, tower.proj.T, None
    trunk: Any = tower.trunk
    norm = trunk.fc_norm if isinstance(trunk.norm, nn.Identity) else trunk.norm
    linear = trunk.head if isinstance(trunk.head, nn.Linear) else tower.head.proj
    return norm, linear.weight, linear.bias


def _read_geometry(tower: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Grid, patch size and image size, each (down, across)."""
    if hasattr(tower, "trunk"):
        embed: Any = tower.trunk.patch_embed
        return tuple(embed.grid_size), tuple(embed.patch_size), tuple(embed.img_size)
    return tuple(tower.grid_size), tuple(tower.patch_size), tuple(tower.image_size)


def _read_normalisation(source: WeightsSource, architecture: Mapping[str, Any]) -> tuple[Any, Any]:
    """Mean and std of the weights' own preprocessing, or of a file's configuration; OpenAI's where neither says."""
    config = source.pretrained_cfg or architecture.get("preprocess_cfg") or {}
    mean = config.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = config.get("std") or open_clip.OPENAI_DATASET_STD
    return tuple(mean), tuple(std)
