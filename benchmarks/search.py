"""Exact search over many videos: our index beside a plain float32 product, on made-up vectors.

    python benchmarks/search.py [--videos 1000000] [--width 512] [--queries 30] [--no-keep]

Warm: every arm has seen the vectors once. The text tower is not in it. Whole questions are asked in processes of their
own, as `s4v retrieve --queries` asks them: a store's manifest, the index, answers with their moments.
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
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from _report import check_bar, describe_machine, format_table, keep
from opening import make_store

from s4v.files import write_json
from s4v.retrieve.index_reader import VideoIndex
from s4v.retrieve.index_writer import FORMAT_VERSION, IndexFacts, fingerprint, measure_rounding
from s4v.store.reader import open_store
from s4v.store.texts import MAX_WORDS
from s4v.train.networks.text_interaction import TextBatch, WeightedTokenInteraction
from s4v.vectors import normalise_rows, score_rows

FRAMES = 12
TOP, RERANKED = 10, 100
PART = 50_000
WHERE = "num_frames < 200 and class_name != 'class-7'"  # about half of them

# Not getrusage: its peak is inherited from the process that starts this one.
_ASK = """
import json, sys, time
from pathlib import Path
import numpy as np
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
from s4v.retrieve.search import Searcher
store, index, width, count, where = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
class Tower:
    rng = np.random.default_rng(1)
    def encode(self, texts):
        return self.rng.standard_normal((len(texts), width), dtype=np.float32)
def ask(searcher):
    start = time.perf_counter()
    answers = searcher.find_text("a query")
    assert len(answers) == 10
    return 1000 * (time.perf_counter() - start)
imports, start = peak(), time.perf_counter()
with Searcher(store, index=index, where=where or None) as searcher:
    searcher._tower = Tower()
    ask(searcher)
    first = 1000 * (time.perf_counter() - start)
    times = [ask(searcher) for _ in range(count)]
print(json.dumps({"imports_gb": imports, "peak_gb": peak(), "first_ms": first, "ms": times}))
"""


def write_index(folder: Path, store: Path, num_videos: int, width: int) -> VideoIndex:
    """Random vectors, part by part."""
    folder.mkdir(parents=True)
    shape = (num_videos, width)
    pooled = np.lib.format.open_memmap(folder / "pooled.npy", "w+", np.float32, shape)
    scanned = np.lib.format.open_memmap(folder / "pooled16.npy", "w+", np.float16, shape)
    frames = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.float16, (num_videos * FRAMES, width))
    rng, rounding = np.random.default_rng(0), 0.0
    for first in range(0, num_videos, PART):
        part = normalise_rows(rng.standard_normal((min(PART, num_videos - first), width), dtype=np.float32))
        span = slice(first, first + len(part))
        pooled[span] = scanned[span] = part
        rounding = max(rounding, measure_rounding(part, scanned[span]))
        frames[FRAMES * first : FRAMES * (first + len(part))] = np.repeat(part, FRAMES, axis=0)
    np.save(folder / "rows.npy", np.arange(num_videos))
    np.save(folder / "offsets.npy", FRAMES * np.arange(num_videos + 1))
    np.save(folder / "times.npy", np.tile(np.arange(FRAMES, dtype=float), num_videos))
    facts = IndexFacts(FORMAT_VERSION, str(store), fingerprint(open_store(store)), num_videos, width, rounding)
    write_json(folder / "index.json", asdict(facts))
    return VideoIndex(folder, facts)


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
    """Write a store and vectors, search them, check the answers, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-search"))
    parser.add_argument("--no-keep", action="store_true", help="print the figures only")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    store, folder = options.folder / "store.zarr", options.folder / "store.index"
    make_store(store, options.videos)
    index = write_index(folder, store, options.videos, options.width)
    rng = np.random.default_rng(1)
    queries = normalise_rows(rng.standard_normal((options.queries, options.width), dtype=np.float32))

    def find_frames(query: np.ndarray) -> None:
        for match in index.find(query, RERANKED):
            frames, _ = index.frames_of(match.place)
            score_rows(frames, query).max()

    compare = WeightedTokenInteraction(options.width)
    texts = TextBatch(torch.randn(1, MAX_WORDS, options.width), torch.ones(1, MAX_WORDS, dtype=torch.bool), None)

    @torch.inference_mode()
    def rerank(query: np.ndarray) -> None:
        frames = np.stack([index.raw_frames_of(match.place) for match in index.find(query, RERANKED)])
        compare(texts, torch.from_numpy(frames)).similarities.topk(TOP)

    names = {
        "find": f"index, top {TOP}",
        "frames": f"index, top {RERANKED}, all their frames",
        "rerank": f"index, top {RERANKED} ranked again word by word",
        "text": f"a whole question, top {TOP} with their moments",
        "where": f'the same, --where "{WHERE}"',
        "float32": "float32 product",
    }
    whole = {}
    for arm, where in (("text", ""), ("where", WHERE)):
        told = [str(store), str(folder), str(options.width), str(options.queries), where]
        command = [sys.executable, "-c", _ASK, *told]
        whole[arm] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    times = {
        "find": measure(lambda query: index.find(query, TOP), queries),
        "frames": measure(find_frames, queries),
        "rerank": measure(rerank, queries),
        **{arm: one["ms"] for arm, one in whole.items()},
    }
    vectors = torch.from_numpy(np.load(folder / "pooled.npy"))
    times["float32"] = measure(lambda query: (vectors @ torch.from_numpy(query)).topk(TOP), queries)
    num_equal = 0
    for query in queries:
        scores = np.concatenate([score_rows(part.numpy(), query) for part in vectors.split(PART)])
        expected = np.argsort(-scores, kind="stable")[:TOP].tolist()
        num_equal += [match.place for match in index.find(query, TOP)] == expected
    shutil.rmtree(options.folder)
    table = format_table(
        ["arm", "median ms", "lowest to highest"],
        [[names[arm], f"{statistics.median(t):.1f}", f"{min(t):.1f} to {max(t):.1f}"] for arm, t in times.items()],
    )
    for arm, one in whole.items():
        memory = f"peak memory {one['peak_gb']:.2f} GB, {one['imports_gb']:.2f} GB of them its imports"
        table += f"\n\n{names[arm]}: the first one {one['first_ms']:.0f} ms with opening all; {memory}."
    median = {arm: statistics.median(t) for arm, t in times.items()}
    bars = [
        check_bar(names["text"], median["text"], 120, " ms"),
        check_bar(names["where"], median["where"], 120, " ms"),
        check_bar("memory of a process that asks, without a text tower", whole["where"]["peak_gb"], 2.5, " GB"),
        check_bar(f"ranking {RERANKED} again, beyond finding {TOP}", median["rerank"] - median["find"], 150, " ms"),
        check_bar("queries answered as by brute force", num_equal / options.queries, 1, most=False),
    ]
    sizes = {"videos": options.videos, "width": options.width, "queries": options.queries, "frames": FRAMES}
    result = {"machine": describe_machine("torch", "numpy"), "sizes": sizes, "ms": times, "whole": whole}
    if options.no_keep:
        print("\n".join([table, *bars]))
    else:
        keep("search", result, table, bars)


if __name__ == "__main__":
    main()
