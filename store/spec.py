"""What a command makes a store of, as one thing, and how that differs from a store that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import StoreError
from . import manifest
from .codecs.contract import Codec
from .layout import CODEC_GROUPS, CODED_ARRAY, CUT_VERSION, DEFAULT_CODEC, IDENTITY_CODEC, StoreLayout
from .reader import StoreReader, open_store
from .records import VideoRecord, count_augmented

# May differ between two runs without making their stores differ: data, weights and a codec's source may lie elsewhere
# by now. What they are is told by paths below the root, by the weights' hash and by the codec's. The activation follows
# from the architecture, and older stores do not tell it.
_VOLATILE_ATTRIBUTES = (
    "created",
    "format_version",
    *CODEC_GROUPS.values(),
    "codec_from",
    "dataset.root",
    "backbone.weights",
    "backbone.activation",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSpec:
    """All that a store is made of before its first shard."""

    layout: StoreLayout
    """Sizes of the arrays."""
    attributes: Mapping[str, Any]
    """What to record in the group's `s4v` attribute beside format version, layout and codec."""
    records: Sequence[VideoRecord]
    """Row v of every array is record v."""
    codec: Codec | None = None
    """How patches are coded, numpy arrays; None means that of the store that is there."""
    cls_codec: Codec | None = None
    """How class tokens are coded; None where they are not, or as the store that is there codes them."""
    head: Mapping[str, np.ndarray] | None = None
    """What stage two needs of the frozen tower's end, by name; None means that of the store that is there. It is empty
    where the embedding is no projection of a norm of the class token: the store has no `head` then."""

    def with_codecs_of(self, store: StoreReader) -> StoreSpec:
        """The same with a store's codecs."""
        return replace(self, codec=store.codec, cls_codec=store.cls_codec)

    def filled_from(self, store: StoreReader) -> StoreSpec:
        """The same as a store was begun: of its date, and with its codecs and tower's end where none are given."""
        return replace(
            self,
            attributes={**self.attributes, "created": store.facts.created},
            codec=store.codec if self.codec is None else self.codec,
            cls_codec=store.cls_codec if self.cls_codec is None else self.cls_codec,
            head=(store.head if store.has_head else {}) if self.head is None else self.head,
        )

    @property
    def codecs(self) -> dict[str, Codec]:
        """By array of frames that is coded; with a codec alone."""
        assert self.codec is not None
        return {CODED_ARRAY: self.codec, **({} if self.cls_codec is None else {"cls": self.cls_codec})}

    def full_attributes(self) -> dict[str, Any]:
        """The group's `s4v` attribute; with a codec alone."""
        sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.layout).items()}
        if not self.layout.frames_per_block:
            del sizes["frames_per_block"]  # of formats that do not know it
        sizes["pixel_offsets"] = [offset.recorded for offset in self.layout.pixel_offsets]
        if sizes["class_tokens"] == "own":
            del sizes["class_tokens"]  # as in all stores from before there was a choice
        if sizes["pixel_format"] == "rgb":
            del sizes["pixel_format"]
        if not self.layout.is_cls_coded:
            del sizes["coded_cls_dtype"], sizes["coded_cls_channels"]
        return {
            "format_version": self.format_version,
            **self.attributes,
            "layout": {**sizes, "pixel_offsets_unit": "frame"},
            **{CODEC_GROUPS[array]: _describe_codec(codec) for array, codec in self.codecs.items()},
            **({"codecs": self._name_codecs()} if self.layout.frames_per_block else {}),
        }

    def _name_codecs(self) -> dict[str, str]:
        """By array of frames: those that are not coded are as they are."""
        coded = {array: codec.name for array, codec in self.codecs.items()}
        return {spec.name: coded.get(spec.name, IDENTITY_CODEC) for spec in self.layout.array_specs()}

    @property
    def format_version(self) -> int:
        """The lowest that a new store of these attributes is read right by."""
        views = self.attributes.get("views") or {}
        is_augmented = any(map(count_augmented, views.values()))
        return max(self.layout.format_version, CUT_VERSION if is_augmented else 0)

    def input_table(self) -> pa.Table:
        """The manifest's input columns of its records."""
        classes = manifest.ClassList(tuple(self.attributes["classes"]["names"]))
        return manifest.input_table(self.records, classes)


def list_differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two stores' attributes, beside what may."""
    differences = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if old == new or prefix + key in _VOLATILE_ATTRIBUTES:
            continue
        if prefix == "codecs." and None in (old, new):
            continue  # one of them has no such array: the layout says so
        if prefix + key == "backbone.name" and all(str(name).endswith(".json") for name in (old, new)):
            continue  # the file of a configuration, whose hash is in the architecture: it may lie elsewhere by now
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += list_differences(old, new, f"{prefix}{key}.")
        else:
            differences.append(f"{prefix}{key} {_shorten(old)} there, {_shorten(new)} here")
    return differences


def list_codec_differences(store: StoreReader, spec: StoreSpec) -> list[str]:
    """Whether a command that names the source of its codec means the one that the store has.

    Which path it names does not matter: the codec's hash decides, and where the source is no longer there, nothing.
    """
    found, wanted = store.facts.codec_from, spec.attributes.get("codec_from")
    if wanted is None:
        return [] if found is None else [f"codec_from {_shorten(found)} there, None here"]
    try:
        source = open_store(wanted).facts
    except StoreError:
        return [] if found is not None else [f"codec_from None there, {_shorten(wanted)} here"]
    return [
        f"the codec of {wanted} is not the one there{'' if array == CODED_ARRAY else f', for {array}'}"
        for array, codec in store.facts.codecs.items()
        if source.codecs.get(array) != codec
    ]


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe_codec(codec: Codec) -> dict[str, Any]:
    facts = {"dtype": codec.dtype, "parts": sorted(codec.parts), "sha256": codec.sha256}
    return facts if codec.name == DEFAULT_CODEC else {**facts, "name": codec.name}
