"""The decoder process: `python -m s4v.extract._decoder`. Reads requests, writes frames, imports no torch.

One JSON request a line on standard input. For each, on standard output: `opened` (a JSON line, once the video's
length is known, with the CPU seconds it gets), then `done` (a JSON line), then the frames' bytes, when there are any.
A file that hangs or crashes the decoder takes this process with it and nothing else: the parent starts another.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from ._video import DecodeFailure, VideoFile, decord, scrub_message
from .resizing import VIEWS, render_view
from .sampling import SAMPLINGS

# A container may announce any length: it gets at most so many CPU seconds for each packet that it really holds.
_MOST_PER_PACKET_S = 0.1
# No file gets more CPU time than this beyond the timeout.
_MAX_BUDGET_S = 24 * 3600.0


class LastVideo:
    """The video that was asked for last: segments of a long one come one after another."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._video: VideoFile | None = None

    def open(self, path: Path, frame_fps: float | None) -> VideoFile:
        """The same one, if it is asked for again and has not changed."""
        stat = path.stat()
        key = (path, frame_fps, stat.st_size, stat.st_mtime_ns)
        if self._video is None or key != self._key:
            self._video = None  # two at once are never open
            self._video, self._key = VideoFile(path, frame_fps), key
        return self._video


def decode(
    request: dict[str, Any], announce: Callable[[float], None], last_video: LastVideo | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """Decode, resize and crop the wanted frames of one video.

    Args:
        request: path, num_frames (0 asks for the video's length alone), sampling, num_clips, start_s, end_s, resize,
            crop_px, views, decoder; frame_fps for folders of JPEGs.
        announce: Called with the CPU seconds that the video's length is worth, as soon as it is known.
        last_video: What the request before this one has left open.

    Returns:
        What the manifest records, and (A, F, 1, H, W, 3) uint8 pixels, frames in the order of time.

    Raises:
        DecodeFailure: With the reason.
    """
    path = Path(request["path"])
    if not (path.is_file() or path.is_dir()):
        raise DecodeFailure("missing-file", "")
    if path.is_file() and path.stat().st_size == 0:
        raise DecodeFailure("empty-file", "")
    video = (last_video or LastVideo()).open(path, request.get("frame_fps"))
    timeline = video.timeline
    announce(min(timeline.duration_s or 0.0, _MOST_PER_PACKET_S * len(timeline.times_s), _MAX_BUDGET_S))
    if request["num_frames"] == 0:
        return {"duration_s": timeline.duration_s, "views": []}, np.empty(0, np.uint8)
    decoded = video.decode(request["decoder"], lambda times_s: _choose_frames(times_s, request))
    height, width = next(iter(decoded.frames.values())).shape[:2]
    views = VIEWS[request.get("views", "centre")](width, height, request["resize"], request["crop_px"])
    rendered = [{index: render_view(frame, view) for index, frame in decoded.frames.items()} for view in views]
    frame_indices = sorted(decoded.frame_indices)
    pixels = np.stack([[frames[index] for index in frame_indices] for frames in rendered])
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
        "views": [asdict(view) for view in views],
        "eval_clips": _find_clips(decoded.frame_indices, request.get("num_clips", 1)),
    }
    return facts, pixels[:, :, None]


def _find_clips(indices: Sequence[int], num_clips: int) -> list[list[int]]:
    """Where the frames of each clip stand: from clip after clip to places in the order of time."""
    places = np.empty(len(indices), dtype=int)
    places[np.argsort(indices, kind="stable")] = np.arange(len(indices))
    return places.reshape(num_clips, -1).tolist()


def _choose_frames(times_s: np.ndarray, request: dict[str, Any]) -> list[int]:
    """Sample among the frames of the wanted segment, clip after clip; a whole video is one segment."""
    start_s, end_s = request["start_s"], request["end_s"]
    if np.isnan(times_s).any() and (start_s, end_s) != (None, None):
        raise DecodeFailure("no-frames", "a segment was asked for, and the rate of the frames is not known")
    first = 0 if start_s is None else int(np.searchsorted(times_s, start_s))
    last = len(times_s) if end_s is None else int(np.searchsorted(times_s, end_s))
    if last <= first:
        what = "no frame" if start_s is None and end_s is None else f"no frame from {start_s} s to {end_s} s"
        raise DecodeFailure("no-frames", f"{what} among {len(times_s)}")
    num_clips = request.get("num_clips", 1)
    clips = SAMPLINGS[request["sampling"]](last - first, request["num_frames"] // num_clips, num_clips)
    return [first + index for clip in clips for index in clip]


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

        try:
            facts, pixels = decode(request, announce, last_video)
        except DecodeFailure as failure:
            _send(answers, {"event": "done", "ok": False, "code": failure.code, "detail": str(failure)})
        except Exception as error:  # one odd file must not end the process: it becomes a row with its reason
            detail = f"{type(error).__name__}: {scrub_message(error, Path(request['path']))}"
            _send(answers, {"event": "done", "ok": False, "code": "decode-error", "detail": detail})
        else:
            _send(answers, {"event": "done", "ok": True, "shape": pixels.shape, **facts}, pixels)


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
    # Libraries print to descriptors 1 and 2: answers go through a private copy of 1, the rest nowhere.
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    av.logging.set_level(av.logging.PANIC)
    if decord is not None:
        decord.logging.set_level(decord.logging.QUIET)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
