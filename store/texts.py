"""Captions as the frozen text tower has them: written once beside the frames, read by training and evaluation.

    text/tokens      (C, M, E) float16   the final norm's output of each word times the projection
    text/mask        (C, M) bool         which of them are words, the start and end tokens among them
    text/embedding   (C, E) float32      of the whole text, not normalised
    text/layers      (C, Lt, M, Dt) float16      where asked for: each word after the tower's last Lt blocks

Row c belongs to row c of captions.parquet. The group records the hash of that file: with other captions the texts are
void, and an extraction writes them anew. What was asked for of them (`TextChoice`) stays recorded.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts

from ..errors import EnvironmentFailedError, StoreDamagedError, StoreMismatchError
from ..files import hash_file, kill_point, read_json, sync_folder
from . import names
from ._shard_file import DamagedChunkError, verify_shard
from ._zarr import create_array, open_array, refused_write, require_metadata, write_group
from .checksums import read_recorded_hashes, write_checksums
from .layout import ArraySpec
from .lease import Lease, Scope, hold_lease
from .manifest import CAPTIONS_NAME
from .reader import StoreReader
from .scratch import Scratch, make_scratch, remove_dead_scratch, take_over_scratch
from .text_choice import CLASSES_NAME, LAYERS_NAME, MOST_WORDS, TEXT_ARRAYS, TEXT_NAME, TextChoice, read_text_choice

TEXTS_PER_SHARD = 1024

REMOVED_STEM = "removed"
"""Of scratch folders with texts that are on their way out."""
_OLD_NAMES = (f"{TEXT_NAME}.partial", f"{TEXT_NAME}.partial.old")
"""Of what the version before was filling, and removing."""
_MOST_CHUNK_BYTES = 2**30

MAX_WORDS = 32
"""M, start and end among them, where the text tower takes as many: what the reference trains and tests with."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Some captions; an array that was not asked for is None."""

    tokens: np.ndarray | None
    """(n, M, E) float16, not normalised."""
    mask: np.ndarray | None
    """(n, M) bool."""
    embedding: np.ndarray | None
    """(n, E) float32, not normalised."""
    layers: np.ndarray | None = None
    """(n, Lt, M, Dt) float16, raw outputs of the text tower's last blocks, zero where there is no word."""

    @property
    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """All of them, in the order in which they are given."""
        return self.tokens, self.mask, self.embedding, self.layers

    def cut_to_longest(self) -> Texts:
        """The same without words that none of the texts has; they must have been read with their mask."""
        assert self.mask is not None
        longest = int(self.mask.sum(axis=1).max(initial=1))
        return Texts(
            None if self.tokens is None else self.tokens[:, :longest],
            self.mask[:, :longest],
            self.embedding,
            None if self.layers is None else self.layers[:, :, :longest],
        )


def has_current_texts(root: Path) -> bool:
    """Whether a store holds the texts of the captions that it has now."""
    metadata = root / TEXT_NAME / "zarr.json"
    if not metadata.is_file():
        return False
    try:
        recorded = names.read_json(root, f"{TEXT_NAME}/zarr.json")["attributes"]["captions_sha256"]
        return recorded == hash_file(names.require_file(root, CAPTIONS_NAME))
    except (StoreDamagedError, LookupError, TypeError):
        return False


def has_void_texts(root: Path) -> bool:
    """Whether a store holds texts of captions that it no longer has, or is about to get their first: nobody's damage.

    Of captions that are damaged themselves nobody can tell.
    """
    try:
        attributes = names.read_json(root, f"{TEXT_NAME}/zarr.json")["attributes"]
        captions_sha256 = hash_file(names.require_file(root, CAPTIONS_NAME))
    except (StoreDamagedError, LookupError, TypeError):
        return False
    is_whole = read_recorded_hashes(root).get(CAPTIONS_NAME) in (None, captions_sha256)
    return is_whole and isinstance(attributes, dict) and attributes.get("captions_sha256") != captions_sha256


def describe_text_array(store: StoreReader, name: str) -> ArraySpec:
    """An array of a store's texts, its name relative to their folder, compared with what the captions say of it.

    Raises:
        StoreDamagedError: If it is not of as many texts as there are captions, or is no such array at all.
    """
    metadata = names.read_json(store.path, f"{TEXT_NAME}/{name}/zarr.json")
    choice = read_text_choice(store.path) if name == LAYERS_NAME else TextChoice()
    try:
        num_words = 1 if name == "embedding" else metadata["shape"][2 if name == LAYERS_NAME else 1]
        rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    except (LookupError, TypeError):
        num_words = rows = None
    if not (type(num_words) is type(rows) is int and 0 < num_words <= MOST_WORDS and 0 < rows <= 2**16):
        raise StoreDamagedError(
            f"{store.path / TEXT_NAME / name} has {ascii(num_words)[:40]} words a caption and {ascii(rows)[:40]} "
            f"captions a shard, which cannot be. {_MEND}"
        )
    if len(choice.layers) * num_words * (choice.width or 0) * 2 > _MOST_CHUNK_BYTES:
        raise StoreDamagedError(f"{store.path / TEXT_NAME / name} has chunks of more than a GiB. {_MEND}")
    captions = names.require_file(store.path, CAPTIONS_NAME)
    try:
        num_captions = pq.read_metadata(captions).num_rows
    except (OSError, pa.ArrowException) as error:
        raise StoreDamagedError(f"{captions} is damaged: {error}. {_MEND}") from error
    specs = {spec.name: spec for spec in _specs(num_captions, num_words, store.layout.embed_dim, choice, rows)}
    if name not in specs:
        raise StoreDamagedError(f"{store.path / TEXT_NAME} does not record the blocks of {name}. {_MEND}")
    require_metadata(store.path, replace(specs[name], name=f"{TEXT_NAME}/{name}"))
    return specs[name]


def list_text_files(store: StoreReader) -> list[str]:
    """The names, relative to a store, of all files of its texts; none where it has no texts of the captions it has now.

    Raises:
        StoreDamagedError: If they are not as they were written.
    """
    if not has_current_texts(store.path):
        return []
    files = [f"{TEXT_NAME}/zarr.json"]
    for name in read_text_choice(store.path).arrays:
        spec = describe_text_array(store, name)
        files.append(f"{TEXT_NAME}/{name}/zarr.json")
        for shard in range(-(-spec.shape[0] // spec.shard_shape[0])):
            file = f"{TEXT_NAME}/{name}/{name_text_shard(spec, shard)}"
            rows = spec.shard_shape[0]
            if not _is_whole(store.path / file, min(rows, spec.shape[0] - shard * rows), rows):
                raise StoreDamagedError(f"{store.path / file} is damaged. {_MEND}")
            files.append(file)
    return files


def write_texts(
    store: StoreReader,
    encode: Callable[[list[str]], Texts],
    *,
    num_words: int,
    choice: TextChoice | None = None,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Write the texts of all captions beside their place, and rename them; those that are there go.

    Whole shards that a killed one has left there are kept: what is encoded together depends on their place alone.

    Args:
        store: With at least one caption.
        encode: Texts, `TEXTS_PER_SHARD` at most, to all arrays of the choice.
        num_words: M.
        choice: What is kept; None is what every store keeps.
        report: Told about progress.

    Another process that writes them is waited for; shards may be written meanwhile.

    Raises:
        EnvironmentFailedError: If the file system refuses; what was written of the texts is removed.
        StoreBusyError: If another process writes to the whole store.
        LeaseLostError: If another process took over, because this one was stopped or cut off for too long.
    """
    advice = "run the command again in a moment"
    with hold_lease(store.path, Scope.manifest(), purpose="extract", wait=True, advice=advice) as lease:
        choice = choice or TextChoice()
        if has_current_texts(store.path) and read_text_choice(store.path) == choice:
            return  # of whom we waited for
        remove_dead_scratch(store.path, REMOVED_STEM)
        scratch = _open_scratch(store.path, lease)
        try:
            _write_texts(store, encode, num_words, choice, report, scratch.path / TEXT_NAME, lease)
        except EnvironmentFailedError:
            scratch.remove()
            raise
        except BaseException:
            scratch.leave()
            raise
        scratch.remove()


def _open_scratch(root: Path, lease: Lease) -> Scratch:
    """What a killed process has left of the texts, or a new folder."""
    scratch = take_over_scratch(root, TEXT_NAME, "extract", lease=lease.nonce)
    remove_dead_scratch(root, TEXT_NAME)
    if scratch is None:
        scratch = make_scratch(root, TEXT_NAME, "extract", lease=lease.nonce)
        kept = root / _OLD_NAMES[0]
        if kept.is_dir() and not kept.is_symlink():
            kept.rename(scratch.path / TEXT_NAME)
    for name in _OLD_NAMES:
        if not (root / name).is_symlink():
            shutil.rmtree(root / name, ignore_errors=True)
    return scratch


def _write_texts(
    store: StoreReader,
    encode: Callable[[list[str]], Texts],
    num_words: int,
    choice: TextChoice,
    report: Callable[[str, int, int], None],
    partial: Path,
    lease: Lease,
) -> None:
    names.refuse_links(store.path)
    captions, final = store.read_captions()["text"].to_pylist(), store.path / TEXT_NAME
    specs = _specs(len(captions), num_words, store.layout.embed_dim, choice)
    attributes = {"captions_sha256": hash_file(store.path / CAPTIONS_NAME), **choice.describe()}
    arrays = _open_partial(partial, specs, attributes)
    for shard, first in enumerate(range(0, len(captions), TEXTS_PER_SHARD)):
        span = slice(first, min(first + TEXTS_PER_SHARD, len(captions)))
        files = [partial / spec.name / key for spec in specs for key in spec.shard_keys(shard)]
        if not all(_is_whole(file, span.stop - span.start, TEXTS_PER_SHARD) for file in files):
            for file in files:
                file.unlink(missing_ok=True)  # else tensorstore would merge the new chunks into it
            texts = encode(captions[span])
            try:
                for name, array in arrays.items():
                    array[span].write(getattr(texts, name)).result()
            except ValueError as error:  # tensorstore raises it for whatever the file system refuses
                raise refused_write(final, error) from error
            kill_point("shard of texts written")
        report("embedding captions", span.stop, len(captions))
    for folder in [*partial.iterdir(), partial]:
        if folder.is_dir():
            sync_folder(folder)
    kill_point("texts written")
    lease.check()
    if final.is_dir():
        _replace_texts(store.path, partial, choice, lease)
    else:
        partial.rename(final)
    sync_folder(store.path)
    kill_point("texts in place")
    write_checksums(store.path)


def _replace_texts(root: Path, fresh: Path, choice: TextChoice, lease: Lease) -> None:
    """Put arrays in the place of those that are there, which are void meanwhile; the texts of classes stay.

    What was asked for stands recorded all the while, wherever a kill comes.
    """
    final = root / TEXT_NAME
    with make_scratch(root, REMOVED_STEM, "extract", lease=lease.nonce) as scratch:
        _retire_texts(root, choice, scratch, lease)
        for name in choice.arrays:
            lease.check()
            (fresh / name).rename(final / name)
        sync_folder(final)
        kill_point("texts moved")
        (fresh / "zarr.json").replace(final / "zarr.json")
        sync_folder(final)


def _retire_texts(root: Path, choice: TextChoice, scratch: Path, lease: Lease) -> None:
    """Have the group say what is asked for and that nothing is there; then take the arrays of captions out of it."""
    final = root / TEXT_NAME
    lease.check()
    write_group(final, choice.describe())
    sync_folder(final)
    kill_point("texts void")
    for name in (*TEXT_ARRAYS, LAYERS_NAME):
        if (final / name).is_dir():
            lease.check()
            (final / name).rename(scratch / name)
    sync_folder(final)
    write_checksums(root)
    kill_point("texts away")


def _open_partial(partial: Path, specs: Sequence[ArraySpec], attributes: dict[str, Any]) -> dict[str, ts.TensorStore]:
    """Arrays to fill: those that a killed process has left, if they are of the same captions and sizes, or new ones."""
    try:
        goes_on = read_json(partial / "zarr.json")["attributes"] == attributes and all(
            _describe_sizes(read_json(partial / spec.name / "zarr.json")) == (spec.shape, spec.dtype, spec.shard_shape)
            for spec in specs
        )
    except (OSError, ValueError, LookupError, TypeError):
        goes_on = False
    if not goes_on:
        shutil.rmtree(partial, ignore_errors=True)
        write_group(partial, attributes)
        return {spec.name: create_array(partial, spec) for spec in specs}
    for file in partial.glob("*/*.__lock"):  # which it was still filling
        file.unlink()
    return {spec.name: open_array(partial, spec.name, write=True) for spec in specs}


def _describe_sizes(metadata: dict[str, Any]) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    shard_shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return tuple(metadata["shape"]), metadata["data_type"], tuple(shard_shape)


def _is_whole(shard: Path, num_texts: int, rows: int) -> bool:
    """Whether a shard is there and holds so many texts, all as they were written."""
    try:
        is_there, problems = verify_shard(shard, rows)
    except DamagedChunkError:
        return False
    return not problems and bool(is_there[:num_texts].all())


def count_text_bytes(num_captions: int, embed_dim: int, num_words: int = MAX_WORDS) -> int:
    """What the texts of so many captions take without `layers`, checksums aside."""
    specs = _specs(num_captions, num_words, embed_dim, TextChoice())
    return sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)


def count_layer_bytes(num_words: int, choice: TextChoice) -> int:
    """What so many words, of all captions together, take in `layers` at most: what is no word is compressed away."""
    return num_words * len(choice.layers) * (choice.width or 0) * 2


def remove_texts(root: Path, lease: Lease, *, is_choice_known: bool = True) -> None:
    """Take the texts of captions out of a store.

    The texts of classes stay, and so does what was asked for of captions.

    Args:
        root: The store.
        lease: Of all that the texts of captions are.
        is_choice_known: Whether what the group records is as it was written.

    Raises:
        LeaseLostError: If another process took over.
    """
    folder = root / TEXT_NAME
    if not folder.is_dir():
        return
    choice = read_text_choice(root) if is_choice_known else TextChoice()
    with make_scratch(root, REMOVED_STEM, "extract", lease=lease.nonce) as scratch:
        lease.check()
        if choice == TextChoice() and not (folder / CLASSES_NAME).is_dir():
            folder.rename(scratch / TEXT_NAME)
            kill_point("texts away")
        else:
            _retire_texts(root, choice, scratch, lease)
        write_checksums(root)


def remove_unfinished_texts(root: Path) -> None:
    """Remove what killed processes have left of texts that nobody asks for any more."""
    if not any(entry.name.startswith(f".{TEXT_NAME}.") for entry in root.iterdir()):
        return
    advice = "run the command again in a moment"
    with hold_lease(root, Scope.manifest(), purpose="extract", wait=True, advice=advice):
        remove_dead_scratch(root, TEXT_NAME)


class TextReader:
    """The texts of a store's captions.

    Raises:
        StoreMismatchError: If the store has no texts, or those of other captions.
    """

    def __init__(self, store: StoreReader) -> None:
        if not has_current_texts(store.path):
            raise StoreMismatchError(
                f"{store.path} holds no texts of its captions: extract a data set with captions, or run the command "
                "that began this store once more, which adds them"
            )
        self._folder = store.path / TEXT_NAME
        self._root = store.path
        self._choice = read_text_choice(store.path)
        self._specs = {name: describe_text_array(store, name) for name in self._choice.arrays}
        if (
            len(
                {
                    spec.shape[spec.dimension_names.index("word")]
                    for spec in self._specs.values()
                    if "word" in spec.dimension_names
                }
            )
            > 1
        ):
            raise StoreDamagedError(f"{self._folder}: its arrays are of other numbers of words. {_MEND}")
        self._arrays = {name: open_array(self._folder, name) for name in self._specs}

    def __len__(self) -> int:
        return int(self._arrays["tokens"].shape[0])

    @property
    def num_words(self) -> int:
        """M."""
        return int(self._arrays["tokens"].shape[1])

    @property
    def choice(self) -> TextChoice:
        """What was asked for of them: which blocks `layers` has, if any."""
        return self._choice

    def describe(self) -> dict[str, dict[str, Any]]:
        """Shape and dtype of each array, of `layers` also the blocks."""
        blocks = {LAYERS_NAME: {"blocks": list(self._choice.layers)}}
        return {
            name: {"shape": list(array.shape), "dtype": array.dtype.name, **blocks.get(name, {})}
            for name, array in self._arrays.items()
        }

    def require(self, arrays: Sequence[str]) -> None:
        """Refuse texts that lack an array.

        Raises:
            StoreMismatchError: If `layers` is wanted and not there.
        """
        if LAYERS_NAME in arrays and not self._choice.layers:
            raise StoreMismatchError(
                f"{self._folder} has no {LAYERS_NAME}: run the command that began this store once more with "
                "--text-layers last4, which adds them"
            )

    def read(self, captions: Sequence[int] | np.ndarray, arrays: Sequence[str] = TEXT_ARRAYS) -> Texts:
        """Texts by their rows, in the order asked for, padded to M words.

        Args:
            captions: Their rows.
            arrays: Of `choice.arrays`; by default those that all texts have.

        Raises:
            StoreMismatchError: If `layers` is asked for and not there.
            StoreDamagedError: If a chunk is missing or its bytes do not match their checksum.
        """
        self.require(arrays)
        rows = np.asarray(captions, dtype=np.int64)
        read = {name: self._read(name, rows) for name in self._specs if name in arrays}
        return Texts(**{**dict.fromkeys(TEXT_ARRAYS), **read})

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        # Every chunk is fetched once, whatever the order and however often a row is asked for.
        wanted, places = np.unique(rows, return_inverse=True)
        if not len(wanted):
            return np.empty((0, *self._arrays[name].shape[1:]), dtype=self._arrays[name].dtype.numpy_dtype)
        spec = self._specs[name]
        for shard in np.unique(wanted // spec.shard_shape[0]).tolist():
            # tensorstore would follow a link, and wait for a pipe.
            file = f"{TEXT_NAME}/{name}/{name_text_shard(spec, shard)}"
            if os.path.lexists(self._root / file):
                names.require_file(self._root, file)
        try:
            values = self._arrays[name].oindex[wanted].read().result()
        except ValueError as error:
            raise StoreDamagedError(f"{self._folder / name} is damaged: {error}. {_MEND}") from error
        # A missing chunk reads as the fill value: NaN, and no word at all.
        flat = values.reshape(len(wanted), -1)
        is_there = np.asarray(flat.any(axis=1) if values.dtype == bool else ~np.isnan(flat[:, 0]))
        if not is_there.all():
            raise StoreDamagedError(f"{self._folder / name} has lost the text {wanted[~is_there][0]}. {_MEND}")
        return values[places]


def name_text_shard(spec: ArraySpec, shard: int) -> str:
    """A shard's file in the folder of an array of texts."""
    return ".".join(["c", str(shard), *["0"] * (len(spec.shape) - 1)])


_MEND = "The command that began the store mends it, with --repair."


def _specs(
    num_captions: int, num_words: int, embed_dim: int, choice: TextChoice, rows: int | None = None
) -> tuple[ArraySpec, ...]:
    """Chunks of one caption: a step of training wants single ones, from anywhere."""
    rows = rows or TEXTS_PER_SHARD
    specs = (
        ArraySpec(
            name="tokens",
            shape=(num_captions, num_words, embed_dim),
            dtype="float16",
            shard_shape=(rows, num_words, embed_dim),
            chunk_shape=(1, num_words, embed_dim),
            dimension_names=("caption", "word", "channel"),
        ),
        ArraySpec(
            name="mask",
            shape=(num_captions, num_words),
            dtype="bool",
            shard_shape=(rows, num_words),
            chunk_shape=(1, num_words),
            dimension_names=("caption", "word"),
        ),
        ArraySpec(
            name="embedding",
            shape=(num_captions, embed_dim),
            dtype="float32",
            shard_shape=(rows, embed_dim),
            chunk_shape=(1, embed_dim),
            dimension_names=("caption", "channel"),
        ),
    )
    if not choice.layers:
        return specs
    assert choice.width is not None
    words = (len(choice.layers), num_words, choice.width)
    layers = ArraySpec(
        name=LAYERS_NAME,
        shape=(num_captions, *words),
        dtype="float16",
        shard_shape=(rows, *words),
        chunk_shape=(1, *words),
        dimension_names=("caption", "layer", "word", "channel"),
        is_compressed=True,  # most captions are far shorter than the longest: their zeros take nothing
    )
    return (*specs, layers)
