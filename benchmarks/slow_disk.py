"""A store on a slow disk: what training gets of its bandwidth, in any order, in a window, and through a cache.

    python benchmarks/slow_disk.py [--shards 40] [--latency-ms 5] [--megabytes 200]

Reads of the store are held up by `_slow_disk.c`, which is preloaded: nothing in s4v knows of it. Two kinds of disk. On
`network` requests wait side by side and share the bandwidth. On `head` one request waits for another, and one that does
not go on behind the last one takes the latency again. `blkio` is a real limit of the kernel's on a cold page cache, by
bandwidth alone; it needs root and a blkio cgroup.

All frames of a row are used, so what is read and what is used can be the same. The training loader hands pixels and
class tokens over as they are stored. A window is an eighth of the shards. "Sequential" reads the same files to their
end, in reads of 32 MB. A later epoch reads copies, beside the same store on the local disk: both of a warm page cache.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _report import check_bar, describe_machine, format_table, keep
from clips import ARRAYS, BytesLoader, Sizes, write_store

from s4v.store.reader import StoreReader, open_store
from s4v.store.shard_cache import ShardCache
from s4v.train.allocator import keep_freed_memory
from s4v.train.clips import ClipPlan, find_labelled_rows, plan_training_epoch
from s4v.train.order import ShardWindow

SIZES = Sizes("75 kB", 6, 196, 64)
FRAMES, BATCH, ROWS_PER_SHARD, WINDOW_SHARE = 8, 8, 32, 8
SEQUENTIAL_READ = 2**25
FEW_BATCHES = 40
"""Of an order that the disk does not like."""
LOCAL_ROUNDS = 5
KINDS = ("network", "head")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BLKIO = Path("/sys/fs/cgroup/blkio/s4v-slow-disk")


class Counts:
    """Requests and bytes that the preloaded library has held up since they were last taken."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None

    def take(self) -> tuple[int, int]:
        """Requests, bytes."""
        requests, size = ctypes.c_int64(), ctypes.c_int64()
        if self._library is not None:
            self._library.take_counts(ctypes.byref(requests), ctypes.byref(size))
        return requests.value, size.value


class Readings:
    """What a child process measures, on one kind of disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._counts = Counts()
        self._slow = options.folder / "slow/store.zarr"
        self._window = options.shards // WINDOW_SHARE

    def _plan(self, store: StoreReader, window: int | None, epoch: int) -> list[ClipPlan]:
        return plan_training_epoch(
            find_labelled_rows(store, "train"),
            num_frames=FRAMES,
            batch_size=BATCH,
            seed=0,
            epoch=epoch,
            window=None if window is None else ShardWindow(window, store.layout.rows_per_shard),
        )

    def _begin(self) -> None:
        self._counts.take()
        if self._options.drops_caches:
            os.sync()
            DROP_CACHES.write_text("3")

    def _load(self, store: StoreReader, plans: list[ClipPlan], *, is_cold: bool = True) -> dict[str, float]:
        """Hand all batches over; what that took, and what was asked of the disk."""
        loader = BytesLoader(store, arrays=ARRAYS, layers=store.layout.layers, device=torch.device("cpu"))
        used = sum(loader.count_bytes(plan) for plan in plans)
        self._begin() if is_cold else self._counts.take()
        start, first = time.perf_counter(), 0.0
        for _ in loader.load(plans):
            first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        requests, read = self._counts.take()
        return {"used": used, "read": read, "requests": requests, "seconds": seconds, "first_batch_s": first}

    def sequential(self) -> dict[str, float]:
        """Every file of the arrays, to its end."""
        self._begin()
        start, used = time.perf_counter(), 0
        for name in ARRAYS:
            for file in sorted((self._slow / name).glob("c.*")):
                handle, place = os.open(file, os.O_RDONLY), 0
                while data := os.pread(handle, SEQUENTIAL_READ, place):
                    place += len(data)
                used += place
                os.close(handle)
        seconds = time.perf_counter() - start
        requests, read = self._counts.take()
        return {"used": used, "read": read, "requests": requests, "seconds": seconds}

    def orders(self) -> dict[str, Any]:
        """Some batches of both orders without a cache."""
        store = open_store(self._slow)
        return {
            "any order": self._load(store, self._plan(store, None, 0)[:FEW_BATCHES]),
            "window": self._load(store, self._plan(store, self._window, 0)[:FEW_BATCHES]),
        }

    def cached(self) -> dict[str, Any]:
        """Two epochs through a cache, the second one beside a local store."""
        cache, local = self._options.folder / "cache", open_store(self._options.folder / "local/store.zarr")
        shutil.rmtree(cache, ignore_errors=True)
        store = open_store(self._slow)
        store.read_through(ShardCache(cache, 10**12), waits=True)
        found: dict[str, Any] = {"window, cache, first epoch": self._load(store, self._plan(store, self._window, 0))}
        shares = []
        for epoch in range(1, 1 + LOCAL_ROUNDS + 1):
            beside = self._load(local, self._plan(local, self._window, epoch), is_cold=False)
            later = self._load(store, self._plan(store, self._window, epoch), is_cold=False)
            if epoch > 1:  # the first one brings both into the page cache
                shares.append(beside["seconds"] / later["seconds"])
        found |= {"cache, later epoch": later, "local, the same": beside, "share_of_local": statistics.median(shares)}
        return found


def measure_child(options: argparse.Namespace) -> None:
    """Print what one kind of disk comes to, as JSON."""
    keep_freed_memory()
    readings = Readings(options)
    found = {"sequential": readings.sequential(), **readings.orders(), **readings.cached()}
    print(json.dumps(found))


def measure(kind: str, options: argparse.Namespace, preload: Path) -> dict[str, Any]:
    """In a process of its own, whose reads are held up."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(preload),
        "SLOW_ROOT": str((options.folder / "slow").resolve()),
        "SLOW_KIND": kind,
        "SLOW_LATENCY_US": str(int(1000 * options.latency_ms)),
        "SLOW_BYTES_PER_S": str(options.megabytes * 1e6),
    }
    return run_child(options, environment)


def run_child(
    options: argparse.Namespace, environment: dict[str, str], flags: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """Its last line."""
    command = [sys.executable, __file__, "--child", "--folder", str(options.folder.resolve())]
    command += ["--shards", str(options.shards), *flags]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, **more)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def limited_by_the_kernel(options: argparse.Namespace) -> Iterator[Callable[[], None] | None]:
    """What a child calls to be limited; None where the kernel does not let us."""
    device = options.folder.stat().st_dev
    try:
        BLKIO.mkdir()
    except OSError:
        yield None
        return
    try:
        limit = f"{os.major(device)}:{os.minor(device)} {int(options.megabytes * 1e6)}"
        (BLKIO / "blkio.throttle.read_bps_device").write_text(limit)
        DROP_CACHES.write_text("1")
        yield lambda: (BLKIO / "cgroup.procs").write_text(str(os.getpid())) and None
    except OSError:
        yield None
    finally:
        BLKIO.rmdir()


def tabulate(kind: str, found: dict[str, Any]) -> list[list[str]]:
    """Lines of the table."""
    lines = []
    sequential = found["sequential"]["used"] / found["sequential"]["seconds"]
    for name, one in found.items():
        if isinstance(one, dict):
            rate = one["used"] / one["seconds"]
            share = f"{rate / sequential:.2f}" if "local" not in name and "later" not in name else ""
            read = f"{one['read'] / one['used']:.2f}" if one["read"] else ""
            asked = f"{one['requests']:,}" if one["requests"] else ""
            first = f"{one['first_batch_s']:.2f}" if "first_batch_s" in one else ""
            lines.append([kind, name, f"{rate / 1e6:,.0f}", share, read, asked, first])
    return lines


def main() -> None:
    """Each kind of disk in its turn; the table of what there is, after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--latency-ms", type=float, default=5.0)
    parser.add_argument("--megabytes", type=float, default=200.0, help="a second")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-slow-disk"))
    parser.add_argument("--kinds", default=",".join((*KINDS, "blkio")))
    parser.add_argument("--drops-caches", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure_child(options)
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    (options.folder / "slow").mkdir(parents=True)
    num_videos, path = options.shards * ROWS_PER_SHARD, options.folder / "slow/store.zarr"
    write_store(path, SIZES, num_videos, num_frames=FRAMES, rows_per_shard=ROWS_PER_SHARD, num_drawn=16)
    shutil.copytree(options.folder / "slow", options.folder / "local", copy_function=os.link)
    preload = options.folder.resolve() / "slow_disk.so"
    source = Path(__file__).with_name("_slow_disk.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", preload, source, "-ldl", "-lpthread"], check=True)
    lines, bars, results = [], [], {}
    for kind in options.kinds.split(","):
        if kind == "blkio":
            with limited_by_the_kernel(options) as enter:
                if enter is None:
                    print("blkio: this kernel, or this user, cannot limit a disk")
                    continue
                found = run_child(options, dict(os.environ), ["--drops-caches"], preexec_fn=enter)
        else:
            found = measure(kind, options, preload)
        results[kind] = found
        lines += tabulate(kind, found)
        sequential = found["sequential"]["used"] / found["sequential"]["seconds"]
        cached = found["window, cache, first epoch"]
        first = cached["used"] / cached["seconds"] / sequential
        bars.append(check_bar(f"{kind}: first epoch of sequential", first, 0.9, most=False))
        bars.append(check_bar(f"{kind}: later epoch of local", found["share_of_local"], 0.9, most=False))
        heads = ["disk", "what", "MB/s used", "of sequential", "read / used", "requests", "first batch, s"]
        machine = describe_machine("numpy", "torch")
        result = {"machine": machine, "latency_ms": options.latency_ms, "megabytes": options.megabytes}
        result |= {"shards": options.shards, "window": options.shards // WINDOW_SHARE, "results": results}
        keep("slow_disk", result, format_table(heads, lines), bars)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
