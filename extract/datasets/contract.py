"""What a data set is to the rest of s4v: a reader in the table, and for a public one what is known of it beforehand.

A new data set is one file here with its `READER`, and its line in the table of `__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...store.records import VideoRecord
from ._files import DatasetFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionRecipe:
    """Which frames and crops of a data set's videos are cached where nobody says otherwise; a new store is made so.

    What goes by split has the key "" for splits that are not named.
    """

    name: str | None = None
    """Of the data set that a paper has it for: training takes the presets of that one too. None is nobody's."""
    told_as: str = "s4v's own"
    """Whose it is, in a few words."""
    network: str | None = None
    """Whose needs a new store serves beside that, as `--for` sets them; None is nobody's."""
    frames: Mapping[str, int] = field(default_factory=lambda: {"train": 16, "": 8})
    """Cached frames of a row."""
    sampling: str = "uniform"
    """A name in `SAMPLINGS`, for all rows but training's."""
    clips: Mapping[str, int] = field(default_factory=lambda: {"": 1})
    """Evaluation clips, which share the frames evenly."""
    validation_clip: tuple[str, ...] = ()
    """Splits whose rows hold one clip more, which shares the frames too: the one that training validates on."""
    resize: str = "256"
    """A name in `RESIZES`."""
    views: Mapping[str, str] = field(default_factory=lambda: {"": "centre"})
    """Names in `VIEWS`, or `augment:N`."""
    augmentation: tuple[str, ...] = ("crop", "flip", "grey")
    """How `augment:N` draws views: of `STEPS` in decode/augmented_views.py. That of Kinetics, where no paper says."""


PLAIN_RECIPE = ExtractionRecipe()
"""Of data sets that no paper has a recipe for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """One public data set, before anyone looks at a disk; as JSON it is what `s4v datasets NAME` tells."""

    name: str
    title: str
    source: str
    """What to look for: the official page or archive."""
    layout: tuple[str, ...]
    """Expected below the root, one line an entry."""
    annotation_folders: tuple[str, ...] = ()
    """Folders below the root that hold its annotation files, beside `annotations/` and `labels/`."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Official number of rows: protocol ("" where there is only one) -> split -> rows. What is not sure is left out."""
    query_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """The same of queries, where a video has several of them with their moments."""
    num_classes: int | None = None
    protocols: tuple[str, ...] = ()
    """Ways to divide the videos that papers report; the first is the default."""
    clip_settings: str = ""
    """How papers take clips of it."""
    recipe: ExtractionRecipe = PLAIN_RECIPE
    """What is cached of it where nobody says otherwise."""
    frame_fps: float | None = None
    """Rate of its frame folders, where it is distributed as JPEG files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """What the user says of the annotations; a reader takes what it knows."""

    protocol: str | None = None
    """One of `DatasetFacts.protocols`, or None where there are none."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Role (`path`, `label`, ...) -> column name."""
    with_classes: bool = True
    """Whether folders are classes."""


Read = Callable[[DatasetFiles, ReadOptions], list[VideoRecord] | None]
"""Annotation files and videos to records, in any order; see `DatasetReader.read`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetReader:
    """A data set that `--dataset` takes: a public one, with its facts, or a form that anybody's files may have."""

    name: str
    """What `--dataset` takes."""
    read: Read
    """A record for each row. Of a public data set it reads the official annotation files; None says that there are none
    of them, and then lists or folders are read. Raises DatasetError for malformed rows, all of them in one message."""
    facts: DatasetFacts | None = None
    """Of a public data set; None for a form of files, which needs a root."""
    read_folder: Callable[[DatasetFiles], list[VideoRecord]] | None = None
    """How videos of a public data set in folders by class are read without annotations; None takes the plain way."""
    find_protocol: Callable[[DatasetFiles], str | None] | None = None
    """The protocol of a recipe whose annotation files are there; None, or None of it, takes the first one."""
    may_be_mirrored: bool = True
    """Whether a mirror image still shows the video's class or captions: not where they tell left from right."""
    takes_annotations: bool = True
    """Whether `--annotations` means anything to it."""
    takes_columns: bool = False
    """Whether its annotations have columns that the user may name (`--column`)."""
    takes_archives: bool = False
    """Whether its folders may be no classes (`--no-classes`)."""
    names_files: bool = False
    """Whether its rows name files as they please: with any ending, and not all that lie below the root."""

    @property
    def recipe(self) -> ExtractionRecipe:
        """What is cached of its videos where nobody says otherwise."""
        return PLAIN_RECIPE if self.facts is None else self.facts.recipe
