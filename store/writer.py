"""Write a store: the skeleton first, then whole shards, each with its done-marker, then the final manifest."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import tensorstore as ts

from ..errors import S4vError, StoreDamagedError, StoreExistsError, StoreMismatchError
from ..files import kill_point, sync_folder
from . import manifest
from ._row_differences import list_video_differences
from ._zarr import open_array, refused_write
from .checksums import (
    APPEND_NAME,
    CHECKSUMS_NAME,
    forget_missing_parts,
    forget_parts,
    read_recorded_hashes,
    write_checksums,
)
from .fingerprint import fingerprint_shard
from .lease import Lease, Scope, check_lease, hold_lease, lease_new_store
from .markers import (
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
from .reader import StoreReader, is_store, open_store
from .records import VideoResult
from .repair import REPAIR_STEM
from .scratch import Scratch, make_scratch, remove_dead_files, remove_dead_scratch
from .skeleton import write_skeleton
from .spec import StoreSpec, list_codec_differences, list_differences
from .swap import find_swaps, finish_swap, place_marker, publish_shard, shard_files, swap_shard
from .text_choice import TEXT_NAME
from .texts import REMOVED_STEM

__all__ = [
    "MarkerState",
    "RowTokens",
    "StoreWriter",
    "create_store",
    "is_undone",
    "read_marker_state",
    "resume_store",
]

_log = logging.getLogger(__name__)

_SHARDS_STEM = "shards"
_BUSY_ADVICE = "wait for it, or choose another --out"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTokens:
    """What one row adds to a shard; a and f are the views and frames that this row uses."""

    patches: np.ndarray
    """(a, f, L, N, K) codes."""
    embedding: np.ndarray
    """(a, f, E)."""
    cls: np.ndarray | None = None
    """(a, f, L, D), or (a, f, L, K) codes where they are coded; None in a store without class tokens."""
    pixels: np.ndarray | None = None
    """(a, f, O, H, W, 3) uint8; None in a store without pixels, or of another pixel format."""
    ycbcr420: np.ndarray | None = None
    """(a, f, O, P) uint8, in a store of that pixel format."""


class StoreWriter:
    """Writes shards into a store whose skeleton exists; `create_store`, `resume_store` and `join_store` make one.

    It is the only writer of its lease's scope until `close`, or until its process ends however it ends; also a context
    manager. Without a lease it takes one of the whole store. A worker of the process that has it takes none: it is told
    which shards are its own (`expect_markers`) and the lease's nonce, and has no table of all inputs.

    Args:
        store: The store as it is under the lease; its layout, codec and format are written on in.
        inputs: The manifest's input columns; None in a worker.
        path: Where the store really lies, if its own path leads there by a link.
        is_worker: Whether another process has the lease.
        lease: Of the store, held already.
        lease_nonce: Of the lease that another process has.

    Raises:
        StoreBusyError: If another process writes there.
    """

    def __init__(
        self,
        store: StoreReader,
        inputs: pa.Table | None,
        *,
        path: Path | None = None,
        is_worker: bool = False,
        lease: Lease | None = None,
        lease_nonce: str | None = None,
    ) -> None:
        path = path or store.path
        with ExitStack() as opening:
            if not is_worker:
                lease = lease or hold_lease(path, Scope.all(), purpose="extract", advice=_BUSY_ADVICE)
                opening.callback(lease.close)
            self.lease_nonce = lease_nonce if lease is None else lease.nonce
            self._open(store, path, inputs, lease)
            opening.pop_all()

    def _open(self, store: StoreReader, path: Path, inputs: pa.Table | None, lease: Lease | None) -> None:
        self.lease = lease
        self.store = store
        self.path = path
        self.layout = store.layout
        self.codec = store.codec
        self.cls_codec = store.cls_codec
        self.codecs_sha256 = store.facts.codecs_sha256
        self._inputs = inputs
        self._specs = store.layout.array_specs()
        self._format_version = store.facts.format_version
        self._expected: dict[int, MarkerState | None] = {}
        self._manifest_lease: Lease | None = None
        self._scratch: Scratch | None = None
        self._arrays: dict[str, ts.TensorStore] = {}
        if lease is not None:
            self._remove_leftovers()
            with self.hold_manifest():
                if lease.scope.kind == "all":
                    _remove_unfinished(path, [spec.name for spec in self._specs])
                forget_missing_parts(path)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other writers in."""
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None
            self._arrays.clear()
        if self.lease is not None:
            with suppress(OSError):  # the store may be gone, or its disk
                remove_dead_scratch(self.path, _SHARDS_STEM)  # of workers that were killed meanwhile
            self.lease.close()

    def check_lease(self) -> None:
        """See that what is written still is ours to write: before each rename that publishes something.

        Raises:
            LeaseLostError: If another process took over, because this one was stopped or cut off for too long.
        """
        if self.lease is not None:
            self.lease.check()
        elif self.lease_nonce is not None:
            check_lease(self.path, self.lease_nonce)
        if self._manifest_lease is not None:
            self._manifest_lease.check()

    def _is_ours(self, shard: int) -> bool:
        """Whether a shard is one that this writer may write."""
        return self.lease is None or self.lease.scope.covers(shard)

    @contextmanager
    def hold_manifest(self) -> Iterator[None]:
        """Be the only one that writes what belongs to the whole store; who has shards alone waits for others."""
        is_held = self._manifest_lease is not None
        if is_held or self.lease is None or self.lease.scope.meets(Scope.manifest()):
            yield
            return
        with hold_lease(self.path, Scope.manifest(), purpose="extract", wait=True, advice=_BUSY_ADVICE) as lease:
            self._manifest_lease = lease
            try:
                yield
            finally:
                self._manifest_lease = None

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
        changed, _ = self._changed_parts(table["status"])
        statuses = table["status"].to_numpy(zero_copy_only=False)
        for first, part in changed.items():
            statuses[first : first + len(part)] = part["status"].to_numpy(zero_copy_only=False)
        return pa.chunked_array([pa.array(statuses, pa.string())])

    def set_pending(self, rows: Sequence[int]) -> None:
        """Have the manifest say of some rows that their done-markers tell: they are about to be done anew.

        A reader that opens the store looks into the markers then, which change together with the rows' tokens.

        Args:
            rows: Whose shards all have done-markers.
        """
        with self.hold_manifest():
            self._set_pending(rows)

    def _set_pending(self, rows: Sequence[int]) -> None:
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
            marker, first = read_marker(self.path, shard, self.codecs_sha256), self.layout.shard_rows(shard).start
            if marker is None:
                continue
            results = marker.as_results()
            for row in range(first, first + len(results)):
                if row in sources:
                    num_bytes, mtime_ns, digest = sources[row]
                    known = {"source_bytes": num_bytes, "source_mtime_ns": mtime_ns, "source_hash": digest}
                    results[row - first] = replace(results[row - first], **known)  # type: ignore[arg-type]
            scratch = self._open_scratch()
            version = self._format_version
            with self.hold_manifest():
                forget_parts(self.path)
            made = make_marker(scratch, shard, results, self.codecs_sha256, marker.files or {}, version)
            self.check_lease()
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
        assert len(results) == len(rows)
        if self._inputs is not None:
            assert [r.video_id for r in results] == self._inputs["video_id"].slice(rows.start, len(rows)).to_pylist()
        assert set(tokens) == {row for row, r in zip(rows, results, strict=True) if r.status == "ok"}
        if shard in self._expected and not is_undone(self.path, shard, self._expected[shard]):
            _log.warning("shard %d of %s was finished by another worker meanwhile", shard, self.path)
            return
        names = [spec.name for spec in self._specs]
        needed = sum(getattr(row, name).nbytes for row in tokens.values() for name in names)
        with naming_what_is_refused(self.path / f"shard {shard}", needed=needed, check=self.check_lease):
            scratch = self._open_scratch()
            for name in shard_files(self._specs, shard):
                (scratch / name).unlink(missing_ok=True)  # of a try that failed: tensorstore would add to it
            self._write_arrays(tokens)
            kill_point("shard written")
            files = {
                f"{spec.name}/{key}": fingerprint_shard(scratch / spec.name / key, spec)
                for spec in self._specs
                for key in spec.shard_keys(shard)
                if (scratch / spec.name / key).is_file()
            }
            mark = partial(make_marker, codec_sha256=self.codecs_sha256, format_version=self._format_version)
            marker = mark(scratch, shard, results, files=files)
            old = marker_path(self.path, shard)
            if not old.exists():
                publish_shard(self.path, scratch, self._specs, shard, marker, list(files), self.check_lease)
            else:
                if old.suffix == ".parquet":
                    with self.hold_manifest():
                        forget_parts(self.path)
                before = self._mark_pending(shard, replaced, mark) if replaced else None
                swap_shard(
                    *(self.path, scratch, self._specs, shard, marker, list(files), self.check_lease),
                    codec_sha256=self.codecs_sha256,
                    before=before,
                )
        kill_point("shard done")

    def _mark_pending(self, shard: int, replaced: Collection[int], mark: Callable[..., Path]) -> Path | None:
        """The shard's marker, but for rows that are about to get other tokens; None where it cannot be read."""
        assert self._scratch is not None
        try:
            marker = read_marker(self.path, shard, self.codecs_sha256)
        except StoreDamagedError:
            return None
        assert marker is not None
        first = self.layout.shard_rows(shard).start
        results = [
            replace(result, status="pending") if first + place in replaced else result
            for place, result in enumerate(marker.as_results())
        ]
        folder = self._scratch.path / "before"
        folder.mkdir(exist_ok=True)
        return mark(folder, shard, results, files=marker.files or {})

    def touch_marker(self, shard: int) -> None:
        """Leave a shard as it is, but seen to: who handed it out looks for another marker."""
        with suppress(FileNotFoundError):
            os.utime(marker_path(self.path, shard))

    def finish_swaps(self, shards: Collection[int] | None = None) -> None:
        """Complete changes of shards that killed writers have begun: all, or those of some shards."""
        for shard in find_swaps(self.path):
            if self._is_ours(shard) and (shards is None or shard in shards):
                finish_swap(self.path, self._specs, shard, self.codecs_sha256, self.check_lease)

    def _remove_leftovers(self) -> None:
        """What killed writers have left half done, as far as it is this writer's."""
        self.finish_swaps()
        remove_dead_scratch(self.path, _SHARDS_STEM)
        for spec in self._specs:  # of the version before, which filled its files beside the others
            for file in (self.path / spec.name).iterdir():
                shard = file.name.split(".")[1] if file.name.endswith(".__lock") else ""
                if shard.isdecimal() and self._is_ours(int(shard)):
                    file.unlink(missing_ok=True)

    def _open_scratch(self) -> Path:
        """A folder of our own with all arrays, empty, to fill shards in."""
        if self._scratch is None:
            self._scratch = make_scratch(self.path, _SHARDS_STEM, "extract", lease=self.lease_nonce)
            for spec in self._specs:
                folder = self._scratch.path / spec.name
                folder.mkdir()
                shutil.copyfile(self.path / spec.name / "zarr.json", folder / "zarr.json")
                self._arrays[spec.name] = open_array(self._scratch.path, spec, write=True)
        return self._scratch.path

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
        path = self.path / manifest.MANIFEST_NAME
        with naming_what_is_refused(path, check=self.check_lease), self.hold_manifest():
            return self._consolidate()

    def _consolidate(self) -> pa.Table:
        table = manifest.read_table(self.path / manifest.MANIFEST_NAME)
        parts, markers = self._changed_parts(table["status"])
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
        self.check_lease()
        write_checksums(self.path, without=manifest.MANIFEST_NAME)
        self.check_lease()
        manifest.write_table(self.path / manifest.MANIFEST_NAME, table)
        kill_point("manifest written")

    def _read_joined(self) -> dict[int, MarkerState]:
        return read_joined(self.path, read_recorded_hashes(self.path).get(manifest.MANIFEST_NAME))

    def _changed_parts(self, statuses: pa.ChunkedArray) -> tuple[dict[int, pa.Table], dict[int, MarkerState]]:
        """Results that the manifest does not hold yet, by first row, and all markers that there are.

        Where a marker is gone whose rows the manifest holds, they are pending.

        Args:
            statuses: As the manifest has them.
        """
        markers, joined = find_markers(self.path), self._read_joined()
        is_pending = pa.compute.equal(statuses, "pending").to_numpy()
        parts: dict[int, pa.Table] = {}
        for shard in range(self.layout.num_shards):
            state = markers.get(shard)
            if state is not None and state == joined.get(shard):
                continue
            rows = self.layout.shard_rows(shard)
            marker = None if state is None else read_marker(self.path, shard, self.codecs_sha256)
            if marker is not None:
                parts[rows.start] = marker.results
            elif not is_pending[rows.start : rows.stop].all():
                assert self._inputs is not None, "a worker does not consolidate"
                ids = self._inputs["video_id"].slice(rows.start, len(rows))
                parts[rows.start] = manifest.pending_results(ids)
        return parts, markers


def create_store(path: Path, spec: StoreSpec, *, overwrite: bool = False, scope: Scope | None = None) -> StoreWriter:
    """Create a store's skeleton: metadata, codec, head and a manifest of pending rows.

    The skeleton is built beside `path` and renamed, so that what stands at `path` is always a whole one. Of two
    processes that create it at once, one does: a folder is not renamed over another one that holds something.

    Args:
        path: Where; its parent folders are created.
        spec: What to make it of, codec and the tower's end included.
        overwrite: Replace a store that stands at `path`.
        scope: What the writer will write to; None is everything.

    Raises:
        StoreExistsError: If something stands at `path`: a store without `overwrite`, or anything else.
        StoreBusyError: If another process writes to the store that is to be replaced.
    """
    named, path = path, path.resolve()  # what a link points to is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_existing(path, overwrite=overwrite)
    remove_dead_scratch(path.parent, path.name)
    with ExitStack() as open_things, naming_what_is_refused(path):
        scratch = open_things.enter_context(make_scratch(path.parent, path.name, "extract"))
        fresh = scratch / path.name
        inputs = write_skeleton(fresh, spec)
        # Under the skeleton's own lease from its first moment: nobody may replace it, or begin it, in between.
        lease = lease_new_store(fresh, scope or Scope.all(), purpose="extract")
        closing = open_things.enter_context(ExitStack())
        closing.callback(lease.close)
        if overwrite and path.exists():
            _move_away(path, scratch / "old")
        move_into_place(fresh, path)
        lease.moved_to(path)
        store = open_store(named)
        closing.pop_all()
        return StoreWriter(store, inputs, path=path, lease=lease)


def _move_away(path: Path, place: Path) -> None:
    """Rename a store that nobody writes to. A kill leaves the old store, none, or the new one, never a gutted one."""
    advice = "stop it before replacing its store"
    with hold_lease(path, Scope.all(), purpose="extract --overwrite", advice=advice) as lease:
        path.rename(place)
        lease.moved_to(place)
    kill_point("old store away")


def move_into_place(fresh: Path, path: Path) -> None:
    """Rename a new store to its place, where nothing may stand but an empty folder.

    Raises:
        StoreExistsError: If something does.
    """
    try:
        fresh.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise StoreExistsError(
            f"{path} was made by another process meanwhile. Nothing was written; run the same command again to go on "
            "with what is there, or choose another --out."
        ) from error
    sync_folder(path.parent)


def _remove_unfinished(path: Path, arrays: Sequence[str]) -> None:
    """What killed processes have left in a store that is all ours, and what the version before has left there."""
    for stem in (APPEND_NAME, REMOVED_STEM, REPAIR_STEM):  # unfinished texts are what the next ones go on with
        remove_dead_scratch(path, stem)
    for folder in (path, path / PARTS_NAME, *(path / name for name in arrays)):
        remove_dead_files(folder)
    tables = (manifest.MANIFEST_NAME, manifest.CAPTIONS_NAME, manifest.MOMENTS_NAME)
    for name in (*tables, CHECKSUMS_NAME, "zarr.json"):
        (path / f".{name}.partial").unlink(missing_ok=True)
    for name in (f"{APPEND_NAME}.partial", f"{TEXT_NAME}.partial.old"):
        if not (path / name).is_symlink():
            shutil.rmtree(path / name, ignore_errors=True)


def resume_store(store: StoreReader, spec: StoreSpec, *, scope: Scope | None = None) -> StoreWriter:
    """Go on with a store that the same command began.

    Args:
        store: The store; it is opened once more when nobody else can change it.
        spec: As for `create_store`; the codec and the tower's end are the store's.
        scope: What the writer will write to; None is everything.

    Raises:
        StoreMismatchError: If the store was begun with other settings or other videos; all differences listed.
        StoreNotFoundError: If it is no longer there.
        StoreBusyError: If another process writes there.
    """
    if not is_store(store.path):
        open_store(store.path)  # which says so, before a lease is looked for
    lease = hold_lease(store.path, scope or Scope.all(), purpose="extract", advice=_BUSY_ADVICE)
    try:
        store = open_store(store.path)
        inputs = _require_same(store, spec)
    except BaseException:
        lease.close()
        raise
    return StoreWriter(store, inputs, lease=lease)


def _require_same(store: StoreReader, spec: StoreSpec) -> pa.Table:
    """Refuse a store of other settings or videos; returns the manifest's input columns."""
    inputs = spec.input_table()
    expected = spec.with_codecs_of(store).full_attributes()
    root = spec.attributes.get("dataset", {}).get("root")
    differences = list_differences(store.attributes, expected) + list_video_differences(store, inputs, root)
    differences += list_codec_differences(store, spec)
    if not store.read_captions().equals(manifest.caption_table(spec.records)):
        differences.append("captions differ")
    _refuse_differences(store.path, differences)
    return inputs


def join_store(store: StoreReader, spec: StoreSpec, *, lease_nonce: str | None = None) -> StoreWriter:
    """Write some shards of a store that another process holds and hands out; neither manifest nor captions are read.

    Args:
        store: That store.
        spec: As for `resume_store`, as this process has it: its own libraries, weights and precision. Its records are
            not looked at.
        lease_nonce: Of the lease under which that process hands out.

    Raises:
        StoreMismatchError: If this process would write other tokens than the store's; all differences listed.
    """
    expected = spec.with_codecs_of(store).full_attributes()
    _refuse_differences(store.path, list_differences(store.attributes, expected))
    return StoreWriter(store, None, is_worker=True, lease_nonce=lease_nonce)


def _refuse_differences(path: Path, differences: Sequence[str]) -> None:
    if differences:
        raise StoreMismatchError(
            f"{path} was begun with other settings: {'; '.join(differences)}. "
            "Run the command that began it, choose another --out, or replace the store with --overwrite."
        )


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


@contextmanager
def naming_what_is_refused(
    path: Path, *, needed: int | None = None, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Say what could not be written, and how much it takes, when the file system refuses (full, quota, read-only).

    Args:
        path: What was to be written.
        needed: Its bytes, where they are known.
        check: Raises where the store is another process's by now, which has removed what this one was writing.
    """
    try:
        yield
    except S4vError:
        raise
    except (ValueError, OSError) as error:  # tensorstore raises ValueError for whatever the file system refuses
        check()
        raise refused_write(path, error, needed=needed) from error
