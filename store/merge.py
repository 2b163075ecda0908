"""Join stores that machines which share nothing made from one skeleton, each of them other shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import StoreExistsError, StoreMismatchError
from . import manifest
from ._files import sync_folder, write_atomic
from .checksums import CHECKSUMS_NAME
from .fidelity import FIDELITY_NAME
from .layout import STATS_NAME
from .reader import StoreReader, open_store
from .writer import StoreWriter, list_differences


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
    """
    stores = [open_store(path) for path in sources]
    first = stores[0]
    is_there = (out / "zarr.json").is_file()
    for other in [*stores[1:], *([open_store(out)] if is_there else [])]:
        _require_same(first, other)
    if not is_there:
        _copy_skeleton(first.path, out)
    with StoreWriter(out, first.layout, first.codec, first.input_columns()) as writer:
        pending = writer.pending_shards()
        for done, shard in enumerate(pending, start=1):
            source = next((s.path for s in stores if manifest.part_path(s.path, shard).exists()), None)
            if source is not None:
                _copy_shard(source, out, shard, [spec.name for spec in first.layout.array_specs()])
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


def _copy_skeleton(source: Path, out: Path) -> None:
    """All of a store but its shards and their markers, renamed into place whole."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreExistsError(f"{out} exists and is not a store. Nothing was written; choose another --out.")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays = {spec.name for spec in open_store(source).layout.array_specs()}

    def skip(folder: str, names: list[str]) -> set[str]:
        place = Path(folder).relative_to(source).as_posix()
        if place == manifest.PARTS_NAME:
            return set(names)
        return {name for name in names if name.startswith("c.")} if place in arrays else set()

    shutil.copytree(source, partial, ignore=skip)
    for name in (FIDELITY_NAME, STATS_NAME):  # of that machine, not of the whole
        (partial / name).unlink(missing_ok=True)
    manifest.write_table(
        partial / manifest.MANIFEST_NAME, manifest.pending_manifest(open_store(source).input_columns())
    )
    (partial / CHECKSUMS_NAME).unlink()  # written anew at the end
    partial.rename(out)
    sync_folder(out.parent)


def _copy_shard(source: Path, out: Path, shard: int, arrays: Sequence[str]) -> None:
    """Data first, then the marker: killed in between, the shard is pending."""

    def copy(file: Path, target: Path) -> None:
        def write(temporary: Path) -> None:
            shutil.copyfile(file, temporary)

        write_atomic(target, write)

    for name in arrays:
        for file in sorted((source / name).glob(f"c.{shard}.*")):
            copy(file, out / name / file.name)
    marker = manifest.part_path(source, shard)
    copy(marker, manifest.part_path(out, shard))
