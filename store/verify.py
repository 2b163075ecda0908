"""Read a whole store back: is every byte the one that was written, and does the manifest tell the truth?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import StoreDamagedError
from . import manifest
from ._cores import count_cores
from ._files import hash_file
from ._shards import DamagedChunkError, verify_chunk_file, verify_shard
from .checksums import CHECKSUMS_NAME, read_recorded_hashes
from .fingerprint import fingerprint_shard
from .layout import ArraySpec
from .markers import PARTS_NAME, Marker, find_markers, marker_path, read_marker
from .reader import StoreReader
from .swap import find_swaps
from .texts import TEXT_NAME, TEXTS_PER_SHARD


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One thing that is not as it was written."""

    where: str
    """A file, relative to the store."""
    what: str
    shard: int | None = None
    """The shard that mends it when it is done anew; None for what belongs to the whole store."""
    video_id: str | None = None
    """The first video that it costs."""
    rows: tuple[int, ...] = ()
    """Of whose tokens less is left than there was."""


def verify_store(store: StoreReader, report: Callable[[str, int, int], None] = lambda *_: None) -> list[Damage]:
    """Check every finished shard, every small array, the manifest and all recorded hashes.

    Args:
        store: It may be unfinished: pending shards are nobody's damage.
        report: Told about progress.

    Returns:
        All damage found, that of the whole store first, then shard by shard.
    """
    found = [*_check_hashes(store), *_check_small_arrays(store), *_check_texts(store)]
    mismatched = {one.where for one in found}
    markers = find_markers(store.path)
    finished = [s for s in range(store.layout.num_shards) if s in markers]
    sha256 = store.attributes["codec"]["sha256"]
    video_ids = _read_ids(store)
    parts: dict[range, pa.Table] = {}
    with ThreadPoolExecutor(count_cores()) as threads:
        checks = threads.map(partial(_check_shard, store, sha256, video_ids), finished)
        for done, (shard, (part, damage)) in enumerate(zip(finished, checks, strict=True), start=1):
            found += [one for one in damage if one.where not in mismatched]
            if part is not None:
                parts[store.layout.shard_rows(shard)] = part
            report("verifying", done, len(finished))
    return found + _check_manifest(store, parts, mismatched)


def _check_hashes(store: StoreReader) -> Iterator[Damage]:
    """Files that Zarr does not checksum."""
    if not (store.path / CHECKSUMS_NAME).exists():
        yield Damage(where=CHECKSUMS_NAME, what="the file is missing: nothing vouches for the metadata")
        return
    try:
        hashes = read_recorded_hashes(store.path)
    except (StoreDamagedError, OSError) as error:
        yield Damage(where=CHECKSUMS_NAME, what=str(error))
        return
    for name, wanted in sorted(hashes.items()):
        part = re.fullmatch(rf"{PARTS_NAME}/(\d+)\.parquet", name)
        if (what := _compare_hash(store.path / name, wanted)) is not None:
            yield Damage(where=name, what=what, shard=int(part[1]) if part else None)


def _compare_hash(file: Path, wanted: str) -> str | None:
    """What is wrong with a file whose sha256 is known; None if nothing is."""
    try:
        return None if hash_file(file) == wanted else "it does not match its recorded hash"
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:  # something else in its place, or a disk that does not read it
        return f"it cannot be read: {error.strerror}"


def _check_small_arrays(store: StoreReader) -> Iterator[Damage]:
    """Codec and head: one chunk each."""
    for metadata in sorted([*store.path.glob("codec/*/zarr.json"), *store.path.glob("head/*/zarr.json")]):
        try:
            num_axes = len(json.loads(metadata.read_bytes())["shape"])
        except (ValueError, KeyError, OSError):
            continue  # its hash tells
        chunk = metadata.parent / ".".join(["c", *["0"] * num_axes])
        if (what := verify_chunk_file(chunk)) is not None:
            yield Damage(where=str(chunk.relative_to(store.path)), what=what)


def _check_texts(store: StoreReader) -> Iterator[Damage]:
    """Captions' texts, if there are any."""
    for metadata in sorted(store.path.glob(f"{TEXT_NAME}/*/zarr.json")):
        try:
            shape = json.loads(metadata.read_bytes())["shape"]
        except (ValueError, KeyError, OSError):
            continue  # its hash tells
        for shard in range(-(-shape[0] // TEXTS_PER_SHARD)):
            file = metadata.parent / ".".join(["c", str(shard), *["0"] * (len(shape) - 1)])
            where = str(file.relative_to(store.path))
            try:
                is_there, problems = verify_shard(file, TEXTS_PER_SHARD)
            except (DamagedChunkError, OSError) as error:
                yield Damage(where=where, what=_describe(error))
                continue
            yield from (Damage(where=where, what=what) for what in problems.values())
            if missing := np.flatnonzero(~is_there[: shape[0] - shard * TEXTS_PER_SHARD]).tolist():
                yield Damage(where=where, what=f"has no chunk {missing[0]}")


def _read_ids(store: StoreReader) -> list[str] | None:
    try:
        return manifest.read_table(store.path / manifest.MANIFEST_NAME, ["video_id"])["video_id"].to_pylist()
    except StoreDamagedError:
        return None  # its hash tells


def _check_shard(
    store: StoreReader, sha256: str, video_ids: list[str] | None, shard: int
) -> tuple[pa.Table | None, list[Damage]]:
    """A finished shard of every array; returns its results too, where they can be read."""
    rows = store.layout.shard_rows(shard)
    marker = marker_path(store.path, shard)
    try:
        read = read_marker(store.path, shard, sha256)
    except StoreDamagedError as error:
        return None, [Damage(where=str(marker.relative_to(store.path)), what=str(error), shard=shard)]
    if read is None:  # another process is doing the shard anew
        return None, []
    part = read.results
    if video_ids is not None and part["video_id"].to_pylist() != video_ids[rows.start : rows.start + len(part)]:
        what = "it holds other videos than the manifest has in these rows"
        return None, [Damage(where=str(marker.relative_to(store.path)), what=what, shard=shard)]
    counts = np.zeros((len(rows), 2), dtype=np.int64)  # views and frames of each row
    is_pending = np.zeros(store.layout.rows_per_shard, dtype=bool)  # such a row may have chunks or not
    is_pending[len(part) : len(rows)] = True
    for place, row in enumerate(part.select(["status", "num_views", "num_cached_frames"]).to_pylist()):
        is_pending[place] = row["status"] == "pending"
        if row["status"] == "ok":
            counts[place] = row["num_views"], row["num_cached_frames"]
    ids = part["video_id"].to_pylist()
    damage = []
    for spec in store.layout.array_specs():
        for place, key in enumerate(spec.shard_keys(shard)):
            wanted = _wanted_chunks(spec, counts, place * spec.shard_shape[1])
            found = _check_file(store, spec, shard, key, wanted, is_pending, ids) if wanted.any() else []
            damage += found or _check_fingerprint(store, spec, shard, key, read)
    return part, damage


def _check_fingerprint(store: StoreReader, spec: ArraySpec, shard: int, key: str, marker: Marker) -> list[Damage]:
    """Whether a file is the one that its done-marker was written for: two writers at once would mix them."""
    name = f"{spec.name}/{key}"
    if not marker.files or shard in find_swaps(store.path):
        return []
    file, rows = store.path / name, tuple(store.layout.shard_rows(shard))
    try:
        found = fingerprint_shard(file, spec) if file.exists() else None
    except (OSError, ValueError) as error:
        return [Damage(where=name, what=str(error), shard=shard, rows=rows)]
    if found == marker.files.get(name):
        return []
    what = "is not the file that the shard's done-marker was written for"
    return [Damage(where=name, what=what, shard=shard, rows=rows)]


def _wanted_chunks(spec: ArraySpec, counts: np.ndarray, first_view: int) -> np.ndarray:
    """(rows, views, chunks along F) bool: which chunks the manifest says the shard holds."""
    rows, views, frames = spec.shard_shape[:3]
    size = frames if spec.chunk_shape is None else spec.chunk_shape[2]
    wanted = np.zeros((rows, views, frames // size), dtype=bool)
    for place, (num_views, num_frames) in enumerate(counts):
        wanted[place, : max(0, num_views - first_view), : -(-num_frames // size)] = num_frames > 0
    return wanted


def _check_file(
    store: StoreReader,
    spec: ArraySpec,
    shard: int,
    key: str,
    wanted: np.ndarray,
    is_pending: np.ndarray,
    video_ids: list[str],
) -> list[Damage]:
    file = store.path / spec.name / key
    where = f"{spec.name}/{key}"

    def damage(what: str, place: int | None = None) -> Damage:
        first = store.layout.shard_rows(shard).start
        hit = np.flatnonzero(wanted.any(axis=(1, 2))).tolist() if place is None else [place]
        rows = tuple(first + row for row in hit)
        return Damage(where=where, what=what, shard=shard, video_id=video_ids[hit[0]], rows=rows)

    if spec.chunk_shape is None:
        what = verify_chunk_file(file)
        return [] if what is None else [damage(what)]
    try:
        is_there, problems = verify_shard(file, wanted.size)
    except (DamagedChunkError, OSError) as error:
        return [damage(_describe(error))]
    per_row = wanted[0].size
    is_known = np.repeat(~is_pending, per_row)
    found = [damage(what, number // per_row) for number, what in problems.items() if is_known[number]]
    for number in np.flatnonzero((is_there != wanted.ravel()) & is_known).tolist():
        what = "has no chunk" if wanted.flat[number] else "has a chunk that the manifest does not know of"
        found.append(damage(f"{what} {number}", min(number // per_row, len(video_ids) - 1)))
    return found


def _describe(error: Exception) -> str:
    return f"it cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def _check_manifest(store: StoreReader, parts: dict[range, pa.Table], mismatched: Collection[str]) -> list[Damage]:
    """Whether a finished manifest says what the done-markers say."""
    try:
        table = manifest.read_table(store.path / manifest.MANIFEST_NAME)
    except StoreDamagedError as error:
        known = manifest.MANIFEST_NAME in mismatched
        return [] if known else [Damage(where=manifest.MANIFEST_NAME, what=str(error))]
    found = []
    statuses = table["status"].to_numpy(zero_copy_only=False)
    there = find_markers(store.path)
    for shard in range(store.layout.num_shards):
        rows = store.layout.shard_rows(shard)
        where = str(marker_path(store.path, shard).relative_to(store.path))
        if shard not in there and where not in mismatched and (statuses[rows.start : rows.stop] != "pending").any():
            found.append(Damage(where=where, what="the file is missing", shard=shard))
    for rows, part in parts.items():
        told: Any = table.slice(rows.start, len(part)).select(manifest.RESULT_SCHEMA.names)
        is_pending = "pending" in told["status"].to_pylist()  # not consolidated since
        if not is_pending and told.to_pylist() != part.select(manifest.RESULT_SCHEMA.names).to_pylist():
            shard = rows.start // store.layout.rows_per_shard
            what = f"rows {rows.start} to {rows.stop - 1} are not what the done-marker of shard {shard} says"
            found.append(Damage(where=manifest.MANIFEST_NAME, what=what, shard=shard))
    return found
