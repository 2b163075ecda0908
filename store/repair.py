"""Put damaged files of a store back as they were written, and mark damaged rows pending."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import StoreDamagedError, StoreMismatchError
from ..files import hash_file, kill_point, sync_folder
from . import manifest
from .checksums import CHECKSUMS_NAME, forget_parts, read_recorded_hashes, write_checksums
from .class_texts import remove_class_texts
from .lease import Lease
from .markers import JOINED_NAME, PARTS_NAME, make_marker, marker_path, read_marker
from .reader import StoreReader
from .scratch import make_scratch, remove_dead_scratch
from .skeleton import write_skeleton
from .spec import StoreSpec, list_differences
from .swap import shard_files
from .text_choice import CLASSES_NAME, LAYERS_NAME, TEXT_NAME
from .texts import remove_texts
from .verify import Damage

_log = logging.getLogger(__name__)

REPAIR_STEM = "repair"
"""Of the name under which a repair is prepared."""


def repair_store(
    store: StoreReader,
    damage: Sequence[Damage],
    *,
    lost_rows: Mapping[int, Collection[int]],
    spec: StoreSpec,
    lease: Lease,
) -> None:
    """Put damaged files of the whole store back as they were written, and mark damaged rows pending.

    Args:
        store: The store as it is under the lease; its own metadata (`zarr.json`) must be whole.
        damage: As `verify_store` found it.
        lost_rows: By damaged shard: rows of it whose tokens are damaged. The others are kept as they are.
        spec: As for `create_store`, all of it must be what the store was begun with: files that come out otherwise
            are not replaced.
        lease: Of the whole store, held since the damage was looked for.

    Raises:
        LeaseLostError: If another process took over meanwhile.
        StoreMismatchError: If the store was begun with other settings or has other rows; nothing was changed.
        StoreDamagedError: If a file cannot be had back; nothing was changed.
    """
    path = store.path
    if differences := list_differences(store.attributes, spec.full_attributes()):
        raise StoreMismatchError(
            f"{path} was begun otherwise than this command says: {'; '.join(differences)}. Nothing was changed. Repair "
            "it with the command that began it, without --append and without videos that are new."
        )
    # Texts are not put back: without them, the extraction writes them anew.
    bad_texts = {one.where for one in damage if one.where.startswith(f"{TEXT_NAME}/")}
    bad_classes = {where for where in bad_texts if where.startswith(f"{TEXT_NAME}/{CLASSES_NAME}")}
    whole_store = sorted({one.where for one in damage if one.shard is None and not one.where.startswith(TEXT_NAME)})
    hashes = read_recorded_hashes(path)
    remove_dead_scratch(path, REPAIR_STEM)
    # In the store, so that all of it is on one file system: a store may be a mount of its own.
    with make_scratch(path, REPAIR_STEM, "extract --repair", lease=lease.nonce) as scratch:
        fresh, version = scratch / path.name, store.facts.format_version
        write_skeleton(fresh, spec, version)
        if CHECKSUMS_NAME in whole_store:  # nothing tells whether these are as they were: they are put back too
            whole_store = sorted({*whole_store, *(n for n in read_recorded_hashes(fresh) if n != "zarr.json")})
        for name in whole_store:
            if not (fresh / name).is_file() or not _is_as_before(fresh / name, path / name, hashes.get(name)):
                raise StoreDamagedError(
                    f"{path / name} is damaged and this command does not give the same file. Nothing was changed. "
                    "Run the command that began the store, or extract it anew (--overwrite)."
                )
        for name in whole_store:
            lease.check()
            if (path / name).is_dir():
                shutil.rmtree(path / name)
            (fresh / name).replace(path / name)
            sync_folder((path / name).parent)
            kill_point("file repaired")
        for shard, rows in lost_rows.items():
            lease.check()
            _mark_damaged(store, shard, rows, scratch)
        lease.check()
        (path / PARTS_NAME / JOINED_NAME).unlink(missing_ok=True)
        sync_folder(path / PARTS_NAME)
        if bad_classes:
            is_known = f"{TEXT_NAME}/{CLASSES_NAME}/zarr.json" not in bad_classes
            _tell_lost("the template of its classes' texts (--class-template)", path, is_known)
            remove_class_texts(path, lease, is_template_known=is_known)
        if bad_texts - bad_classes:
            is_known = f"{TEXT_NAME}/zarr.json" not in bad_texts
            if (path / TEXT_NAME / LAYERS_NAME).is_dir():
                _tell_lost("which blocks of the text tower it keeps (--text-layers)", path, is_known)
            remove_texts(path, lease, is_choice_known=is_known)
        write_checksums(path)


def _tell_lost(what: str, path: Path, is_known: bool) -> None:
    if not is_known:
        _log.warning("%s: %s was damaged and is lost, unless this command says it again", path, what)


def _mark_damaged(store: StoreReader, shard: int, rows: Collection[int], scratch: Path) -> None:
    """Have a shard's marker say that some of its rows are to be done anew; a marker that is damaged goes."""
    path, codec_sha256 = store.path, store.facts.codecs_sha256
    for name in shard_files(store.layout.array_specs(), shard):
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
    first = store.layout.shard_rows(shard).start
    results = [
        replace(result, status="pending", reason="damaged") if first + place in rows else result
        for place, result in enumerate(marker.as_results())
    ]
    version = store.facts.format_version
    make_marker(scratch, shard, results, codec_sha256, marker.files or {}, version).replace(target)


def _is_as_before(fresh: Path, file: Path, recorded: str | None) -> bool:
    """Whether a file that was written anew is the one that was there; its recorded hash may be what is damaged."""
    if recorded is None or file.name == manifest.MANIFEST_NAME:  # which is joined from its parts again
        return True
    sha256 = hash_file(fresh)
    try:
        return sha256 == recorded or sha256 == hash_file(file)
    except OSError:
        return False
