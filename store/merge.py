"""Join stores that machines which share nothing made from one skeleton, each of them other shards."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ConfigError, StoreDamagedError, StoreExistsError, StoreMismatchError
from ..files import describe_bytes, hash_file, kill_point, write_atomic
from . import manifest, names
from ._zarr import describe_small_array, name_only_chunk
from .checksums import read_recorded_hashes, write_checksums
from .class_texts import list_class_files
from .layout import CODEC_GROUPS, StoreLayout
from .markers import PARTS_NAME, marker_path
from .moments import list_moment_files
from .reader import StoreReader, open_store
from .records import VideoResult
from .scratch import make_scratch, remove_dead_scratch
from .spec import list_differences
from .texts import list_text_files
from .verify import Damage, check_shard, compare_hash
from .writer import RowTokens, StoreWriter, move_into_place, naming_what_is_refused

_log = logging.getLogger(__name__)


def merge_stores(
    sources: Sequence[Path], out: Path, report: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, int]:
    """Copy the finished shards of some stores into one; run again, it goes on where it was.

    Every shard is verified before it is taken. Of several copies the one with the most good rows is taken, whatever
    the order of the sources; where they complement each other, each row comes from one that has it.

    Args:
        sources: Stores of one manifest, codec and backbone.
        out: A new store, or one that an earlier merge left unfinished.
        report: Told about progress.

    Returns:
        Videos by status: ok, failed, pending.

    Raises:
        StoreMismatchError: If they are not parts of one extraction; all differences listed.
        StoreExistsError: If something else stands at `out`.
        StoreDamagedError: If the first source's metadata are not as they were written, or a link or a pipe lies in one
            of them; nothing was written. Also, when all else is merged, if shards are damaged wherever they are.
        ConfigError: If the disk cannot hold what is to be copied.
        EnvironmentFailedError: If the file system refuses; shards that are there stay.
    """
    stores = [open_store(path) for path in sources]
    first = max(stores, key=lambda store: store.layout.num_frames)  # of the same number the first
    is_there = (out / "zarr.json").is_file()
    for other in stores:
        _require_same(first, other)
    if is_there:
        _require_same(first, open_store(out))
    for store in [*stores, *([open_store(out)] if is_there else [])]:
        store.require_arrays()
    if not is_there:
        with naming_what_is_refused(out):
            _copy_skeleton(first.path, out)
    target = open_store(out)
    _require_room(first, target)
    video_ids = first.read_manifest(["video_id"])["video_id"]
    bad: list[str] = []
    with StoreWriter(target, first.input_columns()) as writer:
        pending = {*range(first.layout.num_shards)} - {*target.finished_shards()}
        known = {store.path: set(store.finished_shards()) for store in stores}
        shards = sorted({*pending, *set().union(*known.values())})
        sizes = {shard: _largest_shard_bytes(stores, known, shard) for shard in sorted(pending & set(shards))}
        _require_space(out, sum(sizes.values()))
        for done, shard in enumerate(shards, start=1):
            rows = first.layout.shard_rows(shard)
            expected = video_ids.slice(rows.start, len(rows)).to_pylist()
            places = [store for store in stores if shard in known[store.path]]
            with naming_what_is_refused(out / f"shard {shard}", needed=sizes.get(shard)):
                bad += _merge_shard(writer, target, places, shard, expected, is_done=shard not in pending)
            report("merging", done, len(shards))
        table = writer.consolidate()
    _tell_changed_sources(stores, table)
    statuses = table["status"].to_pylist()
    counts = {status: statuses.count(status) for status in ("ok", "failed", "pending")}
    if bad:
        raise StoreDamagedError(
            f"{out} holds what is whole: {counts['ok']} videos ok, {counts['failed']} failed, {counts['pending']} "
            f"pending. No whole copy of {len(bad)} shards: {'; '.join(bad[:3])}{'; ...' if bad[3:] else ''}. Run the "
            "command that began the store on it, with --repair: it does them anew."
        )
    return counts


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A shard as one of the stores has it, verified."""

    store: StoreReader
    part: pa.Table
    marker_sha256: str

    @property
    def statuses(self) -> list[str]:
        return self.part["status"].to_pylist()

    @property
    def worth(self) -> tuple[int, int, str]:
        """Orders candidates, whatever the order of the stores: by good rows, then by final ones."""
        statuses = self.statuses
        return statuses.count("ok"), -statuses.count("pending"), self.marker_sha256


_WORTH = {"pending": 0, "failed": 1, "ok": 2}


def _merge_shard(
    writer: StoreWriter,
    target: StoreReader,
    stores: Sequence[StoreReader],
    shard: int,
    video_ids: list[str],
    *,
    is_done: bool,
) -> list[str]:
    """Bring one shard as far as the stores' copies of it allow.

    Returns:
        What is to be told, if every copy is damaged.
    """
    if is_done and _has_all_rows(target, shard):
        return []
    candidates, problems = [], []
    for store in [*([target] if is_done else []), *stores]:
        part, damage = check_shard(store, shard, video_ids)
        marker = marker_path(store.path, shard)
        damage += _check_marker(store, marker, shard)
        if damage:
            problems.append(f"shard {shard} of {store.path} ({damage[0].where}: {damage[0].what})")
            _log.warning("%s is damaged: not taken", problems[-1])
        elif part is not None:
            candidates.append(_Candidate(store, part, hash_file(marker)))
    if not candidates:
        return problems[:1]
    best = max(candidates, key=lambda one: one.worth)
    taken = [
        max(candidates, key=lambda one: (_WORTH[one.statuses[row]], one is best, one.worth))
        for row in range(len(video_ids))
    ]
    if any(one is not best for one in taken) or (is_done and best.store is not target):
        _write_rows(writer, shard, taken, next((one for one in candidates if one.store is target), None))
    elif best.store is not target:
        _copy_shard(best.store.path, writer, shard)
    return []


def _has_all_rows(store: StoreReader, shard: int) -> bool:
    """Whether no other copy of a finished shard could be better than a store's own."""
    try:
        marker = store.read_marker(shard)
    except StoreDamagedError:
        return False
    return marker is not None and set(marker.statuses) == {"ok"}


def _check_marker(store: StoreReader, marker: Path, shard: int) -> list[Damage]:
    """A done-marker against its recorded hash, if there is one."""
    where = f"{PARTS_NAME}/{marker.name}"
    recorded = read_recorded_hashes(store.path).get(where)
    what = None if recorded is None else compare_hash(store.path, where, recorded)
    return [] if what is None else [Damage(where=where, what=what, shard=shard)]


def _write_rows(writer: StoreWriter, shard: int, taken: Sequence[_Candidate], before: _Candidate | None) -> None:
    """Write a shard whose rows come from several copies of it, codes as they are stored; `before` is what is there."""
    first = writer.layout.shard_rows(shard).start
    tokens, results = {}, []
    replaced = {
        first + place
        for place, one in enumerate(taken)
        if before is not None and one is not before and before.statuses[place] == "ok"
    }
    for place, one in enumerate(taken):
        result = manifest.read_results(one.part.slice(place, 1))[0]
        results.append(result)
        if result.status == "ok":
            tokens[first + place] = _read_row(one.store, first + place, result)
    writer.write_shard(shard, tokens, results, replaced=replaced)


def _read_row(store: StoreReader, row: int, result: VideoResult) -> RowTokens:
    return RowTokens(**store.read_row(row, result.num_views or 0, result.num_cached_frames or 0))


def _tell_changed_sources(stores: Sequence[StoreReader], merged: pa.Table) -> None:
    """Warn of files that were not the same one when parts of them were decoded, here and there."""
    tables = [merged.select(["path", "source_hash"])]
    for store in stores:
        for shard in store.finished_shards():
            with suppress(StoreDamagedError):  # told already
                marker = store.read_marker(shard)
                rows = store.layout.shard_rows(shard)
                if marker is not None:
                    columns = [merged["path"].slice(rows.start, len(marker.results)), marker.results["source_hash"]]
                    tables.append(pa.table(columns, names=tables[0].column_names))
    known = pa.concat_tables(tables)
    known = known.filter(known["source_hash"].is_valid())
    counts = known.group_by("path").aggregate([("source_hash", "count_distinct")])
    changed = sorted(counts.filter(pc.greater(counts["source_hash_count_distinct"], 1))["path"].to_pylist())
    if changed:
        _log.warning(
            "%d files were others on one machine than on another, so their rows are not of one video: %s%s. Put the "
            "right ones everywhere, and do those rows anew",
            *(len(changed), ", ".join(changed[:3]), f" and {len(changed) - 3} more" if changed[3:] else ""),
        )


def _require_room(source: StoreReader, target: StoreReader) -> None:
    """Refuse a target that was begun for shorter rows than a part holds by now."""
    longest, room = source.layout.num_frames, target.layout.num_frames
    if longest > room:
        raise StoreMismatchError(
            f"{target.path} was begun for rows of at most {room} frames, and {source.path} has room for {longest}. "
            "Nothing was merged: name another --out, which takes all parts."
        )


def _require_same(first: StoreReader, other: StoreReader) -> None:
    differences = list_differences(first.attributes, other.attributes)
    if first.layout.frames_per_block and other.layout.num_frames < first.layout.num_frames:
        # A part may hold a longer row than was known when all began; files hold blocks of frames, and do not mind.
        differences = [one for one in differences if not one.startswith("layout.num_frames ")]
    versions = [store.facts.format_version for store in (first, other)]
    if versions[0] != versions[1]:
        differences.append(f"format {versions[0]} there, {versions[1]} here: finish each with the s4v that began it")
    if first.facts.codecs != other.facts.codecs:
        differences.append("the codecs differ: fit one and share it with --prepare or --codec-from")
    if not first.input_columns().equals(other.input_columns()):
        differences.append("the videos differ")
    if differences:
        raise StoreMismatchError(f"{first.path} and {other.path} are not parts of one store: {'; '.join(differences)}")


def _shard_files(source: Path, layout: StoreLayout, shard: int) -> list[str]:
    """The files of a finished shard, its done-marker last; arrays in which no row of it is good have none."""
    files = [f"{spec.name}/{key}" for spec in layout.array_specs() for key in spec.shard_keys(shard)]
    marker = f"{PARTS_NAME}/{marker_path(source, shard).name}"
    return [*(name for name in files if os.path.lexists(source / name)), marker]


def _largest_shard_bytes(stores: Sequence[StoreReader], known: Mapping[Path, set[int]], shard: int) -> int:
    """Bytes of the largest copy of a shard; 0 where there is none."""
    return max(
        (
            sum((store.path / name).lstat().st_size for name in _shard_files(store.path, store.layout, shard))
            for store in stores
            if shard in known[store.path]
        ),
        default=0,
    )


def _require_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ConfigError(
            f"{out} needs {describe_bytes(needed)} more and its disk has {describe_bytes(free)} free. What is there is "
            "kept: make room and run the same command, or begin with another --out."
        )


def _copy_skeleton(source: Path, out: Path) -> None:
    """All of a store but its shards and their markers, renamed into place whole."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreExistsError(f"{out} exists and is not a store. Nothing was written; choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_scratch(out.parent, out.name)
    with make_scratch(out.parent, out.name, "merge") as scratch:
        _fill_skeleton(source, scratch / out.name)
        move_into_place(scratch / out.name, out)


def _fill_skeleton(source: Path, fresh: Path) -> None:
    store = open_store(source)
    recorded = read_recorded_hashes(source)
    for name in _skeleton_files(store):
        file = names.require_file(source, name)
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        _copy_file(file, fresh / name)
        if name in recorded and compare_hash(fresh, name, recorded[name]) is not None:
            raise StoreDamagedError(
                f"{source / name} does not match its recorded hash. Mend it first: the command that began the store, "
                "with --repair."
            )
    (fresh / PARTS_NAME).mkdir()
    manifest.write_table(fresh / manifest.MANIFEST_NAME, manifest.pending_manifest(store.input_columns()))
    write_checksums(fresh)


def _skeleton_files(store: StoreReader) -> list[str]:
    """The names, relative to a store, of all that it has beside its rows: known ones, and no others."""
    arrays = [f"{spec.name}/zarr.json" for spec in store.layout.array_specs()]
    small = [
        # Read: their checksums are right.
        *((name, store.codec_arrays[name].__eq__) for name in sorted(store.read_codec_arrays())),
        *((f"head/{name}", store.is_head_shape) for name in sorted(store.head if store.has_head else ())),
    ]
    groups = [f"{CODEC_GROUPS[array]}/zarr.json" for array in store.facts.codecs]
    groups += ["head/zarr.json"] if store.has_head else []
    files = ["zarr.json", manifest.CAPTIONS_NAME, *arrays, *groups]
    for name, is_possible in small:
        files += [f"{name}/zarr.json", name_only_chunk(describe_small_array(store.path, name, is_possible))]
    # The group of texts is one, whichever of them it holds.
    texts = [*list_text_files(store), *list_class_files(store)]
    return list(dict.fromkeys([*files, *list_moment_files(store), *texts]))


def _copy_file(source: Path, target: Path) -> None:
    """Copy a plain file; nothing else is opened."""
    os.close(names.open_file(source))
    shutil.copyfile(source, target, follow_symlinks=False)


def _copy_shard(source: Path, writer: StoreWriter, shard: int) -> None:
    """Data first, then the marker: killed in between, the shard is pending."""
    for name in _shard_files(source, writer.layout, shard):
        writer.check_lease()
        write_atomic(writer.path / name, partial(_copy_file, names.require_file(source, name)))
    kill_point("shard merged")
