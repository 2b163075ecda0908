"""The frozen backbone: any open_clip ViT with a class token, behind one small adapter.

Only the tower that is needed is built, without memory for its weights at first, so that peak memory stays near the
weights' size in the precision they run in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn
from torch.nn import functional as F

from ..errors import BackboneError, ConfigError, EnvironmentFailedError
from .names import ALIASES, read_architecture, resolve_model
from .weights import WeightsSource, fill_tower, open_tensors, parameters_on_meta, resolve_weights

Precision = Literal["fp32", "fp16", "bf16"]
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# "Paper" layers: up to this depth every block is tapped, above it every second one (ViT-E: 32 of 64).
_EVERY_BLOCK_UP_TO = 32

# By words of the device's name, the more exact first; None for relatives that the words would take in.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "RTX 4090 Laptop": None,
    "RTX 4090 D": None,
    "RTX 3090 Ti": None,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "V100": 125e12,
    "L4": 121e12,
    "T4": 65e12,
}

# CLIP starts training from it; random weights keep it.
_DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneInfo:
    """What stage two and a store need to know of a backbone; no weights."""

    name: str
    """As the user wrote it."""
    architecture: str
    """open_clip's name."""
    weights: str
    """`random:SEED`, an open_clip tag, or the file's path."""
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

    @property
    def num_patches(self) -> int:
        """N, the class token not counted."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class FrameTokens:
    """One forward pass over B frames; tensors on the backbone's device, in its precision."""

    patches: list[torch.Tensor]
    """One (B, N, D) for each tapped layer, ascending."""
    cls: torch.Tensor
    """(B, L, D)."""
    embedding: torch.Tensor
    """(B, E) float32, not normalised."""


class Backbone:
    """A frozen vision tower that gives the tokens of chosen blocks; `build_backbone` makes one.

    Until `load_weights` is called, and after `free_weights`, it has no weights and takes no memory for them.
    """

    def __init__(self, tower: Any, info: BackboneInfo, source: WeightsSource, device: torch.device) -> None:
        self.tower = tower
        self.info = info
        self.device = device
        self._source = source
        self._logit_scale = _DEFAULT_LOGIT_SCALE
        self._forward = tower.forward_intermediates
        self._least_frames = 0
        self._mean = torch.tensor(info.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(info.std, device=device).view(1, 3, 1, 1)

    @property
    def has_weights(self) -> bool:
        """Whether the tower has its weights, and the memory for them."""
        return not any(parameter.is_meta for parameter in self.tower.parameters())

    def load_weights(self) -> Backbone:
        """Give the tower its memory and weights; returns itself.

        Raises:
            WeightsError: If the file is unreadable or belongs to another model.
        """
        tensors = open_tensors(self._source)
        fill_tower(self.tower, tensors, self._source, ("visual.",), self.device, _DTYPES[self.info.precision])
        if tensors is not None and "logit_scale" in tensors:
            self._logit_scale = float(tensors["logit_scale"])
        return self

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
        self._forward = torch.compile(self.tower.forward_intermediates, dynamic=False)
        self._least_frames = batch_size

    @property
    def flops_per_frame(self) -> int:
        """Multiplications and additions of one frame's forward pass, in the matrix products of its blocks."""
        num_tokens = self.info.num_patches + 1
        weights = sum(parameter.numel() for parameter in _find_blocks(self.tower).parameters() if parameter.ndim == 2)
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
        wanted, count = sorted(set(layers)), len(pixels)
        pixels = pixels.to(self.device)
        if count < self._least_frames:
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, self._least_frames - count))
        images = normalise_pixels(pixels, self._mean, self._std)
        try:
            output = self._forward(
                images.to(_DTYPES[self.info.precision]), indices=wanted, output_fmt="NLC", output_extra_tokens=True
            )
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise EnvironmentFailedError(f"torch.compile does not work here: {reason}. Leave out --compile.") from error
        cls = [prefix[:count, 0] for prefix in output["image_intermediates_prefix"]]
        return FrameTokens(
            patches=[values[:count] for values in output["image_intermediates"]],
            cls=torch.stack(cls, dim=1),
            embedding=output["image_features"][:count].float(),
        )

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


def normalise_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 to the backbone's input, (B, 3, H, W) float32; mean and std (1, 3, 1, 1) in [0, 1]."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def find_peak_flops(device: torch.device, precision: Precision) -> float | None:
    """What a GPU could do in a second in half precision; None where that is not known.

    Source:
        The makers' data sheets: dense matrix products, sums in float32.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    return read_peak_flops(torch.cuda.get_device_name(device))


def read_peak_flops(device_name: str) -> float | None:
    """The same by a GPU's name, such as `NVIDIA A100-SXM4-80GB`."""
    peaks = (peak for words, peak in _PEAK_FLOPS.items() if re.search(rf"\b{words}\b", device_name))
    return next(peaks, None)


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """Read `--layers`: `paper`, `all`, or 0-based blocks such as `1,3,5`; the last block is always tapped.

    Raises:
        ConfigError: If a layer is no number or out of range.
    """
    if text == "all":
        return tuple(range(depth))
    if text == "paper":
        step = 1 if depth <= _EVERY_BLOCK_UP_TO else 2
        return tuple(range(depth - 1, -1, -step))[::-1]
    try:
        layers = {int(part) for part in text.split(",")}
    except ValueError:
        raise ConfigError(f"--layers takes paper, all or numbers such as 1,3,5; found {text!r}") from None
    if outside := sorted(layer for layer in layers if not 0 <= layer < depth):
        raise ConfigError(f"--layers must lie in 0 to {depth - 1} for this model; found {outside}")
    return tuple(sorted(layers | {depth - 1}))


def build_backbone(
    name: str, *, weights: str | None, device: torch.device, precision: Precision | None = None, seed: int = 0
) -> Backbone:
    """Build a model's vision tower, without its weights as yet.

    Args:
        name: An alias, or an open_clip architecture.
        weights: An open_clip tag, a local file, or `random`; None takes the alias's own tag.
        device: Where it runs.
        precision: Of weights and arithmetic; None takes fp32 on a CPU and fp16 elsewhere.
        seed: Of random weights.

    Raises:
        BackboneError: If there is no such model, or its tower has no class token or no blocks.
        WeightsError: If the weights cannot be had.
    """
    architecture, _ = resolve_model(name)
    precision = precision or ("fp32" if device.type == "cpu" else "fp16")
    config = read_architecture(architecture)
    tower = build_tower(name, _build_vision_tower, config["embed_dim"], config["vision_cfg"], config)
    _require_class_token(name, tower)
    source = resolve_weights(name, weights, seed)
    grid, patch_size, image_size = _read_geometry(tower)
    mean, std = _read_normalisation(architecture, source)
    info = BackboneInfo(
        name=name,
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
    )
    return Backbone(tower, info, source, device)


def build_tower(
    name: str, build: Callable[..., nn.Module], embed_dim: int, tower_config: Any, config: Mapping[str, Any]
) -> Any:
    """One of open_clip's towers, without memory for its weights.

    Raises:
        BackboneError: If it cannot be built.
    """
    try:
        with parameters_on_meta():
            return build(embed_dim, tower_config, config.get("quick_gelu", False))
    except (RuntimeError, NotImplementedError, ImportError) as error:  # towers that compute while they are built
        reason = str(error).splitlines()[0]
        raise BackboneError(
            f"a tower of {name} cannot be built ({reason}); s4v needs a ViT such as {', '.join(ALIASES)}"
        ) from error


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


def _read_normalisation(architecture: str, source: WeightsSource) -> tuple[Any, Any]:
    """Mean and std of the weights' own preprocessing; OpenAI's where the weights do not say."""
    config = source.pretrained_cfg or {}
    mean = config.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = config.get("std") or open_clip.OPENAI_DATASET_STD
    return tuple(mean), tuple(std)
