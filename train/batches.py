"""How the clips of a step are shared out among processes and batches, and which of them a batch norm counts together.

What is learnt depends on two numbers: the clips of a step, and those that a batch norm counts. A preset holds both.
Processes, and batches of one step (`--accumulate`), share the step out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .recipe import Recipe

if TYPE_CHECKING:
    from .config import TrainConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepShares:
    """The clips of one step of the optimiser."""

    processes: int
    accumulate: int
    """Batches of each process."""
    batch_size: int
    """Clips of each batch."""
    norm_clips: int | None
    """That a batch norm counts together; None is a batch of all processes."""

    @classmethod
    def of_config(cls, config: TrainConfig, num_processes: int) -> StepShares:
        """Those of resolved options."""
        assert config.batch_size is not None
        return cls(num_processes, config.accumulate, config.batch_size, config.norm_clips)

    @classmethod
    def of_run(cls, recorded: Mapping[str, Any]) -> StepShares:
        """Those of a run's recorded options; a run from before there was a choice counted a batch of all processes."""
        return cls(
            recorded.get("processes", 1),
            recorded.get("accumulate", 1),
            recorded["batch_size"],
            recorded.get("norm_clips"),
        )

    @property
    def clips(self) -> int:
        """Of the whole step."""
        return self.processes * self.accumulate * self.batch_size

    @property
    def processes_per_norm(self) -> int:
        """Whose batches one group of a batch norm is made of."""
        return max(1, (self.norm_clips or self.batch_size * self.processes) // self.batch_size)

    @property
    def is_possible(self) -> bool:
        """Whether groups of a batch norm fill batches, or batches of some of the processes fill groups."""
        if self.norm_clips is None or self.batch_size % self.norm_clips == 0:
            return True
        return self.norm_clips % self.batch_size == 0 and self.processes % self.processes_per_norm == 0

    def learns_as(self, other: StepShares) -> bool:
        """Whether another sharing out of the same step teaches the same, rounding aside."""
        # Norms that count all of a batch count something else once a step has other batches.
        same_norms = self.norm_clips == other.norm_clips and (
            self.norm_clips is not None or self.accumulate == other.accumulate
        )
        return self.clips == other.clips and same_norms

    def describe(self, available: int | None = None, *, has_norms: bool = True) -> str:
        """`256 clips a step: 8 processes of 32; batch norms count 32`.

        Args:
            available: Clips of an epoch; None knows nothing of them.
            has_norms: Whether the network has batch norms.
        """
        parts = [f"{self.processes} processes" if self.processes > 1 else ""]
        parts += [f"{self.accumulate} batches" if self.accumulate > 1 else ""]
        shares = " of ".join(part for part in parts if part)
        text = f"{self.clips} clips a step" + (f": {shares} of {self.batch_size}" if shares else "")
        if available is not None and available < self.clips:
            text += f", of which an epoch has {available}"
        if has_norms:
            text += f"; batch norms count {self.norm_clips or self.batch_size * self.processes}"
            text += f", of {self.processes_per_norm} processes" if self.crosses_processes else ""
        return text

    @property
    def crosses_processes(self) -> bool:
        """Whether a batch norm counts clips of several processes."""
        return self.processes_per_norm > 1


def resolve_batches(config: TrainConfig, recipe: Recipe, preset: str | None, num_processes: int) -> dict[str, Any]:
    """`batch_size` and `norm_clips`: as they were given, else the recipe's share.

    Args:
        config: Options as given.
        recipe: That of the preset, or of task and network where there is none.
        preset: Its name; None where there is none.
        num_processes: That train together.

    Raises:
        ConfigError: If a step, or the clips that a norm counts, cannot be shared out so.
    """
    is_named = config.preset == preset
    step_clips = recipe.step_clips if is_named else recipe.batch_size if recipe.is_batch_of_all else None
    share = recipe.batch_size
    if config.batch_size is not None:
        share = config.batch_size
    elif step_clips is not None:
        share = _share_out(step_clips, num_processes, config.accumulate)
    usual = None if preset is None else recipe.norm_clips
    shares = StepShares(num_processes, config.accumulate, share, config.norm_clips or usual)
    if not shares.is_possible:
        if config.norm_clips is None and config.batch_size is not None:
            shares = replace(shares, norm_clips=None)
        else:
            raise ConfigError(_refuse_norms(shares, config.norm_clips is None, preset))
    return {"batch_size": shares.batch_size, "norm_clips": shares.norm_clips}


def _share_out(step_clips: int, num_processes: int, accumulate: int) -> int:
    share, rest = divmod(step_clips, num_processes * accumulate)
    if rest or not share:
        batches = f" with {accumulate} batches each (--accumulate)" if accumulate > 1 else ""
        raise ConfigError(
            f"a step of {step_clips} clips cannot be shared out evenly among {num_processes} processes{batches}: "
            "give --batch-size, the clips of each"
        )
    return share


def _refuse_norms(shares: StepShares, is_of_preset: bool, preset: str | None) -> str:
    whose = f"batch norms of {preset}" if is_of_preset else "batch norms (--norm-clips)"
    processes = f"{shares.processes} processes" if shares.processes > 1 else "one process"
    return (
        f"{whose} count {shares.norm_clips} clips; batches of {shares.batch_size} by {processes} make no such group. "
        "Batches that follow each other are never counted together. Take fewer of --accumulate, other processes, or "
        f"--norm-clips {shares.batch_size}"
    )


def keep_recorded_batches(given: TrainConfig, recorded: Mapping[str, Any], num_processes: int) -> StepShares:
    """The step with which a run goes on: the one that it was begun with, shared out anew among other processes.

    Args:
        given: Options as given; `batch_size` may be what each process had.
        recorded: Options of the run that goes on.
        num_processes: That go on with it.

    Raises:
        ConfigError: If its step cannot be shared out among so many.
    """
    begun = StepShares.of_run(recorded)
    norm_clips = begun.norm_clips if given.norm_clips is None else given.norm_clips
    batch_size = begun.batch_size
    if (begun.processes, begun.accumulate) != (num_processes, given.accumulate):
        batch_size = _share_out(begun.clips, num_processes, given.accumulate)
    if given.batch_size not in (None, begun.batch_size):
        batch_size = given.batch_size  # another run: it is refused with all differences
    shares = StepShares(num_processes, given.accumulate, batch_size, norm_clips)
    if not shares.is_possible:
        raise ConfigError(_refuse_norms(shares, given.norm_clips is None, "this run"))
    return shares


def warn_of_other_step(given: TrainConfig, resolved: TrainConfig, recipe: Recipe, clips: int) -> None:
    """Say that a preset's rate is not that of a step of so many clips: it is never scaled in silence, nor left so."""
    if recipe.step_clips in (None, clips) or given.learning_rate is not None:
        return
    whose, hint = "", ""
    if resolved.preset != "none":
        whose = f" of {resolved.preset}"
        what = f"--preset {resolved.preset}" if given.preset != resolved.preset else "Without --batch-size it"
        hint = f" {what} takes {recipe.step_clips} (--accumulate N makes N batches of them)."
    _log.warning(
        "a step has %d clips; the learning rate%s, %g, is of steps of %d and is not scaled.%s --learning-rate sets "
        "another.",
        *(clips, whose, resolved.learning_rate, recipe.step_clips, hint),
    )
