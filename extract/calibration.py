"""Fit a store's codec on a sample of training frames, the same sample whatever the machine does meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..errors import NoGoodVideoError
from ..store.codec import Codec, check_finite, fit_absmax_scale
from ..store.layout import PatchDtype
from ..store.records import VideoRecord
from .backbone import Backbone
from .decoding import DecodedVideo

FRAMES_PER_VIDEO = 2


def group_for_calibration(records: Sequence[VideoRecord], seed: int) -> list[list[VideoRecord]]:
    """Videos in the order in which calibration takes them, by hash of id and seed: the training split, then the rest.

    The second group serves only where not one video of the first decodes.
    """

    def key(record: VideoRecord) -> bytes:
        return hashlib.sha256(f"{seed}:calibration:{record.video_id}".encode()).digest()

    training = [record for record in records if record.split == "train"]
    others = [record for record in records if record.split != "train"]
    return [sorted(group, key=key) for group in (training, others)]


def fit_codec(
    dtype: PatchDtype,
    groups: Iterable[Iterator[DecodedVideo]],
    backbone: Backbone,
    layers: Sequence[int],
    *,
    num_videos: int,
    batch_size: int,
) -> Codec:
    """Fit the codec of a store.

    Args:
        dtype: Of the codes; float codes need no calibration and no video.
        groups: Decoded candidates in order; failed ones are skipped, and the first group with a good one is used.
        backbone: With weights.
        layers: Blocks to tap.
        num_videos: Good videos to use, fewer where there are not so many.
        batch_size: Frames in one pass; the last batch is padded with zeros, fewer frames are one batch.

    Raises:
        NoGoodVideoError: If not one candidate decodes.
    """
    if dtype != "int8":
        return Codec(dtype=dtype)
    frames: list[np.ndarray] = []
    reasons: list[str] = []
    for group in groups:
        for video in group:
            if video.pixels is None:
                reasons.append(video.facts["reason"])
                continue
            frames.append(video.pixels[0, :, 0])
            if len(frames) == num_videos:
                break
        if frames:
            break
    if not frames:
        raise NoGoodVideoError(
            f"not one of {len(reasons)} videos decodes: nothing was written. First reasons: "
            + "; ".join(sorted(set(reasons))[:3])
        )
    pixels = np.concatenate(frames)
    absmax: torch.Tensor | None = None
    for first in range(0, len(pixels), batch_size):
        batch = pixels[first : first + batch_size]
        padded = np.zeros((min(batch_size, len(pixels)), *batch.shape[1:]), dtype=np.uint8)
        padded[: len(batch)] = batch
        tokens = backbone.encode_frames(torch.from_numpy(padded), layers).patches
        for layer, values in zip(layers, tokens, strict=True):
            check_finite(values, values, layer)
        largest = torch.stack([values[: len(batch)].abs().amax(dim=(0, 1)).float() for values in tokens])
        absmax = largest if absmax is None else torch.maximum(absmax, largest)
    assert absmax is not None
    return Codec(dtype=dtype, scale=fit_absmax_scale(absmax.cpu().numpy()))
