"""Read a whole store back: is every byte the one that was written, and does the manifest tell the truth?"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..device import count_cores
from ..errors import StoreDamagedError
from ..files import hash_file
from . import manifest, names
from ._shard_file import DamagedChunkError, verify_chunk_file, verify_shard
from ._zarr import describe_small_array, name_only_chunk, require_metadata
from .checksums import CHECKSUMS_NAME, read_recorded_hashes
from .class_texts import has_current_class_texts, read_class_template
from .fingerprint import fingerprint_shard
from .layout import ArraySpec
from .markers import PARTS_NAME, Marker, find_markers, marker_path, read_joined
from .moments import list_moment_files
from .reader import StoreReader
from .row_checks import check_rows
from .swap import find_swaps
from .text_choice import CLASSES_NAME, TEXT_ARRAYS, TEXT_NAME, read_text_choice
from .texts import describe_text_array, has_void_texts, name_text_shard

_SHOWN_DAMAGE = 50


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
    found = list(_check_hashes(store))
    for check in (_check_metadata, _check_small_arrays, _check_moments, _check_texts):
        mismatched = {one.where for one in found}
        found += [one for one in check(store) if one.where not in mismatched]
    mismatched = {one.where for one in found}
    finished = store.finished_shards()
    video_ids = _read_ids(store)
    parts: dict[range, pa.Table] = {}
    with ThreadPoolExecutor(count_cores()) as threads:
        checks = threads.map(lambda shard: check_shard(store, shard, _ids_of(store, video_ids, shard)), finished)
        for done, (shard, (part, damage)) in enumerate(zip(finished, checks, strict=True), start=1):
            found += [one for one in damage if one.where not in mismatched]
            if part is not None:
                parts[store.layout.shard_rows(shard)] = part
            report("verifying", done, len(finished))
    return found + _check_manifest(store, parts, mismatched)


def _check_hashes(store: StoreReader) -> Iterator[Damage]:
    """Files that Zarr does not checksum."""
    if not os.path.lexists(store.path / CHECKSUMS_NAME):
        yield Damage(where=CHECKSUMS_NAME, what="the file is missing: nothing vouches for the metadata")
        return
    try:
        hashes = names.read_json(store.path, CHECKSUMS_NAME)
    except (StoreDamagedError, OSError) as error:
        yield Damage(where=CHECKSUMS_NAME, what=str(error))
        return
    for name, wanted in sorted(hashes.items()):
        if (problem := names.judge_name(name)) is not None:
            yield Damage(where=CHECKSUMS_NAME, what=f"it names {ascii(name)[:80]}, which {problem}")
            continue
        part = re.fullmatch(rf"{PARTS_NAME}/(\d+)\.parquet", name, re.ASCII)
        shard = int(part[1]) if part and int(part[1]) < store.layout.num_shards else None
        if (what := compare_hash(store.path, name, wanted)) is not None:
            yield Damage(where=name, what=what, shard=shard)


def compare_hash(root: Path, name: str, wanted: object) -> str | None:
    """What is wrong with a file of a store whose sha256 is recorded; None if nothing is."""
    if not isinstance(wanted, str):
        return "its recorded hash is none"
    try:
        file = names.locate(root, name)
        os.close(names.open_file(file))  # no link, and no pipe that would be waited for
        return None if hash_file(file) == wanted else "it does not match its recorded hash"
    except FileNotFoundError:
        return "the file is missing"
    except StoreDamagedError as error:
        return str(error)
    except OSError as error:  # something else in its place, or a disk that does not read it
        return f"it cannot be read: {error.strerror}"


def _check_metadata(store: StoreReader) -> Iterator[Damage]:
    """Whether every array is what the layout says."""
    for spec in store.layout.array_specs():
        try:
            require_metadata(store.path, spec)
        except StoreDamagedError as error:
            yield Damage(where=f"{spec.name}/zarr.json", what=str(error))


def _check_small_arrays(store: StoreReader) -> Iterator[Damage]:
    """Codecs and head: one chunk each."""
    try:
        heads = store.head_names
    except StoreDamagedError as error:
        yield Damage(where="head", what=str(error))
        heads = []
    arrays = [(name, shape.__eq__) for name, shape in store.codec_arrays.items()]
    for name, is_possible in [*arrays, *((f"head/{name}", store.is_head_shape) for name in heads)]:
        yield from _check_small_array(store, name, is_possible)


def _check_small_array(
    store: StoreReader, name: str, is_possible: Callable[[tuple[int, ...]], bool]
) -> Iterator[Damage]:
    try:
        spec = describe_small_array(store.path, name, is_possible)
    except StoreDamagedError as error:
        yield Damage(where=f"{name}/zarr.json", what=str(error))
        return
    chunk = name_only_chunk(spec)
    if (what := verify_chunk_file(store.path / chunk, 4 * math.prod(spec.shape))) is not None:
        yield Damage(where=chunk, what=what)


def _check_moments(store: StoreReader) -> Iterator[Damage]:
    """Moments of captions, if there are any; those of other captions than the store has now are void."""
    try:
        store.read_captions()
    except StoreDamagedError:
        return  # told already: of which captions they are cannot be seen
    try:
        list_moment_files(store)
    except StoreDamagedError as error:
        yield Damage(where=manifest.MOMENTS_NAME, what=str(error))


def _check_texts(store: StoreReader) -> Iterator[Damage]:
    """Texts of captions and of classes, if there are any; those of other ones than the store has now are void."""
    if not os.path.lexists(store.path / TEXT_NAME):
        return
    yield from _check_class_texts(store)
    if has_void_texts(store.path):
        return
    try:
        arrays = read_text_choice(store.path).arrays
    except StoreDamagedError as error:
        yield Damage(where=f"{TEXT_NAME}/zarr.json", what=str(error))
        arrays = TEXT_ARRAYS
    for name in arrays:
        try:
            spec = describe_text_array(store, name)
        except StoreDamagedError as error:
            yield Damage(where=f"{TEXT_NAME}/{name}/zarr.json", what=str(error))
            continue
        num_texts, per_shard = spec.shape[0], spec.shard_shape[0]
        for shard in range(-(-num_texts // per_shard)):
            where = f"{TEXT_NAME}/{name}/{name_text_shard(spec, shard)}"
            try:
                is_there, problems = verify_shard(store.path / where, per_shard)
            except (DamagedChunkError, OSError) as error:
                yield Damage(where=where, what=_describe(error))
                continue
            yield from (Damage(where=where, what=what) for what in problems.values())
            if missing := np.flatnonzero(~is_there[: num_texts - shard * per_shard]).tolist():
                yield Damage(where=where, what=f"has no chunk {missing[0]}")


def _check_class_texts(store: StoreReader) -> Iterator[Damage]:
    try:
        is_asked = read_class_template(store.path) is not None
    except StoreDamagedError as error:
        yield Damage(where=f"{TEXT_NAME}/{CLASSES_NAME}/zarr.json", what=str(error))
        return
    if is_asked and has_current_class_texts(store):
        shape = (len(store.classes.names), store.layout.embed_dim)
        yield from _check_small_array(store, f"{TEXT_NAME}/{CLASSES_NAME}", shape.__eq__)


def _read_ids(store: StoreReader) -> list[str] | None:
    try:
        ids = manifest.read_table(names.require_file(store.path, manifest.MANIFEST_NAME), ["video_id"])["video_id"]
    except (StoreDamagedError, LookupError):
        return None  # its hash tells
    return ids.to_pylist() if len(ids) == store.layout.num_rows else None


def _ids_of(store: StoreReader, video_ids: list[str] | None, shard: int) -> list[str] | None:
    rows = store.layout.shard_rows(shard)
    return None if video_ids is None else video_ids[rows.start : rows.stop]


def check_shard(store: StoreReader, shard: int, video_ids: list[str] | None) -> tuple[pa.Table | None, list[Damage]]:
    """Check every byte of a finished shard.

    Args:
        store: Which has it.
        shard: Which.
        video_ids: Of its rows; None where the manifest cannot tell.

    Returns:
        Its results, where they can be read, and all damage.
    """
    rows = store.layout.shard_rows(shard)
    marker = f"{PARTS_NAME}/{marker_path(store.path, shard).name}"
    try:
        read = store.read_marker(shard)
    except StoreDamagedError as error:
        return None, [Damage(where=marker, what=str(error), shard=shard)]
    if read is None:
        return None, []  # undone since
    part = read.results
    if video_ids is not None and part["video_id"].to_pylist() != video_ids[: len(part)]:
        what = "it holds other videos than the manifest has in these rows"
        return None, [Damage(where=marker, what=what, shard=shard)]
    counts = np.zeros((len(rows), 2), dtype=np.int64)  # views and frames of each row
    is_pending = np.zeros(store.layout.rows_per_shard, dtype=bool)  # such a row may have chunks or not
    is_pending[len(part) : len(rows)] = True
    for number, row in enumerate(part.select(["status", "num_views", "num_cached_frames"]).to_pylist()):
        is_pending[number] = row["status"] == "pending"
        if row["status"] == "ok":
            counts[number] = row["num_views"] or 0, row["num_cached_frames"] or 0
    ids = part["video_id"].to_pylist()
    damage = []
    for spec in store.layout.array_specs():
        for place in spec.shard_parts():
            key = spec.shard_key(shard, place)
            due = _wanted_chunks(spec, counts, place[0] * spec.shard_shape[1], place[1] * spec.shard_shape[2])
            problems = _check_file(store, spec, shard, key, due, is_pending, ids) if due.any() else []
            damage += problems or _check_fingerprint(store, spec, shard, key, read)
    return part, damage


def _check_fingerprint(store: StoreReader, spec: ArraySpec, shard: int, key: str, marker: Marker) -> list[Damage]:
    """Whether a file is the one that its done-marker was written for: two writers at once would mix them."""
    name = f"{spec.name}/{key}"
    if not marker.files or shard in find_swaps(store.path):
        return []
    file, rows = store.path / name, tuple(store.layout.shard_rows(shard))
    try:
        fingerprint = fingerprint_shard(file, spec) if file.exists() else None
    except (OSError, ValueError) as error:
        return [Damage(where=name, what=str(error), shard=shard, rows=rows)]
    if fingerprint == marker.files.get(name):
        return []
    what = "is not the file that the shard's done-marker was written for"
    return [Damage(where=name, what=what, shard=shard, rows=rows)]


def _wanted_chunks(spec: ArraySpec, counts: np.ndarray, first_view: int, first_frame: int) -> np.ndarray:
    """(rows, views, chunks along F and behind it) bool: which the manifest says that one file of a shard holds."""
    _, views, frames = spec.shard_shape[:3]
    size = frames if spec.chunk_shape is None else spec.chunk_shape[2]
    has_view = first_view + np.arange(views) < counts[:, :1]
    has_frame = first_frame + np.arange(0, frames, size) < counts[:, 1:]
    has_chunk = np.repeat(has_frame, spec.chunks_per_frame, axis=1)
    is_due = np.zeros((spec.shard_shape[0], views, has_chunk.shape[1]), dtype=bool)
    is_due[: len(counts)] = has_view[:, :, None] & has_chunk[:, None]
    return is_due


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
        what = verify_chunk_file(file, math.prod(spec.shard_shape) * np.dtype(spec.dtype).itemsize)
        return [] if what is None else [damage(what)]
    try:
        is_there, problems = verify_shard(file, wanted.size)
    except (DamagedChunkError, OSError) as error:
        return [damage(_describe(error))]
    per_row = wanted[0].size
    is_known = np.repeat(~is_pending, per_row)
    damages = [damage(what, number // per_row) for number, what in problems.items() if is_known[number]]
    for number in np.flatnonzero((is_there != wanted.ravel()) & is_known).tolist():
        what = "has no chunk" if wanted.flat[number] else "has a chunk that the manifest does not know of"
        damages.append(damage(f"{what} {number}", min(number // per_row, len(video_ids) - 1)))
    return damages


def _describe(error: Exception) -> str:
    return f"it cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def _check_manifest(store: StoreReader, parts: dict[range, pa.Table], mismatched: Collection[str]) -> list[Damage]:
    """Whether a finished manifest says what the done-markers say."""
    name = manifest.MANIFEST_NAME
    damages = []
    try:
        table = manifest.read_table(names.require_file(store.path, name))
        table.select(manifest.RESULT_SCHEMA.names)
    except (StoreDamagedError, LookupError) as error:
        return [] if name in mismatched else [Damage(where=name, what=str(error))]
    try:
        check_rows(table, store.layout, len(store.classes.names), store.path / name, store.layout.num_rows)
    except StoreDamagedError as error:
        damages.append(Damage(where=name, what=str(error)))
        if len(table) != store.layout.num_rows:
            return damages
    statuses = table["status"].to_numpy(zero_copy_only=False)
    there = find_markers(store.path)
    for shard in range(store.layout.num_shards):
        rows = store.layout.shard_rows(shard)
        where = str(marker_path(store.path, shard).relative_to(store.path))
        if shard not in there and where not in mismatched and (statuses[rows.start : rows.stop] != "pending").any():
            damages.append(Damage(where=where, what="the file is missing", shard=shard))
    with suppress(StoreDamagedError, OSError):
        joined = read_joined(store.path, read_recorded_hashes(store.path).get(name))
        # Written since the last consolidation: the manifest does not hold it yet. In a copy of a store every marker has
        # another inode; there the times tell.
        written_ns = (store.path / name).stat().st_mtime_ns
        newer = {s for s, state in there.items() if joined and joined.get(s) != state and state[1] > written_ns}
        parts = {rows: part for rows, part in parts.items() if rows.start // store.layout.rows_per_shard not in newer}
    for rows, part in parts.items():
        results: Any = table.slice(rows.start, len(part)).select(manifest.RESULT_SCHEMA.names)
        is_pending = "pending" in results["status"].to_pylist()  # not consolidated since
        if not is_pending and results.to_pylist() != part.select(manifest.RESULT_SCHEMA.names).to_pylist():
            shard = rows.start // store.layout.rows_per_shard
            what = f"rows {rows.start} to {rows.stop - 1} are not what the done-marker of shard {shard} says"
            damages.append(Damage(where=manifest.MANIFEST_NAME, what=what, shard=shard))
    return damages


def render_damage(store: Path, damage: Sequence[Damage], rows: str | None) -> list[str]:
    """What `verify_store` found, in lines.

    Args:
        store: The store.
        damage: What it found.
        rows: How many rows there are, in words; None where that is not known.
    """
    if not damage:
        return [f"{store}: no damage{'' if rows is None else f'; {rows}'}"]
    lines = [
        f"{one.where}: {one.what}" + ("" if one.video_id is None else f" (video {one.video_id})")
        for one in damage[:_SHOWN_DAMAGE]
    ]
    if len(damage) > _SHOWN_DAMAGE:
        lines.append(f"and {len(damage) - _SHOWN_DAMAGE} more: see --json")
    shards = sorted({one.shard for one in damage if one.shard is not None})
    where = f"shards {', '.join(map(str, shards))}" if shards else "what belongs to the whole store"
    count = f"{len(damage)} damage{'s' * (len(damage) != 1)}"
    return [*lines, f"{store}: {count} in {where}. The command that wrote it mends it, with --repair."]
