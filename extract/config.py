"""What `s4v extract` can be told, checked before any work starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, EnvironmentFailedError
from ..store.layout import DEFAULT_CODEC, PATCH_DTYPES, PIXEL_ARRAYS, PatchDtype, PixelFormat
from ..store.offsets import SEEN_FRAME, PixelOffset, describe_offsets, order_offsets
from ..store.records import WHOLE, VideoRecord, count_augmented
from .datasets import (
    PLAIN_RECIPE,
    ExtractionRecipe,
    Listing,
    check_options,
    find_reader,
    read_listing,
    resolve_protocol,
)
from .decode.augmented_views import check_augmented_name, check_steps
from .decode.sampling import PIXEL_EDGES, SAMPLINGS, STEPPED_SAMPLINGS, check_sampling, is_open_ended, resolve_rate
from .decode.views import RESIZES, VIEWS, WHOLE_VIEWS

RECIPE_FIELDS = ("frames", "sampling", "clips", "validation_clip", "resize", "views", "augmentation")
"""Fields of a config that its data set's recipe fills in where nobody says otherwise."""
ALLOWED_LOSS_SHARE = 0.02
_MAX_TIMEOUT_S = 24 * 3600
_MOST_PIXELS = 2**14
"""Along one side of what a backbone sees."""
_FEWEST_WORDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """Everything that decides what a store holds, and how the machine at hand is used to make it."""

    model: str
    """`vit-e`, `vit-e-plus`, `vit-l`, `vit-b16`, `vit-b32`, `tiny-clip`, or any ViT of open_clip or timm.

    One of timm's is `vit_small_patch14_dinov2`; open_clip's must have a class token.
    """
    dataset: str
    """A data set's name (`k400`, `ssv2`, ...), `folder`, `lists` or `table`."""
    out: Path
    """The store to write. [store/DATASET.zarr]"""
    root: Path
    """Folder below which the videos lie. [data/DATASET]"""
    annotations: Path | None = None
    """A table, a list, or the folder of the annotation files. [below the root]"""
    columns: dict[str, str] = field(default_factory=dict)
    """For table: ROLE=NAME; roles are path, label, caption, split, id, start, end. Repeatable."""
    protocol: str | None = None
    """split1 to split3, 1k-A-9k, ...: see s4v datasets. [the data set's first]

    How the data set is divided, where papers divide it in several ways.
    """
    splits: tuple[str, ...] | None = None
    """Only this split. Repeatable.

    None takes all.
    """
    frames: dict[str, int] | None = None
    """Cached frames: 8, or by split; a bare number is for the rest.

    The key "" is for splits that are not named. None, here and below, takes what the store that is there was begun
    with; of a new one the data set's recipe.
    """
    with_classes: bool = True
    """For folder: an archive, whose folders are no classes; paths are ids.

    That is what False says: its option is `--no-classes`.
    """
    segment_s: float | None = None
    """Cut videos into rows of so many seconds, to search long ones. [one row]

    All rows of a video are about as long.
    """
    sampling: str | None = None
    """Which frames: uniform, dense, fps:2, all, reference-k400, -sth, -retrieval, -dist.

    `fps:X` and `all` take as many frames as a video is long; `fps:labels` takes one for each labelled clip.
    """
    clips: dict[str, int] | None = None
    """Evaluation clips, which share the frames; by split: test=4,1.

    They share them evenly. The key "" is for splits that are not named. Without `frames`, or the other way round, the
    one that is not given is not the recipe's: they belong together.
    """
    validation_clip: tuple[str, ...] | None = None
    """This split holds one clip more, which training validates on. Repeatable.

    It shares the frames too. Without it training validates on an evaluation clip.
    """
    resize: str | None = None
    """256: short side 256, crop 224. 256x320: that size. 224: the backbone's own. whole: all of it, padded."""
    views: dict[str, str] | None = None
    """centre, flip (with its mirror image), three, augment:N; by split: train=augment:4,centre.

    `augment:N` is the centre, and N views behind it that are drawn. The key "" is for splits that are not named.
    """
    augmentation: tuple[str, ...] | None = None
    """How augment:N draws: some of randaugment, crop, flip, grey. [the data set's]"""
    input_size: tuple[int, int] | None = None
    """HxW: frames of another size than the weights were made for, as 480x864, or N for a square. [the model's own]

    Multiples of the patch; positions are interpolated. None takes what the store that is there was begun with.
    """
    layers: str = "paper"
    """paper, all, last4, or 0-based blocks: 1,3,5."""
    dtype: PatchDtype = "int8"
    """Of stored patch tokens: int8, float16, float32."""
    channels: int | None = None
    """Stored channels of a token. [int8: at most 256; else all]

    K of a patch token.
    """
    cls: Literal["own", "mean"] = "own"
    """Class tokens: the model's own, where it has one, or mean: of patch tokens.

    Means stand in the place of class tokens for whatever reads those.
    """
    cls_dtype: PatchDtype | None = None
    """Of stored class tokens: int8, float16, float32. [float16; float32 beside float32]

    What is not the default of that is coded, as patches are.
    """
    cls_channels: int | None = None
    """Stored channels of a class token. [all; those of --codec-from]

    K of a class token, at most D.
    """
    codec: str = DEFAULT_CODEC
    """How tokens are coded, by name. [that of --codec-from]

    A name in the table of store/codecs.
    """
    codec_from: Path | None = None
    """Take the codec of this store instead of fitting one."""
    keep_bits: int | None = None
    """Mantissa bits (1 to 9) of float16 to keep, then compressed. [all, uncompressed]"""
    with_pixels: bool = True
    """Do not store frames.

    That is what False says: its option is `--no-pixels`. The side network's pixel stem needs them.
    """
    pixel_offsets: tuple[PixelOffset | int | str, ...] | None = None
    """Frames stored around each cached one: -2..2, or 0,0.5step. [0]

    A number counts frames of the source; `0.5step` is half the distance of a clip's frames. None takes those of the
    store that is there.
    """
    pixel_edge: str | None = None
    """Pixels before a row's first frame: clamp (the first again), wrap (the last ones). [clamp]

    TDS-CLIP's reader of Kinetics wraps. None takes the rule of the store that is there.
    """
    pixel_format: PixelFormat = "rgb"
    """Of stored frames: rgb, or ycbcr420 in half the bytes, at some loss.

    The loss is recorded; tokens are of the frames as they were.
    """
    text_layers: str | None = None
    """Store captions word by word after the text tower's last blocks too: last4. [no]

    A finished store gets them when its command is run again with this.
    """
    text_words: int | None = None
    """Keep so many words of a caption at most, start and end among them. [32]

    Where it is given, M is what the longest caption has.
    """
    class_template: str | None = None
    """Store class names as texts: "a video of {}", or "{}" for names alone. [no]

    A finished store gets them when its command is run again with this.
    """
    weights: str | None = None
    """A tag of open_clip's or timm's, a file, or random. [the model's own]"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """fp32, fp16, bf16. [fp32 on a CPU, fp16 on a GPU]

    Of the backbone's arithmetic.
    """
    batch_size: int = 16
    """Frames in one pass through the backbone."""
    with_compile: bool = False
    """torch.compile the backbone: minutes once."""
    num_decoders: int | None = None
    """Decoder processes. [one for each core]"""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """auto (decord, then PyAV), decord, pyav.

    PyAV is tried after a decord error.
    """
    decode_timeout_s: float = 60.0
    """CPU seconds beyond a video's own length."""
    allow_loss: float = ALLOWED_LOSS_SHARE
    """Share of its announced frames that a good video may lack; two may always be missing."""
    calibration_videos: int = 64
    """Training videos to fit the codec on."""
    seed: int = 0
    """Of split, calibration and random weights."""
    num_workers: int | None = None
    """Processes on this machine that share the work.

    A local Dask cluster, whose workers take shards; None works in this process.
    """
    scheduler: str | None = None
    """Dask scheduler whose workers share it: tcp://..."""
    prepare: bool = False
    """Write the empty store with its codec, and stop."""
    part: tuple[int, int] | None = None
    """I/N: only the I-th of N equal parts; then s4v merge.

    Of all shards; i from 1.
    """
    limit: int | None = None
    """Only the first N pending rows this time.

    Whole shards; None takes all.
    """
    retry_failed: bool = False
    """Decode failed videos anew.

    Their shards are done anew; what decodes by now is then in them.
    """
    redo_changed: bool = False
    """Do rows anew whose video was replaced since.

    Without it they keep what they have.
    """
    brake: int = 50
    """Stop when so many videos in a row are lost to the machine."""
    repair: bool = False
    """Verify the store first; do anew what is damaged."""
    append: bool = False
    """Add videos that are new, at the store's end."""
    overwrite: bool = False
    """Replace the store."""
    recipe: ExtractionRecipe = field(init=False, repr=False, compare=False)
    """What is cached of a row: what was given, and the rest as the data set has it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", self._find_recipe())
        if self.codec != DEFAULT_CODEC:
            from ..store.codecs import CODECS  # a fifth of a second, for those who ask for another one

            if self.codec not in CODECS:
                raise ConfigError(f"--codec takes {', '.join(CODECS)}; found {self.codec!r}")
        recipe = self.recipe
        check_sampling(recipe.sampling)
        if self.is_open_ended:
            self._refuse_shares()
        else:  # refuses clips that it does not have
            SAMPLINGS[recipe.sampling](1, 1, max(recipe.clips.values(), default=1))
        self._check_pictures()
        _check_choice("--dtype", self.dtype, PATCH_DTYPES)
        _check_choice("--cls", self.cls, ("own", "mean"))
        if self.cls_dtype is not None:
            _check_choice("--cls-dtype", self.cls_dtype, PATCH_DTYPES)
        _check_choice("--decoder", self.decoder, ("auto", "decord", "pyav"))
        if self.precision is not None:
            _check_choice("--precision", self.precision, ("fp32", "fp16", "bf16"))
        at_least_one = {
            "--batch-size": self.batch_size,
            "--decoders": self.num_decoders,
            "--limit": self.limit,
            "--workers": self.num_workers,
            "--calibration-videos": self.calibration_videos,
            "--channels": self.channels,
            "--cls-channels": self.cls_channels,
            "--brake": self.brake,
        }
        for name, count in at_least_one.items():
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be at least 1; found {count}")
        if self.keep_bits is not None and (self.dtype != "float16" or not 1 <= self.keep_bits <= 9):
            raise ConfigError(
                f"--keep-bits takes 1 to 9 of the ten mantissa bits of --dtype float16; found {self.keep_bits} "
                f"with --dtype {self.dtype}"
            )
        if not 0 < self.decode_timeout_s <= _MAX_TIMEOUT_S:
            raise ConfigError(
                f"--decode-timeout takes seconds above 0, at most {_MAX_TIMEOUT_S}; found {self.decode_timeout_s:g}"
            )
        if not 0 <= self.allow_loss <= 1:
            raise ConfigError(f"--allow-loss takes a share from 0 to 1; found {self.allow_loss:g}")
        if self.segment_s is not None and not 1 <= self.segment_s < math.inf:
            raise ConfigError(f"--segment takes seconds, at least 1; found {self.segment_s:g}")
        if self.num_workers is not None and self.scheduler is not None:
            raise ConfigError("--workers starts a cluster here, --scheduler joins one that is there: take one of them")
        if self.append and self.overwrite:
            raise ConfigError("--append keeps what is there, --overwrite replaces it: take one of them")
        if self.append and self.repair:
            raise ConfigError("--repair mends the rows that are there: run it first, without --append")
        self._check_texts()
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ConfigError(f"--part takes I/N with I from 1 to N; found {self.part[0]}/{self.part[1]}")
        self._check_offsets()
        check_options(self.dataset, annotations=self.annotations, columns=self.columns, with_classes=self.with_classes)
        resolve_protocol(self.dataset, self.protocol)

    def _check_texts(self) -> None:
        if self.text_words is not None and self.text_words < _FEWEST_WORDS:
            raise ConfigError(
                f"--text-words counts start and end, so it must be at least {_FEWEST_WORDS}; found {self.text_words}"
            )
        _ = self.num_text_layers  # refuses what is no number of blocks
        if self.class_template is not None and "{}" not in self.class_template:
            raise ConfigError(
                f"--class-template must hold {{}}, the place of a class's name; found {self.class_template!r}"
            )

    @property
    def num_text_layers(self) -> int | None:
        """How many of the text tower's last blocks are asked for; None where none are.

        Raises:
            ConfigError: If `text_layers` says otherwise.
        """
        if self.text_layers is None:
            return None
        digits = self.text_layers.removeprefix("last")
        if not (digits.isascii() and digits.isdecimal() and int(digits[:6]) > 0):
            raise ConfigError(f"--text-layers takes last4, or a number of blocks; found {self.text_layers!r}")
        return int(digits[:6])

    def read_records(self, known_splits: Mapping[str, str] | None = None) -> list[VideoRecord]:
        """The data set's videos in row order: the records of `read_listing`."""
        return self.read_listing(known_splits).records

    def read_listing(self, known_splits: Mapping[str, str] | None = None, *, expects_videos: bool = True) -> Listing:
        """The data set's videos in row order, and which of them were not on the disk.

        Args:
            known_splits: Split by video_id of a store that is gone on with: where the data set says no split, its rows
                keep theirs.
            expects_videos: Whether a warning counts those that are not there.

        Raises:
            DatasetError: If its files are not what a reader takes.
        """
        return read_listing(
            self.dataset,
            self.root,
            annotations=self.annotations,
            columns=self.columns,
            protocol=self.protocol,
            splits=self.splits,
            seed=self.seed,
            known_splits=known_splits,
            with_classes=self.with_classes,
            expects_videos=expects_videos,
        )

    def require_root(self) -> None:
        """Stop where the folder of the videos has disappeared: unmounted, it would make failed rows of all that follow.

        Raises:
            EnvironmentFailedError: If it is not there, or empty as a mount point is.
        """
        if not (self.root.is_dir() and any(self.root.iterdir())):
            raise EnvironmentFailedError(
                f"{self.root} is gone, with all its videos (unmounted?). Stopped before they become failed rows; "
                "what is finished is kept. Bring it back and run the same command again."
            )

    def find_part(self, num_shards: int) -> range:
        """The shards that are this run's: all of so many, or those of its part."""
        part, num_parts = self.part or (1, 1)
        return range((part - 1) * num_shards // num_parts, part * num_shards // num_parts)

    @property
    def is_open_ended(self) -> bool:
        """Whether rows hold as many frames as they are long, and not a number of their split's."""
        return is_open_ended(self.recipe.sampling)

    def frames_of(self, split: str) -> int:
        """Frames that a row of this split caches, where that does not depend on its length.

        Raises:
            ConfigError: If `--frames` names other splits only.
        """
        by_split = self.recipe.frames
        frames = by_split.get(split, by_split.get(""))
        if frames is None:
            raise ConfigError(
                f"--frames names {', '.join(sorted(by_split))}, but there is a split {split!r}: add {split}=N"
            )
        clips, validation = self.clips_of(split), self.validation_clips_of(split)
        if frames % (clips + validation):
            more = " and the one that training validates on (--validation-clip)" if validation else ""
            raise ConfigError(
                f"the {frames} frames of split {split!r} (--frames) cannot be shared evenly by {clips} clips "
                f"(--clips){more}"
            )
        return frames

    def clips_of(self, split: str) -> int:
        """Evaluation clips of a row of this split: of training rows all cached frames are one."""
        return 1 if split == "train" else self.recipe.clips.get(split, self.recipe.clips.get("", 1))

    def validation_clips_of(self, split: str) -> int:
        """1 where a row of this split holds a clip of its own for training's validation, else 0."""
        return int(split != "train" and split in self.recipe.validation_clip)

    def sampling_of(self, split: str) -> str:
        """Which frames of this split are cached: of training rows, of which clips take parts, uniform or dense ones."""
        sampling = self.recipe.sampling
        is_drawn = sampling != "dense" and not self.is_open_ended
        return PLAIN_RECIPE.sampling if split == "train" and is_drawn else sampling

    def sampling_of_row(self, record: VideoRecord) -> str:
        """The same of one row: of `fps:labels` with its own rate.

        Raises:
            ConfigError: If a frame for each labelled clip is asked for and the row has none.
        """
        clip_s = next((moment.clip_s for moment in record.moments if moment.clip_s is not None), None)
        return resolve_rate(self.sampling_of(record.split), record.video_id, clip_s)

    @property
    def cached_offsets(self) -> tuple[PixelOffset, ...]:
        """Of the pixels around each cached frame, in the store's order."""
        return (SEEN_FRAME,) if self.pixel_offsets is None else order_offsets(self.pixel_offsets)

    @property
    def cached_edge(self) -> str:
        """In `PIXEL_EDGES`: what stands before a row's first frame."""
        return PIXEL_EDGES[0] if self.pixel_edge is None else self.pixel_edge

    def _check_offsets(self) -> None:
        offsets = self.cached_offsets
        _check_choice("--pixel-format", self.pixel_format, PIXEL_ARRAYS)
        if not self.with_pixels and self.pixel_format != "rgb":
            raise ConfigError(
                f"--no-pixels stores no frames, --pixel-format {self.pixel_format} says how: take one of them"
            )
        if not self.with_pixels and offsets != (SEEN_FRAME,):
            raise ConfigError(
                f"--no-pixels stores no frames, --pixel-offsets {describe_offsets(offsets)} several of each: take one "
                "of them"
            )
        if self.pixel_edge is not None:
            _check_choice("--pixel-edge", self.pixel_edge, PIXEL_EDGES)
        if self.pixel_edge == "wrap" and self.pixel_offsets is not None and offsets == (SEEN_FRAME,):
            raise ConfigError("--pixel-edge wrap has no effect without --pixel-offsets: leave it out, or name some")
        steps = [offset for offset in offsets if offset.unit == "step"]
        if steps and self.recipe.sampling not in STEPPED_SAMPLINGS:
            raise ConfigError(
                f"--pixel-offsets {describe_offsets(steps)} is a share of the distance between a clip's frames, which "
                f"--sampling {self.recipe.sampling} does not keep: name frames of the source, such as -2..2, or take "
                "--sampling uniform"
            )

    def views_of(self, split: str) -> str:
        """The name of the views of a row of this split."""
        return self.recipe.views.get(split, self.recipe.views.get("", "centre"))

    def sampled_views_of(self, split: str) -> str:
        """The name of the views of this split that a codec is fitted and measured on: the centre, and drawn ones."""
        name = self.views_of(split)
        return name if count_augmented(name) else "centre"

    def _require_training_split(self) -> None:
        """Refuse drawn views of rows that something is evaluated on."""
        views = self.recipe.views
        if evaluated := sorted(split for split, name in views.items() if split != "train" and count_augmented(name)):
            name = views[evaluated[0]]
            which = ", ".join(split or "all splits that are not named" for split in evaluated)
            raise ConfigError(
                f"--views {name} is for the split train, whose clips are trained on; found it for {which}. "
                f"Take --views train={name},centre"
            )

    def _refuse_shares(self) -> None:
        """Rows that are as long as their videos are not shared out."""
        shares = {"--frames": self.recipe.frames, "--validation-clip": self.recipe.validation_clip}
        given = [name for name, value in shares.items() if value]
        if set(self.recipe.clips.values()) != {1}:
            given.append("--clips")
        if given:
            raise ConfigError(
                f"--sampling {self.recipe.sampling} takes as many frames as a video is long, in one clip: leave out "
                f"{', '.join(given)}"
            )

    def _check_pictures(self) -> None:
        """Refuse resizes, views and sizes that there are not, or that do not go together."""
        recipe = self.recipe
        _check_choice("--resize", recipe.resize, RESIZES)
        for name in recipe.views.values():
            check_augmented_name(name)
            if not count_augmented(name):
                _check_choice("--views", name, [*VIEWS, "augment:N"])
        self._require_training_split()
        check_steps(recipe.augmentation)
        if recipe.resize == WHOLE and (cut := sorted(set(recipe.views.values()) - WHOLE_VIEWS)):
            raise ConfigError(
                f"--resize {WHOLE} shows all of a frame: there is nothing for --views {', '.join(cut)} to cut. Take "
                f"--views {' or '.join(sorted(WHOLE_VIEWS))}."
            )
        if not find_reader(self.dataset).may_be_mirrored and "flip" in recipe.views.values():
            raise ConfigError("--views flip would turn left into right, and these classes too: take three or centre")
        if self.input_size is not None and not all(1 <= side <= _MOST_PIXELS for side in self.input_size):
            height, width = self.input_size
            raise ConfigError(f"--input takes 1 to {_MOST_PIXELS} pixels a side; found {height}x{width}")

    def _find_recipe(self) -> ExtractionRecipe:
        recipe = find_reader(self.dataset).recipe
        if self.sampling is not None and is_open_ended(self.sampling):
            recipe = replace(recipe, frames={}, clips={"": 1}, validation_clip=())
        elif (self.frames, self.clips) != (None, None) or (self.sampling and is_open_ended(recipe.sampling)):
            plain = {name: getattr(PLAIN_RECIPE, name) for name in ("frames", "clips", "validation_clip")}
            recipe = replace(recipe, **plain)
        given = {name: value for name in RECIPE_FIELDS if (value := getattr(self, name)) is not None}
        return replace(recipe, **given)


def _check_choice(option: str, value: str, choices: object) -> None:
    known = list(choices)  # type: ignore[call-overload]
    if value not in known:
        raise ConfigError(f"{option} takes {', '.join(known)}; found {value!r}")
