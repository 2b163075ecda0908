"""What a network of temporal grounding is trained with: five losses of points, frames, layers and queries.

Each process makes `GroundingTerms` of its own videos, small tensors. Gathered, they give every process the losses of
the whole batch: a batch that is split among processes has the loss, and the gradients, that it has in one. Frames and
words must be padded alike in all processes.

Letters: B videos with a query each, T frames, Z points of all levels, K layers, S side width, W windows.

Source:
    R2-Tuning, https://arxiv.org/abs/2404.00801; its code yeliudev/R2-Tuning at 03fbcf6. Ours differs where that divides
    zero by zero or takes what nobody wants: see `find_boundary_loss` and `find_saliency_loss`. Equal to it:
    tests/train/test_grounding_losses.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..networks.r2_tuning import Grounding
from .contract import Gather

TEMPERATURE = 0.07
"""Of all contrasts; the reference has it as a buffer, and does not learn it."""
_FOCUS = 2.0
_RADIUS = 1.5
"""Strides from a window's middle, within which a point may stand for it."""


@dataclass(frozen=True, slots=True)
class GroundingWeights:
    """Of the five losses; as released."""

    cls: float = 1.0
    reg: float = 0.2
    sal: float = 0.1
    """0.01 on Charades-STA, 0.05 on TACoS."""
    video_cal: float = 0.1
    layer_cal: float = 0.1
    focal_alpha: float | None = None
    """What positive points count in `cls`, negative ones 1 less that; None counts all as 1."""
    has_columns: bool = True
    """Whether `sal` contrasts videos too, and not frames alone; the highlight data sets have frames alone."""


PAPER_WEIGHTS = GroundingWeights(reg=0.1, focal_alpha=0.9)
"""What the paper's text names otherwise than its released code, and figures, have it."""


class Annotation(NamedTuple):
    """What a batch of videos and queries is annotated with."""

    saliency: torch.Tensor
    """(B, T), 0 to 1, zero where there is no frame."""
    positive: torch.Tensor
    """(B,) int64, a frame that shows what is asked for."""
    windows: torch.Tensor | None = None
    """(B, W, 2) start and end in frames (seconds times frames a second), infinite where padded; None of highlights."""


class GroundingTerms(NamedTuple):
    """What the losses are made of; all tensors have B first."""

    logits: torch.Tensor
    """(B, Z)."""
    level_mask: torch.Tensor
    """(B, Z) bool."""
    target: torch.Tensor
    """(B, Z): of moments 1 at positive points, of highlights the saliency."""
    reach: torch.Tensor | None
    """(B, Z, 2) predicted offsets, in strides; None of highlights."""
    reach_target: torch.Tensor | None
    """(B, Z, 2), zero but at positive points."""
    similarity: torch.Tensor
    """(B, T) of each frame and the video's own query, over the temperature."""
    is_allowed: torch.Tensor
    """(B, T) bool, frames that are there and no better than the positive one."""
    positive: torch.Tensor
    """(B,)."""
    layer_frames: torch.Tensor
    """(B, K, S), the positive frame's class token in each layer."""
    layer_queries: torch.Tensor
    """(B, K, S), pooled words of each layer."""

    def gather(self, gather: Gather) -> GroundingTerms:
        """Those of all processes."""
        there = {name: values for name, values in self._asdict().items() if values is not None}
        return self._replace(**{name: gather(values) for name, values in there.items()})


def find_terms(output: Grounding, annotation: Annotation, frame_mask: torch.Tensor | None) -> GroundingTerms:
    """What the losses take of a process's own videos.

    Args:
        output: Of the network.
        annotation: Of the same videos.
        frame_mask: (B, T) bool; None has all frames.
    """
    saliency, positive, windows = annotation
    own = torch.arange(len(positive), device=positive.device)
    is_allowed = saliency <= saliency[own, positive][:, None]
    if frame_mask is not None:
        is_allowed = is_allowed & frame_mask
    if output.offsets is None:
        target, reach_target = saliency, None
    else:
        assert windows is not None
        target, reach_target = assign_windows(output.points, windows)
    return GroundingTerms(
        logits=output.logits,
        level_mask=output.level_mask,
        target=target,
        reach=output.offsets,
        reach_target=reach_target,
        similarity=F.cosine_similarity(output.frames, output.query[:, None], dim=-1) / TEMPERATURE,
        is_allowed=is_allowed,
        positive=positive,
        layer_frames=output.layer_cls.transpose(0, 1)[own, :, positive],
        layer_queries=output.layer_query.transpose(0, 1),
    )


def assign_windows(points: torch.Tensor, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which points are to find a window, and how far its ends are.

    A point may stand for a window that it lies in, near its middle, and whose farther end is in the point's range. Of
    several the shortest is taken.

    Args:
        points: (Z, 4) as `Grounding.points`.
        windows: (B, W, 2) in frames, infinite where padded.

    Returns:
        (B, Z) float, 1 at positive points, and (B, Z, 2) offsets in strides, zero elsewhere.
    """
    place, least, most, stride = (values[:, None] for values in points.unbind(1))  # (Z, 1)
    starts, ends = windows[:, None].unbind(-1)  # (B, 1, W)
    middles, near = (starts + ends) / 2, _RADIUS * stride
    is_inside = (torch.maximum(middles - near, starts) <= place) & (place <= torch.minimum(middles + near, ends))
    reach = torch.stack([place - starts, ends - place], dim=-1)  # (B, Z, W, 2)
    farther = reach.amax(dim=-1)
    fits = is_inside & (least <= farther) & (farther <= most)
    lengths = (ends - starts).expand_as(fits).masked_fill(~fits, torch.inf)
    shortest = lengths.argmin(dim=-1)
    is_positive = fits.any(dim=-1)
    chosen = reach.gather(2, shortest[..., None, None].expand(-1, -1, 1, 2))[:, :, 0] / stride
    return is_positive.to(points.dtype), torch.where(is_positive[..., None], chosen, 0.0)


def find_losses(terms: GroundingTerms, weights: GroundingWeights | None = None) -> Mapping[str, torch.Tensor]:
    """The losses () of a whole batch, weighted, by name; their sum is what is learnt from.

    Args:
        terms: Of all processes.
        weights: None takes the released ones.
    """
    weights = weights or GroundingWeights()
    with torch.autocast(terms.logits.device.type, enabled=False):
        losses = {"cls": weights.cls * find_class_loss(terms, weights.focal_alpha)}
        if terms.reach is not None:
            losses["reg"] = weights.reg * find_boundary_loss(terms)
        losses["sal"] = weights.sal * find_saliency_loss(terms, has_columns=weights.has_columns)
        losses["video_cal"] = weights.video_cal * contrast_videos(terms.layer_frames, terms.layer_queries)
        losses["layer_cal"] = weights.layer_cal * contrast_layers(terms.layer_frames, terms.layer_queries)
    return losses


def find_class_loss(terms: GroundingTerms, alpha: float | None = None) -> torch.Tensor:
    """Of moments the focal loss, of highlights cross-entropy with the saliency: () a mean over valid points."""
    target = terms.target.to(terms.logits.dtype)
    loss = F.binary_cross_entropy_with_logits(terms.logits, target, reduction="none")
    if terms.reach is not None:
        p = terms.logits.sigmoid()
        loss = loss * (p + target - 2 * p * target) ** _FOCUS  # 1 - p of the right answer
        if alpha is not None:
            loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    return loss.masked_fill(~terms.level_mask, 0.0).sum() / terms.level_mask.sum().clamp(min=1)


def find_boundary_loss(terms: GroundingTerms) -> torch.Tensor:
    """Mean distance () of offsets, in strides, at positive points.

    Positive points that stand on padding count too, as in the reference: where a window ends with a shorter video there
    is one. Without any positive point it is 0; in the reference it is 0/0.
    """
    assert terms.reach is not None and terms.reach_target is not None
    is_positive = terms.target > 0
    distance = (terms.reach - terms.reach_target).abs().masked_fill(~is_positive[..., None], 0.0)
    return distance.sum() / (2 * is_positive.sum()).clamp(min=1)


def find_saliency_loss(terms: GroundingTerms, *, has_columns: bool = True) -> torch.Tensor:
    """How the positive frame stands out, (): among its video's lesser frames, and among the videos at its time.

    In a column each video is compared with its own query. The reference takes columns at all places of time. At one
    where no video is allowed its gradient is not a number. Ours are the B columns that count, with the same value.
    """
    own = torch.arange(len(terms.positive), device=terms.positive.device)
    rows = terms.similarity.masked_fill(~terms.is_allowed, -torch.inf)
    loss = F.cross_entropy(rows, terms.positive)
    # (B, B): video b' at the positive frame of b, as columns of b; where b' = b it is allowed.
    return loss + F.cross_entropy(rows[:, terms.positive].T, own) if has_columns else loss


def contrast_videos(frames: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Each video's frame against all queries, and the reverse, in every layer: (B, K, S) twice -> ()."""
    return _contrast(frames.transpose(0, 1), queries.transpose(0, 1))


def contrast_layers(frames: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Each layer's frame against the query in all layers, and the reverse, in every video: (B, K, S) twice -> ()."""
    return _contrast(frames, queries)


def _contrast(frames: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE along the second axis: (G, n, S) twice -> (), a mean over all G n rows of both directions."""
    logits = F.normalize(frames, dim=-1) @ F.normalize(queries, dim=-1).mT / TEMPERATURE  # (G, n, n)
    own = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2]).flatten()
    by_frame, by_query = (F.cross_entropy(one.flatten(0, 1), own) for one in (logits, logits.mT))
    return (by_frame + by_query) / 2
