"""Fit a store's codec on a sample of training frames, and say what it costs on frames it was not fitted on.

The sample is a pure function of the manifest and the seed: the same whatever the machine does meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, NoGoodVideoError
from ..store.codec import Codec, check_finite, fit_basis, fit_scale, round_mantissas
from ..store.fidelity import FidelityMeter, LayerFidelity
from ..store.layout import PatchDtype
from ..store.records import VideoRecord
from .backbone import Backbone
from .batching import split_evenly
from .decoding import DecodedVideo

_SAMPLE_FRAMES = 128
_FRAMES_PER_VIDEO = (2, 16)
"""Fewest and most: neighbouring frames say little new, but a small data set has no others."""


@dataclass(frozen=True, slots=True)
class FrameSample:
    """Frames to fit or to measure on."""

    pixels: np.ndarray
    """(n, H, W, 3) uint8."""
    video_ids: tuple[str, ...]
    """Of each frame."""


def group_for_calibration(records: Sequence[VideoRecord], seed: int) -> list[list[VideoRecord]]:
    """Videos in the order in which calibration takes them, by hash of id and seed: the training split, then the rest.

    The second group serves only where not one video of the first decodes.
    """

    def key(record: VideoRecord) -> bytes:
        return hashlib.sha256(f"{seed}:calibration:{record.video_id}".encode()).digest()

    training = [record for record in records if record.split == "train"]
    others = [record for record in records if record.split != "train"]
    return [sorted(group, key=key) for group in (training, others)]


def frames_per_video(num_videos: int) -> int:
    """Frames that calibration takes of each video, so that a small data set gives a sample too."""
    fewest, most = _FRAMES_PER_VIDEO
    return min(max(fewest, -(-_SAMPLE_FRAMES // max(1, num_videos))), most)


def gather_sample(groups: Iterable[Iterator[tuple[VideoRecord, DecodedVideo]]], num_videos: int) -> FrameSample:
    """Take the first videos that decode.

    Args:
        groups: Decoded candidates in order; failed ones are skipped, and the first group with a good one is used.
        num_videos: Good videos to use, fewer where there are not so many.

    Raises:
        NoGoodVideoError: If not one candidate decodes.
    """
    frames: list[np.ndarray] = []
    ids: list[str] = []
    reasons: list[str] = []
    for group in groups:
        for record, video in group:
            if video.pixels is None:
                reasons.append(video.facts["reason"])
                continue
            # A video shorter than the sample shows frames twice: they would count as more than they are.
            _, distinct = np.unique(video.facts["frame_indices"], return_index=True)
            frames.append(video.pixels[0, distinct, 0])
            ids += [record.video_id] * len(frames[-1])
            if len(frames) == num_videos:
                break
        if frames:
            return FrameSample(np.concatenate(frames), tuple(ids))
    raise NoGoodVideoError(
        f"not one of {len(reasons)} videos decodes: nothing was written. First reasons: "
        + "; ".join(sorted(set(reasons))[:3])
    )


def fit_codec(
    dtype: PatchDtype,
    sample: FrameSample,
    backbone: Backbone,
    layers: Sequence[int],
    *,
    channels: int,
    batch_size: int,
) -> Codec:
    """Fit the codec of a store.

    Args:
        dtype: Of the codes.
        sample: What to fit on; floats without a projection need none of it.
        backbone: With weights.
        layers: Blocks to tap.
        channels: K; below the backbone's width a PCA of each layer projects to the K directions of most variance.
        batch_size: The most frames in one pass.

    Raises:
        ConfigError: If the sample holds too few tokens for K directions.
        EnvironmentFailedError: If the backbone gives NaN or infinity; block and video named.
    """
    width = backbone.info.width
    is_projected = channels < width
    if dtype != "int8" and not is_projected:
        return Codec(dtype=dtype)
    num_tokens = len(sample.pixels) * backbone.info.num_patches
    if is_projected and num_tokens <= channels:
        raise ConfigError(
            f"--channels {channels} wants more than {channels} tokens to calibrate on; {len(sample.pixels)} frames of "
            f"{len(set(sample.video_ids))} videos have {num_tokens}. Take fewer channels, more videos, or a codec that "
            "another store was fitted with (--codec-from)."
        )
    moments = _Moments(len(layers), width, with_products=is_projected, device=backbone.device)
    _run_sample(sample, backbone, layers, batch_size, moments.add)
    mean = moments.mean
    if not is_projected:
        absmax = np.maximum(moments.largest - mean, mean - moments.smallest)
        return Codec(dtype=dtype, mean=mean.astype(np.float32), scale=fit_scale(absmax, moments.deviation))
    basis = np.stack([fit_basis(covariance, channels) for covariance in moments.covariances()])
    codec = Codec(dtype="float32", mean=mean.astype(np.float32), basis=basis)
    if dtype != "int8":
        return Codec(dtype=dtype, mean=codec.mean, basis=codec.basis)
    on_device = codec.map_parts(lambda array: torch.from_numpy(array).to(backbone.device))
    projected = _Moments(len(layers), channels, with_products=False, device=backbone.device)
    _run_sample(
        sample,
        backbone,
        layers,
        batch_size,
        lambda tokens: projected.add([on_device.encode(values, place) for place, values in enumerate(tokens)]),
    )
    absmax = np.maximum(projected.largest, -projected.smallest)
    return Codec(dtype=dtype, mean=codec.mean, basis=basis, scale=fit_scale(absmax, projected.deviation))


def measure_codec(
    codec: Codec,
    keep_bits: int | None,
    sample: FrameSample,
    backbone: Backbone,
    layers: Sequence[int],
    *,
    batch_size: int,
) -> list[LayerFidelity]:
    """Code and decode a sample of frames, and compare them with the live tokens.

    Args:
        codec: Of the store, numpy arrays.
        keep_bits: Mantissa bits that the store keeps of float16 codes; None keeps all.
        sample: Frames that the codec was not fitted on, where there are any.
        backbone: With weights.
        layers: Blocks that are tapped.
        batch_size: The most frames in one pass.

    Returns:
        One for each layer.
    """
    meters = [FidelityMeter(layer) for layer in layers]

    def count_mean(tokens: list[torch.Tensor]) -> None:
        for meter, values in zip(meters, tokens, strict=True):
            meter.count_mean(values.float().cpu().numpy())

    def compare(tokens: list[torch.Tensor]) -> None:
        for place, (meter, values) in enumerate(zip(meters, tokens, strict=True)):
            live = values.float().cpu().numpy()
            codes = round_mantissas(codec.encode(live, place), keep_bits)
            meter.compare(live, codec.decode(codes, place))

    # Twice through the backbone: all tokens of a giant's layers would fill the memory.
    _run_sample(sample, backbone, layers, batch_size, count_mean)
    _run_sample(sample, backbone, layers, batch_size, compare)
    return [meter.summarise() for meter in meters]


def _run_sample(
    sample: FrameSample,
    backbone: Backbone,
    layers: Sequence[int],
    batch_size: int,
    use: Callable[[list[torch.Tensor]], None],
) -> None:
    """Hand over the patch tokens of the sample's frames, (B, N, D) for each layer, batch by batch.

    A batch is freed before the next pass, as an iterator's would not be: 16 frames of ViT-E's layers are 0.5 GB.
    """

    def encode(batch: slice) -> list[torch.Tensor]:
        tokens = backbone.encode_frames(torch.from_numpy(sample.pixels[batch]), layers).patches
        for layer, values in zip(layers, tokens, strict=True):
            check_finite(values, values, layer, sample.video_ids[batch])
        return tokens

    for batch in split_evenly(len(sample.pixels), batch_size):
        use(encode(slice(batch.start, batch.stop)))


class _Moments:
    """Mean, deviation, extremes and, if wanted, products of the channels of each layer, summed in float64."""

    def __init__(self, num_layers: int, width: int, *, with_products: bool, device: torch.device) -> None:
        self._count = 0
        # Apple's GPUs have no float64.
        options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}
        self._sum = torch.zeros(num_layers, width, **options)
        self._squares = torch.zeros(num_layers, width, **options)
        self._smallest = torch.full((num_layers, width), torch.inf, **options)
        self._largest = torch.full((num_layers, width), -torch.inf, **options)
        self._products = torch.zeros(num_layers, width, width, **options) if with_products else None

    def add(self, tokens: Sequence[torch.Tensor]) -> None:
        """Count a batch, (B, N, D) for each layer."""
        self._count += tokens[0].shape[0] * tokens[0].shape[1]
        for place, values in enumerate(tokens):
            rows = values.to(self._sum.device).flatten(0, 1).double()
            self._sum[place] += rows.sum(dim=0)
            self._squares[place] += rows.square().sum(dim=0)
            self._smallest[place] = torch.minimum(self._smallest[place], rows.amin(dim=0))
            self._largest[place] = torch.maximum(self._largest[place], rows.amax(dim=0))
            if self._products is not None:
                self._products[place] += rows.T @ rows

    @property
    def mean(self) -> np.ndarray:
        """(L, D) float64."""
        return (self._sum / self._count).cpu().numpy()

    @property
    def deviation(self) -> np.ndarray:
        """(L, D) float64: the square root of the mean square of what is left when the mean is subtracted."""
        return np.sqrt(np.maximum((self._squares / self._count).cpu().numpy() - self.mean**2, 0))

    @property
    def smallest(self) -> np.ndarray:
        """(L, D) float64."""
        return self._smallest.cpu().numpy()

    @property
    def largest(self) -> np.ndarray:
        """(L, D) float64."""
        return self._largest.cpu().numpy()

    def covariances(self) -> Iterator[np.ndarray]:
        """(D, D) float64 for each layer."""
        assert self._products is not None
        for products, mean in zip(self._products, self.mean, strict=True):
            yield products.cpu().numpy() / self._count - np.outer(mean, mean)
