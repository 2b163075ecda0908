"""Write a store: the skeleton first, then whole shards, each with its done-marker, then the final manifest."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorstore as ts

from ..errors import S4vError, StoreDamagedError, StoreError, StoreExistsError, StoreMismatchError
from . import manifest
from ._files import FolderLock, hash_file, kill_point, sync_folder, wait_for_folder
from ._zarr import create_array, open_array, refused_write, write_group, write_small_array
from .checksums import CHECKSUMS_NAME, forget_missing_parts, forget_parts, read_recorded_hashes, write_checksums
from .codec import Codec
from .fingerprint import fingerprint_shard
from .layout import FORMAT_VERSION, StoreLayout
from .markers import (
    JOINED_NAME,
    PARTS_NAME,
    MarkerState,
    find_markers,
    is_undone,
    make_marker,
    marker_path,
    read_joined,
    read_marker,
    read_marker_state,
    write_joined,
)
from .reader import StoreReader, open_store
from .records import VideoRecord, VideoResult
from .swap import find_swaps, finish_swap, place_marker, publish_shard, shard_files, swap_shard
from .texts import TEXT_NAME, remove_texts
from .verify import Damage

__all__ = [
    "MarkerState",
    "RowTokens",
    "StoreWriter",
    "create_store",
    "is_undone",
    "read_marker_state",
    "repair_store",
    "resume_store",
]

_log = logging.getLogger(__name__)

# May differ between two runs without making their stores differ: data, weights and a codec's source may lie elsewhere
# by now. What they are is told by paths below the root, by the weights' hash and by the codec's.
_VOLATILE_ATTRIBUTES = ("created", "format_version", "codec", "codec_from", "dataset.root", "backbone.weights")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTokens:
    """What one row adds to a shard; a and f are the views and frames that this row uses."""

    patches: np.ndarray
    """(a, f, L, N, K) codes."""
    cls: np.ndarray
    """(a, f, L, D)."""
    embedding: np.ndarray
    """(a, f, E)."""
    pixels: np.ndarray | None = None
    """(a, f, O, H, W, 3) uint8."""


class StoreWriter:
    """Writes shards into a store whose skeleton exists; `create_store` and `resume_store` make one.

    It is the store's only writer until `close`, or until its process ends however it ends; also a context manager.
    A worker of the one that is takes no lock: it is told which shards are its own (`expect_markers`).
    """

    def __init__(
        self, path: Path, layout: StoreLayout, codec: Codec, inputs: pa.Table, *, is_worker: bool = False
    ) -> None:
        busy = f"another process is writing to {path}: wait for it, or choose another --out"
        self._lock = None if is_worker else FolderLock(path, busy)
        self.path = path
        self.layout = layout
        self.codec = codec
        self._codec_sha256 = codec.sha256
        self._inputs = inputs
        self._specs = layout.array_specs()
        self._format_version = open_store(path).attributes["format_version"]
        self._expected: dict[int, MarkerState | None] = {}
        self._scratch: Path | None = None
        self._arrays: dict[str, ts.TensorStore] = {}
        if not is_worker:
            self._remove_leftovers()
            forget_missing_parts(path)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other writers in."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
            self._arrays.clear()
        if self._lock is not None:
            self._lock.close()

    def pending_shards(self) -> list[int]:
        """Shards with a row that is not done, ascending."""
        return self._shards_with("pending")

    def failed_shards(self) -> list[int]:
        """Shards with a row that failed, ascending."""
        return self._shards_with("failed")

    def _shards_with(self, status: str) -> list[int]:
        is_so = np.asarray(pa.compute.equal(self.read_statuses(), status))
        return np.unique(np.flatnonzero(is_so) // self.layout.rows_per_shard).tolist()

    def read_statuses(self) -> pa.ChunkedArray:
        """Of all rows, those of markers that the manifest does not hold yet included."""
        table = manifest.read_table(self.path / manifest.MANIFEST_NAME, ["status"])
        statuses = table["status"].to_numpy(zero_copy_only=False)
        changed, _ = self._changed_parts(statuses)
        for first, part in changed.items():
            statuses[first : first + len(part)] = part["status"].to_numpy(zero_copy_only=False)
        return pa.chunked_array([pa.array(statuses, pa.string())])

    def set_pending(self, rows: Sequence[int]) -> None:
        """Have the manifest say of some rows that their done-markers tell: they are about to be done anew.

        A reader that opens the store looks into the markers then, which change together with the rows' tokens.

        Args:
            rows: Whose shards all have done-markers.
        """
        shards = {row // self.layout.rows_per_shard for row in rows}
        path = self.path / manifest.MANIFEST_NAME
        table = manifest.read_table(path)
        statuses = table["status"].to_numpy(zero_copy_only=False)
        statuses[np.asarray(rows, dtype=np.int64)] = "pending"
        table = table.set_column(table.column_names.index("status"), "status", pa.array(statuses, pa.string()))
        joined = {shard: state for shard, state in self._read_joined().items() if shard not in shards}
        self._write_manifest(table)
        write_joined(self.path, joined, write_checksums(self.path)[manifest.MANIFEST_NAME])

    def set_sources(self, sources: Mapping[int, tuple[int, int, str]]) -> None:
        """Note of which videos rows were made, in the done-markers of their shards.

        Args:
            sources: By row number: bytes, time of the last change in ns, hash.
        """
        rows = sorted(sources)
        for shard in sorted({row // self.layout.rows_per_shard for row in rows}):
            marker, first = read_marker(self.path, shard, self._codec_sha256), self.layout.shard_rows(shard).start
            if marker is None:
                continue
            names = ("source_bytes", "source_mtime_ns", "source_hash")
            results = [
                replace(result, **dict(zip(names, sources[row], strict=True))) if row in sources else result
                for row, result in enumerate(marker.as_results(), start=first)
            ]
            scratch = self._open_scratch()
            version = self._format_version
            forget_parts(self.path)
            made = make_marker(scratch, shard, results, self._codec_sha256, marker.files or {}, version)
            self._lease_check()
            place_marker(self.path, shard, made)

    def expect_markers(self, markers: Mapping[int, MarkerState | None]) -> None:
        """Tell a worker which done-markers its shards had when they were handed out.

        A worker that the scheduler took for dead (a frozen machine, a lost network) may wake up when another one has
        done its shard. It then finds another marker than was there, and leaves what is finished alone.
        """
        self._expected.update(markers)

    def write_shard(
        self,
        shard: int,
        tokens: Mapping[int, RowTokens],
        results: Sequence[VideoResult],
        *,
        replaced: Collection[int] = (),
    ) -> None:
        """Write one shard of every array whole, make it durable, then mark it done.

        A worker does not write what another one has finished since the shard was handed out (`expect_markers`).

        Args:
            shard: Which one.
            tokens: By row number, of the rows that are ok; a shard without any has no file.
            results: One per row of the shard, in row order. Where one is pending, the shard is not done.
            replaced: Rows that get other tokens than they have: readers find them pending meanwhile.

        Raises:
            EnvironmentFailedError: If the file system refuses, say for lack of space; the shard is not marked done.
        """
        rows = self.layout.shard_rows(shard)
        assert [r.video_id for r in results] == self._inputs["video_id"].slice(rows.start, len(rows)).to_pylist()
        assert set(tokens) == {row for row, r in zip(rows, results, strict=True) if r.status == "ok"}
        if shard in self._expected and not is_undone(self.path, shard, self._expected[shard]):
            _log.warning("shard %d of %s was finished by another worker meanwhile", shard, self.path)
            return
        names = [spec.name for spec in self._specs]
        needed = sum(getattr(row, name).nbytes for row in tokens.values() for name in names)
        with naming_what_is_refused(self.path / f"shard {shard}", needed=needed):
            scratch = self._open_scratch()
            self._write_arrays(tokens)
            kill_point("shard written")
            files = {
                f"{spec.name}/{key}": fingerprint_shard(scratch / spec.name / key, spec)
                for spec in self._specs
                for key in spec.shard_keys(shard)
                if (scratch / spec.name / key).is_file()
            }
            mark = partial(make_marker, codec_sha256=self._codec_sha256, format_version=self._format_version)
            marker = mark(scratch, shard, results, files=files)
            old = marker_path(self.path, shard)
            if not old.exists():
                publish_shard(self.path, scratch, self._specs, shard, marker, list(files), self._lease_check)
            else:
                if old.suffix == ".parquet":
                    forget_parts(self.path)
                before = self._mark_pending(shard, replaced, mark) if replaced else None
                swap_shard(
                    *(self.path, scratch, self._specs, shard, marker, list(files), self._lease_check),
                    codec_sha256=self._codec_sha256,
                    before=before,
                )
        kill_point("shard done")

    def _mark_pending(self, shard: int, replaced: Collection[int], mark: Callable[..., Path]) -> Path | None:
        """The shard's marker, but for rows that are about to get other tokens; None where it cannot be read."""
        assert self._scratch is not None
        try:
            marker = read_marker(self.path, shard, self._codec_sha256)
        except StoreDamagedError:
            return None
        assert marker is not None
        first = self.layout.shard_rows(shard).start
        results = [
            replace(result, status="pending") if first + place in replaced else result
            for place, result in enumerate(marker.as_results())
        ]
        folder = self._scratch / "before"
        folder.mkdir(exist_ok=True)
        return mark(folder, shard, results, files=marker.files or {})

    def finish_swaps(self, shards: Collection[int] | None = None) -> None:
        """Complete changes of shards that killed writers have begun: all, or those of some shards."""
        for shard in find_swaps(self.path):
            if shards is None or shard in shards:
                finish_swap(self.path, self._specs, shard, self._codec_sha256, self._lease_check)

    def _lease_check(self) -> None:
        """Called before every change that others see."""

    def _remove_leftovers(self) -> None:
        """What killed writers have left half done."""
        self.finish_swaps()
        for folder in self.path.iterdir():
            if folder.name.startswith("_scratch-"):
                shutil.rmtree(folder, ignore_errors=True)
        for spec in self._specs:  # of the version before, which filled its files beside the others
            for file in (self.path / spec.name).iterdir():
                if file.name.endswith(".__lock"):
                    file.unlink(missing_ok=True)

    def _open_scratch(self) -> Path:
        """A folder of our own with all arrays, empty, to fill shards in."""
        if self._scratch is None:
            self._scratch = self.path / f"_scratch-{uuid.uuid4().hex}"
            for spec in self._specs:
                (self._scratch / spec.name).mkdir(parents=True)
                shutil.copyfile(self.path / spec.name / "zarr.json", self._scratch / spec.name / "zarr.json")
                self._arrays[spec.name] = open_array(self._scratch, spec.name, write=True)
        return self._scratch

    def _write_arrays(self, tokens: Mapping[int, RowTokens]) -> None:
        # A transaction gathers the rows of a shard into one write of its file, and leaves unused places absent.
        transactions = []
        for name, array in self._arrays.items():
            transaction = ts.Transaction()
            target = array.with_transaction(transaction)
            for row, row_tokens in tokens.items():
                values = getattr(row_tokens, name)
                target[row, : values.shape[0], : values.shape[1]].write(values).result()
            transactions.append(transaction)
        commits = [transaction.commit_async() for transaction in transactions]
        kill_point("shard being written")
        for commit in commits:
            commit.result()

    def consolidate(self) -> pa.Table:
        """Write the manifest with the results of all finished shards; returns it.

        Raises:
            EnvironmentFailedError: If the file system refuses; finished shards stay so.
        """
        with naming_what_is_refused(self.path / manifest.MANIFEST_NAME):
            return self._consolidate()

    def _consolidate(self) -> pa.Table:
        table = manifest.read_table(self.path / manifest.MANIFEST_NAME)
        parts, markers = self._changed_parts(table["status"].to_numpy(zero_copy_only=False))
        kill_point("before consolidation")
        # A finished store stays as it is, times included: "the newest store" means the one written last.
        if parts and not (joined := manifest.replace_results(table, parts)).equals(table):
            table = joined
            self._write_manifest(table)
        hashes = write_checksums(self.path)
        if parts:
            write_joined(self.path, markers, hashes[manifest.MANIFEST_NAME])
        kill_point("after consolidation")
        return table

    def _write_manifest(self, table: pa.Table) -> None:
        """Killed between its two writes, a store has no hash of its manifest, not a wrong one."""
        self._lease_check()
        write_checksums(self.path, without=manifest.MANIFEST_NAME)
        self._lease_check()
        manifest.write_table(self.path / manifest.MANIFEST_NAME, table)
        kill_point("manifest written")

    def _read_joined(self) -> dict[int, MarkerState]:
        return read_joined(self.path, read_recorded_hashes(self.path).get(manifest.MANIFEST_NAME))

    def _changed_parts(self, statuses: np.ndarray) -> tuple[dict[int, pa.Table], dict[int, MarkerState]]:
        """Results that the manifest does not hold yet, by first row, and all markers that there are.

        Where a marker is gone whose rows the manifest holds, they are pending.

        Args:
            statuses: As the manifest has them.
        """
        markers, joined = find_markers(self.path), self._read_joined()
        parts: dict[int, pa.Table] = {}
        for shard in range(self.layout.num_shards):
            state = markers.get(shard)
            if state is not None and state == joined.get(shard):
                continue
            rows = self.layout.shard_rows(shard)
            marker = None if state is None else read_marker(self.path, shard, self._codec_sha256)
            if marker is not None:
                parts[rows.start] = marker.results
            elif (statuses[rows.start : rows.stop] != "pending").any():
                ids = self._inputs["video_id"].slice(rows.start, len(rows))
                parts[rows.start] = manifest.pending_results(ids)
        return parts, markers


def create_store(
    path: Path,
    *,
    layout: StoreLayout,
    attributes: Mapping[str, Any],
    records: Sequence[VideoRecord],
    codec: Codec,
    head: Mapping[str, np.ndarray],
    overwrite: bool = False,
) -> StoreWriter:
    """Create a store's skeleton: metadata, codec, head and a manifest of pending rows.

    The skeleton is built beside `path` and renamed, so that what stands at `path` is always a whole one.

    Args:
        path: Where; its parent folders are created.
        layout: Sizes of the arrays.
        attributes: What to record in the group's `s4v` attribute beside format version, layout and codec.
        records: Row v of every array is record v.
        codec: How patches are coded, numpy arrays.
        head: What stage two needs of the frozen tower's end, by name.
        overwrite: Replace a store that stands at `path`.

    Raises:
        StoreExistsError: If something stands at `path`: a store without `overwrite`, or anything else.
    """
    path = path.resolve()  # what a link points to is replaced, not the link
    partial, old = (path.with_name(f"{path.name}.{word}") for word in ("partial", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with wait_for_folder(path.parent, f"another process creates a store in {path.parent}: waiting"):
        refuse_existing(path, overwrite=overwrite)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        with naming_what_is_refused(path):
            inputs = write_skeleton(partial, layout, attributes, records, codec, head)
        # Renamed away first: a kill leaves the old store, none, or the new one, never a gutted one.
        if path.exists():
            FolderLock(path, f"another process is writing to {path}: stop it before replacing its store").close()
            path.rename(old)
        partial.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
        return StoreWriter(path, layout, codec, inputs)  # locked before another one may replace it


def write_skeleton(
    partial: Path,
    layout: StoreLayout,
    attributes: Mapping[str, Any],
    records: Sequence[VideoRecord],
    codec: Codec,
    head: Mapping[str, np.ndarray],
    format_version: int = FORMAT_VERSION,
) -> pa.Table:
    """Everything of a store but its shards; returns the manifest's input columns."""
    partial.mkdir()
    for spec in layout.array_specs():
        create_array(partial, spec)
    _write_named(partial, "codec", codec.parts)
    _write_named(partial, "head", head)
    classes = manifest.ClassList(tuple(attributes["classes"]["names"]))
    inputs = manifest.input_table(records, classes)
    (partial / PARTS_NAME).mkdir()
    manifest.write_table(partial / manifest.MANIFEST_NAME, manifest.pending_manifest(inputs))
    manifest.write_table(partial / manifest.CAPTIONS_NAME, manifest.caption_table(records))
    write_group(partial, {"s4v": {**full_attributes(attributes, layout, codec), "format_version": format_version}})
    write_checksums(partial)
    return inputs


def resume_store(
    path: Path,
    *,
    layout: StoreLayout,
    attributes: Mapping[str, Any],
    records: Sequence[VideoRecord],
    is_worker: bool = False,
) -> StoreWriter:
    """Go on with a store that the same command began.

    Args:
        path: The store.
        layout: As for `create_store`.
        attributes: As for `create_store`.
        records: As for `create_store`.
        is_worker: Whether another process holds the store and hands out its shards.

    Raises:
        StoreMismatchError: If the store was begun with other settings or other videos; all differences listed.
        StoreNotFoundError: If `path` is not a store.
    """
    store = open_store(path)
    inputs = manifest.input_table(records, manifest.ClassList(tuple(attributes["classes"]["names"])))
    wanted = full_attributes(attributes, layout, store.codec)
    differences = list_differences(store.attributes, wanted) + _list_video_differences(store, inputs)
    differences += list_codec_differences(store, attributes)
    if not store.read_captions().equals(manifest.caption_table(records)):
        differences.append("captions differ")
    if differences:
        raise StoreMismatchError(
            f"{path} was begun with other settings: {'; '.join(differences)}. "
            "Run the command that began it, choose another --out, or replace the store with --overwrite."
        )
    return StoreWriter(path, layout, store.codec, inputs, is_worker=is_worker)


def repair_store(
    path: Path,
    damage: Sequence[Damage],
    *,
    lost_rows: Mapping[int, Collection[int]],
    layout: StoreLayout,
    attributes: Mapping[str, Any],
    records: Sequence[VideoRecord],
    codec: Codec,
    head: Mapping[str, np.ndarray],
) -> None:
    """Put damaged files of the whole store back as they were written, and mark damaged rows pending.

    Args:
        path: The store; its own metadata (`zarr.json`) must be whole.
        damage: As `verify_store` found it.
        lost_rows: By damaged shard: rows of it whose tokens are damaged. The others are kept as they are.
        layout: As for `create_store`, all of it must be what the store was begun with: files that come out otherwise
            are not replaced.
        attributes: As for `create_store`.
        records: As for `create_store`.
        codec: As for `create_store`.
        head: As for `create_store`.

    Raises:
        StoreMismatchError: If the store was begun with other settings or has other rows; nothing was changed.
        StoreDamagedError: If a file cannot be had back; nothing was changed.
    """
    store = open_store(path)
    differences = list_differences(store.attributes, full_attributes(attributes, layout, codec))
    if differences:
        raise StoreMismatchError(
            f"{path} was begun otherwise than this command says: {'; '.join(differences)}. Nothing was changed. Repair "
            "it with the command that began it, without --append and without videos that are new."
        )
    # Texts are not put back: without them, the extraction writes them anew.
    has_bad_texts = any(one.where.startswith(f"{TEXT_NAME}/") for one in damage)
    whole_store = sorted({one.where for one in damage if one.shard is None and not one.where.startswith(TEXT_NAME)})
    hashes = read_recorded_hashes(path)
    fresh = path.with_name(f"{path.name}.partial")
    with FolderLock(path, f"another process is writing to {path}: wait for it before repairing its store"):
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            write_skeleton(fresh, layout, attributes, records, codec, head, store.attributes["format_version"])
            if CHECKSUMS_NAME in whole_store:  # nothing tells whether these are as they were: they are put back too
                whole_store = sorted({*whole_store, *(n for n in read_recorded_hashes(fresh) if n != "zarr.json")})
            for name in whole_store:
                if not (fresh / name).is_file() or not _is_as_before(fresh / name, path / name, hashes.get(name)):
                    raise StoreDamagedError(
                        f"{path / name} is damaged and this command does not give the same file. Nothing was changed. "
                        "Run the command that began the store, or extract it anew (--overwrite)."
                    )
            for name in whole_store:
                if (path / name).is_dir():
                    shutil.rmtree(path / name)
                (fresh / name).replace(path / name)
                sync_folder((path / name).parent)
            for shard, rows in lost_rows.items():
                _mark_damaged(path, layout, shard, rows, codec.sha256, store.attributes["format_version"])
            (path / PARTS_NAME / JOINED_NAME).unlink(missing_ok=True)
            sync_folder(path / PARTS_NAME)
            if has_bad_texts:
                remove_texts(path)
            write_checksums(path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _mark_damaged(
    path: Path, layout: StoreLayout, shard: int, rows: Collection[int], codec_sha256: str, format_version: int
) -> None:
    """Have a shard's marker say that some of its rows are to be done anew; a marker that is damaged goes."""
    for name in shard_files(layout.array_specs(), shard):
        if (path / name).is_dir():  # in a file's place
            shutil.rmtree(path / name)
    target = marker_path(path, shard)
    try:
        marker = read_marker(path, shard, codec_sha256)
    except StoreDamagedError:
        marker = None
    forget_parts(path)
    if target.is_dir():
        shutil.rmtree(target)
    if marker is None:
        target.unlink(missing_ok=True)  # its rows are told by the manifest, as far as they are in it
        return
    first = layout.shard_rows(shard).start
    results = [
        replace(result, status="pending", reason="damaged") if first + place in rows else result
        for place, result in enumerate(marker.as_results())
    ]
    folder = path / f"_scratch-{uuid.uuid4().hex}"
    folder.mkdir()
    make_marker(folder, shard, results, codec_sha256, marker.files or {}, format_version).replace(target)
    shutil.rmtree(folder)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse a target that holds something: a store unless `overwrite`, anything else always.

    Raises:
        StoreExistsError: With what stands there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "zarr.json").is_file():
        raise StoreExistsError(f"{path} exists and is not a store. Nothing was written; choose another --out.")
    if not overwrite:
        raise StoreExistsError(f"{path} is a store already. Choose another --out, or replace it with --overwrite.")


def full_attributes(attributes: Mapping[str, Any], layout: StoreLayout, codec: Codec) -> dict[str, Any]:
    """The group's `s4v` attribute."""
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(layout).items()}
    return {
        "format_version": FORMAT_VERSION,
        **attributes,
        "layout": {**sizes, "pixel_offsets_unit": "frame"},
        "codec": {"dtype": codec.dtype, "parts": sorted(codec.parts), "sha256": codec.sha256},
    }


def list_differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two stores' attributes, beside what may."""
    differences = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if old == new or prefix + key in _VOLATILE_ATTRIBUTES:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += list_differences(old, new, f"{prefix}{key}.")
        else:
            differences.append(f"{prefix}{key} {_shorten(old)} there, {_shorten(new)} here")
    return differences


def list_codec_differences(store: StoreReader, attributes: Mapping[str, Any]) -> list[str]:
    """Whether a command that names the source of its codec means the one that the store has.

    Which path it names does not matter: the codec's hash decides, and where the source is no longer there, nothing.
    """
    found, wanted = store.attributes.get("codec_from"), attributes.get("codec_from")
    if wanted is None:
        return [] if found is None else [f"codec_from {_shorten(found)} there, None here"]
    try:
        source = open_store(wanted).attributes["codec"]["sha256"]
    except StoreError:
        return [] if found is not None else [f"codec_from None there, {_shorten(wanted)} here"]
    return [] if source == store.attributes["codec"]["sha256"] else [f"the codec of {wanted} is not the one there"]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _list_video_differences(store: StoreReader, inputs: pa.Table) -> list[str]:
    old = store.input_columns()
    if old.equals(inputs):
        return []
    here, there = (dict(zip(t["video_id"].to_pylist(), t.to_pylist(), strict=True)) for t in (inputs, old))
    examples: Callable[[set[str]], str] = lambda ids: f"{len(ids)} ({', '.join(sorted(ids)[:3])})"  # noqa: E731
    parts = []
    if new := here.keys() - there.keys():
        parts.append(f"{examples(new)} videos are new (--append adds them)")
    if gone := there.keys() - here.keys():
        parts.append(f"{examples(gone)} videos are gone")
    if changed := {i for i in here.keys() & there.keys() if here[i] != there[i]}:
        parts.append(f"{examples(changed)} videos have another path, split, class or segment")
    return parts


def _is_as_before(fresh: Path, file: Path, recorded: str | None) -> bool:
    """Whether a file that was written anew is the one that was there; its recorded hash may be what is damaged."""
    if recorded is None or file.name == manifest.MANIFEST_NAME:  # which is joined from its parts again
        return True
    found = hash_file(fresh)
    try:
        return found == recorded or found == hash_file(file)
    except OSError:
        return False


@contextmanager
def naming_what_is_refused(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Say what could not be written, and how much it takes, when the file system refuses (full, quota, read-only)."""
    try:
        yield
    except S4vError:
        raise
    except (ValueError, OSError) as error:  # tensorstore raises ValueError for whatever the file system refuses
        raise refused_write(path, error, needed=needed) from error


def _write_named(root: Path, group: str, arrays: Mapping[str, np.ndarray]) -> None:
    write_group(root / group)
    for name, values in arrays.items():
        write_small_array(root, f"{group}/{name}", np.asarray(values, dtype=np.float32))
