"""Clips for training and evaluation: which rows and frames, read ahead by threads, handed over as tensors."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from ..errors import ConfigError, StoreDamagedError, StoreMismatchError
from ..files import hash_text
from ..store.codecs.contract import Codec
from ..store.offsets import PixelOffset, describe_offsets
from ..store.reader import Clips, StoreReader, pad_places
from ..store.texts import TextReader, Texts
from .bad_rows import BadRows
from .choices import TrainedViews
from .host_memory import HostMemory
from .mixing import MixedLabels, Mixer, Mixing
from .networks.contract import Network
from .networks.text_interaction import TextBatch
from .order import ShardWindow, draw_order
from .pixel_decoding import decode_ycbcr420
from .shard_prefetch import ShardPrefetch
from .transfer import Streams, WaitMeter, copy_ahead, find_streams, time_waiting

_log = logging.getLogger(__name__)

_BATCHES_AHEAD = 3
READ_AHEAD_BYTES = 2**30
"""Of batches that are read, or read ahead of their step; those of a GPU are pinned memory."""
DEFAULT_CLIP_FRAMES = 8
_MOST_PASSED = 2
"""So often a batch whose damage was gone when it was looked for is read again."""
_BATCHES_SORTED = 16
"""So many batches' worth of rows are put in the order of their lengths."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A batch as it comes from the store."""

    clips: Clips
    texts: Texts | None
    labels: np.ndarray
    is_frame: np.ndarray | None
    """(B, T); None where all are."""
    draws: np.ndarray | None


@cache
def _reading_threads() -> ThreadPoolExecutor:
    """Of this process, whoever reads."""
    return ThreadPoolExecutor(2, thread_name_prefix="s4v-read")


@cache
def _host_memory() -> HostMemory:
    """Of this process, so that what one epoch read into is there for the next."""
    return HostMemory(READ_AHEAD_BYTES)


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """All clips of an epoch in their order (n videos, v views of each): what stands in for one that cannot be read."""

    rows: np.ndarray
    """(n,)"""
    views: np.ndarray
    """(n, v)"""
    num_views: np.ndarray
    """(n,) how many of them there are."""
    places: np.ndarray
    """(n, v, T)"""
    labels: np.ndarray
    """(n, v)"""


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """One batch before it is read."""

    rows: np.ndarray
    """(B,) rows of the store."""
    views: np.ndarray
    """(B,) on the axis A."""
    places: np.ndarray
    """(B, T) places on the axis F; -1 is no frame, behind the last one of a clip that is shorter than others."""
    labels: np.ndarray
    """(B,); for retrieval the captions, by their rows."""
    order: EpochOrder | None = None
    """That it is of; None where no other clip may stand in for one."""
    positions: np.ndarray | None = None
    """(B, 2) each clip's video in that order, and which of its views."""
    partners: np.ndarray | None = None
    """(n,) places of the clips that each of the first n is mixed with; the others are read for that alone."""
    mixing: Mixing | None = None
    """How; None where there are no partners."""
    draws: np.ndarray | None = None
    """(B,) int64 keys of what is drawn for each clip (train/networks/draws.py); a substitute has its clip's."""

    @property
    def num_clips(self) -> int:
        """That a head is shown; not those that are mixed into them alone."""
        return len(self.rows if self.partners is None else self.partners)

    def moved_on(self, steps: np.ndarray) -> ClipPlan:
        """The same, with clips of later videos of the order in place of some.

        Args:
            steps: (B,) how far behind a clip's own video that of its substitute stands; 0 keeps it.
        """
        if not steps.any():
            return self
        assert self.order is not None and self.positions is not None
        at, number = (self.positions[:, 0] + steps) % len(self.order.rows), self.positions[:, 1]
        at = at, np.where(steps > 0, np.minimum(number, self.order.num_views[at] - 1), number)
        order = self.order
        return replace(self, rows=order.rows[at[0]], views=order.views[at], places=order.places[at],
                       labels=order.labels[at])  # fmt: skip

    def take(self, clip: int) -> ClipPlan:
        """One of the clips alone."""
        own = slice(clip, clip + 1)
        return ClipPlan(self.rows[own], self.views[own], self.places[own], self.labels[own])


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """One batch as a head takes it; arrays that the head does not read are None."""

    pixels: torch.Tensor | None
    """(B, T, 3, H, W) float32, of several offsets (B, T, O, 3, H, W), normalised as for the backbone."""
    patches: torch.Tensor | None
    """(B, T, L, N, K) codes; floats where they are between those of two clips."""
    cls: torch.Tensor | None
    """(B, T, L, D) float32."""
    labels: torch.Tensor
    """(B,); for retrieval the captions."""
    texts: TextBatch | None = None
    """Of those captions."""
    frame_mask: torch.Tensor | None = None
    """(B, T) bool, which frames there are; the others are zeros in all arrays. None where all are."""
    draws: torch.Tensor | None = None
    """(B,) int64, keys of what is drawn for each clip; None where the network draws nothing by example."""
    mixed: MixedLabels | None = None
    """What else the clips show; None where they are not mixed."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that there are."""
        texts = () if self.texts is None else self.texts.arrays
        mixed = () if self.mixed is None else (self.mixed.labels, self.mixed.shares)
        own = (self.pixels, self.patches, self.cls, self.labels, self.frame_mask, self.draws)
        for tensor in (*own, *texts, *mixed):
            if tensor is not None:
                yield tensor


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """The good, labelled rows of a split; for retrieval each row once for each of its captions."""

    rows: np.ndarray
    labels: np.ndarray
    """For retrieval the captions, by their rows."""
    num_cached_frames: np.ndarray
    num_views: np.ndarray
    eval_clips: list[list[list[int]]]
    centre_views: np.ndarray | None = None
    """(n,) the view of each row that is the centre of the picture; None is the first."""
    validation_clips: list[list[int] | None] | None = None
    """The clip of each row that training validates on, where it is none of `eval_clips`."""
    sampling: str = "uniform"
    """How the clips were chosen."""
    shows_centre_alone: bool = False
    """Whether an evaluation looks at the centre view of a row, not at all of them."""
    view_labels: np.ndarray | None = None
    """(n, A) the label of each view of a row in training, -1 of one that is not trained on; None where every view that
    there is has the row's."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> LabelledRows:
        """Some of them, in the order of their places."""
        return replace(
            self,
            rows=self.rows[places],
            labels=self.labels[places],
            num_cached_frames=self.num_cached_frames[places],
            num_views=self.num_views[places],
            eval_clips=[self.eval_clips[place] for place in places],
            centre_views=None if self.centre_views is None else self.centre_views[places],
            validation_clips=self.validation_clips and [self.validation_clips[place] for place in places],
            view_labels=None if self.view_labels is None else self.view_labels[places],
        )

    @property
    def labels_by_view(self) -> np.ndarray:
        """(n, A) `view_labels`, whatever there is."""
        if self.view_labels is not None:
            return self.view_labels
        is_there = np.arange(int(self.num_views.max(initial=1))) < self.num_views[:, None]
        return np.where(is_there, self.labels[:, None], -1)

    @property
    def num_trained_views(self) -> np.ndarray:
        """(n,) views of each row that training takes clips of."""
        return (self.labels_by_view >= 0).sum(axis=1)


_ROW_COLUMNS = ["num_cached_frames", "num_views", "eval_clips", "validation_clip"]

_VIEW_COLUMNS = ["views", "augmentations"]

_FIRST_CLIP_ALONE = frozenset({"reference-k400"})
"""Samplings whose first clip of several is the one that they make where they make one; of others the middle one is."""


def find_labelled_rows(store: StoreReader, split: str) -> LabelledRows:
    """The rows of a split that decoded and have a label; none is no error here."""
    table = store.read_manifest(["split", "status", "label", *_columns_of(store, split)])
    is_of_split = pyarrow.compute.and_(
        pyarrow.compute.and_(
            pyarrow.compute.equal(table["split"], split), pyarrow.compute.equal(table["status"], "ok")
        ),
        pyarrow.compute.is_valid(table["label"]),
    )
    rows = np.flatnonzero(is_of_split.to_numpy())
    own = table.take(rows)
    return _make_rows(rows, own["label"].to_numpy().astype(np.int64), own, store, split, store.classes.names)


def find_captioned_rows(store: StoreReader, split: str) -> LabelledRows:
    """The captions of a split's good rows, each with its row, in the order of the captions."""
    columns = _columns_of(store, split)
    table = store.read_manifest(["video_id", "split", "status", *columns])
    is_wanted = pyarrow.compute.and_(
        pyarrow.compute.equal(table["split"], split), pyarrow.compute.equal(table["status"], "ok")
    ).to_numpy()
    row_of = {video_id: row for row, video_id in enumerate(table["video_id"].to_pylist()) if is_wanted[row]}
    owners = [row_of.get(video_id, -1) for video_id in store.read_captions()["video_id"].to_pylist()]
    rows = np.asarray(owners, dtype=np.int64)
    captions = np.flatnonzero(rows >= 0)
    rows = rows[captions]
    return _make_rows(rows, captions, table.select(columns).take(rows), store, split)


def _columns_of(store: StoreReader, split: str) -> list[str]:
    """Columns of the manifest that say what clips of a row there are; the views where they are not alike."""
    return [*_ROW_COLUMNS, *_VIEW_COLUMNS] if store.facts.is_augmented(split) else _ROW_COLUMNS


def label_views(table: pa.Table, labels: np.ndarray, class_names: Sequence[str] | None) -> np.ndarray:
    """The label of each view of rows whose views were drawn.

    A mirror image may show another class. Where the store has no such class, the view is not trained on. Nor is it
    beside captions, which may tell left from right or name colours, where anything but a crop was drawn.

    Args:
        table: Columns views and augmentations of the manifest.
        labels: (n,) of the rows.
        class_names: In label order; None where labels are captions.

    Returns:
        (n, A) labels, -1 of views that are not trained on.
    """
    views, drawn = (_place_entries(table[name]) for name in _VIEW_COLUMNS)
    by_view = np.full(
        (len(table), int(max(views.places.max(initial=0), drawn.places.max(initial=0))) + 1), -1, np.int64
    )
    by_view[views.rows, views.places] = labels[views.rows]
    if class_names is not None:
        shown = pyarrow.compute.struct_field(drawn.values, "class_name")
        known = pyarrow.compute.index_in(shown, pa.array(class_names, pa.string())).fill_null(-1).to_numpy()
        is_other = shown.is_valid().to_numpy()
        by_view[drawn.rows[is_other], drawn.places[is_other]] = known[is_other]
        return by_view
    is_flipped = pyarrow.compute.struct_field(views.values, "flip").fill_null(False).to_numpy()
    by_view[views.rows[is_flipped], views.places[is_flipped]] = -1
    is_grey = pyarrow.compute.struct_field(drawn.values, "grey").fill_null(False).to_numpy()
    operations = pyarrow.compute.struct_field(drawn.values, "operations")
    is_changed = is_grey | (pyarrow.compute.list_value_length(operations).fill_null(0).to_numpy() > 0)
    by_view[drawn.rows[is_changed], drawn.places[is_changed]] = -1
    return by_view


class _Entries(NamedTuple):
    """The entries of a column of lists, one after the other."""

    values: pa.ChunkedArray
    rows: np.ndarray
    """Of each entry."""
    places: np.ndarray
    """In its row's list."""


def _place_entries(column: pa.ChunkedArray) -> _Entries:
    """Of a million rows at once: dicts of them would take minutes."""
    lengths = pyarrow.compute.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return _Entries(pyarrow.compute.list_flatten(column), rows, np.arange(lengths.sum()) - starts[rows])


def take_trained_views(data: LabelledRows, wanted: TrainedViews, store: StoreReader, split: str) -> LabelledRows:
    """The same rows, of which training takes clips of some views alone.

    Args:
        data: Rows of one split.
        wanted: `all`, the `centre`, or those that were drawn (`augmented`).
        store: Theirs.
        split: Theirs.

    Raises:
        StoreMismatchError: If they have no views that were drawn, or a row has none that it can be trained on.
    """
    if wanted == "augmented" and not store.facts.is_augmented(split):
        raise StoreMismatchError(
            f"--train-views augmented: rows of split {split!r} of {store.path} have the views "
            f"{store.facts.views_of(split)}, of which none is drawn. Extract with --views {split}=augment:4,centre."
        )
    by_view = data.labels_by_view
    _, firsts = np.unique(data.rows, return_index=True)  # a row stands there once for each of its captions
    if num_lost := int(data.num_views[firsts].sum() - data.num_trained_views[firsts].sum()):
        _log.warning(
            "%d of %d views of %s are not trained on: they show a class that the store does not have (mirrored), or "
            "something else than their captions say",
            *(num_lost, int(data.num_views[firsts].sum()), store.path),
        )
    if wanted == "all" or not len(data):
        return data
    centre = store.facts.centre_view(split)
    is_wanted = (np.arange(by_view.shape[1]) == centre) == (wanted == "centre")
    by_view = np.where(is_wanted, by_view, -1)
    if (is_lost := (by_view < 0).all(axis=1)).any():
        raise StoreMismatchError(
            f"{int(is_lost.sum())} training rows of {store.path} have no drawn view that they can be trained on, such "
            f"as row {int(data.rows[is_lost][0])}: train with --train-views all"
        )
    return replace(data, view_labels=by_view)


def _make_rows(
    rows: np.ndarray,
    labels: np.ndarray,
    table: pa.Table,
    store: StoreReader,
    split: str,
    class_names: Sequence[str] | None = None,
) -> LabelledRows:
    return LabelledRows(
        rows,
        labels,
        table["num_cached_frames"].to_numpy().astype(np.int64),
        table["num_views"].to_numpy().astype(np.int64),
        table["eval_clips"].to_pylist(),
        np.full(len(rows), store.facts.centre_view(split)),
        table["validation_clip"].to_pylist(),
        store.facts.sampling,
        shows_centre_alone=store.facts.is_augmented(split),
        view_labels=label_views(table, labels, class_names) if "views" in table.column_names else None,
    )


def leave_out_short_videos(data: LabelledRows, store: StoreReader, min_frames: int) -> LabelledRows:
    """The rows whose videos have so many frames or more; of what is cached all rows may hold as many.

    Args:
        data: Which rows.
        store: Theirs.
        min_frames: Frames of a video, as its decoder counted them.

    Raises:
        StoreMismatchError: If no row is left.
    """
    if not min_frames or not len(data):
        return data
    counts = store.read_manifest(["num_frames"])["num_frames"].take(data.rows)
    # A row whose video nobody counted stays: nothing says that it is short.
    is_short = pyarrow.compute.fill_null(pyarrow.compute.less(counts, min_frames), False).to_numpy()
    if is_short.all():
        raise StoreMismatchError(
            f"every training video of {store.path} has fewer than {min_frames} frames (--min-video-frames): none is "
            "left. --min-video-frames 0 takes them all."
        )
    return data.take(np.flatnonzero(~is_short)) if is_short.any() else data


def hold_out_rows(
    data: LabelledRows, store: StoreReader, share: float, *, seed: int, by_class: bool
) -> tuple[LabelledRows, LabelledRows]:
    """Split rows into those to train on and a share that is held out; segments of one video stay together.

    A pure function of the videos' names and the seed: in the order of their hashes, class after class, every so-manieth
    video is held out.

    Args:
        data: Which rows.
        store: Theirs.
        share: Of the videos; at least one is held out.
        seed: Which of them.
        by_class: Whether labels are classes, of which each gives its share.

    Raises:
        StoreMismatchError: If there are fewer than two videos.
    """
    table = store.read_manifest(["path", "source_id"])
    paths, sources = (table[name].take(data.rows).to_pylist() for name in ("path", "source_id"))
    names = [source if source is not None else path for path, source in zip(paths, sources, strict=True)]
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    if len(first) < 2:
        raise StoreMismatchError(f"{store.path} has one good training video: nothing of it can be held out")
    label = {name: int(data.labels[place]) if by_class else 0 for name, place in first.items()}
    order = sorted(first, key=lambda name: (label[name], hash_text(f"{seed}:{name}")))
    steps = np.floor(np.arange(len(order) + 1) * share + 0.5 + 1e-9)
    places = np.flatnonzero(np.diff(steps)) if steps[-1] else np.array([len(order) // 2])
    held_out = {order[place] for place in places}
    is_held = np.array([name in held_out for name in names])
    return data.take(np.flatnonzero(~is_held)), data.take(np.flatnonzero(is_held))


def take_validation_clips(data: LabelledRows) -> LabelledRows:
    """The same rows, each with the one clip that training validates on, of its centre view alone.

    That is the clip which the store holds for it, else the evaluation clip nearest to what the rule makes one clip of.
    """

    def nearest(clips: list[list[int]]) -> list[int]:
        return clips[0 if data.sampling in _FIRST_CLIP_ALONE else (len(clips) - 1) // 2]

    own_clips = data.validation_clips or [None] * len(data)
    clips = [[own or nearest(clips)] for own, clips in zip(own_clips, data.eval_clips, strict=True)]
    return replace(data, eval_clips=clips, shows_centre_alone=True)


def take_first_clips(data: LabelledRows) -> LabelledRows:
    """The same rows, each with its first evaluation clip, of its centre view alone."""
    return replace(data, eval_clips=[clips[:1] for clips in data.eval_clips], shows_centre_alone=True)


def resolve_clip_frames(
    wanted: int | None, available: np.ndarray, store: StoreReader, default: int = DEFAULT_CLIP_FRAMES
) -> int:
    """T: what was asked for if every row holds as many frames, else the default or the fewest that a row holds.

    Rows that are as long as their videos may be shorter: clips of those show frames twice.

    Raises:
        StoreMismatchError: If a row holds fewer frames than were asked for.
    """
    fewest = int(available.min())
    if store.facts.is_open_ended:
        return wanted or default
    if wanted is None:
        return min(default, fewest)
    if wanted > fewest:
        raise StoreMismatchError(
            f"a clip of {wanted} frames was asked for, rows of {store.path} hold as few as {fewest}. "
            f"Use --frames {fewest}, or extract with more frames."
        )
    return wanted


def plan_training_epoch(
    data: LabelledRows,
    *,
    num_frames: int,
    batch_size: int,
    seed: int,
    epoch: int,
    views_per_video: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
    window: ShardWindow | None = None,
) -> list[ClipPlan]:
    """The batches of one epoch: a pure function of rows, seed, epoch and window, so that its rest can be trained later.

    A clip takes one random frame of each of T equal parts of the cached ones; where those are fewer, some stand for
    several parts. What does not fill a step is left out of this epoch, unless there is no full step.

    Args:
        data: Which videos.
        num_frames: T.
        batch_size: Clips in a step of one rank.
        seed: Of the run.
        epoch: From 0.
        views_per_video: Different views of a video that stand side by side in a step, each with frames of its own;
            all where a row has fewer.
        rank: Of this process: in each step every rank takes clips of its own.
        num_ranks: Processes that train together.
        window: Shards that are mixed at a time; None mixes all.

    Raises:
        ConfigError: If there are fewer videos than ranks, or more views than clips in a step.
    """
    if num_ranks > len(data):
        raise ConfigError(f"{num_ranks} processes cannot share {len(data)} training videos: start fewer")
    if views_per_video > batch_size:
        raise ConfigError(
            f"a step of {batch_size} clips cannot hold {views_per_video} views of one video: raise --batch-size"
        )
    generator = np.random.default_rng([seed, epoch])
    order = draw_order(data.rows, generator, window)
    bounds = np.arange(num_frames + 1) * data.num_cached_frames[:, None] // num_frames
    first, stop = bounds[:, :-1], np.maximum(bounds[:, 1:], bounds[:, :-1] + 1)
    places = np.stack([generator.integers(first, stop) for _ in range(views_per_video)], axis=1)
    # A random order of each row's views, those that it is not trained on last.
    labels, num_views = data.labels_by_view, data.num_trained_views
    chances = generator.random(labels.shape)
    chances[labels < 0] = 2
    views = chances.argsort(axis=1)[:, :views_per_video]
    size = min(batch_size // views_per_video, len(order) // num_ranks)
    whole = EpochOrder(
        rows=data.rows[order],
        views=views[order],
        num_views=np.minimum(num_views, views.shape[1])[order],
        places=places[order],
        labels=np.take_along_axis(labels, views, axis=1)[order],
    )
    plans = []
    for begin in range(0, len(order) - size * num_ranks + 1, size * num_ranks):
        first = begin + rank * size
        which, view = np.nonzero(np.arange(views.shape[1]) < whole.num_views[first : first + size, None])
        at = first + which, view
        plans.append(
            ClipPlan(
                *(whole.rows[at[0]], whole.views[at], whole.places[at], whole.labels[at]),
                order=whole,
                positions=np.stack(at, axis=1),
            )
        )
    return plans


def plan_evaluation(
    data: LabelledRows, *, num_frames: int, batch_size: int, num_clips: int | None = None
) -> tuple[list[ClipPlan], np.ndarray]:
    """The batches of an evaluation, and for each clip the place of its video in `data`.

    All views of a clip are looked at, unless the centre alone is shown.

    Args:
        data: Which videos.
        num_frames: T.
        batch_size: Clips in a batch.
        num_clips: Clips spread over each video's cached frames; None takes the evaluation clips that the store
            recorded, each thinned to T frames.
    """
    owners: list[int] = []
    views: list[int] = []
    places: list[list[int]] = []
    for video, count in enumerate(data.num_cached_frames):
        if num_clips is None:
            clips = [thin(clip, num_frames) for clip in data.eval_clips[video]]
        else:
            clips = spread_clips(int(count), num_frames, num_clips)
        for view in _views_of(data, video):
            owners += [video] * len(clips)
            views += [view] * len(clips)
            places += clips
    owner, every_view, place = np.asarray(owners), np.asarray(views), np.asarray(places)
    parts = [slice(first, first + batch_size) for first in range(0, len(owner), batch_size)]
    plans = [ClipPlan(data.rows[owner[p]], every_view[p], place[p], data.labels[owner[p]]) for p in parts]
    return plans, owner


def plan_whole_rows(data: LabelledRows, *, batch_size: int, seed: int, epoch: int) -> list[ClipPlan]:
    """Batches of all frames of each row, of its centre view, padded behind the shorter ones.

    Rows of like length stand together: of each few batches' worth, drawn at random, the order is that of their lengths;
    the batches then come in a random order. A pure function of rows, seed and epoch.

    Args:
        data: Which videos.
        batch_size: Rows in a batch; the last one may have fewer.
        seed: Of the run.
        epoch: From 0.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(data))
    window = _BATCHES_SORTED * batch_size
    batches = []
    for begin in range(0, len(order), window):
        drawn = order[begin : begin + window]
        drawn = drawn[np.argsort(data.num_cached_frames[drawn], kind="stable")]
        batches += [drawn[first : first + batch_size] for first in range(0, len(drawn), batch_size)]
    views = np.array([_centre_of(data, video) for video in range(len(data))], dtype=np.int64)
    plans = []
    for number in generator.permutation(len(batches)):
        own = batches[number]
        places = pad_places([range(count) for count in data.num_cached_frames[own]])
        plans.append(ClipPlan(data.rows[own], views[own], places, data.labels[own]))
    return plans


def _centre_of(data: LabelledRows, video: int) -> int:
    """The view of a row that shows the centre of the picture as it is."""
    return 0 if data.centre_views is None else int(data.centre_views[video])


def _views_of(data: LabelledRows, video: int) -> Sequence[int]:
    """The views of a row that an evaluation looks at."""
    if not data.shows_centre_alone:
        return range(data.num_views[video])
    return (_centre_of(data, video),)


def thin(clip: Sequence[int], num_frames: int) -> list[int]:
    """The middle one of each of `num_frames` equal parts of a clip's frames."""
    return [clip[(2 * step + 1) * len(clip) // (2 * num_frames)] for step in range(num_frames)]


def spread_clips(num_cached: int, num_frames: int, num_clips: int) -> list[list[int]]:
    """`num_clips` clips of `num_frames` places each, evenly shifted inside each of `num_frames` equal parts."""
    return [
        [(2 * (step * num_clips + clip) + 1) * num_cached // (2 * num_clips * num_frames) for step in range(num_frames)]
        for clip in range(num_clips)
    ]


def find_clip_lengths(data: LabelledRows, *, only_first: bool = False) -> np.ndarray:
    """Frames of each recorded evaluation clip, or of each row's first."""
    clips = (row[:1] if only_first else row for row in data.eval_clips)
    return np.asarray([len(clip) for row in clips for clip in row], dtype=np.int64)


def require_long_clips(data: LabelledRows, num_frames: int, store: StoreReader, *, only_first: bool = False) -> None:
    """Refuse recorded evaluation clips that are shorter than a head's: frames would be shown twice.

    Of rows that are as long as their videos they are.

    Raises:
        StoreMismatchError: With both numbers.
    """
    if store.facts.is_open_ended:
        return
    fewest = int(find_clip_lengths(data, only_first=only_first).min(initial=num_frames))
    if fewest < num_frames:
        raise StoreMismatchError(
            f"the run's clips have {num_frames} frames, evaluation clips of {store.path} as few as {fewest}. Use "
            f"--frames {fewest} in training (or --clips in evaluation, which spreads clips over all cached frames), or "
            f"extract clips of {num_frames} frames."
        )


def require_pixels(network: Network, store: StoreReader) -> None:
    """Refuse a store that lacks pixels which a network reads, before anything is read or written.

    Raises:
        StoreMismatchError: With what is there, what is missing, and the option that makes it.
    """
    if "pixels" in network.arrays:
        store.offset_places(network.pixel_offsets)


def require_whole_steps(network: Network, lengths: np.ndarray, num_frames: int, store: StoreReader) -> None:
    """Refuse clips that are not as long as the store caches them, where a network reads pixels at shares of a step.

    Such a share was taken of the distance between the frames of a cached clip. A clip that leaves frames out has other
    distances, and its pixels would be those of other moments.

    Args:
        network: What reads.
        lengths: Frames of the cached clips that it trains or validates on.
        num_frames: T.
        store: Theirs.

    Raises:
        StoreMismatchError: With both numbers.
    """
    steps = [offset for offset in map(PixelOffset.of, network.pixel_offsets) if offset.unit == "step"]
    if steps and (others := sorted({*lengths.tolist()} - {num_frames})):
        raise StoreMismatchError(
            f"the network reads pixels at {describe_offsets(steps)}, a share of the distance between the frames of a "
            f"clip as it is cached: clips of {store.path} have {', '.join(map(str, others))} frames, {num_frames} were "
            f"asked for. Train with --frames {others[0]}, or extract clips of {num_frames} frames."
        )


def warn_of_short_splits(
    store: StoreReader, num_frames: int, known: Collection[str], find_rows: Callable[[StoreReader, str], LabelledRows]
) -> None:
    """Say before a training which splits its run cannot be evaluated on, for their recorded clips are shorter.

    Args:
        store: What it trains on.
        num_frames: T.
        known: Splits that were looked at already.
        find_rows: What there is to evaluate in a split.
    """
    splits = set() if store.facts.is_open_ended else set(store.read_manifest(["split"])["split"].to_pylist())
    for split in sorted(splits - set(known)):
        fewest = int(find_clip_lengths(find_rows(store, split)).min(initial=num_frames))
        if fewest < num_frames:
            _log.warning(
                "the run's clips have %d frames, evaluation clips of the split %s of %s as few as %d: it cannot be "
                "evaluated there. Train with --frames %d, or extract clips of %d frames.",
                *(num_frames, split, store.path, fewest, fewest, num_frames),
            )


def warn_of_thinned_clips(data: LabelledRows, num_frames: int, store: StoreReader, *, only_first: bool = False) -> None:
    """Say that clips sampled as the reference samples them are not its clips once frames are left out."""
    sampling = store.facts.sampling
    most = int(find_clip_lengths(data, only_first=only_first).max(initial=0))
    if str(sampling).startswith("reference-") and most > num_frames:
        _log.warning(
            "evaluation clips of %s are %d frames by %s; the %d that are taken of them are not the reference's clip of "
            "that length. For its figures extract clips of %d frames, or train on %d.",
            store.path,
            most,
            sampling,
            num_frames,
            num_frames,
            most,
        )


class ClipLoader:
    """Reads planned batches with threads, a few ahead, and hands them over on the training device in order."""

    def __init__(
        self,
        store: StoreReader,
        *,
        arrays: Sequence[str],
        layers: Sequence[int],
        device: torch.device,
        text_arrays: Sequence[str] = (),
        pixel_offsets: Sequence[PixelOffset | int | str] = (0,),
        frames_per_token: int = 1,
        streams: Streams | None = None,
        bad: BadRows | None = None,
    ) -> None:
        self._store = store
        self._bad = BadRows() if bad is None else bad
        self._texts = TextReader(store) if text_arrays else None
        if self._texts is not None:
            self._texts.require(text_arrays)
        self._text_arrays = text_arrays
        self._arrays = arrays
        self._layers = None if tuple(layers) == store.layout.layers else layers
        self._device = device
        self._streams = find_streams(device) if streams is None else streams
        self.waiting = WaitMeter()
        backbone = store.facts.backbone
        self._mean, self._std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (backbone.mean, backbone.std)
        )
        self._cls_codec = cls_codec_for(store, layers, device) if "cls" in arrays else None
        self._offsets = pixel_offsets
        if "pixels" in arrays:
            store.offset_places(pixel_offsets)  # refuses those that it does not hold
        self._frames_per_token = frames_per_token
        self._mixer: Mixer | None = None  # made for the first batch that is mixed

    @classmethod
    def for_network(
        cls,
        network: Network,
        store: StoreReader,
        *,
        layers: Sequence[int],
        device: torch.device,
        with_texts: bool = False,
        bad: BadRows | None = None,
    ) -> ClipLoader:
        """One that reads what a network reads.

        Args:
            network: What reads.
            store: Where.
            layers: Backbone blocks.
            device: Where the network is.
            with_texts: For a loss; what the network says of clips needs none.
            bad: Rows for which others stand in, and how many there may be; None is none.
        """
        return cls(
            store,
            arrays=network.arrays,
            layers=layers,
            device=device,
            text_arrays=network.text_arrays if with_texts else (),
            pixel_offsets=network.pixel_offsets,
            frames_per_token=network.frames_per_token,
            bad=bad,
        )

    def load(self, plans: Sequence[ClipPlan]) -> Iterator[ClipBatch]:
        """Batches in the order of the plans; `waiting` is told how long steps stood still for them."""
        batches = self._read_ahead(plans)
        if self._streams is None:
            return time_waiting(batches, self.waiting)
        return copy_ahead(batches, self._streams, self.waiting)

    def count_bytes(self, plan: ClipPlan) -> int:
        """Of a batch in the host's memory, as it is stored."""
        num_clips, num_frames = plan.places.shape
        layout = self._store.layout
        layers = len(layout.layers if self._layers is None else self._layers)
        total = 0
        for name in self._arrays:
            a_frame = layout.bytes_per_frame[layout.name_stored(name)]
            if name == "pixels":
                total += num_clips * num_frames * a_frame * len(self._offsets) // len(layout.pixel_offsets)
            else:
                total += num_clips * -(-num_frames // self._frames_per_token) * a_frame * layers // len(layout.layers)
        return total

    def _read_ahead(self, plans: Sequence[ClipPlan]) -> Iterator[ClipBatch]:
        """Batches whose copies, to a GPU, may be under way on the stream that is current when they are asked for.

        What is read, or handed over and perhaps not copied yet, stays within a number of bytes; one batch is always
        read, however large.
        """
        threads = _reading_threads()
        prefetch = None if self._store.cache is None else ShardPrefetch(self._store, plans, self._arrays)
        pending: deque[tuple[ClipPlan, Future[_Read], int]] = deque()
        # Host memory is free again when the copy is done: surely when the batch after the next one is asked for.
        copying: deque[int] = deque([0, 0], maxlen=2) if self._streams is not None else deque(maxlen=0)

        def hand_over() -> ClipBatch:
            plan, future, size = pending.popleft()
            copying.append(size)
            return self._hand_over(plan, future)

        try:
            with self._store.copying():
                for place, plan in enumerate(plans):
                    if prefetch is not None:
                        prefetch.reach(place)
                    size = self.count_bytes(plan)
                    while pending and (
                        len(pending) > _BATCHES_AHEAD
                        or sum(one for *_, one in pending) + sum(copying) + size > READ_AHEAD_BYTES
                    ):
                        yield hand_over()
                    pending.append((plan, threads.submit(self._read, plan), size))
                while pending:
                    yield hand_over()
        finally:
            if prefetch is not None:
                prefetch.close()
            for _, future, _ in pending:
                future.cancel()
            wait([future for _, future, _ in pending])  # none reads on once the caller has gone

    def _read(self, plan: ClipPlan) -> _Read:
        """A batch; for a clip that cannot be read the next one of the order that can.

        Which that is follows from the order and the store's bytes alone, whoever finds out about them and when.
        """
        steps, num_passed = np.zeros(len(plan.rows), np.int64), 0
        while True:
            readable = plan.moved_on(steps)
            try:
                return self._read_clips(readable)
            except StoreDamagedError as error:
                if plan.order is None or error.row is None:
                    raise
                clips = np.flatnonzero(readable.rows == error.row)
                damaged = [clip for clip in clips.tolist() if not self._is_readable(readable.take(clip))]
                if damaged:
                    self._bad.note(error)
                steps[damaged] += 1
                num_passed += not damaged
                if num_passed > _MOST_PASSED or steps.max() >= len(plan.order.rows):
                    raise

    def _is_readable(self, plan: ClipPlan) -> bool:
        """Whether a clip of a row with damage is none of the damaged ones."""
        try:
            self._read_clips(plan)
        except StoreDamagedError:
            return False
        return True

    def _read_clips(self, plan: ClipPlan) -> _Read:
        places, step = plan.places, self._frames_per_token
        if step == 1:
            clips = self._read_arrays(plan, places, self._arrays)
        else:  # tokens of some frames, pixels of all
            tokens = self._read_arrays(plan, places[:, ::step], [name for name in self._arrays if name != "pixels"])
            pixels = self._read_arrays(plan, places, [name for name in self._arrays if name == "pixels"])
            clips = replace(tokens, pixels=pixels.pixels)
        texts = None if self._texts is None else self._texts.read(plan.labels, self._text_arrays)
        is_frame = plan.places >= 0
        if texts is not None:
            if texts.layers is not None and texts.mask is not None:  # M is what the longest caption of all has
                texts = texts.cut_to_longest()
            texts = Texts(*(None if values is None else self._pin(values) for values in texts.arrays))
        draws = None if plan.draws is None else self._pin(plan.draws)
        return _Read(clips, texts, self._pin(plan.labels), None if is_frame.all() else self._pin(is_frame), draws)

    def _read_arrays(self, plan: ClipPlan, places: np.ndarray, arrays: Sequence[str]) -> Clips:
        return self._store.read_clips(
            plan.rows,
            places,
            view=plan.views,
            layers=self._layers,
            arrays=arrays,
            allocate=self._allocate,
            offsets=self._offsets,
        )

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Room for an array; for a GPU pinned, so that its copy runs beside the step."""
        room = _host_memory() if self._streams is None else self._streams
        return room.allocate(shape, np.dtype(dtype))

    def _pin(self, values: np.ndarray) -> np.ndarray:
        """The same array in such room: of one that is elsewhere a copy holds up the host."""
        if self._streams is None:
            return values
        pinned = self._allocate(values.shape, values.dtype)
        np.copyto(pinned, values)
        return pinned

    def _copy(self, values: np.ndarray) -> torch.Tensor:
        # From memory that is not pinned nothing keeps the source while it is copied.
        return torch.from_numpy(values).to(self._device, non_blocking=self._streams is not None)

    def _hand_over(self, plan: ClipPlan, future: Future[_Read]) -> ClipBatch:
        read = future.result()
        clips = read.clips
        pixels = None
        if clips.pixels is not None:
            pixels = self._normalise(self._copy(clips.pixels))
        batch = ClipBatch(
            pixels,
            None if clips.patches is None else self._copy(clips.patches),
            None if clips.cls is None else self._widen(self._copy(clips.cls)),
            self._copy(read.labels),
            None if read.texts is None else hand_over_texts(read.texts, self._device),
            draws=None if read.draws is None else self._copy(read.draws),
        )
        if read.is_frame is not None:
            batch = self._mask(batch, self._copy(read.is_frame))
        return batch if plan.mixing is None else self._mix(batch, plan, plan.mixing)

    def _mix(self, batch: ClipBatch, plan: ClipPlan, mixing: Mixing) -> ClipBatch:
        """On the device, as the batch is copied: a GPU does it beside the step before."""
        if self._mixer is None:
            store, codec = self._store, None
            if "patches" in self._arrays and mixing.decodes(store.codec):
                codec = codec_for(store, self._layers or store.layout.layers, self._device)
            self._mixer = Mixer(store.facts.backbone.grid, store.facts.backbone.patch_size, codec)
        return self._mixer.mix(batch, plan, lambda values: self._copy(self._pin(values)))

    def _mask(self, batch: ClipBatch, is_frame: torch.Tensor) -> ClipBatch:
        """The batch with zeros for frames that there are not (B, T)."""
        if batch.pixels is not None:  # a black frame, normalised, is none of zeros
            batch.pixels.mul_(is_frame.view(*is_frame.shape, *(1,) * (batch.pixels.ndim - 2)))
        if batch.cls is not None and self._cls_codec is not None:  # nor is the class token of codes of zero
            batch.cls.mul_(is_frame[:, :: self._frames_per_token, None, None])
        return replace(batch, frame_mask=is_frame)

    def _widen(self, raw: torch.Tensor) -> torch.Tensor:
        """Class tokens as stored, (B, T, L, D) or (B, T, L, K) codes, to (B, T, L, D) float32, on the device."""
        codec = self._cls_codec
        if codec is None:
            return raw.float()
        # A codec takes patches, (..., N, K): a frame has one class token.
        return torch.cat([codec.decode(raw[:, :, place, None], place) for place in range(raw.shape[2])], dim=2)

    def _normalise(self, raw: torch.Tensor) -> torch.Tensor:
        """(B, T, O, H, W, 3) or (B, T, O, P) as stored to (B, T, 3, H, W), of several offsets (B, T, O, 3, H, W)."""
        shown, layout = raw if len(self._offsets) > 1 else raw[:, :, 0], self._store.layout
        is_rgb = layout.pixel_format == "rgb"
        pixels = shown.movedim(-1, -3).float() if is_rgb else decode_ycbcr420(shown, layout.image_size)
        return pixels.div_(255).sub_(self._mean).div_(self._std)


def hand_over_texts(texts: Texts, device: torch.device) -> TextBatch:
    """Texts on the training device, in float32."""
    tokens, mask, embedding, layers = (
        None if values is None else torch.from_numpy(values).to(device, non_blocking=device.type == "cuda")
        for values in texts.arrays
    )
    floats = [None if values is None else values.float() for values in (tokens, layers)]
    return TextBatch(floats[0], mask, embedding, floats[1])


def codec_for(store: StoreReader, layers: Sequence[int], device: torch.device) -> Codec:
    """The store's codec for the layers that a head reads, its arrays as tensors on the training device."""
    return _move_codec(store.codec, store.layer_places(layers), device)


def cls_codec_for(store: StoreReader, layers: Sequence[int], device: torch.device) -> Codec | None:
    """The same of class tokens; None where they are not coded."""
    codec = store.cls_codec
    return None if codec is None else _move_codec(codec, store.layer_places(layers), device)


def _move_codec(codec: Codec, places: Sequence[int], device: torch.device) -> Codec:
    return codec.map_parts(lambda array: torch.from_numpy(np.asarray(array)[places]).to(device))
