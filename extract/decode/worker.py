"""The decoder process: `python -m s4v.extract.decode.worker`. Reads requests, writes frames, imports no torch.

One JSON request a line on standard input. For each, JSON lines on standard output: `source` with the file's size, time
and hash, `opened` with the CPU seconds that its length is worth, `done`; then the frames' bytes, when there are any. A
file that hangs or crashes the decoder takes this process with it and nothing else: the parent starts another.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from ...store.offsets import DEFAULT_PIXEL_EDGE, SEEN_FRAME, PixelOffset
from ...store.records import View
from .sampling import is_open_ended, pick_neighbours, pick_offset_frames, sample_open_ended
from .source import Fingerprint, SourceFacts, read_source, take_fingerprint
from .trouble import MEMORY_LIMIT, DecodeTrouble, as_failure, unexpected_failure, verdict_of
from .video_file import ALLOWED_LOSS_SHARE, DecodeFailure, Timeline, VideoFile, decord
from .views import BLACK, Drawing, count_views, make_views, render_views

# A container may announce any length: it gets at most so many CPU seconds for each packet that it really holds.
_MOST_PER_PACKET_S = 0.1
# No file gets more CPU time than this beyond the timeout.
_MAX_BUDGET_S = 24 * 3600.0


# What a decoder may take beyond what it has when it starts, and for each pixel of a frame: a codec keeps up to 17
# frames of at most 3 bytes a pixel, and one frame is held as RGB three times on its way.
_MEMORY_BYTES = 2 << 30
_BYTES_PER_PIXEL = 64
# Pixel frames beside the cached ones are there as they were rendered, and once more as the answer has them.
_COPIES = 2


class LastVideo:
    """The video that was asked for last: segments of a long one come one after another."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._video: VideoFile | None = None
        self._source_key: tuple[object, ...] = ()
        self._source: SourceFacts | None = None

    def open(
        self, path: Path, frame_fps: float | None, allow_loss: float = ALLOWED_LOSS_SHARE, mark: Fingerprint = ()
    ) -> VideoFile:
        """The same one, if it is asked for again and has not changed."""
        key = (path, frame_fps, allow_loss, mark or take_fingerprint(path))
        if self._video is None or key != self._key:
            self._video = None  # two at once are never open
            self._video, self._key = VideoFile(path, frame_fps, allow_loss), key
        return self._video

    def source_of(self, path: Path, mark: Fingerprint) -> SourceFacts:
        """Size, time and hash of a file, read once as long as it does not change."""
        if self._source is None or self._source_key != (path, mark):
            self._source, self._source_key = read_source(path), (path, mark)
        return self._source


class _Renderer:
    """Makes views of frames as they come; the first frame's size decides where they are cut."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self.size: tuple[int, int] | None = None
        self.views: list[View] = []

    def __call__(self, frame: np.ndarray) -> list[np.ndarray]:
        if self.size is None:
            height, width = frame.shape[:2]
            request, self.size = self._request, (width, height)
            drawing = Drawing(
                steps=tuple(request.get("augmentation", ())),
                seed=request.get("seed", 0),
                video_id=request.get("video_id", ""),
                class_name=request.get("class_name"),
            )
            crop_height, crop_width = request["image_size"]
            name, crop = request.get("views", "centre"), (crop_width, crop_height)
            self.views = make_views(name, width, height, request["resize"], crop, drawing)
        return render_views(frame, self.views, self._request.get("padding", BLACK))


def decode(
    request: dict[str, Any],
    announce: Callable[[float], None],
    last_video: LastVideo | None = None,
    tell_source: Callable[[SourceFacts], None] = lambda _: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Decode, resize and crop the wanted frames of one video.

    Args:
        request: path, num_frames (0 asks for the video's length alone, and the frames that `all` or `fps:X` would
            take; else those take what they take), sampling, num_clips, holds_validation_clip, start_s, end_s, resize,
            image_size (H, W), views, pixel_offsets, pixel_edge, decoder; padding (a colour), allow_loss; frame_fps for
            folders of pictures; video_id, class_name, seed and augmentation for views that are drawn.
        announce: Called with the CPU seconds that the video's length is worth, as soon as it is known.
        last_video: What the request before this one has left open.
        tell_source: Called with the source's facts before anything is decoded, unless the length alone is asked for.

    Returns:
        What the manifest records, and (A, F, O, H, W, 3) uint8 pixels, cached frames in the order of time. A frame of
        the file that is wanted in several places is decoded once.

    Raises:
        DecodeFailure: With the reason.
        DecodeTrouble: If the machine did not let it be decoded.
    """
    path = Path(request["path"])
    last_video = last_video or LastVideo()
    try:
        mark = _check_there(path)
        source: dict[str, Any] = {}
        if request["num_frames"]:
            facts = last_video.source_of(path, mark)
            tell_source(facts)
            source = asdict(facts)
        failure, answer = None, None
        try:
            answer = _decode_open(request, path, mark, announce, last_video)
        except DecodeFailure as caught:
            failure = caught
        if take_fingerprint(path) != mark:
            raise DecodeFailure("source-changing", "")
        if failure is not None:
            raise verdict_of(failure, path)
    except (OSError, MemoryError) as error:
        raise as_failure(error, path) from error
    assert answer is not None
    if answer[0]["reason"] is not None and isinstance(trouble := verdict_of(_CLAMPED, path), DecodeTrouble):
        raise trouble
    return {**answer[0], **source}, answer[1]


_CLAMPED = DecodeFailure("truncated", "")


def _check_there(path: Path) -> Fingerprint:
    """What stat tells of a source, before anything is read.

    Raises:
        DecodeFailure: If it is not there, or has no bytes.
        OSError: If the system does not tell.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DecodeFailure("missing-file", "something else is in its place")
    mark = take_fingerprint(path)
    if stat.S_ISREG(mode) and path.stat().st_size == 0:
        raise DecodeFailure("empty-file", "")
    return mark


def _decode_open(
    request: dict[str, Any], path: Path, mark: Fingerprint, announce: Callable[[float], None], last_video: LastVideo
) -> tuple[dict[str, Any], np.ndarray]:
    MEMORY_LIMIT.set(_MEMORY_BYTES)
    video = last_video.open(path, request.get("frame_fps"), request.get("allow_loss", ALLOWED_LOSS_SHARE), mark)
    timeline = video.timeline
    MEMORY_LIMIT.set(_MEMORY_BYTES + _BYTES_PER_PIXEL * timeline.frame_pixels + _offset_bytes(request, timeline))
    announce(min(timeline.duration_s or 0.0, _MOST_PER_PACKET_S * len(timeline.times_s), _MAX_BUDGET_S))
    if request["num_frames"] == 0:
        own = {"count": len(_choose_open_ended(timeline.times_s, timeline, request))} if _is_open(request) else {}
        return {"duration_s": timeline.duration_s, "reason": None, "views": [], **own}, np.empty(0, np.uint8)
    renderer = _Renderer(request)
    decoded = video.decode(
        request["decoder"],
        lambda times_s: _choose_frames(times_s, timeline, request),
        renderer,
        is_whole=(request["start_s"], request["end_s"]) == (None, None),
    )
    offsets = _offsets_of(request)
    picked = np.reshape(decoded.frame_indices, (-1, len(offsets)))  # clip after clip
    cached = picked[:, offsets.index(SEEN_FRAME)]
    order = np.argsort(cached, kind="stable")
    frame_indices = cached[order].tolist()
    assert renderer.size is not None
    width, height = renderer.size
    facts = {
        "decoder": decoded.decoder,
        "reason": decoded.note,
        "num_frames": decoded.num_frames,
        "fps": timeline.fps,
        "duration_s": timeline.duration_s,
        "width": width,
        "height": height,
        "frame_indices": frame_indices,
        "timestamps_s": [float(timeline.times_s[index]) for index in frame_indices],
        "views": [asdict(view) for view in renderer.views],
        **_find_clips(cached.tolist(), request.get("num_clips", 1), request.get("holds_validation_clip", False)),
    }
    return facts, _gather_pixels(decoded.frames, picked[order])


def _offsets_of(request: dict[str, Any]) -> list[PixelOffset]:
    return [PixelOffset.of(offset) for offset in request.get("pixel_offsets", (0,))]


def _offset_bytes(request: dict[str, Any], timeline: Timeline) -> int:
    """What pixel frames beside the cached ones take: with them a video has as much memory left as without."""
    more = len(_offsets_of(request)) - 1
    views = count_views(request.get("views", "centre"))
    num_frames = len(timeline.times_s) if _is_open(request) else request["num_frames"]
    height, width = request["image_size"]
    return _COPIES * more * num_frames * views * height * width * 3


def _gather_pixels(frames: Mapping[int, Sequence[np.ndarray]], picked: np.ndarray) -> np.ndarray:
    """Views of frames, by their index, to (A, F, O, H, W, 3).

    Args:
        frames: (H, W, 3) uint8 of each view.
        picked: (F, O) indices.
    """
    first = frames[int(picked[0, 0])]
    pixels = np.empty((len(first), *picked.shape, *first[0].shape), np.uint8)
    for (place, offset), index in np.ndenumerate(picked):
        for view, frame in enumerate(frames[int(index)]):
            pixels[view, place, offset] = frame
    return pixels


def _find_clips(indices: Sequence[int], num_clips: int, holds_validation_clip: bool) -> dict[str, Any]:
    """Where the frames of each clip stand: from clip after clip to places in the order of time."""
    places = np.empty(len(indices), dtype=int)
    places[np.argsort(indices, kind="stable")] = np.arange(len(indices))
    clips = places.reshape(num_clips + holds_validation_clip, -1).tolist()
    return {"eval_clips": clips[:num_clips], "validation_clip": clips[num_clips] if holds_validation_clip else None}


def _is_open(request: dict[str, Any]) -> bool:
    return is_open_ended(request["sampling"])


def _choose_frames(times_s: np.ndarray, timeline: Timeline, request: dict[str, Any]) -> list[int]:
    """Sample among the frames of the wanted segment, clip after clip; a whole video is one segment.

    In a segment without a frame of its own, the last frame before it is on the screen. Behind each cached frame its
    pixel frames stand, of the same segment: a row is made as if its segment were a file of its own.

    Returns:
        (cached frames x O) indices, offsets fastest.
    """
    start_s, end_s = request["start_s"], request["end_s"]
    if _is_open(request):
        picked = _choose_open_ended(times_s, timeline, request)
        return [index for frame in picked for index in frame]
    if np.isnan(times_s).any() and (start_s, end_s) != (None, None):
        raise DecodeFailure("no-frames", "a segment was asked for, and the rate of the frames is not known")
    first = 0 if start_s is None else int(np.searchsorted(times_s, start_s))
    last = len(times_s) if end_s is None else int(np.searchsorted(times_s, end_s))
    if last <= first and first > 0 and (start_s or 0.0) < timeline.end_s:
        first, last = first - 1, first
    if last <= first:
        what = "no frame" if start_s is None and end_s is None else f"no frame from {start_s} s to {end_s} s"
        raise DecodeFailure("no-frames", f"{what} among {len(times_s)}")
    num_clips = request.get("num_clips", 1)
    holds_validation_clip = request.get("holds_validation_clip", False)
    num_steps = request["num_frames"] // (num_clips + holds_validation_clip)
    picked = pick_offset_frames(
        request["sampling"],
        last - first,
        num_steps,
        num_clips,
        _offsets_of(request),
        edge=request.get("pixel_edge", DEFAULT_PIXEL_EDGE),
        holds_validation_clip=holds_validation_clip,
    )
    return [first + index for frame in picked for index in frame]


def _choose_open_ended(times_s: np.ndarray, timeline: Timeline, request: dict[str, Any]) -> list[list[int]]:
    """The frames of a row that is as long as its segment; at a rate the one before it may be on the screen at first.

    Returns:
        (cached frames, O) indices.
    """
    name, start_s, end_s = request["sampling"], request["start_s"], request["end_s"]
    begin_s, stop_s = start_s or 0.0, min(timeline.end_s, math.inf if end_s is None else end_s)
    first = 0 if start_s is None else int(np.searchsorted(times_s, start_s))
    stop = len(times_s) if end_s is None else int(np.searchsorted(times_s, end_s))
    if np.isnan(times_s).any():
        if name != "all" or (start_s, end_s) != (None, None):
            raise DecodeFailure("no-frames", f"{name} was asked for, and the rate of the frames is not known")
        indices = list(range(len(times_s)))
    else:
        indices = sample_open_ended(name, times_s[:stop] - begin_s, stop_s - begin_s) if begin_s < stop_s else []
    if not indices:
        length_s = max(0.0, stop_s - begin_s)
        raise DecodeFailure("too-short", f"{length_s:.3g} s, in which --sampling {name} takes no frame")
    row = range(min(first, indices[0]), stop)
    return pick_neighbours(indices, row, _offsets_of(request), edge=request.get("pixel_edge", DEFAULT_PIXEL_EDGE))


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until standard input ends."""
    _send(answers, {"event": "ready", "versions": library_versions()})
    last_video = LastVideo()
    for line in requests:
        request = json.loads(line)
        timeout_s = request["timeout_s"]
        _limit_cpu(timeout_s)

        def announce(length_s: float, timeout_s: float = timeout_s) -> None:
            _limit_cpu(timeout_s + length_s)
            _send(answers, {"event": "opened", "budget_s": timeout_s + length_s})

        def tell_source(source: SourceFacts) -> None:
            _send(answers, {"event": "source", **asdict(source)})

        try:
            facts, pixels = decode(request, announce, last_video, tell_source)
        except Exception as error:  # one odd file must not end the process: it becomes a row with its reason
            failure = error if isinstance(error, DecodeFailure) else unexpected_failure(error)
            is_pending = isinstance(failure, DecodeTrouble)
            message = {
                "event": "done",
                "ok": False,
                "code": failure.code,
                "detail": str(failure),
                "pending": is_pending,
            }
            _send(answers, message)
            if failure.code in ("too-large", "no-memory"):
                last_video = LastVideo()
        else:
            _send(answers, {"event": "done", "ok": True, "shape": pixels.shape, **facts}, pixels)
            del pixels


def library_versions() -> dict[str, str]:
    """Versions of what decides the pixels."""
    from PIL import __version__ as pillow_version

    versions = {"av": av.__version__, "pillow": pillow_version}
    return versions if decord is None else {"decord": decord.__version__, **versions}


def _send(answers: BinaryIO, message: dict[str, Any], pixels: np.ndarray | None = None) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    if pixels is not None:
        answers.write(np.ascontiguousarray(pixels).data)
    answers.flush()


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end this process (SIGXCPU) after so many more CPU seconds: no busy machine shortens them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _die_with_parent() -> None:
    """Linux: ask for SIGKILL when the parent's thread ends, however it ends. Elsewhere end of input must do."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    """Entry of the decoder process."""
    _die_with_parent()
    # Ctrl-C, a closed terminal and a scheduler's preemption reach the whole group. The parent decides: a decoder that
    # died first would make a good video a failed row. It ends with its parent in any case.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Libraries print to descriptors 1 and 2: answers go through a private copy of 1. What is printed to 2 the parent
    # reads where this process dies: C++ says there that memory was refused.
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    av.logging.set_level(av.logging.PANIC)
    if decord is not None:
        decord.logging.set_level(decord.logging.QUIET)
    MEMORY_LIMIT.begin(_MEMORY_BYTES)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
