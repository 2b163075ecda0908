"""DiST: a thin convolutional encoder over twice the frames, an integration branch, and a classifier that is text.

The temporal encoder sees 2T dense frames as pixels. The integration branch reads each block of the backbone for every
second of them, and swaps features with the encoder at each block. Learned queries pool the result to one vector, which
is compared with the class names' embeddings. docs/networks.md has all of it as formulas.

Source:
    DiST, https://arxiv.org/abs/2309.07911; its code alibaba-mmai-research/DiST at 4b3a09b,
    models/module_zoo/branches/dist.py. Ours differs in layout (token-major, the class token apart), in computing all
    but the convolution over the grid as matrix products and shifted sums, in taking cached tokens or their codes, and
    in leaving out what the last block sends back to the encoder, which nothing reads. Outputs and gradients agree:
    tests/golden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow.compute
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ...errors import ConfigError, StoreMismatchError
from ...store.class_texts import read_class_template
from ...store.codecs.contract import Codec
from ...store.needs import Lack, StoreNeeds, describe_command
from ...store.offsets import PixelOffset, describe_offsets
from ...store.reader import StoreReader
from ..paper.presets import DIST_PRESETS, DIST_RECIPE, DIST_SIDE_WIDTH
from ..recipe import Optimisation, ParameterGroup, Recipe, cosine_under_warmup
from .contract import NetworkKind, NetworkShape, Outputs, TextNetwork
from .parts import HEAD_WIDTH, make_again, sum_shifted
from .side4video import require_square_patches

if TYPE_CHECKING:
    from ..clips import ClipPlan

DENSE = 2
"""Dense frames for each one that the backbone sees."""

HALF_STEP = "0.5step"
"""Where the second of them lies, of the distance between cached frames."""

_GELU_SCALE = 1.702
_STEM_FRAMES = 5
_STD = 0.02

_MOST_FRAMES = 8
"""T, where nobody says otherwise and a store that holds 2T frames or more would serve for more."""

_FIRST_RATE_SHARE = 8e-8 / 3.2e-5
"""Of the full rate, that the first step has."""


class _QuickGelu(torch.autograd.Function):
    """x sigmoid(1.702 x), by its gradient in one pass over memory: autograd's own takes five."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        scaled = x * _GELU_SCALE
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(_GELU_SCALE)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (scaled,) = ctx.saved_tensors
        # The scale within and the one without cancel.
        return torch.ops.aten.silu_backward(gradients[0], scaled)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return _QuickGelu.apply(x)


class DenseStem(nn.Module):
    """Convolution over 5 dense frames and one patch: (B, M, 3, H, W) -> (B, M, N, C)."""

    def __init__(self, temporal_width: int, patch_px: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.weight = nn.Parameter(torch.empty(_STEM_FRAMES, temporal_width, 3 * patch_px**2))
        self.bias = nn.Parameter(torch.zeros(temporal_width))
        nn.init.normal_(self.weight, std=_STD)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels to temporal tokens; frames before the first and after the last count as zeros."""
        p = self.patch_px
        b, m, c, height, width = pixels.shape
        x = pixels.reshape(b, m, c, height // p, p, width // p, p)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, m, -1, c * p * p)  # (B, M, N, 3*p*p)
        # One product for all steps of the kernel, then shifted sums.
        return sum_shifted(*F.linear(x, self.weight.flatten(0, 1)).chunk(_STEM_FRAMES, dim=-1)) + self.bias


class TimeConv(nn.Module):
    """Full kernel of 3 over time: (B, T, N, S) -> (B, T, N, S), zeros at the ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, width, width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight, std=_STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One product for all three steps of the kernel, then shifted sums."""
        return sum_shifted(*F.linear(x, self.weight.flatten(0, 1)).chunk(3, dim=-1)) + self.bias


class TemporalEncoder(nn.Module):
    """One layer of the encoder: over time, then over the grid, and an activation behind the residual."""

    def __init__(self, temporal_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(temporal_width)
        self.time = TimeConv(temporal_width)
        self.space = nn.Conv2d(temporal_width, temporal_width, 3, padding=1)
        nn.init.normal_(self.space.weight, std=_STD)
        assert self.space.bias is not None
        nn.init.zeros_(self.space.bias)

    def forward(self, y: torch.Tensor, grid: tuple[int, int], side_width: int) -> torch.Tensor:
        """(B, M, N, C) -> (B, M, N, C).

        Args:
            y: Temporal tokens.
            grid: Rows and columns of patches.
            side_width: S, which decides what is kept for the backward pass.
        """

        def convolve_space(x: torch.Tensor) -> torch.Tensor:
            x = _quick_gelu(x).reshape(-1, *grid, y.shape[-1]).permute(0, 3, 1, 2)  # (B*M, C, g, g), channels last
            return self.space(x).permute(0, 2, 3, 1).reshape(y.shape)

        x = make_again(lambda y: self.time(self.norm(y)), y, side_width=side_width)
        return _quick_gelu(y + make_again(convolve_space, x, side_width=side_width))


class PlainTap(nn.Linear):
    """Reads one backbone layer, without a norm: (..., D) -> (..., S)."""

    def read_codes(self, codes: torch.Tensor, codec: Codec, layer: int) -> torch.Tensor:
        """The same of codes (..., K), without ever holding their tokens: one product of K by S decodes and projects."""
        affine = codec.as_affine(layer, codes)
        if affine is None:
            return make_again(lambda codes: self(codec.decode(codes, layer)), codes, side_width=self.out_features)
        bias = self.bias if affine.offset is None else self.weight @ affine.offset + self.bias

        def project(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            """Codes are kept for the backward pass, and not the four times larger numbers that they stand for."""
            return F.linear(codes.float() if affine.scale is None else codes * affine.scale, weight, bias)

        return make_again(project, self.weight @ affine.matrix.T, bias, side_width=self.out_features)


class ToIntegration(nn.Module):
    """What the integration branch gets of each frame's dense frames, and a class token of each frame."""

    def __init__(self, temporal_width: int, side_width: int, num_frames: int) -> None:
        super().__init__()
        self.fuse = nn.Linear(DENSE * temporal_width, side_width)
        self.class_token = nn.Parameter(torch.empty(num_frames, side_width))
        nn.init.normal_(self.class_token, std=_STD)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """(B, 2T, N, C) -> (B, T, N, S)."""

        def fuse(y: torch.Tensor) -> torch.Tensor:
            return self.fuse(y.unflatten(1, (-1, DENSE)).transpose(2, 3).flatten(3))

        return make_again(fuse, y, side_width=self.fuse.out_features)


class QuickMlp(nn.Module):
    """Two layers with CLIP's activation between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, inner)
        self.project = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """(..., S) -> (..., S), of what a norm makes of it."""
        width = self.project.out_features
        x = make_again(lambda x: self.expand(norm(x)), x, side_width=width)
        return make_again(lambda x: self.project(_quick_gelu(x)), x, side_width=width)


class TimeBottleneck(nn.Module):
    """To a quarter of the width, over time there, and back."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(side_width, side_width // 4)
        self.time = TimeConv(side_width // 4)
        self.widen = nn.Linear(side_width // 4, side_width)

    def forward(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """(B, T, N, S) -> (B, T, N, S), of what a norm makes of it."""
        width = self.widen.out_features
        x = self.time(make_again(lambda x: self.narrow(norm(x)), x, side_width=width))
        return make_again(lambda x: self.widen(_quick_gelu(x)), x, side_width=width)


class Integration(nn.Module):
    """Two branches side by side on the same input, without a residual."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.mlp_norm = nn.LayerNorm(side_width)
        self.mlp = QuickMlp(side_width, side_width)
        self.time_norm = nn.LayerNorm(side_width)
        self.time = TimeBottleneck(side_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, N, S) -> (B, T, N, S)."""
        return self.mlp(x, self.mlp_norm) + self.time(x, self.time_norm)


class DistBlock(nn.Module):
    """What follows each of the backbone's blocks."""

    def __init__(self, width: int, side_width: int, temporal_width: int, num_frames: int) -> None:
        super().__init__()
        self.temporal = TemporalEncoder(temporal_width)
        self.tap = PlainTap(width, side_width)
        self.to_integration = ToIntegration(temporal_width, side_width, num_frames)
        self.to_temporal = nn.Linear(side_width, temporal_width)
        self.integration = Integration(side_width)

    def forward(
        self, y: torch.Tensor, read: torch.Tensor, read_cls: torch.Tensor, grid: tuple[int, int], *, is_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One block.

        Args:
            y: (B, 2T, N, C) temporal tokens.
            read: (B, T, N, S) what the tap reads of patches, plus what the block before handed on.
            read_cls: (B, T, S) the same of class tokens.
            grid: Rows and columns of patches.
            is_last: Whether nothing follows: then the encoder gets nothing back, and the residual is added.

        Returns:
            The same three, as the next block takes them.
        """
        side_width = read.shape[-1]
        y = self.temporal(y, grid, side_width)
        x = read + self.to_integration(y)
        x_cls = read_cls + self.to_integration.class_token
        handed, handed_cls = self.integration(x), self.integration(x_cls[:, :, None])[:, :, 0]
        if is_last:
            return y, handed + x, handed_cls + x_cls
        back = self.to_temporal(read)  # (B, T, N, C), of each frame to all of its dense frames
        y = (y.unflatten(1, (-1, DENSE)) + back[:, :, None]).flatten(1, 2)
        return y, handed, handed_cls


class QueryAttention(nn.Module):
    """Attention of one vector over others, all behind one norm."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(side_width)
        self.num_heads = side_width // HEAD_WIDTH
        self.qkv = nn.Linear(side_width, 3 * side_width)
        self.project = nn.Linear(side_width, side_width)

    def forward(self, query: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
        """(n, S) over (n, k, S), in one part or several -> (n, S)."""
        n, s = query.shape
        weight, bias = self.qkv.weight, self.qkv.bias

        def read_keys(*tokens: torch.Tensor) -> torch.Tensor:
            return F.linear(self.norm(torch.cat(tokens, dim=1)), weight[s:], bias[s:])

        keys_values = make_again(read_keys, *tokens, side_width=s)
        k, v = keys_values.view(n, -1, 2, self.num_heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        q = F.linear(self.norm(query), weight[:s], bias[:s]).view(n, self.num_heads, 1, HEAD_WIDTH)
        return self.project(F.scaled_dot_product_attention(q, k, v).reshape(n, s))


class PoolingLayer(nn.Module):
    """Each frame's query looks at its tokens, then the clip's query at those of all frames."""

    def __init__(self, side_width: int, num_frames: int) -> None:
        super().__init__()
        self.frame_attention = QueryAttention(side_width)
        self.frame_norm = nn.LayerNorm(side_width)
        self.frame_mlp = QuickMlp(side_width, 4 * side_width)
        self.position = nn.Parameter(torch.empty(num_frames, side_width))
        self.clip_attention = QueryAttention(side_width)
        self.clip_norm = nn.LayerNorm(side_width)
        self.clip_mlp = QuickMlp(side_width, 4 * side_width)
        nn.init.normal_(self.position, std=_STD)

    def forward(
        self, frames: torch.Tensor, clip: torch.Tensor, x: torch.Tensor, x_cls: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of frames (B, T, S) and clips (B, S), over tokens (B, T, N, S) and (B, T, S) -> queries."""
        flat = frames.flatten(0, 1)
        flat = flat + self.frame_attention(flat, x_cls.flatten(0, 1)[:, None], x.flatten(0, 1))
        flat = flat + self.frame_mlp(flat, self.frame_norm)
        frames = flat.view_as(frames)
        clip = clip + self.clip_attention(clip, frames + self.position)
        return frames, clip + self.clip_mlp(clip, self.clip_norm)


class DistNetwork(TextNetwork):
    """The network.

    Args:
        num_layers: L, blocks of the backbone that it reads.
        width: D, the backbone's.
        side_width: S, a multiple of 64.
        temporal_width: C.
        num_frames: T, frames that the backbone saw.
        pooling_layers: Q.
        num_patches: N, patches of a frame.
        patch_px: Side of a patch.
        embed_dim: E, of texts.
        num_classes: Of the texts that it compares with.
    """

    arrays = ("patches", "cls", "pixels")
    frames_per_token = DENSE

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
        super().__init__(num_classes, embed_dim)
        self.num_frames = num_frames
        self.num_patches = num_patches
        self.stem = DenseStem(temporal_width, patch_px)
        self.blocks = nn.ModuleList(DistBlock(width, side_width, temporal_width, num_frames) for _ in range(num_layers))
        self.frame_query = nn.Parameter(torch.empty(side_width))
        self.clip_query = nn.Parameter(torch.empty(side_width))
        self.pooling = nn.ModuleList(PoolingLayer(side_width, num_frames) for _ in range(pooling_layers))
        self.class_projection = nn.Linear(width, side_width)
        self.end_norm = nn.LayerNorm(side_width)
        self.projection = nn.Parameter(torch.empty(side_width, embed_dim))
        self._draw_weights()
        # Its output would be the next block's: the reference's files hold these weights, nothing reads them.
        last = self.blocks[-1]
        assert isinstance(last, DistBlock)
        last.to_temporal.requires_grad_(False)

    def _draw_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, QueryAttention):
                nn.init.xavier_uniform_(module.qkv.weight)
        for query in (self.frame_query, self.clip_query):
            nn.init.normal_(query, std=_STD)
        nn.init.normal_(self.projection, std=len(self.projection) ** -0.5)

    def fit_clips(self, store: StoreReader, num_frames: int, lengths: np.ndarray) -> int:
        """Settle where dense frames come from: cached clips of T with pixels half a step on, else clips of 2T.

        A store that has both kinds was made for the first: it has tokens of all frames that it caches.
        """
        if _has_half_steps(store) and bool((lengths == num_frames).all()):
            self.pixel_offsets, self.frames_per_token = (0, HALF_STEP), 1
            return num_frames
        if store.facts.is_open_ended or int(lengths.min()) >= DENSE * num_frames:
            self.pixel_offsets, self.frames_per_token = (0,), DENSE
            return DENSE * num_frames
        held = ", ".join(map(str, sorted({*lengths.tolist()})))
        # Of `val` the three test clips, and the one that training validates on.
        frames = f"train={num_frames},val={4 * num_frames},{num_frames}"
        made = Lack("offsets", "", ("--for", "dist", "--frames", frames))
        raise StoreMismatchError(
            f"a clip of --head dist is {num_frames} cached frames with pixels at 0,{HALF_STEP}, or "
            f"{DENSE * num_frames} cached frames; clips of {store.path} have {held} frames, with pixels at "
            f"{describe_offsets(store.layout.pixel_offsets)}. Take other --frames, or make a store: "
            f"{describe_command(store, [made])}"
        )

    def reverse_plan(self, plan: ClipPlan) -> ClipPlan:
        """Dense frames from the last to the first: tokens are then of those that had none before."""
        if self.frames_per_token == 1:
            raise ConfigError(
                f"--backwards: this store has no tokens of the frames half a step on, which a clip of --head dist "
                f"reads when it is played backwards. Evaluate on a store with {DENSE * self.num_frames} frames "
                "(--features), where every dense frame has them."
            )
        return super().reverse_plan(plan)

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Decay is for matrices and kernels: not for learned tokens and positions."""
        spared = {
            id(p) for name, p in self.named_parameters() if name.rpartition(".")[2] in ("class_token", "position")
        }
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            ParameterGroup(tuple(p for p in trained if id(p) not in spared)),
            ParameterGroup(tuple(p for p in trained if id(p) in spared), decays=False),
        ]

    def forward(
        self, pixels: torch.Tensor, patches: torch.Tensor, cls: torch.Tensor, codec: Codec | None = None
    ) -> torch.Tensor:
        """Score clips: (B, classes) logits.

        Args:
            pixels: (B, T, 2, 3, H, W) or (B, 2T, 3, H, W), normalised as for the backbone.
            patches: (B, T, L, N, D) patch tokens or, with a codec, (B, T, L, N, K) codes.
            cls: (B, T, L, D) class tokens of the same layers.
            codec: Decodes the codes of each layer when its tap needs them; arrays on the same device.

        Raises:
            StoreMismatchError: If the number of layers, patches or frames is not this network's.
        """
        self._check_sizes(pixels, patches)
        return self.compare_texts(self.embed(pixels, patches, cls, codec))

    def embed(
        self, pixels: torch.Tensor, patches: torch.Tensor, cls: torch.Tensor, codec: Codec | None = None
    ) -> torch.Tensor:
        """What `forward` takes -> (B, E), not normalised."""
        _, clip = self._pool(*self._integrate(pixels, patches, cls, codec))
        with torch.autocast(clip.device.type, enabled=False):
            dtype = self.projection.dtype
            seen = self.class_projection(cls[:, :, -1].to(dtype).mean(dim=1))
            return self.end_norm(clip.to(dtype) + seen) @ self.projection

    def _check_sizes(self, pixels: torch.Tensor, patches: torch.Tensor) -> None:
        found = (*patches.shape[1:4], pixels.shape[1:-3].numel())
        wanted = (self.num_frames, len(self.blocks), self.num_patches, DENSE * self.num_frames)
        if found != wanted:
            raise StoreMismatchError(
                "this network takes {} frames of {} layers of {} patches, and pixels of {} frames".format(*wanted)
                + "; found {}, {}, {} and {}".format(*found)
            )

    def _integrate(
        self, pixels: torch.Tensor, patches: torch.Tensor, cls: torch.Tensor, codec: Codec | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, T, N, S) and class tokens (B, T, S) after the last block."""
        dense = pixels.flatten(1, 2) if pixels.ndim == 6 else pixels
        p = self.stem.patch_px
        grid = dense.shape[-2] // p, dense.shape[-1] // p
        y, handed, handed_cls = self.stem(dense), None, None
        for layer in range(len(self.blocks)):
            step = (y, handed, handed_cls, layer, grid, patches, cls, codec)
            if self.checkpoints_activations and self.training:
                # Nothing is drawn, and asking a GPU for its state holds it up.
                y, handed, handed_cls = recompute_in_backward(
                    self._run_block, *step, use_reentrant=False, preserve_rng_state=False
                )
            else:
                y, handed, handed_cls = self._run_block(*step)
        assert handed is not None and handed_cls is not None
        return handed, handed_cls

    def _run_block(
        self,
        y: torch.Tensor,
        handed: torch.Tensor | None,
        handed_cls: torch.Tensor | None,
        layer: int,
        grid: tuple[int, int],
        patches: torch.Tensor,
        cls: torch.Tensor,
        codec: Codec | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block, tokens = self.blocks[layer], patches[:, :, layer]
        assert isinstance(block, DistBlock)
        tap = block.tap
        read = tap(tokens.to(cls.dtype)) if codec is None else tap.read_codes(tokens, codec, layer)
        read_cls = tap(cls[:, :, layer])
        if handed is not None and handed_cls is not None:
            read, read_cls = read + handed, read_cls + handed_cls
        return block(y, read, read_cls, grid, is_last=layer + 1 == len(self.blocks))

    def _pool(self, x: torch.Tensor, x_cls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, N, S), (B, T, S) -> queries of frames (B, T, S) and clips (B, S)."""
        frames = self.frame_query.to(x_cls.dtype).expand(*x_cls.shape)
        clip = self.clip_query.to(x_cls.dtype).expand(len(x_cls), -1)
        for layer in self.pooling:
            frames, clip = layer(frames, clip, x, x_cls)
        return frames, clip


def ramp_to_cosine(epoch: float, warmup: float, epochs: float) -> float:
    """A cosine to 0 that begins with the first step; the warm-up rises in a line to where it has come to by then."""
    if epoch >= warmup:
        return cosine_under_warmup(epoch, warmup, epochs)
    reached = cosine_under_warmup(warmup, warmup, epochs)
    return _FIRST_RATE_SHARE + (reached - _FIRST_RATE_SHARE) * epoch / warmup


@dataclass(frozen=True)
class DistOptions:
    """What a command says of the network."""

    side_width: int | None = None
    """S; None takes half of the backbone's width, 384 at most."""
    frames: int | None = None
    """T, frames that the backbone sees; None takes those of the store's clips, or half of them, 8 at most."""
    temporal_width: int | None = None
    """C; None takes a quarter of S."""
    pooling_layers: int = 2
    """Q."""


@dataclass(frozen=True, kw_only=True)
class DistShape(NetworkShape):
    """Of the network."""

    side_width: int
    """S."""
    frames: int
    """T: learned tokens and positions are of so many frames."""
    temporal_width: int
    """C."""
    pooling_layers: int
    """Q."""
    embed_dim: int
    """E, of texts."""
    class_template: str = "{}"
    """In which {} stands for a class's name."""

    @property
    def clip_frames(self) -> int:
        """T."""
        return self.frames


class Dist(NetworkKind):
    """DiST: see above. The paper has it beside CLIP; beside any other backbone with a text tower it is the same."""

    name = "dist"
    tasks = ("recognition",)
    reads = "patch and class tokens of all layers, pixels of twice the frames, class names, order"
    # Its clips are whole: a frame of pixels lies half way to the next frame of the clip as it is cached. Three test
    # views of one crop. The paper's training frames are drawn anew in each epoch, here they are the uniform ones.
    extraction: ClassVar[Mapping[str, Any]] = {
        "layers": "all",
        "sampling": "reference-dist",
        "frames": {"train": 8, "val": 32, "": 8},
        "clips": {"val": 3, "": 1},
        "validation_clip": ("val",),
        "views": {"": "centre"},
        "resize": "224",
        "pixel_offsets": (0, HALF_STEP),
        "class_template": "{}",
    }
    options = DistOptions
    shape: ClassVar[type[NetworkShape]] = DistShape
    presets = DIST_PRESETS
    needs: ClassVar[Mapping[str, StoreNeeds]] = {
        "recognition": StoreNeeds(
            arrays=DistNetwork.arrays,
            head=True,
            text_tower=True,
            class_texts=True,
            instead={
                "class_texts": "run the command that began it once more with --class-template '{}': it adds them",
                "cls": "train with --head attentive",
            },
        )
    }
    can_checkpoint_activations = True
    classifies_by_text = True
    optimisation: ClassVar[Mapping[str, Optimisation]] = {"recognition": Optimisation(schedule=ramp_to_cosine)}

    def find_recipe(self, task: str, width: int) -> Recipe:
        """The same beside every backbone."""
        return DIST_RECIPE

    def plan(self, store: StoreReader, outputs: Outputs, options: DistOptions, layers: tuple[int, ...]) -> NetworkShape:
        """Fit it to a store."""
        require_square_patches(store, "Train with --head attentive.")
        if layers[-1] != (last := store.facts.backbone.depth - 1):
            raise StoreMismatchError(
                f"--head dist reads the class token of the last block, {last}; --layers ends with {layers[-1]}"
            )
        side_width = options.side_width or min(
            DIST_SIDE_WIDTH, max(HEAD_WIDTH, store.layout.width // (2 * HEAD_WIDTH) * HEAD_WIDTH)
        )
        if side_width % HEAD_WIDTH:
            raise ConfigError(f"--side-width must be a multiple of 64 (one attention head); found {side_width}")
        temporal_width = side_width // 4 if options.temporal_width is None else options.temporal_width
        for name, value in (("temporal_width", temporal_width), ("pooling_layers", options.pooling_layers)):
            if value < 1:
                raise ConfigError(f"--set {name} must be at least 1; found {value}")
        return self.describe_shape(
            store,
            outputs,
            layers,
            side_width=side_width,
            frames=options.frames or _find_frames(store),
            temporal_width=temporal_width,
            pooling_layers=options.pooling_layers,
            embed_dim=store.layout.embed_dim,
            class_template=read_class_template(store.path) or "{}",
        )

    def build(self, shape: DistShape) -> DistNetwork:
        """A network of those sizes."""
        return DistNetwork(
            num_layers=len(shape.layers),
            width=shape.width,
            side_width=shape.side_width,
            temporal_width=shape.temporal_width,
            num_frames=shape.frames,
            pooling_layers=shape.pooling_layers,
            num_patches=shape.num_patches,
            patch_px=shape.patch_px,
            embed_dim=shape.embed_dim,
            num_classes=shape.num_classes,
        )


def _has_half_steps(store: StoreReader) -> bool:
    return store.layout.with_pixels and PixelOffset.of(HALF_STEP) in store.layout.pixel_offsets


def _find_frames(store: StoreReader) -> int:
    """T of a store's recorded clips: with pixels half a step on that is all of the shortest one, else half of it."""
    if store.facts.is_open_ended:
        return _MOST_FRAMES
    table = store.read_manifest(["status", "eval_clips"])
    clips = pyarrow.compute.list_flatten(table.filter(pyarrow.compute.equal(table["status"], "ok"))["eval_clips"])
    shortest = pyarrow.compute.min(pyarrow.compute.list_value_length(clips)).as_py() or 1
    return shortest if _has_half_steps(store) else max(1, min(_MOST_FRAMES, shortest // DENSE))
