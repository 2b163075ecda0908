"""How fast an extraction goes and what holds it up: for the progress bar, and for `stats.json` in the store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..files import write_json
from ..store.layout import STATS_NAME, StoreLayout

ReportProgress = Callable[..., None]
"""Called with what is under way, how much is done, how much there is (0: not known) and, where it is known, how fast.
What a stage is called may end in a colon and what is to be known when it begins (progress.py)."""

_BOTTLENECKS = {
    "decoding": ("waiting for decoders",),
    "backbone": ("backbone", "encoding"),
    "writing": ("waiting for the writer",),
}


@dataclass(slots=True)
class StageClock:
    """Seconds that the main thread spends on, or waits for, each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def bottleneck(self) -> str | None:
        """What the main thread spent most of its time on, of what a longer run has more of."""
        shares = {name: sum(self.seconds.get(stage, 0.0) for stage in stages) for name, stages in _BOTTLENECKS.items()}
        return max(shares, key=lambda name: shares[name]) if any(shares.values()) else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def add(self, seconds: dict[str, float]) -> None:
        """Count what another process spent."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


@dataclass(kw_only=True, slots=True)
class Meter:
    """Counts what gets done, from its making on."""

    layout: StoreLayout
    passes: Sequence[int]
    """Frames of each row that go through the backbone."""
    total: int
    """Rows to do."""
    flops_per_frame: int
    peak_flops: float | None
    """Of one device in a second; None where that is not known."""
    clock: StageClock
    report: ReportProgress
    rows: int = 0
    frames: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    """Of all processes together: as long as this one has been at it, or as workers tell."""
    _start: float = field(default_factory=time.perf_counter)

    def count(self, shard: int, kept: Collection[int] = (), worker_seconds: float | None = None) -> None:
        """One more shard is done.

        Args:
            shard: Which.
            kept: Its rows that were copied: they went through no backbone.
            worker_seconds: What it took a worker; None where this process did it.
        """
        rows = self.layout.shard_rows(shard)
        self.rows += len(rows)
        self.frames += sum(self.passes[row] for row in rows if row not in kept)
        self.seconds = time.perf_counter() - self._start
        self.busy_seconds = self.seconds if worker_seconds is None else self.busy_seconds + worker_seconds
        share = "" if self.flop_utilisation is None else f" at {self.flop_utilisation:.0%} of the GPU's peak"
        rate = f"{self.frames_per_second:.1f} frames/s{share}, held up by {self.clock.bottleneck}"
        self.report("extracting", self.rows, self.total, rate)

    @property
    def frames_per_second(self) -> float:
        """Of all processes together."""
        return self.frames / self.seconds if self.seconds else 0.0

    @property
    def flop_utilisation(self) -> float | None:
        """The backbone's operations as a share of what its device could have done, each worker with a device."""
        if self.peak_flops is None or not self.busy_seconds:
            return None
        return self.frames * self.flops_per_frame / (self.busy_seconds * self.peak_flops)


def write_stats(path: Path, meter: Meter, seconds: float) -> None:
    """What this run did and how fast, seconds by stage of its main thread (of all workers together)."""
    stages = {name: round(value, 3) for name, value in meter.clock.seconds.items()}
    write_json(
        path / STATS_NAME,
        {
            "videos": meter.rows,
            "frames": meter.frames,
            "frames_per_second": round(meter.frames_per_second, 3),
            "bottleneck": meter.clock.bottleneck,
            "flops_per_frame": meter.flops_per_frame,
            "flop_utilisation": meter.flop_utilisation,
            "seconds": seconds,
            "seconds_by_stage": stages,
            "free_bytes": shutil.disk_usage(path).free,
        },
    )
