"""Where the metrics of each epoch go beside metrics.jsonl: TensorBoard always, Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, EnvironmentFailedError
from ..files import write_text
from .config import TrainConfig
from .run_folder import Run

_WANDB_ID_NAME = "wandb_id.txt"

Logger = Callable[[dict[str, Any]], None]
"""Takes the metrics of one epoch."""


def make_loggers(run: Run, config: TrainConfig, epochs_done: int) -> list[Logger]:
    """All loggers of a run; see `require_wandb`.

    Raises:
        EnvironmentFailedError: If wandb cannot begin: nobody is logged in, or its server does not answer.
    """
    loggers = [_make_tensorboard(run, epochs_done)]
    return [*loggers, _make_wandb(run, config.wandb)] if config.wandb is not None else loggers


def _make_tensorboard(run: Run, epochs_done: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    # What was logged of an epoch that is trained again is hidden.
    board = SummaryWriter(run.path, purge_step=epochs_done + 1 if epochs_done else None)

    def log(metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            board.add_scalar(name, value, metrics["epoch"])
        board.flush()

    return log


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

    def log(metrics: dict[str, Any]) -> None:
        session.log(metrics, step=metrics["epoch"])

    return log
