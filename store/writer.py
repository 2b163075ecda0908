"""Write a store: the skeleton first, then whole shards, each with its done-marker, then the final manifest."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorstore as ts

from ..errors import S4vError, StoreDamagedError, StoreError, StoreExistsError, StoreMismatchError
from . import manifest
from ._files import FolderLock, hash_file, kill_point, sync_folder, wait_for_folder
from ._row_differences import list_video_differences
from ._zarr import create_array, open_array, refused_write, write_group, write_small_array
from .checksums import CHECKSUMS_NAME, forget_checksums, forget_missing_parts, read_recorded_hashes, write_checksums
from .codec import Codec
from .layout import FORMAT_VERSION, StoreLayout
from .reader import StoreReader, open_store
from .records import VideoRecord, VideoResult
from .texts import TEXT_NAME, remove_texts
from .verify import Damage

_log = logging.getLogger(__name__)

# May differ between two runs without making their stores differ: data, weights and a codec's source may lie elsewhere
# by now. What they are is told by paths below the root, by the weights' hash and by the codec's.
_VOLATILE_ATTRIBUTES = ("created", "codec", "codec_from", "dataset.root", "backbone.weights")


MarkerState = tuple[int, int]
"""Tells one done-marker from another one in its place."""


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
        self._specs = {spec.name: spec for spec in layout.array_specs()}
        self._arrays = {name: open_array(path, name, write=True) for name in self._specs}
        self._expected: dict[int, MarkerState | None] = {}
        if not is_worker:
            self._remove_leftovers()
            forget_missing_parts(path)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other writers in."""
        if self._lock is not None:
            self._lock.close()

    def pending_shards(self) -> list[int]:
        """Shards without a done-marker, ascending."""
        return [s for s in range(self.layout.num_shards) if not manifest.part_path(self.path, s).exists()]

    def failed_shards(self) -> list[int]:
        """Finished shards with a row that failed, ascending."""
        found = []
        for shard in range(self.layout.num_shards):
            part = manifest.read_part(self.path, shard, self._codec_sha256)
            if part is not None and "failed" in part["status"].to_pylist():
                found.append(shard)
        return found

    def expect_markers(self, markers: Mapping[int, MarkerState | None]) -> None:
        """Tell a worker which done-markers its shards had when they were handed out.

        A worker that the scheduler took for dead (a frozen machine, a lost network) may wake up when another one has
        done its shard. It then finds another marker than was there, and leaves what is finished alone.
        """
        self._expected.update(markers)

    def write_shard(self, shard: int, tokens: Mapping[int, RowTokens], results: Sequence[VideoResult]) -> None:
        """Write one shard of every array whole, make it durable, then mark it done.

        A worker does not write what another one has finished since the shard was handed out (`expect_markers`).

        Args:
            shard: Which one.
            tokens: By row number; rows that failed are not in it, and a shard of failed rows alone has no file.
            results: One per row of the shard, in row order.

        Raises:
            EnvironmentFailedError: If the file system refuses, say for lack of space; the shard is not marked done.
        """
        rows = self.layout.shard_rows(shard)
        assert [r.video_id for r in results] == self._inputs["video_id"].slice(rows.start, len(rows)).to_pylist()
        assert set(tokens) == {row for row, r in zip(rows, results, strict=True) if r.status == "ok"}
        if shard in self._expected and not is_undone(self.path, shard, self._expected[shard]):
            _log.warning("shard %d of %s was finished by another worker meanwhile", shard, self.path)
            return
        needed = sum(getattr(row, name).nbytes for row in tokens.values() for name in self._arrays)
        with naming_what_is_refused(self.path / f"shard {shard}", needed=needed):
            self._undo_shard(shard)
            self._write_arrays(tokens)
            kill_point("shard written")
            for name in self._arrays:
                sync_folder(self.path / name)
            kill_point("shard durable")
            manifest.write_part(self.path, shard, results, self._codec_sha256)
        kill_point("shard done")

    def _undo_shard(self, shard: int) -> None:
        """Take back a shard that was done before, or what a killed writer left of it."""
        marker = manifest.part_path(self.path, shard)
        if marker.exists():
            # In this order: a marker without a recorded hash is a marker, a hash of another marker is damage.
            forget_checksums(self.path, {f"{manifest.PARTS_NAME}/{marker.name}"})
            kill_point("shard forgotten")
            marker.unlink(missing_ok=True)
            sync_folder(marker.parent)
        kill_point("shard undone")
        # Gone first: tensorstore would merge the rows of the new shard into the file of the old one.
        for name, spec in self._specs.items():
            for key in spec.shard_keys(shard):
                (self.path / name / key).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """Files that killed writers were still filling. Only while no worker writes: each fills one of these."""
        for name in self._arrays:
            for file in (self.path / name).iterdir():
                if file.name.endswith(".__lock"):
                    file.unlink(missing_ok=True)

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
            self._remove_leftovers()
            return self._consolidate()

    def _consolidate(self) -> pa.Table:
        parts = {}
        for shard in range(self.layout.num_shards):
            part = manifest.read_part(self.path, shard, self._codec_sha256)
            if part is not None:
                parts[self.layout.shard_rows(shard)] = part
        kill_point("before consolidation")
        table = manifest.join_parts(self._inputs, parts)
        path = self.path / manifest.MANIFEST_NAME
        # A finished store stays as it is, times included: "the newest store" means the one written last.
        if not manifest.read_table(path).equals(table):
            # Killed between the two writes, a store has no hash of its manifest, not a wrong one.
            write_checksums(self.path, without=manifest.MANIFEST_NAME)
            manifest.write_table(path, table)
            kill_point("manifest written")
        write_checksums(self.path)
        kill_point("after consolidation")
        return table


def read_marker_state(path: Path, shard: int) -> MarkerState | None:
    """Which done-marker a shard has; None where it has none."""
    try:
        state = manifest.part_path(path, shard).stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def is_undone(path: Path, shard: int, handed_out: MarkerState | None) -> bool:
    """Whether nobody has finished a shard since it was handed out, with that marker or none."""
    return read_marker_state(path, shard) in (None, handed_out)


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
) -> pa.Table:
    """Everything of a store but its shards; returns the manifest's input columns."""
    partial.mkdir()
    for spec in layout.array_specs():
        create_array(partial, spec)
    _write_named(partial, "codec", codec.parts)
    _write_named(partial, "head", head)
    classes = manifest.ClassList(tuple(attributes["classes"]["names"]))
    inputs = manifest.input_table(records, classes)
    (partial / manifest.PARTS_NAME).mkdir()
    manifest.write_table(partial / manifest.MANIFEST_NAME, manifest.pending_manifest(inputs))
    manifest.write_table(partial / manifest.CAPTIONS_NAME, manifest.caption_table(records))
    write_group(partial, {"s4v": full_attributes(attributes, layout, codec)})
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
    root = attributes.get("dataset", {}).get("root")
    differences = list_differences(store.attributes, wanted) + list_video_differences(store, inputs, root)
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
    layout: StoreLayout,
    attributes: Mapping[str, Any],
    records: Sequence[VideoRecord],
    codec: Codec,
    head: Mapping[str, np.ndarray],
) -> None:
    """Put damaged files of the whole store back as they were written, and mark damaged shards undone.

    Args:
        path: The store; its own metadata (`zarr.json`) must be whole.
        damage: As `verify_store` found it.
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
    differences = list_differences(open_store(path).attributes, full_attributes(attributes, layout, codec))
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
            write_skeleton(fresh, layout, attributes, records, codec, head)
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
            markers = [manifest.part_path(path, one.shard) for one in damage if one.shard is not None]
            forget_checksums(path, {f"{manifest.PARTS_NAME}/{marker.name}" for marker in markers})
            for file in {*markers, *(path / one.where for one in damage if one.shard is not None)}:
                if file.is_dir():  # in a file's place
                    shutil.rmtree(file)
            for marker in markers:
                marker.unlink(missing_ok=True)
            sync_folder(path / manifest.PARTS_NAME)
            if has_bad_texts:
                remove_texts(path)
            write_checksums(path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


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
