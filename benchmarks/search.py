"""Exact search over many videos: our index beside a plain float32 product, on made-up vectors.

    python benchmarks/search.py [--videos 1000000] [--width 512] [--queries 30]

Warm: every arm has seen the vectors once. The text tower is not in it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _report import describe_machine, format_table, keep

from s4v.retrieve.index import IndexFacts, VideoIndex
from s4v.store.texts import MAX_WORDS
from s4v.train.interaction import TextBatch, WeightedTokenInteraction

FRAMES = 12
TOP, RERANKED = 10, 100
PART = 50_000

# In a process of its own: this one has written the vectors.
SEARCH = """
import json, sys
from pathlib import Path
import numpy as np
from s4v.retrieve.index import IndexFacts, VideoIndex
# Not getrusage: its peak is inherited from the process that starts this one.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
imports = peak()
index = VideoIndex(Path(sys.argv[1]), IndexFacts(1, "", "", 0, 0))
for place in range(3):
    index.find(index.vector_of(place), 10)
print(json.dumps({"imports": imports, "after": peak()}))
"""


def write_index(folder: Path, num_videos: int, width: int) -> VideoIndex:
    """Random vectors, part by part."""
    folder.mkdir(parents=True)
    shape = (num_videos, width)
    pooled = np.lib.format.open_memmap(folder / "pooled.npy", "w+", np.float32, shape)
    scanned = np.lib.format.open_memmap(folder / "pooled16.npy", "w+", np.float16, shape)
    frames = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.float16, (num_videos * FRAMES, width))
    rng = np.random.default_rng(0)
    for first in range(0, num_videos, PART):
        part = rng.standard_normal((min(PART, num_videos - first), width), dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
        span = slice(first, first + len(part))
        pooled[span] = scanned[span] = part
        frames[FRAMES * first : FRAMES * (first + len(part))] = np.repeat(part, FRAMES, axis=0)
    np.save(folder / "rows.npy", np.arange(num_videos))
    np.save(folder / "offsets.npy", FRAMES * np.arange(num_videos + 1))
    np.save(folder / "times.npy", np.zeros(num_videos * FRAMES))
    return VideoIndex(folder, IndexFacts(1, "", "", num_videos, width))


def measure(ask: Callable[[np.ndarray], object], queries: np.ndarray) -> list[float]:
    """Milliseconds of each query, after a first one that warms up."""
    ask(queries[0])
    found = []
    for query in queries:
        start = time.perf_counter()
        ask(query)
        found.append(1000 * (time.perf_counter() - start))
    return found


def main() -> None:
    """Write vectors, search them, check the answers, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-search"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    index = write_index(options.folder, options.videos, options.width)
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((options.queries, options.width), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)

    def find_frames(query: np.ndarray) -> None:
        for match in index.find(query, RERANKED):
            frames, _ = index.frames_of(match.place)
            (frames @ query).max()

    compare = WeightedTokenInteraction(options.width)
    texts = TextBatch(torch.randn(1, MAX_WORDS, options.width), torch.ones(1, MAX_WORDS, dtype=torch.bool), None)

    @torch.inference_mode()
    def rerank(query: np.ndarray) -> None:
        frames = np.stack([index.raw_frames_of(match.place) for match in index.find(query, RERANKED)])
        compare(texts, torch.from_numpy(frames)).similarities.topk(TOP)

    peak_gb = json.loads(
        subprocess.run(
            [sys.executable, "-c", SEARCH, str(options.folder)], capture_output=True, text=True, check=True
        ).stdout
    )
    times = {f"index, top {TOP}": measure(lambda query: index.find(query, TOP), queries)}
    times[f"index, top {RERANKED}, all their frames"] = measure(find_frames, queries)
    times[f"index, top {RERANKED} ranked again word by word"] = measure(rerank, queries)
    vectors = torch.from_numpy(np.load(options.folder / "pooled.npy"))
    times["float32 product"] = measure(lambda query: (vectors @ torch.from_numpy(query)).topk(TOP), queries)
    for query in queries:
        expected = (vectors @ torch.from_numpy(query)).topk(TOP).indices.tolist()
        assert [match.place for match in index.find(query, TOP)] == expected, "not what brute force finds"
    shutil.rmtree(options.folder)
    table = format_table(
        ["arm", "median ms", "lowest to highest"],
        [[name, f"{statistics.median(t):.1f}", f"{min(t):.1f} to {max(t):.1f}"] for name, t in times.items()],
    )
    sizes = {"videos": options.videos, "width": options.width, "queries": options.queries, "frames": FRAMES}
    result = {"machine": describe_machine("torch", "numpy"), "sizes": sizes, "ms": times, "peak_gb": peak_gb}
    memory = f"{peak_gb['after']:.2f} GB, {peak_gb['imports']:.2f} GB of them its imports"
    keep("search", result, f"{table}\n\nAnswers equal brute force. Peak memory of a process that searches: {memory}.")


if __name__ == "__main__":
    main()
