"""What stands where an extraction writes: found once, and passed on to all that ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..backbone.facts import describe_size
from ..errors import StoreMismatchError
from ..store.append import finish_appending, is_half_appended
from ..store.info import count_statuses
from ..store.reader import StoreReader, is_store, open_store
from .config import ExtractConfig

State = Literal["new", "half appended", "begun", "finished"]


@dataclass(frozen=True, slots=True)
class Target:
    """The place that an extraction writes to. `find` looks and changes nothing."""

    path: Path
    reader: StoreReader | None = None
    """The store that the extraction goes on with, as it was when it was found; None where there is none to go on with:
    nothing, something to be replaced, or a store that is half appended to."""
    is_half_appended: bool = False
    """Whether an `--append` was killed there: the store has no reader before `finish_append`."""

    @classmethod
    def find(cls, config: ExtractConfig) -> Target:
        """Look at `config.out`; a store that `--overwrite` replaces is not opened.

        Raises:
            StoreError: If there is a store that cannot be opened.
            StoreMismatchError: If it has another codec, or frames of another size, than was asked for.
        """
        if config.overwrite or not is_store(config.out):
            return cls(config.out)
        if is_half_appended(config.out):
            return cls(config.out, is_half_appended=True)
        reader = open_store(config.out)
        codec_name = reader.facts.codec.name
        if config.codec_from is None and config.codec != codec_name:
            raise StoreMismatchError(
                f"{config.out} was begun with --codec {codec_name}; found {config.codec}. Give what it was begun with."
            )
        if config.input_size not in (None, begun := reader.facts.backbone.image_size):
            assert config.input_size is not None
            raise StoreMismatchError(
                f"{config.out} was begun with frames of {describe_size(begun)}; found --input "
                f"{describe_size(config.input_size)}. Leave --input out, or extract another store."
            )
        return cls(config.out, reader)

    def finish_append(self) -> Target:
        """Complete the `--append` that was killed here; returns the store with all of its rows.

        Raises:
            StoreBusyError: If another process writes to the store.
            StoreDamagedError: If what was prepared is not what an append prepares; nothing was changed.
        """
        finish_appending(self.path)
        return Target(self.path, open_store(self.path))

    @property
    def goes_on(self) -> bool:
        """Whether there is a store to go on with."""
        return self.reader is not None

    @property
    def segment_s(self) -> float | None:
        """Seconds of the segments into which the store's videos are cut; None where they are whole."""
        return None if self.reader is None else self.reader.facts.segment_s

    @property
    def state(self) -> State:
        """What there is to go on with; the rows' statuses are read now."""
        if self.reader is None:
            return "half appended" if self.is_half_appended else "new"
        return "begun" if count_statuses(self.reader)["pending"] else "finished"
