"""Where figures of epochs and steps go beside JSON lines: TensorBoard always, Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, EnvironmentFailedError
from ..files import write_text
from .config import TrainConfig
from .run_folder import Run

_WANDB_ID_NAME = "wandb_id.txt"

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Logger:
    """One place where figures go."""

    log_epoch: Log
    """Takes the metrics of an epoch."""
    log_step: Log
    """Takes what is told of a step: train/step_log.py."""


def make_loggers(run: Run, config: TrainConfig, epochs_done: int, steps_done: int) -> list[Logger]:
    """All loggers of a run; see `require_wandb`.

    Raises:
        EnvironmentFailedError: If wandb cannot begin: nobody is logged in, or its server does not answer.
    """
    loggers = [_make_tensorboard(run, epochs_done, steps_done)]
    return [*loggers, _make_wandb(run, config.wandb)] if config.wandb is not None else loggers


def _make_tensorboard(run: Run, epochs_done: int, steps_done: int) -> Logger:
    # What was logged of an epoch that is trained again is hidden. Steps have a folder of their own: they are hidden by
    # their own number.
    epochs = _open_board(run.path, epochs_done)
    steps: list[Any] = []

    def log_epoch(metrics: dict[str, Any]) -> None:
        _add_scalars(epochs, metrics, metrics["epoch"])

    def log_step(facts: dict[str, Any]) -> None:
        if not steps:  # a short run tells of none
            steps.append(_open_board(run.path / "steps", steps_done))
        _add_scalars(steps[0], facts, facts["step"])

    return Logger(log_epoch, log_step)


def _open_board(folder: Path, num_done: int) -> Any:
    """A writer whose file TensorBoard reads after those that are there, of which it hides what is told again.

    Files are read in the order of their names: the second that they began in, then host, process and a counter. Of one
    second 10 would come before 9, so a second file begins in a later one.
    """
    from torch.utils.tensorboard import SummaryWriter

    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.02)
    return SummaryWriter(folder, purge_step=num_done + 1 if num_done else None)


def _add_scalars(board: Any, values: dict[str, Any], place: int) -> None:
    for name, value in values.items():
        if value is not None:
            board.add_scalar(name, value, place)
    board.flush()


def require_wandb(config: TrainConfig) -> None:
    """Told before a run's folder is made.

    Raises:
        ConfigError: If wandb is asked for and not installed.
    """
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs the package wandb: pip install wandb, or leave the option out")


def _make_wandb(run: Run, project: str) -> Logger:
    import wandb  # type: ignore[import-not-found]

    # Kept in the folder, so that a run that goes on is the same one there too, and another in its place is not.
    path = run.path / _WANDB_ID_NAME
    if not path.is_file():
        write_text(path, uuid.uuid4().hex)
    try:
        session = wandb.init(
            project=project,
            id=path.read_text(encoding="utf-8"),
            name=run.path.name,
            dir=run.path,
            config=run.config,
            resume="allow",
        )
    except wandb.Error as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise EnvironmentFailedError(
            f"wandb does not begin a run (--wandb): {reason}. Mend that, or set WANDB_MODE=offline, and run the same "
            "command with --resume."
        ) from error

    # Each kind of figure has its own axis: wandb's own steps, one an entry, must only rise.
    session.define_metric("*", step_metric="epoch")
    session.define_metric("step/*", step_metric="step/step")
    return Logger(session.log, lambda facts: session.log({f"step/{name}": value for name, value in facts.items()}))
