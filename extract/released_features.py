"""Features that R2-Tuning's authors released, made a store of: tokens of frames and words, without a video.

    FOLDER/clip_b32_vid_k4/VID.npy    (T, L, 1 + N, D) float16      class token first, raw outputs of the last L blocks
    FOLDER/clip_b32_txt_k4/QID.npy    (M, L, Dt) float16            all words of a query, start and end among them

A row is read, coded and written before the next one. Embeddings, and words behind the text tower's norm, are made of
them by the backbone's own end. A row without its file fails, and says which.

Source:
    https://github.com/yeliudev/R2-Tuning at 03fbcf6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from ..backbone.contract import FrameTokens
from ..backbone.facts import BackboneInfo
from ..errors import ConfigError, DataNotFoundError, StoreMismatchError
from ..store.codecs.affine import AffineCodec
from ..store.codecs.contract import Codec
from ..store.moments import write_moments
from ..store.records import VideoRecord, VideoResult
from ..store.texts import Texts
from ..store.writer import RowTokens, StoreWriter, create_store, refuse_existing, resume_store
from .caption_texts import write_caption_texts
from .codec_fit import FrameSample, fit_patches, group_for_calibration, wants_fit
from .config import ExtractConfig
from .decode.pool import DecoderPool
from .disk_space import require_space
from .job import Job, set_up_job
from .meter import ReportProgress, StageClock
from .recipe import settle_recipe
from .summary import ExtractSummary, refuse_no_good_video, summarise_store
from .target import Target
from .text_needs import require_texts

_VIDEO_FOLDERS = "clip_*_vid_k*"
_QUERY_FOLDERS = "clip_*_txt_k*"
_SAMPLE_FRAMES = 128
_FRAMES_PER_VIDEO = 2
_ORIGIN = "R2-Tuning"


class FeatureFolder:
    """The released files below a folder.

    Raises:
        DataNotFoundError: If it has no folder of videos' features, or several.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._videos = self._find(_VIDEO_FOLDERS)
        self._queries = self._find(_QUERY_FOLDERS)

    def _find(self, pattern: str) -> Path:
        found = sorted(one for one in self.path.glob(pattern) if one.is_dir())
        if len(found) != 1:
            there = ", ".join(one.name for one in found) or "none"
            raise DataNotFoundError(f"expected one folder {pattern} in {self.path}, found {there}: unpack it there")
        return found[0]

    def find_video(self, video_id: str) -> Path:
        """Where the features of a video lie, or would."""
        return self._videos / f"{video_id}.npy"

    def find_query(self, query_id: str) -> Path:
        """Where the features of a query lie, or would."""
        return self._queries / f"{query_id}.npy"


def open_features(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The features of a file, mapped and not read.

    Args:
        file: One of `FeatureFolder`.
        shape: Expected behind the first axis.

    Raises:
        StoreMismatchError: If it holds something else, or cannot be read as an array.
    """
    values = _map(file)
    if values.ndim != len(shape) + 1 or values.shape[1:] != shape or not len(values) or values.dtype.kind != "f":
        raise StoreMismatchError(
            f"{file} has {values.dtype} {values.shape}, expected floats (n, {', '.join(map(str, shape))}): it is of "
            "another backbone, or of other --layers"
        )
    return values


def _map(file: Path) -> np.ndarray:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise StoreMismatchError(f"{file} does not read as an array: {error}. Unpack it once more") from error
    if not isinstance(values, np.ndarray) or values.ndim == 0:
        raise StoreMismatchError(f"{file} holds no array of frames or words. Unpack it once more")
    return values


def import_features(config: ExtractConfig, folder: Path, report: ReportProgress = lambda *_: None) -> ExtractSummary:
    """Make a store of released features; run again, it goes on where it was.

    Args:
        config: As for an extraction. Its root need hold annotations alone.
        folder: Below which the features lie.
        report: Told about progress.

    Raises:
        S4vError: If the files are not of this backbone and these layers, or annotations are malformed.
    """
    features, clock, target = FeatureFolder(folder), StageClock(), Target.find(config)
    if config.cls_dtype is not None or config.cls_channels is not None or config.with_pixels:
        raise ConfigError("released features hold no pixels, and their class tokens are kept as they are")
    config = settle_recipe(config, target)
    if not config.recipe.sampling.startswith("fps:"):
        raise ConfigError(
            "released features are at a fixed rate: say which (--sampling fps:0.5), or name a --dataset that has one"
        )
    if not target.goes_on:
        refuse_existing(config.out, overwrite=config.overwrite)
    listing = config.read_listing(expects_videos=False)
    with DecoderPool(1) as pool:
        job = set_up_job(config, target, listing, pool, clock, report, num_frames=_count(features, listing.records))
        require_texts(job)
        job.attributes["features"] = _ORIGIN
        shape = (len(job.layout.layers), 1 + job.layout.num_patches, job.layout.width)
        _require_shapes(features, job.records, shape)
        job.load_weights()
        with _open_writer(job, features, shape) as writer:
            for done, shard in enumerate(shards := writer.pending_shards(), start=1):
                _write_shard(job, writer, features, shard, shape)
                report("importing", done, len(shards))
            table, store = writer.consolidate(), writer.store
        write_moments(store, job.records)
        write_caption_texts(job, store, lambda texts, made: _take_words(features, job, texts, made))
    summary = summarise_store(config.out, table, sum(clock.seconds.values()), [])
    refuse_no_good_video(summary, len(job.records))
    return summary


def _count(features: FeatureFolder, records: Sequence[VideoRecord]) -> list[int]:
    """Frames of each row; 0 where it has no file."""
    files = [features.find_video(record.video_id) for record in records]
    return [len(_map(file)) if file.is_file() else 0 for file in files]


def _require_shapes(features: FeatureFolder, records: Sequence[VideoRecord], shape: tuple[int, ...]) -> None:
    """Refuse files of another backbone before anything is written."""
    for record in records:
        if (file := features.find_video(record.video_id)).is_file():
            open_features(file, shape)


def _open_writer(job: Job, features: FeatureFolder, shape: tuple[int, ...]) -> StoreWriter:
    if job.target.reader is not None:
        return resume_store(job.target.reader, job.spec)
    require_space(job.layout, sum(job.num_frames), job.config.out, replaces=True)
    codec = _fit(job, features, shape)
    spec = replace(job.spec, codec=codec, head=job.backbone.read_head())
    return create_store(job.config.out, spec, overwrite=job.config.overwrite)


class _FeatureTable:
    """Some frames' features for what fits a codec: a tower whose frames are numbers."""

    def __init__(self, tokens: torch.Tensor, info: BackboneInfo) -> None:
        self._tokens = tokens  # (n, L, N, D)
        self.info, self.device = info, tokens.device

    def encode_frames(self, pixels: torch.Tensor, layers: Iterable[int]) -> FrameTokens:
        """Of frames by their numbers, (B,)."""
        values = self._tokens[pixels]
        return FrameTokens(list(values.unbind(dim=1)), None, values[:, -1, 0])


def _fit(job: Job, features: FeatureFolder, shape: tuple[int, ...]) -> Codec:
    layout = job.layout
    if not wants_fit(job, layout):
        return AffineCodec(dtype=layout.patch_dtype)
    there = [record for record in job.records if features.find_video(record.video_id).is_file()]
    groups = group_for_calibration(there, job.config.seed)
    chosen = (groups[0] or there)[: job.config.calibration_videos]
    tokens, ids = [], []
    for record in chosen:
        values = open_features(features.find_video(record.video_id), shape)
        count = min(len(values), max(_FRAMES_PER_VIDEO, _SAMPLE_FRAMES // len(chosen)))
        places = np.linspace(0, len(values) - 1, count).astype(np.int64)
        tokens.append(np.asarray(values[places, :, 1:], dtype=np.float32))
        ids += [record.video_id] * count
    if not tokens:
        raise DataNotFoundError(f"{features.path} has features of none of the {len(job.records)} videos")
    table = _FeatureTable(torch.from_numpy(np.concatenate(tokens)), job.backbone.info)
    sample = FrameSample(np.arange(len(ids)), tuple(ids))
    return fit_patches(job, sample, table, layout)


def _write_shard(job: Job, writer: StoreWriter, features: FeatureFolder, shard: int, shape: tuple[int, ...]) -> None:
    tokens, results = {}, []
    head = job.backbone.read_head()
    for row in job.layout.shard_rows(shard):
        record = job.records[row]
        file = features.find_video(record.video_id)
        if not file.is_file():
            reason = f"missing-file: {file.parent.name}/{file.name}"
            results.append(VideoResult(video_id=record.video_id, status="failed", reason=reason))
            continue
        values = np.asarray(open_features(file, shape), dtype=np.float32)
        codes = [writer.codec.encode(values[:, place, 1:], place) for place in range(shape[0])]
        tokens[row] = RowTokens(
            patches=np.stack(codes, axis=1)[None],
            cls=values[None, :, :, 0].astype(job.layout.cls_dtype),
            embedding=embed(values[:, -1, 0], head)[None],
        )
        results.append(_describe_row(job, record, len(values)))
    writer.write_shard(shard, tokens, results)


def embed(cls: np.ndarray, head: dict[str, np.ndarray]) -> np.ndarray:
    """The embedding of frames, (T, E), of their class tokens behind the last block, (T, D): norm, then projection."""
    centred = cls - cls.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + head["norm_eps"])
    values = (normed * head["norm_weight"] + head["norm_bias"]) @ head["proj_weight"].T
    return (values + head.get("proj_bias", 0)).astype(np.float32)


def _describe_row(job: Job, record: VideoRecord, num_frames: int) -> VideoResult:
    """Of a video that nobody has decoded: frames are the middles of equal parts of its annotated length."""
    duration_s = next((moment.duration_s for moment in record.moments if moment.duration_s is not None), None)
    name = job.config.sampling_of_row(record)
    step_s = 1 / float(Fraction(name.removeprefix("fps:")))
    return VideoResult(
        video_id=record.video_id,
        status="ok",
        duration_s=duration_s,
        num_cached_frames=num_frames,
        num_views=1,
        timestamps_s=[(place + 0.5) * step_s for place in range(num_frames)],
        eval_clips=[list(range(num_frames))],
    )


def _take_words(features: FeatureFolder, job: Job, texts: list[str], made: Texts) -> Texts:
    """Texts with the released words in the place of our own, as far as there are files."""
    if made.layers is None:
        return made
    assert made.mask is not None
    query_of = {
        text: moment.query_id
        for record in job.records
        for text, moment in zip(record.captions, record.moments, strict=True)
    }
    layers = made.layers.copy()
    for place, text in enumerate(texts):
        file = features.find_query(query_of[text])
        if not file.is_file():
            continue
        values = open_features(file, (layers.shape[1], layers.shape[3]))
        count = int(made.mask[place].sum())
        if len(values) < count:
            raise StoreMismatchError(
                f"{file} has {len(values)} words and {text[:80]!r} has {count}: it is of another query or tokenizer"
            )
        layers[place, :, :count] = np.asarray(values[:count]).swapaxes(0, 1)
    return replace(made, layers=layers)
