"""How texts and videos are compared in retrieval: by their means, or token by token, weighted.

Source:
    Weighted token-wise interaction and channel decorrelation: Wang et al., "Disentangled Representation Learning for
    Text-Video Retrieval", https://arxiv.org/abs/2203.07111; as in HJYao00/Side4Video at 5d72352,
    Retrieval/eva_clip/eva_modeling.py. Equal to it: tests/train/test_text_interaction.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

_LEAST_STD = 1e-6


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts as a store holds them, on the training device; what is not read is None."""

    tokens: torch.Tensor | None
    """(A, M, E) of words, not normalised."""
    mask: torch.Tensor | None
    """(A, M) bool, which of them are words; at least one a text."""
    embedding: torch.Tensor | None
    """(A, E) of the whole text, not normalised."""
    layers: torch.Tensor | None = None
    """(A, Lt, M, Dt) of words after the text tower's last blocks, zero where there is none."""

    @property
    def arrays(self) -> tuple[torch.Tensor | None, ...]:
        """All of them, in the order in which they are given."""
        return self.tokens, self.mask, self.embedding, self.layers


@dataclass(frozen=True, slots=True)
class Interaction:
    """A batch of texts against a batch of videos."""

    similarities: torch.Tensor
    """(A, B) from -1 to 1, texts by videos."""
    loss: torch.Tensor
    """() beside the contrastive one, weighted: of pairs on the diagonal; zero where A and B differ, and of means."""


class MeanInteraction(nn.Module):
    """Cosine of the mean of a video's frames and a text.

    Args:
        normalises_frames: Whether frames are normalised before the mean, so that each counts the same; the reference's
            are not.
    """

    text_arrays = ("embedding",)
    """What it reads of a text."""

    def __init__(self, *, normalises_frames: bool = True) -> None:
        super().__init__()
        self.normalises_frames = normalises_frames

    def forward(self, texts: TextBatch, frames: torch.Tensor, frame_mask: torch.Tensor | None = None) -> Interaction:
        """Compare (A) texts with (B) videos by their frames (B, T, E), not normalised.

        Every frame counts, as in the reference, whatever `frame_mask` (B, T) says.
        """
        assert texts.embedding is not None
        frames = F.normalize(frames, dim=-1) if self.normalises_frames else frames
        videos = F.normalize(frames.mean(dim=1), dim=-1)
        similarities = F.normalize(texts.embedding, dim=-1) @ videos.T
        return Interaction(similarities, similarities.new_zeros(()))


class WeightedTokenInteraction(nn.Module):
    """Each word looks for its best frame and each frame for its best word; small networks weigh words and frames.

    Args:
        width: E.
        decorrelation: Weight of the channel decorrelation loss; of 0 it is not computed.
        on_diagonal: In that loss, weight of how far channels of a pair are from agreeing.
        off_diagonal: Of how far different channels are from being uncorrelated; the reference's 0.
        heeds_frame_mask: Whether frames that are not there are left out, as the reference does beside EVA. Beside CLIP
            they count there.
    """

    text_arrays = ("tokens", "mask")
    """What it reads of a text."""

    def __init__(
        self,
        width: int,
        *,
        decorrelation: float = 0.0,
        on_diagonal: float = 0.11,
        off_diagonal: float = 0.0,
        heeds_frame_mask: bool = False,
    ) -> None:
        super().__init__()
        self.text_weight = _make_weighting(width)
        self.frame_weight = _make_weighting(width)
        self.decorrelation = decorrelation
        self.on_diagonal = on_diagonal
        self.off_diagonal = off_diagonal
        self.heeds_frame_mask = heeds_frame_mask

    def forward(self, texts: TextBatch, frames: torch.Tensor, frame_mask: torch.Tensor | None = None) -> Interaction:
        """Compare (A) texts, word by word, with (B) videos by their frames (B, T, E), not normalised.

        Args:
            texts: Their words, and which of them are words.
            frames: Of the videos.
            frame_mask: (B, T) bool, which frames there are; at least one a video. None is all.
        """
        words, mask = texts.tokens, texts.mask
        assert words is not None and mask is not None
        frame_mask = frame_mask if self.heeds_frame_mask else None
        word_shares = self.text_weight(words)[..., 0].masked_fill(~mask, -torch.inf).softmax(dim=-1)  # (A, M)
        frame_weights = self.frame_weight(frames)[..., 0]
        if frame_mask is not None:
            frame_weights = frame_weights.masked_fill(~frame_mask, -torch.inf)
        frame_shares = frame_weights.softmax(dim=-1)  # (B, T)
        words, frames = F.normalize(words, dim=-1), F.normalize(frames, dim=-1)
        # What is no word has a cosine of zero, as the reference has it: a frame may find it the best. So with frames.
        cosines = torch.einsum("ame,bte->abmt", words, frames) * mask[:, None, :, None]
        if frame_mask is not None:
            cosines = cosines * frame_mask[None, :, None, :]
        of_words, best_frames = cosines.max(dim=3)  # (A, B, M)
        of_frames, best_words = cosines.max(dim=2)  # (A, B, T)
        similarities = torch.einsum("abm,am->ab", of_words, word_shares)
        similarities = (similarities + torch.einsum("abt,bt->ab", of_frames, frame_shares)) / 2
        if not self.decorrelation or len(words) != len(frames):
            return Interaction(similarities, similarities.new_zeros(()))
        own = torch.arange(len(words), device=words.device)
        loss = self._decorrelate(
            words, mask, frames, frame_mask, word_shares, frame_shares, best_frames[own, own], best_words[own, own]
        )
        return Interaction(similarities, self.decorrelation * loss)

    def _decorrelate(
        self,
        words: torch.Tensor,
        mask: torch.Tensor,
        frames: torch.Tensor,
        frame_mask: torch.Tensor | None,
        word_shares: torch.Tensor,
        frame_shares: torch.Tensor,
        best_frames: torch.Tensor,
        best_words: torch.Tensor,
    ) -> torch.Tensor:
        """Of pairs: words (A, M, E) with their best frames (A, M), frames (A, T, E) with their best words (A, T)."""
        num_pairs, width = len(words), words.shape[-1]
        their_frames = frames.gather(1, best_frames[..., None].expand(-1, -1, width)).flatten(0, 1)
        their_words = words.gather(1, best_words[..., None].expand(-1, -1, width)).flatten(0, 1)
        # What is no word has no share and no part in means. To pick words by a mask, the host would wait for a GPU.
        is_frame = None if frame_mask is None else frame_mask.flatten()
        of_words = _correlate(words.flatten(0, 1), their_frames, word_shares.flatten(), mask.flatten())
        of_frames = _correlate(their_words, frames.flatten(0, 1), frame_shares.flatten(), is_frame)
        correlation = (of_words + of_frames) / (2 * num_pairs)
        diagonal = correlation.diagonal()
        on = (diagonal - 1).square().sum()
        off = correlation.square().sum() - diagonal.square().sum()
        return self.on_diagonal * on + self.off_diagonal * off


def _correlate(
    first: torch.Tensor, second: torch.Tensor, shares: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(n, E) each and (n,) -> (E, E): products of standardised channels, weighted, summed; a mask leaves rows out."""
    first, second = (_standardise(x, mask) for x in (first, second))
    return (first * shares[:, None]).T @ second


def _standardise(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Channels of (n, E) to mean 0 and deviation 1, over the rows that a mask (n,) says are there."""
    # A channel that is the same in all, as where every frame's best word is the start: it correlates with nothing.
    if mask is None:
        return (x - x.mean(0)) / x.std(0).clamp(min=_LEAST_STD)
    is_there, count = mask[:, None].to(x.dtype), mask.sum()
    centred = x - (x * is_there).sum(0) / count
    variance = (centred * is_there).square().sum(0) / (count - 1)
    return centred / variance.clamp(min=_LEAST_STD**2).sqrt()


def _make_weighting(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def contrastive_loss(
    similarities: torch.Tensor,
    logit_scale: torch.Tensor,
    is_same: torch.Tensor | None = None,
    texts_of_videos: torch.Tensor | None = None,
) -> torch.Tensor:
    """CLIP's symmetric loss: each text's own video is on the diagonal of (A, A); the scale is a logarithm.

    Args:
        similarities: (A, A), texts by videos.
        logit_scale: ().
        is_same: (A, A) bool, pairs off the diagonal that are right too, as where a video is there twice: they count
            for neither side. None has none, as in the reference.
        texts_of_videos: (A, C), what videos choose from instead of the A texts, their own first and what is right too
            left out with -inf.
    """
    scale = logit_scale.exp()
    logits = scale * similarities
    own = torch.arange(len(logits), device=logits.device)
    if is_same is not None:
        logits = logits.masked_fill(is_same & (own != own[:, None]), -torch.inf)
    by_text = F.cross_entropy(logits, own)
    if texts_of_videos is None:
        return (by_text + F.cross_entropy(logits.T, own)) / 2
    # Infinity times the gradient of the scale is not a number: what is left out is scaled as nothing.
    left_out = texts_of_videos.isneginf()
    choices = (scale * texts_of_videos.masked_fill(left_out, 0.0)).masked_fill(left_out, -torch.inf)
    return (by_text + F.cross_entropy(choices, torch.zeros_like(own))) / 2
