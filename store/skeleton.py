"""A store before its first shard: metadata of all arrays, codecs, the tower's end, and a manifest of pending rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from . import manifest
from ._zarr import create_array, write_group, write_small_array
from .checksums import write_checksums
from .layout import CODEC_GROUPS
from .markers import PARTS_NAME
from .moments import moment_table
from .spec import StoreSpec


def write_skeleton(folder: Path, spec: StoreSpec, format_version: int | None = None) -> pa.Table:
    """Everything of a store but its shards.

    Args:
        folder: Where; it must not be there yet.
        spec: What to make it of, codecs and the tower's end included.
        format_version: To record: a store that is there keeps its own. None takes that of a new one.

    Returns:
        The manifest's input columns.
    """
    assert spec.head is not None and spec.layout.is_cls_coded == ("cls" in spec.codecs)
    folder.mkdir()
    for array in spec.layout.array_specs():
        create_array(folder, array)
    for coded, codec in spec.codecs.items():
        _write_named(folder, CODEC_GROUPS[coded], codec.parts)
    if spec.head:
        _write_named(folder, "head", spec.head)
    inputs = spec.input_table()
    (folder / PARTS_NAME).mkdir()
    manifest.write_table(folder / manifest.MANIFEST_NAME, manifest.pending_manifest(inputs))
    manifest.write_table(folder / manifest.CAPTIONS_NAME, manifest.caption_table(spec.records))
    if (moments := moment_table(spec.records)) is not None:
        manifest.write_table(folder / manifest.MOMENTS_NAME, moments)
    version = spec.format_version if format_version is None else format_version
    write_group(folder, {"s4v": {**spec.full_attributes(), "format_version": version}})
    write_checksums(folder)
    return inputs


def _write_named(root: Path, group: str, arrays: Mapping[str, np.ndarray]) -> None:
    write_group(root / group)
    for name, values in arrays.items():
        write_small_array(root, f"{group}/{name}", np.asarray(values, dtype=np.float32))
