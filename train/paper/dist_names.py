"""DiST's released files: the whole CLIP with its text tower beside the side network, and no names of classes.

Files from before a renaming have `ladder_net.` where later ones have `dist_net.`, and other words for its parts.

Source:
    alibaba-mmai-research/DiST at 4b3a09b: models/module_zoo/branches/dist.py, models/base/clip.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from ...errors import WeightsError
from ...store.reader import StoreReader
from ..networks.contract import NetworkShape
from ..networks.dist import DENSE, Dist, DistShape
from ..networks.parts import HEAD_WIDTH
from .checkpoint_file import CheckpointFile
from .released import NamePatterns, ReleasedNetwork, count_numbers, count_side_blocks, require_names, resolve_layers

# `module.` is DistributedDataParallel's.
_PREFIX = r"^(?:module\.)?(?:backbone\.base_encoder\.)?"
_SIDE = _PREFIX + r"(?:dist_net|ladder_net)\."
_TEMPORAL, _FUSE = r"temporal_nets\.(\d+)\.", r"(?:temporal2integration_nets|t2s_fuse_nets)\.(\d+)\."
_INTEGRATION = r"(?:integration_nets|spatial_nets)\.(\d+)\."
_POOLING = r"(?:adapooling_nets|final_temporal_nets)\.(\d+)\."

_OWN = re.compile(_SIDE)
_BACKBONE_BLOCK = re.compile(_PREFIX + r"visual\.transformer\.resblocks\.(\d+)\.")
_POSITIONS = re.compile(_PREFIX + r"visual\.positional_embedding$")
_TEXT = re.compile(
    _PREFIX + r"((?:transformer\.|token_embedding\.|ln_final\.).*|positional_embedding|text_projection)$"
)
_NEEDED = (
    "stem.weight",
    "blocks.0.tap.weight",
    "blocks.0.to_integration.fuse.weight",
    "blocks.0.to_integration.class_token",
    "projection",
    "logit_scale",
)


def _compile_names() -> NamePatterns:
    own = (
        (r"temporal_stem\.", "stem."),
        (r"(?:input_linears|input_map_feat_nets)\.(\d+)\.", r"blocks.\1.tap."),
        (_TEMPORAL + r"ln\.", r"blocks.\1.temporal.norm."),
        (_TEMPORAL + r"temporal_net\.c_fc1\.", r"blocks.\1.temporal.time."),
        (_TEMPORAL + r"temporal_net\.c_fc2\.", r"blocks.\1.temporal.space."),
        (_FUSE + r"linear_fuse\.", r"blocks.\1.to_integration.fuse."),
        (_FUSE + r"cls_token$", r"blocks.\1.to_integration.class_token"),
        (r"(?:integration2temporal_nets|s2t_fuse_nets)\.(\d+)\.linear_fuse\.", r"blocks.\1.to_temporal."),
        (_INTEGRATION + r"ln\.", r"blocks.\1.integration.mlp_norm."),
        (_INTEGRATION + r"ln_temporal\.", r"blocks.\1.integration.time_norm."),
        (_INTEGRATION + r"ffn\.c_fc\.", r"blocks.\1.integration.mlp.expand."),
        (_INTEGRATION + r"ffn\.c_proj\.", r"blocks.\1.integration.mlp.project."),
        (_INTEGRATION + r"temporal_ffn\.c_fc1\.", r"blocks.\1.integration.time.narrow."),
        (_INTEGRATION + r"temporal_ffn\.c_fc2\.", r"blocks.\1.integration.time.time."),
        (_INTEGRATION + r"temporal_ffn\.c_proj\.", r"blocks.\1.integration.time.widen."),
        (_POOLING + r"positional_embedding$", r"pooling.\1.position"),
        *_name_attention("spatial", "frame", "spatial_", "spat"),
        *_name_attention("temporal", "clip", "", "temp"),
        (r"aggregated_spatial_cls_token$", "frame_query"),
        (r"aggregated_cls_token$", "clip_query"),
        (r"proj_spatial_cls_token\.", "class_projection."),
        (r"ln_post\.", "end_norm."),
        (r"proj$", "projection"),
    )
    clips = ((r"visual\.ln_post\.", "end.norm."), (r"visual\.proj$", "end.project.weight"))
    return (
        *((re.compile(_SIDE + theirs), ours) for theirs, ours in own),
        *((re.compile(_PREFIX + theirs), ours) for theirs, ours in (*clips, (r"logit_scale$", "logit_scale"))),
    )


def _name_attention(theirs: str, ours: str, mlp: str, norm: str) -> tuple[tuple[str, str], ...]:
    """Of frames over their tokens, or of a clip over its frames."""
    attention, ours = _POOLING + rf"{theirs}_transformer\.", rf"pooling.\1.{ours}_"
    return (
        (attention + r"ln_1\.", ours + "attention.norm."),
        (attention + r"attn\.in_proj_", ours + "attention.qkv."),
        (attention + r"attn\.out_proj\.", ours + "attention.project."),
        (_POOLING + rf"ln_out_{norm}_cls_token\.", ours + "norm."),
        (_POOLING + rf"output_map_{mlp}cls_token\.c_fc\.", ours + "mlp.expand."),
        (_POOLING + rf"output_map_{mlp}cls_token\.c_proj\.", ours + "mlp.project."),
    )


class ReleasedDist(ReleasedNetwork):
    """The network, without texts of classes: those are made of names by the text tower in the file."""

    title = "DiST"
    names: ClassVar[NamePatterns] = _compile_names()

    def is_named_in(self, names: Iterable[str]) -> bool:
        """By any name of the side network."""
        return any(_OWN.match(name) for name in names)

    def count_backbone_blocks(self, names: Iterable[str]) -> int | None:
        """Of the image tower."""
        return count_numbers(_BACKBONE_BLOCK, names)

    def compare(self, shape: DistShape, store: StoreReader) -> dict[str, tuple[Any, Any]]:
        """The width of texts."""
        return {"width of embeddings": (shape.embed_dim, store.layout.embed_dim)}

    def name_text(self, name: str, shape: DistShape) -> str | None:
        """As CLIP has it."""
        match = _TEXT.match(name)
        return match[1] if match else None

    def read_shape(
        self, file: CheckpointFile, ours: Mapping[str, torch.Tensor], layers: tuple[int, ...] | None
    ) -> NetworkShape:
        """All but the classes."""
        require_names(file, self.title, ours, _NEEDED)
        positions = next((tensor for name, tensor in file.tensors.items() if _POSITIONS.match(name)), None)
        if positions is None:
            raise WeightsError(f"{file.path} has no visual.positional_embedding, which tells the patches of a frame")
        stem, (num_frames, side_width) = ours["stem.weight"], ours["blocks.0.to_integration.class_token"].shape
        fused = ours["blocks.0.to_integration.fuse.weight"].shape[1] / stem.shape[1]
        if fused != DENSE or side_width % HEAD_WIDTH:
            raise WeightsError(
                f"{file.path} joins {fused:g} dense frames to one of width {side_width}: {self.title} in s4v joins "
                f"{DENSE}, to a multiple of {HEAD_WIDTH}"
            )
        return DistShape(
            name=Dist.name,
            num_classes=0,
            layers=resolve_layers(file, count_side_blocks(ours), self.count_backbone_blocks(file.tensors), layers),
            width=ours["blocks.0.tap.weight"].shape[1],
            num_patches=len(positions) - 1,
            patch_px=round((stem.shape[2] / 3) ** 0.5),
            side_width=side_width,
            frames=num_frames,
            temporal_width=stem.shape[1],
            pooling_layers=len({name.split(".")[1] for name in ours if name.startswith("pooling.")}),
            embed_dim=ours["projection"].shape[1],
        )

    def complete(self, state: Mapping[str, torch.Tensor], shape: DistShape) -> dict[str, torch.Tensor]:
        """No class yet."""
        return {**state, "class_texts": torch.zeros(shape.num_classes, shape.embed_dim)}

    def reshape(self, name: str, new_name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Kernels as the matrices that we multiply with; learned tokens without axes of one."""
        if new_name == "stem.weight":  # (C, 3, K, p, p) -> (K, C, 3*p*p)
            return tensor.permute(2, 0, 1, 3, 4).flatten(2)
        if new_name.endswith(".time.weight"):  # (C, C, 3, 1, 1) -> (3, C, C)
            return tensor.flatten(2).permute(2, 0, 1)
        if new_name.endswith(".space.weight"):  # (C, C, 1, 3, 3) -> (C, C, 3, 3)
            return tensor.squeeze(2)
        if new_name.endswith(".fuse.weight"):  # (S, C, A, 1, 1) -> (S, A*C)
            return tensor.flatten(2).transpose(1, 2).flatten(1)
        if new_name.rpartition(".")[2] in ("class_token", "position"):  # (1, 1, T, S), (1, T, S) -> (T, S)
            return tensor.flatten(0, -2)
        if new_name in ("frame_query", "clip_query"):  # (1, 1, S) -> (S,)
            return tensor.flatten()
        if new_name == "end.project.weight":  # (D, E) -> (E, D)
            return tensor.T
        return tensor.flatten(1) if tensor.ndim == 5 else tensor
