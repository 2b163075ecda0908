"""The decoder process: `python -m s4v.extract._decoder`. Reads requests, writes frames, imports no torch.

One JSON request a line on standard input. For each, on standard output: `opened` (a JSON line, once the video's
length is known), then `done` (a JSON line), then the frames' bytes, when there are any. A file that hangs or
crashes the decoder takes this process with it and nothing else: the parent starts another.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from .resizing import centre_view, render_view
from .sampling import SAMPLINGS

try:  # wheels exist for Linux on x86-64 and for Windows
    import decord
except ImportError:
    decord = None

_ALLOWED_LOSS_FRAMES = 2
_ALLOWED_LOSS_SHARE = 0.02

# decord: how many damaged frames it may replace by the last good one before it raises. Zero means "any number",
# so a share too small to be one frame.
_NO_REPLACED_FRAMES = 1e-9


class DecodeFailure(Exception):
    """A video that cannot be decoded; `code` is one of the manifest's reasons."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True)
class Decoded:
    """What a decoder found: all frame times, and the frames that were wanted."""

    decoder: str
    timestamps_s: np.ndarray
    """(n,) of every frame that can be decoded, rising."""
    fps: float
    duration_s: float
    frame_indices: list[int]
    """Wanted frames, counted in the file."""
    frames: dict[int, np.ndarray]
    """(H, W, 3) uint8, upright, by frame index."""
    note: str | None = None
    """Says so when the announced length was clamped."""


Choose = Callable[[np.ndarray], list[int]]
"""Frame times of the whole file -> indices of the wanted frames."""


def decode(request: dict[str, Any], announce: Callable[[float], None]) -> tuple[dict[str, Any], np.ndarray]:
    """Decode, resize and crop the wanted frames of one video.

    Args:
        request: path, num_frames, sampling, start_s, end_s, resize, crop_px, decoder.
        announce: Called with the video's length in seconds as soon as it is known.

    Returns:
        What the manifest records, and (1, F, 1, H, W, 3) uint8 pixels of one centre view.

    Raises:
        DecodeFailure: With the reason.
    """
    path = Path(request["path"])
    if not path.is_file():
        raise DecodeFailure("missing-file", "")
    if path.stat().st_size == 0:
        raise DecodeFailure("empty-file", "")

    def choose(timestamps_s: np.ndarray) -> list[int]:
        return _choose_frames(timestamps_s, request)

    decoded = _decode_with(request["decoder"], path, choose, announce)
    height, width = next(iter(decoded.frames.values())).shape[:2]
    view = centre_view(width, height, request["resize"], request["crop_px"])
    rendered = {index: render_view(frame, view) for index, frame in decoded.frames.items()}
    pixels = np.stack([rendered[index] for index in decoded.frame_indices])
    facts = {
        "decoder": decoded.decoder,
        "reason": decoded.note,
        "num_frames": len(decoded.timestamps_s),
        "fps": decoded.fps,
        "duration_s": decoded.duration_s,
        "width": width,
        "height": height,
        "frame_indices": decoded.frame_indices,
        "timestamps_s": [float(decoded.timestamps_s[index]) for index in decoded.frame_indices],
        "views": [asdict(view)],
    }
    return facts, pixels[None, :, None]


def _choose_frames(timestamps_s: np.ndarray, request: dict[str, Any]) -> list[int]:
    """Sample among the frames of the wanted segment; a whole video is one segment."""
    start_s, end_s = request["start_s"], request["end_s"]
    first = 0 if start_s is None else int(np.searchsorted(timestamps_s, start_s))
    last = len(timestamps_s) if end_s is None else int(np.searchsorted(timestamps_s, end_s))
    if last <= first:
        what = "no frame" if start_s is None and end_s is None else f"no frame from {start_s} s to {end_s} s"
        raise DecodeFailure("no-frames", f"{what} among {len(timestamps_s)}")
    return [first + index for index in SAMPLINGS[request["sampling"]](last - first, request["num_frames"])]


def _decode_with(name: str, path: Path, choose: Choose, announce: Callable[[float], None]) -> Decoded:
    if name == "pyav" or (name == "auto" and decord is None):
        return decode_pyav(path, choose, announce)
    if decord is None:
        raise DecodeFailure("decode-error", "decord has no wheel for this system: use --decoder pyav")
    try:
        return decode_decord(path, choose, announce)
    except DecodeFailure as failure:
        if name == "decord" or failure.code == "no-frames":
            raise
        return decode_pyav(path, choose, announce)


def decode_decord(path: Path, choose: Choose, announce: Callable[[float], None]) -> Decoded:
    """Decode with decord, which seeks; any frame it cannot decode is an error."""
    try:
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=_NO_REPLACED_FRAMES)
        timestamps_s = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        duration_s = float(reader.get_frame_timestamp(len(reader) - 1)[1])
        if not _are_times(timestamps_s):
            raise DecodeFailure("decode-error", "decord reads no frame times from this container")
        announce(duration_s)
        indices = choose(timestamps_s)
        wanted = sorted(set(indices))
        frames = reader.get_batch(wanted).asnumpy()
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, ValueError, IndexError) as error:
        raise DecodeFailure("decode-error", _scrub(error, path)) from error
    return Decoded(
        decoder="decord",
        timestamps_s=timestamps_s,
        fps=float(reader.get_avg_fps()),
        duration_s=duration_s,
        frame_indices=indices,
        frames=dict(zip(wanted, frames, strict=True)),
    )


def _are_times(timestamps_s: np.ndarray) -> bool:
    """Whether decord's frame times are real: in AVI files it finds none, and then seeks to wrong frames."""
    return bool(np.isfinite(timestamps_s).all() and timestamps_s[0] > -1 and (np.diff(timestamps_s) >= 0).all())


def decode_pyav(path: Path, choose: Choose, announce: Callable[[float], None]) -> Decoded:
    """Decode with PyAV, in order from the start; a slightly short video is clamped, a shorter one refused."""
    times, fps, duration_s = _scan_pyav(path)
    announce(duration_s)
    indices = choose(times)
    frames = dict(_read_pyav(path, set(indices), times))
    if set(indices) <= frames.keys():
        return Decoded("pyav", times, fps, duration_s, indices, frames)
    good = sorted(index for index, _ in _read_pyav(path, set(range(len(times))), times, keep=False))
    lost = len(times) - len(good)
    if not good or lost > max(_ALLOWED_LOSS_FRAMES, _ALLOWED_LOSS_SHARE * len(times)):
        raise DecodeFailure("truncated", f"{len(good)} of {len(times)} frames decode")
    chosen = [good[place] for place in choose(times[good])]
    note = f"clamped: {len(good)} of {len(times)} frames decode"
    frames = dict(_read_pyav(path, set(chosen), times))
    return Decoded("pyav", times[good], fps, duration_s, chosen, frames, note)


def _scan_pyav(path: Path) -> tuple[np.ndarray, float, float]:
    """Times of all frames that the container announces, from its packets alone."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DecodeFailure("no-video-stream", "")
            stream: Any = container.streams.video[0]
            packets: list[Any] = [p for p in container.demux(stream) if p.pts is not None and not p.is_discard]
            ticks = sorted({p.pts for p in packets})
            if not ticks or stream.codec_context is None:
                raise DecodeFailure("no-frames", "the container announces none")
            base = float(stream.time_base)
            times = np.asarray(ticks, dtype=np.float64) * base
            last_s = max((p.duration or 0) for p in packets if p.pts == ticks[-1]) * base
            duration_s = float(times[-1] + last_s)
            fps = float(stream.average_rate or 0) or len(times) / max(duration_s, 1e-9)
            return times, fps, duration_s
    except av.FFmpegError as error:
        raise DecodeFailure("unreadable", _scrub(error, path)) from error


def _read_pyav(
    path: Path, wanted: set[int], times: np.ndarray, *, keep: bool = True
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield wanted frames that decode, by index; after an error, nothing until the next clean key frame.

    What follows a broken frame is predicted from it: the decoder shows it, and it is wrong.
    """
    last = max(wanted)
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        base = float(stream.time_base)
        # AVI stores decoding order only: what FFmpeg makes up as display times may go backwards. Frames come out in
        # display order, so they are counted; behind an error the count is lost.
        is_counted = container.format.name == "avi"
        count = 0
        is_broken = False
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                is_broken = True
                continue
            for frame in decoded:
                is_broken = frame.is_corrupt or (is_broken and (is_counted or not frame.key_frame))
                if is_broken or (frame.pts is None and not is_counted):
                    continue
                index = count if is_counted else int(np.searchsorted(times, frame.pts * base - 1e-9))
                count += 1
                if index in wanted:
                    yield index, _upright(frame) if keep else np.empty(0)
                if index >= last:
                    return


def _upright(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8, turned as the file's display matrix says; decord does this by itself."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)


def _scrub(error: Exception, path: Path) -> str:
    """An error's message without clocks, addresses, paths and source lines: the same in every run."""
    text = str(error).replace(str(path), "").strip()
    text = text.splitlines()[0].partition("; last error log")[0] if text else type(error).__name__
    text = re.sub(r"\[(\d\d:\d\d:\d\d|Errno -?\d+)\]", "", text)
    text = re.sub(r"0x[0-9a-f]+", "", text)
    text = re.sub(r"(/[\w.-]+)+(:\d+)?:?", "", text)
    return re.sub(r"\s+", " ", text).strip(" :;'")[:160]


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until standard input ends."""
    _send(answers, {"event": "ready", "versions": library_versions()})
    for line in requests:
        request = json.loads(line)
        timeout_s = request["timeout_s"]
        _limit_cpu(timeout_s)

        def announce(duration_s: float, timeout_s: float = timeout_s) -> None:
            _limit_cpu(timeout_s + duration_s)
            _send(answers, {"event": "opened", "duration_s": duration_s})

        try:
            facts, pixels = decode(request, announce)
        except DecodeFailure as failure:
            _send(answers, {"event": "done", "ok": False, "code": failure.code, "detail": str(failure)})
        except Exception as error:  # one odd file must not end the process: it becomes a row with its reason
            detail = f"{type(error).__name__}: {_scrub(error, Path(request['path']))}"
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
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
