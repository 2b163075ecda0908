"""R2-Tuning: temporal grounding of a query, recurrent over the last layers of two frozen towers, from last to first.

Each layer's tokens are pooled in every frame by what the words ask for. One block, shared by all layers, refines the
frames; each layer joins through a gate. A pyramid over time and two heads make points of it: a score, and how far a
moment reaches. The variant for highlights has one level and no boundaries. docs/networks.md has all of it as formulas.

Letters beside those of store/layout.py: M words, Dt width of the text tower, S side width, Z points of all levels.
Padding is part of what training computes, as in the reference. An evaluation is not padded.

Source:
    R2-Tuning, https://arxiv.org/abs/2404.00801; its code yeliudev/R2-Tuning at 03fbcf6, with layers of yeliudev/nncore
    0.4.4. Ours keeps patches and class tokens apart, multiplies the words, not the tokens, with the pooling's key
    weights, folds codes into the first norm where nothing is dropped, computes norms again in the backward pass, and
    draws what is dropped by example (train/networks/draws.py). Outputs and gradients agree:
    tests/train/test_r2_tuning.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ...errors import ConfigError, StoreMismatchError
from ...store.codecs.contract import AffineMap, Codec
from ...store.needs import StoreNeeds, require_needs
from ...store.reader import StoreReader
from ...store.text_choice import read_text_choice
from .contract import Network, NetworkKind, NetworkShape, Outputs
from .draws import drop_channels, drop_examples
from .parts import make_again

if TYPE_CHECKING:
    from ..clips import ClipBatch

MOST_FRAMES = 1024
"""T at most: a reference network has points for so many."""
STRIDES = (1, 2, 4, 8)
"""Frames between points of each level, of moments; highlights have the first alone."""
NUM_LAYERS = 4
"""That it reads of each tower, its last ones."""
_HEADS = 8
_SIDE_WIDTH = 256
_FFN_RATIO = 4
_NUM_TIMES = 2
"""Time features of a frame: where it begins and where it ends."""
_PLACES_OF_A_LAYER = 8
"""Where something is dropped: two in each projection, three in the block, one is free."""

Drop = Callable[[torch.Tensor, int], torch.Tensor]
"""Drops numbers of tokens before the first product of a projection (0) or before the second (1)."""


class Tokens(NamedTuple):
    """One layer of a video, projected; no query has a part in it."""

    patches: torch.Tensor
    """(B, T, N, S)."""
    cls: torch.Tensor
    """(B, T, S)."""


class Refined(NamedTuple):
    """What the recurrence over layers comes to. Layers are in the order of its visits: the last one first."""

    frames: torch.Tensor
    """(B, T, S)."""
    words: torch.Tensor
    """(B, M, S), of the layer that was visited last."""
    layer_cls: torch.Tensor
    """(K, B, T, S) projected class tokens."""
    layer_words: torch.Tensor
    """(K, B, M, S) projected words."""


class Grounding(NamedTuple):
    """What the network says of videos and their queries, in float32."""

    frames: torch.Tensor
    """(B, T, S), never negative: what pyramid and saliency see."""
    query: torch.Tensor
    """(B, S) pooled words."""
    layer_cls: torch.Tensor
    """(K, B, T, S) projected class tokens, the last layer first."""
    layer_query: torch.Tensor
    """(K, B, S) pooled words of each layer, the last one first."""
    points: torch.Tensor
    """(Z, 4) place in frames, least and most distance to a moment's farther end in frames, stride."""
    level_mask: torch.Tensor
    """(B, Z) bool, whether any frame of a point's cell is there."""
    logits: torch.Tensor
    """(B, Z) of a moment around each point; of highlights, of each frame being one."""
    offsets: torch.Tensor | None
    """(B, Z, 2) to a moment's start and end, in strides; None of highlights."""

    def float(self) -> Grounding:
        """As it is: all of it is float32, whatever the step's precision."""
        return self


class Projection(nn.Module):
    """To the side width: norm, product, ReLU, norm, product.

    Args:
        width: Of what it reads.
        side_width: S.
    """

    def __init__(self, width: int, side_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.reduce = nn.Linear(width, side_width)
        self.hidden_norm = nn.LayerNorm(side_width)
        self.project = nn.Linear(side_width, side_width)

    def forward(self, x: torch.Tensor, drop: Drop | None = None, times: torch.Tensor | None = None) -> torch.Tensor:
        """(B, ..., width) -> (B, ..., S).

        Args:
            x: Tokens without their time features.
            drop: None drops nothing.
            times: (T, 2) time features, joined to every token of a frame of (B, T, ..., width - 2); None has none.
        """
        return self.finish(make_again(lambda x: self.begin(x, drop, times), x, side_width=self._side_width), drop)

    def begin(self, x: torch.Tensor, drop: Drop | None, times: torch.Tensor | None) -> torch.Tensor:
        """Up to the first product, from what `forward` takes: (B, ..., S)."""
        if times is not None:
            times = times.view(len(times), *(1,) * (x.ndim - 3), _NUM_TIMES).expand(*x.shape[:-1], -1)
            x = torch.cat([x, times.to(x.dtype)], dim=-1)
        x = self.norm(x)
        return self.reduce(x if drop is None else drop(x, 0))

    def finish(self, x: torch.Tensor, drop: Drop | None) -> torch.Tensor:
        """From the first product on: (B, ..., S) -> (B, ..., S)."""

        def finish(x: torch.Tensor) -> torch.Tensor:
            x = self.hidden_norm(x.relu())
            return self.project(x if drop is None else drop(x, 1))

        return make_again(finish, x, side_width=self._side_width)

    def read_codes(
        self,
        codes: torch.Tensor,
        codec: Codec,
        layer: int,
        *,
        drop: Drop | None,
        times: torch.Tensor | None,
        frame_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """What `forward` makes of the tokens that codes (B, T, N, K) stand for.

        Where something is dropped between the norm and the product, tokens are decoded, and again in the backward
        pass. Else the product takes the codes. A frame that is not there has tokens of zero, and not the codec's mean.

        Args:
            codes: Of one layer.
            codec: Its arrays on the same device.
            layer: Its place on the codec's axis.
            drop: As in `forward`, as is `times`.
            times: (T, 2), or None.
            frame_mask: (B, T) bool; None has all frames.
        """
        affine = codec.as_affine(layer, codes)
        is_there = None if frame_mask is None else frame_mask[..., None, None]

        def begin(codes: torch.Tensor) -> torch.Tensor:
            if affine is not None and drop is None:
                return self._fold(codes, affine, times, is_there)
            tokens = codec.decode(codes, layer)
            return self.begin(tokens if is_there is None else tokens * is_there, drop, times)

        return self.finish(make_again(begin, codes, side_width=self._side_width), drop)

    def _fold(
        self, codes: torch.Tensor, affine: AffineMap, times: torch.Tensor | None, is_there: torch.Tensor | None
    ) -> torch.Tensor:
        """`begin` of tokens h = z B + m without making them, for orthonormal rows of B.

        The norm runs over n = D + 2 numbers, h and the time features e. With mean(h) = z b + mean(m), b the row means
        of B, the mean of all is mean(h) - c, c = (2 mean(h) - sum(e)) / n. The squares around it are those around
        mean(h), a quadratic form of z, D c^2, and those of e.
        """
        basis, width = affine.matrix, affine.matrix.shape[1]
        mean = basis.new_zeros(width) if affine.offset is None else affine.offset
        row_mean, centre = basis.mean(1), mean - mean.mean()
        centred = basis - row_mean[:, None]
        z = codes.float() if affine.scale is None else codes * affine.scale
        there = z.new_ones(1, 1, 1, 1) if is_there is None else is_there.to(z.dtype)
        e = z.new_zeros(z.shape[1], 0) if times is None else times
        num_times = e.shape[-1]
        with torch.no_grad(), torch.autocast(codes.device.type, enabled=False):
            token_mean = (z @ row_mean)[..., None] + there * mean.mean()  # (B, T, N, 1)
            shift = (num_times * token_mean - e.sum(-1).view(1, -1, 1, 1)) / (width + num_times)
            times_off = e[None, :, None] - token_mean + shift  # (B, T, N, 2)
            square = z.square().sum(-1, keepdim=True) - width * (z @ row_mean)[..., None].square()
            square = square + there * (2 * (z @ (centred @ centre))[..., None] + centre.square().sum())
            square = square.clamp(min=0) + width * shift.square() + times_off.square().sum(-1, keepdim=True)
            inverse_std = (square / (width + num_times) + self.norm.eps).rsqrt()
        weight = self.reduce.weight * self.norm.weight
        of_tokens, of_times = weight[:, :width], weight[:, width:]
        # Small numbers beside their norm's scale: in 16 bits the large ones would cancel.
        x = F.linear(z, of_tokens @ centred.T) + there * (of_tokens @ centre)
        x = x + shift * of_tokens.sum(1)
        if num_times:
            x = x + F.linear(times_off, of_times)
        return torch.addcmul(self.reduce.weight @ self.norm.bias + self.reduce.bias, x, inverse_std)

    @property
    def _side_width(self) -> int:
        return self.project.out_features


class SpatialPooling(nn.Module):
    """Words look at the tokens of each frame, with one head; each channel keeps what the word has that found most."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(side_width, side_width)
        self.key = nn.Linear(side_width, side_width)

    def forward(self, words: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Words (B, M, S), padding among them, and a layer's tokens -> (B, T, S).

        Tokens of one video may meet the words of several queries.
        """
        patches, cls = tokens
        asked = self.query(words)
        # The same products from the side of the few: tokens are the keys as they are.
        wanted, bias = asked @ self.key.weight, asked @ self.key.bias  # (B, M, S), (B, M)
        of_cls = (wanted @ cls.mT).mT[..., None]  # (B, T, M, 1)
        of_patches = (wanted @ patches.flatten(1, 2).mT).unflatten(2, patches.shape[1:3]).transpose(1, 2)
        scores = torch.cat([of_cls, of_patches], dim=-1) + bias[:, None, :, None]
        shares = (scores / math.sqrt(words.shape[-1])).softmax(dim=-1)  # (B, T, M, 1 + N)
        shares = shares.to(patches.dtype)
        found = shares[..., 1:] @ patches + shares[..., :1] * cls[:, :, None] + words[:, None]
        return found.max(dim=2).values


class Attention(nn.Module):
    """Attention of several heads, without dropout."""

    def __init__(self, side_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.project = (nn.Linear(side_width, side_width) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.project):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, T, S), (B, M, S), (B, M, S) -> (B, T, S); a mask (B, M) bool says which keys there are, None all."""
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.project(x.transpose(1, 2).flatten(2))


class RefinementBlock(nn.Module):
    """Frames look at the words, then at each other, then a small network; all residual, norms behind the sums."""

    def __init__(self, side_width: int, num_heads: int) -> None:
        super().__init__()
        self.cross_attention = Attention(side_width, num_heads)
        self.cross_norm = nn.LayerNorm(side_width)
        self.self_attention = Attention(side_width, num_heads)
        self.self_norm = nn.LayerNorm(side_width)
        self.widen = nn.Linear(side_width, _FFN_RATIO * side_width)
        self.narrow = nn.Linear(_FFN_RATIO * side_width, side_width)
        self.ffn_norm = nn.LayerNorm(side_width)
        for layer in (self.widen, self.narrow):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.out_features))
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: torch.Tensor,
        words: torch.Tensor,
        frame_mask: torch.Tensor | None,
        word_mask: torch.Tensor | None,
        drop: Drop | None = None,
    ) -> torch.Tensor:
        """Frames (B, T, S) and words (B, M, S) with their masks -> (B, T, S); `drop` takes the branch's number."""
        position = embed_positions(x.shape[1], x.shape[2], x.device)

        def keep(x: torch.Tensor, branch: int) -> torch.Tensor:
            return x if drop is None else drop(x, branch)

        x = self.cross_norm(x + keep(self.cross_attention(x + position, words, words, word_mask), 0))
        placed = x + position
        x = self.self_norm(x + keep(self.self_attention(placed, placed, x, frame_mask), 1))
        return self.ffn_norm(x + keep(self.narrow(self.widen(x).relu()), 2))


def embed_positions(num_frames: int, side_width: int, device: torch.device | None = None) -> torch.Tensor:
    """(T, S): sines in even channels and cosines in odd ones, of the share of the clip that has passed."""
    place = 2 * math.pi * torch.arange(1, num_frames + 1, device=device) / (num_frames + 1e-6)
    channels = torch.arange(side_width, device=device)
    angles = place[:, None] / 10000.0 ** (2 * (channels // 2) / side_width)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos())


class Recurrence(nn.Module):
    """Over the layers of both towers, from the last to the first, each with the same weights.

    Args:
        num_layers: K.
        width: D.
        text_width: Dt.
        side_width: S.
        num_heads: Of the block's attentions.
        has_times: Whether time features stand behind every token.
        dropout: Before both products of the projections.
        drop_path: Of the block's branches, a whole video at a time.
    """

    checkpoints_activations = False

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        text_width: int,
        side_width: int,
        num_heads: int,
        has_times: bool,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.has_times = has_times
        self.dropout, self.drop_path = dropout, drop_path
        self.gate = nn.Parameter(torch.zeros(num_layers - 1))
        self.scale = nn.Parameter(torch.zeros(num_layers))
        self.video_map = Projection(width + _NUM_TIMES * has_times, side_width)
        self.query_map = Projection(text_width, side_width)
        self.pooling = SpatialPooling(side_width)
        self.block = RefinementBlock(side_width, num_heads)

    @property
    def num_layers(self) -> int:
        """K."""
        return len(self.scale)

    def read_tokens(
        self,
        patches: torch.Tensor,
        cls: torch.Tensor,
        layer: int,
        *,
        codec: Codec | None,
        frame_mask: torch.Tensor | None,
        keys: torch.Tensor | None,
    ) -> Tokens:
        """Project one layer of videos.

        Args:
            patches: (B, T, K, N, D) tokens or, with a codec, codes.
            cls: (B, T, K, D).
            layer: Its place among the K.
            codec: Decodes the codes.
            frame_mask: (B, T) bool; None has all frames.
            keys: (B,) of what is dropped; None drops nothing.
        """
        num_frames, num_tokens = patches.shape[1], 1 + patches.shape[3]
        times = None
        if self.has_times:
            begins = torch.arange(num_frames, device=cls.device, dtype=torch.float32) / num_frames
            times = torch.stack([begins, begins + 1 / num_frames], dim=1)
        numbers = torch.arange(num_frames * num_tokens, device=cls.device, dtype=torch.int32)
        numbers = numbers.view(num_frames, num_tokens)  # the class token first
        drop_patches, drop_cls = (
            self._find_drop(keys, _PLACES_OF_A_LAYER * layer, own) for own in (numbers[:, 1:], numbers[:, 0])
        )
        of_layer = patches[:, :, layer]
        if codec is None:
            read = self.video_map(of_layer.to(cls.dtype), drop_patches, times)
        else:
            read = self.video_map.read_codes(
                of_layer, codec, layer, drop=drop_patches, times=times, frame_mask=frame_mask
            )
        return Tokens(read, self.video_map(cls[:, :, layer], drop_cls, times))

    def read_words(self, words: torch.Tensor, layer: int, keys: torch.Tensor | None) -> torch.Tensor:
        """Project one layer of words (B, K, M, Dt): (B, M, S)."""
        numbers = torch.arange(words.shape[2], device=words.device, dtype=torch.int32)
        return self.query_map(words[:, layer], self._find_drop(keys, _PLACES_OF_A_LAYER * layer + 2, numbers))

    def forward(
        self,
        read: Callable[[int], Tokens],
        words: torch.Tensor,
        word_mask: torch.Tensor | None,
        frame_mask: torch.Tensor | None,
        keys: torch.Tensor | None = None,
    ) -> Refined:
        """Visit all layers.

        Args:
            read: A layer's tokens, of one video for all queries or of as many as queries.
            words: (B, K, M, Dt).
            word_mask: (B, M) bool; None has all words, as has None for frames.
            frame_mask: (B, T) bool.
            keys: (B,) of what is dropped; None drops nothing.
        """
        refined: torch.Tensor | None = None
        seen, asked = [], []
        for layer in reversed(range(self.num_layers)):
            arguments = (refined, layer, read, words, word_mask, frame_mask, keys)
            if self.checkpoints_activations and self.training:
                # What is dropped is drawn from keys: there is no state to keep.
                refined, cls, own_words = recompute_in_backward(
                    self._visit, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                refined, cls, own_words = self._visit(*arguments)
            seen.append(cls)
            asked.append(own_words)
        assert refined is not None
        return Refined(refined, asked[-1], torch.stack(seen), torch.stack(asked))

    def _visit(
        self,
        before: torch.Tensor | None,
        layer: int,
        read: Callable[[int], Tokens],
        words: torch.Tensor,
        word_mask: torch.Tensor | None,
        frame_mask: torch.Tensor | None,
        keys: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer: refined frames (B, T, S), its class tokens (B, T, S) and words (B, M, S)."""
        tokens, own_words = read(layer), self.read_words(words, layer, keys)
        x = tokens.cls + self.scale[layer].tanh() * self.pooling(own_words, tokens)
        if before is not None:
            gate = self.gate[layer].sigmoid()
            x = gate * x + (1 - gate) * before
        drop: Drop | None = None
        if keys is not None and self.drop_path:
            place = _PLACES_OF_A_LAYER * layer + 4
            drop = lambda x, branch: drop_examples(x, keys, place + branch, self.drop_path)  # noqa: E731
        return self.block(x, own_words, frame_mask, word_mask, drop), tokens.cls, own_words

    def _find_drop(self, keys: torch.Tensor | None, place: int, numbers: torch.Tensor) -> Drop | None:
        if keys is None or not self.dropout:
            return None
        return lambda x, product: drop_channels(x, keys, place + product, numbers, self.dropout)


class PyramidLevel(nn.Module):
    """Halves the frames so often: a convolution of two, norm, ReLU."""

    def __init__(self, side_width: int, stride: int) -> None:
        super().__init__()
        steps = range(stride.bit_length() - 1)
        self.convolutions = nn.ModuleList(nn.Conv1d(side_width, side_width, 2, stride=2) for _ in steps)
        self.norms = nn.ModuleList(nn.LayerNorm(side_width) for _ in steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, S) -> (B, floor(T / stride), S)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x.mT).mT).relu()
        return x


class PointHead(nn.Module):
    """Numbers of each point from three points, through a hidden layer; in float32 whatever the step's precision."""

    def __init__(self, side_width: int, num_outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Conv1d(side_width, side_width, 3, padding=1)
        self.project = nn.Conv1d(side_width, num_outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, z, S) -> (B, z, outputs)."""
        return self.project(self.hidden(x.mT).relu()).mT


class WordPooling(nn.Module):
    """The mean of words, each weighted by one product with it."""

    def __init__(self, side_width: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(side_width, 1, bias=False)

    def forward(self, words: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(..., B, M, S) -> (..., B, S); words that a mask (B, M) says are not there have no part in it."""
        weights = self.weigh(words)[..., 0]
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        return (weights.softmax(dim=-1)[..., None, :] @ words)[..., 0, :]


class R2Network(Network):
    """The network: see above.

    Args:
        num_layers: K.
        width: D, the backbone's.
        text_width: Dt, the text tower's.
        num_patches: N.
        side_width: S.
        num_heads: Of attention.
        strides: Frames between points, of each level; powers of two, the first 1.
        has_boundaries: Whether moments' starts and ends are learnt.
        has_times: Whether time features stand behind every token.
        dropout: Before both products of the projections.
        drop_path: Of the recurrent block's branches.
    """

    arrays = ("patches", "cls")
    text_arrays = ("layers", "mask")
    reads_texts = True
    draws_by_example = True

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        text_width: int,
        num_patches: int,
        side_width: int = _SIDE_WIDTH,
        num_heads: int = _HEADS,
        strides: Sequence[int] = STRIDES,
        has_boundaries: bool = True,
        has_times: bool = True,
        dropout: float = 0.5,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_patches, self.text_width = num_patches, text_width
        self.strides = tuple(strides)
        self.recurrence = Recurrence(
            num_layers=num_layers,
            width=width,
            text_width=text_width,
            side_width=side_width,
            num_heads=num_heads,
            has_times=has_times,
            dropout=dropout,
            drop_path=drop_path,
        )
        self.levels = nn.ModuleList(PyramidLevel(side_width, stride) for stride in strides[1:])
        self.pooling = WordPooling(side_width)
        self.class_head = PointHead(side_width, 1)
        self.boundary_head = PointHead(side_width, 2) if has_boundaries else None
        # Without boundaries nothing reads it; released files have it all the same.
        self.level_scale = nn.Parameter(torch.ones(len(self.strides)), requires_grad=has_boundaries)

    def inputs(self, batch: ClipBatch) -> tuple[Any, ...]:
        """Tokens, the queries' words, masks, and keys of what is dropped."""
        assert batch.texts is not None, "a batch of queries has their texts"
        return batch.patches, batch.cls, batch.texts.layers, batch.texts.mask, batch.frame_mask, batch.draws

    def forward(
        self,
        patches: torch.Tensor,
        cls: torch.Tensor,
        words: torch.Tensor,
        word_mask: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        draws: torch.Tensor | None = None,
        codec: Codec | None = None,
    ) -> Grounding:
        """Ask each video its query.

        Args:
            patches: (B, T, K, N, D) tokens or, with a codec, codes; tokens of absent frames are zero.
            cls: (B, T, K, D) class tokens, zero where there is no frame.
            words: (B, Kt, M, Dt) of the text tower's last Kt blocks, K or more, zero where there is no word.
            word_mask: (B, M) bool; None has all words.
            frame_mask: (B, T) bool; None has all frames.
            draws: (B,) int64, keys of what training drops; see train/networks/draws.py.
            codec: Decodes patches.

        Raises:
            StoreMismatchError: If layers, patches or words are not this network's, there are more than 1,024 frames, or
                an evaluation is padded.
            ValueError: If it is to drop and has no keys.
        """
        self._check_video(patches, cls)
        words = self._check_words(words)
        recurrence = self.recurrence
        recurrence.checkpoints_activations = self.checkpoints_activations
        keys = None
        if not self.training:
            _refuse_padding(frame_mask, word_mask)
            frame_mask = word_mask = None
        elif recurrence.dropout or recurrence.drop_path:
            if draws is None:
                raise ValueError("this network drops by example: a batch in training has draws (B,), one key a clip")
            keys = draws

        def read(layer: int) -> Tokens:
            return recurrence.read_tokens(patches, cls, layer, codec=codec, frame_mask=frame_mask, keys=keys)

        refined = recurrence(read, words, word_mask, frame_mask, keys)
        return self._finish(refined, word_mask, frame_mask)

    def read_video(self, patches: torch.Tensor, cls: torch.Tensor, codec: Codec | None = None) -> list[Tokens]:
        """All that no query has a part in, once for a video: nearly all of the cost.

        Args:
            patches: (1, T, K, N, D) tokens or, with a codec, codes: of all its frames.
            cls: (1, T, K, D).
            codec: Decodes patches.

        Returns:
            Of each layer, for `answer`.

        Raises:
            StoreMismatchError: As `forward`.
        """
        self._check_video(patches, cls)
        return [
            self.recurrence.read_tokens(patches, cls, layer, codec=codec, frame_mask=None, keys=None)
            for layer in range(self.recurrence.num_layers)
        ]

    def answer(self, video: Sequence[Tokens], words: torch.Tensor) -> Grounding:
        """Ask one video several queries of equal length: what `forward` says of it and each query alone.

        Args:
            video: From `read_video`.
            words: (B, Kt, M, Dt), all of them words.

        Raises:
            StoreMismatchError: If words are not of this network's text tower.
        """
        return self._finish(self.recurrence(video.__getitem__, self._check_words(words), None, None), None, None)

    def _finish(self, refined: Refined, word_mask: torch.Tensor | None, frame_mask: torch.Tensor | None) -> Grounding:
        """Pyramid, heads and pooling."""
        x = refined.frames.relu()  # the reference's first level is in place: everything behind sees it
        num_queries, num_frames = len(refined.words), x.shape[1]
        layer_cls = refined.layer_cls.float()
        with_stride = enumerate_levels(self.strides, num_frames)
        levels = [(x if level == 0 else self.levels[level - 1](x)).float() for _, level in with_stride]
        mask = x.new_ones(num_queries, num_frames, dtype=torch.bool) if frame_mask is None else frame_mask
        cells = [
            mask[:, : one.shape[1] * stride].unflatten(1, (-1, stride)).any(dim=2)
            for one, (stride, _) in zip(levels, with_stride, strict=True)
        ]
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.cat([self.class_head(one)[..., 0] for one in levels], dim=1)
            if self.training:
                # Processes agree on which gradients there are, whatever the lengths of their videos: zeros here.
                left_out = self.levels[max(0, len(levels) - 1) :]
                logits = logits + sum(0 * parameter.sum() for parameter in left_out.parameters())
            offsets = None
            if self.boundary_head is not None:
                scales = [self.level_scale[level] for _, level in with_stride]
                offsets = torch.cat(
                    [self.boundary_head(one).exp() * scale for one, scale in zip(levels, scales, strict=True)], dim=1
                )
            layer_query = self.pooling(refined.layer_words.float(), word_mask)
        return Grounding(
            frames=x.float(),
            query=layer_query[-1],
            layer_cls=layer_cls.expand(-1, num_queries, -1, -1),
            layer_query=layer_query,
            points=list_points(self.strides, num_frames, x.device),
            level_mask=torch.cat(cells, dim=1),
            logits=logits,
            offsets=offsets,
        )

    def _check_video(self, patches: torch.Tensor, cls: torch.Tensor) -> None:
        num_layers = self.recurrence.num_layers
        if patches.shape[2:4] != (num_layers, self.num_patches) or cls.shape[:3] != patches.shape[:3]:
            raise StoreMismatchError(
                f"this network takes {num_layers} layers of {self.num_patches} patches, and their class tokens; found "
                f"patches {tuple(patches.shape)}, class tokens {tuple(cls.shape)}: train one on this store"
            )
        if patches.shape[1] > MOST_FRAMES:
            raise StoreMismatchError(
                f"this network takes {MOST_FRAMES} frames of a video at most; found {patches.shape[1]}: ask parts of it"
            )

    def _check_words(self, words: torch.Tensor) -> torch.Tensor:
        """Of the last K blocks: (B, K, M, Dt)."""
        num_layers = self.recurrence.num_layers
        if words.ndim != 4 or words.shape[1] < num_layers or words.shape[3] != self.text_width:
            raise StoreMismatchError(
                f"this network takes words (B, {num_layers} or more layers, M, {self.text_width}); found "
                f"{tuple(words.shape)}: take the texts of its own text tower, extracted with --text-layers "
                f"last{num_layers}"
            )
        return words[:, -num_layers:]


def _refuse_padding(frame_mask: torch.Tensor | None, word_mask: torch.Tensor | None) -> None:
    """Refuse an evaluation of videos or queries that are padded."""
    for name, mask in (("frames", frame_mask), ("words", word_mask)):
        if mask is not None and not bool(mask.all()):
            raise StoreMismatchError(
                f"padding changes what this network says, and {int((~mask).sum())} {name} are padding: evaluate one "
                "video at a time, with queries of equal length"
            )


def enumerate_levels(strides: Sequence[int], num_frames: int) -> list[tuple[int, int]]:
    """Stride and number of each level that has a cell: one whose stride is no more than the frames."""
    return [(stride, level) for level, stride in enumerate(strides) if stride <= num_frames]


def list_points(strides: Sequence[int], num_frames: int, device: torch.device | None = None) -> torch.Tensor:
    """(Z, 4) of all levels: place in frames, range from and to in frames, stride.

    Cell j of a level stands at frame j times its stride: no half cell. The range begins with 0 on the first level and
    with its own stride on the others, and ends with the next one's stride.
    """
    parts = []
    for stride, level in enumerate_levels(strides, num_frames):
        places = torch.arange(num_frames // stride, device=device, dtype=torch.float32) * stride
        most = strides[level + 1] if level + 1 < len(strides) else math.inf
        values = (0.0 if level == 0 else stride, most, stride)
        parts.append(torch.stack([places, *(torch.full_like(places, value) for value in values)], dim=1))
    return torch.cat(parts)


@dataclass(frozen=True)
class R2Options:
    """What a command says of the network."""

    side_width: int | None = None
    """S; None takes 256, the paper's."""
    heads: int = _HEADS
    """Of attention."""
    dropout: float = 0.5
    """Before both products of the projections; the presets have their data sets'."""
    drop_path: float = 0.1
    """Of the recurrent block's branches, a whole video at a time."""
    variant: str = "moments"
    """`moments`: four levels, boundaries, time features. `highlights`: one level, and neither."""


@dataclass(frozen=True, kw_only=True)
class R2Shape(NetworkShape):
    """Of the network."""

    text_width: int
    """Dt."""
    side_width: int
    """S."""
    heads: int
    """As in `R2Options`, as are the next two."""
    dropout: float
    drop_path: float
    strides: tuple[int, ...]
    """Of the levels."""
    has_boundaries: bool
    has_times: bool


_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "moments": {"strides": STRIDES, "has_boundaries": True, "has_times": True},
    "highlights": {"strides": STRIDES[:1], "has_boundaries": False, "has_times": False},
}


class R2Tuning(NetworkKind):
    """R2-Tuning: see above. The paper has it beside CLIP B/32; beside any backbone with a text tower it is the same."""

    name = "r2-tuning"
    tasks = ("grounding",)
    reads = "patch and class tokens of the last four layers of whole videos, and the words of a query"
    extraction: ClassVar[Mapping[str, Any]] = {
        "layers": f"last{NUM_LAYERS}",
        "text_layers": f"last{NUM_LAYERS}",
        "with_pixels": False,
    }
    options = R2Options
    shape: ClassVar[type[NetworkShape]] = R2Shape
    needs: ClassVar[Mapping[str, StoreNeeds]] = {
        "grounding": StoreNeeds(arrays=("patches", "cls"), text_tower=True),
    }
    can_checkpoint_activations = True

    def plan(self, store: StoreReader, outputs: Outputs, options: R2Options, layers: tuple[int, ...]) -> NetworkShape:
        """Fit it to a store: the last four of the layers at hand, and the words of as many blocks."""
        require_needs(store, self.find_needs(outputs.task, options), f"--head {self.name}")
        side_width = _check_options(options)
        layers = layers[-NUM_LAYERS:]
        choice = read_text_choice(store.path)
        if len(choice.layers) < len(layers) or choice.width is None:
            raise StoreMismatchError(
                f"--head {self.name} reads words of the text tower's last {len(layers)} blocks; {store.path} has those "
                f"of {len(choice.layers)}. Run the command that began the store once more with --text-layers "
                f"last{len(layers)}, which adds them."
            )
        return self.describe_shape(
            store,
            outputs,
            layers,
            text_width=choice.width,
            side_width=side_width,
            heads=options.heads,
            dropout=options.dropout,
            drop_path=options.drop_path,
            **_VARIANTS[options.variant],
        )

    def read_shape(self, saved: Mapping[str, Any]) -> NetworkShape:
        """Its shape as a run saved it: strides are a list there."""
        return super().read_shape({**saved, "strides": tuple(saved["strides"])})

    def build(self, shape: R2Shape) -> R2Network:
        """A network of those sizes."""
        return R2Network(
            num_layers=len(shape.layers),
            width=shape.width,
            text_width=shape.text_width,
            num_patches=shape.num_patches,
            side_width=shape.side_width,
            num_heads=shape.heads,
            strides=shape.strides,
            has_boundaries=shape.has_boundaries,
            has_times=shape.has_times,
            dropout=shape.dropout,
            drop_path=shape.drop_path,
        )


def _check_options(options: R2Options) -> int:
    """S.

    Raises:
        ConfigError: If an option does not fit, with what does.
    """
    side_width = options.side_width or _SIDE_WIDTH
    if options.heads < 1 or side_width % options.heads:
        raise ConfigError(
            f"--side-width must be a multiple of the heads (--set heads); found {side_width} and {options.heads}"
        )
    for name in ("dropout", "drop_path"):
        if not 0 <= getattr(options, name) < 1:
            raise ConfigError(f"--set {name} takes a number from 0 to below 1; found {getattr(options, name):g}")
    if options.variant not in _VARIANTS:
        raise ConfigError(f"--set variant takes {', '.join(_VARIANTS)}; found {options.variant!r}")
    return side_width
