"""Frames of one video, the wanted ones decoded. Imports no torch. Folders of numbered pictures go to Pillow.

Of a file PyAV reads the packets first: they tell how many frames there are and when, the same for both decoders.
decord then seeks to the wanted frames, but only in streams where its seeking is right, and where it saves most of the
decoding; everywhere else PyAV decodes in order, and sees what is broken on its way. Each wanted frame is made small as
soon as it is there: what is kept of a video does not grow with frames times pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

try:  # wheels exist for Linux on x86-64 and for Windows
    import decord
except ImportError:
    decord = None

from .containers import MAX_FRAME_PIXELS, open_container
from .frame_folder import format_of_frame, list_frames
from .orientation import Turn, turn_of
from .timeline import ALLOWED_LOSS_SHARE, Clock, Timeline, check_shape, is_too_short, read_file_timeline
from .trouble import MEMORY_LIMIT, DecodeFailure, as_failure, memory_failure, scrub_message

__all__ = ["ALLOWED_LOSS_SHARE", "DecodeFailure", "Decoded", "Timeline", "VideoFile", "decord", "scrub_message"]

# decord: how many damaged frames it may replace by the last good one before it raises. Zero means "any number",
# so a share too small to be one frame.
_NO_REPLACED_FRAMES = 1e-9

# A whole video is decoded in order where that costs little: so many pixels, about 15 ms, or where seeking to the wanted
# frames would decode more than this share of it anyway. Then all that is broken in it is known.
_CHEAP_PIXELS = 1 << 22
_SEEK_SHARE = 0.5

# decord is quicker with several frames at a time: as many as have so many pixels together, 12 MB.
_BATCH_PIXELS = 1 << 22

# Of a frame as a codec keeps it, with its borders.
_BYTES_PER_PIXEL = 4

# Decoders that give frames out of their order hold back at most so many.
_MOST_REORDERED = 32


@dataclass(frozen=True)
class Decoded:
    """The frames that were wanted."""

    decoder: str
    num_frames: int
    """Frames of the file that can be decoded, as far as is known."""
    frame_indices: list[int]
    """Wanted frames, counted in the file."""
    frames: dict[int, Any]
    """What was made of each, by frame index."""
    note: str | None = None
    """Says so when the announced length was clamped."""


Choose = Callable[[np.ndarray], list[int]]
"""Times of the frames that can be had, in seconds -> places of the wanted ones among them."""
Render = Callable[[np.ndarray], Any]
"""(H, W, 3) uint8, upright -> what is kept of it."""


class VideoFile:
    """A video whose frames are taken once or, of a long one, segment after segment.

    What the whole file costs is paid once: reading its packets, decord's index of them, and decoding in order, which
    goes on where the last segment ended.

    Args:
        path: The file, or a folder of numbered pictures.
        frame_fps: Rate of frames in folders; None where it is not known.
        allow_loss: Share of the announced frames that may be missing.

    Raises:
        DecodeFailure: If there is no container, no video stream or no frame, or fewer frames than were announced.
    """

    def __init__(self, path: Path, frame_fps: float | None = None, allow_loss: float = ALLOWED_LOSS_SHARE) -> None:
        self.timeline = _read_timeline(path, frame_fps, allow_loss)
        self._path = path
        self._allow_loss = allow_loss
        self._decord: Any = None
        self._in_order: Iterator[tuple[int | None, Any]] = iter(())
        self._last_taken = len(self.timeline.times_s)  # nothing is left of the empty iterator
        self._decodable: list[int] | None = None
        self._is_clean = True
        self._turn: tuple[int, Turn] | None = None

    def decode(self, decoder: str, choose: Choose, render: Render, *, is_whole: bool = False) -> Decoded:
        """Decode the wanted frames.

        Args:
            decoder: `auto` (decord where its seeking is right and saves much, PyAV after an error and elsewhere),
                `decord` or `pyav`.
            choose: Which frames.
            render: Makes small what is kept of each.
            is_whole: Whether they are chosen from the whole video: then all of it has to be there.

        Raises:
            DecodeFailure: With the reason.
        """
        timeline = self.timeline
        indices = choose(timeline.times_s)
        if timeline.frame_files:
            return _decode_pictures(timeline, indices, render)
        is_possible = decord is not None and timeline.is_seekable
        if decoder == "decord" and not is_possible:
            why = "has no wheel for this system" if decord is None else "seeks to wrong frames in this kind of stream"
            raise DecodeFailure("decode-error", f"decord {why}: use --decoder auto")
        if decoder == "decord":
            return self._decode_decord(indices, render)
        if decoder == "auto" and is_possible:
            is_checked = is_whole and self._is_cheap(indices)
            if is_checked and not timeline.has_same_pixels:
                self._count_decodable()
            if not is_checked or (not timeline.has_same_pixels and self._is_all_there):
                try:
                    return self._decode_decord(indices, render)
                except DecodeFailure as failure:
                    if failure.code == "too-large":
                        raise
                    self._decord = None
        return self._decode_pyav(indices, choose, render, is_whole)

    @property
    def _is_all_there(self) -> bool:
        return self._decodable is not None and len(self._decodable) == len(self.timeline.times_s)

    def _is_cheap(self, indices: list[int]) -> bool:
        """Whether decoding all of the video costs little, or little more than seeking to these frames."""
        timeline = self.timeline
        num_frames = len(timeline.times_s)
        if num_frames * timeline.frame_pixels <= _CHEAP_PIXELS or timeline.key_indices is None:
            return True
        cost, position = 0, -1
        for index in sorted(set(indices)):
            place = int(np.searchsorted(timeline.key_indices, index, side="right"))
            key = int(timeline.key_indices[max(0, place - 1)])
            cost += index - max(key - 1, position)
            position = index
        return cost >= _SEEK_SHARE * num_frames

    def _decode_decord(self, indices: list[int], render: Render) -> Decoded:
        """Decode with decord, which seeks; any frame it cannot decode is an error."""
        num_present = len(self.timeline.times_s)
        frames = {}
        try:
            if self._decord is None:
                self._decord = decord.VideoReader(str(self._path), num_threads=1, fault_tol=_NO_REPLACED_FRAMES)
            reader = self._decord
            if len(reader) != num_present:
                raise DecodeFailure("decode-error", f"decord counts {len(reader)} frames of {num_present}")
            places = sorted(set(indices))
            step = max(1, _BATCH_PIXELS // max(1, self.timeline.frame_pixels))
            for place in range(0, len(places), step):
                batch = places[place : place + step]
                for index, frame in zip(batch, reader.get_batch(batch).asnumpy(), strict=True):
                    frames[index] = render(frame)
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, ValueError, IndexError) as error:
            raise DecodeFailure("decode-error", scrub_message(error, self._path)) from error
        return Decoded("decord", num_present, indices, frames, self._note(num_present))

    def _decode_pyav(self, indices: list[int], choose: Choose, render: Render, is_whole: bool) -> Decoded:
        """Decode with PyAV, in order; a slightly short video is clamped, a shorter one refused."""
        num_present = len(self.timeline.times_s)
        distinct = set(indices)
        frames = self._take_in_order(distinct, render, to_end=is_whole and self._decodable is None)
        if not is_whole and distinct <= frames.keys():
            return Decoded("pyav", num_present, indices, frames, self._note(num_present))
        self._count_decodable()
        good = self._decodable or []
        num_announced = self.timeline.num_announced
        num_good = len(good)
        if self._is_clean and abs(2 * num_good - num_present) <= 1 < num_present:
            # Two packets a frame, as of interlaced pictures: all frames are there, and none was broken.
            num_announced = num_good + self.timeline.num_missing // 2
        if not good or is_too_short(num_good, num_announced, self._allow_loss):
            raise DecodeFailure("truncated", f"{num_good} of {num_announced} frames decode")
        if num_good < num_present:
            indices = [good[place] for place in choose(self.timeline.times_s[good])]
            if not set(indices) <= frames.keys():
                frames = self._take_in_order(set(indices), render)
            if not set(indices) <= frames.keys():
                raise DecodeFailure("decode-error", "frames that decoded once do not decode again")
        return Decoded("pyav", num_good, indices, frames, self._note(num_good, num_announced))

    def _note(self, num_good: int, num_announced: int | None = None) -> str | None:
        """The reason of a good row that lacks a frame or two."""
        num_announced = self.timeline.num_announced if num_announced is None else num_announced
        if num_good >= num_announced:
            return None
        what = "decode" if num_good < len(self.timeline.times_s) else "are there"
        return f"clamped: {num_good} of {num_announced} frames {what}"

    def _count_decodable(self) -> None:
        """Decode all of it, keeping nothing."""
        if self._decodable is None:
            self._take_in_order(set(), lambda _: None, to_end=True)

    def _take_in_order(self, wanted: set[int], render: Render, *, to_end: bool = False) -> dict[int, Any]:
        """Those of the wanted frames that decode, from where the last call ended, if they all come later."""
        if to_end or self._last_taken >= min(wanted):
            self._in_order, self._last_taken = _read_in_order(self._path, self.timeline), -1
            self._is_clean = True
        last = max(wanted, default=-1)
        frames: dict[int, Any] = {}
        seen: set[int] = set()
        num_beyond = 0
        for index, frame in self._in_order:
            if index is None:
                self._is_clean = False
                continue
            self._last_taken = max(self._last_taken, index)
            if index in wanted and index not in frames:
                frames[index] = render(self._upright(frame))
            if to_end:
                seen.add(index)
                continue
            num_beyond += index >= last
            if len(frames) == len(wanted) or num_beyond > _MOST_REORDERED:
                break
        if to_end:
            self._decodable = sorted(seen)
        return frames

    def _upright(self, frame: Any) -> np.ndarray:
        """(H, W, 3) uint8, turned and mirrored as the display matrix says; decord turns by itself."""
        if frame.width * frame.height > MAX_FRAME_PIXELS:
            raise DecodeFailure("too-large", f"a frame of {frame.width}x{frame.height}")
        check_shape(frame.width, frame.height)
        # Whose matrix is looked at stays in memory until Python collects circles: one frame, not each.
        if self._turn is None or self._turn[0] != frame.rotation:
            self._turn = frame.rotation, turn_of(frame)
        return self._turn[1].apply(frame.to_ndarray(format="rgb24"))


def _read_timeline(path: Path, frame_fps: float | None, allow_loss: float = ALLOWED_LOSS_SHARE) -> Timeline:
    """Read the packets of a file's film, or the names in a folder of numbered pictures.

    Args:
        path: The file or folder.
        frame_fps: Rate of frames in folders; None where it is not known.
        allow_loss: Share of the announced frames that may be missing.

    Raises:
        DecodeFailure: If there is no container, no video stream or no frame, or too few frames.
    """
    return _read_folder_timeline(path, frame_fps) if path.is_dir() else read_file_timeline(path, allow_loss)


def _read_folder_timeline(folder: Path, fps: float | None) -> Timeline:
    try:
        files = list_frames(folder)
    except ValueError as error:
        raise DecodeFailure("unreadable", str(error)) from error
    except OSError as error:
        raise as_failure(error, folder, "unreadable") from error
    if not files:
        raise DecodeFailure("no-frames", "the folder holds no numbered picture")
    return Timeline(
        times_s=np.arange(len(files)) / fps if fps else np.full(len(files), np.nan),
        ticks=np.empty(0, np.int64),
        fps=fps,
        duration_s=len(files) / fps if fps else None,
        is_seekable=False,
        is_counted=False,
        num_announced=len(files),
        frame_files=tuple(files),
    )


def _decode_pictures(timeline: Timeline, indices: list[int], render: Render) -> Decoded:
    frames: dict[int, Any] = {}
    shapes = set()
    for index in sorted(set(indices)):
        file = timeline.frame_files[index]
        try:
            with Image.open(file, formats=(format_of_frame(file),)) as image:
                width, height = image.size
                if width * height > MAX_FRAME_PIXELS:
                    raise DecodeFailure(
                        "too-large", f"{file.name}: {width}x{height}, at most {MAX_FRAME_PIXELS} pixels are decoded"
                    )
                check_shape(width, height)
                if image.mode.startswith(("I", "F")):  # depths and the like: converting would cut their values
                    raise DecodeFailure("decode-error", f"{file.name}: expected 8-bit colours, found {image.mode}")
                ImageOps.exif_transpose(image, in_place=True)
                picture = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError) as error:
            failure = as_failure(error, file)
            if failure.code == "missing-file":  # one of many: the folder is there
                raise DecodeFailure("decode-error", f"{file.name}: the frame is not there") from error
            if failure.code == "decode-error":
                raise DecodeFailure("decode-error", f"{file.name}: {failure}") from error
            raise failure from error
        shapes.add(picture.shape)
        frames[index] = render(picture)
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{width}x{height}" for height, width, _ in shapes))
        raise DecodeFailure("decode-error", f"expected frames of one size, found {sizes}")
    return Decoded("pillow", len(timeline.frame_files), indices, frames)


def _read_in_order(path: Path, timeline: Timeline) -> Iterator[tuple[int | None, Any]]:
    """Yield PyAV's frames that decode as they come; after an error, nothing until the next clean key frame.

    What follows a broken frame is predicted from it: the decoder shows it, and it is wrong. (None, None) stands for an
    error.
    """
    try:
        with open_container(path) as container:
            stream: Any = container.streams[timeline.stream_index]
            stream.codec_context.thread_count = 1
            clock = Clock(float(stream.time_base))
            count = 0
            is_broken = False
            for packet in container.demux(stream):
                if packet.size:
                    clock.set(packet)
                try:
                    decoded = packet.decode()
                except EOFError:  # a second end of the stream
                    continue
                except av.FFmpegError as error:
                    if isinstance(error, MemoryError):
                        raise
                    if MEMORY_LIMIT.is_reached(_BYTES_PER_PIXEL * timeline.frame_pixels):
                        raise memory_failure() from error
                    is_broken = True
                    yield None, None
                    continue
                for frame in decoded:
                    # Where frames must be counted, an error loses the count for good.
                    was_broken = is_broken
                    is_broken = frame.is_corrupt or (is_broken and (timeline.is_counted or not frame.key_frame))
                    if is_broken and not was_broken:
                        yield None, None
                    index = count if timeline.is_counted else timeline.index_of(frame.pts)
                    count += 1
                    if not is_broken and index is not None and index < len(timeline.ticks):
                        yield index, frame
    except (av.FFmpegError, OSError, MemoryError) as error:
        raise as_failure(error, path) from error
