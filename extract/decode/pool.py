"""Decoder processes, seen from the parent: ask for a video's frames, get them or the reason why not."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from ...device import count_cores
from ...errors import EnvironmentFailedError
from ...store.offsets import DEFAULT_PIXEL_EDGE
from ...store.records import VideoRecord, View
from ..config import ExtractConfig
from ..datasets import frame_rate
from .views import BLACK, Colour, count_views

# Wall seconds for one CPU second of budget: a stuck read or a deadlock uses no CPU.
_WALL_FACTOR = 5
_START_TIMEOUT_S = 120.0
# A process that is killed while it starts says nothing about anything: it is started again.
_START_TRIES = 4
# Decoded frames that wait for the consumer, of all videos, where more than one for each decoder are ahead.
_AHEAD_BYTES = 2**30
_KILLED = "killed"
"""Code of a decoder that ended by SIGKILL, which no file causes: it never stands in a row."""


_AS_MANY_AS_THERE_ARE = 1
"""Frames that are asked for where the row's length decides: any number but 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRequest:
    """Which frames of which file, and how they are to look."""

    path: str
    num_frames: int
    """0 asks for the video's length alone, and for how many frames `all` or `fps:X` would take; else those take what
    they take."""
    sampling: str
    resize: str
    image_size: tuple[int, int]
    """H, W of the picture that the backbone sees."""
    padding: Colour = BLACK
    """What stands where there is no picture: whole frames fill theirs in one direction alone."""
    num_clips: int = 1
    """Which share the frames evenly."""
    holds_validation_clip: bool = False
    """Whether one clip more shares them."""
    views: str = "centre"
    start_s: float | None = None
    end_s: float | None = None
    frame_fps: float | None = None
    """Rate of frames, where `path` is a folder of JPEGs; None where it is not known."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    timeout_s: float = 60.0
    allow_loss: float = 0.02
    """Share of the announced frames that may be missing from a good video."""
    augmentation: tuple[str, ...] = ()
    """Steps of views that are drawn; they depend on this and on the next three."""
    seed: int = 0
    video_id: str = ""
    class_name: str | None = None
    pixel_offsets: tuple[int | str, ...] = (0,)
    """Pixel frames of each cached frame, as a store records them."""
    pixel_edge: str = DEFAULT_PIXEL_EDGE

    @property
    def answer_bytes(self) -> int:
        """Of the pixels that come back."""
        frames = self.num_frames * len(self.pixel_offsets) * count_views(self.views)
        return frames * self.image_size[0] * self.image_size[1] * 3

    @classmethod
    def of(
        cls,
        record: VideoRecord,
        config: ExtractConfig,
        *,
        image_size: tuple[int, int],
        padding: Colour = BLACK,
        num_frames: int | None = None,
    ) -> Self:
        """What an extraction asks of one video's decoding: what its split caches, or so many frames for a sample."""
        split = record.split
        is_sample = num_frames is not None
        if num_frames is None:
            num_frames = _AS_MANY_AS_THERE_ARE if config.is_open_ended else config.frames_of(split)
        return cls(
            path=str(config.root.resolve() / record.path),
            num_frames=num_frames,
            sampling="uniform" if is_sample else config.sampling_of_row(record),
            num_clips=1 if is_sample else config.clips_of(split),
            holds_validation_clip=not is_sample and bool(config.validation_clips_of(split)),
            resize=config.recipe.resize,
            image_size=image_size,
            padding=padding,
            views=config.sampled_views_of(split) if is_sample else config.views_of(split),
            start_s=record.start_s,
            end_s=record.end_s,
            frame_fps=frame_rate(config.dataset),
            decoder=config.decoder,
            timeout_s=config.decode_timeout_s,
            allow_loss=config.allow_loss,
            pixel_offsets=(0,) if is_sample else tuple(offset.recorded for offset in config.cached_offsets),
            pixel_edge=config.cached_edge,
            augmentation=config.recipe.augmentation,
            seed=config.seed,
            video_id=record.video_id,
            class_name=record.class_name,
        )


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """Frames and facts, or the reason why there are none."""

    pixels: np.ndarray | None
    """(A, F, O, H, W, 3) uint8."""
    facts: dict[str, Any]
    """Result columns of the manifest; where decoding failed, `reason` and what is known of the source."""
    is_pending: bool = False
    """Whether it was the machine that failed, not the video: the row stays pending, with its reason."""


def decode_records(
    pool: DecoderPool,
    records: Iterable[VideoRecord],
    config: ExtractConfig,
    *,
    image_size: tuple[int, int],
    padding: Colour = BLACK,
    num_frames: int | None = None,
    missing: Container[str] = (),
) -> Iterator[DecodedVideo]:
    """Videos of a data set to pixels, in order, a few ahead: what an extraction caches of them, or so many frames.

    A file that was listed and is gone leaves its row pending, as whatever else the machine did not let happen.

    Args:
        pool: What decodes.
        records: Which.
        config: Of the extraction.
        image_size: H, W of the picture that the backbone sees.
        padding: What stands where there is no picture.
        num_frames: Wanted of each; None takes what its split caches.
        missing: Paths that were not there when the videos were listed.

    Raises:
        EnvironmentFailedError: If the folder of all videos is gone, or so many files in a row are lost to the machine
            (`brake`) that it is not about them.
    """
    asked: deque[VideoRecord] = deque()

    def requests() -> Iterator[DecodeRequest]:
        for record in records:
            asked.append(record)
            yield DecodeRequest.of(record, config, image_size=image_size, padding=padding, num_frames=num_frames)

    lost: dict[str, str] = {}  # reason by path, of files in a row
    for video in pool.decode_ahead(requests()):
        record = asked.popleft()
        if video.pixels is None and video.facts["reason"].startswith("missing-file"):
            config.require_root()
            if record.path not in missing:
                reason = "missing-file: it was there when the videos were listed"
                video = DecodedVideo(None, {**video.facts, "reason": reason}, is_pending=True)
        if not video.is_pending:
            lost.clear()
            yield video
            continue
        lost[record.path] = video.facts["reason"]
        if len(lost) >= config.brake:
            raise EnvironmentFailedError(
                f"{len(lost)} videos in a row are lost to the machine, the last one {record.path} "
                f"({lost[record.path]}). Stopped; what is finished is kept. Mend that and run the same command again "
                "(--brake N stops later)."
            )
        yield video


class _Turnstile:
    """Lets many work side by side, or one alone: who asks for that waits for the others, and they for him."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside = 0
        self._num_alone = 0

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._num_alone == 0)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._num_alone += 1
            self._changed.wait_for(lambda: self._num_inside == 0)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._num_alone -= 1
                self._changed.notify_all()


class DecoderPool:
    """A fixed number of decoder processes (None: one for each core), each driven by a thread of its own.

    A video whose decoder died or hung is tried once more while no other decoder runs: on a machine that is short of
    memory or time that is often enough. What happens then is the video's fault, except for a kill from outside.

    Use it as a context manager: leaving it ends the processes, also when an exception passes through.
    """

    def __init__(self, num_processes: int | None = None) -> None:
        num_processes = num_processes or count_cores()
        self._num_processes = num_processes
        self._num_ahead = 2 * num_processes + 2
        self._local = threading.local()
        self._children: list[_Child] = []
        self._lock = threading.Lock()
        self._is_closed = False
        self._turnstile = _Turnstile()
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="s4v-decode")

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_closed = True
            for child in self._children:
                child.kill()
        # Threads that wait for an answer now see the end of the pipe.
        self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.close()

    def submit(self, request: DecodeRequest) -> Future[DecodedVideo]:
        """Queue one video; results come in any order, hold on to the futures."""
        return self._threads.submit(self._decode, request)

    def decode_ahead(self, requests: Iterable[DecodeRequest]) -> Iterator[DecodedVideo]:
        """Decoded videos in the order of the requests, a bounded number and bounded bytes of them ahead."""
        ahead: deque[tuple[Future[DecodedVideo], int]] = deque()
        waiting_bytes = 0
        for request in requests:
            ahead.append((self.submit(request), request.answer_bytes))
            waiting_bytes += request.answer_bytes
            while len(ahead) > (self._num_ahead if waiting_bytes <= _AHEAD_BYTES else self._num_processes):
                future, size = ahead.popleft()
                waiting_bytes -= size
                yield future.result()
        while ahead:
            yield ahead.popleft()[0].result()

    def library_versions(self) -> dict[str, str]:
        """Versions of what decides the pixels, as a decoder process reports them."""
        return self._threads.submit(lambda: self._child().versions).result()

    def _decode(self, request: DecodeRequest) -> DecodedVideo:
        try:
            with self._turnstile.beside_others():
                return self._child().decode(request)
        except _ChildDied as death:
            first = death
            self._drop_child()
        if first.is_final or self._is_closed:
            return first.as_video()
        try:
            with self._turnstile.alone():
                return self._child().decode(replace(request, decoder=_decoder_after(first, request)))
        except _ChildDied as death:
            self._drop_child()
            return death.as_video()

    def _child(self) -> _Child:
        # A thread keeps its child to itself: PR_SET_PDEATHSIG fires when the thread that started it ends.
        child = getattr(self._local, "child", None)
        if child is None:
            child = self._local.child = _start_child()
            with self._lock:
                self._children.append(child)
                if self._is_closed:
                    child.kill()
        return child

    def _drop_child(self) -> None:
        child = self._local.child
        del self._local.child
        child.close()
        with self._lock:
            self._children.remove(child)


class _ChildDied(Exception):
    def __init__(self, code: str, detail: str, source: dict[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.source = source or {}
        """What the child said of the file before it died."""

    @property
    def is_final(self) -> bool:
        """Whether another try cannot end in another way: it was the decoder's own limit."""
        return self.code == "too-large"

    def as_video(self) -> DecodedVideo:
        if self.code == _KILLED:
            reason = "no-memory: the decoder was killed (SIGKILL), again while no other one ran: out of memory?"
            return DecodedVideo(None, {"reason": reason, **self.source}, is_pending=True)
        return DecodedVideo(None, {"reason": f"{self.code}: {self}", **self.source})


def _decoder_after(death: _ChildDied, request: DecodeRequest) -> Literal["auto", "decord", "pyav"]:
    """Which decoder a second try takes: after a crash in `auto` PyAV, as after any error of decord."""
    return "pyav" if death.code == "crashed" and request.decoder == "auto" else request.decoder


def _start_child() -> _Child:
    """Start a decoder process, again where it was killed from outside meanwhile.

    Raises:
        EnvironmentFailedError: If it does not start.
    """
    for _ in range(_START_TRIES - 1):
        with contextlib.suppress(_KilledAtStart):
            return _Child()
    return _Child()


class _KilledAtStart(EnvironmentFailedError):
    """A decoder process was killed before it was ready."""


class _Child:
    """One decoder process and its pipes."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            # -P: no file in the user's current folder stands in for a library.
            [sys.executable, "-P", "-m", "s4v.extract.decode.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Read when decord is imported: how often it retries at the end of a file before it gives up.
            # One arena: each other one takes address space, which is limited, for nothing.
            env={**os.environ, "DECORD_EOF_RETRY_MAX": "1024", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self._buffer = bytearray()
        self._source: dict[str, Any] = {}
        try:
            self.versions: dict[str, str] = self._read_message(_START_TIMEOUT_S)["versions"]
        except _ChildDied as death:
            lines = self._read_errors().strip().splitlines() or [str(death)]
            self.close()
            kind = _KilledAtStart if death.code == _KILLED else EnvironmentFailedError
            raise kind(
                f"the decoder process does not start: {lines[-1]}. Try `{sys.executable} -m s4v.extract.decode.worker`."
            ) from death

    def decode(self, request: DecodeRequest) -> DecodedVideo:
        try:
            self._requests.write(json.dumps(asdict(request)).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError as error:
            raise self._death() from error
        self._source = {}
        budget_s = request.timeout_s
        while (message := self._read_message(budget_s * _WALL_FACTOR))["event"] != "done":
            if message["event"] == "opened":
                budget_s = message["budget_s"]
            else:
                self._source = {name: value for name, value in message.items() if name != "event"}
        if not message["ok"]:
            reason = message["code"] + (f": {message['detail']}" if message["detail"] else "")
            return DecodedVideo(None, {"reason": reason, **self._source}, is_pending=message["pending"])
        shape = message["shape"]
        data = self._read_bytes(int(np.prod(shape)), budget_s * _WALL_FACTOR)
        facts = {k: v for k, v in message.items() if k not in ("event", "ok", "shape")}
        facts["views"] = [View.from_dict(view) for view in facts["views"]]
        return DecodedVideo(np.frombuffer(data, dtype=np.uint8).reshape(shape), facts)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self._process.wait()
        for file in (self._requests, self._answers):
            with contextlib.suppress(BrokenPipeError):  # what was still to be sent has no reader any more
                file.close()
        self._selector.close()
        self._errors.close()

    def _read_message(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while (end := self._buffer.find(b"\n")) < 0:
            self._fill(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return json.loads(line)

    def _read_bytes(self, count: int, timeout_s: float) -> bytearray:
        deadline = time.monotonic() + timeout_s
        while len(self._buffer) < count:
            self._fill(deadline)
        data = self._buffer[:count]
        del self._buffer[:count]
        return data

    def _fill(self, deadline: float) -> None:
        if not self._selector.select(max(0.0, deadline - time.monotonic())):
            raise _ChildDied("timeout", "no answer within the wall limit", self._source)
        data = os.read(self._answers.fileno(), 1 << 20)
        if not data:
            raise self._death()
        self._buffer += data

    def _death(self) -> _ChildDied:
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return _ChildDied("timeout", "the CPU budget is used up", self._source)
        if code == -signal.SIGKILL:
            return _ChildDied(_KILLED, "SIGKILL", self._source)
        if code == -signal.SIGABRT and "bad_alloc" in self._read_errors():
            return _ChildDied("crashed", "a library asked for more memory than there is", self._source)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _ChildDied("crashed", how, self._source)

    def _read_errors(self) -> str:
        """What the process printed."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")
