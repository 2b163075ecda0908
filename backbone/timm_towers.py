"""timm's towers: any of its ViTs whose blocks can be tapped, with or without a class token, registers left out.

DINOv2 and DINOv3, Perception Encoder, SigLIP's and AIMv2's image towers, EVA, BEiT, DeiT and more.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from ..errors import BackboneError, WeightsError
from ..files import hash_file
from . import open_clip_models
from .contract import DEFAULT_LOGIT_SCALE, DTYPES, Backbone, FrameTokens, TowerLibrary
from .facts import BackboneInfo, Family, Precision
from .resizing import resize_timm
from .weights import WeightsSource, fill_tower, find_file, find_random, open_tensors, parameters_on_meta

_PREFIX = "timm/"
"""Before a name: timm's model, where open_clip has one of the same name."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_LEFT_OUT = ("mask_token", "head.", "head_dist.")
"""Of training alone, or a classifier: a file may hold them though this tower has no use for them."""

_EXAMPLES = "vit_small_patch14_dinov2, vit_small_patch16_dinov3 or vit_pe_core_base_patch16_224"

_log = logging.getLogger(__name__)

Passed = tuple[list[torch.Tensor], list[torch.Tensor] | None, torch.Tensor]
"""Patches (B, N, D) and prefix tokens (B, P, D) of each tapped layer, and the embedding (B, E)."""


class TimmBackbone(Backbone):
    """A vision tower of timm."""

    packages = ("timm",)

    def __init__(self, tower: Any, info: BackboneInfo, source: WeightsSource, device: torch.device) -> None:
        super().__init__(tower, info, device, _make_forward(tower))
        self._source = source

    @property
    def blocks(self) -> nn.Module:
        """The transformer blocks."""
        return self.tower.blocks

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers."""
        return int(self.tower.num_prefix_tokens)

    def load_weights(self) -> Self:
        """Give the tower its memory and weights; returns itself.

        Raises:
            WeightsError: If the file is unreadable or belongs to another model.
        """
        dtype = DTYPES[self.info.precision]
        tensors = open_tensors(self._source)
        with self.at_own_size():
            if tensors is not None:
                tensors = _convert_names(tensors, self.tower, self._source)
            fill_tower(self.tower, tensors, self._source, ("",), self.device, dtype, casts_buffers=False)
            # By the modules themselves: some keep a buffer in float32, such as the periods of rotary embeddings.
            self.tower.to(dtype=dtype)
        return self

    def resize_tower(self, image_size: tuple[int, int]) -> None:
        """Have the tower as it is take frames of another size; see the contract.

        Raises:
            BackboneError: If timm cannot resize it.
        """
        if not hasattr(self.tower, "set_input_size"):
            super().resize_tower(image_size)  # which says so
        resize_timm(self.tower, image_size)

    def run_tower(self, images: torch.Tensor, layers: Sequence[int]) -> FrameTokens:
        """One pass over (B, 3, H, W); see the contract."""
        patches, prefixes, embedding = self.forward(images, list(layers))
        cls = None
        if self.info.has_class_token:
            assert prefixes is not None
            cls = torch.stack([tokens[:, 0] for tokens in prefixes], dim=1)
        return FrameTokens(patches, cls, embedding)

    def read_head(self) -> dict[str, np.ndarray]:
        """The tower's end, where it is a projection of a norm of the class token; else nothing.

        A classifier is a projection. So is no projection at all, by the identity.
        """
        if (end := _find_head(self.tower)) is None:
            return {}
        norm, linear = end
        weight = torch.eye(self.info.width) if linear is None else linear.weight
        head = {
            "norm_weight": norm.weight,
            "norm_bias": torch.zeros(self.info.width) if norm.bias is None else norm.bias,
            "proj_weight": weight,
            "proj_bias": None if linear is None else linear.bias,
        }
        arrays = {name: values.detach().float().cpu().numpy() for name, values in head.items() if values is not None}
        return {**arrays, "norm_eps": np.float32(norm.eps), "logit_scale": np.float32(DEFAULT_LOGIT_SCALE)}


class Timm(TowerLibrary):
    """What timm builds."""

    title = "timm"

    def list_models(self) -> Sequence[str]:
        """Its names, but for those that open_clip has too: `timm/NAME` is timm's."""
        taken = set(open_clip_models.list_models())
        return [name for name in timm.list_models() if name not in taken]

    def has_model(self, name: str) -> bool:
        """Whether it is a name of timm's: plain, `timm/NAME`, or `NAME.TAG` with the tag of its weights."""
        architecture, tag = _split_name(name)
        if not timm.is_model(architecture) or (tag is not None and tag not in _list_tags(architecture)):
            return False
        return name.startswith(_PREFIX) or architecture not in open_clip_models.list_models()

    def build_backbone(
        self, name: str, *, weights: str | None, device: torch.device, precision: Precision, seed: int
    ) -> Backbone:
        """A model's vision tower, without its weights as yet, for pictures of its own configuration's size.

        Args:
            name: timm's, with or without a tag behind a dot, which says the head's size and the pictures' scale too.
            weights: A tag of timm's, a local file in timm's names, or `random`; None takes the name's tag, or the first
                that timm has.
            device: Where it runs.
            precision: Of weights and arithmetic.
            seed: Of random weights.

        Raises:
            BackboneError: If it has no blocks that can be tapped.
            WeightsError: If the weights cannot be had.
        """
        architecture, tag = _split_name(name)
        tags = _list_tags(architecture)
        if weights in tags:
            tag = weights
        tower = _build_tower(name, architecture if tag is None else f"{architecture}.{tag}")
        source = _find_source(name, architecture, tower, tag, weights, seed)
        grid, patch_size, image_size = read_geometry(tower)
        embed_dim = tower.num_classes or tower.num_features
        info = BackboneInfo(
            name=name,
            architecture=architecture,
            weights=source.label,
            weights_sha256=source.sha256,
            width=tower.embed_dim,
            depth=len(tower.blocks),
            grid=grid,
            patch_size=patch_size,
            image_size=image_size,
            embed_dim=embed_dim,
            mean=tuple(tower.pretrained_cfg["mean"]),
            std=tuple(tower.pretrained_cfg["std"]),
            precision=precision,
            device_type=device.type,
            side_family=_find_side_family(tower),
            has_class_token=getattr(tower, "cls_token", None) is not None,
            has_text_tower=False,
        )
        return TimmBackbone(tower, info, source, device)


LIBRARY = Timm()


def read_geometry(tower: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Grid, patch size and image size of one of timm's towers, each (down, across).

    A tower that takes any size has no size of its own: it gets its configuration's. Of a tower that begins with
    convolutions a patch is what they make one token of.
    """
    embed = tower.patch_embed
    if getattr(tower, "dynamic_img_size", False):
        patch_size, image_size = _as_pair(embed.patch_size), _as_pair(tower.pretrained_cfg["input_size"][1:])
        return (image_size[0] // patch_size[0], image_size[1] // patch_size[1]), patch_size, image_size
    grid, image_size = _as_pair(embed.grid_size), _as_pair(embed.img_size)
    return grid, (image_size[0] // grid[0], image_size[1] // grid[1]), image_size


def _as_pair(values: Any) -> tuple[int, int]:
    height, width = values
    return int(height), int(width)


def _split_name(name: str) -> tuple[str, str | None]:
    """Architecture, and the tag behind a dot."""
    architecture, _, tag = name.removeprefix(_PREFIX).partition(".")
    return architecture, tag or None


def _list_tags(architecture: str) -> list[str]:
    """Of an architecture's weights that timm knows, its own choice first."""
    tags = [name.partition(".")[2] for name in timm.list_models(architecture, pretrained=True)]
    config = get_pretrained_cfg(architecture)
    first = None if config is None else config.tag
    return sorted(tags, key=lambda tag: tag != first)


def _build_tower(name: str, full_name: str) -> Any:
    """A tower without memory for its weights; its buffers are computed as usual.

    Raises:
        BackboneError: If it cannot be built so, or is no ViT whose blocks can be tapped.
    """
    try:
        tower = _create(full_name)
    except (RuntimeError, NotImplementedError, ImportError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackboneError(
            f"a tower of {name} cannot be built ({reason}); s4v needs a ViT such as {_EXAMPLES}"
        ) from error
    if (lacking := _find_lack(tower)) is not None:
        raise BackboneError(f"{name} {lacking}; s4v needs a ViT such as {_EXAMPLES}")
    return tower


def _create(full_name: str) -> Any:
    """One of timm's models, its parameters without memory.

    Buffers that are computed from parameters while it is built (mixed rotary embeddings) need those for a moment.
    """
    try:
        with parameters_on_meta():
            return timm.create_model(full_name, pretrained=False)
    except (NotImplementedError, RuntimeError):
        tower = timm.create_model(full_name, pretrained=False)
    for module in tower.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return tower


def _find_lack(tower: Any) -> str | None:
    """Why a tower's tokens cannot be had; None where they can."""
    forward = getattr(tower, "forward_intermediates", None)
    options = set() if forward is None else set(inspect.signature(forward).parameters)
    if not {"indices", "return_prefix_tokens", "norm", "output_fmt"} <= options or not hasattr(tower, "blocks"):
        return "has no transformer blocks whose tokens timm hands out"
    embed = getattr(tower, "patch_embed", None)
    if getattr(embed, "img_size", None) is None or getattr(embed, "grid_size", None) is None:
        return "does not cut pictures of one size into patches"
    return None


def _make_forward(tower: Any) -> Callable[[torch.Tensor, list[int]], Passed]:
    """One pass through a tower: its blocks' tokens before the final norm, and what its own head makes of the last."""
    has_prefix = bool(tower.num_prefix_tokens)

    def forward(images: torch.Tensor, layers: list[int]) -> Passed:
        last, tapped = tower.forward_intermediates(
            images, indices=layers, return_prefix_tokens=has_prefix, norm=False, output_fmt="NLC"
        )
        embedding = tower.forward_head(last)
        if not has_prefix:
            return tapped, None, embedding
        return [patches for patches, _ in tapped], [prefix for _, prefix in tapped], embedding

    return forward


def _find_head(tower: Any) -> tuple[Any, nn.Linear | None] | None:
    """Final norm and projection, where the embedding is that of the class token and nothing else; else None."""
    if getattr(tower, "cls_token", None) is None or getattr(tower, "global_pool", None) != "token":
        return None
    if getattr(tower, "attn_pool", None) is not None or hasattr(tower, "head_dist"):
        return None
    ends = (getattr(tower, name, nn.Identity()) for name in ("norm", "fc_norm"))
    norms = [norm for norm in ends if not isinstance(norm, nn.Identity)]
    if len(norms) != 1 or not isinstance(norms[0], nn.LayerNorm):
        return None
    if isinstance(tower.head, nn.Identity):
        return norms[0], None
    return (norms[0], tower.head) if isinstance(tower.head, nn.Linear) else None


def _find_side_family(tower: Any) -> Family:
    """EVA's side blocks stand beside blocks that normalise what they add, as those of its largest CLIP towers do."""
    return "eva" if type(tower.blocks[0]).__name__ == "EvaBlockPostNorm" else "clip"


def _find_source(
    name: str, architecture: str, tower: nn.Module, tag: str | None, weights: str | None, seed: int
) -> WeightsSource:
    """Where a tower's weights come from: `random`, a local file, or a tag (downloaded when it is not cached).

    Raises:
        WeightsError: If they cannot be had.
    """
    tags = _list_tags(architecture)
    if weights is None:
        weights = tag or (tags[0] if tags else None)
    if weights is None:
        raise WeightsError(f"{name} has no weights of timm's: give --weights a file in timm's names, or `random`")
    shapes = {key: list(value.shape) for key, value in tower.state_dict(keep_vars=True).items()}
    if (source := find_random(weights, seed, architecture, shapes)) is not None:
        return source
    if (source := find_file(weights)) is not None:
        return source
    if weights not in tags:
        raise WeightsError(
            f"no weights {weights!r} for {name}: no such file, and its tags are {', '.join(tags) or 'none'}"
        )
    path = _download(f"{architecture}.{weights}")
    return WeightsSource(weights, hash_file(path), path)


def _download(full_name: str) -> Path:
    """The file of a tag's weights, from the hub's cache or the hub.

    Raises:
        WeightsError: If it is not cached and cannot be downloaded.
    """
    config = get_pretrained_cfg(full_name)
    reason = "they are not on the hub"
    if config is not None and config.hf_hub_id:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        repository, _, revision = config.hf_hub_id.partition("@")
        files = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
        for file, is_cached in [(file, is_cached) for is_cached in (True, False) for file in files]:
            try:
                with _silence("huggingface_hub"):
                    place = hf_hub_download(repository, file, revision=revision or None, local_files_only=is_cached)
                return Path(place)
            except EntryNotFoundError as error:  # the local one: not cached, or no network
                reason = type(error).__name__
                if not is_cached and isinstance(error, LocalEntryNotFoundError):
                    break
            except Exception as error:  # hubs raise whatever their HTTP library raises
                reason = type(error).__name__
                break
    raise WeightsError(
        f"the weights {full_name} are not cached and cannot be downloaded ({reason}). "
        "Copy their file here and name it: --weights FILE; or use --weights random."
    )


@contextlib.contextmanager
def _silence(name: str) -> Iterator[None]:
    """Without a logger's warnings: what they say of retries is told in one line when all have failed."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _convert_names(
    tensors: Mapping[str, torch.Tensor], tower: Any, source: WeightsSource
) -> Mapping[str, torch.Tensor]:
    """The tensors of a file by the tower's own names; those of a model's makers are renamed as timm does.

    Raises:
        WeightsError: If the file has tensors that this tower has no place for, or a position embedding for pictures of
            another size: timm would interpolate it without a word.
    """
    own = set(tower.state_dict(keep_vars=True))
    if own <= set(tensors):
        _refuse_strange(tensors, own, source)
        return tensors
    rename = getattr(sys.modules[type(tower).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return tensors  # what is missing is told when the tower is filled
    num_patches = tower.patch_embed.num_patches
    for name, values in tensors.items():
        if name.endswith(("pos_embed", "positional_embedding")):
            num_places = values.shape[-2] if values.ndim > 1 else 0
            if not 0 <= num_places - num_patches <= tower.num_prefix_tokens:
                raise WeightsError(
                    f"{source.label}: {name} has {num_places} places, this model needs {num_patches} and at most "
                    f"{tower.num_prefix_tokens} more: they are for pictures of another size, or another model's."
                )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it tries
            renamed: dict[str, torch.Tensor] = rename(dict(tensors), tower)
    except Exception as error:  # it is made for the files that it knows
        _log.debug("timm cannot rename the tensors of %s: %s", source.label, error)
        return tensors
    if own <= set(renamed):
        _refuse_strange(renamed, own, source)
        return renamed
    return tensors


def _refuse_strange(tensors: Mapping[str, torch.Tensor], own: set[str], source: WeightsSource) -> None:
    strange = sorted(name for name in tensors if name not in own and not name.startswith(_LEFT_OUT))
    if strange:
        raise WeightsError(
            f"{source.label} does not fit this model: {len(strange)} are not known (first: {strange[0]}). "
            "Are they another model's?"
        )
