"""What the packets of a file's film tell before anything is decoded: which frames there are, and when.

The film is the video track that players choose. Its packets say how many frames are there; its header says how many
should be. Timestamps that jump back, as where streams were put one after the other, are counted on.
"""

from __future__ import annotations

import re
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from .containers import MAX_FRAME_PIXELS, MAX_PACKETS, check_boxes, may_decord_open, open_container
from .first_bytes import name_first_bytes, read_head
from .matroska import is_matroska_whole
from .orientation import Turn, turn_of
from .trouble import DecodeFailure, as_failure

ALLOWED_LOSS_FRAMES = 2
ALLOWED_LOSS_SHARE = 0.02

# Where decord's seeking was checked against decoding in order. It lands on wrong frames, without an error, in AVI, ASF
# and MPEG transport streams, in MPEG-2 and MPEG-4 with B-frames, and behind key frames that are not clean.
_SEEKABLE_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
_SEEKABLE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9"})
# decord keeps up to thirty whole frames at a time.
_MAX_DECORD_PIXELS = 1 << 21
# Where its pixels are PyAV's to the bit; in others (ten bits, interlaced) rows keep the decoder they always had.
_SAME_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})

_H264_IDR = frozenset({5})
_HEVC_IDR = frozenset({19, 20})
_SEI_ORIENTATION = 47

_PICTURES = av.stream.Disposition.attached_pic | av.stream.Disposition.still_image
_PICTURES |= av.stream.Disposition.timed_thumbnails
_DEFAULT = av.stream.Disposition.default

# Containers whose reading may end where a second file begins: how many bytes begin one, and what stands near them.
_BEGINNINGS = {"flv": (4, b""), "asf": (16, b""), "matroska,webm": (4, b"\x42\x82")}
_BEGINNING_BYTES = 64
_REST_BYTES = 1 << 20

# A stream that jumps back by less than this, and not to a key frame, is badly muxed and no second stream.
_JUMP_S = 10.0
# Packets that share a timestamp are near each other.
_NUM_RECENT = 32
_LONGEST_SHAPE = 100
"""How many times as long as wide a frame may be: resized to the crop's short side it would be too large."""


@dataclass(frozen=True)
class Timeline:
    """What the packets of a video tell, or the names of its frames, before anything is decoded."""

    times_s: np.ndarray
    """(n,) of every frame that is there, rising from 0, the first frame's time; NaN where the rate is not known."""
    ticks: np.ndarray
    """(n,) int64, the same in the stream's own unit, rising; empty for folders."""
    fps: float | None
    duration_s: float | None
    is_seekable: bool
    """Whether decord finds the right frames in it."""
    is_counted: bool
    """Whether frames must be counted as they come out: AVI and bare streams store no display times."""
    num_announced: int
    """Frames that should be there; the number of those that are, where the header does not say."""
    num_missing: int = 0
    """Of them, those that no packet is there for."""
    stream_index: int = 0
    """Of the film in its file."""
    frame_pixels: int = 0
    """Of a frame, as the header says."""
    key_indices: np.ndarray | None = None
    """Frames at which decord can begin, rising; None where it is not to seek."""
    has_same_pixels: bool = True
    """Whether decord and PyAV give the same pixels, to the bit."""
    frame_files: tuple[Path, ...] = ()
    """The frames of a folder of pictures; empty for a file."""

    def index_of(self, tick: int | None) -> int | None:
        """The frame with this timestamp; None where there is no such frame."""
        if tick is None:
            return None
        index = int(np.searchsorted(self.ticks, tick))
        return index if index < len(self.ticks) and self.ticks[index] == tick else None

    @property
    def end_s(self) -> float:
        """When the last frame leaves the screen."""
        last_s = float(self.times_s[-1])
        if self.duration_s is not None and self.duration_s > last_s:
            return self.duration_s
        return last_s + (1 / self.fps if self.fps else 0.0)


def is_too_short(num_present: int, num_announced: int, allow_loss: float) -> bool:
    """Whether a video lacks more than two frames and more than the share of it that may be lost."""
    return num_announced - num_present > max(ALLOWED_LOSS_FRAMES, allow_loss * num_announced)


class Clock:
    """Gives each packet of a stream its place in time, across timestamps that jump back or that two packets share.

    The packets' own timestamps are changed to it, so that the frames bear it too. Of other streams nothing is changed.
    """

    def __init__(self, time_base: float) -> None:
        self._jump = round(_JUMP_S / time_base) if time_base > 0 else 0
        self._offset = 0
        self._end: int | None = None
        self._last_dts: int | None = None
        self._last_key_pts: int | None = None
        self._recent: deque[int] = deque(maxlen=_NUM_RECENT)

    def set(self, packet: Any) -> int | None:
        """Change a packet's timestamps where streams before it ended; returns its display time."""
        dts, pts = packet.dts, packet.pts
        jumps_back = False
        if dts is not None:
            if self._last_dts is not None and dts < self._last_dts:
                jumps_back = packet.is_keyframe or self._last_dts - dts > self._jump
            self._last_dts = dts
        if packet.is_keyframe and pts is not None:
            jumps_back |= self._last_key_pts is not None and pts < self._last_key_pts
            self._last_key_pts = pts
        if jumps_back and pts is not None and self._end is not None:
            self._offset = self._end - pts
        if pts is None:
            return None
        place = pts + self._offset
        while place in self._recent:
            place += 1
        self._recent.append(place)
        if place != pts:
            packet.pts = pts = place
            if dts is not None:
                packet.dts = dts + self._offset
        end = pts + (packet.duration or 0)
        self._end = end if self._end is None else max(self._end, end)
        return pts


class _Track:
    """One video stream of a file, as its packets come."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.stream = stream
        self.is_mp4 = "mov" in container.format.name.split(",")
        self.is_avi = container.format.name == "avi"
        self.is_matroska = "matroska" in container.format.name.split(",")
        self.is_mxf = container.format.name == "mxf"
        self.width, self.height = stream.codec_context.width, stream.codec_context.height
        self.base_s = float(stream.time_base)
        self.announced_frames = len(stream.index_entries) if self.is_mp4 and stream.frames else stream.frames
        self.announced_end_s = self._find_announced_end(container)
        self.num_packets = 0
        self.num_hidden = 0
        self.first_place = self.last_place = 0
        self.end_byte = 0
        """Where its last packet ends in the file, as far as the container tells."""
        self._is_clean = _key_frame_check(container, stream)
        self.is_seekable = self._is_clean is not None
        self._is_hidden = _hidden_frame_check(stream)
        self._clock = Clock(self.base_s)
        self.ticks = array("q")
        self._keys = array("q")
        self._max_tick = -(1 << 62)
        self.last_tick_duration = 0
        self.probe: Any = None
        """The first key frame, decoded, where decord may come to read the stream."""
        self.has_own_turn = False

    def _find_announced_end(self, container: Any) -> float | None:
        """When the stream ends by its own header, in seconds of its timestamps."""
        if self.is_matroska:
            tag_s = _parse_clock(self.stream.metadata.get("DURATION", ""))
            file_s = container.duration / 1e6 if container.duration else None
            # A stream is no longer than its file: a tag that says so is damaged, or another file's.
            return tag_s if tag_s is None or file_s is None else min(tag_s, file_s)
        if self.is_mxf and self.stream.duration:
            return self.stream.duration * self.base_s
        return None

    def add(self, packet: Any, place: int) -> None:
        """Take a packet into account; `place` counts packets of all tracks."""
        if not packet.size:
            # A sample without bytes repeats the picture before it; without a time it is the end of the stream.
            self.num_packets += packet.pts is not None
            return
        self.first_place = self.first_place if self.num_packets else place
        self.last_place = place
        self.end_byte = max(self.end_byte, (packet.pos or 0) + packet.size)
        self.num_packets += 1
        if self.num_packets > MAX_PACKETS:
            raise DecodeFailure("too-large", f"more than {MAX_PACKETS} packets")
        tick = self._clock.set(packet)
        if packet.is_discard:
            return
        if self._is_hidden is not None and self._is_hidden(packet):
            self.num_hidden += 1
            return
        if tick is None:
            return
        self.ticks.append(tick)
        if tick >= self._max_tick:
            self._max_tick, self.last_tick_duration = tick, packet.duration or 0
        if self.is_seekable and packet.is_keyframe:
            data = bytes(packet)
            assert self._is_clean is not None
            self.is_seekable = self._is_clean(data)
            if not self._keys:
                self.probe = _decode_one(self.stream, packet)
                self.is_seekable &= self.probe is not None
                self.has_own_turn = _has_orientation(data, self.stream)
            self._keys.append(tick)

    @property
    def rank(self) -> tuple[bool, bool, int, int, int]:
        """How players choose among tracks: a film before a picture, the default one, the largest, the longest."""
        is_film, is_default = self.num_packets > 1, bool(_disposition(self.stream) & _DEFAULT)
        return is_film, is_default, self.width * self.height, self.num_packets, -self.stream.index

    def as_timeline(self, path: Path, allow_loss: float, may_decord_open: bool) -> Timeline:
        """All of it.

        Raises:
            DecodeFailure: If there is no frame, or fewer than were announced.
        """
        rate = float(self.stream.average_rate or 0)
        num_present = self.num_packets
        is_counted = self.is_avi
        if self.num_packets and not self.ticks and not self.num_hidden:
            # A bare stream stores no times at all.
            is_counted = True
            step = max(1, round(1 / (rate or 25.0) / self.base_s))
            self.ticks = array("q", range(0, step * self.num_packets, step))
            self._max_tick, self.last_tick_duration = self.ticks[-1], step
        num_missing = self._count_missing(path, rate)
        if is_too_short(num_present, num_present + num_missing, allow_loss):
            about = "" if self.announced_frames else "about "
            raise DecodeFailure("truncated", f"{num_present} of {about}{num_present + num_missing} frames are there")
        if not self.ticks:
            raise DecodeFailure("no-frames", "the container announces none")
        ticks = np.unique(np.frombuffer(self.ticks, dtype=np.int64))
        times_s = (ticks.astype(np.float64) - ticks[0]) * self.base_s
        duration_s = float(times_s[-1] + self.last_tick_duration * self.base_s)
        keys = np.searchsorted(ticks, np.unique(np.frombuffer(self._keys, dtype=np.int64))) if self._keys else None
        turn = turn_of(self.probe) if self.probe is not None else Turn()
        # decord turns as MP4's header says; it knows no mirror images, no other container's turns, no stream's own.
        is_turned_right = turn == Turn() or (self.is_mp4 and not turn.is_mirrored and not self.has_own_turn)
        return Timeline(
            times_s=times_s,
            ticks=ticks,
            fps=rate or len(times_s) / max(duration_s, 1e-9),
            duration_s=duration_s,
            is_seekable=(
                self.is_seekable
                and may_decord_open
                and keys is not None
                and is_turned_right
                and self.width * self.height <= _MAX_DECORD_PIXELS
            ),
            is_counted=is_counted,
            num_announced=len(ticks) + num_missing,
            num_missing=num_missing,
            stream_index=self.stream.index,
            frame_pixels=self.width * self.height,
            key_indices=keys,
            has_same_pixels=self.probe is not None
            and self.probe.format.name in _SAME_PIXEL_FORMATS
            and not self.probe.interlaced_frame,
        )

    def _count_missing(self, path: Path, rate: float) -> int:
        """Frames that the stream's own header announces and no packet is there for."""
        if self.announced_frames:
            num_present = self.num_packets
            if self.is_avi and self.ticks:  # a frame that was dropped is a chunk without bytes: time goes on
                num_present = max(num_present, self._max_tick - min(self.ticks) + 1)
            return max(0, self.announced_frames - num_present)
        if not self.ticks:
            return 0
        first_s, end_s = min(self.ticks) * self.base_s, (self._max_tick + self.last_tick_duration) * self.base_s
        rate = len(self.ticks) / (end_s - first_s) if end_s > first_s else rate
        # Writers differ in whether the length counts from zero or from the first frame: the longer one is believed.
        missing_s = 0.0 if self.announced_end_s is None else self.announced_end_s - max(end_s, end_s - first_s)
        num_missing = max(0, round(missing_s * rate))
        if self.is_matroska and not is_matroska_whole(path):
            # Then a gap between frames is no still stretch, but what was in the damaged place.
            gaps = np.diff(np.unique(np.frombuffer(self.ticks, dtype=np.int64)))
            gap_s = float(np.median(gaps)) * self.base_s if len(gaps) else 0.0
            span_s = end_s - first_s + max(0.0, missing_s)
            num_missing = max(num_missing, round(span_s / gap_s) - self.num_packets if gap_s else 0)
        return num_missing


def read_file_timeline(path: Path, allow_loss: float = ALLOWED_LOSS_SHARE) -> Timeline:
    """Read the packets of a file's film.

    Args:
        path: The file.
        allow_loss: Share of the announced frames that may be missing.

    Raises:
        DecodeFailure: If there is no container, no video stream or no frame, or too few frames.
    """
    try:
        head = read_head(path)
        boxes = check_boxes(path, head)
        with open_container(path, head) as container:
            tracks = _list_tracks(container)
            place = 0
            for place, packet in enumerate(container.demux([track.stream for track in tracks.values()])):
                if (track := tracks.get(packet.stream_index)) is not None:
                    track.add(packet, place)
            film = max(tracks.values(), key=lambda track: track.rank)
            if boxes.is_elsewhere and not film.num_packets:
                raise DecodeFailure("unreadable", "its frames lie in another file, and none but itself is opened")
            _check_film(film, container, head)
            _check_neighbours(film, tracks.values(), container)
            _check_rest(path, film.end_byte, head, container.format.name)
            # decord takes a path in UTF-8, and chooses a track by itself.
            is_alone = len(container.streams.video) == 1
            return film.as_timeline(path, allow_loss, is_alone and may_decord_open(head) and is_utf8(str(path)))
    except (av.FFmpegError, OSError, MemoryError) as error:
        raise as_failure(error, path, "unreadable") from error


def _list_tracks(container: Any) -> dict[int, _Track]:
    videos = container.streams.video
    if not videos:
        raise DecodeFailure("no-video-stream", "")
    films = [stream for stream in videos if not _disposition(stream) & _PICTURES]
    if not films:
        raise DecodeFailure("no-video-stream", "only an attached picture")
    known = [stream for stream in films if stream.codec_context is not None]
    if not known:
        raise DecodeFailure("decode-error", "there is no decoder for its codec")
    return {stream.index: _Track(container, stream) for stream in known}


def _check_film(film: _Track, container: Any, head: bytes) -> None:
    """Refuse pictures that were taken for videos, and sizes beyond the limits."""
    name = name_first_bytes(head)
    if film.num_packets <= 1 and name is not None and "picture" in name:
        raise DecodeFailure("unreadable", f"it is {name}")
    width, height = film.width, film.height
    if width * height > MAX_FRAME_PIXELS:
        raise DecodeFailure("too-large", f"frames of {width}x{height}: at most {MAX_FRAME_PIXELS} pixels are decoded")
    check_shape(width, height)


def check_shape(width: int, height: int) -> None:
    """Refuse a frame that is so long and narrow that resizing would make it huge.

    Raises:
        DecodeFailure: With the code `too-large`.
    """
    if min(width, height) and max(width, height) > _LONGEST_SHAPE * min(width, height):
        raise DecodeFailure(
            "too-large", f"frames of {width}x{height}: more than {_LONGEST_SHAPE} times as long as wide"
        )


def _check_neighbours(film: _Track, tracks: Any, container: Any) -> None:
    """Refuse a transport stream in which another film stands before or behind the one that was chosen."""
    if container.format.name not in ("mpegts", "mpeg"):
        return
    for track in tracks:
        if track is film or track.num_packets <= 1:
            continue
        if track.first_place > film.last_place or track.last_place < film.first_place:
            total = film.num_packets + track.num_packets
            raise DecodeFailure(
                "truncated",
                f"{film.num_packets} of {total} frames are in one track: streams of several kinds stand one after the "
                "other in it",
            )


def _check_rest(path: Path, end_byte: int, head: bytes, kind: str) -> None:
    """Refuse a file behind which a second one begins, where reading ends with the first."""
    if kind not in _BEGINNINGS or not end_byte:
        return
    num_bytes, mark = _BEGINNINGS[kind]
    with path.open("rb") as file:
        file.seek(end_byte)
        rest = file.read(_REST_BYTES)
    place = rest.find(head[:num_bytes])
    if place >= 0 and mark in rest[place : place + _BEGINNING_BYTES]:
        raise DecodeFailure(
            "truncated", "a second file begins behind the first one, and players show the first: take them apart"
        )


def is_utf8(name: str) -> bool:
    """Whether a file's name is text, or bytes that only the file system knows what to do with."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _disposition(stream: Any) -> Any:
    try:
        return stream.disposition
    except ValueError:  # a flag that this version of PyAV has no name for
        return av.stream.Disposition(0)


def _parse_clock(text: str) -> float | None:
    """`00:00:08.000000000` in seconds."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text.strip())
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None


def _decode_one(stream: Any, packet: Any) -> Any:
    """The frame of a key packet; None where it does not decode."""
    context = stream.codec_context
    context.thread_count = 1
    try:
        frames = context.decode(packet) or context.decode(None)
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        return None
    return frames[0] if frames else None


def _key_frame_check(container: Any, stream: Any) -> Callable[[bytes], bool] | None:
    """How to tell that nothing behind a key frame needs what stands before it; None where decord is not to seek.

    Key frames of open groups and of intra refresh are marked as such, and are not clean: decord starts at them and
    returns neighbours of the frames that were asked for.
    """
    if not _SEEKABLE_CONTAINERS & set(container.format.name.split(",")):
        return None
    name = _codec_name(stream)
    if name not in _SEEKABLE_CODECS:
        return None
    if name in ("vp8", "vp9"):
        return lambda _: True
    length_size = _nal_length_size(stream)
    if length_size is None:
        return None
    if name == "h264":
        return lambda data: any(unit[0] & 31 in _H264_IDR for unit in _nal_units(data, length_size))
    return lambda data: any(unit[0] >> 1 & 63 in _HEVC_IDR for unit in _nal_units(data, length_size))


def _hidden_frame_check(stream: Any) -> Callable[[Any], bool] | None:
    """How to tell a packet whose picture is never shown: VP8 and VP9 predict from such pictures."""
    name = _codec_name(stream)
    if name == "vp8":
        return lambda packet: not memoryview(packet)[0] & 0x10
    if name == "vp9":
        return _is_hidden_vp9
    return None


def _is_hidden_vp9(packet: Any) -> bool:
    data = memoryview(packet)
    if data[-1] & 0xE0 == 0xC0 or data[0] >> 6 != 2:  # a superframe ends with a frame that is shown
        return False
    bits = data[0] << 8 | (data[1] if len(data) > 1 else 0)
    is_profile_3 = bits >> 12 & 3 == 3
    shift = 10 if is_profile_3 else 11  # show_existing_frame follows marker, profile and profile 3's reserved bit
    return not bits >> shift & 1 and not bits >> (shift - 2) & 1


def _codec_name(stream: Any) -> str:
    name = stream.codec_context.name if stream.codec_context else ""
    return {"libvpx": "vp8", "libvpx-vp9": "vp9"}.get(name, name)


def _nal_length_size(stream: Any) -> int | None:
    """Bytes of a NAL unit's length field, as avcC or hvcC says; None where there is neither."""
    extradata = bytes(stream.codec_context.extradata or b"")
    place = 4 if _codec_name(stream) == "h264" else 21
    return None if len(extradata) <= place or extradata[0] != 1 else (extradata[place] & 3) + 1


def _nal_units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The first three bytes of each NAL unit of a packet with length fields."""
    place = 0
    while place + length_size < len(data):
        length = int.from_bytes(data[place : place + length_size], "big")
        yield data[place + length_size : place + length_size + 3]
        place += length_size + length


def _has_orientation(data: bytes, stream: Any) -> bool:
    """Whether the stream itself, not its container, says how it is to be turned: a message (SEI) of H.264 or HEVC."""
    length_size = _nal_length_size(stream)
    if length_size is None:
        return False
    is_h264 = _codec_name(stream) == "h264"
    for unit in _nal_units(data, length_size):
        kind = unit[0] & 31 if is_h264 else unit[0] >> 1 & 63
        payload = unit[1:2] if is_h264 else unit[2:3]
        if kind == (6 if is_h264 else 39) and payload == bytes([_SEI_ORIENTATION]):
            return True
    return False
