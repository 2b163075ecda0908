"""Frames of one video: which there are, and the wanted ones decoded. Imports no torch. Folders of JPEGs go to Pillow.

Of a file PyAV reads the packets first: they tell how many frames there are and when, the same for both decoders.
decord then seeks to the wanted frames, but only in streams where its seeking is right; everywhere else PyAV decodes in
order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

try:  # wheels exist for Linux on x86-64 and for Windows
    import decord
except ImportError:
    decord = None

from ._frames import format_of_frame, list_frames

_ALLOWED_LOSS_FRAMES = 2
_ALLOWED_LOSS_SHARE = 0.02

# decord: how many damaged frames it may replace by the last good one before it raises. Zero means "any number",
# so a share too small to be one frame.
_NO_REPLACED_FRAMES = 1e-9

# Where decord's seeking was checked against decoding in order. It lands on wrong frames, without an error, in AVI, ASF
# and MPEG transport streams, in MPEG-2 and MPEG-4 with B-frames, and behind key frames that are not clean.
_SEEKABLE_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
_SEEKABLE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9"})

_H264_IDR = frozenset({5})
_HEVC_IDR = frozenset({19, 20})


class DecodeFailure(Exception):
    """A video that cannot be decoded; `code` is one of the manifest's reasons."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True)
class Timeline:
    """What the packets of a video tell, or the names of its frames, before anything is decoded."""

    times_s: np.ndarray
    """(n,) of every announced frame, rising from 0, the first frame's time; NaN where the rate is not known."""
    index_of_tick: dict[int, int]
    """Frame index by the stream's own timestamp."""
    fps: float | None
    duration_s: float | None
    is_seekable: bool
    """Whether decord finds the right frames in it."""
    is_counted: bool
    """Whether frames must be counted as they come out: AVI stores no display times."""
    frame_files: tuple[Path, ...] = ()
    """The frames of a folder of JPEGs; empty for a file."""


@dataclass(frozen=True)
class Decoded:
    """The frames that were wanted."""

    decoder: str
    num_frames: int
    """Frames of the file that can be decoded, as far as is known."""
    frame_indices: list[int]
    """Wanted frames, counted in the file."""
    frames: dict[int, np.ndarray]
    """(H, W, 3) uint8, upright, by frame index."""
    note: str | None = None
    """Says so when the announced length was clamped."""


Choose = Callable[[np.ndarray], list[int]]
"""Times of the frames that can be had, in seconds -> places of the wanted ones among them."""


class VideoFile:
    """A video whose frames are taken once or, of a long one, segment after segment.

    What the whole file costs is paid once: reading its packets, decord's index of them, and decoding in order, which
    goes on where the last segment ended.

    Args:
        path: The file, or a folder of numbered JPEGs.
        frame_fps: Rate of frames in folders; None where it is not known.

    Raises:
        DecodeFailure: If there is no container, no video stream or no frame.
    """

    def __init__(self, path: Path, frame_fps: float | None = None) -> None:
        self.timeline = _read_timeline(path, frame_fps)
        self._path = path
        self._decord: Any = None
        self._in_order: Iterator[tuple[int, Any]] = iter(())
        self._last_taken = len(self.timeline.times_s)  # nothing is left of the empty iterator
        self._decodable: list[int] | None = None

    def decode(self, decoder: str, choose: Choose) -> Decoded:
        """Decode the wanted frames.

        Args:
            decoder: `auto` (decord where its seeking is right, PyAV after an error and elsewhere), `decord` or `pyav`.
            choose: Which frames.

        Raises:
            DecodeFailure: With the reason.
        """
        indices = choose(self.timeline.times_s)
        if self.timeline.frame_files:
            return _decode_frame_files(self.timeline, indices)
        is_possible = decord is not None and self.timeline.is_seekable
        if decoder == "decord" and not is_possible:
            why = "has no wheel for this system" if decord is None else "seeks to wrong frames in this kind of stream"
            raise DecodeFailure("decode-error", f"decord {why}: use --decoder auto")
        if decoder != "pyav" and is_possible:
            try:
                return self._decode_decord(indices)
            except DecodeFailure:
                self._decord = None
                if decoder == "decord":
                    raise
        return self._decode_pyav(indices, choose)

    def _decode_decord(self, indices: list[int]) -> Decoded:
        """Decode with decord, which seeks; any frame it cannot decode is an error."""
        wanted = sorted(set(indices))
        num_announced = len(self.timeline.times_s)
        try:
            if self._decord is None:
                self._decord = decord.VideoReader(str(self._path), num_threads=1, fault_tol=_NO_REPLACED_FRAMES)
            reader = self._decord
            if len(reader) != num_announced:
                raise DecodeFailure("decode-error", f"decord counts {len(reader)} frames of {num_announced}")
            frames = reader.get_batch(wanted).asnumpy()
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, ValueError, IndexError) as error:
            raise DecodeFailure("decode-error", scrub_message(error, self._path)) from error
        return Decoded("decord", num_announced, indices, dict(zip(wanted, frames, strict=True)))

    def _decode_pyav(self, indices: list[int], choose: Choose) -> Decoded:
        """Decode with PyAV, in order; a slightly short video is clamped, a shorter one refused."""
        num_announced = len(self.timeline.times_s)
        frames = self._take_in_order(set(indices))
        if set(indices) <= frames.keys():
            return Decoded("pyav", num_announced, indices, frames)
        if self._decodable is None:
            self._decodable = sorted(index for index, _ in _read_in_order(self._path, self.timeline))
        good = self._decodable
        lost = num_announced - len(good)
        if not good or lost > max(_ALLOWED_LOSS_FRAMES, _ALLOWED_LOSS_SHARE * num_announced):
            raise DecodeFailure("truncated", f"{len(good)} of {num_announced} frames decode")
        chosen = [good[place] for place in choose(self.timeline.times_s[good])]
        note = f"clamped: {len(good)} of {num_announced} frames decode"
        return Decoded("pyav", len(good), chosen, self._take_in_order(set(chosen)), note)

    def _take_in_order(self, wanted: set[int]) -> dict[int, np.ndarray]:
        """Those of the wanted frames that decode, from where the last call ended, if they all come later."""
        if self._last_taken >= min(wanted):
            self._in_order = _read_in_order(self._path, self.timeline)
        last = max(wanted)
        frames = {}
        for index, frame in self._in_order:
            self._last_taken = index
            if index in wanted:
                frames[index] = _upright(frame)
            if index >= last:
                break
        return frames


def _read_timeline(path: Path, frame_fps: float | None) -> Timeline:
    """Read the packets of a file's first video stream, or the names in a folder of numbered JPEGs.

    Args:
        path: The file or folder.
        frame_fps: Rate of frames in folders; None where it is not known.

    Raises:
        DecodeFailure: If there is no container, no video stream or no frame.
    """
    if path.is_dir():
        return _read_folder_timeline(path, frame_fps)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DecodeFailure("no-video-stream", "")
            stream: Any = container.streams.video[0]
            is_clean = _key_frame_check(container, stream)
            is_seekable = is_clean is not None
            durations: dict[int, int] = {}
            for packet in container.demux(stream):
                if packet.pts is None or packet.is_discard:
                    continue
                durations[packet.pts] = packet.duration or 0
                if is_clean is not None and packet.is_keyframe and not is_clean(bytes(packet)):
                    is_seekable = False
            if not durations or stream.codec_context is None:
                raise DecodeFailure("no-frames", "the container announces none")
            ticks = sorted(durations)
            base = float(stream.time_base)
            times_s = (np.asarray(ticks, dtype=np.float64) - ticks[0]) * base
            duration_s = float(times_s[-1] + durations[ticks[-1]] * base)
            return Timeline(
                times_s=times_s,
                index_of_tick={tick: index for index, tick in enumerate(ticks)},
                fps=float(stream.average_rate or 0) or len(times_s) / max(duration_s, 1e-9),
                duration_s=duration_s,
                is_seekable=is_seekable,
                is_counted=container.format.name == "avi",
            )
    except av.FFmpegError as error:
        raise DecodeFailure("unreadable", scrub_message(error, path)) from error


def _read_folder_timeline(folder: Path, fps: float | None) -> Timeline:
    try:
        files = list_frames(folder)
    except ValueError as error:
        raise DecodeFailure("unreadable", str(error)) from error
    if not files:
        raise DecodeFailure("no-frames", "the folder holds no numbered JPEG")
    return Timeline(
        times_s=np.arange(len(files)) / fps if fps else np.full(len(files), np.nan),
        index_of_tick={},
        fps=fps,
        duration_s=len(files) / fps if fps else None,
        is_seekable=False,
        is_counted=False,
        frame_files=tuple(files),
    )


def _decode_frame_files(timeline: Timeline, indices: list[int]) -> Decoded:
    frames: dict[int, np.ndarray] = {}
    for index in sorted(set(indices)):
        file = timeline.frame_files[index]
        try:
            with Image.open(file, formats=(format_of_frame(file),)) as image:
                if image.mode.startswith(("I", "F")):  # depths and the like: converting would cut their values
                    raise DecodeFailure("decode-error", f"{file.name}: expected 8-bit colours, found {image.mode}")
                frames[index] = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise DecodeFailure("decode-error", f"{file.name}: {scrub_message(error, file)}") from error
    shapes = {frame.shape for frame in frames.values()}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{width}x{height}" for height, width, _ in shapes))
        raise DecodeFailure("decode-error", f"expected frames of one size, found {sizes}")
    return Decoded("pillow", len(timeline.frame_files), indices, frames)


def _key_frame_check(container: Any, stream: Any) -> Callable[[bytes], bool] | None:
    """How to tell that nothing behind a key frame needs what stands before it; None where decord is not to seek.

    Key frames of open groups and of intra refresh are marked as such, and are not clean: decord starts at them and
    returns neighbours of the frames that were asked for.
    """
    codec = stream.codec_context.name if stream.codec_context else ""
    if not _SEEKABLE_CONTAINERS & set(container.format.name.split(",")):
        return None
    name = {"libvpx": "vp8", "libvpx-vp9": "vp9"}.get(codec, codec)
    if name not in _SEEKABLE_CODECS:
        return None
    if name in ("vp8", "vp9"):
        return lambda _: True
    extradata = bytes(stream.codec_context.extradata or b"")
    place = 4 if name == "h264" else 21  # where avcC and hvcC say how long a NAL unit's length field is
    if len(extradata) <= place or extradata[0] != 1:
        return None
    length_size = (extradata[place] & 3) + 1
    if name == "h264":
        return lambda data: any(unit[0] & 31 in _H264_IDR for unit in _nal_units(data, length_size))
    return lambda data: any(unit[0] >> 1 & 63 in _HEVC_IDR for unit in _nal_units(data, length_size))


def _nal_units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The first byte of each NAL unit of a packet with length fields."""
    place = 0
    while place + length_size < len(data):
        length = int.from_bytes(data[place : place + length_size], "big")
        yield data[place + length_size : place + length_size + 1]
        place += length_size + length


def _read_in_order(path: Path, timeline: Timeline) -> Iterator[tuple[int, Any]]:
    """Yield PyAV's frames that decode, by rising index; after an error, nothing until the next clean key frame.

    What follows a broken frame is predicted from it: the decoder shows it, and it is wrong.
    """
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        count = 0
        is_broken = False
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                is_broken = True
                continue
            for frame in decoded:
                # Frames come out in display order. Where they must be counted, an error loses the count for good.
                is_broken = frame.is_corrupt or (is_broken and (timeline.is_counted or not frame.key_frame))
                index = count if timeline.is_counted else timeline.index_of_tick.get(frame.pts)
                count += 1
                if not is_broken and index is not None:
                    yield index, frame


def _upright(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8, turned as the file's display matrix says; decord does this by itself."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)


def scrub_message(error: Exception, path: Path) -> str:
    """An error's message without clocks, addresses, paths and source lines: the same in every run."""
    text = str(error).replace(str(path), "").strip()
    text = text.splitlines()[0].partition("; last error log")[0] if text else type(error).__name__
    text = re.sub(r"\[(\d\d:\d\d:\d\d|Errno -?\d+)\]", "", text)
    text = re.sub(r"0x[0-9a-f]+", "", text)
    text = re.sub(r"(/[\w.-]+)+(:\d+)?:?", "", text)
    return re.sub(r"\s+", " ", text).strip(" :;'")[:160]
