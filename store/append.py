"""Add rows at the end of a store: all of its metadata changes at once, its finished shards stay where they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import StoreDamagedError, StoreMismatchError
from ..files import kill_point, sync_folder, write_json
from . import manifest, names
from ._zarr import require_metadata
from .attributes import check_attributes, parse_layout
from .checksums import APPEND_NAME, write_checksums
from .layout import StoreLayout
from .lease import Lease, Scope, hold_lease
from .markers import PARTS_NAME, marker_path, read_marker
from .reader import StoreReader, open_store
from .records import VideoRecord
from .scratch import make_scratch, remove_dead_scratch
from .skeleton import write_skeleton
from .spec import StoreSpec, list_codec_differences, list_differences

_TO_DO_NAME = "append.json"
_PURPOSE = "extract --append"
_MOST_TO_DO_BYTES = 2**16

# What new rows change.
_GROWING = ("layout.num_rows ", "classes.")
_LENGTHENING = "layout.num_frames "


def append_rows(path: Path, spec: StoreSpec) -> None:
    """Give a store more rows, which are pending then.

    What the store will be is written beside it and renamed into it as `_append`; from that moment on the change takes
    place, if need be by `finish_appending` after a kill. A last shard that was not full keeps what it has, and gets
    pending rows.

    Args:
        path: The store.
        spec: As for `resume_store`: sizes with all rows, the store's own number of rows in a shard; its records are
            the store's rows as they are, then the new ones.

    Raises:
        StoreMismatchError: If anything but the number of rows and classes is another; all differences listed.
        StoreBusyError: If another process writes to the store.
    """
    with _hold(path) as lease:
        store = open_store(path)
        store.require_arrays()
        _require_same_rows(store, spec)
        remove_dead_scratch(path, APPEND_NAME)
        with make_scratch(path, APPEND_NAME, _PURPOSE, lease=lease.nonce) as scratch:
            prepared, version = scratch / APPEND_NAME, store.facts.format_version
            inputs = write_skeleton(prepared, spec.filled_from(store), version)
            parts = {}
            for shard in store.finished_shards():
                marker = store.read_marker(shard)
                if marker is not None:
                    parts[spec.layout.shard_rows(shard).start] = marker.results
            table = manifest.replace_results(manifest.pending_manifest(inputs), parts)
            manifest.write_table(prepared / manifest.MANIFEST_NAME, table)
            has_moments = (prepared / manifest.MOMENTS_NAME).is_file()
            write_json(
                prepared / _TO_DO_NAME, {"files": _name_changed_files(spec.layout, has_moments), "undone_shard": None}
            )
            kill_point("append prepared")
            lease.check()
            prepared.rename(path / APPEND_NAME)
            sync_folder(path)
        _take_place(path, lease)


def is_half_appended(path: Path) -> bool:
    """Whether an `append_rows` was killed there, or is under way."""
    return os.path.lexists(path / APPEND_NAME)


def finish_appending(path: Path) -> None:
    """Complete an `append_rows` that was killed; without one, nothing."""
    if is_half_appended(path):
        with _hold(path) as lease:
            if is_half_appended(path):  # nobody else completed it meanwhile
                _take_place(path, lease)


def order_records(store: StoreReader, records: Sequence[VideoRecord]) -> list[VideoRecord]:
    """Records in the order of a store's rows; those that are not in the store come last, as they came."""
    by_id = {record.video_id: record for record in records}
    known = [by_id.pop(video_id) for video_id in _read_row_order(store, list(by_id)) if video_id in by_id]
    return [*known, *by_id.values()]


def _read_row_order(store: StoreReader, video_ids: Sequence[str]) -> list[str]:
    """The video ids of a store's rows.

    A damaged manifest is about to be repaired: finished shards know their rows too, and what is left over fills the
    others in its order, as it did when the store was begun.
    """
    try:
        return store.input_columns()["video_id"].to_pylist()
    except StoreDamagedError:
        rows: list[str | None] = [None] * store.layout.num_rows
    for shard in range(store.layout.num_shards):
        span = store.layout.shard_rows(shard)
        with suppress(StoreDamagedError):
            marker = read_marker(store.path, shard, store.facts.codecs_sha256)
            if marker is not None:
                rows[span.start : span.start + len(marker.results)] = marker.results["video_id"].to_pylist()
    placed = set(rows)
    others = (video_id for video_id in video_ids if video_id not in placed)
    return [name for row in rows if (name := row if row is not None else next(others, None)) is not None]


def _hold(path: Path) -> Lease:
    return hold_lease(path, Scope.all(), purpose=_PURPOSE, advice="wait for it before adding rows")


def _require_same_rows(store: StoreReader, spec: StoreSpec) -> None:
    expected = spec.with_codecs_of(store).full_attributes()
    # Files hold blocks of frames: of longer rows those that are there stay.
    is_longer = store.layout.frames_per_block and spec.layout.num_frames > store.layout.num_frames
    growing = (*_GROWING, _LENGTHENING) if is_longer else _GROWING
    differences = [one for one in list_differences(store.attributes, expected) if not one.startswith(growing)]
    differences += list_codec_differences(store, spec)
    known = spec.records[: store.layout.num_rows]
    inputs = manifest.input_table(known, manifest.ClassList.of(known))
    old = store.input_columns()
    if not inputs.drop_columns("label").equals(old.drop_columns("label")):
        differences.append("videos that it holds are gone, or have another path, split, class or segment")
    elif not manifest.caption_table(known).equals(store.read_captions()):
        differences.append("captions of videos that it holds differ")
    if differences:
        raise StoreMismatchError(
            f"rows cannot be added to {store.path}: {'; '.join(differences)}. Nothing was changed. "
            "Run the command that began it with --append, or choose another --out."
        )


def _take_place(path: Path, lease: Lease) -> None:
    """Move the prepared files to their places: done again from any point, it comes to the same.

    Raises:
        StoreDamagedError: If what is prepared is not what `append_rows` prepares; nothing was changed.
    """
    prepared = path / APPEND_NAME
    files, undone_shard = _read_to_do(path)
    lease.check()
    if undone_shard is not None:  # by the version before, which did a last shard that grew anew
        marker_path(path, undone_shard).unlink(missing_ok=True)
        sync_folder(path / PARTS_NAME)
    for name in files:
        if (prepared / name).exists():
            lease.check()
            (prepared / name).replace(path / name)
            sync_folder((path / name).parent)
            kill_point("append moved")
    write_checksums(path)
    kill_point("append in place")
    # Renamed first: a list of what to do that is half removed would be worse than none.
    with make_scratch(path, APPEND_NAME, _PURPOSE, lease=lease.nonce) as scratch:
        lease.check()
        prepared.rename(scratch / APPEND_NAME)
        kill_point("append away")


def _read_to_do(path: Path) -> tuple[list[str], int | None]:
    """What is to be moved, and the shard to be done anew: read and judged before anything is changed.

    A store may come from anyone, and with an append under way: every file that is named is one of those that an append
    changes, and every one of them, moved or not, belongs to the layout that the store is to have.

    Raises:
        StoreDamagedError: With what is wrong.
    """
    prepared = path / APPEND_NAME
    names.refuse_links(path)
    if not prepared.is_dir():
        raise _refuse_to_do(path, f"{APPEND_NAME} is no folder")
    to_do = names.read_json(prepared, _TO_DO_NAME, _MOST_TO_DO_BYTES)
    files, shard = to_do.get("files"), to_do.get("undone_shard")
    if set(to_do) != {"files", "undone_shard"} or not isinstance(files, list):
        raise _refuse_to_do(path, "it must say `files` and `undone_shard`")
    for name in files:
        if not names.is_known(name):
            names.locate(path, name)
            raise _refuse_to_do(path, f"{ascii(name)[:80]} is no file that an append changes")
    is_moved = [not (prepared / name).exists() for name in files]
    if is_moved != sorted(is_moved, reverse=True):
        raise _refuse_to_do(
            path, f"{files[is_moved.index(True, is_moved.index(False))]} is missing among what is prepared"
        )
    layout = _read_layout(path if not files or is_moved[-1] else prepared)
    arrays = layout.array_specs()
    if files != _name_changed_files(layout, manifest.MOMENTS_NAME in files):
        raise _refuse_to_do(path, "it names other files than an append of this store changes")
    if shard is not None and (type(shard) is not int or not 0 <= shard < layout.num_shards):
        raise _refuse_to_do(path, f"it names the shard {ascii(shard)[:80]}, of {layout.num_shards}")
    places = {name: path if moved else prepared for name, moved in zip(files, is_moved, strict=True)}
    for spec in arrays:
        require_metadata(places[f"{spec.name}/zarr.json"], spec)
    for name in {manifest.CAPTIONS_NAME, manifest.MOMENTS_NAME} & set(files):
        names.require_file(places[name], name)
    table = names.require_file(places[manifest.MANIFEST_NAME], manifest.MANIFEST_NAME)
    ids = manifest.read_table(table, ["video_id"])
    if len(ids) != layout.num_rows:
        raise _refuse_to_do(path, f"its manifest has {len(ids)} rows, its layout {layout.num_rows}")
    return files, shard


def _name_changed_files(layout: StoreLayout, has_moments: bool) -> list[str]:
    """What an append changes, in the order in which it is moved; the store's own attributes come last."""
    arrays = [f"{spec.name}/zarr.json" for spec in layout.array_specs()]
    tables = [manifest.CAPTIONS_NAME, *[manifest.MOMENTS_NAME] * has_moments, manifest.MANIFEST_NAME]
    return [*arrays, *tables, "zarr.json"]


def _read_layout(folder: Path) -> StoreLayout:
    group = names.read_json(folder, "zarr.json").get("attributes")
    attributes = group.get("s4v") if isinstance(group, dict) else None
    if not isinstance(attributes, dict):
        raise StoreDamagedError(f"{folder / 'zarr.json'} is not a store's: it has no `s4v` attribute")
    return parse_layout(folder, check_attributes(folder, attributes)["layout"])


def _refuse_to_do(path: Path, why: str) -> StoreDamagedError:
    return StoreDamagedError(
        f"{path / APPEND_NAME / _TO_DO_NAME} is not a list that s4v wrote: {why}. Nothing was changed. If the store is "
        f"your own, remove {path / APPEND_NAME} and run the append anew; else take the store from where it came from."
    )
