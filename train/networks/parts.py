"""Parts that several networks share: reading tokens and codes, stems, norms, blocks, and memory for the backward pass.

Token-major throughout: activations are (B, T, N, S), so every projection is one matrix product over the last axis.

Source:
    Those of Side4Video: see train/networks/side4video.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ...errors import StoreMismatchError
from ...store.codecs.contract import Codec
from .norms import BatchNorm, recomputing

HEAD_WIDTH = 64
"""Of one attention head."""

# In narrower networks what comes before a product costs as much as the product: S = 64 took a fifth longer.
_LEAN_FROM_WIDTH = 192

# Of linear layers in the reference's retrieval beside CLIP.
_LINEAR_STD = 0.02

# The reference's initialisation counts 12 blocks whatever the depth.
_INIT_DEPTH = 12

TOWER_END = {
    "norm.weight": "norm_weight",
    "norm.bias": "norm_bias",
    "project.weight": "proj_weight",
    "project.bias": "proj_bias",
}
"""Names in a store's `head`, by those of `TowerEnd`."""


class Classifier(nn.Linear):
    """A linear layer to class scores, in the precision of its weights whatever the rest is computed in.

    Scores of 16 bits tie where those of float32 do not: of 400 classes, top-1 moves by a tenth of a point.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., classes)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class TowerEnd(nn.Module):
    """The end of a backbone's tower: its final norm and the projection to the space that it shares with texts."""

    def __init__(self, width: int, embed_dim: int, norm_eps: float, has_bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.project = nn.Linear(width, embed_dim, bias=has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., E)."""
        return self.project(self.norm(x))

    def load_arrays(self, head: Mapping[str, np.ndarray]) -> None:
        """Take the weights of a store's `head`: norm_weight, norm_bias, norm_eps, proj_weight and, for EVA, proj_bias.

        Raises:
            StoreMismatchError: If they are of another size, a bias is there or missing, or the norm's eps is another.
        """
        state = {ours: torch.from_numpy(np.array(head[name])) for ours, name in TOWER_END.items() if name in head}
        expected = {**{name: tuple(t.shape) for name, t in self.state_dict().items()}, "eps": f"{self.norm.eps:.3g}"}
        held_sizes = {**{name: tuple(t.shape) for name, t in state.items()}, "eps": f"{float(head['norm_eps']):.3g}"}
        if held_sizes != expected:
            raise StoreMismatchError(
                f"the network's end takes {expected}; the store's head holds {held_sizes}: build the network with the "
                "embed_dim, norm_eps and has_projection_bias of the store's backbone"
            )
        self.load_state_dict(state)


class PixelStem(nn.Module):
    """Convolution over 3 frames and one patch, then batch norm: (B, T, C, H, W) -> (B, T, N, S).

    Args:
        side_width: S.
        patch_px: Side of a patch.
        channels: C; 3 are colours.
        shift_px: How far up and left each patch lies of its place. Outside the frame there are zeros, and its last rows
            and columns are not seen.
    """

    def __init__(self, side_width: int, patch_px: int, *, channels: int = 3, shift_px: int = 0) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.shift_px = shift_px
        fan_in = 3 * channels * patch_px**2
        self.weight = nn.Parameter(torch.empty(3, side_width, channels * patch_px**2))
        self.bias = nn.Parameter(torch.empty(side_width))
        self.norm = BatchNorm(side_width)
        for parameter in (self.weight, self.bias):  # PyTorch's default for a convolution of this size
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels to side tokens; frames before the first and after the last count as zeros."""
        p = self.patch_px
        if self.shift_px:
            pixels = F.pad(pixels, (self.shift_px, -self.shift_px) * 2)  # below zero it crops
        b, t, c, height, width = pixels.shape
        x = pixels.reshape(b, t, c, height // p, p, width // p, p)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, t, -1, c * p * p)  # (B, T, N, C*p*p)
        # One product for all three time steps of the kernel, then shifted sums.
        steps = F.linear(x, self.weight.flatten(0, 1)).chunk(3, dim=-1)
        return normalise_tokens(self.norm, sum_shifted(*steps) + self.bias)


class Tap(nn.Module):
    """Reads one backbone layer: LayerNorm over D, then a projection to S; post-norm, projection, then LayerNorm."""

    def __init__(self, width: int, side_width: int, is_post_norm: bool = False) -> None:
        super().__init__()
        self.is_post_norm = is_post_norm
        self.norm = nn.LayerNorm(side_width if is_post_norm else width)
        self.project = nn.Linear(width, side_width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., S)."""
        return self.norm(self.project(tokens)) if self.is_post_norm else self.project(self.norm(tokens))

    def read_codes(self, codes: torch.Tensor, codec: Codec, layer: int) -> torch.Tensor:
        """The same of codes (..., K), without ever holding their tokens: one product of K by S decodes and projects.

        A layer norm comes between decoding and projecting, but all it needs of a token h = z B + m is its mean and its
        variance over D, and the variance is a quadratic form of z: (|z|^2 - D (z.b)^2 + 2 z.q + |m'|^2) / D for
        orthonormal rows of B, b their means, m' = m - mean(m) and q = (B - b) m'.
        """
        affine = codec.as_affine(layer, codes)
        if affine is None:
            return self._read_decoded(codes, codec, layer)
        basis, mean, scale = affine.matrix, affine.offset, affine.scale
        weight = self.project.weight
        mean = basis.new_zeros(basis.shape[1]) if mean is None else mean

        def project(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            """Codes are kept for the backward pass, and not the four times larger numbers that they stand for."""
            return F.linear(codes.float() if scale is None else codes * scale, weight, bias)

        if self.is_post_norm:
            return self.norm(
                make_again(project, weight @ basis.T, weight @ mean + self.project.bias, side_width=len(weight))
            )
        row_mean, centre = basis.mean(1), mean - mean.mean()
        centred = basis - row_mean[:, None]

        def project_and_describe(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """The product, and of each token 1 / std, (..., 1)."""
            z = codes.float() if scale is None else codes * scale
            read = F.linear(z, weight, bias)
            # No gradient reaches a token: what describes it is computed once, in float32 whatever the step's precision.
            with torch.no_grad(), torch.autocast(codes.device.type, enabled=False):
                width = basis.shape[1]
                square = z.square().sum(-1) - width * (z @ row_mean).square() + 2 * (z @ (centred @ centre))
                variance = (square + centre.square().sum()).clamp(min=0) / width
                return read, (variance + self.norm.eps).rsqrt()[..., None]

        weight = weight * self.norm.weight
        read, inverse_std = make_again(
            project_and_describe, weight @ centred.T, weight @ centre, side_width=len(weight)
        )
        return torch.addcmul(self.project.weight @ self.norm.bias + self.project.bias, read, inverse_std)

    def _read_decoded(self, codes: torch.Tensor, codec: Codec, layer: int) -> torch.Tensor:
        """Of codes that no map folds: they are kept for the backward pass, the tokens are not."""
        side_width = self.project.out_features
        if self.is_post_norm:
            return self.norm(
                make_again(lambda codes: self.project(codec.decode(codes, layer)), codes, side_width=side_width)
            )
        return make_again(lambda codes: self(codec.decode(codes, layer)), codes, side_width=side_width)


class TemporalConv(nn.Module):
    """1x1x1, depthwise 3x1x1 over time, 1x1x1, with nothing in between."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(side_width, side_width)
        self.weight = nn.Parameter(torch.empty(3, side_width))
        self.bias = nn.Parameter(torch.empty(side_width))
        self.project = nn.Linear(side_width, side_width)
        for parameter in (self.weight, self.bias):  # PyTorch's default for a depthwise kernel of 3
            nn.init.uniform_(parameter, -(3**-0.5), 3**-0.5)

    def draw_weights(self) -> None:
        """Initialise as the reference's retrieval does beside CLIP; biases keep PyTorch's default there."""
        nn.init.normal_(self.expand.weight, std=_LINEAR_STD)
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.normal_(self.project.weight, std=_LINEAR_STD)

    def forward(self, x: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """(B, T, N, S) -> (B, T, N, S); with a batch norm, of what that makes of it."""

        def convolve(x: torch.Tensor) -> torch.Tensor:
            x = self.expand(x if norm is None else normalise_tokens(norm, x))
            return self.project(convolve_time(x, self.weight, self.bias))

        return make_again(convolve, x, side_width=x.shape[-1])


class FrameAttention(nn.Module):
    """Attention of the patches of a frame over those patches and one more token, the first."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.num_heads = side_width // HEAD_WIDTH
        self.qkv = nn.Linear(side_width, 3 * side_width)
        self.project = nn.Linear(side_width, side_width)

    def draw_weights(self) -> None:
        """Initialise as the reference does beside CLIP; beside EVA it leaves PyTorch's defaults."""
        side_width = self.project.out_features
        nn.init.normal_(self.qkv.weight, std=side_width**-0.5)
        nn.init.normal_(self.project.weight, std=_residual_std(side_width))
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.project.bias)

    def forward(
        self, x: torch.Tensor, cls: torch.Tensor, position: torch.Tensor, norm: nn.Module | None = None
    ) -> torch.Tensor:
        """What `prepend_class_token` takes -> (B, T, N, S); the first token is looked at and does not look.

        With a layer norm, of what that makes of all tokens.
        """
        b, t, n, s = x.shape

        def read_keys(x: torch.Tensor, cls: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            keys = prepend_class_token(x, cls, position)
            return self.qkv(keys if norm is None else norm(keys))

        qkv = make_again(read_keys, x, cls, position, side_width=s).view(
            b * t, 1 + n, 3, self.num_heads, s // self.num_heads
        )
        # Parted before they are turned: their gradients are then put together in one pass.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B*T, heads, 1+N, 64)
        x = F.scaled_dot_product_attention(q[:, :, 1:], k, v)
        return make_again(lambda x: self.project(x.transpose(1, 2).reshape(b, t, n, s)), x, side_width=s)


class Mlp(nn.Sequential):
    """To four times the width and back."""

    def __init__(self, side_width: int) -> None:
        widen, narrow = nn.Linear(side_width, 4 * side_width), nn.Linear(4 * side_width, side_width)
        super().__init__(widen, nn.GELU(), narrow)

    def draw_weights(self) -> None:
        """Initialise as the reference does beside CLIP; beside EVA it leaves PyTorch's defaults."""
        widen, _, narrow = self
        assert isinstance(widen, nn.Linear) and isinstance(narrow, nn.Linear)
        nn.init.normal_(widen.weight, std=(2 * widen.in_features) ** -0.5)
        nn.init.normal_(narrow.weight, std=_residual_std(widen.in_features))

    def forward(self, x: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """(B, T, N, S) -> (B, T, N, S); with a batch norm, of what that makes of it."""
        widen, gelu, narrow = self
        width = x.shape[-1]
        x = widen(x) if norm is None else make_again(lambda x: widen(normalise_tokens(norm, x)), x, side_width=width)
        return make_again(lambda x: narrow(gelu(x)), x, side_width=width)


def draw_linear(layer: nn.Linear) -> None:
    """Initialise a linear layer as the reference's retrieval does beside CLIP."""
    nn.init.normal_(layer.weight, std=_LINEAR_STD)
    nn.init.zeros_(layer.bias)


def make_again(function: Callable[..., Any], *inputs: torch.Tensor, side_width: int) -> Any:
    """`function(*inputs)`, keeping nothing but the inputs for the backward pass; narrow networks keep all.

    For a matrix product and what cheaply comes before it (a norm, an activation, a reordering): that is computed again
    when the product's gradient needs it, the product itself is not, for torch stops when it has what it wants.
    """
    is_worth_it = side_width >= _LEAN_FROM_WIDTH and torch.is_grad_enabled()
    if not is_worth_it or torch.compiler.is_compiling():
        return function(*inputs)
    return recompute_in_backward(
        function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=recomputing
    )


def normalise_tokens(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Batch norm of each channel over all clips, frames and patches: (B, T, N, S) -> (B, T, N, S)."""
    # Seen as (B, S, T, N) without a copy: torch's kernel for channels-last, twice as fast as the one for (rows, S).
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _TimeKernel(torch.autograd.Function):
    """A depthwise kernel of 3 over time, in three passes over memory.

    Autograd's own way of sums over slices copies the whole several times: it takes four times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        before, at, after = weight.to(x.dtype)
        return _add_shifted(torch.addcmul(bias.to(x.dtype), x, at), x, before, after)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        before, at, after = weight.to(x.dtype)
        of_x = _add_shifted(gradient * at, gradient, after, before) if ctx.needs_input_grad[0] else None
        pairs = ((gradient[:, 1:], x[:, :-1]), (gradient, x), (gradient[:, :-1], x[:, 1:]))
        of_weight = torch.stack([(one * other).sum((0, 1, 2), dtype=weight.dtype) for one, other in pairs])
        return of_x, of_weight, gradient.sum((0, 1, 2), dtype=weight.dtype)


def _add_shifted(y: torch.Tensor, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """y[t] + before x[t-1] + after x[t+1], zeros outside, into y."""
    y[:, 1:].addcmul_(x[:, :-1], before)
    y[:, :-1].addcmul_(x[:, 1:], after)
    return y


def convolve_time(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Each channel over time: y[t] = w[0] x[t-1] + w[1] x[t] + w[2] x[t+1] + bias, zeros outside.

    Args:
        x: (B, T, N, S).
        weight: (3, S), in any precision; gradients are in its own.
        bias: (S,).

    Returns:
        (B, T, N, S), in the precision of `x`.
    """
    return _TimeKernel.apply(x, weight, bias)


class _ShiftedSum(torch.autograd.Function):
    """Its gradients are moved, once each: autograd's own way of sums into slices takes twice as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, *steps: torch.Tensor) -> torch.Tensor:
        reach = len(steps) // 2
        y = steps[reach].clone()
        for distance in range(1, min(reach, y.shape[1] - 1) + 1):
            y[:, distance:] += steps[reach - distance][:, :-distance]
            y[:, :-distance] += steps[reach + distance][:, distance:]
        ctx.num_steps = len(steps)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (gradient,), reach = gradients, ctx.num_steps // 2
        return tuple(_move(gradient, reach - place) if place != reach else gradient for place in range(ctx.num_steps))


def _move(x: torch.Tensor, frames: int) -> torch.Tensor:
    """(B, T, ...) so many frames earlier, or later where that is below zero; zeros from outside."""
    moved, kept = torch.empty_like(x), max(0, x.shape[1] - abs(frames))
    if frames > 0:
        moved[:, :kept], moved[:, kept:] = x[:, x.shape[1] - kept :], 0
    else:
        moved[:, x.shape[1] - kept :], moved[:, : x.shape[1] - kept] = x[:, :kept], 0
    return moved


def sum_shifted(*steps: torch.Tensor) -> torch.Tensor:
    """A kernel over time from the products of its steps, an odd number: y[t] is the sum of steps[k][t + k - k_middle].

    Frames outside count as zeros.
    """
    return _ShiftedSum.apply(*steps)


def shift_class_token(cls: torch.Tensor) -> torch.Tensor:
    """First half of the channels from frame t+1, second half from t-1, zeros at the ends: (B, T, S) -> (B, T, S)."""
    later, earlier = cls.split(cls.shape[-1] // 2, dim=-1)
    return torch.cat([F.pad(later[:, 1:], (0, 0, 0, 1)), F.pad(earlier[:, :-1], (0, 0, 1, 0))], dim=-1)


def prepend_class_token(x: torch.Tensor, cls: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """What the patches of a frame attend to: (B, T, N, S), class tokens (B, T, S) -> (B, T, 1+N, S).

    The class token comes first, shifted in time; position embeddings (N, S) are the patches', (1+N, S) also its own,
    added after the shift.
    """
    first = shift_class_token(cls)[:, :, None]
    if len(position) > x.shape[2]:
        first, position = first + position[:1], position[1:]
    return torch.cat([first, x + position], dim=2)


def normalise_channels(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm before the mean: (B, T, N, S) -> (B, S, T, N)."""
    # Channel-major, this once: the mean makes gradients that all but cancel in the batch norm, and torch's kernel
    # for this layout sums them in double precision.
    return norm(x.permute(0, 3, 1, 2).contiguous())


def _residual_std(side_width: int) -> float:
    return side_width**-0.5 * math.sqrt(1 / (2 * _INIT_DEPTH))
