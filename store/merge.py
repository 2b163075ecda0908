"""Join stores that machines which share nothing made from one skeleton, each of them other shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..errors import ConfigError, StoreDamagedError, StoreExistsError, StoreMismatchError
from . import manifest
from ._files import describe_bytes, hash_file, kill_point, write_atomic
from .checksums import read_recorded_hashes, write_checksums
from .fidelity import FIDELITY_NAME
from .layout import STATS_NAME, StoreLayout
from .markers import PARTS_NAME, marker_path
from .reader import StoreReader, open_store
from .scratch import is_scratch_name, make_scratch, remove_dead_scratch
from .writer import StoreWriter, list_differences, move_into_place, naming_what_is_refused


def merge_stores(
    sources: Sequence[Path], out: Path, report: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, int]:
    """Copy the finished shards of some stores into one; run again, it goes on where it was.

    Args:
        sources: Stores of one manifest, codec and backbone.
        out: A new store, or one that an earlier merge left unfinished.
        report: Told about progress.

    Returns:
        Videos by status: ok, failed, pending.

    Raises:
        StoreMismatchError: If they are not parts of one extraction; all differences listed.
        StoreExistsError: If something else stands at `out`.
        StoreDamagedError: If the first source's metadata are not as they were written.
        ConfigError: If the disk cannot hold what is to be copied.
        EnvironmentFailedError: If the file system refuses; shards that are there stay.
    """
    stores = [open_store(path) for path in sources]
    first = stores[0]
    is_there = (out / "zarr.json").is_file()
    for other in [*stores[1:], *([open_store(out)] if is_there else [])]:
        _require_same(first, other)
    if not is_there:
        with naming_what_is_refused(out):
            _copy_skeleton(first.path, out)
    with StoreWriter(out, first.layout, first.codec, first.input_columns()) as writer:
        pending = writer.pending_shards()
        found = {shard: source for shard in pending if (source := _find_source(stores, shard)) is not None}
        sizes = {shard: _count_bytes(source, first.layout, shard) for shard, source in found.items()}
        _require_space(out, sum(sizes.values()))
        for done, shard in enumerate(pending, start=1):
            if shard in found:
                with naming_what_is_refused(out / f"shard {shard}", needed=sizes[shard]):
                    _copy_shard(found[shard], out, first.layout, shard)
            report("merging", done, len(pending))
        statuses = writer.consolidate()["status"].to_pylist()
    return {status: statuses.count(status) for status in ("ok", "failed", "pending")}


def _require_same(first: StoreReader, other: StoreReader) -> None:
    differences = list_differences(first.attributes, other.attributes)
    if first.attributes["codec"] != other.attributes["codec"]:
        differences.append("the codecs differ: fit one and share it with --prepare or --codec-from")
    if not first.input_columns().equals(other.input_columns()):
        differences.append("the videos differ")
    if differences:
        raise StoreMismatchError(f"{first.path} and {other.path} are not parts of one store: {'; '.join(differences)}")


def _find_source(stores: Sequence[StoreReader], shard: int) -> Path | None:
    return next((store.path for store in stores if marker_path(store.path, shard).exists()), None)


def _shard_files(source: Path, layout: StoreLayout, shard: int) -> list[Path]:
    """The files of a finished shard, its done-marker last; arrays in which no row of it is good have none."""
    files = [source / spec.name / key for spec in layout.array_specs() for key in spec.shard_keys(shard)]
    return [*(file for file in files if file.exists()), marker_path(source, shard)]


def _count_bytes(source: Path, layout: StoreLayout, shard: int) -> int:
    return sum(file.stat().st_size for file in _shard_files(source, layout, shard))


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
    arrays = {spec.name for spec in open_store(source).layout.array_specs()}

    def skip(folder: str, names: list[str]) -> set[str]:
        place = Path(folder).relative_to(source).as_posix()
        if place == PARTS_NAME:
            return set(names)
        unfinished = {name for name in names if is_scratch_name(name)}
        return unfinished | ({name for name in names if name.startswith("c.")} if place in arrays else set())

    shutil.copytree(source, fresh, ignore=skip)
    for name in (FIDELITY_NAME, STATS_NAME):  # of that machine, not of the whole
        (fresh / name).unlink(missing_ok=True)
    manifest.write_table(fresh / manifest.MANIFEST_NAME, manifest.pending_manifest(open_store(source).input_columns()))
    for name, recorded in read_recorded_hashes(source).items():
        file = fresh / name
        if name != manifest.MANIFEST_NAME and file.is_file() and hash_file(file) != recorded:
            raise StoreDamagedError(
                f"{source / name} does not match its recorded hash. Mend it first: the command that began the store, "
                "with --repair."
            )
    write_checksums(fresh)


def _copy_shard(source: Path, out: Path, layout: StoreLayout, shard: int) -> None:
    """Data first, then the marker: killed in between, the shard is pending."""
    for file in _shard_files(source, layout, shard):
        write_atomic(out / file.relative_to(source), partial(shutil.copyfile, file))
    kill_point("shard merged")
