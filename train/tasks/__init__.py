"""What a training is for: one file a task, and its line in this table."""

from __future__ import annotations

from ...errors import ConfigError
from .contract import Task
from .recognition import Recognition
from .retrieval import Retrieval

TASKS: dict[str, type[Task]] = {task.name: task for task in (Recognition, Retrieval)}
"""By the name that `--task` takes; the first is the default."""


def find_task(name: str) -> type[Task]:
    """A task by its name.

    Raises:
        ConfigError: With the names that there are.
    """
    if name not in TASKS:
        raise ConfigError(f"--task takes {', '.join(TASKS)}; found {name!r}")
    return TASKS[name]
