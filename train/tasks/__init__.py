"""What a training is for: one file a task, and its line in this table."""

from __future__ import annotations

from ...errors import ConfigError
from ...store.reader import StoreReader
from .contract import Task
from .recognition import Recognition
from .retrieval import Retrieval

TASKS: dict[str, type[Task]] = {task.name: task for task in (Recognition, Retrieval)}
"""By the name that `--task` takes; the first is the default."""


def choose_task(store: StoreReader) -> str:
    """The name of the task that a store was made for; the default where it looks as if for none, or for several."""
    return next((name for name, task in TASKS.items() if task.fits(store)), next(iter(TASKS)))


def find_task(name: str) -> type[Task]:
    """A task by its name.

    Raises:
        ConfigError: With the names that there are.
    """
    if name not in TASKS:
        raise ConfigError(f"--task takes {', '.join(TASKS)}; found {name!r}")
    return TASKS[name]
