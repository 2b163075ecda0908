"""What a store says of itself, by name and type: a view of its attributes, in which nothing is looked up by a string.

A fact is read when it is asked for. One that a store lacks, from before it was recorded, is an error only then.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from .attributes import Attributes
from .layout import CODEC_GROUPS, CODED_ARRAY, DEFAULT_CODEC, IDENTITY_CODEC, PatchDtype
from .offsets import DEFAULT_PIXEL_EDGE
from .records import count_augmented, name_views

RANDOM_WEIGHTS = "random"
"""How the weights of a backbone begin that was not trained: `random:SEED`."""


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """Which videos a store was made of. Each fact raises StoreDamagedError where the store lacks it."""

    attributes: Attributes

    @property
    def name(self) -> str:
        """Of the data set, or of the way in which its videos were listed."""
        return self.attributes["name"]

    @property
    def protocol(self) -> str | None:
        """How the data set is divided; None where there is one way alone."""
        return self.attributes.get("protocol")

    @property
    def root(self) -> str | None:
        """Folder below which the videos lay."""
        return self.attributes["root"]


@dataclass(frozen=True, slots=True)
class BackboneFacts:
    """The frozen tower that made a store's tokens. Each fact raises StoreDamagedError where the store lacks it."""

    attributes: Attributes

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return self.attributes["name"]

    @property
    def architecture(self) -> str:
        """The name that its library has for it."""
        return self.attributes["architecture"]

    @property
    def weights(self) -> str:
        """`random:SEED`, a tag, or the file's path."""
        return self.attributes["weights"]

    @property
    def has_random_weights(self) -> bool:
        """Whether it was never trained."""
        return self.weights.startswith(RANDOM_WEIGHTS)

    @property
    def weights_sha256(self) -> str:
        """Of the weights' file; for random weights, of what they are drawn from."""
        return self.attributes["weights_sha256"]

    @property
    def has_class_token(self) -> bool:
        """Whether the tower has one of its own."""
        return self.attributes.get("has_class_token", True)

    @property
    def has_text_tower(self) -> bool:
        """Whether its embeddings can be asked by text."""
        return self.attributes.get("has_text_tower", True)

    @property
    def width(self) -> int:
        """D."""
        return self.attributes["width"]

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.attributes["depth"]

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.attributes["embed_dim"]

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels down and across."""
        height, width = self.attributes["patch_size"]
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        down, across = self.attributes["grid"]
        return down, across

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels down and across: H, W."""
        height, width = self.attributes["image_size"]
        return height, width

    @property
    def own_image_size(self) -> tuple[int, int] | None:
        """What the weights were made for, where the tower was resized; None where `image_size` is that."""
        size = self.attributes.get("own_image_size")
        return None if size is None else (size[0], size[1])

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of each colour from 0 to 1, subtracted first."""
        red, green, blue = self.attributes["mean"]
        return red, green, blue

    @property
    def std(self) -> tuple[float, float, float]:
        """Of each colour, divided by."""
        red, green, blue = self.attributes["std"]
        return red, green, blue


@dataclass(frozen=True, slots=True)
class CodecFacts:
    """A codec that a store records; every store has all of that of its patches."""

    dtype: PatchDtype
    """Of the codes."""
    parts: tuple[str, ...]
    """Names of the arrays that it has."""
    name: str
    """Of the kind, in the table of store/codecs."""
    sha256: str
    """Of dtype and arrays: codes of stores that have the same may stand beside each other."""


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What a store says of itself. Each fact raises StoreDamagedError where the store lacks it."""

    attributes: Attributes
    """Its `s4v` attribute, checked."""

    @property
    def format_version(self) -> int:
        """Of the store's format."""
        return self.attributes["format_version"]

    @property
    def created(self) -> str:
        """When its extraction began, in ISO 8601."""
        return self.attributes["created"]

    @property
    def dataset(self) -> DatasetFacts:
        """Which videos."""
        return DatasetFacts(self.attributes["dataset"])

    @property
    def backbone(self) -> BackboneFacts:
        """Which frozen tower."""
        return BackboneFacts(self.attributes["backbone"])

    @property
    def codec(self) -> CodecFacts:
        """How patches are coded."""
        return self.codecs[CODED_ARRAY]

    @property
    def codecs(self) -> dict[str, CodecFacts]:
        """By array of frames that is coded: patches in every store, class tokens in some."""
        recorded = {array: self.attributes[name] for array, name in CODEC_GROUPS.items() if name in self.attributes}
        return {
            # Today's codec records no name: stores stay what they were.
            array: CodecFacts(one["dtype"], tuple(one["parts"]), one.get("name", DEFAULT_CODEC), one["sha256"])
            for array, one in recorded.items()
        }

    @property
    def codecs_sha256(self) -> str:
        """Of all its codecs together, which done-markers record; where patches alone are coded, their codec's."""
        hashes = [codec.sha256 for codec in self.codecs.values()]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def codec_of(self, array: str) -> str:
        """The name of the codec of an array of frames; stores from before format 3 code patches alone."""
        known = {CODED_ARRAY: self.codec.name, **self.attributes.get("codecs", {})}
        return known.get(array, IDENTITY_CODEC)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return tuple(self.attributes["classes"]["names"])

    @property
    def sampling(self) -> str:
        """Which frames are cached, by the rule's name."""
        return self.attributes["sampling"]

    @property
    def resize(self) -> str:
        """How frames were resized before the crop, by the rule's name."""
        return self.attributes["resize"]

    @property
    def pixel_edge(self) -> str:
        """What stands in the place of pixel frames before a row's first frame, by the rule's name."""
        return self.attributes.get("pixel_edge", DEFAULT_PIXEL_EDGE)

    @property
    def frames(self) -> dict[str, int]:
        """Cached frames of a row, by split; the key "" is for splits that are not named.

        Empty where rows are as long as their videos.
        """
        return dict(self.attributes["frames"])

    @property
    def is_open_ended(self) -> bool:
        """Whether rows hold as many frames as they are long, and not a number of their split's."""
        return not self.frames

    @property
    def clips(self) -> dict[str, int]:
        """Evaluation clips of a row, by split."""
        return dict(self.attributes.get("clips") or {"": 1})

    @property
    def validation_clip(self) -> tuple[str, ...]:
        """Splits whose rows hold one clip more, for training's validation."""
        return tuple(self.attributes.get("validation_clip") or ())

    @property
    def views(self) -> dict[str, str]:
        """Names of the views of a row, by split."""
        return dict(self.attributes.get("views") or {"": "centre"})

    @property
    def recipe(self) -> str | None:
        """The data set whose recipe the extraction took; None where there was none, or none was recorded."""
        return self.attributes.get("recipe")

    def centre_view(self, split: str) -> int:
        """Which view of a row of a split is the centre of the picture, as it is; 0 where none is named so."""
        names = name_views(self.views_of(split))
        return names.index("centre") if "centre" in names else 0

    def views_of(self, split: str) -> str:
        """The name of the views of a row of a split."""
        views = self.views
        return views.get(split, views.get("", "centre"))

    def is_augmented(self, split: str) -> bool:
        """Whether rows of a split have views that were drawn for training: all else looks at their centre alone."""
        return count_augmented(self.views_of(split)) > 0

    @property
    def augmentation(self) -> tuple[str, ...] | None:
        """The steps that augmented views were drawn with; None where there are none."""
        steps = self.attributes.get("augmentation")
        return None if steps is None else tuple(steps)

    @property
    def segment_s(self) -> float | None:
        """Seconds of the segments into which videos are cut; None where they are whole."""
        return self.attributes.get("segment_s")

    @property
    def codec_from(self) -> str | None:
        """The store whose codec was taken over; None where it was fitted here."""
        return self.attributes.get("codec_from")

    @property
    def seed(self) -> int:
        """Of whatever was drawn."""
        return self.attributes["seed"]

    @property
    def calibration_videos(self) -> int:
        """How many videos the codec was fitted on, at most."""
        return self.attributes["calibration_videos"]
