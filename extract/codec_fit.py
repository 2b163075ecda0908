"""The codecs of a new store: taken over, the identity, or fitted on a sample of training frames.

The sample is a pure function of the manifest and the seed: the same whatever the machine does meanwhile.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, NoGoodVideoError
from ..store.codecs.affine import AffineCodec, check_finite, fit_basis, fit_basis_of_few, fit_scale
from ..store.codecs.contract import Codec
from ..store.layout import DEFAULT_CODEC, PatchDtype, StoreLayout
from ..store.padding import find_padding
from ..store.reader import open_store
from ..store.records import VideoRecord
from .batching import split_evenly
from .class_tokens import ClassTokenRecorder, Tower
from .decode.pool import DecodedVideo
from .job import Job
from .meter import ReportProgress

_SAMPLE_FRAMES = 128
_FRAMES_PER_VIDEO = (2, 16)
"""Fewest and most: neighbouring frames say little new, but a small data set has no others."""
_TRIAL_FRAMES = 2
"""Rows that cache no more are a trial's: a giant's sample would take a CPU many times as long as the trial itself."""
_CLASS_TOKENS_PER_DIRECTION = 4
"""A frame has one class token where it has hundreds of patches: directions of fewer are those of the sample alone."""
_LONG_S = 600.0
"""Calibration that takes longer says what would make it shorter."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrameSample:
    """Frames to fit or to measure on."""

    pixels: np.ndarray
    """(n, H, W, 3) uint8."""
    video_ids: tuple[str, ...]
    """Of each frame."""
    padding: np.ndarray | None = None
    """(n, N) bool, true where a patch shows nothing of the picture: it says nothing of tokens. None where none does."""

    @property
    def num_padded(self) -> int:
        """Patches that are left out."""
        return 0 if self.padding is None else int(self.padding.sum())


def fits_codec(job: Job) -> bool:
    """Whether a codec of a new store is fitted on its own videos: of patches, or of class tokens."""
    return job.config.codec_from is None and (wants_fit(job, job.layout) or _wants_cls_fit(job))


def wants_fit(job: Job, layout: StoreLayout) -> bool:
    """Whether the codec of a layout's patches is not the identity."""
    is_plain = layout.patch_dtype != "int8" and layout.channels == layout.width
    return not (is_plain and job.config.codec == DEFAULT_CODEC)


def _wants_cls_fit(job: Job) -> bool:
    return job.layout.is_cls_coded and wants_fit(job, job.layout.of_cls())


def make_codecs(job: Job) -> tuple[Codec, Codec | None]:
    """The codecs of a new store: taken over, the identity, or fitted; the same whenever they are made.

    Returns:
        Of patches, and of class tokens; None where those are not coded.

    Raises:
        ConfigError: If nothing fits a codec of that name, or the sample holds too few tokens.
    """
    config, layout = job.config, job.layout
    if config.codec_from is not None:
        source = open_store(config.codec_from)
        return source.codec, source.cls_codec
    if not fits_codec(job):
        return AffineCodec(dtype=config.dtype), AffineCodec(dtype=layout.cls_dtype) if layout.is_cls_coded else None
    if config.codec not in FITS:
        raise ConfigError(
            f"nothing fits a codec {config.codec!r}; those that can be fitted are {', '.join(FITS)}. Take one of them, "
            "or the codec of a store that has it (--codec-from)."
        )
    sample = _decode_sample(job)
    if not layout.is_cls_coded:
        return fit_patches(job, sample, job.backbone, layout), None
    recorder = ClassTokenRecorder(job.backbone, sample.pixels, layout.layers, layout.class_tokens, sample.padding)
    codec = fit_patches(job, sample, recorder, layout) if wants_fit(job, layout) else AffineCodec(dtype=config.dtype)
    return codec, _fit_cls(job, sample, recorder) if _wants_cls_fit(job) else AffineCodec(dtype=layout.cls_dtype)


def fit_patches(job: Job, sample: FrameSample, tower: Tower, layout: StoreLayout) -> Codec:
    """The codec of a layout's patches, as the job's options say.

    Args:
        job: Whose.
        sample: What it is fitted on.
        tower: Makes its tokens.
        layout: Of the new store.
    """
    return FITS[job.config.codec](
        layout.patch_dtype,
        sample,
        tower,
        layout.layers,
        channels=layout.channels,
        batch_size=job.config.batch_size,
        report=job.report,
    )


def _fit_cls(job: Job, sample: FrameSample, recorder: ClassTokenRecorder) -> Codec:
    layout, num_frames = job.layout.of_cls(), len(sample.pixels)
    if layout.channels < layout.width and num_frames <= layout.channels:
        raise ConfigError(
            f"--cls-channels {layout.channels} wants more than {layout.channels} class tokens to calibrate on, one of "
            f"each frame; {len(set(sample.video_ids))} videos have {num_frames} frames. Take fewer channels, more "
            "--calibration-videos, or codecs that another store was fitted with (--codec-from)."
        )
    table = recorder.finish(job.config.batch_size)
    return FITS[job.config.codec](
        layout.patch_dtype,
        FrameSample(table.frames, sample.video_ids),
        table,
        layout.layers,
        channels=layout.channels,
        batch_size=num_frames,
        report=lambda *_: None,  # it takes no pass through the backbone
    )


def _decode_sample(job: Job) -> FrameSample:
    config, layout = job.config, job.layout
    groups = group_for_calibration(job.records, config.seed)
    num_candidates = len(groups[0]) or len(job.records)
    num_videos = min(config.calibration_videos, num_candidates)
    num_frames = frames_per_video(num_candidates, layout, config.calibration_videos)
    if layout.cls_channels < layout.width:
        num_frames = max(num_frames, frames_for_cls(layout.cls_channels, num_videos))
    decoded = (zip(group, job.decode(group, num_frames), strict=True) for group in groups)

    def count(num_decoded: int) -> None:
        stage = f"decoding for calibration: {num_videos} videos, {num_frames} frames of each"
        job.report(stage, num_decoded, num_videos)

    count(0)
    return gather_sample(decoded, config.calibration_videos, count, patch_size=job.backbone.info.patch_size)


def group_for_calibration(records: Sequence[VideoRecord], seed: int) -> list[list[VideoRecord]]:
    """Videos in the order in which calibration takes them, by hash of id and seed: the training split, then the rest.

    The second group serves only where not one video of the first decodes.
    """

    def key(record: VideoRecord) -> bytes:
        return hashlib.sha256(f"{seed}:calibration:{record.video_id}".encode()).digest()

    training = [record for record in records if record.split == "train"]
    others = [record for record in records if record.split != "train"]
    return [sorted(group, key=key) for group in (training, others)]


def frames_per_video(num_videos: int, layout: StoreLayout | None = None, num_taken: int | None = None) -> int:
    """Frames that calibration takes of each video, so that a small data set gives a sample too.

    Of a store whose rows cache one or two frames, a trial's, it takes twice as many, or what the codec's directions
    need. Neither `--limit` nor the machine plays a part: a store that is begun in parts has the codec of the whole.

    Args:
        num_videos: That there are.
        layout: Of the store; None, or more cached frames than a trial's, takes the sample of a real run.
        num_taken: Videos that the sample is taken from; None takes all.
    """
    fewest, most = _FRAMES_PER_VIDEO
    usual = min(max(fewest, -(-_SAMPLE_FRAMES // max(1, num_videos))), most)
    if layout is None or layout.num_frames > _TRIAL_FRAMES:
        return usual
    directions = layout.channels if layout.channels < layout.width else 0
    tokens_per_frame = layout.num_patches * max(1, min(num_videos, num_taken or num_videos))
    return min(usual, max(2 * layout.num_frames, -(-2 * directions // tokens_per_frame)))


def frames_for_cls(channels: int, num_videos: int) -> int:
    """Frames of each video that calibration takes at least where class tokens are projected.

    Args:
        channels: K of a class token.
        num_videos: That the sample is taken from.
    """
    fewest, most = _FRAMES_PER_VIDEO
    return min(most, max(fewest, -(-_CLASS_TOKENS_PER_DIRECTION * channels // num_videos)))


def gather_sample(
    groups: Iterable[Iterator[tuple[VideoRecord, DecodedVideo]]],
    num_videos: int,
    count: Callable[[int], None] = lambda _: None,
    *,
    patch_size: tuple[int, int],
) -> FrameSample:
    """Take the first videos that decode.

    Args:
        groups: Decoded candidates in order; failed ones are skipped, and the first group with a good one is used.
        num_videos: Good videos to use, fewer where there are not so many.
        count: Told how many are decoded.
        patch_size: Of the backbone, down and across.

    Raises:
        NoGoodVideoError: If not one candidate decodes.
    """
    frames: list[np.ndarray] = []
    ids: list[str] = []
    padding: list[np.ndarray] = []
    reasons: list[str] = []
    for group in groups:
        for record, video in group:
            if video.pixels is None:
                reasons.append(video.facts["reason"])
                continue
            # A video shorter than the sample shows frames twice: they would count as more than they are.
            _, distinct = np.unique(video.facts["frame_indices"], return_index=True)
            # Of several views each frame shows another one, and each video begins with another.
            shown = (np.arange(len(distinct)) + len(frames)) % len(video.pixels)
            frames.append(video.pixels[shown, distinct, 0])
            ids += [record.video_id] * len(frames[-1])
            masks = [find_padding(view, patch_size) for view in video.facts["views"]]
            padding += [masks[view] for view in shown]
            count(len(frames))
            if len(frames) == num_videos:
                break
        if frames:
            is_padding = np.stack(padding)
            return FrameSample(np.concatenate(frames), tuple(ids), is_padding if is_padding.any() else None)
    raise NoGoodVideoError(
        f"not one of {len(reasons)} videos decodes: nothing was written. First reasons: "
        + "; ".join(sorted(set(reasons))[:3])
    )


def fit_codec(
    dtype: PatchDtype,
    sample: FrameSample,
    backbone: Tower,
    layers: Sequence[int],
    *,
    channels: int,
    batch_size: int,
    report: ReportProgress = lambda *_: None,
) -> Codec:
    """Fit the codec of a store.

    Args:
        dtype: Of the codes.
        sample: What to fit on; floats without a projection need none of it.
        backbone: With weights.
        layers: Blocks to tap.
        channels: K; below the backbone's width a PCA of each layer projects to the K directions of most variance.
        batch_size: The most frames in one pass.
        report: Told of frames that went through the backbone.

    Raises:
        ConfigError: If the sample holds too few tokens for K directions.
        EnvironmentFailedError: If the backbone gives NaN or infinity; block and video named.
    """
    width = backbone.info.width
    is_projected = channels < width
    if dtype != "int8" and not is_projected:
        return AffineCodec(dtype=dtype)
    num_tokens = len(sample.pixels) * backbone.info.num_patches - sample.num_padded
    if is_projected and num_tokens <= channels:
        raise ConfigError(
            f"--channels {channels} wants more than {channels} tokens to calibrate on; {len(sample.pixels)} frames of "
            f"{len(set(sample.video_ids))} videos have {num_tokens}. Take fewer channels, more videos, or a codec that "
            "another store was fitted with (--codec-from)."
        )
    num_passes = 2 if is_projected and dtype == "int8" else 1
    tokens_of = SampleTokens("calibrating the codec", sample, backbone, layers, batch_size, num_passes, report)
    # A trial's: the eigenvectors of ViT-E's covariances alone would take a CPU minutes.
    are_few = is_projected and tokens_of.is_kept and num_tokens < width
    moments = _Moments(len(layers), width, with_products=is_projected and not are_few, device=backbone.device)
    tokens_of.hand_to(moments.add)
    mean = moments.mean
    if not is_projected:
        absmax = np.maximum(moments.largest - mean, mean - moments.smallest)
        return AffineCodec(dtype=dtype, mean=mean.astype(np.float32), scale=fit_scale(absmax, moments.deviation))
    bases: list[np.ndarray] = []
    for place in range(len(layers)):
        report("fitting the codec", place, len(layers))
        if are_few:
            values = tokens_of.kept[place].flatten(0, 1).double().cpu().numpy()
            bases.append(fit_basis_of_few(values, mean[place], channels))
        else:
            bases.append(fit_basis(moments.covariance(place), channels))
    report("fitting the codec", len(layers), len(layers))
    basis = np.stack(bases)
    codec = AffineCodec(dtype="float32", mean=mean.astype(np.float32), basis=basis)
    if dtype != "int8":
        return AffineCodec(dtype=dtype, mean=codec.mean, basis=codec.basis)
    on_device = codec.map_parts(lambda array: torch.from_numpy(array).to(backbone.device))
    projected = _Moments(len(layers), channels, with_products=False, device=backbone.device)
    tokens_of.hand_to(
        lambda tokens: projected.add([on_device.encode(values, place) for place, values in enumerate(tokens)])
    )
    absmax = np.maximum(projected.largest, -projected.smallest)
    return AffineCodec(dtype=dtype, mean=codec.mean, basis=basis, scale=fit_scale(absmax, projected.deviation))


FITS: dict[str, Callable[..., Codec]] = {AffineCodec.name: fit_codec}
"""By a codec's name, what fits it: each takes what `fit_codec` takes. `SampleTokens` hands it the sample's tokens."""


class SampleTokens:
    """The patch tokens of a sample's frames, from the backbone as often as they are asked for.

    All tokens of a giant's layers would fill the memory; those of a sample of one batch are there anyway, and kept.

    Args:
        stage: What they are for.
        sample: The frames.
        backbone: With weights.
        layers: Blocks to tap.
        batch_size: The most frames in one pass.
        num_passes: How often they will be asked for.
        report: Told of frames that went through the backbone.
    """

    def __init__(
        self,
        stage: str,
        sample: FrameSample,
        backbone: Tower,
        layers: Sequence[int],
        batch_size: int,
        num_passes: int,
        report: ReportProgress,
    ) -> None:
        self._sample, self._backbone, self._layers = sample, backbone, layers
        self._batches = split_evenly(len(sample.pixels), batch_size)
        self.is_kept = len(self._batches) == 1
        """Whether there is one pass, whose tokens stay."""
        self.kept: list[torch.Tensor] = []
        self._stage, self._report = stage, report
        self._pass, self._num_passes = 0, 1 if self.is_kept else num_passes

    def hand_to(self, use: Callable[[list[torch.Tensor]], None]) -> None:
        """Hand over the tokens, (B, N, D) for each layer, batch by batch; (1, n, D) where some patches are padding.

        A batch is freed before the next pass, as an iterator's would not be: 16 frames of ViT-E's layers are 0.5 GB.
        """
        if self.kept:
            use(self.kept)
            return
        self._pass += 1
        began, num_frames = time.perf_counter(), len(self._sample.pixels)
        which = "" if self._num_passes == 1 else f", time {self._pass} of {self._num_passes}"
        num_videos = len(set(self._sample.video_ids))
        stage = f"{self._stage}: {num_videos} videos, {num_frames} frames through the backbone{which}"
        self._report(stage, 0, num_frames)
        for batch in self._batches:
            use(self._encode(slice(batch.start, batch.stop)))
            self._report(stage, batch.stop, num_frames)
            if batch is self._batches[0]:
                self._warn_if_long((time.perf_counter() - began) / len(batch))

    def _encode(self, batch: slice) -> list[torch.Tensor]:
        tokens = self._backbone.encode_frames(torch.from_numpy(self._sample.pixels[batch]), self._layers).patches
        for layer, values in zip(self._layers, tokens, strict=True):
            check_finite(values, values, layer, self._sample.video_ids[batch])
        if self._sample.padding is not None:
            is_picture = torch.from_numpy(~self._sample.padding[batch]).to(tokens[0].device)
            tokens = [values[is_picture][None] for values in tokens]
        if self.is_kept:
            self.kept = tokens
        return tokens

    def _warn_if_long(self, seconds_per_frame: float) -> None:
        seconds = seconds_per_frame * len(self._sample.pixels) * (self._num_passes - self._pass + 1)
        if self._pass == 1 and seconds > _LONG_S:
            _log.warning(
                "%s takes about %.0f minutes here: fewer --calibration-videos shorten it, and --dtype float16 has no "
                "codec to fit",
                *(self._stage, seconds / 60),
            )


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

    def covariance(self, place: int) -> np.ndarray:
        """(D, D) float64 of a layer."""
        assert self._products is not None
        mean = self.mean[place]
        return self._products[place].cpu().numpy() / self._count - np.outer(mean, mean)
