"""Side networks in the layouts of the code that their papers published: what `side_network.py` times ours against.

Written from descriptions of that code; none of it is here. Each computes what ours computes. It differs in layout: maps
(B, S, T, h, w) for convolutions and batch norms, sequences (tokens, B*T, S) for attention, and the reorderings between
them. `take_weights` loads ours, `compare` says how far outputs and gradients are apart.

Source:
    Side4Video, https://arxiv.org/abs/2311.15769: HJYao00/Side4Video at 5d72352, Recognition/clip/model.py.
    TDS-CLIP, https://arxiv.org/abs/2408.10688: BBYL9413/TDS-CLIP at cf4e58c, clip/model.py.
    DiST, https://arxiv.org/abs/2309.07911: alibaba-mmai-research/DiST at 4b3a09b, models/module_zoo/branches/dist.py.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

HEAD_WIDTH = 64
REDUCTION = 16
"""How many times narrower than S a gate of TDS-CLIP is inside."""
DENSE, STEM_FRAMES = 2, 5
"""Of DiST: dense frames for each that the backbone sees, and those that its stem sees at once."""


def order_tokens(patches: torch.Tensor, cls: torch.Tensor) -> list[torch.Tensor]:
    """(B, T, L, N, D) and (B, T, L, D) -> for each layer (1+N, B*T, D), as a backbone leaves them."""
    joined = torch.cat([cls[:, :, :, None], patches], dim=3)
    return [layer.flatten(0, 1).transpose(0, 1).contiguous() for layer in joined.unbind(2)]


def to_map(x: torch.Tensor, num_clips: int) -> torch.Tensor:
    """(N, B*T, S) -> (B, S, T, h, w)."""
    side = math.isqrt(len(x))
    x = x.view(side, side, num_clips, x.shape[1] // num_clips, x.shape[2])
    return x.permute(2, 4, 3, 0, 1).contiguous()


def to_sequence(x: torch.Tensor) -> torch.Tensor:
    """(B, S, T, h, w) -> (N, B*T, S)."""
    b, s, t, height, width = x.shape
    return x.permute(3, 4, 0, 2, 1).reshape(height * width, b * t, s)


def to_frames(x: torch.Tensor) -> torch.Tensor:
    """(B, S, T, h, w) -> (B*T, S, h, w)."""
    return x.transpose(1, 2).flatten(0, 1)


def to_clips(x: torch.Tensor, num_clips: int) -> torch.Tensor:
    """(B*T, S, h, w) -> (B, S, T, h, w)."""
    return x.unflatten(0, (num_clips, -1)).transpose(1, 2)


class Stem(nn.Module):
    """Conv3d over 3 frames and one patch, then batch norm: (B, C, T, H, W) -> (B, S, T, h, w)."""

    def __init__(self, channels: int, side_width: int, patch_px: int, padding: int) -> None:
        super().__init__()
        kernel, stride = (3, patch_px, patch_px), (1, patch_px, patch_px)
        self.conv = nn.Conv3d(channels, side_width, kernel, stride, (1, padding, padding))
        self.norm = nn.BatchNorm3d(side_width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(pixels))


class MotionStem(nn.Module):
    """Of TDS-CLIP: (B, T, 5, 3, H, W) -> (B, S, T, h, w)."""

    def __init__(self, side_width: int, patch_px: int) -> None:
        super().__init__()
        self.frames = Stem(3, side_width, patch_px, 1)
        self.differences = Stem(12, side_width, patch_px, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        frames = pixels.unbind(2)
        differences = torch.cat([one - before for before, one in itertools.pairwise(frames)], dim=2)
        seen = self.frames(frames[2].transpose(1, 2))
        return seen + 0.5 * self.differences(differences.transpose(1, 2))


class MotionGate(nn.Module):
    """Of TDS-CLIP: (B, S, T, h, w) -> (B, S, T, h, w), with 1x1 convolutions of single frames."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        narrow = side_width // REDUCTION
        self.squeeze = nn.Conv2d(side_width, narrow, 1, bias=False)
        self.squeeze_norm = nn.BatchNorm2d(narrow)
        self.pool = nn.MaxPool3d((3, 1, 1), stride=1, padding=(1, 0, 0))
        self.excite = nn.Conv2d(narrow, side_width, 1, bias=False)
        self.excite_norm = nn.BatchNorm2d(side_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = to_clips(self.squeeze_norm(self.squeeze(to_frames(x))), len(x))
        behind = to_frames(squeezed - self.pool(squeezed))
        mixed = 0.5 * behind + 0.5 * behind.mean(dim=1, keepdim=True)
        return x * (0.5 + to_clips(self.excite_norm(self.excite(mixed)), len(x)).sigmoid())


class Attention(nn.Module):
    """Of a sequence's last tokens over all of it: (1+N, B*T, S) -> (N, B*T, S)."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(side_width, side_width // HEAD_WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x[1:], x, x, need_weights=False)[0]


class Block(nn.Module):
    """Of Side4Video beside CLIP, of TDS-CLIP with its gate: sequences (N, B*T, S) -> (N, B*T, S)."""

    def __init__(self, side_width: int, is_gated: bool) -> None:
        super().__init__()
        self.temporal_norm = nn.BatchNorm3d(side_width)
        self.temporal = nn.Sequential(
            nn.Conv3d(side_width, side_width, 1),
            nn.Conv3d(side_width, side_width, (3, 1, 1), padding=(1, 0, 0), groups=side_width),
            nn.Conv3d(side_width, side_width, 1),
        )
        self.gate = MotionGate(side_width) if is_gated else nn.Identity()
        self.attention_norm = nn.LayerNorm(side_width)
        self.attention = Attention(side_width)
        self.mlp_norm = nn.BatchNorm3d(side_width)
        self.mlp = nn.Sequential(
            nn.Linear(side_width, 4 * side_width), nn.GELU(), nn.Linear(4 * side_width, side_width)
        )

    def forward(self, x: torch.Tensor, cls: torch.Tensor, position: torch.Tensor, num_clips: int) -> torch.Tensor:
        maps = to_map(x, num_clips)
        x = to_sequence(maps + self.gate(self.temporal(self.temporal_norm(maps))))
        keys = torch.cat([shift(cls, num_clips), x + position[:, None]])
        x = x + self.attention(self.attention_norm(keys))
        return x + self.mlp(to_sequence(self.mlp_norm(to_map(x, num_clips))))


def shift(cls: torch.Tensor, num_clips: int) -> torch.Tensor:
    """Class tokens (1, B*T, S): of half the channels the next frame's, of the others the last one's."""
    by_clip = cls.view(num_clips, -1, cls.shape[2])
    half, shifted = cls.shape[2] // 2, torch.zeros_like(by_clip)
    shifted[:, :-1, :half] = by_clip[:, 1:, :half]
    shifted[:, 1:, half:] = by_clip[:, :-1, half:]
    return shifted.view_as(cls)


class SideNetwork(nn.Module):
    """Recognition beside CLIP: Side4Video's, or TDS-CLIP's on five frames for each of a clip."""

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        side_width: int,
        num_patches: int,
        patch_px: int,
        num_classes: int,
        is_tds_clip: bool = False,
    ) -> None:
        super().__init__()
        self.is_tds_clip = is_tds_clip
        self.stem = MotionStem(side_width, patch_px) if is_tds_clip else Stem(3, side_width, patch_px, 0)
        self.position = nn.Parameter(torch.zeros(num_patches, side_width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_layers))
        self.projections = nn.ModuleList(nn.Linear(width, side_width) for _ in range(num_layers))
        self.blocks = nn.ModuleList(Block(side_width, is_tds_clip) for _ in range(num_layers))
        self.norm = nn.BatchNorm3d(side_width)
        self.classifier = nn.Linear(side_width, num_classes)

    def forward(self, pixels: torch.Tensor, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pixels (B, T, 3, H, W) or (B, T, 5, 3, H, W), tokens as from `order_tokens` -> (B, classes)."""
        x = to_sequence(self.stem(pixels if self.is_tds_clip else pixels.transpose(1, 2)))
        for norm, project, block, layer in zip(self.norms, self.projections, self.blocks, tokens, strict=True):
            read = project(norm(layer))  # (1+N, B*T, S)
            x = block(0.5 * x + 0.5 * read[1:], read[:1], self.position, len(pixels))
        return self.classifier(self.norm(to_map(x, len(pixels))).mean(dim=(2, 3, 4)))


class QuickGelu(nn.Module):
    """CLIP's activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class TemporalEncoder(nn.Module):
    """Of DiST: (B, C, M, h, w) -> (B, C, M, h, w); its layer norm is over the channels of each place."""

    def __init__(self, temporal_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(temporal_width)
        self.time = nn.Conv3d(temporal_width, temporal_width, (3, 1, 1), padding=(1, 0, 0))
        self.space = nn.Conv3d(temporal_width, temporal_width, (1, 3, 3), padding=(0, 1, 1))
        self.activation = QuickGelu()

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        normalised = self.norm(y.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3).contiguous()
        return self.activation(y + self.space(self.activation(self.time(normalised))))


class ToIntegration(nn.Module):
    """Of DiST: (B, C, M, h, w) -> (1+N, B*T, S), a learned class token of each frame first."""

    def __init__(self, temporal_width: int, side_width: int, num_frames: int) -> None:
        super().__init__()
        self.fuse = nn.Conv3d(temporal_width, side_width, (DENSE, 1, 1), stride=(DENSE, 1, 1))
        self.class_token = nn.Parameter(torch.zeros(1, 1, num_frames, side_width))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        cls = self.class_token.expand(1, len(y), -1, -1).flatten(1, 2)
        return torch.cat([cls, to_sequence(self.fuse(y))])


class QuickMlp(nn.Module):
    """Two layers with CLIP's activation between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, inner)
        self.activation = QuickGelu()
        self.project = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.activation(self.expand(x)))


class TimeBottleneck(nn.Module):
    """Of DiST: sequences (1+N, B*T, S) -> the same, by convolutions over (B, S, T, 1+N, 1)."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        narrow = side_width // 4
        self.narrow = nn.Conv3d(side_width, narrow, 1)
        self.time = nn.Conv3d(narrow, narrow, (3, 1, 1), padding=(1, 0, 0))
        self.activation = QuickGelu()
        self.widen = nn.Conv3d(narrow, side_width, 1)

    def forward(self, x: torch.Tensor, num_clips: int) -> torch.Tensor:
        clips = x.unflatten(1, (num_clips, -1)).permute(1, 3, 2, 0)[..., None].contiguous()
        return to_sequence(self.widen(self.activation(self.time(self.narrow(clips)))))


class Integration(nn.Module):
    """Of DiST: two branches side by side, (1+N, B*T, S) -> (1+N, B*T, S)."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.mlp_norm = nn.LayerNorm(side_width)
        self.mlp = QuickMlp(side_width, side_width)
        self.time_norm = nn.LayerNorm(side_width)
        self.time = TimeBottleneck(side_width)

    def forward(self, x: torch.Tensor, num_clips: int) -> torch.Tensor:
        return self.mlp(self.mlp_norm(x)) + self.time(self.time_norm(x), num_clips)


class DistBlock(nn.Module):
    """Of DiST, beside one block of the backbone."""

    def __init__(self, width: int, side_width: int, temporal_width: int, num_frames: int) -> None:
        super().__init__()
        self.temporal = TemporalEncoder(temporal_width)
        self.tap = nn.Linear(width, side_width)
        self.to_integration = ToIntegration(temporal_width, side_width, num_frames)
        self.to_temporal = nn.Linear(side_width, temporal_width)
        self.integration = Integration(side_width)

    def forward(
        self, y: torch.Tensor, handed: torch.Tensor | None, layer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Temporal map, what the block before handed on, tokens -> map, what is handed on, what came before that."""
        y = self.temporal(y)
        read = self.tap(layer) if handed is None else self.tap(layer) + handed
        x = read + self.to_integration(y)
        back = to_map(self.to_temporal(read[1:]), len(y)).repeat_interleave(DENSE, dim=2)
        return y + back, self.integration(x, len(y)), x


class QueryAttention(nn.Module):
    """Of a query (1, n, S) over (k, n, S), behind one norm."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(side_width)
        self.attention = nn.MultiheadAttention(side_width, side_width // HEAD_WIDTH)

    def forward(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        keys = self.norm(tokens)
        return self.attention(self.norm(query), keys, keys, need_weights=False)[0]


class PoolingLayer(nn.Module):
    """Of DiST: queries of frames (1, B*T, S), then of clips (1, B, S)."""

    def __init__(self, side_width: int, num_frames: int) -> None:
        super().__init__()
        self.frame_attention = QueryAttention(side_width)
        self.frame_norm = nn.LayerNorm(side_width)
        self.frame_mlp = QuickMlp(side_width, 4 * side_width)
        self.position = nn.Parameter(torch.zeros(1, num_frames, side_width))
        self.clip_attention = QueryAttention(side_width)
        self.clip_norm = nn.LayerNorm(side_width)
        self.clip_mlp = QuickMlp(side_width, 4 * side_width)

    def forward(self, frames: torch.Tensor, clip: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = frames + self.frame_attention(frames, x)
        frames = frames + self.frame_mlp(self.frame_norm(frames))
        by_clip = frames.view(clip.shape[1], -1, clip.shape[2]) + self.position
        clip = clip + self.clip_attention(clip, by_clip.transpose(0, 1))
        return frames, clip + self.clip_mlp(self.clip_norm(clip))


class DistNetwork(nn.Module):
    """DiST, with class names' texts as its classifier."""

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        side_width: int,
        temporal_width: int,
        num_frames: int,
        pooling_layers: int,
        num_patches: int,
        patch_px: int,
        embed_dim: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        kernel, stride = (STEM_FRAMES, patch_px, patch_px), (1, patch_px, patch_px)
        convolution = nn.Conv3d(3, temporal_width, kernel, stride, (STEM_FRAMES // 2, 0, 0))
        self.stem = nn.Sequential(OrderedDict(conv=convolution))
        self.blocks = nn.ModuleList(DistBlock(width, side_width, temporal_width, num_frames) for _ in range(num_layers))
        self.frame_query = nn.Parameter(torch.zeros(1, 1, side_width))
        self.clip_query = nn.Parameter(torch.zeros(1, 1, side_width))
        self.pooling = nn.ModuleList(PoolingLayer(side_width, num_frames) for _ in range(pooling_layers))
        self.class_projection = nn.Linear(width, side_width)
        self.end_norm = nn.LayerNorm(side_width)
        self.projection = nn.Parameter(torch.zeros(side_width, embed_dim))
        self.register_buffer("class_texts", torch.zeros(num_classes, embed_dim))
        self.register_buffer("logit_scale", torch.zeros(()))

    def forward(self, pixels: torch.Tensor, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pixels (B, 2T, 3, H, W), tokens as from `order_tokens` -> (B, classes)."""
        y, handed = self.stem(pixels.transpose(1, 2)), None
        for block, layer in zip(self.blocks, tokens, strict=True):
            y, handed, x = block(y, handed, layer)
        x = x + handed
        frames = self.frame_query.expand(1, x.shape[1], -1)
        clip = self.clip_query.expand(1, len(pixels), -1)
        for layer in self.pooling:
            frames, clip = layer(frames, clip, x)
        seen = tokens[-1][0].unflatten(0, (len(pixels), -1)).mean(dim=1)
        embedding = self.end_norm(clip[0] + self.class_projection(seen)) @ self.projection
        texts = F.normalize(self.class_texts, dim=-1)
        return self.logit_scale.exp() * (F.normalize(embedding, dim=-1) @ texts.T)


# Ours -> the names above; what is not here has the same name.
_NAMES = (
    (r"^(stem(?:\.frames|\.differences)?)\.(weight|bias)$", r"\1.conv.\2"),
    (r"^taps\.(\d+)\.norm\.", r"norms.\1."),
    (r"^taps\.(\d+)\.project\.", r"projections.\1."),
    (r"\.temporal\.expand\.", r".temporal.0."),
    (r"\.temporal\.(weight|bias)$", r".temporal.1.\1"),
    (r"\.temporal\.project\.", r".temporal.2."),
    (r"attention\.qkv\.", r"attention.attention.in_proj_"),
    (r"attention\.project\.", r"attention.attention.out_proj."),
)


def rename(ours: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of our network, weights or their gradients, under the names and in the shapes of a published one."""
    shapes, renamed = {name: tensor.shape for name, tensor in network.state_dict().items()}, {}
    for name, tensor in ours.items():
        for own, theirs in _NAMES:
            name = re.sub(own, theirs, name)
        shape = shapes[name]
        if name.endswith(".fuse.weight"):  # ours joins dense frames, then channels
            tensor = tensor.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)
        elif len(shape) == 5 and shape[2] > 1:  # our kernels over time have time first: (K, outputs, inputs)
            tensor = tensor.reshape(shape[2], *shape[:2], *shape[3:]).movedim(0, 2)
        renamed[name] = tensor.reshape(shape)
    return renamed


def take_weights(network: nn.Module, ours: nn.Module) -> nn.Module:
    """The network, with all that ours has, running statistics too."""
    network.load_state_dict(rename(ours.state_dict(), network))
    return network


def compare(network: nn.Module, ours: nn.Module) -> float:
    """The largest difference between gradients of a published network and ours, of the largest number of their layer.

    Of a layer, for some have no gradient but rounding: biases before a batch norm.
    """
    expected = rename({name: one.grad for name, one in ours.named_parameters() if one.grad is not None}, network)
    found = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    assert set(found) == set(expected), sorted(set(found) ^ set(expected))
    sizes: dict[str, float] = {}
    for name, tensor in expected.items():
        layer = name.rpartition(".")[0]
        sizes[layer] = max(sizes.get(layer, 0.0), tensor.abs().max().item())
    return max(
        (found[name] - tensor).abs().max().item() / sizes[name.rpartition(".")[0]] for name, tensor in expected.items()
    )
