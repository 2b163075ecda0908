"""Class names as the frozen text tower has them: `text/classes`, (classes, E) float32, not normalised.

Row c belongs to label c. The array's attributes record the sentence that names stand in, and the hash of all texts:
with other class names they are void, and an extraction writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreDamagedError, StoreMismatchError
from ..files import hash_text, kill_point, read_json, sync_folder, write_json
from . import names
from ._zarr import describe_small_array, name_only_chunk, read_small_array, write_group, write_small_array
from .checksums import write_checksums
from .lease import Lease, Scope, hold_lease
from .reader import StoreReader
from .scratch import make_scratch, remove_dead_scratch
from .text_choice import CLASSES_NAME, TEXT_NAME

_ARRAY = f"{TEXT_NAME}/{CLASSES_NAME}"
_METADATA = f"{_ARRAY}/zarr.json"
_CHUNK = "c.0.0"
_STEM = "classes"
_PLACE = "{}"


@dataclass(frozen=True, slots=True)
class ClassTexts:
    """The classes of a store as texts."""

    template: str
    """In which {} stands for a name."""
    texts: tuple[str, ...]
    """By label: what was embedded."""
    embedding: np.ndarray
    """(classes, E) float32, not normalised."""


def fill_template(template: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """Class names as texts: without the quotation marks that lists of classes put around names of several words."""
    return tuple(template.replace(_PLACE, name.replace('"', "").strip()) for name in class_names)


def read_class_template(root: Path) -> str | None:
    """In which sentence a store's class names were asked for, whether they are current or not; None where never.

    Raises:
        StoreDamagedError: If what is recorded is not readable.
    """
    if not os.path.lexists(root / _METADATA):
        return None
    template = _read_attributes(root).get("template")
    if not isinstance(template, str) or _PLACE not in template:
        raise StoreDamagedError(f"{root / _METADATA} records no template. {_MEND}")
    return template


def has_current_class_texts(store: StoreReader) -> bool:
    """Whether a store holds the texts of the classes that it has now."""
    try:
        template = read_class_template(store.path)
        if template is None:
            return False
        expected = _hash_texts(fill_template(template, store.classes.names))
        return _read_attributes(store.path).get("texts_sha256") == expected
    except StoreDamagedError:
        return False


def read_class_texts(store: StoreReader) -> ClassTexts:
    """The classes of a store as texts, for a network that compares videos with them.

    Raises:
        StoreMismatchError: If the store has none, or those of other classes.
        StoreDamagedError: If they are not as they were written.
    """
    if not has_current_class_texts(store):
        raise StoreMismatchError(
            f"{store.path} holds no texts of its classes: run the command that began this store once more with "
            '--class-template "{}" (names alone; or a sentence around {}), which adds them'
        )
    template = read_class_template(store.path)
    assert template is not None
    values = read_small_array(store.path, _ARRAY, _shape_of(store).__eq__)
    return ClassTexts(template, fill_template(template, store.classes.names), values)


def describe_class_texts(store: StoreReader) -> dict[str, Any] | None:
    """Shape, dtype and template; None where there are none of the classes that the store has now."""
    if not has_current_class_texts(store):
        return None
    shape = list(_shape_of(store))
    return {"shape": shape, "dtype": "float32", "template": read_class_template(store.path)}


def list_class_files(store: StoreReader) -> list[str]:
    """The names, relative to a store, of the files of its classes' texts; none where it has none of today's classes.

    Raises:
        StoreDamagedError: If they are not as they were written.
    """
    if not has_current_class_texts(store):
        return []
    spec = describe_small_array(store.path, _ARRAY, _shape_of(store).__eq__)
    read_small_array(store.path, _ARRAY, _shape_of(store).__eq__)
    return [f"{TEXT_NAME}/zarr.json", _METADATA, name_only_chunk(spec)]


def write_class_texts(store: StoreReader, template: str, encode: Callable[[Sequence[str]], np.ndarray]) -> None:
    """Write the texts of a store's classes; those that are there go.

    They are void from the first change to the last. What was asked for stays recorded all the while.

    Args:
        store: With at least one class.
        template: In which {} stands for a name.
        encode: Texts to (n, E) float32, not normalised.

    Another process that writes texts is waited for; shards may be written meanwhile.

    Raises:
        EnvironmentFailedError: If the file system refuses.
        StoreBusyError: If another process writes to the whole store.
        LeaseLostError: If another process took over, because this one was stopped or cut off for too long.
    """
    texts, root = fill_template(template, store.classes.names), store.path
    advice = "run the command again in a moment"
    with hold_lease(root, Scope.manifest(), purpose="extract", wait=True, advice=advice) as lease:
        if has_current_class_texts(store) and read_class_template(root) == template:
            return  # of whom we waited for
        names.refuse_links(root)
        remove_dead_scratch(root, _STEM)
        with make_scratch(root, _STEM, "extract", lease=lease.nonce) as scratch:
            fresh = scratch / TEXT_NAME
            write_group(fresh)
            write_small_array(fresh, CLASSES_NAME, encode(texts))
            attributes = {"template": template, "texts_sha256": _hash_texts(texts)}
            file = fresh / CLASSES_NAME / "zarr.json"
            write_json(file, {**read_json(file), "attributes": attributes})
            sync_folder(fresh / CLASSES_NAME)
            kill_point("texts of classes written")
            _put_into_place(root, fresh, template, lease)
        write_checksums(root)


def _put_into_place(root: Path, fresh: Path, template: str, lease: Lease) -> None:
    lease.check()
    if not (root / TEXT_NAME).is_dir():
        fresh.rename(root / TEXT_NAME)
        sync_folder(root)
    elif not (root / _ARRAY).is_dir():
        (fresh / CLASSES_NAME).rename(root / _ARRAY)
        sync_folder(root / TEXT_NAME)
    else:
        # File by file, the chunk between two states of the metadata: no reader takes it for the other template's.
        _declare_void(root, template)
        for name in (_CHUNK, "zarr.json"):
            (fresh / CLASSES_NAME / name).replace(root / _ARRAY / name)
            sync_folder(root / _ARRAY)
            kill_point("texts of classes moved")


def remove_class_texts(root: Path, lease: Lease, *, is_template_known: bool = True) -> None:
    """Take the texts of classes out of a store; what was asked for stays recorded.

    Args:
        root: The store.
        lease: Of all that the texts of classes are.
        is_template_known: Whether what the array records is as it was written; else it goes too.

    Raises:
        LeaseLostError: If another process took over.
    """
    if not (root / _ARRAY).is_dir():
        return
    template = read_class_template(root) if is_template_known else None
    with make_scratch(root, _STEM, "extract", lease=lease.nonce) as scratch:
        lease.check()
        if template is None:
            (root / _ARRAY).rename(scratch / CLASSES_NAME)
        else:
            _declare_void(root, template)
        write_checksums(root)


def _declare_void(root: Path, template: str) -> None:
    """Have the metadata say what was asked for, and that nothing is there."""
    file = root / _METADATA
    write_json(file, {**names.read_json(root, _METADATA), "attributes": {"template": template}})
    sync_folder(file.parent)
    write_checksums(root)
    kill_point("texts of classes void")


def _read_attributes(root: Path) -> dict[str, Any]:
    attributes = names.read_json(root, _METADATA).get("attributes")
    return attributes if isinstance(attributes, dict) else {}


def _shape_of(store: StoreReader) -> tuple[int, int]:
    return len(store.classes.names), store.layout.embed_dim


def _hash_texts(texts: Sequence[str]) -> str:
    return hash_text("\n".join(texts))


_MEND = "The command that began the store mends it, with --repair."
