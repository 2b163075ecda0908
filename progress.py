"""Progress on stderr: a bar on a terminal; elsewhere, say in the file of a batch job, plain lines now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .terminal import print_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

Report = Callable[..., None]
"""Called with what is under way, how much is done, how much there is (0: not known) and, where that is known, how fast.
What a stage is called may end in a colon and what is to be known when it begins."""

_EVERY_S = 60.0
"""Between two lines about one stage."""

_MOST_BESIDE = 32
"""Characters beside a bar."""

_UNITS = {
    "calibrating the codec": "frames",
    "checking the stores": "stores",
    "embedding captions": "captions",
    "extracting": "rows",
    "fitting the codec": "layers",
    "indexing": "rows",
    "measuring the codec": "frames",
    "merging": "shards",
    "training": "steps",
    "verifying": "shards",
}
"""What a stage counts, where it is not videos."""


def _unit(stage: str) -> str:
    return _UNITS.get(_name(stage), "videos")


def _name(stage: str) -> str:
    return stage.partition(":")[0]


@dataclass(slots=True)
class LineProgress:
    """Progress as lines: one when a stage begins, one a minute, one at the end of a stage that took as long.

    A stage that is found to take minutes says so at the first sign of it.
    """

    command: str
    write: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    every_s: float = _EVERY_S
    _stage: str | None = None
    _done: int = 0
    _total: int = 0
    _rate: str = ""
    _began: float = 0.0
    _first: int = 0
    """What was done when the stage began."""
    _last_line: float = 0.0
    _has_estimate: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def report(self, stage: str, done: int, total: int, rate: str = "") -> None:
        """Note how far the work is; most calls write nothing."""
        with self._lock:
            if stage != self._stage:
                self.finish()
                self._begin(stage, done, total)
            self._done, self._total, self._rate = done, total, rate
            is_long = not self._has_estimate and (self._seconds_left() or 0) > self.every_s
            if is_long:
                self._has_estimate = True
                self._write_state()
            else:
                self.tick()

    def tick(self) -> None:
        """Write a line if it is time for one."""
        with self._lock:
            if self._stage is not None and self.clock() - self._last_line >= self.every_s:
                self._write_state()

    def finish(self) -> None:
        """The stage under way has come to its end."""
        with self._lock:
            if self._stage is not None and (elapsed := self.clock() - self._began) > self.every_s:
                count = f", {self._done:,} {_unit(self._stage)}" if self._done else ""
                self._write(f"done in {describe_seconds(elapsed)}{count}")
            self._stage = None

    def _begin(self, stage: str, done: int, total: int) -> None:
        self._stage, self._began, self._first, self._has_estimate = stage, self.clock(), done, False
        said = stage.partition(": ")[2]
        self._write(said or (f"{total:,} {_unit(stage)}" if total else ""))

    def _seconds_left(self) -> float | None:
        if not self._first < self._done < self._total:
            return None
        return (self.clock() - self._began) * (self._total - self._done) / (self._done - self._first)

    def _write_state(self) -> None:
        assert self._stage is not None
        elapsed, left = self.clock() - self._began, self._seconds_left()
        num_new = self._done - self._first
        rate = self._rate or describe_rate(self._stage, num_new, elapsed)
        parts = [
            f"{self._done:,} of {self._total:,} {_unit(self._stage)}" if self._total else "",
            rate if num_new and self._done < self._total else f"for {describe_seconds(elapsed)} now",
            "" if left is None else f"about {describe_seconds(left)} left",
        ]
        self._write(", ".join(part for part in parts if part))

    def _write(self, text: str) -> None:
        self._last_line = self.clock()
        assert self._stage is not None
        self.write(f"s4v {self.command}: {_name(self._stage)}" + (f": {text}" if text else ""))


def describe_seconds(seconds: float) -> str:
    """`12 s`, `3.5 min`, `2.1 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def describe_rate(stage: str, done: int, elapsed_s: float) -> str:
    """`3.1 videos/s`, `2.0 frames/min`; nothing in the first second."""
    if not done or elapsed_s < 1:
        return ""
    rate, unit = done / elapsed_s, _unit(stage)
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{60 * rate:.1f} {unit}/min"


@contextmanager
def show_progress(command: str, first: str | None = None) -> Iterator[Report]:
    """Progress on stderr for as long as the context is open.

    Args:
        command: Whose.
        first: The stage that is under way already: told at once. None tells nothing before the first report.
    """
    with _show_bar(first) if _is_terminal() else _show_lines(command) as report:
        if first is not None:
            report(first, 0, 0)
        yield report


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def _show_lines(command: str) -> Iterator[Report]:
    stream = sys.stderr

    def write(line: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # a full disk or a closed log ends no extraction
            print_lines(line, to=stream)

    progress = LineProgress(command, write)
    has_ended = threading.Event()

    def tell_now_and_then() -> None:
        # Beside the reports: a stage that hangs reports nothing.
        while not has_ended.wait(1.0):
            progress.tick()

    thread = threading.Thread(target=tell_now_and_then, name="s4v-progress", daemon=True)
    thread.start()
    try:
        yield progress.report
        progress.finish()
    finally:
        has_ended.set()
        thread.join()


@contextmanager
def _show_bar(first: str | None) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Bar(Progress):
        """With a line below for what is too long to stand beside the bar."""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for one in self.tasks:
                if one.fields["details"]:
                    yield Text(one.fields["details"], no_wrap=True, overflow="ellipsis")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(first or "starting", total=None, rate="", details="")
        began: dict[str, tuple[float, int]] = {}

        def report(stage: str, done: int, total: int, rate: str = "") -> None:
            start, first = began.setdefault(stage, (time.perf_counter(), done))
            rate = rate or describe_rate(stage, done - first, time.perf_counter() - start)
            beside, details = (rate, "") if len(rate) <= _MOST_BESIDE else ("", rate)
            bar.update(task, description=stage, completed=done, total=total or None, rate=beside, details=details)

        yield report
